"""How many pairs it takes: the prediction is what simulated studies find."""

import math

import numpy as np
import pytest
from scipy import stats

from research.statistics.mean import FEWEST_FOR_BOOTSTRAP
from research.statistics.pairs import (
    MOST_PAIRS,
    pairs_needed,
    power_of,
    smallest_difference,
    spread_limits,
)
from tests.benchmarks import coverage


def found(size: float, pairs: int, studies: int) -> float:
    """The share of studies of normal differences in which 0 lies outside of the interval."""
    numbers = np.random.default_rng(pairs).normal(size, 1, size=(studies, pairs))
    method = "studentized" if pairs >= FEWEST_FOR_BOOTSTRAP else "Student"
    low, high = coverage.intervals(method, numbers)
    return float(np.mean((low > 0) | (high < 0)))


@pytest.mark.parametrize("size", [2.0, 1.3, 0.9, 0.75])
def test_predicted_pairs_find_the_difference_in_four_of_five_studies(size):
    """The prediction, rounded up to whole pairs, is within 8 points of 600 simulated studies."""
    pairs = pairs_needed(size, 1.0)
    power = power_of(size, pairs if pairs < FEWEST_FOR_BOOTSTRAP else pairs - 1)
    assert found(size, pairs, studies=600) == pytest.approx(power, abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [4, 5, 7, 8, 10, 12, 15, 20, 30])
def test_smallest_difference_is_found_in_four_of_five_studies(pairs):
    assert 0.73 < found(smallest_difference(1.0, pairs), pairs, studies=4000) < 0.84


@pytest.mark.slow
def test_predicted_runs_find_an_unpaired_difference():
    runs = pairs_needed(1.0, math.sqrt(2), paired=False)
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, size=(4000, runs)), rng.normal(1, 1, size=(4000, runs))
    p_values = stats.ttest_ind(b, a, axis=1, equal_var=False).pvalue
    assert np.mean(p_values <= 0.05) == pytest.approx(0.8, abs=0.03)


def test_textbook_sizes():
    """Cohen (1988): half a deviation takes 34 pairs, or 64 runs of each; the bootstrap one more."""
    assert pairs_needed(0.5, 1.0) == 34 + 1
    assert pairs_needed(0.5, math.sqrt(2), paired=False) == 64
    assert pairs_needed(2.0, 1.0) == 5  # Student's t decides: none more


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", [2, 3, 5, 7, 10, 40])
def test_smallest_difference_at_n_takes_n_pairs(n, paired):
    size = smallest_difference(0.003, n, paired=paired)
    assert pairs_needed(size * 1.001, 0.003, paired=paired) <= n
    assert pairs_needed(size * 0.999, 0.003, paired=paired) > n


def test_bootstrap_takes_no_pairs_more_where_student_decides():
    """At the level of more than 10 comparisons: their prediction is Student's own."""
    alpha = 0.05 / 11
    needed = pairs_needed(1.0, 1.0, alpha=alpha)
    assert needed > FEWEST_FOR_BOOTSTRAP
    assert power_of(1.0, needed - 1, alpha) < 0.8 <= power_of(1.0, needed, alpha)
    assert power_of(smallest_difference(1.0, 12, alpha=alpha), 12, alpha) == pytest.approx(0.8)
    assert power_of(smallest_difference(1.0, 12), 12) > 0.8  # where the bootstrap does


def test_sign_and_unit_do_not_matter():
    assert pairs_needed(-0.01, 0.02) == pairs_needed(1.0, 2.0) == pairs_needed(0.01, 0.02)


def test_a_stricter_level_takes_more_pairs():
    needed = [pairs_needed(1.0, 1.0, alpha=alpha) for alpha in (0.05, 0.01, 0.001)]
    assert needed == sorted(set(needed))


def test_what_no_number_would_show_has_none():
    assert pairs_needed(0.0, 1.0) is None
    assert pairs_needed(1e-6, 1.0) is None
    assert pairs_needed(1.0, 0.0) is None
    assert pairs_needed(1.0, math.nan) is None
    assert pairs_needed(0.03, 1.0) < MOST_PAIRS


def test_huge_differences_take_two_pairs():
    """Where SciPy's noncentral t gives up (not a number)."""
    for size in (50.0, 1e3, 1e6):
        assert pairs_needed(size, 1.0) == pairs_needed(size, 1.0, paired=False) == 2


def test_a_single_pair_shows_nothing():
    with pytest.raises(ValueError, match="2 or more"):
        smallest_difference(1.0, 1)


def test_limits_of_the_spread_cover():
    """Of normal numbers, 95 % promised; 1000 studies of five."""
    spreads = np.random.default_rng(0).normal(0, 3, size=(1000, 5)).std(axis=1, ddof=1)
    covered = np.mean([3 in spread_limits(float(spread), 4) for spread in spreads])
    assert (
        stats.binom.ppf(1e-4, 1000, 0.95) <= 1000 * covered <= stats.binom.ppf(1 - 1e-4, 1000, 0.95)
    )


def test_few_pairs_tell_their_spread_badly():
    assert spread_limits(1.0, 4).high == pytest.approx(2.874, abs=1e-3)
