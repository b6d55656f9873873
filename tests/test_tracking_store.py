import os
from pathlib import Path

import pytest

from research.tracking.store import (
    project_root,
    redact,
    resolve_tracking_uri,
    show_command,
    sqlite_path,
    sqlite_uri,
)

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def test_default_store_is_a_file_at_the_project_root_from_any_folder():
    assert project_root() == PROJECT
    assert resolve_tracking_uri(None) == f"sqlite:///{PROJECT.as_posix()}/mlflow.db"


def test_empty_flag_means_no_tracking_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_tracking_uri("") is None
    assert resolve_tracking_uri("  ") is None


def test_environment_is_read_at_the_call_and_empty_counts_as_unset(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000/")
    assert resolve_tracking_uri(None) == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert resolve_tracking_uri(None) == f"sqlite:///{PROJECT.as_posix()}/mlflow.db"


def test_flag_wins_over_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_tracking_uri("sqlite:///runs.db") == f"sqlite:///{tmp_path}/runs.db"


@pytest.mark.parametrize(
    "address",
    [
        "https://mlflow.example.org",
        "http://[::1]:5000",
        "postgresql://user:secret@host:5432/mlflow",
        "postgresql+psycopg2://user@host/mlflow",
        "sqlite:////var/runs.db",
    ],
)
def test_addresses_mlflow_can_write_to_are_kept(address):
    assert resolve_tracking_uri(address) == address


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("mlruns", "folder"),
        ("./mlruns", "folder"),
        ("C:/runs", "folder"),
        ("file:./mlruns", "folder"),
        ("file:///tmp/mlruns", "folder"),
        ("sqlite://", "slashes"),
        ("sqlite:runs.db", "slashes"),
        ("postgresql:host", "slashes"),
        ("sqlite:///", "no database file"),
        ("sqlite:///:memory:", "no database file"),
        ("sqlite:///.", "no database file"),
        ("htp://host:5000", "no address"),
        ("http://", "no host"),
        ("http://host:port", "not a web address"),
        ("databricks", "folder"),
    ],
)
def test_other_addresses_are_refused_with_what_is_allowed(address, why):
    with pytest.raises(ValueError, match=why) as refusal:
        resolve_tracking_uri(address)
    assert "--tracking_uri" in str(refusal.value)
    assert "sqlite:///path/to/mlflow.db" in str(refusal.value)


def test_refusal_names_the_variable_that_the_address_came_from(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    with pytest.raises(ValueError, match=r"^MLFLOW_TRACKING_URI: 'file:./mlruns'"):
        resolve_tracking_uri(None)


@pytest.mark.parametrize("name", ["plain", "with space", "100%20 sure?", "#1", "ümlaut"])
def test_sqlite_address_leads_back_to_its_file(tmp_path, name):
    database = tmp_path / name / "mlflow.db"
    assert sqlite_path(sqlite_uri(database)) == database
    assert resolve_tracking_uri(sqlite_uri(database)) == sqlite_uri(database)


def test_only_sqlite_addresses_have_a_file():
    assert sqlite_path("postgresql://host/db") is None
    assert sqlite_path("http://host:5000") is None


def test_bare_ui_shows_the_store_of_the_current_folder(tmp_path):
    command = show_command(f"sqlite:///{tmp_path}/mlflow.db", "abc", "1")
    page = "http://127.0.0.1:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
    assert command == f"mlflow ui  # then open {page}"


@pytest.mark.parametrize("obstacle", ["other folder", "other name", "variable", "old file store"])
def test_store_that_bare_ui_would_not_show_is_named(monkeypatch, tmp_path, obstacle):
    database = tmp_path / "mlflow.db"
    match obstacle:
        case "other folder":
            monkeypatch.chdir(os.sep)
        case "other name":
            database = tmp_path / "my runs.db"
        case "variable":
            monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:///other.db")
        case "old file store":
            (tmp_path / "mlruns" / "0").mkdir(parents=True)
            (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
    command = show_command(f"sqlite:///{database}", "abc", "1")
    uri = f"sqlite:///{database}"
    quoted = f"'{uri}'" if " " in uri else uri
    assert command.startswith(f"mlflow ui --backend-store-uri {quoted}  # then open http://")


def test_run_on_a_server_is_shown_by_its_page():
    shown = show_command("http://user:secret@host:5000", "abc", "7")
    page = "http://host:5000/#/experiments/7/runs/abc?workflowType=machine_learning"
    assert shown == page


def test_passwords_are_never_shown():
    secret = "postgresql://me:se-cret@host/db"
    assert redact(f"--tracking_uri {secret} x") == "--tracking_uri postgresql://me:***@host/db x"
    assert "se-cret" not in show_command(secret, "abc", "1")
    with pytest.raises(ValueError, match="no address") as refusal:
        resolve_tracking_uri("mongo://me:se-cret@host/db")
    assert "se-cret" not in str(refusal.value)
