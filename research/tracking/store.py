"""Where runs live: which tracking store, which file, and the command that shows a run in it.

With nothing set, runs go to `mlflow.db` at the project root and their files to `mlruns/` beside it,
which is what a bare `mlflow ui` there looks at. Standard library only: this is on the way of
every start.
"""

import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
ALLOWED = "sqlite:///path/to/mlflow.db, http(s)://host:port, postgresql://user@host/database"
SERVER_ADDRESS = "http://127.0.0.1:5000"  # where `mlflow ui` listens unless told otherwise


class TrackingError(ValueError):
    """A run could not be recorded; the message says why and what to do, in plain words."""


def project_root() -> Path:
    """Folder that holds this project (its pyproject.toml), else the current folder."""
    above_package = Path(__file__).resolve().parents[2]
    return above_package if (above_package / "pyproject.toml").is_file() else Path.cwd()


def sqlite_uri(database: Path) -> str:
    """Address of an SQLite file, absolute; `%` and `?` are escaped, as SQLAlchemy reads them."""
    path = database.absolute().as_posix()
    return "sqlite:///" + path.replace("%", "%25").replace("?", "%3F")


def sqlite_path(tracking_uri: str) -> Path | None:
    """File behind an `sqlite:///` address; None for every other kind of store."""
    scheme, separator, rest = tracking_uri.partition(":///")
    if not separator or scheme.partition("+")[0] != "sqlite":
        return None
    return Path(unquote(rest.partition("?")[0]))


def is_server(tracking_uri: str) -> bool:
    """Whether a server keeps the runs, reached over the network."""
    return urlsplit(tracking_uri).scheme in ("http", "https")


def resolve_tracking_uri(flag: str | None) -> str | None:
    """Address of the tracking store, absolute; None when nothing is to be recorded.

    `flag` decides if given, and `""` means no tracking. Otherwise MLFLOW_TRACKING_URI, read now,
    decides; empty counts as not set, as it does for MLflow. Otherwise the default store. Raises
    ValueError on an address that MLflow could not write to from here.
    """
    if flag is not None:
        return _checked(flag, "--tracking_uri") if flag.strip() else None
    variable = os.environ.get("MLFLOW_TRACKING_URI", "")
    if variable.strip():
        return _checked(variable, "MLFLOW_TRACKING_URI")
    return sqlite_uri(project_root() / "mlflow.db")


def _checked(address: str, setting: str) -> str:
    address = address.strip()
    problem = f"{setting}: {redact(address)!r}"
    parts = re.match(r"([A-Za-z][A-Za-z0-9.-]*(?:\+[A-Za-z0-9_]+)?):(.*)", address, re.DOTALL)
    # A single letter before the colon is a Windows drive.
    scheme = parts[1].lower() if parts and len(parts[1]) > 1 else ""
    if scheme in ("", "file"):
        raise ValueError(
            f"{problem} is a folder, and MLflow no longer keeps runs in folders. "
            f'Allowed: {ALLOWED}, or "" to record nothing.'
        )
    if scheme in ("http", "https"):
        try:
            host = urlsplit(address).hostname
            _ = urlsplit(address).port
        except ValueError as error:
            raise ValueError(
                f"{problem} is not a web address ({error}). Allowed: {ALLOWED}."
            ) from error
        if not host:
            raise ValueError(f"{problem} names no host. Allowed: {ALLOWED}.")
        return address.rstrip("/")
    if scheme.partition("+")[0] not in DATABASES:
        raise ValueError(
            f'{problem} is no address of a tracking store. Allowed: {ALLOWED}, or "" to '
            "record nothing."
        )
    path = sqlite_path(address)
    if path is None:
        if scheme.startswith("sqlite") or "://" not in address:
            raise ValueError(
                f"{problem} lacks its slashes (three before a relative path, four before an "
                f"absolute one). Allowed: {ALLOWED}."
            )
        return address
    if not path.name or path.name == ":memory:" or path.is_dir():
        raise ValueError(
            f"{problem} names no database file (a database in memory would be gone with the run, "
            f"a folder cannot hold one by itself). Allowed: {ALLOWED}."
        )
    head, _, rest = address.partition(":///")
    _, mark, query = rest.partition("?")
    return head + sqlite_uri(path).removeprefix("sqlite") + mark + query


def redact(text: str) -> str:
    """The text with the password of any address in it replaced by `***`."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", text)


def show_command(tracking_uri: str, run_id: str, experiment_id: str) -> str:
    """What a reader types or opens to see the run.

    For a database the `mlflow ui` command, followed, as a comment of the shell, by the run's page;
    for a server the run's page.
    """
    # A browser that is new to MLflow is shown the page of a language model's evaluation without.
    page = f"#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"
    page += "?workflowType=machine_learning"
    if is_server(tracking_uri):
        return f"{re.sub(r'://[^/@]*@', '://', tracking_uri)}/{page}"
    command = "mlflow ui"
    if not _is_what_bare_ui_shows(sqlite_path(tracking_uri)):
        command += f" --backend-store-uri {shlex.quote(redact(tracking_uri))}"
    return f"{command}  # then open {SERVER_ADDRESS}/{page}"


def _is_what_bare_ui_shows(database: Path | None) -> bool:
    """Whether `mlflow ui`, typed here with nothing behind it, opens this file.

    It prefers an old file store, recognised by `mlruns/<number>/meta.yaml`, to `mlflow.db`.
    """
    here = Path.cwd()
    return (
        database is not None
        and database.name == "mlflow.db"
        and database.parent.resolve() == here.resolve()
        and not os.environ.get("MLFLOW_BACKEND_STORE_URI")
        and not any(here.glob("mlruns/[0-9]*/meta.yaml"))
    )
