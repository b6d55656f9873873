"""How the objective goes with the parameters: slices of it, and all parameters side by side.

A conditional parameter has axes only among the trials that have it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from research.pictures.style import (
    INK,
    MUTED,
    PAPER,
    VERMILION,
    add_axes,
    new_figure,
    save,
    tidy,
)
from research.search.importances import branches, label, shared
from research.search.learning_rates import PALE_TO_BLUE
from research.search.results import Dimension, Point, Results, short
from research.search.scales import (
    Window,
    draw_points,
    jitter,
    names_of,
    number,
    place,
    position,
    round_ticks,
    set_parameter,
    set_values,
    width_of,
    window_for,
)

ROWS = 4  # of panels on a page of slices
COLUMNS = 4
PANEL = 262  # pixels
MOST_BRANCHES = 20  # figures of parallel coordinates
LEGIBLE = 34  # letters of a class's name

Drawing = tuple[str, Callable[[Path], None]]


def drawings(results: Results, objective: int) -> list[Drawing]:
    """The names of the figures that have something to show, and how each is drawn."""
    found: list[Drawing] = []
    for page, rows in enumerate(pages(results), start=1):
        name = "slice" if page == 1 else f"slice_{page}"
        found.append((name, partial(draw_slices, results, objective, rows)))
    common = shared(results, results.complete)
    if len(common) > 1:
        found.append(
            (
                "parallel_coordinates",
                partial(draw_parallel, results, objective, results.complete, common, "all trials"),
            )
        )
    for name, points in branches(results)[:MOST_BRANCHES]:
        dimensions = shared(results, points)
        is_whole = len(points) == len(results.complete) and dimensions == common
        if len(points) > 1 and len(dimensions) > 1 and not is_whole:
            found.append(
                (
                    f"parallel_coordinates_{file_name(name)}",
                    partial(
                        draw_parallel, results, objective, points, dimensions, f"{name} trials"
                    ),
                )
            )
    return found


def file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)


# ---- slices --------------------------------------------------------------------------------------


def columns_of(dimension: Dimension) -> int:
    """How many panels' width the names below the axis need."""
    if not dimension.is_categorical:
        return 1
    needed = sum(width_of(name) + 10 for name in names_of(dimension, LEGIBLE)) + 56
    return min(COLUMNS, math.ceil(needed / PANEL))


def is_steep(dimension: Dimension) -> bool:
    """True where the names fit below the widest panel only when they are turned."""
    names = names_of(dimension, LEGIBLE)
    widest = COLUMNS * PANEL - 56
    return columns_of(dimension) == COLUMNS and max(map(width_of, names)) > widest / len(names)


def pages(results: Results) -> list[list[list[Dimension]]]:
    """Rows of panels, a page at a time: common dimensions first, then branch by branch."""
    drawn = [
        each
        for each in results.dimensions
        if any(each.name in point.varied for point in results.complete)
    ]
    rows: list[list[Dimension]] = []
    for each in sorted(drawn, key=lambda each: bool(each.branch)):
        taken = sum(map(columns_of, rows[-1])) if rows else COLUMNS
        if taken + columns_of(each) > COLUMNS:
            rows.append([])
        rows[-1].append(each)
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]


def row_height(row: Sequence[Dimension]) -> float:
    """Pixels from this row's top to the next one's."""
    longest = max(
        (width_of(n) for each in row if is_steep(each) for n in names_of(each)), default=0
    )
    return 258 + 0.42 * longest


def draw_slices(
    results: Results, objective: int, rows: Sequence[Sequence[Dimension]], path: Path
) -> None:
    """The objective against each parameter; later trials are darker."""
    goal = results.search.objectives[objective]
    window = window_for(results, objective)
    figure = new_figure(
        COLUMNS * PANEL + 70,
        round(100 + sum(row_height(row) for row in rows)),
        f"{goal.metric} by each parameter",
        "dark: later trials; vermilion: the best; ring: pruned; cross: diverged",
    )
    top = 112.0
    for row in rows:
        left = 76.0
        for dimension in row:
            wide = PANEL * columns_of(dimension)
            axes = add_axes(figure, left, top, wide - 46, 168, tidy(label(dimension), 26))
            if dimension.branch:
                axes.text(
                    0, 1.165, tidy(dimension.branch, LEGIBLE), size=8.5, color=MUTED,
                    transform=axes.transAxes, parse_math=False,
                )  # fmt: skip
            draw_slice(axes, results, objective, dimension, window)
            if dimension is not row[0]:
                axes.set_yticklabels([])
            left += wide
        top += row_height(row)
    save(figure, path)


def draw_slice(
    axes: Axes, results: Results, objective: int, dimension: Dimension, window: Window
) -> None:
    goal = results.search.objectives[objective]
    points = [p for p in results.points if dimension.name in p.varied]
    set_parameter(axes, dimension, LEGIBLE, ticks=5 if dimension.is_log else 6)
    set_values(axes, window, goal.metric)
    if is_steep(dimension):
        axes.set_xticks(axes.get_xticks(), names_of(dimension, LEGIBLE), rotation=35, ha="right")
        axes.tick_params(axis="x", pad=2)
    spread_out = 0.22 if dimension.is_categorical else 0.0
    newest = max((p.slot for p in points), default=0) or 1
    places = [(point, place(point, objective, window)) for point in points]
    for shade in range(4):
        own = [
            (p, at)
            for p, at in places
            if at is not None and min(3, 4 * p.slot // (newest + 1)) == shade
        ]
        xs = [position(dimension, p.varied[dimension.name]) for p, _ in own]
        xs = [x + jitter(p.slot, spread_out) for x, (p, _) in zip(xs, own, strict=True)]
        draw_points(axes, xs, [at for _, at in own], PALE_TO_BLUE(0.4 + 0.2 * shade), 15)
    sign = -1.0 if goal.direction == "maximize" else 1.0
    complete = [p for p in points if p.state == "complete"]
    if complete:
        best = min(complete, key=lambda p: sign * p.value(objective))
        x = position(dimension, best.varied[dimension.name]) + jitter(best.slot, spread_out)
        axes.scatter([x], [window.clip(best.value(objective))], s=34, color=VERMILION, zorder=5)


# ---- parallel coordinates ------------------------------------------------------------------------


def draw_parallel(
    results: Results,
    objective: int,
    points: Sequence[Point],
    dimensions: Sequence[Dimension],
    title: str,
    path: Path,
) -> None:
    """A line for each complete trial through its value of every parameter, to the objective."""
    goal = results.search.objectives[objective]
    window = window_for(results, objective)
    rooms = [room_for(dimension) for dimension in dimensions]
    # The names of an axis stand to its left.
    places = [rooms[0]]
    for room in rooms[1:]:
        places.append(places[-1] + 40 + room)
    end = places[-1] + 130
    width = max(700.0, end + 100)
    tallest = max([12, *(len(names_of(each)) for each in dimensions if each.is_categorical)])
    height = max(330, 19 * tallest)
    figure = new_figure(
        round(width),
        height + 150,
        f"{goal.metric} of {len(points)} complete trials: {title}",
        "a line is a trial; dark: among the best tenth; vermilion: the best",
    )
    axes = add_axes(figure, 0, 104, width, height)
    axes.set_xlim(0, width)
    axes.set_ylim(0, 1)
    axes.set_axis_off()
    sign = -1.0 if goal.direction == "maximize" else 1.0
    order = sorted(points, key=lambda p: -sign * p.value(objective))
    lines = [line_of(p, dimensions, places, end, window, objective) for p in order]
    span = window.high - window.low
    # By rank, not value: among many trials most are middling, and the best few are to be seen.
    good = [place_of / max(len(order) - 1, 1) for place_of in range(len(order))]
    colors: list[Any] = [PALE_TO_BLUE(0.08 + 0.92 * share**4) for share in good]
    colors[-1:] = [VERMILION]
    thick = [(0.5 if len(order) > 200 else 0.7) + 0.7 * share**4 for share in good]
    thick[-1:] = [2.2]
    alpha = 0.9 if len(order) <= 200 else 0.6
    axes.add_collection(
        LineCollection(
            lines, colors=colors, linewidths=thick, alpha=[alpha] * (len(lines) - 1) + [1.0]
        )
    )
    for dimension, x in zip(dimensions, places, strict=True):
        draw_coordinate(axes, dimension, x)
    axes.plot([end, end], [0, 1], color=INK, linewidth=1, clip_on=False, zorder=4)
    for value in round_ticks(window.low, window.high):
        height_at = (value - window.low) / span
        axes.text(
            end + 6,
            height_at,
            number(value, goal.metric),
            size=9,
            va="center",
            color=INK,
        )
    axes.text(
        end, 1.045, goal.metric, size=9.5, weight="bold", color=INK, ha="center", parse_math=False
    )
    save(figure, path)


def room_for(dimension: Dimension) -> float:
    """Pixels for the names at an axis's left."""
    names = names_of(dimension, LEGIBLE) if dimension.is_categorical else ["0.0001"]
    longest = max(map(width_of, names))
    return max(longest, 0.55 * width_of(label(dimension), 9.5)) + 26


def scaled(dimension: Dimension, value: float) -> float:
    """The place of the value on the axis, 0 to 1; logarithmic where it was drawn so."""
    if dimension.is_categorical:
        return (value + 0.5) / len(names_of(dimension))
    low, high = dimension.distribution.low, dimension.distribution.high  # type: ignore[attr-defined]
    if low == high:
        return 0.5
    if dimension.is_log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def line_of(
    point: Point,
    dimensions: Sequence[Dimension],
    places: Sequence[float],
    end: float,
    window: Window,
    objective: int,
) -> list[tuple[float, float]]:
    """The corners of the trial's line; at a categorical axis a little apart from the others."""
    line = []
    for dimension, x in zip(dimensions, places, strict=True):
        at = position(dimension, point.varied[dimension.name])
        if dimension.is_categorical:
            at += jitter(point.slot, 0.28)
        line.append((x, scaled(dimension, at)))
    value = window.clip(point.value(objective))
    return [*line, (end, (value - window.low) / (window.high - window.low))]


def draw_coordinate(axes: Axes, dimension: Dimension, x: float) -> None:
    """The axis, its ticks to the left, its name above."""
    axes.plot([x, x], [0, 1], color=INK, linewidth=1, clip_on=False, zorder=4)
    axes.text(
        x,
        1.045,
        label(dimension),
        size=9.5,
        weight="bold",
        color=INK,
        ha="center",
        parse_math=False,
    )
    box = {"facecolor": PAPER, "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    for value, name in ticks_of(dimension):
        axes.text(
            x - 6, scaled(dimension, value), name, size=9, color=INK, ha="right", va="center",
            bbox=box, zorder=5, parse_math=False,
        )  # fmt: skip


def ticks_of(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.is_categorical:
        return [(float(n), name) for n, name in enumerate(names_of(dimension, LEGIBLE))]
    low, high = dimension.distribution.low, dimension.distribution.high  # type: ignore[attr-defined]
    if dimension.is_log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        values = [10.0**power for power in range(first, last + 1)]
        values = values if len(values) > 1 else [low, high]
    else:
        values = round_ticks(low, high)
    return [(value, short(float(f"{value:.3g}"))) for value in values]
