"""Any folder of pictures: root/train/<class>/* and root/test/<class>/*.

The pictures are decoded once, on all cores, into one file of bytes under root/.cache.  That file
carries a fingerprint of the folder (every name, size and time of change) and checksums of its own
content; when either does not fit any more, it is made anew.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from research.data.decoding import decode, read_size, shown
from research.data.module import (
    DataError,
    DataFileError,
    ImageData,
    check,
    check_fraction,
    locate,
    refuse,
)
from research.data.split import Split, part
from research.data.streams import stream

CACHE_FORMAT = 1  # to be raised when `decode` turns the same files into other bytes


@dataclass(frozen=True)
class Listing:
    """The picture files of `train` or `test`, one of each class in turn, and their labels.

    In turn, so that the first few batches of an evaluation hold all classes.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    stamps: tuple[tuple[str, int, int], ...]  # name, bytes, nanoseconds of the last change


class ImageFolder(ImageData):
    """Pictures in one folder for each class; with only train/, a test split is cut from it.

    Hidden files are ignored, and so are files beside the class folders; anything else in a class
    folder must be a picture.  Links are followed within root; one that leads out of it is
    refused.

    Args:
        root: the folder that holds train/<class>/* and, if there is one, test/<class>/*.
        image_size: height and width to which pictures are brought: the shorter side is resized,
            the middle is kept; None takes the pictures as they are, which then must all be
            square and of the same size.
        test_fraction: share of the pictures, of each class alike, that becomes the test split
            if there is no test folder.
        test_seed: fixes which pictures these are; apart from `seed`, so that runs of different
            seeds are judged on the same pictures.
        **common: the settings of ImageData.
    """

    reads_anew = True

    def __init__(
        self,
        root: str = "data/images",
        image_size: int | None = None,
        test_fraction: float = 0.1,
        test_seed: int = 0,
        **common: Any,
    ) -> None:
        refuse(
            None if image_size is None else check(image_size, "image_size", 1),
            check_fraction(test_fraction, "test_fraction"),
            None if test_fraction != 0 else "data.test_fraction is 0; nothing would be tested",
        )
        self.root = locate(root)
        self.class_names = find_classes(self.root)
        self.resize = image_size is not None
        self.image_size = self._own_size() if image_size is None else image_size
        self.test_fraction = test_fraction
        self.test_seed = test_seed
        super().__init__(**common)

    @property
    def dataset_name(self) -> str:
        return self.root.resolve().name

    def prepare_data(self) -> None:
        """Decode the folder into the cache, if it is not there already."""
        # Lightning calls it before every fit and test; with the pictures in memory, from an earlier
        # trial too, nothing is to be read, and listing a folder takes a third of a second of each.
        if self._as_made is None:
            self._fill_cache()

    def _fill_cache(self) -> None:
        from filelock import FileLock

        cache = self._cache
        try:
            with FileLock(cache.with_suffix(".lock")):
                if read_fingerprint(cache) != self._fingerprint:
                    self._decode_into(cache)
        except OSError as error:
            raise DataFileError(
                f"the decoded pictures cannot be kept in {cache}: {error.strerror or error}"
            ) from None

    def read(self) -> tuple[Split, Split]:
        pictures = self._load()
        if pictures is None:
            # Nobody has called prepare_data, or the file is damaged.
            self._cache.unlink(missing_ok=True)
            self._fill_cache()
            pictures = self._load()
            if pictures is None:
                raise DataFileError(f"{self._cache} is damaged again right after it was written")
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        train = self._train
        start_of_test = len(train.labels)
        learn = Split(images[:start_of_test], torch.tensor(train.labels))
        if self._test is not None:
            return learn, Split(images[start_of_test:], torch.tensor(self._test.labels))
        kept, taken = part(learn.labels, self.test_fraction, stream(self.test_seed, "test"))
        return learn.select(kept), learn.select(taken)

    def _load(self) -> np.ndarray | None:
        count = sum(len(listing.files) for listing in self._listings)
        pictures = load(self._cache, self._fingerprint)
        shape = (count, self.image_size, self.image_size, 3)
        is_right = pictures is not None and pictures.dtype == np.uint8 and pictures.shape == shape
        return pictures if is_right else None

    @cached_property
    def _train(self) -> Listing:
        return list_pictures(self.root, "train", self.class_names)

    @cached_property
    def _test(self) -> Listing | None:
        if not (self.root / "test").exists():
            return None
        return list_pictures(self.root, "test", self.class_names)

    @property
    def _listings(self) -> list[Listing]:
        return [self._train] if self._test is None else [self._train, self._test]

    @cached_property
    def _fingerprint(self) -> str:
        size = self.image_size if self.resize else None
        stamps = [listing.stamps for listing in self._listings]
        return hashlib.sha256(repr((CACHE_FORMAT, size, stamps)).encode()).hexdigest()

    @cached_property
    def _cache(self) -> Path:
        name = f"pictures-{self.image_size}.npz" if self.resize else "pictures.npz"
        return find_cache_folder(self.root) / name

    def _own_size(self) -> int:
        folder = self.root / "train" / self.class_names[0]
        first = scan_pictures(folder, self.root.resolve())[0].path
        width, height = read_size(first)
        if width != height:
            raise DataError(
                f"{shown(first)} is {width}x{height} pixels, not square; set data.image_size (to "
                f"32, for example) to have all pictures resized"
            )
        return width

    def _decode_into(self, cache: Path) -> None:
        files = [file for listing in self._listings for file in listing.files]
        pictures = decode(files, self.image_size, self.resize)
        aside = cache.with_suffix(".part")
        aside.unlink(missing_ok=True)  # of a run that was killed; and a link is not written through
        try:
            with open(aside, "xb") as file:
                np.savez(file, fingerprint=np.array(self._fingerprint), pictures=pictures)
            os.replace(aside, cache)
        finally:
            aside.unlink(missing_ok=True)


def find_classes(root: Path) -> tuple[str, ...]:
    """Return the names of the class folders in root/train, sorted."""
    train = root / "train"
    if not train.is_dir():
        raise DataError(
            f"data.root is {root}, and there is no folder {train}; it must name a folder with the "
            f"pictures of each class in train/<class>/ (and, if there are any, those of the test "
            f"in test/<class>/)"
        )
    names = class_folders(train, root.resolve())
    if len(names) < 2:
        found = f"only one class folder, {names[0]}" if names else "no class folders"
        raise DataError(f"{train} has {found}; a classifier needs at least two classes")
    return names


def class_folders(folder: Path, root: Path) -> tuple[str, ...]:
    with unreadable_told(folder):
        return tuple(sorted(entry.name for entry in scan(folder, root) if entry.is_dir()))


@contextmanager
def unreadable_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataFileError(
            f"{shown(error.filename or path)} cannot be read: {error.strerror}"
        ) from None


def scan(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    """Return what is in the folder, without hidden files; `root` is resolved already."""
    with unreadable_told(folder), os.scandir(folder) as found:
        entries = [entry for entry in found if not is_hidden(entry.name)]
    links = [Path(entry.path) for entry in entries if entry.is_symlink()]
    for path in (folder, *links):
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise DataError(
                f"{shown(path)} is a link that leads out of {root}; copy the pictures there, or "
                f"let data.root name the folder that it leads to"
            )
    return entries


def scan_pictures(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    """Return the files in a class folder, sorted by name; at least one."""
    entries = sorted(scan(folder, root), key=lambda entry: entry.name)
    if not entries:
        raise DataError(
            f"{shown(folder)} is empty; remove it, or put the pictures of its class there"
        )
    for entry in entries:
        with unreadable_told(folder):
            is_file = entry.is_file()
        if not is_file:
            raise DataError(
                f"{shown(entry.path)} is not a file; only pictures may be in {shown(folder)}"
            )
    return entries


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def list_pictures(root: Path, name: str, class_names: tuple[str, ...]) -> Listing:
    """Return the pictures of every class in root/`name`."""
    resolved = root.resolve()
    found = class_folders(root / name, resolved)
    if found != class_names:
        missing = sorted(set(class_names) - set(found))
        unknown = sorted(set(found) - set(class_names))
        which = [f"no folder {', '.join(missing)}"] if missing else []
        which += [f"a folder {', '.join(unknown)}, which train has not"] if unknown else []
        raise DataError(f"{root / name} has {' and '.join(which)}; both need the same classes")
    pictures = []
    for label, class_name in enumerate(class_names):
        for rank, entry in enumerate(scan_pictures(root / name / class_name, resolved)):
            with unreadable_told(Path(entry.path)):
                facts = entry.stat()
            stamp = (f"{name}/{class_name}/{entry.name}", facts.st_size, facts.st_mtime_ns)
            pictures.append((rank, label, entry.path, stamp))
    pictures.sort(key=lambda picture: picture[:2])
    _, labels, files, stamps = zip(*pictures, strict=True)
    return Listing(files, labels, stamps)


def find_cache_folder(root: Path) -> Path:
    """Return root/.cache, or one of the user's where root cannot be written to."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    tried = []
    for folder in (root / ".cache", users / "research" / name):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
            tried.append(f"{folder} is not writable")
        except OSError as error:
            tried.append(str(error))
    raise DataFileError(f"there is no place to keep the decoded pictures: {'; '.join(tried)}")


def read_fingerprint(cache: Path) -> str | None:
    """Return the fingerprint of the folder that was decoded into the cache, if it can be told."""
    fingerprint = read_member(cache, "fingerprint")
    return None if fingerprint is None else str(fingerprint)


def load(cache: Path, fingerprint: str) -> np.ndarray | None:
    """Return the cached pictures, uint8 (N, H, W, 3); None if they are damaged or others."""
    return read_member(cache, "pictures") if read_fingerprint(cache) == fingerprint else None


def read_member(cache: Path, name: str) -> np.ndarray | None:
    """Return an array of the cache, its checksum verified; None if that fails."""
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored[name]
    except Exception:  # there is no end to what numpy may raise on a damaged file
        return None
