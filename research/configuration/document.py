"""A YAML text as plain data, of bounded size: a file from a stranger can neither run nor flood us.

jsonargparse's loader is a safe one (no tag makes an object), and its YAML reads 1e-3 as a number,
which PyYAML's does not. Here are the bounds that it lacks: libyaml ends the whole process on text
nested some ten thousand levels deep, and a few lines of aliases to aliases are worth gigabytes.
Importing this file puts the bounds around every YAML text that jsonargparse reads.
"""

from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_dumper, set_loader
from jsonargparse._loaders_dumpers import dumpers, get_yaml_default_loader, yaml_comments_dump

if TYPE_CHECKING:
    from ruamel.yaml.representer import RoundTripRepresenter

MOST_LEVELS = 50
MOST_VALUES = 100_000  # as if every alias were written out


class UnreadableDocument(yaml.YAMLError):
    """No YAML, or more of it than settings can be; says why, and in `place` where it is known."""

    def __init__(self, problem: str, place: str = "") -> None:
        super().__init__(problem)
        self.place = place


def load_bounded(text: str) -> Any:
    """The plain data that `text` stands for; UnreadableDocument for anything else."""
    try:
        # Short of this length nothing can be nested too deep, and only aliases can swell.
        if len(text) > MOST_LEVELS or "*" in text:
            measure(text)
        return LOAD(text)
    except UnreadableDocument:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UnreadableDocument(problem, place) from None
    except (ValueError, TypeError, RecursionError) as error:  # a number of 5,000 digits, a bad date
        raise UnreadableDocument(str(error)) from None


def swells(text: str) -> bool:
    """True for YAML that is too much; False for all else, also for what is no YAML."""
    try:
        measure(text)
    except UnreadableDocument:
        return True
    except yaml.YAMLError:
        return False
    return False


def measure(text: str) -> None:
    """UnreadableDocument if the text is nested too deep, or is too much with its aliases."""
    values_in: dict[str, int] = {}  # by anchor, its aliases written out
    inside: list[tuple[str | None, int]] = []  # what is open: its anchor, the values before it
    values = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in values_in:  # not there, or it holds itself
                raise UnreadableDocument(f"*{event.anchor} stands for nothing that came before it")
            values += values_in[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = inside.pop()
            if anchor is not None:
                values_in[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                values_in[event.anchor] = 1
        if len(inside) > MOST_LEVELS:
            raise UnreadableDocument(f"it is nested more than {MOST_LEVELS} levels deep")
        if values > MOST_VALUES:
            raise UnreadableDocument(f"it holds more than {MOST_VALUES:,} values")


class Dumper(yaml.SafeDumper):
    """Quotes what would be read as something else: the text 1e-3 is no number to PyYAML."""

    yaml_implicit_resolvers = get_yaml_default_loader().yaml_implicit_resolvers


def dump(settings: Any) -> str:
    """YAML that `load_bounded` reads as the same again."""
    return yaml.dump(
        settings, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )


def dump_with_comments(settings: Any, parser: ArgumentParser) -> str:
    """The same YAML, each setting below what its parser says of it; ruamel.yaml puts that there.

    ruamel's YAML is of version 1.2, where yes is a text: it would leave off the quotes that keep it
    one where it is read again.
    """
    from ruamel.yaml.representer import RoundTripRepresenter  # a quarter of a second

    RoundTripRepresenter.add_representer(str, represent_text)
    return yaml_comments_dump(settings, parser)


def represent_text(representer: "RoundTripRepresenter", text: str) -> Any:
    """The text as a node of ruamel's, quoted unless it reads as itself without."""
    try:
        is_plain = LOAD(text) == text
    except (ValueError, yaml.YAMLError):
        is_plain = False
    return representer.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if is_plain else "'"
    )


LOAD = get_loader("yaml")
set_loader("yaml", load_bounded, exceptions=(yaml.YAMLError,))
set_dumper("yaml", dump)
dumpers["yaml_comments"] = dump_with_comments
