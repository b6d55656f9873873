"""Training as a plain function: `fit(configuration)` trains, validates, tests, records, returns.

It may be called any number of times in one process: random state, signal handlers, warning
filters and log levels are afterwards what they were before.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from research import evaluation
from research.building import (
    build_classifier,
    build_data,
    build_trainer,
    check_lengths,
    checked_seeds,
    faults_of,
    place_loop,
    prepare,
    told_of_batch_norm,
)
from research.callbacks import Keeper, Pace, Progress, checkpoints
from research.checkpoints.content import CheckpointContent
from research.checkpoints.io import discard_previous
from research.classifier import Classifier
from research.configuration.compose import ConfigurationError
from research.configuration.schema import Configuration
from research.data import ImageData
from research.data.kept import Kept
from research.data.streams import seed_of
from research.dynamics import Dynamics
from research.faults import memory
from research.faults.nonfinite import STEP_FILE, StopAtNonFiniteLoss
from research.faults.stopping import Stopped, Stopper, ending_of, listening
from research.processes import restarts
from research.processes.deaths import bound_together
from research.processes.placement import Agreement, described
from research.processes.sharding import is_sharded
from research.randomness import BatchStreams, drawing_from
from research.recording.album import FirstBatch, Outcome, record_network
from research.recording.record import (
    checkpoint_folder,
    finish,
    is_recorded,
    record_outcome,
    record_step,
    recorded,
    resume_command,
    tag_best,
)
from research.resumption import Resumption, bring
from research.scaling import Rule, Scaling, scaling_of
from research.speed.allocation import keep_freed_memory
from research.speed.epoch_loop import DirectEpochLoop
from research.tracking.arms import TEST_LOOKS, has_tested, looks_at_test
from research.tracking.run import Recorder, Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What came of a run.

    `metrics` holds train/, val/ and test/ loss and accuracy (a fraction) at the best checkpoint,
    and what else `evaluation.judge` says of the test split; its train/ figures are the running
    ones of that epoch.  `history` has a mapping for each epoch.
    Where nothing was recorded, `run_id` is None.
    """

    metrics: dict[str, float]
    history: list[dict[str, float]]
    best_epoch: int | None = None
    best_checkpoint: str | None = None
    images_per_second: float | None = None
    training_seconds: float = 0.0  # of the epochs alone, without validation
    num_parameters: int = 0
    precision: str = "32-true"
    captured_steps: int = 0  # done as one CUDA graph each
    seconds: float = 0.0
    experiment_id: str | None = None
    run_id: str | None = None
    run_name: str | None = None
    refused: str | None = None  # what the store refused to record, in a sentence or two
    waiting: str | None = None  # what waits on this machine's disk until the store is back


def fit(
    configuration: Configuration,
    recorder: Recorder | None = None,
    callbacks: Sequence[Callback] = (),
    resume_from: str | Path | None = None,
    resumption: Resumption | None = None,
    *,
    tags: Mapping[str, str] = {},
    on_begun: Callable[[str], None] | None = None,
    tags_of_result: Callable[[Result], Mapping[str, str]] | None = None,
    kept: Kept | None = None,
) -> Result:
    """Train, validate each epoch, test the best checkpoint once, record; returns what came of it.

    recorder: a warm one that serves many runs; None starts one if anything is to be recorded.
    callbacks: beside those that the configuration names.
    resume_from: a checkpoint to go on from, as a run of its own.
    resumption: a recorded run that goes on.
    tags: of the record, beside its own.
    on_begun: told the run's id as soon as the store has it, before anything is trained.
    tags_of_result: more tags, once all has come of the run and before its record is closed.
    kept: pictures that an earlier call in this process has read, and that this one leaves.

    ConfigurationError, before anything is recorded, for settings that nothing can be built from.
    KeyboardInterrupt after Ctrl-C and SystemExit after SIGTERM, once `last.ckpt` is saved.
    """
    started = time.perf_counter()
    values = configuration.values
    with contextlib.ExitStack() as stack:
        stack.enter_context(nothing_left_behind(quiet=not prints_by_itself(values.trainer)))
        stack.enter_context(endings())
        stopper = stack.enter_context(listening())
        checkpoint = resume_from if resumption is None else resumption.checkpoint
        parts = build_parts(configuration, stopper, callbacks, checkpoint, kept)
        keep_freed_memory()  # not what the pictures were read with
        trainer = parts.trainer
        run = None
        if is_recorded(configuration) and trainer.is_global_zero:
            recorder = recorder or stack.enter_context(Recorder.start())
            run = stack.enter_context(
                recorded(
                    configuration,
                    recorder,
                    trainer,
                    parts.data,
                    parts.classifier,
                    resumption,
                    tags,
                    is_from_scratch=checkpoint is None,
                )
            )
            if on_begun is not None:
                on_begun(run.wait().run_id)
            tie_to_record(parts, configuration, run, is_new=resumption is None)
        folder = place_checkpoints(parts, configuration, run)
        going_on = partial(how_to_go_on, run, configuration, folder)
        stack.enter_context(told_how_to_go_on(going_on))
        stack.enter_context(bound_together(trainer, run, values.log_system_metrics, going_on))
        stack.enter_context(memory.told_plainly(configuration, parts.classifier.network))
        if trainer.is_global_zero:
            tell_of_processes(parts, values.scale_lr)
        if resumption is not None:
            resume_from = bring(resumption, folder) if trainer.is_global_zero else checkpoint
        place = "" if resumption is None else f"{resumption.run.run_id} {resumption.steps}"
        trainer.callbacks.append(Agreement(place))  # type: ignore[attr-defined]
        stopper.waits = trainer.world_size > 1
        if trainer.num_devices > 1:
            parts.data.share_with_others()
        restarts.meet(trainer)
        trainer.fit(
            parts.classifier, datamodule=parts.data, ckpt_path=resume_from, weights_only=True
        )
        result, outcome = conclude(parts, partial(build_classifier, configuration, parts.data))
        if trainer.is_global_zero:
            discard_previous(folder)
        if run is not None:
            result = record_result(run, configuration, result, outcome, parts.keepers, resumption)
            if tags_of_result is not None:
                run.set_tags(tags_of_result(result))
            refused, waiting = finish(run)
            result = replace(result, refused=refused, waiting=waiting)
    return replace(result, seconds=time.perf_counter() - started)


# ---- what takes part -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """All that takes part in a training, built and not yet at work."""

    data: ImageData
    classifier: Classifier
    trainer: Trainer
    scaling: Scaling
    stopper: Stopper
    guard: StopAtNonFiniteLoss
    pace: Pace
    content: CheckpointContent
    keepers: Sequence[Keeper]
    loop: DirectEpochLoop


def build_parts(
    configuration: Configuration,
    stopper: Stopper,
    callbacks: Sequence[Callback],
    checkpoint: str | Path | None,
    kept: Kept | None,
) -> Parts:
    """What is to train, seeded; ConfigurationError for settings that nothing can be built from."""
    values = configuration.values
    if not 0 <= values.seed_everything < 2**32:
        raise ConfigurationError(
            f"seed_everything is {values.seed_everything}; it must be from 0 to {2**32 - 1}."
        )
    drawn_by = checked_seeds(configuration)
    seed_everything(values.seed_everything, workers=False, verbose=False)
    data = build_data(configuration, kept)
    classifier = build_classifier(configuration, data)
    if checkpoint is None:
        with drawing_from(seed_of(drawn_by.weights, "prepare")):
            prepare(classifier.network, data)
    classifier.is_validated = data.val_fraction > 0 and values.trainer.limit_val_batches != 0
    pace = Pace()
    streams = BatchStreams(drawn_by.dropout)
    content = CheckpointContent(configuration.yaml(), data)
    guard = StopAtNonFiniteLoss(content.origin)
    watchers, keepers = own_callbacks(
        configuration, classifier.is_validated, pace, streams, content, guard
    )
    trainer = build_trainer(configuration, [stopper, *watchers, *callbacks, *keepers])
    loop = place_loop(trainer, classifier)
    if data.batch_size < trainer.world_size:  # told before anything is recorded or started
        raise ConfigurationError(
            f"data.batch_size is {data.batch_size}, for all {trainer.world_size} processes "
            f"together; it must be at least {trainer.world_size}, so that each gets a picture."
        )
    check_lengths(trainer, data)
    scaling = scaling_of(values.scale_lr, trainer.world_size, checkpoint)
    classifier.lr_factor = scaling.factor
    content.origin["scale_lr"] = scaling.as_plain()
    return Parts(data, classifier, trainer, scaling, stopper, guard, pace, content, keepers, loop)


def tie_to_record(parts: Parts, configuration: Configuration, run: Run, is_new: bool) -> None:
    """Let the parts tell the run what they find, and its checkpoints whose they are."""
    parts.content.origin["run_id"] = run.wait().run_id
    parts.guard.on_found = partial(record_step, run)
    for keeper in parts.keepers[:1]:
        keeper.on_best = partial(tag_best, run)
    if configuration.values.log_pictures and is_new:
        record_network(run, parts.data, parts.classifier, run.scratch)
        first_batch = FirstBatch(run, parts.data, run.scratch)
        parts.trainer.callbacks.append(first_batch)  # type: ignore[attr-defined]


def place_checkpoints(parts: Parts, configuration: Configuration, run: Run | None) -> Path:
    """The folder of the checkpoints, which all who write one are told."""
    folder = checkpoint_folder(configuration, run)
    parts.stopper.folder = folder if parts.keepers else None
    parts.guard.folder = folder
    if run is not None and run.wait().artifact_dir is not None:  # among the artifacts at once
        parts.guard.folder = folder.with_name(Path(STEP_FILE).parent.name)
    for callback in parts.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder)
    return folder


def tell_of_processes(parts: Parts, scale_lr: Rule | None) -> None:
    """Print how many there are and what that changes; nothing for one process as it was typed."""
    trainer, classifier, data = parts.trainer, parts.classifier, parts.data
    if trainer.world_size > 1:
        print(described(trainer, data.batch_size), file=sys.stderr, flush=True)
        told = told_of_batch_norm(trainer, classifier.network, data.batch_size)
        if told is not None:
            logger.warning(told)
    told = parts.scaling.described(classifier, scale_lr, trainer.world_size)
    if told is not None:
        print(told, file=sys.stderr, flush=True)


# ---- what watches, keeps and records -------------------------------------------------------------


def own_callbacks(
    configuration: Configuration,
    is_validated: bool,
    pace: Pace,
    streams: BatchStreams,
    content: CheckpointContent,
    guard: StopAtNonFiniteLoss,
) -> tuple[list[Callback], list[Keeper]]:
    """What watches the run (pace, progress), and what keeps its checkpoints, the best first."""
    settings = configuration.values.trainer
    with faults_of("checkpoint"):
        keepers = checkpoints(is_validated, **configuration.arguments("checkpoint"))
    if settings.barebones:
        return [streams, content], []
    # A checkpoint's random states are set after those of a beginning; the guard notes each batch's.
    watchers: list[Callback] = [Dynamics(), pace, streams, content]
    if configuration.values.non_finite_loss == "stop":
        watchers.append(guard)
    if settings.enable_progress_bar is not False:
        watchers.append(Progress(pace))
    if settings.enable_checkpointing is False or settings.fast_dev_run:
        return watchers, []
    return watchers, keepers


def prints_by_itself(settings: Any) -> bool:
    """True where a flag asks for what Lightning prints through its log: keep that on."""
    return settings.profiler is not None or settings.enable_model_summary


def record_result(
    run: Run,
    configuration: Configuration,
    result: Result,
    outcome: Outcome,
    keepers: Sequence[Keeper],
    resumption: Resumption | None = None,
) -> Result:
    """The result with its place in the store, after all that came of the run is recorded."""
    info = run.wait()
    if result.best_epoch is not None and "val/accuracy" in result.metrics:
        best = {
            "best_val/epoch": result.best_epoch,
            "best_val/accuracy": result.metrics["val/accuracy"],
        }
        run.log_metrics(best, step=0)  # bars in MLflow's page, as the test figures (logger.py)
    # Loss and accuracy have come by the logger already.
    further = {k: v for k, v in result.metrics.items() if k.startswith("test/")}
    further = {k: v for k, v in further.items() if k not in ("test/loss", "test/accuracy")}
    run.log_metrics(further, step=0)
    if resumption is not None and has_tested(result.metrics):
        before = looks_at_test(resumption.run.tags, resumption.run.metrics)
        run.set_tags({TEST_LOOKS: str(before + 1)})
    record_outcome(run, configuration, outcome, keepers, run.scratch)
    path = result.best_checkpoint
    if path is not None and info.artifact_dir is None:
        path = f"runs:/{info.run_id}/checkpoints/{Path(path).name}"
    return replace(
        result,
        best_checkpoint=path,
        experiment_id=info.experiment_id,
        run_id=info.run_id,
        run_name=info.run_name,
    )


# ---- the figures ---------------------------------------------------------------------------------


def conclude(parts: Parts, rebuild: Callable[[], Classifier]) -> tuple[Result, Outcome]:
    """The figures of the best checkpoint, tested once, and all that they were made of.

    Of the last weights if none was kept.  The classifier of the outcome has these weights on the
    first process; it is a new one, by `rebuild`, where training has parted the weights.

    The first process alone reads the file, which another machine may not have: a test begins with
    the weights of the first on all processes, whatever the strategy.
    """
    data, trainer, history = parts.data, parts.trainer, parts.pace.history
    best = (keeper.best_model_path for keeper in parts.keepers if keeper.best_model_path)
    path = next(best, None)
    path = trainer.strategy.broadcast(path)
    epoch, figures = None, history[-1] if history else {}
    weights: Mapping[str, Tensor] = {}
    if path is not None:
        about: Any = None
        if trainer.is_global_zero:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            weights = checkpoint["state_dict"]
            about = checkpoint["epoch"] + 1, checkpoint["validation"]
        epoch, validation = trainer.strategy.broadcast(about)
        # Validation may come several times an epoch: the checkpoint knows its own.
        figures = next((row for row in history if row["epoch"] == epoch), {}) | validation
    elif is_sharded(trainer):
        weights = trainer.strategy.lightning_module_state_dict()  # all take part, the first gets it

    def trained() -> Classifier:
        whole = rebuild() if is_sharded(trainer) else parts.classifier
        if weights:
            # Not by `ckpt_path`: with that, Lightning puts the callbacks back to that epoch too.
            whole.load_state_dict(weights)
        return whole

    metrics = {k: value for k, value in figures.items() if k.startswith(("train/", "val/"))}
    predictions = None
    if trainer.limit_test_batches != 0:
        tested, predictions = evaluation.test(trainer, trained(), data)
        metrics |= tested
    file = None if path is None else Path(path)
    outcome = Outcome(trained(), data, metrics, history, predictions, epoch, file)
    result = Result(
        metrics,
        history,
        epoch,
        path,
        images_per_second=parts.pace.mean_images_per_second,
        training_seconds=parts.pace.total_seconds,
        num_parameters=sum(p.numel() for p in outcome.classifier.network.parameters()),
        precision=str(trainer.precision),
        captured_steps=parts.loop.captured,
    )
    return result, outcome


@contextlib.contextmanager
def endings() -> Iterator[None]:
    """Tells Lightning's ways to end a training as what they are.

    Ctrl-C is KeyboardInterrupt (Lightning: SystemExit 1), SIGTERM is SystemExit 143 (Lightning:
    SystemExit 0, as if all were well), a flag that does not fit is a ConfigurationError.
    """
    try:
        yield
    except Stopped as stopped:
        ending = ending_of(stopped)
        ending.__notes__ = getattr(stopped, "__notes__", [])
        raise ending from None
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            interrupt = error.__context__
            for note in getattr(error, "__notes__", ()):
                interrupt.add_note(note)
            raise interrupt from None
        raise
    except MisconfigurationException as error:
        raise ConfigurationError(f"trainer: {error}") from error


@contextlib.contextmanager
def told_how_to_go_on(going_on: Callable[[], str | None]) -> Iterator[None]:
    """Whatever ends the training takes along, as a note, the command that goes on with it."""
    try:
        yield
    except BaseException as error:
        line = going_on()
        if line is not None:
            error.add_note(line)
        raise


def how_to_go_on(run: Run | None, configuration: Configuration, folder: Path) -> str | None:
    """What a person types to go on with the run, if it left anything to go on from."""
    if run is None or not any(folder.glob("[!.]*.ckpt")):
        return None
    return f"Go on with it: {resume_command(run, configuration)}"


# ---- leaving no trace ----------------------------------------------------------------------------

# What Lightning says of every run and what nobody can act on here.
NOISE = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*does not have many workers.*",
    r".*number of training batches .* is smaller than the logging interval.*",
    r"Checkpoint directory .* exists and is not empty.*",
    r"Total length of `list` across ranks is zero.*",
    r"Precision .* is not supported by the model summary.*",
    r"`ModelCheckpoint\(monitor=.*\)` could not find the monitored key.*",
    r".*recommended to use `self.log\(.*sync_dist=True\)`.*",  # log_sums has reduced them
)


@contextlib.contextmanager
def nothing_left_behind(quiet: bool = True) -> Iterator[None]:
    """Puts back random state, environment, signals, warnings, log levels, torch's switches."""
    environment = dict(os.environ)
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with isolate_rng(), warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message)
        for logger in loggers:
            if quiet:
                logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.benchmark = benchmark
