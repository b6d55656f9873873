"""The arms and their differences: every run a dot, the mean a diamond, the interval a bar."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
MOST_ROWS = 16  # of a panel; more go on in panels beside it


@dataclass(frozen=True)
class Row:
    """A name, single values as dots, and their mean with its interval."""

    name: str
    values: Sequence[float]
    mean: float
    interval: Interval | None

    @property
    def reach(self) -> list[float]:
        ends = [self.interval.low, self.interval.high] if self.interval is not None else []
        return finite([*self.values, self.mean, *ends])


def draw_arms(arms: Sequence[ArmResult], metric: str) -> list[Panel]:
    """A row for each arm, in this order: its runs, its mean and the interval of the mean."""
    rows = [Row(arm.name, arm.values, arm.mean.value, arm.mean.interval) for arm in arms]
    told = [f"{arm.name} {numbers.value(arm.mean.value, metric)}" for arm in arms]
    label = f"{metric}, %" if numbers.is_share(metric) else metric
    figures = draw_rows("Every run, the mean and its interval", rows, metric, label)
    return in_parts("arms", figures, metric, told)


def draw_differences(contrasts: Sequence[Contrast], metric: str) -> list[Panel]:
    """A row for each comparison: the pairs' differences, their mean and its interval; a line at 0.

    Unpaired comparisons have no dots.
    """
    others = {each.against for each in contrasts}
    title = "Differences" if len(others) > 1 else f"Difference to {next(iter(others))}"
    rows, told = [], []
    for each in contrasts:
        found = each.difference
        name = versus(each) if len(others) > 1 else each.arm
        rows.append(Row(name, each.values, found.estimate, found.interval))
        told.append(f"{versus(each)} {numbers.difference(found.estimate, metric)}")
    words = f"difference in {metric}"
    label = f"{words}, points" if numbers.is_share(metric) else words
    figures = draw_rows(title, rows, metric, label, from_zero=True)
    return in_parts("differences", figures, words, told)


def in_parts(name: str, figures: Sequence[Figure], words: str, told: Sequence[str]) -> list[Panel]:
    """The panels of a figure in parts, each with the words of its own rows."""
    return [
        finish(
            name if part == 0 else f"{name}-{part + 1}",
            figure,
            f"{words}: {', '.join(told[own])}",
        )
        for part, (figure, own) in enumerate(zip(figures, evenly(len(told)), strict=True))
    ]


def evenly(count: int) -> list[slice]:
    """Parts of at most MOST_ROWS of so many rows, as few and as even as can be; at least one."""
    parts = max(math.ceil(count / MOST_ROWS), 1)
    most = max(math.ceil(count / parts), 1)
    return [slice(first, first + most) for first in range(0, max(count, 1), most)]


def versus(contrast: Contrast) -> str:
    return f"{contrast.arm} {numbers.MINUS} {contrast.against}"


def draw_rows(
    title: str, rows: Sequence[Row], metric: str, label: str, *, from_zero: bool = False
) -> list[Figure]:
    """Figures of at most MOST_ROWS rows, all with the same axis; the names stand above the rows."""
    ends = limits([end for row in rows for end in row.reach] + [0.0] * from_zero)
    figures = []
    for own in evenly(len(rows)):
        part = rows[own]
        height = 84 + ROW * max(len(part), 1)
        figure, axes = new_panel(title, height=height, left=14, right=14)
        axes.set_ylim(len(part) - 0.45, -0.7)
        axes.set_xlim(*ends)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        light_grid(axes, "x")
        if from_zero:
            axes.axvline(0, color=INK, linewidth=1)
        for place, row in enumerate(part):
            draw_row(axes, place, row)
        write_values(axes, metric, on_x=True, sign=from_zero)
        name_axes(axes, label)
        figures.append(figure)
    return figures


def draw_row(axes: Axes, place: int, row: Row) -> None:
    """The name, below it the dots, and below them the mean as a diamond on its interval."""
    beside, below = axes.get_yaxis_transform(), place + 0.2
    name = axes.text(
        0, place - 0.38, short(row.name, 46), transform=beside, size=8, color=INK, va="center",
        parse_math=False, zorder=6,
    )  # fmt: skip
    name.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.8})
    dots = finite(row.values)
    axes.plot(dots, [place] * len(dots), linestyle="", marker="o", markersize=4.5, color=SKY)
    if row.interval is not None:
        ends = [row.interval.low, row.interval.high]
        axes.plot(ends, [below] * 2, color=BLUE, linewidth=2.4, solid_capstyle="butt", zorder=3)
    if math.isfinite(row.mean):
        axes.plot([row.mean], [below], marker="D", markersize=5.5, color=BLUE, zorder=4)
    else:
        axes.text(
            0.5, place, "no finite value", transform=beside, ha="center", va="center", size=8,
            color=MUTED,
        )  # fmt: skip


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
