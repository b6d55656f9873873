"""An MLflow server that dies, stays away or hangs neither stops nor slows a training.

For real: `mlflow server` on this machine, killed, stopped and started again under the command.  The
network tells in a file how many steps it has made and waits at two of them for the test, so that an
outage spans the same steps on every machine: what is shown is that they are made.
"""

import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from research.tracking.runs import find_run, open_store
from research.tracking.spool import waiting
from tests.test_faults_signals import (
    ARGUMENTS,
    PATIENCE_SECONDS,
    PROJECT,
    Fit,
    assert_equal,
    environment_of,
    histories,
    write_program,
)
from tests.test_tracking_server import Server

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's of SQLAlchemy
]

BEGIN, END = 15, 41  # the steps between which the server is away, of 60: epochs 2 to 4 end there
HANGS_SECONDS = 10.0
PAUSING = '''
import os
import time
from pathlib import Path

import torch

from research.networks import CNN


class Pausing(CNN):
    """Notes when each training step begins; at some it waits for a file of the step's number."""

    steps = 0

    def forward(self, x):
        if torch.is_grad_enabled() and "PAUSE_AT" in os.environ:
            Pausing.steps += 1
            folder = Path(os.environ["PAUSE_IN"])
            with open(folder / "steps", "a") as file:
                file.write(f"{time.time()}\\n")
            deadline = time.monotonic() + 300
            while str(self.steps) in os.environ["PAUSE_AT"].split():
                if (folder / str(self.steps)).exists():
                    break
                assert time.monotonic() < deadline
                time.sleep(0.01)
        return super().forward(x)
'''
TRAINING = [*ARGUMENTS, "--trainer.max_epochs", "6", "--experiment", "outage"]
WITH_ALL = ["--log_pictures", "true", "--log_model", "true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the network, and of the spools."""
    folder = tmp_path_factory.mktemp("outage")
    (folder / "pausing.py").write_text(PAUSING)
    (folder / "bin").mkdir()
    write_program(folder / "bin" / "python", f'exec "{sys.executable}" "$@"')
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def unbroken(place, server):
    training = Training(place, server, "unbroken", *WITH_ALL)
    training.pass_gate(BEGIN)
    training.pass_gate(END)
    assert training.wait() == 0, training.said
    return find_run(server.uri, "unbroken")


@pytest.fixture
def train(unbroken, place, server):
    """Starts a training, which waits before its step BEGIN; the server is there."""
    started = []

    def train(name, *arguments):
        started.append(Training(place, server, name, *arguments))
        started[-1].await_gate(BEGIN)
        return started[-1]

    if server.process is None:
        server.start()
    yield train
    for training in started:
        training.kill()


class Training(Fit):
    """The command, recording through the server."""

    def __init__(self, place, server, name, *arguments):
        command = [sys.executable, "-m", "research.fit", *TRAINING, *arguments]
        command += ["--run_name", name, "--tracking_uri", server.uri]
        environment = environment_of(place) | {"PAUSE_AT": f"{BEGIN} {END}"}
        super().__init__(command, environment | spools_in(place), place / name)

    @property
    def steps(self):
        """When each step began, in seconds since 1970."""
        file = self.folder / "steps"
        return [float(line) for line in file.read_text().split()] if file.exists() else []

    def await_gate(self, step):
        self.until(lambda: len(self.steps) >= step)

    def pass_gate(self, step):
        self.await_gate(step)
        (self.folder / str(step)).touch()


def spools_in(place):
    return {"RESEARCH_SPOOL": str(place / "spool")}


def go_to_work(command, place, server):
    """The exit code and the words of one of our commands."""
    ran = subprocess.run(
        [sys.executable, "-m", *command, "--tracking_uri", server.uri],
        cwd=PROJECT,
        env=environment_of(place) | spools_in(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_SECONDS,
        text=True,
    )
    return ran.returncode, ran.stdout


def spools(place):
    return list((place / "spool").glob("*"))


# ---- what must be there --------------------------------------------------------------------------


def assert_all_there(unbroken, run):
    """All that the unbroken run has, once, in order, and the same."""
    assert_equal(unbroken, run)
    client = open_store(run.tracking_uri)
    for name in histories(run):
        rows = sorted(client.get_metric_history(run.run_id, name), key=lambda row: row.step)
        assert [row.timestamp for row in rows] == sorted(row.timestamp for row in rows), name
    one, other = (client.get_run(each.run_id) for each in (unbroken, run))
    assert settings_of(one) == settings_of(other)
    assert {each.dataset.digest for each in one.inputs.dataset_inputs} == {
        each.dataset.digest for each in other.inputs.dataset_inputs
    }
    for tag in ("checkpoint.best", "fingerprint.configuration", "fingerprint.data", "seed"):
        assert one.data.tags[tag] == other.data.tags[tag]


def settings_of(run):
    """All of them, but for what is recorded and under which name."""
    others = ("run_name", "log_pictures", "log_model")
    return {name: text for name, text in run.data.params.items() if name not in others}


def assert_same_files(unbroken, run):
    """Pictures, model, settings, checkpoints: under the same names, and none of them empty."""
    expected, found = (sizes(each) for each in (unbroken, run))
    assert expected.keys() == found.keys()
    assert any(path.endswith(".png") for path in found)
    assert all(size > 0 for size in found.values())
    one, other = (models(each) for each in (unbroken, run))
    assert one == other
    assert {name for name, _ in one} == {"best", "last"}


def sizes(run, folder=""):
    """The size of each file among the run's artifacts; what git says of this folder left out."""
    found = {}
    for item in open_store(run.tracking_uri).list_artifacts(run.run_id, folder):
        if item.is_dir:
            found |= sizes(run, item.path)
        elif not item.path.startswith("code/"):
            found[item.path] = item.file_size
    return found


def models(run):
    client = open_store(run.tracking_uri)
    found = client.search_logged_models([run.experiment_id])
    return sorted(
        (model.name, sorted((each.key, each.step, each.value) for each in model.metrics))
        for model in found
        if model.source_run_id == run.run_id
    )


def assert_steps_went_on(training):
    """Those while the server was away came as the others did: nothing waited for an answer."""
    gaps = [later - earlier for earlier, later in pairwise(training.steps)]
    before, during = sorted(gaps[1 : BEGIN - 1]), sorted(gaps[BEGIN : END - 1])
    assert len(during) == END - BEGIN - 1
    middle = during[len(during) // 2]
    assert middle < 10 * before[len(before) // 2] + 0.1
    assert max(during) < 10.0  # an answer is waited for 15 s


# ---- the tests -----------------------------------------------------------------------------------


def test_server_that_is_killed_and_comes_back_gets_all_of_it(train, unbroken, server, place):
    training = train("restarted", *WITH_ALL)
    server.stop()
    training.pass_gate(BEGIN)
    training.await_gate(END)
    training.await_words("records wait and are sent later")
    server.start()
    training.pass_gate(END)
    assert training.wait() == 0, training.said
    assert_steps_went_on(training)
    assert "records of this run wait" not in training.said
    run = find_run(server.uri, "restarted")
    assert_all_there(unbroken, run)
    assert_same_files(unbroken, run)
    assert spools(place) == []


def test_server_that_stays_away_gets_all_of_it_by_one_command(train, unbroken, server, place):
    training = train("away", *WITH_ALL)
    server.stop()
    training.pass_gate(BEGIN)
    training.pass_gate(END)
    assert training.wait() == 0, training.said
    assert_steps_went_on(training)
    assert re.search(r"^  test +\d", training.said, re.M)
    assert re.search(
        r"^record: +\d+ records of this run wait in .*research\.repair", training.said, re.M
    )
    assert "Traceback" not in training.said

    code, said = go_to_work(["research.repair"], place, server)
    assert code == 1, said
    assert "still waits" in said
    server.start()
    code, said = go_to_work(["research.repair"], place, server)
    assert code == 0, said
    run = find_run(server.uri, "away")
    assert_all_there(unbroken, run)
    assert_same_files(unbroken, run)
    assert spools(place) == []


def test_training_killed_in_an_outage_is_delivered_and_goes_on(train, unbroken, server, place):
    training = train("killed")
    server.stop()
    training.pass_gate(BEGIN)
    training.await_gate(END)
    training.process.kill()
    training.wait()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not waiting(place / "spool"):  # the recorder tries for a while, and leaves it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.start()
    code, said = go_to_work(["research.repair"], place, server)
    assert code == 0, said
    run = find_run(server.uri, "killed")
    assert run.status == "KILLED"
    validated = [step for step, _ in histories(run)["val/loss"]]
    assert validated[:3] == [1, 2, 3]  # and the 4th, if it was 0.1 s old

    code, said = go_to_work(["research.fit", "--resume", run.run_id, "--trust"], place, server)
    assert code == 0, said
    assert f"step {END - 1}, 4 epochs ended" in said
    assert_all_there(unbroken, find_run(server.uri, "killed"))
    assert spools(place) == []


def test_server_that_hangs_is_not_waited_for(train, unbroken, server, place):
    training = train("hung")
    began = time.monotonic()
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        training.pass_gate(BEGIN)
        training.await_gate(END)
        time.sleep(max(0.0, began + HANGS_SECONDS - time.monotonic()))
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)
    training.pass_gate(END)
    assert training.wait() == 0, training.said
    assert_steps_went_on(training)
    assert_all_there(unbroken, find_run(server.uri, "hung"))
    assert spools(place) == []
