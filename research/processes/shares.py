"""What the processes of a run hold of one batch, brought together: each then sees the whole batch.

Process r has share number r, a few consecutive rows of the batch, so one share after the other is
the batch that a single process would have had.  A collective: all processes call it alike.

Legend: B rows in a share, C classes, H x W cells; a share may be one row longer than another.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def join(scores: Tensor, labels: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The scores (sum of B, C) or (sum of B, C, H, W), and the labels, of all shares in order.

    `sizes` has the B of each process.  A graph leads to this process's own scores, none to those
    of the others.  Both are contiguous, so that every process computes with them to the same bit.
    """
    own = dist.get_rank()
    rows = torch.cat([as_bytes(scores), as_bytes(labels)], dim=1)  # one collective for both
    assert len(rows) == sizes[own], "the loader tells how many rows it hands out"
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    whole = torch.cat([share[:size] for share, size in zip(gathered, sizes, strict=True)])
    width = as_bytes(scores[:1]).shape[1]
    all_scores, all_labels = (
        from_bytes(whole[:, :width], scores),
        from_bytes(whole[:, width:], labels),
    )
    if scores.requires_grad:
        shares = list(all_scores.split(list(sizes)))
        shares[own] = scores.contiguous()
        all_scores = torch.cat(shares)
    return all_scores, all_labels


def sizes_of_all(own: int, device: torch.device) -> list[int]:
    """The numbers that the processes have, by rank."""
    number = torch.tensor([own], device=device)
    gathered = [torch.empty_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, number)
    return torch.cat(gathered).tolist()


def as_bytes(rows: Tensor) -> Tensor:
    """uint8 (B, bytes in a row)."""
    return rows.detach().contiguous().view(len(rows), -1).view(torch.uint8)


def from_bytes(bytes_of_rows: Tensor, like: Tensor) -> Tensor:
    """The rows again, of the shape and type that the rows of `like` have."""
    return bytes_of_rows.contiguous().view(like.dtype).view(-1, *like.shape[1:])
