"""Learning-rate fans of known shape: the best rate, the basin, its ends."""

import math

import numpy as np
import pytest

from research.statistics.basin import basin


def hill(place: float, *, top: float = -1.5, height: float = 0.7, bend: float = 0.1) -> float:
    """A parabola in log10 of the rate."""
    return height - bend * (place - top) ** 2


def fan(places, value, noise=0.0, seed=0):
    drawn = np.random.default_rng(seed)
    return [(10**place, value(place) + noise * drawn.normal()) for place in places]


def test_parabola_has_its_best_rate_and_its_width_in_decades():
    found = basin(fan(np.linspace(-4, 1, 41), hill), tolerance=0.01)
    assert math.log10(found.best_rate) == pytest.approx(-1.5, abs=0.05)
    assert found.best_value == pytest.approx(0.7, abs=0.002)
    assert found.decades == pytest.approx(2 * math.sqrt(0.1), abs=0.05)  # 0.1 x^2 = 0.01
    assert math.log10(found.high / found.low) == pytest.approx(found.decades)
    assert (found.edge, found.open_low, found.open_high) == (None, False, False)
    assert (found.advice, found.runs, found.diverged) == ("", 41, 0)


@pytest.mark.parametrize("seed", range(5))
def test_noise_neither_cuts_the_basin_nor_lifts_its_top(seed):
    """Forty rates drawn at random, as noisy as half of the tolerance."""
    places = np.random.default_rng(100 + seed).uniform(-4, 1, size=40)
    points = fan(places, hill, noise=0.01, seed=seed)
    found = basin(points, tolerance=0.02)
    assert math.log10(found.best_rate) == pytest.approx(-1.5, abs=0.45)
    assert found.decades == pytest.approx(2 * math.sqrt(0.2), abs=0.45)
    assert abs(found.best_value - 0.7) < abs(max(value for _, value in points) - 0.7)


def test_few_rates_far_apart_are_joined_by_straight_lines():
    points = [(1e-3, 0.50), (1e-2, 0.70), (1e-1, 0.60), (1.0, 0.20), (10.0, 0.10)]
    found = basin(points, tolerance=0.05)
    assert found.best_rate == pytest.approx(1e-2)
    assert found.best_value == pytest.approx(0.70)
    assert math.log10(found.low) == pytest.approx(-2.25, abs=0.011)
    assert math.log10(found.high) == pytest.approx(-1.5, abs=0.011)
    curve = dict(found.curve)
    for rate, value in points:
        assert curve[min(curve, key=lambda at: abs(at - rate))] == pytest.approx(value, abs=5e-3)


def test_seeds_of_a_rate_count_by_their_mean():
    points = [(0.01, 0.5), (0.1, 0.9), (0.1, 0.3), (1.0, 0.7), (0.1 * (1 + 1e-9), 0.6)]
    found = basin(points, tolerance=0.0)
    assert [len(rate.values) for rate in found.rates] == [1, 3, 1]
    assert found.rates[1].mean == pytest.approx(0.6)
    assert found.best_rate == pytest.approx(1.0)
    assert found.decades == 0


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_lower_may_be_better(higher_is_better):
    sign = 1 if higher_is_better else -1
    points = [(rate, sign * value) for rate, value in fan(np.linspace(-3, 0, 13), hill)]
    found = basin(points, higher_is_better=higher_is_better)
    assert math.log10(found.best_rate) == pytest.approx(-1.5, abs=0.05)
    assert sign * found.best_value == pytest.approx(0.7, abs=0.002)


# ---- ends ----------------------------------------------------------------------------------------


def test_best_rate_at_the_end_of_the_search_asks_for_more():
    found = basin(fan(np.linspace(-4, -2, 9), hill), tolerance=0.01)
    assert (found.edge, found.open_low, found.open_high) == ("high", False, True)
    assert found.advice == (
        "The best rate is the highest that was tried, 0.01: search higher ones."
    )
    found = basin(fan(np.linspace(-1, 1, 9), hill), tolerance=0.01)
    assert (found.edge, found.open_low) == ("low", True)
    assert "lowest" in found.advice and "0.1:" in found.advice


def test_basin_that_goes_on_beyond_the_search_is_a_lower_bound():
    found = basin(fan(np.linspace(-1.7, 0, 9), hill), tolerance=0.01)
    assert (found.edge, found.open_low, found.open_high) == (None, True, False)


def test_rates_that_diverged_are_counted_and_end_the_basin():
    """The highest rate that lives is no end of the search: those beyond it were tried."""
    points = [(1e-3, 0.60), (1e-2, 0.70), (1e-1, 0.70), (1.0, None), (10.0, math.nan)]
    found = basin(points, tolerance=0.01)
    assert (found.runs, found.diverged) == (5, 2)
    assert (found.edge, found.open_high) == (None, False)
    assert found.high == pytest.approx(0.1)
    assert [rate.diverged for rate in found.rates] == [0, 0, 0, 1, 1]


def test_no_basin_reaches_across_a_rate_that_diverges():
    points = [(1e-4, 0.695), (1e-3, None), (1e-2, 0.70), (1e-1, 0.695), (1.0, 0.5)]
    found = basin(points, tolerance=0.01)
    assert 1e-3 < found.low <= 1e-2
    assert 1e-1 <= found.high < 1.0
    assert not found.open_low


def test_one_seed_of_three_that_diverges_is_counted_and_no_end():
    points = [(0.1, 0.7), (0.1, 0.7), (0.1, None), (0.01, 0.7), (0.01, None), (0.001, 0.7)]
    found = basin(points, tolerance=0.01)
    assert [rate.mostly_diverged for rate in found.rates] == [False, True, False]
    assert found.diverged == 2


def test_nothing_that_lives_has_no_best_rate():
    found = basin([(0.1, None), (1.0, math.inf)])
    assert (found.best_rate, found.low, found.decades, found.curve) == (None, None, 0.0, ())
    assert "lower" in found.advice
    assert basin([]).advice == "No run."
    assert basin([(0.1, 0.5)]).edge == "both"


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_rate_without_a_logarithm_is_refused(rate):
    with pytest.raises(ValueError, match="learning rate must be above 0"):
        basin([(0.1, 0.5), (rate, 0.5)])


def test_negative_tolerance_is_refused():
    with pytest.raises(ValueError, match="tolerance"):
        basin([(0.1, 0.5)], tolerance=-0.1)
