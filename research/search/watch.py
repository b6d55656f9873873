"""What a coordinator makes of what its workers say, and when it gives up.

    watch = Watch(crew, say)
    watch.begin(cells)                  # the studies that are worked on now
    watch.hear()                        # often
    watch.look(trials)                  # at what all machines have done

A worker that dies leaves a trial that says it is running: it is put back at once, and the next
worker goes on with it.  Going on ends where it leads nowhere: workers that cannot even begin, or
first trials that all fail alike.
"""

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from optuna.trial import FrozenTrial, TrialState

from research.search.display import FINISHED, duration, name_of, reason_of
from research.search.slots import OWNER, Slots
from research.search.workers import Crew, Ended, Gone, Signalled, Took, Worker, death_of
from research.tracking.heartbeat import machine

HEAR_SECONDS = 0.2
STOP_SECONDS = 60.0  # for the workers to save their checkpoints
IDLE_SECONDS = 5.0  # after a worker that found nothing to take
SAME_WORDS = 3  # first trials that fail alike: so will the others
EARLY_DEATHS = 3  # of workers before they took any trial
MEND_IT = "Mend it, and begin anew under another --name (the failed ones count)."
LATE_DEATHS = 9  # of workers since a trial last ended: three slots' worth


class SearchFailed(ValueError):
    """Going on would only burn the budget; the message says why."""

    exit_code = 1


class Stop(Exception):
    """This process was told to stop by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Watch:
    """Listens to the workers of this machine; `say` prints a line that stays.

    `advice` is what to do where the first trials all fail alike.
    """

    def __init__(self, crew: Crew, say: Callable[[str], None], advice: str = MEND_IT) -> None:
        self.crew, self.say, self.advice = crew, say, advice
        self.cells: Mapping[str, Slots] = {}
        self.early_deaths = self.late_deaths = 0
        self.has_buried = False  # so that there are words of the dead to be read
        self.not_before = 0.0  # no worker is started before
        self.ended_before: set[tuple[str, int]] | None = None

    def begin(self, cells: Mapping[str, Slots]) -> None:
        self.cells, self.ended_before = cells, None

    def hear(self) -> None:
        """Take in all that was said by now; waits a moment for the first.

        Stop after a signal, SearchFailed where workers die without getting anywhere.
        """
        heard = self.crew.hear(HEAR_SECONDS)
        while heard is not None:
            match heard:
                case Took():
                    self.early_deaths = 0
                case Ended():
                    self.late_deaths = 0
                case Gone(worker, code):
                    self.bury(worker, code)
                case Signalled(number):
                    raise Stop(number)
            heard = self.crew.hear(0.0)

    def bury(self, worker: Worker, code: int) -> None:
        """A worker is gone: put its trial back at once."""
        if code == 0:
            if worker.took == 0:  # others were faster; and if not, do not start one at each look
                self.not_before = monotonic() + IDLE_SECONDS
            return
        self.has_buried = True
        how = death_of(code)
        trials = self.put_back(worker, how)
        told = f"; {', '.join(trials)} will be run on by another" if trials else ""
        self.say(f"worker {worker.number} ended ({how}){told}. Its words: {worker.log}")
        self.early_deaths += worker.took == 0
        self.late_deaths += 1
        places = len(self.crew.places)
        if self.early_deaths >= max(EARLY_DEATHS, places):
            what = f"{self.early_deaths} workers ended before they took a trial"
        elif self.late_deaths >= LATE_DEATHS + places:
            what = f"{self.late_deaths} workers ended, and no trial between them"
        else:
            return
        raise SearchFailed(
            f"{what}, the last one by: {how}. Its last words:\n{worker.tail() or 'none'}"
        )

    def put_back(self, worker: Worker, how: str, counts: bool = True) -> list[str]:
        """Let the trials of a dead worker wait again; which they are, in words."""
        found = []
        for name, slots in self.cells.items():
            for trial in slots.trials():
                owner = trial.user_attrs.get(OWNER) or {}
                is_its = owner.get("heartbeat.pid") == str(worker.process.pid)
                is_its = is_its and owner.get("heartbeat.machine") == machine()
                if trial.state == TrialState.RUNNING and is_its:
                    slots.put_back(trial, f"worker {how}", counts=counts)
                    found.append(name_of(name, trial))
            slots.revive_dead()  # one that it had taken and not signed yet
        return found

    def look(self, trials: Mapping[str, Sequence[FrozenTrial]]) -> None:
        """SearchFailed where all that ended since the first look failed with the same words."""
        ended = {
            (name, trial.number): trial
            for name, found in trials.items()
            for trial in found
            if trial.state in FINISHED
        }
        if self.ended_before is None:
            self.ended_before = set(ended)
        fresh = [trial for key, trial in ended.items() if key not in self.ended_before]
        words = {reason_of(trial) for trial in fresh}
        if len(fresh) < SAME_WORDS or len(words) > 1:
            return
        if all(trial.state == TrialState.FAIL for trial in fresh):
            raise SearchFailed(
                f"The first {len(fresh)} trials of this start all failed with the same words, so "
                f"it was stopped: {words.pop() or 'no reason was given'}\n"
                f"{self.advice}"
            )

    def stop(self) -> None:
        """Let the workers save what they do; those that take too long are ended."""
        running = len(self.crew.running)
        what = "the trials that run save their checkpoints" if running else "the workers end"
        self.say(f"stopping: {what} (at most {duration(STOP_SECONDS)}); again to stop at once")
        self.crew.stop()
        deadline = monotonic() + STOP_SECONDS
        while self.crew.workers and monotonic() < deadline:
            self.crew.hear(HEAR_SECONDS)
        left = list(self.crew.workers)
        self.crew.close(0.0)
        for worker in left:
            self.put_back(worker, "was stopped", counts=False)
