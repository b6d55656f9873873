"""What is measured and shown while a run trains: the pace of an epoch, and progress to see."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from torch import Tensor
from tqdm import tqdm

from research.classifier import Classifier


class Pace(Callback):
    """Logs once an epoch: `learning_rate` it began with, `epoch_seconds`, `images_per_second`.

    Seconds are those spent training; validation in between does not count.  `history` holds all
    that was logged, a mapping for each finished epoch, `epoch` from 1.  Checkpoints carry it, as
    `pace`, so that a run that goes on has all of its epochs.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.epoch: int | None = None
        self.learning_rate = 0.0
        self.validated = False
        self.ended = False
        self.images = 0
        self.processes = 1
        self.seconds = 0.0
        self.total_images = 0
        self.total_seconds = 0.0
        self.paused_at = 0.0
        self.figures: dict[str, float] = {}  # of this epoch, from before it was interrupted
        self.earlier: dict[str, Tensor] = {}  # figures that Lightning keeps of an epoch before

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close_epoch(trainer)
        self.epoch, self.validated, self.ended = trainer.current_epoch + 1, False, False
        self.learning_rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.processes = trainer.world_size
        self.earlier = dict(trainer.callback_metrics)
        self.images, self.seconds = 0, -time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch[1]) * self.processes

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            # Reading the sum waits for the device: what it still has to do is training.
            wait_for(pl_module)
            self.paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated = True
            self.seconds -= time.perf_counter() - self.paused_at

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wait_for(pl_module)
        self.seconds += time.perf_counter()
        self.ended = True
        self.total_images += self.images
        self.total_seconds += self.seconds
        pl_module.log_dict(
            {
                "learning_rate": self.learning_rate,
                "epoch_seconds": self.seconds,
                "images_per_second": self.images / self.seconds,
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close_epoch(trainer)

    def close_epoch(self, trainer: Trainer) -> None:
        # Lightning ends an epoch for the module after the callbacks: only now are there figures.
        if self.epoch is not None and "train/loss" in trainer.callback_metrics:
            self.history.append(self.row(trainer))
        self.epoch, self.figures = None, {}

    def row(self, trainer: Trainer) -> dict[str, float]:
        """What has been logged in this epoch until now."""
        assert self.epoch is not None
        # What Lightning keeps of an earlier epoch, or of its validation, is not this one's.
        logged = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if (self.validated or not name.startswith("val/"))
            and value is not self.earlier.get(name)
        }
        return {"epoch": self.epoch, **self.figures, **logged}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state: dict[str, Any] = {"history": list(self.history), "epoch": None}
        if self.epoch is not None and self.ended:
            state["history"].append(self.row(trainer))
        elif self.epoch is not None:
            row = self.row(trainer)
            figures = {name: value for name, value in row.items() if name.startswith("val/")}
            seconds = self.seconds + time.perf_counter()
            state |= {"epoch": self.epoch, "figures": figures, "seconds": seconds}
        for name in ("learning_rate", "validated", "images", "total_images", "total_seconds"):
            state[name] = getattr(self, name)
        checkpoint["pace"] = state

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        vars(self).update(checkpoint.get("pace", {}))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.processes = trainer.world_size
        if self.epoch is not None:  # goes on in the middle of an epoch
            self.seconds -= time.perf_counter()

    @property
    def mean_images_per_second(self) -> float | None:
        """Over the whole of the training, None before the first epoch ended."""
        return self.total_images / self.total_seconds if self.total_seconds else None


def wait_for(pl_module: LightningModule) -> None:
    """Returns when the device has done the training steps it was given."""
    assert isinstance(pl_module, Classifier)
    if pl_module.sums["train"].total is not None:
        pl_module.sums["train"].total[0].item()


class Progress(ProgressBar):
    """A line for each finished epoch and, on a terminal, a bar for the one that runs.

    The bar shows loss and accuracy so far and images per second; reading them from the device
    a few times a second is all it costs.  Comes after its `pace` in the list of callbacks.
    """

    refresh_seconds = 0.2

    def __init__(self, pace: Pace, out: TextIO | None = None) -> None:
        super().__init__()
        self.pace = pace
        self.out = out if out is not None else sys.stderr
        self.enabled = True
        self.bar: tqdm | None = None
        self.next_refresh = 0.0
        self.printed = 0

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.printed = len(self.pace.history)  # those of a run that goes on were printed before
        if self.pace.epoch is not None:
            self.open_bar(f"epoch {self.pace.epoch}", self.total_train_batches)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.print_epochs(trainer)
        self.open_bar(f"epoch {trainer.current_epoch + 1}", self.total_train_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.advance(pl_module, "train", len(batch[1]) * trainer.world_size, batch_idx + 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clear_bar()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close_bar()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close_bar()
        self.print_epochs(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.close_bar()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._current_eval_dataloader_idx = 0
        self.open_bar("test", self.total_test_batches_current_dataloader)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.advance(pl_module, "test", len(batch[1]) * trainer.world_size, batch_idx + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close_bar()

    def open_bar(self, description: str, batches: float) -> None:
        if self.enabled and self.out.isatty():
            self.bar = tqdm(
                desc=description,
                total=int(batches) if batches != float("inf") else None,
                file=self.out,
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}]{postfix}",
            )
            self.images, self.opened_at = 0, time.perf_counter()

    def advance(self, pl_module: LightningModule, split: str, images: int, batches: int) -> None:
        if self.bar is None:
            return
        self.images += images
        now = time.perf_counter()
        if now < self.next_refresh:
            return
        self.next_refresh = now + self.refresh_seconds
        assert isinstance(pl_module, Classifier)
        total = pl_module.sums[split].total
        if total is not None:
            loss, correct, count = total.tolist()
            speed = self.images / (time.perf_counter() - self.opened_at)
            self.bar.set_postfix_str(
                f"loss {loss / count:.4f}, accuracy {correct / count:.1%}, {speed:,.0f} images/s",
                refresh=False,
            )
        self.bar.update(batches - self.bar.n)

    def clear_bar(self) -> None:
        if self.bar is not None:
            self.bar.clear()

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def print_epochs(self, trainer: Trainer) -> None:
        """Print the epochs that ended since the last call."""
        if not self.enabled:
            return
        of = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        for epoch in self.pace.history[self.printed :]:
            parts = [f"epoch {epoch['epoch']:{len(str(of))}}{'/' if of else ''}{of}"]
            for split in ("train", "val"):
                if f"{split}/loss" in epoch:
                    loss, accuracy = epoch[f"{split}/loss"], epoch[f"{split}/accuracy"]
                    parts.append(f"{split} loss {loss:.4f} accuracy {accuracy:6.2%}")
            parts.append(f"{epoch['images_per_second']:,.0f} images/s")
            parts.append(f"{epoch['epoch_seconds']:.1f} s")
            print("   ".join(parts), file=self.out, flush=True)
        self.printed = len(self.pace.history)


class Keeper(ModelCheckpoint):
    """Lightning's ModelCheckpoint whose file names count epochs from 1, as everything here does.

    `on_best` is told the file of the best checkpoint, as soon as there is another: a run that is
    killed has one too, and where several are kept their names do not say it.
    """

    on_best: Callable[[Path], None] | None = None
    every_step: int | None = None  # saves in the middle of an epoch too, each so many steps
    told = ""
    from_first: Callable[[Any], Any] = staticmethod(lambda seen: seen)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.from_first = trainer.strategy.broadcast

    def format_checkpoint_name(self, metrics: dict[str, Tensor], *args: Any, **kwargs: Any) -> str:
        return super().format_checkpoint_name(
            metrics | {"epoch": metrics["epoch"] + 1}, *args, **kwargs
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Knows again the files that are in its folder, wherever that was when they were saved.

        On the first process's machine: were they others on another, the processes would no longer
        decide alike what to save, and wait for each other for ever.
        """
        folder = Path(self.dirpath or "")
        kept = {str(folder / Path(p).name): s for p, s in state_dict["best_k_models"].items()}
        best = str(folder / Path(state_dict["best_model_path"]).name)
        there = self.from_first({path for path in (*kept, best) if Path(path).is_file()})
        kept = {path: score for path, score in kept.items() if path in there}
        if kept:
            ranked = sorted(kept, key=lambda path: kept[path].item(), reverse=self.mode == "max")
            best = best if best in kept else ranked[0]
            self.best_model_score, self.best_k_models = kept[best], kept
            self.kth_best_model_path, self.kth_value = ranked[-1], kept[ranked[-1]]
        if best in there:
            self.best_model_path = best

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Before the next batch, not after the last one as Lightning does: a validation that was due
        # is then behind it, and a run that goes on neither leaves it out nor repeats it.
        at_boundary = batch_idx > 0 and batch_idx % trainer.accumulate_grad_batches == 0
        if self.every_step and at_boundary and trainer.global_step % self.every_step == 0:
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath, f"{self.filename}.ckpt"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.tell()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self.tell()

    def tell(self) -> None:
        if self.on_best is not None and self.best_model_path not in ("", self.told):
            self.told = self.best_model_path
            self.on_best(Path(self.told))


def checkpoints(
    validated: bool,
    monitor: Literal["val/accuracy", "val/loss"] = "val/accuracy",
    save_top_k: int = 1,
    save_last: bool = True,
    every_n_train_steps: int | None = None,
) -> list[Keeper]:
    """What keeps the best checkpoints, then the last; their folder is the caller's `dirpath`.

    `best.ckpt` and `last.ckpt` are overwritten in place; more than one of the best are
    `epoch=N.ckpt` each.  Nothing is kept twice, and never chosen by the test split.  Where nothing
    is validated there is no best one.

    Args:
        monitor: what the best checkpoint is best in
        save_top_k: how many of the best are kept; 0 for none, -1 for every epoch's
        save_last: keep the last one, from which a run goes on
        every_n_train_steps: save the last one also after so many steps, for epochs of hours
    """
    if save_top_k < -1:
        raise ValueError(
            f"checkpoint.save_top_k is {save_top_k}; it must be -1 (keep every epoch's), 0 or more."
        )
    if every_n_train_steps is not None and (every_n_train_steps < 1 or not save_last):
        raise ValueError(
            f"checkpoint.every_n_train_steps is {every_n_train_steps}; it must be 1 or more, and "
            "checkpoint.save_last true."
        )
    keepers: list[Keeper] = []
    if validated and save_top_k != 0:
        best = Keeper(
            filename="best" if save_top_k == 1 else "{epoch}",
            monitor=monitor,
            mode="max" if monitor == "val/accuracy" else "min",
            save_top_k=save_top_k,
            enable_version_counter=False,
        )
        keepers.append(best)
    if save_last:
        last = Keeper(filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
        last.every_step = every_n_train_steps
        keepers.append(last)
    return keepers
