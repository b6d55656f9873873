"""What was typed becomes arms: runs by themselves, parents with the runs below them, searches.

    gathered = gather([read(uri, "Adam"), read(uri, "SGD")])

Runs that were named one by one and differ in nothing but their seeds are one arm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from research.comparison.grouping import (
    arm_of,
    arms_by_settings,
    common_name,
    configuration_of,
    named_apart,
    with_own_names,
)
from research.comparison.selection import select
from research.configuration.compose import ConfigurationError
from research.statistics.arms import Arm
from research.tracking.arms import Found, Read

# Tags of a parent: the search whose best configurations were trained again, what that varied.
CONFIRMS, CONFIRMS_CHOICE_OF = "confirms", "confirms.choice_of"
CONFIRMS_AIM = "confirms.objective"  # with its direction: "val/loss minimize"


@dataclass(frozen=True)
class Aim:
    """What a search was for: a metric at the best checkpoint, and whether less of it is better."""

    metric: str
    is_minimized: bool


@dataclass(frozen=True)
class Gathered:
    """The arms, the settings that are `meant` to differ, and what is to be said of their choice.

    `aims` are those of the searches that the arms come from, each once; none for other runs.
    """

    arms: tuple[Arm, ...]
    meant: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    searches: tuple[Found, ...] = field(default=(), repr=False)
    aims: tuple[Aim, ...] = ()


def gather(found: Sequence[Found]) -> Gathered:
    """The arms behind all that was named, in that order; ConfigurationError for fewer than two."""
    arms: list[Arm] = []
    notes: list[str] = []
    meant: list[str] = []
    lone = []
    for each in found:
        if each.is_search:
            selected = select(each)
            arms += selected.arms
            notes += selected.notes
            meant += selected.meant
        elif each.is_parent:
            arms += arms_below(each)
            meant += each.run.tags.get(CONFIRMS_CHOICE_OF, "").split()
            if CONFIRMS in each.run.tags:
                notes.append(
                    f"{each.run.run_name}: the best of a search, trained again on seeds that had "
                    "no part in its choice; each run was tested once."
                )
        else:
            lone.append(len(arms))
            run = each.runs[0].trained
            arms.append(Arm(run.run_name, each.text, (run,)))
    arms = merge(arms, lone)
    if not arms:
        raise ConfigurationError(f"Nothing has come to its end yet. {' '.join(notes)}")
    if len(arms) < 2:
        raise ConfigurationError(
            f"{arms[0].name} is a single arm ({count(arms)}); name another to compare it with: "
            f"python -m research.compare {found[0].text} OTHER."
        )
    searches = tuple(each for each in found if each.is_search)
    aims = [aim for each in found if (aim := aim_of(each)) is not None]
    return Gathered(
        tuple(with_own_names(arms)),
        tuple(dict.fromkeys(meant)),
        tuple(notes),
        searches,
        tuple(dict.fromkeys(aims)),
    )


def aim_of(found: Found) -> Aim | None:
    """What the search was for that was named, or whose best was trained again."""
    if found.is_search:
        return Aim(found.objective, found.is_minimized)
    metric, _, direction = found.run.tags.get(CONFIRMS_AIM, "").rpartition(" ")
    return Aim(metric, direction == "minimize") if metric else None


def count(arms: Sequence[Arm]) -> str:
    runs = sum(len(arm.runs) for arm in arms)
    return "1 run" if runs == 1 else f"{runs} runs"


# ---- arms of one parent --------------------------------------------------------------------------


def arms_below(found: Found) -> list[Arm]:
    """The arms of a parent: by the names they were trained under, or else by their settings."""
    named: dict[str | None, list[Read]] = {}
    for each in found.runs:
        named.setdefault(each.arm, []).append(each)
    arms: list[Arm] = []
    for name, reads in named.items():
        if name is not None:
            arms.append(arm_of(name, found.text, [each.trained for each in reads]))
            continue
        groups = arms_by_settings([each.trained for each in reads], found.text)
        arms += named_apart(groups) if len(groups) > 1 else groups
    if len(arms) == 1 and None in named:
        arms = [replace(arms[0], name=found.run.run_name)]
    return arms


def merge(arms: Sequence[Arm], lone: Sequence[int]) -> list[Arm]:
    """Of the arms at the places `lone`, single runs, those with equal settings and code are one."""
    groups: dict[object, list[Arm]] = {}
    for place, arm in enumerate(arms):
        key: object = place
        if place in lone and arm.runs[0].settings:
            key = configuration_of(arm.runs[0]), arm.runs[0].origins.get("code")
        groups.setdefault(key, []).append(arm)
    return [
        group[0]
        if len(group) == 1
        else arm_of(
            common_name([arm.name for arm in group]),
            " ".join(arm.source for arm in group),
            [arm.runs[0] for arm in group],
        )
        for group in groups.values()
    ]
