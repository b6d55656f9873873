"""Rows precision-*, compile-*, flops-*: how fast the step itself is, in bare loops.

precision  as fit ships it (channels_last, and bf16 where the processor computes in it) against
           float32 in torch's own memory format
compile    the same as shipped, compiled by torch.compile, against not compiled: no target, the
           figure is what the choice stands on
flops      the floating-point operations per second of a step as shipped, against those of the
           largest matrix product in the same precision: a share of what the machine can do at all

Both sides of a row see the same batches, a few tenths of a second each in turn.
"""

import copy
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from research.building import build_data
from research.networks import CNN
from tests.benchmarks.bare import AUTOCAST, WHOLE, BareLoop, Batch, per_second, wait_for
from tests.benchmarks.ratios import Asked, NotMeasured, Round, Row, Target, in_slices
from tests.benchmarks.training import IN_MEMORY, configured

TURN_SECONDS = 0.4
TURNS = 8  # of each, in a round
SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}  # of square matrices
PROFILED_STEPS = 10
COMPILERS = ("c++", "g++", "clang++")


class Case:
    """The CNN, its pictures and what fit would do with them."""

    def __init__(self, batch_size: int, accelerator: str, asked: Asked) -> None:
        configuration = configured(batch_size, accelerator, asked)
        self.precision = str(configuration.values.trainer.precision)
        self.channels_last = configuration.arguments("model")["channels_last"]
        self.device = torch.device("cuda" if accelerator == "gpu" else "cpu")
        data = build_data(configuration, asked.kept)
        count = max(2, IN_MEMORY // batch_size)
        self.batches = list(itertools.islice(data.train_dataloader(), count))
        torch.manual_seed(0)
        self.network = CNN()

    def loop(self, precision: str, channels_last: bool, compiled: bool = False) -> BareLoop:
        """All loops begin with the same weights."""
        order = torch.channels_last if channels_last else torch.contiguous_format
        network = copy.deepcopy(self.network).to(self.device).to(memory_format=order)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        if compiled:
            network.compile()
        batches: list[Batch] = [
            (images.to(self.device).contiguous(memory_format=order), labels.to(self.device))
            for images, labels in self.batches
        ]
        return BareLoop(network, optimizer, batches, precision)

    def shipped(self, compiled: bool = False) -> BareLoop:
        return self.loop(self.precision, self.channels_last, compiled)


def compared(
    ours: BareLoop, others: BareLoop, names: tuple[str, str], asked: Asked
) -> Iterator[Round]:
    """The speed of one loop over that of another, and the loss of both after as many steps."""
    others.run(5 + ours.done)  # caches; compiling has taken ours some steps
    ours.run(5)
    steps = per_second(5, ours.run, TURN_SECONDS)
    others.run(5)
    size = len(ours.batches[0][1])
    for _ in range(asked.rounds):
        mine, theirs = in_slices(lambda: ours.run(steps), lambda: others.run(steps), TURNS)
        rates = (size * steps / seconds for seconds in (mine, theirs))
        told = (f"{name} {rate:,.0f} images/s" for name, rate in zip(names, rates, strict=True))
        yield Round(theirs / mine, ", ".join(told))
    losses = [float(loop.loss.detach()) for loop in (ours, others)]
    asked.notes.append(
        f"{names[0]} against {names[1]}; loss after {ours.done} steps "
        f"{losses[0]:.4f} against {losses[1]:.4f}"
    )


def as_shipped(batch_size: int, asked: Asked) -> Iterator[Round]:
    case = Case(batch_size, "cpu", asked)
    names = (f"{case.precision} {'channels_last' if case.channels_last else ''}", "32-true")
    yield from compared(case.shipped(), case.loop("32-true", False), names, asked)


def compilation(batch_size: int, asked: Asked) -> Iterator[Round]:
    if "CXX" not in os.environ and not any(shutil.which(name) for name in COMPILERS):
        raise NotMeasured("no compiler")
    case = Case(batch_size, "cpu", asked)
    began = time.perf_counter()
    compiled = case.shipped(compiled=True)
    compiled.run(2)
    asked.notes.append(f"{time.perf_counter() - began:.0f} s to compile, or to find it compiled")
    names = (f"compiled {case.precision}", f"eager {case.precision}")
    yield from compared(compiled, case.shipped(), names, asked)


# ---- operations per second -----------------------------------------------------------------------


def achieved(batch_size: int, accelerator: str, asked: Asked) -> Iterator[Round]:
    case = Case(batch_size, accelerator, asked)
    loop = case.shipped()
    loop.run(5)
    with FlopCounterMode(display=False) as counter:
        loop.run(1)
    step_flops = counter.get_total_flops()
    steps = per_second(5, loop.run, TURN_SECONDS)
    kind = AUTOCAST.get(case.precision) or WHOLE[case.precision]
    # The product that comes nearest to what the machine can do, by one look at each.
    multiply, size = max(
        ((Product(size, kind, case.device), size) for size in SIZES[case.device.type]),
        key=lambda each: each[0].flops / min(each[0].run(1) for _ in range(3)),
    )
    times = per_second(1, multiply.run, TURN_SECONDS)
    for _ in range(asked.rounds):
        seconds, of_product = in_slices(lambda: loop.run(steps), lambda: multiply.run(times), TURNS)
        reached, possible = steps * step_flops / seconds, times * multiply.flops / of_product
        told = f"step {reached / 1e9:,.1f} GFLOP/s, product {possible / 1e9:,.1f}"
        yield Round(reached / possible, told)
    asked.notes.append(
        f"{step_flops / batch_size / 1e6:.1f} MFLOP a picture forward and backward, "
        f"{case.precision}; the product is of {size} x {size} matrices in {str(kind)[6:]}"
    )
    asked.notes.append(f"slowest operators of a step: {slowest(loop)}")


class Product:
    """A product of square matrices; `flops` of one."""

    def __init__(self, size: int, kind: torch.dtype, device: torch.device) -> None:
        self.left, self.right = (torch.rand(size, size, device=device).to(kind) for _ in range(2))
        self.out: Tensor = torch.empty_like(self.left)
        self.flops = 2 * size**3

    def run(self, times: int) -> float:
        """Seconds of so many."""
        wait_for(self.out.device)
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(self.left, self.right, out=self.out)
        wait_for(self.out.device)
        return time.perf_counter() - began


def slowest(loop: BareLoop, count: int = 3) -> str:
    """The operators in which a step spends most of its time, and the share of each."""
    on_gpu = loop.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiler:
        loop.run(PROFILED_STEPS)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, name), reverse=True)
    whole = sum(getattr(event, name) for event in events)
    return ", ".join(f"{event.key} {getattr(event, name) / whole:.0%}" for event in events[:count])


ROWS = [
    *(
        Row(
            name=f"precision-{batch_size}",
            what=f"bare loop as shipped on a CPU, batch {batch_size}",
            against="bare loop in eager float32, contiguous",
            target=Target("at least", 2.2, with_bf16=True),
            measure=partial(as_shipped, batch_size),
        )
        for batch_size in (64, 512)
    ),
    *(
        Row(
            name=f"compile-{batch_size}",
            what=f"bare loop as shipped on a CPU and compiled, batch {batch_size}",
            against="the same, not compiled",
            target=None,
            measure=partial(compilation, batch_size),
            rounds=3,
        )
        for batch_size in (64, 512)
    ),
    *(
        Row(
            name=f"flops-{batch_size}" if accelerator == "cpu" else f"gpu-flops-{batch_size}",
            what=f"FLOP/s of the CNN's training step, batch {batch_size}",
            against="the largest matrix product in the same precision",
            target=None,
            measure=partial(achieved, batch_size, accelerator),
            rounds=3,
            on_gpu=accelerator == "gpu",
        )
        for accelerator in ("cpu", "gpu")
        for batch_size in (64, 512)
    ),
]
