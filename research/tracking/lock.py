"""The lock of a store's file: who makes the store, or changes more than one run of it, holds it."""

from pathlib import Path
from typing import Any

LOCK_SECONDS = 60.0


def store_lock(database: Path) -> Any:
    """The lock beside an SQLite store, to be entered; filelock.Timeout after a minute.

    One object for all of a process, so that a holder may enter it again; other threads wait.
    """
    from filelock import FileLock

    return FileLock(f"{database}.lock", timeout=LOCK_SECONDS, is_singleton=True)
