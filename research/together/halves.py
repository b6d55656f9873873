"""A group of trainings that the memory has no room for, trained in halves.

    train_in_parts(group, company, train)

`train(part)` trains an epoch for as many as it is given (shared_epoch.py).  Where memory runs out
in it, all are brought back to where they stood, and half as many are trained at a time, until they
fit; whoever does not fit with one other is left to train by itself, where it may fail by itself.
How many fit is remembered, so that it is tried once: a number that has trained an epoch needs no
more memory in the next, and where it runs out then all the same, `train` fails.

What a training stands at is kept on the host, and only until its number has fitted once.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor

from research.faults.memory import Shortage, free_memory, shortage_in, size

if TYPE_CHECKING:
    from research.together.shared_epoch import Member

logger = logging.getLogger(__name__)


@dataclass
class Company:
    """What was seen of trainings that may be together.

    `refusal` is why they are trained one after another, None if they need not be.  `fitted` of them
    at once have found room in the memory; more than `most` have not, None where all did.
    """

    refusal: str | None
    fitted: int = 0
    most: int | None = None


def train_in_parts(
    group: Sequence["Member"], company: Company, train: Callable[[Sequence["Member"]], None]
) -> None:
    """Train an epoch of the group, as many at once as there is room for; 1 trains by itself."""
    left = list(group)
    while len(left) > 1 and company.most != 1:
        part = left[: company.most]
        if len(part) == 1:
            return
        before = [Standing(member) for member in part] if len(part) > company.fitted else []
        shortage = shortage_of(train, part, is_fatal=not before)
        if shortage is None:
            company.fitted = max(company.fitted, len(part))
            left = left[len(part) :]
            continue
        free_memory()
        for standing in before:
            standing.restore()
        company.most = (len(part) + 1) // 2
        logger.warning(told(shortage, len(part), company.most))


def shortage_of(
    train: Callable[[Sequence["Member"]], None], part: Sequence["Member"], is_fatal: bool
) -> Shortage | None:
    """What ran out, None if nothing did; not the error, which holds what filled the memory."""
    try:
        train(part)
    except (MemoryError, RuntimeError) as error:
        found = shortage_in(error)
        if found is None or is_fatal:
            raise
        return found
    return None


def told(found: Shortage, tried: int, most: int) -> str:
    more = "" if found.wanted is None else f" ({size(found.wanted)} more were asked for)"
    how = "one after another" if most == 1 else f"{most} at once"
    typed = "no --together" if most == 1 else f"--together {most}"
    return (
        f"The memory of {found.place} is full with {tried} trained at once{more}: they begin the "
        f"epoch again, {how}. With {typed} nothing is trained twice."
    )


class Standing:
    """Where a training stands before an epoch that it may have to begin again."""

    def __init__(self, member: "Member") -> None:
        network = member.classifier.network
        self.member = member
        self.tensors = [
            (tensor, tensor.detach().to("cpu", copy=True))
            for tensor in (*network.parameters(), *network.buffers())
        ]
        self.optimizer = on_host(member.optimizer.state_dict())
        self.schedules = [copy.deepcopy(each.state_dict()) for each in member.schedules]
        self.totals = {split: sums.total for split, sums in member.classifier.sums.items()}
        self.callbacks = [(each, copied(vars(each))) for each in member.watching]

    @torch.no_grad()
    def restore(self) -> None:
        member = self.member
        for tensor, before in self.tensors:
            tensor.copy_(before)
        member.optimizer.load_state_dict(self.optimizer)
        for schedule, state in zip(member.schedules, self.schedules, strict=True):
            schedule.load_state_dict(state)
        for split, total in self.totals.items():
            member.classifier.sums[split].total = total
        for callback, attributes in self.callbacks:
            vars(callback).update(copied(attributes))
        if member.start > 0:  # its batches go on where its Trainer stands
            loader: Any = member.trainer.train_dataloader
            loader.load_state_dict(loader.state_dict())


def on_host(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state, its tensors copied to the CPU."""
    return apply_to_collection(state, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))


def copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A callback's attributes; of the lists in which it gathers, copies."""
    return {k: list(v) if isinstance(v, list) else v for k, v in attributes.items()}
