"""Runs whose seeds do not match: Welch's t keeps its level, and says that it is unpaired."""

import numpy as np
import pytest
from scipy import stats

from research.statistics.unpaired import compare_unpaired, superiority, welch


def test_interval_is_the_textbook_one():
    a, b = [0.60, 0.62, 0.61, 0.65], [0.66, 0.70, 0.64]
    difference = compare_unpaired(a, b)
    one, other = np.var(a, ddof=1) / 4, np.var(b, ddof=1) / 3
    freedom = (one + other) ** 2 / (one**2 / 3 + other**2 / 2)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(one + other)
    assert difference.estimate == pytest.approx(np.mean(b) - np.mean(a))
    assert difference.interval.low == pytest.approx(difference.estimate - half)
    assert difference.interval.high == pytest.approx(difference.estimate + half)
    assert (difference.paired, difference.n, difference.runs) == (False, 3, (4, 3))
    assert difference.standard_deviation == pytest.approx(np.sqrt(4 * one + 3 * other))


def test_simultaneous_interval_is_that_of_the_stricter_level():
    a, b = [0.60, 0.62, 0.61, 0.65], [0.66, 0.70, 0.64]
    among = compare_unpaired(a, b, comparisons=10)
    assert among.simultaneous == compare_unpaired(a, b, level=0.995).interval
    assert among.interval == compare_unpaired(a, b).interval


def test_level_is_kept_by_arms_of_other_size_and_spread():
    """The case in which Student's test of two samples fails; 1 study set in 10 000 by chance."""
    rng = np.random.default_rng(0)
    pooled, found = 0, 0
    for _ in range(500):
        a, b = rng.normal(0, 4, size=4), rng.normal(0, 1, size=12)
        found += welch(a, b, 0.95)[1] <= 0.05
        pooled += stats.ttest_ind(a, b).pvalue <= 0.05
    assert stats.binomtest(pooled, 500, 0.05, alternative="greater").pvalue < 1e-4
    assert stats.binomtest(found, 500, 0.06, alternative="greater").pvalue > 1e-4


@pytest.mark.parametrize("runs", [(3, 10), (5, 5), (4, 8)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_superiority_covers(runs, shift):
    """B beats A with probability Phi(shift / sqrt 2); 95 % promised, 400 studies."""
    rng = np.random.default_rng(1)
    truth = stats.norm.cdf(shift / np.sqrt(2))
    covered = 0
    for _ in range(400):
        a, b = rng.normal(0, 1, size=runs[0]), rng.normal(shift, 1, size=runs[1])
        covered += truth in superiority(a, b, 0.95)[1]
    assert covered / 400 >= stats.binom.ppf(1e-4, 400, 0.95) / 400


def test_superiority_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 6, size=7).astype(float), rng.integers(2, 8, size=5).astype(float)
    share, interval = superiority(a, b, 0.95)
    assert share == pytest.approx(stats.mannwhitneyu(b, a).statistic / 35)
    assert share in interval
    back, mirrored = superiority(b, a, 0.95)
    assert back == pytest.approx(1 - share)
    assert mirrored.low == pytest.approx(1 - interval.high)


def test_arms_that_do_not_overlap_are_not_called_certain():
    share, interval = superiority(np.array([1.0, 2, 3]), np.array([4.0, 5, 6]), 0.95)
    assert share == 1 and interval.high == 1
    assert 0.4 < interval.low < 0.8
    mirrored = superiority(np.array([4.0, 5, 6]), np.array([1.0, 2, 3]), 0.95)[1]
    assert mirrored.low == 0 and mirrored.high == pytest.approx(1 - interval.low)


def test_a_single_run_gives_no_interval():
    difference = compare_unpaired([0.6], [0.65, 0.66, 0.67])
    assert difference.interval is None and difference.p_value == 1
    assert difference.pairs_needed is None and difference.runs == (1, 3)


def test_runs_without_any_spread_give_no_interval():
    difference = compare_unpaired([0.6, 0.6], [0.7, 0.7, 0.7])
    assert difference.interval is None and difference.p_value == 1
    assert compare_unpaired([0.6, 0.6], [0.7, 0.7, 0.8]).interval is not None


def test_lower_may_be_better():
    a, b = [1.2, 1.3, 1.4], [1.0, 1.1, 1.25]
    assert compare_unpaired(a, b).probability_of_improvement == pytest.approx(1 / 9)
    lower = compare_unpaired(a, b, higher_is_better=False)
    assert lower.probability_of_improvement == pytest.approx(8 / 9)
    assert lower.estimate == pytest.approx(-11 / 60)


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="Value 1 of 2 in b is nan"):
        compare_unpaired([0.6, 0.7], [float("nan"), 0.8])
