"""One look for all pictures: colours, type, axes, and names made fit to print.

Colours are Okabe and Ito's (2008), told apart by colour-blind readers: blue is right or validation,
vermilion is wrong, amber is training.
"""

import math
import re
import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#1f2933", "#5f6b7a", "#d9dee4", "#ffffff"
BLUE, VERMILION, AMBER, GREEN, SKY = "#0072b2", "#d55e00", "#e69f00", "#009e73", "#7cc4ec"
PIXELS_PER_INCH = 100
TIMES = "\N{MULTIPLICATION SIGN}"


def new_figure(width: int, height: int, title: str, subtitle: str = "") -> Figure:
    """A figure of `width` by `height` pixels with its title at the upper left."""
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH),
        dpi=PIXELS_PER_INCH,
        facecolor=PAPER,
    )
    left = 20 / width
    figure.text(
        left, 1 - 18 / height, title, size=13, weight="bold", color=INK, va="top", parse_math=False
    )
    figure.text(left, 1 - 42 / height, subtitle, size=10, color=MUTED, va="top", parse_math=False)
    return figure


def add_axes(
    figure: Figure, left: float, top: float, width: float, height: float, title: str = ""
) -> Axes:
    """Axes at this place, in pixels from the upper left corner, with light lines."""
    total_width, total_height = figure.get_size_inches() * PIXELS_PER_INCH
    axes = figure.add_axes(
        (
            left / total_width,
            1 - (top + height) / total_height,
            width / total_width,
            height / total_height,
        )
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, which="both")
    axes.tick_params(axis="x", pad=7)
    axes.set_axisbelow(True)
    if title:
        # With y given, matplotlib does not measure all labels to find a place for the title.
        axes.set_title(title, loc="left", y=1.0, pad=7, size=10.5, weight="bold", color=INK)
    return axes


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG; a letter that the font lacks becomes a box, not a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        figure.savefig(path, format="png", facecolor=PAPER)


def tidy(name: str, length: int = 24) -> str:
    """The name on one line, of at most `length` letters, with nothing that cannot be written."""
    name = name.encode("utf-8", "replace").decode("utf-8")
    name = re.sub(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff\s]+", " ", name).strip()
    return name if len(name) <= length else cut_middle(name, length)


def cut_middle(name: str, length: int) -> str:
    """`length` letters of the name, its beginning and its end: there names differ most."""
    tail = (length - 1) // 3
    head = max(length - 1 - tail, 0)
    return f"{name[:head].rstrip()}…{name[len(name) - tail :].lstrip()}"


def percent(share: float, digits: int = 0) -> str:
    """The share 0..1 as "12 %"; "?" where it is no number, and 0 or 100 only where it is exact."""
    if not math.isfinite(share):
        return "?"
    smallest = 10.0**-digits
    value = 100 * share
    if 0 < value < smallest / 2:
        return f"<{smallest:.{digits}f} %"
    if 100 - smallest / 2 < value < 100:
        return f">{100 - smallest:.{digits}f} %"
    return f"{value:.{digits}f} %"
