"""Between a study and a training: a taken trial becomes a Task, its Outcome is told.

    desks = open_desks(job)
    turn, desk, ticket = next_ticket(desks, turn)
    state = desk.do(ticket, recorder, kept, hearing)
    do_together([(desk, ticket), ...], recorder, kept, hearing, on_ended)

Only this asks and tells Optuna.  Of a trial that is stopped or whose process died the slot is put
back, and whoever takes it next goes on with the same run from its last checkpoint.
"""

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from optuna.pruners import NopPruner
from optuna.trial import TrialState

from research.configuration.compose import ConfigurationError
from research.configuration.schema import Configuration
from research.data.kept import Kept
from research.faults.memory import free_memory
from research.search.alone import is_alone, train_alone
from research.search.document import Cell, Search
from research.search.job import Job
from research.search.slots import INTERRUPTED, Slots, Ticket
from research.search.storage import StorageError, open_storage
from research.search.trial import (
    SIGNALS,
    Outcome,
    State,
    Task,
    configuration_of,
    outcome_of_error,
    train,
    uri_of,
)
from research.together.training import Seat, train_in_turns, why_alone
from research.together.turns import Turn
from research.tracking.heartbeat import BEAT_SECONDS
from research.tracking.run import Recorder
from research.tracking.runs import find_begun
from research.tracking.store import TrackingError

logger = logging.getLogger(__name__)

# A run's tag with the slot's first owner, by which it is found if he died before he knew its id.
# MLflow's page hides tags that begin so.
BEGUN_BY = "mlflow.searchToken"

Hearing = Callable[[], contextlib.AbstractContextManager[None]]


def open_desks(job: Job) -> list["Desk"]:
    """A desk for each study that the job names."""
    search = Search.from_document(job.document)
    storage = open_storage(job.storage, Path(f"{search.name}.journal"))
    names = job.stages or [search.study_name(cell) for cell in search.cells]
    return [Desk(search, storage, name, job) for name in names]


def next_ticket(desks: Sequence["Desk"], turn: int) -> tuple[int, "Desk", Ticket] | None:
    """A trial of the next study that has one, so that all get on alike; None if none has any."""
    for place in range(turn, turn + len(desks)):
        desk = desks[place % len(desks)]
        ticket = desk.slots.take()
        if ticket is not None:
            return place + 1, desk, ticket
    return None


class Desk:
    """One study as a worker sees it.

    A study that is of no cell holds pinned trials, each of which says its cell (`candidate`).
    """

    def __init__(self, search: Search, storage: Any, study_name: str, job: Job) -> None:
        own = [cell for cell in search.cells if search.study_name(cell) == study_name]
        self.search = search
        self.job = job
        self.study_name = study_name
        self.cell = own[0] if own else None
        some = self.cell or search.cells[0]
        self.slots = Slots(
            storage,
            study_name,
            [objective.direction for objective in search.objectives],
            partial(search.sampler, cell=some),
            search.pruner() if own else NopPruner(),
        )

    def do(
        self,
        ticket: Ticket,
        recorder: Recorder | None,
        kept: Kept,
        hearing: Hearing,
        turn: Turn | None = None,
    ) -> State:
        """Train the trial, or what is left of it, and tell what came of it.

        turn: this function's among those of other trials, with which it trains at once.
        hearing: inside it a signal is an exception.  KeyboardInterrupt or SystemExit after one,
        once the trial is put back.
        """
        try:
            with beating(self.slots, ticket), hearing():
                outcome = self.outcome(ticket, recorder, kept, turn)
        except (KeyboardInterrupt, SystemExit) as ending:
            if isinstance(ending, KeyboardInterrupt) or ending.code in SIGNALS:
                self.slots.put_back(ticket, "stopped", counts=False)
                raise
            words = f"the training ended the process (exit code {ending.code})"
            outcome = Outcome("FAIL", reason=words, attrs={"error": words})
        except StorageError:  # nobody could be told
            raise
        except Exception as error:  # of the sampler, or a bug of ours
            logger.exception("Trial %d failed outside its training.", ticket.trial.number)
            outcome = outcome_of_error(error)
        self.settle(ticket, outcome)
        free_memory()
        return outcome.state

    def outcome(
        self, ticket: Ticket, recorder: Recorder | None, kept: Kept, turn: Turn | None
    ) -> Outcome:
        task = self.task(ticket)
        begin = partial(self.slots.remember_run, ticket)
        configuration = None
        with contextlib.suppress(ConfigurationError):  # `train` says what is wrong and records it
            configuration = configuration_of(task, self.search)
        if task.run_id is None and earlier_owners(ticket):
            task = replace(task, run_id=begun_before(task, configuration))
        if configuration is not None and is_alone(configuration):
            return train_alone(task, ticket.trial, begin)
        seats = seats_for(turn, configuration)
        return train(task, self.search, ticket.trial, recorder, kept, begin, configuration, seats)

    def task(self, ticket: Ticket) -> Task:
        """What the trial is to do; asks the sampler."""
        cell = self.cell_of(ticket)
        pinned = ticket.pinned
        settings = cell.space.suggest(ticket.trial) if pinned is None else pinned["settings"]
        number = ticket.trial.number
        where = self.study_name.removeprefix(self.search.name).strip("/")
        own = {"run_name": f"{where} trial {number}".strip()}
        if pinned is not None and "name" in pinned:
            own["run_name"] = pinned["name"]
        if self.job.tracking_uri is not None:
            own["tracking_uri"] = self.job.tracking_uri
        tags = {"study": self.study_name, "trial": str(number), "slot": str(ticket.slot)}
        tags |= {} if pinned is None else pinned.get("tags", {})
        tags[BEGUN_BY] = next(iter(earlier_owners(ticket)), ticket.token)
        if self.job.parent_run_id is not None:
            tags["mlflow.parentRunId"] = self.job.parent_run_id
        before = self.slots.study.get_trials(deepcopy=False)[number].intermediate_values
        return Task(
            self.search.document,
            cell.name,
            {**settings, **own},
            tags,
            ticket.run_id,
            max(before, default=0),
        )

    def cell_of(self, ticket: Ticket) -> Cell:
        if self.cell is not None:
            return self.cell
        assert ticket.pinned is not None
        return self.search.cell(ticket.pinned["candidate"][0])

    def settle(self, ticket: Ticket, outcome: Outcome) -> None:
        """Tell the study what came of the trial."""
        if outcome.state in ("STOPPED", "DIED"):
            reason = outcome.reason or "its process died"
            self.slots.put_back(ticket, reason, counts=outcome.state == "DIED")
            return
        values = outcome.values if outcome.state == "COMPLETE" else None
        state = TrialState[outcome.state]
        if not self.slots.finish(ticket, values, state, outcome.reason, outcome.attrs):
            logger.warning(
                "Trial %d was given up for dead meanwhile; what came of it is not counted.",
                ticket.trial.number,
            )


def seats_for(turn: Turn | None, configuration: Configuration | None) -> list[Seat]:
    """The trial's place among others; none for one that can only be trained by itself."""
    if turn is None or configuration is None or why_alone(configuration) is not None:
        return []
    return [Seat(turn, configuration)]


def earlier_owners(ticket: Ticket) -> list[str]:
    """The tokens of those who had the slot before, the first one first."""
    tokens = ticket.trial.user_attrs.get(INTERRUPTED, {})
    return [token for token in tokens if token]  # without one it was taken and never begun


def begun_before(task: Task, configuration: Configuration | None) -> str | None:
    """The run that an earlier attempt had begun and died before it knew its id; None if none."""
    uri = uri_of(task, configuration)
    if uri is None:
        return None
    try:
        run = find_begun(uri, {BEGUN_BY: task.tags[BEGUN_BY]})
    except TrackingError as error:
        logger.warning("Whether this trial had begun a run is not known: %s", error)
        return None
    return None if run is None else run.run_id


def do_together(
    taken: Sequence[tuple[Desk, Ticket]],
    recorder: Recorder | None,
    kept: Kept,
    hearing: Hearing,
    on_ended: Callable[[Desk, Ticket, State], None],
) -> None:
    """Train these trials in turns, and those that can be at once; each ends as it does by itself.

    hearing: raises for a signal that came before.
    KeyboardInterrupt or SystemExit after a signal, once all are put back.
    """

    def work(desk: Desk, ticket: Ticket, turn: Turn) -> None:
        state: State = "STOPPED"
        try:
            state = desk.do(ticket, recorder, kept, lambda: both(turn.hearing(), hearing()), turn)
        finally:
            on_ended(desk, ticket, state)

    with contextlib.ExitStack() as stack:
        for desk, ticket in taken:  # also while it waits for its first turn
            stack.enter_context(beating(desk.slots, ticket))
        errors = train_in_turns([partial(work, *each) for each in taken])
    for error in errors:
        if error is not None:
            raise error


@contextlib.contextmanager
def both(
    one: contextlib.AbstractContextManager[None], other: contextlib.AbstractContextManager[None]
) -> Iterator[None]:
    with one, other:
        yield


@contextlib.contextmanager
def beating(slots: Slots, ticket: Ticket) -> Iterator[None]:
    """Signs of life as long as this lasts; a storage that is away is tried again at the next."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            try:
                slots.beat(ticket)
            except Exception:
                logger.warning("No sign of life could be given: %s", traceback.format_exc(limit=0))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
