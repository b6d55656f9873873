"""Out of memory, told as what to do about it: which memory, at what, and the batch size to try.

    with memory.told_plainly(configuration, classifier):
        trainer.fit(...)

torch says it in several ways, with pages of advice on its allocator; here it is one exception whose
message is for the user.  torch is not imported here: the commands import this before it.
"""

import contextlib
import gc
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from research.configuration.schema import Configuration

# What torch, its libraries and C++ say in a RuntimeError where there is no class for it.
SAID = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|bad_alloc"
    r"|bad allocation|(CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class OutOfMemory(RuntimeError):
    """A device or the machine has no memory left; the message says what to try."""

    exit_code = 1


@dataclass(frozen=True)
class Shortage:
    """What ran out: `place` in words, whose `device` is "cuda", "mps" or "cpu".

    `wanted` is the number of bytes that were asked for last, None where that is not known.
    """

    place: str
    device: str
    wanted: int | None


def shortage_in(error: BaseException) -> Shortage | None:
    """What ran out by this error, or by the one that it was raised from; None for others."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (
            isinstance(cause, RuntimeError) and SAID.search(str(cause))
        ):
            return describe(str(cause))
        cause = cause.__cause__
    return None


def describe(said: str) -> Shortage:
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)\b", said)
    wanted = None if found is None else int(float(found[1]) * UNITS[found[2]])
    if re.search(r"CUDA|CUBLAS|CUDNN|CUSOLVER|HIP out", said):
        number = re.search(r"GPU (\d+)", said)
        return Shortage(f"GPU {number[1]}" if number else "the GPU", "cuda", wanted)
    if "MPS" in said:
        return Shortage("the GPU (mps)", "mps", wanted)
    return Shortage("this machine", "cpu", wanted)


def free_memory() -> None:
    """Give back what nothing holds any more, to other processes too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ---- what is told --------------------------------------------------------------------------------


@contextlib.contextmanager
def told_plainly(
    configuration: "Configuration | None" = None,
    network: "nn.Module | None" = None,
    learns: bool = True,
) -> Iterator[None]:
    """Raises OutOfMemory, with the batch size to try, where memory runs out inside.

    network: what is on the device whatever the batch; without it the batch is held to blame for
    all that is there.
    learns: False where batches are only scored, so that their size changes no result.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        found = shortage_in(error)
        if found is None:
            raise
        raise OutOfMemory(told(found, configuration, network, learns)) from error


def told(
    found: Shortage,
    configuration: "Configuration | None" = None,
    network: "nn.Module | None" = None,
    learns: bool = True,
) -> str:
    """A few sentences: what ran out, with which batches, and what to type."""
    more = "" if found.wanted is None else f" ({size(found.wanted)} more were asked for)"
    batch = None if configuration is None else configuration.arguments("data").get("batch_size")
    if configuration is None or batch is None:
        return f"The memory of {found.place} is full{more}. {other_ways(found, None)}"
    settings = configuration.values.trainer
    accumulated = settings.accumulate_grad_batches if learns else 1
    problem = f"The memory of {found.place} is full{more}, with batches of {batch}."
    found_room = smaller(batch, accumulated, most_that_fits(found, batch, network))
    if found_room is None:
        return (
            f"{problem} What is there beside the pictures of a batch is too much already. "
            + other_ways(found, settings.precision)
        )
    smaller_batch, pieces = found_room
    flags = f"--data.batch_size {smaller_batch}"
    if not learns:
        return f"{problem} Try {flags}; the figures stay the same."
    if configuration.classes["optimizer"].__name__ == "LBFGS":  # which cannot add gradients up
        return f"{problem} Try {flags}. {other_ways(found, settings.precision)}"
    of_each = smaller_batch * pieces
    before = batch * accumulated
    step = f"the same {before}" if of_each == before else f"{of_each} instead of {before}"
    return (
        f"{problem} Try {flags} --trainer.accumulate_grad_batches {pieces}: each step then learns "
        f"from {step} pictures. {other_ways(found, settings.precision)}"
    )


def told_of_setting(key: str, found: Shortage) -> str:
    """What is told where memory runs out while that is built which the setting `key` asks for."""
    more = "" if found.wanted is None else f" ({size(found.wanted)} more were asked for)"
    fewer = "fewer or smaller pictures" if key == "data" else "a smaller network"
    return f"{key}: this does not fit into the memory of {found.place}{more}. Choose {fewer}."


def other_ways(found: Shortage, precision: Any) -> str:
    ways = ["a smaller --model.network"]
    if precision in (None, "32", 32, "32-true"):
        ways.append("--trainer.precision bf16-mixed")
    ways.append("--trainer.accelerator cpu" if found.device != "cpu" else "ending other programs")
    return f"What else helps: {', '.join(ways[:-1])}, {ways[-1]}."


def size(count: int) -> str:
    for unit in ("TiB", "GiB", "MiB"):
        if count >= UNITS[unit]:
            return f"{count / UNITS[unit]:.1f} {unit}"
    return f"{count:,} bytes"


# ---- the batch size to try -----------------------------------------------------------------------


def smaller(batch: int, accumulated: int, most: int | None) -> tuple[int, int] | None:
    """A batch of at most half as many pictures and at most `most`, and how many make up a step.

    Where it can be a step learns from as many pictures as before, and a batch is a multiple of 8,
    which is what tensor cores like.  None where there is no smaller one.
    """
    limit = batch // 2 if most is None else min(batch // 2, most)
    if limit < 1:
        return None
    fewest = -(-batch // limit)
    whole = [pieces for pieces in range(fewest, 2 * fewest + 1) if batch % pieces == 0]
    in_eights = [pieces for pieces in whole if batch // pieces % 8 == 0]
    for pieces in (*in_eights, *whole):
        return batch // pieces, accumulated * pieces
    pieces, found = fewest, batch // fewest
    return (found - found % 8 if found >= 8 else found), accumulated * pieces


def most_that_fits(found: Shortage, batch: int, network: "nn.Module | None" = None) -> int | None:
    """The most pictures that there may be room for; None where that cannot be told.

    The step ended before it had all it needed, so this is an upper bound: it tells a batch that is
    ten times too large from one that is a little too large.
    """
    if found.device == "cuda":
        room, held = cuda_bytes(network)
        needed = held + (found.wanted or 0)
        return None if room is None or needed <= 0 else int(batch * max(room, 0) / needed)
    room = machine_bytes() if found.device == "cpu" else None
    if room is None or not found.wanted:
        return None
    return max(int(batch * room / found.wanted), 1)  # part of the room is held by this batch still


def cuda_bytes(network: "nn.Module | None") -> tuple[int | None, int]:
    """What there is for pictures on the GPU in all, and the most of it that was ever held."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None, 0
    tensors = [] if network is None else [*network.parameters(), *network.buffers()]
    fixed = sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
    free, _ = torch.cuda.mem_get_info()
    room = free + torch.cuda.memory_reserved() - fixed
    return room, max(torch.cuda.max_memory_allocated() - fixed, 0)


def machine_bytes() -> int:
    """The bytes of memory that could be had now."""
    import psutil

    room = psutil.virtual_memory().available
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            room = min(room, max(limit - psutil.Process().memory_info().vms, 0))
    return room
