"""Which parameters an optimizer treats alike: groups with marks, and optimizers that split them.

parameter_groups    the parameters of a network in groups that any optimizer takes
SplitOptimizer      what Muon and MuonSGD share: another algorithm for each role of a parameter
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# The only layers of torch whose gains can have two or more dimensions.
NORMS = (nn.LayerNorm, nn.RMSNorm)
# A row of an embedding's matrix is looked up, not multiplied: Muon's author leaves it to AdamW.
NOT_MULTIPLIED = (*NORMS, nn.Embedding, nn.EmbeddingBag)


def parameter_groups(
    network: nn.Module, decay_biases_and_norms: bool = True
) -> list[dict[str, Any]]:
    """The trainable parameters as one group, or two where biases and norms are not to decay.

    With `decay_biases_and_norms` false, the second group has `weight_decay` 0 and holds all that
    has fewer than two dimensions (biases, gains) or belongs to a normalisation layer.  The keys
    `hidden_matrices` and `first_layer` of a group give the positions of its hidden matrices and of
    what belongs to the first layer with a matrix; `Muon` and `MuonSGD` read them, other optimizers
    pass over them.  Raises ValueError where every parameter is frozen.
    """
    hidden, first = hidden_matrices(network), first_layer(network)
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        # `whole_ndim`: FSDP has left this process a flat share of it (sharding.py).
        dimensions = getattr(parameter, "whole_ndim", parameter.ndim)
        plain = dimensions < 2 or isinstance(owner(network, name), NORMS)
        (undecayed if plain and not decay_biases_and_norms else decayed).append(parameter)
    if not decayed and not undecayed:
        raise ValueError(
            f"{type(network).__name__} has no parameter to train; at least one must have "
            "requires_grad set."
        )
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    for group in groups:
        group["hidden_matrices"] = [i for i, p in enumerate(group["params"]) if p in hidden]
        group["first_layer"] = [i for i, p in enumerate(group["params"]) if p in first]
    return [group for group in groups if group["params"]]


def hidden_matrices(network: nn.Module) -> set[nn.Parameter]:
    """The weights of all convolutions and linear layers but the first (input) and last (output).

    First and last as `network.named_parameters()` lists them, frozen ones too.
    """
    return {parameter for _, parameter in matrices(network)[1:-1]}


def first_layer(network: nn.Module) -> set[nn.Parameter]:
    """What belongs to the first convolution or linear layer itself, frozen or not."""
    return {p for layer, _ in matrices(network)[:1] for p in layer.parameters(recurse=False)}


def matrices(network: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """The weights that are multiplied with what comes in, each with its layer, frozen or not."""
    return [
        (owner(network, name), parameter)
        for name, parameter in network.named_parameters()
        if name.endswith("weight")
        and parameter.ndim >= 2
        and not isinstance(owner(network, name), NOT_MULTIPLIED)
    ]


def owner(network: nn.Module, parameter_name: str) -> nn.Module:
    """The module that holds the parameter itself."""
    return network.get_submodule(parameter_name.rpartition(".")[0])


class SplitOptimizer(Optimizer):
    """An optimizer that splits each group it is given by the roles of its parameters.

    `settings` has what a group of each role begins with, in the order in which they are added; what
    the given group itself says holds for all its parts.  A part tells its role under `role_key`.
    """

    role_key = "role"
    settings: dict[str, dict[str, Any]]

    @abstractmethod
    def role_of(self, parameter: Tensor, is_hidden: bool, is_of_first_layer: bool) -> str:
        """A key of `settings`; without marks all matrices are hidden and none is of the first."""

    @abstractmethod
    def step_part(self, group: dict[str, Any]) -> None:
        """A step of what has a gradient among the group's parameters."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Split the group by the roles of its parameters, and add the parts."""
        given = dict(param_group)
        params = given.pop("params")
        params = [params] if isinstance(params, Tensor) else list(params)
        hidden, first = given.pop("hidden_matrices", None), given.pop("first_layer", ())
        if hidden is None:
            hidden = [i for i, parameter in enumerate(params) if parameter.ndim >= 2]
        parts: dict[str, list[Tensor]] = {role: [] for role in self.settings}
        for i, parameter in enumerate(params):
            parts[self.role_of(parameter, i in hidden, i in first)].append(parameter)
        for role, chosen in parts.items():
            if chosen:
                settings = self.settings[role] | given
                super().add_param_group(settings | {"params": chosen, self.role_key: role})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The closure's loss (None without one), after one step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_part(group)
        return loss
