"""The usual way to train on CIFAR-10, and rows usual-*: a training as shipped against it.

Usual is what tutorials show: torchvision's data set, which makes a PIL picture of each array, a
DataLoader with 2 workers that crops, mirrors and normalises picture by picture, a LightningModule
that logs its loss, Lightning's defaults, float32.  (Without Lightning's progress bar, which only
makes it slower.)  The network and the pictures are the same; each fits in turn, and what is
compared is the images per second from the 20th step to the last.  Told beside it is how many times
as fast as the usual way a bare loop is, as much as no training could surpass by sparing overhead.
"""

import contextlib
import itertools
import logging
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from research.building import build_data
from research.data import ImageData
from research.networks import CNN
from research.tracking.run import Recorder
from tests.benchmarks.bare import BareLoop, wait_for
from tests.benchmarks.ratios import Asked, Round, Row, Target, alternate, shown
from tests.benchmarks.training import IN_MEMORY, configured, quietly

WARM_UP_STEPS = 20
# Steps of ours and of the usual way: about 10 seconds of each on two cores.
STEPS = {64: (600, 150), 512: (80, 40)}
BARE_STEPS = {64: 200, 512: 25}
ON_GPU = {64: (700, 300), 512: (88, 88)}  # a whole epoch of 45,000 is 704 and 88
WORKERS = 2


class Pictures(Dataset):
    """As torchvision.datasets.CIFAR10 does it: an array in, a PIL picture through the transform."""

    def __init__(self, data: ImageData) -> None:
        mean, deviation = data.normalization.mean, data.normalization.std
        self.data = data.splits.train.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = data.splits.train.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.image_size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, deviation),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


class UsualModule(LightningModule):
    """A LightningModule of a few lines."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """`seconds` of a step: from the start of step `first` to that of step `last`."""

    direct = True  # logs nothing: may be called without Lightning's wrappers

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.began = self.seconds = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.first:
            wait_for(pl_module.device)
            self.began = time.perf_counter()
        elif batch_idx == self.last:
            wait_for(pl_module.device)
            self.seconds = (time.perf_counter() - self.began) / (self.last - self.first)


def usual_loader(data: ImageData, batch_size: int, workers: int = WORKERS) -> DataLoader:
    return DataLoader(Pictures(data), batch_size=batch_size, shuffle=True, num_workers=workers)


def against_usual(batch_size: int, accelerator: str, asked: Asked) -> Iterator[Round]:
    steps, usual_steps = (STEPS if accelerator == "cpu" else ON_GPU)[batch_size]
    limit = ["--trainer.limit_train_batches", str(steps)]
    configuration = configured(batch_size, accelerator, asked, *limit)
    data = build_data(configuration, asked.kept)
    loader = usual_loader(data, batch_size)
    precision = str(configuration.values.trainer.precision)
    bare = bare_loop(data, precision, accelerator)

    def ours(recorder: Recorder) -> float:
        clock = Clock(WARM_UP_STEPS, steps - 1)
        quietly(configuration, recorder, [clock], asked)
        return clock.seconds

    def usual() -> float:
        clock = Clock(WARM_UP_STEPS, usual_steps - 1)
        with warnings.catch_warnings(), quiet_lightning():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                accelerator=accelerator,
                devices=1,
                max_epochs=1,
                limit_train_batches=usual_steps,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=asked.folder,
                callbacks=[clock],
            )
            trainer.fit(UsualModule(CNN()), loader)
        return clock.seconds

    asked.notes.append(f"ours in {precision}, the usual in float32")
    with Recorder.start() as recorder:
        for mine, theirs in alternate(partial(ours, recorder), usual, asked.rounds):
            bare.run(WARM_UP_STEPS)
            told = f"ours {batch_size / mine:,.0f} images/s, usual {batch_size / theirs:,.0f}"
            ceiling = theirs / (bare.run(BARE_STEPS[batch_size]) / BARE_STEPS[batch_size])
            yield Round(theirs / mine, f"{told}, a bare loop {shown(ceiling)} times the usual")


def bare_loop(data: ImageData, precision: str, accelerator: str) -> BareLoop:
    """The same network in channels_last, with batches in memory."""
    device = torch.device("cpu" if accelerator == "cpu" else "cuda")
    network = CNN().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loader = data.train_dataloader()
    batches = list(itertools.islice(loader, max(2, IN_MEMORY // loader.batch_size)))
    there = [(images.to(device), labels.to(device)) for images, labels in batches]
    return BareLoop(network, optimizer, there, precision)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's words about every run are held back, as those of fit are."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


ROWS = [
    Row(
        name=f"usual-{batch_size}" if accelerator == "cpu" else f"gpu-usual-{batch_size}",
        what=f"fit's images/s, CNN, batch {batch_size}, as shipped",
        against=f"torchvision, DataLoader with {WORKERS} workers, Lightning's defaults, float32",
        target=target,
        measure=partial(against_usual, batch_size, accelerator),
        rounds=3,
        on_gpu=accelerator == "gpu",
    )
    for accelerator, target in (
        ("cpu", Target("at least", 4, with_bf16=True)),
        ("gpu", Target("at least", 10)),
    )
    for batch_size in (64, 512)
]
