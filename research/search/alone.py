"""A trial on several devices, in a process of its own: `python -m research.search.alone TASK.json`.

Lightning starts the other processes of a training as copies of the first; of a warm worker it would
start workers.  So the worker starts this one, which trains one trial and ends.  They talk in lines
of JSON: up come {"begun": run id}, {"report": [value, step]}, {"ask": true} and at the end
{"outcome": ...}, down goes true or false for each question.  Only the worker asks Optuna.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from research.configuration.schema import Configuration
from research.data.kept import Kept
from research.processes.launch import is_rank_zero
from research.search.document import Search
from research.search.trial import SIGNALS, Judge, Outcome, Task, train, uri_of
from research.search.worker import separate_stdout
from research.tracking.run import Recorder


def is_alone(configuration: Configuration) -> bool:
    """True for settings that ask for several processes, or for a strategy that needs its own."""
    trainer = configuration.values.trainer
    return (
        trainer.num_nodes > 1
        or trainer.strategy != "auto"
        or asked_devices(trainer.devices, trainer.accelerator) > 1
    )


def asked_devices(devices: Any, accelerator: Any) -> int:
    """How many devices `trainer.devices` asks for on this machine."""
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        import torch

        on_gpu = accelerator in ("auto", "gpu", "cuda")
        return torch.cuda.device_count() if on_gpu and torch.cuda.is_available() else 1
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return int(devices)


# ---- the worker's end ----------------------------------------------------------------------------


def train_alone(task: Task, judge: Judge, on_begun: Callable[[str], None]) -> Outcome:
    """What `research.search.trial.train` returns and raises, of a trial in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(asdict(task)))
        with subprocess.Popen(
            [sys.executable, "-m", "research.search.alone", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes to the worker, which passes it on once
            text=True,
        ) as process:
            try:
                outcome = listen(process, judge, on_begun)
                code = process.wait()
            except BaseException:
                process.terminate()  # it saves its checkpoint, and then ends
                assert process.stdin is not None
                process.stdin.close()  # it may be waiting for an answer
                process.wait()
                raise
    if outcome is not None:
        return outcome
    if code in SIGNALS:
        return Outcome("STOPPED", reason=f"stopped by {signal.Signals(code - 128).name}")
    return Outcome("DIED", reason=f"its process ended with {ending(code)}")


def ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def listen(
    process: "subprocess.Popen[str]", judge: Judge, on_begun: Callable[[str], None]
) -> Outcome | None:
    """Do what the process says until it says no more; its outcome, if it came to one."""
    assert process.stdout is not None and process.stdin is not None
    outcome = None
    for line in process.stdout:
        if not line.endswith("\n"):
            break  # killed in the middle of it
        match json.loads(line):
            case {"begun": run_id}:
                on_begun(run_id)
            case {"report": [value, step]}:
                judge.report(value, step)
            case {"ask": _}:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(bool(judge.should_prune())) + "\n")
                    process.stdin.flush()
            case {"outcome": found}:
                outcome = Outcome(**found)
    return outcome


# ---- its own -------------------------------------------------------------------------------------


class Far:
    """The judge that is in the worker; without a worker no trial goes on."""

    def __init__(self, out: IO[str]) -> None:
        self.out = out
        self.answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in sys.stdin:
            self.answers.put(json.loads(line))
        os.kill(os.getpid(), signal.SIGINT)  # see worker.py
        self.answers.put(False)

    def say(self, **what: Any) -> None:
        with contextlib.suppress(OSError):  # the worker has died, and `listen` ends this one
            self.out.write(json.dumps(what) + "\n")
            self.out.flush()

    def report(self, value: float, step: int) -> None:
        self.say(report=[value, step])

    def should_prune(self) -> bool:
        self.say(ask=True)
        return self.answers.get()


class Silent:
    """The judge of the other processes, who ask nobody."""

    def report(self, value: float, step: int) -> None: ...

    def should_prune(self) -> bool:
        return False


def main() -> int:
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    search = Search.from_document(task.document)
    if not is_rank_zero():
        return 0 if train(task, search, Silent(), kept=Kept()).state != "FAIL" else 1
    signal.signal(signal.SIGINT, signal.default_int_handler)
    far = Far(separate_stdout())
    with contextlib.ExitStack() as stack:
        recorder = None
        if uri_of(task, None) is not None:
            recorder = stack.enter_context(Recorder.start())
        try:
            outcome = train(
                task, search, far, recorder, Kept(), lambda run_id: far.say(begun=run_id)
            )
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    far.say(outcome=asdict(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
