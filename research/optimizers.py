"""Every optimizer and schedule of torch by its own name, and what torch lacks for that to work.

A name is looked up here first, then in `torch.optim` or `torch.optim.lr_scheduler`; most classes of
torch work as they are.  Here are those that do not: Muon trains matrices only, SparseAdam wants
sparse gradients, LBFGS knows one group, and a few schedules ask for the length of the run, which
`build_scheduler` knows.  torch has no name for linear warm-up, then cosine, nor for a straight line
to 0 step by step.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT

from research import param_groups
from research.airbench import MuonSGD as MuonSGD  # found here by its name
from research.checks import require_at_least

# ---- optimizers ----------------------------------------------------------------------------------


class Muon(param_groups.SplitOptimizer):
    """torch's Muon for the hidden matrices and torch's AdamW for everything else, as one optimizer.

    Muon makes the momentum of a weight matrix orthogonal before it steps along it (Jordan et al.,
    2024, https://kellerjordan.github.io/posts/muon/).  The kernel of a convolution is seen as a
    matrix of one row per output channel.  Biases, norms, embeddings and the first and last layer
    go to AdamW, as Muon's author says; the groups of `parameter_groups` tell which those are.  Of
    parameters that come without that mark, all with two or more dimensions go to Muon.

    Each group is split in up to two, `algorithm` "Muon" and "AdamW", with a learning rate each, and
    a schedule moves both: one that sets the rate anew (CyclicLR, OneCycleLR with `max_lr`) takes a
    list of two.  `weight_decay` is shared.  Cycled momentum is Muon's only.  What a group itself
    says (`lr`, `weight_decay`, ...) holds for both its parts.
    """

    role_key = "algorithm"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        """
        Args:
            lr: of the hidden matrices, in units of the spectral norm
            weight_decay: decoupled, of hidden matrices and all others
            momentum: of the hidden matrices
            nesterov: look ahead along the momentum
            ns_coefficients: of the Newton-Schulz polynomial
            eps: floor under the norm that the momentum is divided by
            ns_steps: Newton-Schulz iterations, 1 to 99
            adjust_lr_fn: how the rate depends on a matrix's shape; with match_rms_adamw a rate
                that suits AdamW suits Muon
            adamw_lr: of all other parameters
            adamw_betas: of all other parameters
            adamw_eps: of all other parameters
        """
        # torch's words for both would be of an `lr`.
        require_at_least(0, lr=lr, momentum=momentum, eps=eps, weight_decay=weight_decay)
        require_at_least(0, adamw_lr=adamw_lr, adamw_eps=adamw_eps)
        if not 1 <= ns_steps < 100:  # torch says so at the first step only
            raise ValueError(f"ns_steps: {ns_steps} given, but it must be from 1 to 99.")
        # Made only to be asked: torch checks the rest and adds whatever else its version sets.
        muon = torch.optim.Muon(
            [torch.zeros(1, 1)],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        adamw = torch.optim.AdamW(
            [torch.zeros(1)],
            lr=adamw_lr,
            betas=adamw_betas,
            eps=adamw_eps,
            weight_decay=weight_decay,
        )
        self.settings = {"Muon": muon.defaults, "AdamW": adamw.defaults}
        # `momentum` among the defaults, and no `betas`, is how OneCycleLR and CyclicLR learn that
        # there is a momentum to cycle.
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def role_of(self, parameter: Tensor, is_hidden: bool, is_of_first_layer: bool) -> str:
        return "Muon" if is_hidden else "AdamW"

    def step_part(self, group: dict[str, Any]) -> None:
        if group["algorithm"] == "Muon":
            self._step_muon(group)
        else:
            adamw = torch.optim.AdamW(group["params"])
            adamw.param_groups, adamw.state = [group], self.state
            adamw.step()

    def _step_muon(self, group: dict[str, Any]) -> None:
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not trained:
            return
        # New views at each step: a move to another memory format would leave old ones behind.
        matrices = [as_matrix(parameter.detach(), parameter) for parameter in trained]
        muon = torch.optim.Muon(matrices)
        muon.param_groups = [group | {"params": matrices}]
        for parameter, matrix in zip(trained, matrices, strict=True):
            matrix.grad = as_matrix(parameter.grad, parameter)
            momentum = self.state[parameter].get("momentum_buffer")
            if momentum is None:
                momentum = torch.zeros_like(parameter)
            elif momentum.stride() != parameter.stride():  # saved in another memory format
                momentum = torch.empty_like(parameter).copy_(momentum)
            self.state[parameter]["momentum_buffer"] = momentum
            muon.state[matrix]["momentum_buffer"] = as_matrix(momentum, parameter)
        muon.step()


def as_matrix(tensor: Tensor, parameter: Tensor) -> Tensor:
    """(out, rest): the tensor with all dimensions after the first in one, in `parameter`'s order.

    A view where both lie in memory alike, whichever the memory format.  The order of the columns
    follows it, which does not matter to Muon: its update of a matrix with permuted columns is the
    permuted update.
    """
    columns = sorted(range(1, parameter.ndim), key=parameter.stride, reverse=True)
    return tensor.permute(0, *columns).reshape(len(tensor), -1)


class SparseAdam(torch.optim.SparseAdam):
    """torch's SparseAdam, with dense gradients handed over as sparse ones.

    An entry whose gradient is exactly 0 (behind a ReLU that was off for the whole batch) keeps its
    weight and its moments, where Adam would let the moments decay and move on.  There is no weight
    decay.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The closure's loss (None without one), after one step; `grad` stays dense."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        dense = [p for group in self.param_groups for p in group["params"]]
        dense = [p for p in dense if p.grad is not None and not p.grad.is_sparse]
        kept = [(p.data, p.grad) for p in dense]
        for parameter in dense:
            # On several threads torch (2.15) cannot add a sparse tensor to a channels_last weight.
            parameter.data = parameter.data.contiguous()
            parameter.grad = parameter.grad.to_sparse()
        super().step()
        for parameter, (weight, gradient) in zip(dense, kept, strict=True):
            if parameter.data is not weight:
                weight.copy_(parameter.data)
            parameter.data, parameter.grad = weight, gradient
        return loss


class LBFGS(torch.optim.LBFGS):
    """torch's LBFGS, for several groups and for weights in channels_last format too.

    It evaluates the batch up to `max_eval` times a step, so it needs a closure (Lightning's
    automatic optimization gives one), full precision, and no accumulation of gradients.  It knows
    no weight decay, hence groups that differ in nothing else are one; others raise ValueError.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the parameters to the one group."""
        if not self.param_groups:
            super().add_param_group(param_group)
            return
        (group,) = self.param_groups
        for key, value in param_group.items():
            if key in self.defaults and value != group[key]:
                raise ValueError(
                    f"LBFGS takes one {key} for all parameters, but groups of parameters came with "
                    f"{group[key]} and {value}; give them the same, or choose another optimizer."
                )
        group["params"].extend(param_group["params"])

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """The loss before the step."""

        def evaluate() -> Any:
            loss = closure()
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:  # torch flattens gradients by `view`
                    parameter.grad = parameter.grad.contiguous()
            return loss

        return super().step(evaluate)


# ---- schedules -----------------------------------------------------------------------------------

# Arguments that count optimizer steps; a schedule that has one is stepped after each batch.
COUNT_STEPS = ("total_steps", "step_size_up")
# Arguments that are the length of the run where they are left open.
LENGTHS = ("total_steps", "total_iters", "T_max")


def interval_of(scheduler: LRScheduler | type[LRScheduler]) -> Literal["step", "epoch"]:
    """How often a schedule is stepped: "step" if an argument of it counts steps, else "epoch".

    OneCycleLR, CyclicLR and LinearWarmupCosineAnnealingLR count steps (`COUNT_STEPS`).  All others
    of torch are read in epochs, as their documentation does: `StepLR.step_size`, `T_max`, ...
    """
    scheduler_class = scheduler if isinstance(scheduler, type) else type(scheduler)
    arguments = inspect.signature(scheduler_class).parameters
    return "step" if any(name in arguments for name in COUNT_STEPS) else "epoch"


def build_scheduler(
    scheduler_class: type[LRScheduler],
    optimizer: Optimizer,
    total_steps: float,
    max_epochs: float,
    /,  # so that `arguments` may hold a total_steps of its own
    **arguments: Any,
) -> LRScheduler:
    """The schedule, stepped by the optimizer's steps or by epochs as `interval_of` says.

    The function of LambdaLR and MultiplicativeLR is written as its import path.
    A length (`LENGTHS`) that is None, or required and not given, becomes `total_steps` or
    `max_epochs`, whichever the schedule is stepped by.  `cycle_momentum` is switched off where the
    optimizer has no momentum to cycle.  Raises ValueError for an argument that is missing or
    unknown, for a run without end where its length is needed, and for schedules made of schedules.
    """
    refuse_composed(scheduler_class)
    name = scheduler_class.__name__
    parameters = inspect.signature(scheduler_class).parameters
    interval = interval_of(scheduler_class)
    # OneCycleLR's other way to say its length; torch itself tells when half of it is missing.
    told = any(arguments.get(other) is not None for other in ("epochs", "steps_per_epoch"))
    for argument in LENGTHS:
        if argument not in parameters or told:
            continue
        value = arguments.get(argument, parameters[argument].default)
        if value is None or value is inspect.Parameter.empty:
            length = total_steps if interval == "step" else max_epochs
            if not 1 <= length < math.inf:
                raise ValueError(
                    f"lr_scheduler: {name} needs the length of the run, and this run has no end "
                    f"in {interval}s; set trainer.max_epochs, or lr_scheduler.{argument}."
                )
            arguments[argument] = int(length)
    if "cycle_momentum" in parameters and not has_momentum(optimizer):
        arguments["cycle_momentum"] = False
    try:
        inspect.signature(scheduler_class).bind(optimizer, **arguments)
    except TypeError as error:
        takes = ", ".join(a for a in parameters if a not in ("optimizer", "last_epoch"))
        raise ValueError(f"lr_scheduler: {name} {error}; it takes {takes}.") from None
    return scheduler_class(optimizer, **arguments)


def refuse_composed(scheduler_class: Callable[..., LRScheduler]) -> None:
    """Raises ValueError for a schedule made of schedules."""
    if "schedulers" in inspect.signature(scheduler_class).parameters:
        raise ValueError(
            f"lr_scheduler: {scheduler_class.__name__} is made of other schedules, which a "
            "configuration cannot hold; choose LinearWarmupCosineAnnealingLR or OneCycleLR, or "
            "write the combination as a class of its own in research/optimizers.py."
        )


def has_momentum(optimizer: Optimizer) -> bool:
    """False for a momentum of 0 too: cycling it would make another optimizer of plain SGD."""
    return "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))


class CosineAnnealingLR(lr_scheduler.CosineAnnealingLR):
    """torch's, over the whole run in epochs where `T_max` is left open."""

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int | None = None,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, known_length(self, "T_max", T_max), eta_min, last_epoch)


class PolynomialLR(lr_scheduler.PolynomialLR):
    """torch's, over the whole run in epochs where `total_iters` is left open.

    torch's own default ends at a learning rate of 0 after five epochs, however long the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int | None = None,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        length = known_length(self, "total_iters", total_iters)
        super().__init__(optimizer, length, power, last_epoch)


class OneCycleLR(lr_scheduler.OneCycleLR):
    """torch's, over the whole run in steps where `total_steps` is left open.

    Where `max_lr` is left open, each group peaks at its own learning rate: the optimizer's `lr`.
    Given, it is the peak instead, and the optimizer's `lr` has no effect.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float] | None = None,
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.85,
        max_momentum: float | list[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        max_lrs = [group["lr"] for group in optimizer.param_groups] if max_lr is None else max_lr
        try:
            super().__init__(
                optimizer,
                max_lrs,
                total_steps,
                epochs,
                steps_per_epoch,
                pct_start,
                anneal_strategy,
                cycle_momentum,
                base_momentum,
                max_momentum,
                div_factor,
                final_div_factor,
                three_phase,
                last_epoch,
            )
        except ZeroDivisionError:  # torch spreads the rise over pct_start * total_steps - 1 steps
            raise ValueError(
                f"lr_scheduler.pct_start {pct_start} of {self.total_steps} steps is a rise of one "
                "step, which OneCycleLR cannot do; choose another, or a longer run."
            ) from None


class LinearWarmupCosineAnnealingLR(LRScheduler):
    """Linear warm-up to the optimizer's learning rate, then half a cosine down to `eta_min`.

    With W warm-up steps out of T, step t = 0, 1, ..., T - 1 is taken at
        lr (t + 1) / (W + 1)                                            for t < W,
        eta_min + (lr - eta_min) (1 + cos(pi (t - W) / (T - W))) / 2    for t >= W,
    so that the first step already moves and `eta_min` is reached when the last is done (Loshchilov
    & Hutter, 2017, with the warm-up of Goyal et al., 2017).  After T steps it stays at `eta_min`.
    Without warm-up it is CosineAnnealingLR, step by step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup_steps: int | None = None,
        warmup_fraction: float = 0.05,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        """
        Args:
            total_steps: T; the whole run where left open
            warmup_steps: W; where left open, `warmup_fraction` of T
            warmup_fraction: W / T, 0 to 1; rounded to whole steps
            eta_min: learning rate at the end
        """
        self.total_steps = known_length(self, "total_steps", total_steps)
        if not 0 <= warmup_fraction <= 1:
            raise ValueError(
                f"lr_scheduler.warmup_fraction is a share of the run, 0 to 1; came "
                f"{warmup_fraction}.  A number of steps goes into lr_scheduler.warmup_steps."
            )
        if warmup_steps is None:
            warmup_steps = round(warmup_fraction * self.total_steps)
        if not 0 <= warmup_steps <= self.total_steps:
            raise ValueError(
                f"lr_scheduler.warmup_steps is {warmup_steps}, and the run has {self.total_steps} "
                "steps; warm up for none of them, some, or all."
            )
        if eta_min < 0:
            raise ValueError(f"lr_scheduler.eta_min is a learning rate, 0 or more; came {eta_min}.")
        self.warmup_steps = warmup_steps
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at step `last_epoch`, in closed form."""
        done, warmup = self.last_epoch, self.warmup_steps
        if done < warmup:
            return [lr * (done + 1) / (warmup + 1) for lr in self.base_lrs]
        if done >= self.total_steps:
            return [self.eta_min for _ in self.base_lrs]
        share = (1 + math.cos(math.pi * (done - warmup) / (self.total_steps - warmup))) / 2
        return [self.eta_min + (lr - self.eta_min) * share for lr in self.base_lrs]


class LinearDecayLR(LRScheduler):
    """A straight line from the optimizer's learning rate down to 0, step by step.

    Of T steps, step t = 0, 1, ..., T - 1 is taken at lr (1 - t / (until T)), or at 0 where that is
    less: a group whose `until` is below 1 stays as it is for the rest of the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        until: float | list[float] = 1.0,
        last_epoch: int = -1,
    ) -> None:
        """
        Args:
            total_steps: T; the whole run where left open
            until: the share of the run, above 0 to 1, after which the rate is 0; one number, or one
                for each group of the optimizer
        """
        self.total_steps = known_length(self, "total_steps", total_steps)
        groups = len(optimizer.param_groups)
        self.until = list(until) if isinstance(until, list | tuple) else [until] * groups
        if len(self.until) != groups:
            raise ValueError(
                f"lr_scheduler.until has {len(self.until)} numbers, and the optimizer has {groups} "
                "groups of parameters; give one for each, or one for all."
            )
        if not all(0 < share <= 1 for share in self.until):
            raise ValueError(
                f"lr_scheduler.until is a share of the run, above 0 to 1; came {until}."
            )
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at step `last_epoch`, in closed form."""
        ends = [share * self.total_steps for share in self.until]
        left = [max(0.0, 1 - self.last_epoch / end) for end in ends]
        return [lr * share for lr, share in zip(self.base_lrs, left, strict=True)]


def known_length(scheduler: LRScheduler, argument: str, length: int | None) -> int:
    """`length`, which only `build_scheduler` can fill in; raises ValueError if it did not."""
    if length is None or length < 1:
        raise ValueError(
            f"lr_scheduler.{argument} of {type(scheduler).__name__} is 1 or more; came {length}.  "
            "build_scheduler fills in the length of the run where it is left open."
        )
    return length
