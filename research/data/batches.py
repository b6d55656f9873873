"""The batches a model is fed with: shuffled, altered, normalised, many pictures at once.

The whole split lies in memory, so some hundred pictures, the next few batches, are a few operations
on tensors; there are no worker processes and there is no Python per picture.  What comes at which
place of which epoch is fixed by the seed alone: neither other users of random numbers, nor the
device, nor the number of processes, nor a stop and a resumption in the middle of an epoch change
it.

Each global batch is shared among the processes of a run; every picture is in exactly one share.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from research.data.augmentation import Augmentation, Draws
from research.data.normalization import Normalization, normalize
from research.data.split import Split
from research.data.streams import stream

NO_AUGMENTATION = Augmentation()

# How many bytes of pictures are made into batches in one go, a block, by the device on which they
# lie, and how many are altered by one operation, a piece.  Batch by batch would cost more calls
# than work: a step of training leaves nothing of the code that makes batches in the processor's
# caches.  Large pieces do not fit there themselves.  Within a fit of the tutorial's CNN a batch of
# 64 pictures of 32x32 takes 210 us as shipped, in blocks of 1,024 and pieces of 256; 235 in blocks
# of 512 altered in one piece, 300 in four; 184 in blocks of 2,048 and pieces of 512, which take
# twice the memory (medians, 2 cores).  A GPU was not measured.
BYTES_OF_BLOCK = {"cpu": 3 * 2**20, "cuda": 12 * 2**20}
BYTES_OF_PIECE = {"cpu": 3 * 2**18, "cuda": 12 * 2**20}


class Batches:
    """An iterable of (images, labels), one epoch per iteration.

    images: float32 (B, 3, H, W), normalised, in channels_last order; labels: int64 (B,); both on
    `device`.  `split` may lie there already, else each batch is brought there.

    `batch_size` counts the pictures of all `world_size` processes together and is the most that
    a batch may have: an epoch is dealt into as few batches as that allows, their sizes equal to
    within one.  No batch is a small rest, whose noisy step would be the last before validation:
    45,000 pictures in batches of 64 leave a rest of 8, and right after the step on those a
    plain CNN stood at 58 % validation accuracy, one ordinary step later at 63 %, two at 66 %
    (JPEG CIFAR-10, n=1).  This process, number `rank`, gets its share of each batch, give or
    take one picture.  All processes have the same number of batches, none of them empty.

    Without `shuffle` the order is that of the split.  With `reshuffle=False` every epoch has the
    order of epoch 0, as `overfit_batches` needs.  `seed` fixes the order, and the augmentation too
    where that has no seed of its own.

    `place` tells, when an iteration starts, which epoch it is and how many of its batches have
    been used already; without it, iterations are counted from 0.  An iteration starts in the
    middle of the epoch only after `load_state_dict`, which is how Lightning resumes a loader.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        normalization: Normalization,
        *,
        augmentation: Augmentation = NO_AUGMENTATION,
        shuffle: bool = False,
        reshuffle: bool = True,
        seed: int = 0,
        augmentation_seed: int | None = None,
        place: Callable[[], tuple[int, int]] | None = None,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        if batch_size < world_size:
            raise ValueError(
                f"data.batch_size is {batch_size}, for all {world_size} processes together; it "
                f"must be at least {world_size}, so that each gets a picture"
            )
        if len(split) < world_size:
            raise ValueError(
                f"a split has {len(split)} pictures for {world_size} processes; use fewer "
                f"processes (trainer.devices) or more pictures"
            )
        self.batch_size = batch_size
        self._split = split
        self._augmentation = augmentation
        self._shuffle = shuffle
        self._reshuffle = reshuffle
        self._seed = seed
        self._augmentation_seed = seed if augmentation_seed is None else augmentation_seed
        self._place = place
        # An empty tensor turns "cuda" into "cuda:0", the form in which tensors tell their device.
        self._device = torch.empty(0, device=device or split.images.device).device
        self._world_size = world_size
        self._bounds = _deal(len(split), batch_size, world_size)
        self._shares = [_cut(*ends, rank, world_size) for ends in itertools.pairwise(self._bounds)]
        sizes = (share.stop - share.start for share in self._shares)
        # Where each batch starts among the pictures of this process, and where the last one ends.
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self._of_block = _count(split, BYTES_OF_BLOCK)
        self._of_piece = _count(split, BYTES_OF_PIECE)
        self._color = normalization.color().to(self._device)
        scale, shift = normalization.factors(split.images.shape[3])
        self._factors = scale.to(self._device), shift.to(self._device)
        self._epoch = -1
        self._next_batch = 0
        self._resumed: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._shares)

    @property
    def places(self) -> Tensor:
        """The places of the epoch's order, int64, that this process gets, as they come."""
        if self._world_size == 1:
            return torch.arange(len(self._split))
        return torch.cat([torch.arange(share.start, share.stop) for share in self._shares])

    def share_sizes(self, batch: int) -> list[int]:
        """How many pictures of batch number `batch` of an epoch each process gets, by rank."""
        start, stop = self._bounds[batch : batch + 2]
        cuts = (_cut(start, stop, rank, self._world_size) for rank in range(self._world_size))
        return [share.stop - share.start for share in cuts]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # This is a generator: all of it runs at the first batch, when Lightning knows the epoch.
        self._start()
        mine = self.places
        whole = self._order(self._epoch)
        order = whole[mine].to(self._split.labels.device)
        draws = self._draws(self._epoch, whole)[mine].to(self._device)
        # Blocks begin at the same batches wherever an epoch is taken up again.
        step = max(1, self._of_block // self._starts[1])
        first = self._next_batch
        for block in range(first - first % step, len(self), step):
            starts = self._starts[block : block + step + 1]
            of_block = slice(starts[0], starts[-1])
            batches = deque(self._make(order[of_block], draws[of_block], starts))
            for batch in range(block, block + len(batches)):
                if batch < first:
                    batches.popleft()
                    continue
                self._next_batch = batch + 1
                yield batches.popleft()  # keeping none: the next block takes as much memory

    def begin(self, batches: int, most: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield of each of the first `batches` its size, and up to `most` of its pictures.

        Those come altered but not normalised, uint8 (B, H, W, 3), and with their labels (B,): the
        same on every device, to the last bit.  The iterations are as if nobody had asked.
        """
        assert self._world_size == 1
        order = self._order(0)
        draws = self._draws(0, order).to(self._device)
        for start, stop in itertools.pairwise(self._starts[: batches + 1]):
            part = slice(start, min(stop, start + most))
            chosen = order[part].to(self._split.labels.device)
            pictures = self._alter(self._split.pixels, chosen, draws[part])
            yield stop - start, pictures, self._fetch(self._split.labels, chosen)

    def state_dict(self) -> dict[str, int]:
        """Return which epoch it is and how many of its batches have been handed out."""
        return {"epoch": self._epoch, "batch": self._next_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iteration go on in the middle of an epoch."""
        self._resumed = dict(state_dict)

    def _start(self) -> None:
        """Find out the epoch, and the batch in it that comes first."""
        resumed, self._resumed = self._resumed, None
        if self._place is not None:
            # The trainer's own count, not that of the state: a run that was stopped between
            # taking a batch and learning from it takes that batch again.
            self._epoch, used = self._place()
            self._next_batch = 0 if resumed is None else used
        elif resumed is None or resumed["batch"] == len(self):
            self._epoch = (self._epoch if resumed is None else resumed["epoch"]) + 1
            self._next_batch = 0
        else:
            self._epoch, self._next_batch = resumed["epoch"], resumed["batch"]

    def _order(self, epoch: int) -> Tensor:
        count = len(self._split)
        if not self._shuffle:
            return torch.arange(count)
        epoch = epoch if self._reshuffle else 0
        return torch.randperm(count, generator=stream(self._seed, "order", epoch))

    def _draws(self, epoch: int, order: Tensor) -> Draws:
        height, width = self._split.images.shape[2:]
        count = len(self._split)
        seed = self._augmentation_seed
        return self._augmentation.draw(count, height, width, seed, epoch, order)

    def _make(
        self, chosen: Tensor, draws: Draws, starts: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return some successive batches, which begin and end at `starts`."""
        pixels = self._split.pixels
        shape = (len(chosen), *pixels.shape[1:])
        images = torch.empty(shape, dtype=torch.float32, device=self._device)
        for start in range(0, len(chosen), self._of_piece):
            part = slice(start, start + self._of_piece)
            altered = self._alter(pixels, chosen[part], draws[part])
            normalize(altered, *self._factors, out=images[part])
        labels = self._fetch(self._split.labels, chosen)
        sizes = [stop - start for start, stop in itertools.pairwise(starts)]
        parts = zip(images.permute(0, 3, 1, 2).split(sizes), labels.split(sizes), strict=True)
        # `data`, or else autograd would take what is written into one batch for a change of all
        # that lie beside it.
        return [(images.data, labels.data) for images, labels in parts]

    def _alter(self, pixels: Tensor, chosen: Tensor, draws: Draws) -> Tensor:
        return self._augmentation(self._fetch(pixels, chosen), draws, self._color)

    def _fetch(self, source: Tensor, chosen: Tensor) -> Tensor:
        """Return the `chosen` rows of `source` on the device."""
        if source.device == self._device:
            return source.index_select(0, chosen)
        # From pinned memory the copy runs beside the computation; the allocator does not hand
        # the block out again before the copy has ended.
        pinned = self._device.type == "cuda"
        shape = (len(chosen), *source.shape[1:])
        rows = torch.empty(shape, dtype=source.dtype, pin_memory=pinned)
        return torch.index_select(source, 0, chosen, out=rows).to(self._device, non_blocking=True)


def _count(split: Split, most_bytes: dict[str, int]) -> int:
    """Return how many pictures of the split have at most so many bytes on its device; 1 or more."""
    most = most_bytes.get(split.images.device.type, most_bytes["cpu"])
    return max(1, most // split.images[:1].nbytes)


def num_batches(count: int, batch_size: int, world_size: int = 1) -> int:
    """Return how many batches so many pictures are, of all processes together."""
    # Where batches would have fewer pictures than there are processes, fewer and larger ones.
    return min(math.ceil(count / batch_size), count // world_size)


def _deal(count: int, batch_size: int, world_size: int) -> list[int]:
    """Return where each global batch starts in the epoch's order, and at last where it ends."""
    batches = num_batches(count, batch_size, world_size)
    size, larger = divmod(count, batches)
    return [batch * size + min(batch, larger) for batch in range(batches + 1)]


def _cut(start: int, stop: int, rank: int, world_size: int) -> slice:
    """Return the places from `start` to `stop` that belong to one process."""
    return slice(
        start + (stop - start) * rank // world_size,
        start + (stop - start) * (rank + 1) // world_size,
    )
