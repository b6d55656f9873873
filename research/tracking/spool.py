"""What a run was told, on disk, until the store has it: nobody's death and no outage loses it.

A run's folder:

    records.jsonl   all that the run was told, one JSON line each; the training process appends
                    to it and holds a lock on it while it may still do so
    delivered       up to which byte of that the store has all, and the next sample's step
    run.json        which run of the store it is, once that is known
    samples.jsonl   what the recorder process measured and could not deliver
    documents/      files of the provenance that are not sent yet
    files/          the run's scratch folder
    lock            locked by whoever delivers

The kernel lets go of a lock when its process dies. Where there are no such locks (Windows, some
network file systems) they are taken to be free. Records are safe from a death of any process; the
death of the machine may cost the last seconds, for nothing here is synced.

Standard library only: this is imported before torch.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from research.tracking.store import project_root, sqlite_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORDS, SAMPLES, DOCUMENTS, SCRATCH = "records.jsonl", "samples.jsonl", "documents", "files"
LOCK_SECONDS = 0.5  # another process looks whether a lock is free by holding it for a moment
EMPTY_SECONDS = 60.0  # a folder without a record is one that is just being made


def spool_root(tracking_uri: str) -> Path:
    """The folder of the spools of a store's runs: RESEARCH_SPOOL, else `mlruns/.spool`.

    For an SQLite file beside it, for every other store at the project's root.
    """
    if folder := os.environ.get("RESEARCH_SPOOL"):
        return Path(folder).absolute()
    database = sqlite_path(tracking_uri)
    home = project_root() if database is None else database.absolute().parent
    return home / "mlruns" / ".spool"


def new_spool(tracking_uri: str, number: int) -> "Spool":
    """A spool for a run of this process, the `number`th; nothing is on disk yet."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    return Spool(spool_root(tracking_uri) / f"{stamp}-{os.getpid()}-{number}")


def waiting(root: Path) -> list["Spool"]:
    """Spools, the oldest first, that nobody writes to and nobody delivers."""
    spools = [Spool(path.parent) for path in sorted(root.glob(f"*/{RECORDS}"))]
    return [spool for spool in spools if spool.is_abandoned()]


class Spool:
    """A run's folder. Of its two ends, one process opens, appends and closes; another delivers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken = False  # could not be written: it does not hold all any more
        self._records: int | None = None
        self._claim: int | None = None

    # ---- the training process's end ------------------------------------------------------------

    def append(self, lines: bytes) -> int:
        """Write whole lines; the size afterwards. OSError if they cannot be written."""
        if self._records is None:
            self.make_folder()
            self._records = _open(self.folder / RECORDS)
            _lock(self._records, LOCK_SECONDS)
        before = os.fstat(self._records).st_size
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._records, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._records, before)
            raise
        return before + len(lines)

    def close(self) -> None:
        """Nothing more is written."""
        descriptor, self._records = self._records, None
        if descriptor is not None:
            _close(descriptor)

    def make_folder(self, name: str = "") -> Path:
        """The folder, or one inside it, for this user only: an address may hold a password."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    # ---- the end of whoever delivers -----------------------------------------------------------

    def claim(self) -> bool:
        """Whether it is ours to deliver: there, and not in another's hands."""
        if self._claim is None:
            try:
                descriptor = _open(self.folder / "lock")
            except OSError:
                return not self.is_gone()  # a folder that cannot be written may still be read
            is_ours = _lock(descriptor, LOCK_SECONDS)
            # Whoever held it may have delivered all and removed it a moment ago.
            if not is_ours or self.is_gone():
                _close(descriptor)
                if is_ours:  # the lock alone came after the removal
                    shutil.rmtree(self.folder, ignore_errors=True)
                return False
            self._claim = descriptor
        return True

    def release(self) -> None:
        descriptor, self._claim = self._claim, None
        if descriptor is not None:
            _close(descriptor)

    def remove(self) -> None:
        """Remove it all; who holds it lets go."""
        # The records first: without its lock, what is still there would look abandoned.
        with contextlib.suppress(OSError):
            (self.folder / RECORDS).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def read(self, begin: int, end: int | None = None) -> Iterator[tuple[dict[str, Any], int]]:
        """Records from byte `begin` to `end`, or to the last whole line; each with where it ends.

        A line that no writer left so (the disk's fault) is passed over.
        """
        with open(self.folder / RECORDS, "rb") as file:
            file.seek(begin)
            at = begin
            while end is None or at < end:
                line = file.readline()
                if not line.endswith(b"\n"):
                    return  # the writer was killed in the middle of it
                at += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line), at

    def metrics(self) -> Iterator[tuple[list[Any], int]]:
        """Rows of metrics that the run was told, and where their record ends; none if gone."""
        with contextlib.suppress(OSError):
            for message, end in self.read(0):
                if message["op"] == "metrics":
                    yield message["rows"], end

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the run in the store; empty before anything is."""
        try:
            found = json.loads((self.folder / "run.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @about.setter
    def about(self, known: dict[str, Any]) -> None:
        self._replace("run.json", json.dumps(known))

    @property
    def delivered(self) -> tuple[int, int]:
        """Byte up to which the store has all, and the step of the next sample."""
        try:
            end, step = (self.folder / "delivered").read_text().split()
            return int(end), int(step)
        except (OSError, ValueError):
            return 0, 0

    @delivered.setter
    def delivered(self, value: tuple[int, int]) -> None:
        self._replace("delivered", f"{value[0]} {value[1]}")

    def keep_samples(self, rows: list[Any]) -> None:
        """Set samples aside that could not be delivered."""
        with (
            contextlib.suppress(OSError),
            open(self.folder / SAMPLES, "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps({"op": "metrics", "rows": rows}) + "\n")

    def samples(self) -> list[dict[str, Any]]:
        try:
            lines = (self.folder / SAMPLES).read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _replace(self, name: str, text: str) -> None:
        """Leaves the old or the new text, whatever happens; on a full disk the old."""
        with contextlib.suppress(OSError):
            side = self.folder / f"{name}.new"
            side.write_text(text)
            os.replace(side, self.folder / name)

    # ---- anybody's -----------------------------------------------------------------------------

    @property
    def pid(self) -> str:
        """The process that wrote it."""
        return self.folder.name.split("-")[-2]

    def is_gone(self) -> bool:
        return not (self.folder / RECORDS).exists()

    def is_written(self) -> bool:
        """Whether the process that writes to it is there and may write more."""
        return self._is_locked(RECORDS)

    def is_abandoned(self) -> bool:
        """Whether nobody writes to it and nobody delivers it."""
        try:
            state = (self.folder / RECORDS).stat()
        except OSError:
            return False
        if state.st_size == 0 and time.time() - state.st_mtime < EMPTY_SECONDS:
            return False
        return not self.is_written() and not self._is_locked("lock")

    def size(self) -> int:
        """Bytes of records; 0 where it is gone."""
        try:
            return (self.folder / RECORDS).stat().st_size
        except OSError:
            return 0

    def written_at(self) -> float:
        """When the last record was written, in seconds."""
        return (self.folder / RECORDS).stat().st_mtime

    def count(self) -> int:
        """How many records wait: a value of a metric is one, and so is each file, tag..."""
        records = 0
        with contextlib.suppress(OSError):
            for message, _ in self.read(self.delivered[0]):
                if message["op"] != "flush":
                    records += len(message["rows"]) if message["op"] == "metrics" else 1
        return records + sum(len(message["rows"]) for message in self.samples())

    def _is_locked(self, name: str) -> bool:
        try:
            descriptor = os.open(self.folder / name, os.O_RDWR)
        except OSError:
            return False
        try:
            return not _lock(descriptor)
        finally:
            os.close(descriptor)


# ---- locks ---------------------------------------------------------------------------------------

_held: set[int] = set()


def _open(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    _held.add(descriptor)
    return descriptor


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _lock(descriptor: int, seconds: float = 0.0) -> bool:
    """Whether we have the lock; another's stands against it, also one of this process.

    One that is taken is tried again for so many `seconds`.
    """
    if fcntl is None:
        return True
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        except OSError:  # this file system knows no locks
            return True
        else:
            return True


def _let_go() -> None:
    # A worker that the training process forked must not hold its locks when it is dead.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
