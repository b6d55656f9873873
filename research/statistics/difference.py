"""How far arm B lies from arm A: one figure with its interval, p-values and what it would take."""

from dataclasses import dataclass

from research.statistics.interval import Interval


@dataclass(frozen=True)
class Difference:
    """B minus A, in the unit of the metric.

    `interval` is None where the runs give none: too few, or without any spread.  `p_value` is
    two-sided and agrees with the interval; `adjusted_p_value` is for several comparisons at once,
    None for a single one.  `simultaneous` is the interval at the level that `comparisons` leave to
    each, so that at the usual level all of them hold at once; None for a single one, or where it
    would have no end.  `permutation_p_value` is of the sign-flip test, which takes nothing for
    granted but symmetry; None where unpaired.

    `n` counts pairs, or the runs of the smaller arm where unpaired; `runs` are those of A and B.
    `standard_deviation` is of the difference of one run of each (of one pair), nan where unknown.
    `probability_of_improvement` is that a run of B beats its partner in A, or where unpaired any
    run of A; ties count half.  `pairs_needed` (of runs of each arm, where unpaired) would show a
    true difference of this size in 80 % of studies; None where there is none to show, the spread is
    unknown, or more than MOST_PAIRS would be.
    """

    estimate: float
    interval: Interval | None
    p_value: float
    adjusted_p_value: float | None
    n: int
    paired: bool
    method: str
    probability_of_improvement: float
    improvement_interval: Interval
    standard_deviation: float
    pairs_needed: int | None
    permutation_p_value: float | None
    runs: tuple[int, int]
    higher_is_better: bool = True
    comparisons: int = 1
    simultaneous: Interval | None = None

    @property
    def deciding_p_value(self) -> float:
        return self.p_value if self.adjusted_p_value is None else self.adjusted_p_value

    @property
    def deciding_interval(self) -> Interval | None:
        return self.interval if self.comparisons == 1 else self.simultaneous
