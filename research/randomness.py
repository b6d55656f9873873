"""Who draws which random numbers: one seed each for weights, order, augmentation and dropout.

Two runs with the same seeds begin with the same weights and see the same pictures, in the same
order and alike cropped, and drop the same activations, whatever their losses and optimizers draw:

weights       of the network, as after `torch.manual_seed`.  A loss that begins with random numbers
              has them from a stream beside, so the weights do not depend on it.
order         of the pictures in each epoch (data/batches.py).
augmentation  of the pictures by their place in that order (data/augmentation.py).
dropout       and whatever else draws from torch's generators while a batch is trained.  They are
              seeded at each batch, by seed, process, epoch and batch.  So what a network draws in
              its forward pass depends neither on how much was drawn before (by the initialisation,
              the loss, an optimizer with noise, a validation, a picture) nor on a stop and a
              resumption.  What a loss and an optimizer draw in a step comes after that.

The masks of dropout are equal where shapes, device and memory format are; those of a CPU and of a
GPU, of one process and of several, differ.  Python's and numpy's generators are seeded once, when
training starts.  Seeding torch's at a batch takes 4 us, where a step of the tutorial's CNN takes
milliseconds.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from research.data.streams import seed_of

if TYPE_CHECKING:
    from research.configuration.schema import Configuration

MOST = 2**32 - 1  # what numpy takes


@dataclass(frozen=True)
class Seeds:
    """What each part of a run draws by."""

    weights: int
    order: int
    augmentation: int
    dropout: int


def seeds(
    seed_everything: int,
    data_seed: int | None = None,
    weights: int | None = None,
    order: int | None = None,
    augmentation: int | None = None,
    dropout: int | None = None,
) -> Seeds:
    """The seed of each part; one that is not given is that of everything.

    ValueError for one that is not in 0..2**32 - 1.

    Args:
        seed_everything: the run's
        data_seed: `data.seed`, which goes before it for order and augmentation
        weights: seed of the network's first weights; null: seed_everything
        order: seed of the order of the pictures; null: data.seed, or else seed_everything
        augmentation: seed of crops, flips and cutout; null: data.seed, or else seed_everything
        dropout: seed of what the network draws in training; null: seed_everything
    """
    given = {"weights": weights, "order": order, "augmentation": augmentation, "dropout": dropout}
    for name, seed in given.items():
        if seed is not None and not 0 <= seed <= MOST:
            raise ValueError(f"random.{name} is {seed}; it must be from 0 to {MOST}, or null.")
    of_data = seed_everything if data_seed is None else data_seed
    return Seeds(
        weights=seed_everything if weights is None else weights,
        order=of_data if order is None else order,
        augmentation=of_data if augmentation is None else augmentation,
        dropout=seed_everything if dropout is None else dropout,
    )


def seeds_of(configuration: "Configuration") -> Seeds:
    """The seeds that a configuration asks for; ValueError for one that cannot be."""
    data_seed = configuration.arguments("data").get("seed")
    given = configuration.arguments("random")
    return seeds(configuration.values.seed_everything, data_seed, **given)


def seed_generators(seed: int) -> None:
    """Let torch's (of all devices), Python's and numpy's generators begin at `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (MOST + 1))


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """All generators begin at `seed`, and are afterwards where they were before."""
    with isolate_rng():
        seed_generators(seed)
        yield


class BatchStreams(Callback):
    """Lets torch's generators begin each training batch at a place that is this batch's own.

    Comes before whatever sets or notes random states.
    """

    AHEAD = 64  # hashed at once: a single one costs ten times as much in between two steps

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.ahead: dict[tuple[int, int], int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On all processes alike: Python's and numpy's are for what they decide together.
        seed_generators(seed_of(self.seed, "training", trainer.global_step))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epoch = trainer.current_epoch
        number = self.ahead.get((epoch, batch_idx))
        if number is None:
            stream, rank = (self.seed, epoch), trainer.global_rank
            batches = range(batch_idx, batch_idx + self.AHEAD)
            self.ahead = {(epoch, batch): seed_of_batch([stream], rank, batch) for batch in batches}
            number = self.ahead[epoch, batch_idx]
        seed_torch(number, pl_module.device)


def seed_of_batch(streams: Sequence[tuple[int, int]], rank: int, batch_idx: int) -> int:
    """What torch's generators are seeded with for a batch.

    streams: seed and epoch; several where networks that draw differently are trained as one.
    """
    (seed, epoch), *others = streams
    more = [number for stream in others for number in stream]
    return seed_of(seed, "dropout", rank, epoch, batch_idx, *more)


def seed_torch(number: int, device: torch.device) -> None:
    """Let torch's generators of the CPU and of `device` begin at `number`."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(number)
