"""A training batch as the network sees it: after augmentation, its normalisation undone.

B pictures of H rows and W columns.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from research.data.normalization import Normalization
from research.pictures.sheet import MARGIN, TITLE_HEIGHT, Sheet, fit_tiles
from research.pictures.style import TIMES, tidy


def undo_normalization(images: Tensor, normalization: Normalization) -> Tensor:
    """The bytes that `normalize` made floats of: uint8 (B, H, W, 3) of float (B, 3, H, W).

    Exact for float32. What lies outside of 0..255 is clipped; what is no number becomes black.
    """
    scale, shift = normalization.factors(1)
    values = images.detach().cpu().float().permute(0, 2, 3, 1)
    pixels = ((values - shift) / scale).round().nan_to_num(nan=0.0).clamp(0, 255)
    return pixels.byte().contiguous()


def draw_batch(
    images: Tensor,
    labels: Tensor,
    normalization: Normalization,
    class_names: Sequence[str],
    path: Path,
    count: int = 32,
) -> None:
    """Write the first `count` pictures of a batch and their classes as a PNG sheet.

    Images (B, 3, H, W), normalised; labels (B,).
    """
    pixels = undo_normalization(images[:count], normalization).numpy()
    height, width = images.shape[2:]
    sheet = make_sheet(
        pixels,
        [tidy(class_names[label], 40) for label in labels[:count].tolist()],
        "A training batch, as the network sees it",
        f"after augmentation; {len(pixels)} of {len(images)} pictures of "
        f"{height} {TIMES} {width} pixels",
    )
    sheet.save(path)


def make_sheet(pixels: np.ndarray, captions: Sequence[str], title: str, subtitle: str) -> Sheet:
    """Pictures uint8 (N, H, W, 3), 8 in a row, each above its caption."""
    columns, cell, caption = min(8, max(4, len(pixels))), 112, 26
    tiles = fit_tiles(pixels, 96)
    height = tiles.shape[1]
    rows = math.ceil(len(tiles) / columns)
    sheet = Sheet(
        2 * MARGIN + columns * cell - (cell - 96),
        TITLE_HEIGHT + rows * (height + caption) + MARGIN // 2,
        title,
        subtitle,
    )
    for number, (tile, words) in enumerate(zip(tiles, captions, strict=True)):
        x = MARGIN + cell * (number % columns)
        y = TITLE_HEIGHT + (height + caption) * (number // columns)
        sheet.paste(tile, x, y)
        sheet.write(words, x, y + height + 4, 12, space=cell - 8)
    return sheet
