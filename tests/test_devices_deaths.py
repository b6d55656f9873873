"""A process of several dies, fails, is stopped or halted: one run that says why, nobody is left.

Most of these trainings are started as torchrun does it, from one Python (launched.py); three are
the command itself, whose second process Lightning starts.  The network does at a chosen step, in a
chosen process, what is asked of it.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from research.processes.lifeline import GRACE_SECONDS
from research.tracking.store import sqlite_uri
from tests import launched
from tests.conftest import SMALL
from tests.launched import ROOT

pytestmark = [
    pytest.mark.devices,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's of SQLAlchemy
]

PATIENCE_SECONDS = 300.0
# It takes 2 to 7 s, on a machine that others use much longer; without a line it is half an hour.
BOUND_SECONDS = 60.0
ACTING = '''
import os
import time
from pathlib import Path

import torch

from research.networks import CNN

RANK = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
if os.environ.get("ACT_" + RANK) == "end":
    os._exit(3)


class Acting(CNN):
    """Does at the 12th step, in the second epoch, what ACT_<rank> says."""

    steps = 0

    def forward(self, x):
        Acting.steps += torch.is_grad_enabled()
        if torch.is_grad_enabled() and self.steps == 12:
            Path(f"there.{RANK}").write_text(str(os.getpid()))
            act = os.environ.get("ACT_" + RANK)
            if act == "raise":
                raise RuntimeError("a bug in the network")
            deadline = time.monotonic() + (300 if act else 0)
            while time.monotonic() < deadline and (act == "hang" or not Path("go").exists()):
                time.sleep(0.02)
        return super().forward(x)
'''
ARGUMENTS = [
    *SMALL,
    *("--model.network", "acting.Acting", "--model.network.widths", "[4,4,8]"),
    *("--model.network.hidden", "8", "--data.batch_size", "32", "--trainer.max_epochs", "3"),
    *("--log_pictures", "false", "--log_model", "false", "--experiment", "deaths"),
]
SILENT = ["--log_system_metrics", "false"]


class Training:
    """The processes of a run, what they say, and what they leave in the store of their folder."""

    def __init__(self, folder):
        self.folder = folder
        self.uri = sqlite_uri(folder / "mlflow.db")
        folder.mkdir(exist_ok=True)
        (folder / "acting.py").write_text(ACTING)
        self.count = 0

    def launch(self, count, *arguments, nodes=1, **environment):
        """Start that many processes as torchrun does."""
        for file in self.folder.glob("there.*"):
            file.unlink()
        self.count = count
        typed = [*arguments, "--tracking_uri", self.uri]
        script = (
            "import sys; sys.path.insert(0, '.'); sys.argv[1:] = " + repr(typed) + "\n"
            "from research.fit import main; sys.exit(main())"
        )
        self.process = launched.start(
            count, script, self.folder, nodes=nodes, environment=environment
        )

    def command(self, *arguments, **environment):
        """Start the command itself."""
        for file in self.folder.glob("there.*"):
            file.unlink()
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), "."]), "OMP_NUM_THREADS": "1"}
        with open(self.folder / "out.0", "wb") as out, open(self.folder / "err.0", "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "research.fit", *arguments, "--tracking_uri", self.uri],
                cwd=self.folder,
                env=os.environ | paths | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def await_step(self, *ranks):
        for rank in ranks:
            self.await_it((self.folder / f"there.{rank}").exists)
            self.await_it(lambda rank=rank: (self.folder / f"there.{rank}").read_text())

    def await_it(self, condition):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.05)

    def send(self, rank, number):
        os.kill(int((self.folder / f"there.{rank}").read_text()), number)

    def go(self):
        (self.folder / "go").touch()

    def end(self, bound=PATIENCE_SECONDS):
        """The exit codes, of all processes or of the command."""
        self.process.wait(bound)
        if self.count:
            return json.loads((self.folder / "codes.json").read_text())
        return self.process.returncode

    def told(self):
        """All that was said on standard error."""
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("err.*")))

    def query(self, query):
        with contextlib.closing(sqlite3.connect(self.folder / "mlflow.db")) as store:
            return store.execute(query).fetchall()

    def status(self):
        """That of the only run, once the recorder process has said it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            ((status,),) = self.query("SELECT status FROM runs")
            if status != "RUNNING" or time.monotonic() > deadline:
                return status
            time.sleep(0.1)

    def traceback(self):
        (file,) = self.folder.glob("mlruns/*/*/artifacts/traceback.txt")
        return file.read_text()

    def left(self):
        """Processes that still work in the folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if Path(process.cwd()) == self.folder and process.status() != "zombie":
                    found.append(process)
        return found

    def await_nobody(self):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.left():
            assert time.monotonic() < deadline, self.left()
            time.sleep(0.1)


@pytest.fixture
def training(tmp_path):
    made = Training(tmp_path.resolve() / "here")
    yield made
    for process in made.left():
        with contextlib.suppress(psutil.Error):
            process.kill()
    made.process.wait()


def resume_words(training):
    ((run_id,),) = training.query("SELECT run_uuid FROM runs")
    return f"Go on with it: python -m research.fit --resume {run_id[:8]}"


# ---- as torchrun starts them ---------------------------------------------------------------------


def test_a_killed_process_ends_a_run_whose_first_one_is_stuck_and_the_run_goes_on(training):
    # Rank 0 hangs in a call that no error of the others ever ends, as in NCCL.
    acts = {f"ACT_{rank}": "hang" for rank in range(3)}
    training.launch(3, *ARGUMENTS, *SILENT, **acts)
    training.await_step(0, 1, 2)
    training.send(1, signal.SIGKILL)
    training.send(0, signal.SIGTERM)  # as torchrun does at once
    assert training.end(BOUND_SECONDS) == [1, -signal.SIGKILL, 1]
    told = training.told()
    assert told.count("died without a word") == 1 and "error: rank 1 (process " in told
    assert told.count(resume_words(training)) == 1
    assert "Traceback" not in told
    assert training.status() == "FAILED"
    assert "rank 1 (process " in training.traceback()
    ((run_id,),) = training.query("SELECT run_uuid FROM runs")
    training.await_nobody()

    training.launch(2, "--resume", run_id, "--trust", "--allow_changes")
    assert training.end() == [0, 0], training.told()
    assert training.status() == "FINISHED"
    epochs = training.query("SELECT step FROM metrics WHERE key = 'val/loss' ORDER BY step")
    assert epochs == [(1,), (2,), (3,)]


def test_others_end_when_the_first_process_is_killed(training):
    training.launch(3, *ARGUMENTS, *SILENT, ACT_0="hang", ACT_2="hang")
    training.await_step(0, 1, 2)
    training.send(0, signal.SIGKILL)
    assert training.end(BOUND_SECONDS) == [-signal.SIGKILL, 1, 1]
    told = training.told()
    assert told.count("rank 0 died without a word") == 1 and "Traceback" not in told
    assert training.status() == "KILLED"
    training.await_nobody()


def test_an_error_in_one_process_is_told_once_and_recorded_whole(training):
    training.launch(3, *ARGUMENTS, *SILENT, ACT_1="raise")
    assert training.end() == [1, 1, 1]
    told = training.told()
    assert told.count("RuntimeError: a bug in the network") == 1
    assert "error: rank 1 (process " in told and "acting.py" in told
    assert told.count(resume_words(training)) == 1
    assert "Connection closed by peer" not in told
    assert training.status() == "FAILED"
    recorded = training.traceback()
    assert "RuntimeError: a bug in the network" in recorded and "fit_loop.py" in recorded
    assert "Connection closed by peer" not in recorded
    training.await_nobody()


def test_a_loss_that_is_no_number_on_all_is_the_first_ones_own_error(training):
    training.launch(2, *ARGUMENTS, *SILENT, "--optimizer.lr", "1e30")
    assert training.end() == [1, 1]
    told = training.told()
    assert told.count("The loss became") == 1 and "rank 1" not in told
    assert training.status() == "FAILED"
    assert "NonFiniteLoss" in training.traceback()


def test_a_signal_to_one_stops_all_as_it_should(training):
    training.launch(2, *ARGUMENTS, *SILENT, ACT_0="wait", ACT_1="wait")
    training.await_step(0, 1)
    training.send(1, signal.SIGTERM)
    training.go()
    assert training.end() == [128 + signal.SIGTERM, 0]
    told = training.told()
    assert "stopped by SIGTERM" in told and "died" not in told
    assert resume_words(training) in told
    assert training.status() == "KILLED"


def test_a_halted_process_is_not_dead_and_both_nodes_are_measured(training):
    training.launch(
        2,
        *ARGUMENTS,
        nodes=2,
        ACT_0="wait",
        ACT_1="wait",
        MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="0.5",
    )
    training.await_step(0, 1)
    training.send(1, signal.SIGSTOP)
    time.sleep(GRACE_SECONDS + 3)
    assert training.process.poll() is None
    training.send(1, signal.SIGCONT)
    names = [f"system/{node}cpu_utilization_percentage" for node in ("", "node_1/")]
    for name in names:
        query = f"SELECT COUNT(*) FROM metrics WHERE key = '{name}'"
        training.await_it(lambda query=query: training.query(query)[0][0] >= 2)
    training.go()
    assert training.end() == [0, 0], training.told()
    assert training.status() == "FINISHED"
    keys = {key for (key,) in training.query("SELECT DISTINCT key FROM metrics")}
    system = {key for key in keys if key.startswith("system/")}
    others = {key for key in system if key.startswith("system/node_")}
    assert others == {key.replace("system/", "system/node_1/") for key in system - others}
    for name in names:
        rows = training.query(f"SELECT step FROM metrics WHERE key = '{name}' ORDER BY timestamp")
        assert rows == [(step,) for step in range(len(rows))]
    training.await_nobody()


# ---- as Lightning starts them --------------------------------------------------------------------


def test_the_command_says_what_killed_its_second_process_and_goes_on_with_one(training):
    typed = ["--trainer.devices", "2"]
    training.command(*ARGUMENTS, *SILENT, *typed, ACT_1="hang")
    training.await_step(1)
    training.send(1, signal.SIGKILL)
    assert training.end(BOUND_SECONDS) == 1
    told = training.told()
    assert told.count("was killed by SIGKILL") == 1 and "Traceback" not in told
    assert told.count(resume_words(training)) == 1
    assert training.status() == "FAILED"
    assert "was killed by SIGKILL" in training.traceback()
    training.await_nobody()
    ((run_id,),) = training.query("SELECT run_uuid FROM runs")
    one = ("--trainer.devices", "1", "--allow_changes")
    training.command("--resume", run_id, "--trust", *one)
    assert training.end() == 0, training.told()
    assert training.status() == "FINISHED"


def test_a_process_that_ends_before_training_has_begun_ends_the_run(training):
    training.command(*ARGUMENTS, *SILENT, "--trainer.devices", "2", ACT_1="end")
    assert training.end() == 1
    told = training.told()
    assert "error: rank 1 ended with exit code 3 before training began." in told
    assert training.status() == "FAILED"
    assert "exit code 3" in training.traceback()
    training.await_nobody()


def test_a_process_whose_first_one_is_killed_before_they_have_met_does_not_wait_for_it(training):
    training.command(*ARGUMENTS, *SILENT, "--trainer.devices", "2")
    first = psutil.Process(training.process.pid)

    def others():
        return [each for each in first.children() if "research.fit" in each.cmdline()]

    training.await_it(others)
    first.kill()
    assert training.end() == -signal.SIGKILL
    training.await_nobody()
    assert training.status() == "KILLED"
