"""The pictures of a run: which are drawn when, and that one which cannot be drawn ends nothing."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from research.classifier import Classifier
from research.data import ImageData
from research.data.normalization import normalize
from research.evaluation import Predictions
from research.tracking.run import Run

logger = logging.getLogger(__name__)


def record_network(run: Run, data: ImageData, classifier: Classifier, folder: Path) -> None:
    """The network as a graph and as text."""
    with leaving_out("the network's graph"):
        from research.pictures.graph import draw_graph, summarize

        shape = (data.in_channels, data.image_size, data.image_size)
        run.log_text(summarize(classifier.network, shape), "network.txt")
        record_pictures(
            run, folder, {"network.svg": lambda file: draw_graph(classifier.network, shape, file)}
        )


class FirstBatch(Callback):
    """Draws the first training batch as the network is given it, before it learns from it.

    A run that ends in its first epoch shows it too; it takes some hundredths of a second.
    """

    def __init__(self, run: Run, data: ImageData, folder: Path) -> None:
        self.run = run
        self.data = data
        self.folder = folder
        self.is_drawn = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.is_drawn:
            return
        self.is_drawn = True
        with leaving_out("pictures/training_batch.png"):
            from research.pictures.batch import draw_batch

            images, labels = (tensor[:64].detach().cpu() for tensor in batch)
            normalization, names = self.data.normalization, self.data.class_names
            drawing = partial(draw_batch, images, labels, normalization, names)
            record_pictures(self.run, self.folder, {"training_batch.png": drawing})


@dataclass(frozen=True)
class Outcome:
    """A trained run: `classifier` has the weights of the checkpoint that was tested.

    `metrics` are the figures of that checkpoint.
    """

    classifier: Classifier
    data: ImageData
    metrics: dict[str, float]
    history: list[dict[str, float]]
    predictions: Predictions | None
    best_epoch: int | None
    tested: Path | None  # the checkpoint, if one was kept


def record_results(run: Run, outcome: Outcome, folder: Path) -> None:
    """Learning curves, layers; of the test split the confusions, the mistakes, how sure it was."""
    with leaving_out("pictures"):
        from research.pictures.curves import draw_learning_curves
        from research.pictures.layers import draw_feature_maps, draw_filters
        from research.pictures.results import draw_calibration, draw_confusion_matrix, draw_mistakes

        network, data = outcome.classifier.network, outcome.data
        names, test = data.class_names, data.splits.test
        drawings: dict[str, Callable[[Path], Any]] = {
            "learning_curves.png": lambda file: draw_learning_curves(
                outcome.history,
                file,
                outcome.best_epoch,
                outcome.metrics.get("val/accuracy"),
            ),
            "filters.png": lambda file: draw_filters(network, file),
            "feature_maps.png": lambda file: draw_feature_maps(
                network, some_of(data), data.normalization, file
            ),
        }
        if outcome.predictions is not None:
            said, labels = outcome.predictions.probabilities, outcome.predictions.labels
            drawings |= {
                "confusion_matrix.png": lambda file: draw_confusion_matrix(
                    said, labels, names, file
                ),
                "mistakes.png": lambda file: draw_mistakes(
                    test.pixels[: len(labels)], said, labels, names, file
                ),
                "calibration.png": lambda file: draw_calibration(said, labels, file),
            }
        record_pictures(run, folder, drawings)


def record_pictures(run: Run, folder: Path, drawings: Mapping[str, Callable[[Path], Any]]) -> None:
    """Each drawing as a file of the run's pictures/; one that draws nothing is left out."""
    for name, draw in drawings.items():
        file = folder / name
        with leaving_out(f"pictures/{name}"):
            draw(file)
            if file.exists():
                run.log_artifact(file, "pictures")


def some_of(data: ImageData, count: int = 3) -> torch.Tensor:
    """The first test pictures as the network sees them, float32 (count, 3, H, W)."""
    pixels = data.splits.test.pixels[:count].cpu()
    factors = data.normalization.factors(pixels.shape[2])
    return normalize(pixels, *factors).permute(0, 3, 1, 2)


@contextlib.contextmanager
def leaving_out(what: str) -> Iterator[None]:
    """What goes wrong inside costs the run this one thing, and a line that says so."""
    try:
        yield
    except Exception as error:
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.warning("Not recorded: %s. %s", what, told)
        logger.debug("Why %s is not recorded:", what, exc_info=True)
