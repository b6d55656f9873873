"""What a checkpoint holds beside weights, optimizer and place: where it came from, random state."""

import random
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from research.data import ImageData


class CheckpointContent(Callback):
    """What a checkpoint holds beside Lightning's own: `origin`, `validation`, `random_state`.

    `validation` is the latest loss and accuracy on the validation split.
    `origin` is the `configuration` (YAML), the `run_id`, and what the `pictures` were: class names,
    size, mean and standard deviation of each channel.  Order and augmentation need no state, they
    follow from the seed; dropout draws from torch's own generators.
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
        self.random_state: dict[str, Any] | None = None

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
        name, keys, *rest = np.random.get_state()
        checkpoint["random_state"] = {
            "cpu": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": (name, [int(key) for key in keys], *rest),  # weights_only knows no arrays
        }
        if pl_module.device.type == "cuda":
            checkpoint["random_state"]["cuda"] = torch.cuda.get_rng_state(pl_module.device)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.random_state = checkpoint.get("random_state")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not when it was loaded: what Lightning does until here may draw.
        if self.random_state is not None:
            torch.set_rng_state(self.random_state["cpu"].cpu())
            if "python" in self.random_state:
                random.setstate(self.random_state["python"])
                np.random.set_state(self.random_state["numpy"])
            if pl_module.device.type == "cuda" and "cuda" in self.random_state:
                torch.cuda.set_rng_state(self.random_state["cuda"].cpu(), pl_module.device)
        self.random_state = None
