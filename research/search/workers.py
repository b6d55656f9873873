"""The worker processes of one machine: where each has its place, started, listened to, ended.

    crew = Crew(places(2, 1, gpus=[], devices=1), folder_for_logs)
    crew.start(2)                       # they import, which takes seconds
    crew.give(job)                      # what these are told, and those that are started later
    heard = crew.hear(0.2)              # Took, Ended, Gone or Signalled; None if nothing came

A worker is `python -m research.search.worker`.  It gets its job as a line of JSON on standard
input, which stays open: it closes when this process dies, however it does, and the worker then
stops.  It says on standard output, a line of JSON each, which trial it took and how that ended.
What it prints on standard error is in a file of its own.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from research.configuration.compose import ConfigurationError
from research.search.job import Job
from research.tracking.store import project_root

COMMAND = [sys.executable, "-m", "research.search.worker"]
THREADS = "OMP_NUM_THREADS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
TAIL = 15  # lines of a worker's log that are told where it died


@dataclass(frozen=True)
class Place:
    """Where a worker works: its number from 0, its GPUs by the names that CUDA knows."""

    number: int
    gpus: tuple[str, ...] | None = None  # None: as this process sees them
    threads: int = 1


@dataclass(frozen=True)
class Took:
    worker: "Worker"
    cell: str
    slot: int
    trial: int


@dataclass(frozen=True)
class Ended:
    worker: "Worker"
    cell: str
    slot: int
    state: str


@dataclass(frozen=True)
class Gone:
    """The process has ended; `code` is minus the signal's number where a signal did it."""

    worker: "Worker"
    code: int


@dataclass(frozen=True)
class Signalled:
    """This process was told to stop."""

    number: int


Heard = Took | Ended | Gone | Signalled


# ---- places --------------------------------------------------------------------------------------


def places(
    workers: int | None, per_gpu: int | None, gpus: Sequence[str], devices: int
) -> list[Place]:
    """Where each worker works; without `workers` one for each GPU, or one where there is none.

    gpus: those that trials may use; none where they train on the CPU.  devices: how many of them
    one trial takes.  ConfigurationError where no trial could have its GPUs.
    """
    for name, number in (("workers", workers), ("workers_per_gpu", per_gpu)):
        if number is not None and number < 1:
            raise ConfigurationError(f"{name} is {number}; it must be 1 or more.")
    if not gpus:
        count = workers or 1
        return [Place(number, None, threads(count * devices)) for number in range(count)]
    groups = [tuple(gpus[at : at + devices]) for at in range(0, len(gpus), devices)]
    groups = [group for group in groups if len(group) == devices]
    if not groups:
        raise ConfigurationError(
            f"trainer.devices is {devices}, and this machine has {len(gpus)} GPUs; let a trial "
            "have fewer, or search where there are as many."
        )
    count = workers or len(groups) * (per_gpu or 1)
    share = threads(count * devices)
    return [Place(number, groups[number % len(groups)], share) for number in range(count)]


def threads(processes: int) -> int:
    """How many threads each of so many processes may have, so that they do not fight."""
    return max(1, cores() // processes)


def cores() -> int:
    """How many this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        found = [name.strip() for name in named.split(",")]
        return [name for name in found if name and name != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


# ---- one worker ----------------------------------------------------------------------------------


class Worker:
    """One process, and what it said of itself last."""

    def __init__(self, number: int, place: Place, log: Path, shared: Mapping[str, str]) -> None:
        self.number = number  # of all that were started, from 1
        self.place = place
        self.log = log
        self.running: list[Took] = []
        self.took = 0
        self.is_told = False
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(place) | dict(shared),
                start_new_session=True,  # Ctrl-C is for the coordinator, which tells the workers
            )

    def give(self, job: Job) -> None:
        self.is_told = True
        line = json.dumps(asdict(replace(job, number=self.number))) + "\n"
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it died; that is heard
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def tail(self) -> str:
        """The last lines it printed."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-TAIL:])

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def kill(self) -> None:
        """It and what it started; but not its recorder process, which still has to deliver."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def environment(place: Place) -> dict[str, str]:
    found = dict(os.environ)
    path = found.get("PYTHONPATH")
    package = str(project_root())
    found["PYTHONPATH"] = package if not path else package + os.pathsep + path
    found.setdefault(THREADS, str(place.threads))
    if place.gpus is not None:
        found[VISIBLE] = ",".join(place.gpus)
    return found


def death_of(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        memory = ", as where memory runs out" if -code == signal.SIGKILL else ""
        return f"killed by {name}{memory}"
    return f"exit code {code}"


# ---- all of them ---------------------------------------------------------------------------------


class Crew:
    """The workers of this machine, at most one for each place.

    folder: for their logs.  shared: environment that all of them have in common.
    """

    def __init__(
        self, places: Sequence[Place], folder: Path, shared: Mapping[str, str] | None = None
    ) -> None:
        self.places = places
        self.folder = folder
        self.shared = shared or {}
        self.workers: list[Worker] = []  # those that have not ended
        self.job: Job | None = None
        self.started = 0
        self._said: queue.SimpleQueue[Heard] = queue.SimpleQueue()

    @property
    def running(self) -> list[Worker]:
        """Those that have a trial, or several."""
        return [worker for worker in self.workers if worker.running]

    def start(self, count: int) -> None:
        """Start so many more, as far as there are places."""
        taken = {worker.place.number for worker in self.workers}
        for place in [place for place in self.places if place.number not in taken][:count]:
            self.started += 1
            log = self.folder / f"worker-{self.started}.log"
            worker = Worker(self.started, place, log, self.shared)
            self.workers.append(worker)
            threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
            if self.job is not None:
                worker.give(self.job)

    def give(self, job: Job) -> None:
        """Tell the job to those that have none yet, and to all that are started from now on."""
        self.job = job
        for worker in self.workers:
            if not worker.is_told:
                worker.give(job)

    def hear(self, seconds: float) -> Heard | None:
        """What came next; waits so long for it."""
        try:
            heard = self._said.get(timeout=seconds)
        except queue.Empty:
            return None
        match heard:
            case Took(worker):
                worker.running.append(heard)
                worker.took += 1
            case Ended(worker, cell, slot):
                worker.running = [
                    took for took in worker.running if (took.cell, took.slot) != (cell, slot)
                ]
            case Gone(worker):
                self.workers.remove(worker)
                worker.hang_up()
        return heard

    def tell_signal(self, number: int) -> None:
        """Let `hear` say that this process was told to stop; a signal's handler may call it."""
        self._said.put(Signalled(number))

    def _listen(self, worker: Worker) -> None:
        pipe = worker.process.stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                try:
                    said = json.loads(line)
                    event = said["event"]
                    if event == "took":
                        self._said.put(Took(worker, said["cell"], said["slot"], said["trial"]))
                    elif event == "ended":
                        self._said.put(Ended(worker, said["cell"], said["slot"], said["state"]))
                except (ValueError, TypeError, KeyError):  # a library that prints
                    with open(worker.log, "ab") as log:
                        log.write(line)
        self._said.put(Gone(worker, worker.process.wait()))

    def stop(self) -> None:
        """Ask all to save what they do and end."""
        for worker in self.workers:
            worker.signal(signal.SIGTERM)

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()

    def close(self, seconds: float = 5.0) -> None:
        """End whatever is still there, in good order where it takes no longer than that."""
        self.stop()
        deadline = time.monotonic() + seconds
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()
        for worker in self.workers:
            worker.process.wait()
            worker.hang_up()
