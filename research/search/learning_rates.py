"""Learning-rate curves, and the map of losses by optimizers.

A point is a trial. The line goes through the best trial of each third of a decade: what a rate can
reach, whatever else was drawn with it. It is drawn for each colour where there are trials enough,
else for all colours together, and not across a decade without a trial.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from research.pictures.style import (
    BLUE,
    INK,
    LINE,
    MUTED,
    PAPER,
    add_axes,
    new_figure,
    save,
    tidy,
)
from research.search.ranking import Best, best_of_each, shown
from research.search.results import Point, Results, short, varies
from research.search.scales import (
    OTHERS,
    SERIES,
    Window,
    draw_points,
    number,
    place,
    set_log,
    set_values,
    width_of,
    window_for,
    window_of,
)

BIN = 1 / 3  # decades
FEWEST_ON_A_LINE = 3
FEWEST_OF_A_COLOR = 5  # trials of each colour in each panel, on average, for lines of their own
WIDEST_GAP = 1.0  # decades that a line crosses
LEGEND_COLUMNS = 4
PALE_TO_BLUE = LinearSegmentedColormap.from_list("pale_to_blue", ["#f2f5f8", "#7cc4ec", "#00507d"])
TITLES = {"optimizer": "optimizer", "model.loss": "loss"}

Drawing = tuple[str, Callable[[Path], None]]


def drawings(results: Results, objective: int) -> list[Drawing]:
    """The names of the figures that have something to show, and how each is drawn."""
    found: list[Drawing] = []
    losses = best_of_each(results, "model.loss", objective)
    optimizers = best_of_each(results, "optimizer", objective)
    if varies(results, "optimizer.lr"):
        found.append(
            (
                "learning_rate_by_optimizer",
                partial(draw_rates, results, objective, "optimizer", "model.loss"),
            )
        )
        if len(losses) > 1:
            found.append(
                (
                    "learning_rate_by_loss",
                    partial(draw_rates, results, objective, "model.loss", "optimizer"),
                )
            )
    if len(losses) > 1 and len(optimizers) > 1:
        found.append(
            ("loss_by_optimizer", partial(draw_map, results, objective, losses, optimizers))
        )
    return found


# ---- learning rates ------------------------------------------------------------------------------


def draw_rates(results: Results, objective: int, panels: str, colors: str, path: Path) -> None:
    """The objective against the learning rate: a panel for each `panels`, `colors` apart by colour.

    Both are keys, of loss or optimizer. Seven have colours of their own, the best ones; all others
    are grey.
    """
    goal = results.search.objectives[objective]
    window = window_for(results, objective)
    points = [point for point in results.points if point.settings.get("optimizer.lr") is not None]
    best = best_of_each(results, panels, objective)
    names: list[str | None] = [each.name for each in best] or [None]
    series = [each.name for each in best_of_each(results, colors, objective)]
    color_of = dict(zip(series, SERIES, strict=False)) if len(series) > 1 else {}
    by_color = len(points) >= FEWEST_OF_A_COLOR * len(names) * max(len(series), 1)
    columns = 2 if len(names) == 4 else min(len(names), 3 if len(names) <= 9 else 4)
    width = 1060 // max(columns, 2)
    rows = math.ceil(len(names) / columns)
    title = f"{goal.metric} by learning rate"
    title += f", for each {TITLES[panels]}" if len(names) > 1 else ""
    entries = len(color_of) + (len(series) > len(color_of) > 0)
    top = 116 + 19 * math.ceil(entries / LEGEND_COLUMNS)
    figure = new_figure(
        40 + max(width * columns, 700), top + 268 * rows - 10, title, subtitle(results, color_of)
    )
    rates = [float(point.settings["optimizer.lr"]) for point in points]
    for index, name in enumerate(names):
        own = [p for p in points if name is None or p.settings.get(panels) == name]
        axes = add_axes(
            figure,
            70 + width * (index % columns),
            top + 268 * (index // columns),
            width - 66,
            186,
        )
        letters = (width - 50) // 9
        axes.text(
            0, 1.135, tidy(name or "", letters), size=10.5, weight="bold", color=INK,
            transform=axes.transAxes, parse_math=False,
        )  # fmt: skip
        ranged = rates if panels == "model.loss" else rates_of(own)
        set_log(axes, min(ranged), max(ranged), ticks=5 if columns < 4 else 4)
        set_values(axes, window, goal.metric)
        draw_series(axes, own, objective, window, colors, color_of, by_color)
        tell_best(axes, best[index] if best else None, goal.metric, objective)
        if index + columns >= len(names):
            axes.set_xlabel("learning rate", color=MUTED, size=9)
    if color_of:
        handles = [
            Line2D(
                [], [], color=color, marker="o", markersize=5, linewidth=1.6, label=tidy(name, 34)
            )
            for name, color in color_of.items()
        ]
        if len(series) > len(color_of):
            handles.append(
                Line2D([], [], color=OTHERS, marker="o", markersize=5, linewidth=0,
                       label=f"{len(series) - len(color_of)} others")
            )  # fmt: skip
        total_width, total_height = figure.get_size_inches() * 100
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(12 / total_width, 1 - 60 / total_height),
            ncols=LEGEND_COLUMNS,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            handlelength=1.4,
            columnspacing=1.6,
        )
    save(figure, path)


def subtitle(results: Results, color_of: dict[str, str]) -> str:
    states = {point.state for point in results.points}
    words = ["dot: a trial; line: the best in each third of a decade"]
    words += ["ring: pruned, at its last value"] if "pruned" in states else []
    words += ["cross at the edge: diverged"] if "diverged" in states else []
    return "; ".join(words)


def rates_of(points: Sequence[Point]) -> list[float]:
    return [float(point.settings["optimizer.lr"]) for point in points]


def draw_series(
    axes: Axes,
    points: Sequence[Point],
    objective: int,
    window: Window,
    key: str,
    color_of: dict[str, str],
    by_color: bool,
) -> None:
    """The points, the best series on top, and the line of each or of all."""
    for name in [None, *reversed(color_of)] if color_of else [None]:
        own = [p for p in points if color_of and name == known(p, key, color_of)]
        own = own if color_of else list(points)
        color = color_of[name] if name is not None else (OTHERS if color_of else BLUE)
        places = [place(point, objective, window) for point in own]
        shown_points = [(r, at) for r, at in zip(rates_of(own), places, strict=True) if at]
        if not shown_points:
            continue
        xs, ats = zip(*shown_points, strict=True)
        draw_points(axes, xs, ats, color, 16)
        if (by_color and name is not None) or not color_of:
            draw_line(axes, best_in_bins(own, objective, window), color)
    if color_of and not by_color:
        draw_line(axes, best_in_bins(points, objective, window), OTHERS)


def draw_line(axes: Axes, line: Sequence[tuple[float, float]], color: str) -> None:
    for piece in pieces(line) if len(line) >= FEWEST_ON_A_LINE else []:
        across, up = zip(*piece, strict=True)
        above = 2.5 if color == OTHERS else 3.5
        axes.plot(across, up, color=color, linewidth=1.5, alpha=0.9, zorder=above)


def known(point: Point, key: str, color_of: dict[str, str]) -> str | None:
    name = point.settings.get(key)
    return name if name in color_of else None


def best_in_bins(
    points: Sequence[Point], objective: int, window: Window
) -> list[tuple[float, float]]:
    """(learning rate, value) of the best complete trial in each third of a decade."""
    best: dict[int, tuple[float, float]] = {}
    lower_is_worse = window.poor == window.low
    for point in points:
        rate = float(point.settings["optimizer.lr"])
        if point.state != "complete" or rate <= 0:
            continue
        value = point.value(objective)
        if not window.holds(value):
            continue
        place_of = math.floor(math.log10(rate) / BIN)
        before = best.get(place_of)
        if before is None or ((value > before[1]) == lower_is_worse and value != before[1]):
            best[place_of] = rate, value
    return [best[each] for each in sorted(best)]


def pieces(line: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The line, broken where there is no trial for more than a decade."""
    found: list[list[tuple[float, float]]] = []
    for rate, value in line:
        if found and math.log10(rate / found[-1][-1][0]) <= WIDEST_GAP:
            found[-1].append((rate, value))
        else:
            found.append([(rate, value)])
    return found


def tell_best(axes: Axes, best: Best | None, metric: str, objective: int) -> None:
    if best is None or best.lr is None:
        return
    axes.text(
        0.0,
        1.04,
        f"best: {shown(best.point.value(objective), metric)} at {short(float(best.lr))}",
        transform=axes.transAxes,
        size=9,
        color=MUTED,
        parse_math=False,
    )


# ---- losses by optimizers ------------------------------------------------------------------------


def draw_map(
    results: Results, objective: int, losses: Sequence[Best], optimizers: Sequence[Best], path: Path
) -> None:
    """The best value with each loss and each optimizer, and how many trials the cell had."""
    goal = results.search.objectives[objective]
    rows, columns = names_in(results, "model.loss", losses), names_in(
        results, "optimizer", optimizers
    )  # fmt: skip
    window = shades(results, objective, rows, columns)
    left = 30 + max(width_of(tidy(name, 34)) for name in rows)
    tall = 46 if len(rows) <= 12 else 34
    wide = 92 if len(columns) <= 10 else 70
    figure = new_figure(
        round(max(left + wide * len(columns) + 30, 640)),
        110 + tall * len(rows) + 30,
        f"The best {goal.metric} with each loss and optimizer",
        "below: how many trials came to their end, of how many; hatched: none tried",
    )
    axes = add_axes(figure, left, 106, wide * len(columns), tall * len(rows))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.set_xticks(np.arange(len(columns)) + 0.5, [tidy(name, 12) for name in columns])
    axes.set_yticks(np.arange(len(rows)) + 0.5, [tidy(name, 34) for name in rows])
    axes.tick_params(colors=INK, labelsize=9, pad=4)
    sign = -1.0 if goal.direction == "maximize" else 1.0
    for row, loss in enumerate(rows):
        for column, optimizer in enumerate(columns):
            own = cell(results, loss, optimizer)
            complete = [point.value(objective) for point in own if point.state == "complete"]
            best = sign * min(sign * value for value in complete) if complete else None
            draw_cell(axes, row, column, best, len(complete), len(own), window, goal.metric)
    save(figure, path)


def cell(results: Results, loss: str, optimizer: str) -> list[Point]:
    """The trials with this loss and this optimizer that have ended."""
    return [
        point
        for point in results.points
        if point.settings.get("model.loss") == loss
        and point.settings.get("optimizer") == optimizer
        and point.state != "open"
    ]


def shades(results: Results, objective: int, rows: Sequence[str], columns: Sequence[str]) -> Window:
    """From the best cell's value to that of the poorest, outliers left out."""
    goal = results.search.objectives[objective]
    pick = max if goal.direction == "maximize" else min
    values = [
        [p.value(objective) for p in cell(results, loss, optimizer) if p.state == "complete"]
        for loss in rows
        for optimizer in columns
    ]
    return window_of([pick(each) for each in values if each], goal)


def names_in(results: Results, key: str, best: Sequence[Best]) -> list[str]:
    """The names, the best first, then those with which no trial came to its end."""
    names = [each.name for each in best]
    tried = {str(point.settings[key]) for point in results.points if key in point.settings}
    return [*names, *sorted(tried - set(names))]


def draw_cell(
    axes: Axes,
    row: int,
    column: int,
    best: float | None,
    complete: int,
    tried: int,
    window: Window,
    metric: str,
) -> None:
    span = window.high - window.low
    good = 0.0 if best is None else abs(window.clip(best) - window.poor) / span
    empty = best is None
    axes.add_patch(
        Rectangle(
            (column, row),
            1,
            1,
            facecolor=PAPER if empty else PALE_TO_BLUE(good),
            edgecolor=LINE if empty else PAPER,
            hatch="////" if empty and not tried else None,
            linewidth=1.5,
        )
    )
    color = PAPER if good > 0.62 else INK
    if best is not None:
        axes.text(
            column + 0.5, row + 0.4, cell_text(best, metric), size=9.5, color=color,
            ha="center", va="center", parse_math=False,
        )  # fmt: skip
    if tried:
        counted = f"{complete} of {tried}" if complete < tried else str(tried)
        axes.text(
            column + 0.5, row + 0.76, counted if not empty else f"0 of {tried}", size=7.5,
            color=color if not empty else MUTED, ha="center", va="center",
        )  # fmt: skip


def cell_text(value: float, metric: str) -> str:
    return f"{100 * value:.1f} %" if metric.endswith("accuracy") else number(value, metric)
