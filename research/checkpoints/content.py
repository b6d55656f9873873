"""What a checkpoint holds beside weights, optimizer and place: where it came from, random state.

What a batch draws (dropout) follows from seed, process and batch alone (randomness.py).  The states
are for what else may draw: each process of a run has its own, the first that of a run of one
process, each other one a stream of its own, and a checkpoint has where all of them are.
"""

import random
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from research.data import ImageData
from research.data.streams import stream
from research.tracking.logger import RecordLogger


class CheckpointContent(Callback):
    """What a checkpoint holds beside Lightning's own: `origin`, `validation`, random states.

    `validation` is the latest loss and accuracy on the validation split.  `logged` is what was
    recorded before (`tracking.run.Run.logged`); it will not come again.
    `origin` is the `configuration` (YAML), the `run_id`, and what the `pictures` were: class names,
    size, mean and standard deviation of each channel.  Order, augmentation and dropout need no
    state, they follow from the seeds.
    `random_state` is that of the first process, `other_random_states` are those of the others by
    rank, if there are any.  As many processes as had saved go on as if they had never stopped; one
    that was not there begins a stream of its own, fixed by seed, rank and step.
    """

    def __init__(self, configuration: str, data: ImageData) -> None:
        pictures = {
            "class_names": list(data.class_names),
            "image_size": data.image_size,
            "mean": list(data.normalization.mean),
            "std": list(data.normalization.std),
        }
        self.origin: dict[str, Any] = {
            "configuration": configuration,
            "run_id": None,
            "pictures": pictures,
        }
        self.random_states: list[dict[str, Any]] = []  # by rank, of the checkpoint to go on from

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["origin"] = self.origin
        checkpoint["saved_at"] = time.time()
        checkpoint["validation"] = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        for logger in trainer.loggers:
            if isinstance(logger, RecordLogger):
                checkpoint["logged"] = logger.logged()
        first, *others = all_random_states(trainer, pl_module.device)
        checkpoint["random_state"] = first
        if others:
            checkpoint["other_random_states"] = others

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        first = checkpoint.get("random_state")
        others = checkpoint.get("other_random_states", [])
        self.random_states = [] if first is None else [first, *others]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: what Lightning does until here may draw, and must draw the same everywhere.
        rank, saved = trainer.global_rank, self.random_states
        if saved:
            set_random_state(saved[rank if rank < len(saved) else 0], pl_module.device)
        if rank > 0 and rank >= len(saved):
            # So far as the first process.  Python's and numpy's generators stay in step with its,
            # for what all processes decide together.
            own = stream(torch.initial_seed(), "rank", rank, trainer.global_step)
            torch.manual_seed(own.initial_seed())
        self.random_states = []


def all_random_states(trainer: Trainer, device: torch.device) -> list[dict[str, Any]]:
    """Where the generators of each process are, by rank; all processes ask at the same time."""
    own = random_state(device)
    if trainer.world_size == 1:
        return [own]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, own)
    return states


def random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], *rest),  # weights_only knows no arrays
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """An older checkpoint's, which has torch's generators only, sets those."""
    torch.set_rng_state(state["cpu"].cpu())
    if "python" in state:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
