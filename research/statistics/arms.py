"""Arms of a comparison: trained runs with seeds, which of them are pairs, what sets arms apart.

An arm is one way to train, run on several seeds. Two runs are a pair where all their seeds are
equal: common random numbers, so that what is random cancels in their difference. Plain data:
nothing here knows where runs are kept.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Arguments go with the class that has them: another class is one difference, not ten.
CHOICES = ("model.network", "model.loss", "optimizer", "lr_scheduler", "data")
SEEDS = ("seed_everything", "data.seed")
BY_SEED = ("pictures",)  # of what a run stood on: it depends on its seeds
# Copies of other settings under names for people, and what follows from the settings.
DERIVED = ("Learning rate", "Loss", "Network", "Optimizer", "num_parameters")


@dataclass(frozen=True)
class Trained:
    """A run of an arm, finished or not.

    `seeds` are by stream: weights, order, augmentation, dropout, split. `metrics` are of the best
    checkpoint ("val/accuracy", "test/accuracy", fractions of 1); `curves` have (epoch, value) by
    metric; `settings` are flat, by the keys of the command line. `initial_weights` and
    `first_batches` are hashes, None for a run that recorded none. `test_looks` counts how often
    its test pictures were scored. `origins` say what it stood on: data, code, device, versions.
    `diverged`: its loss was not finite, so that it would fail again; not so a run that crashed.
    `changes` are what it was resumed with that differs from its `settings`, in words.
    """

    run_id: str
    run_name: str
    seeds: Mapping[str, int]
    status: str
    metrics: Mapping[str, float]
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    seconds: float | None
    initial_weights: str | None
    first_batches: str | None
    settings: Mapping[str, Any]
    test_looks: int
    failure: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    diverged: bool = False
    changes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        return self.status == "FINISHED"

    @property
    def seed_key(self) -> tuple[tuple[str, int], ...]:
        """The seeds of all streams: equal for the two runs of a pair."""
        return tuple(sorted(self.seeds.items()))

    @property
    def seed_text(self) -> str:
        """`7`, or `weights 1, order 2, ...` where the streams differ."""
        values = set(self.seeds.values())
        if len(values) <= 1:
            return str(next(iter(values), "none"))
        return ", ".join(f"{stream} {seed}" for stream, seed in self.seeds.items())


@dataclass(frozen=True)
class Arm:
    """One way to train: a short name, what was asked for, and its runs, by seed."""

    name: str
    source: str
    runs: tuple[Trained, ...]

    def measured(self, metric: str) -> tuple[Trained, ...]:
        """The finished runs that have the metric, a finite number, one for each seed: the last.

        A repeat of a seed is no further evidence.
        """
        found = {
            run.seed_key: run
            for run in self.runs
            if run.finished and math.isfinite(run.metrics.get(metric, math.nan))
        }
        return tuple(found.values())

    def counted(self, metric: str) -> tuple[Trained, ...]:
        """Of each seed the run that is measured, or else its last one."""
        last = {run.seed_key: run for run in self.runs}
        return tuple((last | {run.seed_key: run for run in self.measured(metric)}).values())

    def values(self, metric: str) -> dict[Hashable, float]:
        """The metric of these runs, by the seeds of all streams."""
        return {run.seed_key: run.metrics[metric] for run in self.measured(metric)}


@dataclass(frozen=True)
class Pairing:
    """The pairs of two arms, in the order of the first's seeds, and the runs without a partner."""

    pairs: tuple[tuple[Trained, Trained], ...]
    alone_a: tuple[Trained, ...]
    alone_b: tuple[Trained, ...]

    def values(self, metric: str) -> tuple[list[float], list[float]]:
        """The metric of the first of each pair, and of the second."""
        ones = [one.metrics[metric] for one, _ in self.pairs]
        return ones, [other.metrics[metric] for _, other in self.pairs]


def pair(a: Arm, b: Arm, metric: str) -> Pairing:
    """The runs of both arms that have the metric, paired where the seeds of all streams match."""
    ones = {run.seed_key: run for run in a.measured(metric)}
    others = {run.seed_key: run for run in b.measured(metric)}
    return Pairing(
        tuple((ones[key], others[key]) for key in ones if key in others),
        tuple(run for key, run in ones.items() if key not in others),
        tuple(run for key, run in others.items() if key not in ones),
    )


# ---- what sets arms apart ------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A setting that is not the same in all arms: its value in each, a text; None: not there.

    `within` names the choice whose arguments it belongs to, where the arms chose otherwise there.
    """

    key: str
    values: tuple[str | None, ...]
    within: str | None = None


def settings_apart(arms: Sequence[Arm], ignoring: Collection[str] = ()) -> list[Setting]:
    """The settings in which the arms differ, choices first, then their arguments, then the rest.

    Seeds, names and `ignoring` are left out. Runs of one arm that differ among themselves are
    told as `0.1 or 0.2`.
    """
    keys = dict.fromkeys(key for arm in arms for run in arm.runs for key in run.settings)
    left_out = {*SEEDS, *DERIVED, *ignoring}
    apart: dict[str, Setting] = {}
    for key in keys:
        if key in left_out or key.startswith("random."):
            continue
        values = tuple(value_in(arm, key) for arm in arms)
        if len(set(values)) > 1:
            apart[key] = Setting(key, values, choice_of(key))
    chosen = {key for key in apart if key in CHOICES}
    found = [
        Setting(each.key, each.values, each.within if each.within in chosen else None)
        for each in apart.values()
    ]
    order = [*CHOICES, None]
    return sorted(found, key=lambda each: order.index(family_of(each)))


def causes(settings: Sequence[Setting]) -> list[str]:
    """The things that were changed: a choice counts once, with all its arguments."""
    return [each.key for each in settings if each.within is None]


def family_of(setting: Setting) -> str | None:
    return setting.key if setting.key in CHOICES else setting.within


def choice_of(key: str) -> str | None:
    """The choice whose argument this is; None for a choice itself and for any other setting."""
    found = [choice for choice in CHOICES if key.startswith(f"{choice}.")]
    return None if key in CHOICES or not found else found[0]


def value_in(arm: Arm, key: str) -> str | None:
    """The setting's value in the arm; several where its runs differ; None where none has it."""
    values = dict.fromkeys(str(run.settings[key]) for run in arm.runs if key in run.settings)
    return " or ".join(values) if values else None


def origins_apart(arms: Sequence[Arm]) -> dict[str, tuple[str, ...]]:
    """What the runs stood on that is not the same for all of them: the values, by what it is.

    The data, the code, the device, the versions of libraries. What a run does not tell is "?".
    The pictures are parted by the seed, so that only runs with the same seeds are compared in them.
    """
    runs = [run for arm in arms for run in arm.runs]
    found = {}
    for key in dict.fromkeys(key for run in runs for key in run.origins):
        groups: dict[Hashable, dict[str, None]] = {}
        for run in runs:
            group = run.seed_key if key in BY_SEED else None
            groups.setdefault(group, {})[run.origins.get(key, "?")] = None
        values = next((tuple(values) for values in groups.values() if len(values) > 1), None)
        if values is not None:
            found[key] = values
    return found


# ---- whether pairs are pairs ---------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How many pairs have the same hash, how many another, and how many recorded none."""

    equal: int
    other: int
    unknown: int


def match(pairs: Sequence[tuple[Trained, Trained]], what: str) -> Match:
    """Whether pairs began alike; `what` is initial_weights or first_batches."""
    both = [(getattr(one, what), getattr(other, what)) for one, other in pairs]
    unknown = sum(None in each for each in both)
    equal = sum(one == other for one, other in both if None not in (one, other))
    return Match(equal, len(both) - equal - unknown, unknown)
