"""The command itself, told to end by a person, a scheduler, a bug: it says how to go on, and can.

Each training is `python -m research.fit` in a process group of its own.  Its network waits at a
chosen step until the test has sent its signal, so that nothing here depends on the machine's speed.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from research.checkpoints.io import newest_whole, progress_of
from research.tracking import heartbeat
from research.tracking.runs import find_run, open_store
from research.tracking.store import TrackingError, sqlite_uri
from tests.conftest import SMALL
from tests.test_resume import HARD, OF_TIME

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's of SQLAlchemy
]

PROJECT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 300.0
STEPS_OF_EPOCH = 10
PAUSING = '''
import os
import time
from pathlib import Path

import torch

from research.networks import CNN


class Pausing(CNN):
    """Waits at a training step, or in the test, until the file `go` is there."""

    steps = 0

    def forward(self, x):
        Pausing.steps += torch.is_grad_enabled()
        place = f"step {self.steps}" if torch.is_grad_enabled() else f"{len(x)} pictures"
        if place == os.environ.get("PAUSE_AT"):
            folder = Path(os.environ["PAUSE_IN"])
            (folder / "reached").touch()
            deadline = time.monotonic() + 300
            while not (folder / "go").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        if place == os.environ.get("RAISE_AT"):
            raise RuntimeError("a bug in the network")
        return super().forward(x)
'''
TEST_PICTURES = 20  # no other split has a batch of so many
ARGUMENTS = [
    *SMALL,
    *("--model.network", "pausing.Pausing", "--model.network.widths", "[4,4,8]"),
    *("--model.network.hidden", "8", *HARD, "--data.num_test", str(TEST_PICTURES)),
    *("--data.batch_size", "32", "--trainer.max_epochs", "3", "--experiment", "signals"),
    *("--log_pictures", "false", "--log_model", "false", "--log_system_metrics", "false"),
]


@pytest.fixture(autouse=True)
def signals_are_heard():
    """A shell that starts the tests in the background has what they start ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the store, of the network, and of the programs that are looked for first."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "pausing.py").write_text(PAUSING)
    programs = folder / "bin"
    programs.mkdir()
    write_program(programs / "python", f'exec "{sys.executable}" "$@"')
    write_program(programs / "scontrol", f'echo "$@" >> {folder}/scontrol.log')
    return folder


def write_program(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def uri(place):
    return sqlite_uri(place / "mlflow.db")


@pytest.fixture
def start(place, uri, tmp_path):
    """Starts the command; what is still running at the end of the test is killed."""
    started = []

    def start(*arguments, base=ARGUMENTS, **environment):
        number = len(started)
        fit = Fit(
            [sys.executable, "-m", "research.fit", *base, *arguments, "--tracking_uri", uri],
            environment_of(place) | environment,
            tmp_path / f"{number}",
        )
        started.append(fit)
        return fit

    yield start
    for fit in started:
        fit.kill()


def environment_of(place):
    left_out = {"RESEARCH_SPOOL", "MLFLOW_TRACKING_URI"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in left_out and not name.startswith("SLURM_")
    }
    paths = {"PATH": f"{place / 'bin'}{os.pathsep}{kept['PATH']}", "PYTHONPATH": str(place)}
    return kept | paths | {"OMP_NUM_THREADS": "1"}


class Fit:
    """The command in a process group of its own, and what it prints."""

    def __init__(self, command, environment, folder):
        folder.mkdir()
        self.folder = folder
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=environment | {"PAUSE_IN": str(folder)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self):
        return (self.folder / "log").read_text()

    def await_pause(self):
        self.until((self.folder / "reached").exists)

    def go_on(self):
        (self.folder / "go").touch()

    def await_words(self, words):
        self.until(lambda: words in self.said)

    def until(self, condition):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def ctrl_c(self):
        """As a terminal does it: to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self):
        """The exit code."""
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def run_in_shell(command, place):
    """The exit code and all that was printed by a command line, as a person types it."""
    ran = subprocess.run(
        ["sh", "-c", command],
        cwd=PROJECT,
        env=environment_of(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_SECONDS,
        text=True,
    )
    return ran.returncode, ran.stdout


@pytest.fixture(scope="module")
def unbroken(place, uri):
    line = " ".join([*(f"'{word}'" for word in ARGUMENTS), "--run_name unbroken"])
    code, said = run_in_shell(f"python -m research.fit {line} --tracking_uri {uri}", place)
    assert code == 0, said
    return find_run(uri, "unbroken")


# ---- what is compared ----------------------------------------------------------------------------


def histories(run):
    """Every metric's values as (step, value) in the order of steps; of times only the steps."""
    client = open_store(run.tracking_uri)
    found = {}
    for name in client.get_run(run.run_id).data.metrics:
        rows = client.get_metric_history(run.run_id, name)
        found[name] = sorted((row.step, 0 if name in OF_TIME else row.value) for row in rows)
    return found


def assert_equal(one, other):
    """Two runs have the same metrics, at the same steps, the same weights and optimizer."""
    assert one.status == other.status == "FINISHED"
    assert histories(one) == histories(other)
    for name in ("last.ckpt", "best.ckpt"):
        expected, found = (
            torch.load(run.file(f"checkpoints/{name}"), weights_only=True) for run in (one, other)
        )
        assert expected["global_step"] == found["global_step"]
        assert expected["state_dict"].keys() == found["state_dict"].keys()
        for key, weight in expected["state_dict"].items():
            assert torch.equal(weight, found["state_dict"][key]), (name, key)
        assert str(expected["optimizer_states"]) == str(found["optimizer_states"])
        assert expected["lr_schedulers"] == found["lr_schedulers"]
    for run in (one, other):
        names = {Path(file).name for file in run.files("checkpoints")}
        if run.artifact_dir is None:  # a server keeps what a run that was killed had sent to it
            names -= {"previous.ckpt"}
        assert names == {"last.ckpt", "best.ckpt"}


def steps_saved(run):
    checkpoint, torn = newest_whole(run.artifact_dir / "checkpoints")
    assert torn == []
    return progress_of(checkpoint)[0]


def command_to_go_on(said):
    (command,) = re.findall(r"^Go on with it: (python -m research\.fit --resume .*)$", said, re.M)
    return command


# ---- the tests -----------------------------------------------------------------------------------


def test_what_ctrl_c_prints_goes_on_to_the_same_end(start, place, uri, unbroken):
    fit = start("--run_name", "ctrl-c", PAUSE_AT="step 14")
    fit.await_pause()
    fit.ctrl_c()
    fit.await_words("stopping after this step")
    fit.go_on()
    assert fit.wait() == 130
    assert "stopped by Ctrl-C" in fit.said
    assert "Traceback" not in fit.said
    run = find_run(uri, "ctrl-c")
    assert run.status == "KILLED"
    assert steps_saved(run) == 14
    code, said = run_in_shell(command_to_go_on(fit.said), place)
    assert code == 0, said
    assert "step 14, 1 epochs ended" in said
    assert_equal(unbroken, find_run(uri, "ctrl-c"))


def test_sigterm_saves_and_ends_with_143(start, uri):
    fit = start("--run_name", "sigterm", PAUSE_AT="step 7")
    fit.await_pause()
    fit.process.send_signal(signal.SIGTERM)
    fit.await_words("SIGTERM: stopping after this step")
    fit.go_on()
    assert fit.wait() == 143
    assert "stopped by SIGTERM" in fit.said
    assert command_to_go_on(fit.said)
    run = find_run(uri, "sigterm")
    assert run.status == "KILLED"
    assert steps_saved(run) == 7


def test_a_second_ctrl_c_ends_it_at_once_and_the_recorder_says_that_it_was_killed(start, uri):
    fit = start("--run_name", "twice", PAUSE_AT="step 14")
    fit.await_pause()
    fit.ctrl_c()
    fit.await_words("stopping after this step")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while fit.process.poll() is None:  # the step never ends, and nothing can be saved
        assert time.monotonic() < deadline
        time.sleep(0.1)
        if fit.process.poll() is None:
            fit.ctrl_c()
    assert fit.wait() == 130
    assert "Traceback" not in fit.said
    client = open_store(uri)  # not find_run, which would look for dead runs itself
    (run,) = client.search_runs(
        [client.get_experiment_by_name("signals").experiment_id], "run_name = 'twice'"
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while client.get_run(run.info.run_id).info.status != "KILLED":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert heartbeat.ENDED_BY not in client.get_run(run.info.run_id).data.tags
    assert steps_saved(find_run(uri, "twice")) == STEPS_OF_EPOCH  # the epoch before


# What is mapped into the process while it still imports, and has no handler of its own.
@pytest.mark.parametrize("library", ["libtorch_cpu", "_statistics", "research.fit"])
def test_ctrl_c_while_it_imports_leaves_nothing(start, uri, library, tmp_path, place):
    before = set(place.rglob("*"))
    fit = start("--run_name", f"importing {library}")
    maps = Path(f"/proc/{fit.process.pid}/maps")
    if library == "research.fit":
        fit.until(lambda: children(fit.process.pid))  # the recorder is started first of all
    else:
        fit.until(lambda: library in maps.read_text())
    fit.ctrl_c()
    assert fit.wait() == 130
    assert fit.said.strip() == "stopped by Ctrl-C"
    with pytest.raises(TrackingError):
        find_run(uri, f"importing {library}")
    assert {path for path in set(place.rglob("*")) - before if path.suffix != ".pyc"} <= {
        place / "__pycache__",
        place / "mlflow.db.lock",
    }


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_ctrl_c_in_the_test_at_the_end_goes_on_with_the_test(start, place, uri, unbroken):
    fit = start("--run_name", "testing", PAUSE_AT=f"{TEST_PICTURES} pictures")
    fit.await_pause()
    fit.ctrl_c()
    assert fit.wait() == 130
    assert "stopped by Ctrl-C" in fit.said
    assert "Traceback" not in fit.said
    assert find_run(uri, "testing").status == "KILLED"
    assert steps_saved(find_run(uri, "testing")) == 3 * STEPS_OF_EPOCH
    code, said = run_in_shell(command_to_go_on(fit.said), place)
    assert code == 0, said
    assert_equal(unbroken, find_run(uri, "testing"))


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "training",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_NODELIST": "localhost",
}


def test_slurm_job_that_runs_out_of_time_is_requeued_and_goes_on_by_itself(
    start, place, uri, unbroken
):
    fit = start("--run_name", "slurm", **SLURM, PAUSE_AT="step 14")
    fit.await_pause()
    fit.process.send_signal(signal.SIGUSR1)
    fit.await_words("SLURM's time is nearly up")
    assert not (place / "scontrol.log").exists()
    fit.go_on()
    assert fit.wait() == 128 + signal.SIGUSR1, fit.said
    assert "SLURM job 4711 is requeued" in fit.said
    assert (place / "scontrol.log").read_text() == "requeue 4711\n"
    run = find_run(uri, "slurm")
    assert (run.status, steps_saved(run)) == ("KILLED", 14)

    again = start("--run_name", "slurm", **SLURM, SLURM_RESTART_COUNT="1")
    assert again.wait() == 0, again.said
    assert f"going on with run slurm ({run.run_id})" in again.said
    assert_equal(unbroken, find_run(uri, "slurm"))

    third = start("--run_name", "slurm", **SLURM, SLURM_RESTART_COUNT="2")
    assert third.wait() == 0
    assert "is finished; nothing is left to do" in third.said
    assert find_run(uri, "slurm").run_id == run.run_id  # there is no other of that name


def test_a_bug_leaves_a_failed_run_with_its_traceback(start, uri):
    fit = start("--run_name", "bug", RAISE_AT="step 7")
    assert fit.wait() == 1
    assert "RuntimeError: a bug in the network" in fit.said
    run = find_run(uri, "bug")
    assert run.status == "FAILED"
    traceback = run.file("traceback.txt").read_text()
    assert "pausing.py" in traceback
    assert "RuntimeError: a bug in the network" in traceback


def test_a_loss_that_is_no_number_leaves_a_step_that_can_be_done_again(start, place, uri):
    diverging = ["--optimizer.lr", "1e30", "--lr_scheduler", "null"]
    fit = start("--run_name", "no number", *diverging)
    assert fit.wait() == 1
    assert "Traceback" not in fit.said
    run = find_run(uri, "no number")
    assert run.status == "FAILED"
    assert run.file("non_finite/step.pt").stat().st_size > 0
    assert f"python -m research.replay {run.run_id[:8]}" in fit.said
    code, said = run_in_shell(
        f"python -m research.replay {run.run_id} --tracking_uri {uri} --trust", place
    )
    assert code == 0, said
    assert "the same" in said
