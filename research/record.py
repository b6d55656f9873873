"""What a run leaves in MLflow beside its curves: settings, data, pictures, checkpoints, a model.

Nothing here can end a training: what cannot be drawn or exported is told in a line and left out.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from research.classifier import Classifier
from research.configuration.schema import Configuration
from research.data import ImageData
from research.data.normalization import normalize
from research.evaluation import Predictions, write_class_table
from research.tracking.logger import RecordLogger
from research.tracking.provenance import fingerprint, hash_code
from research.tracking.run import DatasetInput, Recorder, Run
from research.tracking.store import resolve_tracking_uri

logger = logging.getLogger(__name__)

# What is set but cannot change the figures: two runs that differ in nothing else are equal.
WITHOUT_EFFECT = (
    *("experiment", "run_name", "tracking_uri", "log_pictures", "log_model", "log_system_metrics"),
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.logger", "trainer.log_every_n_steps", "trainer.profiler"),
    "data.root",  # the pictures themselves are hashed
)


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
    parameters = headline(configuration)
    parameters["num_parameters"] = sum(p.numel() for p in classifier.network.parameters())
    run = recorder.start_run(
        uri,
        values.experiment,
        values.run_name,
        params=configuration.flat() | parameters,
        tags={
            "seed": str(values.seed_everything),
            "world_size": str(trainer.world_size),
            **describe_device(trainer.strategy.root_device),
            **hashes(configuration, inputs),
        },
        log_system_metrics=values.log_system_metrics,
    )
    run.wait()
    run.log_text(configuration.yaml(), "config.yaml")
    run.log_inputs(inputs)
    trainer.loggers = [RecordLogger(run), *trainer.loggers]
    with run:
        yield run


def headline(configuration: Configuration) -> dict[str, Any]:
    """What is compared most, once more under names that MLflow lists before all others.

    Its Compare page opens with the first three parameters that differ, in the order of characters,
    where capitals come first; `log_model` and `lr_scheduler.T_max` would be in the way otherwise.
    """
    settings = configuration.flat()
    names = {"Learning rate": "optimizer.lr", "Loss": "model.loss"}
    names |= {"Network": "model.network", "Optimizer": "optimizer"}
    return {name: settings[key] for name, key in names.items() if key in settings}


def describe_data(data: ImageData) -> list[DatasetInput]:
    """Each split as MLflow's page shows it; an empty one is none."""
    described = []
    for context in ("train", "val", "test"):
        split = getattr(data.splits, context)
        if len(split) == 0:
            continue
        counts = torch.bincount(split.labels, minlength=data.num_classes).tolist()
        described.append(
            DatasetInput(
                name=data.dataset_name,
                context=context,
                digest=split.digest(),
                source=data.source,
                num_pictures=len(split),
                picture_shape=tuple(split.pixels.shape[1:]),
                counts=dict(zip(data.class_names, counts, strict=True)),
            )
        )
    return described


def hashes(configuration: Configuration, inputs: Sequence[DatasetInput]) -> dict[str, str]:
    """Tags by which equal runs are found: `fingerprint`, and the three parts that it is made of.

    Equal configuration, data and code have equal fingerprints; the configuration without what
    cannot change the figures (names, recording).
    """
    settings = {k: v for k, v in configuration.flat().items() if k not in WITHOUT_EFFECT}
    text = json.dumps(settings, sort_keys=True)
    digests = {given.context: given.digest for given in inputs}
    code = hash_code(Path(__file__).parent, files_of(configuration))
    return {
        "fingerprint": fingerprint(text, digests, code),
        "fingerprint.configuration": short_hash(text),
        "fingerprint.data": short_hash(json.dumps(digests, sort_keys=True)),
        "fingerprint.code": code[:16],
    }


def files_of(configuration: Configuration) -> list[Path]:
    """The files of the chosen classes that belong neither to this package nor to a library."""
    found = set()
    for chosen in configuration.classes.values():
        with contextlib.suppress(TypeError, OSError):
            path = Path(inspect.getsourcefile(chosen) or "")
            installed = {"site-packages", "dist-packages"} & set(path.parts)
            if path.is_file() and not installed and not path.is_relative_to(Path(__file__).parent):
                found.add(path)
    return sorted(found)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_device(device: torch.device) -> dict[str, str]:
    """Tags: the `device`'s name, and what of torch's build and threads changes figures on it."""
    tags = {"device": device_name(device), "torch.num_threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        tags["cuda"] = str(torch.version.cuda)
        tags["cudnn"] = str(torch.backends.cudnn.version())
    return tags


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or device.type


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
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        finally:
            for file in sorted(Path(folder).glob("*.ckpt")):
                run.log_artifact(file, "checkpoints")
            run.flush()


# ---- pictures ------------------------------------------------------------------------------------


class FirstLook(Callback):
    """Draws the network and a training batch once the first epoch is over.

    Not before: the first step should not wait for it, and a long run shows them early all the same.
    """

    def __init__(self, run: Run, data: ImageData, folder: Path) -> None:
        self.run = run
        self.data = data
        self.folder = folder
        self.batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_done = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and not self.is_done:
            images, labels = batch
            self.batch = images[:64].detach().clone(), labels[:64].clone()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_done or self.batch is None:
            return
        self.is_done = True
        images, labels = (tensor.cpu() for tensor in self.batch)
        self.batch = None
        assert isinstance(pl_module, Classifier)
        record_first_pictures(self.run, self.data, pl_module, images, labels, self.folder)


def record_first_pictures(
    run: Run,
    data: ImageData,
    classifier: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    folder: Path,
) -> None:
    """The network as a graph and as text, and a training batch (B, 3, H, W) as it was."""
    with leaving_out("pictures"):
        from research.pictures.batch import draw_batch
        from research.pictures.graph import draw_graph, summarize

        shape = (data.in_channels, data.image_size, data.image_size)
        with leaving_out("network.txt"):
            run.log_text(summarize(classifier.network, shape), "network.txt")
        record_pictures(
            run,
            folder,
            {
                "network.svg": lambda file: draw_graph(classifier.network, shape, file),
                "training_batch.png": lambda file: draw_batch(
                    images, labels, data.normalization, data.class_names, file
                ),
            },
        )


@dataclass(frozen=True)
class Outcome:
    """A trained run: `classifier` has the weights of the checkpoint that was tested."""

    classifier: Classifier
    data: ImageData
    history: list[dict[str, float]]
    predictions: Predictions | None
    best_epoch: int | None


def record_last_pictures(run: Run, outcome: Outcome, folder: Path) -> None:
    """Learning curves, layers; of the test split the confusions, the mistakes, how sure it was."""
    with leaving_out("pictures"):
        from research.pictures.curves import draw_learning_curves
        from research.pictures.layers import draw_feature_maps, draw_filters
        from research.pictures.results import draw_calibration, draw_confusion_matrix, draw_mistakes

        network, data = outcome.classifier.network, outcome.data
        names, test = data.class_names, data.splits.test
        drawings: dict[str, Callable[[Path], Any]] = {
            "learning_curves.png": lambda file: draw_learning_curves(
                outcome.history, file, outcome.best_epoch
            ),
            "filters.png": lambda file: draw_filters(network, file),
            "feature_maps.png": lambda file: draw_feature_maps(
                network, some_of(data), data.normalization, file
            ),
        }
        if outcome.predictions is not None:
            said, labels = outcome.predictions.probabilities, outcome.predictions.labels
            drawings |= {
                "confusion_matrix.png": lambda file: draw_confusion_matrix(
                    said, labels, names, file
                ),
                "mistakes.png": lambda file: draw_mistakes(
                    test.pixels[: len(labels)], said, labels, names, file
                ),
                "calibration.png": lambda file: draw_calibration(said, labels, file),
            }
        record_pictures(run, folder, drawings)


def record_pictures(run: Run, folder: Path, drawings: Mapping[str, Callable[[Path], Any]]) -> None:
    """Each drawing as a file of the run's pictures/; one that draws nothing is left out."""
    for name, draw in drawings.items():
        file = folder / name
        with leaving_out(f"pictures/{name}"):
            draw(file)
            if file.exists():
                run.log_artifact(file, "pictures")


def some_of(data: ImageData, count: int = 3) -> torch.Tensor:
    """The first test pictures as the network sees them, float32 (count, 3, H, W)."""
    pixels = data.splits.test.pixels[:count].cpu()
    factors = data.normalization.factors(pixels.shape[2])
    return normalize(pixels, *factors).permute(0, 3, 1, 2)


@contextlib.contextmanager
def leaving_out(what: str) -> Iterator[None]:
    """What goes wrong inside costs the run this one thing, and a line that says so."""
    try:
        yield
    except Exception as error:
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.warning("Not recorded: %s. %s", what, told)


# ---- what came out -------------------------------------------------------------------------------


def record_outcome(
    run: Run,
    configuration: Configuration,
    outcome: Outcome,
    metrics: Mapping[str, float],
    keepers: Sequence[ModelCheckpoint],
    folder: Path,
) -> None:
    """Tables and pictures of the trained run, and its checkpoints and model tied to `metrics`.

    `folder` must stay until the run is flushed.
    """
    if outcome.predictions is not None:
        with leaving_out("test/classes.csv"):
            file = folder / "classes.csv"
            write_class_table(outcome.predictions, outcome.data.class_names, file)
            run.log_artifact(file, "test")
    if configuration.values.log_pictures:
        record_last_pictures(run, outcome, folder)
    best = next((k.best_model_path for k in keepers if k.best_model_path), None)
    if best is not None:
        run.set_tags({"checkpoint.best": f"checkpoints/{Path(best).name}"})
    if configuration.values.log_model:
        record_models(run, configuration, outcome, metrics, keepers, folder)


def record_models(
    run: Run,
    configuration: Configuration,
    outcome: Outcome,
    metrics: Mapping[str, float],
    keepers: Sequence[ModelCheckpoint],
    folder: Path,
) -> None:
    """The kept checkpoints as models in MLflow, with their figures; the best one can be served."""
    settings = configuration.flat()
    chosen = {key: settings[key] for key in ("model.network", "model.loss", "optimizer")}
    for keeper in keepers:
        if not keeper.best_model_path:
            continue
        path = Path(keeper.best_model_path)
        is_tested = keeper is keepers[0]
        step = outcome.best_epoch or len(outcome.history)
        # The run has those of each class; a table of models has no room for them.
        figures = {k: v for k, v in metrics.items() if not k.startswith("test/accuracy/")}
        if not is_tested:
            last = outcome.history[-1]
            step = int(last["epoch"])
            figures = {k: v for k, v in last.items() if k.startswith(("train/", "val/"))}
        files = None
        if is_tested:
            with leaving_out("the model that can be served"):
                files = export_model(outcome, folder / "model")
        run.log_model(
            name=path.stem if path.stem in ("best", "last") else "best",
            step=step,
            metrics=figures,
            params=chosen,
            tags={"checkpoint": f"checkpoints/{path.name}"},
            folder=files,
        )


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
