"""Labelled pictures in memory, and how they are parted into train, validation and test.

N pictures of H rows and W columns.  A picture is kept as bytes in the order row, column, channel
(torch's channels_last): a quarter of the memory of floats, and the order convolutions like best.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Split:
    """Pictures `images`, uint8 (N, 3, H, W) in channels_last order, and `labels`, int64 (N,).

    Other memory orders are accepted and copied into channels_last.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(
                f"the pictures of a split are {self.images.dtype} {tuple(self.images.shape)}; "
                f"they must be torch.uint8 (N, 3, H, W)"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"the labels of a split are {self.labels.dtype} {tuple(self.labels.shape)}; "
                f"they must be torch.int64 ({len(self.images)},), one for each picture"
            )
        pixels = self.images.permute(0, 2, 3, 1).contiguous()
        object.__setattr__(self, "images", pixels.permute(0, 3, 1, 2))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> Tensor:
        """The pictures as (N, H, W, 3), contiguous: the same memory as `images`."""
        return self.images.permute(0, 2, 3, 1)

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.labels.nbytes

    def digest(self) -> str:
        """The pictures and labels as 16 hexadecimal digits: equal for equal bytes in equal order.

        0.6 s for each gigabyte (SHA-256 in hardware), once: a process may train on them many times.
        """
        written = self.images._version, self.labels._version  # torch counts what is written
        if vars(self).get("_digest_at") == written:
            return self.__dict__["_digest"]
        sha = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        sha.update(self.pixels.cpu().numpy().data)
        sha.update(self.labels.cpu().numpy().data)
        vars(self).update(_digest=sha.hexdigest()[:16], _digest_at=written)
        return self.__dict__["_digest"]

    def select(self, places: Tensor) -> "Split":
        """Return a copy of the pictures and labels at `places`, int64 (n,), in that order."""
        pixels = self.pixels.index_select(0, places)
        return Split(pixels.permute(0, 3, 1, 2), self.labels.index_select(0, places))

    def rearrange(self, kept: Tensor, taken: Tensor) -> tuple["Split", "Split"]:
        """Return the pictures at `kept` and those at `taken` (each ascending, together all).

        They lie one behind the other in the memory of this split, which is written anew: parting
        so takes room for the second only, where `select` takes as much again as there is.
        """
        second = self.select(taken)
        start = 0
        for places in kept.split(ROWS_AT_ONCE):
            # None of these comes from before the place it goes to, so nothing needed is lost.
            here = slice(start, start + len(places))
            self.pixels[here] = self.pixels.index_select(0, places)
            self.labels[here] = self.labels.index_select(0, places)
            start += len(places)
        self.pixels[len(kept) :], self.labels[len(kept) :] = second.pixels, second.labels
        return (
            Split(self.images[: len(kept)], self.labels[: len(kept)]),
            Split(self.images[len(kept) :], self.labels[len(kept) :]),
        )

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """What a model learns from, is chosen by, and is judged on; no picture is in two of them."""

    train: Split
    val: Split
    test: Split


def part(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the places that stay and the places that are taken away, each ascending.

    Of each class, `fraction` of its pictures is taken, rounded; but at least one, and never the
    last one, so that a class of two or more pictures is on both sides.  Fraction 0 takes none.
    """
    taken = torch.zeros(len(labels), dtype=torch.bool)
    if fraction > 0:
        for label in labels.unique():
            members = (labels == label).nonzero().squeeze(1)
            count = min(max(round(len(members) * fraction), 1), len(members) - 1)
            taken[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~taken).nonzero().squeeze(1), taken.nonzero().squeeze(1)
