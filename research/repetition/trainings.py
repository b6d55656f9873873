"""Which trainings a repetition has, each a pinned slot of one study.

    crossed(["Adam", "SGD"], [0, 1])                Adam 0, SGD 0, Adam 1, SGD 1
    by_stream([{"weights": 1, "order": 0}, ...])    streams of random numbers set apart

The slots are taken in this order: a start that is stopped in the middle has whole pairs, and a
machine that grows slower or hotter does so to all arms alike.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from research.search.arms import Arms
from research.search.display import reason_of
from research.search.results import Results
from research.search.slots import BUDGET, SLOT, Slots
from research.search.storage import alone
from research.search.studies import Studies, pinned_slots
from research.search.trial import MEASURED


@dataclass(frozen=True)
class Training:
    """One training of an arm: what it is called among the arm's, what it sets beside the arm's.

    `settings` are nested: {"seed_everything": 3}, {"random": {"weights": 3}}, or nothing.
    """

    arm: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.arm, self.label

    def pinned(self, prefix: str = "") -> dict[str, Any]:
        """What a slot takes along; its run is called by `prefix`, the arm and the label."""
        return {
            "settings": dict(self.settings),
            "candidate": [self.arm, self.label],
            "name": " ".join(filter(None, (prefix, self.arm, self.label))),
            "tags": {"arm": self.arm} if self.arm else {},
        }


def crossed(arms: Sequence[str], seeds: Sequence[int]) -> list[Training]:
    """Every arm on every seed, seed by seed."""
    return [
        Training(arm, f"seed {seed}", {"seed_everything": seed}) for seed in seeds for arm in arms
    ]


def by_stream(seeds: Sequence[Mapping[str, int]]) -> list[Training]:
    """A training for each, of the seeds of its streams (weights, order, ...), in their order.

    It is called by the seed that most streams have, and by those that have another. The same seeds
    again are a repeat: what differs then is the machine's doing. The seed of the split, where one
    is given, is that of the run, which every stream that is not given has too.
    """
    trainings: list[Training] = []
    for own in seeds:
        ((most, _),) = Counter(own.values()).most_common(1)
        others = [f"{stream} {seed}" for stream, seed in own.items() if seed != most]
        label = ", ".join([f"seed {most}", *others])
        streams = {stream: seed for stream, seed in own.items() if stream != "split"}
        settings: dict[str, Any] = {"random": streams}
        if "split" in own:
            settings["seed_everything"] = own["split"]
        before = sum(each.settings == settings for each in trainings)
        label += f", repeat {before}" if before else ""
        trainings.append(Training("", label, settings))
    return trainings


# ---- their study ---------------------------------------------------------------------------------


class Trainings(Studies):
    """The study of a repetition; `wanted` is what is asked for now.

    What is there already stays, so that more seeds can be asked for later; other arms are another
    study.  What failed gets another slot at the next start; what diverged would diverge again.
    """

    def __init__(
        self,
        search: Arms,
        address: str | dict[str, Any],
        storage: BaseStorage,
        wanted: Sequence[Training],
        prefix: str = "",
    ) -> None:
        self.search, self.address, self.storage, self.changed = search, address, storage, ()
        self.slots = pinned_slots(storage, search.name, search)
        self.cells = {"": self.slots}
        self.wanted, self.prefix = wanted, prefix

    def fill(self) -> int:
        """Give all that is wanted and not there its slot; how many were added.

        What waits behind the last one that is wanted, of an earlier start, goes on waiting, but not
        while anything runs: that start may still be at work.
        """
        with alone(self.storage):
            pinned, places = in_slots(self.slots)
            before = len(pinned)
            for training in self.wanted:
                if training.key not in places:
                    places[training.key] = len(pinned)
                    pinned.append(training.pinned(self.prefix))
            needed = 1 + max(places[training.key] for training in self.wanted)
            self.slots.fill(max(needed, self.kept_budget()), pinned)
            filled, _ = in_slots(self.slots)
        planned = [(training, filled[places[training.key]]) for training in self.wanted]
        if any(list(training.key) != slot["candidate"] for training, slot in planned):
            return self.fill()  # a start on another machine, which no lock reaches, took the slots
        return len(pinned) - before

    def kept_budget(self) -> int:
        """The budget while anything runs, 0 else."""
        running = any(trial.state == TrialState.RUNNING for trial in self.slots.trials())
        return self.slots.study.user_attrs.get(BUDGET, 0) if running else 0

    def is_cut_short(self) -> bool:
        """Whether something wanted lies beyond the budget, as one that asked for fewer left it."""
        budget = self.slots.study.user_attrs.get(BUDGET, 0)
        _, places = in_slots(self.slots)
        return any(places.get(training.key, 0) >= budget for training in self.wanted)

    def confirmation(self) -> None:
        """There is none: what is trained here has not been chosen."""
        return None

    def results(self) -> Results:
        return Results(self.search, self.trials())


def in_slots(slots: Slots) -> tuple[list[dict[str, Any]], dict[tuple[str, str], int]]:
    """What each slot takes along, by slot; where each training is, but for those that failed."""
    pinned: dict[int, dict[str, Any]] = {}
    places: dict[tuple[str, str], int] = {}
    for trial in slots.study.get_trials(deepcopy=False):
        slot = trial.user_attrs.get(SLOT)
        if slot is None or slot in pinned:
            continue
        pinned[slot] = trial.user_attrs["pinned"]
        if trial.state != TrialState.FAIL:
            places[key_of(trial)] = slot
    return [pinned[slot] for slot in sorted(pinned)], places


def key_of(trial: FrozenTrial) -> tuple[str, str]:
    arm, label = trial.user_attrs["pinned"]["candidate"]
    return arm, label


# ---- what came of them ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training: `metrics` where it came to its end, else the `reason`."""

    arm: str
    label: str
    state: TrialState
    metrics: Mapping[str, float]
    run_id: str | None
    reason: str

    @property
    def key(self) -> tuple[str, str]:
        return self.arm, self.label

    @property
    def finished(self) -> bool:
        return self.state == TrialState.COMPLETE


def trained_in(slots: Slots) -> list[TrainingResult]:
    """All that was trained or is to be; of what failed and was tried again, the last try."""
    found = {}
    for trial in slots.trials():
        attrs = trial.user_attrs
        found[key_of(trial)] = TrainingResult(
            *key_of(trial),
            trial.state,
            attrs.get(MEASURED, {}) if trial.state == TrialState.COMPLETE else {},
            attrs.get("run_id"),
            reason_of(trial),
        )
    return list(found.values())
