"""The best of a search, trained again on fresh seeds, and each of these runs tested once.

    confirmed = confirm(read(uri, "my search"), 5, 3, means, question)

A test is scored once: what an earlier confirmation of the same search has trained is read from its
parent run, or gone on with there. Only the configurations that are new have a parent of their own.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from research.comparison.gathering import CONFIRMS, CONFIRMS_AIM, CONFIRMS_CHOICE_OF
from research.comparison.grouping import (
    arms_by_settings,
    configuration_of,
    named_apart,
    with_own_names,
)
from research.comparison.judging import Question
from research.comparison.selection import confirmable, searched
from research.comparison.training import Means, again, read_trained, refuse_unanswerable, repeated
from research.configuration.compose import ConfigurationError, nearest
from research.configuration.schema import Configuration
from research.repetition.trainings import crossed
from research.search.winner import fresh_seeds_of
from research.statistics.arms import Trained
from research.tracking.arms import ARM, Found
from research.tracking.runs import RecordedRun, find_all_tagged

CONFIRMS_TRIALS = "confirms.trials"  # tag of a parent: the trial's run of each arm, as JSON


@dataclass(frozen=True)
class Confirmed:
    """The parents that have the runs; `owner` is the one that the report belongs to, if any."""

    found: tuple[Found, ...]
    owner: Found | None


def confirm(
    found: Found, best: int, seeds: int | list[int], means: Means, question: Question
) -> Confirmed:
    """Train what is not there yet of the best configurations of a search.

    `best` is their number; 0: the best of each cell.
    No seed of the search is among theirs: neither they nor the test pictures had a part in its
    choice.
    """
    chosen = chosen_of(found, best)
    groups = with_own_names(named_apart(arms_by_settings(chosen, found.text)))
    trials = {arm.name: arm.runs[0] for arm in groups}
    arms = {name: trained_again(found, run.run_id, means) for name, run in trials.items()}
    refuse_unanswerable(question, arms)
    if question.baseline is not None and question.baseline not in arms:
        raise ConfigurationError(
            f"baseline: there is no arm {question.baseline}{nearest(question.baseline, arms)} "
            f"There are {', '.join(arms)}."
        )
    wanted = seeds_of(found, seeds)
    names = {configuration_of(run): name for name, run in trials.items()}
    parents: list[Found] = []
    owner = None
    befores = find_all_tagged(means.tracking_uri, {CONFIRMS: found.run.run_id})
    earlier = [(before, theirs) for before in befores if (theirs := arms_of(before, found))]
    for before, theirs in earlier:
        common = {name: own for name, own in theirs.items() if configuration_of(own) in names}
        if not common:
            continue
        # Gone on with, where not all seeds are there yet.
        parent = trained(found, before.run_name, theirs, list(common), wanted, means)
        if len(common) == len(theirs):
            owner = parent
        parents.append(renamed(parent, {name: names.pop(configuration_of(own))
                                        for name, own in common.items()}))  # fmt: skip
    if parents:
        print(
            f"{len(arms) - len(names)} of {len(arms)} configurations were confirmed before: what "
            "is there of these, by the same code, is not trained or tested again.",
            file=sys.stderr,
        )
    if names:
        number = f" {len(earlier) + 1}" if earlier else ""
        new = {name: trials[name] for name in names.values()}
        name = f"{found.run.run_name} confirmed{number}"
        owner = trained(found, name, new, list(new), wanted, means)
        parents.append(owner)
    return Confirmed(tuple(parents), owner)


def chosen_of(found: Found, best: int) -> list[Trained]:
    chosen = confirmable(found, of_each=best == 0)
    chosen = chosen[:best] if best else chosen
    if not chosen or len(chosen) < best:
        raise ConfigurationError(
            f"confirm: {found.text} has {len(chosen)} different configurations that came to their "
            f"end, and {best or 'one of each cell'} are asked for."
        )
    return chosen


def seeds_of(found: Found, asked: int | list[int]) -> list[int]:
    """Fresh ones; ConfigurationError for those that the search has used."""
    used = {seed for each in found.runs for seed in each.trained.seeds.values()}
    wanted = asked if isinstance(asked, list) else fresh_seeds_of(0, asked, used)
    stale = sorted(used.intersection(wanted))
    if stale:
        raise ConfigurationError(
            f"seeds: the search has used {', '.join(map(str, stale))} already; a confirmation "
            "needs seeds that had no part in the choice. Leave them out, or write only how many."
        )
    return wanted


def trained_again(found: Found, run_id: str, means: Means) -> Configuration:
    return again(run_id, {"experiment": found.run.run_name}, means)


def trained(
    found: Found,
    name: str,
    trials: Mapping[str, Trained],
    wanted: Sequence[str],
    seeds: Sequence[int],
    means: Means,
) -> Found:
    """The parent of that name for the settings of these trials, by arm; those that are wanted are
    trained on the seeds."""
    arms = {arm: trained_again(found, run.run_id, means) for arm, run in trials.items()}
    varied = searched([each for each in found.runs if not each.confirms])
    tags = {
        CONFIRMS: found.run.run_id,
        CONFIRMS_CHOICE_OF: " ".join(varied),
        CONFIRMS_AIM: f"{found.objective} {'minimize' if found.is_minimized else 'maximize'}",
        CONFIRMS_TRIALS: json.dumps({arm: run.run_id for arm, run in trials.items()}),
    }
    came = repeated(arms, crossed(wanted, seeds), means, name, tags)
    return read_trained(came, means.tracking_uri)


# ---- what was confirmed before -------------------------------------------------------------------


def arms_of(before: RecordedRun, found: Found) -> dict[str, Trained]:
    """The trial of each arm of an earlier confirmation; none where not all are known."""
    runs = {each.trained.run_id: each.trained for each in found.runs}
    try:
        recorded: dict[str, str] = json.loads(before.tags.get(CONFIRMS_TRIALS, "{}"))
    except ValueError:  # of very many arms, more than the tag has room for
        return {}
    if not all(run_id in runs for run_id in recorded.values()):
        return {}
    return {name: runs[run_id] for name, run_id in recorded.items()}


def renamed(parent: Found, names: Mapping[str, str]) -> Found:
    """Only these arms of it, under the names that they have among all that are compared."""
    runs = [
        replace(each, tags={**each.tags, ARM: names[each.arm]})
        for each in parent.runs
        if each.arm is not None and each.arm in names
    ]
    return replace(parent, runs=tuple(runs))
