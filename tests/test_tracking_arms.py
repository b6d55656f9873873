"""Arms read from a store: runs, parents, searches, with seeds, figures, and looks at test."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from research.comparison.gathering import Aim, Gathered, gather
from research.comparison.judging import Question, judge
from research.comparison.selection import confirmable
from research.configuration.compose import ConfigurationError
from research.tracking.arms import add_look_at_test, read
from research.tracking.runs import find_run
from research.tracking.store import TrackingError
from tests.recorded import Store, make_store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy
ADAM = {"optimizer": "Adam"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """One that all share, for it takes seconds to make; runs are named by their ids."""
    return make_store(tmp_path_factory.mktemp("project"))


def gathered(store: Store, *names: str) -> Gathered:
    return gather([read(store.uri, name) for name in names])


def below(store: Store, parent: str, arm: str, values: Sequence[float], **more: Any) -> None:
    for seed, value in enumerate(values):
        store.run(f"{arm} seed {seed}", seed, value, value, parent=parent, **more)


# ---- a run ---------------------------------------------------------------------------------------


def test_figures_are_those_of_the_best_epoch_and_curves_whole(store):
    (one,) = read(store.uri, store.run("curve", 3, 0.6, 0.55, curve=[0.4, 0.6, 0.5])).runs
    assert one.trained.metrics["val/accuracy"] == 0.6
    assert one.trained.metrics["test/accuracy"] == 0.55
    assert one.trained.curves["val/accuracy"] == ((1, 0.4), (2, 0.6), (3, 0.5))
    assert one.trained.seconds == one.trained.metrics["training_seconds"] == 6.0
    assert one.trained.settings["optimizer.lr"] == 0.1
    assert one.trained.origins["test pictures"] == "digest"


@pytest.mark.parametrize(
    ("settings", "seeds"),
    [
        ({}, {"weights": 4, "order": 4, "augmentation": 4, "dropout": 4, "split": 4}),
        ({"data.seed": 0}, {"weights": 4, "order": 0, "augmentation": 0, "dropout": 4, "split": 0}),
        (
            {"random.order": 7, "data.seed": 1},
            {"weights": 4, "order": 7, "augmentation": 1, "dropout": 4, "split": 1},
        ),
    ],
)
def test_each_stream_has_the_seed_that_it_draws_by(store, settings, seeds):
    (one,) = read(store.uri, store.run("seeds", 4, settings=settings)).runs
    assert one.trained.seeds == seeds


@pytest.mark.parametrize(
    ("status", "tags", "told", "why"),
    [
        ("FAILED", {}, "FAILED", "no reason is recorded"),
        ("KILLED", {"ended_by": "its process is gone"}, "KILLED", "its process is gone"),
        ("RUNNING", {}, "RUNNING", "it still runs"),
        ("FINISHED", {"trial.state": "PRUNED"}, "PRUNED", "its search ended it early"),
        ("FAILED", {"trial.state": "PRUNED"}, "FAILED", "it diverged"),
    ],
)
def test_how_a_run_ended_and_why_is_read(store, status, tags, told, why):
    (one,) = read(store.uri, store.run("ended", status=status, tags=tags)).runs
    assert (one.trained.status, one.trained.failure) == (told, why)


@pytest.mark.parametrize(
    ("status", "tags", "traceback", "diverged"),
    [
        ("FAILED", {"trial.state": "PRUNED"}, "", True),
        ("FAILED", {}, "research.faults.nonfinite.NonFiniteLoss: the loss is nan", True),
        ("FAILED", {"trial.state": "FAIL"}, "RuntimeError: out of memory", False),
        ("FINISHED", {"trial.state": "PRUNED"}, "", False),
        ("KILLED", {}, "", False),
    ],
)
def test_only_a_run_whose_loss_was_not_finite_has_diverged(
    store, status, tags, traceback, diverged
):
    run_id = store.run("diverged", status=status, tags=tags)
    file = store.folder / "mlruns" / "1" / run_id / "artifacts" / "traceback.txt"
    file.parent.mkdir(parents=True)
    file.write_text(traceback)
    (one,) = read(store.uri, run_id).runs
    assert one.trained.diverged == diverged


def test_every_look_at_test_is_counted(store):
    tested, untested = store.run("tested"), store.run("untested", test=None)
    for run_id, looks in ((tested, [1, 2, 3]), (untested, [0, 1, 2])):
        for expected in looks:
            (one,) = read(store.uri, run_id).runs
            assert one.trained.test_looks == expected
            assert add_look_at_test(find_run(store.uri, run_id)) == expected + 1


# ---- several -------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_one_arm(store):
    names = []
    for name, settings in (("x0", {}), ("x1", ADAM)):
        for seed in (2, 0, 1):
            names.append(f"{name}-{seed}")
            store.run(names[-1], seed, settings=settings)
    found = gathered(store, *names)
    assert [(arm.name, [run.seed_text for run in arm.runs]) for arm in found.arms] == [
        ("x0", ["0", "1", "2"]),
        ("x1", ["0", "1", "2"]),
    ]
    with pytest.raises(ConfigurationError, match=r"x0 is a single arm \(3 runs\)"):
        gathered(store, *names[:3])


def test_runs_of_equal_settings_and_other_code_are_arms(store):
    tags = {"fingerprint.code": "changed"}
    names = [store.run("before"), store.run("after", tags=tags)]
    assert [arm.name for arm in gathered(store, *names).arms] == ["before", "after"]


def test_parent_with_arms_is_a_comparison_by_itself(store):
    parent = store.run("sgd vs adam", None)
    below(store, parent, "sgd", [0.5, 0.6], tags={"arm": "sgd"})
    below(store, parent, "adam", [0.6, 0.7], tags={"arm": "adam"}, settings=ADAM)
    judgement = judge(gathered(store, parent), Question())
    assert [standing.arm.name for standing in judgement.standings] == ["adam", "sgd"]
    assert judgement.contrasts[0].difference.n == 2


def test_parents_of_seeds_are_arms_by_their_names_also_below_another_parent(store):
    top = store.run("top", None)
    parents = [store.run(name, None, parent=top) for name in ("first", "second")]
    below(store, parents[0], "a", [0.5, 0.6])
    below(store, parents[1], "b", [0.6, 0.7], settings=ADAM)
    for names in (parents, [top]):
        arms = gathered(store, *names).arms
        assert [(arm.name, len(arm.runs)) for arm in arms] == [("first", 2), ("second", 2)]


def test_parents_of_one_name_are_told_apart_by_their_settings(store):
    parents = []
    for settings in ({}, {"optimizer.lr": 0.2}, {"optimizer.lr": 0.2}):
        parents.append(store.run("CNN SGD", None))
        below(store, parents[-1], "run", [0.5], settings=settings)
    names = [arm.name for arm in gathered(store, *parents).arms]
    assert names == ["CNN SGD lr=0.1", "CNN SGD lr=0.2", "CNN SGD lr=0.2 (2)"]


def test_unnamed_arms_of_a_parent_are_told_by_what_sets_them_apart(store):
    parent = store.run("mixed", None)
    for settings in ({}, ADAM, {**ADAM, "optimizer.lr": 0.01}):
        below(store, parent, "run", [0.5], settings=settings)
    names = [arm.name for arm in gathered(store, parent).arms]
    assert names == ["SGD lr=0.1", "Adam lr=0.1", "Adam lr=0.01"]


# ---- searches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def search(store) -> Callable[..., str]:
    """The id of a search's parent with three trials of each of two optimizers, one pruned."""

    def search(confirmed: bool = False) -> str:
        parent = store.run("a search", None, tags={"search.storage": "journal"})
        for optimizer, values in (("SGD", (0.3, 0.5, 0.4)), ("Adam", (0.6, 0.2, 0.1))):
            for place, value in enumerate(values):
                settings = {"optimizer": optimizer, "optimizer.lr": 0.1 / (place + 1)}
                state = "PRUNED" if value == 0.1 else "COMPLETE"
                tags = {"study": f"s/{optimizer}", "trial.state": state}
                store.run(f"{optimizer} trial {place}", 0, value, None, settings=settings,
                          tags=tags, parent=parent)  # fmt: skip
        for optimizer, value in (("SGD", 0.55), ("Adam", 0.45)) if confirmed else ():
            for seed in (1000, 1001):
                settings = {"optimizer": optimizer, "optimizer.lr": 0.1}
                store.run("confirmation", seed, value, None, settings=settings, parent=parent,
                          tags={"study": "s/confirmation", "trial.state": "COMPLETE"})  # fmt: skip
        return parent

    return search


def test_search_has_the_best_trial_of_each_kind_and_says_that_it_was_chosen(store, search):
    parent = search()
    found = gathered(store, parent)
    assert [(arm.name, len(arm.runs)) for arm in found.arms] == [("Adam", 1), ("SGD", 1)]
    assert [arm.runs[0].metrics["val/accuracy"] for arm in found.arms] == [0.6, 0.5]
    assert "a search of 6 trials (5 finished, 1 pruned)" in found.notes[0]
    assert "--confirm each" in found.notes[1]
    assert [run.metrics["val/accuracy"] for run in confirmable(read(store.uri, parent), True)] == [
        *(0.6, 0.5)
    ]
    values = [run.metrics["val/accuracy"] for run in confirmable(read(store.uri, parent))]
    assert values == [0.6, 0.5, 0.4, 0.3, 0.2]
    judgement = judge(found, Question())
    assert "indistinguishable at n=1 pair" in judgement.headline
    assert not any("more than one thing" in told for told in judgement.cautions)
    (seen,) = [one for one in read(store.uri, parent).runs if one.trained.run_name == "SGD trial 0"]
    add_look_at_test(find_run(store.uri, seen.trained.run_id))
    assert any("SGD trial 0" in note for note in gathered(store, parent).notes)


def test_confirmed_search_is_compared_on_its_fresh_seeds_alone(store, search):
    found = gathered(store, search(confirmed=True))
    assert {arm.name: len(arm.runs) for arm in found.arms} == {"SGD": 2, "Adam": 2}
    assert {run.seeds["weights"] for arm in found.arms for run in arm.runs} == {1000, 1001}
    assert "confirmed on fresh seeds" in found.notes[1]


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("objective: val/loss", ("val/loss", True)),
        ("objective: {val/top3: maximize, val/loss: minimize}", ("val/top3", False)),
        ("objective: val/loss\ndirection: maximize", ("val/loss", False)),
        ("not: [yaml", ("val/accuracy", False)),
    ],
)
def test_objective_of_a_search_is_that_of_its_file(store, text, objective):
    parent = store.run("searched", None, tags={"search.storage": "journal"})
    store.run("trial", 0, parent=parent)
    file = store.folder / "mlruns" / "1" / parent / "artifacts" / "search.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    found = read(store.uri, parent)
    assert (found.objective, found.is_minimized) == objective


def test_what_a_confirmed_search_varied_was_meant_to_differ(store):
    tags = {"confirms": "search", "confirms.choice_of": "optimizer optimizer.lr"}
    tags["confirms.objective"] = "val/loss minimize"
    parent = store.run("confirmed", None, tags=tags)
    below(store, parent, "a", [0.5], tags={"arm": "a"})
    below(store, parent, "b", [0.6], tags={"arm": "b"}, settings={**ADAM, "optimizer.lr": 0.01})
    found = gathered(store, parent)
    assert found.meant == ("optimizer", "optimizer.lr")
    assert found.aims == (Aim("val/loss", True),)
    assert "no part in its choice" in found.notes[0]


def test_search_for_what_no_epoch_has_is_judged_by_it(store):
    parent = store.run("small", None, tags={"search.storage": "journal"})
    for place, count in enumerate((900, 100)):
        settings = {"num_parameters": count, "optimizer.lr": place}
        store.run(f"trial {place}", 0, settings=settings, parent=parent)
    file = store.folder / "mlruns" / "1" / parent / "artifacts" / "search.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("objective: num_parameters")
    judgement = judge(gathered(store, parent), Question())
    assert (judgement.metric, judgement.higher_is_better) == ("num_parameters", False)
    assert judgement.standings[0].arm.name == "lr=1"


def test_parent_below_which_nothing_began_is_told_and_is_no_run(store):
    tags = {"repetition.storage": "journal"}
    empty = store.run("begun", None, tags=tags)
    with pytest.raises(TrackingError, match="parent of several runs, and none has begun below it"):
        read(store.uri, empty)
    with pytest.raises(TrackingError, match="none has begun"):  # of other tools, or of long ago
        read(store.uri, store.run("nothing", None))
    top = store.run("top", None)
    store.run("begun", None, tags=tags, parent=top)
    below(store, store.run("trained", None, tags=tags, parent=top), "a", [0.5, 0.6])
    assert [one.trained.run_name for one in read(store.uri, top).runs] == ["a seed 0", "a seed 1"]


def test_changes_of_a_run_that_was_resumed_are_read_in_their_order(store):
    tags = {"resumed": "11", "resumed.2.changes": "a: 1 -> 2", "resumed.11.changes": "b: 3 -> 4"}
    (one,) = read(store.uri, store.run("resumed", tags=tags)).runs
    assert one.trained.changes == ("a: 1 -> 2", "b: 3 -> 4")


def test_search_without_a_trial_is_told(store):
    parent = store.run("new", None, tags={"search.storage": "journal"})
    with pytest.raises(TrackingError, match="a search without a single trial"):
        read(store.uri, parent)
