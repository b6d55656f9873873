"""How a run comes to be delivered: made in the store, made to go on there, or only found there.

For the recorder process and whoever delivers a spool later. Each function may be called again after
an error: nothing is made twice.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from research.tracking.lookup import local_folder, run_of_id
from research.tracking.opening import Stores
from research.tracking.repeats import Places
from research.tracking.spool import RECORDS, Spool
from research.tracking.store import TrackingError, is_server, redact
from research.tracking.troubles import may_pass

# By which a run is found whose store did not live to answer that it was made. MLflow's page hides
# tags that begin so.
TOKEN = "mlflow.recorderToken"
RETRY_SECONDS = 1.0
OTHER_SECONDS = 60.0  # for another process to be done with what it delivers of the same run
CLAIM_SECONDS = 1.5  # for the recorder process of a dead one to take in hand what that left


@dataclass
class About:
    """What a spool must know of its run for another process to go on with it."""

    tracking_uri: str
    run_id: str
    experiment_id: str
    experiment: str
    run_name: str
    artifact_dir: str | None
    is_ours: bool  # started or resumed here: its status and its provenance are ours to record
    resumed: bool = False
    since: int = 0  # when what it goes on from was saved, in milliseconds ...
    behind: Places = field(default_factory=dict)  # ... and what had been logged then
    log_system_metrics: bool = False
    documents_in: str | None = None  # folder among the artifacts for the files of the provenance
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Self:
        """From what a spool knows, which another version of this code may have written."""
        names = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in known.items() if name in names})


def start(
    stores: Stores, message: dict[str, Any], tags: dict[str, str], may_exist: bool
) -> tuple[Any, About]:
    """A client and the run, made unless it `may_exist` and does."""
    uri = message["tracking_uri"]
    client, experiment_id = stores.experiment(uri, message["experiment"])
    run = _find_by_token(client, experiment_id, message["token"]) if may_exist else None
    if run is None:
        run = _create(client, experiment_id, message, tags)
    about = About(
        tracking_uri=uri,
        run_id=run.info.run_id,
        experiment_id=experiment_id,
        experiment=message["experiment"],
        run_name=run.info.run_name,
        artifact_dir=_local_folder(run.info.artifact_uri, uri),
        is_ours=True,
        log_system_metrics=message["log_system_metrics"],
    )
    return client, about


def find(stores: Stores, message: dict[str, Any]) -> tuple[Any, About]:
    """A client and the run, which is in the store."""
    uri = message["tracking_uri"]
    client = stores.client(uri)
    info = find_run(client, uri, message["run_id"]).info
    about = About(
        tracking_uri=uri,
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        experiment=client.get_experiment(info.experiment_id).name,
        run_name=info.run_name,
        artifact_dir=_local_folder(info.artifact_uri, uri),
        is_ours=False,
    )
    return client, about


def resume(
    stores: Stores, message: dict[str, Any], tags: dict[str, str], own: Spool | None
) -> tuple[Any, About]:
    """A client and the run, which is in the store and RUNNING again.

    What other spools of the run hold is delivered first. TrackingError if it cannot be, or if
    another process is recording the run.
    """
    client, about = find(stores, message)
    _deliver_earlier(Path(message["spool_root"]), about.run_id, own)
    moment = datetime.fromtimestamp(message["started"] / 1000, UTC)
    about.is_ours = about.resumed = True
    about.log_system_metrics = message["log_system_metrics"]
    about.since, about.behind = message["since"], message.get("behind", {})
    # Beside what the run began with, which may have been something else.
    about.documents_in = f"resumed/{moment:%Y-%m-%d_%H-%M-%S}"
    forget_its_end(client, about.run_id)
    if tags:
        from mlflow.entities import RunTag

        # Before the status: a run that is RUNNING with the old ones would be taken for dead.
        entities = [RunTag(name, value) for name, value in tags.items()]
        client.log_batch(about.run_id, tags=entities)
    client.update_run(about.run_id, status="RUNNING")
    return client, about


def find_run(client: Any, uri: str, run_id: str) -> Any:
    """The run as MLflow keeps it. TrackingError if it is not there, or was deleted."""
    run = run_of_id(client, run_id)
    if run is None:
        raise TrackingError(f'There is no run "{run_id}" in {redact(uri)}.')
    return run


def forget_its_end(client: Any, run_id: str) -> bool:
    """Whether the run was said to have been found dead; that tag is then gone, for it lives."""
    from research.tracking.heartbeat import ENDED_BY

    if ENDED_BY not in client.get_run(run_id).data.tags:
        return False
    client.delete_tag(run_id, ENDED_BY)
    return True


def _find_by_token(client: Any, experiment_id: str, token: str) -> Any:
    found = client.search_runs([experiment_id], f"tags.`{TOKEN}` = '{token}'", max_results=1)
    return found[0] if found else None


def _create(client: Any, experiment_id: str, message: dict[str, Any], tags: dict[str, str]) -> Any:
    def create() -> Any:
        with one_attempt():
            return client.create_run(
                experiment_id,
                start_time=message["started"],
                tags=tags | message["tags"] | {TOKEN: message["token"]},
                run_name=message["run_name"],
            )

    try:
        return create()
    except Exception as error:
        if not may_pass(error, message["tracking_uri"]):
            raise
        time.sleep(RETRY_SECONDS)
        return _find_by_token(client, experiment_id, message["token"]) or create()


@contextlib.contextmanager
def one_attempt() -> Iterator[None]:
    """MLflow's own second attempt would make a second one where only an answer was lost."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _deliver_earlier(root: Path, run_id: str, own: Spool | None) -> None:
    from research.tracking.redelivery import deliver

    for spool in _spools_of(root, run_id):
        if own is not None and spool.folder == own.folder:
            continue
        deadline = time.monotonic() + OTHER_SECONDS
        while not spool.is_gone() and not spool.is_abandoned():
            if spool.is_written():
                raise TrackingError(
                    f"The run {run_id} is being recorded by process {spool.pid}. Wait for it to "
                    "end, or end it."
                )
            if time.monotonic() > deadline:
                raise TrackingError(
                    f"Another process is still delivering {spool.folder}, which belongs to the "
                    f"run {run_id}. Try again when it is done."
                )
            time.sleep(0.2)
        if spool.is_gone():
            continue
        reason = deliver(spool)
        if reason is not None and not spool.is_gone():
            raise TrackingError(
                f"The run {run_id} cannot go on before {spool.folder} is "
                f"delivered, and it cannot be: {reason}"
            )


def deliver_begun(root: Path, tags: Mapping[str, str]) -> None:
    """Bring to the store what dead processes left of the runs that they began with these tags.

    Waits for those that have not ended yet. TrackingError if that takes too long.
    """
    from research.tracking.redelivery import deliver

    deadline = time.monotonic() + OTHER_SECONDS
    for spool in _spools_begun(root, tags):
        reason: str | None = "Another process is still at it."
        while not spool.is_gone():
            if time.monotonic() > deadline:
                raise TrackingError(f"{spool.folder} is not delivered yet. {reason}")
            if _is_left(spool):
                reason = deliver(spool)
            time.sleep(0.2)


def _is_left(spool: Spool) -> bool:
    """Whether nobody will deliver it; a recorder process may have been told of it just now."""
    if not spool.is_abandoned():
        return False
    time.sleep(CLAIM_SECONDS)
    return spool.is_abandoned()


def _spools_begun(root: Path, tags: Mapping[str, str]) -> list[Spool]:
    found = []
    for path in sorted(root.glob(f"*/{RECORDS}")):
        spool, first = Spool(path.parent), None
        with contextlib.suppress(OSError):  # gone just now
            first = next(spool.read(0), None)
        began = {} if first is None or first[0]["op"] != "start" else first[0]["tags"]
        if tags.items() <= began.items():
            found.append(spool)
    return found


def _spools_of(root: Path, run_id: str) -> list[Spool]:
    spools = [Spool(path.parent) for path in sorted(root.glob("*/run.json"))]
    return [spool for spool in spools if spool.about.get("run_id") == run_id]


def _local_folder(artifact_uri: str, tracking_uri: str) -> str | None:
    """The run's folder, made, if its files lie in this machine's file system."""
    folder = local_folder(artifact_uri)
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        if is_server(tracking_uri):
            return None  # a folder of the server's machine
        raise
    return str(folder)
