"""What the commands share: what went wrong becomes words and an exit code, never a traceback.

0      all is well
1      a file, a disk, a device or a store cannot be used: no room, no permission, it broke;
       or the loss became NaN or infinite
2      a mistake in what was typed
130    stopped by Ctrl-C (143: by SIGTERM)

An exception may say its own code by an attribute `exit_code`.  A bug of ours keeps its traceback.
Nothing here imports torch.
"""

import atexit
import contextlib
import errno
import io
import logging
import os
import re
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from research.configuration.compose import ConfigurationError, printable
from research.faults import memory
from research.processes.launch import launch
from research.processes.lifeline import RankDied
from research.speed.spared import spare
from research.tracking.store import TrackingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What the system says of disks, permissions and limits: whoever was told, it is no bug of ours.
OF_THE_SYSTEM = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV, errno.ENXIO, errno.ESTALE),
}
NO_ROOM = {errno.ENOSPC: "Free some space", errno.EDQUOT: "Free some space"}
# Of torch.distributed, which is not imported here.
UNREACHED = ("DistNetworkError", "DistStoreError")
NO_MESH = "Gloo connectFullMesh failed"
# torch's own writer of files hides the system's error behind these.
TORCH_CANNOT_WRITE = re.compile(r"unexpected pos \d+ vs \d+|file write failed|inline_container")


def run_or_help(
    run: Callable[[Sequence[str]], int],
    words: str,
    arguments: Sequence[str] | None = None,
    needs_any: bool = False,
) -> int:
    """The exit code of a command: what `run` returns of the arguments, or ends with.

    `words` are printed instead where somebody asks for help; where there are no arguments and it
    `needs_any`, that is a mistake too.

    arguments: None for what was typed.
    """
    typed = sys.argv[1:] if arguments is None else list(arguments)
    is_mistaken = needs_any and not typed

    def work() -> int:
        if is_mistaken or "-h" in typed or "--help" in typed:
            print(words, end="")
            return 2 if is_mistaken else 0
        return run(typed)

    return exit_code_of(work)


def exit_code_of(work: Callable[[], int]) -> int:
    """What `work` returns, or the exit code for what went wrong in it, told on standard error."""
    try:
        code = work()
        sys.stdout.flush()  # else a full disk behind `> file` is met when nobody can tell it
        return code
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:
        print("stopped by Ctrl-C", file=sys.stderr)
        print_notes(error)
        return 130
    except SystemExit as error:
        if error.code in (128 + signal.SIGTERM, 128 + signal.SIGUSR1):
            print(f"stopped by {signal.Signals(error.code - 128).name}", file=sys.stderr)
            print_notes(error)
        raise
    except Exception as error:
        words = words_for(error)
        if words is None:
            raise
        code, found = code_of(error), launch()
        # Everybody whom torchrun or SLURM started was told the same; one on each machine says it.
        if found is None or found.local_rank == 0 or code != 2:
            who = "" if found is None or found.rank == 0 else f" in process {found.rank}"
            for line in printable(words).splitlines():
                print(f"error{who}: {line}", file=sys.stderr)
            print_notes(error)
        return code


def code_of(error: Exception) -> int:
    """The exit code of an error that has words.

    A store that cannot be used is no mistake in what was typed; a run that it does not have is.
    """
    if isinstance(error, TrackingError):
        return 1 if error.__cause__ is not None or place_of(error).name == "run.py" else 2
    return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)


def print_notes(error: BaseException) -> None:
    """What else went wrong on the way out, and how to go on.

    A second Ctrl-C has none, but it may have come upon the first one, which has.
    """
    found: BaseException | None = error
    while found is not None and not hasattr(found, "__notes__"):
        found = found.__context__
    for note in getattr(found, "__notes__", ()):
        print(printable(note), file=sys.stderr)


def words_for(error: Exception) -> str | None:
    """What to tell the user of this error; None for a bug, which is shown whole."""
    if isinstance(error, memory.OutOfMemory | RankDied):
        return str(error)
    if isinstance(error, ValueError) and is_users_mistake(error):
        return str(error)
    if isinstance(error, FloatingPointError):  # NonFiniteLoss is one, whose module needs torch
        return str(error)
    shortage = memory.shortage_in(error)
    if shortage is not None:
        return memory.told(shortage)
    if type(error).__name__ in UNREACHED or NO_MESH in str(error):
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        return (
            f"The processes of this run cannot reach each other; the first is at {where} "
            f"({str(error).splitlines()[0]}). Was the command started on every node, with this "
            "address, and is the network between them open?"
        )
    refused = refused_by_system(error)
    if refused is not None:
        return f"{refused}."
    if isinstance(error, RuntimeError) and TORCH_CANNOT_WRITE.search(str(error)):
        return "A file could not be written whole. Is the disk full?"
    return None


def refused_by_system(error: BaseException | None) -> str | None:
    """The file and the reason where the system refused to read or write; None for other errors.

    Libraries may hide such an error behind one of their own.
    """
    cause: BaseException | None = error if isinstance(error, OSError | RuntimeError) else None
    while cause is not None:
        if isinstance(cause, OSError):
            # Our own code names a file in what it raises; what came from within a library has to
            # be the system's doing.
            is_told = cause.filename is not None and cause is error
            if cause.strerror is not None and (is_told or cause.errno in OF_THE_SYSTEM):
                place = "" if cause.filename is None else f"{os.fsdecode(str(cause.filename))}: "
                hint = f". {NO_ROOM[cause.errno]}" if cause.errno in NO_ROOM else ""
                return f"{place}{cause.strerror}{hint}"
        cause = cause.__cause__ or cause.__context__
    return None


def is_users_mistake(error: ValueError) -> bool:
    """True for a fault of the settings, and for what our code or Lightning's refuses; else a bug.

    torch's ValueErrors come out of torch's files: but for its schedules', those are shown whole.
    """
    if isinstance(error, ConfigurationError | TrackingError):
        return True
    raised_in = place_of(error)
    ours = raised_in.is_relative_to(Path(__file__).parent)
    return ours or "lightning" in raised_in.parts or raised_in.name == "lr_scheduler.py"


def place_of(error: Exception) -> Path:
    """The file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename) if frames else Path()


def run_as_script(main: Callable[[], int]) -> None:
    """End this process with the exit code of `main`, which has imported no Lightning yet."""
    spare()
    ending = Ending()
    atexit.register(ending.end)  # registered first, called last
    if sys.stdout is None:  # closed by who started it: `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is not None:
        sys.stderr = unheard()
    for stream in (sys.stdout, sys.stderr):
        # The name of a file may hold what is no text; what it is about is told all the same.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        ending.code = main()
        sys.exit(ending.code)
    except BrokenPipeError:  # `--help.trainer | head`: nobody reads on, and nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Unheard(io.FileIO):
    """Standard error that goes nowhere once nobody reads it: `fit 2>&1 | tee log`, and Ctrl-C.

    What is told meanwhile is no part of the work, which goes on, or ends in order, without it.
    """

    def write(self, told: Any, /) -> int:
        try:
            return super().write(told)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(told)


def unheard() -> TextIO:
    """Standard error anew, as an `Unheard`, written out at the end of each line."""
    sys.stderr.flush()
    raw = Unheard(sys.stderr.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=sys.stderr.encoding, line_buffering=True
    )


class Ending:
    """Ends a process, once all else is done, without taking it down piece by piece.

    CUDA's libraries, which come with torch, read 100 MB of themselves only to be unloaded, and take
    half a second for it.  A process whose `code` is not known, one with a traceback, ends as ever,
    and so does one with a file that somebody writes to and has not closed: it may hold lines back.
    """

    code: int | None = None

    def end(self) -> None:
        if self.code is None or is_writing():
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.code)


def is_writing() -> bool:
    """Whether a file beside the standard ones is open to be written to."""
    for number in map(int, os.listdir("/dev/fd")) if fcntl is not None else ():
        with contextlib.suppress(OSError):  # that of the listing itself is closed by now
            opened = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
            if number > 2 and opened != os.O_RDONLY and stat.S_ISREG(os.fstat(number).st_mode):
                return True
    return False
