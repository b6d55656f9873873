"""The network's graph, found by watching it work on one picture.

torch.fx and torch.export stop at a branch that depends on the data, and so at a network that checks
its input's shape. Watching cannot: it notes each layer that is called, each function of torch that
is called between layers, and whose results they took.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from research.pictures.inspection import is_layer, place, undisturbed
from research.pictures.style import TIMES

# They order the same numbers differently; as nodes they would hide what works on them.
REARRANGEMENTS = {
    *("bfloat16", "chunk", "clone", "contiguous", "detach", "expand", "expand_as", "float", "get"),
    *("getitem", "half", "movedim", "permute", "reshape", "split", "squeeze", "to", "transpose"),
    *("type", "type_as", "unbind", "unsqueeze", "view", "view_as"),
}

SIGNS = {"add": "+", "sub": "-", "mul": TIMES, "truediv": "÷", "div": "÷"}


@dataclass(frozen=True)
class Node:
    """One call of a layer, or of a function between layers; node 0 is the input.

    `name` is the path in the network, or the function's name; `scope` the path of the module that
    called it; `shape` that of the (first) result for one picture; `parameters` those it owns, 0
    where an earlier call counted them; `inputs` the numbers of the nodes whose results it took.
    """

    name: str
    scope: str
    kind: str
    description: str
    shape: tuple[int, ...]
    parameters: int
    inputs: tuple[int, ...]
    is_function: bool = False


@dataclass(frozen=True)
class Graph:
    """The nodes in the order of their calls, and the number of all the network's parameters.

    `folded` is how many levels of modules are shown, None where all are.
    """

    network: str
    nodes: tuple[Node, ...]
    parameters: int
    folded: int | None = None

    @property
    def elsewhere(self) -> int:
        """How many parameters belong to no layer that was called."""
        return self.parameters - sum(node.parameters for node in self.nodes)


def trace(network: nn.Module, image_shape: tuple[int, ...], most: int | None = None) -> Graph:
    """The graph of a network that takes one picture of `image_shape`, (C, H, W).

    Where it has more than `most` nodes, inner modules are folded into the modules that hold them.
    ValueError if the network cannot be run on such a picture.
    """
    graph = watch(network, image_shape, None)
    deepest = max(node.name.count(".") + 1 for node in graph.nodes)
    while most is not None and len(graph.nodes) > most and deepest > 1:
        deepest -= 1
        graph = watch(network, image_shape, deepest)
    return graph


def watch(network: nn.Module, image_shape: tuple[int, ...], depth: int | None) -> Graph:
    """The graph with every module below `depth` levels hidden in the one that holds it."""
    image = place(network).new_zeros(1, *image_shape)
    watcher = Watcher(image)
    with undisturbed(network), watcher.listening_to(network, depth):
        try:
            with watcher:
                output = network(image)
        except Exception as error:
            raise ValueError(
                f"The graph of {type(network).__name__} cannot be drawn, because the network fails "
                f"on one picture of shape {tuple(image_shape)}: {error}"
            ) from error
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Graph(
        type(network).__name__,
        prune(watcher.nodes, watcher.origins_of(tensors(output))),
        parameters,
        depth,
    )


def prune(nodes: Sequence[Node], results: Iterable[int]) -> tuple[Node, ...]:
    """The nodes without the functions that led to no layer and none of the `results`: checks."""
    needed = set(results)
    for number in reversed(range(len(nodes))):
        if number in needed or not nodes[number].is_function:
            needed |= {number, *nodes[number].inputs}
    places = {number: place for place, number in enumerate(sorted(needed))}
    return tuple(
        replace(node, inputs=tuple(places[source] for source in node.inputs))
        for number, node in enumerate(nodes)
        if number in needed
    )


class Watcher(TorchFunctionMode):
    """Notes which layers and functions are called, and whose results they take."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        shape = tuple(image.shape[1:])
        self.nodes = [Node("input", "", "input", "pictures", shape, 0, ())]
        # By identity, each with the tensor itself, so that no identity is given out again.
        self.origins: dict[int, tuple[int, Tensor]] = {}
        self.counted: set[int] = set()
        self.scopes: list[str] = []
        self.inside: list[tuple[int, ...]] = []  # a layer that is at work, its inputs' nodes
        self.versions: list[dict[int, int]] = []
        self.note(image, 0)

    @contextlib.contextmanager
    def listening_to(self, network: nn.Module, depth: int | None) -> Iterator[None]:
        """Every module tells when it is called and what comes of it; afterwards none does."""
        handles: list[RemovableHandle] = []
        try:
            for path, module in network.named_modules():
                levels = path.count(".") + 1 if path else 0
                single = is_layer(module) or levels == depth
                enter, leave = (
                    (self.enter_layer, partial(self.leave_layer, path))
                    if single
                    else (partial(self.enter_scope, path), self.leave_scope)
                )
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter_scope(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.scopes.append(path)

    def leave_scope(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.scopes.pop()

    def enter_layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = list(tensors((args, kwargs)))
        self.inside.append(self.origins_of(given))
        self.versions.append({id(tensor): version(tensor) for tensor in given})

    def leave_layer(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        inputs, before = self.inside.pop(), self.versions.pop()
        if self.inside or not inputs:
            return None
        # Dropout hands its input on. As another tensor, it is told from the one that came in.
        self.inside.append(())
        unchanged = isinstance(output, Tensor) and before.get(id(output)) == version(output)
        output = output.view_as(output) if unchanged else output
        self.inside.pop()
        parameters = 0
        for parameter in module.parameters():
            if id(parameter) not in self.counted:
                parameters += parameter.numel()
                self.counted.add(id(parameter))
        scope, _, _ = path.rpartition(".")
        self.add(
            path or type(module).__name__,
            scope,
            kind_of(module),
            describe(module),
            parameters,
            inputs,
            output,
        )
        return output

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        inputs, before = self.origins_of(given), [version(tensor) for tensor in given]
        output = func(*args, **kwargs)
        changed = [t for t, old in zip(given, before, strict=True) if version(t) != old]
        # What hands its input on, or what nothing was handed to, does nothing to the picture.
        result = [t for t in tensors(output) if changed or not any(t is g for g in given)]
        if not inputs or not (result or changed):
            return output
        name = func.__name__.strip("_")
        if name in REARRANGEMENTS and len(inputs) == 1:
            for tensor in result:
                self.note(tensor, inputs[0])
            return output
        name, description = describe_function(name, args, len(inputs))
        scope = self.scopes[-1] if self.scopes else ""
        kind = "join" if len(inputs) > 1 else kind_of_function(name)
        self.add(name, scope, kind, description, 0, inputs, [*result, *changed], is_function=True)
        return output

    def add(
        self,
        name: str,
        scope: str,
        kind: str,
        description: str,
        parameters: int,
        inputs: tuple[int, ...],
        output: Any,
        is_function: bool = False,
    ) -> None:
        results = list(tensors(output))
        shape = tuple(results[0].shape[1:]) if results else ()
        for tensor in results:
            self.note(tensor, len(self.nodes))
        self.nodes.append(
            Node(name, scope, kind, description, shape, parameters, inputs, is_function)
        )

    def note(self, tensor: Tensor, number: int) -> None:
        self.origins[id(tensor)] = number, tensor

    def origins_of(self, given: Iterable[Tensor]) -> tuple[int, ...]:
        """The nodes that these tensors come from, each once, in their order."""
        numbers = [self.origins[id(tensor)][0] for tensor in given if id(tensor) in self.origins]
        return tuple(dict.fromkeys(numbers))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, and in torchvision's named outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def kind_of(module: nn.Module) -> str:
    """What a layer does to a picture, in a word: "convolution", "pooling", ...; else "other"."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(module, nn.Linear | nn.Bilinear):
        return "linear"
    name, home = type(module).__name__, type(module).__module__
    if "Pool" in name:
        return "pooling"
    if "Norm" in name:
        return "normalization"
    if home == "torch.nn.modules.activation" and name != "MultiheadAttention":
        return "activation"
    return "other"


def kind_of_function(name: str) -> str:
    """The same for a function between layers."""
    if "pool" in name:
        return "pooling"
    if "norm" in name:
        return "normalization"
    if name in {"linear", "conv2d"}:
        return {"linear": "linear", "conv2d": "convolution"}[name]
    title = name.replace("_", "")
    is_activation = any(title == known.lower() for known in nn.modules.activation.__all__)
    return "activation" if is_activation else "other"


def describe(module: nn.Module) -> str:
    """The class of a layer with the settings that shape its work: "Conv2d 3×3, stride 2"."""
    parts = [type(module).__name__]
    kernel, stride = getattr(module, "kernel_size", None), getattr(module, "stride", None)
    if kernel is not None:
        parts[0] += f" {times(kernel)}"
        usual = kernel if "Pool" in parts[0] else 1
        if stride is not None and pair(stride) != pair(usual):
            parts.append(f"stride {pair(stride)[0]}")
    groups = getattr(module, "groups", 1)
    if "Conv" in parts[0] and groups != 1:
        parts.append(f"{groups} groups")
    if isinstance(module, nn.Dropout | nn.Dropout2d):
        parts.append(f"p {module.p:g}")
    return ", ".join(parts)


def describe_function(name: str, args: Any, inputs: int) -> tuple[str, str]:
    """The name of a function, and what it does, for a reader who does not know it."""
    if name[:1] in {"i", "r"} and name[1:] in SIGNS:
        name = name[1:]
    if inputs > 1:
        words = {"add": "sum of both", "mul": "product of both", "cat": "concatenation"}
        return name, words.get(name, "")
    numbers = [value for value in args if isinstance(value, int | float)]
    return name, f"{SIGNS[name]} {numbers[0]:g}" if name in SIGNS and numbers else ""


def times(size: Any) -> str:
    return TIMES.join(str(number) for number in pair(size))


def pair(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)
