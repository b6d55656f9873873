"""Killed at any moment, a search goes on as if nothing had been: no trial lost, none done twice.

A search is `python -m research.sweep` on drawn pictures, with two workers.  In each round one of
its workers, its coordinator, or all of its processes, the recorders too, are killed at a random
moment while trials run; then it is started again, until it has come to its end.  FAULTS_SEED=N
draws the same kinds and moments again, FAULTS_ROUNDS=N as many of them.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest

from research.search import parent
from research.search.storage import open_storage
from research.tracking.run import Recorder
from research.tracking.runs import open_store
from research.tracking.store import sqlite_uri

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's of SQLAlchemy
]

PROJECT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 300.0
ROUNDS = 3
TRIALS = 3
MANY_TRIALS = 6  # so that there is time for all the rounds
SEARCH = {
    "name": "killed",
    "settings": {
        "data": "Synthetic",
        "data.num_train": 2000,
        "data.num_test": 20,
        "model.network": "CNN",
        "model.network.widths": [4, 4, 8],
        "model.network.hidden": 8,
        "trainer.max_epochs": 4,
        "trainer.accelerator": "cpu",
    },
    "space": {"optimizer": {"SGD": {"lr": "log 1e-3..1e-1"}, "AdamW": {"lr": "log 1e-4..1e-2"}}},
    "budget": {"trials": TRIALS},
}


@pytest.fixture(autouse=True)
def signals_are_heard():
    """A shell that starts the tests in the background has what they start ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Victim:
    """A search in a folder of its own, started as often as it takes to come to its end."""

    def __init__(self, folder, document=SEARCH):
        self.folder = folder
        self.file = folder / "killed.yaml"
        self.file.write_text(json.dumps(document))
        self.uri = sqlite_uri(folder / "mlflow.db")
        self.starts = 0
        self.process = None
        self.seen = {}  # every process that there was, by its number

    def start(self, *arguments):
        self.starts += 1
        left_out = {"RESEARCH_SPOOL", "MLFLOW_TRACKING_URI"}
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "research.sweep", str(self.file)),
                    *("--workers", "2", "--tracking_uri", self.uri, *arguments),
                ],
                cwd=PROJECT,
                env={**kept, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self):
        return self.folder / f"{self.starts}.log"

    @property
    def said(self):
        return self.log.read_text()

    def wait(self):
        code = self.process.wait(PATIENCE_SECONDS)
        self.family()
        return code

    def family(self):
        """The processes of this start that live, as psutil knows them."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.seen |= {each.pid: each for each in found}
        return found

    def workers(self):
        found = []
        for each in self.family():
            try:
                if "research.search.worker" in each.cmdline():
                    found.append(each)
            except psutil.NoSuchProcess:
                continue
        return found

    def trials(self):
        path = self.folder / "killed.journal"
        if not path.exists():
            return []
        storage = open_storage(str(path), path)
        if "killed" not in optuna.get_all_study_names(storage):
            return []
        return optuna.load_study(study_name="killed", storage=storage).get_trials(deepcopy=False)

    def running(self):
        return [trial for trial in self.trials() if trial.state == optuna.trial.TrialState.RUNNING]

    def finished(self):
        """What came of each trial that has ended, by its slot."""
        return {
            trial.user_attrs["slot"]: (trial.number, trial.state, trial.values, trial.params)
            for trial in self.trials()
            if trial.state.is_finished()
        }

    def until_running(self):
        """Wait until a trial runs in a worker of this start; False if it came to its end first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            pids = {str(worker.pid) for worker in self.workers()}
            for trial in self.running():
                if (trial.user_attrs.get("owner") or {}).get("heartbeat.pid") in pids:
                    return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.05)
        raise AssertionError(f"no trial runs:\n{self.said}")

    def kill(self, kind, draw):
        """Kill what `kind` says, all of it at once."""
        if kind == "worker":
            victims = [draw.choice(self.workers())] if self.workers() else []
        elif kind == "coordinator":
            victims = [psutil.Process(self.process.pid)]
        else:
            victims = [psutil.Process(self.process.pid), *self.family()]
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        return bool(victims)

    def until_all_are_gone(self):
        """Wait for the workers that have lost their coordinator to save and end by themselves."""
        _, alive = psutil.wait_procs(self.seen.values(), timeout=PATIENCE_SECONDS)
        assert not alive, alive

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.kill("everything", random)
            self.process.wait()


@pytest.fixture
def victim(tmp_path):
    found = Victim(tmp_path)
    yield found
    found.close()


def check_whole(victim, trials=TRIALS):
    """The budget is used; one trial and one run for each slot; nothing seems to be alive."""
    found = victim.trials()
    assert sorted(trial.user_attrs["slot"] for trial in found) == [*range(trials)]
    assert {trial.state.name for trial in found} == {"COMPLETE"}
    client = open_store(victim.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "killed"]
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parents[0].info.run_id}
    assert {run.info.status for run in children} == {"FINISHED"}
    assert sorted(int(run.data.tags["slot"]) for run in children) == [*range(trials)]
    for trial in found:  # what the record says of it is what the study says
        (run,) = [run for run in children if run.data.tags["slot"] == str(trial.user_attrs["slot"])]
        assert run.info.run_id == trial.user_attrs["run_id"]
        assert run.data.metrics["best_val/accuracy"] == pytest.approx(trial.value)
        files = [file.path for file in client.list_artifacts(run.info.run_id)]
        assert "config.yaml" in files and run.inputs.dataset_inputs
    best = client.get_metric_history(parents[0].info.run_id, "search/best_val_accuracy")
    assert max(row.value for row in best) == pytest.approx(max(trial.value for trial in found))
    assert Counter(row.step for row in best).keys() == {*range(1, trials + 1)}


def test_killed_at_any_moment_it_reaches_its_budget_with_nothing_lost(victim):
    seed = int(os.environ.get("FAULTS_SEED", time.time_ns() % 2**32))
    print(f"FAULTS_SEED={seed}")
    draw, counts, kept = random.Random(seed), Counter(), {}
    rounds = int(os.environ.get("FAULTS_ROUNDS", ROUNDS))
    trials = max(MANY_TRIALS, rounds)
    victim.file.write_text(json.dumps(SEARCH | {"budget": {"trials": trials}}))
    kinds = (["worker", "coordinator", "everything"] * rounds)[:rounds]
    draw.shuffle(kinds)
    victim.start()
    for kind in kinds:
        if not victim.until_running():
            break
        time.sleep(draw.uniform(0, 1.5))
        now = victim.finished()
        assert {slot: now.get(slot) for slot in kept} == kept  # all that had ended is unchanged
        counts[kind] += victim.kill(kind, draw)
        if kind == "worker":
            continue
        assert victim.process.wait() == -signal.SIGKILL
        if draw.random() < 0.5:  # the next start may come while the workers still save
            victim.until_all_are_gone()
        kept = victim.finished()
        victim.start()
    code = victim.wait()
    assert code == 0, victim.said
    now = victim.finished()
    assert {slot: now.get(slot) for slot in kept} == kept
    print(dict(counts))
    assert sum(counts.values()) >= 2, "it was over too soon: this has shown nothing"
    victim.until_all_are_gone()
    check_whole(victim, trials)


# What a coordinator does, killed when its recorder process has begun to make the parent run.
BEGIN_AND_DIE = """
import os, signal, sys, time
import optuna
from research.search import parent
from research.tracking.run import Recorder

def begin_and_die(*arguments, **options):
    run = Recorder.start_run(recorder, *arguments, **options)
    while "tags" not in run._spool.about:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

recorder = Recorder.start()
recorder.start_run = begin_and_die
study = optuna.load_study(study_name="killed", storage=sys.argv[1])
parent.begin(recorder, sys.argv[2], [study], "killed", {"seed": 0}, {"study": "killed"})
"""


def test_a_parent_run_whose_coordinator_died_before_it_knew_of_it_is_found(tmp_path):
    storage, uri = sqlite_uri(tmp_path / "killed.db"), sqlite_uri(tmp_path / "mlflow.db")
    study = optuna.create_study(study_name="killed", storage=storage)
    died = subprocess.run([sys.executable, "-c", BEGIN_AND_DIE, storage, uri], cwd=PROJECT)
    assert died.returncode == -signal.SIGKILL
    assert parent.run_id_of(study, uri) is None
    with Recorder.start() as recorder:
        for _ in range(2):  # as one that was begun, and as one that is known
            run = parent.begin(recorder, uri, [study], "killed", {"seed": 0}, {"study": "killed"})
            assert parent.run_id_of(study, uri) == run.wait().run_id
            run.finish()
    client = open_store(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "killed"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (run.wait().run_id, "FINISHED")
    assert found.data.params == {"seed": "0"}


def test_ctrl_c_says_how_to_go_on_and_that_goes_on(victim):
    victim.start()
    assert victim.until_running()
    victim.process.send_signal(signal.SIGINT)
    assert victim.wait() == 130, victim.said
    assert "Traceback" not in victim.said
    assert "stopping: " in victim.said
    (command,) = re.findall(r"^Go on with it: python -m research\.sweep (.*)$", victim.said, re.M)
    assert command.split()[0] == str(victim.file)
    assert not victim.running()
    kept = victim.finished()
    begun = {t.number: dict(t.intermediate_values) for t in victim.trials()}
    client = open_store(victim.uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.status for run in runs} <= {"KILLED", "FINISHED"}
    victim.start()
    assert victim.wait() == 0, victim.said
    now = victim.finished()
    assert {slot: now[slot] for slot in kept} == kept
    for trial in victim.trials():  # what was reported before stands, and was not trained again
        reported = begun[trial.number]
        assert {step: trial.intermediate_values[step] for step in reported} == reported
    check_whole(victim)


def test_sigterm_ends_with_143_and_a_second_one_at_once(victim):
    victim.start("--workers", "1")
    assert victim.until_running()
    victim.process.send_signal(signal.SIGTERM)
    assert victim.wait() == 143, victim.said
    assert not victim.running()
    victim.start("--workers", "1")
    assert victim.until_running()
    victim.process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    victim.process.send_signal(signal.SIGTERM)
    assert victim.wait() == 143, victim.said
    victim.until_all_are_gone()


def test_two_coordinators_share_a_search(victim):
    victim.start("--workers", "1")
    first = victim.process
    assert victim.until_running()
    victim.start("--workers", "1")
    assert victim.wait() == 0, victim.said
    second = victim.said
    assert first.wait(PATIENCE_SECONDS) == 0
    victim.starts -= 1
    assert "is at work on it too" in second
    check_whole(victim)
