"""The companion process that owns MLflow: `python -m research.tracking.recorder`.

Standard input brings a run's records as JSON lines, standard output takes the answers (run.py is
the other end and documents neither: both ends of one protocol change together). Records are
delivered in order and once; while the store is away they wait in memory and are tried again. When
the input ends, runs that were not finished become KILLED, and so does this process's work.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from research.tracking import environment, provenance
from research.tracking.changes import uncommitted_patch
from research.tracking.datasets import dataset_entity
from research.tracking.limits import MAX_TAG, tag_texts
from research.tracking.monitoring import Rows, start_sampling
from research.tracking.opening import Stores, preload
from research.tracking.store import TrackingError, is_server, redact
from research.tracking.troubles import explain, may_pass

# Sent together: on SQLite one batch of 6 metrics takes 6 ms, one of 1000 takes 80.
BATCH_METRICS = 500
BATCH_SECONDS = 1.0
RETRY_SECONDS = 1.0
LAST_SECONDS = 30.0  # to deliver what is left when the training process is gone
# MLflow's Compare opens with the metric that a run logged first: samples of the machine wait for
# one of the run's own, but no longer than this.
SAMPLE_SECONDS = 120.0
DOCUMENT_SECONDS = 25.0  # for a run's end to wait: git and nvidia-smi may take 10 s each


class Inbox:
    """What the training process sends, read ahead so that its pipe is never full."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.give_up_at: dict[int, float] = {}  # by run, once it is being finished
        self.ended_at: float | None = None
        self._stream = stream
        self._any_run = False
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True).start()

    def seconds_left(self, run: int) -> float:
        """How long delivery for this run may still be tried."""
        ends = [self.give_up_at[run]] if run in self.give_up_at else []
        if self.ended_at is not None:
            ends.append(self.ended_at + LAST_SECONDS)
        return min(ends) - time.monotonic() if ends else float("inf")

    def _read(self) -> None:
        for line in self._stream:
            if not line.endswith(b"\n"):
                break  # the writer was killed in the middle of it
            message = json.loads(line)
            self._any_run = self._any_run or message["op"] in ("start", "open")
            if message["op"] == "finish":
                self.give_up_at[message["run"]] = time.monotonic() + message["seconds"]
            self.messages.put(message)
        self._end()

    def _watch_parent(self, parent: int) -> None:
        # A worker that the training process forked holds the pipe open when its parent is killed.
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(0.5)  # what is still in the pipe
        self._end()

    def _end(self) -> None:
        if not self._any_run:
            os._exit(0)
        if self.ended_at is None:
            self.ended_at = time.monotonic()
            self.messages.put(None)


@dataclass
class OpenRun:
    """A run that was started, or opened again, and not yet finished."""

    number: int
    client: Any  # mlflow.MlflowClient
    tracking_uri: str
    run_id: str
    experiment_id: str
    artifact_dir: Path | None
    is_ours: bool  # started here: its status and its provenance are ours to record
    stop_sampling: Callable[[], None] = lambda: None
    has_documents: bool = False
    early_samples: Rows | None = field(default_factory=list)  # None: they wait no longer
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    oldest: float = 0.0
    away: str | None = None  # why the store cannot be reached just now
    gave_up: bool = False
    undelivered: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Delivery:
    """Takes the messages one by one and brings them to the store."""

    def __init__(self, inbox: Inbox, answers: IO[str]) -> None:
        self.inbox = inbox
        self.answers = answers
        self.stores = Stores()
        self.runs: dict[int, OpenRun] = {}
        self.tags: dict[str, str] = {}
        self.tags_known = threading.Event()
        self.documents: dict[str, bytes] = {}  # artifacts of every run that is started, by path
        self.documents_known = threading.Event()
        self.any_start = threading.Event()

    def serve(self) -> None:
        while (message := self._next()) is not None:
            try:
                self._handle(message)
            except Exception as error:  # a fault of ours in one record must not lose the others
                self._note(message, f"{type(error).__name__}: {error}")
        for run in list(self.runs.values()):
            self._end_run(run, "KILLED", int(1000 * time.time()))

    def _next(self) -> dict[str, Any] | None:
        """The next message; sends metrics that have waited long enough meanwhile."""
        while True:
            waiting = [run for run in self.runs.values() if run.metrics]
            if not waiting:
                return self.inbox.messages.get()
            due = min(run.oldest for run in waiting) + BATCH_SECONDS
            try:
                return self.inbox.messages.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                for run in waiting:
                    self._flush(run)

    def _handle(self, message: dict[str, Any]) -> None:
        operation = message["op"]
        if operation == "hello":
            threading.Thread(target=self._collect, args=(message,), daemon=True).start()
            preload()
            return
        if operation in ("start", "open"):
            if self.inbox.ended_at is None:  # else there is nobody left to run it
                self._start(message) if operation == "start" else self._open(message)
            return
        if operation == "documents":
            for started in self.runs.values():
                self._log_documents(started)
            return
        run = self.runs.get(message["run"])
        if run is None:  # was refused
            return
        client, run_id = run.client, run.run_id
        match operation:
            case "sample":
                self._take_sample(run, message["rows"])
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
                send = partial(client.log_inputs, run_id, datasets=inputs)
                self._deliver(run, "dataset", len(inputs), send)
            case "model":
                self._log_model(run, message)
            case "flush":
                self._flush(run)
                self._settle(run, message["ticket"])
            case "finish":
                self._end_run(run, message["status"], message["ended"])
                self._settle(run, message["ticket"])

    def _collect(self, message: dict[str, Any]) -> None:
        folder, command = self.stores.root, message["command"]
        with contextlib.suppress(Exception):  # or every run would wait for it in vain
            self.tags = tag_texts(provenance.collect(command, message["script"], folder))
        self.tags_known.set()
        commit = self.tags.get("mlflow.source.git.commit")
        documents: dict[str, bytes | None] = {}
        with contextlib.suppress(Exception):
            if commit is not None and self.tags.get("git.clean") == "false":
                # The page previews .txt, and neither .patch nor .diff.
                documents["code/uncommitted.patch.txt"] = uncommitted_patch(folder, commit)
        # git works in processes of its own; what follows would slow down the first start.
        self.any_start.wait()
        with contextlib.suppress(Exception):
            documents["environment/requirements.txt"] = environment.requirements().encode()
        with contextlib.suppress(Exception):
            documents["environment/machine.yaml"] = environment.machine().encode()
        line = provenance.command_line(command)
        documents["environment/command.txt"] = line.encode() if len(line) > MAX_TAG else None
        self.documents = {path: text for path, text in documents.items() if text is not None}
        self.documents_known.set()
        self.inbox.messages.put({"op": "documents"})

    # ---- one kind of record each ------------------------------------------------------------

    def _start(self, message: dict[str, Any]) -> None:
        number, uri = message["run"], message["tracking_uri"]
        client = created = None
        try:
            client, experiment_id = self.stores.experiment(uri, message["experiment"])
            self.tags_known.wait()
            created = client.create_run(
                experiment_id,
                start_time=message["started"],
                tags=self.tags | message["tags"],
                run_name=message["run_name"],
            )
            run_id = created.info.run_id
            client.log_batch(run_id, params=_entities("Param", message["params"]))
            folder = _local_folder(created.info.artifact_uri, uri)
        except Exception as error:
            if client is not None and created is not None:
                with contextlib.suppress(Exception):  # the first error tells what is wrong
                    client.set_terminated(created.info.run_id, "FAILED")
            self._answer(number, "refused", message=explain(error, uri))
            return
        run = OpenRun(number, client, uri, run_id, experiment_id, folder, is_ours=True)
        self._answer_started(run, created.info.run_name, message["experiment"])
        self.any_start.set()
        if message["log_system_metrics"]:
            run.stop_sampling = start_sampling(partial(self._put_sample, number))
        self._log_documents(run)

    def _open(self, message: dict[str, Any]) -> None:
        uri, run_id = message["tracking_uri"], message["run_id"]
        try:
            client = self.stores.client(uri)
            info = _find_run(client, uri, run_id).info
            experiment = client.get_experiment(info.experiment_id).name
            folder = _local_folder(info.artifact_uri, uri)
        except Exception as error:
            self._answer(message["run"], "refused", message=explain(error, uri))
            return
        place = (uri, run_id, info.experiment_id, folder)
        run = OpenRun(message["run"], client, *place, is_ours=False)
        self._answer_started(run, info.run_name, experiment)

    def _answer_started(self, run: OpenRun, run_name: str, experiment: str) -> None:
        self.runs[run.number] = run
        self._answer(
            run.number,
            "started",
            run_id=run.run_id,
            experiment_id=run.experiment_id,
            run_name=run_name,
            artifact_dir=None if run.artifact_dir is None else str(run.artifact_dir),
            experiment=experiment,
        )

    def _put_sample(self, number: int, rows: Rows) -> None:
        self.inbox.messages.put({"op": "sample", "run": number, "rows": rows})

    def _take_sample(self, run: OpenRun, rows: Rows) -> None:
        if not rows:
            return
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

    def _log_documents(self, run: OpenRun) -> None:
        """The files of the provenance, once they are collected and once for each run."""
        if run.has_documents or not run.is_ours or not self.documents_known.is_set():
            return
        run.has_documents = True
        send = partial(_send_files, run.client, run.run_id, self.documents)
        self._deliver(run, "file", len(self.documents), send)

    def _flush(self, run: OpenRun) -> None:
        from mlflow.entities import Metric

        while run.metrics:
            rows, run.metrics = run.metrics[:BATCH_METRICS], run.metrics[BATCH_METRICS:]
            metrics = [Metric(name, value, at, step) for name, value, step, at in rows]
            self._deliver(
                run, "metric", len(rows), partial(run.client.log_batch, run.run_id, metrics)
            )

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
        if run.artifact_dir is not None:
            target = run.artifact_dir / (folder or "") / source.name
            if target.exists() and target.samefile(source):
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
        texts = (message["params"], message["tags"])
        self._deliver(
            run,
            f"model {message['name']}",
            1,
            lambda: log_model(
                run.client,
                run.run_id,
                run.experiment_id,
                folder,
                message["name"],
                message["step"],
                message["metrics"],
                *texts,
            ),
        )

    def _end_run(self, run: OpenRun, status: str, ended: int) -> None:
        run.stop_sampling()
        self._take_metrics(run, [])
        self._flush(run)
        if run.is_ours:
            left = self.inbox.seconds_left(run.number)
            self.documents_known.wait(max(0.0, min(DOCUMENT_SECONDS, left)))
            self._log_documents(run)
            end = partial(run.client.set_terminated, run.run_id, status, end_time=ended)
            self._deliver(run, f"status {status}", 1, end)
        del self.runs[run.number]
        self.inbox.give_up_at.pop(run.number, None)

    # ---- delivery ---------------------------------------------------------------------------

    def _deliver(self, run: OpenRun, what: str, count: int, send: Callable[[], Any]) -> None:
        """Send until the store has answered, or until there is no time left for this run."""
        while not run.gave_up:
            try:
                send()
            except Exception as error:
                reason = explain(error, run.tracking_uri)
                if not may_pass(error, run.tracking_uri):
                    run.problems.append(f"{_amount(count, what)} refused: {reason}")
                    return
                if run.away is None:
                    self._answer(run.number, "away", message=reason)
                run.away = reason
                left = self.inbox.seconds_left(run.number)
                run.gave_up = left <= 0
                time.sleep(max(0.0, min(RETRY_SECONDS, left)))
            else:
                if run.away is not None:
                    self._answer(run.number, "back")
                run.away = None
                return
        run.undelivered[what] += count

    def _settle(self, run: OpenRun, ticket: int) -> None:
        problems, run.problems = run.problems, []
        if run.undelivered:
            amounts = ", ".join(_amount(count, what) for what, count in run.undelivered.items())
            problems.append(f"Undelivered from run {run.run_id}: {amounts}. {run.away}")
            run.undelivered.clear()
        if len(problems) > 5:
            problems[5:] = [f"And {len(problems) - 5} more."]
        self._answer(run.number, "settled", ticket=ticket, problems=problems)

    def _note(self, message: dict[str, Any], problem: str) -> None:
        run = self.runs.get(message.get("run", 0))
        if run is not None:
            run.problems.append(problem)
        if "ticket" in message:
            self._answer(message["run"], "settled", ticket=message["ticket"], problems=[problem])
        print(problem, file=sys.stderr)

    def _answer(self, run: int, event: str, **rest: Any) -> None:
        try:
            self.answers.write(json.dumps({"run": run, "event": event, **rest}) + "\n")
            self.answers.flush()
        except OSError:  # nobody listens any more
            pass


def _entities(kind: str, texts: dict[str, str]) -> list[Any]:
    import mlflow.entities

    return [getattr(mlflow.entities, kind)(name, value) for name, value in texts.items()]


def _find_run(client: Any, uri: str, run_id: str) -> Any:
    """The run as MLflow keeps it. TrackingError if it is not there, or was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackingError(f'There is no run "{run_id}" in {redact(uri)}.') from error
    if found.info.lifecycle_stage != "active":
        raise TrackingError(
            f"The run {run_id} was deleted from {redact(uri)}. Bring it back: mlflow runs restore "
            f"--run-id {run_id}"
        )
    return found


def _send_files(client: Any, run_id: str, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        client.log_artifacts(run_id, folder)


def _local_folder(artifact_uri: str, tracking_uri: str) -> Path | None:
    """The run's folder, made, if its files lie in this machine's file system."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if not is_local_uri(artifact_uri):
        return None
    folder = Path(local_file_uri_to_path(artifact_uri))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        if is_server(tracking_uri):
            return None  # a folder of the server's machine
        raise
    return folder


def _amount(count: int, what: str) -> str:
    return what if count == 1 and " " in what else f"{count} {what}{'s' if count != 1 else ''}"


def main() -> None:
    # Signals to the whole group are for the training process; this one ends with its pipe.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.disable()  # nobody reads it, and an outage would fill the disk with it
    # Answers get a stream of their own: MLflow prints to standard output on some occasions.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    Delivery(Inbox(sys.stdin.buffer), answers).serve()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and Python's own farewell to MLflow takes 0.2 s


if __name__ == "__main__":
    main()
