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
    "Gradients and steps",
    [
        ("gradient_norm", "gradient norm", VERMILION),
        ("update_to_weight_ratio", "update / weight", GREEN),
    ],
)
SPEED = "Training pictures per second", [("images_per_second", "", INK)]
PANELS = [LOSS, ACCURACY, LEARNING_RATE, GRADIENTS, SPEED]

HUGE = 1e30  # what a loss that ran away may reach; axes of such a length break


def draw_learning_curves(history: History, path: Path, best_epoch: int | None = None) -> None:
    """Write the curves of a run as PNG: up to four panels, of those that the history has data for.

    `history` has a mapping for each epoch: `epoch` from 1; train/ and val/ loss and accuracy (a
    fraction); learning_rate, gradient_norm, update_to_weight_ratio, images_per_second. Whatever is
    missing is left out; what is no finite number leaves a gap and is said. ValueError for a history
    without an epoch.
    """
    if not history:
        raise ValueError("There are no learning curves of a run that finished no epoch.")
    panels = [panel for panel in PANELS if any(read(history, key) for key, _, _ in panel[1])][:4]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = new_figure(1100, 72 + 300 * rows, *describe(history, best_epoch))
    for number, (title, curves) in enumerate(panels):
        axes = add_axes(figure, 76 + 540 * (number % 2), 100 + 300 * (number // 2), 440, 210, title)
        draw_panel(axes, history, curves, best_epoch)
        if (title, curves) == ACCURACY:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        elif (title, curves) == GRADIENTS:
            set_logarithmic(axes, history, curves)
        elif (title, curves) != LOSS or not spans_decades(history, curves):
            axes.set_ylim(bottom=0 if (title, curves) != LOSS else None)
        else:
            set_logarithmic(axes, history, curves)
    save(figure, path)


def describe(history: History, best_epoch: int | None) -> tuple[str, str]:
    """The title, which says how far the run came, and a line about its best epoch."""
    last = round(history[-1]["epoch"])
    title = f"Learning curves of {last} {'epoch' if last == 1 else 'epochs'}"
    subtitle = "numbers: the last epoch's"
    row = next((row for row in history if row["epoch"] == best_epoch), None)
    if row is None:
        return title, subtitle
    accuracy = row.get("val/accuracy", math.nan)
    detail = f", validation accuracy {percent(accuracy, 1)}" if math.isfinite(accuracy) else ""
    return title, f"{subtitle}; dashed line: the best, epoch {best_epoch}{detail}"


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
        finite = [value for value in values if math.isfinite(value)]
        label = f"{name} {show(key, finite[-1])}".strip() if finite else name or "nothing finite"
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
    axes.set_xlim(first - 0.5, last + 0.5) if last - first < 10 else axes.set_xlim(first, last)
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
        noun = f"epoch {min(broken)}" if len(broken) == 1 else f"{len(broken)} epochs"
        since = f", first {min(broken)}" if len(broken) > 1 else ""
        axes.text(
            0.02,
            0.04,
            f"not finite in {noun}{since}",
            color=VERMILION,
            size=9,
            transform=axes.transAxes,
        )


def show(key: str, value: float) -> str:
    """The value as the legend says it."""
    if key.endswith("accuracy"):
        return percent(value, 1)
    return f"{value:,.0f}" if key == "images_per_second" else f"{value:.3g}"


def spans_decades(history: History, curves: list[tuple[str, str, str]]) -> bool:
    """True where all values are above 0 and the largest is over a hundred times the smallest."""
    values = [v for key, _, _ in curves for _, v in read(history, key) if math.isfinite(v)]
    return bool(values) and 0 < 100 * min(values) < max(values)


def set_logarithmic(axes: Axes, history: History, curves: list[tuple[str, str, str]]) -> None:
    """A logarithmic axis, if there is anything above 0 to show on it."""
    values = [v for key, _, _ in curves for _, v in read(history, key) if v > 0]
    if values:
        axes.set_yscale("log")
        # Plain numbers: matplotlib's powers of ten need its parser of formulas, and half a second.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(min(values) / 2, max(values) * 2)
