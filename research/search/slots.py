"""The places of a study's budget, each filled by one trial: who runs it, and what if he dies.

Every slot is one trial of Optuna's, added WAITING before anybody works.  A worker takes the lowest
one (WAITING -> RUNNING), writes its name on it, and tells the result.  Where the process dies or is
stopped, the same trial is put back to WAITING, with its number, its parameters, what it reported,
and its run: nothing is forgotten, nothing stands twice, and whoever takes it next continues it.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from research.search.storage import StorageError, alone
from research.tracking.heartbeat import beat, first_beat, is_dead

MOST_ATTEMPTS = 3
NAMELESS_SECONDS = 60.0  # between taking a trial and writing one's name on it lie milliseconds
SLOT, OWNER, BEAT, RUN, PINNED = "slot", "owner", "heartbeat", "run_id", "pinned"
INTERRUPTED = "interrupted"  # {owner's token: {"reason": ..., "counts": ...}}
BUDGET, EXHAUSTED = "budget", "exhausted"  # of the study


@dataclass(frozen=True)
class Ticket:
    """One slot that this process runs."""

    slot: int
    attempt: int  # 1, and one more for each process that died with it
    trial: Trial
    run_id: str | None  # of the run that an earlier attempt began
    pinned: dict[str, Any] | None  # as given to `Slots.fill`
    token: str  # of this taking, in all the world


@dataclass(frozen=True)
class Counts:
    """How many slots are in which state; nothing is left to do when none waits or runs."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int  # and needed

    @property
    def finished(self) -> int:
        return self.complete + self.pruned + self.failed

    @property
    def left(self) -> int:
        return self.running + self.waiting


class Slots:
    """One study, and the slots of its budget.

    The study is loaded, or made where there is none, with `attrs` as its user attributes; many
    processes may do so at once.  `sampler(slot)` is asked for anew at each trial, so that what a
    trial draws depends on its slot and on the trials before it alone.  None prunes nothing.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        directions: Sequence[str],
        sampler: Callable[[int], BaseSampler],
        pruner: BasePruner | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        self.storage, self.sampler, self.pruner = storage, sampler, pruner or NopPruner()
        self.study = optuna.create_study(
            storage=storage,
            sampler=sampler(0),
            pruner=self.pruner,
            study_name=name,
            directions=[StudyDirection[direction.upper()] for direction in directions],
            load_if_exists=True,
        )
        found = [direction.name.lower() for direction in self.study.directions]
        if found != [direction.lower() for direction in directions]:
            raise StorageError(
                f"The study {name!r} was made to {', '.join(found)}, not to "
                f"{', '.join(directions)}. Name the search anew, or take another storage."
            )
        present = self.study.user_attrs
        for key, value in (attrs or {}).items():
            if key not in present:
                self.study.set_user_attr(key, value)
        self._nameless_since: dict[int, float] = {}

    # ---- the coordinator's side ------------------------------------------------------------------

    def fill(self, budget: int, pinned: Sequence[Mapping[str, Any]] = ()) -> int:
        """Give each slot of the budget its trial; returns how many were added.

        Slot i takes `pinned[i]` along, where there is one.  Slots beyond a lowered budget stay and
        are not taken; what has finished of them stays, too.
        """
        with alone(self.storage):
            if self.study.user_attrs.get(BUDGET) != budget:
                self.study.set_user_attr(BUDGET, budget)
            missing = set(range(budget)) - set(self._by_slot())
            for slot in sorted(missing):
                attrs: dict[str, Any] = {SLOT: slot}
                if slot < len(pinned):
                    attrs |= {key: pinned[slot][key] for key in pinned[slot] if key != "settings"}
                    attrs |= {PINNED: dict(pinned[slot])}
                self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attrs))
            self._by_slot()
        return len(missing)

    def revive_dead(self, counts: bool = True) -> list[int]:
        """Put back the trials whose process is dead; returns the slots that wait again.

        Not `counts`: as where everything died, which was not the trials' doing.
        """
        with alone(self.storage) as certain:
            running = [t for t in self._by_slot().values() if t.state == TrialState.RUNNING]
            nameless = {t._trial_id for t in running if not t.user_attrs.get(OWNER)}
            now = time.monotonic()
            self._nameless_since = {i: self._nameless_since.get(i, now) for i in nameless}
            revived = []
            for trial in running:
                if trial._trial_id not in nameless:
                    dead = is_dead(_tags(trial))
                else:
                    # Taken, and killed before it could write its name.  Where taking needs the
                    # lock that is held here, there is no other way that this can be.
                    waited = now - self._nameless_since[trial._trial_id]
                    dead = certain or waited > NAMELESS_SECONDS
                if dead and self.put_back(trial, _death(trial), counts):
                    revived.append(trial.user_attrs[SLOT])
        return revived

    def put_back(self, trial: FrozenTrial | Ticket, reason: str, counts: bool = True) -> bool:
        """Let a running trial wait again, its process having died or (not `counts`) stopped.

        False, and nothing is done, if it was put back or has finished in the meantime.  False, too,
        when its processes have died MOST_ATTEMPTS times: it is then told FAIL for good.
        """
        if isinstance(trial, Ticket):
            trial_id, token = trial.trial._trial_id, trial.token
        else:
            trial_id, token = trial._trial_id, _token(trial)
        with alone(self.storage):
            found = self.storage.get_trial(trial_id)
            if found.state != TrialState.RUNNING or _token(found) != token:
                return False
            # By the owner's token: who is killed in the middle of this leaves a trial that is found
            # dead again, and its death counts once.
            interrupted = {
                **found.user_attrs.get(INTERRUPTED, {}),
                token: {"reason": reason, "counts": counts},
            }
            self.storage.set_trial_user_attr(trial_id, INTERRUPTED, interrupted)
            if _deaths(interrupted) >= MOST_ATTEMPTS:
                study = self._study(found.user_attrs[SLOT])
                self._tell(study, found, TrialState.FAIL, None, {"reason": reason})
                return False
            self.storage.set_trial_user_attr(trial_id, OWNER, None)
            try:
                self.storage.set_trial_state_values(trial_id, TrialState.WAITING)
            except UpdateFinishedTrialError:
                return False
            return True

    def trials(self) -> list[FrozenTrial]:
        """The trial of each slot, by slot; not those that wait and are not needed."""
        needed = self._needed()
        return [
            trial
            for slot, trial in self._by_slot(deepcopy=True).items()
            if trial.state != TrialState.WAITING or needed(slot, trial)
        ]

    def counts(self) -> Counts:
        """How many slots are in which state, as `trials` has them."""
        return counted(self.trials())

    @property
    def exhausted(self) -> bool:
        """Whether the sampler said that nothing is left to try, as that of a grid does."""
        return bool(self.study.user_attrs.get(EXHAUSTED))

    def reopen(self) -> None:
        """Let the slots be taken again that were not needed: the space has grown."""
        self.study.set_user_attr(EXHAUSTED, False)

    # ---- the worker's side -----------------------------------------------------------------------

    def take(self) -> Ticket | None:
        """The lowest slot that waits, now this process's own; None if none does."""
        needed = self._needed()
        token = uuid.uuid4().hex
        with alone(self.storage):
            for slot, trial in self._by_slot().items():
                if trial.state == TrialState.WAITING and needed(slot, trial) and self._pop(trial):
                    owner = {"token": token, **first_beat(os.getpid())}
                    self.storage.set_trial_user_attr(trial._trial_id, OWNER, owner)
                    break
            else:
                return None
        attrs = trial.user_attrs
        return Ticket(
            slot=slot,
            attempt=1 + _deaths(attrs.get(INTERRUPTED, {})),
            trial=Trial(self._study(slot), trial._trial_id),
            run_id=attrs.get(RUN),
            pinned=attrs.get(PINNED),
            token=token,
        )

    def beat(self, ticket: Ticket) -> bool:
        """A sign of life, every BEAT_SECONDS; False if the trial is no longer this process's.

        That happens to who was silent for so long that he was given up: the work is then another's.
        """
        if not self.owns(ticket):
            return False
        try:
            ticket.trial.set_user_attr(BEAT, beat()["heartbeat.time"])
        except UpdateFinishedTrialError:
            return False
        return True

    def owns(self, ticket: Ticket) -> bool:
        """Whether the trial still runs, as this process's own."""
        return _is_of(self.storage.get_trial(ticket.trial._trial_id), ticket)

    def remember_run(self, ticket: Ticket, run_id: str) -> None:
        """Let the slot's next attempt, if there is one, continue this run."""
        ticket.trial.set_user_attr(RUN, run_id)

    def finish(
        self,
        ticket: Ticket,
        values: Sequence[float] | None,
        state: TrialState,
        reason: str | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Tell the result; `values` with COMPLETE alone.  False if the trial is not one's own."""
        found = self.storage.get_trial(ticket.trial._trial_id)
        if not _is_of(found, ticket):
            return False
        attrs = {**(attrs or {}), **({} if reason is None else {"reason": reason})}
        return self._tell(ticket.trial.study, found, state, values, attrs)

    # ---- within ----------------------------------------------------------------------------------

    def _study(self, slot: int) -> optuna.Study:
        """The study, with the sampler of the slot."""
        return optuna.load_study(
            study_name=self.study.study_name,
            storage=self.storage,
            sampler=self.sampler(slot),
            pruner=self.pruner,
        )

    def _by_slot(self, deepcopy: bool = False) -> dict[int, FrozenTrial]:
        """The trial of each slot, by slot.

        Two that fill a server's study at the same moment may add two trials to one slot.  The
        first, which everybody who sees the second sees as well, is the slot's; the other is told
        FAIL.
        """
        first: dict[int, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=deepcopy):
            slot = trial.user_attrs.get(SLOT)
            if slot is None:
                continue  # added by hand
            if slot not in first:
                first[slot] = trial
            elif trial.state == TrialState.WAITING:
                self._fail_surplus(trial)
        return dict(sorted(first.items()))

    def _fail_surplus(self, trial: FrozenTrial) -> None:
        try:
            self.storage.set_trial_user_attr(trial._trial_id, "surplus", True)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            pass

    def _needed(self) -> Callable[[int, FrozenTrial], bool]:
        """Tells of a slot that waits whether it is to be taken."""
        attrs = self.study.user_attrs
        budget, exhausted = attrs.get(BUDGET, 0), attrs.get(EXHAUSTED, False)
        # What was begun is finished: the sampler has counted it among what was tried.
        return lambda slot, trial: slot < budget and (not exhausted or bool(trial.params))

    def _pop(self, trial: FrozenTrial) -> bool:
        try:
            return self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _tell(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
        attrs: Mapping[str, Any],
    ) -> bool:
        try:
            for key, value in attrs.items():
                self.storage.set_trial_user_attr(trial._trial_id, key, value)
            study.tell(trial.number, values, state)
        except UpdateFinishedTrialError:
            # Told before, by a call whose answer was lost, or by another.
            return self.storage.get_trial(trial._trial_id).state == state
        except RuntimeError as error:
            # A sampler that has nothing left to try stops the study, which Optuna forbids here,
            # after it has stored the trial.
            if "Study.stop" not in str(error):
                raise
            self.study.set_user_attr(EXHAUSTED, True)
        return True


def counted(trials: Iterable[FrozenTrial]) -> Counts:
    """How many of the trials are in which state."""
    states = [trial.state for trial in trials]
    return Counts(
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        running=states.count(TrialState.RUNNING),
        waiting=states.count(TrialState.WAITING),
    )


def _is_of(trial: FrozenTrial, ticket: Ticket) -> bool:
    return trial.state == TrialState.RUNNING and _token(trial) == ticket.token


def _token(trial: FrozenTrial) -> str:
    return (trial.user_attrs.get(OWNER) or {}).get("token", "")


def _tags(trial: FrozenTrial) -> dict[str, str]:
    """The owner's tags with its last sign of life; one of the owner before it is older."""
    owner = trial.user_attrs[OWNER]
    last = max(owner["heartbeat.time"], trial.user_attrs.get(BEAT, ""))
    return {**owner, "heartbeat.time": last}


def _deaths(interrupted: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(bool(entry["counts"]) for entry in interrupted.values())


def _death(trial: FrozenTrial) -> str:
    owner = trial.user_attrs.get(OWNER)
    if not owner:
        return "its process died as soon as it had taken the trial"
    return f"process {owner['heartbeat.pid']} on {owner['heartbeat.host']} died"
