"""Gradient norm and update-to-weight ratio against what torch says of the same steps."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from research.training import fit


class Witness(Callback):
    """The same two numbers of every step, the slow and plain way."""

    def __init__(self):
        self.norms, self.ratios = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        flat = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
        self.norms.append(flat.norm().item())
        self.before = torch.cat([p.detach().flatten() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        self.ratios.append(((after - self.before).norm() / self.before.norm()).item())


def test_figures_are_the_means_over_the_steps_of_the_epoch(small):
    witness = Witness()
    result = fit(small("--trainer.max_epochs", "1"), callbacks=[witness])
    epoch = result.history[0]
    assert len(witness.norms) == 5  # fewer than SAMPLES, so that every step counts
    assert epoch["gradient_norm"] == pytest.approx(sum(witness.norms) / 5, rel=1e-4)
    assert epoch["update_to_weight_ratio"] == pytest.approx(sum(witness.ratios) / 5, rel=1e-4)


def test_plain_sgd_moves_by_its_learning_rate_times_the_gradient(small):
    one_step = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1")
    slow = fit(small(*one_step, "--optimizer.lr", "0.01")).history[0]
    fast = fit(small(*one_step, "--optimizer.lr", "0.1")).history[0]
    assert slow["gradient_norm"] == fast["gradient_norm"]
    ratio = fast["update_to_weight_ratio"] / slow["update_to_weight_ratio"]
    assert ratio == pytest.approx(10, rel=1e-4)


def test_gradient_norm_is_that_before_clipping(small):
    one_step = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1")
    free = fit(small(*one_step)).history[0]
    clipped = fit(small(*one_step, "--trainer.gradient_clip_val", "0.001")).history[0]
    assert free["gradient_norm"] == clipped["gradient_norm"] > 0.001
    assert clipped["update_to_weight_ratio"] < free["update_to_weight_ratio"]


def test_only_a_few_steps_of_a_long_epoch_are_measured(small):
    counted = []

    class Counter(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            dynamics = next(c for c in trainer.callbacks if type(c).__name__ == "Dynamics")
            counted.append(len(dynamics.ratios))

    fit(
        small("--trainer.max_epochs", "1", "--data.batch_size", "4", "--data.num_train", "600"),
        callbacks=[Counter()],
    )
    assert len(counted) == 135
    assert 20 <= max(counted) <= 27


@pytest.mark.parametrize("optimizer", ["LBFGS", "SparseAdam", "Muon"])
def test_unusual_optimizers_have_their_figures(small, optimizer):
    epoch = fit(small("--optimizer", optimizer, "--trainer.max_epochs", "1")).history[0]
    assert epoch["gradient_norm"] > 0
    assert epoch["update_to_weight_ratio"] > 0


def test_accumulated_gradients_are_one_step(small):
    epoch = fit(small("--trainer.accumulate_grad_batches", "5")).history[0]
    assert epoch["update_to_weight_ratio"] > 0
