"""What is handed out: every picture once, in an order that only seed and epoch decide."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torchvision.transforms.v2 import functional as pictures

from research.data import batches as making
from research.data.augmentation import Augmentation
from research.data.batches import Batches
from research.data.normalization import IDENTITY, Normalization
from research.data.split import Split

ALL = Augmentation(crop_padding=2, horizontal_flip=True, cutout=3)


def numbered(count: int, size: int = 4) -> Split:
    """A split whose labels are the places of the pictures, and whose pictures are random."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def labels_of(batches) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 4), st.booleans())
def test_every_picture_is_handed_out_once_over_all_processes(data, world_size, shuffle):
    batch_size = data.draw(st.integers(world_size, 9))
    count = data.draw(st.integers(world_size, 40))
    split = numbered(count, size=1)
    ranks = [
        Batches(split, batch_size, IDENTITY, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [labels_of(batches) for batches in ranks]
    assert len({len(share) for share in shares} | {len(batches) for batches in ranks}) == 1
    assert all(len(batch) > 0 for share in shares for batch in share)
    for number, parts in enumerate(zip(*shares, strict=True)):
        sizes = [len(labels) for labels in parts]
        assert all(batches.share_sizes(number) == sizes for batches in ranks)
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) < batch_size + world_size
    everything = [label for share in shares for batch in share for label in batch]
    assert sorted(everything) == list(range(count))


def test_the_shares_of_a_batch_are_together_the_batch_of_one_process():
    split = numbered(52, size=8)

    def batches(rank, world_size):
        settings = {"augmentation": ALL, "shuffle": True, "seed": 4}
        return list(Batches(split, 16, IDENTITY, rank=rank, world_size=world_size, **settings))

    for (images, labels), *parts in zip(
        batches(0, 1), *(batches(rank, 3) for rank in range(3)), strict=True
    ):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_batches_are_normalized_floats_in_channels_last_order():
    split = numbered(10)
    normalization = Normalization(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    batches = Batches(split, 4, normalization)
    assert len(batches) == 3
    start = 0
    for images, labels in batches:
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        mean = torch.tensor(normalization.mean).view(3, 1, 1)
        std = torch.tensor(normalization.std).view(3, 1, 1)
        expected = (split.images[start : start + len(labels)] / 255 - mean) / std
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
        start += len(labels)
    assert start == 10


@given(count=st.integers(1, 200), batch_size=st.integers(1, 250))
def test_batches_are_as_few_as_can_be_and_equal_to_within_one(count, batch_size):
    """A small rest at the end of an epoch would be a noisy step right before validation."""
    sizes = [len(batch) for batch in labels_of(Batches(numbered(count), batch_size, IDENTITY))]
    assert sum(sizes) == count
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-count // batch_size)


def test_altered_pictures_belong_to_their_labels():
    split = numbered(40, size=8)
    batches = Batches(split, 16, IDENTITY, augmentation=ALL, shuffle=True, seed=1)
    draws = ALL.draw(40, 8, 8, seed=1, epoch=0)
    place = 0
    for images, labels in batches:
        pixels = split.pixels[labels]
        expected = ALL(pixels, draws[slice(place, place + len(labels))], IDENTITY.color())
        torch.testing.assert_close(images.permute(0, 2, 3, 1), expected / 255)
        place += len(labels)


def test_batches_are_what_torchvision_makes_picture_by_picture_of_the_same_draws():
    split = numbered(90, size=32)
    normalization = Normalization(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    augmentation = Augmentation(crop_padding=4, horizontal_flip=True)
    draws = augmentation.draw(90, 32, 32, seed=7, epoch=0)
    drawn = zip(draws.offsets.tolist(), draws.flips.tolist(), strict=True)
    batches = Batches(split, 16, normalization, augmentation=augmentation, shuffle=True, seed=7)
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            (top, left), flipped = next(drawn)
            picture = pictures.pad(split.images[label], 4, padding_mode="reflect")
            picture = pictures.crop(picture, top, left, 32, 32)
            picture = pictures.horizontal_flip(picture) if flipped else picture
            picture = pictures.to_dtype(picture, torch.float32, scale=True)
            expected = pictures.normalize(picture, normalization.mean, normalization.std)
            torch.testing.assert_close(image, expected, atol=2e-6, rtol=1e-6)
    assert next(drawn, None) is None


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
def test_how_many_are_made_at_once_changes_no_bit(data, world_size, of_block, of_piece):
    """Nor does where an epoch is taken up again."""
    count = data.draw(st.integers(world_size, 40))
    rank = data.draw(st.integers(0, world_size - 1))
    batch_size = data.draw(st.integers(world_size, 12))
    split = numbered(count, size=5)
    settings = {"augmentation": ALL, "shuffle": True, "rank": rank, "world_size": world_size}

    def made(of_block, of_piece, used=0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(making.BYTES_OF_BLOCK, "cpu", of_block * 5 * 5 * 3)
            patch.setitem(making.BYTES_OF_PIECE, "cpu", of_piece * 5 * 5 * 3)
            batches = Batches(split, batch_size, IDENTITY, place=lambda: (2, used), **settings)
        if used > 0:
            batches.load_state_dict({"epoch": 2, "batch": used})
        return list(batches)

    expected = made(1, 1)
    used = data.draw(st.integers(0, len(expected) - 1))
    assert len(made(of_block, of_piece, used)) == len(expected) - used
    for (images, labels), (same_images, same_labels) in zip(
        made(of_block, of_piece, used), expected[used:], strict=True
    ):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_batches_that_were_handed_out_are_kept_by_nobody():
    """So that only one block of them is in memory, and none during a validation."""
    batches = Batches(numbered(20), 4, IDENTITY)
    iteration = iter(batches)
    images, _ = next(iteration)
    made = StorageWeakRef(images.untyped_storage())
    for _ in range(len(batches) - 1):
        images, _ = next(iteration)
    assert not made.expired()  # they were made in one go
    del images
    assert made.expired()


def test_order_and_alterations_do_not_depend_on_the_batch_size():
    def epoch(batch_size):
        batches = Batches(numbered(50, 8), batch_size, IDENTITY, augmentation=ALL, shuffle=True)
        images, labels = zip(*batches, strict=True)
        return torch.cat(images), torch.cat(labels)

    for small, large in zip(epoch(7), epoch(50), strict=True):
        assert torch.equal(small, large)


def test_the_global_generator_is_neither_read_nor_moved():
    batches = Batches(numbered(30), 8, IDENTITY, augmentation=ALL, shuffle=True)
    again = Batches(numbered(30), 8, IDENTITY, augmentation=ALL, shuffle=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(batches)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_augmentation_leaves_the_order_alone():
    plain = Batches(numbered(30), 8, IDENTITY, shuffle=True)
    altered = Batches(numbered(30), 8, IDENTITY, shuffle=True, augmentation=ALL)
    assert labels_of(plain) == labels_of(altered)


def test_epochs_and_seeds_have_different_orders():
    def order(seed, epoch):
        return tuple(map(tuple, labels_of(_at(epoch, seed=seed))))

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(2, 1) == order(2, 1)


def _at(epoch: int, **settings) -> Batches:
    return Batches(numbered(30), 8, IDENTITY, shuffle=True, place=lambda: (epoch, 0), **settings)


def test_without_a_trainer_iterations_count_as_epochs():
    batches = Batches(numbered(30), 8, IDENTITY, shuffle=True)
    for epoch in range(3):
        assert labels_of(batches) == labels_of(_at(epoch))


def test_without_reshuffling_the_order_stays_and_the_alterations_vary():
    split = numbered(30, 8)
    batches = Batches(split, 8, IDENTITY, shuffle=True, reshuffle=False, augmentation=ALL)
    first, second = list(batches), list(batches)
    assert [y.tolist() for _, y in first] == [y.tolist() for _, y in second]
    assert not torch.equal(first[0][0], second[0][0])


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_an_epoch_goes_on_where_it_was_left(stop):
    def loader():
        return Batches(numbered(30, 8), 8, IDENTITY, shuffle=True, augmentation=ALL, seed=3)

    whole = loader()
    expected = [*whole, *whole, *whole]
    broken = loader()
    list(broken)
    for _, _ in zip(range(stop), broken, strict=False):
        pass
    resumed = loader()
    resumed.load_state_dict(broken.state_dict())
    # Of an epoch that was handed out to its end nothing is left: the next one comes.
    rest = [*resumed] if stop == 4 else [*resumed, *resumed]
    for (images, labels), (same_images, same_labels) in zip(
        rest, expected[4 + stop :], strict=True
    ):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_with_a_trainer_its_count_of_used_batches_holds():
    state = {"epoch": 5, "batch": 3}  # three were taken, two were learnt from
    batches = Batches(numbered(30), 8, IDENTITY, shuffle=True, place=lambda: (5, 2))
    batches.load_state_dict(state)
    assert labels_of(batches) == labels_of(_at(5))[2:]
    assert labels_of(batches) == labels_of(_at(5)), "only the first iteration is a resumption"


def test_nothing_is_drawn_before_the_first_batch_is_asked_for():
    asked = []

    def place():
        asked.append(True)
        return 0, 0

    iterator = iter(Batches(numbered(8), 4, IDENTITY, place=place))
    assert not asked  # Lightning makes iterators before it knows the epoch
    next(iterator)
    assert asked


def test_a_batch_that_is_kept_or_changed_has_its_own_memory():
    split = numbered(8)
    pristine = split.images.clone()
    batches = Batches(split, 4, IDENTITY)
    kept = list(batches)
    copies = [(images.clone(), labels.clone()) for images, labels in kept]
    for images, labels in batches:
        images.zero_()
        labels.zero_()
    for (images, labels), (same_images, same_labels) in zip(kept, copies, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert torch.equal(split.images, pristine)
    assert split.labels.tolist() == list(range(8))


def test_what_is_written_into_a_batch_does_not_reach_those_beside_it():
    batches, others = (
        Batches(numbered(20, 8), 4, IDENTITY, augmentation=ALL, shuffle=True) for _ in range(2)
    )
    weight = torch.ones(3, 1, 1, requires_grad=True)
    learnt = torch.zeros(())
    both = zip(batches, list(others), strict=True)
    for number, ((images, labels), (same_images, same_labels)) in enumerate(both):
        assert not images.requires_grad
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
        if number % 2 == 0:
            learnt = learnt + (images * weight).sum()
        else:
            images.mul_(2 * weight)
            labels.zero_()
    learnt.backward()  # which refuses if anything that it needs has been written to


def test_too_few_pictures_for_the_processes_are_refused():
    with pytest.raises(ValueError, match=r"data.batch_size is 3, for all 4 processes"):
        Batches(numbered(8), 3, IDENTITY, world_size=4)
    with pytest.raises(ValueError, match="3 pictures for 4 processes"):
        Batches(numbered(3), 8, IDENTITY, world_size=4)


def test_a_split_elsewhere_is_brought_to_the_device_batch_by_batch():
    # The meta device has no memory, but everything on the way to it runs for real.
    batches = Batches(
        numbered(10, 8), 4, IDENTITY, augmentation=ALL, shuffle=True, device=torch.device("meta")
    )
    shapes = []
    for images, labels in batches:
        assert images.device.type == labels.device.type == "meta"
        shapes.append((tuple(images.shape), tuple(labels.shape)))
    assert shapes == [((4, 3, 8, 8), (4,))] + [((3, 3, 8, 8), (3,))] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lies_there", [True, False])
def test_a_gpu_gets_the_same_batches_as_the_cpu(lies_there):
    device = torch.device("cuda")
    split = numbered(300, 32)
    settings = {"augmentation": ALL, "shuffle": True}
    here = Batches(split, 64, IDENTITY, **settings)
    there = Batches(
        split.to(device) if lies_there else split, 64, IDENTITY, device=device, **settings
    )
    for (images, labels), (gpu_images, gpu_labels) in zip(here, there, strict=True):
        assert gpu_images.device.type == gpu_labels.device.type == "cuda"
        assert gpu_images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(gpu_images.cpu(), images)
        assert torch.equal(gpu_labels.cpu(), labels)
