"""What all data sets share: the split, the batches, and the settings that shape them.

A new data set is a subclass with `class_names`, `image_size` and `read`; its other settings and
its batches come from here, and `--data` finds it by its name.
"""

import os
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule, Trainer

from research.data.augmentation import Augmentation
from research.data.batches import Batches
from research.data.normalization import IDENTITY, Normalization, measure
from research.data.shared import Content, Lease, shared
from research.data.split import Split, Splits, part
from research.data.streams import stream
from research.processes.launch import HOST_GROUP, host_group


class DataError(ValueError):
    """The data are missing, damaged or not usable; the message says which and what to do."""


class DataFileError(DataError):
    """A file of the data, or the disk that they lie on, cannot be read or written."""

    exit_code = 1


@dataclass(frozen=True)
class Made:
    """What `setup` made: splits and constants, their copies on a device, a lease on their file."""

    splits: Splits
    normalization: Normalization
    on_device: dict[str, Split]
    lease: Lease


class ImageData(LightningDataModule, ABC):
    """Colour pictures of one size and their classes, handed out in batches.

    Known from the start: `class_names`, `num_classes`, `image_size` (height and width),
    `in_channels`.  After `setup`: `splits` (train, val, test as bytes) and `normalization`; of
    several processes of a run on one machine one reads and measures them, and all have them from
    the same memory (shared.py).

    Args:
        batch_size: pictures in a batch, over all processes together.
        val_fraction: share of the training pictures, of each class alike, that is kept for
            validation; 0 trains on all of them and validates on none.
        crop_padding: pixels by which a training picture is padded (mirrored) before a window of
            its own size is cut out at a random place; 0 is off.
        horizontal_flip: mirror each training picture with probability 1/2.
        cutout: side of the square that is painted over in each training picture; 0 is off.
        alternating_flip: mirror each training picture in every other epoch, one half of them in
            the first; in place of `horizontal_flip`.
        normalize: bring each channel to mean 0 and standard deviation 1; otherwise values are
            in 0..1.
        seed: fixes the validation split, and order and augmentation where `--random` does not;
            None takes the seed of the run, or 0 where there is no run.
    """

    class_names: tuple[str, ...]
    reads_anew: ClassVar[bool] = False  # true: nobody else has what `read` returns; saves memory
    image_size: int
    in_channels = 3

    splits: Splits
    normalization: Normalization

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        cutout: int = 0,
        alternating_flip: bool = False,
        normalize: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        size = self.image_size
        refuse(
            check(batch_size, "batch_size", 1),
            check_fraction(val_fraction, "val_fraction"),
            check(crop_padding, "crop_padding", 0, size - 1, f"pictures of {size} pixels"),
            check(cutout, "cutout", 0, size, f"pictures of {size} pixels"),
            check_flips(horizontal_flip, alternating_flip),
        )
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.augmentation = Augmentation(crop_padding, horizontal_flip, cutout, alternating_flip)
        self.normalize = normalize
        self.seed = seed
        self._order_seed: int | None = None
        self._augmentation_seed: int | None = None
        self._parted_by: int | None = None
        self._as_made: tuple[Splits, Normalization] | None = None
        self._lease = Lease()
        self._on_device: dict[str, Split] = {}
        self._train_batches: Batches | None = None
        self._resumed: dict[str, int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def dataset_name(self) -> str:
        """What a record of a run calls these pictures."""
        return type(self).__name__

    @property
    def source(self) -> str:
        """Where the pictures come from, in a record of a run: a folder, an address, or words."""
        root = getattr(self, "root", None)
        return type(self).__name__ if root is None else str(Path(root).resolve())

    @abstractmethod
    def read(self) -> tuple[Split, Split]:
        """Return the pictures to learn from and the test pictures.

        Validation is cut from the first by `setup`.  Raises DataError if that is not possible.
        """

    def measure_normalization(self, train: Split) -> Normalization:
        """Return the constants for training pictures `train`; a data set may know them better."""
        return measure(train.pixels)

    def setup(self, stage: str | None = None) -> None:
        seed = self._run_seed()
        if self._parted_by == seed:
            return
        group = host_group()
        if group is None:
            self._take(*self._make(seed))
        else:
            self._share(group, lambda: self._make(seed, prepare=True))
        self._parted_by = seed

    def share_with_others(self) -> None:
        """Let the processes that Lightning is about to start here have the splits from this one.

        They find them by a name in the environment.  Does nothing in a process that was itself
        started beside others.
        """
        if host_group() is not None:
            return
        os.environ[HOST_GROUP] = secrets.token_hex(16)
        # Only what `setup` made: who has changed it since will do so in the others as well.
        made = self._as_made
        if made is not None and made[0] is self.splits:
            normalization = self.normalization
            self._share(os.environ[HOST_GROUP], lambda: made)
            self.normalization = normalization

    def hand_over(self) -> Made:
        """Return what `setup` made, for others that ask for the same; it outlives this object."""
        lease, self._lease = self._lease, Lease()
        return Made(self.splits, self.normalization, self._on_device, lease)

    def take_over(self, made: Made) -> None:
        """Have what another one, which asked for the same, has made; `setup` makes nothing then."""
        self._take(made.splits, made.normalization)
        self._on_device = made.on_device
        self._parted_by = self._run_seed()

    def _make(self, seed: int, prepare: bool = False) -> tuple[Splits, Normalization]:
        """Read, part and measure; in memory that holds nothing else."""
        if prepare:
            self.prepare_data()
        learn, test = self.read()
        kept, taken = part(learn.labels, self.val_fraction, stream(seed, "validation"))
        if len(taken) > 0 and reads_anew(type(self)):
            train, val = learn.rearrange(kept, taken)
        else:
            train = learn.select(kept) if len(taken) > 0 else learn
            val = learn.select(taken)
        train, val, test = compact(train, val, test)
        splits = Splits(train, val, test)
        return splits, self.measure_normalization(train) if self.normalize else IDENTITY

    def _share(self, group: str, make: Callable[[], tuple[Splits, Normalization]]) -> None:
        self._lease.end()
        content, self._lease = shared(group, self.asked(), lambda: packed(*make()))
        self._take(*unpacked(content))

    def _take(self, splits: Splits, normalization: Normalization) -> None:
        self._as_made = splits, normalization
        self.splits, self.normalization = splits, normalization
        self._on_device = {}

    def asked(self) -> str:
        """Return everything that shapes the splits, in words: equal words are equal splits."""
        without = ("trainer", "splits", "normalization", "batch_size", "augmentation")
        settings = {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name not in without
        }
        kind = type(self)
        return repr(
            (kind.__module__, kind.__qualname__, sorted(settings.items()), self._run_seed())
        )

    def draw_by(self, order: int, augmentation: int) -> None:
        """Let order and augmentation follow from these seeds, the split still from `seed`."""
        self._order_seed, self._augmentation_seed = order, augmentation

    @property
    def seeds(self) -> tuple[int, int, int]:
        """Those of the validation split, of the order and of the augmentation."""
        own = self._run_seed()
        order, augmentation = self._order_seed, self._augmentation_seed
        order = own if order is None else order
        return own, order, own if augmentation is None else augmentation

    def first_batches(
        self, batches: int, most: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield what the first batches of a training begin with, as `Batches.begin` does.

        Of all processes together; no loader, device or stream is touched by it.
        """
        _, order, augmentation = self.seeds
        whole = Batches(
            self.splits.train,
            self.batch_size,
            self.normalization,
            augmentation=self.augmentation,
            shuffle=True,
            seed=order,
            augmentation_seed=augmentation,
            device=torch.device("cpu"),
        )
        yield from whole.begin(batches, most)

    def train_dataloader(self) -> Batches:
        # Overfitting the first few batches needs the same few in every epoch.
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        batches = self._batches("train", self.augmentation, shuffle=True, reshuffle=not overfit)
        if self._resumed is not None:
            batches.load_state_dict(self._resumed)
        self._train_batches, self._resumed = batches, None
        return batches

    def state_dict(self) -> dict[str, int]:
        # Lightning keeps the state of loaders too, but forgets to load it where the loader was made
        # early, as a schedule does that asks for the run's length (estimated_stepping_batches).
        return {} if self._train_batches is None else self._train_batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let training go on in the middle of an epoch."""
        self._resumed = dict(state_dict)

    def val_dataloader(self) -> Batches | list[Batches]:
        return self._batches("val") if len(self.splits.val) > 0 else []

    def test_dataloader(self) -> Batches:
        return self._batches("test")

    def _run_seed(self) -> int:
        return 0 if self.seed is None else self.seed

    def _batches(
        self,
        name: str,
        augmentation: Augmentation | None = None,
        shuffle: bool = False,
        reshuffle: bool = True,
    ) -> Batches:
        trainer = self.trainer
        if trainer is not None:
            # Lightning asks for batches after a barrier that follows everyone's setup.
            self._lease.end(all_have_it=True)
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        _, order, augmentation_seed = self.seeds
        return Batches(
            self._place(name, device),
            self.batch_size,
            self.normalization,
            augmentation=augmentation or Augmentation(),
            shuffle=shuffle,
            reshuffle=reshuffle,
            seed=order,
            augmentation_seed=augmentation_seed,
            place=None if trainer is None else lambda: place_in(trainer),
            device=device,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
        )

    def _place(self, name: str, device: torch.device) -> Split:
        """Return the split on the device, or where it is if it is too big for that."""
        split: Split = getattr(self.splits, name)
        placed = self._on_device.get(name)
        if placed is not None and placed.images.device == device:
            return placed
        if fits(split.nbytes, device):
            self._on_device[name] = split = split.to(device)
        return split


def reads_anew(data: type[ImageData]) -> bool:
    """What the class says whose `read` is called; of its own `read` a subclass has to say it."""
    owner = next(each for each in data.__mro__ if "read" in vars(each))
    return bool(vars(owner).get("reads_anew", False))


def compact(*splits: Split) -> list[Split]:
    """Return the splits in memory that holds nothing else.

    A part of something keeps all of that in memory, so it is copied, unless all of it is in use.
    """
    memory = [split.images.untyped_storage() for split in splits]
    used: Counter[int] = Counter()
    for split, storage in zip(splits, memory, strict=True):
        used[storage.data_ptr()] += split.images.nbytes
    return [
        split
        if used[storage.data_ptr()] >= storage.nbytes()
        else Split(split.images.clone(), split.labels.clone())
        for split, storage in zip(splits, memory, strict=True)
    ]


def packed(splits: Splits, normalization: Normalization) -> Content:
    pictures = {name: (split.images, split.labels) for name, split in vars(splits).items()}
    return {"pictures": pictures, "normalization": (normalization.mean, normalization.std)}


def unpacked(content: Content) -> tuple[Splits, Normalization]:
    pictures = {name: Split(*tensors) for name, tensors in content["pictures"].items()}
    return Splits(**pictures), Normalization(*content["normalization"])


def locate(root: str) -> Path:
    """Return the folder: as it lies from here, or else from the project's own folder.

    So a recorded run finds its pictures again from wherever it is evaluated or repeated.
    """
    folder = Path(root).expanduser()
    beside_package = Path(__file__).resolve().parents[2] / folder
    return beside_package if not folder.exists() and beside_package.exists() else folder


def place_in(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch that is being trained, and how many of its batches have been learnt from."""
    return trainer.current_epoch, trainer.fit_loop.batch_idx + 1


def fits(nbytes: int, device: torch.device) -> bool:
    """Return whether a split may lie on the device: it leaves half of the free memory free.

    On accelerators whose free memory torch cannot tell, each batch is sent there instead.
    """
    if device.type == "cpu":
        return True
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= free / 2


def check(value: int, name: str, least: int, most: int | None = None, why: str = "") -> str | None:
    """Return what is wrong with the whole number given for `data.<name>`, or None."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and value >= least and (most is None or value <= most):
        return None
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}, for {why}"
    return f"data.{name} is {value}; it must be a whole number {bounds}"


def check_fraction(value: float, name: str) -> str | None:
    """Return what is wrong with the fraction given for `data.<name>`, or None."""
    if 0 <= value < 1:
        return None
    return f"data.{name} is {value}; it must be at least 0 and less than 1"


def check_flips(horizontal_flip: bool, alternating_flip: bool) -> str | None:
    """Return what is wrong with two ways to mirror pictures at once, or None."""
    if not (horizontal_flip and alternating_flip):
        return None
    return "data.horizontal_flip and data.alternating_flip are both true; choose one of them"


def refuse(*faults: str | None) -> None:
    """Raise one ValueError that tells all the faults, if there are any."""
    found = [fault for fault in faults if fault is not None]
    if found:
        raise ValueError("\n".join(found))
