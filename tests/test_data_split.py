"""How pictures are stored, parted and normalised."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.normalization import IDENTITY, measure, normalize
from research.data.split import Split, part
from research.data.streams import stream


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    fraction=st.floats(0, 0.99),
    seed=st.integers(),
)
def test_parting_is_complete_disjoint_and_stratified(labels, fraction, seed):
    labels = torch.tensor(labels)
    kept, taken = part(labels, fraction, stream(seed, "test"))
    assert sorted([*kept.tolist(), *taken.tolist()]) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept.tolist()) and taken.tolist() == sorted(taken.tolist())
    for label in labels.unique():
        members = int((labels == label).sum())
        count = int((labels[taken] == label).sum())
        if fraction == 0 or members == 1:
            assert count == 0
        else:
            assert 1 <= count <= members - 1
            assert abs(count - members * fraction) <= 0.5 or count in (1, members - 1)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 60),
    fraction=st.floats(0, 0.99),
    at_once=st.integers(1, 70),
    seed=st.integers(),
)
def test_parting_in_place_gives_what_copies_give(count, fraction, at_once, seed):
    labels = torch.arange(count) % 3
    images = torch.randint(256, (count, 3, 4, 5), dtype=torch.uint8, generator=stream(seed, "i"))
    split = Split(images, labels)
    kept, taken = part(labels, fraction, stream(seed, "test"))
    copies = split.select(kept), split.select(taken)
    memory = split.images.untyped_storage().data_ptr()
    with patch("research.data.split.ROWS_AT_ONCE", at_once):
        parts = split.rearrange(kept, taken)
    for one, other in zip(parts, copies, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.images.untyped_storage().data_ptr() == memory


def test_parting_is_fixed_by_the_seed():
    labels = torch.arange(200) % 4
    _, first = part(labels, 0.25, stream(1, "validation"))
    _, again = part(labels, 0.25, stream(1, "validation"))
    _, other = part(labels, 0.25, stream(2, "validation"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_streams_of_different_purpose_are_unrelated():
    def numbers(*purpose):
        return torch.rand(4, generator=stream(*purpose)).tolist()

    assert numbers(0, "order", 1) == numbers(0, "order", 1)
    distinct = [
        numbers(*purpose)
        for purpose in ((0, "order", 1), (1, "order", 0), (0, "flip", 1), (-1, "order", 1), (0,))
    ]
    assert len({tuple(drawn) for drawn in distinct}) == len(distinct)


def test_any_memory_order_is_stored_as_channels_last():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    split = Split(images, torch.tensor([0, 1]))
    assert torch.equal(split.images, images)
    assert split.images.is_contiguous(memory_format=torch.channels_last)
    assert split.pixels.is_contiguous() and split.pixels.shape == (2, 4, 5, 3)
    assert split.pixels.data_ptr() == split.images.data_ptr()
    chosen = split.select(torch.tensor([1]))
    assert torch.equal(chosen.images, images[1:]) and chosen.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), r"torch.float32 \(2, 3, 4, 4\)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1]), r"\(2, 4, 4, 3\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0]), r"int64 \(1,\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.tensor([0.0]), "torch.float32"),
    ],
)
def test_pictures_and_labels_of_the_wrong_kind_are_refused(images, labels, told):
    with pytest.raises(ValueError, match=told):
        Split(images, labels)


def test_normalized_pictures_have_mean_zero_and_deviation_one():
    pixels = torch.randint(0, 256, (450, 6, 5, 3), dtype=torch.uint8)
    pixels[..., 1] //= 3
    found = measure(pixels)
    reference = pixels.double() / 255
    torch.testing.assert_close(
        torch.tensor(found.mean, dtype=torch.float64), reference.mean((0, 1, 2))
    )
    torch.testing.assert_close(
        torch.tensor(found.std, dtype=torch.float64), reference.std((0, 1, 2), correction=0)
    )
    normal = normalize(pixels, *found.factors(width=5))
    expected = (reference - torch.tensor(found.mean)) / torch.tensor(found.std)
    torch.testing.assert_close(normal, expected.float(), atol=1e-5, rtol=1e-5)
    assert found.color().tolist() == [round(255 * mean) for mean in found.mean]


def test_without_normalization_values_lie_in_zero_to_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert normalize(pixels, *IDENTITY.factors(width=1)).flatten().tolist() == pytest.approx(
        [0, 0.2, 1]
    )


def test_a_channel_without_variation_stays_finite():
    pixels = torch.full((3, 2, 2, 3), 7, dtype=torch.uint8)
    found = measure(pixels)
    assert found.std == (1.0, 1.0, 1.0)
    assert normalize(pixels, *found.factors(width=2)).abs().max() < 1e-6


def test_digest_tells_pictures_labels_and_order_apart():
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    split = Split(pixels, torch.tensor([0, 1]))
    in_another_memory_order = Split(
        pixels.contiguous(memory_format=torch.channels_last), split.labels
    )
    assert split.digest() == in_another_memory_order.digest()
    changed = pixels.clone()
    changed[0, 0, 0, 0] += 1
    others = [
        Split(changed, split.labels),
        Split(pixels, torch.tensor([1, 0])),
        Split(pixels.flip(0), split.labels.flip(0)),
        Split(pixels[:1], split.labels[:1]),
    ]
    assert len({split.digest(), *(other.digest() for other in others)}) == 5
