"""Figures and predictions against closed forms, and against what the classifier counted."""

import csv
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from research import evaluation
from research.building import build_classifier, build_data
from research.data.batches import Batches
from research.data.normalization import IDENTITY
from research.data.split import Split
from research.evaluation import Predictions, gather, judge, write_class_table

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*sync_dist"
)
NAMES = ("cat", "dog", "eel")
PREDICTIONS = Predictions(
    torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]),
    torch.tensor([0, 1, 0, 2]),
)


def drawn(N: int = 500, C: int = 5, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(N, C, generator=generator)
    return Predictions(scores.softmax(1), torch.randint(C, (N,), generator=generator))


# ---- the figures ---------------------------------------------------------------------------------


def test_figures_of_four_pictures_are_those_worked_out_by_hand():
    figures = judge(PREDICTIONS, NAMES)
    assert figures.pop("accuracy") == 0.75
    assert figures.pop("top3_accuracy") == 1.0
    # cat: precision 1, recall 1/2; dog: precision 1/2, recall 1; eel: all right
    assert figures.pop("macro_f1") == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    brier = [0.25 + 0.09 + 0.04, 0.01 + 0.16 + 0.09, 2.0, 0.0625 + 0.0625]
    assert figures.pop("brier_score") == pytest.approx(sum(brier) / 4)
    impossible = -math.log(torch.finfo(torch.float32).tiny)
    nats = [-math.log(0.5), -math.log(0.6), impossible, -math.log(0.75)]
    assert figures.pop("negative_log_likelihood") == pytest.approx(sum(nats) / 4)
    # four bins of one picture each: |right - said|
    gaps = [0.5, 0.4, 1.0, 0.25]
    assert figures.pop("expected_calibration_error") == pytest.approx(sum(gaps) / 4)
    assert figures == {"accuracy/cat": 0.5, "accuracy/dog": 1.0, "accuracy/eel": 1.0}


def test_figures_agree_with_plain_formulas_on_drawn_predictions():
    predictions = drawn()
    probabilities, labels = predictions.probabilities.double(), predictions.labels
    figures = judge(predictions, [str(c) for c in range(5)])
    one_hot = torch.nn.functional.one_hot(labels, 5)
    top3 = (probabilities.topk(3).indices == labels[:, None]).any(1)
    confidences, decided = probabilities.max(1)
    error = 0.0
    for bin in range(15):
        inside = (confidences >= bin / 15) & (confidences < (bin + 1) / 15)
        if inside.any():
            gap = (decided == labels)[inside].double().mean() - confidences[inside].mean()
            error += inside.double().mean() * gap.abs()
    assert figures["top3_accuracy"] == pytest.approx(top3.double().mean().item())
    distances = (probabilities - one_hot).square().sum(1)
    assert figures["brier_score"] == pytest.approx(distances.mean().item())
    nll = torch.nn.functional.nll_loss(probabilities.log(), labels)
    assert figures["negative_log_likelihood"] == pytest.approx(nll.item())
    assert figures["expected_calibration_error"] == pytest.approx(float(error))
    for c in range(5):
        recall = (decided == c)[labels == c].double().mean().item()
        assert figures[f"accuracy/{c}"] == pytest.approx(recall)


def test_two_classes_have_a_top_two():
    predictions = Predictions(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
    figures = judge(predictions, ["a", "b"])
    assert (figures["accuracy"], figures["top3_accuracy"]) == (0.5, 1.0)


def test_class_without_a_picture_has_no_accuracy_and_no_nan():
    figures = judge(Predictions(PREDICTIONS.probabilities, torch.tensor([0, 1, 0, 0])), NAMES)
    assert "accuracy/eel" not in figures
    assert all(math.isfinite(value) for value in figures.values())


def test_more_than_a_hundred_classes_have_no_figures_each():
    figures = judge(drawn(300, 101), [f"class {c}" for c in range(101)])
    assert not [name for name in figures if name.startswith("accuracy/")]


def test_probabilities_that_are_no_numbers_give_figures_that_are_none():
    broken = PREDICTIONS.probabilities.clone()
    broken[1] = float("nan")
    figures = judge(Predictions(broken, PREDICTIONS.labels), NAMES)
    for name in ("brier_score", "negative_log_likelihood", "expected_calibration_error"):
        assert math.isnan(figures[name])
    assert 0 <= figures["accuracy"] <= 1


def test_class_table_tells_precision_recall_and_the_usual_mistake(tmp_path):
    write_class_table(PREDICTIONS, NAMES, tmp_path / "classes.csv")
    with open(tmp_path / "classes.csv", newline="") as file:
        cat, dog, eel = csv.DictReader(file)
    assert list(cat.values()) == ["cat", "2", "1.0000", "0.5000", "0.6667", "dog", "1"]
    assert list(dog.values()) == ["dog", "1", "0.5000", "1.0000", "0.6667", "", "0"]
    assert list(eel.values()) == ["eel", "1", "1.0000", "1.0000", "1.0000", "", "0"]


def test_class_table_leaves_empty_what_cannot_be_said(tmp_path):
    predictions = Predictions(torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([0]))
    write_class_table(predictions, ("a, b", "never", "nowhere"), tmp_path / "classes.csv")
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["class"] == "a, b"
    assert list(rows[1].values()) == ["never", "0", "", "", "", "", "0"]


# ---- a test run ----------------------------------------------------------------------------------


def score(small, *arguments: str, **trainer):
    configuration = small(*arguments)
    data = build_data(configuration)
    classifier = build_classifier(configuration, data)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", devices=1, **quiet, **trainer)
    figures, predictions = evaluation.test(trainer, classifier, data)
    return trainer, classifier, data, figures, predictions


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "CrossEntropyLoss2d", "BCELoss", "CTCLoss"])
def test_predictions_are_those_of_the_network_in_the_splits_order(small, loss):
    trainer, classifier, data, figures, predictions = score(small, "--model.loss", loss)
    assert predictions.labels.tolist() == data.splits.test.labels.tolist()
    assert predictions.probabilities.dtype == torch.float32
    images = torch.cat([images for images, _ in data.test_dataloader()])
    with torch.no_grad():
        expected = classifier.loss.probabilities(classifier.eval()(images))
    torch.testing.assert_close(predictions.probabilities, expected)
    assert not predictions.probabilities.is_inference()
    assert not any(type(callback).__name__ == "Collector" for callback in trainer.callbacks)
    # The classifier counted by itself, from the scores.
    assert figures["test/accuracy"] == judge(predictions, data.class_names)["accuracy"]
    if loss == "CrossEntropyLoss":
        said = figures["test/negative_log_likelihood"]
        assert said == pytest.approx(figures["test/loss"], rel=1e-5)


def test_half_precision_decides_as_the_classifier_counted(small):
    """Scores in bfloat16 are often equal: both must then take the same class."""
    *_, figures, predictions = score(small, precision="bf16-mixed")
    decided = predictions.probabilities.argmax(1)
    assert (decided == predictions.labels).double().mean().item() == figures["test/accuracy"]


def test_test_that_is_cut_short_predicts_what_it_saw(small):
    arguments = ("--data.batch_size", "10")
    _, _, data, figures, predictions = score(small, *arguments, limit_test_batches=2)
    count = len(predictions.labels)
    assert count == 10 + 9  # 64 pictures in batches of at most 10
    assert predictions.labels.tolist() == data.splits.test.labels[:count].tolist()
    assert figures["test/accuracy"] == pytest.approx(
        judge(predictions, data.class_names)["accuracy"]
    )


# ---- several processes ---------------------------------------------------------------------------


class Ranks:
    """Processes played by threads: `reduce` sums what they all bring."""

    def __init__(self, world_size: int) -> None:
        self.brought: list[torch.Tensor] = []
        self.barrier = threading.Barrier(world_size)

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        self.brought.append(tensor)
        self.barrier.wait()
        total = torch.stack(self.brought).sum(0)
        if self.barrier.wait() == 0:
            self.brought.clear()
        self.barrier.wait()
        return total


@pytest.mark.parametrize(("count", "batch_size"), [(20, 6), (23, 5), (7, 100), (3, 3)])
@pytest.mark.parametrize("num_batches", [None, 2])
def test_rows_of_several_processes_come_in_the_order_of_the_split(count, batch_size, num_batches):
    world_size = 3
    split = Split(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), torch.arange(count))
    ranks, gathered = Ranks(world_size), {}

    def play(rank: int) -> None:
        batches = Batches(split, batch_size, IDENTITY, rank=rank, world_size=world_size)
        labels = torch.cat([labels for _, labels in list(batches)[:num_batches]])
        trainer = SimpleNamespace(world_size=world_size, strategy=ranks, test_dataloaders=batches)
        rows = torch.stack([labels, labels + 0.5], dim=1)
        gathered[rank] = gather(trainer, rows), gather(trainer, labels)

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows, labels in gathered.values():
        seen = len(labels)
        assert seen == count or num_batches is not None
        assert labels.dtype == torch.int64
        assert labels.tolist() == list(range(seen))
        assert rows[:, 1].tolist() == [place + 0.5 for place in range(seen)]
