"""Lightning's loop over the batches of an epoch, without the wrappers it puts around every hook.

Around each call of each hook Lightning opens a profiler's context, builds names, and notes which
hook runs, so that `self.log` can ask: more than a millisecond a step, a tenth of the tutorial's
CNN's.  Here the same hooks of the same callbacks are called in the same order with the same
arguments, and the same counts are kept, at a tenth of that; what is trained is bit for bit the
same, and so are checkpoints and the place a run goes on from.  Between two steps nothing is asked
that has one answer until the next validation.

That holds for what this project and Lightning bring.  Whatever may need more (a callback of yours
that looks at every batch, `self.log` in a step, hooks of the module, a profiler, several processes,
a scaler of gradients) is run by Lightning's own code, step by step; so are the first and the last
batch of every epoch, where the rest of Lightning's bookkeeping is done.

Lightning's loop classes are private: this is written against 2.6, and tested against its own loop.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from research.data.batches import Batches

Hooks = Mapping[str, Sequence[Callable[..., Any]]]
Context = Callable[[], AbstractContextManager[Any]]

HOOKS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)
OF_MODULE = (
    *HOOKS,
    *("optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping"),
)
OF_STEP = ("training_step", *OF_MODULE)
OF_DATA = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
PRECISIONS = (Precision, MixedPrecision, HalfPrecision, DoublePrecision)
RECORDED = Optimizer.profile_hook_step(lambda self: None).__code__  # what torch puts around steps


class DirectEpochLoop(_TrainingEpochLoop):
    """Calls the hooks of an epoch's steps directly where that is known to be the same."""

    def __init__(self, replaced: _TrainingEpochLoop) -> None:
        super().__init__(replaced.trainer, replaced.min_steps, replaced.max_steps)
        self.captured = 0  # steps that were CUDA graphs (capture.py)
        self.hooks: Hooks | None = None  # None: by Lightning's code
        self.context: Context = replaced.trainer.precision_plugin.train_step_context

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """One step by Lightning's code, or those up to the next that it has to look at."""
        done, batches = self.batch_progress.current.ready, self.trainer.num_training_batches
        if self.hooks is None or self.restarting or done == 0 or done + 1 >= batches:
            self.advance_as_lightning(data_fetcher)
            self.hooks = hooks_of(self.trainer, self) if done + 2 < batches else None
            self.context = context_of(self.trainer.precision_plugin)
            return
        self.val_loop.restarting = False  # as Lightning's `advance`, which trains first
        self.step_on_next(data_fetcher, self.hooks)
        # Lightning asks a dozen objects between two steps whether anything is due, by `done`,
        # `on_advance_end` and `on_iteration_done`.
        for _ in range(self.uneventful_steps()):
            if self.is_to_end():
                break
            self.count_end()
            self.step_on_next(data_fetcher, self.hooks)

    def step_on_next(self, data_fetcher: _DataFetcher, hooks: Hooks) -> None:
        batch = next_batch(data_fetcher)
        self.step(self.trainer.precision_plugin.convert_input(batch), hooks)

    def advance_as_lightning(self, data_fetcher: _DataFetcher) -> None:
        """By the code that this class stands in for."""
        super().advance(data_fetcher)

    def step(self, batch: Any, hooks: Hooks) -> None:
        """`_TrainingEpochLoop.advance` for one batch that is neither the first nor the last."""
        trainer, progress = self.trainer, self.batch_progress
        module, batch_idx = trainer.lightning_module, self.batch_idx + 1
        progress.increment_ready()
        for hook in hooks["on_train_batch_start"]:
            hook(trainer, module, batch, batch_idx)
        progress.increment_started()
        outputs = self.learn(batch, batch_idx, hooks)
        progress.increment_processed()
        if self.is_stepping():
            self.step_schedules(batch_idx)
        for hook in hooks["on_train_batch_end"]:
            hook(trainer, module, outputs, batch, batch_idx)
        progress.increment_completed()

    def learn(self, batch: Any, batch_idx: int, hooks: Hooks) -> dict[str, Any]:
        """Forward, backward and, where gradients are not only added up, the optimizer's step."""
        trainer, module = self.trainer, self.trainer.lightning_module
        optimizer, steps = trainer.optimizers[0], self.is_stepping()
        pieces, counts = trainer.accumulate_grad_batches, self.automatic_optimization.optim_progress
        outputs: dict[str, Any] = {}

        def closure() -> Tensor | None:
            with self.context():
                output = module.training_step(batch, batch_idx)
            loss: Tensor | None
            if isinstance(output, Tensor) and pieces == 1:
                loss = output
                outputs["loss"] = loss.detach()
            else:
                result = ClosureResult.from_training_step_output(output, pieces)
                loss = result.closure_loss
                outputs.update({} if loss is None else result.asdict())
            if batch_idx % pieces == 0:
                counts.optimizer.zero_grad.increment_ready()
                for hook in hooks["on_before_zero_grad"]:
                    hook(trainer, module, optimizer)
                counts.optimizer.zero_grad.increment_started()
                self.zero_grad(optimizer)
                counts.optimizer.zero_grad.increment_completed()
            if loss is not None:
                for hook in hooks["on_before_backward"]:
                    hook(trainer, module, loss)
                loss.backward()
                for hook in hooks["on_after_backward"]:
                    hook(trainer, module)
            if steps:
                self.before_optimizer_step(hooks)
            return outputs.get("loss")

        if steps:
            counts.optimizer.step.increment_ready()
            step_of(optimizer)(closure)
            counts.optimizer.step.increment_completed()
        else:
            closure()
        return outputs

    def zero_grad(self, optimizer: Optimizer) -> None:
        if type(optimizer).zero_grad is not Optimizer.zero_grad:
            optimizer.zero_grad()
            return
        # What Optimizer.zero_grad does by default, without a profiler's record around it: 0.15 ms
        # a step, as much as making half a batch of 64.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def before_optimizer_step(self, hooks: Hooks) -> None:
        """The gradients are there: show them to who asked, and clip them."""
        trainer, module = self.trainer, self.trainer.lightning_module
        for hook in hooks["on_before_optimizer_step"]:
            hook(trainer, module, trainer.optimizers[0])
        if trainer.gradient_clip_val:
            module.clip_gradients(
                trainer.optimizers[0], trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )

    def step_schedules(self, batch_idx: int) -> None:
        """Those that step with the batches."""
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "step" and (batch_idx + 1) % config.frequency == 0:
                self.scheduler_progress.increment_ready()
                self.trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
                self.scheduler_progress.increment_completed()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        if self.hooks is None or self.is_more_due():
            super().on_advance_end(data_fetcher)
        else:
            self.count_end()

    def count_end(self) -> None:
        if self.is_stepping():
            self._batches_that_stepped += 1

    def is_stepping(self) -> bool:
        """False where the gradients of this batch are only added to those before."""
        return self.trainer.accumulate_grad_batches == 1 or not self._should_accumulate()

    def is_more_due(self) -> bool:
        """True where a validation may be, or somebody has asked the training to end."""
        trainer: Any = self.trainer
        if self.is_to_end() or trainer._val_check_time_interval:
            return True
        every, is_last = trainer.val_check_batch, self.batch_progress.is_last_batch
        return is_last or every is None or self.batches_counted() % every == 0

    def is_to_end(self) -> bool:
        trainer: Any = self.trainer
        return bool(trainer.should_stop or trainer.received_sigterm)

    def batches_counted(self) -> int:
        """What `val_check_batch` divides: those of this epoch, or of the whole training."""
        per_epoch = self.trainer.check_val_every_n_epoch is not None
        return 1 + (self.batch_idx if per_epoch else self.total_batch_idx)

    def uneventful_steps(self) -> int:
        """How many more batches before Lightning's own code has to look what comes after one.

        Asked once for all of them: a callback that moves `max_steps` or `val_check_batch` in the
        middle is heard after those.
        """
        trainer: Any = self.trainer
        if self.is_more_due():
            return 0
        every = trainer.val_check_batch
        until_validation = every - self.batches_counted() % every
        until_last = trainer.num_training_batches - 1 - self.batch_progress.current.ready
        most = min(until_validation, until_last)
        if trainer.max_steps != -1:
            most = min(most, trainer.max_steps - self.global_step)  # a batch makes one at most
        return max(0, int(most))


def context_of(plugin: Precision) -> Context:
    """What makes the context of a training step; autocast is made once and entered anew."""
    if type(plugin) is not MixedPrecision:
        return plugin.train_step_context
    autocast = plugin.autocast_context_manager()
    return lambda: autocast


def hooks_of(trainer: Any, loop: _TrainingEpochLoop) -> dict[str, list[Callable[..., Any]]] | None:
    """The hooks that are called at each batch, by name; None if Lightning's own code has to."""
    module = trainer.lightning_module
    is_plain = (
        type(trainer.strategy) is SingleDeviceStrategy
        and type(trainer.precision_plugin) in PRECISIONS
        and getattr(trainer.precision_plugin, "scaler", None) is None
        and isinstance(trainer.profiler, PassThroughProfiler)
        and isinstance(trainer.train_dataloader, Batches)
        and is_of_one_loader(trainer.fit_loop._data_fetcher)
        and module.automatic_optimization
        and not loop.automatic_optimization._skip_backward
        and not any(each.meta.fx in OF_STEP for each in loop._results.values())  # by self.log
        and not any(overrides(module, LightningModule, name) for name in OF_MODULE)
        and not any(overrides(module, DataHooks, name) for name in OF_DATA)
        and not any(overrides(trainer.datamodule, DataHooks, name) for name in OF_DATA)
        and not any(
            config.reduce_on_plateau and config.interval == "step"
            for config in trainer.lr_scheduler_configs
        )
    )
    if not is_plain:
        return None
    watching = {
        name: [
            each
            for each in trainer.callbacks
            if overrides(each, Callback, name) and not is_idle(each, name)
        ]
        for name in HOOKS
    }
    if not all(may_be_called_directly(each) for who in watching.values() for each in who):
        return None
    return {name: [getattr(each, name) for each in who] for name, who in watching.items()}


def overrides(instance: Any, base: type, name: str) -> bool:
    """True if calling `name` on the instance does something else than on its base class."""
    found = getattr(instance, name, None)
    return getattr(found, "__func__", found) is not getattr(base, name) and found is not None


def is_idle(callback: Callback, name: str) -> bool:
    """True for a ModelCheckpoint, at the end of a batch, that saves at no batch's end."""
    return (
        isinstance(callback, ModelCheckpoint)
        and name == "on_train_batch_end"
        and not overrides(callback, ModelCheckpoint, name)
        and callback._every_n_train_steps < 1
        and callback._train_time_interval is None
    )


def step_of(optimizer: Optimizer) -> Callable[..., Any]:
    """`optimizer.step` without a profiler's record around it, where that is all there is.

    The record takes 0.12 ms, half as much as the step of SGD itself.
    """
    step, own = type(optimizer).step, vars(optimizer).get("step")
    hooks = (
        *(optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
        *(_global_optimizer_pre_hooks, _global_optimizer_post_hooks),
    )
    if (
        any(hooks)
        or getattr(step, "__code__", None) is not RECORDED
        or not (own is None or hasattr(own, "_wrapped_by_lr_sched"))
        or type(optimizer)._optimizer_step_code is not Optimizer._optimizer_step_code
    ):
        return optimizer.step
    optimizer._opt_called = True  # type: ignore[attr-defined]  # for a schedule, which asks
    return partial(step.__wrapped__, optimizer)  # type: ignore[attr-defined]


def is_of_one_loader(data_fetcher: Any) -> bool:
    """True where `next_batch` does what the fetcher does."""
    if type(data_fetcher) is not _PrefetchDataFetcher or data_fetcher.batches:
        return False
    loaders: Any = data_fetcher.iterator
    return data_fetcher.length is not None and len(loaders._iterator.iterators) == 1


def next_batch(data_fetcher: Any) -> Any:
    """`next(data_fetcher)` without all that it does for several loaders and for a profiler."""
    loaders = data_fetcher.iterator._iterator
    batch = next(loaders.iterators[0])
    loaders._idx += 1
    data_fetcher.fetched += 1
    data_fetcher.done = data_fetcher.fetched >= data_fetcher.length
    return batch


def may_be_called_directly(callback: Callback) -> bool:
    """True for those of this project and of Lightning, and for whoever says so by `direct = True`.

    They log nothing by `pl_module.log` in a step.
    """
    if isinstance(callback, LambdaCallback):  # of which nobody knows what it does
        return False
    package = type(callback).__module__.partition(".")[0]
    return bool(getattr(callback, "direct", package in ("research", "lightning")))
