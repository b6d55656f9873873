"""Rows batches-*: making batches, cropped, mirrored and normalised, against the usual DataLoader.

Nothing is trained.  Both work in the calling thread alone, one thread each, so the ratio is that
of one core's work; what the DataLoader brings with 2 worker processes is noted beside.
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from research.building import build_data
from research.data import ImageData
from tests.benchmarks.ratios import Asked, Round, Row, Target, in_slices, seconds_of
from tests.benchmarks.training import configured
from tests.benchmarks.usual import WORKERS, usual_loader

PICTURES = {"ours": 10_240, "usual": 1_024}  # in a turn: tenths of a second
TURNS = 6
IN_QUEUE = 2 * WORKERS  # batches that workers make ahead
SECONDS_OF_WORKERS = 2.0


def batches_alone(batch_size: int, asked: Asked) -> Iterator[Round]:
    data = build_data(configured(batch_size, "cpu", asked), asked.kept)
    ours = drawn(data.train_dataloader(), PICTURES["ours"] // batch_size)
    usual = drawn(usual_loader(data, batch_size, workers=0), PICTURES["usual"] // batch_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = []
    try:
        next(ours), next(usual)  # caches
        for _ in range(asked.rounds):
            mine, theirs = in_slices(
                seconds_of(lambda: next(ours)), seconds_of(lambda: next(usual)), TURNS
            )
            speed, usual_speed = PICTURES["ours"] / mine, PICTURES["usual"] / theirs
            rates.append((speed, with_workers(data, batch_size)))
            told = f"ours {speed:,.0f} pictures/s, DataLoader {usual_speed:,.0f}"
            yield Round(speed / usual_speed, f"{told}, with {WORKERS} workers {rates[-1][1]:,.0f}")
    finally:
        torch.set_num_threads(threads)
    of_workers = statistics.median(mine / theirs for mine, theirs in rates)
    asked.notes.append(
        f"{of_workers:.1f} times, on one thread, what {WORKERS} workers of a DataLoader bring"
    )


def drawn(loader: Iterable[object], count: int) -> Iterator[None]:
    """Each `next` makes `count` batches, and begins another epoch where one ends."""
    made = 0
    while True:
        for _ in loader:
            made += 1
            if made == count:
                made = 0
                yield


def with_workers(data: ImageData, batch_size: int) -> float:
    """Pictures per second of worker processes that are at work already."""
    batches = iter(usual_loader(data, batch_size))
    for _ in range(2 * IN_QUEUE):
        next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS_OF_WORKERS:
        count += len(next(batches)[1])
    return count / (time.perf_counter() - began)


ROWS = [
    Row(
        name=f"batches-{batch_size}",
        what=f"batches of {batch_size} alone: crop, flip, normalise; one thread",
        against="the usual DataLoader, one thread",
        target=Target("at least", 10),
        measure=partial(batches_alone, batch_size),
    )
    for batch_size in (64, 512)
]
