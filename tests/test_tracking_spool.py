"""Nothing is lost: records on disk outlive full disks, killed processes, stores that are away."""

import contextlib
import errno
import http.client
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from research.tracking import companion, spool
from research.tracking.beginning import About
from research.tracking.delivery import OpenRun
from research.tracking.recorder import Recording
from research.tracking.redelivery import deliver
from research.tracking.run import DatasetInput, Recorder
from research.tracking.spool import Spool, new_spool, spool_root, waiting
from research.tracking.store import TrackingError, project_root, sqlite_uri
from tests.test_tracking_run import client_of, eventually, is_alive, steps_and_values
from tests.test_tracking_server import Server

PROJECT = Path(__file__).resolve().parents[1]

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


def line(**message):
    return json.dumps(message).encode() + b"\n"


def records(spool, begin=0):
    return [message for message, _ in spool.read(begin)]


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def content(client, run_id):
    """All that the store has of a run, but for the signs of life."""
    run = client.get_run(run_id)
    histories = {
        name: [(row.step, row.timestamp, row.value) for row in rows]
        for name in run.data.metrics
        for rows in [client.get_metric_history(run_id, name)]
    }
    models = [
        (model.name, model.status, sorted((m.key, m.step, m.value) for m in model.metrics))
        for model in client.search_logged_models([run.info.experiment_id])
        if model.source_run_id == run_id
    ]
    inputs = [(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs]
    tags = {name: tag for name, tag in run.data.tags.items() if not name.startswith("heartbeat.")}
    return run.info.status, histories, run.data.params, tags, inputs, models


# ---- the folder itself ---------------------------------------------------------------------------


def test_spools_lie_beside_the_store(monkeypatch, tmp_path):
    monkeypatch.delenv("RESEARCH_SPOOL")
    beside = spool_root(sqlite_uri(tmp_path / "a b" / "mlflow.db"))
    assert beside == tmp_path / "a b" / "mlruns" / ".spool"
    assert spool_root("http://127.0.0.1:1") == project_root() / "mlruns" / ".spool"
    monkeypatch.setenv("RESEARCH_SPOOL", str(tmp_path / "elsewhere"))
    assert spool_root("http://127.0.0.1:1") == tmp_path / "elsewhere"


def test_spool_that_is_being_removed_is_nobody_elses(root, monkeypatch):
    mine = new_spool("http://h", 1)
    mine.append(line(op="tags"))
    mine.close()
    assert mine.claim()
    found = []
    remove = shutil.rmtree

    def look_and_remove(folder, **rest):
        monkeypatch.setattr(spool.shutil, "rmtree", remove)
        (folder / "lock").unlink()  # the first to go, as the file system may have it
        other = Spool(folder)
        found.append((waiting(root), other.is_abandoned(), other.claim()))
        remove(folder, **rest)

    monkeypatch.setattr(spool.shutil, "rmtree", look_and_remove)
    mine.remove()
    assert found == [([], False, False)]
    assert not mine.folder.exists()


def test_who_looks_whether_a_lock_is_free_keeps_nobody_from_it(root):
    """To look means to hold it for a moment."""
    mine = new_spool("http://h", 1)
    mine.append(line(op="tags"))
    mine.close()
    done = threading.Event()

    def look():
        other = Spool(mine.folder)
        while not done.is_set():
            other.is_abandoned()

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(200):
            assert mine.claim()
            mine.release()
    finally:
        done.set()
        for looker in lookers:
            looker.join()


def test_what_is_appended_is_read_but_for_a_torn_last_line(root):
    mine = new_spool("http://h", 1)
    mine.append(line(op="metrics", n=1) + line(op="tags", n=2))
    end = mine.append(line(op="tags", n=3))
    with open(mine.folder / spool.RECORDS, "ab") as file:
        file.write(b"not JSON\n" + line(op="tags", n=4) + b'{"op": "tags", "n"')
    assert [message["n"] for message in records(mine)] == [1, 2, 3, 4]
    assert [message["n"] for message in records(mine, end)] == [4]
    mode = mine.folder.stat().st_mode | (mine.folder / spool.RECORDS).stat().st_mode
    assert mode & 0o077 == 0  # addresses may hold passwords
    mine.close()


def test_full_disk_leaves_no_half_of_a_line(root, monkeypatch):
    mine = new_spool("http://h", 1)
    mine.append(line(n=1))
    write = os.write

    def full(descriptor, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:10])

    monkeypatch.setattr(spool.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        mine.append(line(n=2, text="x" * 100))
    monkeypatch.undo()
    assert (mine.folder / spool.RECORDS).read_bytes() == line(n=1)
    mine.close()


def test_only_what_nobody_writes_or_delivers_waits(root):
    assert waiting(root) == []
    mine = new_spool("http://h", 1)
    mine.append(line(op="start"))
    assert mine.is_written()
    assert waiting(root) == []
    worker = os.fork()  # as data loaders do; it must not keep the lock
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    try:
        mine.close()
        assert eventually(lambda: [each.folder for each in waiting(root)] == [mine.folder])
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    (found,) = waiting(root)
    assert found.claim()
    assert not mine.claim()
    assert waiting(root) == []
    assert "Another process" in deliver(mine)
    found.release()
    found.remove()
    assert waiting(root) == []
    assert not mine.claim()
    assert deliver(mine) is None


def test_how_far_delivery_is_survives_torn_files(root):
    mine = new_spool("http://h", 1)
    mine.append(line(op="metrics", rows=[1, 2, 3]))
    mine.close()
    assert mine.delivered == (0, 0)
    assert mine.about == {}
    assert mine.count() == 3
    mine.delivered = (mine.size(), 7)
    mine.about = {"run_id": "x"}
    assert (mine.delivered, mine.about, mine.count()) == ((mine.size(), 7), {"run_id": "x"}, 0)
    (mine.folder / "delivered").write_text("")
    (mine.folder / "run.json").write_text('{"run')
    assert (mine.delivered, mine.about) == ((0, 0), {})


# ---- while a run is recorded ---------------------------------------------------------------------


def test_nothing_is_left_on_disk_of_a_run_that_is_recorded(recorder, root, uri, client):
    run = recorder.start_run(uri, "clean")
    run.wait()
    run.log_metrics({"loss": 1.0}, 1)
    picture = run.scratch / "picture.png"
    picture.write_bytes(b"picture")
    run.log_artifact(picture, "pictures")
    assert run.flush()
    assert eventually(lambda: Spool(picture.parent.parent).count() == 0)
    run.finish()
    assert run.waiting is None
    assert list(root.iterdir()) == []
    assert (run.wait().artifact_dir / "pictures" / "picture.png").read_bytes() == b"picture"
    with contextlib.suppress(TrackingError):
        recorder.start_run(sqlite_uri(root), "is a folder").wait()
    assert eventually(lambda: list(root.iterdir()) == [])


@pytest.mark.parametrize("fault", ["no folder", "full disk"])
def test_spool_that_cannot_be_written_stops_nothing(root, uri, client, monkeypatch, caplog, fault):
    if fault == "no folder":
        root.write_text("a file")
    with Recorder.start() as recorder:
        run = recorder.start_run(uri, "unwritable")
        run.wait()
        run.log_metrics({"loss": 0.0}, 0)
        if fault == "full disk":
            assert run.flush()

            def full(self, lines):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(Spool, "append", full)
        for step in range(1, 1000):
            run.log_metrics({"loss": step}, step)
        (run.scratch / "a.txt").write_text("a")
        run.log_artifact(run.scratch / "a.txt")
        run.log_text("x" * 300_000, "more than the pipe holds.txt")
        assert run.flush()
        other = recorder.start_run(uri, "unwritable")
        run.finish()
        other.finish()
    assert run.waiting is None
    assert steps_and_values(uri, run, "loss") == [(step, step) for step in range(1000)]
    assert (run.wait().artifact_dir / "a.txt").read_text() == "a"
    assert client.get_run(run.wait().run_id).info.status == "FINISHED"
    told = [record for record in caplog.records if "cannot be written" in record.message]
    assert len(told) == 1
    assert not root.is_dir() or list(root.iterdir()) == []


@pytest.mark.faults
def test_recorder_that_is_killed_is_replaced_and_nothing_is_lost(root, uri, client, caplog):
    caplog.set_level(logging.WARNING)
    with Recorder.start() as recorder:
        run = recorder.start_run(uri, "killed recorder", params={"lr": 0.1})
        info = run.wait()
        for step in range(900):
            run.log_metrics({"loss": step, "accuracy": -step}, step)
            if step % 400 == 200:
                time.sleep(1.5)  # in the middle of a batch, or between two
                os.kill(recorder.pid, signal.SIGKILL)
            if step == 300:
                run.log_text("text", "in between.txt")
                run.set_tags({"of": "step 300"})
            time.sleep(0.001)
        assert run.flush()
        assert run.wait() == info
        run.finish()
        second = recorder.start_run(uri, "killed recorder")
        second.finish()
    expected = [(step, step) for step in range(900)]
    assert steps_and_values(uri, run, "loss") == expected
    assert steps_and_values(uri, run, "accuracy") == [(step, -step) for step in range(900)]
    stored = client.get_run(info.run_id)
    assert (stored.info.status, stored.data.tags["of"]) == ("FINISHED", "step 300")
    assert stored.data.params == {"lr": "0.1"}
    assert (info.artifact_dir / "in between.txt").read_text() == "text"
    assert len(client.search_runs([info.experiment_id])) == 2
    assert sum("A new one goes on" in record.message for record in caplog.records) == 2
    assert list(root.iterdir()) == []


def test_recorder_that_is_killed_before_it_started_the_run_is_replaced(root, uri, client):
    with Recorder.start() as recorder:
        run = recorder.start_run(uri, "killed early")
        run.log_metrics({"loss": 1.0}, 1)
        time.sleep(0.3)
        os.kill(recorder.pid, signal.SIGKILL)
        info = run.wait()
        run.finish()
    assert steps_and_values(uri, run, "loss") == [(1, 1.0)]
    assert len(client.search_runs([info.experiment_id])) == 1


def test_recorder_that_always_dies_leaves_all_on_disk(root, uri, client, monkeypatch, caplog):
    monkeypatch.setattr(companion, "RESTARTS", 1)
    with Recorder.start() as recorder:
        run = recorder.start_run(uri, "dies always")
        run_id = run.wait().run_id
        (run.scratch / "a.txt").write_text("a")
        first = recorder.pid
        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: recorder.pid != first)
        run.log_metrics({"loss": 1.0}, 1)
        os.kill(recorder.pid, signal.SIGKILL)
        assert eventually(lambda: recorder._end is not None)
        run.log_metrics({"loss": 2.0}, 2)
        run.log_artifact(run.scratch / "a.txt")
        assert not run.flush()
        begin = time.monotonic()
        run.finish()
        assert time.monotonic() - begin < 5  # there is nobody to wait for
        assert "The recorder process ended (exit code -9)" in run.waiting
        assert "python -m research.repair" in run.waiting
        assert run.waiting in caplog.text
        with pytest.raises(TrackingError, match="recorder process ended"):
            recorder.start_run(uri, "late").wait()
    assert client.get_run(run_id).info.status == "RUNNING"
    (left,) = waiting(root)
    assert deliver(left) is None
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert [row.value for row in client.get_metric_history(run_id, "loss")] == [1.0, 2.0]
    assert (run.wait().artifact_dir / "a.txt").read_text() == "a"
    assert list(root.iterdir()) == []


def test_traceback_of_an_exception_is_recorded(recorder, root, uri, client):
    def fails(secret):
        raise RuntimeError(f"no answer from https://me:{secret}@example.org")

    run = recorder.start_run(uri, "traceback")
    with pytest.raises(RuntimeError), run:
        fails("password")
    text = (run.wait().artifact_dir / "traceback.txt").read_text()
    assert "in fails" in text
    assert "https://me:***@example.org" in text
    assert "password" not in text.splitlines()[-1]
    assert client.get_run(run.wait().run_id).info.status == "FAILED"
    interrupted = recorder.start_run(uri, "traceback")
    with pytest.raises(KeyboardInterrupt), interrupted:
        raise KeyboardInterrupt
    assert not (interrupted.wait().artifact_dir / "traceback.txt").exists()


def test_run_names_the_process_that_records_it(recorder, root, uri, client):
    with recorder.start_run(uri, "heartbeat") as run:
        tags = client.get_run(run.wait().run_id).data.tags
    assert tags["heartbeat.pid"] == str(os.getpid())
    assert tags["heartbeat.time"]


def test_signs_of_life_are_tried_once_and_only_for_what_is_recorded_here():
    class Store:
        def __init__(self):
            self.tags = []

        def set_tag(self, run_id, name, value):
            self.tags.append((run_id, name))
            raise ConnectionError("away")

    store = Store()
    recording = Recording(SimpleNamespace(parent=1), io.StringIO())
    for number, ours, away in [(1, True, None), (2, False, None), (3, True, "No answer.")]:
        about = About("http://h", f"run {number}", "0", "x", "name", None, is_ours=ours)
        recording.runs[number] = OpenRun(number, store, about, None, away=away)
    recording.handle({"op": "beat"})
    assert store.tags == [("run 1", "heartbeat.time")]
    assert recording.answers.getvalue() == ""


# ---- killed trainings ----------------------------------------------------------------------------


TRAINING = """
import os, signal, sys, time
from pathlib import Path
from research.tracking.run import Recorder

uri, what = sys.argv[1], sys.argv[2]
recorder = Recorder.start()
run = recorder.start_run(uri, "killed " + what, log_system_metrics=what == "sampled")
if what == "at once":
    run.log_metrics({"loss": 0.0}, 0)
    time.sleep(0.4)
    os.kill(recorder.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
print(run.wait().run_id, recorder.pid, flush=True)
checkpoints = Path(sys.argv[3])
run.keep_sending(checkpoints, "checkpoints")
run.log_metrics({"loss": 0.0}, 0)
run.flush()
os.kill(recorder.pid, signal.SIGSTOP)  # so that nothing more is delivered
for step in range(1, 500):
    run.log_metrics({"loss": step}, step)
(run.scratch / "picture.png").write_bytes(b"picture")
run.log_artifact(run.scratch / "picture.png")
time.sleep(0.5)
(checkpoints / "last.ckpt").write_bytes(b"weights")
if what == "finished":
    run.finish("FAILED", timeout=1)
if what != "recorder lives":
    os.kill(recorder.pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def train_and_be_killed(uri, what, checkpoints):
    checkpoints.mkdir(exist_ok=True)
    command = [sys.executable, "-c", TRAINING, uri, what, str(checkpoints)]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return ended.stdout.split()


@pytest.mark.faults
@pytest.mark.parametrize(("what", "status"), [("unfinished", "KILLED"), ("finished", "FAILED")])
def test_all_that_a_killed_training_had_handed_over_is_delivered(
    root, uri, client, tmp_path, what, status
):
    run_id, _ = train_and_be_killed(uri, what, tmp_path / "checkpoints")
    assert eventually(lambda: waiting(root))
    (left,) = waiting(root)
    with open(left.folder / spool.RECORDS, "ab") as file:
        file.write(b'{"op": "metrics", "run": 1, "rows": [["lo')
    written = left.written_at()
    before, here = dict(os.environ), os.getcwd()
    assert deliver(left) is None
    assert (dict(os.environ), os.getcwd()) == (before, here)
    run = client.get_run(run_id)
    assert run.info.status == status
    assert abs(run.info.end_time / 1000 - written) < 2
    history = client.get_metric_history(run_id, "loss")
    assert [(row.step, row.value) for row in history] == [(n, n) for n in range(500)]
    folder = Path(run.info.artifact_uri)
    assert (folder / "picture.png").read_bytes() == b"picture"
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == b"weights"
    assert list(root.iterdir()) == []


@pytest.mark.faults
def test_dead_run_is_ended_by_the_next_start_and_delivered_all_the_same(
    root, uri, client, tmp_path
):
    run_id, _ = train_and_be_killed(uri, "finished", tmp_path / "checkpoints")
    assert client.get_run(run_id).info.status == "RUNNING"
    with Recorder.start() as next_one:
        next_one.start_run(uri, "next").finish()
        assert eventually(lambda: client.get_run(run_id).info.status == "KILLED")
    assert "found dead" in client.get_run(run_id).data.tags["ended_by"]
    assert eventually(lambda: waiting(root))
    (left,) = waiting(root)
    assert deliver(left) is None
    stored = client.get_run(run_id)
    assert stored.info.status == "FAILED"  # as it was finished with
    assert "ended_by" not in stored.data.tags
    assert len(client.get_metric_history(run_id, "loss")) == 500


def test_recorder_that_outlives_its_training_delivers_and_leaves_nothing(
    root, uri, client, tmp_path
):
    run_id, pid = train_and_be_killed(uri, "recorder lives", tmp_path / "checkpoints")
    assert waiting(root) == []  # it is in its hands
    os.kill(int(pid), signal.SIGCONT)
    assert eventually(lambda: not is_alive(int(pid)), 60)
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run_id, "loss")) == 500
    sent = Path(run.info.artifact_uri) / "checkpoints" / "last.ckpt"
    assert sent.read_bytes() == b"weights"
    assert list(root.iterdir()) == []


def test_run_that_never_reached_the_store_is_made_later(root, uri, client, tmp_path):
    assert train_and_be_killed(uri, "at once", tmp_path / "checkpoints") == []
    assert eventually(lambda: waiting(root))
    (left,) = waiting(root)
    # If it had reached the store after all, it is found by its token.
    shutil.copytree(left.folder, tmp_path / "again")
    assert deliver(left) is None
    experiment = client.get_experiment_by_name("killed at once").experiment_id
    (made,) = client.search_runs([experiment])
    assert (made.info.status, made.data.metrics) == ("KILLED", {"loss": 0.0})
    shutil.copytree(tmp_path / "again", left.folder)
    left.about = {"tags": {}}
    assert deliver(left) is None
    assert len(client.search_runs([experiment])) == 1


def test_training_that_ended_at_once_leaves_no_run(root, uri):
    mine = new_spool(uri, 1)
    with Recorder.start() as other:
        other.start_run(uri, "at once, never").wait()
        (theirs,) = root.iterdir()
        first = (theirs / spool.RECORDS).read_bytes().splitlines(keepends=True)[0]
        mine.append(first.replace(b"at once, never", b"not to be made"))
        mine.close()
    assert deliver(mine) is None
    assert client_of(uri).get_experiment_by_name("not to be made") is None
    assert list(root.iterdir()) == []


# ---- delivered twice -----------------------------------------------------------------------------


def record_everything(run, folder):
    split = DatasetInput("Pets", "train", "digest", "drawn", 5, (32, 40, 3), {"cat": 3, "dog": 2})
    run.log_inputs([split])
    run.log_params({"late": "yes"})
    for step in range(20):
        values = {"train/loss": 1 / (step + 1), "nan": float("nan"), "inf": float("inf")}
        run.log_metrics(values, step)
    run.log_model("best", 3, {"train/loss": 0.25, "other": 7.0}, tags={"of": "the third"})
    run.log_metrics({"train/loss": 0.01}, 20)
    run.log_model("best", 20, {"train/loss": 0.01}, tags={"of": "the last"})
    run.log_model("last", 20, {"train/loss": 0.01})
    run.set_tags({"tag": "first"})
    run.set_tags({"tag": "second"})
    run.log_text("first", "text.txt")
    run.log_text("second", "text.txt")
    (folder / "notes").mkdir(exist_ok=True)
    (folder / "notes" / "a.txt").write_text("a")
    run.log_artifact(folder / "notes")


def delivered_twice(recorder, uri, root, tmp_path):
    """What the store has of a run, and what it has when all was delivered once more."""
    run = recorder.start_run(uri, "twice", params={"lr": 0.1})
    run_id = run.wait().run_id
    record_everything(run, tmp_path)
    assert run.flush()
    (folder,) = root.iterdir()
    client = client_of(uri)
    shutil.copytree(folder, tmp_path / "copy")
    run.finish()
    before = content(client, run_id)
    once_more = Spool(root / folder.name)
    shutil.copytree(tmp_path / "copy", once_more.folder)
    with open(once_more.folder / spool.RECORDS, "ab") as file:
        file.write(line(op="finish", run=1, status="FINISHED", ended=1, seconds=1, ticket=0))
    (once_more.folder / "delivered").unlink(missing_ok=True)
    assert deliver(once_more) is None
    return before, content(client, run_id)


@pytest.mark.parametrize("store", ["file", pytest.param("server", marks=pytest.mark.faults)])
def test_what_is_delivered_twice_is_there_once(recorder, root, tmp_path, store, request):
    uri = (
        request.getfixturevalue("uri") if store == "file" else request.getfixturevalue("server").uri
    )
    before, after = delivered_twice(recorder, uri, root, tmp_path)
    (status, histories, params, tags, inputs, models) = before
    assert status == "FINISHED"
    assert repr(after) == repr(before)  # repr: nan is not equal to nan
    assert len(histories["train/loss"]) == 21
    assert (params, tags["tag"]) == ({"lr": "0.1", "late": "yes"}, "second")
    assert inputs == [("Pets", "digest")]
    assert sorted(name for name, *_ in models) == ["best", "last"]


def test_refused_records_are_named_and_cost_no_other(recorder, root, uri, client, tmp_path):
    run = recorder.start_run(uri, "refused", params={"lr": 0.1})
    run_id = run.wait().run_id
    (folder,) = root.iterdir()
    run.flush()
    shutil.copytree(folder, tmp_path / "copy")
    run.finish()
    left = Spool(root / folder.name)
    shutil.copytree(tmp_path / "copy", left.folder)
    number = records(left)[0]["run"]
    with open(left.folder / spool.RECORDS, "ab") as file:
        file.write(line(op="params", run=number, params={"lr": "0.2"}))
        file.write(line(op="artifact", run=number, source=str(tmp_path / "gone.png"), path=None))
        file.write(line(op="metrics", run=number, rows=[["loss", 1.0, 1, 1000]]))
    reason = deliver(left)
    assert "Changing param" in reason
    assert "gone.png" in reason
    assert left.is_gone()
    assert client.get_run(run_id).data.metrics == {"loss": 1.0}
    client.delete_run(run_id)
    shutil.copytree(tmp_path / "copy", left.folder)
    assert run_id in deliver(left)


def test_what_could_not_be_copied_is_copied_later(recorder, root, uri, client, tmp_path):
    run = recorder.start_run(uri, "mended")
    folder = run.wait().artifact_dir
    (folder / "pictures").write_text("stands in the way, as a full disk does")
    (run.scratch / "a.png").write_bytes(b"a")
    run.log_artifact(run.scratch / "a.png", "pictures")
    run.log_metrics({"loss": 1.0}, 1)
    with pytest.raises(TrackingError, match=r"file a\.png refused"):
        run.finish()
    assert "research.repair" in run.waiting
    stored = client.get_run(run.wait().run_id)
    assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"loss": 1.0})
    (left,) = waiting(root)
    assert "pictures" in deliver(left)
    (folder / "pictures").unlink()
    assert deliver(left) is None
    assert (folder / "pictures" / "a.png").read_bytes() == b"a"
    assert client.get_run(run.wait().run_id).info.status == "FINISHED"
    assert len(client.get_metric_history(run.wait().run_id, "loss")) == 1
    assert list(root.iterdir()) == []


# ---- runs that go on -----------------------------------------------------------------------------


def test_resumed_run_goes_on_without_repeats(recorder, root, uri, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with Recorder.start() as first:
        run = first.start_run(uri, "resumed", params={"lr": 0.1}, log_system_metrics=True)
        info = run.wait()
        for step in range(1, 6):
            run.log_metrics({"loss": step}, step)
        name = "system/cpu_utilization_percentage"
        assert eventually(lambda: len(steps_and_values(uri, run, name)) > 1)
        run.finish("KILLED")
    with Recorder.start() as second:
        run = second.resume_run(uri, info.run_id, log_system_metrics=True)
        assert run.wait() == info
        assert run.experiment == "resumed"
        assert client.get_run(info.run_id).info.status == "RUNNING"
        for step in range(4, 9):
            run.log_metrics({"loss": step}, step)
        samples = len(client.get_metric_history(info.run_id, name))
        assert eventually(lambda: len(client.get_metric_history(info.run_id, name)) > samples)
        run.finish()
    stored = client.get_run(info.run_id)
    assert stored.info.status == "FINISHED"
    history = client.get_metric_history(info.run_id, "loss")
    assert [(row.step, row.value) for row in history] == [(n, n) for n in range(1, 9)]
    steps = [row.step for row in client.get_metric_history(info.run_id, name)]
    assert steps == list(range(len(steps)))
    assert len(client.search_runs([info.experiment_id])) == 1
    # What the second part stood on lies beside what the first stood on.
    (resumed,) = (info.artifact_dir / "resumed").iterdir()
    assert (resumed / "environment" / "machine.yaml").exists()
    assert (info.artifact_dir / "environment" / "machine.yaml").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("boom"), "FAILED"), (KeyboardInterrupt(), "KILLED"), ("closed", "KILLED")],
)
def test_resumed_run_ends_as_a_started_one(recorder, root, uri, client, error, status):
    started = recorder.start_run(uri, "resumed and ended")
    started.finish()
    run_id = started.wait().run_id
    if error == "closed":
        with Recorder.start() as other:
            other.resume_run(uri, run_id).wait()
    else:
        with pytest.raises(type(error)), recorder.resume_run(uri, run_id):
            raise error
    assert client.get_run(run_id).info.status == status


@pytest.mark.faults
def test_what_a_killed_training_left_comes_before_what_follows(
    recorder, root, uri, client, tmp_path
):
    run_id, _ = train_and_be_killed(uri, "unfinished", tmp_path / "checkpoints")
    run = recorder.resume_run(uri, run_id)
    run.log_metrics({"loss": 499.0}, 499)
    run.log_metrics({"loss": 500.0}, 500)
    run.finish()
    assert run.waiting is None
    history = client.get_metric_history(run_id, "loss")
    assert [(row.step, row.value) for row in history] == [(n, n) for n in range(501)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert list(root.iterdir()) == []


@pytest.mark.faults
def test_run_whose_recorder_is_still_at_it_is_waited_for(recorder, root, uri, client, tmp_path):
    run_id, pid = train_and_be_killed(uri, "recorder lives", tmp_path / "checkpoints")
    run = recorder.resume_run(uri, run_id)
    time.sleep(1)
    assert client.get_run(run_id).info.status == "RUNNING"  # the first one's, still
    os.kill(int(pid), signal.SIGCONT)
    run.wait()
    assert not is_alive(int(pid)) or eventually(lambda: not is_alive(int(pid)), 20)
    assert client.get_run(run_id).info.status == "RUNNING"
    run.finish()
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.get_metric_history(run_id, "loss")) == 500


def test_runs_that_cannot_go_on_are_refused(recorder, root, uri, client):
    alive = recorder.start_run(uri, "alive")
    run_id = alive.wait().run_id
    with pytest.raises(TrackingError, match=f"is being recorded by process {os.getpid()}"):
        recorder.resume_run(uri, run_id).wait()
    alive.finish()
    assert client.get_run(run_id).info.status == "FINISHED"
    with pytest.raises(TrackingError, match='There is no run "0123"'):
        recorder.resume_run(uri, "0123").wait()
    client.delete_run(run_id)
    with pytest.raises(TrackingError, match="was deleted"):
        recorder.resume_run(uri, run_id).wait()
    assert eventually(lambda: list(root.iterdir()) == [])


# ---- servers that are away, slow, or do not live to answer ---------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running):
    """A server that is there, at first and for the next test."""
    yield running
    if running.process is None:
        running.start()


class Proxy(ThreadingHTTPServer):
    """Stands before a server; answers late, or does as asked and gives no answer."""

    def __init__(self, server):
        self.server = server
        self.seconds = 0.0
        self.answers_lost = {}  # of requests whose path ends so, this many
        super().__init__(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def handle_one_request(self):
        self.raw_requestline = self.rfile.readline()
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.seconds)
        there = http.client.HTTPConnection("127.0.0.1", self.server.server.port, timeout=60)
        with contextlib.closing(there):
            there.request(self.command, self.path, body, dict(self.headers))
            answer = there.getresponse()
            content = answer.read()
        self.close_connection = True
        for end, left in self.server.answers_lost.items():
            if left and self.path.partition("?")[0].endswith(end):
                self.server.answers_lost[end] -= 1
                return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.faults
def test_slow_server_never_slows_training(server, recorder, root):
    with Proxy(server) as proxy:
        proxy.seconds = 1.0
        run = recorder.start_run(proxy.uri, "slow")
        run_id = run.wait().run_id
        longest = 0.0
        for step in range(2000):
            begin = time.perf_counter()
            run.log_metrics({"loss": step}, step)
            longest = max(longest, time.perf_counter() - begin)
            time.sleep(0.001)
        assert not run.flush(timeout=0.5)
        run.finish()
        assert run.waiting is None
    assert longest < 0.9  # a single request takes more
    history = client_of(server.uri).get_metric_history(run_id, "loss")
    assert [(row.step, row.value) for row in history] == [(n, n) for n in range(2000)]


@pytest.mark.faults
def test_answers_that_are_lost_make_nothing_twice(server, recorder, root, tmp_path):
    with Proxy(server) as proxy:
        proxy.answers_lost = {
            "experiments/create": 1,
            "runs/create": 1,
            "runs/log-batch": 3,
            "runs/log-inputs": 1,
            "logged-models": 1,
            "runs/update": 1,
        }
        run = recorder.start_run(proxy.uri, "answers lost", params={"lr": 0.1}, patience=60)
        run_id = run.wait().run_id
        record_everything(run, tmp_path)
        run.finish(patience=60)
        assert run.waiting is None
        assert not any(proxy.answers_lost.values())
    client = client_of(server.uri)
    status, histories, params, _, inputs, models = content(client, run_id)
    assert status == "FINISHED"
    assert [step for step, _, _ in histories["train/loss"]] == list(range(21))
    assert (params, inputs) == ({"lr": "0.1", "late": "yes"}, [("Pets", "digest")])
    assert sorted(name for name, *_ in models) == ["best", "last"]
    assert len(client.search_runs([client.get_run(run_id).info.experiment_id])) == 1
    assert list(root.iterdir()) == []


@pytest.mark.faults
def test_server_that_comes_while_it_is_waited_for_gets_the_run(server, recorder, root, caplog):
    server.stop()
    with pytest.raises(TrackingError, match="No MLflow server answers"):
        recorder.start_run(server.uri, "patience", patience=2).wait()
    assert list(root.iterdir()) == []
    caplog.clear()
    run = recorder.start_run(server.uri, "patience", patience=120)
    run.log_metrics({"loss": 1.0}, 1)
    assert eventually(lambda: "tried again for 120 seconds" in caplog.text)
    server.start()
    run_id = run.wait().run_id
    run.finish()
    assert caplog.text.count("tried again") == 1
    assert client_of(server.uri).get_run(run_id).data.metrics == {"loss": 1.0}
    again = recorder.resume_run(server.uri, run_id, patience=5)
    again.log_metrics({"loss": 1.0}, 1)
    again.finish()
    assert len(client_of(server.uri).get_metric_history(run_id, "loss")) == 1


@pytest.mark.faults
def test_server_that_is_away_at_the_end_gets_everything_later(server, recorder, root, tmp_path):
    run = recorder.start_run(server.uri, "away at the end", log_system_metrics=True)
    run_id = run.wait().run_id
    run.log_metrics({"train/loss": 5.0}, 0)
    assert run.flush()
    server.stop()
    record_everything(run, run.scratch)
    (run.scratch / "picture.png").write_bytes(b"picture")
    run.log_artifact(run.scratch / "picture.png", "pictures")
    time.sleep(6)  # a sample of the machine too
    begin = time.monotonic()
    assert not run.flush(timeout=1)
    run.finish(patience=3)
    assert time.monotonic() - begin < 60
    assert "No MLflow server answers" in run.waiting
    (left,) = waiting(root)
    assert str(left.folder) in run.waiting
    assert left.count() > 60
    assert "No MLflow server answers" in deliver(left, seconds=1)
    assert [each.folder for each in waiting(root)] == [left.folder]
    server.start()
    assert deliver(left) is None
    client = client_of(server.uri)
    status, histories, _, tags, inputs, models = content(client, run_id)
    assert (status, tags["tag"]) == ("FINISHED", "second")
    assert [step for step, _, _ in histories["train/loss"]] == [0, *range(21)]
    samples = histories["system/cpu_utilization_percentage"]
    assert [step for step, _, _ in samples] == list(range(len(samples)))
    assert len(samples) > 1
    assert inputs == [("Pets", "digest")]
    assert sorted(name for name, *_ in models) == ["best", "last"]
    (tmp_path / "there").mkdir()
    files = tree(client.download_artifacts(run_id, "", str(tmp_path / "there")))
    assert files["pictures/picture.png"] == b"picture"
    assert (files["notes/a.txt"], files["text.txt"]) == (b"a", b"second")
    assert "environment/machine.yaml" in files
    assert list(root.iterdir()) == []


@pytest.mark.faults
def test_training_killed_while_the_server_is_away_is_delivered_later(server, root, tmp_path):
    run_id, _ = train_and_be_killed(server.uri, "unfinished", tmp_path / "checkpoints")
    server.stop()
    assert eventually(lambda: waiting(root))
    (left,) = waiting(root)
    assert "No MLflow server answers" in deliver(left, seconds=1)
    with Recorder.start() as recorder, pytest.raises(TrackingError, match="No MLflow server"):
        recorder.resume_run(server.uri, run_id).wait()
    server.start()
    assert deliver(left) is None
    client = client_of(server.uri)
    history = client.get_metric_history(run_id, "loss")
    assert [(row.step, row.value) for row in history] == [(n, n) for n in range(500)]
    assert client.get_run(run_id).info.status == "KILLED"
    sent = {item.path for item in client.list_artifacts(run_id, "checkpoints")}
    assert sent == {"checkpoints/last.ckpt"}
    assert list(root.iterdir()) == []


@pytest.mark.faults
def test_recorder_killed_during_an_outage_loses_nothing(server, recorder, root):
    with Recorder.start() as recorder:
        run = recorder.start_run(server.uri, "both")
        run_id = run.wait().run_id
        for step in range(300):
            run.log_metrics({"loss": step}, step)
            if step == 100:
                server.stop()
            if step == 200:
                time.sleep(1)
                os.kill(recorder.pid, signal.SIGKILL)
            time.sleep(0.005)
        server.start()
        run.finish(timeout=120, patience=60)
        assert run.waiting is None
    history = client_of(server.uri).get_metric_history(run_id, "loss")
    assert [(row.step, row.value) for row in history] == [(n, n) for n in range(300)]
    assert list(root.iterdir()) == []
