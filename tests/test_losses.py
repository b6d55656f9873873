"""Each loss is what torch computes, is differentiable, survives half precision, and trains.

The losses are found by themselves, in every combination of their Literal and bool settings, so
that a new one is tested as soon as it is written. Only two things are kept by hand: what torch
says of hand-made targets (a test tells when one is missing) and learning rates.
"""

import gc
import inspect
import itertools
import textwrap
import typing
import warnings
from typing import Any

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research import losses
from research.losses import ClassificationLoss
from research.networks import CNN


def every_loss(base: Any = ClassificationLoss) -> list[type[ClassificationLoss]]:
    found = []
    for loss in base.__subclasses__():
        if loss.__module__ == losses.__name__ and not inspect.isabstract(loss):
            found.append(loss)
        found += every_loss(loss)
    return found


def variants(loss: type[ClassificationLoss]) -> list[dict]:
    """Every combination of the settings that have few values."""
    choices: dict[str, tuple] = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if typing.get_origin(parameter.annotation) is typing.Literal and name != "reduction":
            choices[name] = typing.get_args(parameter.annotation)
        elif parameter.annotation is bool:
            choices[name] = (False, True)
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


LOSSES = every_loss()
by_loss = pytest.mark.parametrize("Loss", LOSSES, ids=lambda loss: loss.__name__)
by_variant = pytest.mark.parametrize(
    ("Loss", "settings"),
    [
        pytest.param(Loss, settings, id="-".join([Loss.__name__, *map(str, settings.values())]))
        for Loss in LOSSES
        for settings in variants(Loss)
    ],
)


def example(loss: ClassificationLoss, seed: int = 0, B: int = 4, C: int = 5):
    """Random scores of the shape that the loss takes, in float64, and labels."""
    generator = torch.Generator().manual_seed(seed)
    cells = (2, 3) if loss.per_cell else ()
    scores = torch.randn(B, C, *cells, generator=generator, dtype=torch.float64)
    return scores, torch.randint(C, (B, *cells), generator=generator)


def as_cells(loss: ClassificationLoss, scores: Tensor) -> Tensor:
    return scores[:, :, None, None].expand(-1, -1, 2, 3) if loss.per_cell else scores


# What torch says of targets made by hand.

SCORES = torch.tensor(
    [[0.5, -1.2, 2.0, 0.3], [-0.7, 1.5, 0.2, -2.1], [1.1, 0.4, -0.6, -0.2]], dtype=torch.float64
)
LABELS = torch.tensor([2, 0, 3])
CORNERS = torch.eye(4, dtype=torch.float64)
ONE_HOT = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
SIGNS = torch.tensor([[-1, -1, 1, -1], [1, -1, -1, -1], [-1, -1, -1, 1]], dtype=torch.float64)
SMOOTHED = torch.tensor(  # 0.8 of the one-hot, and 0.2 shared by four
    [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]],
    dtype=torch.float64,
)
HARDEST = CORNERS[[0, 1, 0]]  # the highest score that is not the label's
TRUE_OF_PAIR, OTHER_OF_PAIR = torch.tensor(
    [[2.0, 2.0, 2.0, -0.7, -0.7, -0.7, -0.2, -0.2, -0.2],
     [0.5, -1.2, 0.3, 1.5, 0.2, -2.1, 1.1, 0.4, -0.6]],
    dtype=torch.float64,
)  # fmt: skip
LISTS = torch.tensor([[2, -1, -1, -1], [0, -1, -1, -1], [3, -1, -1, -1]])
WEIGHT = [1.0, 2.0, 0.5, 4.0]
W = torch.tensor(WEIGHT, dtype=torch.float64)
DISTANCES = (SCORES[:, None] - CORNERS).norm(dim=2)
VARIANCE = torch.full((3, 4), 0.3, dtype=torch.float64)
LOG_PROBS = SCORES.log_softmax(1)
MAPS = torch.stack([SCORES, SCORES.flip(0)], dim=-1)[..., None]  # (3, 4, 2, 1)
MAP_LABELS = torch.tensor([[[2], [3]], [[0], [0]], [[3], [1]]])


def ctc(r: str, zero_infinity: bool) -> Tensor:
    """The blank first, where torch has it by default, and so every class one further on."""
    log_probs = torch.cat([torch.zeros(3, 1).double(), SCORES], dim=1).log_softmax(1)
    sequences = LABELS[:, None] + 1
    loss = nn.CTCLoss(reduction=r, zero_infinity=zero_infinity)
    return loss(log_probs[None], sequences, (1, 1, 1), (1, 1, 1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(a, b)


def squared(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum(1)


REFERENCES: dict[str, list[tuple[dict, Any]]] = {
    "CrossEntropyLoss": [
        ({}, lambda r: nn.CrossEntropyLoss(reduction=r)(SCORES, LABELS)),
        (
            {"weight": WEIGHT, "ignore_index": 0, "label_smoothing": 0.2},
            lambda r: nn.CrossEntropyLoss(W, None, 0, None, r, 0.2)(SCORES, LABELS),
        ),
    ],
    "CrossEntropyLoss2d": [
        ({}, lambda r: nn.CrossEntropyLoss(reduction=r)(MAPS, MAP_LABELS)),
        (
            {"weight": WEIGHT, "ignore_index": 3, "label_smoothing": 0.2},
            lambda r: nn.CrossEntropyLoss(W, None, 3, None, r, 0.2)(MAPS, MAP_LABELS),
        ),
    ],
    "NLLLoss": [
        ({}, lambda r: nn.NLLLoss(reduction=r)(LOG_PROBS, LABELS)),
        (
            {"weight": WEIGHT, "ignore_index": 0},
            lambda r: nn.NLLLoss(W, None, 0, None, r)(LOG_PROBS, LABELS),
        ),
    ],
    "KLDivLoss": [
        ({"label_smoothing": 0.0}, lambda r: nn.KLDivLoss(reduction=r)(LOG_PROBS, ONE_HOT)),
        ({"label_smoothing": 0.2}, lambda r: nn.KLDivLoss(reduction=r)(LOG_PROBS, SMOOTHED)),
    ],
    "BCELoss": [
        ({}, lambda r: nn.BCELoss(reduction=r)(SCORES.sigmoid(), ONE_HOT)),
        ({"weight": WEIGHT}, lambda r: nn.BCELoss(W, reduction=r)(SCORES.sigmoid(), ONE_HOT)),
    ],
    "BCEWithLogitsLoss": [
        ({}, lambda r: nn.BCEWithLogitsLoss(reduction=r)(SCORES, ONE_HOT)),
        (
            {"weight": WEIGHT, "pos_weight": WEIGHT[::-1]},
            lambda r: nn.BCEWithLogitsLoss(W, reduction=r, pos_weight=W.flip(0))(SCORES, ONE_HOT),
        ),
    ],
    "MultiLabelSoftMarginLoss": [
        ({}, lambda r: nn.MultiLabelSoftMarginLoss(reduction=r)(SCORES, ONE_HOT)),
        (
            {"weight": WEIGHT},
            lambda r: nn.MultiLabelSoftMarginLoss(W, reduction=r)(SCORES, ONE_HOT),
        ),
    ],
    "SoftMarginLoss": [({}, lambda r: nn.SoftMarginLoss(reduction=r)(SCORES, SIGNS))],
    "PoissonNLLLoss": [
        ({}, lambda r: nn.PoissonNLLLoss(reduction=r)(SCORES, ONE_HOT)),
        (
            {"log_input": False, "full": True, "eps": 0.01},
            lambda r: nn.PoissonNLLLoss(False, True, None, 0.01, None, r)(
                F.softplus(SCORES), ONE_HOT
            ),
        ),
    ],
    "GaussianNLLLoss": [
        (
            {"variance": 0.3, "full": True},
            lambda r: nn.GaussianNLLLoss(full=True, reduction=r)(SCORES, ONE_HOT, VARIANCE),
        ),
        (
            {"variance": 0.3, "eps": 0.5},
            lambda r: nn.GaussianNLLLoss(eps=0.5, reduction=r)(SCORES, ONE_HOT, VARIANCE),
        ),
        (
            {"variance": 2},
            lambda r: nn.GaussianNLLLoss(reduction=r)(SCORES, ONE_HOT, VARIANCE / 0.15),
        ),
    ],
    "L1Loss": [
        ({}, lambda r: nn.L1Loss(reduction=r)(SCORES.softmax(1), ONE_HOT)),
        ({"scores": "raw"}, lambda r: nn.L1Loss(reduction=r)(SCORES, ONE_HOT)),
    ],
    "MSELoss": [
        ({}, lambda r: nn.MSELoss(reduction=r)(SCORES.softmax(1), ONE_HOT)),
        ({"scores": "raw"}, lambda r: nn.MSELoss(reduction=r)(SCORES, ONE_HOT)),
    ],
    "SmoothL1Loss": [
        (
            {"beta": 0.2},
            lambda r: nn.SmoothL1Loss(reduction=r, beta=0.2)(SCORES.softmax(1), ONE_HOT),
        ),
        ({"scores": "raw"}, lambda r: nn.SmoothL1Loss(reduction=r)(SCORES, ONE_HOT)),
    ],
    "HuberLoss": [
        (
            {"delta": 0.2},
            lambda r: nn.HuberLoss(reduction=r, delta=0.2)(SCORES.softmax(1), ONE_HOT),
        ),
        ({"scores": "raw"}, lambda r: nn.HuberLoss(reduction=r)(SCORES, ONE_HOT)),
    ],
    "MarginRankingLoss": [
        (
            {"margin": margin},
            lambda r, margin=margin: nn.MarginRankingLoss(margin, reduction=r)(
                TRUE_OF_PAIR, OTHER_OF_PAIR, torch.ones(9)
            ),
        )
        for margin in (0.0, 1.5)
    ],
    "MultiLabelMarginLoss": [({}, lambda r: nn.MultiLabelMarginLoss(reduction=r)(SCORES, LISTS))],
    "MultiMarginLoss": [
        ({}, lambda r: nn.MultiMarginLoss(reduction=r)(SCORES, LABELS)),
        (
            {"p": 2, "margin": 0.5, "weight": WEIGHT},
            lambda r: nn.MultiMarginLoss(2, 0.5, W, reduction=r)(SCORES, LABELS),
        ),
    ],
    "TripletMarginLoss": [
        ({}, lambda r: nn.TripletMarginLoss(reduction=r)(SCORES, ONE_HOT, HARDEST)),
        (
            {"margin": 0.4, "p": 3.0, "eps": 0.1, "swap": True},
            lambda r: nn.TripletMarginLoss(0.4, 3.0, 0.1, True, reduction=r)(
                SCORES, ONE_HOT, HARDEST
            ),
        ),
    ],
    "TripletMarginWithDistanceLoss": [
        (
            {"distance": name, "margin": 0.7, "swap": swap},
            lambda r, function=function, swap=swap: nn.TripletMarginWithDistanceLoss(
                distance_function=function, margin=0.7, swap=swap, reduction=r
            )(SCORES, ONE_HOT, HARDEST),
        )
        for name, function in (
            ("euclidean", None), ("squared_euclidean", squared), ("cosine", cosine)
        )
        for swap in (False, True)
    ],
    "HingeEmbeddingLoss": [
        (
            {"margin": margin},
            lambda r, margin=margin: nn.HingeEmbeddingLoss(margin, reduction=r)(DISTANCES, SIGNS),
        )
        for margin in (1.0, 2.5)
    ],
    "CosineEmbeddingLoss": [
        (
            {"margin": margin},
            lambda r, margin=margin: nn.CosineEmbeddingLoss(margin, reduction=r)(
                SCORES[[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]],
                CORNERS[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]],
                SIGNS.flatten(),
            ),
        )
        for margin in (0.0, 0.3)
    ],
    "CTCLoss": [
        ({"zero_infinity": zero}, lambda r, zero=zero: ctc(r, zero)) for zero in (False, True)
    ],
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("name", "settings", "torch_says"),
    [
        pytest.param(name, *case, id=f"{name}-{number}")
        for name, cases in REFERENCES.items()
        for number, case in enumerate(cases)
    ],
)
def test_loss_equals_torch_on_hand_made_targets(name, settings, torch_says, reduction):
    loss = getattr(losses, name)(**settings, reduction=reduction)
    found = loss(MAPS, MAP_LABELS) if loss.per_cell else loss(SCORES, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the "mean" of KLDivLoss
        torch.testing.assert_close(found, torch_says(reduction))


@by_loss
def test_loss_of_torch_has_a_reference(Loss):
    assert Loss.__name__ in REFERENCES or not hasattr(nn, Loss.__name__)


def test_no_loss_of_torch_is_missing():
    in_torch = {name for name in dir(nn) if name.endswith(("Loss", "Loss2d"))}
    own_last_layer = {"AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss"}
    ours = {Loss.__name__ for Loss in LOSSES}
    assert in_torch - own_last_layer - {"NLLLoss2d"} == ours - {"CrossEntropyLoss2d"}


@by_loss
def test_settings_and_defaults_are_those_of_torch(Loss):
    torch_class = getattr(nn, Loss.__name__, nn.CrossEntropyLoss)
    theirs = inspect.signature(torch_class).parameters
    made_by_the_encoding = {"blank", "log_target", "distance_function"}
    ours = inspect.signature(Loss).parameters
    for name in theirs.keys() - {"size_average", "reduce"} - made_by_the_encoding:
        assert ours[name].default == theirs[name].default


# The tutorials' values. Their targets are not one-hot, so the same differences are moved to where
# the target is.


@pytest.mark.parametrize(
    ("Loss", "reduction", "value"),
    [(losses.L1Loss, "mean", 0.6667), (losses.L1Loss, "sum", 2), (losses.MSELoss, "mean", 1.3333)],
)
def test_distance_of_1_2_3_from_1_2_5_is_the_tutorials(Loss, reduction, value):
    difference = torch.tensor([[1.0, 2.0, 3.0]]) - torch.tensor([[1.0, 2.0, 5.0]])
    scores = torch.tensor([[0.0, 1.0, 0.0]]) + difference
    loss = Loss(scores="raw", reduction=reduction)(scores, torch.tensor([1]))
    assert loss.item() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("Loss", [losses.CrossEntropyLoss, losses.NLLLoss])
def test_cross_entropy_of_the_tutorials_scores(Loss):
    scores = torch.tensor([[0.1, 0.2, 0.3]])
    assert Loss()(scores, torch.tensor([1])).item() == pytest.approx(1.1019, abs=5e-5)


@pytest.mark.parametrize("Loss", [losses.BCELoss, losses.BCEWithLogitsLoss, losses.SoftMarginLoss])
def test_binary_cross_entropy_of_the_tutorials_3_by_3_example(Loss):
    """The worked example of BCELoss that many blogs copy; its rows have 2, 3, and 0 true classes.

    A one-hot target gives the same value because a logit of x for the target 0 costs what -x does
    for the target 1.
    """
    logits = torch.tensor(
        [[1.9072, 1.1079, 1.4906], [-0.6584, -0.0512, 0.7608], [-0.0614, 0.6583, 0.1095]]
    )
    target = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]])
    scores = torch.where(target == torch.eye(3), logits, -logits)
    assert Loss()(scores, torch.tensor([0, 1, 2])).item() == pytest.approx(0.8000, abs=1e-4)


# Every loss, in every variant.


@by_variant
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_is_that_of_finite_differences(Loss, settings, reduction):
    loss = Loss(**settings, reduction=reduction)
    scores, labels = example(loss)
    assert loss(scores, labels).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda s: loss(s, labels), scores.requires_grad_())


@by_variant
def test_no_class_is_special(Loss, settings):
    loss = Loss(**settings)
    scores, labels = example(loss)
    order = torch.tensor([3, 0, 4, 2, 1])
    renamed = order.argsort()[labels]
    torch.testing.assert_close(loss(scores[:, order], renamed), loss(scores, labels))


@by_variant
def test_sum_is_mean_times_what_the_mean_is_over(Loss, settings):
    B, C, H, W = 4, 5, 2, 3
    mean, total = Loss(**settings), Loss(**settings, reduction="sum")
    counts = [total(*example(mean, seed)) / mean(*example(mean, seed)) for seed in (0, 1)]
    per_pair = Loss is losses.MarginRankingLoss
    known = [B * H * W] if mean.per_cell else [B * (C - 1)] if per_pair else [B, B * C]
    assert counts[0].item() in [pytest.approx(count) for count in known]
    assert counts[1].item() == pytest.approx(counts[0].item())


@by_variant
@pytest.mark.parametrize("size", [80.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_extreme_scores_stay_finite_under_bf16_autocast(Loss, settings, size, dtype):
    loss = Loss(**settings)
    scores, labels = example(loss, B=16)
    scores = (size * scores.sign()).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(scores, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert scores.grad.isfinite().all()


@by_variant
def test_half_precision_is_computed_in_float32(Loss, settings):
    loss = Loss(**settings)
    scores, labels = example(loss)
    halves = scores.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(halves, labels).item() == loss(halves.float(), labels).item()


def descend(loss: ClassificationLoss, free: Tensor, expand: int, labels: Tensor) -> Tensor:
    """Where gradient descent takes free scores; each row is used `expand` times."""
    free = free.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss(as_cells(loss, free.repeat_interleave(expand, dim=0)), labels).backward()
        optimizer.step()
    return free.detach()


@by_variant
def test_minimum_has_the_label_as_arg_max(Loss, settings):
    free = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    found = descend(Loss(**settings), free, 1, labels)
    assert found.argmax(1).tolist() == labels.tolist()


@by_variant
def test_minimum_under_label_noise_has_the_majority_as_arg_max(Loss, settings):
    if Loss is losses.MarginRankingLoss:
        settings = settings | {"margin": 1.0}  # at margin 0 equal scores are a minimum too
    free = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3] * 6 + [1] * 3 + [0] + [2] * 6 + [4] * 4)
    assert descend(Loss(**settings), free, 10, labels).argmax(1).tolist() == [3, 2]


LEARNING_RATES = {  # for SGD with momentum 0.9, where 0.1 is not good; measured on this test
    "PoissonNLLLoss": 0.08,
    "L1Loss": 1.0,
    "MSELoss": 1.0,
    "SmoothL1Loss": 1.0,
    "HuberLoss": 1.0,
    "CosineEmbeddingLoss": 0.2,
    "TripletMarginLoss": 0.01,
    "TripletMarginWithDistanceLoss": 0.01,
}


def noisy_patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, 16, 16) of ten fixed random patterns in as much noise, and labels."""
    patterns = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    return patterns[labels] + torch.randn(count, 3, 16, 16, generator=generator), labels


@by_loss
def test_loss_trains_the_cnn(Loss):
    torch.manual_seed(0)
    loss = Loss()
    network = CNN(image_size=16, widths=(8, 8, 16), hidden=32, normalization="BatchNorm2d")
    score = network.cell_scores if loss.per_cell else network
    rate = LEARNING_RATES.get(Loss.__name__, 0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    pictures, labels = noisy_patterns(32 * 80, seed=1)
    for batch, its_labels in zip(pictures.split(32), labels.split(32), strict=True):
        optimizer.zero_grad()
        loss(score(batch), its_labels).backward()
        optimizer.step()
    pictures, labels = noisy_patterns(500, seed=2)
    with torch.no_grad():
        votes = score(pictures).flatten(2).mean(2) if loss.per_cell else score(pictures)
    accuracy = (votes.argmax(1) == labels).float().mean().item()
    assert accuracy > 0.5  # chance is 0.1


@by_loss
def test_loss_is_found_by_its_name_with_its_defaults(Loss):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=ClassificationLoss)
    found = parser.parse_args([f"--loss={Loss.__name__}", "--loss.reduction=sum"]).loss
    defaults = {name: p.default for name, p in inspect.signature(Loss).parameters.items()}
    assert found.init_args.as_dict() == defaults | {"reduction": "sum"}
    made = parser.instantiate(parser.parse_args([f"--loss={Loss.__name__}"])).loss
    assert type(made) is Loss


def test_map_takes_a_label_per_picture_or_per_cell():
    loss = losses.CrossEntropyLoss2d()
    scores, labels = example(loss)[0], torch.tensor([1, 0, 4, 2])
    per_cell = labels[:, None, None].expand(4, 2, 3)
    assert loss(scores, labels).item() == loss(scores, per_cell).item()


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_soft_margin_does_not_overflow_as_in_torch(size):
    scores = torch.tensor([[size, -size]], requires_grad=True)
    losses.SoftMarginLoss()(scores, torch.tensor([1])).backward()
    assert scores.grad.tolist() == [[0.5, -0.5]]


def test_weights_follow_the_device_and_dtype_but_stay_out_of_checkpoints():
    loss = losses.CrossEntropyLoss(weight=[1.0, 2.0, 3.0])
    assert not loss.state_dict()
    assert loss.to("meta").weight.device.type == "meta"
    whole = losses.CrossEntropyLoss(weight=[1.0, 2.0, 3.0])
    halved = losses.CrossEntropyLoss(weight=[1.0, 2.0, 3.0]).to(torch.bfloat16)
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    assert halved(scores, labels).item() == whole(scores, labels).item()


def test_loss_of_the_module_docstring_works_and_has_under_ten_lines():
    text = losses.__doc__.split("all that the command line needs:\n")[1].split("Not here:")[0]
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) < 10
    names = vars(losses) | {"__name__": "of_a_user"}
    exec(textwrap.dedent(text), names)
    focal = names.pop("FocalLoss")
    for reduction in ("mean", "sum"):
        cross_entropy = losses.CrossEntropyLoss(reduction=reduction)
        value = focal(gamma=0.0, reduction=reduction)(SCORES, LABELS)
        torch.testing.assert_close(value, cross_entropy(SCORES, LABELS))
    assert focal()(SCORES.bfloat16(), LABELS).dtype == torch.float32
    del focal
    gc.collect()  # or other tests would find this class among the losses


# Probabilities.


def awkward_scores(dtype: torch.dtype) -> Tensor:
    """Rows on which naive formulas give 0/0, infinity minus infinity, or ties that were none."""
    largest = torch.finfo(dtype).max
    rows = [
        [0.0, 0.0, 0.0, 0.0],
        [20.0, 40.0, 30.0, -5.0],
        [1000.0, 3000.0, -1000.0, 0.0],
        [-1000.0, -4000.0, -900.0, -2000.0],
        [0.0, 2.0**-12, 2.0**-13, 0.0],
        [1.25, 1.5, 0.0, -0.25],
        [-0.5, -0.25, -3.0, -0.75],
        [largest, -largest, 0.0, largest],
        [0.0, float("inf"), -float("inf"), 0.0],
        [-float("inf")] * 4,
    ]
    drawn = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3
    return torch.cat([torch.tensor(rows, dtype=dtype), drawn.to(dtype)])


@by_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_sum_to_one_and_decide_as_the_scores(Loss, settings, dtype):
    scores = awkward_scores(dtype)
    probabilities = Loss(**settings).probabilities(scores)
    assert probabilities.shape == scores.shape
    assert probabilities.dtype == torch.promote_types(dtype, torch.float32)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities[:, 0]))
    assert probabilities.argmax(1).tolist() == scores.argmax(1).tolist()


@by_variant
def test_probabilities_of_nothing_but_nan_are_nan(Loss, settings):
    scores = torch.tensor([[float("nan")] * 4, [0.0, 1.0, 2.0, 3.0]])
    probabilities = Loss(**settings).probabilities(scores)
    assert probabilities[0].isnan().all()
    assert probabilities[1].sum().item() == pytest.approx(1)


@by_variant
def test_probabilities_export_for_any_number_of_pictures(Loss, settings):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = Loss(**settings)

        def forward(self, scores):
            return self.loss.probabilities(scores)

    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about pytrees
        exported = torch.export.export(Reader(), (scores,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(scores[:3]), Reader()(scores[:3]))


@pytest.mark.parametrize("name", ["BCELoss", "BCEWithLogitsLoss", "SoftMarginLoss"])
def test_probabilities_of_binary_losses_are_shares_of_sigmoids(name):
    shares = SCORES.sigmoid() / SCORES.sigmoid().sum(1, keepdim=True)
    torch.testing.assert_close(getattr(losses, name)().probabilities(SCORES), shares)


def test_probabilities_of_rates_are_shares_of_rates():
    rates = F.softplus(SCORES)
    loss = losses.PoissonNLLLoss(log_input=False)
    torch.testing.assert_close(loss.probabilities(SCORES), rates / rates.sum(1, keepdim=True))
    torch.testing.assert_close(losses.PoissonNLLLoss().probabilities(SCORES), SCORES.softmax(1))


@pytest.mark.parametrize("name", ["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"])
def test_probabilities_of_raw_scores_are_the_nearest_ones(name):
    """Kept where they are probabilities; never further from any corner than the scores are."""
    loss = getattr(losses, name)(scores="raw")
    shares = SCORES.softmax(1)
    torch.testing.assert_close(loss.probabilities(shares), shares)
    torch.testing.assert_close(loss.probabilities(CORNERS), CORNERS)
    given = torch.tensor([[0.3, 0.0], [1.2, 0.1], [-0.1, -0.3]])
    nearest = torch.tensor([[0.65, 0.35], [1.0, 0.0], [0.6, 0.4]])
    torch.testing.assert_close(loss.probabilities(given), nearest)
    distance, was = torch.cdist(loss.probabilities(SCORES), CORNERS), torch.cdist(SCORES, CORNERS)
    assert (distance <= was).all()


@by_variant
def test_probabilities_of_the_minimum_are_sure_of_the_label(Loss, settings):
    free = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    loss = Loss(**settings)
    sure = loss.probabilities(descend(loss, free, 1, labels)).gather(1, labels[:, None])
    assert sure.mean() > 0.3  # chance: 0.2


# Refusals.


@by_loss
def test_reduction_none_is_refused_in_one_sentence(Loss):
    with pytest.raises(ValueError, match=r"reduction must be 'mean' or 'sum'.*'none'") as refusal:
        Loss(reduction="none")
    assert str(refusal.value).count(".") == 1


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        *[("CrossEntropyLoss", "label_smoothing", value) for value in (-0.1, 1.0, float("nan"))],
        ("CrossEntropyLoss2d", "label_smoothing", 1.5),
        ("KLDivLoss", "label_smoothing", -0.1),
        ("CrossEntropyLoss", "weight", [1.0, -1.0]),
        ("NLLLoss", "weight", [0.0, 0.0]),
        ("BCELoss", "weight", [float("inf"), 1.0]),
        ("BCEWithLogitsLoss", "pos_weight", [-1.0]),
        ("MultiMarginLoss", "weight", []),
        ("PoissonNLLLoss", "eps", 0.0),
        ("GaussianNLLLoss", "variance", 0.0),
        ("GaussianNLLLoss", "eps", -1.0),
        *[(name, "scores", "Softmax") for name in ("L1Loss", "MSELoss", "SmoothL1Loss")],
        ("HuberLoss", "scores", "logits"),
        ("SmoothL1Loss", "beta", -0.5),
        ("HuberLoss", "delta", 0.0),
        ("MarginRankingLoss", "margin", -1.0),
        ("MultiMarginLoss", "margin", float("inf")),
        ("MultiMarginLoss", "p", 3),
        ("TripletMarginLoss", "margin", 0.0),
        ("TripletMarginLoss", "p", 0.5),
        ("TripletMarginLoss", "eps", 0.0),
        ("TripletMarginWithDistanceLoss", "margin", -1.0),
        ("TripletMarginWithDistanceLoss", "distance", "Cosine"),
        ("HingeEmbeddingLoss", "margin", -0.1),
        ("CosineEmbeddingLoss", "margin", 1.1),
    ],
)
def test_setting_out_of_range_is_refused_by_name(name, setting, value):
    with pytest.raises(ValueError) as refusal:
        getattr(losses, name)(**{setting: value})
    message = str(refusal.value)
    assert message.startswith(f"{name}: {setting} must be ")
    assert message.endswith(f"it is {value!r}.")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (Loss.__name__, setting)
        for Loss in LOSSES
        for setting in inspect.signature(Loss).parameters
        if setting.endswith("weight")
    ],
)
def test_weight_of_wrong_length_is_refused_on_the_first_batch(name, setting):
    loss = getattr(losses, name)(**{setting: [1.0, 2.0]})
    with pytest.raises(ValueError, match=f"{name}: {setting} must be one number .* 5 classes"):
        loss(*example(loss))


@by_loss
def test_scores_or_labels_of_a_wrong_shape_are_refused(Loss):
    loss = Loss()
    scores, labels = example(loss)
    with pytest.raises(ValueError, match=f"{Loss.__name__}: scores' shape must be"):
        loss(scores[..., None], labels)
    for wrong in (labels[..., None], labels[:1]):
        with pytest.raises(ValueError, match=f"{Loss.__name__}: labels' shape must be"):
            loss(scores, wrong)
