"""Learning curves of whatever history a run may have."""

import math

import pytest
from PIL import Image

from research.pictures.curves import describe, draw_learning_curves, read, spans_decades
from research.pictures.style import percent, tidy


def epoch(number: int, **values: float) -> dict[str, float]:
    row = {"epoch": number, "train/loss": 2 / number, "train/accuracy": 1 - 1 / number}
    return row | {"learning_rate": 0.1} | values


def draw(history, path, best_epoch=None) -> tuple[int, int]:
    draw_learning_curves(history, path / "curves.png", best_epoch)
    with Image.open(path / "curves.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").resize((50, 50)).getcolors(2500)) > 5
        return image.size


def test_every_panel_with_data_is_drawn(tmp_path):
    lean = [epoch(i) for i in (1, 2, 3)]
    full = [epoch(i, gradient_norm=1.0, update_to_weight_ratio=1e-3) for i in (1, 2, 3)]
    only_loss = [{"epoch": 1, "train/loss": 1.0}]
    assert draw(lean, tmp_path)[1] == draw(full, tmp_path, best_epoch=2)[1]
    assert draw(only_loss, tmp_path)[1] < draw(lean, tmp_path)[1]


@pytest.mark.parametrize(
    "history",
    [
        [epoch(1)],
        [epoch(i) for i in range(1, 301)],
        [epoch(7), epoch(8)],
        [epoch(1), epoch(2, **{"train/loss": math.nan, "val/loss": math.inf})],
        [epoch(i, **{"train/loss": math.nan, "learning_rate": math.nan}) for i in (1, 2)],
        [epoch(1, **{"train/loss": 1e308}), epoch(2, **{"train/loss": -1e308})],
        [epoch(i, gradient_norm=0.0, update_to_weight_ratio=0.0) for i in (1, 2)],
        [epoch(i, gradient_norm=math.inf) for i in (1, 2)],
        [epoch(i, **{"val/loss": 10.0**i, "val/accuracy": 0.5}) for i in (1, 2, 3, 4)],
        [epoch(i, learning_rate=0.0) for i in (1, 2)],
    ],
)
def test_odd_histories_are_drawn(tmp_path, history):
    draw(history, tmp_path, best_epoch=1)


def test_a_run_without_an_epoch_has_no_curves(tmp_path):
    with pytest.raises(ValueError, match="no epoch"):
        draw_learning_curves([], tmp_path / "curves.png")


def test_what_is_not_finite_is_a_gap():
    history = [{"epoch": 1, "x": 2.0}, {"epoch": 2}, {"epoch": 3, "x": -math.inf}]
    (first, value), (second, gap) = read(history, "x")
    assert (first, value, second) == (1, 2.0, 3) and math.isnan(gap)


def test_a_loss_of_several_decades_gets_a_logarithmic_axis():
    curves = [("x", "", "#000000")]
    assert spans_decades([{"epoch": 1, "x": 0.1}, {"epoch": 2, "x": 11.0}], curves)
    assert not spans_decades([{"epoch": 1, "x": 0.1}, {"epoch": 2, "x": 9.0}], curves)
    assert not spans_decades([{"epoch": 1, "x": 0.0}, {"epoch": 2, "x": 9.0}], curves)
    assert not spans_decades([{"epoch": 1, "x": math.nan}], curves)


@pytest.mark.parametrize(
    ("share", "digits", "expected"),
    [
        (0.0, 0, "0 %"),
        (0.004, 0, "<1 %"),
        (0.006, 0, "1 %"),
        (0.994, 0, "99 %"),
        (0.9951, 0, ">99 %"),
        (1.0, 0, "100 %"),
        (0.12345, 1, "12.3 %"),
        (0.9999, 1, ">99.9 %"),
        (math.nan, 0, "?"),
    ],
)
def test_percent_says_0_and_100_only_where_that_is_so(share, digits, expected):
    assert percent(share, digits) == expected


def test_names_are_made_fit_to_print():
    assert tidy(" a\tb\n\x00 c ") == "a b c"
    assert tidy("\udcff") == "?"
    assert tidy("frog") == "frog"
    long = tidy("a very long name of class 17", 12)
    assert len(long) <= 12 and long.startswith("a very") and "…" in long and long.endswith("17")


@pytest.mark.parametrize(
    ("best_accuracy", "told"),
    [
        (None, "the best, epoch 2, validation accuracy 50.0 %"),
        (0.5, "the best, epoch 2, validation accuracy 50.0 %"),
        (0.75, "the best, within epoch 2, validation accuracy 75.0 %"),
    ],
)
def test_the_best_is_told_as_what_validation_gave_when_it_was_kept(best_accuracy, told):
    history = [epoch(i, **{"val/accuracy": 0.5}) for i in (1, 2, 3)]
    assert describe(history, 2, best_accuracy)[1].endswith(told)
    assert describe([epoch(2)], 2, None)[1].endswith("the best, epoch 2")
