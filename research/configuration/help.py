"""What can be chosen and set, out of the classes themselves: `--help.model` and its like."""

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser
from torchvision import models

from research.configuration.compose import CHOICES, ConfigurationError, nearest
from research.configuration.schema import (
    add_choice,
    describe,
    known_actions,
    known_classes,
    known_keys,
    resolve,
    short_key,
)

TOPICS = ("run", "model", "network", "loss", "optimizer", "lr_scheduler", "data", "trainer")


def explain_topic(topic: str) -> str:
    """The help for one topic, "full_help" for every key; ConfigurationError for an unknown one."""
    if topic == "full_help":
        return "\n\n".join(explain_topic(t) for t in TOPICS if t not in ("network", "loss"))
    if topic in ("model.network", "model.loss"):
        topic = topic.removeprefix("model.")
    if topic == "run":
        return keys_under("")
    if topic == "model":
        return "\n\n".join([explain_topic("network"), explain_topic("loss"), keys_under("model.")])
    if topic == "trainer":
        return (
            keys_under("trainer.")
            + "\n\nEach is described in Lightning's documentation of Trainer."
        )
    if topic not in TOPICS:
        raise ConfigurationError(
            f"help.{topic}: there is no such topic{nearest(topic, TOPICS)} "
            f"Known: {', '.join(TOPICS)}, and --full_help."
        )
    key = next(choice for choice in CHOICES if choice.rpartition(".")[2] == topic)
    lines = [f"--{key} NAME, its arguments as --{key}.ARGUMENT VALUE"]
    for name, found in sorted(known_classes(key).items()):
        lines += explain_class(key, name, found)
    if topic == "network":
        lines += explain_class(key, "torchvision.models.resnet18, and others so", models.resnet18)
    return "\n".join(lines)


def explain_class(key: str, name: str, found: Any) -> Iterator[str]:
    """A class in a few lines: what it is, and its arguments with their defaults."""
    first_line = (inspect.getdoc(found) or "").strip().partition("\n")[0]
    yield f"\n  {name}" + (f": {first_line}" if first_line else "")
    # jsonargparse follows **kwargs to the class that takes them; a bare signature would not.
    parser, prefix = ArgumentParser(exit_on_error=False, add_help=False), f"{key}.init_args."
    add_choice(parser, key, found)
    arguments = [
        name.removeprefix(prefix) + (" (needed)" if action.required else f"={action.default!r}")
        for name, action in known_actions(parser).items()
        if name.startswith(prefix)
    ]
    if arguments:
        yield textwrap.indent(textwrap.fill(", ".join(arguments), 90), " " * 6)


def keys_under(prefix: str) -> str:
    """The plain keys of the parser below `prefix`, with types in words and defaults.

    Below "" are those with no topic of their own.
    """
    apart = CHOICES if prefix else (*CHOICES, *(f"{topic}." for topic in TOPICS))
    lines = []
    parser = resolve().parser
    actions = known_actions(parser)
    for key in known_keys(parser):
        if key.startswith(prefix) and not key.startswith(apart):
            action = actions[key]
            expected = describe(getattr(action, "_typehint", action.type))
            said = (
                f". {action.help}"
                if isinstance(action.help, str) and "%(" not in action.help
                else ""
            )
            lines.append(f"--{short_key(key)} ({action.default}): {expected}{said}")
    return "\n".join(textwrap.shorten(line, 200, placeholder=" ...") for line in lines)
