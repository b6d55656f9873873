"""A batch on paper shows the bytes that the network was fed with."""

import numpy as np
import pytest
import torch
from PIL import Image

from research.data.normalization import Normalization, normalize
from research.pictures.batch import draw_batch, make_sheet, undo_normalization
from research.pictures.sheet import fit_tiles

NORMALIZATION = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def pictures(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    shape = (count, side, side, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def feed(pixels: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    factors = normalization.factors(pixels.shape[2])
    return normalize(pixels, *factors).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "normalization",
    [
        NORMALIZATION,
        Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        Normalization((0.9, 0.5, 0.1), (0.01, 0.002, 0.5)),
    ],
)
def test_normalization_is_undone_exactly(normalization):
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(
        undo_normalization(feed(every_byte, normalization), normalization), every_byte
    )


def test_what_is_no_colour_is_clipped():
    images = torch.tensor([-1e9, 1e9, float("nan"), float("inf")]).view(1, 1, 2, 2)
    pixels = undo_normalization(images.expand(1, 3, 2, 2), NORMALIZATION)
    assert pixels[0, :, :, 0].tolist() == [[0, 255], [0, 255]]


@pytest.mark.parametrize("side", [8, 32, 90])
def test_the_sheet_shows_each_picture_pixel_by_pixel(tmp_path, side):
    pixels = pictures(9, side)
    labels = torch.arange(9) % 2
    path = tmp_path / "batch.png"
    draw_batch(feed(pixels, NORMALIZATION), labels, NORMALIZATION, ["cat", "dog"], path, count=9)
    factor = 96 // side
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    for number, (x, row) in enumerate([*((20 + 112 * i, 0) for i in range(8)), (20, 1)]):
        y = 68 + row * (side * factor + 26)
        shown = sheet[y : y + side * factor, x : x + side * factor]
        for offset in (0, factor - 1):
            assert (shown[offset::factor, offset::factor] == pixels[number].numpy()).all()


def test_large_pictures_are_reduced_to_means_of_squares():
    pixels = pictures(2, 224).numpy()
    tiles = fit_tiles(pixels, 96)
    assert tiles.shape == (2, 75, 75, 3)
    expected = pixels[:, :222, :222].reshape(2, 74, 3, 74, 3, 3).mean(axis=(2, 4))
    assert np.abs(tiles[:, :74, :74] - expected).max() <= 1


@pytest.mark.parametrize("count", [1, 5, 32])
def test_sheets_of_any_number_and_any_names_are_drawn(tmp_path, count):
    names = ["$x_{", "猫" * 99, "", "a"] * 8
    make_sheet(pictures(count, 64).numpy(), names[:count], "title", "subtitle").save(
        tmp_path / "sheet.png"
    )
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width <= 1000 and image.height <= 600


def test_a_batch_of_fewer_than_asked_for_is_drawn(tmp_path):
    images = torch.zeros(3, 3, 256, 256)
    draw_batch(images, torch.zeros(3, dtype=torch.long), NORMALIZATION, ["x"], tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 0
