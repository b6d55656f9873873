"""Runs that were trained alike are one arm, and an arm is called by what sets it apart."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

from research.configuration.effect import WITHOUT_EFFECT
from research.statistics.arms import CHOICES, SEEDS, Arm, Trained, settings_apart

# A search sets it for its own sake; whether test was measured is told of each run by itself.
IGNORED = (*WITHOUT_EFFECT, "trainer.limit_test_batches", "checkpoint.save_top_k")


def arms_by_settings(runs: Sequence[Trained], source: str) -> list[Arm]:
    """An arm for each configuration, seeds and names apart; each is named after its first run."""
    groups: dict[str, list[Trained]] = {}
    for run in runs:
        groups.setdefault(configuration_of(run), []).append(run)
    return [arm_of(group[0].run_name, source, group) for group in groups.values()]


def arm_of(name: str, source: str, runs: Sequence[Trained]) -> Arm:
    return Arm(name, source, tuple(sorted(runs, key=lambda run: run.seed_key)))


def configuration_of(run: Trained) -> str:
    """All settings that can change the figures, but for the seeds; equal texts are one arm."""
    left_out = {*IGNORED, *SEEDS}
    settings = {
        key: value
        for key, value in run.settings.items()
        if key not in left_out and not key.startswith("random.")
    }
    return repr(sorted(settings.items()))


# ---- names ---------------------------------------------------------------------------------------


def common_name(names: Sequence[str]) -> str:
    """What the names begin with, before the numbers of seeds: `Adam-0` and `Adam-1` are `Adam`."""
    parts = common_start([re.split(r"(?<=[-_ .=])|(?=[-_ .=])", name) for name in names])
    letters = common_start(names)
    name = "".join(parts).rstrip("-_ .=").removesuffix("seed").rstrip("-_ .=")
    return name or "".join(letters).rstrip("0123456789") or names[0]


def common_start(sequences: Sequence[Sequence[str]]) -> list[str]:
    together = zip(*sequences, strict=False)
    return [each[0] for each in itertools.takewhile(lambda each: len(set(each)) == 1, together)]


def named_apart(arms: Sequence[Arm]) -> list[Arm]:
    """The arms by what sets them apart: `MSELoss Adam`, and where that is not enough `lr=0.1`."""
    apart = settings_apart(arms, IGNORED)
    names = [""] * len(arms)
    for setting in sorted(apart, key=lambda each: each.key not in CHOICES):
        is_choice = setting.key in CHOICES
        if not is_choice and len(set(names)) == len(names):
            break
        last = setting.key.rpartition(".")[2]
        for place, value in enumerate(setting.values):
            if value is not None:
                part = value if is_choice and value != "None" else f"{last}={short(value)}"
                names[place] = f"{names[place]} {part}".strip()
    return [replace(arm, name=name or arm.name) for arm, name in zip(arms, names, strict=True)]


def short(value: str) -> str:
    """The value of a setting; a number to three digits."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value


def with_own_names(arms: Sequence[Arm]) -> list[Arm]:
    """No two arms of the same name: they take on what sets them apart, or else a number."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.name, []).append(arm)
    apart = {
        id(arm): f"{name} {told.name}" if told.name != name else name
        for name, group in groups.items()
        for arm, told in zip(group, named_apart(group), strict=True)
    }
    arms = [replace(arm, name=apart[id(arm)]) for arm in arms]
    taken: set[str] = set()
    named = []
    for arm in arms:
        name, number = arm.name, 2
        while name in taken:
            name, number = f"{arm.name} ({number})", number + 1
        taken.add(name)
        named.append(replace(arm, name=name))
    return named
