"""Does again the step whose loss was NaN or infinite, and tells where that came from.

    python -m research.replay RUN [--tracking_uri URI]

`HELP` below is what `--help` prints; torch is imported only to replay. The training data are not
needed: the run kept the batch, with weights, optimizer and random state as they were before it.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from research.command import run_as_script, run_or_help
from research.configuration.compose import ConfigurationError

if TYPE_CHECKING:
    from research.faults.diagnosis import Diagnosis, Extent, Step

HELP = """\
python -m research.replay RUN [--tracking_uri URI]

Do the step again at which a run stopped because its loss was NaN or infinite: forward and backward
with the same batch, weights, optimizer and random numbers, in the same precision. Each layer is
told with its largest output, weight and gradient, and the first whose output is not finite.

  RUN                    a run's id, the first 4 or more digits of it, its name, or a step.pt file
  --tracking_uri URI     where the run is (else MLFLOW_TRACKING_URI, mlflow.db)
  --trust                let a step.pt, or a run on a server, name classes from anywhere

The exit code is 0 if the loss is what it was, 1 if it is not. Nothing is recorded.

Examples
  python -m research.replay my-run
  python -m research.replay checkpoints/my-run/step.pt
"""


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    run: str
    tracking_uri: str | None
    trust: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s, or 1 for another loss."""
    return run_or_help(run, HELP, arguments)


def run(arguments: Sequence[str]) -> int:
    asked = read_arguments(arguments)
    title, path, is_own = find_step(asked.run, asked.tracking_uri)
    from research.faults.diagnosis import is_reproduced, read_step, replay

    step = read_step(path, trust=asked.trust or is_own)
    diagnosis = replay(step)
    print(report(step, diagnosis, title))
    return 0 if is_reproduced(step, diagnosis) else 1


def read_arguments(arguments: Sequence[str]) -> Asked:
    """ConfigurationError for what is missing or unknown."""
    parser = Parser(prog="research.replay", add_help=False, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--tracking_uri")
    parser.add_argument("--trust", action="store_true")
    return Asked(**vars(parser.parse_args(arguments)))


class Parser(argparse.ArgumentParser):
    """Tells a mistake as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See python -m research.replay --help.")


def find_step(text: str, tracking_uri: str | None) -> tuple[str, Path, bool]:
    """What to call the step's run, the step's file, and whether the run is this project's own.

    ConfigurationError where none was kept.
    """
    if text.endswith(".pt") or Path(text).is_file():
        return text, Path(text), False
    from research.checkpoints.trained import is_own_store
    from research.faults.nonfinite import STEP_FILE
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
    return run.described(), run.file(STEP_FILE), is_own_store(uri)


# ---- the report ----------------------------------------------------------------------------------


def report(step: "Step", diagnosis: "Diagnosis", title: str) -> str:
    """The step in words and a table: which, then and now, each layer, and what that suggests."""
    from research.faults.diagnosis import differences, is_reproduced, suggest

    content = step.content
    again = is_reproduced(step, diagnosis)
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(content["learning_rates"]))
    lines = [
        f"{title}, step {content['global_step'] + 1} (epoch {content['epoch'] + 1}, batch "
        f"{content['batch_idx'] + 1}), learning rate {rates}, {content['precision']}",
        f"  {'':<12}{'then':>12}{'now':>12}",
        f"  {'loss':<12}{content['loss']:>12.6g}{diagnosis.loss:>12.6g}  "
        f"{'the same' if again else 'not the same'}",
    ]
    if max(content["evaluation"], diagnosis.evaluation) > 1:
        then, now = content["evaluation"], diagnosis.evaluation
        lines.append(f"  {'evaluation':<12}{then:>12}{now:>12}  of the batch within the step")
    lines += [f"  {describe_batch(step)}", ""]
    lines += [*layer_table(diagnosis), "", suggest(step, diagnosis)]
    others = differences(step, diagnosis)
    if others:
        lines.append(f"Not as in the run: {'; '.join(others)}.")
    return "\n".join(lines)


def describe_batch(step: "Step") -> str:
    images, labels = step.content["images"], step.content["labels"]
    finite = images[images.isfinite()]
    span = f"{finite.min():.3g} to {finite.max():.3g}" if len(finite) else "no number at all"
    bad = 1 - len(finite) / images.numel()
    told = f"{bad:.1%} not finite" if bad else "all finite"
    size = "x".join(str(length) for length in images.shape[1:])
    return (
        f"{len(images)} pictures of {size}, {span}, {told}; labels "
        f"{labels.min()} to {labels.max()} of {step.checkpoint.pictures.num_classes} classes"
    )


def layer_table(diagnosis: "Diagnosis") -> list[str]:
    """A line for each layer in the order of their calls, an arrow at the first that went wrong."""
    head = ["layer", "", "largest output", "not finite", "largest weight", "largest gradient"]
    rows = [head]
    for layer in diagnosis.layers:
        share = "" if layer.output is None else f"{layer.output.not_finite:.1%}"
        weight, gradient = magnitude(layer.weight), magnitude(layer.gradient)
        rows.append(
            [layer.name, layer.description, magnitude(layer.output), share, weight, gradient]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  "
        + "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if diagnosis.first is not None:
        lines[1 + diagnosis.layers.index(diagnosis.first)] += "  <- the first"
    return lines


def magnitude(extent: "Extent | None") -> str:
    """The largest finite magnitude."""
    if extent is None:
        return ""
    return "not finite" if math.isnan(extent.largest) else f"{extent.largest:.3g}"


if __name__ == "__main__":
    run_as_script(main)
