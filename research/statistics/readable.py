"""The smallest difference of two arms worth reading, at n seeds each, given the noise of one arm.

For planning, before there are two arms: noise.py has measured how much one experiment's figure
varies. `pairs.py` tells the rest: how large a difference must be to be found with some probability,
and how many pairs that takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from research.statistics.interval import Interval
from research.statistics.noise import Component, mean_square
from research.statistics.pairs import spread_limits


@dataclass(frozen=True)
class Readable:
    """Means of n runs each have to differ by more than this to be worth reading.

    In the figure's unit. `paired` is where both arms use the same seeds (common random numbers),
    None where nothing is known of their correlation. The intervals say where the limits would lie
    if the standard deviation were known exactly: they are as wide as it is uncertain.
    """

    n: int
    unpaired: float
    unpaired_interval: Interval
    paired: float | None
    paired_interval: Interval | None


def readable(
    total: Component,
    *,
    counts: Sequence[int] = range(1, 21),
    differences: Sequence[float] | None = None,
    correlation: float | None = None,
    alpha: float = 0.05,
) -> tuple[Readable, ...]:
    """The smallest difference of two means worth reading, for each number of seeds per arm.

    Two arms that do not differ come out further apart in a share `alpha` of comparisons only:
    t * deviation * sqrt(2 / n), with Student's t by the degrees of freedom of `total`, since the
    deviation is known from these runs and not from the arms (so that n = 1 has an answer). It
    assumes that both arms are as noisy as this experiment and their figures normal. A difference
    that is to be found with 80 % probability must be larger: pairs.py.

    `paired` takes the standard deviation of `differences`, of pairs of runs of two such arms with
    the same seeds, or else the `correlation` of such pairs that is assumed, which takes
    sqrt(1 - correlation) off.
    """
    if correlation is not None and not -1 <= correlation <= 1:
        raise ValueError(f"correlation must be from -1 to 1, but it is {correlation}.")
    level, of_pairs = total.interval.level, None
    if differences is not None:
        of_pairs = mean_square([differences])
    found = []
    for n in counts:
        own = total.deviation, total.degrees_of_freedom
        unpaired = limit(*own, math.sqrt(2 / n), alpha, level)
        paired: tuple[float | None, Interval | None] = (None, None)
        if of_pairs is not None:
            spread = math.sqrt(of_pairs.value), of_pairs.degrees_of_freedom
            paired = limit(*spread, math.sqrt(1 / n), alpha, level)
        elif differences is None and correlation is not None:
            paired = limit(*own, math.sqrt(2 * (1 - correlation) / n), alpha, level)
        found.append(Readable(n, *unpaired, *paired))
    return tuple(found)


def limit(
    deviation: float, degrees: int, factor: float, alpha: float, level: float
) -> tuple[float, Interval]:
    """What a normal number with `factor` deviations exceeds by chance in a share `alpha`.

    The interval has the deviation's chi-square limits in its place.
    """
    from scipy import stats

    t = float(stats.t.ppf(1 - alpha / 2, degrees))
    known = float(stats.norm.ppf(1 - alpha / 2)) * factor
    true = spread_limits(deviation, degrees, level=level)
    return t * deviation * factor, Interval(known * true.low, known * true.high, level)
