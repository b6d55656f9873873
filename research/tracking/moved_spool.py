"""The spool of a project that was moved or copied leads to the store and the files beside it.

Its records name the store and files by absolute paths, as they were where it was written.  A copy
must neither wait for the original's store nor write to it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from research.tracking.moved import MLRUNS, is_same
from research.tracking.spool import Spool
from research.tracking.store import sqlite_path, sqlite_uri

PATHS = ("artifact_dir", "folder", "source", "spool_root")  # in records, and in what a spool knows


def address_of(spool: Spool) -> str | None:
    """The store that its records are for; None if nothing can be read of them."""
    try:
        return next((message.get("tracking_uri") for message, _ in spool.read(0)), None)
    except OSError:  # delivered and removed just now
        return None


def followed(spool: Spool) -> Spool:
    """The spool itself, or the same with other paths, where it was moved with its store."""
    before = sqlite_path(address_of(spool) or "")
    if before is None or not spool.folder.match(f"{MLRUNS}/.spool/*"):
        return spool
    now = spool.folder.absolute().parents[2] / before.name
    if now == before or is_same(now, before) or not now.exists():
        return spool
    return MovedSpool(spool.folder, before, now)


class MovedSpool(Spool):
    """A spool that was written for the store `before`, which is `now` elsewhere."""

    def __init__(self, folder: Path, before: Path, now: Path) -> None:
        super().__init__(folder)
        self._before, self._now = before, now

    def read(self, begin: int, end: int | None = None) -> Iterator[tuple[dict[str, Any], int]]:
        for message, at in super().read(begin, end):
            yield self._here(message), at

    @property
    def about(self) -> dict[str, Any]:
        return self._here(super().about)

    @about.setter
    def about(self, known: dict[str, Any]) -> None:
        Spool.about.fset(self, known)  # type: ignore[attr-defined]

    def _here(self, record: dict[str, Any]) -> dict[str, Any]:
        found = {name: self._path_here(record[name]) for name in PATHS if name in record}
        if "tracking_uri" in record:
            found["tracking_uri"] = sqlite_uri(self._now)
        return record | found

    def _path_here(self, path: str | None) -> str | None:
        home = f"{self._before.parent / MLRUNS}/"
        if path is None or not path.startswith(home):
            return path
        return str(self._now.parent / MLRUNS / path.removeprefix(home))
