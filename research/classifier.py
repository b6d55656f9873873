"""The LightningModule: a network, a loss, an optimizer, a schedule, and how well they do.

Where several processes share a batch, the loss is that of the whole batch, on each of them: the
scores, a few numbers for each picture, are brought together.  So a loss that is no mean over
pictures (a sum, one with weights for classes) is what it is in one process, and whoever goes by
its value, as a line search does, decides alike everywhere.

Legend: B pictures, C classes, H x W pixels or cells.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from research.data.batches import Batches
from research.losses import ClassificationLoss
from research.optimizers import build_scheduler, interval_of
from research.param_groups import parameter_groups
from research.processes import shares
from research.scaling import scale_optimizer, scaled_rates

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Trains `network` to sort pictures into classes; logs loss and accuracy once an epoch.

    Pictures (B, 3, H, W) float, labels (B,) int64.  `optimizer` and `lr_scheduler` are a class
    with its arguments (`functools.partial`): the first takes parameter groups, the second the
    optimizer.  Whatever the loss, the decision is the arg max over classes of the scores.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: ClassificationLoss,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        lr_scheduler: functools.partial[LRScheduler] | None = None,
        channels_last: bool = True,
        compile: bool = False,
        cuda_graphs: bool | None = False,
        decay_biases_and_norms: bool = True,
    ) -> None:
        """
        Args:
            channels_last: store pictures and kernels pixel by pixel; faster convolutions
            compile: torch.compile the network; pays on long runs
            cuda_graphs: start a step as one CUDA graph; null: in runs of 1,000 steps or more
            decay_biases_and_norms: false keeps weight decay off biases and normalisation layers
        """
        super().__init__()
        if loss.per_cell and not hasattr(network, "cell_scores"):
            raise ValueError(
                f"model.loss {type(loss).__name__} scores the cells of a feature map, and "
                f"{type(network).__name__} has no cell_scores; choose CNN, ResNet9 or another loss."
            )
        self.network = network.to(memory_format=torch.channels_last) if channels_last else network
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.decay_biases_and_norms = decay_biases_and_norms
        self.lr_factor = 1.0  # of every learning rate: more than 1 where it is scaled (scaling.py)
        self.cuda_graphs = cuda_graphs
        if compile:
            self.network.compile()  # in place: the names in a checkpoint stay as they are
        self.is_validated = True  # False where no picture is kept for validation
        of_means = loss.reduction != "sum"
        self.sums = {split: Sums(of_means) for split in ("train", "val", "test")}
        self.new_loss: dict[str, Tensor] = {}  # what ReduceLROnPlateau has not seen yet
        self.own_share: Batch | None = None  # scores and labels; of several processes only

    def forward(self, images: Tensor) -> Tensor:
        """The scores (B, C) whose arg max is the decision."""
        return votes(self.scores(images))

    def scores(self, images: Tensor) -> Tensor:
        """What the loss sees: (B, C), or (B, C, H, W) for a loss on each cell."""
        if self.loss.per_cell:
            return self.network.cell_scores(images)  # type: ignore[operator]
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.step(batch, "train", batch_idx)[0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.step(batch, "val", batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The scores (B, C), which a callback gets as the outputs of the batch."""
        return self.step(batch, "test", batch_idx)[1]

    def step(self, batch: Batch, split: str, batch_idx: int) -> tuple[Tensor, Tensor]:
        """The loss of the whole batch, and the own scores (B, C) without a graph.

        Every process counts the whole batch, not only its share.
        """
        images, labels = batch
        scores = self.scores(images)
        voted = decisive = votes(scores.detach())
        if self.trainer.world_size > 1:
            self.own_share = scores.detach(), labels
            scores, labels = self.whole(scores, labels, split, batch_idx)
            decisive = votes(scores.detach())
        loss = self.loss(scores, labels)
        self.sums[split].add(loss.detach(), decisive, labels)
        return loss, voted

    def whole(
        self, scores: Tensor, labels: Tensor, split: str, batch_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Scores and labels of all processes; the graph of the own scores is corrected for them."""
        sizes = self.share_sizes(split, batch_idx)
        if sizes is None:
            sizes = shares.sizes_of_all(len(labels), labels.device)
        if scores.requires_grad:
            # Each process has the gradient by its own share, so the sum over processes is that by
            # the batch; DDP and FSDP make a mean of it.
            scores.register_hook(lambda gradient: gradient * len(sizes))
        return shares.join(scores, labels, sizes)

    def share_sizes(self, split: str, batch_idx: int) -> list[int] | None:
        """How many pictures of the batch each process has, None if the loader does not say."""
        loaders = {
            "train": "train_dataloader",
            "val": "val_dataloaders",
            "test": "test_dataloaders",
        }
        loader = getattr(self.trainer, loaders[split])
        return loader.share_sizes(batch_idx) if isinstance(loader, Batches) else None

    def on_train_epoch_end(self) -> None:
        self.log_sums("train")
        loss = self.new_loss.pop("val" if self.is_validated else "train", None)
        for scheduler in self.plateau_schedulers():
            if loss is not None:  # None: this epoch was not validated
                scheduler.step(loss)

    def on_validation_epoch_end(self) -> None:
        self.log_sums("val")

    def on_test_epoch_end(self) -> None:
        self.log_sums("test")

    def log_sums(self, split: str) -> None:
        total = self.sums[split].total
        assert total is not None, "an epoch has at least one batch"
        # All go by what the first process has counted, to the last bit, whatever their devices are.
        total = total if self.trainer.is_global_zero else torch.zeros_like(total)
        loss, correct, count = self.trainer.strategy.reduce(total, reduce_op="sum")
        self.sums[split].reset()
        self.new_loss[split] = loss / count
        if not self.trainer.barebones:  # which warns of every log
            # Accuracy first: MLflow's Compare opens with what a run logged first, and the losses
            # of different kinds have no axis in common.
            self.log_dict({f"{split}/accuracy": correct / count, f"{split}/loss": loss / count})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # In the middle of an epoch: what has been counted so far, of all processes' pictures.
        totals = {split: sums.total for split, sums in self.sums.items() if sums.total is not None}
        checkpoint["sums"] = {split: total.clone() for split, total in totals.items()}
        checkpoint["new_loss"] = dict(self.new_loss)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does so after the weights are loaded, which rounds them
        for split, total in checkpoint.get("sums", {}).items():
            self.sums[split].total = total.to(self.device)
        self.new_loss = {k: v.to(self.device) for k, v in checkpoint.get("new_loss", {}).items()}

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer()
        scheduler = self.build_lr_scheduler(
            optimizer, self.trainer.estimated_stepping_batches, self.trainer.max_epochs or 1
        )
        if scheduler is None:
            return optimizer
        # The monitor is for Lightning, which insists on one for ReduceLROnPlateau.
        settings = {"scheduler": scheduler, "monitor": "train/loss"}
        return {
            "optimizer": optimizer,
            "lr_scheduler": settings | {"interval": interval_of(scheduler)},
        }

    def plateau_schedulers(self) -> list[ReduceLROnPlateau]:
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return [s for s in schedulers if isinstance(s, ReduceLROnPlateau)]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # Lightning would step ReduceLROnPlateau after the epoch's checkpoint is written, and a
        # resumed run would lack that step; on_train_epoch_end has done it.
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def build_optimizer(self) -> Optimizer:
        """A new optimizer over the network's parameters."""
        groups = parameter_groups(self.network, decay_biases_and_norms=self.decay_biases_and_norms)
        return scale_optimizer(self.make_optimizer(groups), self.lr_factor)

    def build_lr_scheduler(
        self, optimizer: Optimizer, total_steps: float, max_epochs: int
    ) -> LRScheduler | None:
        """A new schedule for a run of this length, None where none was chosen."""
        if self.make_lr_scheduler is None:
            return None
        scheduler_class = cast(type[LRScheduler], self.make_lr_scheduler.func)
        arguments = dict(self.make_lr_scheduler.keywords)
        if self.lr_factor != 1:
            arguments |= scaled_rates(scheduler_class, arguments, self.lr_factor)
        return build_scheduler(scheduler_class, optimizer, total_steps, max_epochs, **arguments)


def votes(scores: Tensor) -> Tensor:
    """(B, C): scores of cells (B, C, H, W) as the mean vote of the cells, others unchanged."""
    return scores.mean(dim=(2, 3)) if scores.ndim == 4 else scores


def exact_type(device: torch.device) -> torch.dtype:
    """Double, which counts exactly whatever the precision of the run; MPS has none of it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Sums:
    """Summed loss, correct decisions and pictures since the last reset, kept on the device.

    A torchmetrics metric costs as much as a whole step of a small network, and `self.log` each
    step half of one; here a step is noted, some dozens are judged and added up at once, and the
    host reads the sums once an epoch.  In double they are exact, in whatever portions they are
    added.

    of_means: the losses are means over their batches, else sums
    """

    AT_ONCE = 32

    def __init__(self, of_means: bool) -> None:
        self.of_means = of_means
        self._total: Tensor | None = None
        self.noted: list[tuple[Tensor, Tensor, Tensor]] = []  # of one size, and not added yet

    @property
    def total(self) -> Tensor | None:
        """Float64 (3,), None before the first batch; of later batches the same tensor."""
        self.add_up()
        return self._total

    @total.setter
    def total(self, total: Tensor | None) -> None:
        self.noted = []
        self._total = total

    def add(self, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        """A batch's loss, scores (B, C) and labels (B,), none of them to be changed later."""
        if self.noted and len(self.noted[-1][2]) != len(labels):
            self.add_up()
        self.noted.append((loss, scores, labels))
        if len(self.noted) >= self.AT_ONCE:
            self.add_up()

    def add_up(self) -> None:
        if not self.noted:
            return
        losses, scores, labels = zip(*self.noted, strict=True)
        self.noted = []
        wanted = torch.cat(labels)
        correct = torch.cat(scores).argmax(dim=1) == wanted
        summed = torch.stack(losses) * (len(labels[0]) if self.of_means else 1)
        exact = exact_type(wanted.device)
        if self._total is None:
            self._total = torch.zeros(3, dtype=exact, device=wanted.device)
        self._total[0] += summed.to(exact).sum()
        self._total[1] += correct.sum()
        self._total[2] += len(wanted)

    def reset(self) -> None:
        self.total = None
