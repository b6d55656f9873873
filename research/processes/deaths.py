"""When a process of a run dies: the others end within seconds, and the record says why.

    with bound_together(trainer, run, log_system_metrics, how_to_go_on):
        trainer.fit(...)

The first process gets RankDied, which ends the run as FAILED like an error of its own.  It may be
stuck in an exchange of gradients that never ends: after a few seconds it is ended from a thread, in
which the run is then ended the same way.  All others leave quietly with exit code 1.

Without this NCCL waits for half an hour for a process that has died, gloo tells of it in 40 lines,
and Lightning kills the first process, before it can say anything.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from research.command import words_for
from research.configuration.compose import printable
from research.faults.stopping import Stopped
from research.processes.launch import launch
from research.processes.lifeline import DONE, FAILED, STOPPED, Address, Death, Hub, Line, ended
from research.tracking.monitoring import INTERVAL, start_sampler
from research.tracking.run import Run

# Set by the process that lets Lightning start others: they end when it does.
PARENT = "RESEARCH_PARENT"
OBSERVER = "child-process-observer"  # Lightning's thread
LOOPBACK = "127.0.0.1"
VERDICT_SECONDS = 5.0  # until the death is known that another error follows from
LEAVING_SECONDS = 3.0  # for a process to end by itself before it is ended
# What torch.distributed says, in errors that have no class of their own, when another has gone.
OF_CONNECTION = re.compile(
    r"\bgloo\b|\bnccl|Connection (closed|reset|refused)|Broken pipe|TCPStore|ProcessGroup|c10d",
    re.IGNORECASE,
)


@contextlib.contextmanager
def bound_together(
    trainer: Trainer,
    run: Run | None = None,
    log_system_metrics: bool = False,
    how_to_go_on: Callable[[], str | None] = lambda: None,
) -> Iterator[None]:
    """Ends this process when another of the run dies, and the others when this one fails.

    run: the record, in the first process.  how_to_go_on: a line for the user if the run fails.
    Raises RankDied in the first process, SystemExit(1) in the others.
    """
    if trainer.world_size == 1:
        yield
        return
    first = trainer.is_global_zero
    bond = First(trainer, run, log_system_metrics, how_to_go_on) if first else Other(trainer)
    os.environ[PARENT] = str(os.getpid())  # for those that Lightning starts from this one
    trainer.callbacks.insert(0, Joining(bond))  # type: ignore[attr-defined]
    try:
        yield
    except BaseException as error:
        bond.fail(error)
        raise
    else:
        bond.done()
    finally:
        bond.close()


class Joining(Callback):
    """Brings the processes together as soon as they can talk by torch's means."""

    def __init__(self, bond: "Bond") -> None:
        self.bond = bond

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.bond.joined:
            self.bond.joined = True
            invitation = trainer.strategy.broadcast(self.bond.invitation())
            assert invitation is not None
            self.bond.join(invitation)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.bond.interrupted()  # Lightning is about to kill the processes that it started


@dataclass(frozen=True)
class Invitation:
    """What the first process tells all others.

    `interval` is MLflow's own setting of the seconds between two samples of a node, if it is set;
    `samples` is False where they are not asked for.
    """

    address: Address
    samples: bool
    interval: str | None


class Bond:
    """What the first process and the others do alike."""

    joined = False

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.rank = trainer.global_rank
        self.host = LOOPBACK
        if trainer.num_nodes > 1:
            self.host = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
        self.children = Children(trainer)

    def invitation(self) -> Invitation | None:
        return None

    def join(self, invitation: Invitation) -> None:
        pass

    def interrupted(self) -> None:
        pass

    def done(self) -> None:
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """What is to be told of this error, and what is raised instead of it."""
        raise NotImplementedError

    def close(self) -> None:
        pass


# ---- the first process ---------------------------------------------------------------------------


class First(Bond):
    def __init__(
        self,
        trainer: Trainer,
        run: Run | None,
        log_system_metrics: bool,
        how_to_go_on: Callable[[], str | None],
    ) -> None:
        super().__init__(trainer)
        self.run, self.how_to_go_on = run, how_to_go_on
        self.samples = log_system_metrics and run is not None
        self.hub = Hub(self.host, self.end_by_force, self.record_sample, self.children.codes)

    def invitation(self) -> Invitation:
        return Invitation(self.hub.address, self.samples, os.environ.get(INTERVAL))

    def record_sample(self, node: int, rows: list[Any]) -> None:
        if self.run is not None:
            self.run.log_samples_of(node, rows)

    def interrupted(self) -> None:
        self.end(STOPPED)

    def end(self, how: str) -> None:
        self.hub.end(how)
        if self.hub.is_forced:
            threading.Event().wait()  # the thread that ends this process is at it

    def done(self) -> None:
        self.end(DONE)

    def fail(self, error: BaseException) -> None:
        death = self.death_behind(error)
        if death is None and isinstance(error, KeyboardInterrupt | SystemExit):
            self.end(STOPPED)
            return
        self.end(FAILED)
        self.children.end()
        if death is not None:
            instead = death.error()
            raise instead from instead.__cause__

    def death_behind(self, error: BaseException) -> Death | None:
        """The death of another process that this error follows from."""
        if is_of_connection(error):
            return self.hub.wait_for_death(VERDICT_SECONDS)
        if isinstance(error, Stopped) and error.signal == signal.SIGTERM:
            # torchrun tells all others to end as soon as one has died.
            return self.hub.wait_for_death(0.5)
        return None

    def end_by_force(self, death: Death) -> None:
        """End this process, whatever it is doing; not called where it ends by itself."""
        error = death.error()
        try:
            self.hub.tell(FAILED)
            self.children.end()
            with contextlib.suppress(Exception):  # a store that is away just now
                line = self.how_to_go_on()
                if line is not None:
                    error.add_note(line)
            if self.run is not None:
                self.run.__exit__(type(error), error, None)
        finally:
            os._exit(tell(error))

    def close(self) -> None:
        self.hub.close()


def tell(error: BaseException) -> int:
    """Say on standard error what ended the run; returns the exit code."""
    code, words = 1, f"error: {printable(str(error))}"
    if isinstance(error, KeyboardInterrupt):
        code, words = 128 + signal.SIGINT, "stopped by Ctrl-C"
    elif isinstance(error, SystemExit) and isinstance(error.code, int):
        code, words = error.code, f"stopped by {signal.Signals(error.code - 128).name}"
    say("\n".join([words, *(printable(note) for note in getattr(error, "__notes__", ()))]))
    return code


def say(text: str) -> None:
    """Print on standard error past Python's buffers, which the main thread may be using."""
    start = "\n" if os.isatty(2) else ""  # a progress bar's line may not have ended
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{text}\n".encode(errors="replace"))


def is_of_connection(error: BaseException) -> bool:
    """True for an error that may follow from the death of another process."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.distributed.DistError):
            return True
        if isinstance(cause, RuntimeError | OSError) and OF_CONNECTION.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


class Children:
    """The processes that Lightning has started from this one, if it did."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.first_rank = trainer.global_rank + 1
        self.are_ours = False  # to watch

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        return list(getattr(self.trainer.strategy.launcher, "procs", ()))

    def codes(self) -> dict[int, int | None]:
        """Their exit codes, by rank; None for one that runs.

        From the first call after they were started it is ours to watch them: Lightning's thread,
        which looks every 5 seconds, would kill this process before it has said anything.
        """
        if not self.are_ours:
            self.excuse_observer()
        return {rank: each.poll() for rank, each in enumerate(self.processes, self.first_rank)}

    def excuse_observer(self) -> None:
        launcher: Any = self.trainer.strategy.launcher
        watched = getattr(launcher, "procs", None)
        if not watched:
            return
        for thread in threading.enumerate():
            if thread.name == OBSERVER and getattr(thread, "_child_processes", watched) is watched:
                # It looks at this list, and ends when nothing is left in it.
                launcher.procs = list(watched)
                watched.clear()
                self.are_ours = True
                return

    def end(self) -> None:
        """Let them end by themselves, as they were told to, and kill them if they do not."""
        until = time.monotonic() + LEAVING_SECONDS + 1
        for each in self.processes:
            while each.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            each.kill()


# ---- the others ----------------------------------------------------------------------------------


class Other(Bond):
    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.line: Line | None = None
        self.stop_sampling: Callable[[], None] = lambda: None
        self.closed = threading.Event()
        parent = os.environ.get(PARENT)
        found = launch()
        known = int(parent) if parent is not None and trainer.local_rank > 0 else None
        if found is not None:
            known = os.getppid() if found.by == "torchrun" else None
        threading.Thread(target=self.watch, args=(known,), daemon=True).start()

    def watch(self, parent: int | None) -> None:
        """Until there is a line: end with the process that started this one, or if one dies that
        was started from here."""
        while self.line is None and not self.closed.wait(1.0):
            if parent is not None and os.getppid() != parent:
                os._exit(1)
            died = {rank: code for rank, code in self.children.codes().items() if code}
            for rank, code in died.items():
                if self.line is None:
                    say(f"rank {rank} {ended(code)} before training began")
                    self.children.end()
                    os._exit(1)

    def join(self, invitation: Invitation) -> None:
        try:
            self.line = Line(invitation.address, self.host, self.rank, self.leave)
        except OSError as error:
            say(
                f"rank {self.rank} cannot reach rank 0 at {self.host}:{invitation.address.port} "
                f"({error}): if one of the two dies, the other will wait for it for long"
            )
            return
        if invitation.samples and self.trainer.local_rank == 0:
            put = partial(self.line.sample, self.trainer.node_rank)
            with contextlib.suppress(OSError):
                self.stop_sampling = start_sampler(put, invitation.interval)

    def leave(self, why: str, is_told: bool) -> None:
        """End this process, unless it leaves the training by itself, whatever it is doing."""
        if not is_told and self.rank == 1:  # one line is enough
            say(why)
        if not self.closed.wait(LEAVING_SECONDS):
            self.children.end()
            os._exit(1)

    def done(self) -> None:
        if self.line is not None:
            self.line.done()

    def fail(self, error: BaseException) -> None:
        if self.line is None:
            return
        if isinstance(error, KeyboardInterrupt | SystemExit):
            number = getattr(error, "signal", signal.SIGINT)
            self.line.stopped(int(number))
            return
        if self.line.over.is_set() or (
            is_of_connection(error) and self.line.over.wait(VERDICT_SECONDS)
        ):
            raise SystemExit(1) from None
        words = words_for(error) if isinstance(error, Exception) else None
        told = words or f"{type(error).__name__}: {error}"
        if self.line.failed(told, error, is_bug=words is None):
            raise SystemExit(1) from None

    def close(self) -> None:
        self.stop_sampling()
        self.closed.set()
        if self.line is not None:
            self.line.close()
