"""Every optimizer and schedule of torch and ours: it trains, it resumes, it does what torch's does.

The classes are found, not listed: one that a new torch brings is tested from its first day.
"""

import copy
import inspect
import io
import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from research import optimizers
from research.optimizers import (
    LBFGS,
    LinearWarmupCosineAnnealingLR,
    Muon,
    OneCycleLR,
    SparseAdam,
    as_matrix,
    build_scheduler,
    interval_of,
)
from research.param_groups import hidden_matrices, parameter_groups

MEMORY_FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"]
)


def classes_in(module: ModuleType, base: type) -> dict[str, type]:
    return {
        name: member
        for name, member in vars(module).items()
        if inspect.isclass(member) and issubclass(member, base) and member is not base
        and not name.startswith("_")
    }  # fmt: skip


OPTIMIZERS = classes_in(torch.optim, Optimizer) | classes_in(optimizers, Optimizer)
SCHEDULERS = classes_in(lr_scheduler, LRScheduler) | classes_in(optimizers, LRScheduler)
MADE_OF_SCHEDULES = {"ChainedScheduler", "SequentialLR"}
CONFIGURABLE = sorted(SCHEDULERS.keys() - MADE_OF_SCHEDULES)

EVERY_OPTIMIZER = pytest.mark.parametrize("name", sorted(OPTIMIZERS))
EVERY_SCHEDULER = pytest.mark.parametrize("name", CONFIGURABLE)


def shrink(step: int) -> float:
    return 0.9**step


# What has no default in torch; everything else is left open.
REQUIRED: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": shrink},
    "MultiplicativeLR": {"lr_lambda": shrink},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 5]},
    "ExponentialLR": {"gamma": 0.8},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.01, "step_size_up": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    # With the default patience of ten epochs a short test would see nothing of it.
    "ReduceLROnPlateau": {"patience": 1, "threshold": 0.2},
}

# Torch's default rates are for other jobs than thirty steps of a tiny network.
RATES = dict.fromkeys(("SGD", "ASGD"), 0.1)
RATES |= dict.fromkeys(("Adam", "AdamW", "Adamax", "RAdam", "SparseAdam", "Adafactor"), 0.02)


def make_network(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )
    return network.to(memory_format=memory_format)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(32) % 4
    patterns = torch.randn(4, 3, 8, 8, generator=generator)
    return 2 * patterns[labels] + torch.randn(32, 3, 8, 8, generator=generator), labels


def make_optimizer(name: str, network: nn.Module, **arguments: Any) -> Optimizer:
    if name in RATES:
        arguments = {"lr": RATES[name], **arguments}
    return OPTIMIZERS[name](parameter_groups(network), **arguments)


def train(
    network: nn.Module, optimizer: Optimizer, steps: int, scheduler: LRScheduler | None = None
) -> list[float]:
    images, labels = make_batch()

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(closure)))
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(losses[-1])
        elif scheduler is not None:
            scheduler.step()
    return losses


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- every optimizer -----------------------------------------------------------------------------


def test_classes_are_found_and_ours_go_before_torchs():
    assert {"SGD", "Adafactor", "Rprop", "ASGD", "NAdam"} <= OPTIMIZERS.keys()
    assert (OPTIMIZERS["Muon"], OPTIMIZERS["LBFGS"]) == (Muon, LBFGS)
    assert {"ReduceLROnPlateau", "LambdaLR", "LinearWarmupCosineAnnealingLR"} <= set(CONFIGURABLE)
    assert SCHEDULERS["OneCycleLR"] is OneCycleLR


@EVERY_OPTIMIZER
@MEMORY_FORMATS
def test_optimizer_reduces_the_loss(name, memory_format):
    network = make_network(memory_format)
    losses = train(network, make_optimizer(name, network), 30)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


@EVERY_OPTIMIZER
@MEMORY_FORMATS
@pytest.mark.parametrize("decay", [True, False])
def test_resumed_optimizer_matches_unbroken_run(name, memory_format, decay):
    def start():
        network = make_network(memory_format)
        groups = parameter_groups(network, decay_biases_and_norms=decay)
        return network, OPTIMIZERS[name](groups)

    unbroken, optimizer = start()
    losses = train(unbroken, optimizer, 3)
    saved = through_a_file({"network": unbroken.state_dict(), "optimizer": optimizer.state_dict()})
    losses += train(unbroken, optimizer, 3)

    resumed, optimizer = start()
    train(resumed, optimizer, 1)  # whatever it remembers must go
    resumed.load_state_dict(saved["network"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(resumed, optimizer, 3) == losses[3:]
    assert_same_weights(resumed, unbroken)


@EVERY_OPTIMIZER
def test_biases_and_norms_do_not_decay_when_told(name):
    if "weight_decay" not in inspect.signature(OPTIMIZERS[name]).parameters:
        pytest.skip(f"{name} has no weight decay")
    network = make_network()
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.5)
    before = copy.deepcopy(network)
    arguments = {"lambd": 0.0} if name == "ASGD" else {}  # another decay of its own, on all alike
    optimizer = OPTIMIZERS[name](
        parameter_groups(network, decay_biases_and_norms=False), weight_decay=0.1, **arguments
    )
    for _ in range(2):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for (parameter_name, now), then in zip(
        network.named_parameters(), before.parameters(), strict=True
    ):
        if now.ndim < 2:
            assert torch.equal(now, then), parameter_name
        else:
            assert now.norm() < then.norm(), parameter_name


@EVERY_OPTIMIZER
def test_negative_learning_rate_is_refused(name):
    with pytest.raises(ValueError, match="-1"):
        OPTIMIZERS[name](parameter_groups(make_network()), lr=-1.0)


@pytest.mark.parametrize(
    ("name", "setting", "value", "allowed"),
    [
        ("Muon", "adamw_lr", -1.0, "at least 0"),
        ("Muon", "momentum", -0.5, "at least 0"),
        ("Muon", "ns_steps", 0, "from 1 to 99"),
        ("Muon", "ns_steps", 100, "from 1 to 99"),
        ("MuonSGD", "bias_lr", -1.0, "at least 0"),
        ("MuonSGD", "ns_steps", 0, "at least 1"),
    ],
)
def test_split_optimizers_name_the_argument_that_they_refuse(name, setting, value, allowed):
    with pytest.raises(ValueError, match=rf"^{setting}: {value} given.* {allowed}\.$"):
        OPTIMIZERS[name](parameter_groups(make_network()), **{setting: value})


# ---- parameter groups ----------------------------------------------------------------------------


class Unusual(nn.Module):
    """Layers whose parameters are easily taken for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2, 3))
        self.input = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm([4, 6, 6])
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Conv2d(4, 4, 3, bias=False)
        self.attention = nn.MultiheadAttention(4, 2)
        self.output = nn.Linear(4, 2)


def names_of(network: nn.Module, parameters: Iterable[nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in network.named_parameters() if id(parameter) in wanted}


def test_one_group_by_default_and_two_without_decay_of_biases_and_norms():
    network = Unusual()
    (everything,) = parameter_groups(network)
    assert list(map(id, everything["params"])) == list(map(id, network.parameters()))
    decayed, undecayed = parameter_groups(network, decay_biases_and_norms=False)
    assert "weight_decay" not in decayed and undecayed["weight_decay"] == 0
    assert names_of(network, undecayed["params"]) == {
        "input.bias", "norm.weight", "norm.bias", "attention.in_proj_bias",
        "attention.out_proj.bias", "output.bias",
    }  # fmt: skip
    assert len(decayed["params"]) + len(undecayed["params"]) == len(everything["params"])


def test_an_empty_group_is_left_out():
    network = nn.Linear(3, 2, bias=False)
    assert len(parameter_groups(network, decay_biases_and_norms=False)) == 1


def test_frozen_parameters_are_left_out_and_a_frozen_network_is_refused():
    network = make_network()
    network[0].requires_grad_(False)
    (group,) = parameter_groups(network)
    assert len(group["params"]) == len(list(network.parameters())) - 2
    # The frozen input layer stays the input layer.
    hidden = [group["params"][i] for i in group["hidden_matrices"]]
    assert names_of(network, hidden) == {"3.weight", "7.weight"}
    with pytest.raises(ValueError, match="no parameter to train"):
        parameter_groups(network.requires_grad_(False))


def test_hidden_matrices_are_the_weights_between_the_first_and_the_last_layer():
    network = Unusual()
    expected = {"hidden.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert names_of(network, hidden_matrices(network)) == expected
    for decay in (True, False):
        groups = parameter_groups(network, decay_biases_and_norms=decay)
        marked = [group["params"][i] for group in groups for i in group["hidden_matrices"]]
        assert names_of(network, marked) == expected


# ---- Muon ----------------------------------------------------------------------------------------


def set_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        # A gradient lies in memory like its weight, as autograd's does.
        parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten(1)


@MEMORY_FORMATS
@pytest.mark.parametrize("kernel", [(8, 6, 3, 3), (6, 8, 1, 1), (4, 1, 5, 5), (2, 2, 1, 3)])
def test_muon_steps_a_kernel_like_torch_steps_the_flattened_matrix(memory_format, kernel):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(kernel, generator=generator)
    weight = nn.Parameter(start.clone(memory_format=memory_format))
    flattened = nn.Parameter(start.flatten(1).clone())
    ours = Muon([weight], lr=0.1, weight_decay=0.2)
    torchs = torch.optim.Muon([flattened], lr=0.1, weight_decay=0.2)
    for _ in range(4):
        gradient = torch.randn(kernel, generator=generator)
        weight.grad = gradient.clone(memory_format=memory_format)
        flattened.grad = gradient.flatten(1).clone()
        ours.step()
        torchs.step()
    if memory_format == torch.contiguous_format:
        assert torch.equal(flat(weight), flattened)
    else:
        # The columns come in another order, and Newton-Schulz sums over them in bfloat16: four
        # steps of 0.1 times an orthogonal matrix, rounded to eight bits.
        torch.testing.assert_close(flat(weight), flattened.detach(), rtol=0, atol=0.01)
        assert weight.is_contiguous(memory_format=torch.channels_last)


@MEMORY_FORMATS
def test_a_kernel_is_seen_as_a_matrix_without_a_copy(memory_format):
    weight = torch.randn(8, 6, 3, 3).to(memory_format=memory_format)
    matrix = as_matrix(weight, weight)
    assert matrix.shape == (8, 54)
    assert matrix.data_ptr() == weight.data_ptr()
    assert torch.equal(matrix.sort().values, flat(weight).sort().values)


def test_muon_leaves_the_rest_to_adamw_exactly():
    network = make_network()
    reference = copy.deepcopy(network)
    muon = Muon(
        parameter_groups(network, decay_biases_and_norms=False),
        weight_decay=0.1, adamw_lr=0.01, adamw_betas=(0.8, 0.9), adamw_eps=1e-6,
    )  # fmt: skip
    adamw = torch.optim.AdamW(
        parameter_groups(reference, decay_biases_and_norms=False),
        lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6,
    )  # fmt: skip
    for seed in range(4):
        set_gradients(network, seed)
        set_gradients(reference, seed)
        muon.step()
        adamw.step()
    same = {
        name
        for (name, ours), torchs in zip(
            network.named_parameters(), reference.parameters(), strict=True
        )
        if torch.equal(ours, torchs)
    }
    assert same == {name for name, _ in network.named_parameters()} - {"3.weight", "7.weight"}


def test_muon_splits_plain_parameters_by_their_dimensions():
    network = make_network()
    muon = Muon(network.parameters())
    by_algorithm = {group["algorithm"]: group["params"] for group in muon.param_groups}
    assert all(parameter.ndim >= 2 for parameter in by_algorithm["Muon"])
    assert all(parameter.ndim < 2 for parameter in by_algorithm["AdamW"])
    assert sum(map(len, by_algorithm.values())) == len(list(network.parameters()))


def test_a_schedule_moves_both_parts_of_muon_from_their_own_rates():
    network = make_network()
    muon = Muon(parameter_groups(network), lr=0.02, adamw_lr=0.001)
    scheduler = build_scheduler(OneCycleLR, muon, 10, 1, pct_start=0.5)
    rates, momenta = [], []
    for _ in range(10):
        rates.append([group["lr"] for group in muon.param_groups])
        momenta.append(muon.param_groups[0]["momentum"])
        train(network, muon, 1, scheduler)
    assert [max(column) for column in zip(*rates, strict=True)] == [0.02, 0.001]
    assert [group["algorithm"] for group in muon.param_groups] == ["Muon", "AdamW"]
    assert (momenta[0], min(momenta)) == (0.95, 0.85)
    assert muon.param_groups[1]["betas"] == (0.9, 0.95)


def test_a_group_of_muon_may_have_its_own_settings():
    network = make_network()
    groups = [
        {"params": network[3].parameters(), "lr": 0.3, "weight_decay": 0.0},
        {"params": network[7].weight},
    ]
    muon = Muon(groups, lr=0.1, weight_decay=0.5)
    assert [(g["algorithm"], g["lr"], g["weight_decay"]) for g in muon.param_groups] == [
        ("Muon", 0.3, 0.0), ("AdamW", 0.3, 0.0), ("Muon", 0.1, 0.5),
    ]  # fmt: skip


def test_muon_follows_a_network_into_another_memory_format():
    network = make_network()
    muon = Muon(parameter_groups(network))
    train(network, muon, 2)
    reference = copy.deepcopy(network)
    unmoved = Muon(parameter_groups(reference))
    unmoved.load_state_dict(copy.deepcopy(muon.state_dict()))
    network.to(memory_format=torch.channels_last)
    for seed in range(2):
        set_gradients(network, seed)
        set_gradients(reference, seed)
        muon.step()
        unmoved.step()
    torch.testing.assert_close(
        flat(network[3].weight), flat(reference[3].weight), rtol=0, atol=1e-3
    )
    weight = network[3].weight
    assert muon.state[weight]["momentum_buffer"].stride() == weight.stride()


def test_muon_skips_what_has_no_gradient():
    network = make_network()
    before = copy.deepcopy(network)
    muon = Muon(parameter_groups(network))
    muon.step()
    assert_same_weights(network, before)
    network[3].weight.grad = torch.ones_like(network[3].weight)
    muon.step()
    assert list(muon.state) == [network[3].weight]
    muon.zero_grad()
    assert network[3].weight.grad is None


def test_a_copied_muon_trains_on_like_the_first():
    network = make_network()
    muon = Muon(parameter_groups(network))
    train(network, muon, 2)
    other, copied = copy.deepcopy((network, muon))
    assert train(other, copied, 2) == train(network, muon, 2)


@pytest.mark.parametrize("name", ["Muon", "SparseAdam", "AdamW"])
def test_loss_scaling_does_not_change_a_step(name):
    plain, scaled = make_network(), make_network()
    images, labels = make_batch()
    optimizer = make_optimizer(name, plain)
    F.cross_entropy(plain(images), labels).backward()
    optimizer.step()
    optimizer = make_optimizer(name, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # a power of two scales exactly
    scaler.scale(F.cross_entropy(scaled(images), labels)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert_same_weights(plain, scaled)


# ---- SparseAdam and LBFGS ------------------------------------------------------------------------


def test_sparse_adam_is_adam_where_no_gradient_is_zero():
    ours, torchs = make_network(), make_network()
    sparse = SparseAdam(parameter_groups(ours), lr=0.01)
    adam = torch.optim.Adam(torchs.parameters(), lr=0.01)
    for seed in range(4):
        set_gradients(ours, seed)
        set_gradients(torchs, seed)
        sparse.step()
        adam.step()
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_sparse_adam_leaves_entries_without_gradient_and_gradients_as_they_are():
    weight = nn.Parameter(torch.ones(2, 3))
    scalar = nn.Parameter(torch.tensor(1.0))
    sparse = SparseAdam([weight, scalar], lr=0.1)
    gradients = [torch.ones(2, 3), torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 2.0]])]
    for gradient in gradients:
        before = weight.detach().clone()
        moment_before = sparse.state[weight].get("exp_avg", torch.zeros(2, 3)).clone()
        weight.grad, scalar.grad = gradient, torch.tensor(1.0)
        sparse.step()
        assert weight.grad is gradient and not gradient.is_sparse
        # Adam would go on along the first gradient where the second is 0.
        assert torch.equal(weight == before, gradient == 0)
        assert torch.equal(sparse.state[weight]["exp_avg"] == moment_before, gradient == 0)
    assert scalar.item() == pytest.approx(0.8)


def test_sparse_adam_takes_gradients_that_are_sparse_already():
    embedding = nn.Embedding(5, 2, sparse=True)
    before = embedding.weight.detach().clone()
    sparse = SparseAdam(embedding.parameters(), lr=0.1)
    sparse.step(lambda: embedding(torch.tensor([1, 3])).sum().backward())
    changed = (embedding.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, True, False]


def test_lbfgs_joins_groups_and_steps_like_torch():
    ours, torchs = make_network(), make_network()
    settings = {"lr": 0.5, "max_iter": 5, "line_search_fn": "strong_wolfe"}
    groups = parameter_groups(ours, decay_biases_and_norms=False)
    lbfgs = LBFGS(groups, **settings)
    assert len(groups) == 2 and len(lbfgs.param_groups) == 1
    # The same order in both: sums over the flat direction are taken in it.
    groups = parameter_groups(torchs, decay_biases_and_norms=False)
    reference = torch.optim.LBFGS([p for group in groups for p in group["params"]], **settings)
    assert train(ours, lbfgs, 3) == train(torchs, reference, 3)
    assert_same_weights(ours, torchs)


def test_lbfgs_refuses_groups_with_different_settings():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": first.parameters(), "lr": 0.1}, {"params": second.parameters(), "lr": 0.2}]
    with pytest.raises(ValueError, match=r"one lr for all parameters.* 0\.1 and 0\.2"):
        LBFGS(groups)


# ---- every schedule ------------------------------------------------------------------------------


def make_scheduler(name: str, optimizer: Optimizer, steps: int = 8) -> LRScheduler:
    required = dict(REQUIRED.get(name, {}))
    if name == "CyclicLR" and len(optimizer.param_groups) > 1:
        required["max_lr"] = [0.01] * len(optimizer.param_groups)
    return build_scheduler(SCHEDULERS[name], optimizer, steps, steps, **required)


@EVERY_SCHEDULER
@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW", "Muon", "Adafactor"])
def test_resumed_schedule_matches_unbroken_run(name, optimizer_name):
    def start():
        network = make_network()
        optimizer = make_optimizer(optimizer_name, network)
        return network, optimizer, make_scheduler(name, optimizer)

    unbroken = start()
    rates = []
    for step in range(8):
        if step == 3:
            saved = through_a_file({"all": [part.state_dict() for part in unbroken]})["all"]
        rates.append([group["lr"] for group in unbroken[1].param_groups])
        train(unbroken[0], unbroken[1], 1, unbroken[2])
    assert any(rate != rates[0] for rate in rates)

    resumed = start()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    resumed_rates = []
    for _ in range(5):
        resumed_rates.append([group["lr"] for group in resumed[1].param_groups])
        train(resumed[0], resumed[1], 1, resumed[2])
    assert resumed_rates == rates[3:]
    assert_same_weights(resumed[0], unbroken[0])


@EVERY_SCHEDULER
@pytest.mark.parametrize("steps", [1, 8])
def test_every_schedule_takes_every_optimizer(name, steps):
    for optimizer_name in OPTIMIZERS:
        network = make_network()
        optimizer = make_optimizer(optimizer_name, network)
        scheduler = make_scheduler(name, optimizer, steps)
        set_gradients(network, 0)
        optimizer.step(lambda: 0.0)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert all(math.isfinite(group["lr"]) for group in optimizer.param_groups), optimizer_name


@EVERY_SCHEDULER
def test_interval_fits_the_schedule(name):
    by_step = {"OneCycleLR", "CyclicLR", "LinearDecayLR", "LinearWarmupCosineAnnealingLR"}
    expected = "step" if name in by_step else "epoch"
    assert interval_of(SCHEDULERS[name]) == expected
    assert interval_of(make_scheduler(name, torch.optim.SGD(nn.Linear(2, 2).parameters()))) == (
        expected
    )


def rates_of(
    name: str, steps: int, run: tuple[int, int], lr: float = 1.0, **arguments: Any
) -> list[float]:
    """The learning rate of each of `steps` steps, and the one after the last.

    `run` is the length of the run in steps and in epochs.
    """
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=lr)
    scheduler = build_scheduler(SCHEDULERS[name], optimizer, *run, **arguments)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "PolynomialLR"])
def test_an_open_length_is_the_run_in_epochs_and_a_given_one_stands(name):
    argument = {"CosineAnnealingLR": "T_max", "PolynomialLR": "total_iters"}[name]
    run = (700, 7)
    open_length = rates_of(name, 7, run)
    assert open_length == rates_of(name, 7, run, **{argument: None})
    assert open_length[6] > 0.01 and open_length[7] == pytest.approx(0, abs=1e-12)
    given = rates_of(name, 7, run, **{argument: 3})
    assert given[2] > 0.1 and given[3] == pytest.approx(0, abs=1e-12)
    # Torch's own class, whose signature requires T_max or defaults to five epochs.
    if name == "CosineAnnealingLR":
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
        scheduler = build_scheduler(lr_scheduler.CosineAnnealingLR, optimizer, *run)
        assert scheduler.T_max == 7


def test_short_warm_ups_keep_torchs_own_length():
    run = (700, 7)
    assert rates_of("LinearLR", 7, run)[5:] == pytest.approx([1, 1, 1])
    assert rates_of("ConstantLR", 7, run)[4:] == pytest.approx([1 / 3, 1, 1, 1])


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 9, 100])
def test_one_cycle_spans_the_run_like_torch_told_its_length(strategy, steps):
    ours = rates_of("OneCycleLR", steps, run=(steps, 1), lr=0.3, anneal_strategy=strategy)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.7)
    torchs = lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.3, total_steps=steps, anneal_strategy=strategy
    )
    reference = [torchs.get_last_lr()[0]]
    for _ in range(steps):
        optimizer.step()
        torchs.step()
        reference += torchs.get_last_lr()
    assert ours == reference
    if steps > 3:
        assert ours[0] == pytest.approx(0.3 / 25)
    assert ours[steps - 1] == pytest.approx(0.3 / 25 / 1e4)  # the rate of the last step


def test_one_cycle_takes_torchs_other_arguments():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.7)
    scheduler = build_scheduler(
        OneCycleLR, optimizer, 99, 9, max_lr=0.1, epochs=2, steps_per_epoch=5
    )
    assert scheduler.total_steps == 10
    assert optimizer.param_groups[0]["max_lr"] == 0.1
    scheduler = build_scheduler(OneCycleLR, optimizer, 99, 9, max_lr=0.1, total_steps=12)
    assert scheduler.total_steps == 12
    with pytest.raises(ValueError, match="total_steps OR"):
        build_scheduler(OneCycleLR, optimizer, 99, 9, epochs=2)


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (1, 1), (10, 0), (10, 3), (10, 10), (200, 17)]
)
@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_warm_up_then_cosine_is_its_closed_form_at_every_step(steps, warmup, floor):
    rates = rates_of(
        "LinearWarmupCosineAnnealingLR", steps + 3,
        run=(steps, 1), lr=0.5, warmup_steps=warmup, eta_min=floor,
    )  # fmt: skip
    rising = np.linspace(0, 0.5, warmup + 2)[1:-1]
    angle = np.linspace(0, np.pi, steps - warmup + 1)
    falling = floor + (0.5 - floor) * np.cos(angle / 2) ** 2
    falling = falling[:-1] if steps > warmup else falling[:0]
    expected = np.concatenate([rising, falling, np.full(4, floor)])
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-15)


def test_warm_up_is_a_share_of_the_run_and_none_is_plain_cosine():
    run = (40, 40)
    name = "LinearWarmupCosineAnnealingLR"
    tenth = rates_of(name, 40, run, warmup_fraction=0.1)
    assert tenth == rates_of(name, 40, run, warmup_steps=4)
    assert tenth.index(max(tenth)) == 4 and max(tenth) == 1
    # 0 warm-up steps are not "none given".
    plain = rates_of(name, 40, run, warmup_steps=0)
    assert plain == pytest.approx(rates_of("CosineAnnealingLR", 40, run), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": 11}, "warmup_steps is 11, and the run has 10"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_fraction": 1.5}, "0 to 1; came 1.5"),
        ({"eta_min": -0.1}, "0 or more; came -0.1"),
        ({"total_steps": 0}, "total_steps of LinearWarmupCosineAnnealingLR is 1 or more; came 0"),
    ],
)
def test_a_warm_up_that_cannot_be_is_refused(arguments, message):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=message):
        LinearWarmupCosineAnnealingLR(optimizer, **{"total_steps": 10, **arguments})


@pytest.mark.parametrize(
    ("name", "run", "arguments", "message"),
    [
        ("ChainedScheduler", (10, 2), {}, "made of other schedules.*LinearWarmupCosineAnnealingLR"),
        ("SequentialLR", (10, 2), {"milestones": [3]}, "made of other schedules"),
        ("StepLR", (10, 2), {}, "missing a required .*'step_size'; it takes step_size, gamma[.]"),
        ("LambdaLR", (10, 2), {}, "LambdaLR missing a required argument: 'lr_lambda'"),
        ("PolynomialLR", (10, 2), {"pow": 2}, "got an unexpected .*'pow'; it takes total_iters, "),
        ("OneCycleLR", (math.inf, 2), {}, "no end in steps.*lr_scheduler.total_steps"),
        ("OneCycleLR", (10, 2), {"pct_start": 0.1}, "pct_start 0.1 of 10 steps is a rise of one"),
        ("CosineAnnealingLR", (10, -1), {}, "no end in epochs.*lr_scheduler.T_max"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_refused_in_a_sentence(name, run, arguments, message):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=message):
        build_scheduler(SCHEDULERS[name], optimizer, *run, **arguments)


def test_a_schedule_by_a_function_takes_its_import_path():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(
        lr_scheduler.LambdaLR, skip={"optimizer"}, instantiate=False, fail_untyped=False
    )
    arguments = parser.parse_object({"lr_lambda": "math.exp2"}).as_dict()
    rates = rates_of("LambdaLR", 3, (3, 3), **arguments)
    assert rates == [1, 2, 4, 8]


OURS = classes_in(optimizers, Optimizer) | classes_in(optimizers, LRScheduler)


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_argument_of_ours_has_a_type_and_a_default_that_fits(name):
    cls = OURS[name]
    parser = ArgumentParser(exit_on_error=False)
    filled_in = {"params", "optimizer"}
    parser.add_class_arguments(cls, skip=filled_in, instantiate=False, fail_untyped=True)
    parsed = parser.parse_args([]).as_dict()
    assert parsed.keys() == inspect.signature(cls).parameters.keys() - filled_in


# ---- in Lightning --------------------------------------------------------------------------------


WOLFE = {"max_iter": 5, "line_search_fn": "strong_wolfe"}
CLIPPED = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}


@pytest.mark.parametrize(
    ("name", "settings", "flags"),
    [
        ("LBFGS", WOLFE, {}),
        ("LBFGS", WOLFE, {"precision": "bf16-mixed"}),
        ("SparseAdam", {"lr": 0.02}, {}),
        ("SparseAdam", {"lr": 0.02}, {"precision": "bf16-mixed", **CLIPPED}),
        ("Muon", {"lr": 0.1, "adamw_lr": 0.02}, {}),
        ("Muon", {"lr": 0.1, "adamw_lr": 0.02}, {"precision": "bf16-mixed", **CLIPPED}),
    ],
)
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning 2.6 with torch 2.15
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_optimizer_trains_in_lightning(name, settings, flags, decay):
    from lightning.pytorch import LightningModule, Trainer

    class Tiny(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = make_network(torch.channels_last)

        def training_step(self, batch, batch_idx):
            images, labels = batch
            return F.cross_entropy(self.network(images), labels)

        def configure_optimizers(self):
            groups = parameter_groups(self.network, decay_biases_and_norms=decay)
            optimizer = OPTIMIZERS[name](groups, **settings)
            scheduler = build_scheduler(
                LinearWarmupCosineAnnealingLR,
                optimizer,
                self.trainer.estimated_stepping_batches,
                self.trainer.max_epochs,
            )
            interval = interval_of(scheduler)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": interval},
            }

    model = Tiny()
    batch = make_batch()
    before = model.training_step(batch, 0).item()
    trainer = Trainer(
        max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **flags,
    )  # fmt: skip
    trainer.fit(model, DataLoader([batch, batch], batch_size=None))
    assert trainer.global_step == 20 // flags.get("accumulate_grad_batches", 1)
    assert model.training_step(batch, 0).item() < 0.8 * before
    (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert scheduler.get_last_lr() == [0.0] * len(trainer.optimizers[0].param_groups)


def test_sparse_adam_steps_channels_last_weights_on_several_threads():
    """torch's own fails there: its worker threads take the weight for one that is recorded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plain = nn.Conv2d(32, 64, 5)
        last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        for layer in (plain, last):
            optimizer = optimizers.SparseAdam(layer.parameters(), lr=0.1)
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        assert torch.equal(plain.weight, last.weight)
        assert last.weight.is_contiguous(memory_format=torch.channels_last)
    finally:
        torch.set_num_threads(threads)
