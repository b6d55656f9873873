"""The configurations of a search in order, and how sure that order is.

Two things are kept apart. The value that a trial reached in the search was *selected*: it is the
best of many draws of one seed, so likely above what the configuration reaches on average. What
fresh seeds reach was not selected, and only that goes into a mean, a spread or a comparison.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.trial import FrozenTrial

from research.search.results import Point, Results, State, state_of

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class FreshSeeds:
    """What a configuration reached on seeds that had no part in choosing it."""

    values: Mapping[int, float]  # by seed
    diverged: int = 0
    failed: int = 0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of a single run (n - 1); nan below two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean; None below two seeds."""
        if len(self.values) < 2:
            return None
        from scipy import stats

        half = stats.t.ppf((1 + LEVEL) / 2, len(self.values) - 1)
        half *= self.deviation / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Ranked:
    """A configuration with its place, from 1; `fresh` is None where none of it was confirmed."""

    place: int
    point: Point
    fresh: FreshSeeds | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.point.cell.name, self.point.slot


def ranked(results: Results) -> list[Ranked]:
    """The distinct configurations that came to their end, the best first.

    Confirmed ones go before all others, by the mean over their fresh seeds; one that diverged on
    a fresh seed goes behind those that did not. The others by what they reached in the search.
    With several objectives: the Pareto front alone, by the first objective.
    """
    fresh = fresh_seeds(results)
    sign = -1.0 if results.objective.direction == "maximize" else 1.0

    def order(point: Point) -> tuple[float, ...]:
        found = fresh.get((point.cell.name, point.slot))
        if found is None or not found.values:
            return (1.0, 0.0, sign * point.value())
        return (0.0, float(found.diverged > 0), sign * found.mean)

    points = results.complete if len(results.search.objectives) == 1 else pareto_front(results)
    points = sorted(distinct(points, sign), key=order)  # stable: cells and slots settle ties
    return [
        Ranked(place, point, fresh.get((point.cell.name, point.slot)))
        for place, point in enumerate(points, start=1)
    ]


def distinct(points: Sequence[Point], sign: float) -> list[Point]:
    """The points, of equal configurations only the best: a sampler may draw one twice."""
    kept: dict[tuple[str, str], Point] = {}
    for point in points:
        key = point.cell.name, repr(sorted(point.trial.params.items()))
        if key not in kept or sign * point.value() < sign * kept[key].value():
            kept[key] = point
    return list(kept.values())


def fresh_seeds(results: Results) -> dict[tuple[str, int], FreshSeeds]:
    """What the confirmation trials reached, by cell name and slot of their candidate."""
    values: dict[tuple[str, int], dict[int, float]] = {}
    ended: Counter[tuple[tuple[str, int], State]] = Counter()
    for trial in results.confirmed:
        candidate, seed = trial.user_attrs.get("candidate"), trial.user_attrs.get("seed")
        if candidate is None or seed is None:
            continue
        key = str(candidate[0]), int(candidate[1])
        state = state_of(trial)
        if state == "open":  # not confirmed yet
            continue
        ended[key, state] += 1
        found = values.setdefault(key, {})
        if state == "complete":
            found[int(seed)] = trial.values[0]
    return {
        key: FreshSeeds(
            dict(sorted(found.items())),
            ended[key, "diverged"],
            ended[key, "failed"] + ended[key, "pruned"],
        )
        for key, found in values.items()
    }


def pareto_front(results: Results) -> list[Point]:
    """The complete trials that no other one beats in every objective, as Optuna finds them."""
    # By their values alone: cells may have spaces that one study would not take together.
    study = study_of(
        [
            optuna.trial.create_trial(values=list(point.values or ()), user_attrs={"index": index})
            for index, point in enumerate(results.complete)
        ],
        [each.direction for each in results.search.objectives],
    )
    return [results.complete[trial.user_attrs["index"]] for trial in study.best_trials]


def study_of(
    trials: Sequence[FrozenTrial], directions: Sequence[Literal["minimize", "maximize"]]
) -> optuna.Study:
    """A study in memory with these trials, made without a word on the terminal."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(directions=list(directions))
    finally:
        optuna.logging.set_verbosity(level)
    study.add_trials(trials)
    return study


@dataclass(frozen=True)
class Best:
    """The best trial with one loss or one optimizer, and how many of its trials came to an end."""

    name: str
    point: Point
    trials: int

    @property
    def lr(self) -> float | None:
        return self.point.settings.get("optimizer.lr")


def best_of_each(results: Results, key: str, objective: int = 0) -> list[Best]:
    """For each class chosen by `key` (model.loss, optimizer) its best trial, the best first."""
    sign = -1.0 if results.search.objectives[objective].direction == "maximize" else 1.0
    groups: dict[str, list[Point]] = {}
    for point in results.complete:
        if key in point.settings:
            groups.setdefault(str(point.settings[key]), []).append(point)

    def cost(point: Point) -> float:
        return sign * point.value(objective)

    best = [Best(name, min(points, key=cost), len(points)) for name, points in groups.items()]
    return sorted(best, key=lambda each: cost(each.point))


def standard_error(results: Results, point: Point) -> float | None:
    """The binomial standard error of an accuracy, by the number of pictures it was counted on.

    None for another metric, or where the trial did not say how many pictures there were.
    """
    pictures = point.trial.user_attrs.get("val_pictures")
    share = point.value()
    if not results.objective.metric.endswith("accuracy") or not pictures or not 0 <= share <= 1:
        return None
    return math.sqrt(share * (1 - share) / pictures)


def difference(first: FreshSeeds, second: FreshSeeds) -> tuple[float, float] | None:
    """Welch's 95 % interval of mean(first) - mean(second); None below two seeds of each.

    The point itself where neither varies at all.
    """
    one, other = list(first.values.values()), list(second.values.values())
    if min(len(one), len(other)) < 2:
        return None
    if first.deviation == 0 == second.deviation:
        return first.mean - second.mean, first.mean - second.mean
    from scipy import stats

    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval(LEVEL)
    return float(interval.low), float(interval.high)


def verdict(results: Results) -> str:
    """Whether the first is told from the second, in a sentence or two; no more than is known."""
    order = ranked(results)
    if not order:
        return "No trial came to its end, so there is nothing to compare."
    if len(results.search.objectives) > 1:
        return (
            f"{len(order)} of {len(results.complete)} trials are on the Pareto front: no other one "
            "is better in every objective. Each is a single run."
        )
    if len(order) == 1:
        return "Only one configuration came to its end, so there is nothing to compare it with."
    first, second = order[0], order[1]
    if first.fresh is not None and first.fresh.values:
        return verdict_on_seeds(results, first, second)
    return verdict_on_one(results, first.point, second.point)


def verdict_on_seeds(results: Results, first: Ranked, second: Ranked) -> str:
    assert first.fresh is not None
    metric = results.objective.metric
    if second.fresh is None or not second.fresh.values:
        return "Only the first was run on fresh seeds, so it cannot be compared with the second."
    interval = difference(first.fresh, second.fresh)
    if interval is None:
        return (
            "With a single fresh seed each, the spread is unknown: whether first and second differ "
            "cannot be said."
        )
    low, high = interval
    gap = first.fresh.mean - second.fresh.mean
    numbers = (
        f"{signed(gap, metric)} (95 % interval by Welch's t: {signed(low, metric)} to "
        f"{signed(high, metric)})"
    )
    if low <= 0 <= high:
        return f"First and second are not told apart on these seeds: {numbers}."
    return (
        f"First and second differ on fresh seeds: {numbers}. The first was picked by these means, "
        "which flatters it a little."
    )


def verdict_on_one(results: Results, first: Point, second: Point) -> str:
    metric = results.objective.metric
    gap = first.value() - second.value()
    one, other = standard_error(results, first), standard_error(results, second)
    once = "Each is one run of one seed, and the first was selected as the best of "
    once += f"{len(results.complete)}: its value is likely optimistic."
    if one is None or other is None:
        return f"{once} How far another seed would be is unknown; `confirm:` measures it."
    margin = 2 * math.hypot(one, other)
    size = f"{signed(gap, metric)}, against a margin of {signed(margin, metric).lstrip('+')}"
    if abs(gap) <= margin:
        return (
            f"{once} A single seed does not tell first from second ({size}: two standard errors "
            "from the number of validation pictures); `confirm:` runs them on fresh seeds."
        )
    return (
        f"{once} First and second differ by more than the number of validation pictures explains "
        f"({size}), but how much seeds differ is unknown; `confirm:` measures it."
    )


# ---- numbers as they are printed -----------------------------------------------------------------


def shown(value: float | None, metric: str) -> str:
    """The value with its unit: accuracies in percent, seconds as such."""
    if value is None or math.isnan(value):
        return "?"
    if metric.endswith("accuracy"):
        return f"{100 * value:.2f} %"
    if metric.endswith("seconds"):
        return f"{value:,.1f} s"
    if metric.endswith("parameters"):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def signed(value: float, metric: str) -> str:
    """A difference, with its sign; of percentages in points."""
    if metric.endswith("accuracy"):
        return f"{100 * value:+.2f} points"
    if metric.endswith("seconds"):
        return f"{value:+,.1f} s"
    return f"{value:+.3g}"


def spread(fresh: FreshSeeds, metric: str) -> str:
    """`71.62 ± 0.31 % (n=3)`: mean and standard deviation over the fresh seeds."""
    n = len(fresh.values)
    if n == 0:
        return "no seed finished"
    if n == 1:
        return f"{shown(fresh.mean, metric)} (n=1)"
    return f"{plus_minus(fresh.mean, fresh.deviation, metric)} (n={n})"


def plus_minus(mean: float, deviation: float, metric: str) -> str:
    """`71.62 ± 0.31 %`: both in the metric's unit, with the same number of decimals."""
    if metric.endswith("accuracy"):
        return f"{100 * mean:.2f} ± {100 * deviation:.2f} %"
    if metric.endswith("seconds"):
        return f"{mean:,.1f} ± {deviation:,.1f} s"
    if metric.endswith("parameters"):
        return f"{mean:,.0f} ± {deviation:,.0f}"
    return f"{mean:.3f} ± {deviation:.3f}"
