"""What differs between a search and the older one that its studies were made for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from research.search.space import MEANT_AS_RANGE
from research.search.strategies import FINITE

# Another of these is another number of trials, or another way to choose or end the next ones.
FREE = ("trials", "hours", "seed", "sampler", "pruner", "confirm")


@dataclass(frozen=True)
class Difference:
    """One key that changed; `extends` where Optuna can go on with the trials that there are."""

    key: str
    old: Any  # None where it was not there
    new: Any
    extends: bool


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Between two `Search.canonical()`; none for equal ones."""
    found = [
        Difference(key, old.get(key), new.get(key), extends=True)
        for key in FREE
        if old.get(key) != new.get(key)
    ]
    for section in ("objective", "settings"):
        found += changed(section, old[section], new[section], lambda before, now: False)
    # These remember every point of the space that they began with.
    bound = new["sampler"]["class_path"].rpartition(".")[2] in (*FINITE, "QMCSampler")
    before, now = old["cells"], new["cells"]
    for name in sorted({*before, *now}):
        place = f"each.{name}" if name else ""
        if name not in before or name not in now:  # a study more, or one that is left alone
            kept = bool(name) and "" not in {*before, *now}
            was, is_now = name if name in before else None, name if name in now else None
            found.append(Difference(place or "each", was, is_now, extends=kept))
            continue
        for part in ("settings", "space"):
            key = ".".join(filter(None, (place, part)))
            found += changed(
                key,
                before[name][part],
                now[name][part],
                lambda one, other: not bound and same_kind(one, other),
            )
    return found


def changed(
    key: str, old: Mapping[str, Any], new: Mapping[str, Any], extends: Any
) -> Iterator[Any]:
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name) or (name in old) != (name in new):
            before, now = old.get(name), new.get(name)
            yield Difference(f"{key}.{name}", before, now, extends(before, now))


def same_kind(one: Any, other: Any) -> bool:
    """True for two ranges that Optuna takes for one parameter: both whole or not, logarithmic or
    not."""
    if not all(isinstance(text, str) and MEANT_AS_RANGE.match(text) for text in (one, other)):
        return False
    return kind(one) == kind(other)


def kind(text: str) -> tuple[bool, bool]:
    words = text.split()
    return "int" in words, "log" in words
