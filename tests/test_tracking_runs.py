"""Runs found and read back, in a store that MLflow's own client has filled."""

import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from research.tracking.heartbeat import first_beat
from research.tracking.limits import check_name
from research.tracking.runs import find_run, none_found, open_store, recordable_names
from research.tracking.store import TrackingError, sqlite_uri

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def client(place) -> Any:
    """A store that all share, for it takes seconds to make."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(sqlite_uri(place / "mlflow.db"))
    client.create_experiment("first", str(place / "mlruns" / "1"))
    client.create_experiment("second", str(place / "mlruns" / "2"))
    return client


@pytest.fixture(scope="module")
def uri(client, place) -> str:
    return sqlite_uri(place / "mlflow.db")


@pytest.fixture(scope="module")
def make(client) -> Callable[..., str]:
    """The id of a new run of that name."""

    def make(name: str, started: int | None = None, experiment: str = "1", files=()) -> str:
        run = client.create_run(experiment, started, run_name=name)
        for file in files:
            path = Path(run.info.artifact_uri) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name}'s {file}")
        client.set_terminated(run.info.run_id)
        return run.info.run_id

    return make


# ---- finding -------------------------------------------------------------------------------------


def test_run_is_found_by_id_by_prefix_and_by_name_in_any_experiment(uri, make, client):
    run_id = make("a very own name", experiment="2", files=["config.yaml"])
    client.log_metric(run_id, "test/loss", 2.0, step=1)
    client.log_metric(run_id, "test/loss", 1 / 3, step=2)
    client.set_tag(run_id, "seed", "7")
    for text in (run_id, run_id.upper(), run_id[:4], run_id[:31], "a very own name"):
        run = find_run(uri, text)
        assert (run.run_id, run.run_name) == (run_id, "a very own name")
    assert run.status == "FINISHED"
    assert run.experiment_id == "2"
    assert run.metrics == {"test/loss": 1 / 3}
    assert run.tags["seed"] == "7"
    assert abs(run.started_at.timestamp() - time.time()) < 600
    assert run.configuration() == "a very own name's config.yaml"


@pytest.mark.parametrize("name", ["it's", 'say "yes"', "100 % = x AND y", "é/ü:1", "a%b", "cafe"])
def test_run_of_an_odd_name_is_found(uri, make, name):
    run_id = make(name)
    assert find_run(uri, name).run_id == run_id


def test_percent_and_underline_stand_for_themselves(uri, make):
    make("axb")
    with pytest.raises(TrackingError, match='no run "a_b"'):
        find_run(uri, "a_b")


def test_name_of_several_runs_lists_them_newest_first(uri, make):
    day = 24 * 3600 * 1000
    ids = [make("twin", (20000 + number) * day) for number in range(7)]
    with pytest.raises(TrackingError) as refusal:
        find_run(uri, "twin")
    told = str(refusal.value)
    assert re.findall("[0-9a-f]{32}", told) == ids[:1:-1]
    assert "2024-10-0" in told
    assert "Use the run id" in told


def test_deleted_run_is_not_found_and_its_id_says_why(uri, make, client):
    run_id = make("gone soon")
    client.delete_run(run_id)
    with pytest.raises(TrackingError, match=f"was deleted.*restore --run-id {run_id}"):
        find_run(uri, run_id)
    for text in ("gone soon", run_id[:12]):
        with pytest.raises(TrackingError, match="There is no run"):
            find_run(uri, text)


def test_wrong_name_lists_the_nearest(uri, make):
    run_id = make("caring-shark-852")
    with pytest.raises(TrackingError) as refusal:
        find_run(uri, "caring-shak-85")
    told = str(refusal.value)
    assert f"The nearest: caring-shark-852 ({run_id[:8]}, 20" in told
    wrong_id = run_id[:7] + ("0" if run_id[7] != "0" else "1")
    with pytest.raises(TrackingError, match=f"nearest: .*{run_id[:8]}"):
        find_run(uri, wrong_id)


@pytest.mark.parametrize(
    "text", ["zzzzzzzzzz", "", "abc", "%", "0" * 32, "no 'such' \"name\"", ".."]
)
def test_text_that_stands_for_nothing_lists_the_newest(uri, make, text):
    make("qqqq")
    with pytest.raises(TrackingError) as refusal:
        find_run(uri, text)
    told = str(refusal.value)
    assert told.startswith("There is no run ")
    assert re.search(r"The (newest|nearest): .+ \([0-9a-f]{8}, ", told)
    assert len(told.splitlines()) == 1


def test_nearest_of_many_are_few_and_of_equals_the_newest():
    def row(number):
        info = SimpleNamespace(run_name=f"run {number}", run_id=f"{number:032x}", start_time=number)
        return SimpleNamespace(info=info)

    rows = [row(number) for number in range(9999, 0, -1)]

    class Store:
        def search_runs(self, experiments, condition, view, count, order):
            assert order == ["attributes.start_time DESC"]
            return rows[:count]

    began = time.perf_counter()
    told = none_found("run 99999", "http://127.0.0.1:1", Store(), ["1"])
    assert time.perf_counter() - began < 5
    assert "The nearest: run 9999 (" in told
    ages = [int(age) for age in re.findall(r"run (\d{4}) ", told)]
    assert len(ages) == 5
    assert ages[1:] == sorted(ages[1:], reverse=True)  # all as like as one another


# ---- its state -----------------------------------------------------------------------------------


@pytest.fixture
def dead(client) -> str:
    """A run that is RUNNING in the store, and whose process was killed."""
    with subprocess.Popen(["sleep", "600"]) as process:
        tags = first_beat(process.pid)
        process.kill()
    return client.create_run("1", tags=tags, run_name="dead").info.run_id


def test_run_whose_process_is_gone_is_found_killed(uri, dead, client, make):
    alive = client.create_run("1", tags=first_beat(os.getpid())).info.run_id
    assert find_run(uri, alive).status == "RUNNING"
    assert client.get_run(dead).info.status == "KILLED"  # whichever was looked for
    assert find_run(uri, dead).status == "KILLED"
    assert "is gone" in find_run(uri, "dead").tags["ended_by"]
    client.set_terminated(alive)


def test_store_that_cannot_be_written_is_read_with_its_dead_runs(uri, dead, place, tmp_path):
    copy = tmp_path / "mlflow.db"
    shutil.copy(place / "mlflow.db", copy)
    with open(copy, "r+b") as file:
        file.seek(18)  # "write version" of the header: from a future that nobody may write to
        file.write(b"\x03")
    before = copy.read_bytes()
    assert find_run(sqlite_uri(copy), dead).status == "RUNNING"
    assert copy.read_bytes() == before


# ---- stores that cannot be read ------------------------------------------------------------------


def test_store_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(TrackingError, match=r"no runs yet in .*python -m research\.fit"):
        find_run(sqlite_uri(tmp_path / "mlflow.db"), "any")
    assert list(tmp_path.iterdir()) == []


def test_store_without_a_run_says_how_to_make_one(tmp_path, uri):
    (tmp_path / "empty.db").touch()
    with pytest.raises(TrackingError, match="There are no runs yet"):
        find_run(sqlite_uri(tmp_path / "empty.db"), "any")
    assert (tmp_path / "empty.db").stat().st_size == 0


def test_file_that_is_no_store_is_told_in_a_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_text("Dear diary, today I wrote no database at all.")
    with pytest.raises(TrackingError, match="is not an SQLite database"):
        find_run(sqlite_uri(tmp_path / "mlflow.db"), "any")


def test_server_that_is_away_is_told_in_a_sentence():
    began = time.perf_counter()
    with pytest.raises(TrackingError, match=r"No MLflow server answers at http://127\.0\.0\.1:9"):
        find_run("http://127.0.0.1:9", "any")
    assert time.perf_counter() - began < 30


# ---- its files -----------------------------------------------------------------------------------

KEPT = ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/notes.txt", "config.yaml"]


def test_checkpoint_is_the_best_the_last_or_a_named_one(uri, make):
    run = find_run(uri, make("two checkpoints", files=KEPT))
    assert run.checkpoint() == run.checkpoint("best") == run.checkpoint("best.ckpt")
    assert run.checkpoint().read_text() == "two checkpoints's checkpoints/best.ckpt"
    assert run.checkpoint("last").name == "last.ckpt"
    for wrong in ("notes.txt", "epoch=3.ckpt", "../config.yaml", ""):
        with pytest.raises(TrackingError, match=r"it has best\.ckpt, last\.ckpt\."):
            run.checkpoint(wrong)


def test_run_that_kept_only_the_last_has_no_best(uri, make):
    run = find_run(uri, make("only last", files=["checkpoints/last.ckpt"]))
    assert run.checkpoint().name == "last.ckpt"
    with pytest.raises(TrackingError, match=r'no checkpoint "best"; it has last\.ckpt'):
        run.checkpoint("best")
    none = find_run(uri, make("none kept"))
    with pytest.raises(TrackingError, match="it has none at all"):
        none.checkpoint()


def test_best_of_several_kept_is_the_one_that_a_tag_tells(uri, make, client):
    files = [f"checkpoints/{name}.ckpt" for name in ("epoch=1", "epoch=3", "epoch=12", "last")]
    run_id = make("three best", files=files)
    client.set_tag(run_id, "checkpoint.best", "checkpoints/epoch=3.ckpt")
    run = find_run(uri, run_id)
    assert run.checkpoint().name == run.checkpoint("best").name == "epoch=3.ckpt"
    assert run.checkpoint("epoch=12").name == "epoch=12.ckpt"


def test_files_of_a_project_that_was_moved_are_found(uri, make, place, tmp_path):
    run_id = make("moved", files=KEPT)
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(place / "mlflow.db", moved)
    old = place / "mlruns" / "1" / run_id
    shutil.copytree(old, moved / "mlruns" / "1" / run_id)
    shutil.move(old, place / "elsewhere")
    run = find_run(sqlite_uri(moved / "mlflow.db"), run_id)
    assert run.artifact_dir == moved / "mlruns" / "1" / run_id / "artifacts"
    assert run.checkpoint().is_relative_to(moved)


def test_files_that_are_gone_are_told_with_the_place(uri, make):
    run = find_run(uri, make("no files"))
    with pytest.raises(TrackingError, match=r"run no files .* has no file config.yaml \(looked at"):
        run.configuration()


def test_files_of_a_remote_store_are_brought_here(uri, make):
    """The store is asked for each, as where a server keeps them."""
    here = find_run(uri, make("far away", files=KEPT))
    remote = replace(here, artifact_dir=None)
    assert remote.configuration() == here.configuration()
    brought = remote.checkpoint("last")
    assert brought.read_text() == here.checkpoint("last").read_text()
    assert not brought.is_relative_to(here.artifact_dir)
    with pytest.raises(TrackingError, match=r"it has best\.ckpt, last\.ckpt\."):
        remote.checkpoint("first")


def test_client_is_opened_once(uri):
    assert open_store(uri) is open_store(uri)


# ---- names ---------------------------------------------------------------------------------------


def test_recordable_names_are_taken_and_differ():
    texts = ["cat", "sea/lion", "sea_lion", "sea\\lion", "..", "", "häschen", "n" * 400, "n" * 401]
    names = recordable_names([*texts, "a\nb", "cat "])
    assert len({*names}) == len(texts) + 2
    assert names[0] == "cat"
    assert names[6] == "häschen"
    assert all("/" not in name for name in names)
    for name in names:
        check_name("metric", f"test/accuracy/{name}")
