"""What all data sets share, and how Lightning takes their batches."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import research.data
from research.data import ImageData, Synthetic
from research.data.split import Split

# Lightning's own words about its own code, and about what a test leaves out on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def small(**settings) -> Synthetic:
    settings = {"num_train": 100, "num_test": 20, "image_size": 8, "batch_size": 16, **settings}
    return Synthetic(**settings)


class Recorder(LightningModule):
    """A linear classifier that notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3 * 8 * 8, 10)
        self.seen: list[tuple[int, float]] = []
        self.evaluated = 0

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.trainer.current_epoch, images.double().sum().item()))
        return torch.nn.functional.cross_entropy(self.linear(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        self.evaluated += len(batch[1])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def trainer(**settings) -> Trainer:
    silent: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": "callbacks" in settings,
    }
    return Trainer(**silent, **settings)


def fit(data: ImageData, resume_from: Path | None = None, **settings) -> Recorder:
    model = Recorder()
    trainer(**settings).fit(model, data, ckpt_path=resume_from)
    return model


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -3),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("val_fraction", -0.1),
        ("val_fraction", 1.0),
        ("val_fraction", float("nan")),
        ("crop_padding", -1),
        ("crop_padding", 8),
        ("cutout", -1),
        ("cutout", 9),
    ],
)
def test_a_wrong_setting_is_refused_at_once_and_named(setting, value):
    with pytest.raises(ValueError, match=rf"^data\.{setting} is {value}; it must be "):
        small(**{setting: value})


def test_all_faults_are_told_together():
    with pytest.raises(ValueError) as told:
        small(batch_size=0, val_fraction=2, cutout=-1)
    assert str(told.value).splitlines() == [
        "data.batch_size is 0; it must be a whole number of at least 1",
        "data.val_fraction is 2; it must be at least 0 and less than 1",
        "data.cutout is -1; it must be a whole number from 0 to 8, for pictures of 8 pixels",
    ]


def test_limits_of_the_settings_are_allowed():
    data = small(batch_size=1, val_fraction=0.0, crop_padding=7, cutout=8)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (1, 3, 8, 8)


def test_what_networks_need_is_known_before_any_picture_is():
    data = small()
    assert (data.num_classes, data.image_size, data.in_channels) == (10, 8, 3)
    assert len(set(data.class_names)) == 10


def test_no_seed_means_seed_zero_until_the_run_gives_one():
    def first_batch(data):
        data.setup()
        return next(iter(data.train_dataloader()))[0]

    zero = first_batch(small(seed=0))
    assert torch.equal(zero, first_batch(small()))
    assert not torch.equal(zero, first_batch(small(seed=1)))
    late = small()
    late.setup()
    late.seed = 1
    assert torch.equal(first_batch(late), first_batch(small(seed=1)))


def test_the_seed_moves_pictures_between_train_and_validation_but_never_the_test():
    one, two = small(seed=1), small(seed=2)
    one.setup()
    two.setup()
    assert torch.equal(one.splits.test.images, two.splits.test.images)
    assert not torch.equal(one.splits.val.images, two.splits.val.images)
    for data in (one, two):
        splits = data.splits
        assert (len(splits.train), len(splits.val), len(splits.test)) == (90, 10, 20)
        assert splits.val.labels.bincount().tolist() == [1] * 10
        pictures = torch.cat([s.images.flatten(1) for s in (splits.train, splits.val, splits.test)])
        assert len(pictures.unique(dim=0)) == 120


@pytest.mark.parametrize("val_fraction", [0.0, 0.1])
def test_what_one_read_gave_is_copied_only_where_some_of_it_is_not_used(val_fraction):
    whole = torch.randint(0, 256, (60, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.arange(60) % 10

    class Slices(Synthetic):
        def read(self):
            return Split(whole[:50], labels[:50]), Split(whole[50:], labels[50:])

    data = Slices(image_size=8, val_fraction=val_fraction)
    data.setup()
    splits = vars(data.splits).values()
    held = {s.images.untyped_storage().data_ptr(): s.images.untyped_storage() for s in splits}
    assert sum(storage.nbytes() for storage in held.values()) == whole.nbytes
    assert (whole.data_ptr() in held) == (val_fraction == 0)
    assert torch.equal(data.splits.test.images, whole[50:])


def test_only_training_pictures_are_shuffled_and_altered():
    data = small(crop_padding=2, horizontal_flip=True, cutout=3, normalize=False)
    data.setup()
    for name in ("val", "test"):
        split = getattr(data.splits, name)
        batches = getattr(data, f"{name}_dataloader")()
        for _ in range(2):
            images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            assert torch.equal(labels, split.labels)
            torch.testing.assert_close(images, split.images / 255)


def test_training_pictures_come_out_normalized():
    data = small(val_fraction=0.0)
    data.setup()
    images = torch.cat([images for images, _ in data.train_dataloader()])
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_each_process_gets_its_share():
    def labels(rank, world_size):
        data = small()
        data.trainer = SimpleNamespace(
            world_size=world_size,
            global_rank=rank,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            current_epoch=3,
            fit_loop=SimpleNamespace(batch_idx=-1),
        )
        data.setup()
        return [
            [labels.tolist() for _, labels in getattr(data, f"{name}_dataloader")()]
            for name in ("train", "val", "test")
        ]

    for whole, first, second in zip(labels(0, 1), labels(0, 2), labels(1, 2), strict=True):
        assert whole == [a + b for a, b in zip(first, second, strict=True)]


def test_lightning_trains_validates_and_tests():
    data = small()
    model = Recorder()
    run = trainer(max_epochs=3)
    run.fit(model, data)
    assert [epoch for epoch, _ in model.seen] == [0] * 6 + [1] * 6 + [2] * 6
    assert len(set(model.seen)) == 18
    assert model.evaluated == 10 * 3 + 10  # three epochs and the sanity check
    run.test(model, data, verbose=False)
    assert model.evaluated == 40 + 20


def test_the_same_seed_shows_the_same_pictures_in_every_run():
    settings = {"crop_padding": 2, "horizontal_flip": True, "cutout": 2, "seed": 5}
    assert fit(small(**settings), max_epochs=2).seen == fit(small(**settings), max_epochs=2).seen


def test_the_same_data_can_train_again():
    data = small()
    assert fit(data, max_epochs=2).seen == fit(data, max_epochs=2).seen


def test_no_validation_pictures_mean_no_validation():
    with pytest.warns(UserWarning, match="across ranks is zero"):  # Lightning's own, and true
        model = fit(small(val_fraction=0.0), max_epochs=1)
    assert len(model.seen) == 7
    assert model.evaluated == 0


def test_limit_train_batches_takes_the_first_of_each_epoch():
    whole = fit(small(), max_epochs=2).seen
    assert fit(small(), max_epochs=2, limit_train_batches=4).seen == [*whole[:4], *whole[6:10]]
    assert len(fit(small(), max_epochs=1, limit_train_batches=0.5).seen) == 3


def test_overfit_batches_shows_the_same_pictures_in_every_epoch():
    seen = fit(small(), max_epochs=3, overfit_batches=2).seen
    sums = [shown for _, shown in seen]
    assert len(sums) == 6
    assert sums[:2] == sums[2:4] == sums[4:]


def test_fast_dev_run_takes_one_batch_of_each_kind():
    model = fit(small(), fast_dev_run=True)
    assert len(model.seen) == 1
    assert model.evaluated == 10


class Stop(Exception):
    """Stands for whatever ends a run."""


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise Stop


@pytest.mark.parametrize(
    ("limits", "saving"),
    [
        ({"max_epochs": 4}, {"every_n_train_steps": 4}),
        ({"max_steps": 22}, {"every_n_train_steps": 4}),
        ({"max_epochs": 4, "limit_train_batches": 4}, {"every_n_train_steps": 3}),
        ({"max_epochs": 4}, {"every_n_epochs": 1}),
        ({"max_steps": 22}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
        ({"max_epochs": 4, "val_check_interval": 4}, {"every_n_epochs": 1}),
        ({"max_epochs": 4}, {"every_n_train_steps": 100, "save_on_exception": True}),
    ],
)
def test_a_resumed_run_sees_what_an_unbroken_one_sees(tmp_path, limits, saving):
    def data():
        return small(crop_padding=2, horizontal_flip=True, cutout=3)

    unbroken = fit(data(), **limits)
    keep = ModelCheckpoint(tmp_path, filename="kept", **saving)
    with pytest.raises(Stop):
        fit(data(), callbacks=[keep, StopAt(9)], **limits)
    (path,) = tmp_path.glob("*kept*.ckpt")
    step = torch.load(path, weights_only=True)["global_step"]
    assert 0 < step <= 9
    resumed = fit(data(), resume_from=path, **limits)
    assert resumed.seen == unbroken.seen[step:]
    assert torch.equal(resumed.linear.weight, unbroken.linear.weight)


class TwoColors(ImageData):
    """A data set of one's own needs no more than this."""

    class_names = ("dark", "light")
    image_size = 8

    def read(self):
        images = torch.tensor([50, 200] * 8, dtype=torch.uint8).view(16, 1, 1, 1)
        split = Split(images.expand(16, 3, 8, 8), torch.arange(16) % 2)
        return split, split


def test_a_data_set_of_ones_own_is_one_short_class():
    data = TwoColors(batch_size=4, val_fraction=0.25)
    data.setup()
    assert (len(data.splits.train), len(data.splits.val)) == (12, 4)
    for images, labels in data.train_dataloader():
        assert torch.equal(images[:, 0, 0, 0] > 0, labels == 1)


def test_settings_are_read_from_the_signature_and_classes_found_by_name():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    for name in ("CIFAR10", "ImageFolder", "Synthetic"):
        chosen = ["--data", name, "--data.batch_size", "8", "--data.val_fraction", "0.2"]
        arguments = parser.parse_args(chosen).data
        assert arguments.class_path == f"research.data.{name}"
        assert (arguments.init_args.batch_size, arguments.init_args.val_fraction) == (8, 0.2)
        assert arguments.init_args.seed is None


def test_importing_the_package_imports_nothing_heavy_beyond_lightning():
    heavy = {"torchvision", "PIL", "matplotlib", "mlflow", "tqdm", "filelock"}
    sources = list(Path(research.data.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        for node in ast.parse(source.read_text()).body:  # the top level: what import runs
            names = [alias.name for alias in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {name.split(".")[0] for name in names} & heavy, source


@pytest.mark.parametrize("anew", [True, False])
def test_parting_leaves_what_a_data_set_keeps(anew):
    """Only what nobody else has is parted in its own memory."""
    kept = Synthetic(num_train=80, num_test=20)
    kept.setup()
    whole = kept.read()

    class Keeping(Synthetic):
        reads_anew = anew

        def read(self):
            return whole

    before = whole[0].images.clone()
    data = Keeping(num_train=80, num_test=20)
    data.setup()
    assert torch.equal(data.splits.train.images, kept.splits.train.images)
    assert torch.equal(data.splits.val.images, kept.splits.val.images)
    assert torch.equal(whole[0].images, before) == (not anew)
