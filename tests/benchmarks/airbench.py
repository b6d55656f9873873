"""Row gpu-airbench: experiments/airbench94.yaml against the script it is modelled on.

The peer is airbench94_muon.py of https://github.com/KellerJordan/cifar10-airbench, whose file
`--airbench FILE` names.  It runs as a process of its own, fewer times than the 200 it is written
for, on the pictures that ours has, which it finds in the folder where it looks.  It counts the
seconds of whitening, training and the one evaluation at the end, and so do we.  Its first training,
which compiles, does not count, and neither does our first.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from research.airbench import Airbench94
from research.building import build_data
from research.configuration.schema import resolve
from research.data import ImageData
from research.training import fit
from tests.benchmarks.bare import wait_for
from tests.benchmarks.ratios import PROJECT, Asked, NotMeasured, Round, Row, Target, alternate
from tests.benchmarks.typed import python

RECIPE = PROJECT / "experiments" / "airbench94.yaml"
TRAININGS = 5  # of each in a round
LOOP = "range(200)"  # in the peer's script: how often it trains


class Training(NamedTuple):
    seconds: float
    accuracy: float


class Stopwatch(Callback):
    """`seconds` of preparing the network, of all epochs without validation, and of the test."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, sign: int, module: LightningModule) -> None:
        wait_for(module.device)
        self.seconds += sign * time.perf_counter()

    @contextlib.contextmanager
    def at_preparation(self) -> Iterator[None]:
        """Times what comes before the training, too: the filters that whiten."""
        prepare = Airbench94.prepare

        def timed(network: Airbench94, images: Tensor) -> None:
            wait_for(images.device)
            began = time.perf_counter()
            prepare(network, images)
            wait_for(images.device)
            self.seconds += time.perf_counter() - began

        with patch.object(Airbench94, "prepare", timed):
            yield

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add(-1, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add(+1, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add(+1, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add(-1, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add(-1, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add(+1, pl_module)


def write_for_peer(data: ImageData, folder: Path) -> None:
    """The pictures as the peer keeps them: uint8 (N, H, W, 3)."""
    (folder / "cifar10").mkdir(exist_ok=True)
    for name in ("train", "test"):
        split = getattr(data.splits, name)
        images = split.images.permute(0, 2, 3, 1).contiguous()
        content = {"images": images, "labels": split.labels, "classes": list(data.class_names)}
        torch.save(content, folder / "cifar10" / f"{name}.pt")


def run_peer(script: str, folder: Path) -> list[Training]:
    (folder / "peer.py").write_text(script.replace(LOOP, f"range({TRAININGS})"))
    return trainings_in(python(["peer.py"], folder))


def trainings_in(printed: str) -> list[Training]:
    """Those in the peer's table (run, epoch, train, val, tta_val_acc, time), not the first."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    ends = [row for row in rows if len(row) == 6 and row[1] == "eval"]
    return [Training(float(row[5]), float(row[4])) for row in ends[1:]]


def how_batches_are_made() -> list[str]:
    """The recipe's settings of its data, for whatever pictures; all of them are trained on."""
    settings = yaml.safe_load(RECIPE.read_text()).get("data", {}).get("init_args", {})
    settings = {k: v for k, v in settings.items() if k != "root"} | {"val_fraction": 0}
    return [word for k, v in settings.items() for word in (f"--data.{k}", json.dumps(v))]


def against_airbench(asked: Asked) -> Iterator[Round]:
    if asked.airbench is None:
        raise NotMeasured("no --airbench FILE")
    if not RECIPE.exists():
        raise NotMeasured(f"no {RECIPE.name}")
    script = asked.airbench.read_text()
    if LOOP not in script:
        raise NotMeasured(f"{asked.airbench.name} is another version: it has no {LOOP}")
    where = ["--trainer.default_root_dir", str(asked.folder), "--tracking_uri", ""]
    quiet = ["--trainer.enable_progress_bar", "false"]
    typed = ["--config", str(RECIPE), *asked.data, *how_batches_are_made(), *where, *quiet]
    write_for_peer(build_data(resolve(typed), asked.kept), asked.folder)
    accuracies: dict[str, list[float]] = {"ours": [], "peer": []}

    def train(seed: int) -> Training:
        stopwatch = Stopwatch()
        configuration = resolve([*typed, "--seed_everything", str(seed)])
        with stopwatch.at_preparation():
            result = fit(configuration, callbacks=[stopwatch], kept=asked.kept)
        return Training(stopwatch.seconds, result.metrics["test/accuracy"])

    def mean_seconds(name: str, trainings: list[Training]) -> float:
        accuracies[name] += [training.accuracy for training in trainings]
        return sum(training.seconds for training in trainings) / len(trainings)

    def ours() -> float:
        train(seed=0)
        return mean_seconds("ours", [train(seed) for seed in range(TRAININGS)])

    def peer() -> float:
        return mean_seconds("peer", run_peer(script, asked.folder))

    for mine, theirs in alternate(ours, peer, asked.rounds):
        yield Round(mine / theirs, f"{mine:.2f} s, peer {theirs:.2f} s")
    for name, found in accuracies.items():
        mean, deviation = torch.tensor(found).mean(), torch.tensor(found).std()
        asked.notes.append(f"{name}: {mean:.2%} ± {deviation:.2%} test accuracy (n={len(found)})")


ROWS = [
    Row(
        name="gpu-airbench",
        what="seconds of a training by experiments/airbench94.yaml, nothing recorded",
        against="cifar10-airbench's airbench94_muon.py, same pictures",
        target=Target("at most", 1.1),
        measure=against_airbench,
        rounds=2,
        on_gpu=True,
    )
]
