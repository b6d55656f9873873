"""What came of a search: the configurations in order, and how sure the order is.

Two things are kept apart. The value that a trial reached in the search was *selected*: it is the
best of many draws of one seed, so likely above what the configuration reaches on average. What
fresh seeds reach was not selected, and only that goes into a mean, a spread or a comparison.
"""

import contextlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from research.configuration.compose import CHOICES

if TYPE_CHECKING:
    from research.search.document import Cell, Objective, Search

LEVEL = 0.95  # of every interval

State = Literal["complete", "pruned", "diverged", "failed", "open"]


@dataclass(frozen=True)
class Results:
    """A search, its trials by cell name (one for each slot), and its confirmation trials.

    A confirmation trial has user_attrs candidate = [cell name, slot] and seed.
    """

    search: "Search"
    trials: Mapping[str, Sequence[FrozenTrial]]
    confirmed: Sequence[FrozenTrial] = ()

    @cached_property
    def points(self) -> "list[Point]":
        """Every trial of every cell, in the order of cells and slots."""
        return [
            point_of(cell, trial)
            for cell in self.search.cells
            for trial in self.trials.get(cell.name, ())
        ]

    @cached_property
    def complete(self) -> "list[Point]":
        return [point for point in self.points if point.state == "complete"]

    @cached_property
    def dimensions(self) -> "list[Dimension]":
        """What was varied: the cells' choices first, then the parameters of all spaces."""
        return dimensions_of(self.search.cells)

    @property
    def objective(self) -> "Objective":
        """The first objective, by which a list is sorted."""
        return self.search.objectives[0]


@dataclass(frozen=True)
class Point:
    """A trial as tables and figures see it.

    `values`, one for each objective, are None unless it is complete; `last` is what a trial that
    ended early reported last. `settings` are by the keys of the command line, class choices as
    names; `varied` has the part of them that differs between trials, by a dimension's name.
    """

    cell: "Cell"
    trial: FrozenTrial
    state: State
    values: tuple[float, ...] | None
    last: float | None
    settings: Mapping[str, Any]
    varied: Mapping[str, Any]

    @property
    def slot(self) -> int:
        return int(self.trial.user_attrs.get("slot", self.trial.number))

    @property
    def title(self) -> str:
        """What the trial is called, as in MLflow: trial 7, or MSELoss trial 7."""
        return f"{self.cell.name} trial {self.slot}".strip()

    def value(self, objective: int = 0) -> float:
        assert self.values is not None
        return self.values[objective]


@dataclass(frozen=True)
class Dimension:
    """Something that differs between trials; `branch` is "" or the class that alone has it."""

    name: str
    key: str
    distribution: BaseDistribution
    branch: str = ""

    @property
    def title(self) -> str:
        last = self.key.rpartition(".")[2]
        return f"{self.branch} {last}".strip()

    @property
    def is_log(self) -> bool:
        return bool(getattr(self.distribution, "log", False))

    @property
    def is_categorical(self) -> bool:
        return isinstance(self.distribution, CategoricalDistribution)


# ---- trials --------------------------------------------------------------------------------------


def point_of(cell: "Cell", trial: FrozenTrial) -> Point:
    state = state_of(trial)
    values = tuple(trial.values) if state == "complete" else None
    reported = trial.intermediate_values
    last = reported[max(reported)] if reported else None
    settings = flat(cell.settings)
    # One that still waits, or died while it drew, lacks parameters.
    with contextlib.suppress(ValueError):
        settings |= flat(cell.space.settings(trial.params))
    fixed = {key: value for key, value in flat(cell.settings).items() if is_choice_of_cells(key)}
    return Point(cell, trial, state, values, last, settings, fixed | dict(trial.params))


def state_of(trial: FrozenTrial) -> State:
    """How the trial ended; one that reached no finite value has diverged."""
    if trial.user_attrs.get("diverged"):
        return "diverged"
    if trial.state == TrialState.COMPLETE:
        return "complete" if all(map(math.isfinite, trial.values)) else "diverged"
    if trial.state == TrialState.PRUNED:
        return "pruned"
    return "failed" if trial.state == TrialState.FAIL else "open"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the keys of the command line; a class choice is its short name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in CHOICES and isinstance(value, Mapping):
            if value.get("class_path") is not None:
                found[key] = value["class_path"].rpartition(".")[2]
            found |= flat(value.get("init_args") or {}, f"{key}.")
            beside = {k: v for k, v in value.items() if k not in ("class_path", "init_args")}
            found |= flat(beside, f"{key}.")
        elif isinstance(value, Mapping):
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def counts(results: Results) -> dict[State, int]:
    """How many trials ended how; every state is there."""
    counted = Counter(point.state for point in results.points)
    states: tuple[State, ...] = ("complete", "pruned", "diverged", "failed", "open")
    return {state: counted[state] for state in states}


# ---- what was varied -----------------------------------------------------------------------------


def is_choice_of_cells(key: str) -> bool:
    """True for what `each:` can go through: a choice, or a setting that is no class's argument."""
    return key in CHOICES or not any(key.startswith(f"{choice}.") for choice in CHOICES)


def dimensions_of(cells: "Sequence[Cell]") -> list[Dimension]:
    found: dict[str, Dimension] = {}
    settings = [flat(cell.settings) for cell in cells]
    for key in settings[0] if settings else ():
        values = [each.get(key) for each in settings]
        if is_choice_of_cells(key) and len(set(map(repr, values))) > 1:
            choices = list(dict.fromkeys(values))
            found[key] = Dimension(key, key, CategoricalDistribution(choices))
    for cell in cells:
        for parameter in cell.space.parameters():
            before = found.get(parameter.name)
            distribution = parameter.distribution
            if before is not None:
                distribution = union(before.distribution, distribution)
            branch = "" if parameter.condition is None else str(parameter.condition[1])
            branch = branch.rpartition(".")[2]
            if not branch and not all(has(other, parameter.name) for other in cells):
                branch = cell.name
            if before is not None and before.branch != branch:
                branch = ""  # of several cells
            found[parameter.name] = Dimension(parameter.name, parameter.key, distribution, branch)
    return list(found.values())


def has(cell: "Cell", name: str) -> bool:
    return any(parameter.name == name for parameter in cell.space.parameters())


def union(one: Any, other: Any) -> BaseDistribution:
    """A distribution that covers both; the other where they are of different kinds."""
    if type(one) is not type(other):
        return other
    if isinstance(one, CategoricalDistribution):
        return CategoricalDistribution(list(dict.fromkeys([*one.choices, *other.choices])))
    low, high = min(one.low, other.low), max(one.high, other.high)
    if isinstance(one, optuna.distributions.IntDistribution):
        return optuna.distributions.IntDistribution(low, high, log=one.log and other.log)
    return optuna.distributions.FloatDistribution(low, high, log=one.log and other.log)


def varies(results: Results, key: str) -> bool:
    """True where the setting is a dimension of the search, in any branch."""
    return any(dimension.key == key for dimension in results.dimensions)


def described(results: Results, point: Point) -> str:
    """What sets this configuration apart: `MSELoss, SGD(lr=0.12, momentum=0.9), batch_size=64`."""
    keys = list(dict.fromkeys(dimension.key for dimension in results.dimensions))
    keys = [key for key in keys if key in point.settings]
    choices = [key for key in keys if key in CHOICES]
    parts = []
    for choice in choices:
        own = [key for key in keys if key.startswith(f"{choice}.") and key not in CHOICES]
        arguments = ", ".join(
            f"{key.removeprefix(f'{choice}.')}={short(point.settings[key])}" for key in own
        )
        name = f"{choice}=null" if point.settings[choice] is None else str(point.settings[choice])
        parts.append(f"{name}({arguments})" if own else name)
        keys = [key for key in keys if key != choice and key not in own]
    lasts = Counter(key.rpartition(".")[2] for key in keys)
    for key in keys:
        last = key.rpartition(".")[2]
        name = last if lasts[last] == 1 else ".".join(key.split(".")[-2:])
        parts.append(f"{name}={short(point.settings[key])}")
    return ", ".join(parts) or "nothing varied"


def short(value: Any) -> str:
    """A setting's value, numbers to three digits."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---- how good, how sure --------------------------------------------------------------------------


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
    fresh: FreshSeeds | None = field(default=None)

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
    if metric.endswith("accuracy"):
        return f"{100 * fresh.mean:.2f} ± {100 * fresh.deviation:.2f} % (n={n})"
    return f"{shown(fresh.mean, metric)} ± {shown(fresh.deviation, metric)} (n={n})"
