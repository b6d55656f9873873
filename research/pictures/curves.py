"""How a run went: loss, accuracy, learning rate and gradients over its epochs.

Plain values on plain axes, no smoothing: an epoch is one point.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from research.pictures.style import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    VERMILION,
    add_axes,
    new_figure,
    percent,
    save,
)

History = Sequence[dict[str, float]]

# Title of the panel; for each curve its key in the history, its name and its colour.
LOSS = "Loss", [("train/loss", "training", AMBER), ("val/loss", "validation", BLUE)]
ACCURACY = "Accuracy", [("train/accuracy", "training", AMBER), ("val/accuracy", "validation", BLUE)]
LEARNING_RATE = "Learning rate as an epoch begins", [("learning_rate", "", INK)]
GRADIENTS = (
    "Gradients",
    [
        ("gradient_norm", "norm", VERMILION),
        ("update_to_weight_ratio", "update / weight", GREEN),
    ],
)
SPEED = "Training pictures per second", [("images_per_second", "", INK)]
PANELS = [LOSS, ACCURACY, LEARNING_RATE, GRADIENTS, SPEED]

HUGE = 1e30  # what a loss that ran away may reach; axes of such a length break


def draw_learning_curves(
    history: History,
    path: Path,
    best_epoch: int | None = None,
    best_accuracy: float | None = None,
) -> None:
    """Write the curves of a run as PNG: up to four panels, of those that the history has data for.

    `history` has a mapping for each epoch: `epoch` from 1; train/ and val/ loss and accuracy (a
    fraction); learning_rate, gradient_norm, update_to_weight_ratio, images_per_second. Whatever is
    missing is left out; what is no finite number leaves a gap and is said. `best_accuracy` is what
    validation gave when the best was kept: with several in an epoch, not what its end has.
    ValueError for a history without an epoch.
    """
    if not history:
        raise ValueError("There are no learning curves of a run that finished no epoch.")
    panels = [panel for panel in PANELS if any(read(history, key) for key, _, _ in panel[1])][:4]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = new_figure(1100, 72 + 300 * rows, *describe(history, best_epoch, best_accuracy))
    for number, panel in enumerate(panels):
        title, curves = panel
        axes = add_axes(figure, 76 + 540 * (number % 2), 100 + 300 * (number // 2), 440, 210, title)
        draw_panel(axes, history, curves, best_epoch)
        if panel == GRADIENTS or (panel == LOSS and spans_decades(history, curves)):
            set_logarithmic(axes, history, curves)
        if panel in (LEARNING_RATE, SPEED):
            axes.set_ylim(bottom=0)
        # Plain numbers: powers of ten would load the parser of formulas, 80 ms.
        in_percent = panel == ACCURACY
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _, p=in_percent: f"{100 * v:g} %" if p else f"{v:g}")
        )
    save(figure, path)


def describe(
    history: History, best_epoch: int | None, best_accuracy: float | None
) -> tuple[str, str]:
    """The title, which says how far the run came, and a line about its best epoch."""
    last = round(history[-1]["epoch"])
    title = f"Learning curves of {last} {'epoch' if last == 1 else 'epochs'}"
    subtitle = "numbers: the last epoch's"
    row = next((row for row in history if row["epoch"] == best_epoch), None)
    if row is None:
        return title, subtitle
    at_end = row.get("val/accuracy", math.nan)
    accuracy = at_end if best_accuracy is None else best_accuracy
    detail = f", validation accuracy {percent(accuracy, 1)}" if math.isfinite(accuracy) else ""
    where = "epoch" if accuracy == at_end or not detail else "within epoch"
    return title, f"{subtitle}; dashed line: the best, {where} {best_epoch}{detail}"


def read(history: History, key: str) -> list[tuple[int, float]]:
    """(epoch, value) of every epoch that has one; nan where it is not finite or absurdly large."""
    return [
        (round(row["epoch"]), row[key] if abs(row[key]) < HUGE else math.nan)
        for row in history
        if key in row
    ]


def draw_panel(
    axes: Axes,
    history: History,
    curves: list[tuple[str, str, str]],
    best_epoch: int | None,
) -> None:
    """The curves with their last values, the best epoch, and what was not finite."""
    first, last = round(history[0]["epoch"]), round(history[-1]["epoch"])
    broken: set[int] = set()
    if best_epoch is not None:
        axes.axvline(best_epoch, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for key, name, color in curves:
        points = read(history, key)
        if not points:
            continue
        epochs, values = zip(*points, strict=True)
        broken |= {epoch for epoch, value in points if not math.isfinite(value)}
        label = f"{name} {show(key, values[-1])}".strip()
        # A value between two gaps has no line: show it as a point.
        marker = "o" if len(epochs) <= 30 or broken else ""
        axes.plot(
            epochs,
            values,
            color=color,
            linewidth=1.8,
            marker=marker,
            markersize=3.5,
            label=label,
            clip_on=False,
        )
    if last - first < 10:
        axes.set_xlim(first - 0.5, last + 0.5)
        axes.set_xticks(range(first, last + 1))
    else:
        axes.set_xlim(first, last)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel("epoch", color=MUTED, size=9)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.15,
        borderpad=0.2,
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.2,
        columnspacing=1.2,
    )
    if broken:
        epochs_in_all = "1 epoch" if len(history) == 1 else f"{len(history)} epochs"
        axes.text(
            0.98,
            0.04,
            f"not finite in {len(broken)} of {epochs_in_all}, first in epoch {min(broken)}",
            color=VERMILION,
            size=9,
            ha="right",
            transform=axes.transAxes,
        )
    if len(broken) == len(history) and not spread(history, curves):
        axes.set_yticks([])


def show(key: str, value: float) -> str:
    """The value as the legend says it."""
    if not math.isfinite(value):
        return "not finite"
    if key.endswith("accuracy"):
        return percent(value, 1)
    return f"{value:,.0f}" if key == "images_per_second" else f"{value:.3g}"


def spread(history: History, curves: list[tuple[str, str, str]]) -> list[float]:
    """All finite values of the curves, in ascending order."""
    values = [value for key, _, _ in curves for _, value in read(history, key)]
    return sorted(value for value in values if math.isfinite(value))


def spans_decades(history: History, curves: list[tuple[str, str, str]]) -> bool:
    """True where all values are above 0 and the largest is over a hundred times the smallest."""
    values = spread(history, curves)
    return bool(values) and 0 < 100 * values[0] < values[-1]


def set_logarithmic(axes: Axes, history: History, curves: list[tuple[str, str, str]]) -> None:
    """A logarithmic axis, if there is anything above 0 to show on it."""
    values = [value for value in spread(history, curves) if value > 0]
    if values:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(values[0] / 2, values[-1] * 2)
