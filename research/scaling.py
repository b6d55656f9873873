"""The learning rate with the number of processes: never by itself, by one flag, and recorded.

`data.batch_size` counts the pictures of all processes together, so more processes change nothing
that is computed, and no rate has to follow.  Who lets the batch grow with the processes may want
the rate to grow too: `--scale_lr linear` or `--scale_lr sqrt`.

linear  times the number of processes: k small steps along nearly the same gradient are one step k
        times as long (Goyal et al., 2017, https://arxiv.org/abs/1706.02677, with warm-up)
sqrt    times its square root: the noise of a step stays as large, for the mean over k times the
        batch has 1/k of the variance (Krizhevsky, 2014, https://arxiv.org/abs/1404.5997; Hoffer et
        al., 2017, https://arxiv.org/abs/1705.08741)

All rates of the optimizer and all that the schedule names are multiplied, so that the schedule's
shape stays: at each step the rate is the factor times what it would be without the flag.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

if TYPE_CHECKING:
    from research.classifier import Classifier

Rule = Literal["linear", "sqrt"]


@dataclass(frozen=True)
class Scaling:
    """How the learning rates of a run follow the number of `processes` that it began with.

    `rule` None is not at all.
    """

    rule: Rule | None
    processes: int

    @property
    def factor(self) -> float:
        """What every learning rate is multiplied by."""
        return {None: 1.0, "linear": float(self.processes), "sqrt": math.sqrt(self.processes)}[
            self.rule
        ]

    def as_plain(self) -> dict[str, Any]:
        """What a checkpoint's `origin` holds of it, as `scale_lr`."""
        return asdict(self)

    def described(self, classifier: "Classifier", asked: Rule | None, processes: int) -> str | None:
        """One line for the terminal: the rates, times what, make which; None if none is scaled.

        asked, processes: of this start; those of a run that goes on may have been others.
        """
        if self.rule is None:
            if asked is None:
                return None
            return (
                f"--scale_lr {asked} has no effect: the learning rates come with the checkpoint, "
                "whose run began without it"
            )
        count = number_of(self.processes)
        groups = classifier.build_optimizer().param_groups
        rates = list(dict.fromkeys(float(group["lr"]) for group in groups))
        told = (
            f"learning rate {in_words([rate / self.factor for rate in rates])} x "
            f"{count if self.rule == 'linear' else f'sqrt({count})'} = {in_words(rates)} "
            f"(--scale_lr {self.rule})"
        )
        make = classifier.make_lr_scheduler
        named = {} if make is None else scaled_rates(make.func, make.keywords, self.factor)
        for name, rate in named.items():
            if rate != 0:
                told += f", lr_scheduler.{name} = {in_words(rate)}"
        if (self.rule, self.processes) != (asked, processes):
            told += f"; the run began so, and keeps these rates with {number_of(processes)}"
        return told


def scaling_of(asked: Rule | None, processes: int, checkpoint: str | Path | None) -> Scaling:
    """The scaling of a run that begins now, or of the one that `checkpoint` goes on with.

    A checkpoint brings the rates of its optimizer and schedule along, and the batch is the same
    whatever the number of processes: it goes on as it began.
    """
    # A process on another machine may not see the file.  It need not: whatever rates it begins with
    # are replaced by the checkpoint's, which the first process hands on, and that one speaks.
    if checkpoint is None or not Path(checkpoint).is_file():
        return Scaling(asked, processes)
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    begun = content.get("origin", {}).get("scale_lr")
    return Scaling(None, processes) if begun is None else Scaling(**begun)


def number_of(processes: int) -> str:
    return f"{processes} process" + ("es" if processes != 1 else "")


def in_words(rate: Any) -> str:
    return ", ".join(f"{float(each):.4g}" for each in (rate if is_several(rate) else [rate]))


# ---- the optimizer and the schedule --------------------------------------------------------------


def scale_optimizer(optimizer: Optimizer, factor: float) -> Optimizer:
    """The same optimizer, the learning rate of each of its groups times `factor`."""
    for group in optimizer.param_groups if factor != 1 else ():
        if "lr" not in group:
            raise ValueError(
                f"scale_lr: {type(optimizer).__name__} has no lr in its groups of parameters, so "
                "there is no learning rate to scale; leave the flag out."
            )
        group["lr"] = group["lr"] * factor  # not in place: groups may share a tensor
    return optimizer


def scaled_rates(
    scheduler: Callable[..., LRScheduler], arguments: Mapping[str, Any], factor: float
) -> dict[str, Any]:
    """Those of the schedule's arguments that are learning rates, given or by default, scaled.

    Rates go by their name: `eta_min`, and all that end with `_lr` (max_lr, base_lr, min_lr,
    swa_lr).  So does `eps` of ReduceLROnPlateau, the smallest change of a rate that it makes.
    What is relative to the optimizer's rate (gamma, start_factor, div_factor) follows by itself.
    """
    rates = {}
    is_plateau = inspect.isclass(scheduler) and issubclass(scheduler, ReduceLROnPlateau)
    for name, parameter in inspect.signature(scheduler).parameters.items():
        value = arguments.get(name, parameter.default)
        is_rate = name == "eta_min" or name.endswith("_lr") or (name == "eps" and is_plateau)
        if is_rate and value is not None and value is not inspect.Parameter.empty:
            is_list = is_several(value)
            rates[name] = [each * factor for each in value] if is_list else value * factor
    return rates


def is_several(rate: Any) -> bool:
    return isinstance(rate, Iterable) and not isinstance(rate, torch.Tensor)
