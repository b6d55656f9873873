"""The parts of Jordan's recipe: each against its closed form, all together against a plain loop."""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from research.airbench import (
    Airbench94,
    MuonSGD,
    newton_schulz,
    orthogonalized,
    views,
    whitening_filters,
)
from research.building import build_data, prepare
from research.configuration.schema import resolve
from research.data import Synthetic
from research.data.augmentation import Augmentation
from research.optimizers import LinearDecayLR, build_scheduler
from research.param_groups import first_layer, parameter_groups
from research.pictures.layers import record_maps
from research.training import fit

QUINTIC = (3.4445, -4.775, 2.0315)
RATES = {"lr": 0.24, "bias_lr": 0.053, "outer_lr": 0.67, "sgd_weight_decay": 0.004}


@pytest.fixture(autouse=True)
def seeded_in_double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_network(**arguments):
    settings = {"num_classes": 4, "image_size": 12, "widths": (4, 30)} | arguments
    return Airbench94(**settings)


def pictures(count=40, size=12):
    """Neighbouring pixels are alike, as in pictures."""
    rough = torch.randn(count, 3, size + 2, size + 2)
    return F.avg_pool2d(rough, 3, stride=1) + 0.1 * torch.randn(count, 3, size, size)


# ---- the network ---------------------------------------------------------------------------------


def test_network_is_jordans():
    network = Airbench94().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_972_792
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained == 1_971_352
    assert all(f"{count:,}" in inspect.getdoc(Airbench94) for count in (1_972_792, trained))
    shapes = {}
    for name, layer in network.named_modules():
        layer.register_forward_hook(
            lambda _, __, y, name=name: shapes.__setitem__(name, tuple(y.shape[1:]))
        )
    network(torch.zeros(1, 3, 32, 32))
    assert shapes["whiten"] == (24, 31, 31)
    assert shapes["features.block1"] == (64, 15, 15)
    assert shapes["features.block2"] == (256, 7, 7)
    assert shapes["features.block3"] == (256, 3, 3)
    assert shapes["features.pool"] == (256, 1, 1)
    assert shapes["head"] == (10,)


def test_forward_equals_the_formula():
    network, x = small_network(), pictures()
    expected = F.conv2d(x, network.whiten.weight, network.whiten.bias)
    expected = F.gelu(expected)
    for block in (network.features.block1, network.features.block2):
        expected = F.max_pool2d(F.conv2d(expected, block.conv1.weight, padding=1), 2)
        for convolution, norm in ((None, block.norm1), (block.conv2, block.norm2)):
            if convolution is not None:
                expected = F.conv2d(expected, convolution.weight, padding=1)
            nn.init.normal_(norm.bias)
            mean, variance = expected.mean((0, 2, 3)), expected.var((0, 2, 3), correction=0)
            expected = (expected - mean[:, None, None]) / (variance + 1e-12).sqrt()[:, None, None]
            expected = F.gelu(expected + norm.bias[:, None, None])
    logits = expected.amax((2, 3)) @ network.head.weight.T / 30
    torch.testing.assert_close(network(x), logits)


def test_a_convolution_starts_by_handing_on_its_inputs():
    network = small_network()
    x = torch.randn(2, 24, 6, 6)
    narrow, wide = network.features.block1.conv1, network.features.block2.conv1
    torch.testing.assert_close(narrow(x), x[:, :4])  # only four outputs: the first four inputs
    x = x[:, :4]
    torch.testing.assert_close(wide(x)[:, :4], x)
    assert (wide.weight[4:] != 0).all()


def test_head_starts_with_standard_deviation_1_and_norms_forget_quickly():
    network = small_network()
    assert network.head.weight.std().item() == pytest.approx(1)
    norm = network.features.block1.norm1
    x = torch.randn(8, 4, 3, 3) + 5
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.4 * x.mean((0, 2, 3)))


def test_filters_and_scales_of_norms_are_not_trained():
    frozen = {name for name, p in small_network().named_parameters() if not p.requires_grad}
    norms = {f"features.block{b}.norm{n}.weight" for b in (1, 2) for n in (1, 2)}
    assert frozen == {"whiten.weight"} | norms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes: 1 given"),
        ({"widths": (4, 0)}, "widths: "),
        ({"image_size": 4}, "image_size: 4 given, but it must be at least 5"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_network(**arguments)


def test_smallest_picture_leaves_one_cell():
    assert small_network(image_size=5)(torch.randn(3, 3, 5, 5)).shape == (3, 4)
    with pytest.raises(ValueError, match="expects pictures of shape"):
        small_network()(torch.randn(3, 3, 5, 5))


# ---- whitening -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 1001])  # one chunk, and three of which the last is small
def test_whitened_patches_are_uncorrelated_and_of_mean_square_1(count):
    network, images = small_network(), pictures(count)
    network.prepare(images)
    nn.init.zeros_(network.whiten.bias)
    answers = network.whiten(images).transpose(0, 1).flatten(1)
    first, second = answers[:12], answers[12:]
    moments = first @ first.T / first.shape[1]
    # Patches vary by at least 0.01 in each direction here, of which eps = 5e-4 takes its share.
    torch.testing.assert_close(moments, torch.eye(12), atol=0.05, rtol=0)
    assert (moments - moments.diag().diag()).abs().max() < 1e-9
    assert torch.equal(first, -second)


def test_filters_are_eigenvectors_over_the_root_of_their_variance():
    images = pictures()
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    moments = patches.T @ patches / len(patches)
    filters = whitening_filters(images, 2, eps=0.3)[:12].flatten(1)
    lengths = filters.norm(dim=1, keepdim=True)
    variances = 1 / lengths.square() - 0.3
    torch.testing.assert_close(filters @ moments, filters * variances)
    assert (variances.flatten().diff() > 0).all()


def test_prepared_filters_stay_in_place_and_in_the_networks_type():
    network = small_network().float().to(memory_format=torch.channels_last)
    weight = network.whiten.weight
    network.prepare(pictures().float())
    assert network.whiten.weight is weight and weight.dtype == torch.float32
    assert not weight.requires_grad


# ---- views ---------------------------------------------------------------------------------------


def test_views_are_the_picture_mirrored_and_moved_by_a_pixel():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    six = views(x, 6)
    assert [share for _, share in six] == [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    shown = [view[0, 0].tolist() for view, _ in six]
    assert shown[0] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert shown[2] == [[4, 3, 4], [1, 0, 1], [4, 3, 4]]  # towards the lower right
    assert shown[4] == [[4, 5, 4], [7, 8, 7], [4, 5, 4]]  # towards the upper left
    for plain, mirrored in ((0, 1), (2, 3), (4, 5)):
        assert shown[mirrored] == [row[::-1] for row in shown[plain]]
    assert views(x, 2)[1][0].tolist() == six[1][0].tolist()
    assert all(sum(share for _, share in views(x, count)) == 1 for count in (1, 2, 6))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_evaluation_averages_the_logits_of_all_views_and_training_sees_one(count):
    network, x = small_network(views=count).eval(), pictures(3)
    expected = sum(share * network.logits(view) for view, share in views(x, count))
    torch.testing.assert_close(network(x), expected)
    network.train()
    plain = copy.deepcopy(network)
    plain.views = 1
    assert torch.equal(network(x), plain(x))


def test_export_has_all_views_for_any_batch_size():
    network = small_network(views=6).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        network, (pictures(2),), dynamic_shapes=({0: batch},), strict=False
    )
    x = pictures(3)
    torch.testing.assert_close(exported.module()(x), network(x))


# ---- the optimizer -------------------------------------------------------------------------------


def send_through(values, steps=3):
    a, b, c = QUINTIC
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_newton_schulz_sends_singular_values_through_the_quintic(shape):
    matrices = torch.randn(2, *shape)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = send_through(s / s.norm(dim=1, keepdim=True))
    made = newton_schulz(matrices, 3, QUINTIC, torch.float64, 0.0)
    torch.testing.assert_close(made, u @ s.diag_embed() @ v)


def test_half_precision_is_near_enough():
    matrices = torch.randn(2, 16, 40).float()
    exact, half = (
        newton_schulz(matrices, 3, QUINTIC, dtype, 1e-7)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.03 * exact.norm()


def test_tensors_of_one_shape_are_made_orthogonal_each_for_itself():
    shapes = [(4, 3, 2, 2), (6, 4), (4, 3, 2, 2), (4, 3, 2, 2)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    settings = {"ns_steps": 3, "ns_coefficients": QUINTIC, "ns_dtype": "float64", "eps": 1e-7}
    for tensor, made in zip(tensors, orthogonalized(tensors, settings), strict=True):
        (alone,) = newton_schulz(tensor.flatten(1)[None], 3, QUINTIC, torch.float64, 1e-7)
        torch.testing.assert_close(made, alone.view(tensor.shape))


def set_gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))


def test_parameters_are_parted_by_their_roles():
    network = small_network()
    optimizer = MuonSGD(parameter_groups(network), **RATES)
    names = {parameter: name for name, parameter in network.named_parameters()}
    roles = {g["role"]: [names[p] for p in g["params"]] for g in optimizer.param_groups}
    assert list(roles) == ["hidden", "outer", "biases", "first_biases"]
    assert roles["hidden"] == [f"features.block{b}.conv{c}.weight" for b in (1, 2) for c in (1, 2)]
    assert roles["outer"] == ["head.weight"]
    assert roles["biases"] == [f"features.block{b}.norm{n}.bias" for b in (1, 2) for n in (1, 2)]
    assert roles["first_biases"] == ["whiten.bias"]
    assert [g["lr"] for g in optimizer.param_groups] == [0.24, 0.67, 0.053, 0.053]
    # Each loses 0.004 of itself in a step at its full rate.
    decays = [g["lr"] * g["weight_decay"] for g in optimizer.param_groups[1:]]
    assert decays == pytest.approx([0.004] * 3)


def test_first_layer_is_the_one_with_the_first_matrix():
    network = nn.Sequential(nn.LayerNorm([2, 2]), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    assert first_layer(network) == set(network[2].parameters())
    assert first_layer(nn.LayerNorm(3)) == set()
    (group,) = parameter_groups(network)
    assert [group["params"][i] for i in group["first_layer"]] == list(network[2].parameters())


def test_plain_parameters_are_parted_by_their_dimensions():
    optimizer = MuonSGD(nn.Linear(3, 2).parameters())
    assert [group["role"] for group in optimizer.param_groups] == ["hidden", "biases"]


@pytest.mark.parametrize("decay_biases", [True, False])
def test_all_that_is_not_hidden_is_stepped_by_torchs_sgd(decay_biases):
    network = small_network()
    reference = copy.deepcopy(network)
    ours = MuonSGD(parameter_groups(network, decay_biases), **RATES)
    shares = {"head": (0.67, True), "bias": (0.053, decay_biases)}
    groups = [
        {
            "params": [p for name, p in reference.named_parameters() if word in name],
            "lr": lr,
            "weight_decay": 0.004 / lr if decays else 0.0,
        }
        for word, (lr, decays) in shares.items()
    ]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    for seed in range(4):
        set_gradients(network, seed)
        set_gradients(reference, seed)
        ours.step()
        sgd.step()
    for (name, now), expected in zip(
        network.named_parameters(), reference.parameters(), strict=True
    ):
        if "head" in name or name.endswith("bias"):
            torch.testing.assert_close(now, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"]
)
def test_hidden_matrix_is_brought_to_length_and_moved_along_its_orthogonal_momentum(memory_format):
    weight = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=memory_format))
    expected, momentum = weight.detach().clone(), 0.0
    optimizer = MuonSGD([weight], lr=0.1, momentum=0.6, ns_dtype="float64")
    for seed in range(3):
        set_gradients(nn.ParameterList([weight]), seed)
        momentum = 0.6 * momentum + weight.grad
        u, s, v = torch.linalg.svd((weight.grad + 0.6 * momentum).flatten(1), full_matrices=False)
        update = u @ send_through(s / s.norm()).diag() @ v
        expected = expected * (6**0.5 / expected.norm()) - 0.1 * update.view(expected.shape)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert weight.is_contiguous(memory_format=memory_format)


def test_a_rate_may_be_a_tensor_and_no_step_reads_the_device():
    plain, other = small_network(), small_network()
    other.load_state_dict(plain.state_dict())
    with_floats, with_tensors = (
        MuonSGD(parameter_groups(network), **RATES, ns_dtype="float64")
        for network in (plain, other)
    )
    for group in with_tensors.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    for seed in range(2):
        set_gradients(plain, seed)
        set_gradients(other, seed)
        with_floats.step()
        with_tensors.step()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    # Tensors without content: whoever reads a number from one gets an error.
    with torch.device("meta"):
        network = small_network()
        optimizer = MuonSGD(parameter_groups(network), **RATES)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        for _ in range(2):
            network(torch.randn(5, 3, 12, 12)).sum().backward()
            optimizer.step()
    with pytest.raises(RuntimeError):
        network.head.weight.norm().item()


def test_what_has_no_gradient_stays():
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    optimizer = MuonSGD(parameter_groups(network), **RATES)
    optimizer.step()
    assert not optimizer.state
    set_gradients(network, 0)
    network.whiten.bias.grad = None
    optimizer.step()
    changed = {
        name for name, value in network.state_dict().items() if (value != before[name]).any()
    }
    assert changed == {n for n, p in network.named_parameters() if p.requires_grad} - {
        "whiten.bias"
    }


# ---- the schedule --------------------------------------------------------------------------------


def rates_of(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def test_rates_fall_in_a_straight_line_each_to_its_own_end():
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": lr} for lr in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    scheduler = build_scheduler(LinearDecayLR, optimizer, 8, 1, until=[1.0, 0.375])
    expected = [[1 - t / 8, max(0.0, 0.5 * (1 - t / 3))] for t in range(8)] + [[0, 0]] * 2
    torch.testing.assert_close(
        torch.tensor(rates_of(scheduler, optimizer, 10)), torch.tensor(expected)
    )


@pytest.mark.parametrize("until", [[1.0, 1.0], [0.0], 1.5, -0.1])
def test_impossible_ends_are_refused(until):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"lr_scheduler\.until"):
        LinearDecayLR(optimizer, total_steps=8, until=until)


# ---- alternating flips ---------------------------------------------------------------------------


def test_alternating_flips_are_drawn_once_for_each_picture_and_then_take_turns():
    augmentation = Augmentation(alternating_flip=True)
    order = torch.randperm(1000)
    first, second, third = (
        augmentation.draw(1000, 8, 8, seed=3, epoch=epoch, order=order).flips for epoch in range(3)
    )
    assert torch.equal(first, ~second) and torch.equal(first, third)
    unordered = augmentation.draw(1000, 8, 8, seed=3, epoch=0).flips
    assert torch.equal(first, unordered[order])
    assert first.double().mean().item() == pytest.approx(0.5, abs=0.06)  # 4 standard deviations
    other = augmentation.draw(1000, 8, 8, seed=4, epoch=0).flips
    assert not torch.equal(unordered, other)


@pytest.mark.parametrize("batch_size", [7, 60])
def test_two_epochs_show_both_sides_of_every_picture(batch_size):
    torch.set_default_dtype(torch.float32)
    data = Synthetic(num_train=60, num_test=10, val_fraction=0, normalize=False,
                     alternating_flip=True, batch_size=batch_size)  # fmt: skip
    data.setup()
    batches = data.train_dataloader()
    plain = (data.splits.train.images.float() / 255).flatten(1)
    mirrored = (data.splits.train.images.flip(3).float() / 255).flatten(1)

    def seen(epoch):
        """Of each picture, whether it came mirrored."""
        sides = torch.zeros(60, dtype=torch.bool)
        for image in torch.cat([images for images, _ in epoch]).flatten(1):
            apart = torch.stack([(side - image).abs().amax(1) for side in (plain, mirrored)])
            assert apart.min() < 1e-5
            side, picture = divmod(int(apart.argmin()), 60)
            sides[picture] = bool(side)
        return sides

    first, second = seen(batches), seen(batches)
    assert torch.equal(first, ~second)
    assert 0 < first.sum() < 60
    assert torch.equal(seen(batches), first)


def test_two_ways_to_flip_at_once_are_refused():
    with pytest.raises(ValueError, match=r"data\.horizontal_flip and data\.alternating_flip"):
        Synthetic(horizontal_flip=True, alternating_flip=True)


# ---- all of it -----------------------------------------------------------------------------------


def test_training_equals_a_plain_loop_of_the_recipe():
    """Two optimizers, rates set by hand, and a bias that is detached once its time is over."""
    steps, bias_steps, images, labels = 8, 3, pictures(64), torch.arange(64) % 4
    network = small_network()
    network.prepare(images)
    plain = copy.deepcopy(network)

    ours = MuonSGD(parameter_groups(network), **RATES, ns_dtype="float64")
    schedule = LinearDecayLR(ours, steps, until=[1.0, 1.0, 1.0, bias_steps / steps])
    kernels = [p for p in plain.parameters() if p.ndim == 4 and p.requires_grad]
    momenta = [torch.zeros_like(p) for p in kernels]
    biases = [p for name, p in plain.named_parameters() if "norm" in name and p.requires_grad]
    rates = [0.053, 0.053, 0.67]
    parts = [[plain.whiten.bias], biases, [plain.head.weight]]
    groups = [
        {"params": part, "lr": lr, "weight_decay": 2e-6 * 2000 / lr}
        for part, lr in zip(parts, rates, strict=True)
    ]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)

    for step in range(steps):
        batch = torch.randperm(64)[:32]
        loss = F.cross_entropy(
            network(images[batch]), labels[batch], label_smoothing=0.2, reduction="sum"
        )
        ours.zero_grad()
        loss.backward()
        ours.step()
        schedule.step()

        plain.zero_grad()
        plain.whiten.bias.requires_grad_(step < bias_steps)
        F.cross_entropy(
            plain(images[batch]), labels[batch], label_smoothing=0.2, reduction="sum"
        ).backward()
        left = 1 - step / steps
        for group, rate, part in zip(
            sgd.param_groups, rates, (1 - step / 3, left, left), strict=True
        ):
            group["lr"] = max(0.0, rate * part)
        sgd.step()
        with torch.no_grad():
            for kernel, momentum in zip(kernels, momenta, strict=True):
                momentum.mul_(0.6).add_(kernel.grad)
                nesterov = (kernel.grad + 0.6 * momentum).flatten(1)
                u, s, v = torch.linalg.svd(nesterov, full_matrices=False)
                update = u @ send_through(s / (s.norm() + 1e-7)).diag() @ v
                kernel.mul_(len(kernel) ** 0.5 / kernel.norm())
                kernel.sub_(0.24 * left * update.view(kernel.shape))

    for (name, ours_now), expected in zip(
        network.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours_now, expected, rtol=1e-6, atol=1e-8, msg=name)


# ---- in a run ------------------------------------------------------------------------------------


def test_network_optimizer_and_schedule_are_found_by_their_names():
    arguments = ["--model.network", "Airbench94", "--optimizer", "MuonSGD"]
    found = resolve([*arguments, "--lr_scheduler", "LinearDecayLR"]).classes
    assert found["model.network"] is Airbench94
    assert found["optimizer"] is MuonSGD
    assert found["lr_scheduler"] is LinearDecayLR


def test_a_run_whitens_its_own_training_pictures_before_it_trains(small):
    torch.set_default_dtype(torch.float32)
    arguments = ["--model.network", "Airbench94", "--model.network.widths", "[2,3]"]
    data = ["--data", "Synthetic", "--data.num_train", "64", "--data.num_test", "32"]
    data += ["--data.val_fraction", "0"]
    configuration = small(
        *(*arguments, *data, "--model.network.views", "6", "--trainer.max_epochs", "1"),
        *("--optimizer", "MuonSGD", "--trainer.enable_progress_bar", "false"),
        base=[],
    )
    result = fit(configuration)
    (last,) = Path.cwd().rglob("last.ckpt")
    weights = torch.load(last, weights_only=True)["state_dict"]
    pixels = build_data(configuration)
    images = torch.cat([images for images, _ in pixels._batches("train")])
    expected = whitening_filters(images, 2)
    torch.testing.assert_close(
        weights["network.whiten.weight"], expected, rtol=1e-3, atol=1e-4 * expected.abs().max()
    )
    assert "val/loss" not in result.metrics and result.metrics["test/loss"] > 0


def test_a_network_without_it_is_not_prepared():
    prepare(nn.Linear(2, 2), None)


def test_maps_of_a_network_with_several_views_are_of_the_pictures_themselves():
    network, x = small_network(views=6).eval(), pictures(3)
    plain = copy.deepcopy(network)
    plain.views = 1
    for several, one in zip(record_maps(network, x), record_maps(plain, x), strict=True):
        torch.testing.assert_close(several.values, one.values)
