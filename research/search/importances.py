"""Which parameters set the best trials apart, by PED-ANOVA (Watanabe et al., IJCAI 2023).

The evaluator is Optuna's own and default: it compares where the best trials lie with where all lie,
parameter by parameter, so that neither a sampler that gathers near the best nor one diverged trial
misleads it, as they do a forest (fANOVA), which also needs scikit-learn. A conditional parameter is
judged among the trials of its own branch only: a share over all trials would say how often the
branch was good, not how much the parameter matters in it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from research.configuration.compose import CHOICES
from research.pictures.style import (
    BLUE,
    INK,
    LINE,
    MUTED,
    add_axes,
    new_figure,
    percent,
    save,
    tidy,
)
from research.search.ranking import study_of
from research.search.results import Dimension, Point, Results
from research.search.scales import OTHERS

FEWEST = 20  # complete trials: of fewer, the best are too few to be compared
BEST = 5  # trials at least are the best ones, as Optuna's documentation asks for
SHARE = 0.1  # of all are the best ones, where that is more
MOST_GROUPS = 12


@dataclass(frozen=True)
class Group:
    """The importances, adding up to 1, of parameters that all `trials` trials of a group have.

    `own` are those that only this branch has.
    """

    title: str
    trials: int
    shares: dict[Dimension, float]
    own: frozenset[str]


def groups(results: Results, objective: int = 0) -> tuple[list[Group], list[str]]:
    """The common parameters over all trials, then each branch; and a line for what is left out."""
    everything = results.complete
    found: list[Group] = []
    small: list[str] = []
    for title, points in [("", everything), *branches(results)]:
        dimensions = shared(results, points)
        own = frozenset(each.name for each in dimensions if each.branch)
        is_whole = bool(title) and len(points) == len(everything)
        if is_whole or (title and not own) or len(dimensions) < 2:
            continue
        if len(points) < FEWEST:
            small.append(f"{title or 'all'} ({len(points)})")
            continue
        shares = importance(points, dimensions, objective, results)
        if shares:
            name = f"{title} trials" if title else "all trials"
            found.append(Group(name, len(points), shares, own if title else frozenset()))
    notes = []
    if small:
        notes.append(
            f"Importances are left out for fewer than {FEWEST} complete trials: {', '.join(small)}."
        )
    if len(found) > MOST_GROUPS:
        notes.append(f"Importances are drawn for {MOST_GROUPS} of {len(found)} branches.")
    return found[:MOST_GROUPS], notes


def branches(results: Results) -> list[tuple[str, list[Point]]]:
    """The complete trials with each class that brings parameters of its own."""
    found = []
    names = dict.fromkeys(each.branch for each in results.dimensions if each.branch)
    for name in names:
        own = [each.name for each in results.dimensions if each.branch == name]
        points = [p for p in results.complete if any(each in p.varied for each in own)]
        found.append((name, points))
    return found


def shared(results: Results, points: Sequence[Point]) -> list[Dimension]:
    """The parameters that all these trials have, and that differ between them."""
    return [
        each
        for each in results.dimensions
        if points
        and all(each.name in point.varied for point in points)
        and len({repr(point.varied[each.name]) for point in points}) > 1
    ]


def importance(
    points: Sequence[Point], dimensions: Sequence[Dimension], objective: int, results: Results
) -> dict[Dimension, float]:
    """Each parameter's share, the largest first; nothing where none sets the best apart."""
    trials = [
        create_trial(
            value=point.value(objective),
            params={each.name: comparable(each, point) for each in dimensions},
            distributions={each.name: distribution_of(each) for each in dimensions},
        )
        for point in points
    ]
    study = study_of(trials, [results.search.objectives[objective].direction])
    quantile = max(SHARE, BEST / len(trials))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials, which `FEWEST` is about
        shares = optuna.importance.get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=quantile),
            params=[each.name for each in dimensions],
            normalize=False,
        )
    total = sum(shares.values())
    by_name = {each.name: each for each in dimensions}
    return {by_name[name]: share / total for name, share in shares.items()} if total > 0 else {}


def distribution_of(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    if isinstance(dimension.distribution, CategoricalDistribution):
        return CategoricalDistribution([repr(each) for each in dimension.distribution.choices])
    return dimension.distribution


def comparable(dimension: Dimension, point: Point) -> object:
    value = point.varied[dimension.name]
    return repr(value) if dimension.is_categorical else value


def draw_importances(results: Results, found: Sequence[Group], objective: int, path: Path) -> None:
    """Bars of each group's shares; what only that branch has is blue."""
    goal = results.search.objectives[objective]
    columns = min(2, len(found))
    rows = [found[start : start + columns] for start in range(0, len(found), columns)]
    heights = [34 + 24 * max(len(group.shares) for group in row) for row in rows]
    figure = new_figure(
        40 + 560 * columns,
        98 + sum(heights) + 20 * (len(rows) - 1),
        f"What sets the best {goal.metric} apart",
        "PED-ANOVA over the complete trials; a group's shares add up to 100 %"
        + ("; blue: only this branch has it" if len(found) > 1 else ""),
    )
    top = 98.0
    for row, height in zip(rows, heights, strict=True):
        for column, group in enumerate(row):
            draw_group(figure, group, 20 + 560 * column, top)
        top += height + 20
    save(figure, path)


def draw_group(figure: Figure, group: Group, left: float, top: float) -> None:
    names = [label(each) for each in group.shares]
    axes = add_axes(figure, left + 190, top, 290, 24 * len(names), f"{group.title}: {group.trials}")
    shares = list(group.shares.values())
    colors = [BLUE if each.name in group.own else OTHERS for each in group.shares]
    axes.barh(range(len(names)), shares, color=colors, height=0.62)
    for row, share in enumerate(shares):
        axes.text(share + 0.01, row, percent(share), size=9, color=INK, va="center")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", colors=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(LINE)
    axes.title.set_color(MUTED if not group.own else INK)


def label(dimension: Dimension) -> str:
    last = dimension.key if dimension.key in CHOICES else dimension.key.rpartition(".")[2]
    return tidy(last.removeprefix("model."), 26)
