"""Learning-rate fans: every run of a cell by its rate, and the basin of good rates."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from research.pictures.style import BLUE, GREEN, MUTED, SKY, VERMILION
from research.statistics.basin import Basin
from research.statistics.figures.panels import (
    Panel,
    core,
    finish,
    light_grid,
    name_axes,
    new_panel,
    nothing_to_show,
    write_values,
)
from research.statistics.report import numbers


def draw_fans(
    fans: Mapping[str, Basin], metric: str, *, higher_is_better: bool = True
) -> list[Panel]:
    """A panel for each cell, all with the same axes, so that heights and widths compare."""
    tried = [rate for fan in fans.values() for rate in fan.rates]
    across = [rate.rate for rate in tried]
    ends = core([value for rate in tried for value in rate.values])
    return [
        draw_fan(name, fan, number, metric, across, ends, higher_is_better)
        for number, (name, fan) in enumerate(fans.items(), start=1)
    ]


def draw_fan(
    name: str,
    fan: Basin,
    number: int,
    metric: str,
    across: Sequence[float],
    ends: tuple[float, float],
    higher_is_better: bool,
) -> Panel:
    """Runs as dots, the smooth curve, the basin shaded, what diverged as crosses at the edge."""
    figure, axes = new_panel(name, width=300, height=232, top=48)
    told = basin_text(fan)
    axes.text(0, 1.03, told, transform=axes.transAxes, size=7.5, color=MUTED, va="bottom")
    name, words = f"fan-{number}", f"{name}: {told}; {fan.runs} runs"
    if not fan.rates:
        nothing_to_show(axes, "no run")
        return finish(name, figure, words)
    bottom, top = ends
    worst = bottom if higher_is_better else top
    axes.set_xscale("log")
    axes.set_xlim(min(across) / 1.6, max(across) * 1.6)
    axes.set_ylim(bottom, top)
    if fan.low is not None and fan.high is not None:
        axes.axvspan(fan.low, fan.high, color=GREEN, alpha=0.14, linewidth=0)
    if fan.curve:
        axes.plot(*zip(*fan.curve, strict=True), color=BLUE, linewidth=1.2)
    if fan.best_rate is not None:
        axes.axvline(fan.best_rate, color=GREEN, linewidth=1.4)
    shown = [(rate.rate, value) for rate in fan.rates for value in rate.values]
    inside = [(rate, value) for rate, value in shown if bottom <= value <= top]
    beyond = [rate for rate, value in shown if not bottom <= value <= top]
    broken = [rate.rate for rate in fan.rates if rate.diverged > 0]
    draw_dots(axes, [rate for rate, _ in inside], [value for _, value in inside], "o", SKY)
    draw_dots(axes, beyond, [worst] * len(beyond), "v", BLUE)
    draw_dots(axes, broken, [worst] * len(broken), "x", VERMILION)
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: numbers.rate(rate)))
    light_grid(axes)
    write_values(axes, metric)
    name_axes(axes, "learning rate")
    return finish(name, figure, words)


def draw_dots(axes: Axes, x: Sequence[float], y: Sequence[float], marker: str, color: str) -> None:
    axes.plot(x, y, linestyle="", marker=marker, markersize=5, color=color, clip_on=False, zorder=3)


def basin_text(fan: Basin) -> str:
    """`best 0.03, good over 1.3 decades`; at least so many where the search ended inside."""
    if fan.best_rate is None:
        return "every run diverged" if fan.runs else "no run"
    at_least = "at least " if fan.open_low or fan.open_high else ""
    return f"best {numbers.rate(fan.best_rate)}, good over {at_least}{fan.decades:.1f} decades"
