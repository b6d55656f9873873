"""Airbench: a network and an optimizer that learn CIFAR-10 in eight epochs.

After airbench94_muon.py of Keller Jordan's https://github.com/KellerJordan/cifar10-airbench (MIT
licence; Jordan, 2024, https://arxiv.org/abs/2404.00498), who reports a mean of 94.01 % over 200
runs. The whole recipe is experiments/airbench94.yaml; here is what it needs that torch has not:

Airbench94         its network; the first convolution whitens patches and is never trained
whitening_filters  the filters of that convolution, out of training pictures
views              a picture, mirrored and moved by a pixel: what is averaged in evaluation
MuonSGD            its optimizer: Muon on normalised weights, Nesterov's SGD for all others

Letters: B pictures, C channels, H, W height and width.
"""

import itertools
from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from research.checks import require_at_least, require_pictures
from research.param_groups import SplitOptimizer

# ---- the network ---------------------------------------------------------------------------------


class Airbench94(nn.Module):
    """Jordan's network for 94 %: a whitening layer, two convolutions for each of `widths`, a head.

    Pictures (B, in_channels, image_size, image_size), logits (B, num_classes). With the defaults
    whiten (B, 24, 31, 31) -> block1 (B, 64, 15, 15) -> block2 (B, 256, 7, 7) -> block3
    (B, 256, 3, 3) -> pool (B, 256, 1, 1) -> logits, and 1,972,792 parameters, of which 1,971,352
    are trained.

    The whitening layer's filters stay what `prepare` makes of the training pictures, which
    `research.fit` hands over before it trains; without that they are random. The scale of each
    batch normalisation stays 1. A convolution starts by handing on its inputs (Zagoruyko and
    Komodakis, 2017, https://arxiv.org/abs/1706.00388); what further channels it has are random.

    Args:
        num_classes: at least 2.
        image_size: height and width in pixels.
        in_channels: 3 for colour, 1 for grey.
        widths: channels of each block, which halves H and W.
        views: how many views of a picture evaluation averages the logits of, as `views` makes
            them; 1 is the picture alone. Training sees one. Validation, test, `research.predict`
            and an exported program see all, give the same answers, and take as many times the
            memory for a batch.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_channels: int = 3,
        widths: tuple[int, ...] = (64, 256, 256),
        views: Literal[1, 2, 6] = 1,
    ) -> None:
        super().__init__()
        require_at_least(2, num_classes=num_classes)
        require_at_least(1, in_channels=in_channels)
        if min(widths, default=0) < 1:
            raise ValueError(f"widths: {widths} given, but it must be one or more numbers above 0.")
        require_at_least(2 ** len(widths) + 1, image_size=image_size)
        self.in_channels, self.image_size, self.views = in_channels, image_size, views
        channels = 2 * in_channels * 2 * 2
        self.whiten = nn.Conv2d(in_channels, channels, 2)
        self.whiten.weight.requires_grad_(False)
        features: OrderedDict[str, nn.Module] = OrderedDict(activation=nn.GELU())
        for number, ends in enumerate(itertools.pairwise((channels, *widths)), start=1):
            features[f"block{number}"] = block(*ends)
        # A plain pooling of the map's size: the adaptive maximum's gradient is not deterministic
        # on CUDA.
        features["pool"] = nn.MaxPool2d((image_size - 1) >> len(widths))
        self.features = nn.Sequential(features)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    @torch.no_grad()
    def prepare(self, images: Tensor) -> None:
        """Let the first layer whiten the patches of normalised training pictures (B, C, H, W)."""
        self.whiten.weight.copy_(whitening_filters(images, self.whiten.weight.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of pictures (B, in_channels, image_size, image_size)."""
        require_pictures(x, self.in_channels, self.image_size)
        if self.training or self.views == 1:
            return self.logits(x)
        # All at once, the pictures themselves first: whoever watches a layer finds them in front.
        seen = views(x, self.views)
        logits = self.logits(torch.cat([view for view, _ in seen]))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Not len(x), which an exported program would take for a constant.
        each = logits.unflatten(0, (len(seen), x.shape[0]))
        shares = logits.new_tensor([share for _, share in seen])
        return (shares[:, None, None] * each).sum(dim=0)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of the pictures as they are; they start at about 1 / width."""
        features = self.features(self.whiten(x)).flatten(1)
        return self.head(features) / features.shape[1]


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, the first with a pooling that halves H and W."""
    return nn.Sequential(
        OrderedDict(
            conv1=identity_convolution(inputs, outputs),
            pool=nn.MaxPool2d(2),
            norm1=unscaled_norm(outputs),
            activation1=nn.GELU(),
            conv2=identity_convolution(outputs, outputs),
            norm2=unscaled_norm(outputs),
            activation2=nn.GELU(),
        )
    )


def identity_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that starts by handing on its inputs; further outputs start at random."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[:inputs])
    return convolution


def unscaled_norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation that learns a shift but no scale, and forgets old statistics soon."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=1 - 0.6)
    norm.weight.requires_grad_(False)
    return norm


def whitening_filters(images: Tensor, size: int, eps: float = 5e-4) -> Tensor:
    """Filters (2 C size², C, size, size) that whiten the patches of pictures, and their negatives.

    The answers of the first half to the patches of `images` (B, C, H, W) are uncorrelated, and the
    mean square of each is 1, a little less where a direction hardly varies: `eps` is added to the
    variances. They are the eigenvectors of the patches' second moments, about 0 as the pictures are
    normalised, from the weakest to the strongest.
    """
    channels, (height, width) = images.shape[1], (side - size + 1 for side in images.shape[2:])
    moments = images.new_zeros(channels * size**2, channels * size**2, dtype=torch.float64)
    for some in images.split(250):  # few enough to stay in the processor's cache
        planes = some.transpose(0, 1).contiguous()
        moved = [
            planes[:, :, row : row + height, column : column + width]
            for row in range(size)
            for column in range(size)
        ]
        # 0.1 s for 5,000 pictures on one core; F.unfold, in float64, took nine times as long.
        patches = torch.stack(moved, dim=1).reshape(len(moments), -1)
        moments += patches @ patches.T
    moments /= len(images) * height * width
    variances, directions = torch.linalg.eigh(moments)
    filters = (directions / (variances + eps).sqrt()).T.reshape(-1, channels, size, size)
    return torch.cat([filters, -filters]).to(images.dtype)


def views(x: Tensor, count: Literal[1, 2, 6]) -> list[tuple[Tensor, float]]:
    """Views of pictures (B, C, H, W), first themselves, and the share of each in a mean.

    2: also mirrored left to right. 6: both of these, and both again moved by a pixel towards the
    lower right and the upper left, half as much each. What comes in at the edge is reflected.
    """
    if count == 1:
        return [(x, 1.0)]
    if count == 2:
        return [(x, 0.5), (x.flip(3), 0.5)]
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    moved = padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]
    still = [(view, 0.25) for view in (x, x.flip(3))]
    return still + [(view, 0.125) for each in moved for view in (each, each.flip(3))]


# ---- the optimizer -------------------------------------------------------------------------------


class MuonSGD(SplitOptimizer):
    """Muon for the hidden matrices, each kept at one length, and Nesterov's SGD for all others.

    A hidden matrix (a convolution's kernel is one row for each output channel) is scaled until the
    mean square of its rows' lengths is 1, then moved along its orthogonalised momentum (Jordan et
    al., 2024, https://kellerjordan.github.io/posts/muon/): `lr` is about the relative change. It
    makes sense where a normalisation follows, which does not see the scale.

    Each group that is given is split in up to four by the marks of `parameter_groups`, in this
    order: `role` "hidden" (hidden matrices), "outer" (the other weights of two or more dimensions,
    as those of the last layer), "biases" (all with fewer), "first_biases" (of these, the first
    layer's). A schedule that takes a value for each group takes them in this order. Without marks
    all matrices are hidden and no bias is a first one. What a group itself says (`lr`, `momentum`,
    `weight_decay` as SGD's) holds for all its parts.

    A learning rate may be a tensor, and no step waits for the device.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.05,
        momentum: float = 0.6,
        bias_lr: float = 0.05,
        outer_lr: float = 0.05,
        sgd_momentum: float = 0.85,
        sgd_weight_decay: float = 0.0,
        ns_steps: int = 3,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16",
        eps: float = 1e-7,
    ) -> None:
        """
        Args:
            lr: of the hidden matrices
            momentum: of the hidden matrices
            bias_lr: of biases and the gains of norms
            outer_lr: of the first and the last layer's weights
            sgd_momentum: of all that is not hidden
            sgd_weight_decay: the share of itself that all that is not hidden loses in a step at
                its full learning rate, and less as the rate falls
            ns_steps: Newton-Schulz iterations
            ns_coefficients: of the Newton-Schulz polynomial
            ns_dtype: what the iterations are computed in
            eps: added to the norm that the momentum is divided by
        """
        require_at_least(0, lr=lr, bias_lr=bias_lr, outer_lr=outer_lr, momentum=momentum, eps=eps)
        require_at_least(0, sgd_momentum=sgd_momentum, sgd_weight_decay=sgd_weight_decay)
        require_at_least(1, ns_steps=ns_steps)
        iterations = {"ns_steps": ns_steps, "ns_coefficients": ns_coefficients}
        iterations |= {"ns_dtype": ns_dtype, "eps": eps}

        def sgd(rate: float) -> dict[str, Any]:
            decay = sgd_weight_decay / rate if rate > 0 else 0.0
            return {"lr": rate, "momentum": sgd_momentum, "weight_decay": decay}

        self.settings = {
            "hidden": {"lr": lr, "momentum": momentum, **iterations},
            "outer": sgd(outer_lr),
            "biases": sgd(bias_lr),
            "first_biases": sgd(bias_lr),
        }
        # `momentum` among the defaults, and no `betas`, is how OneCycleLR and CyclicLR learn that
        # there is a momentum to cycle.
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def role_of(self, parameter: Tensor, is_hidden: bool, is_of_first_layer: bool) -> str:
        if is_hidden or parameter.ndim >= 2:
            return "hidden" if is_hidden else "outer"
        return "first_biases" if is_of_first_layer else "biases"

    def step_part(self, group: dict[str, Any]) -> None:
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not trained:
            return
        changes = self.directions(group, trained)
        if group["role"] == "hidden":
            for parameter in trained:
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
            changes = orthogonalized(changes, group)
        torch._foreach_mul_(changes, group["lr"])
        torch._foreach_sub_(trained, changes)

    def directions(self, group: dict[str, Any], trained: list[Tensor]) -> list[Tensor]:
        """The gradients after decay and Nesterov's momentum, as in torch's SGD; new tensors."""
        gradients: Any = [parameter.grad for parameter in trained]
        if group["role"] != "hidden" and group["weight_decay"] != 0:
            gradients = torch._foreach_add(gradients, trained, alpha=group["weight_decay"])
        for parameter in trained:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in trained]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        return list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))


def orthogonalized(tensors: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Each tensor as the matrix of its first dimension by all others, made about orthogonal.

    Those of one shape are computed together. `group` has the settings `ns_...` and `eps`.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_shape.setdefault(tensor.shape, []).append(i)
    made = list(tensors)
    for places in by_shape.values():
        together = torch.stack([tensors[i] for i in places])
        matrices = newton_schulz(
            together.flatten(2),
            group["ns_steps"],
            group["ns_coefficients"],
            getattr(torch, group["ns_dtype"]),
            group["eps"],
        )
        same = matrices.to(together.dtype).view(together.shape).unbind()
        for i, tensor in zip(places, same, strict=True):
            made[i] = tensor
    return made


def newton_schulz(
    matrices: Tensor,
    steps: int,
    coefficients: tuple[float, float, float],
    dtype: torch.dtype,
    eps: float,
) -> Tensor:
    """Matrices (N, rows, columns) with the singular vectors of those given, computed in `dtype`.

    The singular values, first brought below 1, are sent through s -> a s + b s³ + c s⁵ `steps`
    times. With Jordan's coefficients they end up around 1, not at 1, which is as good for an
    optimizer and takes fewer steps; those that were next to 0 need more of them.
    """
    a, b, c = coefficients
    x = matrices.to(dtype)
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + eps)
    is_tall = x.shape[1] > x.shape[2]  # the product with itself should be the smaller one
    x = x.mT if is_tall else x
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).contiguous()
