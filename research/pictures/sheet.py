"""Sheets of small pictures with captions, laid out pixel by pixel.

Pillow draws them: 32 tiles with captions take 25 ms, a hundred axes of matplotlib 0.8 s; and each
pixel of a picture stays a square of whole pixels. Letters: N tiles of height H and width W.
"""

import functools
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from research.pictures.style import INK, MUTED, PAPER, cut_middle

MARGIN = 20
TITLE_HEIGHT = 68


class Sheet:
    """A white sheet of `width` by `height` pixels; places are (x, y) from the upper left."""

    def __init__(self, width: int, height: int, title: str, subtitle: str = "") -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        space = width - 2 * MARGIN
        self.write(title, MARGIN, 14, 18, bold=True, space=space)
        self.write(subtitle, MARGIN, 40, 13, color=MUTED, space=space)

    def paste(self, tile: np.ndarray, x: int, y: int) -> None:
        """Put a tile, uint8 (H, W, 3), with its upper left corner at (x, y)."""
        self.image.paste(Image.fromarray(tile), (x, y))

    def write(
        self,
        text: str,
        x: float,
        y: float,
        size: int = 12,
        color: str = INK,
        bold: bool = False,
        space: float | None = None,
        anchor: str = "la",
    ) -> None:
        """Write a line, cut with "…" where it is wider than `space`; `anchor` as in Pillow."""
        font = load_font(size, bold)
        self.draw.text(
            (x, y), text if space is None else cut(text, font, space), color, font, anchor
        )

    def save(self, path: Path) -> None:
        self.image.save(path, format="PNG")


@functools.cache
def load_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; letters that it lacks become boxes."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf")
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def cut(text: str, font: ImageFont.FreeTypeFont, space: float) -> str:
    """The text, or as much of its beginning and end as `space` pixels take, with "…" between."""
    shorter, length = text, len(text)
    while length > 1 and font.getlength(shorter) > space:
        length -= 1
        shorter = cut_middle(text, length)
    return shorter


def fit_tiles(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 (N, H, W, 3) enlarged or reduced by a whole number, to at most `side` pixels.

    Enlarged, each pixel becomes a square of its own colour; reduced, squares become their mean.
    """
    longest = max(pixels.shape[1:3])
    if longest <= side:
        factor = side // longest
        return pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    factor = -(-longest // side)
    return np.stack([np.asarray(Image.fromarray(tile).reduce(factor)) for tile in pixels])
