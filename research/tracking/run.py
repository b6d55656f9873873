"""The training process's end of the record: it hands records over and never waits for the store.

`Recorder.start()` starts the companion process (recorder.py), which imports MLflow while the caller
imports torch. `recorder.start_run(...)` gives a `Run`; what a run logs goes into a queue in memory,
a thread of ours moves the queue into a pipe, the companion delivers. Only `wait`, `flush` and
`finish` wait, and they raise TrackingError on what could not be recorded: nothing is lost silently.
A run whose process ends without `finish`, however it ends, becomes KILLED in the store.

Standard library only: this is imported before torch.
"""

import atexit
import collections
import contextlib
import json
import logging
import operator
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from research.tracking.datasets import DatasetInput, dataset_records
from research.tracking.limits import (
    check_name,
    check_names,
    check_path,
    good_names,
    param_texts,
    tag_texts,
)
from research.tracking.store import TrackingError, redact

Status = Literal["FINISHED", "FAILED", "KILLED"]

# Records wait this long for company, so that a line written per step costs no thread switch per
# step. It is also the most that a `kill -9` can lose.
GATHER_SECONDS = 0.1

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


class Recorder:
    """The companion process that owns MLflow; one serves any number of runs.

    Ends with `close`, at the end of a `with` block, and in any case with this process.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._runs: dict[int, Run] = {}  # those that may still be answered
        self._started = 0
        self._end: str | None = None  # why nothing is delivered any more
        self._closing = False
        self._outbox: collections.deque[Any] = collections.deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            # -P: a file of the current folder must not stand in for a module of MLflow's.
            [sys.executable, "-P", "-m", "research.tracking.recorder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the training, which then ends its run itself
        )
        self._writer = threading.Thread(target=self._write, name="record-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="record-reader", daemon=True)
        self._writer.start()
        self._reader.start()
        atexit.register(self.close)
        command = ["python", *sys.orig_argv[1:]]
        self._send({"op": "hello", "command": command, "script": sys.argv[0]}, hurry=True)

    @classmethod
    def start(cls) -> Self:
        """A recorder that is starting up; nothing here waits for it."""
        return cls()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start_run(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str | None = None,
        params: Mapping[str, str | float | bool | None] | None = None,
        tags: Mapping[str, str] | None = None,
        log_system_metrics: bool = False,
    ) -> "Run":
        """A new run, on its way: `wait` on it says whether the store took it.

        `tracking_uri` is what `resolve_tracking_uri` gave; an experiment that is not there is made;
        without `run_name` MLflow invents one. Longer values than MLflow keeps are cut, visibly.
        `log_system_metrics` adds how busy CPU, memory, disk, network and GPUs are, every 5 s at
        first. Raises ValueError on names that MLflow refuses.
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
            "log_system_metrics": log_system_metrics,
        }
        return self._begin(message, experiment)

    def open_run(self, tracking_uri: str, run_id: str) -> "Run":
        """A run that is in the store already, to add records to; `wait` says whether it is there.

        Its status, end and name stay what they are, however this process ends; `finish` delivers
        what was logged and no more. `experiment` is known once `wait` has returned.
        """
        return self._begin({"op": "open", "tracking_uri": tracking_uri, "run_id": run_id}, "")

    def _begin(self, message: dict[str, Any], experiment: str) -> "Run":
        self._started += 1
        run = Run(self, self._started, message["tracking_uri"], experiment)
        self._runs[self._started] = run
        self._send(message | {"run": self._started}, hurry=True)
        if self._end is not None:
            run._lose(self._end)
        return run

    def close(self, timeout: float = 10.0) -> None:
        """End the companion; runs that are not finished become KILLED. Waits `timeout` seconds."""
        if self._closing or os.getpid() != self._owner:  # a forked copy owns nothing
            return
        self._closing = True
        atexit.unregister(self.close)
        if self._started == 0:
            self._process.kill()  # it may still be importing, and has nothing to lose
        self._outbox.append(None)
        self._hurry.set()
        self._wake.set()
        deadline = time.monotonic() + timeout
        self._writer.join(timeout)
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return  # it goes on delivering, and ends by itself
        self._reader.join(1.0)
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the two threads --------------------------------------------------------------------

    def _send(self, message: Any, hurry: bool = False) -> None:
        self._outbox.append(message)
        if hurry:
            self._hurry.set()
        if not self._wake.is_set():
            self._wake.set()

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while True:
                self._wake.wait()
                self._hurry.wait(GATHER_SECONDS)
                # First clear, then take all: what comes in between sets them again.
                self._wake.clear()
                self._hurry.clear()
                messages, last = _taken(self._outbox)
                for message in messages:
                    pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()
                if last:
                    return
        except OSError:
            pass  # the companion is gone; `_read` finds out why
        finally:
            with contextlib.suppress(OSError):
                pipe.close()

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                answer = json.loads(line)
                run = self._runs.get(answer["run"])
                if run is not None:
                    run._hear(answer)
        code = self._process.wait()
        self._end = "The recorder was closed."
        if not self._closing:
            self._errors.seek(0)
            words = self._errors.read()[-2000:].decode(errors="replace").strip()
            self._end = (
                f"The recorder process ended (exit code {code}) and nothing more is recorded. "
                f"Its last words: {words or 'none'}"
            )
        for run in list(self._runs.values()):
            run._lose(self._end)
        self._outbox.clear()
        self._outbox.append(None)  # `close` may have put its own there before the line above
        self._wake.set()


class Run:
    """One run in the store. Made by `start_run` or `open_run`; `with run:` finishes it.

    Everything but `wait`, `flush` and `finish` returns at once. After `finish` nothing can be
    logged.
    """

    def __init__(self, recorder: Recorder, number: int, tracking_uri: str, experiment: str) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self._recorder = recorder
        self._number = number
        self._status: Status | None = None
        self._info: RunInfo | None = None
        self._answered = threading.Event()
        self._loss: str | None = None  # why nothing of this run is delivered any more
        self._loss_told = False
        self._outage: str | None = None
        self._tickets: dict[int, threading.Event] = {}
        self._problems: list[str] = []

    # ---- what waits -------------------------------------------------------------------------

    def wait(self, timeout: float = 120.0) -> RunInfo:
        """The run as the store knows it, once the store has answered.

        Raises TrackingError if the store cannot be used, or says nothing for `timeout` seconds.
        """
        if not self._answered.wait(timeout):
            raise TrackingError(
                f"The tracking store {redact(self.tracking_uri)} has not answered for "
                f"{timeout:g} seconds. Check the address, or record nothing with "
                '--tracking_uri "".'
            )
        if self._info is None:
            assert self._loss is not None
            self._loss_told = True
            raise TrackingError(self._loss)
        return self._info

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until all that was logged is in the store; files may then be removed.

        Raises TrackingError on what the store refused, or if it takes longer.
        """
        self._settle({"op": "flush", "run": self._number}, timeout)

    def finish(self, status: Status = "FINISHED", timeout: float = 60.0) -> None:
        """Wait until all that was logged is in the store, and end the run.

        Raises TrackingError on what could not be recorded. A second call does nothing.
        """
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status is {status!r}; it may be FINISHED, FAILED or KILLED.")
        if self._status is not None:
            return
        self._status = status
        message = {
            "op": "finish",
            "run": self._number,
            "status": status,
            "ended": _milliseconds(None),
            "seconds": 0.8 * timeout,  # so that the companion gives up, and says so, before us
        }
        try:
            self._settle(message, timeout)
        finally:
            self._recorder._runs.pop(self._number, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """FINISHED; FAILED after an exception; KILLED after Ctrl-C, also as Lightning tells it.

        Lightning turns KeyboardInterrupt into SystemExit(1).
        """
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.finish("FINISHED")
            return
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        try:
            self.finish("KILLED" if interrupted else "FAILED")
        except TrackingError as trouble:  # must not hide what really went wrong
            error.add_note(str(trouble))

    # ---- what does not ----------------------------------------------------------------------

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, timestamp: float | None = None
    ) -> None:
        """Record one value of each metric at `step`; `timestamp` in seconds, now by default.

        Raises ValueError on names that MLflow refuses.
        """
        rows = []
        for name, value in metrics.items():
            if name not in good_names:
                check_name("metric", name)
            rows.append((name, float(value)))
        self._log((self._number, rows, operator.index(step), _milliseconds(timestamp)))

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

        `folder` is what `research.export.write_model` wrote; it is read later and must stay as it
        is until `flush` or `finish`. Without it the model is known by its metrics alone. A second
        model of the same name replaces the first.
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

    def _log(self, message: Any) -> None:
        if self._status is not None:
            raise TrackingError("This run is finished; nothing can be logged to it any more.")
        if self._loss is None:
            self._recorder._send(message)

    # ---- what the companion says ------------------------------------------------------------

    def _settle(self, message: dict[str, Any], timeout: float) -> None:
        ticket = len(self._tickets)
        settled = self._tickets[ticket] = threading.Event()
        self._recorder._send(message | {"ticket": ticket}, hurry=True)
        if self._loss is not None:  # also if that was found out just now
            settled.set()
        if not settled.wait(timeout):
            raise TrackingError(
                f"Not everything was recorded within {timeout:g} seconds: "
                + (self._outage or f"{redact(self.tracking_uri)} is too slow.")
            )
        if self._loss is not None and not self._loss_told:
            self._loss_told = True
            raise TrackingError(self._loss)
        if self._problems:
            problems, self._problems = self._problems, []
            raise TrackingError("Not everything was recorded. " + " ".join(problems))

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
            case "settled":
                self._problems += answer["problems"]
                self._tickets[answer["ticket"]].set()
            case "away":
                self._outage = answer["message"]
                logger.warning(
                    "%s Training goes on; records wait and are sent later.", answer["message"]
                )
            case "back":
                self._outage = None
                logger.warning("The tracking store is back; records that waited have been sent.")

    def _lose(self, reason: str) -> None:
        self._loss = reason
        self._answered.set()
        for settled in list(self._tickets.values()):
            settled.set()


def _taken(outbox: collections.deque[Any]) -> tuple[list[dict[str, Any]], bool]:
    """All that is in the queue, metrics of a run that follow one another as one message; and
    whether the end was among it."""
    messages: list[dict[str, Any]] = []
    while True:
        try:
            item = outbox.popleft()
        except IndexError:
            return messages, False
        if item is None:
            return messages, True
        if isinstance(item, dict):
            messages.append(item)
            continue
        number, pairs, step, milliseconds = item
        if not messages or messages[-1]["op"] != "metrics" or messages[-1]["run"] != number:
            messages.append({"op": "metrics", "run": number, "rows": []})
        messages[-1]["rows"] += [(name, value, step, milliseconds) for name, value in pairs]


def _environment() -> dict[str, str]:
    """The environment of the companion: finds this package, stays quiet, takes one core."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    mine = {
        "PYTHONPATH": package if not path else package + os.pathsep + path,
        "PYTHONWARNINGS": "ignore",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    }
    # A server that is away must be noticed in seconds; the companion tries again by itself, where
    # MLflow's own seven retries of up to two minutes each would hold everything up.
    patience = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    }
    return patience | dict(os.environ) | threads | mine


def _milliseconds(timestamp: float | None) -> int:
    return int(1000 * (time.time() if timestamp is None else timestamp))
