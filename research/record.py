"""What a run leaves in MLflow beside its curves: settings, data, pictures, checkpoints, a model.

Nothing here can end a training: what cannot be drawn or exported is told in a line and left out.
"""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from lightning.pytorch import Trainer

from research.album import Outcome, leaving_out, record_results
from research.callbacks import Keeper
from research.classifier import Classifier
from research.configuration.schema import Configuration
from research.data import ImageData
from research.evaluation import write_class_table
from research.identity import describe_data, describe_device, hashes, parameters_of
from research.tracking.logger import RecordLogger
from research.tracking.run import Recorder, Run
from research.tracking.store import TrackingError, resolve_tracking_uri


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
) -> Iterator[Run]:
    """A run in MLflow with all its settings; ends FINISHED, FAILED or KILLED as what is inside."""
    values = configuration.values
    uri = resolve_tracking_uri(values.tracking_uri)
    assert uri is not None
    inputs = describe_data(data)
    tags = {"seed": str(values.seed_everything), "world_size": str(trainer.world_size)}
    tags |= describe_device(trainer.strategy.root_device)
    with leaving_out("the fingerprint"):  # a file of the code may not be readable
        tags |= hashes(configuration, inputs)
    run = recorder.start_run(
        uri,
        values.experiment,
        values.run_name,
        params=parameters_of(configuration, classifier.network),
        tags=tags,
        log_system_metrics=values.log_system_metrics,
    )
    run.wait()
    with run:
        run.log_text(configuration.yaml(), "config.yaml")
        with leaving_out("the data sets"):
            run.log_inputs(inputs)
        trainer.loggers = [RecordLogger(run), *trainer.loggers]
        yield run


# ---- checkpoints ---------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpoint_folder(configuration: Configuration, run: Run | None) -> Iterator[Path]:
    """Where checkpoints are written: the run's own artifacts where they are a folder here.

    For a remote store, a temporary folder whose content is sent when the training ends; where
    nothing is recorded, `checkpoints/<run name>` under `trainer.default_root_dir`.
    """
    if run is None:
        values = configuration.values
        name = re.sub(r"[^\w.-]+", "_", values.run_name or "").lstrip(".")
        parent = Path(values.trainer.default_root_dir or ".") / "checkpoints"
        if not name or (parent / name).exists():  # never over another run's
            name += datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
        yield parent / name
        return
    artifacts = run.wait().artifact_dir
    if artifacts is not None:
        yield artifacts / "checkpoints"
        return
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        send_checkpoints(run, folder)


def send_checkpoints(run: Run, folder: Path) -> None:
    """Record the files of `folder` and remove it, or name it where they could not be delivered."""
    files = sorted(folder.glob("*.ckpt"))
    for file in files:
        run.log_artifact(file, "checkpoints")
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    try:
        run.flush(timeout=60 + 10 * megabytes)
    except TrackingError as trouble:
        raise TrackingError(f"{trouble} The checkpoints are kept in {folder}.") from trouble
    shutil.rmtree(folder, ignore_errors=True)


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
    from research.export import write_model

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
