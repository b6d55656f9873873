"""Training a network whose weights are parted among processes: Lightning's FSDP, made whole.

`--trainer.strategy fsdp` leaves each process a share of every weight, of its gradient and of the
optimizer's state (Zhao et al., 2023, https://arxiv.org/abs/2304.11277).  A run is what it is with
ddp: the same batches, steps, figures and files.  What Lightning's strategy lacks for that:

    CPU             it asks for GPUs; torch shards on CPUs too, with gloo, so that tests can
    clipping        by norm is refused, because only FSDP's root knows the norm of all shares
    precision       bf16-mixed rounds weights and running statistics as well; here autocast only
                    rounds what it rounds in one process
    weight decay    a share is flat, so the dimensions of a weight must be noted before
    going on        reads a checkpoint by plain pickle and from every process's own disk, and fails
                    where the optimizer has no state, as plain SGD, or had one process
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import lightning.pytorch.plugins.precision as lightning_precision
import lightning.pytorch.strategies as lightning_strategies
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

# What steps along a weight as a whole, and would take a flat share of it for all there is.
NEEDS_WHOLE_WEIGHTS = ("Adafactor", "LBFGS", "Muon", "MuonSGD", "SparseAdam")


def strategy_for(strategy: str | Strategy, optimizer: str) -> str | Strategy:
    """What the Trainer is given for `trainer.strategy`, whose optimizer has this class name.

    ValueError for a strategy that parts the weights in a way that nothing else here knows.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, str) and strategy not in ("auto", *StrategyRegistry):
        raise ValueError(f"trainer.strategy is {name}; choose auto, ddp or fsdp.")
    is_own = strategy == "fsdp" or isinstance(strategy, FSDPStrategy)
    if not is_own and name.lower().startswith(("deepspeed", "fsdp", "modelparallel")):
        raise ValueError(
            f"trainer.strategy is {name}, which writes checkpoints that evaluate, predict and "
            "--resume cannot read, or needs a network made for it. Choose fsdp, which parts "
            "weights, gradients and optimizer state, or ddp."
        )
    if is_own and optimizer in NEEDS_WHOLE_WEIGHTS:
        raise ValueError(
            f"trainer.strategy fsdp parts every weight among the processes, and {optimizer} needs "
            "it whole. Choose another optimizer, such as SGD or AdamW, or trainer.strategy ddp."
        )
    return FSDPStrategy() if strategy == "fsdp" else strategy


def is_sharded(trainer: Trainer) -> bool:
    """True where each process has only its share of every weight."""
    return isinstance(trainer.strategy, FSDPStrategy)


class FSDPStrategy(lightning_strategies.FSDPStrategy):
    """Lightning's, for a Classifier, on GPUs or on CPUs.  The whole network is one unit."""

    def __init__(
        self, sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP"] = "FULL_SHARD"
    ) -> None:
        """
        Args:
            sharding_strategy: SHARD_GRAD_OP keeps weights whole between forward and backward
        """
        super().__init__(sharding_strategy=sharding_strategy)

    @property
    def precision_plugin(self) -> "FSDPPrecision":
        return self._own_precision

    @precision_plugin.setter
    def precision_plugin(self, plugin: lightning_precision.Precision | None) -> None:
        self._own_precision = FSDPPrecision(getattr(plugin, "precision", "32-true"), self)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        for parameter in model.parameters():
            parameter.whole_ndim = parameter.ndim  # type: ignore[attr-defined]
        # torch (2.15) mixes up the optimizer's state of kernels in channels_last order.
        model = model.to(memory_format=torch.contiguous_format)
        # As DDP does: weights that only the first process has read are then everywhere.
        share(itertools.chain(model.parameters(), model.buffers()), self.root_device)
        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the optimizer of one process would have, on the first process; {} on the others."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        assert self.model is not None and self.lightning_module is not None
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper has one inside
        with whole_states(self.model, self.root_device, on_all=False):
            by_name = FullyShardedDataParallel.optim_state_dict(self.model, optimizer)
        return numbered(by_name, optimizer, self.lightning_module) if by_name else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Puts weights and optimizer state in their places, and returns all that there is."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True)
        assert self.model is not None and self.lightning_module is not None
        with whole_states(self.model, self.root_device):
            self.model.load_state_dict(checkpoint["state_dict"])
            if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
                return checkpoint
            for optimizer, saved in zip(
                self.optimizers, checkpoint["optimizer_states"], strict=True
            ):
                if saved["state"]:
                    by_name = named(saved, optimizer, self.lightning_module)
                    saved = FullyShardedDataParallel.optim_state_dict_to_load(
                        self.model, optimizer, by_name
                    )
                optimizer.load_state_dict(saved)
        return checkpoint

    def teardown(self) -> None:
        # Layers that sync batch norm would be taken out of what FSDP still has to gather.
        self._layer_sync = None
        super().teardown()


class SharedStatistics(Callback):
    """All processes validate with the running statistics of the first, which a checkpoint holds.

    With fsdp each has those of its own pictures; with ddp too, where validation comes between
    batches whose gradients are accumulated.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            share(pl_module.buffers(), trainer.strategy.root_device)


class FSDPPrecision(lightning_precision.FSDPPrecision):
    """Mixed precision by autocast, as in one process, and clipping by the norm of all shares."""

    def __init__(self, precision: Any, strategy: FSDPStrategy) -> None:
        super().__init__(precision)
        self.strategy = strategy

    @property
    def mixed_precision_config(self) -> Any:
        return None if self.precision in {*HALVES, "32-true"} else super().mixed_precision_config

    def forward_context(self) -> contextlib.AbstractContextManager:
        if self.precision not in HALVES:
            return super().forward_context()
        return torch.autocast(self.strategy.root_device.type, dtype=HALVES[self.precision])

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        self.strategy.model.clip_grad_norm_(clip_val)  # type: ignore[union-attr,operator]


HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@torch.no_grad()
def share(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Give every process what the first one has in these tensors, by way of the device."""
    for tensor in tensors:
        sent = tensor.detach().to(device).contiguous()
        torch.distributed.broadcast(sent, src=0)
        tensor.copy_(sent)


@contextlib.contextmanager
def whole_states(model: nn.Module, device: torch.device, on_all: bool = True) -> Iterator[None]:
    """Inside, the states of a sharded network and its optimizer are whole, on the first or all."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.api import FullOptimStateDictConfig, FullStateDictConfig

    with FullyShardedDataParallel.state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=True, rank0_only=not on_all),
        # torch (2.15) would give all states of a weight the same memory where that is the CPU's.
        FullOptimStateDictConfig(offload_to_cpu=device.type != "cpu", rank0_only=not on_all),
    ):
        yield


def names_in_groups(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """The names of the parameters in the order in which an optimizer numbers them."""
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    return [name_of[p] for group in optimizer.param_groups for p in group["params"]]


def numbered(by_name: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's state with numbers for parameters, as torch.optim has it, instead of names."""
    numbers = {name: i for i, name in enumerate(names_in_groups(optimizer, module))}
    return relabelled(by_name, numbers)


def named(saved: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The other way round; the numbers are those in the file's own groups, whoever wrote it."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    return relabelled(saved, dict(zip(numbers, names_in_groups(optimizer, module), strict=True)))


def relabelled(state: Mapping[str, Any], labels: Mapping[Any, Any]) -> dict[str, Any]:
    groups = state["param_groups"]
    return {
        "state": {labels[label]: values for label, values in state["state"].items()},
        "param_groups": [{**g, "params": [labels[p] for p in g["params"]]} for g in groups],
    }
