"""Pictures that are drawn: the same for a seed, of every class alike, hard for a linear model."""

import pytest
import torch
from torch import nn

from research.data import Synthetic


def drawn(**settings) -> Synthetic:
    data = Synthetic(**{"num_train": 200, "num_test": 100, "val_fraction": 0.0, **settings})
    data.setup()
    return data


def test_the_same_seed_draws_the_same_pictures():
    one, again, other = drawn(), drawn(), drawn(picture_seed=1)
    assert torch.equal(one.splits.train.images, again.splits.train.images)
    assert torch.equal(one.splits.test.images, again.splits.test.images)
    assert not torch.equal(one.splits.train.images, other.splits.train.images)


def test_the_seed_of_the_run_does_not_change_what_is_learnt_from():
    assert torch.equal(drawn(seed=1).splits.train.images, drawn(seed=2).splits.train.images)


def test_no_picture_is_drawn_twice():
    splits = drawn(num_train=200, num_test=200).splits
    pictures = torch.cat([splits.train.images, splits.test.images]).flatten(1)
    assert len(pictures.unique(dim=0)) == 400


@pytest.mark.parametrize("size", [8, 20, 64])
def test_any_size_and_number_come_out_balanced_and_in_mixed_order(size):
    splits = drawn(num_train=57, num_test=33, image_size=size).splits
    assert splits.train.images.shape == (57, 3, size, size)
    assert splits.test.images.shape == (33, 3, size, size)
    for split in (splits.train, splits.test):
        counts = split.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
        assert split.labels.tolist() != sorted(split.labels.tolist())


def test_pictures_use_the_whole_range_and_differ_within_a_class():
    train = drawn(num_train=500).splits.train
    for label in range(10):
        pictures = train.images[train.labels == label].float()
        assert pictures.amin() < 20 and pictures.amax() > 235
        assert pictures.std(0).min() > 20, "no pixel tells the class by itself"


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    drawn()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_train", 9),
        ("num_test", 0),
        ("image_size", 7),
        ("difficulty", -0.1),
        ("difficulty", 1.1),
    ],
)
def test_wrong_settings_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=rf"^data\.{setting} is {value}; it must be "):
        Synthetic(**{setting: value})


def least_squares_accuracy(data: Synthetic) -> float:
    """The best linear classifier, regularised, in closed form."""

    def table(split):
        flat = split.images.flatten(1).double() / 255
        return torch.cat([flat - 0.5, torch.ones(len(split), 1, dtype=torch.float64)], 1)

    x = table(data.splits.train)
    targets = nn.functional.one_hot(data.splits.train.labels, 10).double()
    weights = torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), x.T @ targets)
    scores = table(data.splits.test) @ weights
    return (scores.argmax(1) == data.splits.test.labels).double().mean().item()


def test_a_linear_model_is_poor():
    assert least_squares_accuracy(drawn(num_train=2000, num_test=1000, difficulty=0.0)) < 0.35


def network_accuracy(data: Synthetic, epochs: int) -> float:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).to(memory_format=torch.channels_last)
    batches = data.train_dataloader()
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=epochs * len(batches)
    )
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = [(network(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    return torch.cat(right).mean().item()


def test_a_convolutional_network_learns_easy_pictures_in_seconds():
    data = drawn(num_train=2000, num_test=500, difficulty=0.0, batch_size=32)
    assert network_accuracy(data, epochs=3) > 0.6


@pytest.mark.slow
def test_a_convolutional_network_is_good_at_the_default_pictures():
    data = Synthetic()
    data.setup()
    assert network_accuracy(data, epochs=5) > 0.9
