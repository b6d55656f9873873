"""Axes for what a search found: a range that outliers do not rule, and marks for what lies beyond.

Points are told apart by how their trial ended: a dot is complete, a ring was pruned (it stands at
the last value that was reported), a cross at the poor edge diverged, a plus there failed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from research.configuration.compose import CHOICES
from research.pictures.style import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    SKY,
    VERMILION,
    cut_middle,
    tidy,
)
from research.search.results import Dimension, Point, Results, short

if TYPE_CHECKING:
    from research.search.document import Objective

# The best series have colours of their own; all others share a grey.
SERIES = (BLUE, VERMILION, GREEN, AMBER, SKY, "#cc79a7", INK)
OTHERS = "#b5bdc7"
PERCENT = 100
STEPS = [1, 2, 5, 10]  # of round ticks


@dataclass(frozen=True)
class Window:
    """The range of values that is drawn; `poor` is the edge at which bad values end."""

    low: float
    high: float
    poor: float

    def clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    @property
    def mark(self) -> str:
        """What stands at the edge for a value beyond it: a triangle that points there."""
        return "v" if self.poor == self.low else "^"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def window_of(values: Sequence[float], objective: "Objective") -> Window:
    """From the best value as far towards the bad ones as most of them need.

    Where a tenth or less lies more than twice as far from the best as all others, it is left out,
    to be marked at the edge.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Window(0.0, 1.0, 0.0)
    sign = -1.0 if objective.direction == "maximize" else 1.0
    costs = np.sort(sign * np.asarray(finite))
    best, worst = float(costs[0]), float(costs[-1])
    usual = float(np.quantile(costs, 0.9))
    if worst - best > 3 * (usual - best) > 0:
        worst = best + 1.5 * (usual - best)
    margin = 0.06 * (worst - best) or 0.05 * abs(best) or 0.5
    edges = sign * (best - margin), sign * (worst + 1.5 * margin)
    return Window(min(edges), max(edges), edges[1])


def window_for(results: Results, objective: int) -> Window:
    return window_of(
        [point.value(objective) for point in results.complete], results.search.objectives[objective]
    )


# ---- axes ----------------------------------------------------------------------------------------


def set_values(axes: Axes, window: Window, metric: str, is_x: bool = False) -> None:
    """The objective's axis, accuracies in percent, with light lines across."""
    axis = axes.xaxis if is_x else axes.yaxis
    (axes.set_xlim if is_x else axes.set_ylim)(window.low, window.high)
    axis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, metric)))
    axes.grid(axis="x" if is_x else "y", color=LINE, linewidth=0.7)


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, for an axis that matplotlib does not know."""
    ticks = MaxNLocator(nbins=most, steps=STEPS).tick_values(low, high)
    room = 1e-9 * (high - low)
    return [round(float(tick), 12) for tick in ticks if low - room <= tick <= high + room]


def number(value: float, metric: str) -> str:
    """A tick of the objective's axis: short."""
    return f"{PERCENT * value:.4g} %" if metric.endswith("accuracy") else f"{value:.4g}"


def set_parameter(axes: Axes, dimension: Dimension, letters: int = 16, ticks: int = 6) -> None:
    """The x axis of a parameter: by name where categorical, logarithmic where drawn so."""
    if dimension.is_categorical:
        names = names_of(dimension, letters)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        return
    distribution: Any = dimension.distribution
    if dimension.is_log:
        set_log(axes, distribution.low, distribution.high, ticks)
        return
    margin = 0.04 * (distribution.high - distribution.low) or 0.5
    axes.set_xlim(distribution.low - margin, distribution.high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def set_log(axes: Axes, low: float, high: float, ticks: int = 6) -> None:
    """A logarithmic x axis with plain numbers; powers of ten would load the parser of formulas."""
    axes.set_xscale("log")
    room = (high / low) ** 0.04 if high > low else 2.0
    axes.set_xlim(low / room, high * room)
    few = math.log10(high / low) < 1.5 if high > low else True
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def names_of(dimension: Dimension, letters: int = 40) -> list[str]:
    """The choices as they are printed; classes without the module that they are from."""
    choices: Any = getattr(dimension.distribution, "choices", ())
    return [name_of(dimension.key, choice, letters) for choice in choices]


def name_of(key: str, choice: Any, letters: int = 40) -> str:
    text = str(choice).rpartition(".")[2] if key in CHOICES else short(choice)
    return tidy(text, letters)


def position(dimension: Dimension, value: Any) -> float:
    """Where the value stands on the parameter's axis; a categorical one by its number."""
    if dimension.is_categorical:
        choices: Any = getattr(dimension.distribution, "choices", ())
        return float(choices.index(value))
    return float(value)


def jitter(slot: int, width: float) -> float:
    """A shift from -width to width that is the same for the same slot, evenly spread."""
    return width * (2 * ((slot * 0.6180339887) % 1.0) - 1)


# ---- points --------------------------------------------------------------------------------------


def place(point: Point, objective: int, window: Window) -> tuple[float, str] | None:
    """At what height the trial stands, and its mark; None where it says nothing."""
    if point.state == "complete":
        value = point.value(objective)
        return window.clip(value), "o" if window.holds(value) else window.mark
    if point.state == "pruned" and point.last is not None and objective == 0:
        return window.clip(point.last), "ring"
    if point.state in ("diverged", "failed"):
        return window.poor, "x" if point.state == "diverged" else "+"
    return None


def draw_points(
    axes: Axes, xs: Sequence[float], places: Sequence[tuple[float, str]], color: Any, size: float
) -> None:
    """The marks, each at its place; what was pruned, diverged or failed is pale."""
    looks: dict[str, dict[str, Any]] = {
        "o": {"marker": "o", "color": color, "linewidths": 0, "alpha": 0.85},
        "v": {"marker": "v", "color": color, "linewidths": 0},
        "^": {"marker": "^", "color": color, "linewidths": 0},
        "ring": {"marker": "o", "facecolors": "none", "edgecolors": OTHERS, "linewidths": 0.8},
        "x": {"marker": "x", "color": MUTED, "linewidths": 1.1},
        "+": {"marker": "+", "color": OTHERS, "linewidths": 1.0},
    }
    for mark, look in looks.items():
        chosen = [(x, y) for x, (y, own) in zip(xs, places, strict=True) if own == mark]
        if chosen:
            above = 3 if mark in ("o", "v", "^") else 2
            across, up = zip(*chosen, strict=True)
            axes.scatter(across, up, s=size, clip_on=False, zorder=above, **look)


def width_of(text: str, size: float = 9.0) -> float:
    """About how many pixels the text takes; letters of DejaVu Sans are 0.6 of their size wide."""
    return 0.62 * size * len(text) * 100 / 72


def shorten(text: str, letters: int) -> str:
    return text if len(text) <= letters else cut_middle(text, letters)
