"""The keys of a search file that say what trials are made of: settings, each and space.

A key that is named twice is a fault: in `settings` and in the space, in `each` and in the space,
beside a choice of classes and inside one of them.  An argument beside a choice of classes
(`optimizer.lr` beside `optimizer: [SGD, AdamW]`, or in `settings`) is given to whichever is chosen.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import CategoricalDistribution

from research.configuration.compose import CHOICES, ConfigurationError, same_class, unfold
from research.configuration.schema import known_classes
from research.optimizers import refuse_composed
from research.search.space import ALL, NONE, Fixed, Parameter, Space, read_parameter

# A trial's are the search's own.
RESERVED = {
    "trainer.limit_test_batches": "a trial never sees the test split; leave it out.",
    "experiment": "the trials' experiment goes by the search's name; write name.",
}


@dataclass(frozen=True)
class Item:
    """A value, a range or a list of values that a setting is given, and where the file says so."""

    place: str  # space.optimizer.SGD.lr
    key: str  # optimizer.lr
    value: Any
    parameter: Parameter | None = None


@dataclass(frozen=True)
class Branch:
    """A class that may be chosen, and all that it is then given."""

    place: str
    key: str
    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Option:
    """One of the cells that a key of `each` makes."""

    label: str
    fixed: Mapping[str, Any]  # by command-line key
    drawn: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Parts:
    settings: Mapping[str, Any]  # nested
    each: tuple[tuple[Option, ...], ...]
    space: Space
    common: Mapping[str, Any]  # what settings give to whichever class a cell is for
    branches: list[Branch] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)  # of no class that is chosen

    def searches(self, key: str) -> bool:
        """True where the key, or an argument of the class that it chooses, is searched through."""
        keys = [p.key for p in self.space.drawn]
        for options in self.each:
            keys += [k for option in options for k in option.fixed]
            keys += [p.key for option in options for p in option.drawn]
        return any(k == key or k.startswith(f"{key}.") for k in keys)

    def nested(self, combination: Sequence[Option]) -> dict[str, Any]:
        """The settings of a cell."""
        merged: dict[str, Any] = {}
        for option in combination:
            merged |= option.fixed
        return unfold({**merged, **self.common})


def write_out(section: str, value: Any, faults: list[str]) -> dict[str, Any]:
    """The section by command-line keys, each choice of classes as {class: arguments}."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        faults.append(f"{section}: expected keys, as optimizer.lr: log 1e-4..1; came {value!r}.")
        return {}
    written: dict[str, Any] = {}
    for key, inside in flattened(value):
        if key in written:
            faults.append(f"{section}.{key} comes twice.")
        written[key] = classes(section, key, inside, faults) if key in CHOICES else inside
    return {key: inside for key, inside in written.items() if inside is not None}


def flattened(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        key = f"{prefix}{name}".replace(".init_args.", ".")
        if isinstance(value, Mapping) and key not in CHOICES:
            yield from flattened(value, f"{key}.")
        else:
            yield key, value


def classes(
    section: str, key: str, value: Any, faults: list[str]
) -> dict[str, dict[str, Any]] | None:
    """The classes and their arguments, `all` written out; None where that cannot be read."""
    place = f"{section}.{key}"
    example = f"{place}: [SGD, AdamW]" if key == "optimizer" else f"{place}: [NAME, NAME]"
    if value == ALL:
        value = [ALL]
    if isinstance(value, list) and all(v is None or isinstance(v, str) for v in value):
        value = {NONE if name is None else name: {} for name in value}
    if not isinstance(value, Mapping) or not value or "class_path" in value:
        faults.append(
            f"{place}: expected classes, as {example} or "
            f"{{NAME: {{argument: 0..1}}}}; came {json.dumps(value, default=str)}. One class alone "
            "goes into settings."
        )
        return None
    found: dict[str, dict[str, Any]] = {}
    for name, arguments in value.items():
        if arguments is not None and not isinstance(arguments, Mapping):
            faults.append(f"{place}.{name}: expected its arguments, as {{lr: log 1e-4..1}}; came "
                          f"{arguments!r}.")  # fmt: skip
            arguments = {}
        arguments = {k: v for k, v in (arguments or {}).items()}
        if name == ALL:
            named = [other for other in value if other != ALL]
            for other in remaining(key, named):
                found[other] = dict(arguments)
        elif name.lower() in (NONE, "null") and key == "lr_scheduler":
            found[NONE] = arguments
        elif any(same_class(name, other) for other in value if other not in (name, ALL)):
            faults.append(f"{place}.{name}: the same class comes twice.")
        else:
            found[name] = arguments
    return found


def remaining(key: str, named: Sequence[str]) -> list[str]:
    """Every known class that is not named."""
    found = []
    for name, known in sorted(known_classes(key).items()):
        if key == "lr_scheduler":
            try:
                refuse_composed(known)
            except ValueError:
                continue
        if not any(same_class(name, other) for other in named):
            found.append(name)
    return found


def read_parts(document: Mapping[str, Any], faults: list[str]) -> Parts:
    """What `write_out` made of the sections, read; what is wrong is told and left out."""
    settings = read_settings(document.get("settings"), faults)
    each, space = document.get("each") or {}, document.get("space") or {}
    refuse_reserved({"each": each, "space": space, "settings": flat(settings)}, faults)
    refuse_twice(flat(settings), each, space, faults)

    chosen = [key for key in (*each, *space) if key in CHOICES]
    common: dict[str, Any] = {}
    for key, value in flat(settings).items():
        if any(key.startswith(f"{choice}.") for choice in chosen):
            common[key] = value
    settings = unfold({k: v for k, v in flat(settings).items() if k not in common})

    beside = {choice: [Item(f"settings.{k}", k, v) for k, v in common.items()
                       if k.startswith(f"{choice}.")] for choice in chosen}  # fmt: skip
    items: list[Item] = []
    drawn: list[Parameter] = []
    options: dict[str, list[Option]] = {}
    for key, value in each.items():
        if key in CHOICES:
            continue
        options[key] = read_options(key, value, faults)
        found = [Item(f"each.{key}", key, option.fixed[key]) for option in options[key]]
        (beside[owner(key, chosen)] if owner(key, chosen) else items).extend(found)
    for key, value in space.items():
        if key in CHOICES:
            continue
        item = read_item(f"space.{key}", key, value, None, faults)
        if item is None:
            continue
        if item.parameter is None:
            faults.append(
                f"space.{key}: one value alone is no choice; write it under settings, or a range "
                f"or a list of values; came {value!r}."
            )
            continue
        drawn.append(item.parameter)
        (beside[owner(key, chosen)] if owner(key, chosen) else items).append(item)

    branches: list[Branch] = []
    choices: list[Parameter] = []
    arguments: list[Parameter] = []
    fixed: list[Fixed] = []
    for section, key, name, inside in all_classes(each, space):
        condition = (key, name) if section == "space" else None
        own = read_arguments(f"{section}.{key}.{name}", key, inside, condition, faults)
        others = {item.key for item in beside[key]}
        for item in own:
            if item.key in others:
                faults.append(f"{item.place}: {item.key} stands beside the classes too; take one "
                              "of them out.")  # fmt: skip
        branches.append(Branch(f"{section}.{key}.{name}", key, name, (*own, *beside[key])))
        plain = {item.key: item.value for item in own if item.parameter is None}
        ranges = [item.parameter for item in own if item.parameter is not None]
        if section == "each":
            chosen_class = {key: None if name == NONE else name}
            label = name.rpartition(".")[2]
            option = Option(label, {**chosen_class, **plain}, tuple(ranges))
            options.setdefault(key, []).append(option)
        else:
            arguments += ranges
            fixed += [Fixed(k, v, condition) for k, v in plain.items()]
    for key, inside in space.items():
        if key in CHOICES:
            names = tuple(inside)
            values = tuple(None if n == NONE else n for n in names) if NONE in names else ()
            choices.append(Parameter(key, key, CategoricalDistribution(names), None, values))
    of_space = {k: v for k, v in common.items() if owner(k, [c for c in chosen if c in space])}
    fixed += [Fixed(k, v) for k, v in of_space.items()]
    return Parts(
        settings=settings,
        each=tuple(tuple(options[key]) for key in each if options.get(key)),
        space=Space((*choices, *arguments, *drawn), tuple(fixed)),
        common={k: v for k, v in common.items() if k not in of_space},
        branches=branches,
        items=items,
    )


def all_classes(
    each: Mapping[str, Any], space: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    for section, keys in (("each", each), ("space", space)):
        for key, inside in keys.items():
            if key in CHOICES:
                for name, arguments in inside.items():
                    yield section, key, name, arguments


def owner(key: str, chosen: Sequence[str]) -> str:
    """The choice that a key is an argument of, "" where it is of none."""
    return next((choice for choice in chosen if key.startswith(f"{choice}.")), "")


def read_settings(value: Any, faults: list[str]) -> dict[str, Any]:
    """The settings, nested."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        faults.append(
            f"settings: expected keys of the command line, as trainer.max_epochs: 3; came "
            f"{value!r}."
        )
        return {}
    try:
        return unfold(value)
    except ConfigurationError as error:
        faults += [f"settings.{fault}" for fault in error.faults]
        return {}


def read_options(key: str, values: Any, faults: list[str]) -> list[Option]:
    if not isinstance(values, list) or not values:
        faults.append(
            f"each.{key}: expected a list of values, of which each gets a study of its own, as "
            f"[64, 128]; came {json.dumps(values, default=str)}."
        )
        return []
    if any(values.count(value) > 1 for value in values):
        faults.append(f"each.{key}: a value comes twice in the list.")
    return [Option(f"{key.rpartition('.')[2]}={short(value)}", {key: value}) for value in values]


def short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_arguments(
    place: str, key: str, inside: Mapping[str, Any], condition: tuple[str, str] | None,
    faults: list[str],
) -> list[Item]:  # fmt: skip
    """What the arguments of a class in the file are; what cannot be read is told and left out."""
    read = [
        read_item(f"{place}.{argument}", f"{key}.{argument}", value, condition, faults)
        for argument, value in inside.items()
    ]
    return [item for item in read if item is not None]


def read_item(
    place: str, key: str, value: Any, condition: tuple[str, str] | None, faults: list[str]
) -> Item | None:
    try:
        return Item(place, key, value, read_parameter(key, value, condition))
    except ValueError as error:
        faults.append(f"{place}: {error}.")
        return None


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their keys on the command line; a class goes by its choice's key."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in CHOICES and isinstance(value, Mapping):
            if value.get("class_path") is not None:
                found[key] = value["class_path"]
            found |= {f"{key}.{k}": v for k, v in (value.get("init_args") or {}).items()}
        elif isinstance(value, Mapping) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def refuse_reserved(sections: Mapping[str, Mapping[str, Any]], faults: list[str]) -> None:
    for section, keys in sections.items():
        faults += [f"{section}.{key}: {RESERVED[key]}" for key in keys if key in RESERVED]


def refuse_twice(
    settings: Mapping[str, Any], each: Mapping[str, Any], space: Mapping[str, Any],
    faults: list[str],
) -> None:  # fmt: skip
    for key in each:
        if key in space:
            faults.append(f"space.{key}: each names it too; take one of them out.")
    for section, keys in (("each", each), ("space", space)):
        for key in keys:
            if key in settings:
                faults.append(
                    f"settings.{key}: it is fixed, and {section} names it too; take one of them "
                    "out."
                )
