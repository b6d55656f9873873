"""Row memory: the peak memory of a training of the CNN on all pictures, against a bare loop's.

Resident memory of the training's own process at its highest, shared libraries included, as Linux
counts it (VmHWM); ours records everything, which other processes do.  The bare loop (bare.py) has
the same pictures as bytes, trains in the same precision, and imports torch and nothing else.  Both
train the same steps and score all the test pictures.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from research.building import build_data
from tests.benchmarks.ratios import PROJECT, Asked, NotMeasured, Round, Row, Target, alternate
from tests.benchmarks.training import configured

STEPS = 100
POLL_SECONDS = 0.02
MIB = 2**20


def peak_of(arguments: list[str], folder: Path) -> float:
    """Bytes that `python ARGUMENTS` had resident at most."""
    with open(folder / "told", "w+") as told:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            stdout=told,
            stderr=subprocess.STDOUT,
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, high_water_mark(process.pid))
            time.sleep(POLL_SECONDS)
        told.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments[-8:])}\n{told.read()[-2000:]}")
    return peak


def high_water_mark(pid: int) -> float:
    """Bytes; 0 once the process has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024.0 * int(line.split()[1])
    return 0.0


def peak_memory(asked: Asked) -> Iterator[Round]:
    if not Path("/proc/self/status").exists():
        raise NotMeasured("no /proc")
    few = ("--data.val_fraction", "0", "--trainer.limit_train_batches", str(STEPS))
    configuration = configured(64, "cpu", asked, *few, "--trainer.limit_test_batches", "1.0")
    splits = build_data(configuration).splits
    kept = asked.folder / "pictures.pt"
    pictures = {name: (split.images, split.labels) for name, split in vars(splits).items()}
    torch.save({name: pictures[name] for name in ("train", "test")}, kept)
    (asked.folder / "memory.yaml").write_text(configuration.yaml())
    ours = ["-m", "research.fit", "--config", str(asked.folder / "memory.yaml")]
    precision = str(configuration.values.trainer.precision)
    bare = ["-m", "tests.benchmarks.bare", str(kept), precision, str(STEPS)]
    asked.notes.append(
        f"{len(splits.train):,} and {len(splits.test):,} pictures of "
        f"{(splits.train.images.nbytes + splits.test.images.nbytes) / MIB:,.0f} MiB, {precision}"
    )
    del splits, pictures
    for mine, theirs in alternate(
        partial(peak_of, ours, asked.folder), partial(peak_of, bare, asked.folder), asked.rounds
    ):
        yield Round(mine / theirs, f"{mine / MIB:,.0f} MiB, bare {theirs / MIB:,.0f} MiB")


ROWS = [
    Row(
        name="memory",
        what="peak memory, CNN on 50,000 pictures, everything recorded",
        against="a bare loop's with uint8 pictures",
        target=Target("at most", 1.2),
        measure=peak_memory,
        rounds=3,
    )
]
