"""What the layers of a network make of a few pictures, and what its first layer looks for.

B pictures, C channels, H rows, W columns.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from research.data.normalization import Normalization
from research.pictures.batch import undo_normalization
from research.pictures.inspection import is_layer, place, undisturbed
from research.pictures.sheet import MARGIN, TITLE_HEIGHT, Sheet, fit_tiles
from research.pictures.style import MUTED, TIMES, tidy
from research.pictures.trace import describe, kind_of

SIDE = 64  # pixels of a map on the sheet; 32, 16, 8 and 4 are enlarged to it exactly
LABELS = 190  # pixels for the layers' names


@dataclass(frozen=True)
class Maps:
    """What a layer handed on: float32 (B, C, H, W), of the channels that are shown."""

    name: str
    description: str
    shape: tuple[int, ...]
    values: Tensor


def record_maps(
    network: nn.Module, images: Tensor, channels: int = 6, most: int = 12
) -> list[Maps]:
    """The first `channels` maps after convolutions, poolings and activations, in their order.

    Images (B, C, H, W). Left out are normalisation, which only shifts and stretches each map, and
    maps of one cell. Where there are more than `most` such layers, they are spread from the first
    to the last.
    """
    recorded: list[Maps] = []

    def record(path: str, module: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
            # A copy: an activation may work in place on what it was given.
            # The first are of the pictures themselves, where a network looks at several views.
            values = output[: len(images), :channels].float().cpu().clone()
            recorded.append(Maps(path, describe(module), tuple(output.shape[1:]), values))

    handles = [
        module.register_forward_hook(
            lambda module, _, output, path=path: record(path, module, output)
        )
        for path, module in network.named_modules()
        if is_layer(module) and kind_of(module) in {"convolution", "pooling", "activation"}
    ]
    try:
        with undisturbed(network):
            network(images.to(place(network)))
    finally:
        for handle in handles:
            handle.remove()
    if len(recorded) > most:
        recorded = [recorded[round(i * (len(recorded) - 1) / (most - 1))] for i in range(most)]
    return recorded


def draw_feature_maps(
    network: nn.Module,
    images: Tensor,
    normalization: Normalization,
    path: Path,
    count: int = 3,
    channels: int = 6,
    most_layers: int = 12,
) -> None:
    """Write a sheet of feature maps as PNG: a row for each layer, a block for each picture.

    Images (B, 3, H, W), normalised, of which the first `count` are shown. Each map is scaled on its
    own, dark at its least and bright at its greatest value. A network without maps, such as a
    linear one, has a sheet that says so.
    """
    images = images[:count]
    layers = record_maps(network, images, channels, most_layers)
    block = channels * (SIDE + 3) + 20
    width = 2 * MARGIN + LABELS + len(images) * block - 20
    top = TITLE_HEIGHT + 128 + 12
    title = f"Feature maps of {len(images)} pictures, layer by layer"
    sheet = Sheet(
        max(width, 560),
        top + len(layers) * (SIDE + 8) + MARGIN,
        title if layers else "This network has no feature maps",
        f"at most {most_layers} layers, the first {channels} channels of each; every map scaled on "
        "its own, from dark (least) to bright (greatest)"
        if layers
        else "none of its convolutions, poolings and activations hands on maps (B, C, H, W)",
    )
    sheet.write("input", MARGIN, TITLE_HEIGHT, 12, bold=True)
    sheet.write(show_shape(images.shape[1:]), MARGIN, TITLE_HEIGHT + 17, 11, MUTED)
    inputs = fit_tiles(undo_normalization(images, normalization).numpy(), 128)
    for number, tile in enumerate(inputs):
        sheet.paste(tile, MARGIN + LABELS + number * block, TITLE_HEIGHT)
    for row, maps in enumerate(layers):
        y = top + row * (SIDE + 8)
        sheet.write(ending_of(maps.name), MARGIN, y + 2, 12, bold=True, space=LABELS - 10)
        sheet.write(maps.description, MARGIN, y + 20, 11, MUTED, space=LABELS - 10)
        sheet.write(show_shape(maps.shape), MARGIN, y + 36, 11, MUTED)
        for number, values in enumerate(maps.values):
            for channel, tile in enumerate(fit_tiles(color_maps(values.numpy()), SIDE)):
                x = MARGIN + LABELS + number * block + channel * (SIDE + 3)
                sheet.paste(tile, x, y)
    sheet.save(path)


def ending_of(name: str, length: int = 23) -> str:
    """The name, cut in front: deep in a network it is the end that tells layers apart."""
    name = tidy(name, 200)
    return name if len(name) <= length else f"…{name[1 - length :]}"


def color_maps(values: np.ndarray) -> np.ndarray:
    """Maps (C, H, W), each scaled on its own to 0..1, as uint8 colours (C, H, W, 3).

    A map of one value is as dark as can be, and so is what is not finite.
    """
    finite = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    known = np.where(np.isfinite(finite).any(axis=(1, 2), keepdims=True), finite, 0.0)
    least = np.nanmin(known, axis=(1, 2), keepdims=True)
    span = np.nanmax(known, axis=(1, 2), keepdims=True) - least
    scaled = np.nan_to_num((known - least) / np.where(span > 0, span, 1.0))
    return matplotlib.colormaps["viridis"](scaled, bytes=True)[..., :3]


def show_shape(shape: tuple[int, ...] | torch.Size) -> str:
    return f" {TIMES} ".join(str(size) for size in shape)


# ---- filters -------------------------------------------------------------------------------------


def find_filters(network: nn.Module) -> tuple[str, Tensor] | None:
    """The name and weights, float32 (N, C, H, W) with C 1 or 3, of the first convolution.

    None where the network has none, or one of other channels.
    """
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            weights = module.weight.detach().float().cpu()
            return (path or type(module).__name__, weights) if weights.shape[1] in {1, 3} else None
    return None


def color_filters(weights: Tensor) -> np.ndarray:
    """Weights (N, C, H, W), C 1 or 3, as uint8 (N, H, W, 3): grey is 0, each filter on its own."""
    weights = weights.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = weights.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    pixels = (127.5 + 127.5 * weights / largest).round().byte()
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def draw_filters(network: nn.Module, path: Path, most: int = 128) -> bool:
    """Write the first convolution's filters as a PNG of colour tiles, and say whether there are.

    False, and no file, where the first convolution does not see pictures of 1 or 3 channels, or
    there is none. A colour of a filter is what it answers to most at that place.
    """
    found = find_filters(network)
    if found is None:
        return False
    name, weights = found
    tiles = fit_tiles(color_filters(weights[:most]), 56)
    columns = 8 if len(tiles) <= 64 else 16
    rows, cell = math.ceil(len(tiles) / columns), tiles.shape[2] + 8
    shown = f"{len(tiles)} of " if len(tiles) < len(weights) else ""
    sheet = Sheet(
        max(2 * MARGIN + columns * cell - 8, 560),
        TITLE_HEIGHT + rows * (tiles.shape[1] + 8) + MARGIN - 8,
        f"Filters of the first convolution, {tidy(name, 30)}",
        f"{shown}{len(weights)} filters of {show_shape(weights.shape[2:])}; grey is 0, "
        "each scaled on its own",
    )
    for number, tile in enumerate(tiles):
        y = TITLE_HEIGHT + (tiles.shape[1] + 8) * (number // columns)
        sheet.paste(tile, MARGIN + cell * (number % columns), y)
    sheet.save(path)
    return True
