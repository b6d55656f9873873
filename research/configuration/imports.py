"""Which classes a settings file may name: a name is imported, and importing runs code.

What is typed on the command line may name any class. A file (--config, or the settings inside a
checkpoint) may have come from anywhere, so it may name classes of PyTorch, torchvision, Lightning
and this project only, unless it is trusted (--trust). jsonargparse holds the rule at the place
where it imports; `find_class` asks the same function. In no case can a name reach what runs
programs or opens files: jsonargparse has a list of those.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import set_parsing_settings
from jsonargparse._common import ImportDenied, parsing_settings
from jsonargparse._util import import_object

# Not the whole of torch: torch.hub and torch.load run code that they are pointed to.
OPEN_TO_FILES = (
    *("research", "lightning", "torch.nn", "torch._C._nn", "torch.optim", "torch.device"),
    *("torchvision.models", "torchvision.ops"),
)
PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")

# Else a mapping with a class_path, where any value may stand, would become an object.
set_parsing_settings(instantiate_subclass_spec_in_any=False)

__all__ = ["ImportDenied", "import_object", "names_of", "refusal", "roots_in", "within"]


@contextmanager
def within(roots: Iterable[str] | None) -> Iterator[None]:
    """Inside, names lead to `OPEN_TO_FILES` and to these packages only; None trusts all names."""
    kept = ("import_path_verdicts", "import_paths_enforced")
    before = {key: parsing_settings[key] for key in kept}
    refused_by_name = before["import_path_verdicts"]
    if roots is None:
        set_parsing_settings(import_path_denylist=[])
    else:
        more = [root for root in roots if root not in refused_by_name]
        set_parsing_settings(
            import_path_denylist=["*"], import_path_allowlist=[*OPEN_TO_FILES, *more]
        )
    try:
        yield
    finally:
        parsing_settings.update(before)


def roots_in(settings: Mapping[str, Any], tokens: Sequence[str] = ()) -> list[str]:
    """The packages that typed settings, and `--key=value` tokens, may mean by their values."""
    names = [*names_of(settings)]
    for token in tokens:
        names += (found[0] for found in PATH.finditer(token.partition("=")[2]))
    return sorted({name.partition(".")[0] for name in names})


def names_of(value: Any) -> Iterator[str]:
    """Everything in nested settings that has the form of an import path."""
    if isinstance(value, Mapping):
        for inside in value.values():
            yield from names_of(inside)
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from names_of(inside)
    elif isinstance(value, str) and PATH.fullmatch(value):
        yield value


def refusal(key: str, name: str) -> str:
    """What is told of a name that leads out of what is allowed."""
    return (
        f"{key}: {name} may not be named in a file: importing it would run code. Files may name "
        "classes of torch.nn, torch.optim, torchvision, Lightning and this project. If you trust "
        "the file, add --trust."
    )
