"""What searches, races and noise tell: crashes are no divergence, and half-trained is no result."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from research.comparison.account import report_of
from research.comparison.gathering import Gathered, gather
from research.comparison.judging import Question, judge, summary
from research.comparison.noise import noise_of
from research.comparison.racing import course_of, races_of
from research.comparison.searching import SearchPart, search_part
from research.comparison.selection import select
from research.configuration.compose import ConfigurationError
from research.statistics.arms import Arm, Trained
from research.statistics.basin import basin
from research.statistics.noise import design, estimate
from research.statistics.report import numbers
from research.statistics.report.content import Report, Verdict
from research.statistics.report.files import write_report
from research.tracking.arms import Found, Read
from tests.trained import arm, trained

CURVE = {"val/accuracy": ((1.0, 0.3), (2.0, 0.6))}


def trial(rate: float, value: float | None, status: str = "FINISHED", **changes: Any) -> Trained:
    metrics = {} if value is None else {"val/accuracy": value}
    known = {"run_id": f"{rate}", "metrics": metrics, "status": status, "curves": CURVE}
    return trained(0, **(known | {"settings": {"optimizer.lr": rate}} | changes))


def found(*runs: Trained, **changes: Any) -> Found:
    run = cast(Any, SimpleNamespace(run_name="search"))
    return Found("search", run, tuple(Read(each, {}) for each in runs), True, True, **changes)


def part(*runs: Trained, **changes: Any) -> SearchPart:
    return search_part([found(*runs, **changes)], 0.95)


GOOD = [trial(rate, value) for rate, value in ((0.001, 0.5), (0.01, 0.6), (0.1, 0.6), (0.3, 0.55))]
DIVERGED = trial(1.0, None, "FAILED", diverged=True)


# ---- searches ------------------------------------------------------------------------------------


def test_trial_that_crashed_was_stopped_or_still_runs_is_told_and_is_no_divergence():
    lost = [
        trial(0.02 + place / 100, 0.1, status)
        for place, status in enumerate(("FAILED", "KILLED", "RUNNING"))
    ]
    with_them, without = part(*GOOD, DIVERGED, *lost), part(*GOOD, DIVERGED)
    assert with_them.fans == without.fans and with_them.best_of == without.best_of
    assert (without.fans["search"].diverged, without.best_of["search"].failed) == (1, 1)
    assert with_them.notes[0].endswith("times to a target: 3.") and without.notes == ()
    (note, *_) = select(found(*GOOD, DIVERGED, *lost)).notes
    assert "(4 finished, 1 diverged, 1 failed, 1 stopped, 1 still running)" in note


def test_half_trained_trial_is_no_value_of_its_rate_but_its_rate_was_tried():
    rising = [trial(rate, value) for rate, value in ((0.001, 0.5), (0.01, 0.6), (0.1, 0.7))]
    fan = part(*rising, trial(1.0, 0.2, "PRUNED")).fans["search"]
    assert (fan.runs, fan.stopped, fan.diverged) == (4, 1, 0)
    assert [rate.rate for rate in fan.rates] == [0.001, 0.01, 0.1]
    assert fan.edge is None and fan.advice == "" and fan.open_high
    assert part(*rising).fans["search"].edge == "high"
    assert "stopped early" in basin([], stopped=[0.1]).advice


@pytest.mark.parametrize("is_minimized", [False, True])
def test_cells_come_in_the_order_of_their_best_trials_those_without_a_value_last(is_minimized):
    losses = {"MSELoss": 0.2, "NLLLoss": None, "CTCLoss": 0.6, "L1Loss": 0.4}
    runs = [
        trial(rate, value, settings={"model.loss": loss, "optimizer.lr": rate})
        for loss, value in losses.items()
        for rate in (0.01, 0.1, 1.0)
    ]
    told = part(*runs, is_minimized=is_minimized)
    order = ["MSELoss", "L1Loss", "CTCLoss"] if is_minimized else ["CTCLoss", "L1Loss", "MSELoss"]
    assert list(told.best_of) == list(told.fans) == [*order, "NLLLoss"]


def test_tolerance_of_a_minimised_objective_is_of_its_best_value():
    runs = [
        trial(rate, None, metrics={"val/loss": loss})
        for rate, loss in ((0.1, math.nan), (0.001, 1.0), (0.01, 0.5), (1.0, 90.0))
    ]
    fan = part(*runs, objective="val/loss", is_minimized=True).fans["search"]
    assert fan.tolerance == pytest.approx(0.005)
    assert fan.diverged == 1


def test_search_without_a_value_makes_no_fan_of_use_and_no_error():
    fan = part(*(trial(rate, None, "FAILED", diverged=True) for rate in (1.0, 2.0, 3.0)))
    assert fan.fans["search"].best_rate is None and fan.races == ()


def told_of(*searches: Found, **asked: Any) -> tuple[str, Report]:
    """The metric by which these searches are judged, and their report."""
    judgement = judge(gather(searches), Question(**asked))
    report = report_of(judgement, "title", "again", search_part(searches, 0.95))
    return judgement.metric, report


def losses(*rates: float) -> list[Trained]:
    """Trials whose loss is the least at 0.01, where their accuracy is the least, too."""
    pairs = [(rate, abs(math.log10(rate) + 2)) for rate in rates]
    return [
        trial(rate, None, metrics={"val/loss": 1 + far, "val/accuracy": 0.5 + far / 10})
        for rate, far in pairs
    ]


def test_search_is_judged_by_its_own_objective_and_direction_unless_told_otherwise(tmp_path):
    rates = (0.001, 0.01, 0.1, 1.0)
    search = found(*losses(*rates), objective="val/loss", is_minimized=True)
    metric, report = told_of(search)
    assert (metric, report.higher_is_better) == ("val/loss", False)
    assert "lr=0.01 has the best mean" in report.verdicts[0].text
    assert "the search was for it" in report.summary
    assert report.fans["search"].best_rate == pytest.approx(0.01, rel=0.3)
    assert report.best_of["search"].points[0].expected == pytest.approx(2.0)
    page = write_report(report, tmp_path)[1].read_text()
    assert "val/loss by learning rate" in page and "Expected best val/loss of k trials" in page
    # Asked for another metric, the verdict is by that one; trials are still what they were for.
    metric, report = told_of(search, metric="val/accuracy")
    assert (metric, report.higher_is_better) == ("val/accuracy", True)
    assert "lr=1 has the best mean" in report.verdicts[0].text
    assert (report.search_metric, report.search_higher_is_better) == ("val/loss", False)
    assert report.fans["search"].best_rate == pytest.approx(0.01, rel=0.3)


def test_direction_of_a_search_is_its_own():
    search = found(*losses(0.001, 0.01, 0.1), objective="val/loss", is_minimized=False)
    judgement = judge(gather([search]), Question())
    assert judgement.higher_is_better
    assert judgement.standings[0].arm.name in ("lr=0.001", "lr=0.1")


def test_several_searches_are_all_told():
    one, other = found(*GOOD), replace(found(*GOOD, DIVERGED), text="other")
    _, report = told_of(one, other)
    assert list(report.fans) == list(report.best_of) == ["search: search", "other: search"]
    assert report.best_of["other: search"].failed == 1
    assert sum("a search of" in remark for remark in report.remarks) == 2


def test_searches_for_different_things_need_a_metric_and_have_no_common_figures():
    one = found(*losses(0.001, 0.01, 0.1))
    other = replace(one, text="other", objective="val/loss", is_minimized=True)
    with pytest.raises(ConfigurationError, match=r"different things \(val/accuracy, val/loss\)"):
        told_of(one, other)
    metric, report = told_of(one, other, metric="val/loss")
    assert (metric, report.higher_is_better) == ("val/loss", False)
    assert report.fans == {} and any("name each alone" in remark for remark in report.remarks)


# ---- races ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "diverged", "ended"),
    [
        ("FINISHED", False, "finished"),
        ("PRUNED", False, "pruned"),
        ("RUNNING", False, "pruned"),
        ("FAILED", False, "pruned"),
        ("FAILED", True, "failed"),
    ],
)
def test_only_a_run_that_diverged_never_arrives(status, diverged, ended):
    assert course_of(trial(0.1, 0.5, status, diverged=diverged)).ended == ended


def test_group_whose_runs_all_diverged_at_once_is_in_the_race_and_drawn(tmp_path):
    lost = trial(1.0, None, "FAILED", diverged=True, curves={})
    crashed = trial(1.0, None, "FAILED", curves={})
    groups = {"good": GOOD, "lost": [lost] * 3, "crashed": [crashed]}
    (race,) = races_of(groups, 0.95)
    assert [(arm.runs, arm.reached, arm.failed) for arm in race.arms] == [
        (4, 4, 0), (3, 0, 3), (0, 0, 0)
    ]  # fmt: skip
    report = Report("title", "val/accuracy", (Verdict("It is."),), "again", races=(race,))
    page = write_report(report, tmp_path)[0].read_text()
    assert page.count("not reached by half") == 1 and page.count("no run") == 1
    assert races_of({"lost": [lost] * 3}, 0.95) == ()  # there is no target


def test_runs_that_ended_without_a_curve_have_no_race():
    assert races_of({"a": GOOD, "b": [trial(0.1, 0.5, curves={})]}, 0.95) == ()


def test_bands_of_races_have_the_level_that_is_asked_for():
    (race,) = races_of({"a": [trial(0.1, 0.6)] * 3}, 0.8)
    assert {step.interval.level for step in race.arms[0].steps} == {0.8}


def test_run_that_was_made_again_counts_once():
    crashed, again = trained(0, 0.1, status="FAILED"), trained(0, 0.6, run_id="again")
    lost = [trained(1, 0.1, status="FAILED"), trained(1, 0.2, status="KILLED", run_id="last")]
    counted = arm(again, crashed, *lost).counted("val/accuracy")
    assert [run.run_id for run in counted] == ["again", "last"]


# ---- words ---------------------------------------------------------------------------------------


def test_arm_that_beats_the_best_on_common_seeds_is_named():
    def contrast(name: str, finding: str) -> Any:
        return SimpleNamespace(a=Arm(name, "", ()), b=Arm("best", "", ()), finding=finding)

    both = summary([contrast("x", "better"), contrast("y", "worse")], None)
    assert both == (
        "best has the best mean; it is better than x; worse than y on the seeds that both have"
    )
    assert not summary([contrast("y", "worse")], None).endswith("it is ")


def test_noise_is_read_by_validation_and_tells_how_uncertain_its_limit_is():
    def runs(split: int) -> list[Trained]:
        return [
            trained(
                seed,
                run_id=str(seed),
                seeds={"weights": seed, "split": seed * split},
                metrics={"val/accuracy": 0.6 + seed / 100, "test/accuracy": 0.5 + seed / 50},
                test_looks=1,
            )
            for seed in range(4)
        ]

    told, report = noise_of(found(*runs(1)), None, 0.95, "again")
    assert report.metric == "val/accuracy"
    assert noise_of(found(*runs(1)), "test/accuracy", 0.95, "again")[1].metric == "test/accuracy"
    limit = report.readable[2]
    within = numbers.interval(limit.unpaired_interval, report.metric)
    assert f"about {numbers.bare(limit.unpaired, report.metric)} points ({within})" in (
        report.verdicts[0].text
    )
    assert "may be " in told and "differ in every seed deviate" in " ".join(told.split())
    fixed = " ".join(noise_of(found(*runs(0)), None, 0.95, "again")[0].split())
    assert "every seed but that of the split" in fixed


@pytest.mark.parametrize(
    ("metric", "is_share"),
    [
        ("test/accuracy/cat", True),
        ("test/macro_f1", True),
        ("accuracy", True),
        ("val/loss", False),
        ("epoch_seconds", False),
    ],
)
def test_shares_are_those_of_single_classes_too(metric, is_share):
    assert numbers.is_share(metric) == is_share


def test_report_says_that_intervals_are_over_seeds_alone():
    arms = [
        arm(*(trained(seed, value + seed / 100) for seed in range(3)), name=name)
        for name, value in (("a", 0.5), ("b", 0.6))
    ]
    report = report_of(judge(Gathered(tuple(arms)), Question()), "t", "again")
    assert any("over seeds alone" in remark for remark in report.remarks)


# ---- the split -----------------------------------------------------------------------------------


def test_seed_of_the_split_is_that_of_the_run_and_all_differ_with_it():
    from research.repetition.trainings import by_stream

    planned = design(9, sources=("weights", "order"))
    seeds = [{"split": each.background, **each.seeds} for each in planned]
    trainings = by_stream(seeds)
    assert len({each.key for each in trainings}) == 9
    for each, own in zip(trainings, seeds, strict=True):
        streams = {"weights": own["weights"], "order": own["order"]}
        assert each.settings == {"seed_everything": own["split"], "random": streams}
    noise = estimate([(own, 0.6 + place / 100) for place, own in enumerate(seeds)])
    assert (noise.fixed, noise.untested) == ((), ("split",))
    assert [each.source for each in noise.sources] == ["weights", "order"]
