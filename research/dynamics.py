"""How hard the weights are pulled and how far they move: the two numbers behind a learning rate."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from research.processes.sharding import is_sharded


class Dynamics(Callback):
    """Logs once an epoch: `gradient_norm` and `update_to_weight_ratio`, means over a few steps.

    `gradient_norm` is the Euclidean length of the gradient of all parameters together, before it
    is clipped.  `update_to_weight_ratio` is the length of a step over the length of the weights it
    starts from; about 1e-3 is a healthy rule of thumb (A. Karpathy, cs231n).  Both are taken at
    20 to 40 steps, spread evenly over the epoch, and stay on the device until its end.
    """

    SAMPLES = 20

    def __init__(self) -> None:
        self.every = 1
        self.steps = 0
        self.before: list[Tensor] | None = None  # the weights, while a measured step is under way
        self.norms: list[Tensor] = []
        self.ratios: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.num_training_batches
        steps = 1000 if batches == float("inf") else batches // trainer.accumulate_grad_batches
        self.every = max(1, int(steps) // self.SAMPLES)
        self.steps, self.before, self.norms, self.ratios = 0, None, [], []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.before is not None:  # LBFGS asks for several gradients a step: the first counts
            return
        if trainer.fit_loop._skip_backward:  # an averaging's pass for batch norm: nothing moves
            return
        self.steps += 1
        # From the first step on, so that an epoch of few steps has its figures too.
        if (self.steps - 1) % self.every != 0:
            return
        parameters = trainable(pl_module)
        gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
        if gradients or is_sharded(trainer):  # a process may have no share of a small network
            self.norms.append(length(gradients, trainer))
        self.before = [p.detach().clone() for p in parameters]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.before is None:
            return
        before, self.before = self.before, None
        after = [p.detach() for p in trainable(pl_module)]
        moved = [new - old for new, old in zip(after, before, strict=True)]
        self.ratios.append(length(moved, trainer) / length(before, trainer))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("every", "steps", "norms", "ratios")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """In the middle of an epoch; at its start all of this begins anew."""
        vars(self).update(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Those of a checkpoint come on the CPU.
        self.norms = [norm.to(pl_module.device) for norm in self.norms]
        self.ratios = [ratio.to(pl_module.device) for ratio in self.ratios]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = {"gradient_norm": self.norms, "update_to_weight_ratio": self.ratios}
        pl_module.log_dict({name: mean(values) for name, values in measured.items() if values})


def length(tensors: list[Tensor], trainer: Trainer) -> Tensor:
    """Euclidean, of all of them together; where weights are parted, of the shares of all processes.

    A collective there, and there only.
    """
    if not is_sharded(trainer):
        return get_total_norm(tensors)
    device = trainer.strategy.root_device
    own = get_total_norm(tensors) if tensors else torch.zeros(())
    squared = trainer.strategy.reduce(own.float().to(device).square(), reduce_op="sum")
    assert isinstance(squared, Tensor)
    return squared.sqrt()


def mean(values: list[Tensor]) -> Tensor:
    """Of the finite ones, if there are any: float16 overflows now and then, and skips the step."""
    together = torch.stack(values).float()
    finite = together[together.isfinite()]
    return finite.mean() if len(finite) else together.mean()


def trainable(module: LightningModule) -> list[Tensor]:
    """The parameters that a step moves."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
