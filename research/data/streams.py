"""One random stream per purpose, so that asking for one thing never changes another.

The order of an epoch, its crops, its flips, the split into train and validation: each has a
generator seeded by a hash of the run's seed and its own name.  None of them reads or moves the
global generators, and turning on flips leaves the order of the pictures as it was.
"""

import hashlib

import torch


def stream(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a new CPU generator fixed by `seed` and `purpose`, and by nothing else.

    Seeds and purposes that differ in anything give unrelated streams.
    """
    return torch.Generator().manual_seed(seed_of(seed, *purpose))


def seed_of(seed: int, *purpose: str | int) -> int:
    """Return what a stream is seeded with: 63 bits of the BLAKE2 hash of `seed` and `purpose`."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
