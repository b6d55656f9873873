"""One copy in memory for all processes of a run on a machine, where each would have its own.

    content, lease = shared(group, asked, make)

The first process to come makes the content and writes it to a file; all of them, the first too,
map that file, so its pages are in memory once.  The mapping is private: what a process writes into
its tensors no other one sees.  The file lies in memory itself (/dev/shm) or, where that is small,
among the temporary files, whose pages the system keeps in memory as well.

There is no list of who uses a file.  Whoever needs one holds a lock on it (flock), which ends with
the process however that ends.  So a file that nobody holds is a leftover, and whoever shares
anything next removes it; and whoever has waited for a lock looks whether the file is still there.
"""

import hashlib
import logging
import os
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Tensors and plain values, in dictionaries, lists and tuples: what torch loads with `weights_only`.
Content = dict[str, Any]

logger = logging.getLogger(__name__)


class Lease:
    """Keeps the file of a content for those who have yet to come; ends with this object.

    The last process whose lease ends removes the file.  A copy of a lease, in this process or in
    another, keeps nothing.
    """

    def __init__(self, handle: int | None = None, path: Path | None = None) -> None:
        self._handle = handle
        self._path = path
        self._end = weakref.finalize(self, leave, handle)

    def end(self, all_have_it: bool = False) -> None:
        """Give it back; where all have the content, nothing keeps the file's name any more."""
        if self._end.alive and all_have_it and self._path is not None:
            assert self._handle is not None
            remove(self._path, self._handle)
        self._end()

    def __reduce__(self) -> tuple[type["Lease"], tuple[()]]:
        return Lease, ()


def shared(group: str, asked: str, make: Callable[[], Content]) -> tuple[Content, Lease]:
    """Return what `make` returns, made by one process of the group and mapped by all.

    group: a name that only the processes of this run on this machine know each other by.
    asked: what is to be made; those of a group that ask for the same get the same.

    Where there is no place to share it in, each process makes its own, and one says so.  What
    `make` raises is raised here, and the next process that waits tries for itself.
    """
    if fcntl is None:
        return own(make(), ["this system has no flock"])
    places, name, troubles = find_places(), name_of(group, asked), []
    with one_at_a_time([place / f"{name}.lock" for place in places]):
        sweep()
        for place in places:
            found = take(place / f"{name}.pt")
            if found is not None:
                return found
        content = make()
        for place in places:
            try:
                return keep(content, place / f"{name}.pt")
            except OSError as error:
                troubles.append(f"in {place}: {error.strerror or error}")
    return own(content, troubles or ["no folder is safe from other users"])


def own(content: Content, troubles: list[str]) -> tuple[Content, Lease]:
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        logger.warning(
            "Each process on this machine keeps its own copy of the pictures; one for all cannot "
            "be kept (%s).",
            "; ".join(troubles),
        )
    return content, Lease()


def take(path: Path) -> tuple[Content, Lease] | None:
    """Return what another process of the group keeps there, or None."""
    try:
        handle = hold(path, fcntl.LOCK_SH)
    except OSError:  # there is none, or it is a link or another user's
        return None
    try:
        return load(path), Lease(handle, path)
    except (OSError, RuntimeError):  # all others have it, and have just removed its name
        os.close(handle)
        return None


def keep(content: Content, path: Path) -> tuple[Content, Lease]:
    """Write the content to a file and return it as it is mapped from there; OSError if it cannot.

    The file has its name only when it is whole.
    """
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage() for part in tensors(content)
    }
    nbytes = sum(storage.nbytes() for storage in storages.values())
    free = shutil.disk_usage(path.parent).free
    if nbytes > free / 2:  # a full /dev/shm would be the end of NCCL, a full disk that of others
        raise OSError(f"{nbytes / 1e6:.0f} MB are more than half of the {free / 1e6:.0f} MB free")
    aside = path.with_suffix(f".{secrets.token_hex(8)}.part")
    handle = hold(aside, fcntl.LOCK_SH, os.O_CREAT | os.O_EXCL)
    try:
        with open(handle, "wb", closefd=False) as file:
            torch.save(content, file)
        mapped = load(aside)
        os.rename(aside, path)
        return mapped, Lease(handle, path)
    except BaseException as error:
        remove(aside, handle)
        os.close(handle)
        if isinstance(error, RuntimeError):  # as which torch tells of a disk that is full
            raise OSError(f"{nbytes / 1e6:.0f} MB could not be written and mapped") from error
        raise


def load(path: Path) -> Content:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in dictionaries, lists and tuples."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        yield from tensors(list(content.values()))
    elif isinstance(content, list | tuple):
        for part in content:
            yield from tensors(part)


# ---- files and their locks -----------------------------------------------------------------------


def find_places() -> list[Path]:
    """Return the folders to share in, the best first, in which no other user can swap our files."""
    places = dict.fromkeys((Path("/dev/shm"), Path(tempfile.gettempdir())))
    return [place for place in places if is_safe(place)]


def is_safe(folder: Path) -> bool:
    try:
        mode = os.stat(folder).st_mode
    except OSError:
        return False
    others_may_swap = mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX
    return not others_may_swap and os.access(folder, os.W_OK | os.X_OK)


def prefix() -> str:
    return f"research-shared-{os.geteuid()}-"


def name_of(group: str, asked: str) -> str:
    """Return the name of the group's files for this content.

    Containers that have a folder in common may well have groups of one name (process numbers
    begin at 1 in each), and settings that mean other files there.
    """
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        container = ""
    whole = repr((container, group, os.getcwd(), asked))
    return prefix() + hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def hold(path: Path, how: int, flags: int = 0) -> int:
    """Return a handle on the file, locked; it is ours, no link, and still there by its name."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        try:
            if os.fstat(handle).st_uid != os.geteuid():
                raise PermissionError(f"{path} belongs to another user")
            fcntl.flock(handle, how)
            if is_at(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def remove(path: Path, handle: int) -> None:
    """Remove the file if it is the one of the handle, and not another of that name."""
    if is_at(path, handle):
        with suppress(FileNotFoundError):
            path.unlink()


@contextmanager
def one_at_a_time(paths: list[Path]) -> Iterator[None]:
    """Let one process in at a time, by a lock on the first of the paths where one can be had."""
    for path in paths:
        try:
            handle = hold(path, fcntl.LOCK_EX, os.O_CREAT)
        except OSError:  # a link, another user's, a disk that is full
            continue
        try:
            yield
        finally:
            remove(path, handle)  # those who wait for it see that it is gone, and make another
            os.close(handle)
        return
    yield


def sweep() -> None:
    """Remove all files of this user that nobody holds."""
    for place in find_places():
        for path in place.glob(f"{prefix()}*"):
            with suppress(OSError):  # held (BlockingIOError), gone, or another user's
                handle = hold(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path, handle)
                os.close(handle)


def leave(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
        sweep()
