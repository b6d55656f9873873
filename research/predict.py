"""Labels pictures with a recorded run: any picture, of any size or mode.

    python -m research.predict RUN PICTURE ... [--top N] [--json]

`HELP` below is what `--help` prints; torch is imported only to predict. The training data are not
needed: the checkpoint knows its classes, the size of its pictures and how they were normalised.
What is computed is what the recorded model computes when it is served.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from research.command import run_as_script, run_or_help
from research.configuration.compose import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from research.checkpoints.trained import Checkpoint

HELP = """\
python -m research.predict RUN PICTURE ... [--top N] [--json]

Label pictures with the best checkpoint of a recorded run.

  RUN                    a run's id, the first 4 or more digits of it, its name, or a .ckpt file
  PICTURE ...            picture files of any size and mode, and folders with all they hold
  --checkpoint NAME      best (where nothing is said), last, or the name of a file
  --top N                how many classes are told of each picture (3)
  --json                 a JSON array with the probability of every class instead of a table
  --tracking_uri URI     where the run is (else MLFLOW_TRACKING_URI, mlflow.db)
  --trust                let a file, or a run of another store, name classes from anywhere

Files that cannot be read are told on standard error and the others labelled; the exit code is
then 1.

Examples
  python -m research.predict my-run cat.jpg
  python -m research.predict 4f3a holiday/ --top 1
  python -m research.predict checkpoints/my-run/best.ckpt *.png --json > labels.json
"""

PICTURES_AT_ONCE = 256
FILES_AT_ONCE = 4096  # decoded on all cores; 12 MB of pictures of 32x32
# What is taken from a folder. A file that is named is tried whatever it is called.
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"),
    *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    run: str
    pictures: list[str]
    checkpoint: str | None
    top: int
    json: bool
    tracking_uri: str | None
    trust: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s."""
    return run_or_help(run, HELP, arguments)


def run(arguments: Sequence[str]) -> int:
    asked = read_arguments(arguments)
    files, faults = find_pictures(asked.pictures)
    for fault in faults:
        print(fault, file=sys.stderr)
    if not files:
        return 1
    from research.checkpoints.trained import find_checkpoint, is_own_store, read_checkpoint

    run, path = find_checkpoint(asked.run, asked.checkpoint, asked.tracking_uri)
    is_own = run is not None and is_own_store(run.tracking_uri)
    checkpoint = read_checkpoint(path, trust=asked.trust or is_own)
    names, labelled = checkpoint.pictures.class_names, []
    for file, answer in predict(checkpoint, files):
        if isinstance(answer, str):
            faults.append(answer)
            print(answer, file=sys.stderr)
        else:
            labelled.append((file, answer))
    if asked.json:
        print(json.dumps([as_entry(file, row, names) for file, row in labelled], indent=1))
    elif labelled:
        print(table(labelled, names, asked.top))
    return 1 if faults else 0


def read_arguments(arguments: Sequence[str]) -> Asked:
    """ConfigurationError for what is missing, unknown or out of range."""
    parser = Parser(prog="research.predict", add_help=False, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+")
    parser.add_argument("--checkpoint")
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tracking_uri")
    parser.add_argument("--trust", action="store_true")
    typed = parser.parse_intermixed_args(arguments)
    if typed.top < 1:
        raise ConfigurationError(f"top is {typed.top}; it must be 1 or more.")
    return Asked(**vars(typed))


class Parser(argparse.ArgumentParser):
    """Tells a mistake as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See python -m research.predict --help.")


# ---- pictures ------------------------------------------------------------------------------------


def find_pictures(places: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files named, those in the folders named (sorted, hidden ones left out), and faults."""
    files: list[str] = []
    faults = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            inside = [
                str(file)
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in SUFFIXES
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and file.is_file()
            ]
            files += inside
            if not inside:
                faults.append(f"{place} has no pictures in it.")
        elif path.exists():
            files.append(place)
        else:
            faults.append(f"{place} is not there.")
    return list(dict.fromkeys(files)), faults


def decode_each(files: Sequence[str], size: int) -> "Iterator[tuple[str, np.ndarray | str]]":
    """Each file with its picture (size, size, 3), or with a sentence on what is wrong with it."""
    from research.data.decoding import decode
    from research.data.module import DataError

    try:
        yield from zip(files, decode(files, size, resize=True), strict=True)
    except DataError as error:
        if len(files) == 1:
            yield files[0], f"{error}."
            return
        middle = len(files) // 2  # one of them is at fault: each half again
        yield from decode_each(files[:middle], size)
        yield from decode_each(files[middle:], size)


# ---- answers -------------------------------------------------------------------------------------


def predict(checkpoint: "Checkpoint", files: Sequence[str]) -> "Iterator[tuple[str, Tensor | str]]":
    """Each file with its probabilities (C,), or with a sentence on what is wrong with it."""
    import torch
    from tqdm import tqdm

    from research.checkpoints.trained import build_trained
    from research.recording.export import Deployable

    size = checkpoint.pictures.image_size
    model = Deployable(*build_trained(checkpoint), checkpoint.pictures.normalization, size)
    has_one = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if has_one else torch.device("cpu")
    model.to(device)
    bar = tqdm(total=len(files), desc="Labelling", unit="picture", disable=None, leave=False)
    with bar:
        for start in range(0, len(files), FILES_AT_ONCE):
            decoded = list(decode_each(files[start : start + FILES_AT_ONCE], size))
            good = [picture for _, picture in decoded if not isinstance(picture, str)]
            rows: list[Tensor] = []
            for first in range(0, len(good), PICTURES_AT_ONCE):
                batch = [torch.from_numpy(p) for p in good[first : first + PICTURES_AT_ONCE]]
                with torch.inference_mode():  # not around a yield: it would reach the caller
                    rows += model(torch.stack(batch).to(device)).cpu()
            answers = iter(rows)
            for file, picture in decoded:
                yield file, picture if isinstance(picture, str) else next(answers)
            bar.update(len(decoded))


def as_entry(file: str, row: "Tensor", names: Sequence[str]) -> dict[str, Any]:
    probabilities = dict(zip(names, row.tolist(), strict=True))
    label = names[int(row.argmax())]
    return {
        "file": file,
        "label": label,
        "probability": probabilities[label],
        "probabilities": probabilities,
    }


def table(labelled: "Sequence[tuple[str, Tensor]]", names: Sequence[str], top: int) -> str:
    """A line for each picture: file, label, its probability, and the next best classes."""
    lines = []
    for file, row in labelled:
        best = row.topk(min(top, len(names)))
        told = [(names[i], p) for p, i in zip(best.values.tolist(), best.indices, strict=True)]
        next_best = ", ".join(f"{name} {probability:.1%}" for name, probability in told[1:])
        lines.append([file, told[0][0], f"{told[0][1]:.1%}", next_best])
    heads = ["file", "label", "probability", "next best"]
    columns = 3 if top == 1 or len(names) == 1 else 4
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(columns)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if heads[i] == "probability" else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line[:columns], widths, strict=True))
        ).rstrip()
        for line in [heads, *lines]
    )


if __name__ == "__main__":
    run_as_script(main)
