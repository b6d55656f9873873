"""Why a record did not get through: whether it may later, and what to tell the user."""

import errno
import re
from collections.abc import Sequence
from pathlib import Path

from research.tracking.store import TrackingError, is_server, redact, sqlite_path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def may_pass(error: Exception, uri: str) -> bool:
    """Whether trying again later may help: the store is away, busy, or full."""
    code = getattr(error, "error_code", None)
    if code in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
        return True
    if not is_server(uri) or isinstance(error, FileNotFoundError):
        return False
    return code == "INTERNAL_ERROR" or (code is None and isinstance(error, OSError))


def explain(error: Exception, uri: str) -> str:
    """One or two sentences for the user on why the store cannot be used, and what to do."""
    if isinstance(error, TrackingError):
        return str(error)
    store, text = redact(uri), redact(str(error))
    database = sqlite_path(uri)
    if isinstance(error, ModuleNotFoundError):
        if error.name == "mlflow":
            return (
                "MLflow is not installed. Install it (pip install mlflow), or record nothing "
                'with --tracking_uri "".'
            )
        return f"{store} needs the package {error.name}, which is not installed."
    if is_server(uri) and re.search("failed with (timeout )?exception", text):
        return (
            f"No MLflow server answers at {store}. Start it, or correct --tracking_uri (or "
            'MLFLOW_TRACKING_URI); "" records nothing.'
        )
    if is_server(uri) and re.search(r"\b(401|403)\b", text):
        return (
            f"The MLflow server at {store} refuses access. Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    if "Can't locate revision" in text:
        return _other_version(store, newer=True)
    if found := re.search(r"found version (\w+), but expected", text):
        return _other_version(store, newer=not _is_known_revision(found[1]))
    if database is not None and "not a database" in text:
        return f"{database} is not an SQLite database. Move it away, or use another --tracking_uri."
    if database is not None and ("malformed" in text or "disk I/O error" in text):
        return (
            f"{database} is damaged, or its disk is. Put a copy of it back, or move it away and a "
            f'new one is made; what can be saved of it, "sqlite3 {database} .recover" prints.'
        )
    refused = _refused_by_system(error)
    if refused is not None and not _is_of(refused, database):
        return _told_of_file(refused)
    if "disk is full" in text or "No space left" in text:
        return f"The disk that holds {database or store} is full. Free some space."
    if database is not None and re.search("readonly|unable to open|Permission", text):
        return (
            f"{database} and its folder must be writable to record runs there. Change their "
            "permissions, or use another --tracking_uri."
        )
    if database is not None and ("is locked" in text or type(error).__name__ == "Timeout"):
        return f"{database} is held by another process. Wait for it to finish, or end it."
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"{store}: {first[:500]}"


def _refused_by_system(error: BaseException) -> OSError | None:
    """The system's refusal of a file, which MLflow may hide behind an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.filename and cause.errno in FULL | FORBIDDEN:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _is_of(refused: OSError, database: Path | None) -> bool:
    return database is not None and Path(str(refused.filename)).name.startswith(database.name)


def _told_of_file(refused: OSError) -> str:
    if refused.errno in FULL:
        return f"The disk that holds {refused.filename} is full. Free some space."
    return (
        f"{refused.filename} cannot be written ({refused.strerror}). Change its permissions or "
        "those of its folder, or use another --tracking_uri."
    )


def _other_version(store: str, newer: bool) -> str:
    from mlflow.version import VERSION

    if newer:
        return (
            f"{store} was written by a newer MLflow than the {VERSION} installed here. Update it "
            "(pip install --upgrade mlflow), or use another --tracking_uri."
        )
    return (
        f"{store} was written by an older MLflow than the {VERSION} installed here. Make a copy "
        f"of it, then run: mlflow db upgrade {store}"
    )


def _is_known_revision(revision: str) -> bool:
    import mlflow.store.db_migrations

    folders: Sequence[str] = list(mlflow.store.db_migrations.__path__)
    return any(any(Path(folder).glob(f"versions/{revision}_*.py")) for folder in folders)
