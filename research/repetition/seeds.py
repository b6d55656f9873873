"""Which seeds `--seeds` asks for: a number of them, or which.  Imports nothing slow."""

import re

from research.configuration.compose import ConfigurationError, printable

MOST = 1000
LARGEST = 2**32 - 1


def read_seeds(text: str) -> int | list[int]:
    """How many seeds, or which; ConfigurationError for what says neither.

    `5` is five of them; `1,2,3` and `[1,2,3]` are these, `7,` and `[7]` that one alone.
    """
    inside = text.strip()
    is_list = inside.startswith("[") or "," in inside
    if re.fullmatch(r"\[.*\]", inside):
        inside = inside[1:-1]
    parts = [part.strip() for part in inside.rstrip(", ").split(",")]
    if not all(re.fullmatch(r"\d{1,20}", part) for part in parts):
        raise ConfigurationError(
            f"seeds: expected how many (--seeds 5) or which (--seeds 1,2,3), whole numbers from 0 "
            f"on; came {printable(text)[:80]!r}."
        )
    numbers = [int(part) for part in parts]
    if is_list:
        return listed(numbers)
    if not 1 <= numbers[0] <= MOST:
        raise ConfigurationError(
            f"seeds: expected 1 to {MOST:,} of them; came {numbers[0]}. For the one seed "
            f"{numbers[0]}, write --seed_everything {numbers[0]}."
        )
    return numbers[0]


def listed(seeds: list[int]) -> list[int]:
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ConfigurationError(
            f"seeds: {', '.join(map(str, twice))} came more than once. The same seed gives the "
            "same run, which is no further evidence; name each once."
        )
    if max(seeds) > LARGEST:
        raise ConfigurationError(f"seeds: came {max(seeds)}; a seed is from 0 to {LARGEST}.")
    if len(seeds) > MOST:
        raise ConfigurationError(f"seeds: came {len(seeds):,}; at most {MOST:,} are taken.")
    return seeds


def seeds_from(asked: int | list[int], first: int) -> list[int]:
    """The seeds themselves; those that are only counted begin with `first`."""
    if isinstance(asked, list):
        return asked
    if first + asked - 1 > LARGEST:
        raise ConfigurationError(
            f"seeds: {asked} of them from seed_everything {first} on go beyond {LARGEST}."
        )
    return list(range(first, first + asked))
