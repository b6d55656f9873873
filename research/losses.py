"""Every torch loss that can train a classifier, by torch's name: (scores, labels) -> scalar.

torch's losses ask for twenty kinds of target; a class label is one number. Each class here encodes
the label as the target that its namesake in torch wants, and calls torch. Whatever the loss, the
prediction is the arg max of the scores: each loss is low where the true class scores highest.

    B       pictures in the batch
    C       classes
    H, W    cells of the last feature map, for a loss that is `per_cell`
    scores  (B, C) floating point: what the network puts out, without an activation
    labels  (B,) int64 in 0..C-1
    corner  the one-hot vector of a class: a corner of the probability simplex

`reduction="mean"` is torch's mean. It is over the B pictures for some losses and over all B x C
elements for others, which makes gradients C times smaller: the docstring says which, and the
learning rate has to follow.

A loss of your own is one more class here, and its name is all that the command line needs:

    class FocalLoss(ClassificationLoss):
        def __init__(self, gamma: float = 2.0, reduction: Reduction = "mean") -> None:
            super().__init__(reduction)
            self.gamma = gamma

        def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
            nats = F.cross_entropy(scores, labels, reduction="none")
            return self.reduce((1 - torch.exp(-nats)) ** self.gamma * nats)

Not here: AdaptiveLogSoftmaxWithLoss and LinearCrossEntropyLoss, which own the last layer, so that
no scores are left to take the arg max of; NLLLoss2d, torch's deprecated alias of NLLLoss.
"""

from abc import ABC, abstractmethod
from math import inf, isfinite
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Reduction = Literal["mean", "sum"]
Outputs = Literal["softmax", "raw"]
Distance = Literal["euclidean", "squared_euclidean", "cosine"]
PerClass = list[float] | None


class ClassificationLoss(nn.Module, ABC):
    """A scalar from scores (B, C) and labels (B,); subclasses write `compute`.

    `probabilities` reads the scores of a network that was trained with this loss; subclasses whose
    scores are no logarithms of probabilities write `read`.

    Half precision is raised to float32 and autocast is off inside `compute`, so that no loss
    rounds, overflows or is refused there; float64 stays float64. Raises ValueError for a setting
    out of its range, and on the first batch for shapes or per-class lists that do not fit.
    """

    per_cell: bool = False  # True: scores (B, C, H, W), and labels (B, H, W) or (B,)

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        allowed = "'mean' or 'sum', because training needs one number per batch"
        self.require("reduction", reduction, reduction in get_args(Reduction), allowed)
        self.reduction: str = reduction

    @abstractmethod
    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss, reduced to a scalar; scores are float32 or float64."""

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        if scores.ndim != (4 if self.per_cell else 2):
            wanted = "(B, C, H, W), scores of a map's cells" if self.per_cell else "(B, C)"
            raise self.refusal("scores' shape", tuple(scores.shape), wanted)
        one_each = scores.shape[:1]
        if labels.shape != one_each and labels.shape != one_each + scores.shape[2:]:
            wanted = " or ".join(str(tuple(s)) for s in {one_each, one_each + scores.shape[2:]})
            raise self.refusal("labels' shape", tuple(labels.shape), wanted)
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.float()
        kind = scores.device.type
        if not torch.is_autocast_enabled(kind):
            return self.compute(scores, labels)
        # torch.autocast(enabled=False) does the same, and costs more than a small loss.
        torch.set_autocast_enabled(kind, False)
        try:
            return self.compute(scores, labels)
        finally:
            torch.set_autocast_enabled(kind, True)

    def probabilities(self, scores: Tensor) -> Tensor:
        """What the scores (B, C) say of each class: (B, C), rows from 0 to 1 that sum to 1.

        The arg max is that of the scores, also where rounding makes classes equal. Half precision
        is raised to float32. Plain tensor operations, which torch.export takes.
        """
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        largest = torch.finfo(scores.dtype).max  # of an overflow in half precision came infinity
        scores = scores.clamp(-largest, largest)
        read = self.read(scores)
        decided = scores.argmax(dim=1, keepdim=True)
        highest = read.gather(1, decided)
        just_below = highest * (1 - torch.finfo(scores.dtype).eps)
        return torch.minimum(read, just_below).scatter(1, decided, highest)

    def read(self, scores: Tensor) -> Tensor:
        """Probabilities from finite scores of float32 or float64: the softmax, as of logarithms."""
        return scores.softmax(dim=1)

    def refusal(self, setting: str, came: object, allowed: str) -> ValueError:
        loss = type(self).__name__
        return ValueError(f"{loss}: {setting} must be {allowed}, but it is {came!r}.")

    def require(self, setting: str, came: object, fits: bool, allowed: str) -> None:
        if not fits:
            raise self.refusal(setting, came, allowed)

    def keep_per_class(self, setting: str, values: PerClass) -> None:
        """Store one number per class where `.to(device)` finds it and no checkpoint does."""
        if values is not None:
            fits = all(isfinite(v) and v >= 0 for v in values) and any(values)
            self.require(setting, values, fits, "at least 0 for each class and not 0 for all")
        kept = None if values is None else torch.tensor(values, dtype=torch.float32)
        self.register_buffer(setting, kept, persistent=False)

    def per_class(self, setting: str, scores: Tensor) -> Tensor | None:
        """The stored numbers (C,), in the precision of the scores."""
        values: Tensor | None = getattr(self, setting)
        if values is None:
            return None
        if len(values) != scores.shape[1]:
            allowed = f"one number for each of the {scores.shape[1]} classes"
            raise self.refusal(setting, values.tolist(), allowed)
        return values.to(scores.dtype)

    def reduce(self, elements: Tensor) -> Tensor:
        return elements.mean() if self.reduction == "mean" else elements.sum()


def one_hot(labels: Tensor, scores: Tensor) -> Tensor:
    """Each label's corner, (B, C)."""
    return F.one_hot(labels, scores.shape[1]).to(scores.dtype)


def signs(labels: Tensor, scores: Tensor) -> Tensor:
    """+1 for the label's class and -1 for every other, (B, C)."""
    return 2 * one_hot(labels, scores) - 1


def corners(scores: Tensor) -> Tensor:
    """The corners of all classes, (C, C)."""
    return torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)


def others(labels: Tensor, scores: Tensor) -> Tensor:
    """The scores of the classes that are not the label's, (B, C - 1)."""
    steps = torch.arange(1, scores.shape[1], device=scores.device)
    return scores.gather(1, (labels[:, None] + steps) % scores.shape[1])


def hardest_other(labels: Tensor, scores: Tensor) -> Tensor:
    """The other class's corner that is nearest to the scores, (B, C).

    By every p-norm and by angle that is the corner of the highest other score.
    """
    return one_hot(scores.scatter(1, labels[:, None], -inf).argmax(dim=1), scores)


def outputs(scores: Tensor, kind: str) -> Tensor:
    return scores.softmax(dim=1) if kind == "softmax" else scores


def sigmoid_shares(scores: Tensor) -> Tensor:
    """Each class's sigmoid, divided by the sum of all; never 0/0, being made of logarithms."""
    return F.logsigmoid(scores).softmax(dim=1)


def nearest_in_simplex(points: Tensor) -> Tensor:
    """The probabilities that lie nearest to each point (B, C) (Duchi et al., 2008).

    Of estimates of the one-hot target: one amount is taken off all of them, so that what is left
    above 0 sums to 1. It keeps their order, and a corner stays that corner.
    """
    points = (points - points.amax(dim=1, keepdim=True)).clamp(min=-1)  # whatever is less gets 0
    descending = points.sort(dim=1, descending=True).values
    counts = torch.arange(1, points.shape[1] + 1, device=points.device)
    amounts = (descending.cumsum(dim=1) - 1) / counts  # if so many classes keep something
    keeping = (descending > amounts).sum(dim=1, keepdim=True).clamp(min=1)  # 0 of nan only
    return (points - amounts.gather(1, keeping - 1)).clamp(min=0)


# Likelihoods: scores are logarithms of probabilities or of odds, or the mean of a distribution.


class CrossEntropyLoss(ClassificationLoss):
    """Cross entropy in nats of the label under the softmax of the scores.

    `weight` holds one number per class, and "mean" divides by the labels' weights: by B without
    them. Labels equal to `ignore_index` count for nothing; a batch of nothing else is nan.
    `label_smoothing`, at least 0 and below 1, is the share of the target that is spread evenly
    over all classes (Szegedy et al., 2016).
    """

    def __init__(
        self,
        weight: PerClass = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction)
        fits = 0 <= label_smoothing < 1
        self.require("label_smoothing", label_smoothing, fits, "at least 0 and below 1")
        self.keep_per_class("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            scores,
            labels,
            weight=self.per_class("weight", scores),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class CrossEntropyLoss2d(CrossEntropyLoss):
    """Cross entropy in nats of every cell of a map: scores (B, C, H, W), labels (B, H, W) or (B,).

    A picture's label is every cell's label. "mean" is over the B x H x W cells, as torch's
    CrossEntropyLoss does with maps; the settings are those of CrossEntropyLoss.
    """

    per_cell = True

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 1:
            labels = labels[:, None, None].expand_as(scores[:, 0])
        # Cells as rows: torch's CUDA kernel for maps is not deterministic, the one for rows is.
        return super().compute(scores.movedim(1, -1).flatten(0, 2), labels.flatten())


class NLLLoss(ClassificationLoss):
    """Negative log-likelihood in nats, on the log-softmax of the scores.

    The same function as CrossEntropyLoss without smoothing; `weight`, `ignore_index` and "mean"
    are as there.
    """

    def __init__(
        self, weight: PerClass = None, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction)
        self.keep_per_class("weight", weight)
        self.ignore_index = ignore_index

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.nll_loss(
            scores.log_softmax(dim=1),
            labels,
            weight=self.per_class("weight", scores),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class KLDivLoss(ClassificationLoss):
    """Kullback-Leibler divergence KL(smoothed one-hot || softmax of the scores) in nats.

    `label_smoothing`, at least 0 and below 1, is the share of the target that is spread evenly
    over all classes. "mean" is over the B x C elements, as in torch: 1/C of the divergence per
    picture. torch's `log_target` is left out: the target is made here, the value is the same.
    """

    def __init__(self, label_smoothing: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        fits = 0 <= label_smoothing < 1
        self.require("label_smoothing", label_smoothing, fits, "at least 0 and below 1")
        self.label_smoothing = label_smoothing

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        share = self.label_smoothing
        target = (1 - share) * one_hot(labels, scores) + share / scores.shape[1]
        # Reduced here, because torch warns on every call about what its "mean" divides by.
        return self.reduce(F.kl_div(scores.log_softmax(dim=1), target, reduction="none"))


class BCELoss(ClassificationLoss):
    """Binary cross entropy in nats of every class: sigmoid of the score against the one-hot.

    `weight` holds one number per class. "mean" is over the B x C elements. torch cuts logarithms
    off at -100, and in float32 the sigmoid is exactly 1 above a score of 17, where a wrong score
    has no gradient left: BCEWithLogitsLoss is the same function without these flaws.
    """

    def __init__(self, weight: PerClass = None, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.keep_per_class("weight", weight)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        target, weight = one_hot(labels, scores), self.per_class("weight", scores)
        return F.binary_cross_entropy(scores.sigmoid(), target, weight, reduction=self.reduction)

    def read(self, scores: Tensor) -> Tensor:
        """Each class's own probability, its sigmoid, as a share of all classes'."""
        return sigmoid_shares(scores)


class BCEWithLogitsLoss(ClassificationLoss):
    """Binary cross entropy in nats of every class: the score, as a logit, against the one-hot.

    `weight` and `pos_weight` hold one number per class; the second counts only where the class is
    the true one, so that C - 1 balances one against all. "mean" is over the B x C elements.
    """

    def __init__(
        self, weight: PerClass = None, pos_weight: PerClass = None, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction)
        self.keep_per_class("weight", weight)
        self.keep_per_class("pos_weight", pos_weight)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            scores,
            one_hot(labels, scores),
            weight=self.per_class("weight", scores),
            pos_weight=self.per_class("pos_weight", scores),
            reduction=self.reduction,
        )

    def read(self, scores: Tensor) -> Tensor:
        """Each class's own probability, its sigmoid, as a share of all classes'."""
        return sigmoid_shares(scores)


class MultiLabelSoftMarginLoss(ClassificationLoss):
    """Binary cross entropy in nats, averaged over the C classes of a picture first.

    "mean" is over the B pictures and so equals BCEWithLogitsLoss; "sum" is C times smaller than
    there. `weight` holds one number per class.
    """

    def __init__(self, weight: PerClass = None, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.keep_per_class("weight", weight)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        target, weight = one_hot(labels, scores), self.per_class("weight", scores)
        return F.multilabel_soft_margin_loss(scores, target, weight, reduction=self.reduction)

    def read(self, scores: Tensor) -> Tensor:
        """Each class's own probability, its sigmoid, as a share of all classes'."""
        return sigmoid_shares(scores)


class SoftMarginLoss(ClassificationLoss):
    """log(1 + exp(-sign * score)): sign is +1 for the true class and -1 for every other.

    "mean" is over the B x C elements. The same function as BCEWithLogitsLoss.
    """

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        # F.soft_margin_loss exponentiates first: from a score of 89 it is inf, its gradient nan.
        return self.reduce(-F.logsigmoid(signs(labels, scores) * scores))

    def read(self, scores: Tensor) -> Tensor:
        """Each class's own probability, its sigmoid, as a share of all classes'."""
        return sigmoid_shares(scores)


class PoissonNLLLoss(ClassificationLoss):
    """Negative log-likelihood of the one-hot target as counts of Poisson distributions.

    The rate of a class is exp(score) or, without `log_input`, softplus(score), since a rate is
    positive; `eps` > 0 then guards its logarithm. `full` adds Stirling's term, which is 0 for the
    counts 0 and 1. "mean" is over the B x C elements. exp overflows from a score of 89.
    """

    def __init__(
        self,
        log_input: bool = True,
        full: bool = False,
        eps: float = 1e-8,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction)
        self.require("eps", eps, 0 < eps < inf, "above 0")
        self.log_input = log_input
        self.in_torch = nn.PoissonNLLLoss(log_input, full, eps=eps, reduction=reduction)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        rate = scores if self.log_input else F.softplus(scores)
        return self.in_torch(rate, one_hot(labels, scores))

    def read(self, scores: Tensor) -> Tensor:
        """Each class's rate as a share of all classes': of exp(score) the softmax."""
        if self.log_input:
            return scores.softmax(dim=1)
        # Far below 0 softplus is exp, and its logarithm the score; there float32 would reach 0.
        log_rate = F.softplus(scores.clamp(min=-15)).log()
        return torch.where(scores < -15, scores, log_rate).softmax(dim=1)


class GaussianNLLLoss(ClassificationLoss):
    """Negative log-likelihood of the one-hot target under Gaussians centred on the scores.

    Their `variance` > 0 is given, and is at least `eps` > 0; `full` adds the constant
    log(2 pi) / 2. "mean" is over the B x C elements.
    """

    def __init__(
        self,
        variance: float = 1.0,
        full: bool = False,
        eps: float = 1e-6,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction)
        self.require("variance", variance, 0 < variance < inf, "above 0")
        self.require("eps", eps, 0 < eps < inf, "above 0")
        self.variance = float(variance)  # torch takes any other number for a tensor
        self.in_torch = nn.GaussianNLLLoss(full=full, eps=eps, reduction=reduction)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.in_torch(scores, one_hot(labels, scores), self.variance)

    def read(self, scores: Tensor) -> Tensor:
        """The nearest probabilities to the means."""
        return nearest_in_simplex(scores)


# Distances of each output from the one-hot target. "mean" is over the B x C elements.


class L1Loss(ClassificationLoss):
    """Absolute difference from the one-hot target, of the softmax of the scores or the raw scores.

    Of "softmax" it is 2 (1 - p) / C for a label of probability p, which bears wrong labels well
    (Ghosh et al., 2017). Of "raw" it fits medians: where no class is right more than half of the
    time, all scores go to 0.
    """

    def __init__(self, scores: Outputs = "softmax", reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.require("scores", scores, scores in get_args(Outputs), "'softmax' or 'raw'")
        self.scores = scores
        self.in_torch = nn.L1Loss(reduction=reduction)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.in_torch(outputs(scores, self.scores), one_hot(labels, scores))

    def read(self, scores: Tensor) -> Tensor:
        """The softmax it was trained on, or the nearest probabilities to the raw scores."""
        return scores.softmax(dim=1) if self.scores == "softmax" else nearest_in_simplex(scores)


class MSELoss(ClassificationLoss):
    """Squared difference from the one-hot target, of the softmax of the scores or the raw scores.

    Of "softmax" it is 1/C of Brier's score (1950); of "raw" it is least squares, which rivals
    cross entropy on large networks (Hui and Belkin, 2021).
    """

    def __init__(self, scores: Outputs = "softmax", reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.require("scores", scores, scores in get_args(Outputs), "'softmax' or 'raw'")
        self.scores = scores
        self.in_torch = nn.MSELoss(reduction=reduction)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.in_torch(outputs(scores, self.scores), one_hot(labels, scores))

    def read(self, scores: Tensor) -> Tensor:
        """The softmax it was trained on, or the nearest probabilities to the raw scores."""
        return scores.softmax(dim=1) if self.scores == "softmax" else nearest_in_simplex(scores)


class SmoothL1Loss(ClassificationLoss):
    """L1Loss less beta / 2, and a parabola where the difference is below `beta` >= 0.

    Of "softmax" no difference is above 1, and with `beta` >= 1 it is MSELoss / (2 beta).
    """

    def __init__(
        self, scores: Outputs = "softmax", beta: float = 1.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction)
        self.require("scores", scores, scores in get_args(Outputs), "'softmax' or 'raw'")
        self.require("beta", beta, 0 <= beta < inf, "at least 0")
        self.scores = scores
        self.in_torch = nn.SmoothL1Loss(reduction=reduction, beta=beta)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.in_torch(outputs(scores, self.scores), one_hot(labels, scores))

    def read(self, scores: Tensor) -> Tensor:
        """The softmax it was trained on, or the nearest probabilities to the raw scores."""
        return scores.softmax(dim=1) if self.scores == "softmax" else nearest_in_simplex(scores)


class HuberLoss(ClassificationLoss):
    """Half the squared difference from the one-hot target, linear beyond `delta` > 0 (Huber, 1964).

    It is delta times SmoothL1Loss with beta = delta.
    """

    def __init__(
        self, scores: Outputs = "softmax", delta: float = 1.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction)
        self.require("scores", scores, scores in get_args(Outputs), "'softmax' or 'raw'")
        self.require("delta", delta, 0 < delta < inf, "above 0")
        self.scores = scores
        self.in_torch = nn.HuberLoss(reduction=reduction, delta=delta)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.in_torch(outputs(scores, self.scores), one_hot(labels, scores))

    def read(self, scores: Tensor) -> Tensor:
        """The softmax it was trained on, or the nearest probabilities to the raw scores."""
        return scores.softmax(dim=1) if self.scores == "softmax" else nearest_in_simplex(scores)


# Margins: the true class's score has to exceed the others' by so much.


class MarginRankingLoss(ClassificationLoss):
    """What the true class's score lacks to be `margin` >= 0 above each other class's.

    "mean" is over the B x (C - 1) pairs. torch's default margin of 0 makes it the perceptron's
    loss: equal scores cost nothing, and nothing keeps them apart. 1 is the better start.
    """

    def __init__(self, margin: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.require("margin", margin, 0 <= margin < inf, "at least 0")
        self.in_torch = nn.MarginRankingLoss(margin, reduction=reduction)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        lower = others(labels, scores)
        higher = scores.gather(1, labels[:, None]).expand_as(lower)
        return self.in_torch(higher, lower, torch.ones_like(lower))


class MultiLabelMarginLoss(ClassificationLoss):
    """What the true class's score lacks to be 1 above each other class's, summed over them, by C.

    "mean" is over the B pictures. The same function as MultiMarginLoss with its defaults.
    """

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        # torch reads a row as a list of true classes that ends at the first -1.
        end = labels.new_full((len(labels), scores.shape[1] - 1), -1)
        target = torch.cat([labels[:, None], end], dim=1)
        return F.multilabel_margin_loss(scores, target, reduction=self.reduction)


class MultiMarginLoss(ClassificationLoss):
    """MultiLabelMarginLoss with each lack to the power `p` and for any `margin` >= 0.

    "mean" is over the B pictures (Weston and Watkins, 1999). `weight` holds one number per class;
    the label's counts.
    """

    def __init__(
        self,
        p: Literal[1, 2] = 1,
        margin: float = 1.0,
        weight: PerClass = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction)
        self.require("p", p, p in (1, 2), "1 or 2")
        self.require("margin", margin, 0 <= margin < inf, "at least 0")
        self.keep_per_class("weight", weight)
        self.p, self.margin = p, margin

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        weight = self.per_class("weight", scores)
        return F.multi_margin_loss(
            scores, labels, self.p, self.margin, weight, reduction=self.reduction
        )


# Embeddings: the scores are a point whose place is the corner of its class.


class TripletMarginLoss(ClassificationLoss):
    """What the nearest other corner lacks to be `margin` > 0 further away than the true one.

    The anchor is the scores; the distance is the `p`-norm, 1 <= p < inf, of a difference to which
    `eps` > 0 is added. Corners are 2^(1/p) apart, which is the largest margin within reach; at
    p = 1 a score outside 0..1 has no gradient. `swap` lets the true corner stand in for the anchor
    where it is nearer to the other one (Balntas et al., 2016). "mean" is over the B pictures.
    """

    def __init__(
        self,
        margin: float = 1.0,
        p: float = 2.0,
        eps: float = 1e-6,
        swap: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction)
        self.require("margin", margin, 0 < margin < inf, "above 0")
        self.require("p", p, 1 <= p < inf, "at least 1 and finite")
        self.require("eps", eps, 0 < eps < inf, "above 0")
        self.in_torch = nn.TripletMarginLoss(margin, p, eps, swap, reduction=reduction)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.in_torch(scores, one_hot(labels, scores), hardest_other(labels, scores))

    def read(self, scores: Tensor) -> Tensor:
        """The nearest probabilities to the point."""
        return nearest_in_simplex(scores)


class TripletMarginWithDistanceLoss(ClassificationLoss):
    """TripletMarginLoss with a `distance` by name, where torch takes a function.

    "euclidean" is TripletMarginLoss itself. "squared_euclidean" is a hinge on twice the difference
    of the true and the highest other score (Crammer and Singer, 2001); corners are 2 apart.
    "cosine" is 1 - cosine, blind to the scores' length; corners are 1 apart. "mean" is over the
    B pictures.
    """

    def __init__(
        self,
        distance: Distance = "euclidean",
        margin: float = 1.0,
        swap: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction)
        known = " or ".join(map(repr, get_args(Distance)))
        self.require("distance", distance, distance in get_args(Distance), known)
        self.require("margin", margin, 0 < margin < inf, "above 0")
        self.distance, self.margin, self.swap = distance, margin, swap

    def between(self, points: Tensor, targets: Tensor) -> Tensor:
        if self.distance == "squared_euclidean":
            return (points - targets).square().sum(dim=1)
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(points, targets)
        return F.pairwise_distance(points, targets)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.triplet_margin_with_distance_loss(
            scores,
            one_hot(labels, scores),
            hardest_other(labels, scores),
            distance_function=self.between,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )

    def read(self, scores: Tensor) -> Tensor:
        """The nearest probabilities to the point, or to its direction where only that counts."""
        return nearest_in_simplex(
            F.normalize(scores, dim=1) if self.distance == "cosine" else scores
        )


class HingeEmbeddingLoss(ClassificationLoss):
    """Distance to the true corner, and what the distance to each other lacks to `margin` >= 0.

    "mean" is over the B x C pairs of a picture and a corner. Corners are 1.414 apart, which is
    the largest margin within reach.
    """

    def __init__(self, margin: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.require("margin", margin, 0 <= margin < inf, "at least 0")
        self.in_torch = nn.HingeEmbeddingLoss(margin, reduction=reduction)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        # cdist's faster mode goes through squares, which hides small distances behind large scores.
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(scores, corners(scores), compute_mode=mode)
        return self.in_torch(distances, signs(labels, scores))

    def read(self, scores: Tensor) -> Tensor:
        """The nearest probabilities to the point."""
        return nearest_in_simplex(scores)


class CosineEmbeddingLoss(ClassificationLoss):
    """1 - cosine to the true corner, and what the cosine to each other exceeds `margin` by.

    `margin` is in -1..1. Blind to the scores' length. "mean" is over the B x C pairs of a picture
    and a corner; torch wants them written out, which takes B x C x C numbers.
    """

    def __init__(self, margin: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.require("margin", margin, -1 <= margin <= 1, "in -1..1")
        self.in_torch = nn.CosineEmbeddingLoss(margin, reduction=reduction)

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        B, C = scores.shape
        points, targets = scores.repeat_interleave(C, dim=0), corners(scores).repeat(B, 1)
        return self.in_torch(points, targets, signs(labels, scores).flatten())

    def read(self, scores: Tensor) -> Tensor:
        """The nearest probabilities to the point's direction."""
        return nearest_in_simplex(F.normalize(scores, dim=1))


# Sequences: the label is a sequence of one symbol, read off one step.


class CTCLoss(ClassificationLoss):
    """Connectionist temporal classification of a one-symbol sequence (Graves et al., 2006).

    The blank is an extra class, number C, whose score is fixed at 0. Nats; "mean" is over the B
    pictures. `zero_infinity` drops pictures whose loss is infinite. On CUDA torch's gradient is
    not deterministic.
    """

    def __init__(self, zero_infinity: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.zero_infinity = zero_infinity

    def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
        B, C = scores.shape
        log_probs = F.pad(scores, (0, 1)).log_softmax(dim=1)  # (B, C + 1)
        ones = torch.ones(B, dtype=torch.int64)  # lengths, on the CPU, where torch reads them
        return F.ctc_loss(
            log_probs[None], labels[:, None], ones, ones, C, self.reduction, self.zero_infinity
        )
