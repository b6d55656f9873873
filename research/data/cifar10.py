"""CIFAR-10 as published: 50,000 training and 10,000 test pictures of 32x32 pixels.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import errno
import http.client
import shutil
import socket
import tarfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from research.data.module import DataError, DataFileError, ImageData, locate
from research.data.normalization import Normalization
from research.data.split import Split

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
# What goes wrong where it is written to, and not on the way there.
OF_THE_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
}


class CIFAR10(ImageData):
    """torchvision's CIFAR10, downloaded once if it is not there, with its checksums.

    Args:
        root: the folder that holds cifar-10-batches-py or cifar-10-python.tar.gz, or that one
            of them is brought to.
        **common: the settings of ImageData.
    """

    reads_anew = True
    class_names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    image_size = 32

    def __init__(self, root: str = "data", **common: Any) -> None:
        super().__init__(**common)
        self.root = locate(root)

    def prepare_data(self) -> None:
        if not (self.root / FOLDER).exists():
            bring(self.root)

    def read(self) -> tuple[Split, Split]:
        from torchvision import datasets

        folder = self.root / FOLDER
        if not folder.exists():
            raise DataError(three_ways(self.root, "nothing has been downloaded yet"))

        class Whole(datasets.CIFAR10):
            """Both splits at once, so that each file's checksum is computed once."""

            train_list: ClassVar = [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]
            test_list: ClassVar[list] = []

        try:
            with warnings.catch_warnings():
                # numpy 2.4.0 on the published files: github.com/pytorch/vision/issues/9340
                warnings.filterwarnings("ignore", r"dtype\(\): align should be passed")
                whole = Whole(self.root)
        except (RuntimeError, OSError) as error:
            raise DataFileError(
                f"{folder} is incomplete, damaged or not readable ({error}). Remove it, and the "
                f"next run brings it again."
            ) from None
        pixels = torch.from_numpy(np.ascontiguousarray(whole.data)).permute(0, 3, 1, 2)
        labels = torch.tensor(whole.targets)
        start_of_test = len(labels) // 6 * 5  # six files of the same length, the test file last
        return (
            Split(pixels[:start_of_test], labels[:start_of_test]),
            Split(pixels[start_of_test:], labels[start_of_test:]),
        )

    def measure_normalization(self, train: Split) -> Normalization:
        """Return the published constants, those of all 50,000 training pictures."""
        return Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def bring(root: Path) -> None:
    """Unpack the archive in `root`, downloaded before if it is not there.

    All of it happens in a folder beside that gets its name only when everything is verified; when
    that fails, nothing is left.  Of several processes that start together, one does the work.
    """
    from filelock import FileLock

    is_new = not root.exists()
    lock = root / ".cifar10.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            try:
                if not (root / FOLDER).exists():
                    _bring_alone(root)
            finally:
                with suppress(OSError):  # Windows does not remove an open file
                    lock.unlink()
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise cannot_write(root, error) from None
        raise DataError(three_ways(root, str(error))) from None
    finally:
        if is_new:
            with suppress(OSError):  # not empty: it has worked
                root.rmdir()


def _bring_alone(root: Path) -> None:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, download_url

    archive = root / ARCHIVE
    if archive.exists() and not check_integrity(archive, datasets.CIFAR10.tgz_md5):
        raise DataFileError(
            f"{archive} is incomplete or damaged: its checksum is not that of the published "
            f"archive. Remove it, and the next run downloads it."
        )
    aside = root / ".cifar10.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a silent server must not hold the run for ever
    try:
        if not archive.exists():
            archive = aside / ARCHIVE
            download_url(datasets.CIFAR10.url, aside, ARCHIVE, datasets.CIFAR10.tgz_md5)
        # Only now: its checksum is that of the published one. The filter lets nothing out of the
        # folder; Python before 3.11.4 has none.
        guard = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(archive, "r:gz") as packed:
            packed.extractall(aside, **guard)  # type: ignore[arg-type]
        (aside / FOLDER).rename(root / FOLDER)
    except tarfile.TarError as error:
        raise DataFileError(f"{archive} cannot be unpacked: {error}") from None
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            raise cannot_write(root, error) from None
        raise DataError(three_ways(root, f"the download failed: {error}")) from None
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(aside, ignore_errors=True)


def cannot_write(root: Path, error: OSError) -> DataFileError:
    return DataFileError(
        f"data.root is {root}, and CIFAR-10 cannot be brought there: {error.strerror or error}. "
        "Make room or change its permissions, or let data.root name another folder"
    )


def three_ways(root: Path, reason: str) -> str:
    return (
        f"data.root is {root}, and CIFAR-10 is not there ({reason}). Three ways on: "
        f"put {ARCHIVE} into {root}; "
        f"train on a folder of pictures with --data ImageFolder --data.root FOLDER; "
        f"or start without any files: python -m research.fit --config experiments/quickstart.yaml"
    )
