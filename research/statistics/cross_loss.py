"""Networks trained with each loss, scored under every loss: which of them is good at what.

A network that was trained with cross entropy may be the better one even by mean squared error. The
table has a row for each trained network and a column for each loss, with accuracy and calibration
beside them. All of it is on pictures that were kept for validation, each network's own: the test
split is not looked at. As the best checkpoint was chosen on them, the figures flatter all rows.

`score` takes networks and batches, `score_recorded` checkpoints of `research.fit`. Each network
sees the pictures once, and all losses are computed of these scores. A column is a loss with the
default settings of its class, in its own scale, so that it has one meaning for all rows and values
compare within a column only. A loss on the cells of a map sees one cell, the scores that decide;
`own_loss` is that of the network's own loss as it was set in training, cells and all.

    N   pictures of a validation split
    C   classes
"""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from research.building import build_data
from research.checkpoints.trained import Checkpoint, build_trained, read_checkpoint, settings_of
from research.classifier import votes
from research.configuration.compose import CommandLine, ConfigurationError
from research.configuration.schema import Configuration, known_classes, resolve
from research.data.batches import Batches
from research.data.kept import Kept
from research.data.module import DataError
from research.evaluation import Predictions, judge
from research.losses import ClassificationLoss

JUDGED = ("accuracy", "expected_calibration_error", "brier_score", "negative_log_likelihood")

Batch = tuple[Tensor, Tensor]
Losses = Mapping[str, ClassificationLoss]


@dataclass(frozen=True)
class Row:
    """A network's figures on its validation pictures.

    `losses` by class name; `judged` has the figures of `research.evaluation` that JUDGED names,
    with probabilities as the network's own loss reads them. nan and infinities are left as such.
    """

    arm: str
    trained_on: str
    losses: Mapping[str, float]
    own_loss: float
    judged: Mapping[str, float]
    pictures: int


@dataclass(frozen=True)
class Average:
    """An arm's rows taken together: mean, and standard deviation (nan for one row), by measure."""

    arm: str
    trained_on: str
    rows: int
    mean: Mapping[str, float]
    deviation: Mapping[str, float]


@dataclass(frozen=True)
class CrossLosses:
    """The table; `measures` are its columns, accuracy and the like first.

    `left_out` are losses without a column, `failed` checkpoints without a row, with the reason.
    """

    rows: tuple[Row, ...]
    measures: tuple[str, ...]
    left_out: Mapping[str, str]
    failed: Mapping[str, str]

    def averages(self) -> tuple[Average, ...]:
        """A line for each arm, over its seeds."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.arm, row.trained_on), []).append(row)
        return tuple(averaged(*key, rows, self.measures) for key, rows in groups.items())


def lower_is_better(measure: str) -> bool:
    return measure != "accuracy"


def averaged(arm: str, trained_on: str, rows: Sequence[Row], measures: Sequence[str]) -> Average:
    means, deviations = {}, {}
    for measure in measures:
        values = torch.tensor(
            [{**row.losses, **row.judged}[measure] for row in rows], dtype=torch.float64
        )
        means[measure] = values.mean().item()
        deviations[measure] = values.std().item() if len(rows) > 1 else math.nan
    return Average(arm, trained_on, len(rows), means, deviations)


# ---- networks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainee:
    """A trained network with the loss that it was trained on; pictures (B, 3, H, W), normalised."""

    arm: str
    network: nn.Module
    loss: ClassificationLoss
    batches: Iterable[Batch]
    class_names: Sequence[str]


def every_loss() -> tuple[dict[str, ClassificationLoss], dict[str, str]]:
    """The losses with their default settings, by class name; and why others have no column."""
    found, left_out = {}, {}
    for name, cls in sorted(known_classes("model.loss").items()):
        needed = [
            parameter.name
            for parameter in inspect.signature(cls).parameters.values()
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        ]
        if needed:
            left_out[name] = f"it has no default for {', '.join(needed)}"
            continue
        loss = cls()
        if any(True for _ in loss.parameters()):
            left_out[name] = "it has parameters of its own, which belong to the network it trained"
        else:
            found[name] = loss.eval()
    return found, left_out


def score(
    trainees: Iterable[Trainee], losses: Losses | None = None, *, device: str = "cpu"
) -> CrossLosses:
    """The table of networks that are there; a loss that refuses a network's scores is left out."""
    known, left_out = every_loss() if losses is None else (dict(losses), {})
    rows = [row_of(trainee, known, left_out, device) for trainee in trainees]
    return table(rows, known, left_out, {})


def table(
    rows: Sequence[Row], losses: Losses, left_out: Mapping[str, str], failed: Mapping[str, str]
) -> CrossLosses:
    measures = (*JUDGED, *(name for name in losses if name not in left_out))
    return CrossLosses(tuple(rows), measures, dict(left_out), dict(failed))


def row_of(trainee: Trainee, losses: Losses, left_out: dict[str, str], device: str) -> Row:
    """All figures of a network; a loss that raises goes to `left_out`."""
    with torch.inference_mode():
        scores, labels = seen(trainee, device)
        deciding = votes(scores)
        values = {}
        for name, loss in losses.items():
            try:
                shown = deciding[:, :, None, None] if loss.per_cell else deciding
                values[name] = per_picture(loss, shown, labels)
            except (ValueError, RuntimeError) as error:
                left_out[name] = str(error)
        probabilities = trainee.loss.probabilities(deciding).float()
        judged = judge(Predictions(probabilities, labels), trainee.class_names)
        return Row(
            arm=trainee.arm,
            trained_on=type(trainee.loss).__name__,
            losses=values,
            own_loss=per_picture(trainee.loss, scores, labels),
            judged={name: judged[name] for name in JUDGED},
            pictures=len(labels),
        )


def seen(trainee: Trainee, device: str) -> Batch:
    """What the loss saw in training, (N, C) or (N, C, H, W), and labels (N,); on the CPU."""
    network = trainee.network.eval().to(device)
    look = network.cell_scores if trainee.loss.per_cell else network
    pairs = [(look(images.to(device)).cpu(), labels.cpu()) for images, labels in trainee.batches]  # type: ignore[operator]
    scores, labels = zip(*pairs, strict=True)
    return torch.cat(scores), torch.cat(labels)


def per_picture(loss: ClassificationLoss, scores: Tensor, labels: Tensor) -> float:
    """The loss as a run logs it: a sum is divided by the pictures."""
    value = loss(scores, labels).item()
    return value / len(labels) if loss.reduction == "sum" else value


# ---- recorded runs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A checkpoint to score, as one of an arm's; `trust`: its configuration may name any class."""

    arm: str
    path: Path
    trust: bool = False


def score_recorded(
    recorded: Sequence[Recorded], losses: Losses | None = None, *, device: str = "cpu"
) -> CrossLosses:
    """The table of checkpoints, each on the pictures that its own run kept for validation.

    Those that kept the same ones go one after the other, so that these are read and parted once.
    The arithmetic is in float32, whatever the precision of the training. A checkpoint that cannot
    be read, or kept no pictures, has no row and is told by its path.
    """
    known, left_out = every_loss() if losses is None else (dict(losses), {})
    failed: dict[str, str] = {}
    orders: list[tuple[str, int]] = []
    for place, each in enumerate(recorded):
        with told_in(failed, each):
            checkpoint = read_checkpoint(each.path, each.trust)
            orders.append((pictures_of(configuration_of(checkpoint)), place))
    rows: dict[int, Row] = {}
    kept = Kept(most=1)
    for _, place in sorted(orders):
        each = recorded[place]
        with told_in(failed, each):
            rows[place] = row_of(trainee_of(each, kept), known, left_out, device)
    return table([rows[place] for place in sorted(rows)], known, left_out, failed)


@contextlib.contextmanager
def told_in(failed: dict[str, str], recorded: Recorded) -> Iterator[None]:
    try:
        yield
    except (ConfigurationError, DataError, OSError) as error:
        failed[str(recorded.path)] = str(error)


def configuration_of(checkpoint: Checkpoint) -> Configuration:
    settings = settings_of(checkpoint)
    del settings["trainer"]  # of a machine that this one may not be
    return resolve(CommandLine(files=[settings], trust=checkpoint.trust))


def pictures_of(configuration: Configuration) -> str:
    """Equal for equal pictures; what else shapes the data may make it differ for nothing."""
    arguments = sorted(configuration.arguments("data").items())
    return repr((configuration.classes["data"], arguments, configuration.values.seed_everything))


def trainee_of(recorded: Recorded, kept: Kept) -> Trainee:
    """The network, and the pictures that its run kept; ConfigurationError where there are none."""
    checkpoint = read_checkpoint(recorded.path, recorded.trust)
    network, loss = build_trained(checkpoint)
    data = build_data(configuration_of(checkpoint), kept)
    pictures = checkpoint.pictures
    if data.class_names != pictures.class_names or data.image_size != pictures.image_size:
        raise ConfigurationError(
            f"{recorded.path}: the pictures in {data.source} are not those it was trained on: "
            "their classes or their size are others."
        )
    data.normalization = pictures.normalization
    batches = data.val_dataloader()
    if not isinstance(batches, Batches):
        raise ConfigurationError(
            f"{recorded.path}: its run kept no pictures for validation (data.val_fraction 0), and "
            "the test split is not used here."
        )
    return Trainee(recorded.arm, network, loss, batches, data.class_names)
