import copy
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonargparse
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from research.networks import (
    ACTIVATIONS,
    CNN,
    NORMALIZATIONS,
    POOLINGS,
    ResNet9,
    adapt_to_small_pictures,
    from_torchvision,
)

NETWORKS = {
    "CNN": lambda: CNN(activation="ReLU", normalization="BatchNorm2d", dropout=0.1),
    "ResNet9": lambda: ResNet9(width=8),
    "squeezenet": lambda: from_torchvision("squeezenet1_1"),
    "resnet18": lambda: from_torchvision("torchvision.models.resnet18"),
}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(batch=2, channels=3, size=32):
    return torch.randn(batch, channels, size, size)


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def shapes_after_each_layer(network, x):
    shapes = {}
    for name, layer in network.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(
                lambda _, __, y, name=name: shapes.__setitem__(name, tuple(y.shape[1:]))
            )
    network(x)
    return shapes


# The tutorial's CNN


def test_cnn_is_the_tutorials():
    network = CNN()
    assert count_parameters(network) == 145_578
    assert shapes_after_each_layer(network, pictures()) == {
        "features.conv1": (32, 32, 32),
        "features.pool1": (32, 16, 16),
        "features.conv2": (32, 16, 16),
        "features.pool2": (32, 8, 8),
        "features.conv3": (64, 8, 8),
        "features.pool3": (64, 4, 4),
        "head.flatten": (1024,),
        "head.linear1": (64,),
        "head.linear2": (10,),
    }


def test_cnn_equals_the_tutorials_sequential():
    tutorial = nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.Linear(64, 10),
    )
    network = CNN()
    weights = network.state_dict().values()
    tutorial.load_state_dict(dict(zip(tutorial.state_dict(), weights, strict=True)))
    x = pictures()
    assert torch.equal(network(x), tutorial(x))


def test_same_seed_gives_the_tutorials_weights():
    torch.manual_seed(7)
    network = CNN()
    torch.manual_seed(7)
    conv1 = nn.Conv2d(3, 32, 5, padding=2)
    assert torch.equal(network.features.conv1.weight, conv1.weight)


def test_layers_stand_in_the_order_that_the_names_promise():
    network = CNN(activation="ReLU", normalization="BatchNorm2d", dropout=0.5, widths=(8,))
    assert list(network.features._modules) == ["conv1", "norm1", "activation1", "pool1"]
    assert list(network.head._modules) == [
        "flatten",
        "dropout1",
        "linear1",
        "activation",
        "dropout2",
        "linear2",
    ]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_cnn_and_resnet_learn_with_every_activation(activation):
    for network in (
        CNN(activation=activation, widths=(4, 4)),
        ResNet9(activation=activation, width=2),
    ):
        logits = network(pictures())
        assert logits.shape == (2, 10)
        logits.square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_activations_are_all_of_torch_that_need_no_arguments():
    for name in nn.modules.activation.__all__:
        required = [
            parameter
            for parameter in inspect.signature(getattr(nn, name)).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        assert (name in ACTIVATIONS) == (not required), name


@pytest.mark.parametrize("name", sorted(ACTIVATIONS - {"GLU", "RReLU", "Softmax2d"}))
def test_activation_is_applied_after_each_convolution_and_between_the_linear_layers(name):
    network = CNN(activation=name, widths=(4,), hidden=8)
    activation = getattr(nn, name)
    softmax_like = name in ("Softmax", "Softmin", "LogSoftmax")
    reference = activation(dim=1) if softmax_like else activation()
    x = pictures()
    maps = nn.functional.max_pool2d(reference(network.features.conv1(x)), 2)
    expected = network.head.linear2(reference(network.head.linear1(maps.flatten(1))))
    torch.testing.assert_close(network(x), expected)


def test_glu_is_given_twice_the_channels():
    network = CNN(activation="GLU", widths=(4, 6), hidden=8)
    shapes = shapes_after_each_layer(network, pictures())
    assert shapes["features.conv2"] == (12, 16, 16)
    assert shapes["features.activation2"] == (6, 16, 16)
    assert shapes["head.linear1"] == (16,) and shapes["head.activation"] == (8,)


def test_softmax2d_is_softmax_over_channels():
    network = CNN(activation="Softmax2d", widths=(4,))
    maps = network.features.conv1(pictures())
    assert torch.equal(network.features.activation1(maps), nn.Softmax2d()(maps))


@pytest.mark.parametrize("name", sorted(NORMALIZATIONS))
def test_normalization_is_torchs_on_the_maps_of_every_convolution(name):
    network = CNN(normalization=name, widths=(16, 12), image_size=20)
    network(pictures(size=20)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert type(network.features.norm2) is getattr(nn, name)

    maps = 3 * torch.randn(2, 12, 10, 10) + 1
    normalised = network.features.norm2(maps)
    if name != "LocalResponseNorm":
        over = {
            "BatchNorm2d": (0, 2, 3),
            "InstanceNorm2d": (2, 3),
            "GroupNorm": (2, 3, 4),
            "LayerNorm": (1, 2, 3),
            "RMSNorm": (1, 2, 3),
        }[name]
        if name == "GroupNorm":  # gcd(8, 12) = 4 groups of 3
            normalised = normalised.unflatten(1, (4, 3))
        mean_square = normalised.square().mean(over)
        torch.testing.assert_close(mean_square, torch.ones_like(mean_square), rtol=1e-3, atol=0)


def test_group_norm_has_eight_groups_where_they_divide_the_channels():
    network = CNN(normalization="GroupNorm", widths=(32, 12, 7))
    groups = [getattr(network.features, f"norm{number}").num_groups for number in (1, 2, 3)]
    assert groups == [8, 4, 1]


def test_convolutions_have_a_bias_unless_the_normalization_subtracts_it():
    biased = {
        name: CNN(normalization=name, widths=(8,)).features.conv1.bias is not None
        for name in [None, *NORMALIZATIONS]
    }
    assert [name for name, has_bias in biased.items() if not has_bias] == [
        "BatchNorm2d",
        "InstanceNorm2d",
    ]


@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_pooling_is_torchs(name):
    network = CNN(pooling=name)
    maps = torch.randn(1, 2, 4, 4)
    windows = nn.functional.unfold(maps.transpose(0, 1), 2, stride=2)
    expected = {
        "MaxPool2d": windows.amax(1),
        "AvgPool2d": windows.mean(1),
        "LPPool2d": windows.norm(dim=1),
    }[name]
    torch.testing.assert_close(network.features.pool1(maps), expected.view(1, 2, 2, 2))
    assert network(pictures()).shape == (2, 10)


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
@pytest.mark.parametrize(("ceil_mode", "sizes"), [(False, [14, 7, 3]), (True, [14, 7, 4])])
def test_ceil_mode_decides_what_becomes_of_odd_sizes(pooling, ceil_mode, sizes):
    network = CNN(image_size=28, pooling=pooling, ceil_mode=ceil_mode)
    shapes = shapes_after_each_layer(network, pictures(size=28))
    assert [shapes[f"features.pool{number}"][1] for number in (1, 2, 3)] == sizes
    assert network.head.linear1.in_features == 64 * sizes[-1] ** 2


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_mode_decides_what_convolutions_see_beyond_the_edge(padding_mode):
    network = CNN(padding_mode=padding_mode)
    conv1 = network.features.conv1
    x = pictures()
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode=mode)
    expected = nn.functional.conv2d(padded, conv1.weight, conv1.bias)
    torch.testing.assert_close(conv1(x), expected)
    assert network(x).shape == (2, 10)


def test_dropout_works_in_training_only():
    network = CNN(dropout=0.5)
    x = pictures()
    assert not torch.equal(network(x), network(x))
    network.eval()
    without = CNN()
    without.load_state_dict(network.state_dict())
    assert torch.equal(network(x), without(x))


@settings(deadline=None, max_examples=25, database=None, derandomize=True)
@given(
    image_size=st.integers(4, 40),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    in_channels=st.integers(1, 4),
    num_classes=st.integers(2, 12),
    hidden=st.integers(1, 9),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    normalization=st.sampled_from([None, *NORMALIZATIONS]),
    pooling=st.sampled_from(sorted(POOLINGS)),
    ceil_mode=st.booleans(),
)
def test_any_cnn_that_can_be_built_works_and_its_cells_agree_with_it(
    image_size, widths, in_channels, num_classes, **arguments
):
    build = {"in_channels": in_channels, "widths": tuple(widths), "image_size": image_size}
    if image_size < 2 ** len(widths) and not arguments["ceil_mode"]:
        with pytest.raises(ValueError, match=rf"at least {2 ** len(widths)} pixels"):
            CNN(num_classes, **build, **arguments)
        return
    network = CNN(num_classes, **build, **arguments).eval().double()
    x = pictures(2, in_channels, image_size).double()
    logits, votes = network(x), network.cell_scores(x)
    assert logits.shape == votes.shape[:2] == (2, num_classes)
    torch.testing.assert_close(votes.mean((2, 3)), logits)


@pytest.mark.parametrize("image_size", [28, 32, 48, 64])
def test_networks_take_the_picture_size_that_they_are_built_for(image_size):
    x = pictures(size=image_size)
    for network in (
        CNN(image_size=image_size),
        ResNet9(image_size=image_size, width=2),
        from_torchvision("squeezenet1_1", image_size=image_size),
    ):
        assert network(x).shape == (2, 10)


# Votes of the last map's cells


def test_cell_scores_of_the_default_cnn_have_its_logits_as_mean():
    network, x = CNN(), pictures(4)
    votes = network.cell_scores(x)
    assert votes.shape == (4, 10, 4, 4)
    torch.testing.assert_close(votes.mean((2, 3)), network(x), rtol=1e-4, atol=1e-5)


def test_a_cell_votes_on_what_it_sees_alone():
    """Changing the picture's upper left corner leaves the vote of the lower right cell alone."""
    network, x = CNN(activation="ReLU", kernel_size=1), pictures()
    changed = x.clone()
    changed[:, :, :8, :8] += 1
    differs = (network.cell_scores(x) != network.cell_scores(changed)).any(1).any(0)
    assert differs.nonzero().tolist() == [[0, 0]]


def test_cell_votes_pass_the_activation_one_by_one():
    network, x = CNN(activation="ReLU", widths=(4,), hidden=8), pictures()
    maps = network.features(x)
    linear1, linear2 = network.head.linear1, network.head.linear2
    for row, column in [(0, 0), (3, 11), (15, 15)]:
        own = torch.zeros_like(maps)
        own[:, :, row, column] = 16 * 16 * maps[:, :, row, column]
        expected = linear2(linear1(own.flatten(1)).relu())
        votes = network.cell_scores(x)[:, :, row, column]
        torch.testing.assert_close(votes, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [*sorted(ACTIVATIONS), None])
def test_cell_scores_work_with_every_activation(activation):
    network = CNN(activation=activation, widths=(4, 4), hidden=6, dropout=0.2)
    network.cell_scores(pictures()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_cell_scores_of_resnet_apply_its_classifier_to_each_cell():
    network, x = ResNet9(width=2, global_pooling="AvgPool2d").eval(), pictures()
    votes = network.cell_scores(x)
    assert votes.shape == (2, 10, 4, 4)
    torch.testing.assert_close(votes.mean((2, 3)), network(x))
    cell = network.features(x)[:, :, 1, 2]
    torch.testing.assert_close(votes[:, :, 1, 2], 0.125 * network.head.linear(cell))


def test_cell_scores_bring_no_parameters_of_their_own():
    for network in (CNN(), ResNet9(width=2)):
        before = copy.deepcopy(network.eval().state_dict())
        network.cell_scores(pictures())
        torch.testing.assert_close(dict(network.state_dict()), dict(before), rtol=0, atol=0)


# ResNet9


def test_resnet9_is_its_authors():
    network = ResNet9()
    assert count_parameters(network) == 6_573_120
    shapes = shapes_after_each_layer(network, pictures(1))
    assert shapes["features.prep.activation"] == (64, 32, 32)
    assert shapes["features.layer1.pool"] == (128, 16, 16)
    assert shapes["features.residual1.block2.activation"] == (128, 16, 16)
    assert shapes["features.layer2.pool"] == (256, 8, 8)
    assert shapes["features.layer3.pool"] == (512, 4, 4)
    assert shapes["features.residual3.block2.activation"] == (512, 4, 4)
    assert shapes["head.pool"] == (512, 1, 1)
    assert shapes["head.linear"] == (10,)


def test_resnet9_equals_its_equations():
    network, x = ResNet9(width=2, logit_scale=0.5), pictures()
    named = network.features

    def block(part, x):
        x = nn.functional.conv2d(x, part.conv.weight, padding=1)
        norm = part.norm
        x = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
        return x.relu()

    def halve(x):
        return nn.functional.max_pool2d(x, 2)

    y = block(named.prep, x)
    y = halve(block(named.layer1, y))
    y = y + block(named.residual1.block2, block(named.residual1.block1, y))
    y = halve(block(named.layer2, y))
    y = halve(block(named.layer3, y))
    y = y + block(named.residual3.block2, block(named.residual3.block1, y))
    expected = 0.5 * y.amax((2, 3)) @ network.head.linear.weight.T
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("normalization", [*sorted(NORMALIZATIONS), None])
@pytest.mark.parametrize("global_pooling", sorted(POOLINGS))
def test_resnet9_takes_every_normalization_and_global_pooling(normalization, global_pooling):
    network = ResNet9(width=2, normalization=normalization, global_pooling=global_pooling)
    assert network(pictures()).shape == (2, 10)


def test_resnet9_learns_on_a_cpu():
    network = ResNet9(width=8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    x, labels = pictures(32), torch.arange(32) % 10
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# What every network can do


@every_network
def test_gradient_reaches_every_parameter(build):
    network = build()
    x = pictures(8)
    nn.functional.cross_entropy(network(x), torch.arange(8)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_reaches_every_parameter_of_the_default_cnn():
    network = CNN()
    network(pictures()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@every_network
def test_channels_last_changes_nothing(build):
    network, x = build().eval(), pictures()
    expected = network(x)
    network = network.to(memory_format=torch.channels_last)
    logits = network(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    if hasattr(network, "cell_scores"):
        votes = network.cell_scores(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(votes, network.cell_scores(x), rtol=1e-3, atol=1e-4)


@every_network
def test_autocast_to_bfloat16_stays_close(build):
    network, x = build().eval(), pictures()
    scores = [network, network.cell_scores] if hasattr(network, "cell_scores") else [network]
    for score in scores:
        with torch.autocast("cpu", torch.bfloat16):
            rough = score(x)
        exact = score(x)
        assert (rough.float() - exact).norm() < 0.1 * exact.norm()


@every_network
def test_bfloat16_weights_train(build):
    network = build().bfloat16()
    logits = network(pictures().bfloat16())
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@every_network
def test_compile_in_place_keeps_names_and_results(build):
    network, x = build().eval(), pictures()
    names, expected = list(network.state_dict()), network(x)
    network.compile(backend="eager", fullgraph=True)
    assert torch.equal(network(x), expected)
    assert list(network.state_dict()) == names


@every_network
def test_compiled_network_refuses_wrong_pictures_with_the_same_words(build):
    network = build()
    network.compile(backend="eager")
    network(pictures())
    with pytest.raises(ValueError, match=re.escape("(B, 3, 32, 32) but got (2, 3, 31, 31)")):
        network(pictures(size=31))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks into every imported module
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs g++")
@every_network
def test_compiled_training_step_equals_the_plain_one(build):
    plain, x = build(), pictures(4)
    plain.apply(lambda layer: setattr(layer, "p", 0.0) if isinstance(layer, nn.Dropout) else None)
    compiled = copy.deepcopy(plain)
    compiled.compile()
    for network in (plain, compiled):
        nn.functional.cross_entropy(network(x), torch.arange(4)).backward()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-3, atol=1e-4)
    for (name, expected), parameter in zip(
        plain.named_parameters(), compiled.parameters(), strict=True
    ):
        difference = (parameter.grad - expected.grad).norm()
        assert difference < 1e-2 * expected.grad.norm() + 1e-5, name


@every_network
def test_export_gives_the_same_for_any_batch_size(build):
    network = build().eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(
        network, (pictures(2),), dynamic_shapes=({0: batch},), strict=False
    )
    x = pictures(3)
    torch.testing.assert_close(exported.module()(x), network(x))


@every_network
def test_state_and_copies_are_complete(build):
    network, other, x = build().eval(), build().eval(), pictures()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))


@every_network
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 31, 32), (3, 32, 32)])
def test_wrong_pictures_are_refused_with_both_shapes(build, shape):
    message = re.escape("(B, 3, 32, 32) but got " + str(shape))
    network = build()
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(shape))
    if hasattr(network, "cell_scores"):
        with pytest.raises(ValueError, match=message):
            network.cell_scores(torch.zeros(shape))


# torchvision's networks


def test_resnet18_gets_a_stem_for_small_pictures():
    network = from_torchvision("torchvision.models.resnet18")
    assert network.conv1.kernel_size == (3, 3) and network.conv1.stride == (1, 1)
    assert isinstance(network.maxpool, nn.Identity)
    # He's initialisation for what comes out: sqrt(2 / (64 * 9))
    assert network.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)
    assert count_parameters(network) == 11_173_962  # as in the networks written for CIFAR-10
    assert network.training
    shapes = shapes_after_each_layer(network, pictures())
    assert shapes["conv1"] == shapes["maxpool"] == (64, 32, 32)
    assert shapes["layer4.1.conv2"] == (512, 4, 4)
    assert shapes["fc"] == (10,)


def test_densenet121_gets_a_stem_for_small_pictures():
    network = from_torchvision("densenet121", num_classes=7)
    assert network.features.conv0.kernel_size == (3, 3)
    assert network.features.conv0.stride == (1, 1)
    assert isinstance(network.features.pool0, nn.Identity)
    shapes = shapes_after_each_layer(network, pictures())
    assert shapes["features.denseblock1.denselayer1.conv1"] == (128, 32, 32)
    assert shapes["features.norm5"] == (1024, 4, 4)
    assert shapes["classifier"] == (7,)


def test_torchvision_network_can_be_left_as_it_is():
    from torchvision.models import resnet18

    for network in (
        from_torchvision(resnet18, adapt=False),
        from_torchvision(resnet18, image_size=65),
    ):
        assert network.conv1.stride == (2, 2) and isinstance(network.maxpool, nn.MaxPool2d)


def test_torchvision_network_without_a_known_stem_is_left_as_torchvision_made_it():
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(3)
    network = from_torchvision("mobilenet_v3_small")
    torch.manual_seed(3)
    expected = mobilenet_v3_small(num_classes=10)
    assert str(network) == str(expected)
    ours, theirs = dict(network.state_dict()), dict(expected.state_dict())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_torchvision_arguments_arrive():
    network = from_torchvision("squeezenet1_1", num_classes=5, dropout=0.25)
    assert network.classifier[0].p == 0.25 and network(pictures()).shape == (2, 5)


def test_vision_transformer_is_told_the_picture_size():
    network = from_torchvision("vit_b_32", image_size=64)
    assert network.image_size == 64 and network.seq_length == 5
    assert network(pictures(size=64)).shape == (2, 10)


def test_googlenet_hands_out_plain_logits_in_training():
    assert from_torchvision("googlenet")(pictures()).shape == (2, 10)


def test_networks_that_cannot_take_small_pictures_are_refused():
    for name in ("alexnet", "maxvit_t"):
        with pytest.raises(ValueError, match=rf"torchvision\.models\.{name} .* 32x32 pictures"):
            from_torchvision(f"torchvision.models.{name}")


def test_adapting_insists_on_a_known_stem():
    with pytest.raises(ValueError, match="no stem for small pictures is known for SqueezeNet"):
        from_torchvision("squeezenet1_1", adapt=True)
    with pytest.raises(ValueError, match="no stem for small pictures is known for CNN"):
        adapt_to_small_pictures(CNN(), 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"function": "torchvision.models.resnet19"}, 'network "resnet19"; did you mean resnet18'),
        ({"function": "torchvision.models.ResNet18"}, 'network "ResNet18"; did you mean resnet18'),
        ({"function": "torchvision.models.video.r3d_18"}, "there is no network"),
        ({"function": "resnet18", "depth": 3}, "unexpected keyword argument 'depth'"),
        ({"function": "resnet18", "weights": "DEFAULT"}, "pretrained weights belong to 1000"),
        ({"function": "resnet18", "pretrained": True}, "pretrained weights belong to 1000"),
    ],
)
def test_wrong_torchvision_requests_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        from_torchvision(**call)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
        *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "swin_t"),
        *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_v2_t"),
    ],
)
def test_torchvisions_families_train_on_small_pictures(name):
    network = from_torchvision(name)
    nn.functional.cross_entropy(network(pictures()), torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_torchvision_is_not_imported_with_the_module():
    code = "import sys, research.networks; sys.exit('torchvision' in sys.modules)"
    root = Path(inspect.getfile(CNN)).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# Configuration


def test_signature_is_all_that_a_command_line_needs():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    arguments = {"widths": "[8,16]", "activation": "ReLU", "padding_mode": "reflect", "dropout": 0}
    flags = [f"--network.{name}={value}" for name, value in arguments.items()]
    parsed = parser.parse_args(["--network=research.networks.CNN", *flags])
    network = parser.instantiate(parsed).network
    assert network.features.conv2.out_channels == 16
    assert network.features.conv1.padding_mode == "reflect"
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args(["--network=research.networks.CNN", "--network.padding_mode=mirror"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "relu"}, 'activation: there is no activation "relu"; did you mean ReLU?'),
        (
            {"activation": "Threshold"},
            'activation: there is no activation "Threshold".* Known: CELU',
        ),
        (
            {"normalization": "BatchNorm"},
            "did you mean BatchNorm2d.* Known: BatchNorm2d, GroupNorm",
        ),
        ({"pooling": "MeanPool2d"}, "pooling: .*did you mean .*Pool2d.* Known: AvgPool2d"),
        ({"num_classes": 1}, "num_classes: 1 given, but it must be at least 2"),
        ({"image_size": 7}, "image_size: 7 pixels do not survive 3 poolings by 2; .* at least 8"),
        ({"image_size": 0}, "image_size: 0 given"),
        ({"in_channels": 0}, "in_channels: 0 given"),
        ({"hidden": 0}, "hidden: 0 given"),
        ({"widths": ()}, r"widths: \(\) given"),
        ({"widths": (8, -1)}, r"widths: \(8, -1\) given"),
        ({"kernel_size": 4}, "kernel_size: 4 is even.* choose 3 or 5"),
        ({"kernel_size": 0}, "kernel_size: 0 given"),
        ({"dropout": -0.1}, "dropout probability has to be between 0 and 1, but got -0.1"),
        ({"dropout": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        (
            {"padding_mode": "reflect", "image_size": 8},
            "reflect.* needs a map of 3 .* but one has 2",
        ),
        ({"padding_mode": "circular", "kernel_size": 35, "image_size": 16}, "needs a map of 17"),
    ],
)
def test_wrong_argument_of_cnn_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CNN(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "Relu6"}, "did you mean ReLU6?"),
        ({"normalization": "groupnorm"}, "did you mean GroupNorm?"),
        ({"global_pooling": "MaxPool1d"}, "global_pooling: .*did you mean MaxPool2d?"),
        ({"width": 0}, "width: 0 given"),
        ({"num_classes": 0}, "num_classes: 0 given"),
        ({"image_size": 7}, "image_size: 7 given, but it must be at least 8"),
    ],
)
def test_wrong_argument_of_resnet9_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet9(**arguments)


@pytest.mark.parametrize("network", [CNN, ResNet9])
def test_every_argument_is_described_where_the_help_looks_for_it(network):
    for name in inspect.signature(network).parameters:
        assert f"\n        {name}: " in network.__doc__, name
