"""The search's own run in MLflow, and which of several coordinators is to bring it to its end.

Every coordinator may start workers for the same studies, on any machine; one of them holds the
seat: it records the parent run, revives what died, confirms, reports.  The seat is an attribute of
the first study with signs of life (research.tracking.heartbeat); it is free once its holder is
dead, and the next coordinator that looks takes it.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from research.search.display import FINISHED
from research.tracking import heartbeat
from research.tracking.run import DESCRIPTION, Recorder, Run
from research.tracking.runs import find_begun
from research.tracking.store import TrackingError, redact

logger = logging.getLogger(__name__)

COORDINATOR = "coordinator"
PARENT = "parent_run_id"
PARENT_STORE = "parent_run_store"
EXPERIMENT = "parent_experiment_id"
BEGUN = "parent_begun"  # [token, store], before the run is begun
BEGUN_BY = "mlflow.searchToken"  # the run's tag, with that token
LOGGED = "history_logged"
REPORTED = "reported"
SETTLE_SECONDS = 0.3
PATIENCE_SECONDS = 120.0


class Seat:
    """Who brings a search to its end, as an attribute of `study`."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self.token = secrets.token_hex(8)

    @property
    def holder(self) -> Mapping[str, str] | None:
        """The signs of life of who holds it; None where nobody does, or nobody who lives."""
        held = self.study.user_attrs.get(COORDINATOR)
        return None if not held or heartbeat.is_dead(held) else held

    @property
    def is_mine(self) -> bool:
        holder = self.holder
        return holder is not None and holder.get("token") == self.token

    def take(self) -> bool:
        """Hold it if nobody else does; whether it is held."""
        holder = self.holder
        if holder is None:
            self._sign()
            # Storages have no compare-and-set: of two who look at once, the last to write has it.
            time.sleep(SETTLE_SECONDS)
            return self.is_mine
        return holder.get("token") == self.token

    def beat(self) -> None:
        """A sign of life, every `heartbeat.BEAT_SECONDS`."""
        if self.is_mine:
            self._sign()

    def leave(self) -> None:
        if self.is_mine:
            self.study.set_user_attr(COORDINATOR, {})

    def _sign(self) -> None:
        signs = heartbeat.first_beat(os.getpid()) | {"token": self.token}
        self.study.set_user_attr(COORDINATOR, signs)

    def described(self) -> str:
        """Who holds it, for the terminal."""
        holder = self.holder or {}
        host, pid = holder.get("heartbeat.host", "?"), holder.get("heartbeat.pid", "?")
        return f"the coordinator on {host} (process {pid})"


# ---- the run -------------------------------------------------------------------------------------


def run_id_of(study: optuna.Study, tracking_uri: str | None) -> str | None:
    """The parent run in this store; None if there is none yet."""
    attrs = study.user_attrs
    if tracking_uri is None or attrs.get(PARENT_STORE) != redact(tracking_uri):
        return None
    found: str | None = attrs.get(PARENT)
    return found


def begin(
    recorder: Recorder,
    tracking_uri: str,
    studies: Sequence[optuna.Study],
    experiment: str,
    params: Mapping[str, str | float | bool | None],
    tags: Mapping[str, str],
    run_name: str | None = None,
) -> Run:
    """The parent run, RUNNING: a new one, or that of an earlier start that goes on.

    Without `run_name` it is called as the experiment is.

    TrackingError where the store cannot be used, or has the run no more.
    """
    known = run_id_of(studies[0], tracking_uri)
    if known is not None:
        run = recorder.resume_run(tracking_uri, known, since=time.time(), patience=PATIENCE_SECONDS)
        run.wait()
        run.set_tags(tags)
        return run
    token, found = begun_before(studies[0], tracking_uri)
    if found is not None:
        run = recorder.resume_run(tracking_uri, found, since=time.time(), patience=PATIENCE_SECONDS)
    else:
        own = {**tags, BEGUN_BY: token}
        run = recorder.start_run(
            tracking_uri,
            experiment,
            run_name or experiment,
            params=params,
            tags=own,
            patience=PATIENCE_SECONDS,
        )
    run_id = run.wait().run_id
    studies[0].set_user_attr(EXPERIMENT, run.wait().experiment_id)
    for study in studies:  # the first one's counts, so it comes last
        if study is not studies[0]:
            study.set_user_attr(PARENT, run_id)
    studies[0].set_user_attr(LOGGED, 0)
    studies[0].set_user_attr(PARENT, run_id)
    studies[0].set_user_attr(PARENT_STORE, redact(tracking_uri))
    return run


def begun_before(study: optuna.Study, tracking_uri: str) -> tuple[str, str | None]:
    """The token by which the run is found, and the run that was begun with it, if one was.

    That is one whose coordinator died before it could say which it is.
    """
    token, store = study.user_attrs.get(BEGUN, ("", ""))
    if store != redact(tracking_uri):
        token = secrets.token_hex(16)
        study.set_user_attr(BEGUN, [token, redact(tracking_uri)])
        return token, None
    try:
        run = find_begun(tracking_uri, {BEGUN_BY: token})
    except TrackingError as error:
        logger.warning("Whether the search had begun its run is not known: %s", error)
        return token, None
    return token, None if run is None else run.run_id


def history(
    trials: Sequence[FrozenTrial], metrics: Sequence[str], directions: Sequence[str]
) -> list[dict[str, float]]:
    """For each finished trial, in the order they ended, the best of each objective until then.

    Metrics go by `search/best_val_accuracy`: a metric of the trials has a chart of its own.
    """
    ended = [trial for trial in trials if trial.state in FINISHED]
    ended.sort(key=lambda trial: (trial.datetime_complete is None, trial.datetime_complete))
    best: dict[str, float] = {}
    rows = []
    for trial in ended:
        if trial.state == TrialState.COMPLETE:
            for metric, direction, value in zip(metrics, directions, trial.values, strict=True):
                name = f"search/best_{metric.replace('/', '_')}"
                better: Callable[..., float] = min if direction == "minimize" else max
                best[name] = better(value, best.get(name, value))
        rows.append(dict(best))
    return rows


class History:
    """The parent run's curve: what is new of it is logged, each step once over all starts."""

    def __init__(
        self, run: Run, study: optuna.Study, metrics: Sequence[str], directions: Sequence[str]
    ) -> None:
        self.run, self.study = run, study
        self.metrics, self.directions = metrics, directions
        self.logged = int(study.user_attrs.get(LOGGED, 0))

    def tell(self, trials: Sequence[FrozenTrial]) -> None:
        """The trials that count, of all cells."""
        rows = history(trials, self.metrics, self.directions)
        fresh = rows[self.logged :]
        for step, row in enumerate(fresh, self.logged + 1):
            if row:
                self.run.log_metrics(row, step=step)
        if fresh:
            self.logged = len(rows)
            self.study.set_user_attr(LOGGED, self.logged)


def record_report(run: Run, description: str, folder: Path, files: Sequence[Path]) -> str | None:
    """Record what came of it, and the files written in `folder`, and end the run.

    Returns what the store refused or has to wait for, if anything.

    The store's page shows them where they lay in the folder.
    """
    run.set_tags({DESCRIPTION: description})
    for file in files:
        inside = file.relative_to(folder).parent
        run.log_artifact(file, None if inside == Path() else inside.as_posix())
    try:
        run.finish("FINISHED")
    except TrackingError as error:
        return str(error)
    return run.waiting


def tags_of(name: str, storage: str, budget: str, params: Mapping[str, Any]) -> dict[str, str]:
    """The parent's tags: what may change from start to start stands here and not in the params."""
    return {
        "study": name,
        "search.storage": redact(storage),
        "search.budget": budget,
        **{f"search.{key}": str(value) for key, value in params.items()},
    }
