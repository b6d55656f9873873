"""A search from start to end, as `python -m research.sweep FILE` runs it.

    coordinator = Coordinator(search, file, tracking_uri, recorder, command, sys.stderr)
    ending = coordinator.run()

It makes or joins the studies, keeps as many workers at work as there are places and trials, watches
them and the studies, and at the end confirms and reports.  Workers take their trials from the
studies by themselves: the coordinator hands nothing out, and whatever dies, the studies know what
is left to do.  So it may be killed at any moment, and there may be one on each of many machines.
"""

import contextlib
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from optuna.trial import FrozenTrial

from research.processes.launch import HOST_GROUP
from research.search import parent
from research.search.display import Display, Rate, Snapshot, display_for
from research.search.document import Search
from research.search.halting import Ears, ending
from research.search.job import Job
from research.search.results import Results
from research.search.slots import Counts, Slots, counted
from research.search.studies import Studies, make, sample
from research.search.watch import MEND_IT, SearchFailed, Stop, Watch
from research.search.workers import Crew, Place, places, visible_gpus
from research.tracking.heartbeat import BEAT_SECONDS
from research.tracking.run import Recorder, Run
from research.tracking.store import show_command

POLL_SECONDS = 1.0
POLL_SHARE = 10  # at least so many times as long as a look takes pass until the next


@dataclass
class Ending:
    """What came of a start: `is_over` where the search is at its end, and what there is to say."""

    results: Results
    is_over: bool
    notes: list[str] = field(default_factory=list)
    run: tuple[str, str] | None = None  # id and experiment of the parent run


class Coordinator:
    """One machine's part in a search; `command` is what a person types to go on with it."""

    advice = MEND_IT  # where all trials fail alike
    nothing_left = "Nothing is left to do."

    def __init__(
        self,
        search: Search,
        file: Path,
        tracking_uri: str | None,
        recorder: Recorder | None,
        command: str,
        out: TextIO | None = None,
    ) -> None:
        self.search, self.file, self.command = search, file, command
        self.tracking_uri, self.recorder = tracking_uri, recorder
        self.out = out if out is not None else sys.stderr
        self.display: Display = display_for(self.out)
        self.metrics = [objective.metric for objective in search.objectives]
        self.directions = [objective.direction for objective in search.objectives]
        self.logs = Path(tempfile.mkdtemp(prefix=f"sweep-{search.name}-"))
        self.run_of_parent: Run | None = None
        self.history: parent.History | None = None
        self.is_owner = False
        self.stop_at: float | None = None
        self.beat_at = 0.0
        self.ears = Ears(self.end_workers)
        self.crew = Crew([], self.logs)
        self.watch = Watch(self.crew, self.display.say, self.advice)

    # ---- the whole of it -------------------------------------------------------------------------

    def run(self, extend: bool = False) -> Ending:
        """Search until the budget is used or the time is up; what came of it.

        ConfigurationError where the studies are of another search, SearchFailed where nothing gets
        on.  KeyboardInterrupt after Ctrl-C and SystemExit after SIGTERM, once all is in order.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ears.listening())
            stack.callback(self.clean_up)
            self.studies = self.make_studies(extend)
            sampled = sample(self.search)
            self.settle(sampled.values.trainer)
            self.max_epochs = sampled.values.trainer.max_epochs
            self.crew = self.make_crew(sampled.values.trainer)
            self.watch = Watch(self.crew, self.display.say, self.advice)
            self.seat = parent.Seat(self.studies.first)
            self.is_owner = self.seat.take()
            stack.callback(self.seat.leave)
            revived = self.studies.revive() if self.is_owner else 0
            self.studies.fill()
            if self.is_owner and self.is_reported():
                return Ending(self.studies.results(), True, [self.nothing_left], self.where)
            self.crew.start(math.ceil(self.studies.counts().waiting / self.search.together))
            self.announce(revived)
            if self.search.hours is not None:
                self.stop_at = time.time() + 3600 * self.search.hours
            try:
                with contextlib.ExitStack() as self.recorded:
                    self.begin_parent()
                    what = self.conduct()
            except BaseException as error:
                if not isinstance(error, SearchFailed):
                    error.add_note(f"Go on with it: {self.command}")
                raise
            return what

    def conduct(self) -> Ending:
        """The search, then, for who holds the seat, the confirmation and the report."""
        is_late = self.work(self.studies.cells, "")
        if not self.is_owner and not self.take_over():
            return Ending(
                self.studies.results(),
                False,
                [f"Nothing is left for this machine; {self.seat.described()} ends the search."],
                self.where,
            )
        notes = []
        if is_late:
            counts = self.studies.counts()
            notes.append(
                f"The time ({self.search.hours:g} h) is up with {counts.finished} of "
                f"{counts.finished + counts.left} trials done; go on with them: {self.command}"
            )
        elif self.search.confirm is not None:
            slots = self.studies.fill_confirmation()
            if slots is not None and slots.counts().left:
                self.display.say(
                    f"confirmation: the best {self.search.confirm.best} on "
                    f"{self.search.confirm.seeds} fresh seeds each"
                )
                self.work({"": slots}, "confirmation")
        return Ending(self.report(notes), not is_late, notes, self.where)

    def make_studies(self, extend: bool) -> Studies:
        return make(self.search, self.file, extend)

    def settle(self, trainer: Any) -> None:
        """Trials of one precision on all machines; told where it is not this one's own."""
        self.studies.settle(trainer.accelerator)
        self.search = self.studies.search
        settled = sample(self.search).values.trainer.precision
        if settled != trainer.precision:
            self.say(
                f"precision: {settled}, as on the machine that began this search; here it would "
                f"be {trainer.precision}"
            )

    def make_crew(self, trainer: Any) -> Crew:
        gpus = visible_gpus() if trainer.accelerator in ("auto", "gpu", "cuda") else []
        devices = number_of(trainer.devices)
        found = places(self.search.workers, self.search.workers_per_gpu, gpus, devices)
        # Workers of one machine have the pictures in memory once (research/data/kept.py).
        shared = {HOST_GROUP: secrets.token_hex(16)} if len(found) > 1 else {}
        return Crew(found, self.logs, shared)

    def announce(self, revived: int) -> None:
        """What is about to happen, in two or three lines."""
        studies, counts = self.studies, self.studies.counts()
        cells = len(studies.cells)
        what = f"{cells} studies of {self.search.trials} trials" if cells > 1 else ""
        what = what or f"{self.search.trials} trials"
        done = f", {counts.finished} of them done" if counts.finished and cells == 1 else ""
        done = done or (f", {counts.finished} trials done" if counts.finished else "")
        at_once = f", {self.search.together} trials at once" if self.search.together > 1 else ""
        places = told_places(self.crew.places) + at_once
        self.say(f"search {self.search.name}: {what}{done}; {places}")
        self.say(f"studies in {studies.described}")
        if studies.changed:
            told = ", ".join(f"{c.key} {c.old} -> {c.new}" for c in studies.changed)
            self.say(f"changed since the last start: {told}")
        if revived:
            trials = "a trial" if revived == 1 else f"{revived} trials"
            self.say(f"{trials} whose process died will be run on from the last checkpoint")
        if not self.is_owner:
            self.say(f"{self.seat.described()} is at work on it too")

    def say(self, line: str) -> None:
        print(line, file=self.out, flush=True)

    # ---- the parent run --------------------------------------------------------------------------

    @property
    def where(self) -> tuple[str, str] | None:
        """The parent run's id and that of its experiment."""
        first = self.studies.first
        run_id = parent.run_id_of(first, self.tracking_uri)
        return None if run_id is None else (run_id, first.user_attrs.get(parent.EXPERIMENT, ""))

    def begin_parent(self) -> None:
        """Make the parent run or go on with it; it ends as this start does."""
        if not self.is_owner or self.recorder is None or self.tracking_uri is None:
            return
        search = self.search
        pruner = search.pruning["class_path"] if search.pruning is not None else "none"
        params = {"sampler": search.sampling["class_path"], "pruner": pruner}
        budget = f"{search.trials} trials" + (f" x {len(search.cells)}" * (len(search.cells) > 1))
        run = parent.begin(
            self.recorder,
            self.tracking_uri,
            self.studies.all,
            search.name,
            {**params, "budget": budget, "seed": search.seed},
            parent.tags_of(search.name, self.studies.described, budget, params),
        )
        self.run_of_parent = self.recorded.enter_context(run)
        with contextlib.suppress(OSError):  # deleted meanwhile
            run.log_text(self.file.read_text(encoding="utf-8"), "search.yaml")
        info = run.wait()
        page = show_command(self.tracking_uri, info.run_id, info.experiment_id)
        self.display.say(f"runs: {page}")
        study = self.studies.first
        self.history = parent.History(run, study, self.metrics, self.directions)
        self.history.tell([trial for found in self.studies.trials().values() for trial in found])

    def job(self, stages: list[str]) -> Job:
        first = self.studies.first
        return Job(
            document=self.search.document,
            storage=self.studies.address,
            stages=stages,
            tracking_uri=self.tracking_uri or "",
            parent_run_id=parent.run_id_of(first, self.tracking_uri),
            stop_at=self.stop_at,
        )

    def progress(self) -> list[int]:
        """How many trials have ended, of the search and its confirmation; what that is to be."""
        confirmation = self.studies.confirmation()
        confirmed = 0 if confirmation is None else confirmation.counts().finished
        confirm = self.search.confirm
        wanted = [] if confirm is None else [confirm.best, confirm.seeds]
        return [self.studies.counts().finished, confirmed, *wanted]

    def is_reported(self) -> bool:
        """Whether nothing has happened since the last report."""
        if self.studies.counts().left:
            return False
        return self.studies.first.user_attrs.get(parent.REPORTED) == self.progress()

    def report(self, notes: list[str]) -> Results:
        """What came of it, recorded in the parent run, which then ends."""
        from research.search.report import description, write_report

        results = self.studies.results()
        run = self.run_of_parent
        if run is not None:
            folder = run.scratch / "report"
            files = write_report(results, folder)
            refused = parent.record_report(run, description(results), folder, files)
            if refused is not None:
                notes.append(refused)
        self.studies.first.set_user_attr(parent.REPORTED, self.progress())
        return results

    # ---- while trials run ------------------------------------------------------------------------

    def work(self, cells: Mapping[str, Slots], what: str) -> bool:
        """Keep workers at work until nothing is left; True if the time was up before that."""
        names = [slots.study.study_name for slots in cells.values()]
        self.wait_for_parent()
        self.crew.give(self.job(names))
        self.watch.begin(cells)
        rate, look_at = Rate(), 0.0
        with self.display:
            self.ears.on_first = self.crew.tell_signal
            try:
                while True:
                    self.watch.hear()
                    if time.monotonic() < look_at:
                        continue
                    self.beat(cells)
                    began = time.perf_counter()
                    trials = {name: slots.trials() for name, slots in cells.items()}
                    took = time.perf_counter() - began
                    look_at = time.monotonic() + max(POLL_SECONDS, POLL_SHARE * took)
                    is_late = self.stop_at is not None and time.time() >= self.stop_at
                    if self.is_done(self.take_in(trials, what, rate), is_late):
                        return is_late
            except SearchFailed:
                self.watch.stop()  # in order: what is half trained is saved
                raise
            except Stop as stop:
                self.watch.stop()
                raise ending(stop.number) from None
            finally:
                self.ears.on_first = None

    def take_in(self, trials: Mapping[str, list[FrozenTrial]], what: str, rate: Rate) -> Counts:
        """Show where the search stands, record it, and see whether that leads anywhere."""
        counts = counted(trial for found in trials.values() for trial in found)
        rate.tell(counts.finished)
        self.display.show(self.snapshot(trials, counts, what, rate))
        if self.history is not None and not what:
            self.history.tell([trial for found in trials.values() for trial in found])
        self.watch.look(trials)
        return counts

    def is_done(self, counts: Counts, is_late: bool) -> bool:
        """Whether nothing is left to do here; else workers are started for what waits."""
        at_work = len(self.crew.running)
        if counts.left == 0:
            return True
        if is_late and counts.running == 0 and at_work == 0:
            return True
        if not self.is_owner and counts.waiting == 0 and at_work == 0 and not self.take_over():
            return True
        if not is_late and time.monotonic() >= self.watch.not_before:
            idle = len(self.crew.workers) - at_work
            needed = math.ceil(counts.waiting / self.search.together)
            self.crew.start(max(0, needed - idle))
        return False

    def snapshot(
        self, trials: Mapping[str, list[FrozenTrial]], counts: Counts, what: str, rate: Rate
    ) -> Snapshot:
        left = rate.seconds_left(counts.left)
        if self.stop_at is not None:
            until = max(0.0, self.stop_at - time.time())
            left = until if left is None else min(left, until)
        return Snapshot(
            self.search.name,
            list(zip(self.metrics, self.directions, strict=True)),
            trials,
            counts.finished + counts.left,
            self.max_epochs,
            rate.per_minute(),
            left,
            len(self.crew.workers) - len(self.crew.running) if counts.waiting else 0,
            what,
        )

    def beat(self, cells: Mapping[str, Slots]) -> None:
        """Every now and then: a sign of life, and a look for those who give none."""
        if time.monotonic() - self.beat_at < BEAT_SECONDS:
            return
        self.beat_at = time.monotonic()
        self.seat.beat()
        for slots in cells.values():
            slots.revive_dead()

    def take_over(self) -> bool:
        """Bring the search to its end if nobody else is there to do it any more."""
        if not self.seat.take():
            return False
        self.is_owner = True
        self.begin_parent()
        self.display.say("the other coordinator is gone; this one brings the search to its end")
        return True

    def wait_for_parent(self) -> None:
        """Until the coordinator that began a moment ago has made the parent run."""
        deadline = time.monotonic() + 30
        while (
            not self.is_owner
            and self.tracking_uri is not None
            and time.monotonic() < deadline
            and self.seat.holder is not None
            and parent.run_id_of(self.studies.first, self.tracking_uri) is None
        ):
            time.sleep(0.5)

    def end_workers(self) -> None:
        self.crew.kill()

    def clean_up(self) -> None:
        """Nothing of this start stays behind but the words of workers that died."""
        self.crew.close()
        if not self.watch.has_buried:
            shutil.rmtree(self.logs, ignore_errors=True)


# ---- words and numbers ---------------------------------------------------------------------------


def number_of(devices: Any) -> int:
    """How many devices a trial takes, by Lightning's flag; those that it finds by itself are 1."""
    if isinstance(devices, list | tuple):
        return max(1, len(devices))
    text = str(devices)
    if "," in text:
        return max(1, len([part for part in text.split(",") if part.strip()]))
    return max(1, int(text)) if text.lstrip("-").isdecimal() else 1


def told_places(places: Sequence[Place]) -> str:
    """`2 workers on GPUs 0 and 1`, `2 workers of 1 thread each`."""
    count = f"{len(places)} worker{'s' * (len(places) > 1)}"
    named = sorted({gpu for place in places for gpu in place.gpus or ()})
    if named:
        return (
            f"{count} on GPU{'s' * (len(named) > 1)} {', '.join(named)} of {socket.gethostname()}"
        )
    threads = os.environ.get("OMP_NUM_THREADS") or places[0].threads
    each = " each" if len(places) > 1 else ""
    return f"{count} of {threads} thread{'s' * (str(threads) != '1')}{each}"
