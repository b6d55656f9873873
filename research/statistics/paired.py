"""Two arms that shared their seeds: the differences pair by pair, and what can be read of them.

A pair started from the same weights and saw the same pictures in the same order, so that much of
the noise is common to both and cancels in their difference (Bouthillier et al., 2021, "Accounting
for variance in machine learning benchmarks", MLSys).  Three things are said of the differences:

their mean                       with the interval and the p-value of `mean_of`, which agree; they
                                 decide the verdict
a sign-flip permutation test     of the same mean: if the arms were alike, each difference could as
                                 well have had the other sign (Fisher, 1935; Dror et al., 2018, "The
                                 hitchhiker's guide to testing statistical significance in NLP",
                                 ACL).  It needs no shape but symmetry, and is exact, but n pairs
                                 cannot get below p = 2 / 2^n: of 5 pairs no result is below 6 %
probability of improvement       the share of pairs in which B wins (Bouthillier et al., 2021), as
                                 Vargha and Delaney (2000) count it, ties half; its interval is
                                 that of Clopper and Pearson (1934), which never covers too little
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from research.statistics.difference import Difference
from research.statistics.interval import Interval
from research.statistics.mean import LEVEL, is_flat, mean_of
from research.statistics.pairs import pairs_needed

Numbers = NDArray[np.float64]
FLIPS = 2**13  # all of them up to 13 pairs, so many random ones above


def compare_paired(
    a: Sequence[float],
    b: Sequence[float],
    *,
    level: float = LEVEL,
    seed: int = 0,
    higher_is_better: bool = True,
    comparisons: int = 1,
) -> Difference:
    """B minus A over pairs of runs with the same seeds, a[i] with b[i].

    `seed` is of the random resamples; `comparisons` are all that are made together.  Where all
    differences are the same, and not 0, there is no spread and so no interval; the permutation
    test, which needs none, gives the p-value then.
    """
    ones, others = finite("a", a), finite("b", b)
    if len(ones) != len(others):
        raise ValueError(
            f"Pairs need as many values on both sides, but a has {len(ones)} and b has "
            f"{len(others)}. Keep the seeds that both have, or compare them unpaired."
        )
    differences = in_single_precision(others - ones, max(abs(ones).max(), abs(others).max()))
    mean = mean_of(differences, level=level, seed=seed, comparisons=comparisons)
    simultaneous = None
    if comparisons > 1:
        simultaneous = mean_of(differences, level=shared(level, comparisons), seed=seed).interval
    permuted = sign_flip_test(differences, seed)
    same = is_flat(differences)
    improvement, improvement_interval = share_of_wins(
        differences if higher_is_better else -differences, level
    )
    return Difference(
        estimate=float((others - ones).mean()),
        interval=mean.interval,
        p_value=permuted if same else mean.p_value,
        adjusted_p_value=None,
        n=len(differences),
        paired=True,
        method="sign flips" if same and len(differences) > 1 else mean.method,
        probability_of_improvement=improvement,
        improvement_interval=improvement_interval,
        standard_deviation=mean.standard_deviation,
        pairs_needed=pairs_needed(mean.value, mean.standard_deviation, alpha=1 - level),
        permutation_p_value=permuted,
        runs=(len(ones), len(others)),
        higher_is_better=higher_is_better,
        comparisons=comparisons,
        simultaneous=simultaneous,
    )


def shared(level: float, comparisons: int) -> float:
    """The level of each interval at which all of them hold at once (Bonferroni)."""
    return 1 - (1 - level) / comparisons


def sign_flip_test(differences: Numbers, seed: int = 0) -> float:
    """The two-sided p-value of the sign-flip permutation test of a mean of 0."""
    from scipy import stats

    if len(differences) == 1:
        return 1.0  # one sign, or the other: both are as far from 0
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        rng=np.random.default_rng(seed),
    )
    return float(min(test.pvalue, 1.0))


def smallest_p_value(n: int) -> float:
    """The smallest p-value that the sign-flip test of n pairs can give: 2 / 2^n."""
    return min(1.0, 2.0 ** (1 - n))


def share_of_wins(differences: Numbers, level: float) -> tuple[float, Interval]:
    """The share of positive differences, with its Clopper-Pearson interval; ties count half."""
    from statsmodels.stats.proportion import proportion_confint

    wins = float(np.sum(differences > 0) + np.sum(differences == 0) / 2)
    low, high = proportion_confint(wins, len(differences), alpha=1 - level, method="beta")
    return wins / len(differences), Interval(float(low), float(high), level)


def finite(name: str, values: Sequence[float]) -> Numbers:
    """The values as an array; ValueError where there are none, or one is not a finite number."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise ValueError(f"{name} holds no values, so there is nothing to compare.")
    broken = np.flatnonzero(~np.isfinite(numbers))
    if broken.size > 0:
        place = int(broken[0])
        raise ValueError(
            f"Value {place + 1} of {numbers.size} in {name} is {numbers[place]}: a run that "
            "diverged has no figure to compare. Leave it out with its partner, and tell so."
        )
    return numbers


def in_single_precision(differences: Numbers, scale: float) -> Numbers:
    """The differences of values as large as `scale`, without what lies below single precision.

    Metrics are recorded in single precision: without this, 0.61 - 0.60 and 0.62 - 0.61 would be no
    tie.  The grid is a power of two, so that sums of such differences are exact.
    """
    if scale == 0:
        return differences
    grid = 2.0 ** (math.floor(math.log2(scale)) - 22)
    return np.round(differences / grid) * grid
