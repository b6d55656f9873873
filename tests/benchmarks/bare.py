"""A training loop as one writes it by hand, and nothing else: what everything is held against.

It has its batches in memory, and neither counts, logs nor saves anything.  Alone, as
`python -m tests.benchmarks.bare FILE PRECISION STEPS`, it trains on pictures kept as bytes in FILE
and makes its batches as it goes, for the sake of its memory.

B pictures of H x W pixels.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from research.networks import CNN

Batch = tuple[Tensor, Tensor]
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


class BareLoop:
    """`run(steps)`: seconds of so many training steps, the device's work included.

    network: is trained in place, and lies where the batches do
    batches: taken one after the other, again and again
    precision: one of Lightning's names
    """

    def __init__(
        self, network: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], precision: str
    ) -> None:
        assert precision in AUTOCAST or precision in WHOLE, precision
        kind = WHOLE.get(precision, torch.float32)
        self.network, self.optimizer, self.precision = network.to(kind), optimizer, precision
        self.batches = [(images.to(kind), labels) for images, labels in batches]
        self.device = batches[0][0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "16-mixed")
        self.done = 0
        self.loss = torch.tensor(0.0)

    def run(self, steps: int) -> float:
        wait_for(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait_for(self.device)
        return time.perf_counter() - began

    def step(self) -> None:
        images, labels = self.batches[self.done % len(self.batches)]
        self.done += 1
        with autocast(self.precision, self.device):
            self.loss = F.cross_entropy(self.network(images), labels)
        if self.scaler.is_enabled():
            self.scaler.scale(self.loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if precision not in AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, AUTOCAST[precision])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def per_second(count: int, run: Callable[[int], float], seconds: float) -> int:
    """So many steps that a run of them takes about `seconds`, by one of `count`; at least one."""
    return max(1, round(count * seconds / run(count)))


def train_on_bytes(file: str, precision: str, steps: int) -> None:
    """An epoch's begin of the tutorial's CNN, then all pictures scored: 64 at a time, for training.

    FILE has uint8 pictures (N, 3, H, W) and int64 labels (N,) to learn from, and others to score.
    """
    content = torch.load(file, weights_only=True)
    network = CNN().to(memory_format=torch.channels_last)
    optimizer = SGD(network.parameters(), lr=1e-2)
    device = torch.device("cpu")
    images, labels = content["train"]
    for chosen in torch.randperm(len(images)).split(64)[:steps]:
        with autocast(precision, device):
            loss = F.cross_entropy(network(as_floats(images[chosen])), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    images, labels = content["test"]
    correct = 0
    with torch.no_grad(), autocast(precision, device):
        for chosen in torch.arange(len(images)).split(64):
            scores = network(as_floats(images[chosen]))
            correct += int((scores.argmax(dim=1) == labels[chosen]).sum())
    print(correct / len(images))


def as_floats(images: Tensor) -> Tensor:
    """(B, 3, H, W) bytes as floats around 0, in channels_last order."""
    images = images.contiguous(memory_format=torch.channels_last)
    return images.float().div_(127.5).sub_(1)


if __name__ == "__main__":
    train_on_bytes(sys.argv[1], sys.argv[2], int(sys.argv[3]))
