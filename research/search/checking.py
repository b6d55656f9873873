"""A search held to the signatures of what it names, before anything starts.

Each class that a search may choose is asked once, by jsonargparse, whether it takes the ends of
its ranges and all values of its lists; so is the rest of the settings, with the base experiment.
The product of all choices is not gone through: one class's arguments do not depend on another's.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from research import optimizers
from research.configuration.compose import ConfigurationError, nearest, unfold
from research.configuration.imports import within
from research.configuration.schema import (
    add_choice,
    describe,
    find_class,
    known_actions,
    parse,
    path_of,
    short_key,
)
from research.search.parts import Branch, Item, Parts, flat
from research.search.space import NONE
from research.search.strategies import misfits

if TYPE_CHECKING:
    from research.search.document import Search

INSIDE = (1e-6, 1 - 1e-6)


def check(search: "Search", parts: Parts, faults: list[str]) -> None:
    """Add a sentence to `faults` for all that no class takes."""
    with within(None if search.trust else []):
        for branch in parts.branches:
            faults += branch_faults(branch)
    faults += settings_faults(search, parts)
    fits = not any(misfits(search.sampling, cell.space) for cell in search.cells)
    makers: list[Callable[[], Any]] = [search.pruner]
    if fits:
        makers += [partial(search.sampler, 0, cell) for cell in search.cells[:1]]
    for make in makers:
        try:
            make()
        except ConfigurationError as error:
            faults += error.faults


def tried(item: Item) -> list[Any]:
    """The values by which a range or a list is judged."""
    if item.parameter is None:
        return [item.value]
    distribution = item.parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        choices = list(item.parameter.values or distribution.choices)
        # No type takes two real numbers and not those between them.
        real = all(isinstance(choice, float) for choice in choices)
        return [min(choices), max(choices)] if real else choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.step is not None:
        return [distribution.low, distribution.high]
    # Just inside, where trials will be: momentum 0..0.99 may go with nesterov, and 0 alone not.
    low, high = distribution.low, distribution.high
    if distribution.log:
        return [low * (high / low) ** share for share in INSIDE]
    return [low + (high - low) * share for share in INSIDE]


def is_range(item: Item) -> bool:
    return item.parameter is not None and not isinstance(
        item.parameter.distribution, CategoricalDistribution
    )


def in_step(items: Sequence[Item]) -> Iterable[dict[str, Any]]:
    """Settings by key, as few of them as show every value of every item once."""
    values = [tried(item) for item in items]
    for i in range(max((len(v) for v in values), default=1)):
        yield {item.key: v[i % len(v)] for item, v in zip(items, values, strict=True)}


# ---- a class and its arguments -------------------------------------------------------------------


def branch_faults(branch: Branch) -> list[str]:
    key = branch.key
    if branch.name == NONE and key == "lr_scheduler":
        return [f"{item.place}: no schedule has no arguments." for item in branch.items]
    try:
        found = find_class(key, branch.name)
        if key == "lr_scheduler":
            optimizers.refuse_composed(found)
    except ValueError as error:
        told = error.faults if isinstance(error, ConfigurationError) else [str(error)]
        return [f"{branch.place.split('.')[0]}.{fault}" for fault in told]
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action=ActionConfigFile)
    add_choice(parser, key, found)
    actions = {short_key(name): action for name, action in known_actions(parser).items()}
    arguments = [name.removeprefix(f"{key}.") for name in actions if name != key]
    faults, items = [], []
    for item in branch.items:
        argument = item.key.removeprefix(f"{key}.")
        if argument in arguments:
            items.append(item)
            continue
        has = f"It has {', '.join(arguments)}." if arguments else "It has none."
        faults.append(
            f'{item.place}: {branch.name} has no argument "{argument}"'
            f"{nearest(argument, arguments)} {has}"
        )

    def take(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
        settings = unfold({key: path_of(found), **values})
        taken, wrong = parse(parser, settings, [])
        if taken is None:
            return {}, wrong
        if not wrong and not faults:
            wrong = construction_faults(found, taken, key)
        return {short_key(name): taken.get(name) for name in known_actions(parser)}, wrong

    return faults + judged(items, take, actions, branch.place)


def construction_faults(found: Any, taken: Namespace, key: str) -> list[str]:
    """What a loss or an optimizer itself says of its arguments; others cost too much to make."""
    if key not in ("model.loss", "optimizer"):
        return []
    arguments = dict(vars(taken[key].init_args)) if "init_args" in taken[key] else {}
    parameters = [[torch.zeros(1, 1, requires_grad=True)]] if key == "optimizer" else []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found(*parameters, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        return [str(error).partition("\n")[0]]
    return []


def judged(items: Sequence[Item], take: Any, actions: Mapping[str, Any], place: str) -> list[str]:
    """The faults that `take` finds in any of the items' values, told by the items' places."""
    by_name = {item.key: item for item in items}
    faults: list[str] = []
    for values in in_step(items):
        taken, wrong = take(values)
        for fault in wrong:
            key = fault.partition(":")[0]
            item = by_name.get(key)
            if item is None:
                faults.append(f"{place}: {fault}")
            elif is_range(item) and f"{key}: expected" in fault:
                faults.append(misplaced(item, take, actions))
            else:
                faults.append(f"{item.place}{fault.removeprefix(key)}")
        told = {fault.partition(":")[0] for fault in wrong}
        for item in items:
            came = taken.get(item.key, 0)
            if is_range(item) and item.key not in told and not is_number(came):
                faults.append(misplaced(item, take, actions))
    return list(dict.fromkeys(faults))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def misplaced(item: Item, take: Any, actions: Mapping[str, Any]) -> str:
    """Why a range cannot stand where it does."""
    assert item.parameter is not None
    written, distribution = item.parameter.written(), item.parameter.distribution
    if isinstance(distribution, FloatDistribution):
        low = max(1, round(distribution.low))
        taken, wrong = take({item.key: low})
        mine = [fault for fault in wrong if fault.partition(":")[0] == item.key]
        if not mine and is_number(taken.get(item.key)):
            return (
                f"{item.place}: it is a whole number, and {written} is a range of real ones; write "
                f"int {low}..{max(low + 1, int(distribution.high))}."
            )
    action = actions.get(item.key)
    expected = "something else" if action is None else describe(typehint(action))
    return f"{item.place}: expected {expected}, and a range of numbers came, {written}."


def typehint(action: Any) -> Any:
    return getattr(action, "_typehint", action.type)


# ---- everything else -----------------------------------------------------------------------------


def settings_faults(search: "Search", parts: Parts) -> list[str]:
    """What is wrong with the base, with the settings over it, and with what stands for itself."""
    good = dict(flat(parts.settings))
    actions: dict[str, Any] = {}

    def take(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
        try:
            configuration = search.resolved(unfold({**good, **values}))
        except ConfigurationError as error:
            return {}, error.faults
        for name, action in known_actions(configuration.parser).items():
            actions[short_key(name)] = action
        return configuration.flat(), []

    _, wrong = take({})
    if wrong:
        try:
            search.resolved()
        except ConfigurationError as error:
            return [f"base: {fault}" for fault in error.faults]
        for fault in wrong:
            good.pop(fault.partition(":")[0], None)
    faults = [f"settings.{fault}" for fault in wrong]
    if not parts.items or (wrong and take({})[1]):  # what is left means nothing without the rest
        return faults
    return faults + judged(parts.items, take, actions, "space")
