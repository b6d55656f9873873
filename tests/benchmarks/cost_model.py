"""When more GPUs stop helping, on paper: a step's time on 1, 8 and 64 from counts and assumptions.

    python -m tests.benchmarks.cost_model [--peak TFLOPS] [--share S] [--floor MS]

Counted: parameters, and the floating-point operations of a forward and a backward pass.  Assumed:
everything about the machines; nothing here was measured on a GPU.  The model of a step of B
pictures on W GPUs, b = B / W on each:

    compute    = b * operations / (share * peak)
    all-reduce = 2 (W-1)/W * 4 bytes * parameters / bandwidth + 2 (W-1)/W * latency of a turn
    all-gather =   (W-1)/W * 48 bytes * B / bandwidth         +   (W-1)/W * latency of a turn
    step       = max(floor, compute + all-reduce + all-gather)

for float32 gradients and rings: a turn is W hops, of which one per node leaves the node, and the
bandwidth is that of the slowest link.  The all-gather is ours: ten scores (float32) and a label
(int64) of each picture, so that all have the loss of the whole batch.  Nothing overlaps: the CNN's
gradients fill one bucket of DistributedDataParallel, which is sent when the last one is there;
ResNet9's could overlap in part, so its figures are an upper bound.  The floor is what Lightning
spends on the host for a step of any size: 1 ms, measured on a CPU.  The host runs ahead of the GPU,
hence the maximum and no sum.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from research.networks import CNN, ResNet9

GPUS_OF_A_NODE = 8
BATCHES = (64, 512, 4096, 32768)
BYTES_OF_A_PICTURE = 10 * 4 + 8  # its scores and its label
LEAST_GAIN = 0.1  # what twice the GPUs must save of a step to be called a help
GOOD = 0.8  # the efficiency from which GPUs are called well used


@dataclass(frozen=True)
class Network:
    """`parameters`, and the `operations` (FLOPs) of a training step, per picture."""

    name: str
    parameters: int
    operations: float


@dataclass(frozen=True)
class Link:
    """Bytes per second in one direction, and seconds until the first arrives."""

    name: str
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU and of its host; FLOP/s, a fraction, seconds."""

    peak: float
    share: float
    floor: float


NVLINK = Link("NVLink", 450e9, 2e-6)  # H100 class, 18 links
PCIE = Link("PCIe 5", 50e9, 4e-6)
ETHERNET_100 = Link("100 Gbit/s", 12.5e9, 10e-6)
INFINIBAND_400 = Link("400 Gbit/s", 50e9, 5e-6)
# GPUs, the link inside a node, the one between nodes.
Setup = tuple[int, Link, Link]
SETUPS: tuple[Setup, ...] = (
    (1, NVLINK, NVLINK),
    (8, NVLINK, NVLINK),
    (8, PCIE, PCIE),
    (64, NVLINK, ETHERNET_100),
    (64, NVLINK, INFINIBAND_400),
)


def count(network: nn.Module) -> Network:
    """What can be counted of a network for pictures of 32 x 32."""
    pictures = torch.zeros(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        network(pictures).sum().backward()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Network(type(network).__name__, parameters, counter.get_total_flops() / len(pictures))


def communication(network: Network, gpus: int, batch: float, inside: Link, between: Link) -> float:
    """Seconds of the all-reduce and the all-gather of a step."""
    nodes = math.ceil(gpus / GPUS_OF_A_NODE)
    crossings = nodes if nodes > 1 else 0
    turn = (gpus - crossings) * inside.latency + crossings * between.latency
    bandwidth = min(inside.bandwidth, between.bandwidth) if nodes > 1 else inside.bandwidth
    others = (gpus - 1) / gpus
    reduce = 2 * others * (4 * network.parameters / bandwidth + turn)
    gather = others * (BYTES_OF_A_PICTURE * batch / bandwidth + turn)
    return reduce + gather


def step_seconds(
    network: Network, machine: Machine, gpus: int, batch: float, inside: Link, between: Link
) -> float:
    """Seconds of a step of `batch` pictures, over all GPUs together."""
    compute = batch / gpus * network.operations / (machine.share * machine.peak)
    return max(machine.floor, compute + communication(network, gpus, batch, inside, between))


def least(holds: Callable[[int], bool], highest: int = 2**22) -> int | None:
    """The smallest number up to `highest` for which `holds`, None if there is none."""
    if not holds(highest):
        return None
    low, high = 0, highest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def stops_helping(network: Network, machine: Machine, setup: Setup) -> int | None:
    """Pictures per GPU on half of the GPUs, below which all of them save less than `LEAST_GAIN`."""
    gpus, *links = setup

    def helps(pictures: int) -> bool:
        batch = gpus // 2 * pictures
        before = step_seconds(network, machine, gpus // 2, batch, *links)
        return step_seconds(network, machine, gpus, batch, *links) <= (1 - LEAST_GAIN) * before

    return least(helps)


def pays_from(network: Network, machine: Machine, setup: Setup) -> int | None:
    """Pictures per GPU from which each of them does `GOOD` of what it would do alone."""
    gpus, *links = setup

    def pays(pictures: int) -> bool:
        alone = step_seconds(network, machine, 1, gpus * pictures, *links)
        together = step_seconds(network, machine, gpus, gpus * pictures, *links)
        return alone >= GOOD * gpus * together

    return least(pays)


def name_of(setup: Setup) -> str:
    gpus, inside, between = setup
    if gpus == 1:
        return "1 GPU"
    nodes = gpus // GPUS_OF_A_NODE
    return f"{gpus} GPUs, {inside.name}" if nodes == 1 else f"{gpus} GPUs, {between.name}"


def table(networks: Sequence[Network], machine: Machine) -> str:
    """Markdown: the step in milliseconds; in brackets what a GPU does of what it would alone."""
    lines = heading(["network", "global batch", *(name_of(setup) for setup in SETUPS)])
    for network in networks:
        for batch in BATCHES:
            alone = step_seconds(network, machine, 1, batch, NVLINK, NVLINK)
            cells = []
            for gpus, *links in SETUPS:
                seconds = step_seconds(network, machine, gpus, batch, *links)
                share = f" ({alone / gpus / seconds:.0%})" if gpus > 1 else ""
                cells.append(in_milliseconds(seconds) + share)
            lines.append(f"| {network.name} | {batch:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_limits(networks: Sequence[Network], machine: Machine) -> str:
    """Markdown: pictures per GPU below which more GPUs do not help, and from which they pay."""
    lines = heading(["network", "pictures per GPU", *(name_of(setup) for setup in SETUPS[1:])])
    rows = {
        f"doubling to it saves under {LEAST_GAIN:.0%} of a step, if before it fewer than": (
            stops_helping
        ),
        f"{GOOD:.0%} efficient from": pays_from,
    }
    for network in networks:
        for name, limit in rows.items():
            found = [limit(network, machine, setup) for setup in SETUPS[1:]]
            cells = ["never" if pictures is None else f"{pictures:,}" for pictures in found]
            lines.append(f"| {network.name} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def in_milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def sentence(network: Network, machine: Machine) -> str:
    """What a user needs to know, from the first of the tables of limits."""
    setup = SETUPS[1]
    limit, fills = stops_helping(network, machine, setup), busy_from(network, machine)
    return (
        f"{network.name}: below about {limit:,} pictures per GPU more GPUs ({setup[1].name}) stop "
        f"helping; one GPU alone waits for its host up to {fills:,.0f} pictures in a batch."
    )


def busy_from(network: Network, machine: Machine) -> float:
    """Pictures in the batch of one GPU that take it as long as the floor."""
    return machine.floor * machine.share * machine.peak / network.operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peak", type=float, default=67, help="TFLOP/s of a GPU (67: H100 fp32)")
    parser.add_argument("--share", type=float, default=0.3, help="of the peak that is reached")
    parser.add_argument("--floor", type=float, default=1.0, help="milliseconds of the host a step")
    asked = parser.parse_args()
    machine = Machine(asked.peak * 1e12, asked.share, asked.floor / 1000)
    networks = [count(CNN()), count(ResNet9())]
    print("On paper, not measured.\n")
    print(
        f"Assumed: {asked.peak:g} TFLOP/s a GPU at {asked.share:.0%} of that, {asked.floor:g} ms "
        f"of the host for each step, {GPUS_OF_A_NODE} GPUs in a node,"
    )
    for link in (NVLINK, PCIE, ETHERNET_100, INFINIBAND_400):
        print(f"{link.name} {link.bandwidth / 1e9:g} GB/s and {link.latency * 1e6:g} us a hop,")
    print("float32 gradients, rings, nothing overlapped.\n")
    for network in networks:
        print(
            f"Counted: {network.name} has {network.parameters:,} parameters, so "
            f"{4 * network.parameters / 1e6:.2f} MB are all-reduced a step, and "
            f"{network.operations / 1e6:,.1f} MFLOP a picture, forward and backward."
        )
    print(f"\n{table(networks, machine)}\n\n{table_of_limits(networks, machine)}\n")
    for network in networks:
        print(sentence(network, machine))


if __name__ == "__main__":
    main()
