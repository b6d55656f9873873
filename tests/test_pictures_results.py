"""Decisions on a split: counted as torchmetrics counts, drawn for 2 to 1000 classes."""

import math

import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from research.pictures.results import (
    bin_confidences,
    color_cells,
    count_confusions,
    draw_calibration,
    draw_confusion_matrix,
    draw_mistakes,
    find_mistakes,
)


def decisions(count: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    logits = torch.randn(count, num_classes, generator=generator)
    logits[torch.arange(count), labels] += 2
    return logits.softmax(dim=1), labels


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


ODD_NAMES = ["$x_{", "猫", "\udcff", "a\nb", "x" * 300, "", "$$", "a & b <c>", "\u0645\u0631", "é"]


@pytest.mark.parametrize("num_classes", [2, 10, 37])
def test_confusions_are_counted_as_torchmetrics_counts(num_classes):
    probabilities, labels = decisions(400, num_classes)
    expected = multiclass_confusion_matrix(probabilities, labels, num_classes)
    assert torch.equal(count_confusions(probabilities, labels), expected)


def test_cells_are_blue_where_right_and_reddest_where_most_is_wrong():
    counts = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    cells = color_cells(shares)
    red, blue = cells[..., 0], cells[..., 2]
    assert blue[0, 0] > red[0, 0] and blue[1, 1] > red[1, 1]
    assert red[0, 1] > blue[0, 1] and blue[0, 1] < blue[1, 0]
    assert (cells[0, 2] == 1).all()
    assert (cells[2] == cells[2, 0]).all() and (cells[2] < 1).all()


@pytest.mark.parametrize("num_classes", [2, 10, 20, 21, 100, 1000])
def test_matrices_of_few_and_many_classes_are_drawn(tmp_path, num_classes):
    probabilities, labels = decisions(300, num_classes)
    names = [f"{ODD_NAMES[i % 10]} {i}" for i in range(num_classes)]
    draw_confusion_matrix(probabilities, labels, names, tmp_path / "matrix.png")
    width, height = size_of(tmp_path / "matrix.png")
    assert 300 < width < 2000 and 300 < height < 2000
    assert (tmp_path / "matrix.png").stat().st_size < 400_000


def test_a_network_that_diverged_is_drawn(tmp_path):
    probabilities, labels = decisions(50, 10)
    broken = probabilities * math.nan
    pixels = torch.zeros(50, 8, 8, 3, dtype=torch.uint8)
    draw_confusion_matrix(broken, labels, ODD_NAMES, tmp_path / "matrix.png")
    draw_calibration(broken, labels, tmp_path / "calibration.png")
    draw_mistakes(pixels, broken, labels, ODD_NAMES, tmp_path / "mistakes.png")
    for path in tmp_path.iterdir():
        size_of(path)


def test_mistakes_come_in_the_order_of_their_confidence():
    probabilities, labels = decisions(500, 5)
    probabilities[7] = math.nan
    labels[7] = 4
    places = find_mistakes(probabilities, labels).tolist()
    confidences = probabilities.max(dim=1).values
    wrong = (probabilities.argmax(dim=1) != labels).nonzero().squeeze(1).tolist()
    assert sorted(places) == wrong and places[-1] == 7
    assert places[:-1] == sorted(places[:-1], key=lambda place: -float(confidences[place]))


@pytest.mark.parametrize("side", [8, 32, 100, 224])
def test_the_most_confident_mistake_stands_first_on_the_sheet(tmp_path, side):
    probabilities, labels = decisions(60, 10)
    pixels = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, side, side, 3) * 4
    draw_mistakes(pixels, probabilities, labels, ODD_NAMES, tmp_path / "sheet.png", count=3)
    first, second = find_mistakes(probabilities, labels)[:2].tolist()
    with Image.open(tmp_path / "sheet.png") as sheet:
        # Six columns of 150 pixels, from a margin of 20.
        assert sheet.getpixel((25, 75)) == (4 * first,) * 3
        assert sheet.getpixel((175, 75)) == (4 * second,) * 3


def test_without_a_mistake_the_sheet_says_so(tmp_path):
    labels = torch.arange(10)
    probabilities = torch.eye(10)
    pixels = torch.zeros(10, 32, 32, 3, dtype=torch.uint8)
    draw_mistakes(pixels, probabilities, labels, ODD_NAMES, tmp_path / "sheet.png")
    draw_confusion_matrix(probabilities, labels, ODD_NAMES, tmp_path / "matrix.png")
    draw_calibration(probabilities, labels, tmp_path / "calibration.png")
    assert size_of(tmp_path / "sheet.png")[1] < 150
    size_of(tmp_path / "matrix.png")
    size_of(tmp_path / "calibration.png")


@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_calibration_error_is_that_of_torchmetrics(num_classes):
    probabilities, labels = decisions(3000, num_classes)
    expected = multiclass_calibration_error(probabilities, labels, num_classes, n_bins=15)
    assert bin_confidences(probabilities, labels).error == pytest.approx(expected.item(), abs=1e-6)


def test_bins_of_confidence_hold_what_was_put_in():
    # 0.5 lies in (0.4, 0.5], 1 in (0.9, 1].
    probabilities = torch.tensor([[0.5, 0.5], [0.55, 0.45], [0.0, 1.0], [0.0, 1.0]]).double()
    bins = bin_confidences(probabilities, torch.tensor([0, 1, 1, 0]), bins=10)
    assert bins.shares.tolist() == [0, 0, 0, 0, 0.25, 0.25, 0, 0, 0, 0.5]
    assert bins.accuracies[[4, 5, 9]].tolist() == [1, 0, 0.5]
    assert bins.confidences[[4, 5, 9]].tolist() == pytest.approx([0.5, 0.55, 1])
    assert bins.error == pytest.approx(0.25 * 0.5 + 0.25 * 0.55 + 0.5 * 0.5)


def test_the_reliability_diagram_is_drawn(tmp_path):
    draw_calibration(*decisions(500, 10), tmp_path / "calibration.png")
    assert size_of(tmp_path / "calibration.png") == (640, 720)
