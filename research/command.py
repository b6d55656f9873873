"""What the commands share: what went wrong becomes words and an exit code, never a traceback.

0      all is well
1      a file cannot be read or written
2      a mistake in what was typed
130    stopped by Ctrl-C

A bug of ours keeps its traceback. Nothing here imports torch.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from research.configuration.compose import ConfigurationError


def exit_code_of(work: Callable[[], int]) -> int:
    """What `work` returns, or the exit code for what went wrong in it, told on standard error."""
    try:
        return work()
    except ValueError as error:
        if not is_users_mistake(error):
            raise
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:
            print("stopped by SIGTERM", file=sys.stderr)
        raise


def is_users_mistake(error: ValueError) -> bool:
    """True for a fault of the settings, and for what our code or Lightning's refuses; else a bug.

    torch's ValueErrors come out of torch's files: but for its schedules', those are shown whole.
    """
    if isinstance(error, ConfigurationError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename) if frames else Path()
    ours = raised_in.is_relative_to(Path(__file__).parent)
    return ours or "lightning" in raised_in.parts or raised_in.name == "lr_scheduler.py"


def is_rank_zero() -> bool:
    """False in the processes that Lightning, torchrun or SLURM start beside the first."""
    ranks = (os.environ.get(name, "0") for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)


def run_as_script(main: Callable[[], int]) -> None:
    """End this process with the exit code of `main`."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # `--help.trainer | head`: nobody reads on, and nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
