"""The training process's end of the record: it hands records over and never waits for the store.

`Recorder.start()` starts the recorder process (recorder.py), which imports MLflow while the caller
imports torch. `recorder.start_run(...)` gives a `Run`; what a run logs goes into a queue in memory,
a thread of ours moves the queue into a file, the recorder process delivers (companion.py). Only
`wait`, `flush` and `finish` wait. They raise TrackingError on what the store refused; what it could
not take because it is away stays in the file and is delivered later: nothing is lost silently.
A run whose process ends without `finish`, however it ends, becomes KILLED in the store.

Standard library only: this is imported before torch.
"""

import atexit
import contextlib
import logging
import operator
import os
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from research.tracking.companion import Companion
from research.tracking.datasets import DatasetInput, dataset_records
from research.tracking.limits import (
    check_name,
    check_names,
    check_path,
    good_names,
    param_texts,
    tag_texts,
)
from research.tracking.repeats import OTHER_NODES, Places
from research.tracking.spool import SCRATCH, Spool, new_spool, spool_root
from research.tracking.store import TrackingError, redact

Status = Literal["FINISHED", "FAILED", "KILLED"]

DESCRIPTION = "mlflow.note.content"  # a run's tag: what MLflow's page of it begins with
SECONDS_PER_MEGABYTE = 10.0  # for files that are sent at the end
DELIVER = "Deliver them when the server is back: python -m research.repair"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """A run as the store knows it.

    `artifact_dir` is the folder of the run's files, there and writable; None where files can only
    be sent (a server that keeps them).
    """

    run_id: str
    experiment_id: str
    run_name: str
    artifact_dir: Path | None


class Recorder(Companion):
    """The companion process that owns MLflow; one serves any number of runs.

    Ends with `close`, at the end of a `with` block, and in any case with this process.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._runs: dict[int, Run] = {}  # those that may still be answered
        self._started = 0
        super().__init__()
        atexit.register(self.close)

    @classmethod
    def start(cls) -> Self:
        """A recorder that is starting up; nothing here waits for it."""
        return cls()

    def start_run(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str | None = None,
        params: Mapping[str, str | float | bool | None] | None = None,
        tags: Mapping[str, str] | None = None,
        log_system_metrics: bool = False,
        patience: float = 0.0,
    ) -> "Run":
        """A new run, on its way: `wait` on it says whether the store took it.

        `tracking_uri` is what `resolve_tracking_uri` gave; an experiment that is not there is made;
        without `run_name` MLflow invents one. Longer values than MLflow keeps are cut, visibly.
        `log_system_metrics` adds how busy CPU, memory, disk, network and GPUs are, every 5 s at
        first. A store that is away is tried again for `patience` seconds. Raises ValueError on
        names that MLflow refuses.
        """
        if not experiment.strip():
            raise ValueError("experiment is empty; give it a name, such as --experiment CIFAR10.")
        message = {
            "op": "start",
            "tracking_uri": tracking_uri,
            "experiment": experiment,
            "run_name": run_name,
            "params": param_texts(params or {}),
            "tags": tag_texts(tags or {}),
            "started": _milliseconds(None),
            "token": uuid.uuid4().hex,  # by which it is found if the store's answer is lost
            "log_system_metrics": log_system_metrics,
            "patience": patience,
        }
        return self._begin(message, experiment)

    def resume_run(
        self,
        tracking_uri: str,
        run_id: str,
        since: float = 0.0,
        behind: Places | None = None,
        log_system_metrics: bool = False,
        patience: float = 0.0,
    ) -> "Run":
        """A run of the store that goes on: RUNNING again, and from there like a new one.

        What its last process left undelivered is delivered first. `behind` is what the run said of
        itself (`logged`) when what it goes on from was saved: what was recorded beyond that comes
        again and is not recorded again. So it is with metrics of the time `since`, in seconds, that
        are there at all. `wait` says whether the run is there; a store that is away is tried again
        for `patience` seconds.
        """
        message = {
            "op": "resume",
            "tracking_uri": tracking_uri,
            "run_id": run_id,
            "spool_root": str(spool_root(tracking_uri)),
            "started": _milliseconds(None),
            "since": _milliseconds(since),
            "behind": dict(behind or {}),
            "log_system_metrics": log_system_metrics,
            "patience": patience,
        }
        run = self._begin(message, "")
        run._since = _milliseconds(since)
        run._logged |= {name: (step, count) for name, (step, count) in (behind or {}).items()}
        return run

    def open_run(self, tracking_uri: str, run_id: str) -> "Run":
        """A run that is in the store already, to add records to; `wait` says whether it is there.

        Its status, end and name stay what they are, however this process ends; `finish` delivers
        what was logged and no more. `experiment` is known once `wait` has returned.
        """
        return self._begin({"op": "open", "tracking_uri": tracking_uri, "run_id": run_id}, "")

    def _begin(self, message: dict[str, Any], experiment: str) -> "Run":
        self._started += 1
        number, uri = self._started, message["tracking_uri"]
        run = Run(self, number, uri, experiment, message.get("patience", 0.0))
        self._runs[number] = run
        if self._end is None:
            self._spools[number] = run._spool
            self._send(message | {"run": number}, hurry=True)
        if self._end is not None:  # also if that was found out just now
            run._lose(self._end)
        return run

    def close(self, timeout: float = 10.0) -> None:
        """End the companion; runs that are not finished become KILLED. Waits `timeout` seconds."""
        if self._closing or os.getpid() != self._owner:  # a forked copy owns nothing
            return
        atexit.unregister(self.close)
        self._shut(timeout, unused=self._started == 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self, answer: dict[str, Any]) -> None:
        run = self._runs.get(answer["run"])
        if run is not None:
            run._hear(answer)

    def _lose(self, reason: str, number: int | None = None) -> None:
        for run in list(self._runs.values()):
            if number in (None, run._number):
                if self._closing or run._spool.broken:
                    run._lose(reason)
                else:
                    run._stall(reason)


class Run:
    """One run in the store. Made by `start_run`, `resume_run` or `open_run`; `with run:` ends it.

    Everything but `wait`, `flush` and `finish` returns at once. After `finish` nothing can be
    logged, and `waiting` says, in a sentence or two, what is not in the store yet, if anything.
    """

    def __init__(
        self,
        recorder: Recorder,
        number: int,
        tracking_uri: str,
        experiment: str,
        patience: float = 0.0,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.waiting: str | None = None
        self._recorder = recorder
        self._number = number
        self._patience = patience
        self._spool: Spool = new_spool(tracking_uri, number)
        self._status: Status | None = None
        self._info: RunInfo | None = None
        self._answered = threading.Event()
        self._loss: str | None = None  # why nothing of this run is delivered any more
        self._loss_told = False
        self._stalled: str | None = None  # why nothing more is delivered now; it is in the spool
        self._outage: str | None = None
        self._tickets: dict[int, threading.Event] = {}
        self._problems: list[str] = []
        self._sent_at_end: list[tuple[Path, str]] = []
        self._since: int | None = None
        self._logged: dict[str, tuple[int, int]] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    # ---- what waits -------------------------------------------------------------------------

    def wait(self, timeout: float = 120.0) -> RunInfo:
        """The run as the store knows it, once the store has answered.

        Raises TrackingError if the store cannot be used, or says nothing for `timeout` seconds
        (and the `patience` that the run was started with).
        """
        if not self._answered.wait(timeout + self._patience):
            raise TrackingError(
                f"The tracking store {redact(self.tracking_uri)} has not answered for "
                f"{timeout + self._patience:g} seconds. Check the address, or record nothing with "
                '--tracking_uri "".'
            )
        if self._info is None:
            reason = self._loss or self._stalled
            assert reason is not None
            self._loss_told = True
            raise TrackingError(reason)
        return self._info

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until all that was logged is in the store: True, and files may then be removed.

        False if the store is away, or too slow for `timeout` seconds: the records wait, in order,
        and files must stay. Raises TrackingError on what the store refused, and on a late store
        where records could not be written to disk meanwhile.
        """
        return self._settle({"op": "flush", "run": self._number}, timeout) is None

    def finish(
        self, status: Status = "FINISHED", timeout: float = 60.0, patience: float = 20.0
    ) -> None:
        """Wait until all that was logged is in the store, and end the run.

        Where the store is away for `patience` seconds, or not done after `timeout`, the records
        stay on disk: `waiting` then says so, and so does a warning. Raises TrackingError on what
        the store refused, and on what is lost because it could not be written to disk either. A
        second call does nothing.
        """
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status is {status!r}; it may be FINISHED, FAILED or KILLED.")
        if self._status is not None:
            return
        self._status = status
        timeout += SECONDS_PER_MEGABYTE * self._megabytes_at_end()
        message = {
            "op": "finish",
            "run": self._number,
            "status": status,
            "ended": _milliseconds(None),
            # Less than ours, so that the recorder process gives up, and says so, before us.
            "seconds": min(patience, 0.8 * timeout),
        }
        late: str | None = None
        done = False
        try:
            late = self._settle(message, timeout)
            done = late is None
        finally:
            self._recorder._runs.pop(self._number, None)
            self._recorder._forget(self._number)
            late = late or self._stalled
            if late is not None and not self._spool.broken:
                self._tell_waiting(late)
            elif done:
                self._spool.remove()
                if self._temporary is not None:
                    self._temporary.cleanup()

    def _tell_waiting(self, reason: str) -> None:
        count = self._spool.count()
        records = (
            "One record of this run waits" if count == 1 else f"{count} records of this run wait"
        )
        self.waiting = (
            f"{records} in {self._spool.folder}: {reason.split('. ')[0].rstrip('.')}. {DELIVER}"
        )
        logger.warning("%s", self.waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """FINISHED; FAILED after an exception; KILLED after Ctrl-C, also as Lightning tells it.

        Lightning turns KeyboardInterrupt into SystemExit(1). The traceback of another exception
        becomes the artifact `traceback.txt`.
        """
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.finish("FINISHED")
            return
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        try:
            if not interrupted and self._status is None:
                self.log_text(redact("".join(traceback.format_exception(error))), "traceback.txt")
            self.finish("KILLED" if interrupted else "FAILED")
        except TrackingError as trouble:  # must not hide what really went wrong
            error.add_note(str(trouble))

    # ---- what does not ----------------------------------------------------------------------

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, timestamp: float | None = None
    ) -> None:
        """Record one value of each metric at `step`; `timestamp` in seconds, now by default.

        With a timestamp it is what a checkpoint remembers, and not `logged` by this process. Raises
        ValueError on names that MLflow refuses.
        """
        rows = []
        step = operator.index(step)
        for name, value in metrics.items():
            if name not in good_names:
                check_name("metric", name)
            rows.append((name, float(value)))
        at = _milliseconds(timestamp)
        if timestamp is None and at == self._since:  # the time of what is remembered, and no other
            at += 1
        self._log((self._number, rows, step, at))
        for name, _ in rows if timestamp is None else ():
            last, count = self._logged.get(name, (step, 0))
            self._logged[name] = (step, count + 1 if last == step else 1)

    def logged(self) -> dict[str, tuple[int, int]]:
        """The step that each metric was logged at last, and how many values of it at that step.

        For a checkpoint, from which `resume_run` goes on: what it says was logged is on disk then.
        """
        self._recorder._write_out()
        return dict(self._logged)

    def log_samples_of(self, node: int, rows: Sequence[tuple[str, float, int, int]]) -> None:
        """Record what another machine measured of itself (monitoring.py), named after it."""
        named = [
            (name.replace("system/", f"{OTHER_NODES}{node}/", 1), float(value), int(step), int(at))
            for name, value, step, at in rows
        ]
        for name, *_ in named:
            check_name("metric", name)
        self._log({"op": "sample", "run": self._number, "rows": named, "is_told": True})

    def log_params(self, params: Mapping[str, str | float | bool | None]) -> None:
        """Record parameters later than at the start; one recorded before cannot change."""
        self._log({"op": "params", "run": self._number, "params": param_texts(params)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._log({"op": "tags", "run": self._number, "tags": tag_texts(tags)})

    def log_inputs(self, inputs: Sequence[DatasetInput]) -> None:
        """Record what the run works on, one split each.

        Raises ValueError on what MLflow refuses, and on two splits that it would take for one.
        """
        records = dataset_records(inputs)
        self._log({"op": "inputs", "run": self._number, "inputs": records})

    def log_model(
        self,
        name: str,
        step: int,
        metrics: Mapping[str, float],
        params: Mapping[str, str | float | bool | None] | None = None,
        tags: Mapping[str, str] | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Record a model that came out of the run at `step`, tied to its metrics.

        `folder` is what `recording.export.write_model` wrote; it is read later and must stay as
        it is until `flush` or `finish`. Without it the model is known by its metrics alone. A
        second model of the same name replaces the first.
        """
        check_names("metric", metrics)
        path = None if folder is None else Path(folder).absolute()
        if path is not None and not path.is_dir():
            raise ValueError(f"{path} is no folder, so it cannot be recorded as a model.")
        message = {
            "op": "model",
            "run": self._number,
            "folder": None if path is None else str(path),
            "name": name,
            "step": operator.index(step),
            "metrics": {metric: float(value) for metric, value in metrics.items()},
            "params": param_texts(params or {}),
            "tags": tag_texts(tags or {}),
        }
        self._log(message)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Record `text` as the file `artifact_file` (a relative path) of the run."""
        path = check_path(artifact_file)
        self._log({"op": "text", "run": self._number, "text": text, "path": path})

    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """Record a file or folder, in the folder `artifact_path` of the run or at its top.

        It is read later: it must stay as it is until `flush` or `finish`. A file that lies where it
        would be copied to is left alone.
        """
        source = Path(local_path).absolute()
        if not source.exists():
            raise ValueError(f"{source} is not there, so it cannot be recorded.")
        folder = None if artifact_path is None else check_path(artifact_path)
        message = {"op": "artifact", "run": self._number, "source": str(source), "path": folder}
        self._log(message)

    @property
    def scratch(self) -> Path:
        """A folder for files to be recorded: it is there until all of the run is in the store."""
        if self._temporary is None:
            if not self._spool.broken:
                with contextlib.suppress(OSError):
                    return self._spool.make_folder(SCRATCH)
            self._temporary = tempfile.TemporaryDirectory()
        return Path(self._temporary.name)

    def keep_sending(self, folder: Path, artifact_path: str, pattern: str = "*.ckpt") -> None:
        """Send the files of `folder` that match at the end of the run, however it ends.

        Also when this process is killed: the recorder process then sends what it finds. For the
        checkpoints of a store whose files are not in a folder here.
        """
        if not pattern or "/" in pattern:
            raise ValueError(f"pattern {pattern!r} must match names of files, such as '*.ckpt'.")
        message = {
            "op": "keep",
            "run": self._number,
            "folder": str(folder.absolute()),
            "path": check_path(artifact_path),
            "pattern": pattern,
        }
        self._log(message)
        self._sent_at_end.append((folder.absolute(), pattern))

    def _megabytes_at_end(self) -> float:
        total = 0
        for folder, pattern in self._sent_at_end:
            with contextlib.suppress(OSError):  # one of them vanished just now
                total += sum(file.stat().st_size for file in folder.glob(pattern))
        return total / 1e6

    def _log(self, message: Any) -> None:
        if self._status is not None:
            raise TrackingError("This run is finished; nothing can be logged to it any more.")
        if self._loss is None:
            self._recorder._send(message)

    # ---- what the companion says ------------------------------------------------------------

    def _settle(self, message: dict[str, Any], timeout: float) -> str | None:
        """Wait for the answer: None, or why records wait on disk."""
        ticket = len(self._tickets)
        settled = self._tickets[ticket] = threading.Event()
        self._recorder._send(message | {"ticket": ticket}, hurry=True)
        if self._loss is not None:  # also if that was found out just now
            settled.set()
        late: str | None = None
        if not settled.wait(timeout):
            late = self._outage or f"{redact(self.tracking_uri)} is too slow."
            if self._spool.broken:
                raise TrackingError(
                    f"Not everything was recorded within {timeout:g} seconds: {late}"
                )
        if self._loss is not None and not self._loss_told:
            self._loss_told = True
            raise TrackingError(self._loss)
        if self._problems:
            problems, self._problems = self._problems, []
            raise TrackingError("Not everything was recorded. " + " ".join(problems))
        return late or self._stalled

    def _hear(self, answer: dict[str, Any]) -> None:
        match answer["event"]:
            case "started":
                folder = answer["artifact_dir"]
                self._info = RunInfo(
                    run_id=answer["run_id"],
                    experiment_id=answer["experiment_id"],
                    run_name=answer["run_name"],
                    artifact_dir=None if folder is None else Path(folder),
                )
                self.experiment = answer["experiment"]
                self._answered.set()
            case "refused":
                self._lose(answer["message"])
                self._recorder._runs.pop(self._number, None)
                self._recorder._forget(self._number)
            case "settled":
                self._problems += answer["problems"]
                if self._spool.broken:
                    self._problems += answer["undelivered"]
                else:
                    self._stalled = answer["waits"]
                self._tickets[answer["ticket"]].set()
            case "trying":
                logger.warning(
                    "%s It is tried again for %g seconds.", answer["message"], self._patience
                )
            case "away":
                self._outage = answer["message"]
                logger.warning(
                    "%s Training goes on; records wait and are sent later.", answer["message"]
                )
            case "back":
                self._outage = None
                logger.warning("The tracking store is back; records that waited have been sent.")

    def _stall(self, reason: str) -> None:
        """Nothing more is delivered from here; what was logged, and still is, stays on disk."""
        self._stalled = reason
        self._answered.set()
        for settled in list(self._tickets.values()):
            settled.set()

    def _lose(self, reason: str) -> None:
        self._loss = reason
        self._answered.set()
        for settled in list(self._tickets.values()):
            settled.set()


def _milliseconds(timestamp: float | None) -> int:
    return int(1000 * (time.time() if timestamp is None else timestamp))
