"""The warm process: what it says, how it is stopped, and that it stays as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from research.processes.launch import launch
from research.search.desk import next_ticket, open_desks
from research.search.job import Job
from research.search.worker import Interruption, forget_launcher
from research.tracking.runs import find_run, open_store
from tests.searched import desk_at, job

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = {"trainer.max_epochs": 100_000}


class Started:
    """A worker of the job, in a process."""

    def __init__(self, the_job, folder, **changes):
        self.log = folder / f"worker-{time.monotonic_ns()}.log"
        with open(self.log, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "research.search.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                text=True,
                start_new_session=True,
            )
        self.process.stdin.write(json.dumps({**vars(the_job), **changes}) + "\n")
        self.process.stdin.flush()

    def event(self):
        """The next thing that it says; None at its end."""
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def events(self):
        return [json.loads(line) for line in self.process.stdout]

    def end(self):
        code = self.process.wait(60)
        self.process.stdin.close(), self.process.stdout.close()
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdin.close(), self.process.stdout.close()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_trained(desk, epochs=2):
    return lambda: len(desk.slots.trials()[0].intermediate_values) >= epochs


def test_studies_take_turns_and_an_empty_one_is_passed_over(tmp_path):
    each = {"model.loss": {"CrossEntropyLoss": {}, "MSELoss": {}}}
    the_job = job(tmp_path, recorded=False, each=each)
    desks = open_desks(the_job)
    assert [desk.study_name for desk in desks] == ["small/CrossEntropyLoss", "small/MSELoss"]
    desks[0].slots.fill(3), desks[1].slots.fill(1)
    taken, turn = [], 1
    while (found := next_ticket(desks, turn)) is not None:
        turn, desk, ticket = found
        taken.append((desk.cell.name, ticket.slot))
    assert taken[0] == ("MSELoss", 0)
    assert taken[1:] == [("CrossEntropyLoss", slot) for slot in range(3)]


@pytest.fixture
def interruption():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Interruption()
    for number, heard in before.items():
        signal.signal(number, heard)


def test_a_signal_between_trials_is_heard_by_the_next_one(interruption):
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.number == signal.SIGTERM
    with pytest.raises(SystemExit) as ending, interruption.heard():
        raise AssertionError("the trial began")
    assert ending.value.code == 128 + signal.SIGTERM


def test_a_signal_inside_a_trial_is_an_exception_and_a_second_one_is_noted(interruption):
    with pytest.raises(KeyboardInterrupt), interruption.heard():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.number == signal.SIGINT


@pytest.mark.slow
def test_a_worker_says_what_it_does_and_ends_when_nothing_is_left(tmp_path):
    desk = desk_at(job(tmp_path), 2)
    with Started(desk.job, tmp_path) as worker:
        events = worker.events()
        assert worker.end() == 0
    expected = [{"event": "ready"}]
    for slot in (0, 1):
        expected.append({"event": "took", "cell": "", "slot": slot, "trial": slot})
        expected.append({"event": "ended", "cell": "", "slot": slot, "state": "COMPLETE"})
    assert events == expected
    assert [trial.state for trial in desk.slots.trials()] == 2 * [TrialState.COMPLETE]
    assert "Traceback" not in worker.log.read_text()


@pytest.mark.slow
def test_no_trial_begins_after_the_time(tmp_path):
    desk = desk_at(job(tmp_path, recorded=False), 1)
    with Started(desk.job, tmp_path, stop_at=time.time()) as worker:
        assert worker.events() == [{"event": "ready"}]
        assert worker.end() == 0
    assert desk.slots.counts().waiting == 1


@pytest.mark.faults
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "closed"])
def test_a_worker_that_is_stopped_puts_its_trial_back_and_another_goes_on(tmp_path, how):
    desk = desk_at(job(tmp_path, settings=ENDLESS), 1)
    with Started(desk.job, tmp_path) as worker:
        assert worker.event() == {"event": "ready"} and worker.event()["event"] == "took"
        wait_for(has_trained(desk))
        if how == "closed":
            worker.process.stdin.close()
        else:
            worker.process.send_signal(signal.Signals[how])
        assert worker.event()["state"] == "STOPPED"
        assert worker.end() == (128 + 15 if how == "SIGTERM" else 128 + 2)
    (trial,) = desk.slots.trials()
    run = find_run(desk.job.tracking_uri, trial.user_attrs["run_id"])
    assert trial.state == TrialState.WAITING and run.status == "KILLED"
    assert desk.slots.take().attempt == 1  # it has used none up


@pytest.mark.faults
def test_a_trial_whose_worker_was_killed_goes_on_with_its_run(tmp_path):
    desk = desk_at(job(tmp_path, settings={"trainer.max_epochs": 40}), 1)
    with Started(desk.job, tmp_path) as worker:
        assert worker.event() == {"event": "ready"} and worker.event()["event"] == "took"
        wait_for(has_trained(desk))
        worker.process.kill()
        worker.process.wait()
    assert desk.slots.trials()[0].state == TrialState.RUNNING
    assert desk.slots.revive_dead() == [0]
    before = desk.slots.trials()[0].intermediate_values
    with Started(desk.job, tmp_path) as worker:
        assert worker.events()[-1]["state"] == "COMPLETE"
        assert worker.end() == 0
    (trial,) = desk.slots.trials()
    assert list(trial.intermediate_values) == list(range(1, 41))
    assert before.items() <= trial.intermediate_values.items()
    client = open_store(desk.job.tracking_uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].data.tags["resumed"] == "1"


# What a worker does, killed when its recorder process has begun to make the run.
BEGIN_AND_DIE = """
import contextlib, json, os, signal, sys, time
from research.data.kept import Kept
from research.search.desk import open_desks
from research.search.job import Job
from research.tracking.run import Recorder

def begin_and_die(*arguments, **options):
    run = Recorder.start_run(recorder, *arguments, **options)
    while "tags" not in run._spool.about:
        time.sleep(0.001)
    if recorder_dies:
        recorder._process.kill()
    os.kill(os.getpid(), signal.SIGKILL)

told, recorder_dies = json.loads(sys.argv[1])
recorder = Recorder.start()
recorder.start_run = begin_and_die
desk = open_desks(Job(**told))[0]
desk.do(desk.slots.take(), recorder, Kept(), contextlib.nullcontext)
"""


@pytest.mark.faults
@pytest.mark.parametrize("recorder_dies", [False, True])
def test_a_run_whose_worker_died_before_it_knew_of_it_is_found(tmp_path, recorder_dies):
    desk = desk_at(job(tmp_path), 1)
    told = json.dumps([vars(desk.job), recorder_dies])
    died = subprocess.run([sys.executable, "-c", BEGIN_AND_DIE, told], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    assert desk.slots.revive_dead() == [0]
    assert "run_id" not in desk.slots.trials()[0].user_attrs
    with Started(desk.job, tmp_path) as worker:
        assert worker.events()[-1]["state"] == "COMPLETE"
        assert worker.end() == 0, worker.log.read_text()
    client = open_store(desk.job.tracking_uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].info.run_id == desk.slots.trials()[0].user_attrs["run_id"]
    assert runs[0].inputs.dataset_inputs
    assert "config.yaml" in [file.path for file in client.list_artifacts(runs[0].info.run_id)]
    assert not list((tmp_path / "mlruns" / ".spool").glob("*"))


@pytest.mark.slow
def test_a_trial_of_a_warm_worker_is_the_run_of_a_fresh_process(tmp_path):
    import torch

    from tests.test_search_trial import same_weights, weights_of

    desk = desk_at(job(tmp_path, settings={"model.network.dropout": 0.5}), 3)
    with Started(desk.job, tmp_path) as worker:
        assert worker.events()[-1]["state"] == "COMPLETE"
        assert worker.end() == 0
    last = desk.slots.trials()[-1]
    run = find_run(desk.job.tracking_uri, last.user_attrs["run_id"])
    file = tmp_path / "config.yaml"
    file.write_text(run.configuration())
    command = [sys.executable, "-m", "research.fit", "--config", str(file), "--experiment", "alone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    client = open_store(desk.job.tracking_uri)
    (alone,) = client.search_runs([client.get_experiment_by_name("alone").experiment_id])
    fresh = find_run(desk.job.tracking_uri, alone.info.run_id)
    assert same_weights(weights_of(run), weights_of(fresh))
    for figure in ("train/loss", "val/loss", "best_val/accuracy"):
        assert run.metrics[figure] == fresh.metrics[figure]
    assert isinstance(weights_of(run), dict) and torch is not None


@pytest.mark.slow
def test_memory_does_not_grow_from_trial_to_trial(tmp_path):
    desk = desk_at(job(tmp_path, settings={"trainer.max_epochs": 1}), 48)
    sizes = []
    with Started(desk.job, tmp_path) as worker:
        process = psutil.Process(worker.process.pid)
        while (event := worker.event()) is not None:
            if event["event"] == "took":
                sizes.append(process.memory_info().rss / 2**20)
        assert worker.end() == 0
    assert len(sizes) == 48
    # What the first ones bring in for good is there by then.
    assert sizes[-1] - sizes[16] < 16, sizes


@pytest.mark.devices
@pytest.mark.parametrize("pruner", [None, {"class_path": "ThresholdPruner", "upper": -1.0}])
def test_a_trial_on_two_devices_has_processes_of_its_own(tmp_path, pruner):
    settings = {"trainer.devices": 2, "data.val_fraction": 0.2}
    desk = desk_at(job(tmp_path, settings=settings, pruner=pruner), 2)
    with Started(desk.job, tmp_path) as worker:
        events = worker.events()
        assert worker.end() == 0, worker.log.read_text()
    state = "COMPLETE" if pruner is None else "PRUNED"
    assert [e["state"] for e in events if e["event"] == "ended"] == [state, state]
    for trial in desk.slots.trials():
        run = find_run(desk.job.tracking_uri, trial.user_attrs["run_id"])
        assert trial.state.name == state
        assert list(trial.intermediate_values) == ([1, 2, 3] if pruner is None else [1])
        assert (run.status, run.tags["world_size"]) == ("FINISHED", "2")
        assert run.tags["trial.state"] == state


@pytest.mark.devices
def test_a_stopped_trial_on_two_devices_goes_on(tmp_path):
    settings = {"trainer.devices": 2, "trainer.max_epochs": 30}
    desk = desk_at(job(tmp_path, settings=settings), 1)
    with Started(desk.job, tmp_path) as worker:
        wait_for(has_trained(desk))
        worker.process.terminate()
        assert worker.end() == 143, worker.log.read_text()
    (trial,) = desk.slots.trials()
    assert trial.state == TrialState.WAITING
    with Started(desk.job, tmp_path) as worker:
        assert worker.events()[-1]["state"] == "COMPLETE", worker.log.read_text()
    (trial,) = desk.slots.trials()
    run = find_run(desk.job.tracking_uri, trial.user_attrs["run_id"])
    assert (run.status, run.tags["resumed"]) == ("FINISHED", "1")
    assert list(trial.intermediate_values) == list(range(1, 31))


def test_a_worker_is_no_rank_of_who_started_the_search():
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "WORLD_SIZE": "4", "PATH": "/bin"}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}
    assert launch(torchrun) is not None and launch(slurm) is not None
    for environment in (torchrun, slurm):
        forget_launcher(environment)
        assert launch(environment) is None
    assert torchrun == {"PATH": "/bin"}


def test_a_job_needs_no_more_than_a_search_and_its_storage():
    assert Job({}, "x").stages == () and Job({}, "x").tracking_uri is None
