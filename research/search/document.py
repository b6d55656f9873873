"""A search as its file says it: base experiment, space, objective, budget, sampler, pruner.

`read_search` reads a file and checks it as a whole before anything starts.  `Search.document` is
that file as JSON-able data with the base experiments inside and `all` written out, from which a
worker process makes an equal Search.
"""

import itertools
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from research.configuration.compose import (
    MOST_BYTES,
    CommandLine,
    ConfigurationError,
    compose,
    nearest,
    read_file,
    refuse_strange,
)
from research.configuration.document import UnreadableDocument, load_bounded
from research.configuration.schema import Configuration, resolve
from research.search.changes import Difference, differences
from research.search.checking import check
from research.search.parts import Parts, flat, read_parts, write_out
from research.search.space import Space
from research.search.strategies import FINITE, make_pruner, make_sampler, misfits, read_strategy
from research.tracking.store import project_root

__all__ = [
    "Cell",
    "Confirmation",
    "Difference",
    "Objective",
    "Search",
    "differences",
    "read_search",
]

KEYS = (
    *("name", "base", "settings", "each", "space", "objective", "direction", "budget", "seed"),
    *("sampler", "pruner", "storage", "confirm", "workers", "workers_per_gpu", "together"),
)
OF_STUDY = ("trust", "bfloat16")  # in a document beside its keys, and in no file
NUMBERS = (
    "trials",
    "hours",
    "seed",
    "workers",
    "workers_per_gpu",
    "together",
)  # as typed, they are text
KNOWN_AT_THE_END = ("training_seconds", "num_parameters")
METRICS = ("val/accuracy", "val/loss", *KNOWN_AT_THE_END)
SMALLER_IS_BETTER = ("loss", "seconds", "error", "parameters")

# A trial is one of many: what only one of them is worth can be set back under `settings`.
TRIAL_DEFAULTS: Mapping[str, Any] = {
    "log_model": False,
    "log_pictures": False,
    "log_system_metrics": False,
    "trainer": {"enable_progress_bar": False},
}


@dataclass(frozen=True)
class Objective:
    """What is searched for: a metric of a run, at its best checkpoint."""

    metric: str
    direction: Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Confirmation:
    """The `best` configurations are trained again, with `seeds` fresh seeds each."""

    best: int
    seeds: int


@dataclass(frozen=True)
class Cell:
    """A study of its own within the search; its name is "" where there is only one."""

    name: str
    space: Space
    settings: Mapping[str, Any]  # nested, fixed in this cell


@dataclass(frozen=True)
class Search:
    """The whole of a search file, checked."""

    name: str
    document: dict[str, Any] = field(repr=False)  # `from_document` makes an equal Search of it
    cells: tuple[Cell, ...]
    objectives: tuple[Objective, ...]
    trials: int  # of each cell
    hours: float | None
    seed: int
    storage: str | dict[str, Any] | None
    confirm: Confirmation | None
    workers: int | None
    workers_per_gpu: int | None
    together: int  # trials that a worker trains at once
    sampling: dict[str, Any]  # class_path and init_args
    pruning: dict[str, Any] | None
    base: tuple[Mapping[str, Any], ...] = field(repr=False)  # nested, the last one wins
    settings: Mapping[str, Any]  # nested, laid over the base in every cell
    trust: bool = False
    bfloat16: bool | None = None  # where trials leave trainer.precision open; None: as the machine

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Search":
        """The search whose `document` this is; ConfigurationError for what could be none."""
        if "arms" in document:
            from research.search.arms import read_arms  # which is a Search, too

            return read_arms(document)
        search, _ = read_document(document)
        return search

    @property
    def experiment(self) -> str:
        """The experiment of the runs, in MLflow."""
        return self.name

    @property
    def leaves_all(self) -> bool:
        """Whether a trial's run keeps all that `fit` leaves; else only its best checkpoint."""
        return False

    def settled(self, bfloat16: bool) -> "Search":
        """The same, with trials of one precision on whatever machines they are trained."""
        return self.from_document({**self.document, "bfloat16": bfloat16})

    def study_name(self, cell: Cell) -> str:
        return f"{self.name}/{cell.name}" if cell.name else self.name

    def cell(self, name: str) -> Cell:
        """Raises KeyError where there is none of that name."""
        return {cell.name: cell for cell in self.cells}[name]

    def configuration(self, cell: Cell, settings: Mapping[str, Any]) -> Configuration:
        """The complete configuration of a trial; `settings`, nested, are what its space gave.

        A trial never sees the test split.
        """
        return self.resolved(self.settings, cell.settings, settings)

    def resolved(self, *sources: Mapping[str, Any]) -> Configuration:
        """The base experiments with nested settings laid over them, complete."""
        forced = {"experiment": self.experiment, "trainer": {"limit_test_batches": 0}}
        files = [dict(source) for source in (TRIAL_DEFAULTS, *self.base, *sources, forced)]
        return resolve(CommandLine(files=files, trust=self.trust), bfloat16=self.bfloat16)

    def sampler(self, slot: int, cell: Cell | None = None) -> BaseSampler:
        """Optuna's sampler for one slot of a cell, which may be left out where there is one."""
        if cell is None:
            (cell,) = self.cells
        return make_sampler(self.sampling, cell.space, self.seed, cell.name, slot, self.trust)

    def pruner(self) -> BasePruner:
        return make_pruner(self.pruning, self.trust)

    def canonical(self) -> dict[str, Any]:
        """All that decides what a trial is and which trials there are; JSON-able."""
        confirm = None if self.confirm is None else vars(self.confirm)
        cells = {
            cell.name: {"settings": flat(cell.settings), "space": cell.space.canonical()}
            for cell in self.cells
        }
        canonical = {
            "objective": {o.metric: o.direction for o in self.objectives},
            "settings": flat(compose(TRIAL_DEFAULTS, *self.base, self.settings)),
            "cells": cells,
            "trials": self.trials,
            "hours": self.hours,
            "seed": self.seed,
            "sampler": self.sampling,
            "pruner": self.pruning,
            "confirm": None if confirm is None else dict(confirm),
        }
        return json.loads(json.dumps(canonical))


def read_search(path: str | Path, typed: Mapping[str, Any] = {}, trust: bool = False) -> Search:
    """The search in a YAML file, checked as a whole.

    `typed` are keys of the file from the command line, and `trials` and `hours`; None is not given.
    The file may name classes of the known packages only unless it is trusted.  ConfigurationError
    with every fault found.
    """
    document = read_mapping(Path(path))
    document.setdefault("name", Path(path).stem)
    faults = lay_over(document, typed)
    document["base"] = read_base(document.get("base"), Path(path).parent, faults)
    document["trust"] = trust
    for section in ("each", "space"):
        document[section] = write_out(section, document.get(section), faults)
    search, parts = read_document(document, faults)
    check(search, parts, faults)
    if faults:
        raise ConfigurationError(list(dict.fromkeys(faults)))
    return search


def read_mapping(path: Path) -> dict[str, Any]:
    """What the file holds, keys as written; ConfigurationError where that is no mapping."""
    try:
        with open(path, "rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigurationError(f"{path} has more than {MOST_BYTES:,} bytes.")
        document = load_bounded(content.decode("utf-8-sig"))
    except FileNotFoundError:
        near = nearest(path.name, (p.name for p in sorted(path.parent.glob("*.yaml"))))
        raise ConfigurationError(f"there is no search file {path}{near}") from None
    except UnreadableDocument as error:
        raise ConfigurationError(f"{path} is not YAML{error.place}: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(f"{path} cannot be read: {reason}.") from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigurationError(
            f"{path} holds no search; it must be YAML with the keys {', '.join(KEYS)}."
        )
    refuse_strange(document, f"{path}: ")
    return document


def lay_over(document: dict[str, Any], typed: Mapping[str, Any]) -> list[str]:
    """Put what was typed into the document; a sentence for each key that no search has."""
    for key, value in typed.items():
        if isinstance(value, str) and key in NUMBERS:
            with suppress(UnreadableDocument):  # told as what is no number
                value = load_bounded(value)
        if value is not None and key in ("trials", "hours"):
            budget = document.get("budget")
            document["budget"] = {**(budget if isinstance(budget, dict) else {}), key: value}
        elif value is not None:
            document[key] = value
    return [
        f"{key}: a search has no such key{nearest(key, KEYS)} It has {', '.join(KEYS)}."
        for key in document
        if key not in KEYS
    ]


def read_base(value: Any, folder: Path, faults: list[str]) -> list[dict[str, Any]]:
    """The settings in the base files, which lie at the project's root or beside the search."""
    files = value if isinstance(value, list) else [] if value is None else [value]
    read: list[dict[str, Any]] = []
    for file in files:
        if not isinstance(file, str):
            faults.append(f"base: expected the name of a file or a list of them, came {file!r}.")
            continue
        places = [project_root() / file, folder / file, Path(file)]
        try:
            read.append(read_file(next((p for p in places if p.is_file()), places[0])))
        except ConfigurationError as error:
            faults += [f"base: {fault.removeprefix('config: ')}" for fault in error.faults]
    return read


def read_document(
    document: Mapping[str, Any], faults: list[str] | None = None
) -> tuple[Search, Parts]:
    """The search, and the parts that it was read of.

    Its faults go into `faults`, and what they are about is left out; without such a list they are
    raised.
    """
    told: list[str] = [] if faults is None else faults
    parts = read_parts(document, told)
    cells = cells_of(parts, told)
    objectives = read_objectives(document, parts, told)
    budget = mapping_of(document, "budget", ("trials", "hours"), told)
    confirm = mapping_of(document, "confirm", ("best", "seeds"), told)
    try:
        sampling = read_strategy("sampler", document.get("sampler"), "TPESampler")
        pruning = document.get("pruner")
        pruning = None if pruning is None else read_strategy("pruner", pruning, "MedianPruner")
    except ConfigurationError as error:
        told += error.faults
        sampling, pruning = {"class_path": "TPESampler", "init_args": {}}, None
    if pruning is not None and len(objectives) > 1:
        told.append(
            "pruner: a trial with several objectives cannot be pruned; leave out the pruner, or "
            "search for one objective."
        )
    elif pruning is not None and objectives[0].metric in KNOWN_AT_THE_END:
        told.append(
            f"pruner: {objectives[0].metric} is known at a trial's end only, so no trial can be "
            "pruned by it; leave out the pruner."
        )
    if (document.get("together") or 1) != 1 and any(
        objective.metric == "training_seconds" for objective in objectives
    ):
        told.append(
            "together: trials that are trained at once share the device, so training_seconds says "
            "nothing of one of them; leave out together, or search for another objective."
        )
    searched = {each.key for cell in cells for each in cell.space.parameters()}
    if document.get("confirm") is not None and "seed_everything" in searched:
        told.append(
            "confirm: the seed is searched itself (seed_everything in the space), so the best "
            "cannot be tried again on fresh ones; leave out one of the two."
        )
    search = Search(
        name=read_name(document, told),
        document={key: value for key, value in document.items() if key in (*KEYS, *OF_STUDY)},
        cells=cells,
        objectives=objectives,
        trials=read_trials(budget, sampling, cells, told),
        hours=above_zero(budget, "hours", "budget.hours", told),
        seed=whole(document, "seed", "seed", 0, told) or 0,
        storage=read_storage(document, told),
        confirm=Confirmation(
            best=whole(confirm, "best", "confirm.best", 1, told) or 1,
            seeds=whole(confirm, "seeds", "confirm.seeds", 1, told) or 3,
        )
        if document.get("confirm") is not None
        else None,
        workers=whole(document, "workers", "workers", 1, told),
        workers_per_gpu=whole(document, "workers_per_gpu", "workers_per_gpu", 1, told),
        together=whole(document, "together", "together", 1, told) or 1,
        sampling=sampling,
        pruning=pruning,
        base=tuple(document.get("base") or ()),
        settings=parts.settings,
        trust=bool(document.get("trust")),
        bfloat16=document.get("bfloat16"),
    )
    for cell in cells:
        told += [fault for fault in misfits(sampling, cell.space) if fault not in told]
    if faults is None and told:
        raise ConfigurationError(told)
    return search, parts


def cells_of(parts: Parts, faults: list[str]) -> tuple[Cell, ...]:
    """The product of what `each` names; one cell without a name where it names nothing."""
    cells = []
    for combination in itertools.product(*parts.each):
        drawn = tuple(p for option in combination for p in option.drawn)
        name = " ".join(option.label for option in combination)
        cells.append(
            Cell(
                name=name.replace("/", "_"),
                space=Space((*drawn, *parts.space.drawn), parts.space.fixed),
                settings=parts.nested(combination),
            )
        )
    names = [cell.name for cell in cells]
    for twice in {name for name in names if names.count(name) > 1}:
        faults.append(f"each: two studies would be called {twice}; each needs a name of its own.")
    if not any(cell.space.drawn for cell in cells):
        faults.append(
            "space: there is nothing to search; write at least one key, as "
            "optimizer.lr: log 1e-4..1."
        )
    return tuple(cells)


# ---- single keys ---------------------------------------------------------------------------------


def read_name(document: Mapping[str, Any], faults: list[str]) -> str:
    name = document.get("name")
    if isinstance(name, str) and name.strip() == name and name and not set(name) & set("/\\"):
        return name
    faults.append(f"name: expected a name without slashes, came {name!r}.")
    return "search"


def read_objectives(
    document: Mapping[str, Any], parts: Parts, faults: list[str]
) -> tuple[Objective, ...]:
    objective, direction = document.get("objective", METRICS[0]), document.get("direction")
    several = isinstance(objective, Mapping)
    if several and direction is not None:
        faults.append("direction: write it at each objective, as {val/accuracy: maximize}.")
        direction = None
    if not isinstance(objective, str | Mapping) or not objective:
        faults.append(
            f"objective: expected a metric, or a mapping of metrics to minimize or maximize; came "
            f"{objective!r}."
        )
        objective = METRICS[0]
    found = []
    for metric, towards in (
        objective.items() if isinstance(objective, Mapping) else [(objective, direction)]
    ):
        if towards is None:
            smaller = any(word in metric for word in SMALLER_IS_BETTER)
            towards = "minimize" if smaller else "maximize"
        if towards not in ("minimize", "maximize"):
            place = f"objective.{metric}" if several else "direction"
            faults.append(f"{place}: expected minimize or maximize, came {towards!r}.")
        near = nearest(metric, METRICS)
        if metric.startswith("test/"):
            faults.append(
                f"objective: {metric} is of the test split, which no trial may see; choose "
                "val/accuracy."
            )
        elif metric not in METRICS and (not metric.startswith("val/") or near != "."):
            faults.append(
                f"objective: a trial has no {metric}{near} It has {', '.join(METRICS)}, and what "
                "else it logs as val/..."
            )
        elif metric == "val/loss" and parts.searches("model.loss"):
            faults.append(
                "objective: val/loss cannot be compared where the loss itself is searched; choose "
                "val/accuracy."
            )
        found.append(Objective(metric, "minimize" if towards == "minimize" else "maximize"))
    return tuple(found)


def read_storage(document: Mapping[str, Any], faults: list[str]) -> str | dict[str, Any] | None:
    storage = document.get("storage")
    named = isinstance(storage, Mapping) and isinstance(storage.get("class_path"), str)
    if storage is None or (isinstance(storage, str) and storage):
        return storage
    if named:
        return dict(storage)
    faults.append(
        "storage: expected an address (sqlite:///, postgresql://, grpc://host:port) or a mapping "
        f"with a class_path of Optuna; came {storage!r}."
    )
    return None


def read_trials(
    budget: Mapping[str, Any], sampling: Mapping[str, Any], cells: tuple[Cell, ...],
    faults: list[str],
) -> int:  # fmt: skip
    """Trials of each cell; where every point is tried, that many unless fewer are asked for."""
    trials = whole(budget, "trials", "budget.trials", 1, faults)
    finite = sampling["class_path"].rpartition(".")[2] in FINITE
    points = [cell.space.points() for cell in cells] if finite else []
    most = max((count for count in points if count is not None), default=None)
    if trials is None and most is None and "trials" not in budget:
        faults.append("budget.trials: the number of trials is missing; write budget: {trials: 60}.")
    if trials is not None and most is not None and trials > most:
        faults.append(
            f"budget.trials: came {trials}, and there are only {most} different ones; write "
            f"{most}, or leave it out."
        )
    return trials or most or 1


def mapping_of(
    document: Mapping[str, Any], key: str, known: tuple[str, ...], faults: list[str]
) -> Mapping[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    example = f"{key}: {{{', '.join(f'{name}: 3' for name in known)}}}"
    if not isinstance(value, Mapping):
        faults.append(f"{key}: expected a mapping, as {example}; came {value!r}.")
        return {}
    for name in value:
        if name not in known:
            faults.append(
                f"{key}.{name}: there is no such key{nearest(name, known)} "
                f"It has {', '.join(known)}."
            )
    return value


def whole(
    inside: Mapping[str, Any], key: str, place: str, least: int, faults: list[str]
) -> int | None:
    value = inside.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        faults.append(f"{place}: expected a whole number, {least} or more; came {value!r}.")
        return None
    return value


def above_zero(inside: Mapping[str, Any], key: str, place: str, faults: list[str]) -> float | None:
    value = inside.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        faults.append(f"{place}: expected a number above 0; came {value!r}.")
        return None
    return float(value)
