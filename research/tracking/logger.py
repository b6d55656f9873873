"""The run as a Lightning logger: what the module logs goes to MLflow, on an axis of epochs.

The axis: a value that Lightning gives together with its epoch stands at the number of epochs
behind the weights it was measured on. Training and validation figures of the first epoch stand at 1
(Lightning calls it epoch 0). Test figures, one of each a run, stand at 0: what has no step but 0 is
drawn as bars to compare runs by, all else as curves, of a single point here. Names that end in
`_step`, Lightning's mark for figures of a single step, stand at the optimizer step; so does, at the
step given, all that is logged without an epoch. The epoch itself is the axis and no metric.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from research.tracking.run import Run


class RecordLogger(Logger):
    """Hands metrics to a run and leaves it open: a test may follow the fit.

    `run` is None on all ranks but the first. Parameters are recorded when the run starts, so that
    hyper-parameters of the module, which are the same ones again, are not.
    """

    def __init__(self, run: Run | None) -> None:
        super().__init__()
        self._run = run
        self._training = True

    @property
    def name(self) -> str | None:
        """Name of the experiment."""
        return None if self._run is None else self._run.experiment

    @property
    def version(self) -> str | None:
        """Id of the run; waits for the store if it has not answered yet."""
        return None if self._run is None else self._run.wait().run_id

    @property
    @rank_zero_experiment
    def experiment(self) -> Run | None:
        """The run itself, for whatever Lightning has no word for."""
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._run is None:
            return
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        at_step = 0 if step is None else step
        at_epoch = at_step if epoch is None else int(epoch) + self._training
        by_step = {name: value for name, value in values.items() if name.endswith("_step")}
        by_epoch = {name: value for name, value in values.items() if name not in by_step}
        if by_step:
            self._run.log_metrics(by_step, at_step)
        if by_epoch:
            is_test = all(name.startswith("test/") for name in by_epoch)
            self._run.log_metrics(by_epoch, 0 if is_test else at_epoch)

    def logged(self) -> dict[str, tuple[int, int]]:
        """What `Run.logged` says; nothing on all ranks but the first."""
        return {} if self._run is None else self._run.logged()

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the parameters were recorded when the run started."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Notes whether a training begins: Lightning calls this first in fit, validate and test.

        While it trains, Lightning's epoch is the one in progress; afterwards it is the number of
        those that are finished.
        """
        self._training = model.trainer.state.fn == TrainerFn.FITTING

    def finalize(self, status: str) -> None:
        """The training, or the test, is over; the run is not."""
        self._training = False
