"""Several arms at once: no more false alarms than with two, and a ranking that admits ties."""

import gc
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from research.statistics.paired import compare_paired
from research.statistics.several import Values, compare_arms, compare_several, correct, rank
from research.statistics.verdict import finding


@pytest.fixture(autouse=True)
def without_garbage_collection(monkeypatch):
    """Which statsmodels does for every correction, half a second each where torch is loaded."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


def arms_of(values: np.ndarray, first_seed: int = 0) -> dict[str, Values]:
    """Arms in rows, their runs by seed: A, B, C, ..."""
    return {
        chr(ord("A") + place): dict(enumerate(row, first_seed)) for place, row in enumerate(values)
    }


def with_p_value(p_value: float):
    return replace(compare_paired([0.6, 0.7, 0.8], [0.61, 0.72, 0.8]), p_value=p_value)


def test_adjusted_p_values_are_those_of_holm():
    """Holm (1979): the smallest times m, the next times m - 1, never below the one before."""
    found = correct([with_p_value(p) for p in (0.04, 0.01, 0.03, 0.4)])
    adjusted = [each.adjusted_p_value for each in found]
    assert adjusted == pytest.approx([0.09, 0.04, 0.09, 0.4])
    assert [each.p_value for each in found] == [0.04, 0.01, 0.03, 0.4]
    assert all(each.deciding_p_value == each.adjusted_p_value for each in found)


def test_a_single_comparison_needs_no_correction():
    (found,) = correct([with_p_value(0.03)])
    assert found.adjusted_p_value is None and found.deciding_p_value == 0.03


def test_among_several_it_takes_more_pairs():
    alone = compare_paired([0.6, 0.7, 0.8], [0.61, 0.72, 0.8])
    among = correct([alone] * 10)[0]
    assert among.pairs_needed > alone.pairs_needed


def test_large_differences_are_told_among_many_with_ten_seeds_as_with_nine():
    """66 comparisons, of which those of neighbours are 4 deviations apart."""
    steps, noise = np.arange(12)[:, None] * 0.02, np.random.default_rng(0).normal(size=(12, 10))
    told = {}
    for seeds in (9, 10):
        found = compare_several(arms_of(0.6 + steps + 0.0035 * noise[:, :seeds]))
        told[seeds] = sum(each.difference.deciding_p_value <= 0.05 for each in found)
    assert told[9] <= told[10] == 66


def equivalents(studies: int, arms: int) -> tuple[int, int]:
    """Studies whose true differences all are the margin, in which some are called equivalent.

    First by the interval of the comparison alone, and then as `finding` decides.
    """
    rng = np.random.default_rng(0)
    alone, corrected = 0, 0
    for _ in range(studies):
        values = np.full((arms, 8), 0.6) + rng.normal(0, 0.003, size=(arms, 8))
        values[1:] += 0.01
        found = [each.difference for each in compare_several(arms_of(values), "A")]
        alone += any(each.interval is not None and each.interval.high < 0.01 for each in found)
        corrected += any(finding(each, margin=0.01) == "equivalent" for each in found)
        for each in found:
            if finding(each, margin=0.01) == "equivalent":
                assert each.simultaneous is not None and 0 in each.simultaneous
    return alone, corrected


def test_equivalence_errs_no_oftener_among_several():
    """Twelve arms that all are just as far from the baseline as would matter."""
    alone, corrected = equivalents(studies=60, arms=13)
    assert alone / 60 > 0.1
    assert stats.binomtest(corrected, 60, 0.05, alternative="greater").pvalue > 1e-4
    assert corrected < alone / 2


def false_alarms(studies: int, seeds: int, arms: int = 6) -> tuple[int, int]:
    """In how many studies of equal arms some comparison came out, without Holm and with it."""
    rng = np.random.default_rng(0)
    plain, corrected = 0, 0
    for _ in range(studies):
        shared = rng.normal(0, 0.01, size=seeds)
        values = 0.65 + shared + rng.normal(0, 0.003, size=(arms, seeds))
        found = [each.difference for each in compare_several(arms_of(values), "A")]
        plain += min(each.p_value for each in found) <= 0.05
        corrected += min(each.deciding_p_value for each in found) <= 0.05
    return plain, corrected


def test_holm_keeps_the_family_wise_error():
    """Five arms against a baseline, none of them better: 5 % of studies may say that one is."""
    plain, corrected = false_alarms(studies=100, seeds=5)
    assert plain / 100 > 0.1  # what a correction is for
    assert stats.binomtest(corrected, 100, 0.05, alternative="greater").pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 8, 12])
def test_holm_keeps_the_family_wise_error_in_many_studies(seeds):
    _, corrected = false_alarms(studies=1000, seeds=seeds)
    assert stats.binomtest(corrected, 1000, 0.05, alternative="greater").pvalue > 1e-4


def test_every_arm_is_compared_with_the_baseline_or_with_each_other():
    arms = arms_of(np.random.default_rng(0).normal(size=(4, 3)))
    names = [(each.name_a, each.name_b) for each in compare_several(arms, "B")]
    assert names == [("B", "A"), ("B", "C"), ("B", "D")]
    names = [(each.name_a, each.name_b) for each in compare_several(arms)]
    assert names == [("A", "B"), ("A", "C"), ("A", "D"), ("B", "C"), ("B", "D"), ("C", "D")]


def test_runs_are_paired_by_seed_whatever_their_order():
    a = {3: 0.63, 1: 0.61, 2: 0.62}
    b = {1: 0.615, 2: 0.628, 3: 0.634, 4: 0.9}
    difference = compare_arms(a, b)
    assert difference.paired and difference.n == 3
    assert difference.estimate == pytest.approx((0.005 + 0.008 + 0.004) / 3)


def test_arms_without_two_common_seeds_are_unpaired():
    a = {1: 0.61, 2: 0.62, 3: 0.63}
    difference = compare_arms(a, {3: 0.64, 4: 0.66})
    assert not difference.paired and difference.runs == (3, 2)
    assert compare_arms({1: 0.61}, {1: 0.63}).paired


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="two arms or more, but there are 1"):
        compare_several({"A": {1: 0.6}})
    with pytest.raises(ValueError, match="'SGD' is none of the arms; these are A, B"):
        compare_several(arms_of(np.ones((2, 3))), "SGD")


# ---- ranking -------------------------------------------------------------------------------------


def test_arms_far_apart_have_one_place_each():
    rng = np.random.default_rng(0)
    means = np.array([0.60, 0.70, 0.65])[:, None]
    order = rank(arms_of(means + rng.normal(0, 0.001, size=(3, 5))))
    assert [each.name for each in order] == ["B", "C", "A"]
    assert [(each.best_place, each.worst_place) for each in order] == [(1, 1), (2, 2), (3, 3)]
    assert all(each.interval is not None and each.mean in each.interval for each in order)


def test_lower_may_be_better_in_a_ranking():
    rng = np.random.default_rng(0)
    losses = arms_of(np.array([1.2, 0.9])[:, None] + rng.normal(0, 0.01, size=(2, 5)))
    order = rank(losses, higher_is_better=False)
    assert [each.name for each in order] == ["B", "A"]
    assert [each.worst_place for each in order] == [1, 2]


def test_equal_arms_share_all_places():
    order = rank(arms_of(np.tile([0.6, 0.61, 0.63], (3, 1))))
    assert {(each.best_place, each.worst_place) for each in order} == {(1, 3)}


def test_an_arm_alone_is_first_and_last():
    (only,) = rank({"A": {0: 0.6}})
    assert (only.best_place, only.worst_place, only.n, only.interval) == (1, 1, 1, None)


def test_places_hold_the_truth():
    """In at least 95 % of studies the places of all arms do; 50 studies, 1 in 10 000 by chance."""
    rng = np.random.default_rng(1)
    truth = np.array([0.0, 0.001, 0.002, 0.01])  # best last
    covered = 0
    for _ in range(50):
        order = rank(arms_of(truth[:, None] + rng.normal(0, 0.003, size=(4, 5))))
        places = {"D": 1, "C": 2, "B": 3, "A": 4}
        covered += all(e.best_place <= places[e.name] <= e.worst_place for e in order)
    assert covered / 50 >= stats.binom.ppf(1e-4, 50, 0.95) / 50


def test_a_run_that_diverged_is_refused():
    with pytest.raises(ValueError, match=r"Value 2 of 2 in B is nan"):
        rank({"A": {0: 0.6}, "B": {0: 0.6, 1: float("nan")}})
