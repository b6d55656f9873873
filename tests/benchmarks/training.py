"""Rows fit-*: a training by `research.fit`, everything recorded, against a bare loop.

Both train the same CNN from the same weights on batches of the same pictures, in the precision and
memory format that fit chose; the bare loop has its batches in memory beforehand, cropped, mirrored
and normalised. They take turns inside one fit, half a second each (a GPU less): a callback holds
the fit, lets a twin do as many bare steps, and goes on. A ratio is that of the mean seconds of a
step; the first steps are left out on both sides, and so are turns in which either was half again as
slow as its median. Validation and what is recorded after an epoch are none of it.
"""

import contextlib
import copy
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from research.building import build_data
from research.classifier import Classifier
from research.configuration.schema import Configuration, resolve
from research.tracking.run import Recorder
from research.training import Result, fit
from tests.benchmarks.bare import BareLoop, Batch, wait_for
from tests.benchmarks.ratios import Asked, Pair, Round, Row, Target, means, shown, undisturbed

SLICE_SECONDS = {"cpu": 0.5, "gpu": 0.05}  # an epoch of a GPU is tenths of a second
ON_GPU = ("--trainer.limit_train_batches", "1.0", "--trainer.max_epochs", "20")
WARM_UP_STEPS = 8
TRAINED = 25_600  # pictures in a round
IN_MEMORY = 2048  # pictures that the bare loop goes through again and again
ALTERED = ["--data.crop_padding", "4", "--data.horizontal_flip", "true"]
# What is not training is kept short, and nothing of it is left out.
ONE_EPOCH = [
    *("--trainer.max_epochs", "1", "--trainer.limit_val_batches", "2"),
    *("--trainer.limit_test_batches", "2"),
]


class Turns(Callback):
    """A bare loop has a turn after each of the fit; `turns` has the seconds a step of both."""

    direct = True  # logs nothing: may be called without Lightning's wrappers

    def __init__(self, make_bare: Callable[[Classifier], BareLoop], seconds: float) -> None:
        self.make_bare, self.seconds = make_bare, seconds
        self.bare: BareLoop | None = None
        self.turns: list[Pair] = []
        self.began_at = 0
        self.began = 0.0
        self.steps = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.bare is None:
            assert isinstance(pl_module, Classifier)
            self.bare = self.make_bare(pl_module)
        if batch_idx < WARM_UP_STEPS:
            return
        if batch_idx == WARM_UP_STEPS:
            self.bare.run(WARM_UP_STEPS)
        elif time.perf_counter() - self.began < self.seconds:
            return
        else:
            wait_for(pl_module.device)
            seconds, steps = time.perf_counter() - self.began, batch_idx - self.began_at
            self.turns.append((seconds / steps, self.bare.run(steps) / steps))
            self.steps += steps
        self.began_at, self.began = batch_idx, time.perf_counter()


def training(batch_size: int, accelerator: str, asked: Asked) -> Iterator[Round]:
    more = ON_GPU if accelerator == "gpu" else ()
    configuration = configured(batch_size, accelerator, asked, *more)
    assert not configuration.arguments("model")["compile"], "the twin would not be compiled"
    data = build_data(configuration, asked.kept)
    count = max(2, IN_MEMORY // batch_size)
    batches = list(itertools.islice(data.train_dataloader(), count))
    precision = str(configuration.values.trainer.precision)
    make_bare = partial(twin, batches, precision)
    seconds = SLICE_SECONDS[accelerator]
    asked.notes.append(f"{precision}; as many steps of each in turns of {seconds} s")
    with Recorder.start() as recorder:
        for _ in range(asked.rounds):
            turns = Turns(make_bare, seconds)
            quietly(configuration, recorder, [turns], asked)
            left = undisturbed(turns.turns)
            ours, bare = means(left)
            of_turns = statistics.median(theirs / mine for mine, theirs in turns.turns)
            yield Round(
                bare / ours,
                f"fit {batch_size / ours:,.0f} images/s, bare {batch_size / bare:,.0f}; "
                f"{turns.steps} steps in {len(turns.turns)} turns each, {len(left)} of them "
                f"undisturbed; median of all turns {shown(of_turns)}",
            )


def twin(batches: Sequence[Batch], precision: str, classifier: Classifier) -> BareLoop:
    """A loop over these batches with a copy of the classifier's network, as it is now."""
    network = copy.deepcopy(classifier.network)
    optimizer = classifier.make_optimizer(network.parameters())
    device = classifier.device
    there = [(images.to(device), labels.to(device)) for images, labels in batches]
    return BareLoop(network, optimizer, there, precision)


def configured(batch_size: int, accelerator: str, asked: Asked, *more: str) -> Configuration:
    """The tutorial's CNN on these pictures, cropped and mirrored, everything recorded."""
    where = ["--trainer.accelerator", accelerator, "--trainer.devices", "1"]
    where += ["--trainer.default_root_dir", str(asked.folder)]
    where += ["--tracking_uri", f"sqlite:///{asked.folder / 'mlflow.db'}"]
    size = ["--data.batch_size", str(batch_size)]
    size += ["--trainer.limit_train_batches", str(TRAINED // batch_size)]
    return resolve([*asked.data, *ALTERED, *ONE_EPOCH, *where, *size, *more])


def quietly(
    configuration: Configuration, recorder: Recorder | None, callbacks: list[Callback], asked: Asked
) -> Result:
    """`fit` as shipped, its lines of progress included, which nobody sees."""
    with contextlib.redirect_stderr(io.StringIO()):
        return fit(configuration, recorder, callbacks, kept=asked.kept)


ROWS = [
    Row(
        name=f"fit-{batch_size}" if accelerator == "cpu" else f"gpu-fit-{batch_size}",
        what=f"fit's images/s, CNN, batch {batch_size}, everything recorded",
        against="a bare loop's, same precision, batches in memory",
        target=Target("at least", 0.97),
        measure=partial(training, batch_size, accelerator),
        on_gpu=accelerator == "gpu",
    )
    for accelerator in ("cpu", "gpu")
    for batch_size in (64, 512)
]
