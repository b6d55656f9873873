"""How many pairs of runs it would take, and the smallest difference that n pairs can show.

A difference "is shown" where a study of this size finds it at 5 % in 80 % of cases (its power).
The answer is that of Student's t-test (statsmodels' TTestPower, TTestIndPower), and some pairs more
where the studentized bootstrap decides (see mean.py), which has less power with few pairs, and less
the stricter the level: one pair at 5 %, two at 1 % and at 0.5 %, below which it never decides.  So
counted, 75 to 82 % of simulated studies found a normal difference at 5 %
(tests/test_statistics_pairs.py).

Both answers are rough: the spread is itself estimated from a few pairs (`spread_limits`), and a
size that was observed is no better known than its interval says (Hoenig and Heisey, 2001, "The
abuse of power", The American Statistician 55).  A size that would matter makes the better question.
"""

import math

from research.statistics.interval import Interval
from research.statistics.mean import FEWEST_FOR_BOOTSTRAP, LEVEL, takes_bootstrap

POWER = 0.8
ALPHA = 0.05
MOST_PAIRS = 10_000


def pairs_needed(
    size: float,
    standard_deviation: float,
    *,
    power: float = POWER,
    alpha: float = ALPHA,
    paired: bool = True,
) -> int | None:
    """The fewest pairs that show a true difference of `size` with this power.

    `standard_deviation` is of the differences of pairs; where not `paired`, of the difference of
    one run of each arm, and the answer is in runs of each arm.  None where no number is: a size of
    0, a spread that is 0 or unknown, or more than MOST_PAIRS.
    """
    if size == 0 or not standard_deviation > 0:
        return None
    from scipy import stats

    effect = abs(size) / standard_deviation
    # As many as if the spread were known, and from there up: it takes a few more as it is not.
    known = ((stats.norm.isf(alpha / 2) + stats.norm.isf(1 - power)) / effect) ** 2
    if known > MOST_PAIRS:
        return None
    enough = max(2, math.floor(known))
    while power_of(effect, enough, alpha, paired) < power:
        enough += 1
    if paired and takes_bootstrap(enough, alpha):
        return enough + extra_pairs(alpha)
    return enough


def smallest_difference(
    standard_deviation: float,
    pairs: int,
    *,
    power: float = POWER,
    alpha: float = ALPHA,
    paired: bool = True,
) -> float:
    """The smallest true difference that so many pairs show with this power, in the metric's unit.

    For `paired` and the standard deviation see `pairs_needed`; 2 pairs are the fewest.
    """
    if pairs < 2:
        raise ValueError(f"pairs must be 2 or more, for one has no spread, but it is {pairs}.")
    from scipy.optimize import brentq

    counted = pairs
    if paired and takes_bootstrap(pairs, alpha):
        counted = max(pairs - extra_pairs(alpha), FEWEST_FOR_BOOTSTRAP - 1)
    most = 1.0
    while power_of(most, counted, alpha, paired) < power:
        most *= 2
    effect = brentq(lambda each: power_of(each, counted, alpha, paired) - power, 0, most)
    return float(effect) * standard_deviation


def extra_pairs(alpha: float) -> int:
    """What the bootstrap takes more than Student's t for the same power, as was simulated."""
    return 1 + max(0, math.ceil(round(math.log10(ALPHA / alpha), 6)))


def power_of(effect: float, pairs: int, alpha: float = ALPHA, paired: bool = True) -> float:
    """The share of studies in which Student's t-test finds an effect of so many deviations.

    The chance to find it with the wrong sign, which the two-sided test has too, is left out.
    """
    from scipy import stats
    from statsmodels.stats.power import TTestIndPower, TTestPower

    half = alpha / 2
    if paired:
        found = TTestPower().power(effect, pairs, half, alternative="larger")
        shift, freedom = effect * math.sqrt(pairs), pairs - 1
    else:  # statsmodels counts in deviations of a single run, of which a difference has two
        single = effect * math.sqrt(2)
        found = TTestIndPower().power(single, pairs, half, alternative="larger")
        shift, freedom = effect * math.sqrt(pairs), 2 * pairs - 2
    if math.isnan(found):  # SciPy's noncentral t gives up far out, where the answer is plain
        return float(shift > stats.t.isf(half, freedom))
    return float(found)


def spread_limits(
    standard_deviation: float, degrees_of_freedom: int, *, level: float = LEVEL
) -> Interval:
    """Where the true standard deviation lies: the chi-square interval of normal numbers.

    The degrees of freedom are n - 1 for n pairs.  With 4 of them the true one may be 2.9 times as
    large as it was measured.
    """
    from scipy import stats

    outside = (1 - level) / 2
    low, high = stats.chi2.isf([outside, 1 - outside], degrees_of_freedom)
    return Interval(
        standard_deviation * math.sqrt(degrees_of_freedom / low),
        standard_deviation * math.sqrt(degrees_of_freedom / high),
        level,
    )
