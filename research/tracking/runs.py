"""Recorded runs, read back: found by id, by the beginning of an id, or by name.

A store that is not there is not made, and an older one is not migrated. The one thing written is
that dead runs are dead, where that can be written.
MLflow is imported by the first look into a store.
"""

import contextlib
import difflib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from research.tracking.heartbeat import end_dead_runs
from research.tracking.limits import MAX_NAME
from research.tracking.lookup import all_experiments, local_folder, run_of_id
from research.tracking.moved import find_beside
from research.tracking.store import TrackingError, redact, sqlite_path

TOLD_RUNS = 5
NEAREST_AMONG = 1000  # the newest: a store of 10,000 runs answers in seconds
FIRST_RUN = "python -m research.fit --config experiments/quickstart.yaml"


@dataclass(frozen=True)
class RecordedRun:
    """A run as the store knows it.

    `metrics` holds the latest value of each.  `artifact_dir` is the folder of the run's files;
    None where a server keeps them, and `file` brings them here.
    """

    tracking_uri: str
    run_id: str
    run_name: str
    experiment_id: str
    status: str
    started_at: datetime
    metrics: dict[str, float]
    tags: dict[str, str]
    artifact_dir: Path | None

    def configuration(self) -> str:
        """The whole configuration, as YAML; TrackingError where the run has none."""
        return self.file("config.yaml").read_text(encoding="utf-8")

    def checkpoint(self, name: str | None = None) -> Path:
        """A checkpoint file, by what `checkpoint_name` takes."""
        return self.file(f"checkpoints/{self.checkpoint_name(name)}")

    def checkpoint_name(self, name: str | None = None) -> str:
        """The name of a checkpoint's file: of `best`, `last`, or a file; None: best, or else last.

        TrackingError, with the names that there are, where it is not there.
        """
        there = [PurePosixPath(file).name for file in self.files("checkpoints")]
        there = sorted(file for file in there if file.endswith(".ckpt"))
        # Where several of the best are kept they go by their epochs, and a tag tells the best one.
        best = PurePosixPath(self.tags.get("checkpoint.best", "best.ckpt")).name
        wanted = {None: [best, "best.ckpt", "last.ckpt"], "best": [best, "best.ckpt"]}
        for file in wanted.get(name, [name or "", f"{name}.ckpt"]):
            if file in there:
                return file
        known = f"it has {', '.join(there)}" if there else "it has none at all"
        raise TrackingError(
            f'checkpoint: {self.described()} has no checkpoint "{name or "best"}"; {known}.'
        )

    def file(self, path: str) -> Path:
        """A file of the run, by its path among the artifacts; TrackingError if it is not there."""
        if self.artifact_dir is not None:
            found = self.artifact_dir / path
            if not found.is_file():
                raise TrackingError(f"{self.described()} has no file {path} (looked at {found}).")
            return found
        from mlflow.artifacts import download_artifacts

        folder = downloads() / self.run_id
        folder.mkdir(exist_ok=True)
        with told_in_a_sentence(self.tracking_uri):
            return Path(
                download_artifacts(
                    run_id=self.run_id,
                    artifact_path=path,
                    dst_path=str(folder),
                    tracking_uri=self.tracking_uri,
                )
            )

    def files(self, folder: str) -> list[str]:
        """The paths of the files in a folder of the run's artifacts; none if there is no folder."""
        if self.artifact_dir is not None:
            inside = self.artifact_dir / folder
            return [f"{folder}/{file.name}" for file in inside.glob("*") if file.is_file()]
        with told_in_a_sentence(self.tracking_uri):
            found = open_store(self.tracking_uri).list_artifacts(self.run_id, folder)
        return [file.path for file in found if not file.is_dir]

    def described(self) -> str:
        return f"run {self.run_name} ({self.run_id})"


def find_run(tracking_uri: str, text: str) -> RecordedRun:
    """The run that `text` stands for: its id, its name, or the first 4 or more digits of its id.

    TrackingError, in a sentence or two: for none (with the nearest), for several, for a deleted
    one, and for a store that cannot be read.
    """
    with told_in_a_sentence(tracking_uri):
        client = open_store(tracking_uri)
        experiments = all_experiments(client)  # a store that is away is told here, and tried once
        with contextlib.suppress(Exception):  # what can only be read is read all the same
            end_dead_runs(client, tracking_uri)
        if is_run_id(text):
            run = run_of_id(client, text.lower())
            if run is not None:
                return as_recorded(run, tracking_uri)
        for condition in conditions(text):
            found = search(client, experiments, condition, TOLD_RUNS + 1)
            if len(found) == 1:
                return as_recorded(found[0], tracking_uri)
            if found:
                raise TrackingError(several(text, found))
        raise TrackingError(none_found(text, tracking_uri, client, experiments))


def find_tagged(tracking_uri: str, tags: Mapping[str, str]) -> RecordedRun | None:
    """The newest run that has all these tags; None if there is none, or no store yet.

    TrackingError for a store that cannot be read.
    """
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return None
    with told_in_a_sentence(tracking_uri):
        client = open_store(tracking_uri)
        experiments = all_experiments(client)
        with contextlib.suppress(Exception):
            end_dead_runs(client, tracking_uri)
        condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = search(client, experiments, condition, 1)
        return as_recorded(found[0], tracking_uri) if found else None


def find_all_tagged(tracking_uri: str, tags: Mapping[str, str]) -> list[RecordedRun]:
    """All runs that have these tags, of very many the newest, in the order in which they began.

    TrackingError for a store that cannot be read.
    """
    with told_in_a_sentence(tracking_uri):
        client = open_store(tracking_uri)
        condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = search(client, all_experiments(client), condition, NEAREST_AMONG)
        return [as_recorded(run, tracking_uri) for run in reversed(found)]


def find_begun(tracking_uri: str, tags: Mapping[str, str]) -> RecordedRun | None:
    """The newest run that was begun with all these tags, by a process that died or was stopped.

    Also where it died before it knew of the run: what it left on this machine is delivered first.
    TrackingError if that cannot be, and for a store that cannot be read.
    """
    from research.tracking.beginning import deliver_begun
    from research.tracking.spool import spool_root

    deliver_begun(spool_root(tracking_uri), tags)
    return find_tagged(tracking_uri, tags)


def conditions(text: str) -> Iterator[str]:
    """MLflow's filters for a run's name and for the beginning of its id."""
    # There is no escape: a name with both quotes in it can only be found by the run's id.
    quote = next((mark for mark in "'\"" if mark not in text), None)
    if quote is not None and text:
        yield f"attributes.run_name = {quote}{text}{quote}"
    if re.fullmatch(r"[0-9a-fA-F]{4,31}", text):
        yield f"attributes.run_id LIKE '{text.lower()}%'"


def is_run_id(text: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{32}", text) is not None


def search(client: Any, experiments: list[str], condition: str, count: int) -> list[Any]:
    """The newest runs, at most `count`, that were not deleted and meet the condition."""
    if not experiments:
        return []
    newest_first = ["attributes.start_time DESC"]
    return list(client.search_runs(experiments, condition, 1, count, newest_first))


def several(text: str, found: Sequence[Any]) -> str:
    told = ", ".join(f"{run.info.run_id} ({when(run)})" for run in found[:TOLD_RUNS])
    more = " and others" if len(found) > TOLD_RUNS else ""
    return (
        f'"{text}" stands for several runs, the newest first: {told}{more}. Use the run id, or its '
        "first digits."
    )


def none_found(text: str, tracking_uri: str, client: Any, experiments: list[str]) -> str:
    """That there is no such run, and which of the newest are near; no runs at all are told so."""
    runs = search(client, experiments, "", NEAREST_AMONG)
    if not runs:
        return no_runs_yet(tracking_uri)
    ranked = sorted(runs, key=lambda run: likeness(text, run), reverse=True)  # equals: newest first
    near = [run for run in ranked[:TOLD_RUNS] if likeness(text, run) >= 0.6]
    which = "The nearest" if near else "The newest"
    told = [f"{run.info.run_name} ({run.info.run_id[:8]}, {when(run)})" for run in near or runs[:3]]
    return f'There is no run "{text}" in {place_of(tracking_uri)}. {which}: {", ".join(told)}.'


def likeness(text: str, run: Any) -> float:
    """How like the text is to the run's name or the beginning of its id, 0 to 1."""
    names = (run.info.run_name or "", run.info.run_id[: max(len(text), 4)])
    return max(difflib.SequenceMatcher(None, text.lower(), n.lower()).ratio() for n in names)


def when(run: Any) -> str:
    return f"{datetime.fromtimestamp(run.info.start_time / 1000):%Y-%m-%d %H:%M:%S}"


def no_runs_yet(tracking_uri: str) -> str:
    return f"There are no runs yet in {place_of(tracking_uri)}. Make one: {FIRST_RUN}"


def place_of(tracking_uri: str) -> str:
    return str(sqlite_path(tracking_uri) or redact(tracking_uri))


def as_recorded(run: Any, tracking_uri: str) -> RecordedRun:
    info = run.info
    return RecordedRun(
        tracking_uri=tracking_uri,
        run_id=info.run_id,
        run_name=info.run_name,
        experiment_id=info.experiment_id,
        status=info.status,
        started_at=datetime.fromtimestamp(info.start_time / 1000),
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        artifact_dir=find_folder(info.artifact_uri, tracking_uri),
    )


def find_folder(artifact_uri: str, tracking_uri: str) -> Path | None:
    """The folder of a run's files; None where they do not lie in this machine's file system.

    MLflow keeps an absolute path. Where a project was moved or copied as a whole, the files are
    those beside the store, also before anything has written to it.
    """
    folder = local_folder(artifact_uri)
    if folder is None:
        return None
    database = sqlite_path(tracking_uri)
    if database is not None:
        return find_beside(folder, database)
    if not folder.is_dir() and urlsplit(tracking_uri).scheme in ("http", "https"):
        return None  # a folder of the server's machine
    return folder


# ---- the store -----------------------------------------------------------------------------------


@cache
def open_store(tracking_uri: str) -> Any:
    """MLflow's client of a store that is there already."""
    database = sqlite_path(tracking_uri)
    if database is not None:
        if not database.exists() or database.stat().st_size == 0:
            raise TrackingError(no_runs_yet(tracking_uri))
        with open(database, "rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise TrackingError(f"{database} is not an SQLite database, so it has no runs.")
    # A server that is away is told in seconds; MLflow's own patience is seven tries of 2 minutes.
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
    quiet = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name, value in {**patience, **quiet}.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri)


@cache
def downloads() -> Path:
    """A folder for what a server sent; it is gone when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="research-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@contextlib.contextmanager
def told_in_a_sentence(tracking_uri: str) -> Iterator[None]:
    """Whatever MLflow raises inside becomes a TrackingError in plain words."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        from research.tracking.troubles import explain

        raise TrackingError(explain(error, tracking_uri)) from error


# ---- names ---------------------------------------------------------------------------------------


def recordable_names(texts: Sequence[str]) -> list[str]:
    """The texts as parts of metric names: what MLflow refuses becomes `_`, no two are equal."""
    taken: set[str] = set()
    names = []
    for text in texts:
        base = name = re.sub(r"[^\w.\- :]", "_", text).strip(". ")[: MAX_NAME // 2] or "_"
        number = 2
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        names.append(name)
    return names
