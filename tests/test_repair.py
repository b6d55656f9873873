"""`python -m research.repair` on what killed processes, moved folders and absent servers leave."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from research.repair import main
from research.tracking.moved_spool import address_of, followed
from research.tracking.spool import Spool, spool_root
from research.tracking.store import sqlite_uri

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy
PROJECT = Path(__file__).resolve().parents[1]
AWAY = "http://127.0.0.1:9"

# Its recorder process stands still when the records come, and both are killed.
KILLED = """
import os, signal, sys, time
from research.tracking.run import Recorder

recorder = Recorder.start()
run = recorder.start_run(sys.argv[1], "one", run_name="unlucky")
run.log_metrics({"loss": 3.0}, step=1)
run.flush()
print(run.wait().run_id, flush=True)
os.kill(recorder.pid, signal.SIGSTOP)
run.log_metrics({"loss": 2.0}, step=2)
file = run.scratch / "words.txt"
file.write_text("last words")
run.log_artifact(file, "notes")
time.sleep(1.0)
os.kill(recorder.pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def own_spools(monkeypatch):
    monkeypatch.delenv("RESEARCH_SPOOL", raising=False)


@pytest.fixture
def client_of():
    """A client; nothing is known of where the files of a run were in another test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient
        from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()

    def client_of(folder):
        return MlflowClient(sqlite_uri(folder / "mlflow.db"))

    return client_of


@pytest.fixture(scope="module")
def killed_at(tmp_path_factory):
    """Where a project was whose training was killed, and that lies aside now; its run."""
    folder = tmp_path_factory.mktemp("killed") / "project"
    command = [sys.executable, "-c", KILLED, sqlite_uri(folder / "mlflow.db")]
    training = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, timeout=120)
    assert training.returncode == -signal.SIGKILL
    folder.rename(folder.with_name("aside"))
    return folder, training.stdout.strip()


@pytest.fixture
def killed(killed_at):
    """The project as its training has left it, where it was; and the run."""
    folder, run_id = killed_at
    shutil.copytree(folder.with_name("aside"), folder)
    yield folder, run_id
    shutil.rmtree(folder, ignore_errors=True)


def repair(folder, *arguments):
    return main(["--tracking_uri", sqlite_uri(folder / "mlflow.db"), *arguments])


def steps(client, run_id):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]


def check_whole(client, run_id, folder):
    """The run has all it was told, and its files lie in the folder."""
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert sorted(steps(client, run_id)) == [(1, 3.0), (2, 2.0)]
    assert [file.path for file in client.list_artifacts(run_id, "notes")] == ["notes/words.txt"]
    words = folder / "mlruns/1" / run_id / "artifacts/notes/words.txt"
    assert words.read_text() == "last words"


def fingerprint(folder):
    return {
        str(path): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


# ---- what was typed ------------------------------------------------------------------------------


def test_help_is_told_without_torch_or_mlflow():
    code = (
        "import sys; from research.repair import main; assert main(['--help']) == 0; "
        "print({'torch', 'mlflow', 'lightning'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert told.stdout.startswith("python -m research.repair [--tracking_uri URI]")
    assert told.stdout.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experiment", "x"], "experiment is not known here"),
        (["--trainer.max_epochs=3"], "not known here"),
        (["run"], "was not expected"),
        (["--tracking_uri", ""], "nothing to repair"),
        (["--tracking_uri.a", "b"], "tracking_uri is not known"),
        (["--tracking_uri", "mlruns"], "is a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, words, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert words in told.err
    assert told.out == ""


def test_store_that_was_never_made_is_not_made_now(tmp_path, capsys):
    assert repair(tmp_path) == 2
    assert "no runs yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- a training that was killed ------------------------------------------------------------------


def test_killed_run_gets_all_it_was_told_and_is_killed(killed, client_of, capsys):
    folder, run_id = killed
    client = client_of(folder)
    assert client.get_run(run_id).info.status == "RUNNING"
    assert repair(folder) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert f"of run unlucky ({run_id})" in told.out.splitlines()[0]
    check_whole(client, run_id, folder)
    assert not any(spool_root(sqlite_uri(folder / "mlflow.db")).glob("*"))
    assert repair(folder) == 0
    assert capsys.readouterr().out == f"nothing to repair in {folder}/mlflow.db\n"


def test_run_without_a_spool_is_only_marked(killed, client_of, tmp_path, capsys):
    before, run_id = killed
    folder = tmp_path / "second"  # MLflow takes two stores of one address for one
    before.rename(folder)
    shutil.rmtree(folder / "mlruns" / ".spool")
    assert repair(folder) == 0
    *_, told = capsys.readouterr().out.splitlines()
    assert told == f"marked as KILLED: run unlucky ({run_id}), which nobody records any more"
    run = client_of(folder).get_run(run_id)
    assert (run.info.status, steps(client_of(folder), run_id)) == ("KILLED", [(1, 3.0)])
    assert "is gone" in run.data.tags["ended_by"]


@pytest.mark.parametrize("is_copy", [False, True])
def test_killed_run_of_a_moved_project_is_whole_in_the_new_place(
    killed, client_of, tmp_path, capsys, is_copy
):
    folder, run_id = killed
    second = tmp_path / "the second place"
    (shutil.copytree if is_copy else shutil.move)(folder, second)
    before = fingerprint(folder)
    assert repair(second) == 0
    told = capsys.readouterr().out.splitlines()
    assert sum(str(second) in line and str(folder) in line for line in told) == 2
    assert any(f"of run unlucky ({run_id})" in line for line in told)
    check_whole(client_of(second), run_id, second)
    assert folder.exists() is is_copy
    assert fingerprint(folder) == before
    assert not any((second / "mlruns/.spool").glob("*"))


def test_spool_where_it_was_written_is_itself(killed, tmp_path):
    folder, _ = killed
    (path,) = (folder / "mlruns/.spool").iterdir()
    spool = Spool(path)
    assert address_of(spool) == sqlite_uri(folder / "mlflow.db")
    assert followed(spool) is spool
    link = tmp_path / "link"
    link.symlink_to(folder)
    linked = Spool(link / "mlruns/.spool" / path.name)
    assert followed(linked) is linked
    shutil.move(path, tmp_path)
    aside = Spool(tmp_path / path.name)  # in RESEARCH_SPOOL, of which no store can be told
    assert followed(aside) is aside


# ---- stores that are away ------------------------------------------------------------------------


def make_spool(uri, name):
    """A spool of a run that its store has never heard of."""
    spool = Spool(spool_root(uri) / f"20260101-000000-000000-{name}")
    start = {
        **{"op": "start", "run": 1, "tracking_uri": uri, "experiment": "late", "run_name": "late"},
        **{"params": {"a": "b"}, "tags": {}, "started": 1_700_000_000_000, "token": name * 16},
        **{"log_system_metrics": False, "patience": 0.0},
    }
    rows = [["loss", 1.0, 1, 1_700_000_000_001]]
    finish = {"op": "finish", "run": 1, "status": "FINISHED", "ended": 1_700_000_000_002}
    records = [
        start,
        {"op": "metrics", "run": 1, "rows": rows},
        finish | {"seconds": 1.0, "ticket": 1},
    ]
    spool.append(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    spool.close()
    return spool


def test_server_that_is_away_is_told_and_what_waits_goes_on_waiting(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESEARCH_SPOOL", str(tmp_path))
    assert main(["--tracking_uri", AWAY]) == 1
    assert "No MLflow server answers" in capsys.readouterr().err
    spools = [make_spool(AWAY, "11-1"), make_spool(AWAY, "12-1")]
    before = [fingerprint(spool.folder) for spool in spools]
    began = time.monotonic()
    assert main(["--tracking_uri", AWAY]) == 1
    assert time.monotonic() - began < 60
    told = capsys.readouterr()
    assert "No MLflow server answers" in told.err
    assert told.out == "what 2 runs could not deliver still waits\n"
    assert [fingerprint(spool.folder) for spool in spools] == before


def test_only_what_waits_for_the_store_is_delivered(tmp_path, monkeypatch, client_of, capsys):
    """Also to a store that could not even be made when the run began."""
    monkeypatch.setenv("RESEARCH_SPOOL", str(tmp_path / "spools"))
    other = make_spool(AWAY, "11-1")
    for name in ("12-1", "13-1"):
        make_spool(sqlite_uri(tmp_path / "mlflow.db"), name)
    assert repair(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:18] for line in lines] == ["1 of 2: delivering", "2 of 2: delivering"]
    assert list((tmp_path / "spools").iterdir()) == [other.folder]
    client = client_of(tmp_path)
    experiment = client.get_experiment_by_name("late")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    for run in runs:
        assert (run.data.params, run.data.metrics) == ({"a": "b"}, {"loss": 1.0})
        assert run.info.end_time == 1_700_000_000_002
        assert "ended_by" not in run.data.tags
    assert os.getcwd() != str(tmp_path)
