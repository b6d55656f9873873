"""Searches whose trials have ended, made up: no training, no storage."""

import datetime
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from research.search.document import Cell, Search
from research.search.ranking import study_of
from research.search.results import Results, flat

LOSSES = {"CrossEntropyLoss": {"label_smoothing": "0..0.2"}, "MSELoss": {}, "MultiMarginLoss": {}}
OPTIMIZERS = {
    "SGD": {"lr": "log 1e-3..1", "momentum": "0..0.99", "nesterov": True},
    "AdamW": {"lr": "log 1e-5..0.1"},
}
START = datetime.datetime(2026, 1, 1)


def search(**changes: Any) -> Search:
    """A search over losses, optimizers, learning rates and batch sizes, with keys changed."""
    document: dict[str, Any] = {
        "name": "pairs",
        "base": [],
        "settings": {"trainer.max_epochs": 3},
        "space": {"model.loss": LOSSES, "optimizer": OPTIMIZERS, "data.batch_size": [64, 128]},
        "objective": "val/accuracy",
        "budget": {"trials": 40},
    }
    made = document | changes
    return Search.from_document({key: value for key, value in made.items() if value is not None})


def accuracy(settings: Mapping[str, Any]) -> float:
    """A smooth surface over the logarithm of the learning rate, with an optimum per optimizer."""
    lr = float(settings.get("optimizer.lr", 0.03))
    best = {"SGD": 0.1, "AdamW": 1e-3}.get(str(settings.get("optimizer")), 0.03)
    return max(0.1, 0.7 - 0.05 * math.log10(lr / best) ** 2)


def trial(
    cell: Cell, slot: int, params: Mapping[str, Any], value: Any = None, **attrs: Any
) -> FrozenTrial:
    """A trial of these parameters; with a value it is complete, else it ended as `state` says."""
    state = attrs.pop("state", TrialState.COMPLETE if value is not None else TrialState.PRUNED)
    reported = attrs.pop("reported", {})
    distributions = {p.name: p.distribution for p in cell.space.parameters() if p.name in params}
    values = list(value) if isinstance(value, Sequence) else None if value is None else [value]
    made = create_trial(
        state=state,
        values=values,
        params=dict(params),
        distributions=distributions,
        user_attrs={"slot": slot, **attrs},
        intermediate_values=reported,
    )
    made.number = slot
    made.datetime_complete = START + datetime.timedelta(minutes=slot)
    return made


def ended(
    the_search: Search,
    trials: int = 40,
    value: Callable[[Mapping[str, Any]], Any] | None = None,
    seed: int = 0,
) -> Results:
    """So many trials of each cell: most complete, each tenth pruned, diverged or failed."""
    generator = random.Random(seed)
    study = study_of([], ["maximize"])
    study.sampler = optuna.samplers.RandomSampler(seed=seed)
    found: dict[str, list[FrozenTrial]] = {}
    for cell in the_search.cells:
        found[cell.name] = []
        for slot in range(trials):
            asked = study.ask()
            settings = flat(cell.settings) | flat(cell.space.suggest(asked))
            params = asked.params
            if slot % 10 == 7:
                kinds: list[dict[str, Any]] = [
                    {"reported": {1: 0.2}},
                    {"diverged": True},
                    {"state": TrialState.FAIL, "error": "out of memory"},
                ]
                kind = kinds[slot // 10 % 3]
                found[cell.name].append(trial(cell, slot, params, **kind))
            else:
                reached = accuracy(settings) + generator.gauss(0, 0.005) if value is None else None
                reached = value(settings) if value is not None else reached
                found[cell.name].append(trial(cell, slot, params, reached, val_pictures=5000))
    return Results(the_search, found)


def confirmation(candidate: tuple[str, int], values: Mapping[int, float | None]) -> list[Any]:
    """Confirmation trials of a candidate by seed; None: diverged."""
    return [
        create_trial(
            state=TrialState.COMPLETE if value is not None else TrialState.PRUNED,
            value=value,
            user_attrs={"candidate": list(candidate), "seed": seed}
            | ({"diverged": True} if value is None else {}),
        )
        for seed, value in values.items()
    ]
