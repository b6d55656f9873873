"""The noise of simulated experiments of known make, and what can be read at n seeds."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from research.statistics import noise
from research.statistics.noise import SOURCES, design, estimate
from research.statistics.readable import readable

DEVIATIONS = {"weights": 0.004, "order": 0.003, "augmentation": 0.002}


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(noise, "DRAWS", 2000)


def additive(seed: int, hardware: float = 0.0) -> Callable[[Mapping[str, int]], float]:
    """An experiment whose sources add up: each seed of a stream has an effect of its own."""
    drawn = np.random.default_rng(seed)
    effects: dict[tuple[str, int], float] = {}

    def run(seeds: Mapping[str, int]) -> float:
        figure = 0.6 + (hardware * drawn.normal() if hardware > 0 else 0.0)
        for source, deviation in DEVIATIONS.items():
            key = source, seeds[source]
            if key not in effects:
                effects[key] = deviation * drawn.normal()
            figure += effects[key]
        return figure

    return run


def chaos(seeds: Mapping[str, int]) -> float:
    """An experiment in which any change of any seed is a change of all."""
    return float(np.random.default_rng(list(seeds.values())).normal())


def study(plan, run):
    return [(each.seeds, run(each.seeds)) for each in plan]


# ---- the plan ------------------------------------------------------------------------------------


@given(
    budget=st.integers(1, 90),
    count=st.integers(1, 4),
    backgrounds=st.none() | st.integers(1, 8),
    repeats=st.none() | st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_plan_keeps_to_the_budget_and_tells_every_source_apart(budget, count, backgrounds, repeats):
    sources = SOURCES[:count]
    try:
        plan = design(budget, sources=sources, backgrounds=backgrounds, repeats=repeats)
    except ValueError as error:
        least = int(str(error).partition("allow ")[2].split()[0])
        assert least > budget
        more = design(least, sources=sources, backgrounds=backgrounds, repeats=repeats)
        assert len(more) == least
        return
    assert len(plan) <= budget
    result = estimate(study(plan, chaos))
    assert [each.source for each in result.sources] == list(sources)
    assert not result.untested
    for each in result.sources:
        assert each.degrees_of_freedom >= 2
        assert each.degrees_of_freedom <= result.total.degrees_of_freedom
        assert backgrounds is None or count == 1 or each.groups == backgrounds
    wanted = sum(each.purpose == "hardware" for each in plan)
    assert (result.hardware.degrees_of_freedom if result.hardware else 0) == wanted
    assert repeats is None or wanted == repeats


def test_each_run_differs_from_its_background_in_what_it_is_for():
    plan = design(40)
    backgrounds = {each.background: each.seeds for each in plan if each.purpose == "background"}
    assert sum(each.purpose == "order" for each in plan) == 6
    for each in plan:
        other = [s for s in SOURCES if each.seeds[s] != backgrounds[each.background][s]]
        assert other == ([each.purpose] if each.purpose in SOURCES else [])
    used = [each.seeds[each.purpose] for each in plan if each.purpose in SOURCES]
    assert len(set(used)) == len(used)
    assert not set(used) & {seeds["weights"] for seeds in backgrounds.values()}


@pytest.mark.parametrize("sources", [(), ("weights", "weights"), ("hardware",)])
def test_sources_that_are_none_are_refused(sources):
    with pytest.raises(ValueError, match="sources must be"):
        design(40, sources=sources)


# ---- what comes of it ----------------------------------------------------------------------------


@pytest.mark.parametrize(("hardware", "backgrounds"), [(0.0, None), (0.002, None), (0.002, 2)])
def test_intervals_hold_the_true_deviations_as_often_as_promised(hardware, backgrounds):
    plan = design(40, sources=tuple(DEVIATIONS), backgrounds=backgrounds)
    whole = math.sqrt(sum(each**2 for each in DEVIATIONS.values()) + hardware**2)
    truth = {**DEVIATIONS, "all": whole, "hardware": hardware}
    held = dict.fromkeys(truth, 0)
    squares = dict.fromkeys(truth, 0.0)
    for seed in range(200):
        result = estimate(study(plan, additive(seed, hardware)), seed=seed)
        for each in (*result.sources, result.total, result.hardware):
            held[each.source] += truth[each.source] in each.interval
            squares[each.source] += each.deviation**2 / 200
    for source, times in held.items():
        assert times >= stats.binom.ppf(0.001, 200, 0.95), source
        assert squares[source] == pytest.approx(truth[source] ** 2, rel=0.25, abs=1e-6)


def test_shares_of_an_additive_experiment_sum_to_one():
    plan = design(900, sources=tuple(DEVIATIONS))
    result = estimate(study(plan, additive(1)))
    assert sum(each.share for each in result.sources) == pytest.approx(1, abs=0.25)
    assert 0 in result.interaction.interval
    assert result.notes == [
        "Hardware: 179 of 179 repeats with all seeds fixed gave the same figure to the last bit, "
        "so its part is 0."
    ]


def test_of_chaos_every_source_alone_has_the_whole_share():
    result = estimate(study(design(600), chaos))
    for each in result.sources:
        assert each.share == pytest.approx(1, abs=0.4)
    # Each interaction of all four is counted four times: three times too often.
    assert 3 in result.interaction.interval
    assert result.interaction.interval.low > 1
    assert any("together" in note for note in result.notes)


def test_part_of_a_source_is_free_of_the_hardwares():
    plan = design(1500, sources=("weights",))
    drawn = np.random.default_rng(0)
    result = estimate([(each.seeds, float(drawn.normal())) for each in plan])
    assert result.hardware.deviation == pytest.approx(1, rel=0.1)
    assert result.sources[0].deviation < 0.4
    assert result.sources[0].interval.low == 0


def test_source_that_draws_nothing_is_zero_and_told():
    run = additive(0, hardware=0.0)
    result = estimate(study(design(40), run))
    (dropout,) = [each for each in result.sources if each.source == "dropout"]
    assert (dropout.deviation, dropout.interval.high, dropout.identical) == (0, 0, True)
    assert result.hardware.identical and result.hardware.deviation == 0
    assert any(note.startswith("dropout: no change") for note in result.notes)


def test_twins_around_one_background_give_the_variance_around_it():
    values = [0.1, 0.4, 0.2]
    runs = [({"weights": 0, "order": 0}, 0.1), ({"weights": 1, "order": 0}, 0.4)]
    runs += [({"weights": 2, "order": 0}, 0.2), ({"weights": 9, "order": 1}, 0.7)]
    result = estimate(runs)
    assert result.sources[0].deviation == pytest.approx(np.std(values, ddof=1))
    assert result.total.deviation == pytest.approx(np.std([0.1, 0.7], ddof=1))
    assert result.untested == ("order",) and result.interaction is None
    assert result.hardware is None
    assert len(result.notes) == 3  # no repeat, one background, order never varied alone


def test_interval_of_one_mean_square_is_the_chi_square_one(monkeypatch):
    monkeypatch.setattr(noise, "DRAWS", 200_000)
    values = [0.61, 0.64, 0.60, 0.66, 0.63]
    result = estimate([({"weights": seed}, value) for seed, value in enumerate(values)])
    low, high = 4 * np.var(values, ddof=1) / stats.chi2.ppf([0.975, 0.025], 4)
    interval = result.total.interval
    assert (interval.low, interval.high) == pytest.approx((low**0.5, high**0.5), rel=0.01)


def test_runs_without_a_figure_and_streams_that_stay_are_told():
    runs = [({"weights": s, "split": 7}, 0.6 + s / 100) for s in range(4)]
    result = estimate([*runs, ({"weights": 9, "split": 7}, math.nan)])
    assert (result.failed, result.fixed) == (1, ("split",))
    assert result.total.degrees_of_freedom == 3
    assert any("1 run gave no figure" in note for note in result.notes)
    assert any("split" in note for note in result.notes)


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ([({"weights": 1}, 0.5), ({"weights": 1}, 0.6)], "no seed changes"),
        ([({"weights": 1}, 0.5), ({"weights": 2}, math.nan)], "two or more"),
        ([({"weights": 1}, 0.5), ({"weights": 2, "order": 1}, 0.5)], "no seed of order"),
    ],
)
def test_runs_that_say_nothing_are_refused(runs, told):
    with pytest.raises(ValueError, match=told):
        estimate(runs)


# ---- what can be read ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5])
def test_arms_that_do_not_differ_pass_the_limit_as_often_as_told(n):
    drawn = np.random.default_rng(n)
    passed = 0
    for _ in range(1500):
        runs = [({"weights": s}, value) for s, value in enumerate(drawn.normal(size=8))]
        total = estimate_total(runs)
        (limit,) = readable(total, counts=[n])
        a, b = drawn.normal(size=(2, n)).mean(axis=1)
        passed += abs(a - b) > limit.unpaired
    assert stats.binom.ppf(0.001, 1500, 0.05) <= passed <= stats.binom.ppf(0.999, 1500, 0.05)


def estimate_total(runs):
    square = noise.mean_square([[value for _, value in runs]])
    spread = np.full(10, square.value)
    return noise.component("all", square, square.value, spread, square.value, 0.95)


def test_pairs_that_go_together_read_smaller_differences():
    total = estimate([({"weights": s}, v) for s, v in enumerate([0.60, 0.62, 0.61, 0.65])]).total
    ones = readable(total, correlation=0.75)
    assert [each.n for each in ones] == list(range(1, 21))
    for each in ones:
        assert each.paired == pytest.approx(each.unpaired / 2)
        assert each.unpaired == pytest.approx(ones[0].unpaired / math.sqrt(each.n))
        assert each.unpaired_interval.low < each.unpaired
    measured = readable(total, differences=[0.01, 0.02, 0.03])[3]
    t = stats.t.ppf(0.975, 2)
    assert measured.paired == pytest.approx(t * 0.01 / 2)
    assert readable(total)[0].paired is None
    assert readable(total, differences=[0.01], correlation=0.5)[0].paired is None
    with pytest.raises(ValueError, match="correlation"):
        readable(total, correlation=2)
