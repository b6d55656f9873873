"""The arms and their differences: every run a dot, the mean a diamond, the interval a bar."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from research.pictures.style import BLUE, INK, MUTED, PAPER, SKY, VERMILION
from research.statistics.figures.panels import (
    Panel,
    finish,
    finite,
    light_grid,
    limits,
    name_axes,
    new_panel,
    short,
    write_values,
)
from research.statistics.interval import Interval
from research.statistics.report import numbers
from research.statistics.report.content import ArmResult, Contrast

ROW = 48  # pixels


def draw_arms(arms: Sequence[ArmResult], metric: str) -> Panel:
    """A row for each arm, in this order: its runs, its mean and the interval of the mean."""
    figure, axes = rows_panel("Every run, the mean and its interval", [arm.name for arm in arms])
    reach: list[float] = []
    for row, arm in enumerate(arms):
        reach += draw_row(axes, row, arm.values, arm.mean.value, arm.mean.interval)
    axes.set_xlim(*limits(reach))
    write_values(axes, metric, on_x=True)
    name_axes(axes, metric)
    means = (f"{arm.name} {numbers.value(arm.mean.value, metric)}" for arm in arms)
    return finish("arms", figure, f"{metric}: {', '.join(means)}")


def draw_differences(contrasts: Sequence[Contrast], metric: str) -> Panel:
    """A row for each comparison: the pairs' differences, their mean and its interval; a line at 0.

    Unpaired comparisons have no dots.
    """
    others = {each.against for each in contrasts}
    names = [versus(each) if len(others) > 1 else each.arm for each in contrasts]
    title = "Differences" if len(others) > 1 else f"Difference to {next(iter(others))}"
    figure, axes = rows_panel(title, names)
    reach = [0.0]
    for row, each in enumerate(contrasts):
        found = each.difference
        reach += draw_row(axes, row, each.values, found.estimate, found.interval)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlim(*limits(reach))
    write_values(axes, metric, on_x=True, sign=True)
    name_axes(axes, f"difference in {metric}{', points' if numbers.is_share(metric) else ''}")
    told = (
        f"{versus(each)}: {numbers.difference(each.difference.estimate, metric)}"
        for each in contrasts
    )
    return finish("differences", figure, f"difference in {metric}: {', '.join(told)}")


def versus(contrast: Contrast) -> str:
    return f"{contrast.arm} {numbers.MINUS} {contrast.against}"


def draw_pairs(
    contrast: Contrast, against: ArmResult, arm: ArmResult, metric: str, number: int
) -> Panel:
    """Each pair of runs as a line from the other arm to this one: blue where it goes up."""
    figure, axes = new_panel(f"The pairs: {contrast.against}, {contrast.arm}", top=46)
    ones = dict(zip(against.seeds, against.values, strict=True))
    others = dict(zip(arm.seeds, arm.values, strict=True))
    pairs = [(ones[seed], others[seed]) for seed in ones if seed in others]
    for left, right in pairs:
        color = BLUE if right > left else VERMILION
        axes.plot([0, 1], [left, right], color=color, linewidth=1.3, marker="o", markersize=4)
    means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
    axes.plot([0, 1], means, color=INK, linewidth=2.6, marker="D", markersize=5.5, zorder=5)
    axes.set_xlim(-0.3, 1.3)
    axes.set_ylim(*limits([value for pair in pairs for value in pair]))
    names = [short(against.name, 19), short(arm.name, 19)]
    axes.set_xticks([0, 1], names, color=INK, parse_math=False)
    light_grid(axes)
    write_values(axes, metric)
    name_axes(axes, y=metric)
    higher = sum(right > left for left, right in pairs)
    words = f"{arm.name} is higher than {against.name} in {higher} of {len(pairs)} pairs"
    return finish(f"pairs-{number}", figure, words)


def rows_panel(title: str, names: Sequence[str]) -> tuple[Figure, Axes]:
    """Axes with a row for each name, the name above its row: it may be long on a narrow screen."""
    figure, axes = new_panel(title, height=84 + ROW * max(len(names), 1), left=14, right=14)
    axes.set_ylim(len(names) - 0.45, -0.7)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    light_grid(axes, "x")
    for row, name in enumerate(names):
        label = axes.text(
            0, row - 0.38, short(name, 46), transform=axes.get_yaxis_transform(), size=8,
            color=INK, va="center", parse_math=False, zorder=6,
        )  # fmt: skip
        label.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.8})
    return figure, axes


def draw_row(
    axes: Axes, row: int, values: Sequence[float], mean: float, interval: Interval | None
) -> list[float]:
    """Draws dots, the interval as a bar and the mean as a diamond; returns how far they reach."""
    dots, below = finite(values), row + 0.2
    axes.plot(dots, [row] * len(dots), linestyle="", marker="o", markersize=4.5, color=SKY)
    ends = [interval.low, interval.high] if interval is not None else []
    if len(finite(ends)) == 2:
        axes.plot(ends, [below] * 2, color=BLUE, linewidth=2.4, solid_capstyle="butt", zorder=3)
    if math.isfinite(mean):
        axes.plot([mean], [below], marker="D", markersize=5.5, color=BLUE, zorder=4)
    else:
        axes.text(
            0.5, row, "no finite value", transform=axes.get_yaxis_transform(), ha="center",
            va="center", size=8, color=MUTED,
        )  # fmt: skip
    return finite([*dots, mean, *ends])
