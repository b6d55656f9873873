"""The logger against a run that only takes notes; test_tracking_run.py has real ones."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, TensorDataset

from research.tracking.logger import RecordLogger
from research.tracking.run import RunInfo

EPOCHS, BATCHES = 3, 2


class Notes:
    """Stands for a Run: keeps what is logged as (name, step, value)."""

    experiment = "CIFAR10"

    def __init__(self):
        self.rows = []

    def wait(self):
        return RunInfo("abc", "1", "brave-cat-1", None)

    def log_metrics(self, metrics, step):
        assert metrics
        self.rows += [(name, step, value) for name, value in metrics.items()]

    def steps(self, name):
        return [step for logged, step, _ in self.rows if logged == name]


class Line(LightningModule):
    def __init__(self, slope=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def batches():
    return DataLoader(TensorDataset(torch.ones(2 * BATCHES, 1)), batch_size=2)


@pytest.fixture
def trainer_of(tmp_path):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def make(notes, epochs=EPOCHS):
        return Trainer(
            max_epochs=epochs,
            logger=RecordLogger(notes),
            log_every_n_steps=1,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    # Advice on worker processes, and warnings that Lightning's own code causes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield make


def test_metrics_stand_at_the_epochs_behind_their_weights(trainer_of, batches):
    notes, module = Notes(), Line()
    trainer = trainer_of(notes)
    trainer.test(module, batches, verbose=False)
    assert notes.steps("test/loss") == [0]
    trainer.fit(module, batches, batches)
    assert notes.steps("train/loss") == [1, 2, 3]
    assert notes.steps("val/loss") == [1, 2, 3]
    trainer.test(module, batches, verbose=False)
    trainer.validate(module, batches, verbose=False)
    assert notes.steps("test/loss") == [0, 0]
    assert notes.steps("val/loss") == [1, 2, 3, 3]
    trainer.fit_loop.max_epochs = EPOCHS + 1
    trainer.fit(module, batches, batches)
    assert notes.steps("train/loss") == [1, 2, 3, 4]


def test_epochs_of_a_single_batch_are_counted_too(trainer_of, batches):
    notes, module = Notes(), Line()
    trainer = trainer_of(notes)
    trainer.limit_train_batches = 1
    trainer.fit(module, batches, batches)
    trainer.test(module, batches, verbose=False)
    assert notes.steps("train/loss") == [1, 2, 3]
    assert notes.steps("test/loss") == [0]


def test_figures_of_a_step_stand_at_the_optimizer_step(trainer_of, batches):
    notes = Notes()
    trainer_of(notes).fit(Line(), batches)
    assert notes.steps("loss_step") == list(range(EPOCHS * BATCHES))
    assert notes.steps("loss_epoch") == [1, 2, 3]


def test_epoch_is_the_axis_and_no_metric(trainer_of, batches):
    notes = Notes()
    trainer_of(notes).fit(Line(), batches, batches)
    assert {name for name, _, _ in notes.rows} == {
        "train/loss",
        "val/loss",
        "loss_step",
        "loss_epoch",
    }
    assert all(isinstance(value, float) for _, _, value in notes.rows)


def test_what_has_no_epoch_stands_at_the_step_given():
    notes = Notes()
    logger = RecordLogger(notes)
    logger.log_metrics({"learning_rate": 0.1}, step=7)
    logger.log_metrics({"done": 1.0})
    assert notes.rows == [("learning_rate", 7, 0.1), ("done", 0, 1.0)]


def test_logger_is_named_after_experiment_and_run():
    logger = RecordLogger(Notes())
    assert (logger.name, logger.version) == ("CIFAR10", "abc")


def test_only_the_first_rank_talks(monkeypatch):
    notes = Notes()
    logger = RecordLogger(notes)
    assert logger.experiment is notes
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"loss": 1.0}, step=1)
    assert notes.rows == []
    assert logger.experiment is not notes


def test_other_ranks_need_no_run(trainer_of, batches):
    logger = RecordLogger(None)
    logger.log_metrics({"loss": 1.0}, step=1)
    assert (logger.name, logger.version, logger.experiment) == (None, None, None)
    trainer_of(None).fit(Line(), batches)
