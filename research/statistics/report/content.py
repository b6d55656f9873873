"""What a report tells: plain, frozen values, all of them computed elsewhere.

A part that is empty or None has no section. Accuracies are fractions of 1 here and percents on the
page; a difference is always the arm's value minus the one of what it is compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from research.statistics.arms import Match, Setting
from research.statistics.basin import Basin
from research.statistics.best_of import BestOf
from research.statistics.difference import Difference
from research.statistics.interval import Interval
from research.statistics.noise import Noise
from research.statistics.readable import Readable
from research.statistics.survival import Race

if TYPE_CHECKING:  # it needs torch, which a report does not
    from research.statistics.cross_loss import CrossLosses

Tone = Literal["better", "worse", "unclear", "plain"]


@dataclass(frozen=True)
class Estimate:
    """A number and its interval, None where there are too few runs for one."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Verdict:
    """What came of one comparison, in words; `tone` says which way it went."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class ArmResult:
    """An arm's value over its seeds; `left_out` counts its runs without a value.

    `learning_rate` is the setting, as it is told; empty where no run has one.
    """

    name: str
    mean: Estimate
    values: tuple[float, ...]
    seeds: tuple[str, ...]
    standard_deviation: float | None = None
    left_out: int = 0
    test_looks: int = 0
    learning_rate: str = ""


@dataclass(frozen=True)
class Contrast:
    """An arm against another; `values` are the differences of the pairs by `seeds`, if paired."""

    arm: str
    against: str
    difference: Difference
    seeds: tuple[str, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A cell of a grid: its value with n runs; None and the reason where no run has a value."""

    row: str
    column: str
    value: Estimate | None
    n: int = 0
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """Loss by optimizer, or any two choices: their names, and the cells that were tried."""

    row_title: str
    column_title: str
    cells: tuple[Cell, ...]
    method: str = ""


@dataclass(frozen=True)
class Point:
    """An epoch of an arm: the mean of `n` runs, NaN where it is no finite number."""

    epoch: float
    mean: float
    interval: Interval | None
    n: int


@dataclass(frozen=True)
class Curve:
    """An arm's metric by epoch over its seeds."""

    arm: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curves:
    """The curves of all arms in one metric ("val/accuracy")."""

    metric: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Failure:
    """A run that has no part in the numbers, and why."""

    arm: str
    run: str
    seed: str
    status: str
    reason: str


@dataclass(frozen=True)
class PairMatch:
    """Whether the pairs of two arms began alike, by what was hashed."""

    arm: str
    against: str
    weights: Match
    batches: Match


@dataclass(frozen=True)
class Report:
    """All that a report tells. `command` reproduces it, and `commands` a section, by its slug.

    `fans` and `best_of` are of trials, read by `search_metric`, which their search was for; None:
    by `metric`. `races` are to a target in `race_metric`, which is known of every epoch; test
    figures are not.
    """

    title: str
    metric: str
    verdicts: tuple[Verdict, ...]
    command: str
    summary: str = ""
    made_at: str = ""
    higher_is_better: bool = True
    level: float = 0.95
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    arms: tuple[ArmResult, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    grid: Grid | None = None
    curves: tuple[Curves, ...] = ()
    search_metric: str | None = None
    search_higher_is_better: bool = True
    fans: Mapping[str, Basin] = field(default_factory=dict)
    best_of: Mapping[str, BestOf] = field(default_factory=dict)
    races: tuple[Race, ...] = ()
    race_metric: str = "val/accuracy"
    cross_losses: "CrossLosses | None" = None
    noise: Noise | None = None
    readable: tuple[Readable, ...] = ()
    failures: tuple[Failure, ...] = ()
    settings: tuple[Setting, ...] = ()
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    matches: tuple[PairMatch, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
