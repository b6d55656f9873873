"""Runs recorded for real, through the companion process into SQLite, and read back by MLflow."""

import collections
import contextlib
import math
import os
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from research.tracking import companion
from research.tracking.run import Recorder
from research.tracking.store import TrackingError, sqlite_path, sqlite_uri
from research.tracking.troubles import explain

PROJECT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy


@pytest.fixture
def stored(uri):
    """Reads a run back, by MLflow's own client."""

    def stored(run):
        return client_of(uri).get_run(run.wait().run_id)

    return stored


def client_of(uri):
    """MLflow's own client; imported late, for it takes a second or more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own making
        from mlflow.tracking import MlflowClient

        return MlflowClient(uri)


def copy_of_store(uri, database):
    """The address of a copy; quicker than a fresh store."""
    with contextlib.closing(sqlite3.connect(sqlite_path(uri))) as connection:
        connection.execute("VACUUM INTO ?", [str(database)])
    return sqlite_uri(database)


def steps_and_values(uri, run, name):
    history = client_of(uri).get_metric_history(run.wait().run_id, name)
    return [(metric.step, metric.value) for metric in history]


def eventually(condition, seconds=30.0):
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


# ---- what comes back ---------------------------------------------------------------------------


def test_everything_logged_comes_back_from_a_fresh_store(recorder, tmp_path, monkeypatch):
    folder = tmp_path / "100% ünusual? #1"
    uri = sqlite_uri(folder / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    before = time.time()
    run = recorder.start_run(
        uri,
        "CIFAR10",
        "first try",
        params={"optimizer": "SGD", "optimizer.lr": 0.01, "nesterov": False, "limit": None, "n": 0},
        tags={"seed": "0", "host": "overridden"},
    )
    info = run.wait()
    run.log_metrics({"train/loss": 2.5, "val/accuracy": 0.25}, step=1)
    run.log_metrics({"train/loss": 1.5}, step=2, timestamp=1234.5)
    run.log_params({"late": "yes"})
    run.set_tags({"device": "cpu"})
    run.log_text("optimizer: SGD\n", "config.yaml")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    run.log_artifact("notes/a.txt", "sub/folder")
    run.log_artifact(tmp_path / "notes")
    run.finish()

    client = client_of(uri)
    stored = client.get_run(info.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == info.run_name == "first try"
    assert before - 1 < stored.info.start_time / 1000 <= stored.info.end_time / 1000 < time.time()
    assert stored.data.params == {
        "optimizer": "SGD",
        "optimizer.lr": "0.01",
        "nesterov": "False",
        "limit": "None",
        "n": "0",
        "late": "yes",
    }
    assert sorted(steps_and_values(uri, run, "train/loss")) == [(1, 2.5), (2, 1.5)]
    assert stored.data.metrics["val/accuracy"] == 0.25
    assert client.get_metric_history(info.run_id, "train/loss")[0].timestamp == 1234500
    tags = stored.data.tags
    assert (tags["seed"], tags["device"], tags["host"]) == ("0", "cpu", "overridden")
    assert tags["python"] == sys.version.split()[0]
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["command"] == shlex.join(["python", *sys.orig_argv[1:]])
    files = {"config.yaml", "sub/folder/a.txt", "notes/a.txt"}
    provenance = {"code", "environment"}  # tests/test_tracking_records.py
    assert info.artifact_dir == folder / "mlruns" / info.experiment_id / info.run_id / "artifacts"
    found = {
        path.relative_to(info.artifact_dir).as_posix()
        for path in info.artifact_dir.rglob("*")
        if path.is_file() and path.relative_to(info.artifact_dir).parts[0] not in provenance
    }
    assert found == files
    assert (info.artifact_dir / "config.yaml").read_text() == "optimizer: SGD\n"
    listed = {item.path for item in client.list_artifacts(info.run_id)}
    assert listed - provenance == {"config.yaml", "sub", "notes"}
    assert not (tmp_path / "mlruns").exists()  # nothing in the current folder


def test_run_without_a_name_gets_one_from_mlflow(start, stored):
    run = start()
    name = run.wait().run_name
    run.finish()
    assert name
    assert stored(run).info.run_name == name


def test_thousands_of_metrics_arrive_once_and_in_order(start, uri):
    run = start()
    for step in range(1500):
        run.log_metrics({"train/loss": 1 / (step + 1), "train/accuracy": step}, step)
    run.finish()
    expected = [(step, 1 / (step + 1)) for step in range(1500)]
    assert steps_and_values(uri, run, "train/loss") == expected
    assert len(steps_and_values(uri, run, "train/accuracy")) == 1500


def test_metrics_arrive_while_the_run_goes_on(start, uri):
    run = start()
    run.wait()
    run.log_metrics({"loss": 1.0}, step=1)
    assert eventually(lambda: steps_and_values(uri, run, "loss") == [(1, 1.0)], 10)
    run.finish()


def test_numbers_that_are_none_are_kept_as_mlflow_keeps_them(start, uri):
    run = start()
    run.log_metrics({"nan": math.nan, "inf": math.inf, "minus": -math.inf}, step=0)
    run.finish()
    assert math.isnan(steps_and_values(uri, run, "nan")[0][1])
    assert steps_and_values(uri, run, "inf") == [(0, sys.float_info.max)]
    assert steps_and_values(uri, run, "minus") == [(0, -sys.float_info.max)]


def test_long_values_are_cut_where_all_can_see_it(start, stored):
    run = start(params={"long": "x" * 7000, "fits": "y" * 6000}, tags={"tag": "z" * 9000})
    run.finish()
    data = stored(run).data
    assert data.params["long"].endswith("xxx… (7000 characters; whole in config.yaml)")
    assert len(data.params["long"]) == 6000
    assert data.params["fits"] == "y" * 6000
    assert data.tags["tag"].endswith("zzz… (9000 characters)")


def test_more_parameters_and_tags_than_mlflow_takes_at_once(start, stored):
    many = {f"group.{number}": number for number in range(250)}
    run = start(params=many, tags={f"tag.{number}": "t" for number in range(150)})
    run.finish()
    assert stored(run).data.params == {name: str(value) for name, value in many.items()}
    assert sum(name.startswith("tag.") for name in stored(run).data.tags) == 150


def test_files_may_go_once_they_are_flushed(start, tmp_path):
    run = start()
    file = tmp_path / "picture.png"
    file.write_bytes(b"picture")
    run.log_artifact(file)
    run.flush()
    file.unlink()
    run.finish()
    assert (run.wait().artifact_dir / "picture.png").read_bytes() == b"picture"


def test_what_lies_in_the_run_already_stays_as_it_is(start):
    run = start()
    folder = run.wait().artifact_dir / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(b"weights")
    inode = (folder / "last.ckpt").stat().st_ino
    run.log_artifact(folder / "last.ckpt", "checkpoints")
    run.log_artifact(folder)
    run.finish()
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert (folder / "last.ckpt").stat().st_ino == inode


def test_one_recorder_serves_runs_and_stores_one_after_another(recorder, start, uri, tmp_path):
    first = start()
    first.wait()
    other = recorder.start_run(copy_of_store(uri, tmp_path / "other.db"), "elsewhere")
    first.log_metrics({"loss": 1.0}, 1)
    other.log_metrics({"loss": 2.0}, 1)
    other.finish()
    first.finish("FAILED")
    second = start()
    second.log_metrics({"loss": 3.0}, 1)
    second.finish()
    assert first.wait().experiment_id == second.wait().experiment_id
    assert first.wait().run_id != second.wait().run_id
    assert steps_and_values(uri, first, "loss") == [(1, 1.0)]
    assert steps_and_values(other.tracking_uri, other, "loss") == [(1, 2.0)]
    assert steps_and_values(uri, second, "loss") == [(1, 3.0)]
    assert other.wait().artifact_dir.is_relative_to(tmp_path / "mlruns")


# ---- status --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (SystemExit(0), "FINISHED"),
        (RuntimeError("boom"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
    ],
)
def test_status_tells_how_the_block_ended(start, stored, error, status):
    ending = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with ending, start() as run:
        if error is not None:
            raise error
    assert stored(run).info.status == status


def test_finishing_twice_keeps_the_first_status(start, stored):
    run = start()
    run.finish("FAILED")
    run.finish("FINISHED")
    assert stored(run).info.status == "FAILED"


def test_nothing_can_be_logged_to_a_finished_run(start):
    run = start()
    run.finish()
    with pytest.raises(TrackingError, match="finished"):
        run.log_metrics({"loss": 1.0}, step=1)


def test_signals_for_the_group_do_not_end_the_recorder(recorder, start, stored):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(recorder.pid, number)
    run = start()
    run.finish()
    assert stored(run).info.status == "FINISHED"


TRAINING_THAT_IS_KILLED = """
import os, signal, sys, time
from research.tracking.run import Recorder

recorder = Recorder.start()
run = recorder.start_run(sys.argv[1], "killed")
print(run.wait().run_id, recorder.pid, flush=True)
if sys.argv[2] == "with a worker" and os.fork() == 0:
    os.close(1)
    time.sleep(60)  # holds the pipe to the recorder open
    os._exit(0)
run.log_metrics({"loss": 1.0}, step=1)
time.sleep(1.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("workers", ["alone", "with a worker"])
def test_killed_training_leaves_a_killed_run_and_no_process(uri, workers):
    command = [sys.executable, "-c", TRAINING_THAT_IS_KILLED, uri, workers]
    training = subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, _ = training.communicate(timeout=60)
        assert training.returncode == -signal.SIGKILL
        run_id, pid = out.split()
        client = client_of(uri)
        assert eventually(lambda: client.get_run(run_id).info.status == "KILLED", 10)
        assert client.get_run(run_id).data.metrics == {"loss": 1.0}
        assert eventually(lambda: not is_alive(int(pid)), 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(training.pid, signal.SIGKILL)  # the worker


def is_alive(pid):
    """Whether the process does anything; in a container nobody may collect it when it ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.faults
def test_six_first_starts_at_once_share_one_experiment(tmp_path):
    uri = sqlite_uri(tmp_path / "mlflow.db")
    (tmp_path / "mlflow.db.new").write_text("left by a first start that was killed")
    recorders = [Recorder.start() for _ in range(6)]
    try:
        runs = [recorder.start_run(uri, "together") for recorder in recorders]
        infos = [run.wait() for run in runs]
    finally:
        for recorder in recorders:
            recorder.close()
    client = client_of(uri)
    names = sorted(experiment.name for experiment in client.search_experiments())
    assert names == ["Default", "together"]
    assert len({info.experiment_id for info in infos}) == 1
    stored = client.search_runs([infos[0].experiment_id])
    assert {run.info.run_id for run in stored} == {info.run_id for info in infos}
    assert len(stored) == 6
    # Closed without being finished.
    assert {run.info.status for run in stored} == {"KILLED"}
    with pytest.raises(TrackingError, match="closed"):
        runs[0].finish()


# ---- never in the way ----------------------------------------------------------------------------


def test_logging_does_not_wait_for_a_recorder_that_hangs(recorder, start, uri):
    run = start()
    run.wait()
    os.kill(recorder.pid, signal.SIGSTOP)
    try:
        begin = time.perf_counter()
        for step in range(10_000):
            run.log_metrics({"loss": step}, step)
        run.log_text("x" * 1_000_000, "fills the pipe.txt")
        run.set_tags({"a": "b"})
        seconds = time.perf_counter() - begin
        assert not run.flush(timeout=0.3)
    finally:
        os.kill(recorder.pid, signal.SIGCONT)
    run.finish()
    assert seconds < 2.0  # 0.02 s on an idle machine
    assert len(steps_and_values(uri, run, "loss")) == 10_000


def test_the_training_process_imports_nothing_heavy():
    code = (
        "import sys, research.tracking.run, research.tracking.store; "
        "print([name for name in ('mlflow', 'torch', 'lightning', 'numpy', 'sqlalchemy', "
        "'filelock') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


def test_recorder_that_was_never_used_is_gone_at_once():
    recorder = Recorder.start()
    begin = time.perf_counter()
    recorder.close()
    assert time.perf_counter() - begin < 2.0
    assert not is_alive(recorder.pid)
    with pytest.raises(TrackingError, match="closed"):
        recorder.start_run("sqlite:///unused.db", "late").wait()


def test_close_returns_although_the_companion_ends_in_the_middle_of_it():
    recorder = Recorder.start()

    class Outbox(collections.deque):
        def append(self, item):
            super().append(item)
            if item is None and threading.current_thread() is threading.main_thread():
                recorder._reader.join(10)  # it throws away what nobody takes any more

    assert eventually(lambda: not recorder._outbox, 10)
    recorder._outbox = Outbox()
    begin = time.perf_counter()
    recorder.close()
    assert time.perf_counter() - begin < 2.0


# ---- what goes wrong -----------------------------------------------------------------------------


def test_server_that_is_not_there_is_told_soon_and_costs_nobody_else(recorder, start, stored):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    begin = time.monotonic()
    lost = recorder.start_run(f"http://127.0.0.1:{port}", "nowhere")
    lost.log_metrics({"loss": 1.0}, step=1)
    with pytest.raises(TrackingError, match=f"No MLflow server answers at .*{port}"):
        lost.wait()
    assert time.monotonic() - begin < 20
    lost.finish()  # its loss was told
    run = start()
    run.finish()
    assert stored(run).info.status == "FINISHED"


def test_loss_of_a_run_nobody_waited_for_is_told_at_the_end(recorder, tmp_path):
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    run = recorder.start_run(sqlite_uri(tmp_path / "mlflow.db"), "x")
    with pytest.raises(TrackingError, match="is not an SQLite database"):
        run.finish()


def test_exception_is_not_hidden_by_what_could_not_be_recorded(recorder, tmp_path):
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    run = recorder.start_run(sqlite_uri(tmp_path / "mlflow.db"), "x")
    with pytest.raises(RuntimeError, match="boom") as error, run:
        raise RuntimeError("boom")
    assert "is not an SQLite database" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("ffffffffffff", "by a newer MLflow.*Update it"),
        ("451aebb31d03", "by an older MLflow.*mlflow db upgrade sqlite:///"),
    ],
)
def test_database_of_another_mlflow_is_told(recorder, start, uri, tmp_path, revision, words):
    start().finish()
    copy = copy_of_store(uri, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(sqlite_path(copy))) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])
    with pytest.raises(TrackingError, match=words):
        recorder.start_run(copy, "x").wait()


def test_experiments_that_can_take_no_run_are_refused(recorder, start, uri):
    start().finish()
    client = client_of(uri)
    client.create_experiment("from the page", artifact_location="mlflow-artifacts:/7")
    client.delete_experiment(client.create_experiment("deleted"))
    with pytest.raises(TrackingError, match=r"made in the MLflow page.*another --experiment"):
        recorder.start_run(uri, "from the page").wait()
    with pytest.raises(TrackingError, match=r"was deleted.*mlflow experiments restore"):
        recorder.start_run(uri, "deleted").wait()
    with pytest.raises(ValueError, match="experiment is empty"):
        recorder.start_run(uri, " ")


def test_changed_parameter_is_told_and_costs_no_other(start, stored):
    run = start(params={"lr": 0.1})
    run.log_params({"lr": 0.2, "momentum": 0.9})
    with pytest.raises(TrackingError, match=r"parameter lr refused: .*Changing param"):
        run.finish()
    assert stored(run).data.params == {"lr": "0.1", "momentum": "0.9"}
    assert stored(run).info.status == "FINISHED"


def test_vanished_file_is_told(start, tmp_path):
    run = start()
    run.wait()
    with pytest.raises(ValueError, match="is not there"):
        run.log_artifact(tmp_path / "nothing.png")
    run.finish()


@pytest.mark.parametrize("name", ["", "a,b", "loss%", "/loss", "a//b", "../a", ".", "x" * 251])
def test_names_that_mlflow_refuses_are_refused_at_the_call(start, name):
    with pytest.raises(ValueError, match="parameter name"):
        start(params={name: 1})
    run = start()
    with pytest.raises(ValueError, match="metric name"):
        run.log_metrics({name: 1.0}, step=1)
    with pytest.raises(ValueError, match="tag name"):
        run.set_tags({name: "x"})
    run.finish()


@pytest.mark.parametrize("path", ["", "/etc/x", "../x", "a/../../x"])
def test_artifacts_stay_inside_the_run(start, path):
    run = start()
    with pytest.raises(ValueError, match="artifact path"):
        run.log_text("text", path)
    run.finish()


def test_death_of_the_recorder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(companion, "RESTARTS", 0)
    with Recorder.start() as recorder:
        run = recorder.start_run(sqlite_uri(tmp_path / "mlflow.db"), "x")
        os.kill(recorder.pid, signal.SIGKILL)
        with pytest.raises(TrackingError, match=r"recorder process ended \(exit code -9\)"):
            run.wait()
        run.log_metrics({"loss": 1.0}, step=1)
        with pytest.raises(TrackingError, match="recorder process ended"):
            recorder.start_run(sqlite_uri(tmp_path / "mlflow.db"), "x").wait()


@pytest.mark.parametrize(
    ("error", "uri", "words"),
    [
        (ModuleNotFoundError("no", name="mlflow"), "sqlite:////r/m.db", "pip install mlflow"),
        (ModuleNotFoundError("no", name="psycopg2"), "postgresql://h/d", "package psycopg2"),
        (PermissionError(13, "Permission denied"), "sqlite:////r/m.db", "must be writable"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "sqlite:////r/m.db",
         "must be writable"),
        (sqlite3.OperationalError("unable to open database file"), "sqlite:////r/m.db",
         "must be writable"),
        (sqlite3.OperationalError("database or disk is full"), "sqlite:////r/m.db", "is full"),
        (sqlite3.OperationalError("database is locked"), "sqlite:////r/m.db", "another process"),
        (RuntimeError("API request failed with error code 401"), "https://u:secret@h", "refuses"),
        (RuntimeError("first line\nat https://u:secret@h"), "https://u:secret@h", "first line"),
    ],
)  # fmt: skip
def test_causes_are_told_in_plain_words_and_without_passwords(error, uri, words):
    told = explain(error, uri)
    assert words in told
    assert "secret" not in told
    assert "\n" not in told
