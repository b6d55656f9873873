"""What comes again is recorded once: of a run killed twice at one place, or delivered in parts."""

import os
import signal
import time

import pytest

from research.tracking.run import Recorder
from tests.test_tracking_run import client_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where the spools of the test are."""
    monkeypatch.setenv("RESEARCH_SPOOL", str(tmp_path / "spool"))
    return tmp_path / "spool"


@pytest.fixture(scope="module")
def client(uri, recorder):
    recorder.start_run(uri, "first").finish()  # makes the store
    return client_of(uri)


def recorded(client, run_id, name):
    return [(row.step, row.value) for row in client.get_metric_history(run_id, name)]


def test_what_comes_again_twice_is_recorded_once(recorder, root, uri, client):
    """Killed behind its first validation, and again when it had come that far once more."""
    run = recorder.start_run(uri, "again and again")
    run_id = run.wait().run_id
    run.log_metrics({"train/loss": 3.0}, 1)
    behind = run.logged()
    assert behind == {"train/loss": (1, 1)}
    run.log_metrics({"val/loss": 2.5}, 1)
    run.finish("KILLED")
    for _ in range(2):
        # A run that goes on in the middle of an epoch saves anew, now, what it goes on from.
        run = recorder.resume_run(uri, run_id, time.time(), behind)
        behind = run.logged()
        assert behind == {"train/loss": (1, 1)}
        run.log_metrics({"val/loss": 2.5}, 1)
        run.finish("KILLED")
    run = recorder.resume_run(uri, run_id, time.time(), behind)
    for loss in (2.5, 2.4):  # validated a second time within the epoch
        run.log_metrics({"val/loss": loss}, 1)
    assert run.logged()["val/loss"] == (1, 2)
    run.finish()
    assert recorded(client, run_id, "val/loss") == [(1, 2.5), (1, 2.4)]


def test_what_a_checkpoint_says_was_logged_is_on_disk(recorder, root, uri):
    run = recorder.start_run(uri, "on disk")
    run.wait()
    for step in range(1, 6):
        run.log_metrics({"loss": step}, step)
        assert run.logged() == {"loss": (step, 1)}
        (lines,) = (path.read_text() for path in root.glob("*/records.jsonl"))
        assert f'["loss", {float(step)}, {step}, ' in lines
    run.finish()


def test_rest_of_a_resumed_run_is_delivered_where_its_process_had_got_to(uri, root, client):
    """Half of a second validation's epoch is delivered and noted, and then the recorder dies."""
    with Recorder.start() as recorder:
        run = recorder.start_run(uri, "cut off")
        run_id = run.wait().run_id
        run.log_metrics({"loss": 1.0}, 1)
        run.finish("KILLED")
        run = recorder.resume_run(uri, run_id)
        run.wait()
        run.log_metrics({"loss": 1.0}, 1)
        run.flush()
        os.kill(recorder.pid, signal.SIGKILL)
        run.log_metrics({"loss": 0.9}, 1)
        run.finish()
    assert recorded(client, run_id, "loss") == [(1, 1.0), (1, 0.9)]
