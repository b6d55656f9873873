"""Rows gpu-epoch-* and gpu-together: what only a GPU shows.

gpu-epoch     the seconds of an epoch of `fit`, everything recorded, against a bare loop whose step
              is one CUDA graph and whose pictures lie on the GPU as bytes: there nothing waits for
              Python, so what is above 1 is what fit costs
gpu-together  16 trainings that differ in their seed, one after another, against all at once

Not measured where there is no GPU; the bare loop then runs without its graph, which the tests use.

N pictures, B of them in a batch, H x W pixels.
"""

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from research.building import build_data
from research.data import ImageData
from research.data.kept import Kept
from research.networks import CNN
from research.together.training import fit_together
from research.tracking.run import Recorder
from research.training import fit
from tests.benchmarks.bare import AUTOCAST, WHOLE, wait_for
from tests.benchmarks.ratios import Asked, Round, Row, Target, alternate
from tests.benchmarks.training import configured, quietly

EPOCHS = 3  # of which the last counts
PADDING = 4
TRIES = 3  # steps before the capture, as torch's documentation asks for
SEEDS = 16
SEEDS_BATCH = 512


class GraphLoop:
    """`epoch()`: seconds of one; crops, mirrors, normalises and learns, all on the device.

    Pictures of the last, smaller batch are left out: a graph has one shape.
    """

    def __init__(
        self,
        network: nn.Module,
        data: ImageData,
        batch_size: int,
        precision: str,
        device: torch.device,
    ) -> None:
        self.device, self.precision, self.batch_size = device, precision, batch_size
        self.kind = WHOLE.get(precision, torch.float32)
        self.network = network.to(device, self.kind).to(memory_format=torch.channels_last)
        self.optimizer = SGD(self.network.parameters(), lr=0.01)
        train = data.splits.train
        self.padded = F.pad(train.images.to(device).float(), [PADDING] * 4, "reflect").byte()
        self.labels_of_all = train.labels.to(device)
        self.size = data.image_size
        mean, deviation = data.normalization.mean, data.normalization.std
        self.mean, self.deviation = (
            255 * torch.tensor(values, device=device).view(1, -1, 1, 1)
            for values in (mean, deviation)
        )
        # Where the graph reads: other pictures are copied there before each step.
        shape = (batch_size, 3, self.size, self.size)
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.graph = self.capture() if device.type == "cuda" else None

    @property
    def steps(self) -> int:
        return len(self.labels_of_all) // self.batch_size

    def capture(self) -> torch.cuda.CUDAGraph:
        # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(TRIES):
                self.learn()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)  # gradients get memory of the graph's own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward_backward()
            self.optimizer.step()
        return graph

    def learn(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.forward_backward()
        self.optimizer.step()

    def forward_backward(self) -> None:
        images = ((self.images.float() - self.mean) / self.deviation).to(self.kind)
        # A cache of casted weights would outlive the capture.
        with torch.autocast(
            self.device.type,
            AUTOCAST.get(self.precision, torch.bfloat16),
            enabled=self.precision in AUTOCAST,
            cache_enabled=False,
        ):
            loss = F.cross_entropy(self.network(images), self.labels)
        loss.backward()

    def epoch(self) -> float:
        wait_for(self.device)
        began = time.perf_counter()
        order = torch.randperm(len(self.labels_of_all), device=self.device)
        altered, labels = self.altered()[order], self.labels_of_all[order]
        for step in range(self.steps):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            self.images.copy_(altered[batch].permute(0, 3, 1, 2))
            self.labels.copy_(labels[batch])
            if self.graph is not None:
                self.graph.replay()
            else:
                self.learn()
        wait_for(self.device)
        return time.perf_counter() - began

    def altered(self) -> Tensor:
        """(N, H, W, 3): each picture cut out at a place of its own, and mirrored or not."""
        count, draw = len(self.padded), partial(torch.randint, device=self.device)
        steps = torch.arange(self.size, device=self.device)
        rows = draw(2 * PADDING + 1, (count, 1)) + steps
        mirrored = draw(2, (count, 1)).bool()
        columns = draw(2 * PADDING + 1, (count, 1)) + torch.where(mirrored, steps.flip(0), steps)
        which = torch.arange(count, device=self.device)
        # The indices stand apart, so torch puts their axes before that of the channels.
        return self.padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]


def against_graph(batch_size: int, asked: Asked) -> Iterator[Round]:
    whole = ("--trainer.limit_train_batches", "1.0", "--trainer.max_epochs", str(EPOCHS))
    configuration = configured(batch_size, "gpu", asked, *whole)
    precision = str(configuration.values.trainer.precision)
    data = build_data(configuration, asked.kept)
    bare = GraphLoop(CNN(), data, batch_size, precision, torch.device("cuda"))

    def ours(recorder: Recorder) -> float:
        """Seconds a picture of the last epoch."""
        result = quietly(configuration, recorder, [], asked)
        return 1 / result.history[-1]["images_per_second"]

    def graph() -> float:
        return [bare.epoch() for _ in range(EPOCHS)][-1] / (bare.steps * batch_size)

    asked.notes.append(f"{precision}; epoch {EPOCHS} of {EPOCHS}")
    with Recorder.start() as recorder:
        quietly(configuration, recorder, [], asked)  # imports, caches
        for mine, theirs in alternate(partial(ours, recorder), graph, asked.rounds):
            epoch = len(data.splits.train)
            told = f"an epoch {mine * epoch:.3f} s, bare graph {theirs * epoch:.3f} s"
            yield Round(mine / theirs, told)


def all_at_once(accelerator: str, asked: Asked) -> Iterator[Round]:
    """Wall time of whole trainings, what is recorded of each and its end included."""
    whole = ("--trainer.limit_train_batches", "1.0", "--trainer.max_epochs", str(EPOCHS))
    configurations = [
        configured(SEEDS_BATCH, accelerator, asked, *whole, "--seed_everything", str(seed))
        for seed in range(SEEDS)
    ]

    kept = Kept(most=SEEDS)  # each seed parts the pictures anew
    for configuration in configurations:
        build_data(configuration, kept)

    def together(recorder: Recorder) -> float:
        began = time.perf_counter()
        for ending in fit_together(configurations, recorder, kept=kept):
            if isinstance(ending, Exception):
                raise ending
        return time.perf_counter() - began

    def one_by_one(recorder: Recorder) -> float:
        began = time.perf_counter()
        for configuration in configurations:
            fit(configuration, recorder, kept=kept)
        return time.perf_counter() - began

    with Recorder.start() as recorder:
        fit(configurations[0], recorder, kept=kept)  # imports, caches
        for mine, theirs in alternate(
            partial(together, recorder), partial(one_by_one, recorder), asked.rounds
        ):
            told = f"{SEEDS} together {mine:.1f} s, one after another {theirs:.1f} s"
            yield Round(theirs / mine, told)


ROWS = [
    *(
        Row(
            name=f"gpu-epoch-{batch_size}",
            what=f"seconds of an epoch, CNN, batch {batch_size}, everything recorded",
            against="a bare loop with CUDA graphs, data on the GPU",
            target=Target("at most", 1.2),
            measure=partial(against_graph, batch_size),
            on_gpu=True,
        )
        for batch_size in (64, 512)
    ),
    Row(
        name="gpu-together",
        what=f"speed of {SEEDS} seeds of the CNN trained at once, batch {SEEDS_BATCH}",
        against="one after another",
        target=Target("at least", 5),
        measure=partial(all_at_once, "gpu"),
        rounds=3,
        on_gpu=True,
    ),
]
