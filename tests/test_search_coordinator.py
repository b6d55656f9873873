"""The coordinator keeps workers at work, puts back what dies, and gives up where nothing gets on.

The workers here train nothing: FAKE takes trials as a worker does, and says or dies as the test
asks by FAKE_MODE.  What real ones do is in test_sweep.py and test_faults_sweep.py.
"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState, create_trial

from research.configuration.compose import ConfigurationError
from research.search import parent, studies, watch, workers
from research.search.coordinator import Coordinator, number_of
from research.search.document import Search, read_search
from research.search.halting import Ears
from research.search.watch import SearchFailed
from research.speed import precision
from research.tracking import heartbeat

FAKE = """
import json, os, signal, sys, time
job = json.loads(sys.stdin.readline())
mode = os.environ.get("FAKE_MODE", "")
if mode == "early":
    sys.exit("no GPU left on this machine")
from pathlib import Path
import optuna
from optuna.trial import TrialState
from research.search.slots import Slots
from research.search.storage import open_storage

def say(**what):
    print(json.dumps(what), flush=True)

storage = open_storage(job["storage"], Path("x"))
desks = [
    Slots(storage, name, ["maximize"], lambda slot: optuna.samplers.RandomSampler(slot))
    for name in job["stages"]
]
say(event="ready")
print("a library that prints", flush=True)
for slots in desks:
    while (ticket := slots.take()) is not None:
        say(event="took", cell="", slot=ticket.slot, trial=ticket.trial.number)
        lr = ticket.trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        if mode == "die" and ticket.slot == 1 and ticket.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "slow":
            def stop(*_):
                slots.put_back(ticket, "stopped", counts=False)
                sys.exit(143)
            signal.signal(signal.SIGTERM, stop)
            time.sleep(60)
        if mode == "fail":
            slots.finish(ticket, None, TrialState.FAIL, "boom: no such file")
        else:
            slots.finish(ticket, [lr], TrialState.COMPLETE)
        say(event="ended", cell="", slot=ticket.slot, state="COMPLETE")
"""

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A search file of one range, whose workers are the FAKE ones."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr("research.search.coordinator.POLL_SECONDS", 0.1)
    monkeypatch.setattr(watch, "HEAR_SECONDS", 0.05)
    monkeypatch.setattr(watch, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(parent, "SETTLE_SECONDS", 0.05)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = tmp_path / "lr.yaml"
    write(path)
    return path


def write(path, **changed):
    document = {
        "settings": {"data": "Synthetic", "trainer.accelerator": "cpu"},
        "space": {"optimizer.lr": "log 1e-3..1"},
        "budget": {"trials": 4},
        **changed,
    }
    path.write_text(yaml.safe_dump(document))


def coordinator_of(file, **typed):
    search = read_search(file, typed)
    return Coordinator(search, file, None, None, f"python -m research.sweep {file}", io.StringIO())


def states(coordinator):
    return [trial.state for trial in coordinator.studies.trials()[""]]


# ---- the whole, with workers that train nothing --------------------------------------------------


def test_search_reaches_its_budget_and_again_there_is_nothing_to_do(file):
    coordinator = coordinator_of(file, workers=2)
    ending = coordinator.run()
    assert ending.is_over
    assert states(coordinator) == [TrialState.COMPLETE] * 4
    said = coordinator.out.getvalue()
    assert said.count("COMPLETE") == 4
    assert "search lr: 4 trials; 2 workers" in said
    assert not coordinator.logs.exists()
    again = coordinator_of(file)
    assert again.run().notes == ["Nothing is left to do."]
    assert again.crew.started == 0


@pytest.mark.slow
def test_larger_budget_goes_on_with_what_there_is(file):
    first = coordinator_of(file)
    first.run()
    values = [trial.value for trial in first.studies.trials()[""]]
    more = coordinator_of(file, trials=6)
    more.run()
    assert [trial.value for trial in more.studies.trials()[""]][:4] == values
    assert states(more) == [TrialState.COMPLETE] * 6
    assert "6 trials, 4 of them done" in more.out.getvalue()
    assert "changed since the last start: trials 4 -> 6" in more.out.getvalue()


def test_trial_of_a_worker_that_was_killed_is_run_on_by_another(file, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "die")
    coordinator = coordinator_of(file)
    coordinator.run()
    assert states(coordinator) == [TrialState.COMPLETE] * 4
    assert coordinator.crew.started == 2
    said = coordinator.out.getvalue()
    assert "worker 1 ended (killed by SIGKILL, as where memory runs out); trial 1 will be" in said


def test_workers_that_cannot_begin_end_the_search_with_their_words(file, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "early")
    coordinator = coordinator_of(file)
    with pytest.raises(SearchFailed, match="no GPU left on this machine") as told:
        coordinator.run()
    assert "3 workers ended before they took a trial, the last one by: exit code 1" in str(
        told.value
    )
    assert coordinator.crew.started == 3


def test_first_trials_that_all_fail_alike_end_the_search(file, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "fail")
    write(file, budget={"trials": 40})
    with pytest.raises(SearchFailed, match="boom: no such file"):
        coordinator_of(file).run()


def test_time_that_is_up_leaves_the_rest_for_the_next_start(file):
    coordinator = coordinator_of(file, hours=1e-9)
    ending = coordinator.run()
    assert not ending.is_over
    assert states(coordinator)[-1] == TrialState.WAITING
    assert "go on with them: python -m research.sweep" in ending.notes[0]
    write(file)
    assert coordinator_of(file).run().is_over


def test_sigterm_lets_the_workers_put_back_what_they_do(file, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "slow")
    coordinator = coordinator_of(file, workers=2)

    def signal_when_running():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if len(coordinator.crew.running) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    threading.Thread(target=signal_when_running, daemon=True).start()
    with pytest.raises(SystemExit) as told:
        coordinator.run()
    assert told.value.code == 143
    (note,) = told.value.__notes__
    assert note == f"Go on with it: python -m research.sweep {file}"
    assert "stopping: the trials that run save their checkpoints" in coordinator.out.getvalue()
    assert states(coordinator) == [TrialState.WAITING] * 4
    monkeypatch.delenv("FAKE_MODE")
    again = coordinator_of(file)
    again.run()
    assert states(again) == [TrialState.COMPLETE] * 4
    assert all("reason" not in trial.user_attrs for trial in again.studies.trials()[""])


@pytest.mark.slow
def test_second_coordinator_joins_and_leaves_the_end_to_the_first(file, monkeypatch):
    coordinator = coordinator_of(file)
    coordinator.run()
    held = heartbeat.first_beat(os.getpid()) | {"token": "another"}
    coordinator.studies.first.set_user_attr(parent.COORDINATOR, held)
    joining = coordinator_of(file, trials=6)
    ending = joining.run()
    assert not ending.is_over
    assert "ends the search" in ending.notes[0]
    assert "is at work on it too" in joining.out.getvalue()
    assert states(joining) == [TrialState.COMPLETE] * 6
    held["heartbeat.pid"] = "999999999"  # it died: the next one is not the second any more
    joining.studies.first.set_user_attr(parent.COORDINATOR, held)
    assert coordinator_of(file, trials=7).run().is_over


@pytest.mark.slow
def test_second_coordinator_ends_the_search_where_the_first_died_meanwhile(file, monkeypatch):
    coordinator_of(file).run()
    joining = coordinator_of(file, trials=5)
    held = heartbeat.first_beat(os.getpid()) | {"token": "another"}
    first = studies.make(joining.search, file).first
    first.set_user_attr(parent.COORDINATOR, held)
    work = joining.work

    def outlive(cells, what):
        is_late = work(cells, what)
        first.set_user_attr(parent.COORDINATOR, held | {"heartbeat.pid": "999999999"})
        return is_late

    monkeypatch.setattr(joining, "work", outlive)
    ending = joining.run()
    assert "is at work on it too" in joining.out.getvalue()
    assert ending.is_over
    assert ending.notes == []
    assert coordinator_of(file, trials=5).run().notes == ["Nothing is left to do."]


# ---- machines that differ ------------------------------------------------------------------------


def test_machines_that_join_train_in_the_precision_of_the_first(file, monkeypatch):
    monkeypatch.setattr(precision, "processor_computes_in_bfloat16", lambda: True)
    coordinator_of(file).run()
    monkeypatch.setattr(precision, "processor_computes_in_bfloat16", lambda: False)
    joining = coordinator_of(file, trials=5)
    joining.run()
    told = "precision: bf16-mixed, as on the machine that began this search; here it would be 32-t"
    assert told in joining.out.getvalue()
    search = Search.from_document(joining.job([]).document)  # as a worker reads it
    (cell,) = search.cells
    precisions = [
        search.configuration(cell, chosen).values.trainer.precision
        for chosen in (
            {},
            {"optimizer": {"class_path": "LBFGS"}},
            {"trainer": {"precision": "64-true"}},
        )
    ]
    assert precisions == ["bf16-mixed", "32-true", "64-true"]


def test_nothing_is_told_of_a_precision_that_the_file_fixes(file, monkeypatch):
    settings = {"data": "Synthetic", "trainer.accelerator": "cpu", "trainer.precision": "32-true"}
    write(file, settings=settings)
    monkeypatch.setattr(precision, "processor_computes_in_bfloat16", lambda: True)
    coordinator_of(file).run()
    monkeypatch.setattr(precision, "processor_computes_in_bfloat16", lambda: False)
    joining = coordinator_of(file, trials=5)
    joining.run()
    assert "precision" not in joining.out.getvalue()


# ---- files that have changed ---------------------------------------------------------------------


def test_changed_objective_is_refused_with_the_difference(file):
    coordinator_of(file).run()
    write(file, objective="val/loss")
    with pytest.raises(ConfigurationError) as told:
        coordinator_of(file).run()
    assert "objective.val/accuracy: was maximize, is now not there" in str(told.value)
    assert "objective.val/loss: was not there, is now minimize" in str(told.value)
    assert "--name" in str(told.value)


def test_wider_range_goes_on_only_if_asked_for(file):
    coordinator_of(file).run()
    write(file, space={"optimizer.lr": "log 1e-3..10"}, budget={"trials": 5})
    with pytest.raises(ConfigurationError, match="--extend") as told:
        coordinator_of(file).run()
    assert "was log 0.001..1" in str(told.value)
    extended = coordinator_of(file)
    extended.run(extend=True)
    assert states(extended) == [TrialState.COMPLETE] * 5
    assert coordinator_of(file).run().notes == ["Nothing is left to do."]  # and is remembered


def test_search_that_never_began_is_not_found_and_not_made(file):
    with pytest.raises(ConfigurationError, match=f"Start it: python -m research.sweep {file}"):
        studies.find(read_search(file), file)
    assert list(file.parent.glob("*.journal")) == []


# ---- places --------------------------------------------------------------------------------------


def test_one_worker_for_each_gpu_and_each_gpu_once():
    found = workers.places(None, None, ["0", "1", "2", "3"], devices=1)
    assert [place.gpus for place in found] == [("0",), ("1",), ("2",), ("3",)]


def test_several_workers_share_a_gpu_if_asked_for():
    found = workers.places(None, 2, ["0", "1"], devices=1)
    assert sorted(place.gpus for place in found) == [("0",), ("0",), ("1",), ("1",)]


def test_trials_of_several_devices_have_gpus_of_their_own():
    found = workers.places(None, None, ["0", "1", "2", "3", "4"], devices=2)
    assert [place.gpus for place in found] == [("0", "1"), ("2", "3")]
    with pytest.raises(ConfigurationError, match=r"trainer\.devices is 8"):
        workers.places(None, None, ["0", "1"], devices=8)


def test_workers_together_have_no_more_threads_than_there_are_cores(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 16)
    for count in (1, 2, 3, 16, 40):
        found = workers.places(count, None, [], devices=1)
        assert len(found) == count
        assert sum(place.threads for place in found) <= max(16, count)
        assert min(place.threads for place in found) >= 1


def test_threads_that_the_user_set_stay(monkeypatch):
    place = workers.Place(0, None, threads=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert workers.environment(place)["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert workers.environment(place)["OMP_NUM_THREADS"] == "3"


def test_gpus_are_those_that_this_process_was_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-abc")
    assert workers.visible_gpus() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers.visible_gpus() == []


@pytest.mark.parametrize(
    ("flag", "count"),
    [("auto", 1), (-1, 1), ("-1", 1), (1, 1), (4, 4), ("4", 4), ([0, 2], 2), ("0,2,3", 3)],
)
def test_devices_of_a_trial_are_counted(flag, count):
    assert number_of(flag) == count


# ---- the seat and the curve ----------------------------------------------------------------------


def test_seat_is_held_by_one_until_that_one_is_dead():
    study = optuna.create_study()
    first, second = parent.Seat(study), parent.Seat(study)
    assert first.take() and first.take()
    assert not second.take()
    study.set_user_attr(
        parent.COORDINATOR, {**study.user_attrs[parent.COORDINATOR], "heartbeat.pid": "999999999"}
    )
    assert second.take()
    assert not first.is_mine
    first.leave()  # it is not the first one's to leave
    assert second.is_mine
    second.leave()
    assert study.user_attrs[parent.COORDINATOR] == {}


def test_curve_of_the_parent_is_the_best_so_far_in_the_order_of_ends():
    begun = datetime(2026, 1, 1)
    trials = []
    for end, value in ((3, 0.9), (1, 0.5), (2, None), (4, 0.7)):
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        trial = create_trial(state=state, value=value)
        trial.datetime_complete = begun + timedelta(seconds=end)
        trials.append(trial)
    rows = parent.history(trials, ["val/accuracy"], ["maximize"])
    assert [row["search/best_val_accuracy"] for row in rows] == [0.5, 0.5, 0.9, 0.9]
    rows = parent.history(trials, ["val/accuracy"], ["minimize"])
    assert [row["search/best_val_accuracy"] for row in rows] == [0.5, 0.5, 0.5, 0.5]


# ---- signals -------------------------------------------------------------------------------------


def test_second_signal_ends_at_once_and_an_echo_does_not():
    script = """
import os, signal, sys, time
from research.search.halting import Ears
ears = Ears(lambda: print("killed the workers", flush=True))
with ears.listening():
    ears.on_first = lambda number: print("heard", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.6)
    print("alive", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout) == (130, "heard\nalive\nkilled the workers\n"), done


def test_signals_are_exceptions_where_nothing_runs_yet():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
            with pytest.raises(kind), Ears(lambda: None).listening():
                os.kill(os.getpid(), number)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
