"""The first loss that is NaN or infinite ends the run, and the step that made it is kept.

One such loss makes every weight NaN, and all that is trained after it is for nothing.  The weights
are not touched by it here: the run ends before the optimizer's step, and what it takes to do that
step again (`python -m research.replay`) lies in a file.

What it costs: on a GPU the loss is copied to the host behind the forward pass, and the host looks
at it when it has queued the backward pass, so the device has work meanwhile; random state and
running statistics are noted before the step.  On a CPU it looks before the backward pass, which is
then not done.  On one thread of an AMD EPYC that is 4 microseconds a step for the tutorial's CNN
and 19 for ResNet9 with its 24 statistics.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from research.checkpoints.io import DurableCheckpointIO
from research.classifier import Classifier
from research.recording.identity import describe_device

STEP_FILE = "non_finite/step.pt"  # among a run's artifacts


class NonFiniteLoss(FloatingPointError):
    """The loss of a training step is NaN or infinite; a message for the user, no bug of ours."""


class StopAtNonFiniteLoss(Callback):
    """Raises NonFiniteLoss before a loss that is NaN or infinite reaches the weights.

    `origin` is what a checkpoint tells of where it came from (`CheckpointContent.origin`).
    `folder` is where `step.pt` is written; None keeps nothing.  `on_found` is told that file, on
    the first process, and takes it to the run where `folder` is not a part of it.

    Several processes have the loss of the whole batch, all the same number (`Classifier.step`), so
    they stop at the same step without a word.  The one that met it is the first whose own share of
    the batch gives such a loss; the first of all where it takes the shares together to give it.

    `step.pt` is read with `weights_only=True` and holds, of the process that met the loss:
    `images` and `labels` as the network got them; `state_dict` of the Classifier and
    `optimizer_state`, both before the step (BatchNorm's running statistics too, which have not seen
    the batch); `random_state` at the beginning of the step; `epoch`, `batch_idx` and `global_step`
    as Lightning counts, from 0; `evaluation`, the how-manieth of the step's losses it was, from 1
    (only LBFGS has several); `loss`, of that process's share; `learning_rates`, `precision`,
    `machine`, `origin`.

    With 16-mixed the loss is seen scaled, and a gradient that overflows is the scaler's matter.
    Other callbacks' random numbers are drawn again in a replay only if those callbacks come before
    this one.  Where weights are parted among processes (FSDP, DeepSpeed) nothing is kept.
    """

    def __init__(self, origin: Mapping[str, Any]) -> None:
        self.origin = origin
        self.folder: Path | None = None
        self.on_found: Callable[[Path], None] | None = None
        self.buffers: dict[str, Tensor] = {}
        self.buffers_before: list[Tensor] = []
        self.moved_before: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.batch: Any = None
        self.batch_idx = 0
        self.random_state: dict[str, Tensor] = {}
        self.evaluation = 0
        self.is_on_cpu = self.is_on_cuda = self.asks_again = False
        self.sent = Sent()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            self.folder = None  # no process has all the weights
        # Whichever process meets the loss writes; only the first knows the run's own folder.
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kind = pl_module.device.type
        self.is_on_cpu, self.is_on_cuda = kind == "cpu", kind == "cuda"
        self.asks_again = isinstance(trainer.optimizers[0], torch.optim.LBFGS)
        self.buffers = dict(pl_module.named_buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers.values()]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch, self.batch_idx, self.evaluation = batch, batch_idx, 0
        self.random_state = {"cpu": torch.get_rng_state()}
        if self.is_on_cuda:  # known to the host: nothing waits
            self.random_state["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        if self.buffers:
            torch._foreach_copy_(self.buffers_before, list(self.buffers.values()))
        if self.asks_again:  # LBFGS moves weights between its evaluations
            weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            self.moved_before = weights, copied(trainer.optimizers[0].state_dict())

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self.evaluation += 1
        if self.is_on_cpu:  # it is there, and not yet driven out of the caches
            self.judge(loss.item(), trainer, pl_module)
        else:
            self.sent.send(loss.detach())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.is_on_cpu:
            self.judge(self.sent.arrive(), trainer, pl_module)

    def judge(self, number: float, trainer: Trainer, pl_module: LightningModule) -> None:
        if not math.isfinite(number):
            self.stop(trainer, pl_module, number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batch = self.moved_before = None  # their memory is free for validation

    def stop(self, trainer: Trainer, pl_module: LightningModule, number: float) -> None:
        """Keep the step and raise NonFiniteLoss, on every process alike."""
        told, path = "", None
        own_loss = number if trainer.world_size == 1 else loss_of_own_share(pl_module)
        finder = 0 if trainer.world_size == 1 else first_finder(own_loss, trainer)
        if trainer.global_rank == finder:
            told = describe(number, trainer)
            if self.folder is not None:
                path = self.folder / Path(STEP_FILE).name
                try:
                    content = self.content(trainer, pl_module, own_loss)
                    DurableCheckpointIO().save_checkpoint(content, path)
                except (OSError, RuntimeError) as error:  # the loss is the news all the same
                    told += f" The step could not be kept in {path}: {error}."
                    path = None
        told, path = trainer.strategy.broadcast((told, path), src=finder)
        if path is not None:
            run_id = self.origin["run_id"]
            kept = "" if run_id is None else f", which is kept in {path}"
            # The finder may be on another machine, whose files are not here.
            if self.on_found is not None and trainer.is_global_zero and path.is_file():
                self.on_found(path)
                kept = f", which is kept as {STEP_FILE} among the run's artifacts"
            run = path if run_id is None else run_id[:8]
            told += f" python -m research.replay {run} looks at that step{kept}."
        raise NonFiniteLoss(told)

    def content(
        self, trainer: Trainer, pl_module: LightningModule, own_loss: float
    ) -> dict[str, Any]:
        """What `step.pt` holds."""
        images, labels = self.batch
        optimizer = trainer.optimizers[0]
        weights, optimizer_state = self.moved_before or ({}, optimizer.state_dict())
        before = dict(zip(self.buffers, self.buffers_before, strict=True))
        state = pl_module.state_dict()
        state |= {name: tensor for name, tensor in (before | weights).items() if name in state}
        return {
            "images": images.detach().clone(),  # not the whole of what they may be a part of
            "labels": labels.detach().clone(),
            "state_dict": state,
            "optimizer_state": optimizer_state,
            "random_state": self.random_state,
            "epoch": trainer.current_epoch,
            "batch_idx": self.batch_idx,
            "global_step": trainer.global_step,
            "evaluation": self.evaluation,
            "loss": own_loss,
            "learning_rates": learning_rates(trainer),
            "precision": str(trainer.precision),
            "machine": describe_machine(trainer),
            "origin": dict(self.origin),
        }


class Sent:
    """A number on its way from the device to the host."""

    def __init__(self) -> None:
        self.number: Tensor | None = None
        self.pinned: Tensor | None = None
        self.event: torch.cuda.Event | None = None

    def send(self, number: Tensor) -> None:
        """Start it; on CUDA this only queues the copy, behind what the device has to do."""
        self.number = number
        if number.device.type != "cuda":
            return
        if self.pinned is None or self.pinned.dtype != number.dtype:
            self.pinned = torch.empty((), dtype=number.dtype, pin_memory=True)
            self.event = torch.cuda.Event()
        assert self.event is not None
        self.pinned.copy_(number, non_blocking=True)
        self.event.record(torch.cuda.current_stream(number.device))

    def arrive(self) -> float:
        """The number, once it is here."""
        assert self.number is not None
        if self.number.device.type != "cuda":
            return self.number.item()
        assert self.event is not None and self.pinned is not None
        self.event.synchronize()
        return self.pinned.item()


def describe(loss: float, trainer: Trainer) -> str:
    """Which step it was, and what may help."""
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(learning_rates(trainer)))
    place = f"epoch {trainer.current_epoch + 1}, batch {trainer.fit_loop.batch_idx + 1}"
    return (
        f"The loss became {loss} at step {trainer.global_step + 1} ({place}) with "
        f"learning rate {rates}; try a smaller optimizer.lr, or --trainer.gradient_clip_val 1."
    )


def learning_rates(trainer: Trainer) -> list[float]:
    return [float(group["lr"]) for group in trainer.optimizers[0].param_groups]


def loss_of_own_share(pl_module: LightningModule) -> float:
    """What the step's loss would have been if this process's share had been the batch."""
    assert isinstance(pl_module, Classifier) and pl_module.own_share is not None
    with torch.no_grad():
        return pl_module.loss(*pl_module.own_share).item()


def first_finder(own_loss: float, trainer: Trainer) -> int:
    """The first process whose own loss is not finite; 0 where all are."""
    rank, none = trainer.global_rank, trainer.world_size
    number = none if math.isfinite(own_loss) else rank
    found = torch.tensor(number, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return int(found) % none


def describe_machine(trainer: Trainer) -> dict[str, str]:
    """What figures can depend on beside the step: the device, threads, versions, processes."""
    device = trainer.strategy.root_device
    about = {"accelerator": device.type, "torch": str(torch.__version__)}
    return about | describe_device(device) | {"world_size": str(trainer.world_size)}


def copied(optimizer_state: Mapping[str, Any]) -> dict[str, Any]:
    """LBFGS's state as it is now, which the optimizer's own changes do not reach.

    Its lists hold tensors that it adds and drops, but never changes.
    """
    state = {
        index: {
            name: value.clone() if isinstance(value, Tensor) else list_copied(value)
            for name, value in values.items()
        }
        for index, values in optimizer_state["state"].items()
    }
    return {**optimizer_state, "state": state}


def list_copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
