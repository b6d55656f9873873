"""Runs recorded through a real MLflow server on loopback, even when it goes away."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings

import pytest

from research.tracking.redelivery import deliver
from research.tracking.spool import waiting
from research.tracking.store import TrackingError

pytestmark = pytest.mark.slow


def client_of(uri):
    """MLflow's own client; imported late, for it takes a second or more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own making
        from mlflow.tracking import MlflowClient

        return MlflowClient(uri)


class Server:
    """`mlflow server` with its store in a folder, to be stopped and started again."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process = None

    def start(self):
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "server.log", "ab") as log:
            command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=self.folder,
                env=os.environ | quiet,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
                time.sleep(0.2)

    def stop(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


def test_files_are_sent_to_a_server_that_keeps_them(server, recorder, tmp_path):
    run = recorder.start_run(server.uri, "remote", params={"lr": 0.1})
    info = run.wait()
    assert info.artifact_dir is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    run.log_artifact(tmp_path / "checkpoints")
    run.log_artifact(tmp_path / "checkpoints" / "best.ckpt", "again")
    run.log_text("lr: 0.1", "config.yaml")
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish()
    client = client_of(server.uri)
    assert client.get_run(info.run_id).info.status == "FINISHED"
    assert client.get_run(info.run_id).data.metrics == {"loss": 1.0}
    paths = {item.path for item in client.list_artifacts(info.run_id)}
    assert paths - {"code"} == {"checkpoints", "again", "config.yaml", "environment"}
    assert [item.path for item in client.list_artifacts(info.run_id, "checkpoints")] == [
        "checkpoints/best.ckpt"
    ]


def test_run_of_a_server_is_opened_again(server, recorder):
    with recorder.start_run(server.uri, "again") as run:
        info = run.wait()
    client = client_of(server.uri)
    before = client.get_run(info.run_id)
    with recorder.open_run(server.uri, info.run_id) as run:
        assert run.wait() == info
        run.log_text("more", "more.txt")
        run.log_metrics({"loss": 1.0}, step=1)
    after = client.get_run(info.run_id)
    assert vars(after.info) == vars(before.info)
    assert after.data.metrics == {"loss": 1.0}
    with pytest.raises(TrackingError, match='There is no run "0123"'):
        recorder.open_run(server.uri, "0123").wait()


def test_outage_delays_the_record_and_loses_nothing(server, recorder):
    run = recorder.start_run(server.uri, "outage", log_system_metrics=True)
    run_id = run.wait().run_id
    for step in range(300):
        if step == 100:
            server.stop()
        if step == 200:
            assert not run.flush(timeout=3)
            server.start()
        run.log_metrics({"loss": step}, step)
        time.sleep(0.01)
    run.finish()
    client = client_of(server.uri)
    history = client.get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(n, n) for n in range(300)]
    samples = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert [sample.step for sample in samples] == list(range(len(samples)))
    assert samples
    assert client.get_run(run_id).info.status == "FINISHED"


def test_what_an_outage_keeps_back_in_the_end_waits_on_disk(
    server, recorder, monkeypatch, tmp_path
):
    monkeypatch.setenv("RESEARCH_SPOOL", str(tmp_path / "spool"))
    run = recorder.start_run(server.uri, "swallowed")
    client, run_id = client_of(server.uri), run.wait().run_id
    while "environment" not in {item.path for item in client.list_artifacts(run_id)}:
        time.sleep(0.1)
    run.flush()
    server.stop()
    run.log_metrics({"loss": 1.0, "accuracy": 0.5}, step=1)
    run.finish(timeout=5)
    (spool,) = waiting(tmp_path / "spool")
    assert run.waiting == (
        f"3 records of this run wait in {spool.folder}: No MLflow server answers at {server.uri}. "
        "Deliver them when the server is back: python -m research.repair"
    )
    server.start()
    other = recorder.start_run(server.uri, "swallowed")
    other.finish()
    assert other.waiting is None
    assert client_of(server.uri).get_run(other.wait().run_id).info.status == "FINISHED"
    assert deliver(spool) is None
    stored = client_of(server.uri).get_run(run_id)
    assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"loss": 1.0, "accuracy": 0.5})
    assert not list((tmp_path / "spool").iterdir())
