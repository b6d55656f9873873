"""Arms: settings that are trained as they stand, with nothing to search; a Search all the same.

Each arm is a cell without a space.  Its trainings are pinned trials of one study
(research/repetition/), so workers, resumption, display and record are a search's own.  What one
leaves is what `research.fit` leaves of it: pictures, all checkpoints, one look at the test split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.samplers import BaseSampler, RandomSampler

from research.configuration.compose import CommandLine, compose
from research.configuration.schema import Configuration, resolve
from research.search.document import Cell, Objective, Search
from research.search.space import Space


@dataclass(frozen=True)
class Arms(Search):
    """The arms of a document; see `document_of`."""

    experiment: str = ""  # of all runs
    is_tested: bool = True

    @property
    def leaves_all(self) -> bool:
        return True

    def sampler(self, slot: int, cell: Cell | None = None) -> BaseSampler:
        return RandomSampler(seed=slot)  # is never asked

    def resolved(self, *sources: Mapping[str, Any]) -> Configuration:
        """The arm's settings with others laid over them, complete."""
        forced: dict[str, Any] = {"enable_progress_bar": False}
        if not self.is_tested:
            forced["limit_test_batches"] = 0
        own = {"experiment": self.experiment, "trainer": forced}
        # As if they had been typed: what they name may be imported.
        return resolve(CommandLine(settings=compose(*sources, own)))


def document_of(
    name: str,
    arms: Mapping[str, Mapping[str, Any]],
    experiment: str,
    metric: str,
    is_tested: bool = True,
    workers: int | None = None,
    workers_per_gpu: int | None = None,
    together: int = 1,
) -> dict[str, Any]:
    """What `Search.from_document` makes Arms of.

    arms: the nested settings of each, by its name.  metric: what is shown of a training that runs.
    """
    return {
        "name": name,
        "arms": {arm: dict(settings) for arm, settings in arms.items()},
        "experiment": experiment,
        "objective": metric,
        "is_tested": is_tested,
        "workers": workers,
        "workers_per_gpu": workers_per_gpu,
        "together": together,
    }


def read_arms(document: Mapping[str, Any]) -> Arms:
    """The arms whose `document_of` this is."""
    metric = document["objective"]
    towards = "maximize" if metric == "val/accuracy" else "minimize"
    return Arms(
        name=document["name"],
        document=dict(document),
        cells=tuple(Cell(arm, Space(()), own) for arm, own in document["arms"].items()),
        objectives=(Objective(metric, towards),),  # type: ignore[arg-type]
        trials=0,
        hours=None,
        seed=0,
        storage=None,
        confirm=None,
        workers=document["workers"],
        workers_per_gpu=document["workers_per_gpu"],
        together=document["together"],
        sampling={},
        pruning=None,
        base=(),
        settings={},
        experiment=document["experiment"],
        is_tested=document["is_tested"],
    )
