"""Storages open from every address, for many at once, and survive kills, torn lines and outages."""

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import optuna
import pytest
import sqlalchemy.exc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.storages import GrpcStorageProxy, JournalStorage

from research.search import storage as storages
from research.search.storage import (
    JournalLock,
    StorageAwayError,
    StorageError,
    alone,
    close_storage,
    described,
    file_of,
    open_storage,
    patiently,
    storage_address,
)
from tests.services import free_port, postgresql, postgresql_programs, proxy

needs_postgresql = pytest.mark.skipif(
    postgresql_programs() is None and not os.environ.get("REQUIRE_POSTGRESQL"),
    reason="Debian's package postgresql is not installed",
)


# ---- addresses -----------------------------------------------------------------------------------


def test_no_address_is_a_journal_at_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage_address(None, Path("sweeps/x.journal")) == str(tmp_path / "sweeps/x.journal")


def test_addresses_hold_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storages.importlib.util, "find_spec", lambda name: name)  # drivers
    for given_, meant in {
        "a.journal": str(tmp_path / "a.journal"),
        "sqlite:///a.db": f"sqlite:///{tmp_path}/a.db",
        f"sqlite:///{tmp_path}/b.db": f"sqlite:///{tmp_path}/b.db",
        "grpc://node1:13000": "grpc://node1:13000",
        "postgresql://me@node1/studies": "postgresql+psycopg://me@node1/studies",
        "postgres://me@node1/studies": "postgresql+psycopg://me@node1/studies",
        "postgresql+psycopg2://node1/studies": "postgresql+psycopg2://node1/studies",
    }.items():
        assert storage_address(given_, Path()) == meant
        assert storage_address(meant, Path()) == meant


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("studies", "'studies' is no address"),
        ("http://node1", "is no address"),
        ("postgresql://", "is no address"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("grpc://node1", "grpc://host:port"),
        ("grpc://node1:port", "grpc://host:port"),
        ({"class_path": "InMemoryStorage"}, "none of Optuna's storages"),
        ({"class_path": "RDBStorage", "address": "x"}, "RDBStorage cannot be made"),
        ({"class_path": "JournalStorage", "log_storage": {"class_path": "File"}}, "'File' is none"),
    ],
)
def test_wrong_addresses_are_told_before_anything_is_opened(address, words):
    with pytest.raises(StorageError, match=words) as raised:
        storage_address(address, Path())
    assert raised.value.exit_code == 2


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setattr(storages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match=r"pip install 'psycopg\[binary\]'"):
        storage_address("postgresql://node1/studies", Path())


def test_passwords_are_told_to_nobody():
    secret = "postgresql://me:secret@127.0.0.1:1/studies"
    assert "secret" not in described(secret)
    assert "secret" not in described({"class_path": "RDBStorage", "url": secret})
    with pytest.raises(StorageError) as raised:
        storage_address("mongodb://me:secret@127.0.0.1/studies", Path())
    assert "secret" not in str(raised.value)
    pytest.importorskip("psycopg")
    with pytest.raises(StorageAwayError, match="refused") as raised:
        open_storage(secret, Path())
    assert "secret" not in str(raised.value)
    assert raised.value.exit_code == 1


# ---- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["new/a.journal", "sqlite:///new/a.db"])
def test_a_file_is_made_with_its_folder_and_read_again(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study(storage=open_storage(address, Path()), study_name="s")
    study.tell(study.ask({"x": FloatDistribution(0, 1)}), 1.0)
    again = optuna.load_study(storage=open_storage(address, Path()), study_name="s")
    assert again.best_params == study.best_params
    assert file_of(open_storage(address, Path())) == tmp_path / "new" / Path(address).name


def test_optunas_classes_are_made_of_their_arguments(tmp_path):
    backend = {"class_path": "JournalFileBackend", "file_path": str(tmp_path / "a.journal")}
    for given_ in (backend, {"class_path": "JournalStorage", "log_storage": backend}):
        opened = open_storage(given_, Path())
        assert isinstance(opened, JournalStorage)
        assert file_of(opened) == tmp_path / "a.journal"
    url = f"sqlite:///{tmp_path}/a{{b}}.db"
    opened = open_storage({"class_path": "RDBStorage", "init_args": {"url": url}}, Path())
    assert file_of(opened) == tmp_path / "a{b}.db"
    assert (tmp_path / "a{b}.db").exists()


def test_a_server_that_is_away_is_told_at_once(monkeypatch):
    monkeypatch.setattr(storages, "CONNECT_SECONDS", 0.3)
    pytest.importorskip("grpc")
    with pytest.raises(StorageAwayError, match=r"127\.0\.0\.1") as raised:
        open_storage(f"grpc://127.0.0.1:{free_port()}", Path())
    assert raised.value.exit_code == 1


def test_a_file_of_another_kind_is_refused_and_kept(tmp_path):
    for content in (b"no journal\nat all\n", b"SQLite format 3\x00\xff\xfe\n{}\n", b"{}\n{}\n"):
        other = tmp_path / "other.journal"
        other.write_bytes(content)
        with pytest.raises(StorageError, match="not a journal"):
            open_storage(str(other), Path())
        assert other.read_bytes() == content
    database = tmp_path / "other.db"
    database.write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match="not a database"):
        open_storage(f"sqlite:///{database}", Path())


def open_and_create(address: str) -> None:
    optuna.create_study(
        storage=open_storage(address, Path()), study_name="s", load_if_exists=True
    ).set_user_attr(str(os.getpid()), 1)


def open_at_once(address: str, processes: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_search_storage"])
    started = [context.Process(target=open_and_create, args=(address,)) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes
    opened = open_storage(address, Path())
    assert len(optuna.load_study(storage=opened, study_name="s").user_attrs) == processes
    close_storage(opened)


@pytest.mark.storages
def test_many_may_open_a_new_database_at_once(tmp_path):
    open_at_once(f"sqlite:///{tmp_path}/a.db", 8)


# ---- the journal's lock --------------------------------------------------------------------------


def test_a_writer_killed_within_the_lock_holds_nobody_up(tmp_path):
    journal = tmp_path / "a.journal"
    study = optuna.create_study(storage=open_storage(None, journal), study_name="s")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from research.search.storage import JournalLock\n"
        "JournalLock(Path(sys.argv[1])).acquire()\n"
        'os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), b\'{"op_code": 4, "wor\')\n'
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(journal)])
    assert killed.returncode == -signal.SIGKILL
    started = time.monotonic()
    study.set_user_attr("a", 1)
    assert time.monotonic() - started < 10  # Optuna's own locks wait for 30
    read = optuna.load_study(storage=open_storage(None, journal), study_name="s")
    assert read.user_attrs == {"a": 1}


def test_a_lock_excludes_others_and_lets_its_holder_in_again(tmp_path):
    first, other = (open_storage(None, tmp_path / "a.journal") for _ in range(2))
    code = (
        "import sys; from pathlib import Path; from research.search import storage\n"
        "storage.LOCK_SECONDS = 0.2\n"
        "storage.file_lock(Path(sys.argv[1])).acquire()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.journal")]
    with alone(first) as certain, alone(other):
        assert certain
        optuna.create_study(storage=first)
        assert b"Timeout" in subprocess.run(command, stderr=subprocess.PIPE).stderr
    assert subprocess.run(command).returncode == 0


@given(cut=st.integers(1, 200))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_torn_line_costs_nothing_but_itself(tmp_path, cut):
    journal = tmp_path / "a.journal"
    journal.unlink(missing_ok=True)
    study = optuna.create_study(storage=open_storage(None, journal), study_name="s")
    study.set_user_attr("kept", 1)
    whole = journal.read_bytes()
    study.set_user_attr("torn", "x" * 70)
    last = journal.read_bytes()[len(whole) :]
    journal.write_bytes(whole + last[: min(cut, len(last) - 1)])
    again = optuna.load_study(storage=open_storage(None, journal), study_name="s")
    assert again.user_attrs == {"kept": 1}
    again.set_user_attr("after", 2)
    assert again.user_attrs == {"kept": 1, "after": 2}
    assert journal.read_bytes().startswith(whole)


def test_a_torn_line_longer_than_one_look_is_taken_back(tmp_path):
    journal = tmp_path / "a.journal"
    journal.write_bytes(b"first\n" + b"x" * 200_000)
    lock = JournalLock(journal)
    lock.acquire()
    lock.release()
    assert journal.read_bytes() == b"first\n"
    journal.write_bytes(b"x" * 70_000)
    lock.acquire()
    lock.release()
    assert journal.read_bytes() == b""


# ---- outages -------------------------------------------------------------------------------------


def locked(text: str = "database is locked") -> Exception:
    error = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = sqlalchemy.exc.OperationalError("", {}, sqlite3.OperationalError(text))
    return error


def failing(times: int, error: Exception):
    calls = []

    def call(answer: int) -> int:
        calls.append(answer)
        if len(calls) <= times:
            raise error
        return answer

    return call, calls


@pytest.mark.parametrize("error", [locked(), ConnectionResetError()])
def test_a_call_is_made_again_until_the_storage_answers(error):
    call, calls = failing(2, error)
    assert patiently(call, 7) == 7
    assert calls == [7] * 3


@pytest.mark.parametrize(
    "error", [KeyError("study"), locked("no such table: trials"), optuna.TrialPruned()]
)
def test_what_is_no_outage_is_raised_at_once(error):
    call, calls = failing(1, error)
    with pytest.raises(type(error)):
        patiently(call, 7)
    assert len(calls) == 1


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(storages, "PATIENCE_SECONDS", 0.3)
    call, calls = failing(1000, locked())
    with pytest.raises(StorageAwayError, match="database is locked") as raised:
        patiently(call, 7)
    assert raised.value.exit_code == 1
    assert 1 < len(calls) < 10


def test_optunas_own_calls_are_patient(tmp_path):
    opened = open_storage(f"sqlite:///{tmp_path}/a.db", Path())
    study = optuna.create_study(storage=opened, study_name="s")
    trial = study.ask()
    holder = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    backend = opened._backend
    original = backend.set_trial_intermediate_value
    calls = []

    def away_once(*args):
        calls.append(args)
        if len(calls) == 1:
            holder.execute("COMMIT")
            raise locked()
        return original(*args)

    backend.set_trial_intermediate_value = away_once
    trial.report(0.5, 0)
    assert study.trials[0].intermediate_values == {0: 0.5}
    holder.close()


# ---- servers -------------------------------------------------------------------------------------


@pytest.mark.storages
@needs_postgresql
def test_many_may_open_an_empty_postgresql_at_once():
    with postgresql() as database:
        open_at_once(database.address, 8)


@pytest.mark.storages
@needs_postgresql
def test_a_restarted_postgresql_loses_no_trial(capfd):
    with postgresql() as database:
        opened = open_storage(database.address, Path())
        study = optuna.create_study(storage=opened)
        trial = study.ask()
        trial.report(0.25, 0)
        database.stop()
        starting = threading.Timer(4, database.start)
        starting.start()
        trial.report(0.5, 1)
        starting.join()
        study.tell(trial, 1.0)
        assert study.trials[0].intermediate_values == {0: 0.25, 1: 0.5}
        close_storage(opened)
    assert "away" in capfd.readouterr().err


@pytest.mark.storages
def test_a_restarted_proxy_loses_no_trial(tmp_path):
    behind, port = f"sqlite:///{tmp_path}/a.db", free_port()
    with proxy(behind, port) as address:
        opened = open_storage(address, Path())
        assert isinstance(opened, GrpcStorageProxy)
        study = optuna.create_study(storage=opened)
        trial = study.ask()
        trial.report(0.25, 0)
    with proxy(behind, port):
        trial.report(0.5, 1)
        study.tell(trial, 1.0)
        assert study.trials[0].intermediate_values == {0: 0.25, 1: 0.5}
        assert file_of(opened) is None
        close_storage(opened)


def asked(address: str):
    for _ in range(200):
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError("optuna-dashboard did not answer")


@pytest.mark.storages
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_optuna_dashboard_reads_the_storage(tmp_path, kind):
    pytest.importorskip("optuna_dashboard")
    path = tmp_path / f"a.{kind}"
    name = str(path) if kind == "journal" else f"sqlite:///{path}"
    address = str(tmp_path / "a.journal") if kind == "journal" else name
    study = optuna.create_study(storage=open_storage(address, Path()), study_name="s")
    trial = study.ask({"lr": FloatDistribution(0.0, 1.0)})
    trial.report(0.5, 0)
    study.tell(trial, 0.75)
    port = free_port()
    command = [Path(sys.executable).with_name("optuna-dashboard"), name, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = asked(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
        assert [entry["study_name"] for entry in found] == ["s"]
        detail = asked(f"http://127.0.0.1:{port}/api/studies/{found[0]['study_id']}?after=0")
        assert [trial["state"] for trial in detail["trials"]] == ["Complete"]
        study.tell(study.ask(), 0.5)  # while it is being looked at
    finally:
        server.kill()
        server.wait()
