"""A training step as one CUDA graph: the host starts a step, and no longer each of its kernels.

A step of a small network is done by the GPU in less time than Python needs to queue its fifty
kernels.  So forward pass, loss, figures and backward pass are captured once for each size of batch
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) and replayed; the optimizer and
the schedule, of any kind, step as ever.  The weights are those of a training without graphs.

The host does not wait for a step's loss either.  Whether one was NaN or infinite is looked at every
so many steps, in the sum of the losses, which cannot forget one; then the training goes back to
where it last looked and does these steps again one by one, so that it ends before the step that
made it, as it does without graphs.

Capturing takes as long as some hundred steps, and is done for runs of a thousand or more
(`model.cuda_graphs` null), always (true) or never (false, the default as long as all this has run
on the CPU only).  Where the capture fails the training goes on without, and says so.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor, nn

from research.classifier import Batch, Classifier, Sums
from research.faults.nonfinite import StopAtNonFiniteLoss, copied
from research.randomness import BatchStreams
from research.speed.epoch_loop import DirectEpochLoop, Hooks, step_of

logger = logging.getLogger(__name__)

WARM_UP = 3  # eager steps on the stream of the capture, as torch asks
PAYS_FROM = 1000  # steps of a run
BEFORE_LOOKING = 32  # steps between two looks at the losses
MOST_KEPT = 2**28  # bytes of batches that wait for that
MEANWHILE = ("on_before_zero_grad", "on_before_backward", "on_after_backward")


class CapturedStep:
    """Forward and backward pass of batches of one shape, as a CUDA graph.

    Not run by being made: the first `replay` is the first step.
    """

    def __init__(self, loop: _TrainingEpochLoop, batch: Batch, batch_idx: int) -> None:
        module, self.sums = loop.trainer.lightning_module, sums_of(loop)
        self.total = self.sums.total
        self.parameters = trained(module)
        self.batch = tuple(tensor.clone() for tensor in batch)  # where each batch is copied to
        for parameter in self.parameters:
            parameter.grad = None  # the capture makes gradients of its own, written anew each time

        def work() -> Tensor:
            with loop.trainer.precision_plugin.train_step_context():
                output = module.training_step(self.batch, batch_idx)
            loss = ClosureResult.from_training_step_output(output).closure_loss
            if loss is None:
                raise RuntimeError("it returned no loss")
            self.sums.add_up()  # in the graph, not at some later step
            loss.backward()
            return loss.detach()

        self.loss, self.again = self.record(work)
        self.gradients = [parameter.grad for parameter in self.parameters]

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Where the loss will be, and what does the work once more."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss = work()
        return loss, graph.replay

    def replay(self, batch: Batch) -> Tensor:
        """The loss, and the gradients at their parameters; both are overwritten the next time."""
        for place, new in zip(self.batch, batch, strict=True):
            place.copy_(new, non_blocking=True)
        pairs = zip(self.parameters, self.gradients, strict=True)
        if any(parameter.grad is not gradient for parameter, gradient in pairs):
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        if self.sums.total is not self.total:  # that of another epoch
            assert self.total is not None and self.sums.total is not None
            self.total.copy_(self.sums.total)
            self.sums.total = self.total
        self.again()
        return self.loss


class Place:
    """Where a training stands between two steps, to go back to."""

    def __init__(self, loop: _TrainingEpochLoop) -> None:
        module, optimizer = loop.trainer.lightning_module, loop.trainer.optimizers[0]
        self.sums = sums_of(loop)
        assert self.sums.total is not None
        self.total = self.sums.total.clone()
        self.tensors = [*module.parameters(), *module.buffers()]
        self.copies = [tensor.detach().clone() for tensor in self.tensors]
        self.optimizer_state = copied(optimizer.state_dict())
        groups = self.optimizer_state["param_groups"]
        self.optimizer_state["param_groups"] = [dict(group) for group in groups]
        schedules = loop.trainer.lr_scheduler_configs
        self.schedules = [dict(config.scheduler.state_dict()) for config in schedules]
        self.random_state = torch.get_rng_state()
        self.device = module.device
        if self.device.type == "cuda":
            self.cuda_random_state = torch.cuda.get_rng_state(self.device)
        self.counts = [(count, dict(vars(count))) for count in counts_of(loop)]

    def go_back(self, loop: _TrainingEpochLoop) -> None:
        with torch.no_grad():
            for tensor, copy in zip(self.tensors, self.copies, strict=True):
                tensor.copy_(copy)
        assert self.sums.total is not None
        self.sums.total.copy_(self.total)  # a graph may have put another one there
        loop.trainer.optimizers[0].load_state_dict(self.optimizer_state)
        for config, state in zip(loop.trainer.lr_scheduler_configs, self.schedules, strict=True):
            config.scheduler.load_state_dict(state)
        torch.set_rng_state(self.random_state)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda_random_state, self.device)
        for count, before in self.counts:
            vars(count).update(before)


def counts_of(loop: _TrainingEpochLoop) -> list[Any]:
    optimizer = loop.automatic_optimization.optim_progress.optimizer
    progress = [loop.batch_progress, loop.scheduler_progress, optimizer.step, optimizer.zero_grad]
    return [count for each in progress for count in (each.total, each.current)]


class CapturedEpochLoop(DirectEpochLoop):
    """The direct loop with its steps captured."""

    def __init__(self, replaced: _TrainingEpochLoop, asked: bool | None) -> None:
        super().__init__(replaced)
        self.asked = asked
        self.warmed_up = 0
        self.wanted = False  # in this epoch
        self.told = False
        self.graphs: dict[tuple[int, ...], CapturedStep] = {}
        self.failed = False
        self.distrusts = False  # the sum of this epoch's losses, of which none was at fault
        self.parted: tuple[Hooks, Hooks, bool] | None = None  # all of an epoch, without guards
        self.before: Place | None = None
        self.unlooked: list[Batch] = []  # learnt from since then
        self.unlooked_bytes = 0
        self.handle: Any = None

    # ---- steps -----------------------------------------------------------------------------------

    def step(self, batch: Batch, hooks: Hooks) -> None:
        if self.parted is None or self.parted[0] is not hooks:
            self.parted = hooks, without_guards(hooks), bool(guards_in(hooks))
            self.begin_epoch(hooks)
        _, unguarded, guarded = self.parted
        graph = self.graph_for(batch, hooks)
        if graph is None:
            self.look()
            self.warm_up(batch, hooks)
            return
        if guarded and (len(self.unlooked) >= BEFORE_LOOKING or self.unlooked_bytes > MOST_KEPT):
            self.look()
        if guarded and not self.unlooked:
            self.before = Place(self)
        super().step(batch, unguarded)
        if guarded:
            self.unlooked.append(batch)
            self.unlooked_bytes += batch[0].nbytes

    def warm_up(self, batch: Batch, hooks: Hooks) -> None:
        """An eager step, on another stream if a capture is to follow, as torch asks."""
        self.warmed_up += 1
        if not self.wanted or self.failed or batch[0].device.type != "cuda":
            super().step(batch, hooks)
            return
        stream = torch.cuda.Stream(batch[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            super().step(batch, hooks)
        torch.cuda.current_stream().wait_stream(stream)

    def learn(self, batch: Batch, batch_idx: int, hooks: Hooks) -> dict[str, Any]:
        graph = self.graphs.get(shape_of(batch))
        if graph is None or guards_in(hooks):  # eagerly
            return super().learn(batch, batch_idx, hooks)
        counts = self.automatic_optimization.optim_progress.optimizer
        counts.step.increment_ready()
        counts.zero_grad.increment_ready()
        counts.zero_grad.increment_started()
        counts.zero_grad.increment_completed()
        loss = graph.replay(batch)
        self.captured += 1
        self.before_optimizer_step(hooks)
        step_of(self.trainer.optimizers[0])()
        counts.step.increment_completed()
        return {"loss": loss}

    def graph_for(self, batch: Batch, hooks: Hooks) -> CapturedStep | None:
        """The graph of batches like this one, captured now if there is none; None for no graph."""
        shape = shape_of(batch)
        if self.failed or self.distrusts or not self.wanted:
            return None
        if shape in self.graphs or self.warmed_up < WARM_UP:
            return self.graphs.get(shape)
        self.look()
        try:
            self.graphs[shape] = CapturedStep(self, batch, self.batch_idx + 1)
        except RuntimeError as error:
            self.failed = True
            first_line = str(error).partition("\n")[0]
            logger.warning("model.cuda_graphs: this step cannot be captured: %s", first_line)
            return None
        return self.graphs[shape]

    def begin_epoch(self, hooks: Hooks) -> None:
        """Ask again what may have changed since: a callback may do so between epochs."""
        self.wanted, self.distrusts = self.is_wanted(hooks), False
        parameters = trained(self.trainer.lightning_module)
        if any(not same(graph.parameters, parameters) for graph in self.graphs.values()):
            self.graphs = {}  # others are trained now
        if self.asked and not self.wanted and not self.told:
            self.told = True
            logger.warning("model.cuda_graphs is true, and these steps are none that it can hold.")

    def is_wanted(self, hooks: Hooks) -> bool:
        trainer = self.trainer
        long_enough = trainer.estimated_stepping_batches >= PAYS_FROM
        wanted = long_enough if self.asked is None else self.asked
        others = [hook for name in MEANWHILE for hook in without_guards(hooks)[name]]
        line_search = isinstance(trainer.optimizers[0], torch.optim.LBFGS)
        return wanted and not others and not line_search and trainer.accumulate_grad_batches == 1

    # ---- looking at the losses -------------------------------------------------------------------

    def look(self) -> None:
        """Make sure that no loss since the last look was NaN or infinite; waits for the device.

        Raises NonFiniteLoss, at the step that made one, where one was.
        """
        if not self.unlooked:
            return
        batches, self.unlooked, self.unlooked_bytes = self.unlooked, [], 0
        total = sums_of(self).total
        assert total is not None
        if math.isfinite(total[0].item()):
            return
        assert self.before is not None and self.hooks is not None
        now = [(count, dict(vars(count))) for count in counts_of(self)]
        self.before.go_back(self)
        guards = {
            name: [hook for hook in who if is_guard(hook) or is_stream(hook)]
            for name, who in self.hooks.items()
        }
        for batch in batches:
            super().step(batch, guards)
        self.distrusts = True  # the sum overflowed, or the device does not repeat itself
        for count, values in now:  # a batch may have begun beside those
            vars(count).update(values)

    def run(self, data_fetcher: _DataFetcher) -> None:
        if self.handle is None:  # whatever saves the weights asks for them here first
            module = self.trainer.lightning_module
            self.handle = module.register_state_dict_pre_hook(lambda *_: self.look())
        super().run(data_fetcher)
        self.look()

    def teardown(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.graphs = None, {}
        super().teardown()

    def advance_as_lightning(self, data_fetcher: _DataFetcher) -> None:
        self.look()
        super().advance_as_lightning(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        if self.is_more_due():
            self.look()
        super().on_advance_end(data_fetcher)


def sums_of(loop: _TrainingEpochLoop) -> Sums:
    module = loop.trainer.lightning_module
    assert isinstance(module, Classifier)
    return module.sums["train"]


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def shape_of(batch: Batch) -> tuple[int, ...]:
    return tuple(batch[0].shape)


def guards_in(hooks: Hooks) -> Sequence[Any]:
    return [hook for hook in hooks["on_after_backward"] if is_guard(hook)]


def without_guards(hooks: Hooks) -> Hooks:
    """The hooks but those that look at each loss as it comes."""
    return {name: [hook for hook in who if not is_guard(hook)] for name, who in hooks.items()}


def is_guard(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), StopAtNonFiniteLoss)


def is_stream(hook: Any) -> bool:
    """True for what decides which random numbers a batch gets: a step done again gets the same."""
    return isinstance(getattr(hook, "__self__", None), BatchStreams)


def is_possible(device: torch.device, network: nn.Module) -> bool:
    """True on a CUDA device, for a network that is not compiled (which may use graphs itself)."""
    return device.type == "cuda" and network._compiled_call_impl is None
