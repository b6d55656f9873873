"""What can be set: the signatures of the classes that were chosen are the schema.

`resolve` composes the settings, finds the five classes they name, builds a jsonargparse parser out
of exactly those classes' signatures, and returns the checked, complete configuration.  Every fault
it can find is told at once, a sentence or two each.
"""

import collections.abc
import difflib
import functools
import importlib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type
from lightning.pytorch import Trainer
from torch import nn

from research import losses, networks, optimizers
from research.callbacks import checkpoints
from research.classifier import Classifier
from research.configuration import document  # noqa: F401  (bounds what jsonargparse reads)
from research.configuration.compose import (
    CHOICES,
    MOST_FAULTS,
    CommandLine,
    ConfigurationError,
    compose,
    nearest,
    read_command_line,
    refuse_strange,
)
from research.configuration.imports import ImportDenied, import_object, refusal, roots_in, within
from research.data import ImageData
from research.networks import from_torchvision
from research.randomness import seeds
from research.speed.precision import fastest_precision

# Left open (null) in a configuration, these come from the data.
LEFT_OPEN = {"model.network": ("num_classes", "image_size", "in_channels")}
# What the code fills in by itself: never a setting.  A resumed schedule knows its last epoch.
FILLED_IN = {"optimizer": ("params",), "lr_scheduler": ("optimizer", "last_epoch")}

TRAINER_DEFAULTS = {
    "max_epochs": 10,
    # Two validation batches before training would delay the first step and count as an epoch's.
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


# So that they can be written: StochasticWeightAveraging has a device, Timer an enumeration.
register_type(torch.device)
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, one: dumper.represent_data(one.value))


class Configuration:
    """Checked, complete settings; `values` is the namespace, `yaml()` runs again by `--config`."""

    def __init__(
        self,
        parser: ArgumentParser,
        values: Namespace,
        classes: Mapping[str, Any],
        packages: Sequence[str] | None = None,
    ) -> None:
        self.parser = parser
        self.values = values
        self.classes = classes
        self.packages = packages  # see `imports.within`

    def yaml(self, **dump: bool) -> str:
        """All of it as YAML, nulls included; `dump` goes to jsonargparse (skip_default, ...)."""
        return self.parser.dump(self.values, skip_unset=False, **dump)

    def flat(self) -> dict[str, Any]:
        """Every setting by its command-line key: numbers, truths and text, lists as JSON.

        A class that its short name finds again goes by that name, legible in a table of runs.
        """
        settings = json.loads(self.parser.dump(self.values, format="json", skip_unset=False))
        for key, found in self.classes.items():
            name = getattr(found, "__name__", "")
            if found is not None and known_classes(key).get(name) is found:
                lookup(settings, key)["class_path"] = name
        return {short_key(key): as_scalar(value) for key, value in leaves_of(settings)}

    def arguments(self, key: str) -> dict[str, Any]:
        """The arguments of a choice, or of what a group of settings (model, checkpoint) is for."""
        chosen = self.values[key]
        if key not in CHOICES:
            return {k: v for k, v in vars(chosen).items() if f"model.{k}" not in CHOICES}
        return dict(vars(chosen.init_args)) if chosen is not None and "init_args" in chosen else {}

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments, with the callbacks, loggers and plugins among them made."""
        with within(self.packages):
            return dict(vars(self.parser.instantiate(self.values).trainer))


def leaves_of(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of everything that is not a mapping with something in it."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from leaves_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def as_scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def resolve(
    arguments: Sequence[str] | CommandLine = (),
    *sources: Mapping[str, Any],
    bfloat16: bool | None = None,
) -> Configuration:
    """The configuration out of nested `sources` and then command-line `arguments`, read or not.

    Raises ConfigurationError with every fault found: unknown classes and keys first, then values
    of the wrong type, then what is missing.  The files may name known classes only (imports.py)
    unless they are trusted; flags and `sources` are a person's own and may name any.

    bfloat16: whether an open `trainer.precision` may be that; None asks this machine.
    """
    command = arguments if isinstance(arguments, CommandLine) else read_command_line(arguments)
    for source in (*sources, *command.sources):
        refuse_strange(source, "")
    own = {"sources": list(sources), "settings": command.settings}
    packages = None if command.trust else roots_in(own, command.passed_on)
    with within(packages):
        settings = compose(*sources, *command.sources)
        return check_settings(settings, command.passed_on, packages, bfloat16)


def check_settings(
    settings: dict[str, Any],
    passed_on: list[str],
    packages: Sequence[str] | None,
    bfloat16: bool | None = None,
) -> Configuration:
    """The configuration that composed settings and the trainer's tokens make."""
    faults: list[str] = []
    classes: dict[str, Any] = {}
    values: Namespace | None = None
    for key in CHOICES:
        choice = lookup(settings, key)
        try:
            classes[key] = None if choice is None else find_class(key, choice["class_path"])
            if key == "lr_scheduler" and choice is not None:
                optimizers.refuse_composed(classes[key])
        except ValueError as error:
            faults += error.faults if isinstance(error, ConfigurationError) else [str(error)]
            classes.pop(key, None)
            remove(settings, key)
            continue
        if choice is not None:
            choice["class_path"] = path_of(classes[key])
    parser = parser_for(tuple(classes.items()))
    faults += unknown_settings(parser, settings, classes)
    passed_on, trainer_faults = check_trainer_keys(parser, passed_on)
    faults += trainer_faults
    if len(faults) <= MOST_FAULTS:
        values, type_faults = parse(parser, settings, passed_on)
        faults += type_faults
    if faults or values is None:
        raise ConfigurationError(faults)
    for key, action in known_actions(parser).items():
        # torch writes 0 where it means 0.0; a recorded default should look like the value it is.
        if type(values.get(key)) is int and is_real(getattr(action, "_typehint", None)):
            values[key] = float(values[key])
    if values.trainer.precision is None and values.trainer.plugins is None:  # which may bring one
        values.trainer.precision = fastest_precision(
            values.trainer.accelerator, classes["optimizer"], bfloat16
        )
    return Configuration(parser, values, classes, packages)


BASES: dict[str, type] = {
    "model.network": nn.Module,
    "model.loss": losses.ClassificationLoss,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
    "data": ImageData,
}

# ---- classes by name -----------------------------------------------------------------------------


def known_classes(key: str) -> dict[str, type]:
    """The classes that a short name can choose for `key`; ours go before torch's namesakes."""
    base = BASES[key]
    if key in ("model.loss", "data"):
        return all_subclasses(base)
    if key == "model.network":
        return classes_of(networks, base)
    of_torch = torch.optim if key == "optimizer" else torch.optim.lr_scheduler
    return classes_of(of_torch, base) | classes_of(optimizers, base)


def classes_of(module: types.ModuleType, base: type) -> dict[str, type]:
    package = module.__name__.partition(".")[0]  # a class may have a file of its own there
    return {
        name: member
        for name, member in vars(module).items()
        if inspect.isclass(member) and issubclass(member, base) and member is not base
        and not name.startswith("_") and member.__module__.startswith(package)
        and not name.endswith("LRScheduler")
    }  # fmt: skip


def all_subclasses(base: Any) -> dict[str, type]:
    found: dict[str, type] = {}
    for cls in base.__subclasses__():
        found |= all_subclasses(cls)
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found[cls.__name__] = cls
    return found


def find_class(key: str, name: str) -> Any:
    """The class (for a network, or function) that `name` stands for; a dotted path imports it."""
    known = known_classes(key)
    if name in known:
        return known[name]
    short = name.rpartition(".")[2]
    if "." in name:
        try:
            found = import_object(name)
        except ImportDenied:
            raise ConfigurationError(refusal(key, name)) from None
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(f"{key}: {name} cannot be imported: {error}.") from None
        base = BASES[key]
        if inspect.isclass(found) and not issubclass(found, base):
            instead = f"; write --{key} {short}" if short in known else ""
            raise ConfigurationError(f"{key}: {name} is no {base.__name__}{instead}.")
        if not inspect.isclass(found) and not (key == "model.network" and makes_network(found)):
            instead = (
                ", nor a function that says by -> nn.Module that it makes a network"
                if key == "model.network"
                else ""
            )
            raise ConfigurationError(f"{key}: {name} is no class{instead}.")
        return found
    what = {"lr_scheduler": "schedule", "data": "data set"}.get(key, key.rpartition(".")[2])
    lower = {known_name.lower(): known_name for known_name in known}
    hint = (
        f"; did you mean {lower[name.lower()]}?" if name.lower() in lower else nearest(name, known)
    )
    other = " Others by their import path, as torchvision.models.resnet18."
    if key == "model.network" and name in vars(importlib.import_module("torchvision.models")):
        hint = f"; did you mean torchvision.models.{name}?"
    raise ConfigurationError(
        f'{key}: there is no {what} "{name}"{hint} Known: {", ".join(sorted(known))}.'
        + (other if key == "model.network" else "")
    )


def makes_network(found: Any) -> bool:
    """True for a function whose annotation says so: calling any other is a way to run anything."""
    if not inspect.isfunction(found):
        return False
    try:
        made = typing.get_type_hints(found).get("return")
    except Exception:  # an annotation may be anything
        return False
    return inspect.isclass(made) and issubclass(made, nn.Module)


def path_of(found: Any) -> str:
    """An import path under which `found` is public: torch.optim.SGD, not torch.optim.sgd.SGD."""
    name, module = found.__name__, found.__module__
    parts = module.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts))]
    for public in ("torch.optim", "torch.optim.lr_scheduler", *packages):
        if getattr(importlib.import_module(public), name, None) is found:
            return f"{public}.{name}"
    return f"{module}.{name}"


# ---- the parser ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def parser_for(classes: tuple[tuple[str, Any], ...]) -> ArgumentParser:
    """The parser of these classes, made once: a search asks for the same ones again and again."""
    return build_parser(dict(classes))


def build_parser(classes: Mapping[str, Any]) -> ArgumentParser:
    """A parser whose keys are the arguments of exactly these classes."""
    parser = ArgumentParser(
        prog="python -m research.fit", exit_on_error=False, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of all that is random")
    parser.add_function_arguments(seeds, "random", skip={"seed_everything", "data_seed"})
    parser.add_argument("--experiment", type=str, default="cifar10", help="name in MLflow")
    parser.add_argument("--run_name", type=str | None, default=None, help="name in MLflow")
    parser.add_argument("--tracking_uri", type=str | None, default=None, help='"" records nothing')
    parser.add_argument(
        "--log_pictures", type=bool, default=True, help="draw what a run looks like"
    )
    parser.add_argument("--log_model", type=bool, default=True, help="record a model to be served")
    parser.add_argument("--log_system_metrics", type=bool, default=True, help="CPU, memory, GPU")
    parser.add_argument(
        "--non_finite_loss",
        type=Literal["stop", "ignore"],
        default="stop",
        help="what a loss of NaN or infinity does: stop keeps the step, to be replayed",
    )
    parser.add_argument(
        "--scale_lr",
        type=Literal["linear", "sqrt"] | None,
        default=None,
        help="multiply every learning rate by the number of processes, or by its square root",
    )
    parser.add_function_arguments(checkpoints, "checkpoint", skip={"validated"})
    parser.add_class_arguments(
        Classifier,
        "model",
        skip={"network", "loss", "optimizer", "lr_scheduler"},
        instantiate=False,
        fail_untyped=False,
    )
    for key, found in classes.items():
        if found is None:
            parser.add_argument(f"--{key}", type=str | None, default=None)
        else:
            add_choice(parser, key, found)
    parser.add_class_arguments(
        Trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True
    )
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
    for action in known_actions(parser).values():
        action._typehint = int_before_float(getattr(action, "_typehint", None))
    return parser


def int_before_float(annotation: Any) -> Any:
    """The same union with int ahead of float, so that limit_train_batches 1 is one batch, not all.

    jsonargparse takes the first type that fits, and `typing` may hand out int | float the other
    way round, as it was first written anywhere in the process.
    """
    kinds = typing.get_args(annotation)
    if typing.get_origin(annotation) is not typing.Union or not {int, float} <= set(kinds):
        return annotation
    union = int
    for kind in (kind for kind in kinds if kind is not int):
        union = union | kind
    return union


def add_choice(parser: ArgumentParser, key: str, found: Any) -> None:
    group = parser.add_argument_group("A class, and its arguments")  # a comment above the choice
    group.add_argument(f"--{key}.class_path", type=str, default=path_of(found))
    skip: set[str | int] = set(FILLED_IN.get(key, ()))
    # A builder of torchvision's says little in its signature; `networks.from_torchvision` wraps it.
    signature = inspect.signature(from_torchvision if is_torchvision(found) else found)
    for name in LEFT_OPEN.get(key, ()):
        if name in signature.parameters:
            skip.add(name)
            parser.add_argument(f"--{key}.init_args.{name}", type=int | None, default=None)
    if inspect.isclass(found):
        parser.add_class_arguments(
            found, f"{key}.init_args", skip=skip, instantiate=False, fail_untyped=False
        )
        return
    if is_torchvision(found):
        parser.add_argument(f"--{key}.init_args.adapt", type=bool | None, default=None)
    parser.add_function_arguments(found, f"{key}.init_args", skip=skip, fail_untyped=False)


def is_torchvision(found: Any) -> bool:
    return inspect.isfunction(found) and found.__module__.startswith("torchvision.models.")


def parse(
    parser: ArgumentParser, settings: dict[str, Any], passed_on: list[str]
) -> tuple[Namespace | None, list[str]]:
    """The checked values, and the faults met on the way: each is taken out and the rest tried."""
    faults: list[str] = []
    removed: list[str] = []  # a needed one among them is then missing, which is no news
    while len(faults) <= MOST_FAULTS:
        try:
            arguments = ["--config", as_json(spelt(settings)), *passed_on]
            values = parser.parse_args(arguments)
            parser.dump(values, skip_unset=False)
            return values, faults
        except (ValueError, KeyError, TypeError) as error:  # of classes in the trainer, told late
            why = str(error.__cause__ or error).partition("\n")[0]
            came = " ".join(passed_on) or "what came"
            faults.append(f"trainer: its classes cannot be made of {came}: {why}")
            return None, faults
        except ArgumentError as error:
            key, fault = explain(str(error), parser, settings, passed_on)
            told = [line for line in fault.splitlines() if line.split()[0] not in removed]
            faults += told
            removed.append(short_key(key or ""))
            shorter = [token for token in passed_on if key is None or not is_about(token, key)]
            if key is None or not (remove(settings, key) or len(shorter) < len(passed_on)):
                return None, faults
            passed_on = shorter
    return None, faults


def as_json(settings: Any) -> str:
    """JSON that is YAML too: it takes no pairs of surrogates, and no control characters."""
    text = json.dumps(settings, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def spelt(value: Any) -> Any:
    """The settings with infinity and NaN as YAML writes them, which JSON cannot."""
    if isinstance(value, Mapping):
        return {key: spelt(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [spelt(inside) for inside in value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    return value


# ---- faults --------------------------------------------------------------------------------------


def unknown_settings(
    parser: ArgumentParser, settings: dict[str, Any], classes: Mapping[str, Any]
) -> list[str]:
    """A sentence for each setting that nothing takes; those settings are taken out."""
    known = known_keys(parser)
    faults: list[str] = []

    def walk(inside: dict[str, Any], prefix: str) -> None:
        for name in list(inside):
            if len(faults) > MOST_FAULTS:  # looking for what was meant takes its time
                return
            key = prefix + name
            if key in known or (key in classes and inside[name] is None):
                continue
            if any(other.startswith(f"{key}.") for other in known) and isinstance(
                inside[name], dict
            ):
                walk(inside[name], f"{key}.")
                continue
            value = inside.pop(name)
            if name == "init_args" and value == {}:  # of a class that takes none
                continue
            if any(other.startswith(f"{key}.") for other in known):
                faults.append(f"{key}: a value came where its settings belong; write {key}.NAME.")
            else:
                faults.append(unknown_setting(key, known, classes))

    walk(settings, "")
    return faults


def unknown_setting(key: str, known: Sequence[str], classes: Mapping[str, Any]) -> str:
    choice = next((c for c in CHOICES if key.startswith(f"{c}.init_args.")), None)
    if choice is not None and classes.get(choice) is not None:
        prefix = f"{choice}.init_args."
        name, owner = key.removeprefix(prefix), classes[choice].__name__
        arguments = [other.removeprefix(prefix) for other in known if other.startswith(prefix)]
        has = f"It has {', '.join(arguments)}." if arguments else "It has none."
        return f'{short_key(key)}: {owner} has no argument "{name}"{nearest(name, arguments)} {has}'
    shown = [*CHOICES, *(short_key(k) for k in known if not k.endswith(".class_path"))]
    parent, _, name = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in shown if k.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.6)
    meant = [beside[near[0]]] if near else [k for k in shown if k.rpartition(".")[2] == name]
    hint = f"; did you mean {' or '.join(meant[:3])}?" if meant else "."
    return f"{key}: there is no such setting{hint} All: python -m research.fit --full_help."


def check_trainer_keys(parser: ArgumentParser, passed_on: list[str]) -> tuple[list[str], list[str]]:
    """The trainer's arguments that exist, and a sentence for each that does not."""
    known = known_keys(parser)
    good: list[str] = []
    faults: list[str] = []
    for token in passed_on:
        if len(faults) > MOST_FAULTS:
            break
        key = key_of(token)
        if any(key == other or key.startswith(f"{other}.") for other in known):
            good.append(token)
        else:
            faults.append(unknown_setting(key, known, {}))
    return good, faults


def explain(
    message: str, parser: ArgumentParser, settings: dict[str, Any], passed_on: list[str]
) -> tuple[str | None, str]:
    """The key that jsonargparse's message is about, None if it says none; the fault, reworded."""
    about = re.search(r"Parser key \"([^\"]+)\"", message)
    missing = re.search(r"arguments are required: (.+)", message)
    if about is None and missing is not None:
        keys = [short_key(key) for key in missing[1].split(", ")]
        return None, "\n".join(f"{key} is missing; give it with --{key} VALUE." for key in keys)
    action = known_actions(parser).get(about[1]) if about is not None else None
    if about is None or action is None:
        return None, message.strip()
    key = about[1]
    denied = re.search(r"Importing '([^']+)' is not allowed", message)
    if denied is not None:
        return key, refusal(short_key(key), denied[1])
    typed = [token for token in passed_on if is_about(token, key)]
    came = " ".join(typed) if typed else json.dumps(lookup(settings, key), default=str)
    came = came if len(came) <= 200 else f"{came[:200]}..."
    inner = re.search(r"Problem with given class_path '([^']+)':\s+(.+)", message)
    if inner is not None:  # a class was found, one of its own arguments is wrong
        name, problem = inner[1].rpartition(".")[2], inner[2].strip().rstrip(".")
        return key, f"{short_key(key)}: {name}: {problem}; came {came}."
    expected = describe(getattr(action, "_typehint", action.type))
    return key, f"{short_key(key)}: expected {expected}; came {came}."


def is_real(annotation: Any) -> bool:
    """True where a float may stand and an int is not meant: float, float | None, float | Tensor."""
    kinds = typing.get_args(annotation) or (annotation,)
    return float in kinds and int not in kinds and typing.get_origin(annotation) is not tuple


def describe(annotation: Any) -> str:
    """A type in words: int | None is `a whole number or null`."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if annotation in words:
        return words[annotation]
    if annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(str(a) for a in arguments)}"
    if origin in (typing.Union, types.UnionType):
        literals = [a for a in arguments if typing.get_origin(a) is Literal]
        kinds = [describe(a) for a in arguments if a is not torch.Tensor and a not in literals]
        if literals:
            choices = dict.fromkeys(str(c) for a in literals for c in typing.get_args(a))
            kinds.insert(0, f"one of {', '.join(choices)}")
        return " or ".join(dict.fromkeys(kinds))
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} values ({', '.join(describe(a) for a in arguments)})"
    if origin in (list, tuple, collections.abc.Iterable, collections.abc.Sequence):
        inner = " and ".join(dict.fromkeys(describe(a) for a in arguments if a is not Ellipsis))
        return f"a list ({inner} each)"
    if inspect.isclass(annotation):
        return f"the name of a {annotation.__name__} class"
    return str(annotation)


# ---- keys ----------------------------------------------------------------------------------------


def known_actions(parser: ArgumentParser) -> dict[str, Any]:
    """The parser's settings by dotted key; jsonargparse has no public list of them."""
    return {
        action.dest: action
        for action in parser._actions
        if action.option_strings
        and action.dest not in ("help", "config", "print_config", "print_shtab")
        and not action.dest.endswith(".help")
    }


def known_keys(parser: ArgumentParser) -> list[str]:
    groups = {key.rpartition(".")[0] for key in known_actions(parser)}
    return [key for key in known_actions(parser) if key not in groups]


def short_key(key: str) -> str:
    """The key as it is typed: optimizer.init_args.lr is --optimizer.lr."""
    return key.replace(".init_args", "").removesuffix(".class_path")


def key_of(token: str) -> str:
    return token[2:].partition("=")[0].removesuffix("+")


def is_about(token: str, key: str) -> bool:
    return key_of(token) == key or key_of(token).startswith(f"{key}.")


def lookup(settings: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def remove(settings: dict[str, Any], key: str) -> bool:
    """Take a dotted key out; False where it was not there."""
    *parents, last = key.split(".")
    inside = lookup(settings, ".".join(parents)) if parents else settings
    return isinstance(inside, dict) and inside.pop(last, inside) is not inside
