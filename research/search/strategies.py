"""Optuna's samplers and pruners by name, their arguments held to their signatures.

Each slot of a study has a sampler of its own, seeded by the slot's number: whoever fills the slot,
before or after a restart, draws from the same stream, and no two slots draw the same.
"""

import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import optuna
from jsonargparse import ActionConfigFile, ArgumentParser
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler

from research.configuration.compose import ConfigurationError, nearest
from research.configuration.imports import import_object, within
from research.configuration.schema import known_actions, parse
from research.search.space import Space

MODULES = {"sampler": optuna.samplers, "pruner": optuna.pruners}
BASES: dict[str, type] = {"sampler": BaseSampler, "pruner": BasePruner}
# All slots share one sequence or one order of the grid: another seed would begin another one.
ONE_SEED = ("QMCSampler", "GridSampler")
FINITE = ("GridSampler", "BruteForceSampler")
UNCONDITIONAL = ("GridSampler", "QMCSampler", "CmaEsSampler")
SEEDS = 2**32


def seed_of(*what: Any) -> int:
    """A seed that is the same in every process and on every machine."""
    digest = hashlib.sha256(json.dumps(what).encode()).digest()
    return int.from_bytes(digest[:8], "big") % SEEDS


def read_strategy(kind: str, value: Any, default: str) -> dict[str, Any]:
    """`{"class_path": name, "init_args": {...}}`, however it was written.

    ConfigurationError for what is neither a name nor a mapping with one.
    """
    if value is None:
        return {"class_path": default, "init_args": {}}
    if isinstance(value, str):
        return {"class_path": value, "init_args": {}}
    if not isinstance(value, Mapping) or not isinstance(value.get("class_path"), str):
        raise ConfigurationError(
            f"{kind}: expected the name of Optuna's class, or a mapping as "
            f"{{class_path: {default}, ...}}; came {value!r}."
        )
    return spread(value)


def spread(value: Any) -> Any:
    """Mappings with a class_path in their long form, at any depth."""
    if isinstance(value, list):
        return [spread(inside) for inside in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {key: spread(inside) for key, inside in value.items()}
    arguments = {k: v for k, v in value.items() if k not in ("class_path", "init_args")}
    arguments = {**(value.get("init_args") or {}), **arguments}
    return {
        "class_path": value["class_path"],
        "init_args": {key: spread(inside) for key, inside in arguments.items()},
    }


def known_strategies(kind: str) -> dict[str, Any]:
    base = BASES[kind]
    return {
        name: member
        for name, member in vars(MODULES[kind]).items()
        if inspect.isclass(member) and issubclass(member, base) and not inspect.isabstract(member)
    }


def find_strategy(kind: str, name: str, trust: bool = False) -> Any:
    """The class; ConfigurationError where there is none of that name."""
    known = known_strategies(kind)
    if name in known:
        return known[name]
    if "." not in name:
        raise ConfigurationError(
            f'{kind}: Optuna has no {kind} "{name}"{nearest(name, known)} '
            f"Known: {', '.join(sorted(known))}."
        )
    try:
        with within(None if trust else ["optuna"]):
            found = import_object(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{kind}: {name} cannot be imported: {error}.") from None
    if not (inspect.isclass(found) and issubclass(found, BASES[kind])):
        raise ConfigurationError(f"{kind}: {name} is no {BASES[kind].__name__}.")
    return found


@cache
def parser_of(kind: str, found: Any) -> ArgumentParser:
    """What reads the arguments of a sampler or a pruner, out of its signature."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action=ActionConfigFile)
    if inspect.signature(found).parameters:
        parser.add_class_arguments(found, kind, fail_untyped=False)
    return parser


def make(kind: str, strategy: Mapping[str, Any], trust: bool = False, **more: Any) -> Any:
    """The sampler or pruner; `more` goes to it where it takes that and the file did not say it.

    ConfigurationError with all that is wrong with its arguments.
    """
    found = find_strategy(kind, strategy["class_path"], trust)
    name, takes = found.__name__, inspect.signature(found).parameters
    with warnings.catch_warnings(), within(None if trust else ["optuna"]):
        # Optuna marks much as experimental or deprecated; a search says by name what it wants.
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        parser = parser_of(kind, found)
        known = [key.removeprefix(f"{kind}.") for key in known_actions(parser) if key != kind]
        known = [argument for argument in known if argument != "seed"]
        given = {key: spread(value) for key, value in strategy["init_args"].items()}
        has = f"It has {', '.join(known)}." if known else "It has none."
        faults = [
            f'{kind}.{argument}: {name} has no argument "{argument}"'
            f"{nearest(argument, known)} {has}"
            for argument in given
            if argument not in (*known, "seed")
        ]
        if "seed" in given:
            faults.append(f"{kind}.seed: the sampler's seeds come of the search's; write seed: 0.")
        arguments = {
            **{key: value for key, value in more.items() if key in takes and value is not None},
            **{key: value for key, value in given.items() if key in known},
        }
        values, wrong = parse(parser, {kind: arguments} if arguments else {}, [])
        if faults or wrong or values is None:
            raise ConfigurationError([*faults, *wrong])
        try:
            return parser.instantiate(values)[kind] if takes else found()
        except Exception as error:  # whatever its constructor or a missing package says
            why = str(error).partition("\n")[0] or type(error).__name__
            raise ConfigurationError(f"{kind}: {name} cannot be made: {why}") from None


def make_sampler(
    strategy: Mapping[str, Any], space: Space, seed: int, cell: str, slot: int, trust: bool = False
) -> BaseSampler:
    """The sampler of one slot of one cell."""
    one_seed = strategy["class_path"].rpartition(".")[2] in ONE_SEED
    more: dict[str, Any] = {"seed": seed_of(seed, cell) if one_seed else seed_of(seed, cell, slot)}
    if space.points() is not None and not space.is_conditional():
        more["search_space"] = space.grid()
    # Told once, when the file is read, where a sampler cannot take the space.
    more |= {"warn_independent_sampling": False}
    sampler = make("sampler", strategy, trust, **more)
    if isinstance(sampler, GridSampler | BruteForceSampler):
        # After the last point it would call Study.stop, which only Study.optimize allows.
        sampler.after_trial = nothing  # type: ignore[method-assign, assignment]
    return sampler


def nothing(*arguments: Any) -> None:
    return None


def make_pruner(strategy: Mapping[str, Any] | None, trust: bool = False) -> BasePruner:
    return NopPruner() if strategy is None else make("pruner", strategy, trust)


def misfits(strategy: Mapping[str, Any], space: Space) -> list[str]:
    """Why the sampler cannot draw from this space, a sentence each."""
    name = strategy["class_path"].rpartition(".")[2]
    faults = []
    if name in UNCONDITIONAL and space.is_conditional():
        some = next(p.name for p in space.drawn if p.condition is not None)
        faults.append(
            f"sampler: {name} knows no arguments that only some classes have, such as {some}; "
            "choose TPESampler, or BruteForceSampler for a grid, or move the class to each."
        )
    endless = [p.name for p in space.drawn if getattr(p.distribution, "step", 1) is None]
    if name in FINITE and "search_space" not in strategy["init_args"] and endless:
        faults.append(
            f"sampler: {name} tries every point, and {', '.join(endless)} has no end of them; "
            "write a step, a list or whole numbers, or choose TPESampler."
        )
    return faults
