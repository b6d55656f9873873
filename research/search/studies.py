"""The studies of a search in their storage: made, found again, compared with the file.

A search has a study for each of its cells, and one for its confirmation.  Each remembers, as the
user attribute `search`, what it was made for: where the file says something else by now, this is
told key by key, and nothing is touched.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from research.configuration.compose import ConfigurationError
from research.configuration.schema import Configuration
from research.search.changes import FREE
from research.search.document import Cell, Difference, Search, differences
from research.search.results import Results
from research.search.slots import Counts, Slots, counted
from research.search.storage import described, open_storage, storage_address
from research.speed.precision import computes_in_bfloat16
from research.tracking.store import sqlite_path

SEARCH = "search"  # user attribute: Search.canonical()
BFLOAT16 = "bfloat16"  # user attribute of the first study: Search.bfloat16
CONFIRMATION = "confirmation"


class Studies:
    """All studies of a search; `cells` are its slots by the names of the cells.

    `changed` is what the file says otherwise than at the last start.
    """

    def __init__(
        self,
        search: Search,
        address: str | dict[str, Any],
        storage: BaseStorage,
        changed: Sequence[Difference] = (),
    ) -> None:
        self.search, self.address, self.storage, self.changed = search, address, storage, changed
        self.cells = {cell.name: self._slots(cell) for cell in search.cells}
        self._confirmation: Slots | None = None
        self._take_precision()

    @property
    def all(self) -> list[optuna.Study]:
        return [slots.study for slots in self.cells.values()]

    @property
    def first(self) -> optuna.Study:
        """The one whose attributes hold what is of the whole search."""
        return self.all[0]

    @property
    def described(self) -> str:
        """Where they are, for the terminal; what `optuna-dashboard` takes."""
        path = self.address if isinstance(self.address, str) else ""
        return shortened(path) if path and "://" not in path else described(self.address)

    def trials(self) -> dict[str, list[FrozenTrial]]:
        return {name: slots.trials() for name, slots in self.cells.items()}

    def settle(self, accelerator: Any) -> None:
        """Let all machines leave an open precision as the first one does: it changes the figures.

        `search` is the settled one then.  accelerator: the trials' own.
        """
        if BFLOAT16 not in self.first.user_attrs:
            self.first.set_user_attr(BFLOAT16, computes_in_bfloat16(accelerator))
        self._take_precision()

    def _take_precision(self) -> None:
        bfloat16 = self.first.user_attrs.get(BFLOAT16)
        if bfloat16 is not None:
            self.search = self.search.settled(bfloat16)

    def counts(self) -> Counts:
        return counted(trial for trials in self.trials().values() for trial in trials)

    def fill(self) -> int:
        """Give every slot of the budget its trial; how many were added."""
        if any("space" in difference.key for difference in self.changed):
            for slots in self.cells.values():
                slots.reopen()
        added = sum(slots.fill(self.search.trials) for slots in self.cells.values())
        for study in self.all:
            study.set_user_attr(SEARCH, self.search.canonical())
        return added

    def revive(self) -> int:
        """Put back what ran when everything died, the coordinator too; how many trials.

        That was not the trials' doing, so it does not count against them.
        """
        confirmation = self.confirmation()
        every = [*self.cells.values(), *([] if confirmation is None else [confirmation])]
        return sum(len(slots.revive_dead(counts=False)) for slots in every)

    # ---- the confirmation ------------------------------------------------------------------------

    @property
    def confirmation_name(self) -> str:
        return f"{self.search.name}/{CONFIRMATION}"

    def confirmation(self) -> Slots | None:
        """The slots of the confirmation; None where there are none yet."""
        if self._confirmation is None and self.confirmation_name in names_in(self.storage):
            self._confirmation = self._slots(None)
        return self._confirmation

    def fill_confirmation(self) -> Slots | None:
        """The slots for all that is to be confirmed, beside what was; None for nothing.

        Where the search was extended, others may be the best: they are added.
        """
        from research.search.winner import candidates

        wanted = candidates(Results(self.search, self.trials()))
        if not wanted:
            return self.confirmation()
        if self._confirmation is None:
            self._confirmation = self._slots(None)
        there = [trial.user_attrs["pinned"] for trial in self._confirmation.trials()]
        known = {(*one["candidate"], one["seed"]) for one in there}
        fresh = [one for one in wanted if (*one["candidate"], one["seed"]) not in known]
        self._confirmation.fill(len(there) + len(fresh), pinned=[*there, *fresh])
        return self._confirmation

    def results(self) -> Results:
        confirmation = self.confirmation()
        confirmed = () if confirmation is None else tuple(confirmation.trials())
        return Results(self.search, self.trials(), confirmed)

    def _slots(self, cell: Cell | None) -> Slots:
        """The slots of a cell; None: of the confirmation, where nothing is drawn or pruned."""
        search = self.search
        if cell is None:
            return pinned_slots(self.storage, self.confirmation_name, search)
        return Slots(
            self.storage,
            search.study_name(cell),
            [objective.direction for objective in search.objectives],
            partial(search.sampler, cell=cell),
            search.pruner(),
            {SEARCH: search.canonical()},
        )


def pinned_slots(storage: BaseStorage, name: str, search: Search) -> Slots:
    """Slots that bring their settings along: nothing is drawn and nothing pruned."""
    directions = [objective.direction for objective in search.objectives]
    return Slots(storage, name, directions, lambda slot: RandomSampler(seed=slot))


# ---- making and finding them ---------------------------------------------------------------------


def make(search: Search, file: Path, extend: bool = False) -> Studies:
    """The studies, made where they are not there yet.

    ConfigurationError where the file has changed since so that Optuna cannot go on, or can but was
    not told to.
    """
    address = storage_address(search.storage, file.parent / f"{search.name}.journal")
    storage = open_storage(address, file.parent / f"{search.name}.journal")
    changed = changes(search, storage)
    refuse(search, file, changed, extend)
    return Studies(search, address, storage, changed)


def find(search: Search, file: Path) -> Studies:
    """The studies that are there; ConfigurationError where there are none, or others."""
    address = storage_address(search.storage, file.parent / f"{search.name}.journal")
    path = file_behind(address)
    storage = None
    if path is None or path.exists():
        storage = open_storage(address, file.parent / f"{search.name}.journal")
    missing = {search.study_name(cell) for cell in search.cells}
    missing -= set() if storage is None else names_in(storage)
    if missing:
        raise ConfigurationError(
            f"{search.name}: there is no such search in {described(address)} yet "
            f"({', '.join(sorted(missing)[:3])}). Start it: python -m research.sweep {file}"
        )
    assert storage is not None
    changed = changes(search, storage)
    refuse(search, file, changed, extend=True)
    return Studies(search, address, storage, changed)


def file_behind(address: str | Mapping[str, Any]) -> Path | None:
    if not isinstance(address, str):
        return None
    return sqlite_path(address) if "://" in address else Path(address)


def shortened(path: str) -> str:
    """The path as seen from here, where it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def names_in(storage: BaseStorage) -> set[str]:
    return set(optuna.get_all_study_names(storage))


def changes(search: Search, storage: BaseStorage) -> list[Difference]:
    """How the search differs from the studies of its name; nothing where there are none."""
    new = search.canonical()
    for study in storage.get_all_studies():
        name = study.study_name
        old = study.user_attrs.get(SEARCH)
        if old is not None and (name == search.name or name.startswith(f"{search.name}/")):
            return differences(old, new)
    return []


def refuse(search: Search, file: Path, changed: Sequence[Difference], extend: bool) -> None:
    """ConfigurationError, a line for each key, unless Optuna can go on and may."""
    grave = [one for one in changed if not one.extends]
    asked = [one for one in changed if one.extends and one.key not in FREE]
    if not grave and (extend or not asked):
        return
    lines = [f"{file} has changed since the studies of {search.name} were made:"]
    for one in [*grave, *asked]:
        mark = "  (Optuna can go on with that)" if one.extends else ""
        lines.append(f"  {one.key}: was {shown(one.old)}, is now {shown(one.new)}{mark}")
    if grave:
        lines.append("Make it a search of its own, by another --name; or put the file back.")
    else:
        lines.append("Go on with the trials that there are: --extend; or begin anew: --name NAME.")
    raise ConfigurationError("\n".join(lines))


def shown(value: Any) -> str:
    return "not there" if value is None else str(value)


def sample(search: Search) -> Configuration:
    """The configuration of some trial, by which places and progress are planned."""
    cell = search.cells[0]
    trial = optuna.create_study(sampler=RandomSampler(seed=0)).ask()
    return search.configuration(cell, cell.space.suggest(trial))
