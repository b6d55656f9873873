"""How good the answers of a network are, whatever loss it was trained with.

`test` lets a trainer go once through the test split and returns figures and `Predictions`; `judge`
makes figures of predictions alone. The figures, on the split that was asked:

    accuracy                    share of the pictures whose most probable class is the right one
    top3_accuracy               share whose right class is among the three most probable
    macro_f1                    mean over the classes of 2 / (1 / precision + 1 / recall)
    expected_calibration_error  how far the stated probability is from the share that is right:
                                15 equal bins, absolute differences (Guo et al., 2017)
    brier_score                 squared distance to the one-hot truth, 0 to 2 (Brier, 1950)
    negative_log_likelihood     nats; what is said to be impossible counts as 1e-38
    accuracy/CLASS              recall of one class

N pictures, C classes.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from research.classifier import Classifier
from research.data import ImageData
from research.data.batches import Batches
from research.tracking.runs import recordable_names

TOLD_CLASSES = 100  # of more classes a page of metrics would show little else


@dataclass(frozen=True)
class Predictions:
    """What was said of each picture, in the order of the split, and what is true.

    `probabilities` float32 (N, C), rows that sum to 1; `labels` int64 (N,); both on the CPU.
    """

    probabilities: Tensor
    labels: Tensor


def test(
    trainer: Trainer, classifier: Classifier, data: ImageData
) -> tuple[dict[str, float], Predictions | None]:
    """The figures of the test split as test/NAME, and the predictions they were made of.

    The weights are those that the classifier has. On the processes of
    a run that are not the first there are no predictions, and loss and accuracy only.
    """
    collector = Collector()
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.append(collector)
    try:
        trainer.test(classifier, datamodule=data, verbose=False)
    finally:
        callbacks.remove(collector)
    figures = {}
    if collector.predictions is not None:
        judged = judge(collector.predictions, data.class_names)
        figures = {f"test/{name}": value for name, value in judged.items()}
    logged = trainer.callback_metrics.items()
    figures |= {name: value.item() for name, value in logged if name.startswith("test/")}
    return figures, collector.predictions


class Collector(Callback):
    """Keeps what a test says of each picture; `predictions` afterwards, on the first process.

    Scores stay on the device until the test is over: nothing waits for them meanwhile.  They have
    one place from the first batch on: small tensors kept from each batch would lie between the
    large ones that are freed, and memory would grow by those (40 MB of the tutorial's CNN's).
    """

    def __init__(self) -> None:
        self.predictions: Predictions | None = None
        self.scores = self.labels = torch.empty(0)
        self.count = 0

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.count = 0

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        labels = batch[1]
        if self.count == 0:
            batches = trainer.test_dataloaders
            assert isinstance(batches, Batches)
            self.scores = outputs.new_empty(len(batches.places), *outputs.shape[1:])
            self.labels = labels.new_empty(len(batches.places))
        place = slice(self.count, self.count + len(labels))
        self.scores[place], self.labels[place] = outputs, labels
        self.count = place.stop

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        # Lightning tests in inference mode, whose tensors nobody could change afterwards.
        with torch.inference_mode(False), torch.no_grad():
            scores, labels = self.scores[: self.count].clone(), self.labels[: self.count].clone()
            probabilities = pl_module.loss.probabilities(scores).float()
            probabilities = gather(trainer, probabilities)
            labels = gather(trainer, labels)
            if trainer.is_global_zero:
                self.predictions = Predictions(probabilities.cpu(), labels.cpu())
        self.scores = self.labels = torch.empty(0)


def gather(trainer: Trainer, rows: Tensor) -> Tensor:
    """The rows of all processes in the order of the split; `rows` are those of this one.

    Each process puts its own rows at their places among zeros, and all of them are summed up. A
    test that was cut short has had the first so many places.
    """
    if trainer.world_size == 1:
        return rows
    batches = trainer.test_dataloaders
    assert isinstance(batches, Batches)
    places = batches.places[: len(rows)].to(rows.device)
    count = trainer.strategy.reduce(torch.tensor(len(rows), device=rows.device), reduce_op="sum")
    assert isinstance(count, Tensor)
    whole = rows.new_zeros(int(count), *rows.shape[1:])
    whole[places] = rows
    whole = trainer.strategy.reduce(whole, reduce_op="sum")
    assert isinstance(whole, Tensor)
    return whole


def judge(predictions: Predictions, class_names: Sequence[str]) -> dict[str, float]:
    """The figures above, by their names.

    A class without a picture in the split has no accuracy of its own, and of more than 100 classes
    none has. Probabilities that are not numbers give figures that are not.
    """
    probabilities, labels = predictions.probabilities.double(), predictions.labels
    count = len(class_names)
    of_truth = probabilities.gather(1, labels[:, None]).squeeze(1)
    # The squared distance without the one-hot written out: (1 - p)^2 - p^2 = 1 - 2 p.
    distance = probabilities.square().sum(dim=1) + 1 - 2 * of_truth
    nats = -of_truth.clamp(min=torch.finfo(torch.float32).tiny).log()
    per_class = confusion(predictions, count)
    right, pictures = per_class.diagonal().tolist(), per_class.sum(dim=1).tolist()
    figures = {
        "accuracy": sum(right) / sum(pictures),
        "top3_accuracy": multiclass_accuracy(
            probabilities, labels, count, average="micro", top_k=min(3, count)
        ).item(),
        "macro_f1": multiclass_f1_score(probabilities, labels, count, average="macro").item(),
        "expected_calibration_error": calibration_error(probabilities, labels),
        "brier_score": distance.mean().item(),
        "negative_log_likelihood": nats.mean().item(),
    }
    if count <= TOLD_CLASSES:
        for name, hits, of in zip(recordable_names(class_names), right, pictures, strict=True):
            if of > 0:
                figures[f"accuracy/{name}"] = hits / of
    return figures


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """torchmetrics' figure, in which certainty, 1, has a bin of its own; nan if a number is none.

    torchmetrics takes what is not in 0..1, and so nan, for scores that want a softmax.
    """
    if not probabilities.isfinite().all():
        return math.nan
    within = probabilities.clamp(0, 1)
    count = probabilities.shape[1]
    return multiclass_calibration_error(within, labels, count, n_bins=15, norm="l1").item()


def confusion(predictions: Predictions, count: int) -> Tensor:
    """How many pictures of each class (rows) were taken for each (columns), int64 (C, C)."""
    decided = predictions.probabilities.argmax(dim=1)
    return multiclass_confusion_matrix(decided, predictions.labels, count)


def write_class_table(predictions: Predictions, class_names: Sequence[str], path: Path) -> None:
    """Write a CSV file with a line for each class; a cell is empty where nothing can be said.

    `mistaken_for` is the class that most of its missed pictures were taken for, `mistaken` their
    number.
    """
    matrix = confusion(predictions, len(class_names))
    pictures, decided = matrix.sum(dim=1).tolist(), matrix.sum(dim=0).tolist()
    right = matrix.diagonal().tolist()
    most, mistaken_for = (matrix - matrix.diagonal().diag()).max(dim=1)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            "class pictures precision recall f1 mistaken_for mistaken".split()  # noqa: SIM905
        )
        for label, name in enumerate(class_names):
            hits, times = right[label], int(most[label])
            table.writerow(
                [
                    name,
                    pictures[label],
                    share(hits, decided[label]),
                    share(hits, pictures[label]),
                    share(2 * hits, pictures[label] + decided[label]),
                    class_names[int(mistaken_for[label])] if times > 0 else "",
                    times,
                ]
            )


def share(part: int, of: int) -> str:
    return f"{part / of:.4f}" if of > 0 else ""
