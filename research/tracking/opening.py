"""Opens stores, once each: a client for every address, and the experiment that a run goes to.

Several processes that open a fresh SQLite file at once break it for good, hence the lock.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from research.tracking.lock import store_lock
from research.tracking.moved import repair_paths
from research.tracking.store import (
    TrackingError,
    is_server,
    project_root,
    redact,
    sqlite_path,
    sqlite_uri,
)
from research.tracking.view import VIEW, saved_view

# Marks the experiment as one of training runs, for pages that go by it; a browser that is new to
# MLflow 3.17 goes by its own choice (store.show_command).
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    # In the page's menu of views; what it shows without is kept in each browser, not in the store.
    f"mlflow.sharedViewState.{VIEW}": saved_view(),
}


class Stores:
    """The stores that were opened in this process."""

    def __init__(self) -> None:
        self.root = project_root()  # before this process moves
        self._clients: dict[str, Any] = {}

    def client(self, uri: str) -> Any:
        """A client of a store that is there already. TrackingError if it is not."""
        if uri not in self._clients:
            database = sqlite_path(uri)
            if database is not None and not database.exists():
                raise TrackingError(
                    f"There is no store at {database}, so no run in it either. Check "
                    "--tracking_uri."
                )
            with self._held(database):
                self._clients[uri] = _client(uri)
        return self._clients[uri]

    def experiment(self, uri: str, name: str) -> tuple[Any, str]:
        """A client of the store, made if need be, and the id of the experiment, likewise."""
        if uri in self._clients and (found := _find_experiment(self._clients[uri], uri, name)):
            return self._clients[uri], found
        from mlflow.exceptions import MlflowException

        with self._held(sqlite_path(uri)):
            client = self._clients.get(uri) or _client(uri)
            found = _find_experiment(client, uri, name)
            if found is None:
                try:
                    found = client.create_experiment(name, tags=EXPERIMENT_TAGS)
                except MlflowException:  # a server or a database, where somebody was faster
                    found = _find_experiment(client, uri, name)
                    if found is None:
                        raise
        self._clients[uri] = client
        return client, found

    @contextlib.contextmanager
    def _held(self, database: Path | None) -> Iterator[None]:
        """The store is there, ours alone, and the current folder the one of its `mlruns`.

        MLflow puts the artifacts of a new experiment at ./mlruns/<id>, made absolute.
        """
        if database is None:
            os.chdir(self.root)
            yield
            return
        database.parent.mkdir(parents=True, exist_ok=True)
        with store_lock(database):
            if database.exists():
                _probe(database)
                repair_paths(database)
            else:
                _create(database)
            os.chdir(database.parent)
            yield


def preload() -> None:
    """Import what the first run will need, while the training process is busy importing torch."""
    try:
        import mlflow.store.db.utils
        import mlflow.store.tracking.sqlalchemy_store
        from mlflow.tracking import MlflowClient  # noqa: F401
    except ImportError:  # told when a run is started
        return
    # An unreachable database is otherwise tried for 100 s before anybody hears of it.
    mlflow.store.db.utils.MAX_RETRY_COUNT = 4


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def _find_experiment(client: Any, uri: str, name: str) -> str | None:
    """Id of the experiment, None if there is none. TrackingError if it cannot take runs."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return None
    number = experiment.experiment_id
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f'experiment: "{name}" was deleted from {redact(uri)}. Bring it back (mlflow '
            f"experiments restore --experiment-id {number}) or choose another --experiment."
        )
    if experiment.artifact_location.startswith("mlflow-artifacts:") and not is_server(uri):
        raise TrackingError(
            f'experiment: "{name}" was made in the MLflow page, so only that server can keep '
            "its files. Choose another --experiment (it is made by itself), or record through "
            "the running server: --tracking_uri http://127.0.0.1:5000."
        )
    return number


def _create(database: Path) -> None:
    """Make MLflow's tables in a side file and rename it, so that a kill leaves no half of a store.

    MLflow's sixty migrations, each synced to disk, also take 6 s on a busy disk; unsynced until
    the end they take 1 s.
    """
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    unfinished = database.with_name(f"{database.name}.new")
    unfinished.unlink(missing_ok=True)  # of a start that was killed
    engine = sqlalchemy.create_engine(sqlite_uri(unfinished))
    sqlalchemy.event.listen(
        engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF")
    )
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    if database.exists():  # made meanwhile by something that knows no lock, such as `mlflow ui`
        unfinished.unlink()
    else:
        unfinished.rename(database)


def _probe(database: Path) -> None:
    """Raises at once what MLflow would take 100 s of retries to say: not writable, no database."""
    connection = sqlite3.connect(database, timeout=20.0)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("SELECT count(*) FROM sqlite_master")
        connection.rollback()
    finally:
        connection.close()
