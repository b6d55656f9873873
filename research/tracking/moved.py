"""A project that was moved or copied keeps its files: the store's paths follow its folder.

MLflow stores where files lie as absolute paths.  Where `mlflow.db` and `mlruns/` now lie elsewhere,
those lead to nothing, or, after a copy, to the original's files.  Paths that somebody chose
elsewhere on purpose (another disk, s3://...) stay as they are.
"""

import contextlib
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from research.tracking.lock import store_lock

MLRUNS = "mlruns"
BUSY_SECONDS = 20.0


@dataclass(frozen=True)
class PathColumn:
    """Where a table of MLflow keeps paths, what they are of, and how their experiment is found."""

    table: str
    column: str
    what: str
    experiment: str = "experiment_id"
    condition: str = "true"


EXPERIMENTS = PathColumn("experiments", "artifact_location", "experiment")
COLUMNS = (
    EXPERIMENTS,
    PathColumn("runs", "artifact_uri", "run"),
    PathColumn("logged_models", "artifact_location", "model"),
    PathColumn("model_versions", "source", "registered model", "null"),
    PathColumn("model_versions", "storage_location", "registered model", "null"),
    PathColumn("trace_tags", "value", "trace", "null", "key = 'mlflow.artifactLocation'"),
)


@dataclass(frozen=True)
class Stray:
    """A path in the store, of the shape home/mlruns/tail, that leads out of the store's folder."""

    where: PathColumn
    row: int
    experiment: int | None
    stored: str
    path: Path
    home: Path
    tail: Path


def repair_paths(database: Path) -> list[str]:
    """Let the paths of a moved or copied store lead to the files beside it; a line of what changed.

    One look, and nothing written, where nothing was moved. The errors are SQLite's and the lock's.
    """
    with _opened(database) as connection:
        if not list(_moved(connection, database)):
            return []
    with store_lock(database), _opened(database) as connection:
        connection.execute("BEGIN IMMEDIATE")
        changed = list(_moved(connection, database))  # somebody else may have been faster
        for stray in changed:
            where, new = stray.where, _stored_as(_counterpart(stray, database), stray.stored)
            connection.execute(
                f"UPDATE {where.table} SET {where.column} = ? WHERE rowid = ?", (new, stray.row)
            )
        names = dict(connection.execute("SELECT experiment_id, name FROM experiments"))
        connection.commit()
    return _told(changed, names, database)


def find_beside(folder: Path, database: Path) -> Path:
    """The folder of a run as it lies beside the store, if it does; else the one that is stored."""
    split = None if _is_at_home(folder, database) else _split(folder)
    if split is None:
        return folder
    beside = _mlruns(database) / split[1]
    return beside if beside.is_dir() and not is_same(folder, beside) else folder


# ---- what was moved ------------------------------------------------------------------------------


def _moved(connection: sqlite3.Connection, database: Path) -> Iterator[Stray]:
    """The paths to be changed: those of homes that this store came from, if no file is lost."""
    strays = list(_strays(connection, database))
    homes = {
        home
        for home in {stray.home for stray in strays}
        if not is_same(home / MLRUNS, _mlruns(database))  # one folder by two names
        and (_have_come(home, strays, database) or _is_copied(home, connection, database))
    }
    for stray in strays:
        if stray.home in homes and (stray.where is EXPERIMENTS or _may_go(stray, database)):
            yield stray


def _have_come(home: Path, strays: Iterable[Stray], database: Path) -> bool:
    """Whether files that the store looks for in `home` are here, beside it."""
    # os.path's, which takes what is in a closed folder for not there.
    was_left = not os.path.exists(home / MLRUNS)
    # Ids of runs and models are unique, numbers of experiments are not.
    return any(
        (stray.where is not EXPERIMENTS or was_left) and _counterpart(stray, database).exists()
        for stray in strays
        if stray.home == home
    )


def _is_copied(home: Path, connection: sqlite3.Connection, database: Path) -> bool:
    """Whether the original of this store is still in `home`: they have an experiment in common."""
    original = home / database.name
    if not os.path.isfile(original) or is_same(original, database):
        return False
    made = "SELECT experiment_id, creation_time FROM experiments"  # to the millisecond
    with contextlib.suppress(sqlite3.Error), _opened(original, "ro") as other:
        return not {*connection.execute(made)}.isdisjoint(other.execute(made))
    return False


def _may_go(stray: Stray, database: Path) -> bool:
    """False where the files are only where the path says: a copy that left some out."""
    return _counterpart(stray, database).exists() or not _holds_anything(stray.path)


def _strays(connection: sqlite3.Connection, database: Path) -> Iterator[Stray]:
    for where in COLUMNS:
        known = {row[1] for row in connection.execute(f"PRAGMA table_info({where.table})")}
        if where.column not in known:  # another version of MLflow
            continue
        # Told apart in SQLite: a store may have ten thousands of runs, all where they should be.
        beginnings = sorted(_beginnings(database))
        at_home = " OR ".join(f"substr({where.column}, 1, {len(b)}) = ?" for b in beginnings)
        rows = connection.execute(
            f"SELECT rowid, {where.experiment}, {where.column} FROM {where.table} "
            f"WHERE {where.condition} AND NOT ({at_home})",
            beginnings,
        )
        for row, experiment, stored in rows:
            if not stored.startswith(("/", "file:")):  # s3://..., mlflow-artifacts:, a model's id
                continue
            path = _path_of(stored)
            split = None if _is_at_home(path, database) else _split(path)
            if split is not None:
                yield Stray(where, row, experiment, stored, path, *split)


def _split(path: Path) -> tuple[Path, Path] | None:
    """What is before and behind the last `mlruns` of a path; None without one."""
    places = [place for place, part in enumerate(path.parts) if part == MLRUNS]
    if not places or places[-1] + 1 == len(path.parts):
        return None
    return Path(*path.parts[: places[-1]]), Path(*path.parts[places[-1] + 1 :])


def _mlruns(database: Path) -> Path:
    return database.absolute().parent / MLRUNS


def _counterpart(stray: Stray, database: Path) -> Path:
    return _mlruns(database) / stray.tail


def _is_at_home(path: Path, database: Path) -> bool:
    folder = database.absolute().parent
    # A process that works in the folder writes its real path, also where a link led there.
    return any(path.is_relative_to(home / MLRUNS) for home in (folder, folder.resolve()))


def is_same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def _holds_anything(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(folder.iterdir())
    return False


# ---- the store -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(database: Path, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    # `rw` makes no file, and reads one that cannot be written; `ro` fails after a killed write.
    address = f"file:{quote(database.absolute().as_posix())}?mode={mode}"
    connection = sqlite3.connect(address, timeout=BUSY_SECONDS, uri=True, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()  # takes back what was not committed


def _beginnings(database: Path) -> set[str]:
    """How the stored paths of files in their place begin, most of them; `_is_at_home` knows all."""
    folder = database.absolute().parent
    paths = {(home / MLRUNS).as_posix() for home in (folder, folder.resolve())}
    return {f"{path}/" for path in paths | {path.replace("%", "%25") for path in paths}}


def _path_of(stored: str) -> Path:
    """As MLflow reads it, which takes %20 for a space also in a plain path."""
    return Path(url2pathname(urlsplit(stored).path if stored.startswith("file:") else stored))


def _stored_as(path: Path, before: str) -> str:
    """As an address where it was one before, else as a plain path that MLflow reads so."""
    return path.as_uri() if before.startswith("file:") else path.as_posix().replace("%", "%25")


def _told(changed: Iterable[Stray], names: dict[int, str], database: Path) -> list[str]:
    """A line for each experiment: what of it is found where now."""
    counts: dict[int | None, Counter[str]] = {}
    homes: dict[int | None, Path] = {}
    for stray in changed:
        homes.setdefault(stray.experiment, stray.home)
        counts.setdefault(stray.experiment, Counter())[stray.where.what] += 1
    lines = []
    for experiment, count in counts.items():
        name = "model registry" if experiment is None else f'experiment "{names.get(experiment)}"'
        parts = [
            f"{number} {what}{'s' if number != 1 else ''}"
            for what, number in count.items()
            if what != EXPERIMENTS.what
        ]
        whose = f" ({' and '.join(parts)})" if parts else ""
        lines.append(
            f"{name}: its files{whose} are looked for in {_mlruns(database)} now, no longer in "
            f"{homes[experiment] / MLRUNS}"
        )
    return lines
