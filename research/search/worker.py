"""A warm process that trains one trial after another: `python -m research.search.worker`.

It imports, reads the pictures and opens the stores once; a trial after that costs little more than
its own training.  Its standard input brings one line of JSON, the Job, and ends when whoever
started the worker dies: the worker then stops as by Ctrl-C.  Its standard output says in lines of
JSON what it does (what a training prints goes to standard error):

    {"event": "ready"}
    {"event": "took", "cell": "", "slot": 3, "trial": 7}
    {"event": "ended", "cell": "", "slot": 3, "state": "COMPLETE"}     PRUNED, FAIL, STOPPED, DIED

It ends with 0 when there is nothing left to take.  SIGTERM and Ctrl-C save the checkpoint of the
trial that runs and put it back, so that another worker goes on with it: 143 and 130.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from research.search.job import Job
from research.tracking.run import Recorder
from research.tracking.store import resolve_tracking_uri

if TYPE_CHECKING:
    from research.data.kept import Kept
    from research.search.desk import Desk
    from research.search.slots import Ticket
    from research.search.trial import State

Tell = Callable[..., None]

OF_TORCHRUN = (
    *("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"),
)


# ---- being stopped -------------------------------------------------------------------------------


class Interruption:
    """Signals are noted; inside `heard` they are exceptions, as a training expects them."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_heard = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.is_heard:
            self.raise_it()

    def raise_it(self) -> None:
        self.is_heard = False  # one is enough, the next would disturb what is put in order
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is not None:
            raise SystemExit(128 + self.number)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        self.is_heard = True
        try:
            if self.number is not None:  # it came a moment ago
                self.raise_it()
            yield
        finally:
            self.is_heard = False


def end_with(stream: IO[str]) -> None:
    """Stop this process when the stream ends, which whoever started it has open."""

    def wait() -> None:
        while stream.readline():
            pass
        # Not SIGTERM: a second one would end at once what is saving its checkpoint by the first.
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


# ---- trial after trial ---------------------------------------------------------------------------


def main() -> int:
    forget_launcher(os.environ)
    events = separate_stdout()
    interruption = Interruption()
    threading.Thread(target=warm_up, daemon=True).start()  # while the job is waited for
    try:
        with interruption.heard():
            line = sys.stdin.readline()
        if not line:
            return 0
        job = Job(**json.loads(line))
        end_with(sys.stdin)
        with contextlib.ExitStack() as stack:
            recorder = None
            if resolve_tracking_uri(job.tracking_uri) is not None:
                recorder = stack.enter_context(Recorder.start())  # imports MLflow meanwhile
            work(job, recorder, partial(tell, events), interruption)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def forget_launcher(environment: MutableMapping[str, str]) -> None:
    """Be no process of a training that torchrun or srun started, where they started the search."""
    for name in OF_TORCHRUN:
        environment.pop(name, None)
    if "SLURM_NTASKS" in environment:
        environment["SLURM_NTASKS"] = "1"


def warm_up() -> None:
    import research.search.desk  # noqa: F401


def separate_stdout() -> IO[str]:
    """Standard output for the protocol alone; what anybody prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def tell(events: IO[str], event: str, **what: Any) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        events.write(json.dumps({"event": event, **what}) + "\n")
        events.flush()


def work(job: Job, recorder: Recorder | None, tell: Tell, interruption: Interruption) -> None:
    """Take trials until there is none; KeyboardInterrupt or SystemExit when stopped."""
    from research.data.kept import Kept
    from research.search.desk import open_desks

    desks, kept = open_desks(job), Kept()
    gc.collect()
    gc.freeze()  # it stays, and looking through it after each trial would cost 0.1 s
    tell("ready")
    try:
        take_all(desks, job, recorder, kept, tell, interruption)
    finally:
        gc.unfreeze()


def take_all(
    desks: list["Desk"],
    job: Job,
    recorder: Recorder | None,
    kept: "Kept",
    tell: Tell,
    interruption: Interruption,
) -> None:
    from research.search.desk import do_together, next_ticket

    def on_ended(desk: "Desk", ticket: "Ticket", state: "State") -> None:
        tell("ended", cell=desk.cell_of(ticket).name, slot=ticket.slot, state=state)

    turn = job.number
    while job.stop_at is None or time.time() < job.stop_at:
        if interruption.number is not None:
            interruption.raise_it()
        taken: list[tuple[Desk, Ticket]] = []
        while len(taken) < desks[0].search.together:
            found = next_ticket(desks, turn)
            if found is None:
                break
            turn, desk, ticket = found
            taken.append((desk, ticket))
            of = {"cell": desk.cell_of(ticket).name, "slot": ticket.slot}
            tell("took", **of, trial=ticket.trial.number)
        if not taken:
            return
        if len(taken) > 1:
            do_together(taken, recorder, kept, interruption.heard, on_ended)
            continue
        state: State = "STOPPED"
        try:
            state = desk.do(ticket, recorder, kept, interruption.heard)
        finally:
            on_ended(desk, ticket, state)


if __name__ == "__main__":
    sys.exit(main())
