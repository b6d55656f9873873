"""Delivery of a run's records: in order, tried again while the store is away, each of them once.

Records come from a source: the recorder process's own (recorder.py), which the training process
feeds, or a spool that is left over (redelivery.py). Where a process dies before it has noted what
it had delivered, records are delivered again; that changes nothing, for MLflow keeps one row of a
value of equal name, step, time and number, and everything else replaces itself.
"""

import contextlib
import queue
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from research.tracking import beginning
from research.tracking.beginning import About
from research.tracking.datasets import dataset_entity, log_inputs
from research.tracking.monitoring import Rows
from research.tracking.opening import Stores
from research.tracking.repeats import OTHER_NODES, SYSTEM, Repeats
from research.tracking.source import Source
from research.tracking.spool import DOCUMENTS, Spool
from research.tracking.troubles import explain, may_pass

# Sent together: on SQLite one batch of 6 metrics takes 6 ms, one of 1000 takes 80.
BATCH_METRICS = 500
BATCH_SECONDS = 1.0
RETRY_SECONDS = 1.0
MARK_SECONDS = 1.0  # between two notes on how far delivery is
SECONDS_PER_MEGABYTE = 10.0  # for files that are sent at the end
# MLflow's Compare opens with the metric that a run logged first: samples of the machine wait for
# one of the run's own, but no longer than this.
SAMPLE_SECONDS = 120.0


@dataclass
class OpenRun:
    """A run that is being recorded and not yet finished."""

    number: int
    client: Any  # mlflow.MlflowClient
    about: About
    spool: Spool | None
    stop_sampling: Callable[[], None] = lambda: None
    has_documents: bool = False
    early_samples: Rows | None = field(default_factory=list)  # None: they wait no longer
    next_sample: int = 0
    metrics: Rows = field(default_factory=list)
    oldest: float = 0.0
    repeats: Repeats | None = None
    at_end: list[dict[str, Any]] = field(default_factory=list)  # files to be sent then
    read: int = 0  # end of the last record that was handled, in the spool
    safe: tuple[int, int] = (0, 0)  # up to where all is delivered, and the next sample then
    marked: tuple[int, int] = (0, 0)
    marked_at: float = 0.0
    away: str | None = None  # why the store cannot be reached just now
    gave_up: bool = False
    held: str | None = None  # why what comes from here on must be delivered again
    undelivered: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def run_id(self) -> str:
        return self.about.run_id

    @property
    def is_unmarked(self) -> bool:
        return self.spool is not None and self.safe != self.marked

    def mark(self, at_once: bool = False) -> None:
        """Note how far delivery is: in memory always, on disk once in a while."""
        if not self.metrics and not self.gave_up and self.held is None:
            self.safe = (self.read, self.next_sample)
        now = time.monotonic()
        if self.is_unmarked and (at_once or now - self.marked_at >= MARK_SECONDS):
            assert self.spool is not None
            self.spool.delivered = self.marked = self.safe
            self.marked_at = now


class Delivery:
    """Takes the messages one by one and brings them to the store."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stores = Stores()
        self.runs: dict[int, OpenRun] = {}
        self.unreached: dict[int, str] = {}  # runs that could not begin, and why
        self.finished: list[Spool] = []  # with nothing left to deliver

    def serve(self) -> None:
        while (message := self._next()) is not None:
            try:
                self.handle(message)
            except Exception as error:  # a fault of ours in one record must not lose the others
                self.note(message, f"{type(error).__name__}: {error}")
        for run in list(self.runs.values()):
            self.end_run(run, "KILLED", self.ended_at(run))
            self._leave(run)
        for spool in self.finished:
            spool.remove()  # where the training process has not done so

    # ---- what differs between the recorder process and a later delivery ------------------------

    def answer(self, number: int, event: str, **rest: Any) -> None:
        """Tell the training process."""

    def tags_at_start(self, message: dict[str, Any]) -> dict[str, str]:
        raise NotImplementedError

    def has_begun(self, run: OpenRun) -> None:
        """The run is in the store, and its own records follow."""

    def ended_at(self, run: OpenRun) -> int:
        """When a run ended that nobody finished, in milliseconds."""
        return int(1000 * time.time())

    def note(self, message: dict[str, Any], problem: str) -> None:
        run = self.runs.get(message.get("run", 0))
        if run is not None:
            run.problems.append(problem)

    def log_documents(self, run: OpenRun) -> None:
        """The files of the provenance."""
        if run.spool is not None and (run.spool.folder / DOCUMENTS).is_dir():
            self.send_documents(run, run.spool.folder / DOCUMENTS)

    # ---- messages ------------------------------------------------------------------------------

    def _next(self) -> dict[str, Any] | None:
        """The next message; sends metrics that have waited long enough meanwhile."""
        while True:
            runs = self.runs.values()
            due = [run.oldest + BATCH_SECONDS for run in runs if run.metrics]
            due += [run.marked_at + MARK_SECONDS for run in runs if run.is_unmarked]
            try:
                timeout = max(0.0, min(due) - time.monotonic()) if due else None
                return self.source.messages.get(timeout=timeout)
            except queue.Empty:
                for run in list(runs):
                    self._flush(run)

    def handle(self, message: dict[str, Any]) -> None:
        if message["op"] in ("start", "open", "resume", "adopt"):
            self._begin(message)
        run = self.runs.get(message["run"])
        if run is None:
            self._handle_unreached(message)
            return
        self._take(run, message)
        if "end" in message:
            run.read = max(run.read, message["end"])
        if run.number in self.runs:
            run.mark()

    def _handle_unreached(self, message: dict[str, Any]) -> None:
        """Of a run that could not begin: what it is told waits in its spool; or it was refused."""
        reason = self.unreached.get(message["run"])
        if reason is not None and "ticket" in message:
            undelivered = [f"Nothing of this run is recorded. {reason}"]
            self._answer_settled(message, [], undelivered, reason)

    def _take(self, run: OpenRun, message: dict[str, Any]) -> None:
        client, run_id = run.client, run.run_id
        match message["op"]:
            case "sample":
                self._take_sample(run, message["rows"], "is_told" in message)
            case "metrics":
                self._take_metrics(run, message["rows"])
            case "params":
                self._log_params(run, message["params"])
            case "tags":
                tags = _entities("RunTag", message["tags"])
                self._deliver(run, "tag", len(tags), lambda: client.log_batch(run_id, tags=tags))
            case "text":
                text, path = message["text"], message["path"]
                self._deliver(run, "file", 1, lambda: client.log_text(run_id, text, path))
            case "artifact":
                self._log_artifact(run, Path(message["source"]), message["path"])
            case "inputs":
                inputs = [dataset_entity(record) for record in message["inputs"]]
                send = partial(log_inputs, client, run_id, inputs)
                self._deliver(run, "dataset", len(inputs), send)
            case "model":
                self._log_model(run, message)
            case "keep":
                run.at_end.append(message)
            case "flush":
                self._flush(run)
                self._settle(run, message)
            case "finish":
                self.end_run(run, message["status"], message["ended"])
                self._settle(run, message)

    # ---- beginnings ----------------------------------------------------------------------------

    def _begin(self, message: dict[str, Any]) -> None:
        number, uri = message["run"], message["tracking_uri"]
        if number in self.runs:  # it was adopted, and its first record is delivered again
            self._log_first_params(self.runs[number], message)
            return
        spool = self.source.spools.get(number)
        if self.source.deadline is not None and _is_nothing(message, spool):
            self._refuse(number, "Its process ended at once.")
            return
        until = time.monotonic() + message.get("patience", 0.0)
        may_exist = spool is not None and "tags" in spool.about
        told = False
        while True:
            try:
                client, about = self._enter(message, spool, may_exist)
                break
            except Exception as error:
                reason = explain(error, uri)
                left = self.source.seconds_left(number)
                passes = may_pass(error, uri)
            now = time.monotonic()
            # A delivery that nobody waits for may be made later; so may one that began before.
            later = self.source.deadline is not None or message["op"] == "adopt"
            if not passes or left <= 0 or (now >= until and not later):
                if spool is not None and (later or (passes and left <= 0)):
                    self.unreached[number] = reason
                else:
                    self._refuse(number, reason)
                return
            if not told:
                self.answer(number, "trying", message=reason)
            told = may_exist = True
            time.sleep(max(0.0, min(RETRY_SECONDS, left)))
        run = OpenRun(number, client, about, spool)
        self.runs[number] = run
        if spool is not None:
            run.read, run.next_sample = run.marked = run.safe = spool.delivered
            spool.about = asdict(about)
        self._log_first_params(run, message)
        self.answer(
            number,
            "started",
            run_id=about.run_id,
            experiment_id=about.experiment_id,
            run_name=about.run_name,
            artifact_dir=about.artifact_dir,
            experiment=about.experiment,
        )
        self.has_begun(run)

    def _log_first_params(self, run: OpenRun, message: dict[str, Any]) -> None:
        if message["op"] == "start" and message["params"]:
            params = _entities("Param", message["params"])
            send = partial(run.client.log_batch, run.run_id, params=params)
            self._deliver(run, "parameter", len(params), send)

    def _enter(
        self, message: dict[str, Any], spool: Spool | None, may_exist: bool
    ) -> tuple[Any, About]:
        match message["op"]:
            case "start":
                tags = self.tags_at_start(message)
                if spool is not None and not may_exist:
                    spool.about = {"tags": tags}  # also says that it was tried
                return beginning.start(self.stores, message, tags, may_exist)
            case "resume":
                tags = self.tags_at_start(message)
                return beginning.resume(self.stores, message, tags, spool)
            case "open":
                return beginning.find(self.stores, message)
            case _:
                assert spool is not None
                about = About.of(spool.about)
                return self.stores.client(about.tracking_uri), about

    def _refuse(self, number: int, reason: str) -> None:
        spool = self.source.forget(number)
        if spool is not None:
            spool.remove()
        self.answer(number, "refused", message=reason)

    # ---- one kind of record each ---------------------------------------------------------------

    def _take_sample(self, run: OpenRun, rows: Rows, is_told: bool) -> None:
        """Samples of this machine, or such of another that the training process was told of."""
        if not rows:
            return
        if is_told:  # it counts from 0 in each process
            if run.about.resumed:
                run.repeats = run.repeats or repeats_of(run)
                first = run.repeats.next_system_step
                rows = [(name, value, first + step, at) for name, value, step, at in rows]
        else:
            run.next_sample = rows[-1][2] + 1
        if run.early_samples is None:
            self._take_metrics(run, rows)
            return
        run.early_samples += rows
        if rows[-1][3] - run.early_samples[0][3] > 1000 * SAMPLE_SECONDS:
            self._take_metrics(run, [])

    def _take_metrics(self, run: OpenRun, rows: Rows) -> None:
        if not run.metrics:
            run.oldest = time.monotonic()
        run.metrics += rows + (run.early_samples or [])
        run.early_samples = None
        if len(run.metrics) >= BATCH_METRICS:
            self._flush(run)

    def _flush(self, run: OpenRun) -> None:
        while run.metrics:
            rows = run.metrics[:BATCH_METRICS]
            self._deliver(run, "metric", len(rows), self._sender(run, rows))
            if (run.gave_up or run.held is not None) and run.spool is not None:
                own = [row for row in rows if not row[0].startswith(OTHER_NODES)]
                samples = [row for row in own if row[0].startswith(SYSTEM)]
                if samples:  # all else is in the spool already
                    run.spool.keep_samples(samples)
            run.metrics = run.metrics[BATCH_METRICS:]
        run.mark()

    def _sender(self, run: OpenRun, rows: Rows) -> Callable[[], None]:
        """What sends these rows, but for those that a resumed run has already."""
        from mlflow.entities import Metric

        metrics: list[Any] | None = None

        def send() -> None:
            nonlocal metrics
            if metrics is None:
                fresh = rows
                if run.about.resumed:
                    run.repeats = run.repeats or repeats_of(run)
                    fresh = run.repeats.new(rows)
                metrics = [Metric(name, value, at, step) for name, value, step, at in fresh]
            if metrics:
                run.client.log_batch(run.run_id, metrics)

        return send

    def _log_params(self, run: OpenRun, texts: dict[str, str]) -> None:
        params = _entities("Param", texts)
        before = len(run.problems)
        send = run.client.log_batch
        self._deliver(run, "parameter", len(params), lambda: send(run.run_id, params=params))
        if len(run.problems) > before and len(params) > 1:
            # MLflow refuses all of them for the sake of one that was recorded otherwise before.
            del run.problems[before:]
            for param in params:
                one = partial(send, run.run_id, params=[param])
                self._deliver(run, f"parameter {param.key}", 1, one)

    def _log_artifact(self, run: OpenRun, source: Path, folder: str | None) -> None:
        if run.about.artifact_dir is not None:
            target = Path(run.about.artifact_dir, folder or "", source.name)
            if target.exists() and source.exists() and target.samefile(source):
                return
        self._deliver(
            run,
            f"file {source.name}",
            1,
            lambda: run.client.log_artifact(run.run_id, str(source), folder),
        )

    def _log_model(self, run: OpenRun, message: dict[str, Any]) -> None:
        from research.tracking.model import log_model

        self._flush(run)  # a model's metrics are looked up among the run's
        folder = None if message["folder"] is None else Path(message["folder"])

        def send() -> None:
            with beginning.one_attempt():  # the next one looks first which model there is
                log_model(
                    run.client,
                    run.run_id,
                    run.about.experiment_id,
                    folder,
                    message["name"],
                    message["step"],
                    message["metrics"],
                    message["params"],
                    message["tags"],
                )

        self._deliver(run, f"model {message['name']}", 1, send)

    def send_documents(self, run: OpenRun, folder: Path) -> None:
        count = sum(path.is_file() for path in folder.rglob("*"))
        send = partial(run.client.log_artifacts, run.run_id, str(folder), run.about.documents_in)
        self._deliver(run, "file", count, send)
        if not run.gave_up and run.held is None:
            shutil.rmtree(folder, ignore_errors=True)

    def end_run(self, run: OpenRun, status: str, ended: int) -> None:
        run.stop_sampling()
        self._take_metrics(run, [])
        self._flush(run)
        if run.about.is_ours:
            self.log_documents(run)
        for message in run.at_end:
            for file in sorted(Path(message["folder"]).glob(message["pattern"])):
                with contextlib.suppress(OSError):  # removed just now
                    megabytes = file.stat().st_size / 1e6
                    self.source.allow(run.number, SECONDS_PER_MEGABYTE * megabytes)
                    self._log_artifact(run, file, message["path"])
        if run.about.is_ours:
            end = partial(run.client.set_terminated, run.run_id, status, end_time=ended)
            self._deliver(run, f"status {status}", 1, end)
        del self.runs[run.number]
        self.source.forget(run.number)

    # ---- delivery ------------------------------------------------------------------------------

    def _deliver(self, run: OpenRun, what: str, count: int, send: Callable[[], Any]) -> None:
        """Send until the store has answered, or until there is no time left for this run."""
        while not run.gave_up:
            try:
                send()
            except Exception as error:
                reason = explain(error, run.about.tracking_uri)
                if not may_pass(error, run.about.tracking_uri):
                    run.problems.append(f"{_amount(count, what)} refused: {reason}")
                    if _may_be_mended(error):
                        run.held = run.held or reason
                    return
                if run.away is None:
                    self.answer(run.number, "away", message=reason)
                run.away = reason
                left = self.source.seconds_left(run.number)
                run.gave_up = left <= 0
                time.sleep(max(0.0, min(RETRY_SECONDS, left)))
            else:
                if run.away is not None:
                    self.answer(run.number, "back")
                run.away = None
                return
        run.undelivered[what] += count

    def _settle(self, run: OpenRun, message: dict[str, Any]) -> None:
        """Answer what became of the records before this message."""
        problems, run.problems = run.problems, []
        if len(problems) > 5:
            problems[5:] = [f"And {len(problems) - 5} more."]
        undelivered = []
        if run.undelivered:
            amounts = ", ".join(_amount(count, what) for what, count in run.undelivered.items())
            undelivered = [f"Undelivered from run {run.run_id}: {amounts}. {run.away}"]
            run.undelivered.clear()
        waits = run.away if run.gave_up else run.held
        if message["op"] == "finish" and waits is None:
            # Removed by the training process, once it has heard; until then it stays ours.
            self._answer_settled(message, problems, undelivered, waits)
            if run.spool is not None:
                self.finished = [spool for spool in self.finished if not spool.is_gone()]
                self.finished.append(run.spool)
            return
        run.mark(at_once=True)
        if message["op"] == "finish" and run.spool is not None:
            run.spool.release()
        self._answer_settled(message, problems, undelivered, waits)

    def _leave(self, run: OpenRun) -> None:
        """Remove the spool of a run that is over, or leave it to whoever delivers later."""
        if run.spool is None:
            return
        if run.gave_up or run.held is not None:
            run.mark(at_once=True)
            run.spool.release()
        else:
            run.spool.remove()

    def _answer_settled(
        self,
        message: dict[str, Any],
        problems: list[str],
        undelivered: list[str],
        waits: str | None,
    ) -> None:
        self.answer(
            message["run"],
            "settled",
            ticket=message["ticket"],
            problems=problems,
            undelivered=undelivered,
            waits=waits,
        )


def _is_nothing(message: dict[str, Any], spool: Spool | None) -> bool:
    """Whether a run has nothing but its beginning, of which the store never heard."""
    if message["op"] == "adopt":
        return False
    return spool is None or (not spool.about and spool.size() <= message.get("end", 0))


def _may_be_mended(error: Exception) -> bool:
    """Whether the same record may be taken once somebody has made room or given access."""
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return True
    return "No space left" in text or "disk is full" in text or " 401" in text or " 403" in text


def _entities(kind: str, texts: dict[str, str]) -> list[Any]:
    import mlflow.entities

    return [getattr(mlflow.entities, kind)(name, value) for name, value in texts.items()]


def _amount(count: int, what: str) -> str:
    return what if count == 1 and " " in what else f"{count} {what}{'s' if count != 1 else ''}"


def repeats_of(run: OpenRun) -> Repeats:
    """What a run that goes on has recorded already, and will be told again."""
    told = [] if run.spool is None else list(run.spool.metrics())
    own = [row for rows, _ in told for row in rows]
    repeats = Repeats.of(run.client, run.run_id, run.about.since, run.about.behind, own)
    if run.spool is not None:
        delivered, _ = run.spool.delivered
        for rows, end in told:
            if end <= delivered:  # by a process before this one, which dropped as many
                repeats.new(rows)
    return repeats
