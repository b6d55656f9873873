"""Processes that really train together: the pictures are read once and in memory once."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from research.data import ImageData, shared
from research.data.split import Split
from research.processes.launch import HOST_GROUP
from tests.launched import ROOT, launched

pytestmark = pytest.mark.devices

COUNT = 20_000
SIZE = COUNT * (32 * 32 * 3 + 8)


class Noise(ImageData):
    """61.6 MB of pictures; who reads them leaves a line."""

    class_names = ("a", "b")
    image_size = 32

    def read(self):
        with open("read", "a") as file:
            file.write(f"{os.getpid()}\n")
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(256, (COUNT, 32, 32, 3), dtype=torch.uint8, generator=generator)
        images, labels = images.permute(0, 3, 1, 2), torch.arange(COUNT) % 2
        return Split(images[:-2000], labels[:-2000]), Split(images[-2000:], labels[-2000:])


class Linear(LightningModule):
    """Keeps the digest of what it was shown, and measures before it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.seen = hashlib.sha256()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.update(images.contiguous().numpy().data)
        return nn.functional.cross_entropy(self.linear(images.mean((2, 3))), labels)

    def on_train_end(self):
        splits = vars(self.trainer.datamodule.splits)
        digests = [split.digest() for split in splits.values()]  # touches every page
        self.trainer.strategy.barrier()
        self.told = {"digests": digests, "memory": pss(), "left": os.listdir("place")}
        self.trainer.strategy.barrier()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pss() -> int:
    """Bytes of this process, where those that it has in common with others count in parts."""
    import psutil

    return psutil.Process().memory_full_info().pss


def train(devices: int, shares: bool = True) -> None:
    """Train for three batches, evaluate, and write down what was seen as told.RANK.json."""
    Path("place").mkdir(exist_ok=True)
    shared.find_places = lambda: [Path("place").resolve()] if shares else []
    torch.set_num_threads(1)
    data, model = Noise(batch_size=500, horizontal_flip=True), Linear()
    flags = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    flags |= {"enable_checkpointing": False, "max_epochs": 1, "limit_train_batches": 3}
    trainer = Trainer(accelerator="cpu", devices=devices, use_distributed_sampler=False, **flags)
    data.setup("fit")
    if trainer.num_devices > 1:
        data.share_with_others()
    trainer.fit(model, datamodule=data)
    told = {**model.told, "seen": model.seen.hexdigest(), "group": os.environ.get(HOST_GROUP)}
    Path(f"told.{trainer.global_rank}.json").write_text(json.dumps(told))


def collected(folder: Path, count: int) -> list[dict]:
    assert not os.listdir(folder / "place")
    return [json.loads((folder / f"told.{rank}.json").read_text()) for rank in range(count)]


def times_read(folder: Path) -> int:
    return len((folder / "read").read_text().split())


def run_alone(folder: Path, devices: int) -> None:
    """As a user's own script, from which Lightning starts the others."""
    script = folder / "script.py"
    script.write_text(f"from tests.test_devices_memory import train\ntrain({devices})\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=240)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What three forked processes came to with and without sharing, and two of Lightning's."""
    found = {}
    for name, shares in (("shared", True), ("each its own", False)):
        folder = tmp_path_factory.mktemp("torchrun")
        script = f"from tests.test_devices_memory import train\ntrain(3, shares={shares})\n"
        for outcome in launched(3, script, folder):
            assert outcome.code == 0, outcome.err
        found[name] = collected(folder, 3), times_read(folder)
    folder = tmp_path_factory.mktemp("lightning")
    run_alone(folder, 2)
    found["lightning"] = collected(folder, 2), times_read(folder)
    return found


def test_all_processes_train_on_one_copy(runs):
    (together, times), (apart, times_apart) = runs["shared"], runs["each its own"]
    assert (times, times_apart) == (1, 3)
    less = sum(told["memory"] for told in apart) - sum(told["memory"] for told in together)
    assert 1.6 * SIZE < less < 2.4 * SIZE  # one instead of three


def test_what_is_seen_is_the_same(runs):
    together, apart = runs["shared"][0], runs["each its own"][0]
    assert len({told["seen"] for told in together}) == 3
    for rank in range(3):
        assert together[rank]["seen"] == apart[rank]["seen"]
        assert together[rank]["digests"] == apart[0]["digests"]


def test_the_processes_that_lightning_starts_map_what_the_first_has_read(runs):
    told, times = runs["lightning"]
    assert times == 1
    assert told[0]["group"] is not None
    assert told[0]["group"] == told[1]["group"]
    assert told[0]["digests"] == told[1]["digests"] == runs["shared"][0][0]["digests"]


def test_the_file_has_no_name_any_more_when_training_has_begun(runs):
    for ranks, _ in runs.values():
        assert [told["left"] for told in ranks] == [[]] * len(ranks)
