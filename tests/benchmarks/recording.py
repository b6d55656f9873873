"""What recording costs a training: the same run with all of it and with none, in turn.

    python -m tests.benchmarks.recording [--pairs N] [--key value ...]

Prints, for each pair, the seconds spent training with everything recorded over those with nothing
recorded and nothing measured (no gradient norms either), and the seconds that pictures, model and
figures take when the training is over.  Pairs alternate which comes first, and one process runs
them all, so that a busy machine is busy for both.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from lightning.pytorch import Callback

from research.configuration.schema import resolve
from research.tracking.run import Recorder
from research.training import Result, fit


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


def main(arguments: list[str]) -> None:
    pairs = 5
    if "--pairs" in arguments:
        at = arguments.index("--pairs")
        pairs, arguments = int(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    with tempfile.TemporaryDirectory() as folder, Recorder.start() as recorder:
        arguments = [*arguments, "--trainer.default_root_dir", folder]
        recorded = [*arguments, "--tracking_uri", f"sqlite:///{Path(folder)}/mlflow.db"]
        run(recorded, recorder)  # imports, caches
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
    print(
        f"ratio: median {statistics.median(ratios):.4f}, "
        f"{min(ratios):.4f} to {max(ratios):.4f} over {pairs} pairs"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
