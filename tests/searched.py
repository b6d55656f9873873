"""A small search for tests, and a worker's desk at it in this process."""

import contextlib
import copy
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from research.data.kept import Kept
from research.search.desk import Desk, open_desks
from research.search.job import Job
from research.tracking.store import sqlite_uri

DOCUMENT: dict[str, Any] = {
    "name": "small",
    "base": [],
    "settings": {
        "data": {"class_path": "Synthetic", "num_train": 320, "num_test": 64},
        "model.network.widths": [4, 4, 8],
        "model.network.hidden": 8,
        "trainer.max_epochs": 3,
        "trainer.accelerator": "cpu",
    },
    "space": {
        "optimizer": {"SGD": {"lr": "log 1e-3..1", "momentum": 0.9}, "AdamW": {"lr": "1e-3..1e-2"}},
        "data.batch_size": [32, 64],
    },
    "objective": "val/accuracy",
    "budget": {"trials": 4},
    "sampler": "RandomSampler",
}


def document(**changes: Any) -> dict[str, Any]:
    """The document of the small search with keys in another way; `settings` come beside its own."""
    made = copy.deepcopy(DOCUMENT)
    made["settings"] |= changes.pop("settings", {})
    return made | changes


def job(folder: Path, recorded: bool = True, **changes: Any) -> Job:
    """A worker's job on a search whose stores lie in the folder."""
    uri = sqlite_uri(folder / "mlflow.db") if recorded else ""
    return Job(document(**changes), str(folder / "small.journal"), tracking_uri=uri)


def desk_at(the_job: Job, trials: int) -> Desk:
    """The desk of the search's first study, with so many slots."""
    desk = open_desks(the_job)[0]
    desk.slots.fill(trials)
    return desk


def work(desk: Desk, recorder: Any = None, kept: Kept | None = None) -> list[FrozenTrial]:
    """The study's trials, once all that wait are done."""
    kept = Kept() if kept is None else kept
    while (ticket := desk.slots.take()) is not None:
        desk.do(ticket, recorder, kept, contextlib.nullcontext)
    return desk.slots.trials()
