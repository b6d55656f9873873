"""A trained network as one program that needs none of this code: bytes in, probabilities out.

What is exported is everything between a picture and an answer: the normalisation, the network, the
votes of its cells where the loss asked for them, and what its scores mean as probabilities.
`torch.export` writes that down as a graph of plain tensor operations (https://docs.pytorch.org/docs/
stable/export.html), which torch reads back without the classes that made it.

Letters: B pictures, C classes, H x W pixels.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from research.classifier import votes
from research.data.normalization import Normalization, normalize
from research.losses import ClassificationLoss

Module = TypeVar("Module", bound=nn.Module)

PROGRAM, CLASSES, EXAMPLES = "program.pt2", "classes.json", "examples.npy"


class Deployable(nn.Module):
    """From bytes (B, H, W, 3) to probabilities (B, C), float32: all that an answer takes.

    Made of copies, in float32, on the CPU, in evaluation mode; a compiled network is a plain one
    again. The network and the loss stay as they are, wherever they are. H = W = `image_size`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        loss: ClassificationLoss,
        normalization: Normalization,
        image_size: int,
    ) -> None:
        super().__init__()
        self.network = copy_to_cpu(network)
        self.loss = copy_to_cpu(loss)
        scale, shift = normalization.factors(image_size)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        images = normalize(pixels, self.scale, self.shift).permute(0, 3, 1, 2)
        score = self.network.cell_scores if self.loss.per_cell else self.network
        return self.loss.probabilities(votes(score(images)))  # type: ignore[operator]


def copy_to_cpu(module: Module) -> Module:
    """A copy of the module in float32 on the CPU; nothing is allocated where the module lies."""
    # A deep copy takes what its memo holds for copied. Kernels become contiguous: torch.export
    # cannot tell that one in channels_last fills its storage, and warns.
    memo: dict[int, Tensor] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        copied = tensor.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        memo[id(tensor)] = (
            nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied
        )
    return copy.deepcopy(module, memo)


def export_program(
    network: nn.Module,
    loss: ClassificationLoss,
    normalization: Normalization,
    image_size: int,
    path: Path,
) -> None:
    """Write `Deployable` of these to `path` (.pt2), for any number of pictures at a time.

    `torch.export.load(path).module()` is the function. Of a network trained in half precision it
    is the float32 one. The random state, and what was given, stay as they were. ValueError for a
    network that torch.export cannot write down.
    """
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            deployable = Deployable(network, loss, normalization, image_size)
            pixels = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
            program = torch.export.export(
                deployable,
                (pixels,),
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                strict=False,
            )
        except Exception as error:  # torch documents no common class of its refusals
            raise ValueError(
                f"model.network {type(network).__name__} cannot be exported. torch.export takes a "
                "forward whose steps depend on the pictures' shape only: choose between tensors "
                f"with torch.where instead of if. It says: {first_line(error)}."
            ) from error
        torch.export.save(program, path)


def write_model(
    folder: Path,
    network: nn.Module,
    loss: ClassificationLoss,
    normalization: Normalization,
    class_names: Sequence[str],
    examples: np.ndarray,
    epoch: int | None = None,
) -> None:
    """Write what a served model is made of into `folder`: the program, its classes, examples.

    Args:
        class_names: of the C classes, in the order of the labels.
        examples: a few pictures, uint8 (B, H, W, 3), of the size that the network takes.
        epoch: after which the weights were kept, from 1.

    ValueError as `export_program`.
    """
    assert examples.dtype == np.uint8 and examples.ndim == 4 and examples.shape[3] == 3
    image_size = examples.shape[1]
    folder.mkdir(parents=True, exist_ok=True)
    export_program(network, loss, normalization, image_size, folder / PROGRAM)
    about = {
        "class_names": list(class_names),
        "image_size": image_size,
        "epoch": epoch,
        "mean": normalization.mean,
        "std": normalization.std,
        "note": "mean and std of pixels in 0..1; the program applies them by itself",
    }
    (folder / CLASSES).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
    np.save(folder / EXAMPLES, examples)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings, log lines and, where it fails, half a graph on standard error."""
    logger = logging.getLogger("torch")
    children = [
        logging.getLogger(name) for name in logger.manager.loggerDict if name.startswith("torch.")
    ]
    levels = [(each, each.level) for each in [logger, *children]]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for each, _ in levels:
                each.setLevel(logging.CRITICAL)
            yield
        finally:
            for each, level in levels:
                each.setLevel(level)
