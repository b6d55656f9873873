"""Does again the step whose loss was NaN or infinite, and tells where that came from.

    python -m research.replay RUN [--tracking_uri URI]

`HELP` below is what `--help` prints; torch is imported only to replay. The training data are not
needed: the run kept the batch, with weights, optimizer and random state as they were before it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from research.command import exit_code_of, run_as_script
from research.configuration.compose import ConfigurationError

HELP = """\
python -m research.replay RUN [--tracking_uri URI]

Do the step again at which a run stopped because its loss was NaN or infinite: forward and backward
with the same batch, weights, optimizer and random numbers, in the same precision. Each layer is
told with its largest output, weight and gradient, and the first whose output is not finite.

  RUN                    a run's id, the first 4 or more digits of it, its name, or a step.pt file
  --tracking_uri URI     where the run is (else MLFLOW_TRACKING_URI, mlflow.db)

The exit code is 0 if the loss is what it was, 1 if it is not. Nothing is recorded.

Examples
  python -m research.replay my-run
  python -m research.replay checkpoints/my-run/step.pt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s, or 1 for another loss."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code_of(lambda: run(typed))


def run(arguments: Sequence[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(HELP, end="")
        return 0
    text, tracking_uri = read_arguments(arguments)
    title, path = find_step(text, tracking_uri)
    from research.diagnosis import is_reproduced, read_step, replay, report

    step = read_step(path)
    diagnosis = replay(step)
    print(report(step, diagnosis, title))
    return 0 if is_reproduced(step, diagnosis) else 1


def read_arguments(arguments: Sequence[str]) -> tuple[str, str | None]:
    """The run and the address of the store; ConfigurationError for what is missing or unknown."""
    parser = Parser(prog="research.replay", add_help=False, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--tracking_uri")
    typed = parser.parse_args(arguments)
    return typed.run, typed.tracking_uri


class Parser(argparse.ArgumentParser):
    """Tells a mistake as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See python -m research.replay --help.")


def find_step(text: str, tracking_uri: str | None) -> tuple[str, Path]:
    """What to call the step's run, and the step's file; ConfigurationError where none was kept."""
    if text.endswith(".pt") or Path(text).is_file():
        return text, Path(text)
    from research.nonfinite import STEP_FILE
    from research.tracking.runs import find_run
    from research.tracking.store import resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri)
    if uri is None:
        raise ConfigurationError("tracking_uri is empty, so there is no store to find a run in.")
    run = find_run(uri, text)
    folder, _, _ = STEP_FILE.partition("/")
    if STEP_FILE not in run.files(folder):
        raise ConfigurationError(
            f"{run.described()} has kept no step: its loss never was NaN or infinite in training, "
            "or it was told to go on (non_finite_loss: ignore)."
        )
    return run.described(), run.file(STEP_FILE)


if __name__ == "__main__":
    run_as_script(main)
