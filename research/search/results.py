"""What came of a search, as tables and figures see it: its trials, and what differs among them."""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from research.configuration.compose import CHOICES

if TYPE_CHECKING:
    from research.search.document import Cell, Objective, Search

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
        return f"{self.cell.name} trial {self.trial.number}".strip()

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
