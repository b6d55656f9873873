"""The expected best of k trials against closed forms and against every choice of k."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from research.statistics.best_of import best_of, expectation, weights_of


def expected(curve) -> list[float]:
    return [point.expected for point in curve.points]


def best_of_each_choice(values, choices, pick=max):
    """The mean best of the choices that gave something, and how many gave nothing."""
    choices = list(choices)
    bests = [[values[i] for i in choice if math.isfinite(values[i])] for choice in choices]
    some = [pick(best) for best in bests if best]
    return sum(some) / len(some), 1 - len(some) / len(choices)


# ---- the estimate --------------------------------------------------------------------------------


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_unbiased_is_the_mean_over_all_choices_of_k_trials(higher_is_better):
    values = [0.4, 0.9, math.nan, 0.1, 0.9, 0.5, math.nan]
    curve = best_of(values, higher_is_better=higher_is_better)
    assert (curve.trials, curve.failed) == (7, 2)
    pick = max if higher_is_better else min
    for k in range(1, 8):
        best, nothing = best_of_each_choice(values, combinations(range(7), k), pick)
        assert curve.at(k).expected == pytest.approx(best)
        assert curve.at(k).nothing == pytest.approx(nothing, abs=1e-12)
    assert curve.at(3).nothing == 0  # to the last bit: two failed


def test_plug_in_is_the_mean_over_all_draws_with_replacement():
    values = [0.4, 0.9, math.nan, 0.1]
    curve = best_of(values, estimator="plug_in")
    for k in range(1, 5):
        best, nothing = best_of_each_choice(values, product(range(4), repeat=k))
        assert curve.at(k).expected == pytest.approx(best)
        assert curve.at(k).nothing == pytest.approx(nothing)


def test_best_of_uniform_values_is_k_by_k_plus_one():
    """On average over searches the one estimator is right, and Dodge's falls short at k = n."""
    n, searches = 8, 4000
    ranked = np.sort(np.random.default_rng(0).uniform(size=(searches, n)), axis=1)
    k = np.arange(1, n + 1)
    means = {}
    for estimator in ("unbiased", "plug_in"):
        best, _ = expectation(ranked, weights_of(n, estimator))
        means[estimator] = best.mean(axis=0)
        error = best.std(axis=0) / math.sqrt(searches)
        if estimator == "unbiased":
            assert (np.abs(means[estimator] - k / (k + 1)) < 4 * error).all()
    assert means["plug_in"][-1] < 8 / 9 - 0.03


def test_of_many_trials_no_weight_is_lost_to_rounding():
    for estimator in ("unbiased", "plug_in"):
        weights = weights_of(900, estimator)
        assert np.isfinite(weights).all()
        assert weights.sum(axis=0) == pytest.approx(1, rel=1e-9)


def test_order_of_trials_is_nothing_and_more_trials_never_worse():
    values = [*np.random.default_rng(1).normal(size=15), None, math.inf]
    curve = expected(best_of(values))
    assert curve == expected(best_of(values[::-1]))
    assert sorted(curve) == curve
    assert curve[-1] == pytest.approx(max(values[:15]))
    assert curve[0] == pytest.approx(np.mean(values[:15]))


def test_failures_may_be_worth_something():
    curve = best_of([0.5, None, 0.7, math.nan], failed_value=0.1)
    assert curve.failed == 2
    assert curve.at(1).expected == pytest.approx((0.5 + 0.7 + 0.1 + 0.1) / 4)
    assert curve.at(1).nothing == 0


def test_search_of_failures_has_no_curve():
    curve = best_of([None, math.nan, -math.inf])
    assert (curve.points, curve.trials, curve.failed) == ((), 3, 3)
    assert best_of([]).points == ()
    with pytest.raises(ValueError, match="k must be"):
        curve.at(1)


# ---- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_intervals_hold_the_truth_as_often_as_promised(higher_is_better):
    n, searches = 12, 200
    drawn = np.random.default_rng(3)
    held = np.zeros(n // 2)
    k = np.arange(1, n // 2 + 1)
    truth = k / (k + 1) if higher_is_better else 1 / (k + 1)
    for search in range(searches):
        curve = best_of(
            drawn.uniform(size=n), higher_is_better=higher_is_better, resamples=299, seed=search
        )
        held += [t in p.interval for t, p in zip(truth, curve.points[: n // 2], strict=True)]
    assert (held >= stats.binom.ppf(0.001, searches, 0.93)).all()


def test_intervals_end_at_half_of_the_trials():
    curve = best_of(np.random.default_rng(0).uniform(size=9))
    assert [point.k for point in curve.points if point.interval is not None] == [1, 2, 3, 4]
    for point in curve.points[:4]:
        assert point.interval.low < point.expected < point.interval.high
        assert point.interval.level == 0.95


@pytest.mark.parametrize(
    "values", [[0.1, 0.2, 0.3, 0.4, 0.5], [0.3] * 10, [0.3] * 9 + [0.4], [0.3] + [None] * 9]
)
def test_too_few_trials_or_none_that_vary_have_no_interval(values):
    assert all(point.interval is None for point in best_of(values).points)
