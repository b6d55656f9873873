"""The arms of a search: what it confirmed on fresh seeds, or else the best trial of each cell.

The value by which a trial was chosen is the best of many draws of one seed, so likely better than
what its settings reach on average. Only runs on seeds that had no part in the choice are evidence:
where the search confirmed its best, those runs alone make the arms.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from research.comparison.grouping import arms_by_settings, configuration_of, named_apart
from research.statistics.arms import CHOICES, Arm, Setting, Trained, settings_apart
from research.tracking.arms import Found, Read

MOST_ARMS = 5  # where nothing but numbers was searched


@dataclass(frozen=True)
class Selected:
    """The arms of a search, the settings it varied, and what is to be said of the choice."""

    arms: tuple[Arm, ...]
    meant: tuple[str, ...]
    notes: tuple[str, ...]


def select(found: Found) -> Selected:
    """What a search has to compare; no arms where no trial came to its end."""
    tried = [each for each in found.runs if not each.confirms]
    confirming = [each.trained for each in found.runs if each.confirms]
    meant = tuple(searched(tried))
    notes = [ended(found, tried)]
    looked = [each.trained.run_name for each in tried if each.trained.test_looks]
    if looked:
        notes.append(
            f"{found.text}: the test pictures were scored with {len(looked)} of its trials "
            f"({', '.join(looked[:3])}), so its choice may have been made with them in view."
        )
    if any(run.finished for run in confirming):
        notes.append(
            f"{found.text}: the arms are the configurations that it confirmed on fresh seeds; the "
            "trials that chose them are no part of the figures."
        )
        return Selected(
            tuple(named_apart(arms_by_settings(confirming, found.text))), meant, tuple(notes)
        )
    best = best_of_each(found, tried)
    arms = named_apart([Arm(run.run_name, found.text, (run,)) for run in best])
    if arms:
        notes.append(
            f"{found.text}: each arm is the single best trial of its kind, chosen for its "
            f"{found.objective}, which is therefore likely better than what its settings reach on "
            f"average. Fresh seeds tell: python -m research.compare {found.text} --confirm each"
        )
    return Selected(tuple(arms), meant, tuple(notes))


def ended(found: Found, tried: Sequence[Read]) -> str:
    """How the trials ended, all of them counted."""
    words = {"FINISHED": "finished", "RUNNING": "still running", "KILLED": "stopped"}
    ends = Counter(
        "diverged" if run.diverged else words.get(run.status, run.status.lower())
        for run in (each.trained for each in tried)
    )
    told = ", ".join(f"{number} {how}" for how, number in ends.items())
    return f"{found.text}: a search of {len(tried)} trials ({told})."


def best_of_each(found: Found, tried: Sequence[Read]) -> list[Trained]:
    """The best finished trial of each cell, or of each choice of classes, the best first.

    Where the search chose among no classes: its best few configurations.
    """
    ranked = ranked_trials(found, tried)
    kinds: dict[tuple[str, ...], Trained] = {}
    for each in ranked:
        kinds.setdefault(kind_of(each), each.trained)
    if len(kinds) > 1:
        return list(kinds.values())
    return [each.trained for each in ranked[:MOST_ARMS]]


def ranked_trials(found: Found, tried: Sequence[Read]) -> list[Read]:
    """The finished trials that have the objective, the best first."""
    metric = found.objective
    ended = [each for each in tried if each.trained.finished and metric in each.trained.metrics]
    sign = 1 if found.is_minimized else -1
    return sorted(ended, key=lambda each: sign * each.trained.metrics[metric])


def confirmable(found: Found, of_each: bool = False) -> list[Trained]:
    """The trials with different configurations, the best first; or only the best of each cell."""
    tried = [each for each in found.runs if not each.confirms]
    if of_each:
        return best_of_each(found, tried)
    distinct: dict[str, Trained] = {}
    for each in ranked_trials(found, tried):
        distinct.setdefault(configuration_of(each.trained), each.trained)
    return list(distinct.values())


def kind_of(each: Read) -> tuple[str, ...]:
    choices = (str(each.trained.settings.get(choice)) for choice in CHOICES)
    return (each.study, *choices)


def searched(tried: Sequence[Read]) -> list[str]:
    """The settings that are not the same in all trials: what the search is about."""
    arms = [Arm(each.trained.run_name, "", (each.trained,)) for each in tried]
    apart: list[Setting] = settings_apart(arms) if len(arms) > 1 else []
    return [setting.key for setting in apart]
