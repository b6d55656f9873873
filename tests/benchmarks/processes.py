"""What several processes cost on one machine's cores: two with a thread each against one with two.

    python -m tests.benchmarks.processes [--rounds N] [--steps N] [--json FILE]

The same two cores, the same global batch, the same CNN and pictures, and our own `fit` with nothing
recorded; only who shares the work differs: threads inside each operation, or two processes of
DistributedDataParallel (gloo) with half of each batch.  So a ratio of 1 is a split for free, and
what is below is the overhead of DDP.  One process with one thread stands beside them: what a second
core brings at all.  A last row has the seconds of the gradients' all-reduce alone.

All processes are started once and wait for their turn.  Each round takes the three one after the
other, every second one backwards, so that a busy machine is busy for all; a ratio is taken within
its round, and the table has the median and the range over rounds.  About 3 minutes (5 rounds).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch

from research.configuration.schema import resolve
from research.networks import CNN
from research.tracking.environment import cpu_model
from research.training import fit
from tests.launched import start

BATCH_SIZES = (64, 512)
# Processes and threads of each.
LAYOUTS = {"1 x 2 threads": (1, 2), "2 x 1 thread": (2, 1), "1 x 1 thread": (1, 1)}
ONE, TWO, SINGLE = LAYOUTS
QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--tracking_uri", ""),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"),
    *("--data", "Synthetic", "--data.val_fraction", "0", "--data.num_test", "64"),
    *("--trainer.limit_test_batches", "0"),
]
SCRIPT = "from tests.benchmarks.processes import serve\nserve(rank)\n"
WAITING_SECONDS = 0.02
REPEATS = 50


# ---- in the processes that train -----------------------------------------------------------------


def serve(rank: int) -> None:
    """Do what each order says, in this folder, until one says to stop; the first rank answers."""
    number = 0
    while True:
        order = read(Path(f"order.{number}"))
        if not order:
            return
        torch.set_num_threads(order.pop("threads"))
        answer = train(**order) if "batch_size" in order else all_reduce(**order)
        if rank == 0:
            write(Path(f"answer.{number}"), answer)
        number += 1


def train(batch_size: int, processes: int, steps: int) -> float:
    """Seconds of a training step, the mean over all."""
    sizes = ["--data.batch_size", str(batch_size), "--data.num_train", str(batch_size * steps)]
    result = fit(resolve([*QUIET, *sizes, "--trainer.devices", str(processes)]))
    assert result.images_per_second is not None
    return batch_size / result.images_per_second


def all_reduce(numel: int) -> float:
    """Seconds in which all processes have the sum of `numel` float32; they have trained before."""
    gradients, seconds = torch.zeros(numel), []
    for _ in range(REPEATS):
        torch.distributed.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(gradients)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def read(path: Path) -> Any:
    """The file's content, once it is there."""
    while not path.exists():
        time.sleep(WAITING_SECONDS)
    return json.loads(path.read_text())


def write(path: Path, content: Any) -> None:
    """Whole at once: others wait for the file."""
    draft = path.with_suffix(f"{path.suffix}.draft")
    draft.write_text(json.dumps(content))
    draft.rename(path)


# ---- in the process that asks --------------------------------------------------------------------


class Group:
    """Some processes that wait for orders, all started by one."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder, self.orders = count, folder, 0
        self.process = start(count, SCRIPT, folder)

    def ask(self, **order: int) -> float:
        """What the first of them answers."""
        answer = self.folder / f"answer.{self.orders}"
        write(self.folder / f"order.{self.orders}", order)
        self.orders += 1
        while not answer.exists():
            if self.process.poll() is not None:
                told = [path.read_text() for path in sorted(self.folder.glob("err.*"))]
                raise RuntimeError("a process has ended:\n" + "\n".join(told))
            time.sleep(WAITING_SECONDS)
        return json.loads(answer.read_text())

    def stop(self) -> None:
        write(self.folder / f"order.{self.orders}", None)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            for path in self.folder.glob("pid.*"):
                os.kill(int(path.read_text()), 9)
            self.process.wait(30)


def measure(rounds: int, steps: int, folder: Path) -> list[dict[str, float]]:
    """For each round, the seconds of a step by batch size and layout, and of an all-reduce."""
    numel = sum(parameter.numel() for parameter in CNN().parameters())
    groups = {count: Group(count, folder / str(count)) for count in (1, 2)}
    try:
        for batch_size in BATCH_SIZES:
            for processes, threads in LAYOUTS.values():  # imports, caches
                order = {"batch_size": batch_size, "processes": processes, "threads": threads}
                groups[processes].ask(**order, steps=3)
        measured = []
        for number in range(rounds):
            row: dict[str, float] = {}
            for batch_size in BATCH_SIZES:
                # Enough of the small ones to outlast what a busy machine does for a second.
                count = steps if batch_size == max(BATCH_SIZES) else steps * 4
                for name in list(LAYOUTS)[:: -1 if number % 2 else 1]:
                    processes, threads = LAYOUTS[name]
                    order = {"batch_size": batch_size, "processes": processes, "threads": threads}
                    seconds = groups[processes].ask(**order, steps=count)
                    row[f"{batch_size}, {name}"] = seconds
            row["all-reduce"] = groups[2].ask(numel=numel, threads=1)
            measured.append(row)
            print(f"round {number + 1} of {rounds}", flush=True)
        return measured
    finally:
        for group in groups.values():
            group.stop()


def table(measured: list[dict[str, float]]) -> str:
    """Markdown: milliseconds of a step, and two ratios, each as median (least to most)."""
    lines = [
        f"| global batch | {ONE} | {TWO} | {SINGLE} | speed of {TWO} / {ONE} "
        f"| speed of {ONE} / {SINGLE} | all-reduce alone | of the step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reduce = [row["all-reduce"] for row in measured]
    for batch_size in BATCH_SIZES:
        one, two, single = (
            [row[f"{batch_size}, {name}"] for row in measured] for name in (ONE, TWO, SINGLE)
        )
        cells = [spread([1000 * s for s in seconds], "ms") for seconds in (one, two, single)]
        cells += [spread(ratios(one, two)), spread(ratios(single, one))]
        cells += [spread([1000 * s for s in reduce], "ms")]
        cells += [f"{statistics.median(ratios(reduce, two)):.1%}"]
        lines.append(f"| {batch_size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: list[float], unit: str = "") -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.2f} {unit} ({low:.2f} to {high:.2f})".replace("  ", " ")


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="of the largest batch, in each turn")
    parser.add_argument("--json", type=Path, help="a file for all figures, which are printed too")
    asked = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(asked.rounds, asked.steps, Path(folder))
    figures = {
        "machine": before,
        "load_after": os.getloadavg(),
        "steps": asked.steps,
        "all_reduce_bytes": 4 * sum(parameter.numel() for parameter in CNN().parameters()),
        "seconds": measured,
    }
    print(f"\n{table(measured)}\n\n{json.dumps(figures)}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
