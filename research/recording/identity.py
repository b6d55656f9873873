"""What a run is before it begins: parameters, data sets, device, hashes that find its equals."""

import contextlib
import hashlib
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from research.configuration.effect import WITHOUT_EFFECT
from research.configuration.schema import Configuration
from research.data import ImageData
from research.data.split import Split
from research.randomness import seeds_of
from research.tracking.environment import cpu_model
from research.tracking.provenance import fingerprint, hash_code, hash_of
from research.tracking.run import DatasetInput

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]  # research/


def parameters_of(
    configuration: Configuration, network: nn.Module, lr_factor: float = 1.0
) -> dict[str, Any]:
    """Every setting by its key, what is compared most in front, and the size of the network.

    `random.weights` and its like are the seeds that count, whether they were set or not.
    Where `scale_lr` is set, also `learning_rate.factor`, which all learning rates are multiplied
    by; "Learning rate" is the product then, `optimizer.lr` what was typed.
    """
    count = sum(parameter.numel() for parameter in network.parameters())
    settings = configuration.flat()
    drawn_by = {f"random.{name}": seed for name, seed in vars(seeds_of(configuration)).items()}
    found = headline(settings, lr_factor) | settings | drawn_by | {"num_parameters": count}
    if settings["scale_lr"] is not None:
        found["learning_rate.factor"] = lr_factor
    return found


def headline(settings: Mapping[str, Any], lr_factor: float = 1.0) -> dict[str, Any]:
    """What is compared most, once more under names that MLflow lists before all others.

    Its Compare page opens with the first three parameters that differ, in the order of characters,
    where capitals come first; `log_model` and `lr_scheduler.T_max` would be in the way otherwise.
    """
    names = {"Learning rate": "optimizer.lr", "Loss": "model.loss"}
    names |= {"Network": "model.network", "Optimizer": "optimizer"}
    found = {name: settings[key] for name, key in names.items() if key in settings}
    if lr_factor != 1 and "Learning rate" in found:
        found["Learning rate"] *= lr_factor
    return found


def describe_data(data: ImageData) -> list[DatasetInput]:
    """Each split as MLflow's page shows it; an empty one is none.

    A split whose pictures another has already is left out, and told: MLflow takes both for one.
    """
    described: list[DatasetInput] = []
    for context in ("train", "val", "test"):
        if len(getattr(data.splits, context)) == 0:
            continue
        given = describe_split(data, context)
        twin = next((other for other in described if other.digest == given.digest), None)
        if twin is None:
            described.append(given)
        else:
            logger.warning("The %s split has the same pictures as %s.", context, twin.context)
    return described


def describe_split(data: ImageData, split: str, context: str | None = None) -> DatasetInput:
    """One split, under the name of what it is for: its own, where none is given."""
    pictures: Split = getattr(data.splits, split)
    counts = torch.bincount(pictures.labels, minlength=data.num_classes).tolist()
    height, width, channels = pictures.pixels.shape[1:]
    return DatasetInput(
        name=data.dataset_name,
        context=split if context is None else context,
        digest=pictures.digest(),
        source=data.source,
        num_pictures=len(pictures),
        picture_shape=(height, width, channels),
        counts=dict(zip(data.class_names, counts, strict=True)),
    )


def hashes(
    configuration: Configuration, inputs: Sequence[DatasetInput], lr_factor: float = 1.0
) -> dict[str, str]:
    """Tags by which equal runs are found: `fingerprint`, and the three parts that it is made of.

    Equal configuration, data and code have equal fingerprints; the configuration without what
    cannot change the figures (names, recording).  A factor of the learning rates that comes from
    the number of processes does change them, and belongs to the `fingerprint` alone.
    """
    text = text_of(configuration)
    scaled = text if lr_factor == 1 else f"{text} learning_rate.factor {lr_factor}"
    digests = {given.context: given.digest for given in inputs}
    code = hash_code(PACKAGE, files_of(configuration))
    return {
        "fingerprint": fingerprint(scaled, digests, code),
        "fingerprint.configuration": hash_of(text),
        "fingerprint.data": hash_of(sorted(digests.items())),
        "fingerprint.code": code,
    }


def hashes_of_beginning(network: nn.Module, data: ImageData) -> dict[str, str]:
    """Tags that tell whether runs begin alike, whatever their losses and optimizers are.

    `initial_weights`: of the network before its first step.  `first_batches`: of what its first
    batches begin with, as `ImageData` hands them out; left out for a data set with loaders of its
    own.  Neither depends on devices, their number, or the precision.
    """
    found = {"initial_weights": hash_weights(network)}
    if type(data).train_dataloader is ImageData.train_dataloader:
        found["first_batches"] = hash_batches(data)
    return found


def hash_weights(network: nn.Module) -> str:
    """Names, types, shapes and contents of parameters and buffers, as 16 hexadecimal digits.

    The same on every device and in every memory format.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        whole.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        whole.update(content_of(tensor))
    return whole.hexdigest()[:16]


def hash_batches(data: ImageData, batches: int = 4, most: int = 64) -> str:
    """What a training sees first, as 16 hexadecimal digits.

    That is of each of the first few batches its size and its first pictures, cropped and mirrored
    and so on, with their labels, and the constants that all are normalised by.
    """
    constants = data.normalization.mean, data.normalization.std
    whole = hashlib.sha256(repr(constants).encode())
    for size, pictures, labels in data.first_batches(batches, most):
        whole.update(repr((size, tuple(pictures.shape))).encode())
        whole.update(content_of(pictures))
        whole.update(content_of(labels))
    return whole.hexdigest()[:16]


def content_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of the numbers in the order of the dimensions, however they lie in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def text_of(configuration: Configuration) -> str:
    """What of the configuration can change the figures; equal texts are equal settings."""
    settings = {k: v for k, v in configuration.flat().items() if k not in WITHOUT_EFFECT}
    return json.dumps(settings, sort_keys=True)


def files_of(configuration: Configuration) -> list[Path]:
    """The files of the chosen classes that belong neither to this package nor to a library."""
    found = set()
    for chosen in configuration.classes.values():
        with contextlib.suppress(TypeError, OSError):
            path = Path(inspect.getsourcefile(chosen) or "")
            installed = {"site-packages", "dist-packages"} & set(path.parts)
            if path.is_file() and not installed and not path.is_relative_to(PACKAGE):
                found.add(path)
    return sorted(found)


def describe_device(device: torch.device) -> dict[str, str]:
    """Tags: the `device`'s name, and what of torch's build and threads changes figures on it."""
    tags = {"device": cpu_model() or device.type, "torch.num_threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        tags["device"] = torch.cuda.get_device_name(device)
        tags["cuda"] = str(torch.version.cuda)
        tags["cudnn"] = str(torch.backends.cudnn.version())
    return tags
