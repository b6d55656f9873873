"""The training process's line to the recorder process: it is started, written to, listened to.

What a run is told goes into a queue in memory; a thread appends it to the run's spool (spool.py)
and lets the recorder process know through a pipe, which never blocks, that there is more to read. A
run whose spool cannot be written sends its records through the pipe itself. If the recorder process
dies, a new one takes up where it had got to.

Standard library only: this is imported before torch.
"""

import collections
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from research.tracking.spool import Spool

# Records wait this long for company, so that a line written per step costs no thread switch per
# step. It is also the most that a `kill -9` can lose.
GATHER_SECONDS = 0.1
AGAIN_SECONDS = 1.0  # until a recorder process that did not listen is told again
RESTARTS = 3

logger = logging.getLogger(__name__)


class Companion:
    """The recorder process and the two threads that talk with it."""

    def __init__(self) -> None:
        self._end: str | None = None  # why nothing is delivered any more
        self._closing = False
        self._restarts = 0
        self._warned = False  # of a spool that cannot be written
        self._spools: dict[int, Spool] = {}  # by run; but for additions, the writer's
        self._untold: set[int] = set()  # runs with records that the process has not heard of
        self._outbox: collections.deque[Any] = collections.deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        command = ["python", *sys.orig_argv[1:]]
        self._hello = {"op": "hello", "command": command, "script": sys.argv[0]}
        self._launch()
        self._writer = threading.Thread(target=self._write, name="record-writer", daemon=True)
        self._writer.start()
        self._send(self._hello, hurry=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _hear(self, answer: dict[str, Any]) -> None:
        """What the recorder process says of a run."""
        raise NotImplementedError

    def _lose(self, reason: str, number: int | None = None) -> None:
        """Nothing more of this run, or of any, will be delivered from here."""
        raise NotImplementedError

    def _launch(self) -> None:
        self._process = subprocess.Popen(
            # -P: a file of the current folder must not stand in for a module of MLflow's.
            [sys.executable, "-P", "-m", "research.tracking.recorder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=quiet_environment(),
            start_new_session=True,  # Ctrl-C is for the training, which then ends its run itself
            bufsize=0,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # Windows before Python 3.12: it may block
            os.set_blocking(self._process.stdin.fileno(), False)
        self._reader = threading.Thread(
            target=self._read, args=(self._process,), name="record-reader", daemon=True
        )
        self._reader.start()

    def _shut(self, timeout: float, unused: bool) -> None:
        """End the process, which first delivers; waits `timeout` seconds for that."""
        self._closing = True
        if unused:
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

    # ---- the thread that writes ----------------------------------------------------------------

    def _send(self, message: Any, hurry: bool = False) -> None:
        self._outbox.append(message)
        if hurry:
            self._hurry.set()
        if not self._wake.is_set():
            self._wake.set()

    def _forget(self, number: int) -> None:
        """Nothing more is written to the run's spool, from when this returns."""
        self._ask("forget", number)

    def _write_out(self) -> None:
        """All that was sent until now is in the spools, from when this returns."""
        self._ask("write out")

    def _ask(self, what: str, number: int = 0) -> None:
        done = threading.Event()
        self._send({"op": what, "run": number, "done": done}, hurry=True)
        if not self._closing and threading.current_thread() is not self._reader:
            done.wait(1.0)

    def _write(self) -> None:
        last = False
        while not last:
            self._wake.wait(AGAIN_SECONDS if self._untold else None)
            self._hurry.wait(GATHER_SECONDS)
            # First clear, then take all: what comes in between sets them again.
            self._wake.clear()
            self._hurry.clear()
            messages, last = _taken(self._outbox)
            self._pass_on(messages)
        for spool in self._spools.values():
            spool.close()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _pass_on(self, messages: list[dict[str, Any]]) -> None:
        lines: dict[int, list[bytes]] = {}
        for message in messages:
            if message["op"] in ("forget", "died", "write out"):
                self._pass_on_lines(lines)
                lines = {}
                match message["op"]:
                    case "died":
                        self._replace_process(message["reason"])
                    case "forget":
                        self._drop(message)
                    case _:
                        message["done"].set()
                continue
            lines.setdefault(message.get("run", 0), []).append(json.dumps(message).encode() + b"\n")
        self._pass_on_lines(lines)
        for number in list(self._untold):
            self._tell(number, wait=False)
        if self._end is not None:
            for message in messages:
                if "ticket" in message:
                    self._lose(self._end, message["run"])

    def _pass_on_lines(self, lines: dict[int, list[bytes]]) -> None:
        for number, its in lines.items():
            spool = self._spools.get(number)
            if spool is not None and not spool.broken:
                try:
                    spool.append(b"".join(its))
                except OSError as error:
                    self._give_up_spool(number, spool, error)
                else:
                    self._untold.add(number)
                    continue
            self._put(b"".join(its), wait=True)

    def _drop(self, message: dict[str, Any]) -> None:
        self._untold.discard(message["run"])
        spool = self._spools.pop(message["run"], None)
        if spool is not None:
            spool.close()
        message["done"].set()

    def _give_up_spool(self, number: int, spool: Spool, error: OSError) -> None:
        spool.broken = True
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s cannot be written (%s). Records are delivered all the same, but are lost if "
                "the tracking store stays away or the recorder process dies.",
                spool.folder,
                error.strerror or error,
            )
        if number in self._untold:  # what it does hold comes first
            self._tell(number, wait=True)

    def _tell(self, number: int, wait: bool) -> None:
        """Let the process know that there is more to read."""
        self._untold.discard(number)
        spool = self._spools.get(number)
        if spool is None:
            return
        message = {"op": "more", "run": number, "folder": str(spool.folder)}
        if not self._put(json.dumps(message).encode() + b"\n", wait):
            self._untold.add(number)

    def _put(self, data: bytes, wait: bool) -> bool:
        """Into the pipe; False if it is full and should not be waited for."""
        assert self._process.stdin is not None
        pipe, rest = self._process.stdin.fileno(), memoryview(data)
        while rest:
            try:
                rest = rest[os.write(pipe, rest) :]
            except BlockingIOError:
                if not wait and len(rest) == len(data):
                    return False
                time.sleep(0.02)
            except OSError:
                return True  # the process is gone; `_read` finds out why
        return True

    def _replace_process(self, reason: str) -> None:
        """A new process goes on with the spools of the one that died."""
        self._restarts += 1
        try:
            if self._restarts > RESTARTS:
                raise OSError(f"{reason} It was started again {RESTARTS} times before.")
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._launch()
        except OSError as error:
            self._end = str(error)
            self._untold.clear()
            self._lose(self._end)
            return
        logger.warning("%s A new one goes on with what is not recorded yet.", reason)
        self._put(json.dumps(self._hello).encode() + b"\n", wait=True)
        for number, spool in self._spools.items():
            if spool.broken:
                self._lose(reason, number)
            else:
                self._untold.add(number)

    # ---- the thread that reads -----------------------------------------------------------------

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        pipe = process.stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                self._hear(json.loads(line))
        code = process.wait()
        if self._closing:
            self._end = "The recorder was closed."
            self._lose(self._end)
            self._outbox.clear()
            self._outbox.append(None)  # `close` may have put its own there before the line above
            self._wake.set()
            return
        self._errors.seek(0)
        words = self._errors.read()[-2000:].decode(errors="replace").strip()
        reason = (
            f"The recorder process ended (exit code {code}); its last words: {words or 'none'}."
        )
        self._send({"op": "died", "reason": reason}, hurry=True)


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


def quiet_environment() -> dict[str, str]:
    """The environment of the companion: finds this package, stays quiet, takes one core."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    mine = {
        "PYTHONPATH": package if not path else package + os.pathsep + path,
        "PYTHONWARNINGS": "ignore",
    }
    return PATIENCE | dict(os.environ) | threads | mine | QUIET


# A server that is away must be noticed in seconds; whoever delivers tries again by itself, where
# MLflow's own seven retries of up to two minutes each would hold everything up.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
