"""Arms on seeds: which trainings there are, what they leave, what they have in common.

Workers that train nothing (FAKE) show how a start goes on with another; `desk` trains in this
process.  The command with real workers, killed in the middle, is slow.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from research import fit as command
from research.data.kept import Kept
from research.repetition import repeating
from research.repetition.repeating import place_of, repeat, settings_of
from research.repetition.seeds import MOST, read_seeds, seeds_from
from research.repetition.summary import markdown, metrics_of, table
from research.repetition.trainings import (
    Training,
    TrainingResult,
    Trainings,
    by_stream,
    crossed,
    in_slots,
)
from research.search import parent, watch, workers
from research.search.arms import Arms, document_of
from research.search.desk import Desk
from research.search.document import Search
from research.search.job import Job
from research.search.storage import open_storage
from research.search.trial import MEASURED_BEFORE, outcome_before
from research.tracking.runs import RecordedRun, open_store
from research.tracking.store import sqlite_uri
from research.training import fit
from tests.conftest import SMALL

PROJECT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow of its own store
]


# ---- which seeds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("5", 5),
        ("1,2,3", [1, 2, 3]),
        ("[7, 1]", [7, 1]),
        ("[4]", [4]),
        ("4,", [4]),
        ("0,1", [0, 1]),
    ],
)
def test_seeds_are_counted_or_named(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", f"expected 1 to {MOST:,} of them; came 0"),
        ("1,1", "1 came more than once"),
        ("x", "came 'x'"),
        ("-1", "came '-1'"),
        ("1.5", "came '1.5'"),
        ("", "came ''"),
        ("[]", "expected how many"),
        ("1,,2", "expected how many"),
        ("4294967296,", "a seed is from 0 to 4294967295"),
        ("99999999999", "expected 1 to"),
    ],
)
def test_seeds_that_are_none_are_told(text, words):
    with pytest.raises(ValueError, match=r"^seeds: ") as told:
        read_seeds(text)
    assert words in str(told.value)


def test_counted_seeds_begin_with_that_of_the_experiment():
    assert seeds_from(3, 10) == [10, 11, 12]
    assert seeds_from([5], 10) == [5]
    with pytest.raises(ValueError, match="go beyond 4294967295"):
        seeds_from(2, 2**32 - 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "3", "--resume", "abcd"], "--resume goes on with one run"),
        (["--seeds", "1,2", "--seed_everything", "3"], "and --seed_everything another"),
        (["--seeds", "3", "--workers", "0"], "workers: expected a whole number from 1 on"),
        (["--workers", "2"], "workers: it is for several seeds, beside --seeds"),
        (["--seeds"], "seeds: a value is missing; write --seeds N"),
    ],
)
def test_what_does_not_go_with_seeds_is_told_in_a_sentence(arguments, words, capsys):
    assert command.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_seeds_under_torchrun_are_refused(monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert command.main(["--seeds", "3"]) == 2
    assert "torchrun started several processes of this command" in capsys.readouterr().err


# ---- which trainings -----------------------------------------------------------------------------


def test_arms_are_interleaved_seed_by_seed():
    keys = [training.key for training in crossed(["A", "B"], [3, 1])]
    assert keys == [("A", "seed 3"), ("B", "seed 3"), ("A", "seed 1"), ("B", "seed 1")]


def test_streams_apart_are_named_and_the_same_seeds_again_are_repeats():
    alike = {"weights": 0, "order": 0, "dropout": 0}
    trainings = by_stream([alike, {**alike, "weights": 9}, alike, alike])
    assert [training.label for training in trainings] == [
        "seed 0",
        "seed 0, weights 9",
        "seed 0, repeat 1",
        "seed 0, repeat 2",
    ]
    assert trainings[1].settings == {"random": {"weights": 9, "order": 0, "dropout": 0}}


def studies_of(folder, wanted, arms=("",)):
    studies = unfilled(folder, wanted, arms)
    studies.fill()
    return studies


def unfilled(folder, wanted, arms=("",)):
    document = document_of("some", {arm: {} for arm in arms}, "exp", "val/accuracy")
    search = Search.from_document(json.loads(json.dumps(document)))
    assert isinstance(search, Arms)
    path = folder / "some.journal"
    return Trainings(search, str(path), open_storage(str(path), path), wanted)


def taken(studies):
    """What waits, in the order in which it is taken; each ends at once."""
    found = []
    while (ticket := studies.slots.take()) is not None:
        found.append(tuple(ticket.pinned["candidate"]))
        studies.slots.finish(ticket, [0.5], TrialState.COMPLETE)
    return found


def test_slots_are_taken_in_the_order_asked_for_and_more_may_be_asked_for(tmp_path):
    wanted = crossed(["A", "B"], [0, 1])
    assert taken(studies_of(tmp_path, wanted, "AB")) == [training.key for training in wanted]
    more = crossed(["A", "B"], [2, 1, 0])
    assert taken(studies_of(tmp_path, more, "AB")) == [("A", "seed 2"), ("B", "seed 2")]


def test_fewer_seeds_than_before_leave_the_rest_waiting(tmp_path):
    studies_of(tmp_path, crossed([""], range(5)))
    fewer = studies_of(tmp_path, crossed([""], range(2)))
    assert fewer.counts().left == 2
    assert taken(fewer) == [("", "seed 0"), ("", "seed 1")]
    assert taken(studies_of(tmp_path, crossed([""], range(3)))) == [("", "seed 2")]


def test_fewer_seeds_take_nothing_from_a_start_that_is_at_work(tmp_path):
    first = studies_of(tmp_path, crossed([""], range(8)))
    ticket = first.slots.take()
    studies_of(tmp_path, crossed([""], range(2)))
    assert first.counts().left == 8 and not first.is_cut_short()
    first.slots.finish(ticket, [0.5], TrialState.COMPLETE)
    studies_of(tmp_path, crossed([""], range(2)))  # between two trainings of the first
    assert first.counts().left == 1 and first.is_cut_short()
    first.fill()
    assert first.counts().left == 7 and not first.is_cut_short()


def test_starts_at_the_same_moment_lose_no_seed(tmp_path, monkeypatch):
    def slowly(slots):
        found = in_slots(slots)
        time.sleep(0.2)
        return found

    starts = [unfilled(tmp_path, crossed([""], seeds)) for seeds in ([1, 2], [3, 4])]
    monkeypatch.setattr("research.repetition.trainings.in_slots", slowly)
    threads = [threading.Thread(target=studies.fill) for studies in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken(starts[0])) == [("", f"seed {seed}") for seed in (1, 2, 3, 4)]


def test_slots_that_another_machine_took_meanwhile_are_planned_anew(tmp_path, monkeypatch):
    late, early = (unfilled(tmp_path, crossed([""], [seed])) for seed in (1, 2))
    plans = []

    def overtaken(slots):
        found = in_slots(slots)
        plans.append(found)
        if len(plans) == 1:
            early.slots.fill(1, [early.wanted[0].pinned()])
        return found

    monkeypatch.setattr("research.repetition.trainings.in_slots", overtaken)
    late.fill()
    assert taken(late) == [("", "seed 2"), ("", "seed 1")]


def test_what_failed_is_tried_again_and_what_diverged_is_not(tmp_path):
    wanted = crossed([""], range(3))
    first = studies_of(tmp_path, wanted)
    for state in (TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE):
        ticket = first.slots.take()
        first.slots.finish(ticket, [0.5] if state == TrialState.COMPLETE else None, state)
    assert taken(studies_of(tmp_path, wanted)) == [("", "seed 0")]
    assert taken(studies_of(tmp_path, wanted)) == []


# ---- what a training of them is ------------------------------------------------------------------


def arms_of(configuration, **changes):
    own = {"": settings_of(configuration)}
    document = document_of("some", own, "exp", "val/accuracy", **changes)
    return Search.from_document(json.loads(json.dumps(document)))


def test_an_arm_is_configured_as_fit_would_be_but_for_its_seed(small):
    given = small("--model.loss", "MSELoss", "--optimizer", "AdamW", "--optimizer.lr", "0.002")
    search = arms_of(given)
    configuration = search.configuration(search.cells[0], {"seed_everything": 7})
    before, after = given.flat(), configuration.flat()
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"seed_everything", "experiment", "tracking_uri"}
    assert after["seed_everything"] == 7 and after["experiment"] == "exp"
    untested = arms_of(given, is_tested=False)
    assert untested.configuration(untested.cells[0], {}).values.trainer.limit_test_batches == 0


def test_an_arm_trains_and_tests_what_fit_does_with_its_seed(small, tmp_path):
    given = small("--trainer.max_epochs", "1")
    search, wanted = arms_of(given), crossed([""], [5])
    path = tmp_path / "some.journal"
    studies = Trainings(search, str(path), open_storage(str(path), path), wanted)
    studies.fill()
    desk = Desk(search, studies.storage, "some", Job(search.document, str(path), tracking_uri=""))
    assert desk.do(desk.slots.take(), None, Kept(), contextlib.nullcontext) == "COMPLETE"
    (trial,) = desk.slots.trials()
    measured = trial.user_attrs["metrics"]
    plain = fit(small("--trainer.max_epochs", "1", "--seed_everything", "5")).metrics
    for name in ("val/accuracy", "val/loss", "test/accuracy", "test/loss"):
        assert measured[name] == plain[name]
    assert measured["training_seconds"] > 0
    assert list(tmp_path.glob("checkpoints/*/last.ckpt"))  # as fit leaves it


def test_a_run_is_named_and_tagged_by_its_arm_and_seed(small, tmp_path):
    search = arms_of(small())
    path = tmp_path / "some.journal"
    wanted = [Training("", "seed 3", {"seed_everything": 3})]
    studies = Trainings(search, str(path), open_storage(str(path), path), wanted, "mine")
    studies.fill()
    the_job = Job(search.document, str(path), tracking_uri="", parent_run_id="f" * 32)
    desk = Desk(search, studies.storage, "some", the_job)
    task = desk.task(desk.slots.take())
    assert task.settings["run_name"] == "mine seed 3"
    assert task.tags["mlflow.parentRunId"] == "f" * 32 and "arm" not in task.tags
    assert Training("B", "seed 3").pinned()["tags"] == {"arm": "B"}


def test_figures_survive_a_death_between_the_record_and_the_study():
    tags = {"trial.state": "COMPLETE", "trial.values": "[0.5]", MEASURED_BEFORE: '{"test/loss": 2}'}
    run = RecordedRun("", "", "", "", "FINISHED", datetime.now(), {}, tags, None)
    outcome = outcome_before(run)
    assert (outcome.values, outcome.attrs) == ([0.5], {"metrics": {"test/loss": 2}})


# ---- what they have in common --------------------------------------------------------------------


def trained(label, accuracy, arm="", state=TrialState.COMPLETE, reason=""):
    metrics = {} if accuracy is None else {"val/accuracy": accuracy, "training_seconds": 2.0}
    return TrainingResult(arm, label, state, metrics, None, reason)


def test_parent_has_mean_deviation_and_interval_of_the_seeds_that_finished():
    values = [0.62, 0.66, 0.64]
    all_of_them = [trained(f"seed {i}", value) for i, value in enumerate(values)]
    lost = trained("seed 3", None, state=TrialState.FAIL, reason="no room")
    found = metrics_of([*all_of_them, lost])
    assert found["seeds"] == 3
    assert found["val/accuracy"] == pytest.approx(statistics.fmean(values))
    assert found["val/accuracy_std"] == pytest.approx(statistics.stdev(values))
    half = 4.302653 * statistics.stdev(values) / 3**0.5  # Student's t with 2 degrees of freedom
    assert found["val/accuracy_low"] == pytest.approx(0.64 - half)
    assert found["val/accuracy_high"] == pytest.approx(0.64 + half)
    told = table([*all_of_them, lost])
    assert "64.00 ± 2.00 %" in told and "mean ± sd (n=3)" in told
    assert "seed 3: failed: no room" in told
    page = markdown([*all_of_them, lost])
    assert "| seed 1 | 66.00 % |" in page
    assert page.index("mean ± sd") < page.index("95 %") < page.index("seed 0")


def test_runs_that_share_seeds_have_a_mean_and_nothing_of_a_sample():
    runs = [trained(f"seed 0, weights {i}", 0.5 + i / 10) for i in range(3)]
    found = metrics_of(runs, is_sample=False)
    assert set(found) == {"val/accuracy", "training_seconds"}
    assert found["val/accuracy"] == pytest.approx(0.6)
    told = markdown(runs, is_sample=False)
    assert "| mean (n=3) | 60.00 % |" in told
    assert "±" not in told and "95 %" not in told


def test_one_seed_has_no_deviation_and_none_at_all_no_mean():
    assert set(metrics_of([trained("seed 0", 0.5)])) == {
        "val/accuracy",
        "training_seconds",
        "seeds",
    }
    assert "±" not in table([trained("seed 0", 0.5)])
    lost = trained("seed 0", None, state=TrialState.PRUNED, reason="the loss is nan")
    assert metrics_of([lost]) == {"seeds": 0}
    assert markdown([lost]) == "seed 0: no part of the mean: the loss is nan\n"
    assert "seed 0: no part of the mean: the loss is nan" in table([lost])


def test_several_arms_have_metrics_of_their_own():
    found = metrics_of([trained("seed 0", 0.5, "A"), trained("seed 0", 0.7, "B?")])
    assert found["A/val/accuracy"] == 0.5 and found["B_/val/accuracy"] == 0.7


def test_table_leaves_out_losses_where_there_is_no_room():
    figures = {"val/accuracy": 0.5, "val/loss": 1.0, "test/accuracy": 0.5, "test/loss": 1.0}
    rows = [
        TrainingResult("", f"seed {i}", TrialState.COMPLETE, figures, None, "") for i in range(3)
    ]
    assert "val loss" in table(rows, 120)
    assert max(map(len, table(rows, 80).splitlines())) <= 80 and "loss" not in table(rows, 80)


# ---- from start to end, with workers that train nothing ------------------------------------------

FAKE = """
import json, os, sys
job = json.loads(sys.stdin.readline())
from pathlib import Path
import optuna
from optuna.trial import TrialState
from research.search.slots import Slots
from research.search.storage import open_storage

def say(**what):
    print(json.dumps(what), flush=True)

storage = open_storage(job["storage"], Path("x"))
(name,) = job["stages"]
slots = Slots(storage, name, ["maximize"], lambda slot: optuna.samplers.RandomSampler(slot))
while (ticket := slots.take()) is not None:
    say(event="took", cell="", slot=ticket.slot, trial=ticket.trial.number)
    seed = ticket.pinned["settings"].get("seed_everything", 0)
    if os.environ.pop("LOWERS", None):
        slots.study.set_user_attr("budget", 1)
    if os.environ.get("FAILS") == str(seed):
        slots.finish(ticket, None, TrialState.FAIL, "no room")
    else:
        value = 0.6 + seed / 100
        figures = {"val/accuracy": value, "test/accuracy": value}
        slots.finish(ticket, [value], TrialState.COMPLETE, attrs={"metrics": figures})
    say(event="ended", cell="", slot=ticket.slot, state="COMPLETE")
"""


@pytest.fixture
def faked(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr("research.search.coordinator.POLL_SECONDS", 0.1)
    monkeypatch.setattr(watch, "HEAR_SECONDS", 0.05)
    monkeypatch.setattr(parent, "SETTLE_SECONDS", 0.05)
    monkeypatch.setenv("RESEARCH_SPOOL", str(tmp_path / "spool"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_a_start_goes_on_with_what_is_missing_under_the_same_parent(
    faked, small, uri, recorder, monkeypatch, capsys
):
    given = small("--tracking_uri", uri, "--experiment", "exp")

    def start(seeds):
        return repeat({"": given}, crossed([""], range(seeds)), recorder=recorder, anew="do so")

    monkeypatch.setenv("FAILS", "1")
    first = start(2)
    assert [each.finished for each in first.trained] == [True, False]
    monkeypatch.delenv("FAILS")
    second = start(3)
    third = start(3)
    assert [each.label for each in second.trained] == ["seed 0", "seed 1", "seed 2"]
    assert all(each.finished for each in second.trained)
    assert first.parent == second.parent == third.parent
    assert third.trained == second.trained and "again, do so." in third.notes[0]
    said = capsys.readouterr().err
    assert "seed 1: failed: no room" in table(first.trained)
    assert "3 trainings, 1 of them done before; 1 worker" in said
    run = open_store(uri).get_run(second.parent_run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "CNN CrossEntropyLoss SGD"
    assert run.data.metrics["test/accuracy"] == pytest.approx(0.61)
    assert run.data.metrics["seeds"] == 3
    assert run.data.params["optimizer.lr"] == "0.01" and "seed_everything" not in run.data.params
    assert "| seed 2 | 62.00 % |" in run.data.tags["mlflow.note.content"]


def test_a_start_ends_with_all_its_seeds_though_another_asked_for_fewer(faked, small, monkeypatch):
    monkeypatch.setenv("LOWERS", "1")
    came = repeat({"": small()}, crossed([""], range(3)))
    assert [each.label for each in came.trained if each.finished] == ["seed 0", "seed 1", "seed 2"]


def test_what_was_deleted_from_the_store_is_trained_anew(faked, small, uri, recorder, capsys):
    given = small("--tracking_uri", uri, "--run_name", "lost")

    def start():
        return repeat({"": given}, crossed([""], [0, 1]), recorder=recorder)

    before = start()
    (note,) = start().notes
    assert f"again, delete their parent run {before.parent_run_id} from the store" in note
    assert "trained anew" not in capsys.readouterr().err
    open_store(uri).delete_run(before.parent_run_id)
    after = start()
    assert f"no longer in {uri}, so all is trained anew" in capsys.readouterr().err
    assert after.parent_run_id != before.parent_run_id and not after.notes
    assert all(each.finished for each in after.trained)


def test_a_parent_run_is_lost_with_its_store_and_not_before_there_was_one(tmp_path):
    study, uri = optuna.create_study(), sqlite_uri(tmp_path / "deleted.db")
    study.set_user_attr(parent.BEGUN, ["f" * 32, uri])
    assert not repeating.is_lost(study, uri)
    study.set_user_attr(parent.PARENT, "a" * 32)
    study.set_user_attr(parent.PARENT_STORE, uri)
    assert repeating.is_lost(study, uri)
    assert not repeating.is_lost(study, sqlite_uri(tmp_path / "other.db"))
    (tmp_path / "deleted.db").write_text("no database")
    assert not repeating.is_lost(study, uri)  # unreadable is not gone


def test_streams_apart_are_recorded_as_no_sample_and_may_go_untested(faked, small, uri, recorder):
    given = small("--tracking_uri", uri)
    wanted = [Training("", f"weights {i}", {"random": {"weights": i}}) for i in range(2)]
    came = repeat({"": given}, wanted, recorder=recorder, is_tested=False)
    data = open_store(uri).get_run(came.parent_run_id).data
    assert data.metrics["val/accuracy"] == pytest.approx(0.6)
    assert not {"seeds", "val/accuracy_std"} & set(data.metrics)
    assert "| mean (n=2) |" in data.tags["mlflow.note.content"]


@pytest.mark.parametrize(("seeds", "code"), [("1,2", 0), ("0,1", 1), ("1,3", 1)])
def test_the_exit_code_is_of_the_seeds_that_were_asked_for(monkeypatch, seeds, code):
    all_of_them = [
        trained("seed 0", None, state=TrialState.FAIL),
        trained("seed 1", 0.5),
        trained("seed 2", 0.6),
    ]
    came = repeating.Repetition(None, all_of_them, [])
    monkeypatch.setattr(repeating, "repeat", lambda *_, **__: came)
    assert command.main([*SMALL, "--tracking_uri", "", "--seeds", seeds]) == code


def test_training_on_several_nodes_is_refused(small):
    with pytest.raises(ValueError, match=r"trainer\.num_nodes is 2"):
        repeat({"": small("--trainer.num_nodes", "2")}, crossed([""], [0]))


def test_changed_code_begins_anew_and_says_so(tmp_path):
    file, told = place_of(tmp_path, "x-1", "aaaa", False)
    assert told is None
    file.touch()
    assert place_of(tmp_path, "x-1", "aaaa", False) == (file, None)
    other, told = place_of(tmp_path, "x-1", "bbbb", False)
    assert other != file and "The code has changed" in told
    assert place_of(tmp_path, "x-1", "bbbb", True) == (file, None)
    assert place_of(tmp_path, "x-2", "bbbb", False)[1] is None


def test_parent_has_the_settings_that_all_arms_share(small):
    found = repeating.in_common(
        {"A": small(), "B": small("--optimizer", "Adam", "--optimizer.lr", "0.01")}
    )
    assert found["data"] == "Synthetic" and found["optimizer.lr"] == 0.01
    assert not {"optimizer", "optimizer.momentum", "seed_everything", "random.order"} & set(found)


def test_all_that_sets_trainings_apart_is_in_their_identity(small):
    def of(*arguments, name="n", tested=True):
        return repeating.identity({"": small(*arguments)}, name, "uri", tested)

    assert of() == of("--seed_everything", "3")
    others = [of("--optimizer.lr", "0.3"), of("--experiment", "e"), of(name="m"), of(tested=False)]
    assert len({of(), *others}) == 5


# ---- the command, with real workers --------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_command_goes_on_and_every_run_is_an_ordinary_one(tmp_path):
    uri = sqlite_uri(tmp_path / "mlflow.db")
    arguments = [*SMALL, "--trainer.max_epochs", "4", "--tracking_uri", uri, "--seeds", "2"]

    def started():
        return subprocess.Popen(
            [sys.executable, "-m", "research.fit", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        )

    def runs():
        with contextlib.suppress(Exception):  # not there yet
            return open_store(uri).search_runs(["1"], order_by=["attributes.start_time ASC"])
        return []

    first = started()
    deadline = time.monotonic() + 120
    while not any(run.data.metrics.get("val/accuracy") for run in runs()[1:]):
        assert first.poll() is None and time.monotonic() < deadline, first.stderr.read()
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = started()
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    assert "mean ± sd (n=2)" in out and "mlflow ui" in out
    whole, *children = runs()
    assert [run.info.run_name for run in children] == ["seed 0", "seed 1"]
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == whole.info.run_id
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        assert {path.name for path in folder.glob("checkpoints/*.ckpt")} == {
            "best.ckpt",
            "last.ckpt",
        }
        assert list(folder.rglob("*.png")) or list(folder.rglob("*.html"))
        assert len(open_store(uri).get_metric_history(run.info.run_id, "test/accuracy")) == 1
        assert len(open_store(uri).get_metric_history(run.info.run_id, "val/accuracy")) == 4
    tested = [run.data.metrics["test/accuracy"] for run in children]
    assert whole.data.metrics["test/accuracy"] == pytest.approx(statistics.fmean(tested))
