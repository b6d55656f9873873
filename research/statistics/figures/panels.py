"""A panel: one small figure of 360 pixels, or wider, as SVG.

Small, so that a page sets as many beside each other as fit, and a phone one below the other, in a
type that can be read. The text stays text: letters take the reader's own font, narrower than the
one that is measured here. In the page, colours are names ("var(--ink)") that light and dark
resolve; as a file of its own, a panel is light.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from research.pictures.style import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    PAPER,
    PIXELS_PER_INCH,
    SKY,
    VERMILION,
    add_axes,
    new_figure,
    tidy,
)
from research.statistics.report import numbers

WIDTH, HEIGHT = 360, 270
PURPLE = "#aa4a8f"
# Told apart by colour-blind readers (Okabe and Ito, 2008), the purple darker to be seen on white.
COLORS = (BLUE, VERMILION, GREEN, PURPLE, AMBER, INK)
NAMES = {
    INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", BLUE: "blue", VERMILION: "vermilion",
    AMBER: "amber", GREEN: "green", SKY: "sky", PURPLE: "purple", "#000000": "ink",
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Panel:
    """A figure as an SVG document of `width` pixels, and what it shows in words.

    `name` is for its file and unique in a report.
    """

    name: str
    svg: str
    width: int
    words: str


# ---- SVG -----------------------------------------------------------------------------------------


def finish(name: str, figure: Figure, words: str) -> Panel:
    """The panel of a figure that is drawn: the same bytes for the same figure."""
    looks = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name})
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    file = io.StringIO()
    with looks, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)  # a comment repeats every text
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([^;']*?)'DejaVu Sans'[^;\"]*", rf"font: \g<1>{FONT}", svg)
    svg = in_tags(svg, r"(\d+\.\d{2})\d+", r"\1")
    svg = re.sub(r"\n\s*", "\n", svg)
    width = round(figure.get_size_inches()[0] * PIXELS_PER_INCH)
    return Panel(name, svg, width, tidy(words, 2000))


def to_inline(panel: Panel) -> str:
    """The panel to stand within a page: names for colours, ids of its own, as wide as its place."""
    svg = re.sub(r"<style.*?</style>", "", panel.svg, flags=re.DOTALL)  # it would be the page's
    for color, name in NAMES.items():
        svg = in_tags(svg, color, f"var(--{name})")
    identity = re.sub(r"[^a-z0-9]+", "-", panel.name.lower())
    svg = in_tags(svg, r'\bid="', f'id="{identity}-')
    svg = in_tags(svg, r"url\(#", f"url(#{identity}-")
    svg = in_tags(svg, r'(?:xlink:)?href="#', f'href="#{identity}-')
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">") + 1 :]
    return f'<svg {box[0]} role="img" aria-label="{escape(panel.words)}">{body}'


def in_tags(svg: str, pattern: str, replacement: str) -> str:
    """Replaced in tags only: a text may be anything."""
    return re.sub(r"<[^>]*>", lambda tag: re.sub(pattern, replacement, tag[0]), svg)


# ---- axes ----------------------------------------------------------------------------------------


def new_panel(
    title: str = "",
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    left: int = 52,
    right: int = 12,
    top: int = 34,
    bottom: int = 44,
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, the margins in pixels."""
    figure = new_figure(width, height, "")
    axes = add_axes(figure, left, top, width - left - right, height - top - bottom)
    letters = max((width - 24) // 8, 8)
    place = 8 / width, 1 - 8 / height
    figure.text(
        *place, tidy(title, letters), size=9.5, weight="bold", color=INK, va="top", parse_math=False
    )
    axes.tick_params(labelsize=8, pad=4)
    return figure, axes


def name_axes(axes: Axes, x: str = "", y: str = "") -> None:
    """What is on the axes; the vertical one's name lies above it, where it can be read."""
    if x:
        axes.set_xlabel(x, color=MUTED, size=8, parse_math=False)
    if y:
        axes.text(
            0, 1.02, y, transform=axes.transAxes, color=MUTED, size=8, va="bottom", parse_math=False
        )


def write_values(axes: Axes, metric: str, *, on_x: bool = False, sign: bool = False) -> None:
    """Ticks of the axis in the metric's own unit: whole percents, or as they come."""
    axis = axes.xaxis if on_x else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    low, high = axes.get_xlim() if on_x else axes.get_ylim()
    scale = 100 if numbers.is_share(metric) else 1
    step = scale * abs(high - low) / 5
    digits = 0 if step >= 1 else min(1 - math.floor(math.log10(step)), 6) if step > 0 else 2

    def write(number: float, _: object) -> str:
        text = numbers.signed(scale * number, digits)
        if "." in text:
            text = text.rstrip("0").rstrip(".")
        return f"+{text}" if sign and number > 0 and text != "0" else text

    axis.set_major_formatter(FuncFormatter(write))


def light_grid(axes: Axes, axis: Literal["x", "y"] = "y") -> None:
    axes.grid(visible=True, axis=axis, color=LINE, linewidth=0.7)


def nothing_to_show(axes: Axes, words: str) -> None:
    """Say in the middle of empty axes why they are empty."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(
        0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", size=8.5, color=MUTED
    )


def finite(values: Iterable[float | None]) -> list[float]:
    """The values that are finite numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]


def limits(values: Sequence[float], *, margin: float = 0.06) -> tuple[float, float]:
    """Ends of an axis that holds the finite values, with some room; 0 to 1 for none."""
    found = finite(values)
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    room = margin * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def core(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that single values far out do not set: three spreads of the middle half."""
    found = sorted(finite(values))
    if len(found) < 4:
        return limits(found)
    quarter, three = found[len(found) // 4], found[(3 * len(found)) // 4]
    reach = 3 * (three - quarter)
    kept = [value for value in found if quarter - reach <= value <= three + reach]
    return limits(kept if reach > 0 else found)


def short(name: str, length: int = 22) -> str:
    return tidy(name, length)


Corner = Literal["upper left", "upper right"]


def legend(axes: Axes, loc: Corner, at: tuple[float, float] = (1.0, 1.0), columns: int = 1) -> None:
    """The legend in small type without a frame; names are no mathematics."""
    shown = axes.legend(
        loc=loc,
        bbox_to_anchor=at,
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.4,
        borderaxespad=0.2,
        columnspacing=1.2,
    )
    for text in shown.get_texts():
        text.set_parse_math(False)
