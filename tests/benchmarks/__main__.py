"""The table of what things cost here: `nox -s benchmark`, or

    python -m tests.benchmarks [ROW ...] [--json FILE] [--rounds N] [--list]

ROW is a row's name or the first part of several (`fit` is fit-64 and fit-512); without one all are
taken, which is about 25 minutes on two cores that have nothing else to do.  The table goes to
standard output, and after every row to FILE; standard error has a line for each round.  The
pictures are JPEG CIFAR-10 where data/cifar10-images is, else drawn ones.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.benchmarks import (
    airbench,
    arithmetic,
    batches,
    gpu,
    peak_memory,
    recording,
    startup,
    training,
    usual,
)
from tests.benchmarks.machine import this_machine
from tests.benchmarks.ratios import PROJECT, Asked, Table, chosen, measure

ROWS = [
    *(training.ROWS + usual.ROWS + batches.ROWS + arithmetic.ROWS + startup.ROWS),
    *(peak_memory.ROWS + recording.ROWS + gpu.ROWS + airbench.ROWS),
]
ROWS.sort(key=lambda row: row.on_gpu)
JPEG = PROJECT / "data" / "cifar10-images"
WIDTH = 150  # where the output goes to a file


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a row failed by a fault of the code, not by its figure."""
    asked = read(arguments)
    if asked.list:
        for row in ROWS:
            target = "report" if row.target is None else str(row.target)
            print(f"{row.name:<16}{target:>8}  {row.what}  |  {row.against}")
        return 0
    described, data = pictures()
    table = Table(this_machine(described))
    common = Asked(asked.rounds or 0, Path(), data, asked.airbench)
    for row in chosen(ROWS, asked.rows):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            rounds = asked.rounds or row.rounds
            given = Asked(rounds, Path(folder), data, asked.airbench, common.kept)
            outcome = measure(row, given, table.machine, tell)
        tell(f"{row.name}: {outcome.verdict}, {outcome.seconds:.0f} s")
        table.outcomes.append(outcome)
        if asked.json is not None:
            table.write(asked.json)
    console = Console()
    table.print(console if console.is_terminal else Console(width=WIDTH))
    return int(any(outcome.failed is not None for outcome in table.outcomes))


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="What things cost here, as ratios."
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="a row's name, or its first part")
    parser.add_argument("--json", type=Path, help="a file for the table, written after every row")
    parser.add_argument("--rounds", type=int, help="of each row, instead of the row's own number")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--airbench", type=Path, help="airbench94_muon.py, for gpu-airbench")
    asked = parser.parse_args(arguments)
    if asked.rounds is not None and asked.rounds < 1:
        parser.error(f"--rounds is {asked.rounds}; it must be 1 or more")
    try:
        chosen(ROWS, asked.rows)
    except ValueError as error:
        parser.error(str(error))
    return asked


def pictures() -> tuple[str, list[str]]:
    """What the pictures are, in words, and the arguments of research.fit that choose them."""
    if JPEG.is_dir():
        return "JPEG CIFAR-10", ["--data", "ImageFolder", "--data.root", str(JPEG)]
    return "drawn (Synthetic)", ["--data", "Synthetic", "--data.num_train", "50000"]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
