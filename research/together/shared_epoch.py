"""An epoch of many trainings, trained and validated at once: what a member waits for.

Each member's Trainer has a SharedEpochLoop, which asks for the whole of an epoch where Lightning's
would train batch after batch; `train_epochs` answers all who wait (training.py).  In an epoch each
member has its own loss, optimizer, schedule, clipping and callbacks; the host calls those of all
for each batch, and looks at what the device has counted once, at the end of the epoch.

Legend: N members, B pictures, C classes.
"""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor

from research.callbacks import Keeper, Pace
from research.classifier import Batch, Classifier, exact_type, votes
from research.data.batches import Batches
from research.faults.nonfinite import NonFiniteLoss, StopAtNonFiniteLoss, learning_rates
from research.faults.stopping import Stopper
from research.randomness import BatchStreams, seed_of_batch, seed_torch
from research.speed.epoch_loop import HOOKS, DirectEpochLoop, may_be_called_directly, overrides
from research.together.halves import Company, train_in_parts
from research.together.stacking import Stack, joined, may_be_stacked, refusal, stacked
from research.together.turns import Turn

logger = logging.getLogger(__name__)

# Their part in a step is done here: signals and losses are looked at for all members at once.
DONE_FOR_ALL = (Stopper, StopAtNonFiniteLoss, Keeper, BatchStreams)

# ---- a member's end ------------------------------------------------------------------------------


class SharedEpochLoop(DirectEpochLoop):
    """An epoch that somebody else trains, for many; all before and after it is Lightning's."""

    def __init__(self, replaced: Any, turn: Turn, company: str, loss: str) -> None:
        """
        Args:
            company: equal for those that can be trained together
            loss: equal for those whose losses are
        """
        super().__init__(replaced)
        self.turn = turn
        self.company = company
        self.loss = loss
        self.is_alone = False
        self.val_loop = ValidatedLoop(
            self.trainer,
            TrainerFn.FITTING,
            RunningStage.VALIDATING,
            verbose=False,
            inference_mode=False,
        )
        self.val_loop._data_source = replaced.val_loop._data_source

    def reset(self) -> None:
        super().reset()
        self.is_alone = False

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """All batches that are left of the epoch, in one go."""
        is_over = self.restarting and self._should_check_val_fx(data_fetcher)
        if self.is_alone or is_over:
            super().advance(data_fetcher)
            return
        self.val_loop.restarting = False  # as Lightning's `advance`, which trains first
        if self._should_check_val_epoch():  # as Lightning does when the first epoch is validated
            self.trainer.validating = True
            self.val_loop.setup_data()
            self.trainer.training = True
        member = Member(self)
        self.turn.ask(member)
        member.pace.seconds -= time.perf_counter() - member.waits_since
        if member.stopped_by is not None:
            self.stop(member.stopped_by)
        elif member.is_trained:
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        else:
            self.is_alone = True
            super().advance(data_fetcher)

    def count(self, batches: int, steps: int) -> None:
        """Keep Lightning's counts of what was trained; the last batch counts with `advance`."""
        is_last = self.batch_progress.current.ready + batches == self.trainer.num_training_batches
        self.batch_progress.increment_by(batches, is_last)
        optimizer = self.automatic_optimization.optim_progress.optimizer
        optimizer.step.increment_by(steps)
        optimizer.zero_grad.increment_by(steps)
        if any(config.interval == "step" for config in self.trainer.lr_scheduler_configs):
            self.scheduler_progress.increment_by(steps)
        self._batches_that_stepped += steps - is_last

    def stop(self, number: int) -> None:
        """End as by a signal that came before the next batch."""
        stopper = next(each for each in callbacks_of(self.trainer) if isinstance(each, Stopper))
        stopper.heard = number
        self.batch_progress.increment_ready()
        module = self.trainer.lightning_module
        stopper.on_train_batch_start(self.trainer, module, None, self.batch_idx)


class ValidatedLoop(_EvaluationLoop):
    """A validation of which the figures are there already, `validated` batches of them."""

    validated: int | None = None

    def reset(self) -> None:
        super().reset()
        if self.validated is not None:
            self.batch_progress.increment_by(self.validated, True)
            self._data_fetcher, self.validated = Nothing(), None


class Nothing(_DataFetcher):
    def __next__(self) -> Any:
        raise StopIteration


# ---- what is done for all ------------------------------------------------------------------------


class Member:
    """A training that waits for an epoch, and what it finds when its turn comes again.

    `is_trained`: the epoch is trained, and validated if it is to be; else it trains it by itself.
    `stopped_by`: the signal that ends it.  `error`: what it fails with.
    """

    def __init__(self, loop: SharedEpochLoop) -> None:
        self.loop = loop
        self.trainer: Trainer = loop.trainer
        assert isinstance(loop.trainer.lightning_module, Classifier)
        self.classifier: Classifier = loop.trainer.lightning_module
        self.optimizer = loop.trainer.optimizers[0]
        self.schedules = [
            config.scheduler
            for config in loop.trainer.lr_scheduler_configs
            if config.interval == "step"
        ]
        self.pace = next(each for each in callbacks_of(self.trainer) if isinstance(each, Pace))
        self.start: int = loop.batch_progress.current.ready
        self.waits_since = time.perf_counter()
        self.is_trained = False
        self.stopped_by: int | None = None
        self.error: Exception | None = None
        self.ends_by_nan = any(isinstance(c, StopAtNonFiniteLoss) for c in self.callbacks)

    @property
    def callbacks(self) -> list[Callback]:
        return callbacks_of(self.trainer)

    @property
    def order(self) -> tuple[int, ...]:
        """Equal for members whose batches are the same pictures, in the same order, alike altered.

        Where the first is equal, so are the pictures of validation.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return *data.seeds, self.trainer.current_epoch

    @property
    def dropout(self) -> tuple[int, int]:
        """Equal for members that, each by itself, would draw the same random numbers."""
        streams = next(each for each in self.callbacks if isinstance(each, BatchStreams))
        return streams.seed, self.trainer.current_epoch

    @property
    def watching(self) -> list[Callback]:
        """Those that may look at each batch."""
        return [c for c in self.callbacks if not isinstance(c, DONE_FOR_ALL)]

    def hooks(self) -> dict[str, list[Callable[..., Any]]]:
        """What is called at each batch, by name."""
        return {
            name: [getattr(c, name) for c in self.watching if overrides(c, Callback, name)]
            for name in HOOKS
        }

    def refusal(self) -> str | None:
        """Why its steps cannot be done by others, None if they can."""
        for callback in self.callbacks:
            steps = any(overrides(callback, Callback, name) for name in HOOKS)
            if steps and not may_be_called_directly(callback):
                return f"{type(callback).__name__} looks at every batch"
        if not isinstance(self.trainer.train_dataloader, Batches):
            return f"{type(self.trainer.train_dataloader).__name__} is none of research.data's"
        return "there are several processes" if self.trainer.world_size > 1 else None

    def fail(self, batch_idx: int) -> None:
        """End it: the loss of this batch was no number."""
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(learning_rates(self.trainer)))
        self.error = NonFiniteLoss(
            f"The loss became NaN or infinite in epoch {self.trainer.current_epoch + 1}, batch "
            f"{batch_idx + 1}, with learning rate {rates}; try a smaller optimizer.lr, or "
            "--trainer.gradient_clip_val 1. Trained by itself, the run keeps that step."
        )


def batches_of(loader: Any) -> Batches:
    assert isinstance(loader, Batches)
    return loader


def callbacks_of(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def train_epochs(members: Sequence[Member], stopper: Stopper, seen: dict[str, Company]) -> None:
    """Train and validate an epoch for all, those together that are in company and at one place.

    seen: what epochs before have shown of a company; what this one shows is added.
    """
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        # A run that goes on may be at another epoch, where other things are due.
        due = member.loop._should_check_val_epoch(), member.trainer.accumulate_grad_batches
        groups.setdefault((member.loop.company, member.start, due), []).append(member)
    for (company, *_), group in groups.items():
        try:
            if len(group) > 1 and stopper.heard is None:
                if company not in seen:
                    seen[company] = Company(why_not_stacked(group))
                    if seen[company].refusal is not None:
                        told = "Trained one after another, not together: %s."
                        logger.warning(told, seen[company].refusal)
                if seen[company].refusal is None:
                    train_in_parts(group, seen[company], lambda part: train_epoch(part, stopper))
            for member in group:
                if not member.is_trained:
                    member.stopped_by = stopper.heard
        except Exception as error:
            for member in group:
                if not member.is_trained:
                    member.error = again(error)


def again(error: Exception) -> Exception:
    """The same for one of those who have met it, to be raised with notes of its own."""
    with contextlib.suppress(Exception):
        other = copy.copy(error)
        other.__cause__ = error
        return other
    return error


def why_not_stacked(group: Sequence[Member]) -> str | None:
    """Why these cannot be trained as one, None if they can."""
    reasons = [reason for reason in (member.refusal() for member in group) if reason is not None]
    if reasons:
        return reasons[0]
    first = group[0]
    data: Any = first.trainer.datamodule  # type: ignore[attr-defined]
    shape = (2, data.in_channels, data.image_size, data.image_size)
    with first.trainer.precision_plugin.train_step_context():
        pictures = torch.zeros(shape, device=first.classifier.device)
        networks = [member.classifier.network for member in group]
        return refusal(networks, pictures, first.classifier.loss.per_cell)


def train_epoch(group: Sequence[Member], stopper: Stopper) -> None:
    """Train and validate an epoch, or what is left of it, by one stack."""
    began = time.perf_counter()
    networks = [member.classifier.network for member in group]
    draws_alike = len({member.dropout for member in group}) == 1
    with stacked(networks, group[0].classifier.loss.per_cell, draws_alike) as stack:
        learnt = learn(stack, group, stopper)
        ended = time.perf_counter()
        is_whole = group[0].start + learnt.batches == group[0].trainer.num_training_batches
        validated = [member for member in group if member.loop._should_check_val_epoch()]
        if is_whole and validated:
            validate(stack, group)
    for member, wrong_at in zip(group, learnt.wrong_at, strict=True):
        member.pace.seconds -= began - member.waits_since
        member.waits_since = ended
        member.loop.count(learnt.batches, learnt.steps)
        member.is_trained = is_whole
        if wrong_at >= 0 and member.ends_by_nan:
            member.fail(wrong_at)
        elif not is_whole:
            member.stopped_by = stopper.heard


@dataclass(frozen=True)
class Learnt:
    """What came of the batches of an epoch: how many, in how many steps, and whose went wrong."""

    batches: int
    steps: int
    wrong_at: list[int]  # for each member the first batch whose loss was no number, -1 for none


def learn(stack: Stack, group: Sequence[Member], stopper: Stopper) -> Learnt:
    """Train what is left of the epoch, or until a signal comes; the host waits at its end only."""
    first, device = group[0], group[0].classifier.device
    pieces, last = first.trainer.accumulate_grad_batches, int(first.trainer.num_training_batches)
    hooks = [member.hooks() for member in group]
    streams = sorted({member.dropout for member in group})
    feeds = {
        member.order: iter(batches_of(member.trainer.train_dataloader)) for member in group[::-1]
    }
    sums, losses_of = Totals(group, "train"), Losses(group)
    wrong_at = torch.full((len(group),), -1, device=device)
    steps, batch_idx = 0, first.start
    stack.train()
    while batch_idx < last and (stopper.heard is None or batch_idx % pieces != 0):
        new = {order: next(feed) for order, feed in feeds.items()}
        batches = [new[member.order] for member in group]
        images, labels = (joined(parts) for parts in zip(*batches, strict=True))
        seed_torch(seed_of_batch(streams, 0, batch_idx), device)
        call("on_train_batch_start", hooks, group, batches, batch_idx)
        with first.trainer.precision_plugin.train_step_context():
            scores = stack(images)
            losses = losses_of(scores, labels)
        (losses.sum() / pieces).backward()
        sums.add(losses.detach(), scores.detach(), labels)
        is_wrong = ~losses.detach().isfinite() & (wrong_at < 0)
        wrong_at = torch.where(is_wrong, batch_idx, wrong_at)
        if (batch_idx + 1) % pieces == 0 or batch_idx + 1 == last:
            stack.share_gradients()
            for member, called in zip(group, hooks, strict=True):
                step(member, called["on_before_optimizer_step"])
            stack.zero_grad()
            steps += 1
        call("on_train_batch_end", hooks, group, batches, batch_idx)
        batch_idx += 1
    sums.give(group, "train")
    return Learnt(batch_idx - first.start, steps, wrong_at.tolist())


def call(
    name: str,
    hooks: Sequence[Mapping[str, Sequence[Callable[..., Any]]]],
    group: Sequence[Member],
    batches: Sequence[Batch],
    batch_idx: int,
) -> None:
    """What watches the batches of each member."""
    # What `training_step` has put out is nothing that anybody here looks at.
    more: tuple[Any, ...] = ({},) if name == "on_train_batch_end" else ()
    for called, member, batch in zip(hooks, group, batches, strict=True):
        for hook in called[name]:
            hook(member.trainer, member.classifier, *more, batch, batch_idx)


def step(member: Member, hooks: Sequence[Callable[..., Any]]) -> None:
    """One step of a member's own optimizer and schedule, its gradients clipped before."""
    trainer, classifier = member.trainer, member.classifier
    for hook in hooks:
        hook(trainer, classifier, member.optimizer)
    if trainer.gradient_clip_val:
        classifier.clip_gradients(
            member.optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        )
    member.optimizer.step()
    for schedule in member.schedules:
        classifier.lr_scheduler_step(schedule, None)


@torch.no_grad()
def validate(stack: Stack, group: Sequence[Member]) -> None:
    """Give each member the figures of its validation split."""
    first = group[0]
    feeds = {member.order[0]: iter(batches_of(member.trainer.val_dataloaders)) for member in group}
    sums, losses_of = Totals(group, "val"), Losses(group)
    stack.train(False)
    count = int(sum(first.trainer.num_val_batches))
    for _ in range(count):
        new = {seed: next(feed) for seed, feed in feeds.items()}
        batches = [new[member.order[0]] for member in group]
        images, labels = (joined(parts) for parts in zip(*batches, strict=True))
        with first.trainer.precision_plugin.val_step_context():
            scores = stack(images)
            losses = losses_of(scores, labels)
        sums.add(losses, scores, labels)
    sums.give(group, "val")
    for member in group:
        assert isinstance(member.loop.val_loop, ValidatedLoop)
        member.loop.val_loop.validated = count


class Losses:
    """Each member's own loss of its own scores; equal ones by one call, where torch can."""

    def __init__(self, group: Sequence[Member]) -> None:
        device = group[0].classifier.device
        self.losses = [member.classifier.loss for member in group]
        equal: dict[str, list[int]] = {}
        for row, member in enumerate(group):
            equal.setdefault(member.loop.loss, []).append(row)
        self.rows = [(rows, torch.tensor(rows, device=device)) for rows in equal.values()]
        self.by_stack: dict[int, bool] = {}  # by the first row of those that are equal

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        """(N,), from scores (N, B, C) or (N, B, C, H, W) and labels (B,) of all or (N, B)."""
        found: list[Tensor | None] = [None] * len(self.losses)
        for rows, index in self.rows:
            loss, is_of_all = self.losses[rows[0]], labels.ndim == 1
            if len(rows) > 1 and rows[0] not in self.by_stack:
                self.by_stack[rows[0]] = may_be_stacked(loss, scores.detach()[:2])
            if not self.by_stack.get(rows[0], False):
                for row in rows:
                    found[row] = self.losses[row](scores[row], labels if is_of_all else labels[row])
                continue
            whole = len(rows) == len(found)
            own_scores = scores if whole else scores.index_select(0, index)
            own_labels = labels if whole or is_of_all else labels.index_select(0, index)
            in_dims = (0, None) if is_of_all else (0, 0)
            values = torch.vmap(loss, in_dims=in_dims)(own_scores, own_labels)
            for row, value in zip(rows, values.unbind(), strict=True):
                found[row] = value
        return torch.stack([value for value in found if value is not None])


class Totals:
    """What `classifier.Sums` counts, of all members at once: (N, 3) on the device."""

    def __init__(self, group: Sequence[Member], split: str) -> None:
        device = group[0].classifier.device
        before = [member.classifier.sums[split].total for member in group]
        nothing = torch.zeros(3, dtype=exact_type(device), device=device)
        self.total = torch.stack([nothing if total is None else total for total in before])
        is_mean = [member.classifier.loss.reduction == "mean" for member in group]
        self.is_mean = torch.tensor(is_mean, device=device)

    def add(self, losses: Tensor, scores: Tensor, labels: Tensor) -> None:
        """losses (N,); scores (N, B, C) or (N, B, C, H, W); labels (B,) of all or (N, B)."""
        count = labels.shape[-1]
        self.total[:, 0] += torch.where(self.is_mean, losses * count, losses)
        decided = votes(scores.flatten(0, 1)).argmax(dim=1).unflatten(0, scores.shape[:2])
        self.total[:, 1] += (decided == labels).sum(dim=1)
        self.total[:, 2] += count

    def give(self, group: Sequence[Member], split: str) -> None:
        for member, total in zip(group, self.total, strict=True):
            member.classifier.sums[split].total = total.clone()
