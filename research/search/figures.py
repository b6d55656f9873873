"""The figures of a search, as PNG files that MLflow's page previews.

`draw_figures` makes those that have something to show. Optuna's own plots
(visualization.matplotlib) are not used: their parallel coordinates put the parameters of every
class side by side, most of them "None" for any one trial, and their slices and histories let
one trial that ran away set the axis. Its importances are.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from research.pictures.style import (
    BLUE,
    INK,
    MUTED,
    PAPER,
    SKY,
    VERMILION,
    add_axes,
    new_figure,
    save,
    tidy,
)
from research.search import importances, learning_rates, relations
from research.search.ranking import (
    Ranked,
    pareto_front,
    ranked,
    spread,
)
from research.search.results import (
    Point,
    Results,
    State,
    counts,
    described,
)
from research.search.scales import (
    OTHERS,
    draw_points,
    number,
    place,
    set_values,
    shorten,
    window_for,
    window_of,
)

CANDIDATES = 12  # of the confirmation, at most


def draw_figures(results: Results, folder: Path) -> tuple[list[Path], list[str]]:
    """Write the figures into the folder; returns the files, and a line for what was left out."""
    files: list[Path] = []
    notes: list[str] = []

    def draw(drawing: Callable[[Path], None], name: str, suffix: str = "") -> None:
        file = folder / f"{name}{suffix}.png"
        drawing(file)
        files.append(file)

    if len(results.points) == 0:
        return [], ["No trial has ended, so there is nothing to draw."]
    if any(entry.fresh is not None for entry in ranked(results)):
        draw(partial(draw_confirmation, results), "confirmation")
    several = len(results.search.objectives) > 1
    if several and results.complete:
        draw(partial(draw_pareto_front, results), "pareto_front")
    for index, objective in enumerate(results.search.objectives):
        suffix = f"_{objective.metric.replace('/', '_')}" if several else ""
        draw(partial(draw_history, results, index), "history", suffix)
        if not results.complete:
            continue
        for name, drawing in [
            *learning_rates.drawings(results, index),
            *relations.drawings(results, index),
        ]:
            draw(drawing, name, suffix)
        found, left_out = importances.groups(results, index)
        if found:
            draw(
                partial(importances.draw_importances, results, found, index), "importances", suffix
            )
        notes += left_out
    if not results.complete:
        notes.append("No trial came to its end: the history is all there is to draw.")
    return files, list(dict.fromkeys(notes))


# ---- history -------------------------------------------------------------------------------------


def draw_history(results: Results, objective: int, path: Path) -> None:
    """The objective of each trial in the order in which they ended, and the best so far."""
    goal = results.search.objectives[objective]
    window = window_for(results, objective)
    ended = sorted(
        (point for point in results.points if point.state != "open"),
        key=lambda point: (
            (
                point.trial.datetime_complete is None,
                point.trial.datetime_complete,
                point.slot,
            )
            if point.trial.datetime_complete is not None
            else (True, 0, point.slot)
        ),
    )
    found = counts(results)
    title = f"{goal.metric} of {found['complete']} complete trials"
    figure = new_figure(1100, 470, title, history_subtitle(results, objective))
    axes = add_axes(figure, 76, 100, 990, 300)
    places = [place(point, objective, window) for point in ended]
    numbers = [n for n, where in enumerate(places, start=1) if where is not None]
    draw_points(axes, numbers, [where for where in places if where is not None], SKY, 26)
    steps = best_so_far(ended, objective, goal.direction)
    if steps:
        xs, ys = zip(*steps, strict=True)
        xs, ys = (*xs, len(ended)), (*ys, ys[-1])
        axes.plot(
            xs,
            [window.clip(y) for y in ys],
            color=BLUE,
            linewidth=1.8,
            drawstyle="steps-post",
            zorder=4,
        )
    axes.set_xlim(0, len(ended) + 1)
    axes.set_xlabel("trials, in the order in which they ended", color=MUTED, size=9)
    set_values(axes, window, goal.metric)
    looks: list[tuple[State, dict[str, Any]]] = [
        ("complete", {"marker": "o", "color": SKY}),
        ("pruned", {"marker": "o", "markerfacecolor": "none", "color": OTHERS}),
        ("diverged", {"marker": "x", "color": MUTED}),
        ("failed", {"marker": "+", "color": OTHERS}),
    ]
    handles = [
        Line2D([], [], linestyle="", markersize=6, label=f"{found[state]} {state}", **look)
        for state, look in looks
        if found[state]
    ]
    axes.legend(
        handles=[Line2D([], [], color=BLUE, linewidth=1.8, label="best so far"), *handles],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=5,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.2,
        columnspacing=1.4,
        borderaxespad=0.15,
    )
    save(figure, path)


def history_subtitle(results: Results, objective: int) -> str:
    goal = results.search.objectives[objective]
    window = window_for(results, objective)
    beyond = sum(not window.holds(point.value(objective)) for point in results.complete)
    words = ["a ring stands at the last value that a pruned trial reported"]
    if beyond:
        words.append(f"{beyond} beyond {number(window.poor, goal.metric)} at the edge (triangles)")
    return "; ".join(words)


def best_so_far(ended: list[Point], objective: int, direction: str) -> list[tuple[int, float]]:
    """(number of the trial from 1, best value) where the best value changed."""
    sign = -1.0 if direction == "maximize" else 1.0
    steps: list[tuple[int, float]] = []
    for number_of, point in enumerate(ended, start=1):
        if point.state != "complete":
            continue
        value = point.value(objective)
        if not steps or sign * value < sign * steps[-1][1]:
            steps.append((number_of, value))
    return steps


# ---- several objectives --------------------------------------------------------------------------


def draw_pareto_front(results: Results, path: Path) -> None:
    """Every complete trial in the plane of each two objectives, the Pareto front in blue."""
    goals = results.search.objectives
    pairs = [(x, y) for y in range(len(goals)) for x in range(len(goals)) if x > y]
    front = pareto_front(results)
    figure = new_figure(
        40 + 560 * len(pairs),
        560,
        f"Pareto front: {len(front)} of {len(results.complete)} complete trials",
        "blue: no other trial is better in every objective",
    )
    for column, (x, y) in enumerate(pairs):
        axes = add_axes(figure, 86 + 560 * column, 84, 450, 400)
        windows = window_for(results, x), window_for(results, y)
        at = [
            (windows[0].clip(point.value(x)), windows[1].clip(point.value(y)))
            for point in results.complete
        ]
        across, up = zip(*at, strict=True)
        axes.scatter(across, up, s=26, color=OTHERS, linewidths=0, clip_on=False)
        best = sorted((point.value(x), point.value(y)) for point in front)
        axes.plot(
            *zip(*best, strict=True),
            color=BLUE,
            linewidth=1.2 if len(goals) == 2 else 0,
            drawstyle="steps-post" if goals[x].direction == "minimize" else "steps-pre",
            marker="o",
            markersize=6,
            clip_on=False,
        )
        set_values(axes, windows[1], goals[y].metric)
        set_values(axes, windows[0], goals[x].metric, is_x=True)
        for goal, label in ((goals[x], axes.set_xlabel), (goals[y], axes.set_ylabel)):
            better = "higher" if goal.direction == "maximize" else "lower"
            label(f"{goal.metric} ({better} is better)", color=MUTED, size=9)
    save(figure, path)


# ---- confirmation --------------------------------------------------------------------------------


def draw_confirmation(results: Results, path: Path) -> None:
    """What each confirmed configuration reached: a dot for a seed, the mean and its interval."""
    metric = results.objective.metric
    entries = [e for e in ranked(results) if e.fresh is not None and e.fresh.values][:CANDIDATES]
    figure = new_figure(
        1100,
        150 + 62 * max(len(entries), 1),
        f"{metric} on fresh seeds",
        "dot: a seed; line: mean and its 95 % interval (Student's t); "
        "ring: the search's own value, selected and so no part of the mean",
    )
    axes = add_axes(figure, 60, 86, 1000, 20 + 62 * max(len(entries), 1))
    values = [value for entry in entries for value in seen(entry)]
    window = window_of(values, results.objective)
    axes.set_ylim(len(entries) - 0.4, -0.62)
    set_values(axes, window, metric, is_x=True)
    for row, entry in enumerate(entries):
        assert entry.fresh is not None
        seeds = list(entry.fresh.values.values())
        interval = entry.fresh.interval()
        if interval is not None:
            ends = [window.clip(end) for end in interval]
            axes.plot(ends, [row + 0.12] * 2, color=BLUE, linewidth=2, solid_capstyle="butt")
        axes.plot([window.clip(entry.fresh.mean)] * 2, [row, row + 0.24], color=BLUE, linewidth=3)
        axes.scatter(
            [window.clip(value) for value in seeds],
            [row + 0.12] * len(seeds),
            s=34,
            color=SKY,
            edgecolors=PAPER,
            linewidths=0.6,
            zorder=3,
            clip_on=False,
        )
        axes.scatter(
            [window.clip(entry.point.value())],
            [row + 0.12],
            s=34,
            facecolors=PAPER,
            edgecolors=VERMILION,
            linewidths=1.2,
            zorder=3,
            clip_on=False,
        )
        name = tidy(f"{described(results, entry.point)}", 400)
        axes.text(
            0.002,
            row - 0.24,
            f"{shorten(name, 105)}   {spread(entry.fresh, metric)}",
            transform=axes.get_yaxis_transform(),
            size=9,
            color=INK,
            va="center",
            parse_math=False,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )
    axes.set_yticks(
        [row + 0.12 for row in range(len(entries))], [str(entry.place) for entry in entries]
    )
    axes.spines["left"].set_visible(False)
    save(figure, path)


def seen(entry: Ranked) -> list[float]:
    """All values that the row shows; an interval wider than three times them is cut."""
    assert entry.fresh is not None
    values = [*entry.fresh.values.values(), entry.point.value()]
    interval = entry.fresh.interval()
    if interval is None:
        return values
    reach = 1.5 * (max(values) - min(values))
    return [*values, *(min(max(end, min(values) - reach), max(values) + reach) for end in interval)]
