"""The recorder process that owns MLflow: `python -m research.tracking.recorder`.

Standard input tells, as JSON lines, in which spool there is more to read (or brings the records
themselves, where a spool cannot be written), standard output takes the answers. companion.py is the
other end and documents neither: both ends of one protocol change together. When the input ends,
runs that were not finished become KILLED, and so does this process's work; what the store could not
take until then stays in its spool.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import IO, Any

from research.tracking import environment, heartbeat, provenance
from research.tracking.beginning import forget_its_end
from research.tracking.changes import uncommitted_patch
from research.tracking.delivery import Delivery, OpenRun, repeats_of
from research.tracking.limits import MAX_TAG, tag_texts
from research.tracking.monitoring import Rows, start_sampling
from research.tracking.opening import preload
from research.tracking.source import Source
from research.tracking.spool import DOCUMENTS, Spool

LAST_SECONDS = 30.0  # to deliver what is left when the training process is gone
DOCUMENT_SECONDS = 25.0  # for a run's end to wait: git and nvidia-smi may take 10 s each
CLEANING_SECONDS = 5.0  # for this process's end to wait: dead runs are being marked


class Inbox(Source):
    """What the training process sends, read ahead so that its pipe is never full."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self.parent = os.getppid()
        self._stream = stream
        self._any_run = False
        self._reading = threading.RLock()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch_parent, daemon=True).start()

    def put(self, message: dict[str, Any]) -> None:
        if message["op"] == "finish":
            self.give_up_at[message["run"]] = time.monotonic() + message["seconds"]
        super().put(message)

    def _read(self) -> None:
        for line in self._stream:
            if not line.endswith(b"\n"):
                break  # the writer was killed in the middle of it
            message = json.loads(line)
            self._any_run = self._any_run or "run" in message
            if message["op"] == "more":
                self._read_spool(message["run"], Spool(Path(message["folder"])))
            else:
                self.put(message)
        self._end()

    def _read_spool(self, number: int, spool: Spool) -> None:
        # A run that was refused has none any more.
        with self._reading, contextlib.suppress(OSError):
            self.read(number, spool)

    def _watch_parent(self) -> None:
        # A worker that the training process forked holds the pipe open when its parent is killed.
        while os.getppid() == self.parent:
            time.sleep(1.0)
        time.sleep(0.5)  # what is still in the pipe
        self._end()

    def _end(self) -> None:
        if not self._any_run:
            os._exit(0)
        with self._reading:
            if self.deadline is None:
                for number, spool in list(self.spools.items()):
                    self._read_spool(number, spool)  # what it could not tell us any more
                self.deadline = time.monotonic() + LAST_SECONDS
                self.messages.put(None)


class Recording(Delivery):
    """Delivery for a training process that is there: with answers, provenance, signs of life."""

    def __init__(self, inbox: Inbox, answers: IO[str]) -> None:
        super().__init__(inbox)
        self.parent = inbox.parent
        self.answers = answers
        self.tags: dict[str, str] = {}
        self.tags_known = threading.Event()
        self.documents: dict[str, bytes] = {}  # artifacts of every run that is started, by path
        self.documents_known = threading.Event()
        self.any_start = threading.Event()
        self.cleaners: dict[str, threading.Thread] = {}  # by store

    def serve(self) -> None:
        super().serve()
        for cleaner in self.cleaners.values():
            cleaner.join(CLEANING_SECONDS)

    def handle(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "hello":
                threading.Thread(target=self._collect, args=(message,), daemon=True).start()
                threading.Thread(target=self._beat, daemon=True).start()
                preload()
            case "documents":
                for run in self.runs.values():
                    if self.documents_known.is_set():
                        self._log_documents(run)
            case "beat":
                for run in self.runs.values():
                    self._send_beat(run)
            case _:
                super().handle(message)

    def answer(self, number: int, event: str, **rest: Any) -> None:
        try:
            self.answers.write(json.dumps({"run": number, "event": event, **rest}) + "\n")
            self.answers.flush()
        except OSError:  # nobody listens any more
            pass

    def note(self, message: dict[str, Any], problem: str) -> None:
        super().note(message, problem)
        if "ticket" in message:
            self._answer_settled(message, [problem], [], None)
        print(problem, file=sys.stderr)

    # ---- provenance ----------------------------------------------------------------------------

    def tags_at_start(self, message: dict[str, Any]) -> dict[str, str]:
        """Provenance for a new run, none for one that goes on; and who records it from now on."""
        beat: dict[str, str] = {}
        with contextlib.suppress(Exception):
            beat = heartbeat.first_beat(self.parent)
        if message["op"] != "start":
            return beat
        self.tags_known.wait()
        return self.tags | beat

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
        self.source.put({"op": "documents"})

    def log_documents(self, run: OpenRun) -> None:
        left = self.source.seconds_left(run.number)
        self.documents_known.wait(max(0.0, min(DOCUMENT_SECONDS, left)))
        if self.documents_known.is_set():
            self._log_documents(run)

    def _log_documents(self, run: OpenRun) -> None:
        """The files of the provenance, once they are collected and once for each run."""
        if run.has_documents or not run.about.is_ours:
            return
        run.has_documents = True
        folder = None
        if run.spool is not None:
            with contextlib.suppress(OSError):  # a full disk
                folder = _write_files(run.spool.folder / DOCUMENTS, self.documents)
        if folder is not None:
            self.send_documents(run, folder)
            return
        with tempfile.TemporaryDirectory() as temporary:
            self.send_documents(run, _write_files(Path(temporary), self.documents))

    # ---- what a run has while it is recorded ---------------------------------------------------

    def has_begun(self, run: OpenRun) -> None:
        number, about = run.number, run.about
        if about.is_ours:
            self.any_start.set()
            if about.log_system_metrics:
                put = partial(self._put_sample, number)
                run.stop_sampling = start_sampling(put, self._first_sample(run))
            if self.documents_known.is_set():
                self._log_documents(run)
        if about.tracking_uri not in self.cleaners:
            cleaner = threading.Thread(target=_clean, args=(run,), daemon=True)
            self.cleaners[about.tracking_uri] = cleaner
            cleaner.start()

    def _first_sample(self, run: OpenRun) -> int:
        if run.about.resumed:
            with contextlib.suppress(Exception):  # else they begin at 0 once more
                run.repeats = run.repeats or repeats_of(run)
                return max(run.next_sample, run.repeats.next_system_step)
        return run.next_sample

    def _put_sample(self, number: int, rows: Rows) -> None:
        self.source.put({"op": "sample", "run": number, "rows": rows})

    def _beat(self) -> None:
        while True:
            time.sleep(heartbeat.BEAT_SECONDS)
            self.source.put({"op": "beat"})

    def _send_beat(self, run: OpenRun) -> None:
        """Tried once: the next one comes soon, and an outage is noticed by other records."""
        if run.about.is_ours and run.away is None:
            with contextlib.suppress(Exception):
                for name, value in heartbeat.beat().items():
                    run.client.set_tag(run.run_id, name, value)
                # In an outage another machine heard nothing of it, and may have called it dead.
                if forget_its_end(run.client, run.run_id):
                    run.client.update_run(run.run_id, status="RUNNING")


def _clean(run: OpenRun) -> None:
    """Mark runs of the store as KILLED whose process is dead."""
    with contextlib.suppress(Exception):
        heartbeat.end_dead_runs(run.client, run.about.tracking_uri)


def _write_files(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    folder.mkdir(exist_ok=True)
    return folder


def main() -> None:
    # Signals to the whole group are for the training process; this one ends with its pipe.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.disable()  # nobody reads it, and an outage would fill the disk with it
    # Answers get a stream of their own: MLflow prints to standard output on some occasions.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    Recording(Inbox(sys.stdin.buffer), answers).serve()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and Python's own farewell to MLflow takes 0.2 s


if __name__ == "__main__":
    main()
