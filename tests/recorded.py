"""Runs in a store as MLflow's own client writes them: figures without the training."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.tracking.store import sqlite_uri

STATUS = "FINISHED"


@dataclass
class Store:
    """A store in a folder; `run` adds a run and returns its id."""

    folder: Path
    client: Any
    experiment: str

    @property
    def uri(self) -> str:
        return sqlite_uri(self.folder / "mlflow.db")

    def run(
        self,
        name: str,
        seed: int | None = 0,
        val: float | None = 0.5,
        test: float | None = 0.5,
        *,
        settings: Mapping[str, Any] = {},
        tags: Mapping[str, str] = {},
        status: str = STATUS,
        parent: str | None = None,
        curve: Sequence[float] = (),
        data: str = "digest",
        metrics: Mapping[str, float] = {},
    ) -> str:
        """The id of a new run. `curve` is of val/accuracy by epoch; `val` is that of the best one.

        Without a `seed` it is a parent, which trains nothing.
        """
        from mlflow.entities import Metric, Param, RunTag

        run_id = self.client.create_run(self.experiment, run_name=name).info.run_id
        own = {"mlflow.parentRunId": parent} if parent else {}
        found: list[Any] = []
        params: list[Any] = []
        if seed is not None:
            own |= {"seed": str(seed), "fingerprint.code": "code", "device": "cpu"}
            params = [Param(k, str(v)) for k, v in ({**BASE, "seed_everything": seed, "run_name":
                      name} | dict(settings)).items()]  # fmt: skip
            self._log_test_pictures(run_id, data)
        for step, value in enumerate(curve or ([] if val is None else [val]), start=1):
            found.append(Metric("val/accuracy", value, 0, step))
            found.append(Metric("epoch_seconds", 2.0, 0, step))
        if val is not None and seed is not None:
            epoch = list(curve).index(val) + 1 if val in curve else 1
            found.append(Metric("best_val/epoch", epoch, 0, 0))
            found.append(Metric("best_val/accuracy", val, 0, 0))
        if test is not None and seed is not None:
            found.append(Metric("test/accuracy", test, 0, 0))
        found += [Metric(key, value, 0, 0) for key, value in metrics.items()]
        all_tags = [RunTag(key, value) for key, value in {**own, **tags}.items()]
        self.client.log_batch(run_id, found if seed is not None else [], params, all_tags)
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        return run_id

    def _log_test_pictures(self, run_id: str, digest: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        pictures = Dataset("pictures", digest, "code", "{}")
        given = DatasetInput(pictures, [InputTag("mlflow.data.context", "test")])
        self.client.log_inputs(run_id, [given])


BASE = {
    "model.network": "CNN",
    "model.loss": "CrossEntropyLoss",
    "optimizer": "SGD",
    "optimizer.lr": 0.1,
    "data": "Synthetic",
    "data.batch_size": 64,
    "data.seed": None,
    "trainer.max_epochs": 2,
}


def make_store(folder: Path) -> Store:
    """A new store with one experiment; takes seconds, so share it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(sqlite_uri(folder / "mlflow.db"))
        experiment = client.create_experiment("first", str(folder / "mlruns" / "1"))
    return Store(folder, client, experiment)
