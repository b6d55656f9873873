"""The interval of a mean of few numbers holds the truth as often as it says."""

import math

import numpy as np
import pytest
from scipy import stats

from research.statistics.mean import (
    FEWEST_FOR_BOOTSTRAP,
    RESAMPLES,
    critical_value,
    mean_of,
    studentized,
)
from tests.benchmarks import coverage

# The least share of 95 % intervals that must hold the truth, by shape: what mean.py's table says,
# in round numbers.
PROMISED = {"normal": 0.95, "heavy": 0.95, "skewed": 0.935, "exponential": 0.87}


def below_by_chance(share: float, studies: int) -> float:
    """What a share falls short of in one set of studies in 10 000, three to four deviations."""
    return float(stats.binom.ppf(1e-4, studies, share)) / studies


def covered(n: int, shape: str, studies: int) -> float:
    """The share of studies whose interval, found as `mean_of` finds it, holds the truth."""
    numbers = coverage.SHAPES[shape](np.random.default_rng(n), (studies, n))
    method = "studentized" if n >= FEWEST_FOR_BOOTSTRAP else "Student"
    low, high = coverage.intervals(method, numbers)
    return float(np.mean((low <= 0) & (high >= 0)))


@pytest.mark.parametrize("n", [4, 5, 6, 8, 12])
@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_interval_covers_as_promised(n, shape):
    share = covered(n, shape, studies=600)
    assert share >= below_by_chance(PROMISED[shape], 600)
    assert share <= 0.99  # no wider than it need be


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 10, 15, 20])
@pytest.mark.parametrize("shape", list(PROMISED))
def test_interval_covers_as_promised_in_many_studies(n, shape):
    share = covered(n, shape, studies=4000)
    assert share >= below_by_chance(PROMISED[shape], 4000)
    assert share <= 0.99


def test_stricter_levels_are_kept_better_than_by_student():
    numbers = np.random.default_rng(0).exponential(size=(1000, 10)) - 1
    statistic = np.abs(numbers.mean(axis=1)) / stats.sem(numbers, axis=1)
    critical = np.concatenate(
        [critical_value(studentized(part, 0), 0.99) for part in np.split(numbers, 4)]
    )
    by_student = float(np.mean(statistic > stats.t.isf(0.005, 9)))
    assert by_student > 0.035
    assert np.mean(statistic > critical) < by_student * 0.6


def test_plain_bootstrap_would_promise_too_much():
    """Why the interval is not simply scipy.stats.bootstrap's, neither percentile nor BCa."""
    numbers = np.random.default_rng(0).normal(size=(500, 5))
    for method in ("percentile", "BCa"):
        low, high = coverage.intervals(method, numbers)
        assert np.mean((low <= 0) & (high >= 0)) < 0.9


@pytest.mark.slow
def test_table_says_what_is_measured():
    from research.statistics import mean

    rows = [line.split() for line in (mean.__doc__ or "").splitlines()]
    table = {(row[0], row[1].rstrip("*")): row[2:] for row in rows if row and row[0].isdigit()}
    measured = list(coverage.measure(studies=1000, counts=(5, 8, 20)))
    assert len(measured) == 3 * len(coverage.METHODS)
    for row in measured:
        shown = [float(each) for each in coverage.told(row).split()[2:]]
        written = [float(each) for each in table[str(row.n), row.method]]
        # Percent of the shapes, 1000 studies against 4000; the last column is the width.
        assert shown[:-1] == pytest.approx(written[:-1], abs=4.5)
        assert shown[-1] == pytest.approx(written[-1], rel=0.1)


@pytest.mark.parametrize("n", [3, 6, 10])
def test_simulated_interval_is_the_one_that_is_given(n):
    numbers = np.random.default_rng(n).normal(size=(3, n))
    method = "studentized" if n >= FEWEST_FOR_BOOTSTRAP else "Student"
    lows, highs = coverage.intervals(method, numbers)
    for values, low, high in zip(numbers, lows, highs, strict=True):
        interval = mean_of(values).interval
        assert (interval.low, interval.high) == pytest.approx((low, high))


def test_student_interval_is_the_textbook_one():
    values = [0.012, 0.020, 0.004, 0.010]
    mean = mean_of(values, level=0.9)
    half = stats.t.ppf(0.95, 3) * np.std(values, ddof=1) / 2
    assert mean.method == "Student's t"
    assert (mean.interval.low, mean.interval.high) == pytest.approx((0.0115 - half, 0.0115 + half))
    assert mean.p_value == pytest.approx(2 * stats.t.sf(0.0115 / (half / stats.t.ppf(0.95, 3)), 3))


def test_studentized_resamples_are_those_of_the_definition():
    """Against resamples that are written out number by number."""
    values = np.array([0.3, -0.1, 0.8, 0.2, 0.4, -0.5, 0.1])
    rng = np.random.default_rng(1)
    drawn = rng.choice(values, size=(100_000, 7))
    errors = stats.sem(drawn, axis=1)
    statistic = np.abs(drawn.mean(1) - values.mean()) / np.where(errors > 0, errors, np.nan)
    expected = np.quantile(np.nan_to_num(statistic, nan=np.inf), [0.5, 0.9, 0.95])
    found = [float(critical_value(studentized(values, 0), level)) for level in (0.5, 0.9, 0.95)]
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("n", [4, 5, 6, 7, 11])
def test_p_value_agrees_with_the_interval(n):
    rng = np.random.default_rng(n)
    decisions = set()
    for _ in range(60):
        mean = mean_of(rng.normal(0.6, 1, size=n))
        assert (mean.p_value <= 0.05) == (0 not in mean.interval)
        decisions.add(mean.p_value <= 0.05)
    assert decisions == {True, False}


def test_same_seed_gives_the_same_interval_and_another_nearly():
    values = np.random.default_rng(0).normal(size=12)
    first, again, other = mean_of(values), mean_of(values), mean_of(values, seed=1)
    assert first == again != other
    assert other.interval.low == pytest.approx(first.interval.low, rel=0.1)


def test_wider_level_gives_a_wider_interval():
    values = np.random.default_rng(0).normal(size=12)
    widths = [
        mean_of(values, level=level).interval.high - mean_of(values).value
        for level in (0.8, 0.95, 0.99)
    ]
    assert widths == sorted(widths)
    assert widths[-1] < mean_of(values, level=1 - 0.1 / RESAMPLES).interval.high - values.mean()


@pytest.mark.parametrize(("level", "most"), [(0.95, 10), (0.99, 2)])
def test_student_decides_where_resamples_cannot_tell_the_level(level, most):
    """Beyond `most` comparisons, and so for the level that they leave to a single interval."""
    values = np.random.default_rng(0).normal(1, 1, size=12)
    few = mean_of(values, level=level, comparisons=most)
    many = mean_of(values, level=level, comparisons=most + 1)
    assert few == mean_of(values, level=level)
    assert (few.method, many.method) == ("studentized bootstrap", "Student's t")
    assert many.interval.level == level
    assert many.p_value == pytest.approx(float(stats.ttest_1samp(values, 0).pvalue))
    for comparisons, method in ((most, few.method), (most + 1, many.method)):
        assert mean_of(values, level=1 - (1 - level) / comparisons).method == method


@pytest.mark.parametrize("comparisons", [66, 561])
def test_one_number_more_never_hides_a_mean_among_many_comparisons(comparisons):
    """300 studies of a mean of 2.5 deviations; the bootstrap found 93 %, then 69 % of the first."""
    alpha, drawn = 0.05 / comparisons, np.random.default_rng(0).normal(2.5, 1, size=(300, 12))
    found = [
        np.mean([mean_of(row[:n], comparisons=comparisons).p_value <= alpha for row in drawn])
        for n in (9, 10, 12)
    ]
    assert found == sorted(found) and found[-1] > 0.9


def test_too_little_gives_no_interval():
    single, same = mean_of([0.6]), mean_of([0.6, 0.6, 0.6])
    assert single.interval is None and same.interval is None
    assert single.p_value == same.p_value == 1
    assert math.isnan(single.standard_deviation) and same.standard_deviation == 0
    # A single number that differs: a third of all resamples has no spread.
    assert mean_of([0] * 11 + [1]).interval is None


@pytest.mark.parametrize("broken", [[math.inf], [math.nan], [math.inf, -math.inf]])
def test_a_value_that_is_not_finite_gives_no_interval(broken):
    mean = mean_of([0.5, *broken, 0.6])
    assert mean.interval is None and mean.p_value == 1 and not math.isfinite(mean.value)
    assert math.isnan(mean.standard_deviation)
    assert mean.method == "none: a value is not finite"


def test_no_values_and_no_level_are_refused():
    with pytest.raises(ValueError, match="at least one value"):
        mean_of([])
    with pytest.raises(ValueError, match=r"level must lie between 0 and 1.*95"):
        mean_of([1, 2], level=95)
