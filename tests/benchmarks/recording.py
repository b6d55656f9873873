"""What recording costs a training: the same run with all of it and with none, in turn.

    python -m tests.benchmarks.recording [--pairs N] [--key value ...]

The row recording of `nox -s benchmark` is an account; this command goes further. First an account
of one recorded run: the share of the training's own processor time that goes into measuring
gradients, handing records over and drawing the first batch, and how busy the companion process
keeps a core meanwhile; a busy machine changes neither much. Then, for each pair, the seconds spent
training with everything recorded over those with nothing recorded and nothing measured (no gradient
norms either), and the seconds that pictures, model and figures take when the training is over.
Pairs alternate which comes first, and one process runs them all, so that a busy machine is busy for
both; the ratios still scatter with its load.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import psutil
from lightning.pytorch import Callback

from research.configuration.schema import resolve
from research.dynamics import Dynamics
from research.recording.album import FirstBatch
from research.tracking.logger import RecordLogger
from research.tracking.run import Recorder
from research.training import Result, fit
from tests.benchmarks.ratios import Asked, Round, Row, Target
from tests.benchmarks.training import configured, quietly


class Stopwatch(Callback):
    """`training`: seconds of all epochs, validation included, pictures of the first look not."""

    def __init__(self) -> None:
        self.training = self.started = 0.0

    def on_train_epoch_start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        self.training += time.perf_counter() - self.started


def run(arguments: list[str], recorder: Recorder | None) -> tuple[float, Result]:
    """Seconds in training, and the result; `recorder` None records and measures nothing."""
    stopwatch = Stopwatch()
    quiet = ["--trainer.enable_progress_bar", "false"]
    if recorder is not None:
        result = fit(resolve([*arguments, *quiet]), recorder, [stopwatch])
    else:
        configuration = resolve([*arguments, *quiet, "--tracking_uri", ""])
        with patch("research.training.Dynamics", Callback):
            result = fit(configuration, None, [stopwatch])
    return stopwatch.training, result


@contextlib.contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Adds the processor seconds of all that recording does on the training's thread to `spent`."""
    hooks: list[tuple[type, str]] = [
        (Dynamics, name) for name in vars(Dynamics) if name.startswith("on_")
    ]
    hooks += [(FirstBatch, "on_train_batch_start"), (RecordLogger, "log_metrics")]
    with contextlib.ExitStack() as stack:
        for owner, name in hooks:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), spent)))
        yield


def timed(hook: Callable[..., None], spent: dict[str, float]) -> Callable[..., None]:
    def measure(self: object, *args: object, **kwargs: object) -> None:
        started = time.thread_time()
        hook(self, *args, **kwargs)
        name = type(self).__name__
        spent[name] = spent.get(name, 0.0) + time.thread_time() - started

    return measure


class Account(Callback):
    """`seconds` of the training's thread, `busy` of the companion, over `wall` seconds.

    `of_process`: processor seconds of the training's process, all of its threads.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.companion = psutil.Process(recorder.pid)
        self.seconds = self.of_process = self.busy = self.wall = 0.0

    def add(self, sign: int) -> None:
        self.seconds += sign * time.thread_time()
        self.of_process += sign * time.process_time()
        self.wall += sign * time.perf_counter()
        times = self.companion.cpu_times()
        self.busy += sign * (times.user + times.system)

    def on_train_epoch_start(self, *_: object) -> None:
        self.add(-1)

    def on_train_epoch_end(self, *_: object) -> None:
        self.add(+1)


def print_account(arguments: list[str], recorder: Recorder) -> None:
    account, spent = Account(recorder), dict[str, float]()
    with watched(spent):
        fit(resolve([*arguments, "--trainer.enable_progress_bar", "false"]), recorder, [account])
    for name, seconds in spent.items():
        print(f"{name}: {seconds / account.seconds:.3%} of the training's processor time")
    print(
        f"together {sum(spent.values()) / account.seconds:.3%}; the companion keeps a core "
        f"{account.busy / account.wall:.2%} busy, over {account.wall:.0f} s of training",
        flush=True,
    )


def cost_of_recording(asked: Asked) -> Iterator[Round]:
    """1 and what recording adds: shares of processor time, which a busy machine hardly changes.

    Of the training's thread, what all that measures and records takes; of the processor time of
    the training's process, what the companion process takes beside it.
    """
    configuration = configured(64, "cpu", asked)
    with Recorder.start() as recorder:
        for _ in range(asked.rounds):
            account, spent = Account(recorder), dict[str, float]()
            with watched(spent):
                quietly(configuration, recorder, [account], asked)
            own, beside = sum(spent.values()) / account.seconds, account.busy / account.of_process
            parts = ", ".join(f"{name} {1000 * took:.0f} ms" for name, took in spent.items())
            yield Round(
                1 + own + beside,
                f"{own:.2%} of the training's thread ({parts}), and {beside:.2%} of its "
                f"process beside it; {account.wall:.0f} s of training",
            )
    asked.notes.append("shares of processor time, batch 64; a difference of seconds would be noise")


ROWS = [
    Row(
        name="recording",
        what="processor time of a training, CNN, everything recorded",
        against="without what measures and records",
        target=Target("at most", 1.02),
        measure=cost_of_recording,
    )
]


def main(arguments: list[str]) -> None:
    pairs = 5
    if "--pairs" in arguments:
        at = arguments.index("--pairs")
        pairs, arguments = int(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    with tempfile.TemporaryDirectory() as folder, Recorder.start() as recorder:
        arguments = [*arguments, "--trainer.default_root_dir", folder]
        recorded = [*arguments, "--tracking_uri", f"sqlite:///{Path(folder)}/mlflow.db"]
        run(recorded, recorder)  # imports, caches
        print_account(recorded, recorder)
        ratios = []
        for pair in range(pairs):
            seconds = {}
            for with_it in (True, False) if pair % 2 else (False, True):
                given = recorded if with_it else arguments
                seconds[with_it], result = run(given, recorder if with_it else None)
                if with_it:
                    after = result.seconds - seconds[True]
                else:
                    rest = result.seconds - seconds[False]
            ratios.append(seconds[True] / seconds[False])
            print(
                f"pair {pair + 1}: {seconds[False]:.1f} s of training without, "
                f"{seconds[True]:.1f} s with, ratio {ratios[-1]:.4f}; "
                f"{after - rest:+.1f} s before and after it",
                flush=True,
            )
    if ratios:
        print(
            f"ratio: median {statistics.median(ratios):.4f}, "
            f"{min(ratios):.4f} to {max(ratios):.4f} over {pairs} pairs"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
