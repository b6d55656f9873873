"""Networks that turn pictures into scores: the tutorial's CNN, a fast ResNet, any of torchvision's.

A network is a plain `nn.Module` from pictures (B, C, H, W) to logits (B, C). Its signature is all
there is to configure, so a network of your own is one class, and there is no list to enter it in.
One in a file of its own, as Airbench94, is imported here.

CNN                      three convolutions, two linear layers: where the tutorial starts
ResNet9                  a modern network of the 94 % class, made to be trained in a minute
from_torchvision         any classifier of `torchvision.models`, made to fit small pictures
adapt_to_small_pictures  what is changed in it for that

All of them work in place with `network.compile()`, in channels_last, under autocast, and through
`torch.export`. Letters: B pictures in a batch; C channels, or classes in logits and votes; H, W
height and width.
"""

import inspect
import math
import typing
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from research.airbench import Airbench94 as Airbench94  # found here by its name
from research.checks import (
    require_at_least,
    require_known,
    require_pictures,
    require_pictures_of_module,
)

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

# MultiheadAttention is no activation, and Threshold means nothing without its two arguments.
ACTIVATIONS = set(nn.modules.activation.__all__) - {"MultiheadAttention", "Threshold"}

# Each takes (channels, size) of the (B, channels, size, size) map that it normalises.
NORMALIZATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "BatchNorm2d": lambda channels, size: nn.BatchNorm2d(channels),
    "InstanceNorm2d": lambda channels, size: nn.InstanceNorm2d(channels),
    "GroupNorm": lambda channels, size: nn.GroupNorm(math.gcd(8, channels), channels),
    "LayerNorm": lambda channels, size: nn.LayerNorm((channels, size, size)),
    "RMSNorm": lambda channels, size: nn.RMSNorm((channels, size, size)),
    "LocalResponseNorm": lambda channels, size: nn.LocalResponseNorm(5),
}

POOLINGS: dict[str, Callable[..., nn.Module]] = {
    "MaxPool2d": nn.MaxPool2d,
    "AvgPool2d": nn.AvgPool2d,
    "LPPool2d": partial(nn.LPPool2d, 2),
}


class CNN(nn.Module):
    """The tutorial's network: one convolution and pooling for each of `widths`, two linear layers.

    Pictures (B, in_channels, image_size, image_size), logits (B, num_classes). With the defaults
    (B, 3, 32, 32) -> conv1 (B, 32, 32, 32) -> pool1 (B, 32, 16, 16) -> conv2 (B, 32, 16, 16)
    -> pool2 (B, 32, 8, 8) -> conv3 (B, 64, 8, 8) -> pool3 (B, 64, 4, 4) -> flatten (B, 1024)
    -> linear1 (B, 64) -> linear2 (B, 10): 145,578 parameters, and no activation, so that the
    maximum in the poolings is all that keeps it from being linear.

    Args:
        num_classes: at least 2.
        image_size: height and width in pixels, enough to be halved once for each of the widths.
        in_channels: 3 for colour, 1 for grey.
        widths: channels of each convolution; a pooling that halves H and W follows every one.
        hidden: features between the two linear layers.
        kernel_size: odd, so that the padding keeps H and W.
        activation: a class of torch.nn, after each convolution and between the linear layers.
            Softmax and its kin run over the channels; GLU halves them and is given twice as many.
        normalization: a class of torch.nn, between each convolution and its activation. GroupNorm
            gets 8 groups (or the most that divide both 8 and the channels), LayerNorm and RMSNorm
            span the whole map (C, H, W), LocalResponseNorm spans 5 channels as in AlexNet.
        pooling: MaxPool2d, AvgPool2d, or LPPool2d (the Euclidean norm).
        ceil_mode: halve odd maps upwards, so that the last row and column are not lost.
        padding_mode: what the convolutions see beyond the edge.
        dropout: share of the features zeroed in training before each linear layer (Srivastava et
            al., 2014).

    Source: the layer sizes of Caffe's cifar10_quick, after A. Krizhevsky's cuda-convnet (2012).
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_channels: int = 3,
        widths: tuple[int, ...] = (32, 32, 64),
        hidden: int = 64,
        kernel_size: int = 5,
        activation: str | None = None,
        normalization: str | None = None,
        pooling: str = "MaxPool2d",
        ceil_mode: bool = False,
        padding_mode: PaddingMode = "zeros",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least(2, num_classes=num_classes)
        require_at_least(1, image_size=image_size, in_channels=in_channels, hidden=hidden)
        require_at_least(1, kernel_size=kernel_size)
        require_known("pooling", pooling, POOLINGS)
        if min(widths, default=0) < 1:
            raise ValueError(f"widths: {widths} given, but it must be one or more numbers above 0.")
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size: {kernel_size} is even, and only an odd kernel keeps the map's size; "
                f"choose {kernel_size - 1} or {kernel_size + 1}."
            )
        self.in_channels, self.image_size = in_channels, image_size

        features: OrderedDict[str, nn.Module] = OrderedDict()
        channels, size = in_channels, image_size
        for number, width in enumerate(widths, start=1):
            for role, layer in convolution(
                channels, width, size, kernel_size, activation, normalization, padding_mode
            ).items():
                features[f"{role}{number}"] = layer
            features[f"pool{number}"] = POOLINGS[pooling](2, ceil_mode=ceil_mode)
            channels, size = width, math.ceil(size / 2) if ceil_mode else size // 2
            if size == 0:
                raise ValueError(
                    f"image_size: {image_size} pixels do not survive {len(widths)} poolings by 2; "
                    f"give at least {2 ** len(widths)} pixels, fewer widths, or ceil_mode=True."
                )

        head: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        # Not `> 0`: torch itself refuses a negative share with a good sentence.
        if dropout != 0:
            head["dropout1"] = nn.Dropout(dropout)
        head["linear1"] = nn.Linear(channels * size * size, hidden * gates(activation))
        if activation is not None:
            head["activation"] = make_activation(activation)
        if dropout != 0:
            head["dropout2"] = nn.Dropout(dropout)
        head["linear2"] = nn.Linear(hidden, num_classes)

        self.features = nn.Sequential(features)
        self.head = nn.Sequential(head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of pictures (B, in_channels, image_size, image_size)."""
        require_pictures(x, self.in_channels, self.image_size)
        return self.head(self.features(x))

    def cell_scores(self, x: Tensor) -> Tensor:
        """The votes (B, num_classes, H, W) of the last map's cells; the decision is their mean.

        The first linear layer is a sum over the H·W cells, with a matrix for each. A cell's vote is
        its own term times H·W, put through the rest of the head. So without an activation (and
        without dropout at work) the mean of the votes over H and W equals `forward`. With one, each
        cell passes it alone, and the mean of the votes is a decision of its own: use it, not
        `forward`, for a network trained on its votes.
        """
        require_pictures(x, self.in_channels, self.image_size)
        votes = self.features(x)
        for name, layer in self.head.named_children():
            if name == "linear1":
                assert isinstance(layer, nn.Linear)
                weight = layer.weight.unflatten(1, votes.shape[1:])
                own_terms = torch.einsum("bchw,kchw->bkhw", votes, weight)
                cells = votes.shape[2] * votes.shape[3]
                votes = cells * own_terms + layer.bias[:, None, None]
            elif name == "linear2":
                assert isinstance(layer, nn.Linear)
                votes = classify_cells(votes, layer)
            elif name != "flatten":
                votes = layer(votes)
        return votes


class ResNet9(nn.Module):
    """D. Page's nine-layer residual network for CIFAR-10: small, and made to be trained fast.

    Pictures (B, in_channels, image_size, image_size), logits (B, num_classes). Eight 3×3
    convolutions, each with normalisation and activation, and one linear layer without bias. With
    the defaults prep (B, 64, 32, 32) -> layer1 (B, 128, 16, 16) -> residual1 -> layer2
    (B, 256, 8, 8) -> layer3 (B, 512, 4, 4) -> residual3 -> pool (B, 512, 1, 1) -> logits, and
    6,573,120 parameters. Its author reports 94 % after 24 epochs, in 79 s on one V100.

    Args:
        num_classes: at least 2.
        image_size: height and width in pixels, at least 8.
        in_channels: 3 for colour, 1 for grey.
        width: channels of the first convolution; later maps have 2, 4, and 8 times as many. The
            arithmetic grows with its square: 16 is bearable on a CPU.
        activation: a class of torch.nn, after each convolution, as for CNN.
        normalization: a class of torch.nn, between each convolution and its activation, as for CNN.
        global_pooling: MaxPool2d (the source's), AvgPool2d or LPPool2d, over the whole last map.
        logit_scale: what the logits are multiplied by. Below 1 it keeps the first softmax soft; a
            loss that fits scores to given numbers (MSELoss on raw scores) may do better with 1.

    Source: How to Train Your ResNet, part 4 (2018), https://myrtle.ai/learn/how-to-train-your-resnet/
    and https://github.com/davidcpage/cifar10-fast.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_channels: int = 3,
        width: int = 64,
        activation: str = "ReLU",
        normalization: str | None = "BatchNorm2d",
        global_pooling: str = "MaxPool2d",
        logit_scale: float = 0.125,
    ) -> None:
        super().__init__()
        require_at_least(2, num_classes=num_classes)
        require_at_least(8, image_size=image_size)
        require_at_least(1, in_channels=in_channels, width=width)
        require_known("global_pooling", global_pooling, POOLINGS)
        self.in_channels, self.image_size, self.logit_scale = in_channels, image_size, logit_scale

        def block(inputs: int, outputs: int, halvings: int) -> OrderedDict[str, nn.Module]:
            size = image_size >> halvings
            return convolution(inputs, outputs, size, 3, activation, normalization)

        def layer(inputs: int, outputs: int, halvings: int) -> nn.Sequential:
            named = block(inputs, outputs, halvings)
            return nn.Sequential(OrderedDict(**named, pool=nn.MaxPool2d(2)))

        def residual(channels: int, halvings: int) -> _Residual:
            pair = {f"block{i}": nn.Sequential(block(channels, channels, halvings)) for i in (1, 2)}
            return _Residual(OrderedDict(pair))

        self.features = nn.Sequential(
            OrderedDict(
                prep=nn.Sequential(block(in_channels, width, 0)),
                layer1=layer(width, 2 * width, 0),
                residual1=residual(2 * width, 1),
                layer2=layer(2 * width, 4 * width, 1),
                layer3=layer(4 * width, 8 * width, 2),
                residual3=residual(8 * width, 3),
            )
        )
        # A plain pooling of the map's size, not an adaptive one: on CUDA the gradient of the
        # adaptive maximum is not deterministic, and torch.use_deterministic_algorithms refuses it.
        self.head = nn.Sequential(
            OrderedDict(
                pool=POOLINGS[global_pooling](image_size >> 3),
                flatten=nn.Flatten(),
                linear=nn.Linear(8 * width, num_classes, bias=False),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of pictures (B, in_channels, image_size, image_size)."""
        require_pictures(x, self.in_channels, self.image_size)
        return self.logit_scale * self.head(self.features(x))

    def cell_scores(self, x: Tensor) -> Tensor:
        """The votes (B, num_classes, H, W) of the last map's cells; the decision is their mean.

        A vote is the classifier applied to one cell. With global_pooling="AvgPool2d" the mean of
        the votes over H and W equals `forward`; with another it is a decision of its own: use it,
        not `forward`, for a network trained on its votes.
        """
        require_pictures(x, self.in_channels, self.image_size)
        linear = self.head.get_submodule("linear")
        assert isinstance(linear, nn.Linear)
        return self.logit_scale * classify_cells(self.features(x), linear)


class _Residual(nn.Sequential):
    """What its layers add to their input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def from_torchvision(
    function: str | Callable[..., nn.Module],
    num_classes: int = 10,
    image_size: int = 32,
    adapt: bool | None = None,
    **arguments: Any,
) -> nn.Module:
    """A classifier of `torchvision.models`, untrained, for pictures (B, 3, image_size, image_size).

    Args:
        function: the builder, or its name with or without the path: "torchvision.models.resnet18".
        adapt: None gives small pictures a stem that suits them where one is established, and leaves
            every other network as torchvision made it; True insists, False forbids. See
            `adapt_to_small_pictures`.
        arguments: whatever the builder takes. A network that asks for the pictures' size is told.

    ValueError for an unknown name or argument, for pretrained weights, and for a network that
    cannot take pictures of this size, such as AlexNet, Inception or MaxViT at 32 pixels.
    """
    from torchvision import models  # here, because torchvision is slow to import

    known = {name: models.get_model_builder(name) for name in models.list_models(module=models)}
    name = function if isinstance(function, str) else function.__name__
    name = name.removeprefix("torchvision.models.")
    require_known("network", name, known)
    if arguments.get("weights") is not None or arguments.get("pretrained"):
        raise ValueError(
            f"torchvision.models.{name}: pretrained weights belong to 1000 classes and large "
            "pictures; leave `weights` out to train from scratch."
        )

    # torchvision's builders pass everything on to the class that they say they return.
    accepted = inspect.signature(typing.get_type_hints(known[name])["return"]).parameters
    implied: dict[str, Any] = {
        "num_classes": num_classes,
        "image_size": image_size,  # ViT
        "input_size": (image_size, image_size),  # MaxViT
        "aux_logits": False,  # GoogLeNet, Inception: else they hand out a tuple in training
        "init_weights": True,  # the same two: else they warn that this default will change
    }
    implied = {key: value for key, value in implied.items() if key in accepted}
    try:
        network = known[name](**(implied | arguments))
        if adapt or (adapt is None and isinstance(network, models.ResNet | models.DenseNet)):
            adapt_to_small_pictures(network, image_size)
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"torchvision.models.{name} cannot be had for {image_size}x{image_size} pictures with "
            f"these arguments: {error}"
        ) from error
    network.train().register_forward_pre_hook(
        partial(require_pictures_of_module, image_size=image_size)
    )
    return network


def adapt_to_small_pictures(network: nn.Module, image_size: int) -> nn.Module:
    """The same network, its stem changed in place for pictures of at most 64 pixels.

    torchvision's stems were made for 224 pixels: a 7×7 convolution and a pooling, both of stride 2,
    leave 8×8 of 32×32 pixels before the first block. Where its authors or common practice have a
    stem for CIFAR, a 3×3 convolution of stride 1 and no pooling, the network gets that: ResNet,
    ResNeXt, Wide ResNet (Chen et al., SimCLR, 2020, appendix B), DenseNet (Huang et al., 2017).
    Larger pictures leave the network as it was. ValueError for any other network: it would become
    one that nobody has described.
    """
    from torchvision.models import DenseNet, ResNet

    if not isinstance(network, ResNet | DenseNet):
        raise ValueError(
            f"adapt: no stem for small pictures is known for {type(network).__name__}, only for "
            "ResNet, ResNeXt, Wide ResNet and DenseNet; leave `adapt` out to train it as it is."
        )
    if image_size > 64:
        return network
    # Each starts as torchvision starts the convolution that it replaces.
    if isinstance(network, ResNet):
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    else:
        stem = network.features
        stem.conv0 = nn.Conv2d(3, stem.conv0.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.conv0.weight)
        stem.pool0 = nn.Identity()
    return network


def convolution(
    in_channels: int,
    out_channels: int,
    size: int,
    kernel_size: int,
    activation: str | None,
    normalization: str | None,
    padding_mode: PaddingMode = "zeros",
) -> OrderedDict[str, nn.Module]:
    """Layers "conv", "norm", "activation", the last two if asked for, on maps of `size` pixels."""
    padding = kernel_size // 2
    smallest = {"reflect": padding + 1, "circular": padding}.get(padding_mode, 1)
    if size < smallest:
        raise ValueError(
            f'padding_mode: "{padding_mode}" by {padding} pixels needs a map of {smallest} pixels, '
            f"but one has {size}; choose zeros, larger pictures, a smaller kernel or fewer widths."
        )
    channels = out_channels * gates(activation)
    # These two subtract each channel's mean, and with it any bias.
    bias = normalization not in ("BatchNorm2d", "InstanceNorm2d")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(
        in_channels, channels, kernel_size, padding=padding, padding_mode=padding_mode, bias=bias
    )
    if normalization is not None:
        require_known("normalization", normalization, NORMALIZATIONS)
        layers["norm"] = NORMALIZATIONS[normalization](channels, size)
    if activation is not None:
        layers["activation"] = make_activation(activation)
    return layers


def make_activation(name: str) -> nn.Module:
    """The activation of this name in torch.nn; if it runs along a dimension, along the channels."""
    require_known("activation", name, ACTIVATIONS)
    if name == "Softmax2d":
        name = "Softmax"  # the same over the channels of a map, and not only of a map
    activation = getattr(nn, name)
    along = {"dim": 1} if "dim" in inspect.signature(activation).parameters else {}
    return activation(**along)


def gates(activation: str | None) -> int:
    """How many channels the activation needs for each that it hands on: 2 for GLU, else 1."""
    return 2 if activation == "GLU" else 1


def classify_cells(maps: Tensor, linear: nn.Linear) -> Tensor:
    """The linear layer applied to every cell: maps (B, in, H, W) -> (B, out, H, W)."""
    return nn.functional.conv2d(maps, linear.weight[:, :, None, None], linear.bias)
