"""The noise of one experiment: how much each source moves the result, what n seeds can show."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.ticker import MaxNLocator

from research.pictures.style import BLUE, GREEN, INK, SKY
from research.statistics.figures.panels import (
    Panel,
    finish,
    finite,
    legend,
    light_grid,
    name_axes,
    new_panel,
    short,
    write_values,
)
from research.statistics.noise import Component, Noise
from research.statistics.readable import Readable
from research.statistics.report import numbers


def components(noise: Noise) -> list[Component]:
    """All sources, the hardware where it is known, and at last all of them together."""
    hardware = [noise.hardware] if noise.hardware is not None else []
    return [*noise.sources, *hardware, replace(noise.total, source="all together")]


def draw_sources(noise: Noise, metric: str) -> Panel:
    """A bar for each source, as long as the standard deviation it causes, and its interval."""
    rows = components(noise)
    figure, axes = new_panel(
        "Standard deviation by source", height=84 + 36 * len(rows), left=14, right=52
    )
    reach = max(finite([end for each in rows for end in (each.deviation, each.interval.high)]))
    axes.set_xlim(0, 1.05 * reach or 1.0)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_yticks([])
    for row, each in enumerate(rows):
        color = BLUE if each.source == "all together" else SKY
        axes.barh(row + 0.1, each.deviation, height=0.32, color=color, linewidth=0)
        ends = [each.interval.low, each.interval.high]
        axes.plot(ends, [row + 0.1] * 2, color=INK, linewidth=1.2)
        beside = axes.get_yaxis_transform()
        axes.text(
            0, row - 0.28, short(each.source, 30), color=INK, parse_math=False, transform=beside,
            size=8, va="center",
        )  # fmt: skip
        told = numbers.bare(each.deviation, metric)
        axes.text(1.03, row + 0.1, told, color=INK, transform=beside, size=8, va="center")
    light_grid(axes, "x")
    write_values(axes, metric, on_x=True)
    name_axes(axes, f"points of {metric}" if numbers.is_share(metric) else metric)
    told_all = (f"{each.source} {numbers.bare(each.deviation, metric)}" for each in rows)
    return finish("noise", figure, f"standard deviation of {metric}: {', '.join(told_all)}")


def draw_readable(readable: Sequence[Readable], metric: str) -> Panel:
    """The smallest difference worth reading, by the number of seeds, paired and unpaired."""
    figure, axes = new_panel("Smallest difference worth reading", top=50)
    counts = [each.n for each in readable]
    unpaired = [each.unpaired for each in readable]
    axes.plot(counts, unpaired, color=BLUE, linewidth=1.8, label="other seeds in each arm")
    paired = [(each.n, each.paired) for each in readable if each.paired is not None]
    if paired:
        axes.plot(*zip(*paired, strict=True), color=GREEN, linewidth=1.8, label="paired by seed")
    axes.set_ylim(0, 1.08 * max(unpaired) or 1.0)
    axes.set_xlim(min(counts) - 0.5, max(counts) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    light_grid(axes)
    write_values(axes, metric)
    name_axes(axes, "seeds of each arm", "points" if numbers.is_share(metric) else metric)
    legend(axes, loc="upper right")
    return finish("readable", figure, "smallest readable difference by number of seeds")
