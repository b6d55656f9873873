"""What a network refuses, told as the setting, what came and what is allowed.

Letters: B pictures, C channels, H, W height and width.
"""

import difflib
from collections.abc import Collection
from functools import partial

from torch import Tensor, nn


def require_pictures(x: Tensor, in_channels: int, image_size: int) -> None:
    """ValueError unless `x` has the shape (B, in_channels, image_size, image_size)."""
    if x.shape[1:] != (in_channels, image_size, image_size):
        raise ValueError(
            f"The network expects pictures of shape (B, {in_channels}, {image_size}, {image_size}) "
            f"but got {tuple(x.shape)}; set its image_size (and in_channels) to fit the data."
        )


def require_pictures_of_module(network: nn.Module, inputs: tuple[Tensor], image_size: int) -> None:
    """`require_pictures` as a forward pre-hook, for colour pictures."""
    require_pictures(inputs[0], 3, image_size)


def require_at_least(least: int, **settings: float) -> None:
    """ValueError that names the first setting below `least`."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name}: {value} given, but it must be at least {least}.")


def require_known(argument: str, name: str, known: Collection[str]) -> None:
    """ValueError with the nearest match and at most thirty examples unless `name` is in `known`."""
    if name in known:
        return
    by_lower_case = {each.lower(): each for each in sorted(known)}
    near = partial(difflib.get_close_matches, name.lower(), by_lower_case)
    guess = "".join(f"; did you mean {by_lower_case[each]}?" for each in near(n=1)) or "."
    examples = ", ".join(sorted(by_lower_case[each] for each in near(n=30, cutoff=0)))
    raise ValueError(f'{argument}: there is no {argument} "{name}"{guess} Known: {examples}.')
