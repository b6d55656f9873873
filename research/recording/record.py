"""What a run leaves in MLflow beside its curves: settings, data, pictures, checkpoints, a model.

Nothing here can end a training: what cannot be drawn or exported is told in a line and left out.
"""

import contextlib
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from lightning.pytorch import Trainer

from research.callbacks import Keeper
from research.classifier import Classifier
from research.configuration.compose import ConfigurationError
from research.configuration.imports import OPEN_TO_FILES
from research.configuration.schema import Configuration
from research.data import ImageData
from research.evaluation import write_class_table
from research.faults.nonfinite import STEP_FILE
from research.processes.jobs import job_tags
from research.processes.placement import tags_of
from research.recording.album import Outcome, leaving_out, record_results
from research.recording.identity import (
    describe_data,
    describe_device,
    hashes,
    hashes_of_beginning,
    parameters_of,
)
from research.resumption import Resumption
from research.tracking.logger import RecordLogger
from research.tracking.run import Recorder, Run
from research.tracking.store import TrackingError, redact, resolve_tracking_uri

logger = logging.getLogger(__name__)

OPEN_PACKAGES = {name.partition(".")[0] for name in OPEN_TO_FILES}
PATIENCE_SECONDS = 60.0  # with a server that does not answer when a run begins: it may restart


def is_recorded(configuration: Configuration) -> bool:
    settings = configuration.values.trainer
    silenced = settings.logger is False or settings.fast_dev_run or settings.barebones
    return not silenced and resolve_tracking_uri(configuration.values.tracking_uri) is not None


@contextlib.contextmanager
def recorded(
    configuration: Configuration,
    recorder: Recorder,
    trainer: Trainer,
    data: ImageData,
    classifier: Classifier,
    resumption: Resumption | None = None,
    more_tags: Mapping[str, str] = {},
    is_from_scratch: bool = True,
) -> Iterator[Run]:
    """A run in MLflow with all its settings; ends FINISHED, FAILED or KILLED as what is inside.

    With `resumption` that run goes on: what it lacks is added, and nothing is recorded twice.
    `is_from_scratch`: it begins with the weights that `classifier` has, from no checkpoint.
    ConfigurationError if its pictures have changed since, unless changes are allowed.
    """
    values = configuration.values
    uri = resolve_tracking_uri(values.tracking_uri)
    assert uri is not None
    inputs = describe_data(data)
    tags = {"seed": str(values.seed_everything)} | tags_of(trainer, data.batch_size)
    tags |= describe_device(trainer.strategy.root_device) | job_tags() | dict(more_tags)
    with leaving_out("the fingerprint"):  # a file of the code may not be readable
        tags |= hashes(configuration, inputs, classifier.lr_factor)
    if is_from_scratch:
        with leaving_out("the hashes of what it begins with"):
            tags |= hashes_of_beginning(classifier.network, data)
    if resumption is None:
        run = recorder.start_run(
            uri,
            values.experiment,
            values.run_name,
            params=parameters_of(configuration, classifier.network, classifier.lr_factor),
            tags=tags,
            log_system_metrics=values.log_system_metrics,
            patience=PATIENCE_SECONDS,
        )
    else:
        drift = drift_of(resumption, tags)
        run = recorder.resume_run(
            uri,
            resumption.run.run_id,
            resumption.saved_at,
            resumption.logged,
            log_system_metrics=values.log_system_metrics,
            patience=PATIENCE_SECONDS,
        )
    run.wait(120 + PATIENCE_SECONDS)
    with run:
        if resumption is None or resumption.checkpoint is None:  # it may have died before this
            run.log_text(configuration.yaml(), "config.yaml")
            with leaving_out("the data sets"):
                run.log_inputs(inputs)
        if resumption is not None:
            record_resumption(
                run, resumption, configuration, drift, tags_of(trainer, data.batch_size)
            )
            run.set_tags(more_tags)
        trainer.loggers = [RecordLogger(run), *trainer.loggers]
        yield run


def finish(run: Run) -> tuple[str | None, str | None]:
    """End the record; what the store refused, and what waits until it is back, in sentences."""
    try:
        run.finish()
    except TrackingError as refusal:
        return str(refusal), run.waiting
    return None, run.waiting


# ---- a run that goes on --------------------------------------------------------------------------


def drift_of(resumption: Resumption, tags: Mapping[str, str]) -> list[str]:
    """What changed beside the settings, a sentence each; ConfigurationError for other pictures."""
    before = resumption.run.tags
    changed = {
        part
        for part in ("data", "code")
        if before.get(f"fingerprint.{part}", "") != tags.get(f"fingerprint.{part}", "")
    }
    if "data" in changed and not resumption.allows_changes:
        raise ConfigurationError(
            f"resume: the pictures are not those that {resumption.run.described()} was trained on. "
            "Bring those back, or go on with others by --allow_changes, which is recorded."
        )
    processes = before.get("world_size", "1"), tags["world_size"]
    words = {"data": "The pictures have changed.", "code": "The code has changed."}
    drift = [words[part] for part in ("data", "code") if part in changed]
    if processes[0] != processes[1]:
        drift.append(f"Processes: {processes[0]} -> {processes[1]}.")
    if "code" in changed:
        logger.warning("The code has changed since this run was begun; the record says so.")
    return drift


def record_resumption(
    run: Run,
    resumption: Resumption,
    configuration: Configuration,
    drift: Sequence[str],
    places: Mapping[str, str],
) -> None:
    """That the run goes on, from where and with which changes; the metrics that it still lacks."""
    count = int(resumption.run.tags.get("resumed", "0")) + 1
    settings = [f"{key}: {old} -> {new}" for key, (old, new) in resumption.changes.items()]
    lines = [
        f"time: {datetime.now().astimezone().isoformat(timespec='seconds')}",
        f"checkpoint: {name_of(resumption.checkpoint)}, after {resumption.steps} steps",
        *(f"skipped, damaged: {path.name}" for path in resumption.skipped),
        *(f"changed: {change}" for change in [*settings, *drift]),
    ]
    run.log_text("\n".join(lines) + "\n", f"resumed/{count}.txt")
    run.set_tags({"resumed": str(count), **places})
    if settings or drift:
        run.set_tags({f"resumed.{count}.changes": "; ".join([*settings, *drift])})
        run.log_text(configuration.yaml(), f"resumed/{count}.config.yaml")
    # What the process could not hand over before it was killed; what is there is not sent again.
    for row in resumption.history:
        figures = {name: value for name, value in row.items() if name != "epoch"}
        run.log_metrics(figures, int(row["epoch"]), timestamp=resumption.saved_at)


def name_of(checkpoint: Path | None) -> str:
    return "none yet" if checkpoint is None else checkpoint.name


def resume_command(run: Run, configuration: Configuration) -> str:
    """What a person types to go on with the run."""
    command = f"python -m research.fit --resume {run.wait().run_id[:8]}"
    if run.tracking_uri != resolve_tracking_uri(None):
        if configuration.packages is None or set(configuration.packages) - OPEN_PACKAGES:
            command += " --trust"  # what was typed then will be read from a checkpoint
        command += f" --tracking_uri {shlex.quote(redact(run.tracking_uri))}"
    return command


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint_folder(configuration: Configuration, run: Run | None) -> Path:
    """Where checkpoints are written: the run's own artifacts where they are a folder here.

    For a remote store, a folder of this machine whose content is sent when the run ends, however
    it ends; where nothing is recorded, `checkpoints/<run name>` under `trainer.default_root_dir`.
    """
    if run is None:
        values = configuration.values
        name = re.sub(r"[^\w.-]+", "_", values.run_name or "").lstrip(".")
        parent = Path(values.trainer.default_root_dir or ".") / "checkpoints"
        if not name or (parent / name).exists():  # never over another run's
            name += "-" * bool(name) + datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
        return parent / name
    artifacts = run.wait().artifact_dir
    if artifacts is not None:
        return artifacts / "checkpoints"
    folder = run.scratch / "checkpoints"
    run.keep_sending(folder, "checkpoints")
    return folder


def record_step(run: Run, file: Path) -> None:
    """Keep the step whose loss was no number among the run's artifacts."""
    run.log_artifact(file, str(Path(STEP_FILE).parent))


def tag_best(run: Run, checkpoint: Path) -> None:
    run.set_tags({"checkpoint.best": f"checkpoints/{checkpoint.name}"})


# ---- what came out -------------------------------------------------------------------------------


def record_outcome(
    run: Run,
    configuration: Configuration,
    outcome: Outcome,
    keepers: Sequence[Keeper],
    folder: Path,
) -> None:
    """Tables and pictures of the trained run, and its checkpoints and model tied to its figures.

    `folder` must stay until the run is flushed.
    """
    if outcome.predictions is not None:
        with leaving_out("test/classes.csv"):
            file = folder / "classes.csv"
            write_class_table(outcome.predictions, outcome.data.class_names, file)
            run.log_artifact(file, "test")
    if configuration.values.log_pictures:
        record_results(run, outcome, folder)
    if configuration.values.log_model:
        with leaving_out("models"):
            record_models(run, configuration, outcome, keepers, folder)


def record_models(
    run: Run,
    configuration: Configuration,
    outcome: Outcome,
    keepers: Sequence[Keeper],
    folder: Path,
) -> None:
    """The best and the last checkpoint as models in MLflow; the one tested can be served."""
    settings = configuration.flat()
    chosen = {key: settings[key] for key in ("model.network", "model.loss", "optimizer")}
    # The page lists the newest first, and the best is what one looks for.
    for keeper in reversed(keepers):
        if not keeper.best_model_path:
            continue
        path = Path(keeper.best_model_path)
        name = "last" if path.stem == "last" else "best"
        tags = {"checkpoint": f"checkpoints/{path.name}"}
        if path == outcome.tested:
            # The run has those of each class; a table of models has no room for them.
            figures = {
                k: v for k, v in outcome.metrics.items() if not k.startswith("test/accuracy/")
            }
            files = None
            with leaving_out("the model that can be served"):
                files = export_model(outcome, folder / "model")
            step = outcome.best_epoch or len(outcome.history)
            run.log_model(name, step, figures, chosen, tags, files)
        elif outcome.history:
            last = outcome.history[-1]
            figures = {k: v for k, v in last.items() if k.startswith(("train/", "val/"))}
            run.log_model(name, int(last["epoch"]), figures, chosen, tags)


def export_model(outcome: Outcome, folder: Path) -> Path:
    """The folder that a model is recorded from: classes, a few test pictures, the program."""
    from research.recording.export import write_model

    write_model(
        folder,
        outcome.classifier.network,
        outcome.classifier.loss,
        outcome.data.normalization,
        outcome.data.class_names,
        outcome.data.splits.test.pixels[:2].cpu().numpy(),
        outcome.best_epoch,
    )
    return folder
