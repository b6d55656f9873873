"""Ctrl-C, SIGTERM and SLURM's signal before a time limit end a training with nothing lost.

    with listening() as stopper:
        trainer = Trainer(callbacks=[stopper, ...])
        stopper.folder = folder_of_the_checkpoints
        trainer.fit(...)                                        # raises Stopped

The first signal lets the optimizer step end that is under way, and the validation that is due
after it; then `last.ckpt` is saved and Stopped raised.  The second of the kind ends the process at
once.  Outside the training loop, where there is nothing to save, the first one ends it by an
exception.

Lightning's own ways are kept out: it ends the process by an exception at once (Ctrl-C), or after
the step without saving (SIGTERM), or saves elsewhere and trains on (SLURM).
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from research.checkpoints.io import LAST, progress_of
from research.faults.loop_counts import mend_batches, mend_epochs, mend_loaded
from research.processes.jobs import in_slurm
from research.processes.launch import is_rank_zero

# One Ctrl-C may come twice: from the terminal, and from torchrun or whatever else passes it on.
ECHO_SECONDS = 0.5

# A signal that is not heard for so long never will be; a second one says so too.
STUCK_SECONDS = 30.0
HEARD = b"\0"

MESSAGES = {
    signal.SIGINT: "stopping after this step; Ctrl-C again to stop at once",
    signal.SIGTERM: "SIGTERM: stopping after this step; a second one stops at once",
    signal.SIGUSR1: "SLURM's time is nearly up: stopping after this step",
}


class Stopped(SystemExit):
    """What ends a run that was told by `signal` to end; `checkpoint` is where to go on from.

    The exit code is 128 and the signal's number, as a shell has it.  It is 0 on all ranks but the
    first: Lightning kills the first as soon as another ends with anything else.
    """

    def __init__(self, number: int, checkpoint: Path | None = None) -> None:
        super().__init__(128 + number if is_rank_zero() else 0)
        self.signal = signal.Signals(number)
        self.checkpoint = checkpoint


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, as the rest of the program knows it, with what Stopped knows."""

    def __init__(self, checkpoint: Path | None = None) -> None:
        super().__init__()
        self.signal = signal.SIGINT
        self.checkpoint = checkpoint


def ending_of(stopped: Stopped) -> Stopped | Interrupted:
    """What the caller of a training gets: KeyboardInterrupt for Ctrl-C, else SystemExit."""
    if stopped.signal == signal.SIGINT and is_rank_zero():
        return Interrupted(stopped.checkpoint)
    return stopped


@contextlib.contextmanager
def listening() -> Iterator["Stopper"]:
    """A Stopper that hears signals until the end; then those are heard who heard them before.

    Only the main thread can: elsewhere nothing changes.  A signal that is ignored stays so, as
    Ctrl-C in a command that a script started in the background.
    """
    stopper = Stopper()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        asked = [signal.SIGINT, signal.SIGTERM]
        before = {number: signal.getsignal(number) for number in asked}
        before = {number: heard for number, heard in before.items() if heard != signal.SIG_IGN}
        if in_slurm():
            before[signal.SIGUSR1] = signal.getsignal(signal.SIGUSR1)
    stopper.signals = tuple(before)
    try:
        stopper.hear()
        with heard_when_stuck(stopper):
            yield stopper
    finally:
        for number, heard in before.items():
            # None: not set from Python, and so not to be had again.
            signal.signal(number, signal.SIG_DFL if heard is None else heard)


@contextlib.contextmanager
def heard_when_stuck(stopper: "Stopper") -> Iterator[None]:
    """Ends the process where the main thread cannot hear: it is in C++.

    Python calls what hears a signal between two of its own instructions.  While the other processes
    are awaited none comes for half an hour; in a long computation the second signal is what ends
    the process at once.
    """
    if not stopper.signals:
        yield
        return
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    stopper.mouth = mouth
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=end_if_stuck, args=(stopper, ear), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        stopper.mouth = None
        os.close(mouth)  # ends the thread


def end_if_stuck(stopper: "Stopper", ear: int) -> None:
    """Read `ear` until its other end is closed: numbers of signals, and HEARD for those before."""
    unheard, came_at, again = None, 0.0, False
    while True:
        came, patience = b"", STUCK_SECONDS if stopper.waits else None
        if unheard is None or select.select([ear], [], [], ECHO_SECONDS if again else patience)[0]:
            came = os.read(ear, 1)
            if came == b"":
                break
        elif unheard is not None:
            why = (
                "this process was waiting for others" if stopper.waits else "it could not be heard"
            )
            say(f"stopped at once: {why}")
            stopper.pass_on(signal.SIGKILL)
            os._exit(128 + unheard)
        if came == HEARD:
            unheard, again = None, False
        elif came[0] in stopper.signals:
            now = time.perf_counter()
            # One may come twice, as in `on_signal`.
            again = again or (unheard is not None and now - came_at >= ECHO_SECONDS)
            came_at = came_at if unheard is not None else now
            unheard = came[0]
    os.close(ear)


class Stopper(Callback):
    """Ends a training after the step in which a signal came; the first of the callbacks.

    folder: where `last.ckpt` is saved; None saves nothing.  heard: the first signal that came.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.signals: tuple[int, ...] = ()
        self.heard: int | None = None
        self.heard_at: dict[int, float] = {}
        self.waits = False  # for the other processes of the run, until all are there
        self.mouth: int | None = None  # tells who watches that a signal was heard
        self.training = False
        self.trainer: Trainer | None = None

    @property
    def checkpoint(self) -> Path | None:
        """`last.ckpt`, if there is one."""
        path = None if self.folder is None else self.folder / LAST
        return path if path is not None and path.exists() else None

    # ---- hearing ---------------------------------------------------------------------------------

    def hear(self) -> None:
        """Be the one who hears; Lightning puts its own ear before ours whenever it starts."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.mouth is not None:
            with contextlib.suppress(OSError):
                os.write(self.mouth, HEARD)
        now, before = time.monotonic(), self.heard_at.get(number)
        if before is not None and now - before < ECHO_SECONDS:
            return
        self.heard_at[number] = now
        if before is not None and number != signal.SIGUSR1:
            self.pass_on(signal.SIGKILL)
            os._exit(128 + number)
        if self.heard is not None:
            return  # stopping already, for another reason
        self.heard = number
        if self.training:
            say(MESSAGES[signal.Signals(number)])
        elif number == signal.SIGINT:
            raise Interrupted(self.checkpoint)  # Lightning sees to the other ranks
        else:
            self.pass_on(signal.SIGTERM)
            raise Stopped(number, self.checkpoint)

    def pass_on(self, number: int) -> None:
        """Send a signal to the other ranks, if Lightning has started them from this one."""
        launcher = None if self.trainer is None else self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(number)

    # ---- where Lightning has just put its ear, and where training begins and ends ----------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer, self.waits = trainer, False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hear()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mend_batches(trainer)
        self.hear()
        self.training = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.training = False

    # ---- what is saved at the start of a batch must be resumed exactly ---------------------------

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mend_loaded(checkpoint, trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mend_epochs(trainer)

    # ---- stopping --------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Here and not at the end of the batch before, because now its validation is done too; and
        # not between batches whose gradients are still being added up.
        if batch_idx % trainer.accumulate_grad_batches == 0 and self.agreed(trainer):
            self.save(trainer, may_be_there=batch_idx == 0)
            self.leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.agreed(trainer):
            self.save(trainer, may_be_there=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Now that the others have had their on_train_end.
        if self.training and self.agreed(trainer):
            self.leave()
        self.training = False

    def agreed(self, trainer: Trainer) -> bool:
        """True on all ranks as soon as one of them has heard something."""
        heard = self.heard is not None
        if trainer.world_size > 1:
            heard = trainer.strategy.reduce_boolean_decision(heard, all=False)
        return heard

    def save(self, trainer: Trainer, may_be_there: bool) -> None:
        """Save `last.ckpt`; with `may_be_there`, only if it is not the one of this epoch's end.

        That one is the better place to begin an epoch from: everything that happens at its start
        happens again.
        """
        if self.folder is None:
            return
        path = self.folder / LAST
        there = trainer.strategy.broadcast(may_be_there and is_of_now(path, trainer))
        if not there:
            trainer.save_checkpoint(path)

    def leave(self) -> None:
        self.training = False
        # Another rank may be the one that heard it.
        raise Stopped(signal.SIGTERM if self.heard is None else self.heard, self.checkpoint)


def say(text: str) -> None:
    """Print on standard error past Python's buffers: a signal may find them in use."""
    if is_rank_zero():
        start = "\n" if os.isatty(2) else ""  # a progress bar's line may not have ended
        with contextlib.suppress(OSError):
            os.write(2, f"{start}{text}\n".encode())


def is_of_now(path: Path, trainer: Trainer) -> bool:
    """True if the checkpoint was saved after this many steps and the end of this many epochs."""
    epochs: Any = trainer.fit_loop.epoch_progress.total
    try:
        return progress_of(path) == (trainer.global_step, epochs.processed)
    except (OSError, ValueError):
        return False
