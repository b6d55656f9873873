"""Augmentation against slow references that treat one picture after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.augmentation import Augmentation, Draws, crop, cut_out, flip

COLOR = torch.tensor([9, 99, 199], dtype=torch.uint8)


def random_pixels(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * 10_000 + height * 100 + width)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def cropped_one_by_one(pixels, offsets, padding):
    height, width = pixels.shape[1:3]
    border = ((padding, padding), (padding, padding), (0, 0))
    return torch.stack(
        [
            torch.from_numpy(np.pad(picture, border, mode="reflect"))[
                row : row + height, column : column + width
            ]
            for picture, (row, column) in zip(pixels.numpy(), offsets.tolist(), strict=True)
        ]
    )


def flipped_one_by_one(pixels, flips):
    return torch.stack([p.flip(1) if f else p for p, f in zip(pixels, flips.tolist(), strict=True)])


def cut_one_by_one(pixels, centers, side, color):
    pixels = pixels.clone()
    for picture, (row, column) in zip(pixels, centers.tolist(), strict=True):
        for y in range(row - side // 2, row - side // 2 + side):
            for x in range(column - side // 2, column - side // 2 + side):
                if 0 <= y < picture.shape[0] and 0 <= x < picture.shape[1]:
                    picture[y, x] = color
    return pixels


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(2, 9), st.integers(2, 9))
def test_crop_is_a_window_of_the_mirrored_picture(data, height, width):
    padding = data.draw(st.integers(1, min(height, width) - 1))
    pixels = random_pixels(5, height, width)
    offsets = torch.tensor(
        data.draw(st.lists(st.tuples(*[st.integers(0, 2 * padding)] * 2), min_size=5, max_size=5))
    )
    expected = cropped_one_by_one(pixels, offsets, padding)
    assert torch.equal(crop(pixels, offsets, padding), expected)


def test_flip_mirrors_only_the_chosen_pictures():
    pixels, flips = random_pixels(6, 5, 4), torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    assert torch.equal(flip(pixels, flips), flipped_one_by_one(pixels, flips))


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(2, 9), st.integers(2, 9))
def test_crop_and_flip_at_once_are_crop_then_flip(data, height, width):
    padding = data.draw(st.integers(1, min(height, width) - 1))
    pixels = random_pixels(4, height, width)
    offsets = st.lists(st.tuples(*[st.integers(0, 2 * padding)] * 2), min_size=4, max_size=4)
    offsets = torch.tensor(data.draw(offsets))
    flips = torch.tensor(data.draw(st.lists(st.booleans(), min_size=4, max_size=4)))
    expected = flipped_one_by_one(cropped_one_by_one(pixels, offsets, padding), flips)
    assert torch.equal(crop(pixels, offsets, padding, flips), expected)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 10))
def test_cutout_is_a_square_clipped_at_the_border(data, height, width, side):
    pixels = random_pixels(4, height, width)
    center = st.tuples(st.integers(0, height - 1), st.integers(0, width - 1))
    centers = torch.tensor(data.draw(st.lists(center, min_size=4, max_size=4)))
    expected = cut_one_by_one(pixels, centers, side, COLOR)
    assert torch.equal(cut_out(pixels, centers, side, COLOR), expected)


def test_all_together_are_crop_then_flip_then_cutout():
    augmentation = Augmentation(crop_padding=4, horizontal_flip=True, cutout=7)
    pixels = random_pixels(200, 32, 32)
    before = pixels.clone()
    draws = augmentation.draw(200, 32, 32, seed=3, epoch=1)
    expected = cropped_one_by_one(pixels, draws.offsets, 4)
    expected = flipped_one_by_one(expected, draws.flips)
    expected = cut_one_by_one(expected, draws.centers, 7, COLOR)
    assert torch.equal(augmentation(pixels, draws, COLOR), expected)
    assert torch.equal(pixels, before)


def test_off_means_untouched_and_undrawn():
    augmentation = Augmentation()
    draws = augmentation.draw(3, 8, 8, seed=0, epoch=0)
    assert draws == Draws(None, None, None)
    pixels = random_pixels(3, 8, 8)
    assert torch.equal(augmentation(pixels, draws, COLOR), pixels)


def test_draws_are_uniform_and_differ_from_picture_to_picture():
    augmentation = Augmentation(crop_padding=2, horizontal_flip=True, cutout=1)
    draws = augmentation.draw(30_000, 6, 4, seed=0, epoch=0)
    for drawn, choices in (
        (draws.offsets[:, 0], 5),
        (draws.offsets[:, 1], 5),
        (draws.flips.long(), 2),
        (draws.centers[:, 0], 6),
        (draws.centers[:, 1], 4),
    ):
        counts = torch.bincount(drawn, minlength=choices)
        assert len(counts) == choices
        # Six standard deviations of a binomial count.
        expected = 30_000 / choices
        assert (counts - expected).abs().max() < 6 * expected**0.5
    together = draws.offsets[:, 0] * 5 + draws.offsets[:, 1]
    assert torch.bincount(together, minlength=25).min() > 900


def test_draws_are_fixed_by_seed_and_epoch():
    augmentation = Augmentation(crop_padding=2, horizontal_flip=True, cutout=3)
    first = augmentation.draw(500, 32, 32, seed=5, epoch=2)
    again = augmentation.draw(500, 32, 32, seed=5, epoch=2)
    for name in ("offsets", "flips", "centers"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        for seed, epoch in ((6, 2), (5, 3), (2, 5)):
            other = augmentation.draw(500, 32, 32, seed=seed, epoch=epoch)
            assert not torch.equal(getattr(first, name), getattr(other, name))


def test_one_augmentation_does_not_change_the_draws_of_another():
    alone = Augmentation(crop_padding=2).draw(100, 32, 32, seed=0, epoch=0)
    joined = Augmentation(2, True, 5).draw(100, 32, 32, seed=0, epoch=0)
    assert torch.equal(alone.offsets, joined.offsets)
    flips = Augmentation(horizontal_flip=True).draw(100, 32, 32, seed=0, epoch=0).flips
    assert torch.equal(flips, joined.flips)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_alters_pictures_exactly_like_the_cpu():
    augmentation = Augmentation(crop_padding=4, horizontal_flip=True, cutout=8)
    pixels = random_pixels(64, 32, 32)
    draws = augmentation.draw(64, 32, 32, seed=0, epoch=0)
    device = torch.device("cuda")
    there = augmentation(pixels.to(device), draws.to(device), COLOR.to(device))
    assert torch.equal(there.cpu(), augmentation(pixels, draws, COLOR))
