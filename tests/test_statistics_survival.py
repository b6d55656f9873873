"""Times to a target: by hand, against the plain ecdf, and the level of the test."""

import math

import numpy as np
import pytest
from scipy import stats

from research.statistics.survival import (
    Course,
    Waiting,
    fair_target,
    kaplan_meier,
    logrank,
    race,
)


def course(*values: float, ended="finished", seconds: float | None = None) -> Course:
    """A run that was validated after every epoch, each of which took so many seconds."""
    epochs = range(1, len(values) + 1)
    took = () if seconds is None else tuple((float(epoch), seconds) for epoch in epochs)
    return Course(tuple((float(e), v) for e, v in zip(epochs, values, strict=True)), took, ended)


def at(epoch: int, length: int = 10, **more) -> Course:
    """A run that is at the target, 0.5, from this epoch on; 0: never."""
    values = [0.6 if 0 < epoch <= each else 0.1 for each in range(1, length + 1)]
    return course(*values, **more)


# ---- Kaplan and Meier ----------------------------------------------------------------------------

# Freireich et al. (1963), weeks to relapse under 6-MP, + censored; the textbook's example with its
# textbook's results (Kleinbaum and Klein, "Survival Analysis", chapter 2).
TREATED = "6 6 6 6+ 7 9+ 10 10+ 11+ 13 16 17+ 19+ 20+ 22 23 25+ 32+ 32+ 34+ 35+"
PLACEBO = "1 1 2 2 3 4 4 5 5 8 8 8 8 11 11 12 12 15 17 22 23"
CURVE = {6: 0.8571, 7: 0.8067, 10: 0.7529, 13: 0.6902, 16: 0.6275, 22: 0.5378, 23: 0.4482}


def weeks(text: str) -> list[Waiting]:
    return [Waiting(float(word.rstrip("+")), not word.endswith("+")) for word in text.split()]


def test_curve_of_the_textbook_comes_out():
    steps = {step.time: step.waiting for step in kaplan_meier(weeks(TREATED), 0.95)}
    for time, share in CURVE.items():
        assert steps[time] == pytest.approx(share, abs=1e-4)
    assert logrank(weeks(TREATED), weeks(PLACEBO)) == pytest.approx(
        stats.chi2.sf(16.79, 1), rel=0.02
    )


def test_small_example_by_hand():
    """Epochs 2, 4+, 5, 8+: 3/4 after 2; of the two at risk at 5 one is there: 3/8."""
    runs = [at(2), at(0, 4, ended="pruned"), at(5), at(0, 8)]
    (arm,) = race({"A": runs}, target=0.5).arms
    told = [(step.time, step.waiting) for step in arm.steps]
    assert told == [(2, 0.75), (4, 0.75), (5, 0.375), (8, 0.375)]
    assert (arm.reached, arm.pruned, arm.failed, arm.runs) == (2, 1, 0, 4)
    assert arm.median == 5
    assert arm.restricted_mean == pytest.approx(2 + 3 * 0.75 + 3 * 0.375)
    areas = {2: 3 * 0.75 + 3 * 0.375, 5: 3 * 0.375}
    variance = (areas[2] ** 2 / (4 * 3) + areas[5] ** 2 / (2 * 1)) * 2 / (2 - 1)
    reach = 1.959964 * math.sqrt(variance)
    assert arm.restricted_mean_interval.low == pytest.approx(max(arm.restricted_mean - reach, 0))
    assert arm.restricted_mean_interval.high == pytest.approx(min(arm.restricted_mean + reach, 8))


def test_without_censoring_the_curve_is_one_minus_the_ecdf():
    times = np.random.default_rng(0).integers(1, 12, size=30)
    steps = kaplan_meier([Waiting(float(time), True) for time in times], 0.95)
    plain = stats.ecdf(times).cdf
    assert [step.time for step in steps] == list(plain.quantiles)
    assert [step.waiting for step in steps] == pytest.approx(list(1 - plain.probabilities))
    (arm,) = race({"A": [at(int(time), 12) for time in times]}, target=0.5).arms
    assert arm.restricted_mean == pytest.approx(times.mean())


@pytest.mark.parametrize("censoring", [math.inf, 1.0])
def test_intervals_hold_the_truth_as_often_as_promised(censoring):
    """Exponential times, mean 1, all seen or cut off at uniform times: 25 runs."""
    drawn, held, studies = np.random.default_rng(0), np.zeros(3), 300
    for _ in range(studies):
        times = drawn.exponential(size=25)
        ends = drawn.uniform(0.5, 2.5, size=25) if censoring < math.inf else np.full(25, 3.0)
        waits = [Waiting(min(t, e), t <= e) for t, e in zip(times, ends, strict=True)]
        arm = survival_of(waits, horizon=1.0)
        at_half = [step for step in arm.steps if step.time <= 0.5][-1]
        held += [
            math.exp(-0.5) in at_half.interval,
            math.log(2) in arm.median_interval,
            1 - math.exp(-1) in arm.restricted_mean_interval,
        ]
    assert (held >= stats.binom.ppf(0.001, studies, 0.93)).all(), held


def survival_of(waits, horizon):
    from research.statistics.survival import survival

    return survival("A", waits, 0, 0, horizon, 0.95)


# ---- arms that do not get there ------------------------------------------------------------------


def test_arm_that_never_gets_there_is_told_so():
    found = race({"A": [at(0)] * 4, "B": [at(0)] * 4}, target=0.5)
    for arm in found.arms:
        assert (arm.reached, arm.median) == (0, None)
        assert arm.median_text == "not reached by half"
        assert arm.median_interval.high == math.inf
        assert [(step.time, step.waiting) for step in arm.steps] == [(10, 1)]
        # None of 4 has, and as many as 60 % might have: 0.398^4 = 2.5 %.
        assert arm.steps[0].interval.low == pytest.approx(0.025**0.25)
        assert arm.steps[0].interval.high == 1
        assert (arm.restricted_mean, arm.restricted_mean_interval) == (10, None)
    assert (found.tests[0].p_value, found.tests[0].adjusted_p_value) == (None, None)


def test_all_at_once_leaves_room_for_those_not_seen():
    (arm,) = race({"A": [at(3)] * 4}, target=0.5).arms
    assert (arm.median, arm.steps[0].waiting) == (3, 0)
    assert arm.steps[0].interval.high == pytest.approx(1 - 0.025**0.25)


def test_run_that_failed_is_short_of_the_target_as_long_as_the_longest():
    """A run that diverged early is no run that was on its way."""
    diverged = at(0, 2, ended="failed")
    arm, broken = race({"A": [at(4), at(6), diverged], "B": [diverged]}, target=0.5).arms
    assert arm.waitings == (Waiting(4, True), Waiting(6, True), Waiting(10, False))
    assert arm.steps[-1].waiting == pytest.approx(1 / 3)
    assert (broken.waitings, broken.restricted_mean) == ((Waiting(10, False),), 10)
    pruned = at(0, 2, ended="pruned")
    (arm,) = race({"A": [at(4), at(6), pruned]}, target=0.5).arms
    assert arm.waitings[-1] == Waiting(2, False)
    assert arm.steps[-1].waiting == 0


@pytest.mark.parametrize("unit", ["epochs", "seconds"])
def test_run_that_failed_before_its_first_value_never_gets_there(unit):
    """A rate so large that nothing was recorded is the worst rate, and not one without runs."""
    nothing, first = course(ended="failed"), course(0.1, ended="failed")
    runs = {"A": [at(4, seconds=1.0), at(6, seconds=1.0), nothing], "B": [nothing, first]}
    found = race(runs, target=0.5, unit=unit)
    arm, broken = found.arms
    assert arm.waitings == (Waiting(4, True), Waiting(6, True), Waiting(10, False))
    assert (arm.runs, arm.reached, arm.failed) == (3, 2, 1)
    assert broken.waitings == (Waiting(10, False),) * 2
    assert (broken.failed, broken.restricted_mean, broken.median) == (2, 10, None)
    assert found.horizon == 10 and len(found.tests) == 1
    # One that was there before it failed, at an hour that nobody wrote down, tells no time.
    (arm,) = race({"A": [at(4, seconds=1.0), at(2, ended="failed")]}, target=0.5, unit=unit).arms
    assert arm.runs == (2 if unit == "epochs" else 1)


def test_first_crossing_counts_and_values_that_are_none_do_not():
    run = course(0.1, math.nan, 0.5, 0.2, 0.9)
    (arm,) = race({"A": [run]}, target=0.5).arms
    assert arm.waitings == (Waiting(3, True),)
    (arm,) = race({"A": [course(2.0, 1.0, 0.5)]}, target=1.0, higher_is_better=False).arms
    assert arm.waitings == (Waiting(2, True),)


def test_seconds_are_those_of_the_epochs_until_then():
    slow, fast = at(2, seconds=30.0), at(4, seconds=5.0)
    found = race({"slow": [slow], "fast": [fast, at(1)]}, target=0.5, unit="seconds")
    assert [arm.waitings for arm in found.arms] == [(Waiting(60, True),), (Waiting(20, True),)]


def test_arm_without_runs_has_no_curve_and_no_test():
    found = race({"A": [at(2), at(3)], "B": [], "C": [Course(())]}, target=0.5)
    assert [arm.steps for arm in found.arms[1:]] == [(), ()]
    assert found.tests == ()
    assert race({}, target=0.5).arms == ()


def test_horizon_is_the_end_of_the_curve_that_is_known_least_far():
    assert race({"A": [at(0, 10)], "B": [at(0, 6)]}, target=0.5).horizon == 6
    # All of A are there at 3, and stay there.
    found = race({"A": [at(2), at(3)], "B": [at(0, 6)]}, target=0.5)
    assert found.horizon == 6
    assert found.arms[0].restricted_mean == pytest.approx(2.5)


# ---- the target ----------------------------------------------------------------------------------


def test_fair_target_is_what_half_of_the_worst_arms_runs_attain():
    arms = {
        "good": [course(0.5, 0.8), course(0.5, 0.9)],
        "poor": [course(0.4, 0.5), course(0.4, 0.6), course(0.4, 0.7), course(0.4, 0.55)],
        "broken": [course(0.9, math.nan, ended="failed"), course(0.3, 0.3, ended="pruned")],
    }
    target, reason = fair_target(arms, higher_is_better=True)
    assert target == 0.55
    assert reason == "the median final value of poor, the lowest of all arms"
    found = race(arms)
    assert found.target == 0.55
    assert found.arms[1].reached >= 2
    losses = {name: [course(*(1 - v for _, v in run.values)) for run in arms[name]] for name in
              ("good", "poor")}  # fmt: skip
    assert fair_target(losses, higher_is_better=False)[0] == pytest.approx(0.45)


def test_no_value_to_make_a_target_of_is_refused():
    with pytest.raises(ValueError, match="give one"):
        race({"A": [course(0.4, math.nan, ended="failed")]})


# ---- between arms --------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [6, 12])
def test_log_rank_test_keeps_its_level(runs):
    """Two equal arms on whole epochs, a third of the runs censored."""
    drawn, studies = np.random.default_rng(runs), 500
    found = []
    for _ in range(studies):
        times = np.ceil(drawn.exponential(8, size=(2, runs)))
        arms = [[Waiting(min(float(t), 9.0), bool(t <= 9)) for t in own] for own in times]
        found.append(logrank(*arms))
    values = np.array([1.0 if value is None else value for value in found])
    assert (values <= 0.05).sum() <= stats.binom.ppf(0.999, studies, 0.06)
    assert (values <= 0.05).sum() >= stats.binom.ppf(0.001, studies, 0.02)


def test_all_pairs_are_tested_and_corrected():
    arms = {
        "fast": [at(e) for e in (1, 1, 2, 2, 2, 3)],
        "slow": [at(e) for e in (7, 8, 8, 9, 9, 0)],
        "same": [at(e) for e in (7, 8, 9, 9, 9, 0)],
    }
    tests = {(test.a, test.b): test for test in race(arms, target=0.5).tests}
    assert list(tests) == [("fast", "slow"), ("fast", "same"), ("slow", "same")]
    assert tests["fast", "slow"].adjusted_p_value < 0.01
    assert tests["slow", "same"].p_value > 0.5
    raw = sorted(test.p_value for test in tests.values())
    assert min(test.adjusted_p_value for test in tests.values()) == pytest.approx(3 * raw[0])
