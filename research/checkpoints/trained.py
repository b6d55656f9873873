"""From what a person types for a run to the network that it trained: the checkpoint, read back.

A checkpoint knows all it takes (`origin`): the configuration, the class names, the size of the
pictures and how they were normalised. Neither the training data nor the store is asked again.

A checkpoint may be a stranger's. It is read as tensors and plain values (`weights_only=True`), and
the classes that it names must be known ones unless it is trusted: nothing in it can run.
"""

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from research.building import build_network, faults_of
from research.configuration.compose import CommandLine, ConfigurationError, read_text
from research.configuration.schema import Configuration, resolve
from research.data import ImageData
from research.data.normalization import Normalization
from research.losses import ClassificationLoss
from research.processes.launch import launch
from research.tracking.runs import RecordedRun, find_run
from research.tracking.store import resolve_tracking_uri, sqlite_path


@dataclass(frozen=True)
class Pictures:
    """What a network was made for; the pictures themselves are not here."""

    class_names: tuple[str, ...]
    image_size: int
    normalization: Normalization
    in_channels: int = 3

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file's content.

    `epoch` is the number of epochs behind the weights, from 1.  `run_id` is None for a run that was
    not recorded.  `weights` are those of the whole Classifier, on the CPU.
    """

    path: Path
    epoch: int
    run_id: str | None
    configuration: str
    pictures: Pictures
    weights: Mapping[str, Tensor]
    trust: bool = False  # its configuration may name any class


def is_own_store(tracking_uri: str) -> bool:
    """Whether the runs there are this project's own: its file, the one used when none is named.

    What a run in it names was typed or trusted when it was trained. On a server others write too.
    """
    return sqlite_path(tracking_uri) is not None and tracking_uri == resolve_tracking_uri(None)


def find_checkpoint(
    text: str, name: str | None, tracking_uri: str | None
) -> tuple[RecordedRun | None, Path]:
    """The run and the checkpoint file that `text` and `name` stand for; a file has no run.

    `text` is what `find_run` takes, or the path of a .ckpt file; `name` is what
    `RecordedRun.checkpoint` takes; `tracking_uri` is the flag's value.
    """
    if text.endswith(".ckpt") or Path(text).is_file():
        if name is not None:
            raise ConfigurationError(
                f"checkpoint: {text} is a checkpoint already; leave --checkpoint out, or give the "
                "run instead of the file."
            )
        return None, Path(text)
    uri = resolve_tracking_uri(tracking_uri)
    if uri is None:
        raise ConfigurationError("tracking_uri is empty, so there is no store to find a run in.")
    run = find_run(uri, text)
    return run, run.checkpoint(name)


def read_checkpoint(path: Path, trust: bool = False) -> Checkpoint:
    """ConfigurationError where the file is none of ours; OSError where it cannot be read.

    trust: let its configuration name any class, which runs the code of the module it is in.
    """
    content = read_plain(path)
    origin = content.get("origin") if isinstance(content, dict) else None
    if not isinstance(origin, dict) or "state_dict" not in content:
        raise ConfigurationError(f"{path} is no checkpoint of python -m research.fit.")
    if "pictures" not in origin:
        raise ConfigurationError(
            f"{path} was written by an older version, which did not keep class names and "
            "normalisation in it. Train again with --config and the run's config.yaml."
        )
    if not is_whole(content):
        raise ConfigurationError(f"{path} is no checkpoint of python -m research.fit.")
    known = origin["pictures"]
    return Checkpoint(
        path=path,
        epoch=content["epoch"] + 1,
        run_id=origin["run_id"],
        configuration=origin["configuration"],
        pictures=Pictures(
            tuple(known["class_names"]),
            known["image_size"],
            Normalization(tuple(known["mean"]), tuple(known["std"])),
        ),
        weights=content["state_dict"],
        trust=trust,
    )


def read_plain(path: Path) -> Any:
    """The tensors and plain values in a file of torch.save, on the CPU.

    ConfigurationError for anything else. That includes compressed files, which torch.save does not
    write: a small one may hold more than the memory does.
    """
    with open(path, "rb"):  # so that it is an OSError that names the file
        pass
    try:
        if not path.is_file():  # a pipe may never end
            raise ValueError("no regular file")
        with zipfile.ZipFile(path) as archive:
            held = archive.infolist()
        if any(file.compress_type != zipfile.ZIP_STORED for file in held):
            raise ValueError("compressed")
        if sum(file.file_size for file in held) > os.path.getsize(path):
            raise ValueError("files in it overlap")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch, pickle or zipfile make of a foreign file
        raise ConfigurationError(
            f"{path} is no checkpoint of python -m research.fit, or it is damaged."
        ) from error


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether all that `Checkpoint` takes is of the kind it should be."""
    origin, weights = content["origin"], content["state_dict"]
    known = origin["pictures"]
    if not isinstance(known, dict):
        return False
    names, size = known.get("class_names"), known.get("image_size")
    colors = [known.get("mean"), known.get("std")]
    return (
        isinstance(content.get("epoch"), int)
        and isinstance(origin.get("run_id", 0), str | None)
        and isinstance(origin.get("configuration"), str)
        and isinstance(names, list | tuple)
        and len(names) > 0
        and all(isinstance(name, str) for name in names)
        and isinstance(size, int)
        and size > 0
        and all(is_color(color) for color in colors)
        and isinstance(weights, Mapping)
        and all(isinstance(weight, Tensor) for weight in weights.values())
    )


def is_color(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(part, float | int) and math.isfinite(part) for part in value)
    )


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration as nested settings, without what only matters in training."""
    settings = read_text(checkpoint.configuration, f"The configuration in {checkpoint.path}")
    trainer = settings.setdefault("trainer", {})
    if not isinstance(trainer, dict):
        raise ConfigurationError(f"The configuration in {checkpoint.path} has no trainer.")
    # What Lightning would do beside a test, and what would keep it from one.
    trainer |= {"callbacks": None, "logger": False, "profiler": None, "enable_checkpointing": False}
    trainer |= {"barebones": False, "fast_dev_run": False}
    # Where it was trained need not be where it is used.
    trainer |= {"devices": 1 if launch() is None else "auto", "num_nodes": 1}
    if isinstance(trainer.get("strategy"), str):  # a class is looked at as all that a file names
        trainer["strategy"] = "auto"
    return settings


def build_trained(checkpoint: Checkpoint) -> tuple[nn.Module, ClassificationLoss]:
    """The network with its weights, and the loss that can read its scores; both on the CPU."""
    settings = settings_of(checkpoint)
    del settings["trainer"]  # of a machine that this one may not be
    configuration = resolve(CommandLine(files=[settings], trust=checkpoint.trust))
    network = build_network(configuration, cast(ImageData, checkpoint.pictures))
    inside = {
        name.removeprefix("network."): weight
        for name, weight in checkpoint.weights.items()
        if name.startswith("network.")
    }
    load_weights(network, inside, checkpoint.path)
    return network, build_loss(configuration)


def build_loss(configuration: Configuration) -> ClassificationLoss:
    with faults_of("model.loss"):
        return configuration.classes["model.loss"](**configuration.arguments("model.loss"))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put the weights in; ConfigurationError unless every one has its place."""
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigurationError(
            f"The weights in {path} are not those of this network as the code has it now "
            f"({first_line(error)})."
        ) from error


def first_line(error: Exception) -> str:
    """What went wrong in a line; a heading that ends in a colon takes what follows along."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return said[:200].rstrip(".") or type(error).__name__
