"""Arms judged: pairs, refusals, what is told beside the verdict, and all that as text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from research.comparison.account import report_of
from research.comparison.gathering import Gathered
from research.comparison.judging import Judgement, Question, judge
from research.comparison.screen import WIDTH, screen
from research.configuration.compose import ConfigurationError
from research.statistics.arms import Arm
from research.statistics.report.files import write_report
from tests.trained import trained

NOISE = [0.003, -0.004, 0.001, 0.006, -0.002, 0.0, -0.005, 0.002]
PLAIN = [0.60 + noise for noise in NOISE]
BETTER = [value + 0.01 + 0.0005 * place for place, value in enumerate(PLAIN)]
SGD = {"optimizer": "SGD", "optimizer.lr": 0.1, "data": "CIFAR10"}
ADAM = SGD | {"optimizer": "Adam"}
ALIKE = {"initial_weights": "w", "first_batches": "b"}
ORIGINS = {"code": "c", "data set": "CIFAR10", "test pictures": "t", "device": "cpu"}


def arm(name: str, values: Sequence[float], seeds: Sequence[int] = (), **changes: Any) -> Arm:
    """An arm of that name with a run for each value, tested once each."""
    known = {"settings": SGD, "test_looks": 1, "origins": ORIGINS, **ALIKE, **changes}
    runs = []
    for seed, value in zip(seeds or range(len(values)), values, strict=True):
        metrics = {"val/accuracy": value, "test/accuracy": value, **changes.get("metrics", {})}
        runs.append(trained(seed, **(known | {"metrics": metrics})))
    return Arm(name, name, tuple(runs))


def judged(*arms: Arm, meant: tuple[str, ...] = (), **asked: Any) -> Judgement:
    return judge(Gathered(arms, meant), Question(**asked))


def with_runs(arm: Arm, place: int, **changes: Any) -> Arm:
    """The arm with its run at that place changed."""
    runs = list(arm.runs)
    runs[place] = replace(runs[place], **changes)
    return replace(arm, runs=tuple(runs))


# ---- the verdict ---------------------------------------------------------------------------------


def test_known_effect_is_told_first_with_its_size_and_nothing_speaks_against_it():
    judgement = judged(arm("sgd", PLAIN), arm("adam", BETTER, settings=ADAM))
    assert judgement.headline.startswith("adam is better than sgd: +1.17 points (95 %")
    assert judgement.headline.endswith("n=8 pairs)")
    assert judgement.cautions == ()
    text = screen(judgement)
    assert " ".join(text.split("\n\n")[0].split()) == f"{judgement.headline}."
    assert max(map(len, text.splitlines())) <= WIDTH


def test_pairs_are_found_by_seed_whatever_the_order_of_runs():
    turned = replace(arm("adam", BETTER, settings=ADAM), runs=arm("adam", BETTER).runs[::-1])
    straight = judged(arm("sgd", PLAIN), arm("adam", BETTER)).contrasts[0].difference
    assert judged(arm("sgd", PLAIN), turned).contrasts[0].difference == straight


def test_no_effect_is_indistinguishable_and_says_what_it_would_take():
    swapped = [PLAIN[place] for place in (1, 0, 3, 2, 5, 4, 7, 6)]
    judgement = judged(arm("a", PLAIN), arm("b", swapped, settings=ADAM))
    assert "are indistinguishable at n=8 pairs" in judgement.headline


def test_several_arms_are_corrected_and_the_best_is_told_against_all():
    arms = [
        arm(f"x{n}", [v + n / 100 + place * n / 5000 for place, v in enumerate(PLAIN)],
            settings=SGD | {"optimizer.lr": n})
        for n in (0, 1, 2)
    ]  # fmt: skip
    judgement = judged(*arms)
    assert judgement.headline == "x2 has the best mean; it is better than x1 and x0"
    assert len(judgement.contrasts) == 3
    for each in judgement.contrasts:
        assert each.difference.adjusted_p_value is not None
        assert each.difference.adjusted_p_value >= each.difference.p_value
    assert [standing.ranked.best_place for standing in judgement.standings] == [1, 2, 3]
    against = judged(*arms, baseline="x0")
    assert against.headline == "Better than x0: x2 and x1"
    assert [(each.a.name, each.b.name) for each in against.contrasts] == [
        ("x0", "x2"),
        ("x0", "x1"),
    ]
    assert "\N{MINUS SIGN}1.07" in screen(judgement) and "+1.07" in screen(against)
    with pytest.raises(ConfigurationError, match="baseline: there is no one arm y0"):
        judged(*arms, baseline="y0")


def test_margin_allows_to_call_arms_equivalent():
    same = [value + 0.0001 * (place - 3.6) for place, value in enumerate(PLAIN)]
    arms = arm("a", PLAIN), arm("b", same, settings=ADAM)
    assert "b and a are equivalent within 1.0" in judged(*arms, margin=0.01, level=0.999).headline
    assert "indistinguishable" in judged(*arms, level=0.999).headline


def test_many_arms_fit_the_width():
    names = [f"a_long_name_of_a_loss_and_an_optimizer_{n}" for n in range(7)]
    arms = [arm(name, PLAIN[:3], settings=SGD | {"model.loss": name}) for name in names]
    assert max(map(len, screen(judged(*arms)).splitlines())) <= WIDTH


# ---- pairs ---------------------------------------------------------------------------------------


def test_seeds_without_a_partner_are_told_and_left_out():
    judgement = judged(arm("a", PLAIN[:4]), arm("b", BETTER[:4], [1, 2, 3, 9], settings=ADAM))
    assert judgement.contrasts[0].difference.n == 3
    assert judgement.cautions == ("Seeds without a partner, which are left out: a (0); b (9).",)


def test_arms_without_a_common_seed_are_unpaired_and_told_so():
    judgement = judged(arm("a", PLAIN[:4]), arm("b", BETTER[:4], [10, 11, 12, 13], settings=ADAM))
    assert not judgement.contrasts[0].difference.paired
    assert any("a and b are not paired" in told for told in judgement.cautions)
    assert any(told.startswith("Unpaired") for told in judgement.remarks)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"initial_weights": "x"}, "in their initial weights, which no setting explains"),
        ({"first_batches": "x"}, "in their first batches, which no setting explains"),
        (
            {"initial_weights": "x", "settings": ADAM | {"model.network": "ResNet9"}},
            "initial weights, as they must where model.network differs",
        ),
        (
            {"first_batches": "x", "settings": ADAM | {"data.batch_size": 9}},
            "first batches, as they must where data.batch_size differs",
        ),
        ({"initial_weights": None}, "2 of 2 pairs recorded no hash"),
    ],
)
def test_pairs_that_did_not_prove_to_begin_alike_are_told(changes, told):
    other = arm("b", BETTER[:2], **({"settings": ADAM} | changes))
    assert any(told in caution for caution in judged(arm("a", PLAIN[:2]), other).cautions)


def test_what_explains_a_pair_is_what_its_own_two_arms_differ_in():
    """A third arm with another network explains nothing of the first two."""
    wide = SGD | {"model.network": "Wide"}
    plain, broken = arm("a", PLAIN[:2]), arm("b", PLAIN[:2], settings=ADAM, initial_weights="x")
    third = arm("c", BETTER[:2], settings=wide, initial_weights="y")
    told = [c for c in judged(plain, broken, third).cautions if "initial weights" in c]
    assert told == [
        "4 of 6 pairs differ in their initial weights, as they must where model.network differs: "
        "of that the pairs have nothing in common.",
        "2 of 6 pairs differ in their initial weights, which no setting explains: other code, "
        "versions or pictures. They are pairs by their seeds alone.",
    ]
    judgement = judged(plain, broken, third, baseline="a")
    apart = {(each.a.name, each.b.name): [s.key for s in each.apart] for each in
             judgement.contrasts}  # fmt: skip
    assert apart == {("a", "c"): ["model.network"], ("a", "b"): ["optimizer"]}


@pytest.mark.parametrize(("seeds", "told"), [
    ({"weights": (0, 1), "split": (7, 7)}, "a, b: all runs have the same seed of split"),
    ({"weights": (0, 1), "order": (3, 3), "split": (7, 7)}, "same seed of order, split (data.seed"),
    ({"weights": (0, 1), "split": (0, 1)}, None),
])  # fmt: skip
def test_stream_that_all_seeds_share_is_told_to_be_in_no_interval(seeds, told):
    runs = tuple(
        trained(place, PLAIN[place], run_id=str(place), settings=SGD, seeds={
            stream: own[place] for stream, own in seeds.items()}, **ALIKE)
        for place in (0, 1)
    )  # fmt: skip
    other = tuple(replace(run, settings=ADAM) for run in runs)
    cautions = judged(Arm("a", "a", runs), Arm("b", "b", other)).cautions
    assert [caution for caution in cautions if "intervals do not contain" in caution] == (
        [] if told is None else [next(c for c in cautions if told in c)]
    )


# ---- runs without a part in it -------------------------------------------------------------------


def test_runs_that_did_not_end_are_told_and_counted():
    b = arm("b", BETTER[:6], settings=ADAM)
    for place, status in ((3, "FAILED"), (4, "KILLED"), (5, "PRUNED")):
        b = with_runs(b, place, status=status, failure=f"why {status}")
    judgement = judged(arm("a", PLAIN[:6]), b)
    told = judgement.cautions[0]
    assert told.startswith(
        "b: 3 of 6 runs did not finish (1 FAILED, 1 KILLED, 1 PRUNED) and have no part"
    )
    assert "seed 3: why FAILED" in told and "seed 5: why PRUNED" in told
    assert "3 of 6" in screen(judgement)
    assert [run.status for run in judgement.standings[0].left_out] == ["FAILED", "KILLED", "PRUNED"]


def test_run_that_went_on_with_other_settings_is_told_by_name_and_key():
    b = with_runs(
        arm("b", BETTER[:3], settings=ADAM), 1, run_name="patched",
        changes=("optimizer.weight_decay: 0.0 -> 0.5",),
    )  # fmt: skip
    (told,) = judged(arm("a", PLAIN[:3]), b).cautions
    assert "b: patched was resumed" in told and "optimizer.weight_decay: 0.0 -> 0.5" in told


def test_failure_that_a_later_run_made_up_for_is_told_so():
    b = with_runs(arm("b", BETTER[:4], [0, 0, 1, 2], settings=ADAM), 0, status="FAILED")
    judgement = judged(arm("a", PLAIN[:3]), b)
    assert judgement.contrasts[0].difference.n == 3
    assert "1 of these seeds finished in another run" in judgement.cautions[0]


def test_repeat_of_a_seed_is_no_further_evidence_and_told():
    judgement = judged(arm("a", PLAIN[:3]), arm("b", BETTER[:4], [0, 1, 2, 2], settings=ADAM))
    assert judgement.contrasts[0].difference.n == 3
    assert any("1 runs repeat a seed" in told for told in judgement.cautions)


# ---- what was changed ----------------------------------------------------------------------------


def test_more_than_one_change_is_told_unless_it_was_meant():
    changed = ADAM | {"data.batch_size": 128, "trainer.max_epochs": 9}
    arms = arm("a", PLAIN[:2]), arm("b", BETTER[:2], settings=changed)

    def told(*expected: str) -> bool:
        cautions = judged(*arms, expected=expected).cautions
        return any("in more than one thing" in caution for caution in cautions)

    assert told()
    assert told("optimizer")
    assert not told("optimizer", "data.batch_size", "trainer")
    assert not told("optimizer", "data", "trainer.max_epochs")
    assert not any("more than" in each for each in judged(*arms, meant=tuple(changed)).cautions)
    assert "data.batch_size" in screen(judged(*arms))


def test_each_comparison_by_itself_may_change_one_thing():
    def caution(*arms: Arm, **asked: Any) -> bool:
        return any("more than one thing" in told for told in judged(*arms, **asked).cautions)

    plain, adam = arm("a", PLAIN[:2]), arm("b", PLAIN[:2], settings=ADAM)
    wide = arm("c", BETTER[:2], settings=SGD | {"data": "ImageFolder"})
    assert not caution(plain, adam, wide, baseline="a")
    assert caution(plain, adam, wide, baseline="b")
    twin = arm("d", BETTER[:2])
    same = [told for told in judged(plain, adam, twin).cautions if "same settings" in told]
    assert same == ["a and d have the same settings: all that differs between them is chance."]
    assert not caution(plain, adam, wide, expected=("optimizer", "data"))


def test_arms_with_equal_settings_differ_by_chance():
    cautions = judged(arm("a", PLAIN[:3]), arm("b", BETTER[:3])).cautions
    assert cautions == (
        "The arms have the same settings: all that differs between them is chance.",
    )


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        ({"code": "d"}, "not all made by the same code"),
        ({"device": "gpu"}, "device: cpu, gpu"),
        ({"pictures": "p"}, "did not train and validate on the same pictures"),
    ],
)
def test_what_the_runs_stood_on_is_told_where_it_differs(origin, told):
    other = arm("b", BETTER[:2], settings=ADAM, origins=ORIGINS | origin)
    assert any(told in caution for caution in judged(arm("a", PLAIN[:2]), other).cautions)


# ---- what is refused -----------------------------------------------------------------------------


def test_arms_tested_on_other_pictures_are_refused_unless_meant():
    other = arm("b", BETTER[:2], settings=ADAM, origins=ORIGINS | {"test pictures": "u"})
    with pytest.raises(ConfigurationError, match=r"tested on other pictures.*a on t; b on u"):
        judged(arm("a", PLAIN[:2]), other)
    assert judged(arm("a", PLAIN[:2]), other, expected=("data",)).headline
    sized = arm(
        "b", BETTER[:2], settings=SGD | {"data.batch_size": 9}, origins=other.runs[0].origins
    )
    for asked in ({"expected": ("data.batch_size",)}, {"meant": ("data.batch_size",)}):
        with pytest.raises(ConfigurationError, match="tested on other pictures"):
            judged(arm("a", PLAIN[:2]), sized, **asked)


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("optimiser", "; did you mean optimizer?"),
        ("optimizer.lrr", "; did you mean optimizer.lr?"),
        ("lr", "; did you mean optimizer.lr?"),
        ("data.batch", r"\."),
        ("opt", r"\."),
    ],
)
def test_expected_setting_that_no_arm_has_is_refused_with_the_nearest(typed, near):
    arms = arm("a", PLAIN[:2]), arm("b", BETTER[:2], settings=ADAM)
    with pytest.raises(ConfigurationError, match=f"no arm has a setting {typed}{near}"):
        judged(*arms, expected=("optimizer", typed))


def test_arm_without_a_finished_run_is_refused_with_the_reason():
    failed = arm("b", BETTER[:2], status="FAILED", failure="no memory")
    with pytest.raises(ConfigurationError, match=r"b has no finished run.*FAILED: no memory"):
        judged(arm("a", PLAIN[:2]), failed)


def test_arm_of_which_no_run_finished_is_told_beside_the_others(tmp_path):
    failed = arm("c", PLAIN[:2], settings=SGD | {"optimizer.lr": 9}, status="FAILED",
                 metrics={}, diverged=True, failure="it diverged")  # fmt: skip
    failed = replace(failed, runs=tuple(replace(run, metrics={}) for run in failed.runs))
    judgement = judged(arm("a", PLAIN[:2]), arm("b", BETTER[:2], settings=ADAM), failed)
    assert judgement.headline.startswith("b ") and judgement.baseline == "a"
    assert [each.arm.name for each in judgement.standings] == ["b", "a"]
    (told,) = [c for c in judgement.cautions if c.startswith("c: no run finished")]
    assert "seed 1: it diverged" in told
    assert any(line.startswith("c") and "0 of 2" in line for line in screen(judgement).splitlines())
    report = report_of(judgement, "title", "again")
    assert [each.name for each in report.arms] == ["a", "b", "c"]
    assert [each.arm for each in report.failures] == ["c", "c"]
    assert "it diverged" in write_report(report, tmp_path)[1].read_text()
    with pytest.raises(ConfigurationError, match="c has no finished run"):
        judged(arm("a", PLAIN[:2]), arm("b", BETTER[:2], settings=ADAM), failed, baseline="c")


def test_metric_that_not_all_arms_have_is_refused_with_those_that_they_have():
    arms = arm("a", PLAIN[:2], metrics={"test/f1": 0.5}), arm("b", BETTER[:2], settings=ADAM)
    with pytest.raises(ConfigurationError, match=r"b has no test/f1.*val/accuracy"):
        judged(*arms, metric="test/f1")
    with pytest.raises(ConfigurationError, match="did you mean val/accuracy"):
        judged(*arms, metric="val/acuracy")
    assert judged(*arms, metric="val/accuracy").why_metric == "as asked"


def test_arms_without_a_finite_figure_are_refused():
    with pytest.raises(ConfigurationError, match="b has no val/accuracy"):
        judged(
            arm("a", PLAIN[:2]), arm("b", [float("nan")] * 2, settings=ADAM), metric="val/accuracy"
        )


def test_of_a_loss_less_is_better():
    a = arm("a", PLAIN[:3], metrics={"test/loss": 2.0})
    b = arm("b", PLAIN[:3], metrics={"test/loss": 1.0}, settings=ADAM)
    judgement = judged(a, b, metric="test/loss")
    assert not judgement.higher_is_better
    assert [standing.arm.name for standing in judgement.standings] == ["b", "a"]


def test_losses_of_different_kinds_are_told_to_be_no_common_measure():
    arms = [
        arm(name, PLAIN[:2], metrics={"val/loss": 1.0}, settings=SGD | {"model.loss": name})
        for name in ("MSELoss", "CrossEntropyLoss")
    ]
    told = [c for c in judged(*arms, metric="val/loss").cautions if "nothing of each other" in c]
    assert len(told) == 1 and "(model.loss)" in told[0]
    by_accuracy = judged(*arms, metric="val/accuracy").cautions
    assert not any("nothing of each other" in caution for caution in by_accuracy)


# ---- looks at test -------------------------------------------------------------------------------


def test_test_decides_only_where_it_was_looked_at_once_with_every_run():
    a, b = arm("a", PLAIN[:3]), arm("b", BETTER[:3], settings=ADAM)
    once = judged(a, b)
    assert once.metric == "test/accuracy"
    assert [standing.test_looks for standing in once.standings] == [3, 3]
    again = judged(a, with_runs(b, 0, test_looks=3))
    assert (again.metric, again.standings[0].test_looks) == ("val/accuracy", 5)
    assert "1-3" in screen(again)
    assert any("more than once" in told and "up to 3 times" in told for told in again.cautions)
    never = judged(arm("a", PLAIN[:3], test_looks=0), arm("b", BETTER[:3], test_looks=0))
    assert (never.metric, never.why_metric) == (
        "val/accuracy",
        "no run has looked at the test pictures",
    )


def test_choice_among_many_by_test_is_told():
    arms = [arm(f"y{n}", PLAIN[:2], settings=SGD | {"optimizer.lr": n}) for n in (0, 1, 2)]
    assert any("decided by the test pictures" in told for told in judged(*arms).cautions)
    by_val = judged(*arms, metric="val/accuracy").cautions
    assert not any("decided by the test pictures" in told for told in by_val)
