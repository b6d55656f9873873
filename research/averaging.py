"""Stochastic weight averaging that goes on in the middle of an epoch as if never stopped.

Lightning's StochasticWeightAveraging takes up its schedule, and its last pass for batch norm, as an
epoch begins; that hook is not called where a run goes on within one.
"""

from copy import deepcopy

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging


class AveragingGoesOn(Callback):
    """Tells an averaging of the epoch that a run goes on within; what it resets is put back."""

    def __init__(self, averaging: StochasticWeightAveraging) -> None:
        self.averaging = averaging

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop.restarted_mid_epoch:
            return
        groups = trainer.optimizers[0].param_groups
        rates, state = [group["lr"] for group in groups], deepcopy(pl_module.state_dict())
        self.averaging.on_train_epoch_start(trainer, pl_module)
        pl_module.load_state_dict(state)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
