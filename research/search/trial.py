"""One trial of a search: its training, what is told of it on the way, and what came of it.

    outcome = train(task, judge, recorder, kept, on_begun)

Nothing here asks Optuna: a trial may be trained in another process than the one that took it
(alone.py), so what it is to do (Task) and what came of it (Outcome) are plain values, and who says
whether it should end early (Judge) may be far away.  A search's trial never sees the test split; an
arm's (arms.py) is tested once, at its end.

What becomes of it     in Optuna, which has         in MLflow
trained to its end     COMPLETE, its values         FINISHED, trial.state COMPLETE
not worth going on     PRUNED                       FINISHED, trial.state PRUNED
loss NaN or infinite   PRUNED, `diverged`           FAILED, trial.state PRUNED, traceback.txt
an error               FAIL, `error`                FAILED, trial.state FAIL, traceback.txt
stopped by a signal    WAITING again                KILLED, until it goes on
its process died       WAITING again                KILLED, until it goes on
"""

import contextlib
import json
import logging
import math
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from research.callbacks import Keeper, Pace
from research.command import words_for
from research.configuration.compose import CommandLine, printable
from research.configuration.schema import Configuration, leaves_of
from research.data.kept import Kept
from research.faults.nonfinite import NonFiniteLoss
from research.processes.launch import is_rank_zero
from research.processes.lifeline import RankDied
from research.recording.identity import describe_device
from research.recording.record import PATIENCE_SECONDS, is_recorded
from research.resumption import Resumption, begin_anew, is_to_begin_anew, resume, settings_in
from research.search.document import Objective, Search
from research.tracking.heartbeat import is_dead
from research.tracking.run import Recorder
from research.tracking.runs import RecordedRun, find_run
from research.tracking.store import TrackingError, redact, resolve_tracking_uri
from research.training import Result, fit

logger = logging.getLogger(__name__)

State = Literal["COMPLETE", "PRUNED", "FAIL", "STOPPED", "DIED"]
MEASURED = "metrics"  # attribute of a complete trial: what `measured` says
MEASURED_BEFORE = "mlflow.trialMetrics"  # the same as a tag, which MLflow's page hides
LEAVING_SECONDS = 60.0  # for a process that was told to stop
LONGEST_ERROR = 1500  # characters; MySQL has room for 2048 in an attribute
SIGNALS = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))


class Judge(Protocol):
    """Who is told how a trial goes and says whether to end it; Optuna's Trial is one."""

    def report(self, value: float, step: int) -> None: ...

    def should_prune(self) -> bool: ...


@dataclass(frozen=True)
class Task:
    """What a trial is to do; plain values, which another process can be given as JSON.

    `document` is that of the Search, `cell` the name of its cell.  `settings` are the trial's own,
    nested; they may hold `run_name`, `tracking_uri` and `seed_everything`.  `tags` are for the
    record.  `run_id` is the run that goes on, None for a new one.  `last_step` is the last epoch
    that was reported before.
    """

    document: Mapping[str, Any]
    cell: str
    settings: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    last_step: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: its values as the objectives stand, or the reason for none.

    `attrs` are what else Optuna should know.
    """

    state: State
    values: Sequence[float] | None = None
    reason: str | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)


def configuration_of(task: Task, search: Search | None = None) -> Configuration:
    """The complete settings of the trial; ConfigurationError if they do not fit together."""
    search = Search.from_document(task.document) if search is None else search
    cell = next(cell for cell in search.cells if cell.name == task.cell)
    return search.configuration(cell, task.settings)


def train(
    task: Task,
    search: Search,
    judge: Judge,
    recorder: Recorder | None = None,
    kept: Kept | None = None,
    on_begun: Callable[[str], None] = lambda run_id: None,
    configuration: Configuration | None = None,
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Train a trial here, or what is left of it; what came of it, also if that is an error.

    on_begun: told the run's id before anything is trained.
    configuration: that of the task, where it is known already.
    callbacks: for its training, beside its own.
    KeyboardInterrupt and SystemExit after a signal, once `last.ckpt` is saved.
    """
    reporter = Reporter(reported_metric(search.objectives), judge, task.last_step)
    begun: list[str] = [] if task.run_id is None else [task.run_id]

    def begin(run_id: str) -> None:
        begun[:] = [run_id]
        on_begun(run_id)

    def close(result: Result) -> Mapping[str, str]:
        outcome = outcome_of(result, search.objectives, reporter.pruned, reporter.about)
        tidy_up(outcome.state)
        return {
            "trial.state": outcome.state,
            "trial.values": json.dumps(outcome.values),
            MEASURED_BEFORE: json.dumps(outcome.attrs.get(MEASURED, {})),
        }

    def tidy_up(state: State) -> None:
        if not search.leaves_all:
            tidy(reporter.folder, state)

    try:
        configuration = configuration or configuration_of(task, search)
        resumption = None
        if task.run_id is not None:
            run = run_before(task.run_id, configuration)
            if run is not None and run.status == "FINISHED" and "trial.state" in run.tags:
                return outcome_before(run)
            if run is not None:
                configuration, resumption = go_on(run, configuration)
        result = fit(
            configuration,
            recorder,
            callbacks=[reporter, *callbacks],
            resumption=resumption,
            tags=task.tags,
            on_begun=begin,
            tags_of_result=close,
            kept=kept,
        )
        close(result)
        return outcome_of(result, search.objectives, reporter.pruned, reporter.about)
    except Exception as error:
        outcome = outcome_of_error(error)
        if outcome.state != "DIED":
            tidy_up(outcome.state)
            with contextlib.suppress(TrackingError):  # the error itself is the news
                record_failure(task, configuration, recorder, outcome, error, begun)
        return outcome


# ---- on the way ----------------------------------------------------------------------------------


class Reporter(Callback):
    """Reports the metric after each epoch that was validated, and ends a trial that is pruned.

    The first process reports and asks, all follow.  Nothing is reported if `metric` is None, nor up
    to `last_step`, which was reported before.  After its last epoch a trial is not pruned: nothing
    would be saved by it.

    `pruned` says whether it was; on the first process, `folder` is that of the checkpoints and
    `about` tells by what the values were measured: `val_pictures`, `hardware`, `versions`.
    """

    def __init__(self, metric: str | None, judge: Judge, last_step: int = 0) -> None:
        self.metric = metric
        self.judge = judge
        self.last_step = last_step
        self.pruned = False
        self.folder: Path | None = None
        self.about: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        keepers = [each for each in callbacks_of(trainer) if isinstance(each, Keeper)]
        if trainer.is_global_zero and keepers and keepers[0].dirpath is not None:
            self.folder = Path(keepers[0].dirpath)
        if trainer.is_global_zero:
            self.about = {
                "hardware": describe_device(trainer.strategy.root_device)["device"],
                "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
            }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.val_dataloaders
        share = sum(trainer.num_val_batches) / len(loader)  # below 1 by trainer.limit_val_batches
        pictures = len(trainer.datamodule.splits.val)  # type: ignore[attr-defined]
        self.about["val_pictures"] = round(share * pictures)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A metric that no trial has is told at its end, with those that there are.
        is_there = self.metric is not None and self.metric in trainer.callback_metrics
        if not is_there or not was_validated(trainer):
            return
        ends = False
        if trainer.is_global_zero:
            value = trainer.callback_metrics[str(self.metric)].item()
            ends = self.ask(value, trainer.current_epoch + 1, trainer.max_epochs)
        if trainer.strategy.broadcast(ends):
            self.pruned = trainer.should_stop = True

    def ask(self, value: float, step: int, max_epochs: int | None) -> bool:
        """Report the value; True if the trial is to end."""
        if step > self.last_step:
            self.judge.report(value, step)
        if step < self.last_step or step == max_epochs:
            return False
        return self.judge.should_prune()


def callbacks_of(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def was_validated(trainer: Trainer) -> bool:
    """True if the epoch that ends has figures of its own; also where it was interrupted since."""
    return any(each.validated for each in callbacks_of(trainer) if isinstance(each, Pace))


def reported_metric(objectives: Sequence[Objective]) -> str | None:
    """What is reported while a trial trains; Optuna prunes by a single objective only."""
    names = [objective.metric for objective in objectives]
    return names[0] if len(names) == 1 and names[0].startswith("val/") else None


# ---- what came of it -----------------------------------------------------------------------------


def outcome_of(
    result: Result,
    objectives: Sequence[Objective],
    pruned: bool,
    about: Mapping[str, Any] = {},
) -> Outcome:
    """The outcome of a training that came to its end, by itself or because it was pruned.

    `about` tells by what the values were measured.
    """
    if pruned:
        return Outcome("PRUNED")
    values = [value_of(result, objective.metric) for objective in objectives]
    missing = [o.metric for o, value in zip(objectives, values, strict=True) if value is None]
    if missing:
        there = sorted(name for name in result.metrics if name.startswith("val/"))
        return Outcome(
            "FAIL",
            reason=f"objective: the trial has no {', '.join(missing)}; it has "
            f"{', '.join(there) or 'no figures of validation'}.",
        )
    numbers = [float(value) for value in values if value is not None]
    if not all(math.isfinite(number) for number in numbers):
        told = ", ".join(f"{o.metric} is {v}" for o, v in zip(objectives, numbers, strict=True))
        return Outcome("PRUNED", reason=told, attrs={"diverged": True})
    refused = {} if result.refused is None else {"record": result.refused}
    return Outcome("COMPLETE", numbers, attrs={**about, MEASURED: measured(result), **refused})


def measured(result: Result) -> dict[str, float]:
    """Loss and accuracy on each split at the best checkpoint, and how long training took."""
    found = {k: v for k, v in result.metrics.items() if k.endswith(("/loss", "/accuracy"))}
    return found | {"training_seconds": result.training_seconds}


def value_of(result: Result, metric: str) -> float | None:
    """A figure of the best checkpoint, `training_seconds`, or `num_parameters`."""
    if metric in ("training_seconds", "num_parameters"):
        return float(getattr(result, metric))
    return result.metrics.get(metric) if metric.startswith("val/") else None


def outcome_of_error(error: BaseException) -> Outcome:
    reason = told(error)
    if isinstance(error, NonFiniteLoss):
        return Outcome("PRUNED", reason=reason, attrs={"diverged": True})
    if isinstance(error, RankDied) and error.__cause__ is None:  # killed; it has not failed
        return Outcome("DIED", reason=reason)
    return Outcome("FAIL", reason=reason, attrs={"error": reason})


def told(error: BaseException) -> str:
    """What to say of the error: a sentence for the user, or the end of its traceback."""
    words = words_for(error) if isinstance(error, Exception) else None
    if words is None:
        words = "".join(traceback.format_exception(error)).strip()
    return redact(printable(words))[-LONGEST_ERROR:]


def tidy(folder: Path | None, state: State) -> None:
    """Remove the checkpoints that nobody goes on from: of a complete trial the best stays."""
    if folder is None or state in ("STOPPED", "DIED"):
        return
    there = [path for path in folder.glob("*") if ".ckpt" in path.name]
    best = [path for path in there if path.suffix == ".ckpt" and path.stem != "last"]
    stay = (best or there) if state == "COMPLETE" else []
    for path in there:
        if path not in stay:
            with contextlib.suppress(OSError):
                path.unlink()


def record_failure(
    task: Task,
    configuration: Configuration | None,
    recorder: Recorder | None,
    outcome: Outcome,
    error: BaseException,
    begun: Sequence[str],
) -> None:
    """The state of the trial in its run; a run of its own for one that had not begun any."""
    uri = uri_of(task, configuration)
    if recorder is None or uri is None:
        return
    state = {"trial.state": outcome.state}
    if begun:
        with recorder.open_run(uri, begun[0]) as run:
            run.set_tags(state)
        return
    settings = dict(leaves_of(task.settings)) if configuration is None else configuration.flat()
    run = recorder.start_run(
        uri,
        Search.from_document(task.document).experiment,
        task.settings.get("run_name"),
        params={name: value for name, value in settings.items() if not isinstance(value, list)},
        tags={**task.tags, **state},
        patience=PATIENCE_SECONDS,
    )
    run.log_text(redact("".join(traceback.format_exception(error))), "traceback.txt")
    run.finish("FAILED")


def uri_of(task: Task, configuration: Configuration | None) -> str | None:
    """The store of the trial's run; None where nothing is recorded."""
    if configuration is None:
        return resolve_tracking_uri(task.settings.get("tracking_uri"))
    if not is_recorded(configuration):
        return None
    return resolve_tracking_uri(configuration.values.tracking_uri)


# ---- what was there before -----------------------------------------------------------------------


def run_before(run_id: str, configuration: Configuration) -> RecordedRun | None:
    """The run that the trial had begun; None, and a warning, where the store has it no more.

    A process of several devices outlives the worker that started it until it has saved its
    checkpoint; it is awaited.
    """
    uri = resolve_tracking_uri(configuration.values.tracking_uri)
    if uri is None:
        return None
    deadline = time.monotonic() + LEAVING_SECONDS
    try:
        run = find_run(uri, run_id)
        while is_alive(run) and is_rank_zero() and time.monotonic() < deadline:
            time.sleep(0.5)
            run = find_run(uri, run_id)
        return run
    except TrackingError as error:
        logger.warning("The run of this trial is begun anew: %s", error)
        return None


def is_alive(run: RecordedRun) -> bool:
    return run.status == "RUNNING" and "heartbeat.pid" in run.tags and not is_dead(run.tags)


def outcome_before(run: RecordedRun) -> Outcome:
    """What had come of the trial when its process died, just before it could say so."""
    values = json.loads(run.tags.get("trial.values", "null"))
    state = run.tags["trial.state"]
    assert state in ("COMPLETE", "PRUNED", "FAIL")
    figures = json.loads(run.tags.get(MEASURED_BEFORE, "{}"))
    attrs = {MEASURED: figures} if figures else {}
    return Outcome(state, values, attrs=attrs)  # type: ignore[arg-type]


def go_on(run: RecordedRun, configuration: Configuration) -> tuple[Configuration, Resumption]:
    """The settings, and the place from which the run goes on with them."""
    if is_to_begin_anew(run):
        return configuration, begin_anew(run)
    # As if they had been typed: what they name may be imported, and others are refused.
    settings = settings_in(configuration.yaml(), run.tracking_uri)
    # Left open, it is this machine's own; the run began with that of the machine it was on.
    trainer = {name: value for name, value in settings["trainer"].items() if name != "precision"}
    return resume(run.run_id, CommandLine(settings={**settings, "trainer": trainer}))
