"""The best of k trials that a search may expect: how much trying pays.

A search's best value grows with the number of its trials, so that two methods are compared fairly
only at the same number: here for every k up to the n trials there were (Dodge et al., 2019, "Show
Your Work: Improved Reporting of Experimental Results", EMNLP).

`unbiased` averages the best over all ways to choose k of the n trials, which is right on average
for every k. `plug_in` is Dodge's formula, the expected best of k draws with replacement; it takes
the n trials for all there could be and falls short the more, the nearer k is to n (Tang et al.,
2020, "Showing Your Work Doesn't Always Work", ACL). Both are for trials drawn independently, as by
random search. Those of an optimizing sampler are not: their curve says what the trials found,
whatever their order, and not what k fresh trials would.

Trials that failed or diverged gave nothing, and count: `expected` is the best of those k trials
that gave something, and `nothing` how probable it is that none did. Or they count as
`failed_value`, such as the accuracy of guessing.

    n   trials, failed ones included
    k   trials of a search that is imagined, 1..n
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from research.statistics.interval import Interval

Estimator = Literal["unbiased", "plug_in"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Best:
    """What k trials may expect.

    `interval` is of the bootstrap, and None where it cannot be trusted (see `best_of`); `nothing`
    is the probability that no trial of k gives anything.
    """

    k: int
    expected: float
    interval: Interval | None
    nothing: float


@dataclass(frozen=True)
class BestOf:
    """The curve of a search: a point for each k; empty where every trial failed."""

    points: tuple[Best, ...]
    trials: int
    failed: int
    higher_is_better: bool
    estimator: Estimator

    def at(self, k: int) -> Best:
        """ValueError where there were fewer than k trials."""
        for point in self.points:
            if point.k == k:
                return point
        raise ValueError(f"k must be from 1 to the {len(self.points)} trials, but it is {k}.")


def best_of(
    values: Sequence[float | None],
    *,
    higher_is_better: bool = True,
    failed_value: float | None = None,
    estimator: Estimator = "unbiased",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> BestOf:
    """The expected best of k for every k, from the final values of all trials.

    None, nan and infinities are trials that failed. Intervals are percentiles of a bootstrap over
    trials. They are given up to half of the trials: beyond, the best of k hangs on the few best
    trials alone, of which resampling makes no better ones (Tang et al., 2020), and the interval
    covers too rarely.
    """
    raw = np.array([math.nan if value is None else value for value in values], dtype=float)
    gave = np.isfinite(raw)
    n, failed = len(raw), int((~gave).sum())
    if failed_value is not None:
        raw[~gave] = failed_value
    if not np.isfinite(raw).any():
        return BestOf((), n, failed, higher_is_better, estimator)
    sign = 1.0 if higher_is_better else -1.0
    ranked = np.sort(np.where(np.isfinite(raw), sign * raw, -math.inf))  # failures first, as worst
    weights = weights_of(n, estimator)
    expected, nothing = expectation(ranked[None], weights)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    samples, _ = expectation(ranked[np.sort(drawn, axis=1)], weights)
    points = []
    for k in range(1, n + 1):
        own = samples[:, k - 1]
        own = own[np.isfinite(own)]
        interval = None
        if 2 * k <= n and len(own) > 0:
            low, high = np.quantile(sign * own, [(1 - level) / 2, (1 + level) / 2])
            interval = Interval(float(low), float(high), level)
        points.append(Best(k, sign * float(expected[0, k - 1]), interval, float(nothing[0, k - 1])))
    return BestOf(tuple(points), n, failed, higher_is_better, estimator)


def weights_of(n: int, estimator: Estimator) -> Array:
    """How probable it is that the i-th smallest of n is the largest of k: rows i, columns k.

    Of k drawn without replacement C(i - 1, k - 1) / C(n, k); with, (i/n)^k - ((i - 1)/n)^k.
    """
    from scipy.special import gammaln

    i, k = np.arange(1, n + 1)[:, None], np.arange(1, n + 1)[None, :]
    if estimator == "plug_in":
        return (i / n) ** k - ((i - 1) / n) ** k
    possible = i >= k
    over = np.where(possible, i - k, 0)  # gammaln of what is not used stays finite
    logs = gammaln(i) - gammaln(over + 1) + gammaln(n - k + 1) - gammaln(n + 1)
    return np.where(possible, k * np.exp(logs), 0.0)


def expectation(ranked: Array, weights: Array) -> tuple[Array, Array]:
    """The expected best of k given that there is one, nan where not, and how probable none is.

    Each row of `ranked` ascends, with -inf for trials that gave nothing; a column for each k.
    """
    gave = np.isfinite(ranked)
    something, nothing = gave @ weights, ~gave @ weights
    best = np.where(gave, ranked, 0.0) @ weights
    with np.errstate(invalid="ignore"):
        return best / something, nothing
