"""Checkpoints that survive whatever ends a run while it writes them.

A checkpoint is written to a hidden side file, synced to the disk and only then given its name, so
that under a name there is always a whole file: the new one or the one before.  Of 30 MB that takes
0.04 s with the syncing and without (medians of 10, a virtual disk that may not wait for its own);
a disk that does wait adds what it takes to write them.

What a disk, a copy or a transfer breaks afterwards is found by `is_whole`: torch keeps a checksum
of every record.  `last.ckpt` keeps the one before it as `previous.ckpt`.
"""

import contextlib
import errno
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"

# What file systems say that have no hard links, or no more of them for this file.
NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's way to write and read checkpoints, made safe: for `Trainer(plugins=[...])`.

    Whenever the process is killed, `last.ckpt` is whole if there was one.  An error leaves the
    old file and no other; it is an OSError that names the checkpoint where the system refused.
    Loading unpickles nothing but tensors and plain values, whatever is asked for.  The processes of
    a run load together; those that do not see the file, on another machine, get what the first one
    read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: set[Path] = set()  # known to be whole without reading them

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if storage_options is not None or "://" in str(path):  # not a file of this machine's
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path).absolute()
        part = path.with_name(f".{path.name}.part")
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            try:
                with open(part, "wb") as file:
                    torch.save(checkpoint, file)
                    sync(file)
                if path.name == LAST and (path in self.written or is_whole(path)):
                    keep_as_previous(path)
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)
        self.written.add(path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, _: storage,  # to the CPU
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return super().load_checkpoint(path, map_location, weights_only=True)
        sees: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(sees, Path(path).is_file())
        if not sees[0]:  # told by all, so that none waits for the others
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        is_first = torch.distributed.get_rank() == 0
        content = None
        if is_first or all(sees):
            content = super().load_checkpoint(path, map_location, weights_only=True)
        if not all(sees):
            sent = [content]
            torch.distributed.broadcast_object_list(sent, src=0)
            content = content if is_first else sent[0]
        assert content is not None
        return content


def keep_as_previous(path: Path) -> None:
    """Make the file at `path` be `previous.ckpt` too, with never a moment without either."""
    previous = path.with_name(PREVIOUS)
    part = path.with_name(f".{PREVIOUS}.part")
    try:
        try:
            os.link(path, part)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            with open(path, "rb") as source, open(part, "wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
                sync(copy)
        os.replace(part, previous)
    finally:
        # Still there after an error, and where both were the same file already (a run killed right
        # here): renaming one name of a file to another of its names does nothing.
        part.unlink(missing_ok=True)


def discard_previous(folder: Path) -> None:
    """Remove `previous.ckpt` where `last.ckpt` is whole: for a training that has ended well."""
    if is_whole(folder / LAST):
        (folder / PREVIOUS).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the side files of a run that was killed while it wrote."""
    for part in folder.glob(".*.ckpt.part"):
        part.unlink(missing_ok=True)


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Let the new names be on the disk too, on systems where a folder can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Tells what the system refused as an OSError that names `path`.

    torch's writer hides a full disk behind a RuntimeError ("unexpected pos 896 vs 854").
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno is None:
            raise
        raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error


# ---- reading back ----------------------------------------------------------------------------


def is_whole(path: Path) -> bool:
    """True for a checkpoint as torch wrote it: every record's checksum fits, and torch finds them.

    Nothing is unpickled.  Reading takes 0.05 s for 100 MB in the system's cache.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if not all(as_torch_stores(record) for record in archive.infolist()):
                return False
            if archive.testzip() is not None:
                return False
        # What Python's zipfile forgives in the archive's directory, torch's own reader does not.
        get_unsafe_globals_in_checkpoint(path)
        return True
    except Exception:  # whatever zipfile, torch and pickletools make of a foreign file
        return False


def as_torch_stores(record: zipfile.ZipInfo) -> bool:
    """Nothing compressed, so that nothing grows when it is read, and nothing marked as a folder."""
    return record.compress_type == zipfile.ZIP_STORED and not record.external_attr & 0x10


def progress_of(path: Path) -> tuple[int, int]:
    """How far a checkpoint is: optimizer steps, and epochs whose end it has in it.

    Reads what it must: the weights stay on the disk.  ValueError if it is none of Lightning's.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        epochs = content["loops"]["fit_loop"]["epoch_progress"]["total"]["processed"]
        return int(content["global_step"]), int(epochs)
    except OSError:
        raise
    except Exception as error:  # whatever torch and pickle make of a foreign file
        raise ValueError(f"{path} is no checkpoint that a training can go on from.") from error


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The whole checkpoint that is furthest on in training, and the files that were none.

    Of those equally far `last.ckpt` comes first, then `previous.ckpt`.  None if there is no whole
    one.
    """
    found: list[tuple[tuple[int, int], Path]] = []
    torn = []
    for path in sorted(folder.glob("[!.]*.ckpt"), key=rank_of_name):
        try:
            if not is_whole(path):
                raise ValueError
            found.append((progress_of(path), path))
        except (OSError, ValueError):
            torn.append(path)
    newest = max(found, key=lambda pair: pair[0], default=None)  # the first of those equal
    return (None if newest is None else newest[1]), torn


def rank_of_name(path: Path) -> tuple[int, str]:
    order = [LAST, PREVIOUS]
    return (order.index(path.name) if path.name in order else len(order)), path.name
