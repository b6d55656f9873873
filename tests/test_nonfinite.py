"""The first loss that is no number: where the run stops, and what is kept of the step."""

import copy
import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback

from research.building import build_classifier, build_data, build_trainer
from research.checkpoints.content import CheckpointContent
from research.faults.nonfinite import NonFiniteLoss, StopAtNonFiniteLoss
from research.training import nothing_left_behind

ROOT = Path(__file__).parents[1]

# Each goes wrong after a few steps, in float32 unless it says otherwise.
DIVERGING = {
    "sgd": ["--optimizer.lr", "1e4"],
    "dropout-batchnorm": [
        *("--optimizer.lr", "1e15", "--model.network.dropout", "0.5"),
        *("--model.network.normalization", "BatchNorm2d"),
    ],
    "adamw": ["--optimizer", "AdamW", "--optimizer.lr", "1e12"],
    "momentum-onecycle": [
        *("--optimizer.lr", "1e4", "--optimizer.momentum", "0.9"),
        *("--lr_scheduler", "OneCycleLR", "--lr_scheduler.max_lr", "1e5"),
    ],
    "bf16-mixed": ["--optimizer.lr", "1e4", "--trainer.precision", "bf16-mixed"],
    "bf16-true": ["--optimizer.lr", "1e4", "--trainer.precision", "bf16-true"],
    "64-true": ["--optimizer.lr", "1e12", "--trainer.precision", "64-true"],
    "lbfgs": ["--optimizer", "LBFGS", "--optimizer.lr", "20", "--optimizer.max_iter", "4"],
    "lbfgs-dropout": [
        *("--optimizer", "LBFGS", "--optimizer.lr", "1e6", "--model.network.dropout", "0.5"),
    ],
    "accumulated": ["--optimizer.lr", "1e4", "--trainer.accumulate_grad_batches", "2"],
    "augmented": ["--optimizer.lr", "1e4", "--data.crop_padding", "2", "--data.cutout", "4"],
    "infinite": ["--model.loss", "MSELoss", "--model.loss.scores", "raw", "--optimizer.lr", "30"],
}


def train(configuration, *callbacks, folder=None, run_id=None):
    """Train with the guard, or without it where `folder` is False; returns the last weights."""
    with nothing_left_behind():
        seed_everything(configuration.values.seed_everything, verbose=False)
        data = build_data(configuration)
        classifier = build_classifier(configuration, data)
        if folder is not False:
            content = CheckpointContent(configuration.yaml(), data)
            content.origin["run_id"] = run_id
            guard = StopAtNonFiniteLoss(content.origin)
            guard.folder = folder
            callbacks = (guard, *callbacks)
        trainer = build_trainer(configuration, callbacks)
        trainer.fit(classifier, datamodule=data)
    return classifier.state_dict()


class Witness(Callback):
    """Everything before each batch, and each batch's losses, the slow and plain way."""

    def __init__(self):
        self.before, self.losses = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        noted = {
            "state_dict": pl_module.state_dict(),
            "optimizer_state": trainer.optimizers[0].state_dict(),
            "random_state": {"cpu": torch.get_rng_state()},
            "images": batch[0],
            "labels": batch[1],
            "epoch": trainer.current_epoch,
            "batch_idx": batch_idx,
            "global_step": trainer.global_step,
        }
        self.before.append(copy.deepcopy(noted))
        self.losses.append([])

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses[-1].append(loss.item())

    @property
    def first(self):
        """The batch of the first bad loss, and the place of that loss in it."""
        return next(
            (batch, place)
            for batch, losses in enumerate(self.losses)
            for place, loss in enumerate(losses)
            if not math.isfinite(loss)
        )


class Poison(Callback):
    """Makes a batch's pictures infinite, as a broken file would; on one process alone."""

    def __init__(self, batch, rank=0):
        self.batch, self.rank = batch, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            batch[0][0] = math.inf


def stopped(configuration, folder, *callbacks, run_id=None):
    with pytest.raises(NonFiniteLoss) as caught:
        train(configuration, *callbacks, folder=folder, run_id=run_id)
    return caught.value


def read(file):
    return torch.load(file, weights_only=True)


def assert_same(one, other):
    """Equal to the last bit, however deep."""
    if isinstance(one, dict):  # a state_dict is an OrderedDict
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, others in zip(one, other, strict=True):
            assert_same(mine, others)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("name", DIVERGING)
def test_stops_at_the_first_bad_loss_and_keeps_what_was_before_it(small, tmp_path, name):
    configuration = small(*DIVERGING[name])
    witness = Witness()
    train(configuration, witness, folder=False)
    batch, place = witness.first
    assert len(witness.losses) == 10  # without the guard it goes on to the end
    error = stopped(configuration, tmp_path / "kept")
    kept = read(tmp_path / "kept" / "step.pt")
    before = witness.before[batch]
    for key in before:
        assert_same(before[key], kept[key])
    assert kept["evaluation"] == place + 1
    assert str(kept["loss"]) == str(witness.losses[batch][place])
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())
    assert f"The loss became {kept['loss']} at step {before['global_step'] + 1} (" in str(error)
    assert f"epoch {before['epoch'] + 1}, batch {before['batch_idx'] + 1})" in str(error)


def test_the_cases_go_wrong_in_different_ways(small, tmp_path):
    """Not all at the first loss, not all as nan, and one in the middle of LBFGS's step."""
    losses, evaluations, steps = set(), set(), set()
    for name in ("sgd", "infinite", "lbfgs"):
        stopped(small(*DIVERGING[name]), tmp_path / name)
        kept = read(tmp_path / name / "step.pt")
        losses.add(str(kept["loss"]))
        evaluations.add(kept["evaluation"] > 1)
        steps.add(kept["global_step"] > 0)
    assert losses == {"nan", "inf"}
    assert evaluations == {True, False}
    assert True in steps


def test_message_says_where_how_fast_and_what_next(small, tmp_path):
    configuration = small(*DIVERGING["sgd"])
    error = stopped(configuration, tmp_path / "kept")
    assert "with learning rate 10000; try a smaller optimizer.lr, or" in str(error)
    file = tmp_path / "kept" / "step.pt"
    assert str(error).endswith(f" python -m research.replay {file} looks at that step.")
    recorded = stopped(configuration, tmp_path / "kept", run_id="0123456789abcdef" * 2)
    assert (
        f"python -m research.replay 01234567 looks at that step, which is kept in {file}."
        in str(recorded)
    )
    assert not isinstance(error, ValueError)  # which would be a mistake in what was typed


def test_learning_rate_is_that_of_the_step(small, tmp_path):
    stopped(small(*DIVERGING["momentum-onecycle"]), tmp_path)
    kept = read(tmp_path / "step.pt")
    assert kept["global_step"] > 0
    assert kept["learning_rates"] == [
        group["lr"] for group in kept["optimizer_state"]["param_groups"]
    ]
    assert 0 < kept["learning_rates"][0] <= 1e5
    assert kept["learning_rates"][0] != 1e4


@pytest.mark.parametrize("arguments", [[], ["--optimizer", "LBFGS", "--optimizer.max_iter", "2"]])
def test_finite_run_is_left_alone(small, tmp_path, arguments):
    configuration = small(
        *arguments, "--model.network.dropout", "0.5", "--model.network.normalization", "BatchNorm2d"
    )
    guarded = train(configuration, folder=tmp_path / "kept")
    assert_same(guarded, train(configuration, folder=False))
    assert not (tmp_path / "kept").exists()


def test_bad_pictures_stop_the_run_at_their_batch(small, tmp_path):
    error = stopped(small(), tmp_path, Poison(3))
    assert "at step 4 (epoch 1, batch 4)" in str(error)
    assert not read(tmp_path / "step.pt")["images"].isfinite().all()


def test_weights_are_untouched_in_memory_too(small, tmp_path):
    class After(Callback):
        def on_exception(self, trainer, pl_module, exception):
            self.weights = copy.deepcopy(dict(pl_module.network.named_parameters()))

    after = After()
    stopped(small(*DIVERGING["adamw"]), tmp_path, after)
    kept = read(tmp_path / "step.pt")["state_dict"]
    for name, weight in after.weights.items():
        assert torch.equal(weight.data, kept[f"network.{name}"])


def test_file_is_told_once_when_it_is_whole(small, tmp_path):
    told = []

    class Listen(Callback):
        def on_fit_start(self, trainer, pl_module):
            guard = next(c for c in trainer.callbacks if isinstance(c, StopAtNonFiniteLoss))
            guard.on_found = lambda path: told.append((path, read(path)["global_step"]))

    error = stopped(small(*DIVERGING["sgd"]), tmp_path / "kept", Listen(), run_id="0" * 32)
    assert str(error).endswith("kept as non_finite/step.pt among the run's artifacts.")
    assert told == [(tmp_path / "kept" / "step.pt", 2)]
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["step.pt"]


def test_nothing_is_kept_where_there_is_no_folder(small, tmp_path):
    error = stopped(small(*DIVERGING["sgd"]), None)
    assert "replay" not in str(error)
    assert not any(tmp_path.iterdir())


def test_folder_that_cannot_be_written_changes_no_more_than_the_message(small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    error = stopped(small(*DIVERGING["sgd"]), tmp_path / "file" / "kept")
    assert "The loss became nan" in str(error)
    assert "The step could not be kept in " in str(error)
    assert "replay" not in str(error)


def test_disk_that_fills_up_leaves_no_half_file(small, tmp_path, monkeypatch):
    def save_half(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    error = stopped(small(*DIVERGING["sgd"]), tmp_path / "kept")
    assert "could not be kept" in str(error)
    assert "No space left" in str(error)
    assert not any((tmp_path / "kept").iterdir())


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from research.configuration.schema import resolve
from tests.conftest import SMALL
from tests.test_nonfinite import Poison, train
folder, rank, *arguments = sys.argv[1:]
train(
    resolve([*SMALL, "--tracking_uri", "", "--trainer.devices", "2", *arguments]),
    Poison(1, int(rank)),
    folder=Path(folder),
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_meets_it_alone_stops_the_others_too(tmp_path, rank):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    ran = subprocess.run(
        [sys.executable, "two.py", str(tmp_path / "kept"), str(rank)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1
    assert "NonFiniteLoss: The loss became nan at step 2 (epoch 1, batch 2)" in ran.stderr
    kept = read(tmp_path / "kept" / "step.pt")
    assert not kept["images"].isfinite().all()  # of the process that met it
    assert kept["machine"]["world_size"] == "2"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["sgd", "dropout-batchnorm", "bf16-mixed"])
def test_works_on_a_gpu(small, tmp_path, name):
    on_gpu = ["--trainer.accelerator", "gpu", "--trainer.devices", "1"]
    configuration = small(*DIVERGING[name], *on_gpu)
    witness = Witness()
    train(configuration, witness, folder=False)
    batch, _ = witness.first
    stopped(configuration, tmp_path)
    kept = read(tmp_path / "step.pt")
    before = witness.before[batch]["state_dict"]
    assert all(torch.equal(before[key].cpu(), kept["state_dict"][key].cpu()) for key in before)
    assert set(kept["random_state"]) == {"cpu", "cuda"}
