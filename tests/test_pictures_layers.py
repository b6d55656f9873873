"""Looking at a network's layers shows what they do and changes nothing."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from research.data.normalization import IDENTITY
from research.networks import CNN, ResNet9, from_torchvision
from research.pictures.layers import (
    color_filters,
    color_maps,
    draw_feature_maps,
    draw_filters,
    record_maps,
)


def hooks_in(network: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()
    )


def small_cnn() -> CNN:
    return CNN(
        activation="ReLU", normalization="BatchNorm2d", widths=(8, 8), image_size=8, dropout=0.5
    )


def test_maps_are_those_that_the_layers_hand_on():
    network, images = small_cnn().eval(), torch.randn(2, 3, 8, 8)
    layers = record_maps(network, images, channels=3)
    names = [f"features.{role}{i}" for i in (1, 2) for role in ("conv", "activation", "pool")]
    assert [maps.name for maps in layers] == names
    x = images
    expected = {}
    for name, layer in network.features.named_children():
        x = layer(x)
        expected[f"features.{name}"] = x.detach()
    for maps in layers:
        assert torch.equal(maps.values, expected[maps.name][:, :3])
        assert maps.shape == tuple(expected[maps.name].shape[1:])


def test_an_activation_in_place_does_not_change_the_map_before_it():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    before, after = record_maps(network, torch.randn(1, 3, 8, 8))
    assert before.values.min() < 0 <= after.values.min()


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(tmp_path, fails):
    network = small_cnn()
    network.features.norm1.eval()
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    before, random_state = hooks_in(network), torch.get_rng_state()
    images = torch.randn(2, 3, 9 if fails else 8, 9 if fails else 8)
    torch.set_rng_state(random_state)
    try:
        draw_feature_maps(network, images, IDENTITY, tmp_path / "maps.png")
    except ValueError:
        assert fails
    else:
        assert not fails
    assert [module.training for module in network.modules()] == modes
    assert hooks_in(network) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_layer_that_draws_random_numbers_leaves_the_random_state(tmp_path):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    network = nn.Sequential(Noise(), nn.Conv2d(3, 4, 3))
    state = torch.get_rng_state()
    draw_feature_maps(network, torch.zeros(1, 3, 8, 8), IDENTITY, tmp_path / "maps.png")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_network_shows_its_layers():
    network, images = small_cnn(), torch.randn(2, 3, 8, 8)
    expected = record_maps(network, images)
    network.compile(backend="eager")
    maps = record_maps(network, images)
    assert [m.name for m in maps] == [m.name for m in expected]
    assert all(torch.equal(a.values, b.values) for a, b in zip(maps, expected, strict=True))


def test_in_half_precision_and_in_inference_mode_too():
    network = small_cnn().to(torch.bfloat16)
    with torch.inference_mode():
        layers = record_maps(network, torch.randn(2, 3, 8, 8))
    assert len(layers) == 6 and all(maps.values.dtype == torch.float32 for maps in layers)


def test_of_a_deep_network_layers_from_first_to_last_are_shown():
    network = from_torchvision("resnet18")
    everything = record_maps(network, torch.randn(1, 3, 32, 32), channels=1, most=1000)
    chosen = record_maps(network, torch.randn(1, 3, 32, 32), channels=1, most=12)
    assert len(everything) > 30 and len(chosen) == 12
    assert chosen[0].name == everything[0].name == "conv1"
    assert chosen[-1].name == everything[-1].name == "layer4.1.relu"


@pytest.mark.parametrize(
    ("network", "side", "has_filters"),
    [
        (CNN(), 32, True),
        (ResNet9(width=4), 32, True),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), 8, False),
        (nn.Sequential(nn.Linear(8, 5)), 8, False),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3)), 8, False),
        (nn.Sequential(nn.Conv2d(3, 200, 5)), 100, True),
    ],
)
def test_networks_of_any_structure_are_drawn(tmp_path, network, side, has_filters):
    maps, filters = tmp_path / "maps.png", tmp_path / "filters.png"
    draw_feature_maps(network, torch.rand(4, 3, side, side), IDENTITY, maps)
    assert draw_filters(network, filters) is has_filters is filters.exists()
    for path in [maps, filters] if has_filters else [maps]:
        with Image.open(path) as image:
            image.load()
            assert 500 <= image.width <= 1600 and 100 < image.height < 1200


def test_the_sheet_begins_with_the_picture_itself(tmp_path):
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2) / 255
    draw_feature_maps(CNN(), images, IDENTITY, tmp_path / "maps.png")
    with Image.open(tmp_path / "maps.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    assert (sheet[68:196:4, 210:338:4] == pixels[0].numpy()).all()


def test_each_map_goes_from_dark_to_bright_on_its_own():
    values = np.stack([np.linspace(-3, -1, 16), np.linspace(0, 1e6, 16), np.full(16, 7.0)])
    values = np.concatenate([values, np.full((1, 16), np.nan), values[:1]])
    values[4, 3] = np.inf
    colors = color_maps(values.reshape(5, 4, 4))
    assert colors.dtype == np.uint8 and colors.shape == (5, 4, 4, 3)
    assert (colors[0] == colors[1]).all()
    assert colors[0, 0, 0].sum() < colors[0, -1, -1].sum()
    assert (colors[2] == colors[0, 0, 0]).all() and (colors[3] == colors[0, 0, 0]).all()
    assert (colors[4, 3] == colors[0, 3]).all()


def test_filters_are_grey_where_they_are_zero():
    weights = torch.zeros(3, 3, 2, 2)
    weights[0, 0, 0, 0], weights[1, 2, 1, 1] = -5.0, 1e-3
    tiles = color_filters(weights)
    assert tiles[0, 0, 0].tolist() == [0, 128, 128] and tiles[1, 1, 1].tolist() == [128, 128, 255]
    assert (tiles[2] == 128).all()
    assert (color_filters(torch.randn(4, 1, 3, 3)).std(axis=3) == 0).all()
