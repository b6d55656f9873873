"""Random crop, flip and cutout: each picture its own draw, each batch a handful of operations.

All draws of an epoch are made at once, on the CPU, and belong to the places of the epoch's order:
the picture at place 17 of epoch 3 is altered the same way whatever the batch size, the device or
the number of processes.  A picture of 32x32, shuffled, cropped, flipped and normalised, takes 6 to
10 us of one busy core; torchvision's transforms, one picture after the other in a DataLoader, take
27 to 60 times as much of the processor's time, measured in turn.

B pictures of H rows, W columns and C channels, as bytes in memory order (B, H, W, C): a row of a
picture is one run of W * C bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from research.data.streams import stream


@dataclass(frozen=True)
class Draws:
    """What chance decided for each of B places; None where that augmentation is off."""

    offsets: Tensor | None = None  # int64 (B, 2): the crop's first row and column, 0..2 * padding
    flips: Tensor | None = None  # bool (B,)
    centers: Tensor | None = None  # int64 (B, 2): row and column of the hole's centre

    def __getitem__(self, places: slice | Tensor) -> "Draws":
        return self._map(lambda drawn: drawn[places])

    def to(self, device: torch.device) -> "Draws":
        return self._map(lambda drawn: drawn.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        drawn = (self.offsets, self.flips, self.centers)
        return Draws(*(None if tensor is None else change(tensor) for tensor in drawn))


@dataclass(frozen=True)
class Augmentation:
    """Crop from a picture padded by `crop_padding`, mirror half of them, cut a square out.

    The order is crop, flip, cutout; 0 and False turn each off.  `crop_padding` must be smaller
    than the pictures.  With `alternating_flip` one half of them is mirrored in the first epoch, the
    others in the second, and so on (Jordan, 2024, arXiv:2404.00498): each two epochs show both
    sides of every picture, which the independent draws of `horizontal_flip` do for half of them.
    """

    crop_padding: int = 0
    horizontal_flip: bool = False
    cutout: int = 0
    alternating_flip: bool = False

    def draw(
        self,
        num_places: int,
        height: int,
        width: int,
        seed: int,
        epoch: int,
        order: Tensor | None = None,
    ) -> Draws:
        """Return the draws for every place of one epoch; `order` has the picture at each place."""
        offsets = flips = centers = None
        if self.crop_padding > 0:
            choices = 2 * self.crop_padding + 1
            offsets = torch.randint(choices, (num_places, 2), generator=stream(seed, "crop", epoch))
        if self.horizontal_flip:
            flips = torch.rand(num_places, generator=stream(seed, "flip", epoch)) < 0.5
        elif self.alternating_flip:
            # Drawn for the pictures, not for the places: an epoch has to know the one before.
            flips = torch.rand(num_places, generator=stream(seed, "alternating flip")) < 0.5
            flips = flips if epoch % 2 == 0 else ~flips
            flips = flips if order is None else flips[order]
        if self.cutout > 0:
            where = torch.rand(num_places, 2, generator=stream(seed, "cutout", epoch))
            centers = (where * torch.tensor([height, width])).long()
        return Draws(offsets, flips, centers)

    def __call__(self, pixels: Tensor, draws: Draws, color: Tensor) -> Tensor:
        """Return altered copies of `pixels` (B, H, W, C); holes get `color`, (C,)."""
        if draws.offsets is not None:
            pixels = crop(pixels, draws.offsets, self.crop_padding, draws.flips)
        elif draws.flips is not None:
            pixels = flip(pixels, draws.flips)
        if draws.centers is not None:
            pixels = cut_out(pixels, draws.centers, self.cutout, color)
        return pixels


def crop(pixels: Tensor, offsets: Tensor, padding: int, flips: Tensor | None = None) -> Tensor:
    """Return the H x W window at `offsets` (B, 2) of each picture padded by `padding`.

    The border mirrors the picture without repeating its edge (as in Jordan's airbench, 2024,
    and torchvision's padding_mode "reflect"), so a crop brings in no colours of its own.  Windows
    where `flips` (B,) is true are mirrored left to right.
    """
    batch, height, width, channels = pixels.shape
    period = 2 * (width - 1)  # a mirrored row goes there and back, and neither end comes twice
    strips = _strips(pixels)
    length = period + width

    columns = offsets[:, 1] - padding
    first = torch.where(columns < 0, columns + period, columns)
    if flips is not None:
        first = torch.where(flips, width - 1 - columns, first)
    first = first + torch.arange(batch, device=pixels.device) * (height * length)

    rows = torch.arange(2 * padding + 1, device=pixels.device)[:, None]
    rows = rows + torch.arange(-padding, height - padding, device=pixels.device)
    rows = (height - 1) - (height - 1 - rows.abs()).abs()  # mirrored into 0..H-1
    starts = (rows * length).index_select(0, offsets[:, 0]).add_(first[:, None])

    # Any W * C bytes that start at a pixel are a row of some crop: choose among all of them, and
    # each is copied in one piece (0.2 ms for 512 pictures; indexing pixel by pixel takes 2 ms).
    runs = strips.as_strided((batch * height * length - width + 1, width * channels), (channels, 1))
    return runs.index_select(0, starts.flatten()).view(pixels.shape)


def _strips(pixels: Tensor) -> Tensor:
    """Return (B * H, (3 * W - 2) * C): each row, on from its end backward, and forward again.

    Of W pixels of such a strip, each crop of the row is one, flipped or not.
    """
    batch, height, width, channels = pixels.shape
    strips = pixels.new_empty(batch * height, (3 * width - 2) * channels)
    there, turn = width * channels, (width - 1) * channels
    # The pixel at a turn is written twice: copies of whole rows are faster than of W - 1 pixels.
    strips[:, :there] = pixels.reshape(batch * height, there)
    strips[:, turn : turn + there] = _mirror(pixels)
    strips[:, 2 * turn :] = strips[:, :there]
    return strips


def _mirror(pixels: Tensor) -> Tensor:
    """Return the pictures mirrored left to right, as their rows (B * H, W * C)."""
    batch, height, width, channels = pixels.shape
    # All pixels of the batch in reverse, then the rows of the batch back into their order: runs
    # this long are vectorised.  16 us for 64 pictures; `flip(2)` takes 54.
    backward = pixels.reshape(-1, channels).flip(0)
    return backward.view(batch * height, width * channels).flip(0)


def flip(pixels: Tensor, flips: Tensor) -> Tensor:
    """Return the pictures, those where `flips` (B,) is true mirrored left to right."""
    batch = len(pixels)
    both = torch.cat([pixels, _mirror(pixels).view(pixels.shape)])
    # Whole pictures are chosen, each copied in one piece: faster than torch.where on bytes.
    return both.index_select(0, torch.arange(batch, device=pixels.device) + batch * flips)


def cut_out(pixels: Tensor, centers: Tensor, side: int, color: Tensor) -> Tensor:
    """Return the pictures with a square of `side` pixels around `centers` (B, 2) in `color` (C,).

    A centre may be any pixel; what would stick out of the picture is cut off (DeVries and
    Taylor, 2017, arXiv:1708.04552).
    """
    height, width, channels = pixels.shape[1:]
    row_holes = _cover(centers[:, 0], side, height)
    column_holes = _cover(centers[:, 1], side, width).repeat_interleave(channels, 1)
    holes = row_holes[:, :, None] * column_holes[:, None, :]
    colors = color.repeat(width)
    # Byte arithmetic on whole rows is vectorised, torch.where on bytes is not: 0.5 against 2.9 ms.
    return (pixels.flatten(2) * (1 - holes) + colors * holes).view(pixels.shape)


def _cover(centers: Tensor, side: int, length: int) -> Tensor:
    """Return uint8 (B, length): 1 where `side` pixels around the centre lie."""
    distance = torch.arange(length, device=centers.device) - centers[:, None] + side // 2
    return ((distance >= 0) & (distance < side)).to(torch.uint8)
