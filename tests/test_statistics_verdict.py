"""The verdict says what was found, and no more."""

import gc

import numpy as np
import pytest

from research.statistics.difference import Difference
from research.statistics.interval import Interval
from research.statistics.paired import compare_paired
from research.statistics.pairs import pairs_needed, smallest_difference
from research.statistics.several import correct
from research.statistics.unpaired import compare_unpaired
from research.statistics.verdict import finding, remarks, verdict


@pytest.fixture(autouse=True)
def without_garbage_collection(monkeypatch):
    """Which statsmodels does for every correction, half a second each where torch is loaded."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


def difference(**changed) -> Difference:
    """+0.61 points, 0.35 to 0.88, in 12 pairs; and what is changed of it."""
    fields = {
        "estimate": 0.0061,
        "interval": Interval(0.0035, 0.0088, 0.95),
        "p_value": 0.0009,
        "adjusted_p_value": None,
        "n": 12,
        "paired": True,
        "method": "studentized bootstrap",
        "probability_of_improvement": 1.0,
        "improvement_interval": Interval(0.74, 1.0, 0.95),
        "standard_deviation": 0.0042,
        "pairs_needed": 6,
        "permutation_p_value": 0.0010,
        "runs": (12, 12),
    }
    return Difference(**{**fields, **changed})


UNCLEAR = {
    "estimate": 0.0021,
    "interval": Interval(-0.0012, 0.0054, 0.95),
    "p_value": 0.15,
    "n": 5,
    "method": "Student's t",
    "standard_deviation": 0.0027,
    "pairs_needed": 14,
    "permutation_p_value": 0.19,
    "runs": (5, 5),
}


def test_better():
    assert verdict("A", "B", difference()) == (
        "B is better than A: +0.61 points (95 % 0.35 to 0.88, n=12 pairs)"
    )


def test_worse():
    worse = difference(estimate=-0.0061, interval=Interval(-0.0088, -0.0035, 0.95))
    assert verdict("A", "B", worse) == (
        "B is worse than A: -0.61 points (95 % -0.88 to -0.35, n=12 pairs)"
    )


def test_indistinguishable_says_what_it_would_take():
    assert verdict("A", "B", difference(**UNCLEAR)) == (
        "B and A are indistinguishable at n=5 pairs: +0.21 points (95 % -0.12 to 0.54); "
        "about 14 pairs would show a difference of this size"
    )


def test_a_loss_is_told_in_its_unit_and_lower_is_better():
    loss = difference(
        estimate=-0.0061, interval=Interval(-0.0088, -0.0035, 0.95), higher_is_better=False
    )
    assert verdict("A", "B", loss, unit="nats", scale=1) == (
        "B is better than A: -0.0061 nats (95 % -0.0088 to -0.0035, n=12 pairs)"
    )
    assert "-0.0061 (95 %" in verdict("A", "B", loss, unit="", scale=1)


def test_unpaired_is_told_as_such():
    text = verdict("A", "B", difference(paired=False, n=5, runs=(5, 6)))
    assert text.endswith("n=5 and 6 runs, unpaired)")
    text = verdict("A", "B", difference(**UNCLEAR | {"paired": False}))
    assert "at n=5 runs each, unpaired" in text
    assert "about 14 runs of each would show" in text


def test_the_correction_is_told_and_decides():
    text = verdict("A", "B", difference(adjusted_p_value=0.0045))
    assert text.endswith("n=12 pairs, p=0.0045 by Holm)")
    lost = difference(adjusted_p_value=0.06, p_value=0.01)
    assert "indistinguishable" in verdict("A", "B", lost)
    assert finding(lost) == "unclear"
    assert any("On its own this comparison would pass (p=0.01)" in each for each in remarks(lost))


def test_an_interval_within_the_margin_is_equivalence():
    text = verdict("A", "B", difference(**UNCLEAR), margin=0.006)
    assert text == (
        "B and A are equivalent within 0.60 points: +0.21 points (95 % -0.12 to 0.54, n=5 pairs)"
    )
    assert finding(difference(**UNCLEAR), margin=0.005) == "unclear"


def test_a_difference_that_does_not_matter_is_told_so():
    text = verdict("A", "B", difference(), margin=0.01)
    assert text.startswith("B is better than A")
    assert text.endswith("but by less than the 1.00 points that would matter")


def test_with_a_margin_the_pairs_are_for_the_margin():
    text = verdict("A", "B", difference(**UNCLEAR), margin=0.003)
    assert text.endswith("about 9 pairs would show a difference of 0.30 points")


AMONG = {"comparisons": 10, "adjusted_p_value": 1.0, "simultaneous": Interval(-0.004, 0.008, 0.995)}


def test_among_several_the_simultaneous_interval_makes_equivalence():
    one = difference(**UNCLEAR | AMONG)
    assert finding(one, margin=0.007) == "unclear"  # within which the interval by itself lies
    assert verdict("A", "B", one, margin=0.009) == (
        "B and A are equivalent within 0.90 points: "
        "+0.21 points (99.5 % -0.40 to 0.80, one of 10 comparisons, n=5 pairs)"
    )
    endless = difference(**UNCLEAR | AMONG | {"simultaneous": None})
    assert finding(endless, margin=1.0) == "unclear"


def test_among_several_a_difference_that_does_not_matter_is_judged_by_the_simultaneous_interval():
    better = AMONG | {"adjusted_p_value": 0.009, "simultaneous": Interval(0.001, 0.012, 0.995)}
    text = verdict("A", "B", difference(**better), margin=0.01)
    assert "is better" in text and "would matter" not in text
    text = verdict("A", "B", difference(**better), margin=0.013)
    assert text.endswith("but by less than the 1.30 points that would matter")


def test_among_several_power_is_told_for_the_level_that_is_left_to_each():
    one = difference(**UNCLEAR | AMONG)
    spread = one.standard_deviation
    needed = pairs_needed(0.003, spread, alpha=0.005)
    assert needed > pairs_needed(0.003, spread)
    text = verdict("A", "B", one, margin=0.003)
    assert text.endswith(f"about {needed} pairs would show a difference of 0.30 points")
    least = 100 * smallest_difference(spread, 5, alpha=0.005)
    assert f"about {least:.2f} points in 4 of 5 studies" in remarks(one)[-1]


def test_among_several_the_tests_are_compared_at_the_level_that_is_left_to_each():
    several = {"comparisons": 10, "adjusted_p_value": 0.04}
    close = {"p_value": 0.004, "permutation_p_value": 0.006}
    (said,) = remarks(difference(**several | close))
    assert "do not agree (p=0.004 and p=0.006)" in said
    assert remarks(difference(**several | {"p_value": 0.004, "permutation_p_value": 0.001})) == []
    # Seven pairs get to p=0.016: enough for one comparison, and not for ten.
    student = {"method": "Student's t", "n": 7, "runs": (7, 7), "permutation_p_value": 0.0156}
    (said,) = remarks(difference(**several | student))
    assert "cannot get below p=0.016" in said
    (said,) = remarks(difference(**student))
    assert "cannot get below" not in said


def test_many_comparisons_of_many_pairs_still_rest_on_an_assumption():
    method = {"method": "Student's t", "comparisons": 30, "adjusted_p_value": 0.027}
    (said,) = remarks(difference(**method))
    assert "which 12 pairs can hardly show." in said


def test_a_margin_must_be_above_0():
    with pytest.raises(ValueError, match="must be above 0, but is 0"):
        verdict("A", "B", difference(), margin=0)


def test_a_difference_that_should_have_been_found_is_not_promised_pairs():
    text = verdict("A", "B", difference(**UNCLEAR | {"pairs_needed": 4}))
    assert text.endswith(
        "a difference of this size would mostly have been found with so many pairs"
    )


def test_a_difference_out_of_reach():
    text = verdict("A", "B", difference(**UNCLEAR | {"pairs_needed": None}))
    assert text.endswith("even 10000 pairs would not show a difference of this size")


def test_one_pair():
    text = verdict("A", "B", compare_paired([0.60], [0.61]))
    assert text == (
        "B and A are indistinguishable at n=1 pair: +1.00 points; "
        "one pair has no spread to judge by"
    )
    assert remarks(compare_paired([0.60], [0.61])) == []


def test_one_run_unpaired():
    text = verdict("A", "B", compare_unpaired([0.60], [0.61]))
    assert "at n=1 run each, unpaired: +1.00 points; a single run has no spread" in text
    assert "n=1 and 2 runs, unpaired" in verdict("A", "B", compare_unpaired([0.6], [0.6, 0.7]))


def test_equal_arms():
    text = verdict("A", "B", compare_paired([0.6] * 5, [0.6] * 5))
    assert text == "B and A gave the same in every pair (n=5 pairs)"


def test_no_spread():
    few = verdict("A", "B", compare_paired([0.60] * 5, [0.61] * 5))
    assert few.endswith("+1.00 points; without any spread there is nothing to judge by")
    many = verdict("A", "B", compare_paired([0.60] * 6, [0.61] * 6))
    assert many == "B is better than A: +1.00 points (in every pair, n=6 pairs)"


def test_too_little_spread():
    text = verdict("A", "B", compare_paired([0.6] * 12, [0.61] * 11 + [0.62]))
    assert text.endswith("; too many of the differences are the same to judge by the others")


def test_few_pairs_are_said_to_rest_on_an_assumption():
    (said,) = remarks(difference(**UNCLEAR | {"p_value": 0.01}))
    assert "5 pairs cannot show" in said and "cannot get below p=0.062" in said


def test_tests_that_disagree_are_told():
    (said,) = remarks(difference(p_value=0.04, permutation_p_value=0.07))
    assert "do not agree (p=0.04 and p=0.07)" in said
    assert remarks(difference()) == []


def test_what_could_have_been_found_is_told_with_its_doubt():
    said = remarks(difference(**UNCLEAR))[-1]
    assert "about 0.45 points in 4 of 5 studies" in said
    assert "0.27 to 1.30 points" in said


def test_runs_without_common_seeds_are_told():
    said = remarks(compare_unpaired([0.60, 0.61], [0.60, 0.62]))
    assert said[0].startswith("Unpaired: the seeds of the arms do not match")
    assert said[0].endswith("Runs on the same seeds may show more.")


def test_every_kind_of_difference_has_words():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 6, 9):
        for shift in (0.0, 1e-5, 0.01, 1.0):
            a = rng.normal(0.6, 0.01, size=n)
            found = [compare_paired(a, a + rng.normal(shift, 0.003, size=n))]
            found.append(compare_unpaired(a, rng.normal(0.6 + shift, 0.01, size=n + 1)))
            for each in [*found, *correct(found)]:
                text = verdict("A", "B", each)
                assert text.startswith("B ") and "nan" not in text and "inf" not in text
                assert all(each.endswith(".") for each in remarks(each))
