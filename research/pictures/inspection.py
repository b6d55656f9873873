"""Looking into a network without leaving a trace in it.

B pictures of C channels, H rows and W columns.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, without gradients and not compiled; afterwards as it was.

    Every module gets its own mode back, and torch's random state is put back too, whatever is
    raised within.
    """
    training = {module: module.training for module in network.modules()}
    cuda = [device.index for device in {place(network).device} if device.type == "cuda"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        # Outside of inference mode too: its tensors do not count their changes.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if any(module._compiled_call_impl is not None for module in network.modules()):
            # A compiled forward does not call the hooks of the layers in it.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            network.eval()
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


def place(network: nn.Module) -> Tensor:
    """An empty tensor on the network's device and of its type of floats."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            return torch.empty(0, device=parameter.device, dtype=parameter.dtype)
    return torch.empty(0)


def is_layer(module: nn.Module) -> bool:
    """True for what a reader takes for one layer: all of torch.nn's modules but its containers.

    So is any module that has no modules in it. The rule is torch.fx's.
    """
    if not any(True for _ in module.children()):
        return True
    from_torch = type(module).__module__.startswith("torch.nn")
    return from_torch and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
