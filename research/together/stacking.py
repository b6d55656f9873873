"""Many networks of the same shape as one: their weights stacked, their scores by one call.

    with stacked(networks) as stack:
        scores = stack(images)                   # (N, B, C): of each network, of the same pictures
        loss = sum(loss(s, labels) for loss, s in zip(losses, scores))
        loss.backward()
        stack.share_gradients()                  # each network's parameters have their own
        for optimizer in optimizers:             # ordinary ones, of any class, one for each network
            optimizer.step()
        stack.zero_grad()

A GPU that a small network leaves idle has N times the work in each of its kernels, and the host
launches as many kernels as for one.  The scores of one network do not depend on another's weights,
so each gradient is that of its network alone: what is trained is what single trainings train, but
for the order in which numbers are added up.  Networks that draw alike have the dropout of a single
training, all the same; else each draws for itself, other numbers than a single training does.

Plain torch (`torch.func`), after its tutorial on model ensembling.

Legend: N networks, B pictures, C classes or channels, H x W pixels or cells.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state


class Stack:
    """N networks whose parameters and buffers are, while it lasts, rows of larger tensors.

    A row is a parameter's `data`: what changes the parameter in place changes the stack.
    """

    def __init__(
        self, networks: Sequence[nn.Module], per_cell: bool = False, draws_alike: bool = False
    ) -> None:
        """
        Args:
            networks: of one class and the same shapes, all on one device
            per_cell: score the cells of a map (`cell_scores`), for a loss that asks for it
            draws_alike: what is random in one network is the same in all
        """
        randomness = "same" if draws_alike else "different"
        self.networks = [CellScores(each) if per_cell else each for each in networks]
        self.own = [tensors_of(network) for network in self.networks]
        self.parameters, self.buffers = stack_module_state(self.networks)
        self.shape = copy.deepcopy(self.networks[0])  # says how; its weights are never used
        self.forward = torch.vmap(self.score, in_dims=(0, 0, None), randomness=randomness)
        self.forward_each = torch.vmap(self.score, in_dims=(0, 0, 0), randomness=randomness)
        together = {**self.parameters, **self.buffers}
        for row, tensors in enumerate(self.own):
            for name, (tensor, _) in tensors.items():
                tensor.data = together[name].detach()[row]
                tensor.grad = None

    def score(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor
    ) -> Tensor:
        return functional_call(self.shape, (parameters, buffers), (images,))

    def __call__(self, images: Tensor) -> Tensor:
        """Scores (N, B, C), or (N, B, C, H, W) of cells.

        Of the same pictures (B, 3, H, W) for all, or of own ones (N, B, 3, H, W) for each.
        """
        forward = self.forward if images.ndim == 4 else self.forward_each
        return forward(self.parameters, self.buffers, images)

    def train(self, mode: bool = True) -> None:
        """Dropout and batch norm as in training, or (False) as in use."""
        self.shape.train(mode)

    def share_gradients(self) -> None:
        """Let each network's parameters have their rows of the gradients, until `zero_grad`."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue  # no part of the scores
            rows = parameter.grad.unbind()
            for tensors, row in zip(self.own, rows, strict=True):
                tensors[name][0].grad = row

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        for tensors in self.own:
            for tensor, _ in tensors.values():
                tensor.grad = None

    @torch.no_grad()
    def part(self) -> None:
        """Give each network its weights back, where and in the order they lay before."""
        for tensors in self.own:
            for tensor, before in tensors.values():
                before.copy_(tensor)
                tensor.data, tensor.grad = before, None


class CellScores(nn.Module):
    """The network's `cell_scores` as the forward of a module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.cell_scores(images)  # type: ignore[operator]


def tensors_of(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, each parameter and buffer, and the memory that it has."""
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: (tensor, tensor.data) for name, tensor in named.items()}


@contextlib.contextmanager
def stacked(
    networks: Sequence[nn.Module], per_cell: bool = False, draws_alike: bool = False
) -> Iterator[Stack]:
    """A stack of the networks, which have what became of their weights when it ends."""
    stack = Stack(networks, per_cell, draws_alike)
    try:
        yield stack
    finally:
        stack.part()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """What N networks get, as one tensor (N, ...); the one itself where all get the same."""
    first = tensors[0]
    return first if all(other is first for other in tensors) else torch.stack(list(tensors))


def may_be_stacked(loss: nn.Module, scores: Tensor) -> bool:
    """True for a loss (scores, labels) -> scalar that torch computes for a stack of scores at once.

    Tried on stacked scores (N, B, C) or (N, B, C, H, W), of which only the shape matters.
    """
    labels = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
    scores = torch.randn_like(scores, dtype=torch.float32).requires_grad_()
    with no_loops():
        try:
            torch.vmap(loss, in_dims=(0, None))(scores, labels).sum().backward()
        except UNSTACKABLE:
            return False
    return True


def refusal(networks: Sequence[nn.Module], images: Tensor, per_cell: bool = False) -> str | None:
    """Why these networks cannot be stacked, in a line; None if they can.  Nothing is changed.

    Tried on the pictures (B, 3, H, W), forward and backward: a network with a branch that depends
    on its data, or with operations that know no stack, tells so then.
    """
    copies = [copy.deepcopy(network) for network in networks[:2]]
    with no_loops():
        try:
            for draws_alike in (False, True):
                with stacked(copies, per_cell, draws_alike) as stack:
                    stack(images).float().square().mean().backward()
        except UNSTACKABLE as error:
            return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


UNSTACKABLE = (RuntimeError, ValueError, TypeError, AttributeError, UserWarning)


@contextlib.contextmanager
def no_loops() -> Iterator[None]:
    """Raises UserWarning where torch would go through a stack one by one, which is no faster."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        yield
