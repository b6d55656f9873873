"""A step that was kept, done again, and where its first number came from that was none.

The step runs in Lightning's Trainer as it ran in training: same precision, same clipping, same
closures.  Only the optimizer's last word is not awaited, nothing is learnt here.

B pictures, C channels, H rows, W columns.
"""

import contextlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from research.building import build_classifier, faults_of
from research.checkpoints.trained import (
    Checkpoint,
    load_weights,
    read_checkpoint,
    read_plain,
    settings_of,
)
from research.configuration.compose import CommandLine, ConfigurationError
from research.configuration.schema import resolve
from research.data import ImageData
from research.faults.nonfinite import describe_machine
from research.pictures.inspection import is_layer
from research.pictures.trace import describe, tensors
from research.training import endings, nothing_left_behind

# What changes a step's figures, of the trainer's settings; devices are this machine's.
OF_THE_STEP = ("deterministic", "benchmark", "gradient_clip_val", "gradient_clip_algorithm")
NEEDED = (
    *("images", "labels", "optimizer_state", "random_state", "batch_idx", "global_step"),
    *("evaluation", "loss", "learning_rates", "precision", "machine"),
)
GROWN = 1e3  # trained weights are seldom above 10


@dataclass(frozen=True)
class Step:
    """A `step.pt`: `content` as `nonfinite.StopAtNonFiniteLoss` tells, `checkpoint` its origin."""

    checkpoint: Checkpoint
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Extent:
    """How far numbers go: the `largest` magnitude of the finite ones, nan where there are none.

    `not_finite` is the share of the others, 0 to 1.
    """

    largest: float
    not_finite: float


@dataclass
class Layer:
    """A call of a layer; one without `output` stands for parameters outside of every layer."""

    name: str
    description: str
    parameters: list[nn.Parameter]
    input: Extent | None = None
    output: Extent | None = None
    weight: Extent | None = None
    gradient: Extent | None = None


@dataclass
class Diagnosis:
    """What the step was like this time; `loss` is nan where the network was never asked."""

    loss: float = math.nan
    evaluation: int = 0
    layers: list[Layer] = field(default_factory=list)
    loss_name: str = ""
    precision: str = ""
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> Layer | None:
        """The first layer whose output is not finite throughout."""
        bad = (layer for layer in self.layers if layer.output and layer.output.not_finite > 0)
        return next(bad, None)


def read_step(path: Path, trust: bool = False) -> Step:
    """ConfigurationError where the file is no step of ours; OSError where it cannot be read.

    trust: let its configuration name any class, as `read_checkpoint` does.
    """
    checkpoint = read_checkpoint(path, trust)
    content = read_plain(path)
    missing = [name for name in NEEDED if name not in content]
    if missing:
        raise ConfigurationError(
            f"{path} is a checkpoint and no step that was kept ({', '.join(missing)} are not in "
            "it); python -m research.evaluate reads checkpoints."
        )
    return Step(checkpoint, content)


def is_reproduced(step: Step, diagnosis: Diagnosis) -> bool:
    """True where the same loss of the step is the same number that is none."""
    return step.content["evaluation"] == diagnosis.evaluation and same(
        step.content["loss"], diagnosis.loss
    )


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


# ---- the step ------------------------------------------------------------------------------------


def replay(step: Step) -> Diagnosis:
    """The step again, on the kind of device that it ran on where there is one."""
    settings = settings_of(step.checkpoint)
    given = settings.pop("trainer")  # of a machine that this one may not be
    settings["lr_scheduler"] = None  # the optimizer's state has its rates
    settings.setdefault("model", {})["compile"] = False  # a compiled network hides its layers
    configuration = resolve(CommandLine(files=[settings], trust=step.checkpoint.trust))
    content = step.content
    on_cpu = content["machine"].get("accelerator") == "cpu"
    with nothing_left_behind(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported.*")  # told in words
        warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
        classifier = build_classifier(configuration, cast(ImageData, step.checkpoint.pictures))
        load_weights(classifier, step.checkpoint.weights, step.checkpoint.path)
        probe = Probe(step)
        with faults_of("trainer"):
            trainer = Trainer(
                accelerator="cpu" if on_cpu else "auto",
                devices=1,
                precision=content["precision"],
                callbacks=[probe],
                max_epochs=1,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **{name: given[name] for name in OF_THE_STEP if name in given},
            )
        with endings(), contextlib.suppress(Seen):
            batches: Any = [(content["images"], content["labels"])]
            trainer.fit(classifier, DataLoader(batches, batch_size=None))
    return probe.diagnosis


class Seen(Exception):
    """Ends the replay: all that it is for has been seen."""


class Probe(Callback):
    """Puts the step's beginning in place, and notes what each layer makes of it."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.diagnosis = Diagnosis()
        self.handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.diagnosis.loss_name = type(pl_module.loss).__name__
        self.diagnosis.precision = str(trainer.precision)
        self.diagnosis.machine = describe_machine(trainer)
        # Now that Lightning has brought it to its precision: 64-true would lose digits before.
        pl_module.load_state_dict(self.step.content["state_dict"])
        with faults_of("optimizer"):
            trainer.optimizers[0].load_state_dict(self.step.content["optimizer_state"])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        network = cast(nn.Module, pl_module.network)
        for path, module in network.named_modules():
            if is_layer(module):
                note = partial(self.note, path or type(module).__name__)
                self.handles.append(module.register_forward_hook(note, with_kwargs=True))
        state = self.step.content["random_state"]
        torch.set_rng_state(state["cpu"])
        if pl_module.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], pl_module.device)

    def note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        parameters = list(module.parameters())
        self.diagnosis.layers.append(
            Layer(
                name,
                describe(module),
                parameters,
                input=extent_of(tensors((args, kwargs))),
                output=extent_of(tensors(output)),
                weight=extent_of(parameters),
            )
        )

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self.diagnosis.loss = loss.item()
        self.diagnosis.evaluation += 1
        within = {id(p) for layer in self.diagnosis.layers for p in layer.parameters}
        for name, parameter in pl_module.named_parameters():
            if id(parameter) not in within:
                name = name.removeprefix("network.")
                row = Layer(name, "parameter", [parameter], weight=extent_of([parameter]))
                self.diagnosis.layers.append(row)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for layer in self.diagnosis.layers:
            layer.gradient = extent_of(p.grad for p in layer.parameters if p.grad is not None)
        kept = self.step.content["evaluation"]
        if not math.isfinite(self.diagnosis.loss) or self.diagnosis.evaluation >= kept:
            raise Seen
        self.diagnosis.layers = []  # LBFGS goes on to its next evaluation

    def on_train_batch_end(self, *args: Any) -> None:
        raise Seen  # LBFGS was content earlier than in the run

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self.handles:
            handle.remove()


def extent_of(values: Iterable[Tensor]) -> Extent | None:
    """How far the floating-point numbers among the tensors go; None where there are none."""
    largest, bad, count = math.nan, 0, 0
    for tensor in values:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        numbers = tensor.detach()
        numbers = numbers.coalesce().values() if numbers.is_sparse else numbers
        is_finite = numbers.isfinite()
        finite = numbers[is_finite]
        if len(finite):
            here = finite.abs().max().item()
            largest = here if math.isnan(largest) else max(largest, here)
        count += numbers.numel()
        bad += numbers.numel() - len(finite)
    return Extent(largest, bad / count) if count else None


# ---- what it says --------------------------------------------------------------------------------


def suggest(step: Step, diagnosis: Diagnosis) -> str:
    """In a sentence or two, where the loss was lost and what to do."""
    images = extent_of([step.content["images"]])
    broken = [row.name for row in diagnosis.layers if row.weight and row.weight.not_finite]
    first = diagnosis.first
    if math.isfinite(step.content["loss"]):
        return (
            "The loss of the pictures that were kept is finite, and was: it took those of all "
            f"{step.content['machine']['world_size']} processes together to make one that is not, "
            "as a sum does that overflows."
        )
    if math.isfinite(diagnosis.loss):
        return "The loss is finite this time: what differs from the run decided it."
    if images is not None and images.not_finite:
        return (
            f"The pictures went in with numbers that are none ({images.not_finite:.1%}): it is the "
            "data or their normalisation, no setting of the training."
        )
    if broken:
        before = "evaluation" if diagnosis.evaluation > 1 else "step"
        return (
            f"Weights were not finite before this already ({listed(broken)}): the {before} before "
            "made them so, with a finite loss whose gradient, or whose step, was too large. "
            "Try a smaller optimizer.lr, or --trainer.gradient_clip_val 1."
        )
    if first is not None:
        return f"{where(first)}\n{why(first, diagnosis)}"
    scores = [row.output.largest for row in diagnosis.layers if row.output is not None][-1:]
    of = f" of scores up to {scores[0]:.3g}" if scores else ""
    return (
        f"Every layer's output is finite; it is the loss itself, {diagnosis.loss_name}{of}: a "
        "logarithm or a quotient of 0, or an overflow. Try other arguments of it or another loss, "
        "or a smaller optimizer.lr where the scores are large."
    )


def where(first: Layer) -> str:
    assert first.output is not None
    if first.input is not None and first.input.not_finite:
        return f"Between the layers before {first.name} and itself, numbers overflowed."
    return (
        f"{first.name} overflowed: finite numbers went in, and {first.output.not_finite:.1%} of "
        "what came out are not."
    )


def why(first: Layer, diagnosis: Diagnosis) -> str:
    """What made them large: the weights, or the range of the precision."""
    weights = [(row.weight.largest, row.name) for row in diagnosis.layers if row.weight is not None]
    largest, name = max(weights, default=(0.0, ""))
    if largest > GROWN:
        return (
            f"The weights were large before this step already (up to {largest:.3g}, in {name}): "
            "the steps to there were too long. Try a smaller optimizer.lr, or "
            "--trainer.gradient_clip_val 1."
        )
    if diagnosis.precision.startswith("16"):
        return (
            "float16 ends at 65504, and no weight is large: try --trainer.precision bf16-mixed or "
            "32-true."
        )
    return (
        f"No weight is large (at most {largest:.3g}): look at what that layer computes from its "
        f"input{'' if first.input is None else f', up to {first.input.largest:.3g}'}."
    )


def differences(step: Step, diagnosis: Diagnosis) -> list[str]:
    """What was otherwise than in the run, of all that could change a figure."""
    was = {**step.content["machine"], "precision": step.content["precision"]}
    now = {**diagnosis.machine, "precision": diagnosis.precision}
    told = [
        f"{name} was {was.get(name, 'none')}, is {now.get(name, 'none')}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name)
    ]
    if settings_of(step.checkpoint).get("model", {}).get("compile"):
        told.append("the network was compiled, and is not here")
    return told


def listed(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
