"""Pictures are read once for all trainings of a process that ask for the same ones."""

import gc

import pytest
import torch

from research.data import shared
from research.data.kept import Kept
from research.data.module import ImageData
from research.data.split import Split
from research.data.synthetic import Synthetic
from research.processes.launch import HOST_GROUP
from research.training import fit

SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_test_batches", "0")


class Reads:
    """How often pictures were read."""

    def __init__(self, monkeypatch):
        self.count, read = 0, Synthetic.read

        def counted(data):
            self.count += 1
            return read(data)

        monkeypatch.setattr(Synthetic, "read", counted)


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to share in that nobody else uses."""
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(shared, "find_places", lambda: [folder])
    return folder


def made(kept: Kept, **settings) -> ImageData:
    """As `build_data` makes it."""
    data = Synthetic(num_train=100, num_test=20, **settings)
    asked = data.asked()
    found = kept.find(asked)
    if found is None:
        data.setup("fit")
        kept.keep(asked, data)
    else:
        data.take_over(found)
        data.setup("fit")
    return data


def test_a_second_training_reads_nothing_and_is_the_same(small, reads):
    kept = Kept()
    configuration = small(*SHORT, "--data.horizontal_flip", "true")
    first, second = fit(configuration, kept=kept), fit(configuration, kept=kept)
    assert reads.count == 1
    fresh = fit(configuration)
    assert reads.count == 2
    assert first.metrics == second.metrics == fresh.metrics


def test_what_does_not_shape_the_splits_does_not_part_them(reads):
    kept = Kept()
    one = made(kept, batch_size=32)
    other = made(kept, batch_size=50, crop_padding=2, cutout=4, horizontal_flip=True)
    assert reads.count == 1
    assert other.splits is one.splits
    sizes = [len(next(iter(each.train_dataloader()))[1]) for each in (one, other)]
    assert sizes == [30, 45]  # 90 pictures in batches of nearly one size
    assert other.augmentation.cutout == 4


@pytest.mark.parametrize(
    "settings",
    [{"val_fraction": 0.2}, {"normalize": False}, {"seed": 1}],
    ids=lambda s: next(iter(s)),
)
def test_what_shapes_the_splits_does(reads, settings):
    kept = Kept()
    one, other = made(kept), made(kept, **settings)
    assert reads.count == 2
    fresh = Synthetic(num_train=100, num_test=20, **settings)
    fresh.setup("fit")
    assert torch.equal(other.splits.val.images, fresh.splits.val.images)
    assert other.normalization == fresh.normalization
    assert one.splits is not other.splits


def test_those_used_last_are_kept(reads):
    kept = Kept(most=2)
    for seed, count in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        made(kept, seed=seed)
        assert reads.count == count, seed


def test_only_those_in_use_lie_on_a_device():
    kept = Kept()
    one = made(kept)
    one._on_device["train"] = one.splits.train
    assert made(kept)._on_device == one._on_device != {}
    other = made(kept, seed=1)
    assert one._on_device == other._on_device == {}


def test_processes_of_a_group_read_once_and_the_file_stays_while_one_keeps_it(
    place, reads, monkeypatch
):
    monkeypatch.setenv(HOST_GROUP, "a search")
    one, other = Kept(), Kept()  # each as in a process of its own
    made(one).train_dataloader()
    assert len(list(place.glob("*.pt"))) == 1
    made(other, batch_size=10)
    assert reads.count == 1
    one.forget()
    gc.collect()
    assert len(list(place.glob("*.pt"))) == 1
    late = Kept()
    made(late)
    assert reads.count == 1
    other.forget(), late.forget()
    gc.collect()
    assert list(place.glob("*.pt")) == []


def test_a_training_does_not_take_the_file_from_those_to_come(place, reads, small, monkeypatch):
    monkeypatch.setenv(HOST_GROUP, "a search")
    one, other = Kept(), Kept()
    fit(small(*SHORT), kept=one)
    fit(small(*SHORT, "--data.batch_size", "32"), kept=other)
    assert reads.count == 1


def test_a_split_is_hashed_again_after_it_was_written_to():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    split = Split(images, torch.tensor([0, 1]))
    before = split.digest()
    assert split.digest() == before
    split.images[0] += 1
    assert split.digest() != before
    split.images[0] -= 1
    split.labels[0] = 1
    assert split.digest() != before
