"""Folders that are moved and copied with their store, and then read through MLflow's own client."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from research.tracking.moved import repair_paths
from research.tracking.opening import Stores, _create
from research.tracking.runs import find_run
from research.tracking.store import sqlite_uri

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy


@pytest.fixture(scope="module", autouse=True)
def tables(tmp_path_factory):
    """MLflow's tables with nothing in them: to make them takes a second or more."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        tables = tmp_path_factory.mktemp("tables") / "mlflow.db"
        _create(tables)
        yield tables


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing remembered of where a run's files are, as in a process that has just begun."""
    from mlflow.tracking._tracking_service import utils

    monkeypatch.setattr(utils, "_artifact_repos_cache", type(utils._artifact_repos_cache)())
    monkeypatch.chdir(os.getcwd())


class Project:
    """A folder with a store: a run and a model with files, and paths that were chosen elsewhere."""

    def __init__(self, folder, tables):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tables, self.database)
        self.client, self.one = Stores().experiment(self.uri, "one")
        self.run = self.add_run(self.one, "first words")
        model = self.client.create_logged_model(self.one, "best", source_run_id=self.run)
        self.model = model.model_id
        file = folder / "model.txt"
        file.write_text("weights")
        self.client.log_model_artifact(self.model, str(file))
        file.unlink()

    @property
    def database(self):
        return self.folder / "mlflow.db"

    @property
    def uri(self):
        return sqlite_uri(self.database)

    def add_run(self, experiment, words, name="notes/words.txt"):
        run_id = self.client.create_run(experiment).info.run_id
        self.client.log_text(run_id, words, name)
        return run_id

    def at(self, folder):
        """The same, seen from another place by a client that knows nothing of the first."""
        from mlflow.tracking import MlflowClient
        from mlflow.tracking._tracking_service import utils

        utils._artifact_repos_cache.clear()
        other = object.__new__(Project)
        other.__dict__ |= self.__dict__ | {"folder": folder}
        other.client = MlflowClient(other.uri)
        return other

    def words(self, run_id=None, name="notes/words.txt"):
        found = self.client.download_artifacts(run_id or self.run, name)
        return Path(found).read_text()

    def files(self, run_id=None):
        return [file.path for file in self.client.list_artifacts(run_id or self.run, "notes")]

    def paths(self):
        with sqlite3.connect(self.database) as connection:
            rows = connection.execute(
                "SELECT artifact_location FROM experiments UNION ALL SELECT artifact_uri FROM runs "
                "UNION ALL SELECT artifact_location FROM logged_models"
            ).fetchall()
        connection.close()
        return [path for (path,) in rows]


@pytest.fixture
def project(tmp_path, tables):
    return Project(tmp_path / "first place", tables)


def fingerprint(folder):
    """Every name, byte and time of change under a folder."""
    return {
        str(path): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in [folder, *folder.rglob("*")]
    }


# ---- moved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["second", "50 %25 ä#?", "first place/inside/it"])
def test_files_of_a_moved_folder_are_found_by_mlflow(project, tmp_path, name):
    aside, second = tmp_path / "aside", tmp_path / name
    project.folder.rename(aside)
    second.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(second)
    moved = project.at(second)
    assert moved.files() == []  # what this is about

    told = repair_paths(moved.database)

    (line,) = [line for line in told if '"one"' in line]
    assert line == (
        f'experiment "one": its files (1 run and 1 model) are looked for in {second}/mlruns now, '
        f"no longer in {project.folder}/mlruns"
    )
    assert len(told) == 2  # and of MLflow's Default
    moved = moved.at(second)
    assert moved.files() == ["notes/words.txt"]
    assert moved.words() == "first words"
    model = moved.client.get_logged_model(moved.model)
    assert model.artifact_location.endswith(f"/mlruns/1/models/{moved.model}/artifacts")
    assert (second / "mlruns/1/models" / moved.model / "artifacts/model.txt").is_file()
    assert [file.path for file in moved.client.list_logged_model_artifacts(moved.model)] == [
        "model.txt"
    ]
    later = moved.add_run(moved.one, "later words")
    assert (second / "mlruns/1" / later / "artifacts/notes/words.txt").is_file()
    before = fingerprint(second)
    assert repair_paths(moved.database) == []
    assert fingerprint(second) == before


def test_store_opened_for_the_next_run_mends_itself(project, tmp_path):
    second = tmp_path / "second"
    project.folder.rename(second)
    Stores().client(sqlite_uri(second / "mlflow.db"))
    assert project.at(second).words() == "first words"
    third = tmp_path / "third"
    second.rename(third)
    client, experiment = Stores().experiment(sqlite_uri(third / "mlflow.db"), "one")
    assert experiment == project.one
    assert client.get_experiment(experiment).artifact_location == f"{third}/mlruns/1"
    assert not second.exists()


def test_folder_that_moves_up_a_level_is_followed(tmp_path, tables):
    project = Project(tmp_path / "place" / "inner", tables)
    for part in ("mlflow.db", "mlruns"):
        (project.folder / part).rename(tmp_path / "place" / part)
    moved = project.at(tmp_path / "place")
    assert len(repair_paths(moved.database)) == 2
    assert moved.words() == "first words"


def test_addresses_stay_addresses_and_an_older_schema_is_read(project, tmp_path):
    with sqlite3.connect(project.database) as connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = 'file://' || ?",
            (f"{project.folder}/mlruns/1".replace(" ", "%20"),),
        )
        connection.execute("DROP TABLE logged_models")
    connection.close()
    project.folder.rename(tmp_path / "the second")
    assert repair_paths(tmp_path / "the second" / "mlflow.db") != []
    moved = project.at(tmp_path / "the second")
    with sqlite3.connect(moved.database) as connection:
        ((stored,), *_) = connection.execute("SELECT artifact_location FROM experiments")
    connection.close()
    assert stored == f"file://{tmp_path}/the%20second/mlruns/1"


# ---- copied --------------------------------------------------------------------------------------


def test_copy_uses_its_own_files_and_leaves_the_original_alone(project, tmp_path):
    shutil.copytree(project.folder, tmp_path / "copy")
    before = fingerprint(project.folder)
    copy = project.at(tmp_path / "copy")
    own = copy.folder / "mlruns/1" / copy.run / "artifacts"
    # Also before anything is mended, and where nothing can be written.
    assert find_run(copy.uri, copy.run).artifact_dir == own

    assert len(repair_paths(copy.database)) == 2

    (own / "notes/words.txt").write_text("the copy's words")
    assert copy.words() == "the copy's words"
    copy.client.log_text(copy.run, "more", "notes/more.txt")
    assert (own / "notes/more.txt").is_file()
    later = copy.add_run(copy.one, "later")
    assert (copy.folder / "mlruns/1" / later / "artifacts/notes/words.txt").is_file()
    assert fingerprint(project.folder) == before
    assert not any(str(project.folder) in path for path in copy.paths())
    assert project.at(project.folder).words() == "first words"
    assert repair_paths(project.database) == []


def test_copy_of_the_database_alone_reads_the_original_and_writes_beside_itself(project, tmp_path):
    (tmp_path / "copy").mkdir()
    shutil.copy(project.database, tmp_path / "copy")
    before = fingerprint(project.folder)
    copy = project.at(tmp_path / "copy")
    repair_paths(copy.database)
    assert copy.words() == "first words"  # the files are nowhere else
    later = copy.add_run(copy.one, "later")
    assert (copy.folder / "mlruns/1" / later / "artifacts/notes/words.txt").is_file()
    assert fingerprint(project.folder) == before
    assert repair_paths(copy.database) == []


def test_place_that_another_project_has_taken_since_is_left_alone(tmp_path, tables):
    first, link = tmp_path / "first", tmp_path / "link"
    first.mkdir()
    link.symlink_to(first)
    project = Project(link, tables)  # MLflow takes two stores of one address for one
    first.rename(tmp_path / "second")
    newcomer = Project(first, tables)
    before = fingerprint(newcomer.folder)
    moved = project.at(tmp_path / "second")
    repair_paths(moved.database)
    assert moved.words() == "first words"
    assert repair_paths(newcomer.database) == []
    assert fingerprint(newcomer.folder) == before


# ---- what stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mounted", [True, False])
def test_files_that_were_put_elsewhere_on_purpose_stay_there(project, tmp_path, is_mounted):
    disk = tmp_path / "big disk"
    chosen = [f"{disk}/mlruns/7", f"{disk}/results", "s3://bucket/mlruns/1", "mlflow-artifacts:/4"]
    for number, path in enumerate(chosen):
        project.client.create_experiment(f"chosen {number}", path)
    on_disk = project.add_run(
        project.client.get_experiment_by_name("chosen 0").experiment_id, "far"
    )
    if not is_mounted:
        disk.rename(tmp_path / "unmounted")
    assert repair_paths(project.database) == []
    project.folder.rename(tmp_path / "second")
    moved = project.at(tmp_path / "second")
    assert len(repair_paths(moved.database)) == 2
    paths = moved.paths()
    assert set(chosen) <= set(paths)
    assert f"{disk}/mlruns/7/{on_disk}/artifacts" in paths
    if is_mounted:
        assert moved.words(on_disk) == "far"


def test_folder_by_another_name_is_no_other_folder(project, tmp_path):
    link, beside = tmp_path / "link", tmp_path / "beside"
    link.symlink_to(project.folder)
    beside.mkdir()
    beside.joinpath("mlruns").symlink_to(project.folder / "mlruns")
    before = fingerprint(project.folder)
    assert repair_paths(link / "mlflow.db") == []
    assert fingerprint(project.folder) == before
    shutil.copy(project.database, beside)  # with files that are the original's by choice
    assert repair_paths(beside / "mlflow.db") == []


def test_files_behind_a_link_named_mlruns_stay_there(project, tmp_path):
    mlruns = project.folder / "mlruns"
    mlruns.rename(tmp_path / "large disk")
    mlruns.symlink_to(tmp_path / "large disk")
    assert repair_paths(project.database) == []
    assert project.words() == "first words"
    project.folder.rename(tmp_path / "second")
    moved = project.at(tmp_path / "second")
    assert len(repair_paths(moved.database)) == 2
    assert moved.words() == "first words"


# ---- bad luck ------------------------------------------------------------------------------------


def test_several_that_find_a_moved_folder_mend_it_once(project, tmp_path):
    project.folder.rename(tmp_path / "second")
    told, problems = [], []

    def repair():
        try:
            told.append(repair_paths(tmp_path / "second" / "mlflow.db"))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=repair) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert sorted(len(lines) for lines in told) == [0, 0, 0, 2]
    assert project.at(tmp_path / "second").words() == "first words"


KILLED_WRITER = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE runs SET name = 'torn'")
for number in range(3000):
    connection.execute("INSERT INTO experiment_tags VALUES (?, 'x', 1)", (str(number) * 50,))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folder_that_is_moved_after_a_kill_in_the_middle_of_a_write(project, tmp_path):
    command = [sys.executable, "-c", KILLED_WRITER, str(project.database)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert (project.folder / "mlflow.db-journal").stat().st_size > 0
    project.folder.rename(tmp_path / "second")
    assert len(repair_paths(tmp_path / "second" / "mlflow.db")) == 2
    moved = project.at(tmp_path / "second")
    assert moved.words() == "first words"
    assert moved.client.get_run(moved.run).info.run_name != "torn"


def test_moved_store_that_cannot_be_written_is_read(project, tmp_path):
    project.folder.rename(tmp_path / "second")
    moved = project.at(tmp_path / "second")
    with open(moved.database, "r+b") as file:
        file.seek(18)  # "write version" of the header: from a future that nobody may write to
        file.write(b"\x03")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        repair_paths(moved.database)
    before = fingerprint(moved.folder)
    found = find_run(moved.uri, moved.run)
    assert found.file("notes/words.txt").read_text() == "first words"
    assert fingerprint(moved.folder) == before


def test_what_is_no_store_is_left_as_it_is(tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE experiments (name TEXT)")
        connection.execute("INSERT INTO experiments VALUES ('/a/mlruns/1')")
    connection.close()
    assert repair_paths(other) == []
    with pytest.raises(sqlite3.OperationalError):
        repair_paths(tmp_path / "absent.db")
    assert not (tmp_path / "absent.db").exists()
