"""Pairs of runs: the differences are read right, and what pairs cannot show is not claimed."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from research.statistics.paired import (
    compare_paired,
    share_of_wins,
    sign_flip_test,
    smallest_p_value,
)
from research.statistics.unpaired import compare_unpaired

ACCURACIES = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=9)


def permuted_by_hand(differences: np.ndarray) -> float:
    signs = np.array(list(product([1, -1], repeat=len(differences))))
    means = np.abs((signs * differences).mean(axis=1))
    return float(np.mean(means >= abs(differences.mean()) - 1e-12))


@settings(deadline=None, max_examples=50)  # the first imports scipy.stats
@given(pairs=ACCURACIES)
def test_swapping_the_arms_mirrors_everything(pairs):
    a = [one / 1000 for one, _ in pairs]
    b = [other / 1000 for _, other in pairs]
    there, back = compare_paired(a, b), compare_paired(b, a)
    assert back.estimate == pytest.approx(-there.estimate)
    assert back.p_value == pytest.approx(there.p_value)
    assert back.permutation_p_value == pytest.approx(there.permutation_p_value)
    assert back.probability_of_improvement == pytest.approx(1 - there.probability_of_improvement)
    assert (back.interval is None) == (there.interval is None)
    if there.interval is not None:
        assert back.interval.low == pytest.approx(-there.interval.high)


@pytest.mark.parametrize("n", [2, 4, 7, 10])
def test_permutation_test_tries_every_sign(n):
    differences = np.random.default_rng(n).normal(0.5, 1, size=n)
    assert sign_flip_test(differences) == pytest.approx(permuted_by_hand(differences))


def test_permutation_test_of_many_pairs_is_close_to_the_exact_one():
    differences = np.random.default_rng(3).normal(0.5, 1, size=15)
    assert sign_flip_test(differences) == pytest.approx(permuted_by_hand(differences), abs=0.01)


def test_permutation_test_keeps_its_level():
    """Of arms that do not differ, 5 % come out below 5 %; 400 studies, 1 in 10 000 by chance."""
    rng = np.random.default_rng(0)
    below = [sign_flip_test(rng.laplace(size=8)) <= 0.05 for _ in range(400)]
    assert stats.binomtest(sum(below), 400, 0.05, alternative="greater").pvalue > 1e-4
    assert sum(below) > 0


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 6, 8, 10])
@pytest.mark.parametrize("shape", ["normal", "laplace"])
def test_both_tests_keep_their_level_in_many_studies(n, shape):
    rng = np.random.default_rng(n)
    found = [
        compare_paired(np.zeros(n), getattr(rng, shape)(size=n), seed=study)
        for study in range(1500)
    ]
    for p_values in (
        [each.p_value for each in found],
        [each.permutation_p_value for each in found],
    ):
        below = sum(p_value <= 0.05 for p_value in p_values)
        assert stats.binomtest(below, 1500, 0.05, alternative="greater").pvalue > 1e-4


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9])
def test_no_result_of_n_pairs_is_below_the_smallest_p_value(n):
    surest = sign_flip_test(np.linspace(1, 2, n))
    assert surest == pytest.approx(smallest_p_value(n))
    assert (surest <= 0.05) == (n >= 6)


def test_pairs_find_what_unpaired_runs_cannot():
    """Seeds whose effect both arms share: five times the noise that is left between them."""
    rng = np.random.default_rng(0)
    paired, unpaired = [], []
    for _ in range(120):
        seeds = rng.normal(0, 0.010, size=5)
        a = 0.65 + seeds + rng.normal(0, 0.0014, size=5)
        b = 0.655 + seeds + rng.normal(0, 0.0014, size=5)
        paired.append(compare_paired(a, b).p_value <= 0.05)
        unpaired.append(compare_unpaired(a, b).p_value <= 0.05)
    assert np.mean(paired) > 0.9
    assert np.mean(unpaired) < 0.2


def test_probability_of_improvement_covers_for_every_truth():
    """Exactly, by the binomial distribution: at no truth do less than 95 % of studies cover."""
    for n in (3, 6, 10):
        outcomes = np.arange(n + 1)
        ends = [
            share_of_wins(np.array([1.0] * wins + [-1.0] * (n - wins)), 0.95)[1]
            for wins in outcomes
        ]
        for truth in np.linspace(0.01, 0.99, 25):
            chances = stats.binom.pmf(outcomes, n, truth)
            covered = sum(
                chance for chance, each in zip(chances, ends, strict=True) if truth in each
            )
            assert covered >= 0.95 - 1e-9


@pytest.mark.parametrize("n", [8, 12])
@pytest.mark.parametrize("comparisons", [4, 45])
def test_simultaneous_interval_is_that_of_the_stricter_level(n, comparisons):
    a, b = np.random.default_rng(n).normal(0.6, 0.01, size=(2, n))
    alone, among = compare_paired(a, b), compare_paired(a, b, comparisons=comparisons)
    strict = compare_paired(a, b, level=1 - 0.05 / comparisons)
    assert (among.simultaneous, among.method) == (strict.interval, strict.method)
    assert among.deciding_interval == among.simultaneous and among.interval.level == 0.95
    assert alone.simultaneous is None and alone.deciding_interval == alone.interval


def test_ties_count_half():
    difference = compare_paired([0.5, 0.5, 0.5, 0.5], [0.6, 0.5, 0.5, 0.4])
    assert difference.probability_of_improvement == 0.5
    assert compare_paired([0.5] * 4, [0.6, 0.6, 0.5, 0.5]).probability_of_improvement == 0.75


def test_what_single_precision_cannot_tell_is_a_tie():
    a, b = [0.60, 0.11, 0.32], [0.61, 0.12, 0.33]
    assert len({y - x for x, y in zip(a, b, strict=True)}) > 1  # though meant as one
    difference = compare_paired(a, b)
    assert difference.standard_deviation == 0
    assert difference.estimate == pytest.approx(0.01)
    stored = np.float32(0.6123)
    assert compare_paired([0.6123], [float(stored)]).probability_of_improvement == 0.5


def test_equal_arms_are_not_told_apart():
    difference = compare_paired([0.6, 0.7, 0.8], [0.6, 0.7, 0.8])
    assert difference.estimate == 0 and difference.interval is None
    assert difference.p_value == difference.permutation_p_value == 1
    assert difference.pairs_needed is None


def test_differences_without_a_spread_are_left_to_the_permutation_test():
    few, many = compare_paired([0.6] * 5, [0.61] * 5), compare_paired([0.6] * 6, [0.61] * 6)
    assert few.interval is None and many.interval is None
    assert few.method == many.method == "sign flips"
    assert (few.p_value, many.p_value) == (0.0625, 0.03125)


def test_a_single_pair_has_no_interval():
    difference = compare_paired([0.60], [0.65])
    assert difference.interval is None and difference.p_value == 1
    assert difference.n == 1 and difference.pairs_needed is None
    assert difference.improvement_interval.low < 0.05 and difference.improvement_interval.high == 1


def test_lower_may_be_better():
    difference = compare_paired([1.2, 1.3, 1.4], [1.1, 1.2, 1.5], higher_is_better=False)
    assert difference.probability_of_improvement == pytest.approx(2 / 3)
    assert difference.estimate == pytest.approx(-1 / 30)


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"Value 2 of 3 in b is nan: a run that diverged.*tell"):
        compare_paired([0.6, 0.7, 0.8], [0.6, float("nan"), 0.8])
    with pytest.raises(ValueError, match="Value 1 of 2 in a is inf"):
        compare_paired([float("inf"), 0.7], [0.6, 0.8])


def test_values_without_a_partner_are_refused():
    with pytest.raises(ValueError, match=r"a has 2 and b has 3.*seeds that both have"):
        compare_paired([0.6, 0.7], [0.6, 0.7, 0.8])
    with pytest.raises(ValueError, match="no values"):
        compare_paired([], [])
