"""Lines with bands over epochs, trials or time: one panel for few arms, one each for many.

Beyond six, colours are not told apart any more: then every arm has a panel of its own, with all
others in grey behind it and the same axes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from research.pictures.style import BLUE, LINE, MUTED
from research.statistics.best_of import BestOf
from research.statistics.figures.panels import (
    COLORS,
    HEIGHT,
    Panel,
    core,
    finish,
    finite,
    legend,
    light_grid,
    limits,
    name_axes,
    new_panel,
    nothing_to_show,
    short,
    write_values,
)
from research.statistics.interval import Interval
from research.statistics.report import numbers
from research.statistics.report.content import Curves
from research.statistics.survival import Race

MOST_MULTIPLES = 24


@dataclass(frozen=True)
class Line:
    """A line and its band, all of one length; `marks` are the (x, y) of censored runs."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    marks: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """The name of x, the metric of y, how points are joined, and which ends y has.

    Without `y_limits` y holds the lines, but for values far out unless it `keeps_all`.
    """

    x: str
    metric: str
    joined: Literal["straight", "steps"] = "straight"
    y_limits: tuple[float, float] | None = None
    whole_x: bool = True
    keeps_all: bool = False

    @property
    def unit(self) -> str:
        return "%" if numbers.is_share(self.metric) else ""

    @property
    def named(self) -> str:
        """The metric with its unit."""
        return f"{self.metric}, {self.unit}" if self.unit else self.metric


def draw_curves(curves: Curves) -> list[Panel]:
    """Learning curves of all arms in one metric: mean over seeds, and its interval as a band."""
    lines = []
    for curve in curves.curves:
        places = [(point.epoch, point.mean, point.interval) for point in curve.points]
        lines.append(line_of(curve.arm, places))
    return draw_lines(f"curves-{curves.metric}", curves.metric, lines, Axis("epoch", curves.metric))


def draw_best_of(found: Mapping[str, BestOf], metric: str) -> list[Panel]:
    """The best result to be expected of k trials, by k, of each loss and optimizer."""
    ends = (0.0, 1.0) if numbers.is_share(metric) else (-math.inf, math.inf)
    lines = [
        line_of(
            name, [(best.k, best.expected, within(best.interval, ends)) for best in each.points]
        )
        for name, each in found.items()
    ]
    title = f"Expected best {metric}"
    return draw_lines("best-of", title, lines, Axis("number of trials", metric, keeps_all=True))


def draw_race(race: Race, title: str, number: int) -> list[Panel]:
    """The share of runs that reached the target, by time; a tick where a run was seen no more."""
    lines = []
    for arm in race.arms:
        steps: list[Place] = [(0.0, 0.0, None)]
        for step in arm.steps:
            low, high = 1 - step.interval.high, 1 - step.interval.low
            steps.append((step.time, 1 - step.waiting, Interval(low, high, step.interval.level)))
        last = max((waiting.time for waiting in arm.waitings), default=0.0)
        if last > steps[-1][0]:
            steps.append((last, *steps[-1][1:]))
        gone = [waiting.time for waiting in arm.waitings if not waiting.reached]
        marks = [(time, height(steps, time)) for time in gone]
        lines.append(line_of(arm.name, steps, marks))
    axis = Axis(race.unit, "share of runs", "steps", (0.0, 1.0), whole_x=race.unit == "epochs")
    return draw_lines(f"target-{number}", title, lines, axis)


Place = tuple[float, float, Interval | None]


def line_of(name: str, places: Sequence[Place], marks: Sequence[tuple[float, float]] = ()) -> Line:
    lows = [math.nan if found is None else found.low for _, _, found in places]
    highs = [math.nan if found is None else found.high for _, _, found in places]
    return Line(name, [x for x, _, _ in places], [y for _, y, _ in places], lows, highs, marks)


def within(interval: Interval | None, ends: tuple[float, float]) -> Interval | None:
    """What of the interval can be: a symmetric one of a few trials reaches beyond 0 and 100 %."""
    if interval is None:
        return None
    low, high = ends
    return Interval(max(interval.low, low), min(interval.high, high), interval.level)


def height(steps: Sequence[Place], time: float) -> float:
    """The height of the steps at this time."""
    return [value for at, value, _ in steps if at <= time][-1]


def draw_lines(name: str, title: str, lines: Sequence[Line], axis: Axis) -> list[Panel]:
    """One panel with a legend for up to six lines, a panel for each of the first of more."""
    if len(lines) <= len(COLORS):
        return [draw_together(name, title, lines, axis)]
    shown = lines[:MOST_MULTIPLES]
    return [
        draw_alone(f"{name}-{number}", line, shown, axis)
        for number, line in enumerate(shown, start=1)
    ]


def draw_together(name: str, title: str, lines: Sequence[Line], axis: Axis) -> Panel:
    columns = 1 if any(len(line.name) > 18 for line in lines) else 2
    rows = -(-len(lines) // columns) if len(lines) > 1 else 0
    bottom = 48 + 20 * rows
    figure, axes = new_panel(title, height=HEIGHT - 44 + bottom, bottom=bottom, top=48)
    for line, color in zip(lines, COLORS, strict=False):
        draw_line(axes, line, axis, color, band=True)
    set_axes(axes, lines, axis, axis.unit)
    if rows:
        legend(axes, "upper left", at=(-0.1, -0.24), columns=columns)
    return finish(name, figure, f"{title}: {', '.join(line.name for line in lines)}")


def draw_alone(name: str, line: Line, lines: Sequence[Line], axis: Axis) -> Panel:
    figure, axes = new_panel(line.name, height=220, top=46, width=300)
    for other in lines:
        if other is not line:
            draw_line(axes, other, axis, MUTED, band=False, width=0.8, alpha=0.35)
    draw_line(axes, line, axis, BLUE, band=True)
    set_axes(axes, lines, axis, axis.named)
    return finish(name, figure, f"{axis.metric} of {line.name}, all others in grey")


def draw_line(
    axes: Axes,
    line: Line,
    axis: Axis,
    color: str,
    *,
    band: bool,
    width: float = 1.8,
    alpha: float = 1.0,
) -> None:
    steps = axis.joined == "steps"
    if band and any(len(finite(pair)) == 2 for pair in zip(line.low, line.high, strict=True)):
        axes.fill_between(
            line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0,
            step="post" if steps else None,
        )  # fmt: skip
    # A value between two gaps has no line, and a line of one point no length: points show both.
    pointed = len(finite(line.y)) == 1 or (has_gaps(line.y) and band)
    axes.plot(
        line.x, line.y, color=color, linewidth=width, alpha=alpha, label=short(line.name, 36),
        drawstyle="steps-post" if steps else "default", marker="o" if pointed else "", markersize=4,
    )  # fmt: skip
    if band and line.marks:
        axes.plot(
            *zip(*line.marks, strict=True), linestyle="", marker="|", markersize=9, color=color,
            markeredgewidth=1.6, clip_on=False,
        )  # fmt: skip


def has_gaps(values: Sequence[float]) -> bool:
    """True where a number stands between two that are none, or beside the end."""
    shown = [bool(finite([value])) for value in values]
    alone = [
        here and not before and not after
        for before, here, after in zip([False, *shown], shown, [*shown[1:], False], strict=False)
    ]
    return any(alone)


def set_axes(axes: Axes, lines: Sequence[Line], axis: Axis, y: str) -> None:
    """The same ends for all panels of a figure; what ran far off does not set them."""
    heights = [value for line in lines for value in finite(line.y)]
    if not heights:
        nothing_to_show(axes, "no finite value")
        return
    bands = [value for line in lines for value in finite([*line.low, *line.high])]
    low, high = limits(heights) if axis.keeps_all else core(heights)
    if bands:
        room = high - low
        low = min(low, max(min(bands), low - room / 2))
        high = max(high, min(max(bands), high + room / 2))
    axes.set_ylim(*(axis.y_limits or (low, high)))
    if axis.y_limits is not None:
        axes.set_ylim(axis.y_limits[0] - 0.02, axis.y_limits[1] + 0.04)
    across = [value for line in lines for value in finite(line.x)]
    first, last = min(across), max(across)
    axes.set_xlim(*((first, last) if last > first else (first - 0.5, last + 0.5)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=axis.whole_x, nbins=6))
    light_grid(axes)
    write_values(axes, axis.metric)
    name_axes(axes, axis.x, y)
    axes.spines["bottom"].set_color(LINE)


def at_risk(race: Race, times: Sequence[float]) -> dict[str, list[int]]:
    """For each arm how many of its runs were still on their way at these times."""
    return {
        arm.name: [sum(waiting.time >= time for waiting in arm.waitings) for time in times]
        for arm in race.arms
    }


def round_times(race: Race) -> list[float]:
    """About five round times from 0 to the last."""
    ends = finite(waiting.time for arm in race.arms for waiting in arm.waitings)
    last = max(ends, default=0.0)
    places = MaxNLocator(nbins=4, integer=race.unit == "epochs").tick_values(0, max(last, 1.0))
    return [float(tick) for tick in places if 0 <= tick <= last]
