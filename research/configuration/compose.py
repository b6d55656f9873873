"""One nested mapping of settings out of defaults, files and the command line.

Later sources win: the defaults below, then each `--config FILE` in the order given, then the
command line as a whole.  Five settings choose a class (`CHOICES`); choosing *another* class drops
all arguments of the one before, so that an `AdamW.weight_decay` never reaches the `SGD` that
replaced it (LightningCLI and jsonargparse keep whatever the new class happens to accept).

Nothing here imports torch: a misspelt file name is told within a second.  Whatever comes in, a
file of noise or a value of a million characters, is told in a few short sentences or is settings.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Each holds `{"class_path": name, "init_args": {...}}`, or None where that means "none".
CHOICES = ("model.network", "model.loss", "optimizer", "lr_scheduler", "data")

# What `python -m research.fit` trains when nothing is said: the tutorial's CNN and its plain SGD.
DEFAULTS: Mapping[str, Any] = {
    "model": {"network": "CNN", "loss": "CrossEntropyLoss"},
    "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.01}},
    "lr_scheduler": None,
    "data": "CIFAR10",
}

# Only the trainer's arguments can be lists of classes; jsonargparse itself reads those from argv.
PASSED_ON = "trainer"

MOST_BYTES = 1_000_000  # of a file
MOST_CHARACTERS = 5_000  # of a key or a value
# Control characters but tab and line ends; halves of surrogates, as bytes become that are no UTF-8.
STRANGE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
MOST_PARTS = 20  # of a dotted key
MOST_FAULTS = 20  # told at once
FAULT_CHARACTERS = 2_000


class ConfigurationError(ValueError):
    """What is wrong with the settings, one sentence or two for each fault.

    A fault is cut where it is too long to read, and what could not be printed is escaped: it may
    quote a file from anywhere.  `exit_code` is what a command ends with.
    """

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]) -> None:
        told = [faults] if isinstance(faults, str) else list(faults)
        more = len(told) - MOST_FAULTS
        told = [printable(fault) for fault in told[:MOST_FAULTS]]
        told = [fault if fault.endswith((".", "?", "!")) else f"{fault}." for fault in told]
        self.faults = [*told, *([f"And {more} more."] if more > 0 else [])]
        super().__init__("\n".join(self.faults))


def printable(text: str) -> str:
    """The text, of bounded length, lines kept; control characters and half surrogates escaped."""
    if len(text) > FAULT_CHARACTERS:
        half = FAULT_CHARACTERS // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


@dataclass
class CommandLine:
    """What was typed: the files' settings, the flags', and what jsonargparse reads by itself."""

    files: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    passed_on: list[str] = field(default_factory=list)
    print_config: str | None = None
    trust: bool = False  # the files may name any class, not only those of the known packages

    @property
    def sources(self) -> list[dict[str, Any]]:
        """All settings in the order in which they count: a flag wins over every file."""
        return [*self.files, self.settings]


def compose(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """The nested settings of all sources, defaults first; every choice in its long form."""
    settings: dict[str, Any] = {}
    for source in (DEFAULTS, *sources):
        merge(settings, expand_choices(source))
    return settings


def merge(settings: dict[str, Any], source: Mapping[str, Any], path: str = "") -> None:
    """Lay `source` over `settings` in place; another class replaces a choice whole."""
    for key, value in source.items():
        here = f"{path}{key}"
        before = settings.get(key)
        if here in CHOICES and isinstance(value, Mapping):
            another = value.get("class_path")
            if another is not None and (
                before is None or not same_class(another, before["class_path"])
            ):
                settings[key] = {"class_path": another, "init_args": dict(value["init_args"])}
            elif before is None:
                raise ConfigurationError(
                    f"{here}: arguments came ({', '.join(value['init_args'])}) but no class; "
                    f"choose one with --{here} NAME."
                )
            else:
                settings[key] = {
                    "class_path": before["class_path"],
                    "init_args": {**before["init_args"], **value["init_args"]},
                }
        elif isinstance(value, Mapping) and isinstance(before, dict):
            merge(before, value, f"{here}.")
        else:
            settings[key] = dict(value) if isinstance(value, Mapping) else value


def same_class(one: str, other: str) -> bool:
    """True for `SGD` and `torch.optim.SGD`: a short name stands for the known class so called."""
    if "." in one and "." in other:
        return one == other
    return one.rpartition(".")[2] == other.rpartition(".")[2]


def expand_choices(source: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The same settings with every choice as class_path and init_args, however it was written.

    Raises ConfigurationError where a choice is neither a name nor a mapping.
    """
    expanded = {}
    for key, value in source.items():
        here = f"{path}{key}"
        holds_choices = any(choice.startswith(f"{here}.") for choice in CHOICES)
        if here in CHOICES:
            expanded[key] = expand_choice(here, value)
        elif holds_choices and not isinstance(value, Mapping):
            raise ConfigurationError(
                f"{here}: a value came where its settings belong; write {here}.NAME."
            )
        elif holds_choices:
            expanded[key] = expand_choices(value, f"{here}.")
        else:
            expanded[key] = value
    return expanded


def expand_choice(key: str, value: Any) -> dict[str, Any] | None:
    if value is None or value in ("null", "None"):
        if key != "lr_scheduler":
            raise ConfigurationError(f"{key} is empty; it must name a class.")
        return None
    if isinstance(value, str):
        return {"class_path": value, "init_args": {}}
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            f"{key}: expected the name of a class, or a mapping of class_path and init_args; "
            f"came {value!r}."
        )
    name, arguments = value.get("class_path"), value.get("init_args")
    if name is not None and not isinstance(name, str):
        raise ConfigurationError(f"{key}.class_path: expected the name of a class, came {name!r}.")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ConfigurationError(f"{key}.init_args: expected a mapping, came {arguments!r}.")
    # `optimizer: {class_path: SGD, lr: 0.1}` is read like `--optimizer SGD --optimizer.lr 0.1`.
    beside = {k: v for k, v in value.items() if k not in ("class_path", "init_args")}
    return {"class_path": name, "init_args": {**(arguments or {}), **beside}}


def read_file(file: str | Path) -> dict[str, Any]:
    """The settings in a YAML file; raises ConfigurationError where there are none to read."""
    path = Path(file)
    try:
        with open(path, "rb") as opened:
            content = opened.read(MOST_BYTES + 1)  # it may be /dev/zero
        if len(content) > MOST_BYTES:
            raise ConfigurationError(
                f"config: {file} has more than {MOST_BYTES:,} bytes; no settings are that long."
            )
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        near = nearest(path.name, (p.name for p in sorted(path.parent.glob("*.yaml"))))
        raise ConfigurationError(f"config: there is no file {file}{near}") from None
    except ConfigurationError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(f"config: {file} cannot be read: {reason}.") from None
    except ValueError:  # a zero byte
        raise ConfigurationError(f"config: {file} is no name of a file.") from None
    return read_text(text, f"config: {file}")


def read_text(text: str, source: str) -> dict[str, Any]:
    """The settings in a YAML text, as plain data: nothing in it can run.

    ConfigurationError, which begins with `source`, where there are none.
    """
    from research.configuration.document import UnreadableDocument, load_bounded

    try:
        settings = load_bounded(text)
    except UnreadableDocument as error:
        raise ConfigurationError(f"{source} is not YAML{error.place}: {error}.") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigurationError(
            f"{source} holds no settings; it must be YAML, lines like seed_everything: 7."
        )
    refuse_strange(settings, f"{source}: ")
    return unfold(settings)


def refuse_strange(value: Any, place: str) -> None:
    """ConfigurationError for a value, or one inside it, that no setting can have."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            if not isinstance(key, str):
                raise ConfigurationError(f"{place}a key is {key!r}; it must be a name.")
            refuse_strange(key, place)
            if key.count(".") > MOST_PARTS:
                raise ConfigurationError(f"{place}{key[:50]}... has more than {MOST_PARTS} parts.")
            refuse_strange(inside, f"{place}{key}: ")
    elif isinstance(value, list | tuple):
        for inside in value:
            refuse_strange(inside, place)
    elif isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            raise ConfigurationError(
                f"{place}{value[:50]}... has {len(value):,} characters; at most "
                f"{MOST_CHARACTERS:,} are read."
            )
        if STRANGE.search(value):
            raise ConfigurationError(
                f"{place}{value[:50]} has characters that are no text, or is not UTF-8."
            )
        if "&" in value and "*" in value:  # jsonargparse reads a value as YAML
            from research.configuration.document import swells

            if swells(value):
                raise ConfigurationError(f"{place}{value[:50]}... is too much to be one setting.")
    elif value is not None and not isinstance(value, int | float | bool):
        kind = type(value).__name__
        raise ConfigurationError(
            f"{place}{kind} is no kind of value that a setting can have; it must be text, a "
            "number, true, false, null, or a list of them."
        )


def unfold(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with `optimizer.lr: 0.1` put where `optimizer: {lr: 0.1}` stands."""
    unfolded: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        lay_beside(unfolded, expand_choices(value))
    return unfolded


def lay_beside(settings: dict[str, Any], others: Mapping[str, Any]) -> None:
    """Add `others`, of the same source: a class and its arguments may come in any order."""
    for key, value in others.items():
        inside = settings.get(key)
        if isinstance(value, Mapping) and isinstance(inside, dict):
            lay_beside(inside, value)
        elif not (key == "class_path" and value is None and inside is not None):
            settings[key] = value


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """What `--key value` and `--key=value` say, values as typed, and what the files named hold.

    Raises ConfigurationError with all that cannot be read.
    """
    typed = CommandLine()
    faults: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token[2:3] in ("", "="):
            faults.append(f'"{token}" was not expected; settings are written --key value.')
            continue
        key, equals, value = token[2:].partition("=")
        if key == "print_config":
            typed.print_config = value
            continue
        if key == "trust" and not equals:
            typed.trust = True
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                faults.append(f"{key}: a value is missing; write --{key} VALUE.")
                continue
            value = rest.pop(0)
        try:
            refuse_strange({key: value}, "")
            if key == "config":
                typed.files.append(read_file(value))
            elif key.startswith(f"{PASSED_ON}."):
                typed.passed_on.append(f"--{key}={value}")
            else:
                put(typed.settings, key, value)
        except ConfigurationError as error:
            faults += error.faults
    if faults:
        raise ConfigurationError(faults)
    return typed


def put(settings: dict[str, Any], key: str, value: str) -> None:
    """Set the dotted `key`; a choice's name and arguments may come in any order."""
    choice = next((c for c in CHOICES if key == c or key.startswith(f"{c}.")), None)
    *parents, last = key.split(".")
    if choice is not None:
        argument = key[len(choice) + 1 :].removeprefix("init_args.")
        *parents, last = (*choice.split("."), argument or "class_path")
        if value in ("null", "None") and last == "class_path" and choice == "lr_scheduler":
            *parents, last = choice.split(".")
            settings[last] = None
            return
    here = settings
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise ConfigurationError(
                f"{key}: {parent} was given a value, it cannot hold {last} too."
            )
    here[last] = value


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence: `; did you mean X?` where a known word is near, else a full stop."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else "."
