"""`fit` as a plain function: what comes of it, and that nothing else does."""

import logging
import os
import random
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from research.checkpoints.content import CheckpointContent
from research.configuration.compose import ConfigurationError
from research.configuration.schema import resolve
from research.data.normalization import IDENTITY
from research.data.synthetic import Synthetic
from research.fit import title_of
from research.training import fit


def weights(path):
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_result_holds_what_was_measured(small):
    result = fit(small())
    splits = ("train", "val", "test")
    assert set(result.metrics) >= {f"{s}/{m}" for s in splits for m in ("loss", "accuracy")}
    assert {"test/macro_f1", "test/brier_score", "test/accuracy/disc"} <= set(result.metrics)
    assert [epoch["epoch"] for epoch in result.history] == [1, 2]
    best = max(result.history, key=lambda epoch: epoch["val/accuracy"])
    assert result.best_epoch == best["epoch"]
    assert result.metrics["val/accuracy"] == best["val/accuracy"]
    assert all(epoch["images_per_second"] > 0 for epoch in result.history)


def test_figures_are_those_of_a_hand_written_loop(small):
    """The same network, batches and SGD without Lightning: same weights, same figures."""
    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities.seed import isolate_rng

    from research.building import build_data, build_network

    configuration = small("--trainer.max_epochs", "1", "--optimizer.lr", "0.05")
    result = fit(configuration)
    with isolate_rng():
        seed_everything(0, verbose=False)
        data = build_data(configuration)
        network = build_network(configuration, data).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    losses, correct, count = 0.0, 0, 0
    for images, labels in data.train_dataloader():
        scores = network(images)
        loss = torch.nn.functional.cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.item() * len(labels)
        correct += (scores.argmax(1) == labels).sum().item()
        count += len(labels)
    trained = weights(result.best_checkpoint)
    assert_equal(trained, {f"network.{k}": v for k, v in network.state_dict().items()})
    assert result.metrics["train/loss"] == pytest.approx(losses / count, rel=1e-6)
    assert result.metrics["train/accuracy"] == correct / count
    data.setup("test")
    with torch.no_grad():
        hits = sum((network(x).argmax(1) == y).sum().item() for x, y in data.test_dataloader())
    assert result.metrics["test/accuracy"] == hits / 64


def test_same_seed_repeats_and_another_does_not(small):
    first, again, other = fit(small()), fit(small()), fit(small("--seed_everything", "1"))
    assert first.metrics == again.metrics
    assert first.metrics != other.metrics


def test_seed_zero_is_a_seed(small, tmp_path):
    one, other = fit(small("--seed_everything", "0")), fit(small("--seed_everything", "0"))
    assert_equal(weights(one.best_checkpoint), weights(other.best_checkpoint))


class Intruder(Callback):
    """Draws random numbers all the time, as an unrelated callback might."""

    def on_train_batch_start(self, *_):
        torch.rand(3), random.random(), np.random.rand()


def test_other_draws_change_neither_order_nor_augmentation(small):
    arguments = ("--data.crop_padding", "2", "--data.horizontal_flip", "true")
    assert fit(small(*arguments)).metrics == fit(small(*arguments), callbacks=[Intruder()]).metrics


def test_nothing_is_left_behind(small):
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    environment, filters = dict(os.environ), list(warnings.filters)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    levels = [logging.getLogger(f"lightning.{name}").level for name in ("pytorch", "fabric")]
    fit(small("--trainer.deterministic", "true"))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert dict(os.environ) == environment
    assert list(warnings.filters) == filters
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [
        logging.getLogger(f"lightning.{name}").level for name in ("pytorch", "fabric")
    ] == levels
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_untracked_run_keeps_its_checkpoints_under_the_root_folder(small, tmp_path):
    result = fit(small("--run_name", "here", "--trainer.default_root_dir", str(tmp_path / "out")))
    folder = tmp_path / "out" / "checkpoints" / "here"
    assert sorted(file.name for file in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert result.best_checkpoint == str(folder / "best.ckpt")


def test_checkpoint_says_what_made_it(small, tmp_path):
    configuration = small()
    result = fit(configuration)
    checkpoint = torch.load(result.best_checkpoint, weights_only=True)
    assert checkpoint["origin"]["configuration"] == configuration.yaml()
    file = tmp_path / "config.yaml"
    file.write_text(checkpoint["origin"]["configuration"])
    assert fit(resolve(["--config", str(file)])).metrics == result.metrics


RESUMED = {
    "sgd-onecycle": ["--optimizer.momentum", "0.9", "--lr_scheduler", "OneCycleLR"],
    "adamw-warmup": ["--optimizer", "AdamW", "--lr_scheduler", "LinearWarmupCosineAnnealingLR"],
    "muon-step": [
        *("--optimizer", "Muon", "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1")
    ],
    "adam-plateau": [
        *("--optimizer", "Adam", "--lr_scheduler", "ReduceLROnPlateau"),
        *("--lr_scheduler.patience", "0", "--lr_scheduler.threshold", "10"),
    ],
    "sparse": ["--optimizer", "SparseAdam"],
    "lbfgs": ["--optimizer", "LBFGS", "--optimizer.max_iter", "2"],
    "float64": ["--optimizer.momentum", "0.9", "--trainer.precision", "64-true"],
    "dropout-batchnorm-augmented": [
        *("--model.network.dropout", "0.5", "--model.network.normalization", "BatchNorm2d"),
        *("--data.crop_padding", "2", "--data.horizontal_flip", "true", "--data.cutout", "4"),
    ],
}


class StopAfter(Callback):
    """Ends the training after an epoch, with the length of the whole run still in force."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise Stopped


class Stopped(Exception):
    """Stands for whatever ended the first half."""


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # meant: two runs to compare
@pytest.mark.parametrize("name", RESUMED)
def test_resume_matches_unbroken_run(small, tmp_path, name):
    arguments = [*RESUMED[name], "--trainer.max_epochs", "4"]
    unbroken = fit(small(*arguments, "--run_name", "unbroken"))
    with pytest.raises(Stopped):
        fit(small(*arguments, "--run_name", "first"), callbacks=[StopAfter(2)])
    halfway = tmp_path / "checkpoints" / "first" / "last.ckpt"
    resumed = fit(small(*arguments, "--run_name", "second"), resume_from=halfway)
    one, other = (
        torch.load(tmp_path / "checkpoints" / run / "last.ckpt", weights_only=True)
        for run in ("unbroken", "second")
    )
    assert_equal(one["state_dict"], other["state_dict"])
    assert one["lr_schedulers"] == other["lr_schedulers"]
    measured = ("train/loss", "val/loss", "val/accuracy", "learning_rate")
    for before, after in zip(unbroken.history, resumed.history, strict=True):
        assert {key: before[key] for key in measured} == {key: after[key] for key in measured}


def drawn_after(checkpoint, rank, seed=7):
    """The first random numbers of the process: torch's, Python's, numpy's."""
    data = Synthetic()
    data.normalization = IDENTITY
    content = CheckpointContent("", data)
    trainer = SimpleNamespace(global_rank=rank, global_step=5)
    module = SimpleNamespace(device=torch.device("cpu"))
    with isolate_rng():
        seed_everything(seed, verbose=False)
        content.on_load_checkpoint(trainer, module, checkpoint)
        content.on_train_start(trainer, module)
        return torch.rand(1).item(), random.random(), np.random.rand()


def test_processes_go_on_with_their_own_random_numbers(small):
    """Whether a checkpoint has those of all processes, of the first alone, or of none."""
    saved = torch.load(fit(small()).best_checkpoint, weights_only=True)
    assert "other_random_states" not in saved  # of one process
    first, second, third = (drawn_after(saved, rank) for rank in range(3))
    assert len({first[0], second[0], third[0]}) == 3
    assert first[1:] == second[1:] == third[1:]  # what all decide together
    assert drawn_after(saved, 2) == third
    assert drawn_after(saved, 2, seed=8) == third  # the checkpoint's seed counts
    with isolate_rng():
        torch.manual_seed(100)
        other = {**saved["random_state"], "cpu": torch.get_rng_state()}
        expected = torch.rand(1).item()
    both = saved | {"other_random_states": [other]}
    assert [drawn_after(both, rank)[0] for rank in range(3)] == [first[0], expected, third[0]]
    fresh = [drawn_after({}, rank) for rank in range(3)]
    assert len({numbers[0] for numbers in fresh}) == 3
    assert fresh[1] != drawn_after({}, 1, seed=8)
    with isolate_rng():
        seed_everything(7, verbose=False)
        assert fresh[0] == (torch.rand(1).item(), random.random(), np.random.rand())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"],
        ["--trainer.limit_test_batches", "0"],
        ["--trainer.overfit_batches", "2"],
        ["--trainer.enable_checkpointing", "false"],
        ["--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "1.0"],
        ["--trainer.precision", "bf16-mixed"],
        ["--trainer.precision", "bf16-true"],
        ["--trainer.precision", "64-true"],
        ["--model.channels_last", "false"],
        ["--model.loss", "CrossEntropyLoss2d"],
        ["--model.loss.reduction", "sum", "--optimizer.lr", "1e-4"],
        ["--data.val_fraction", "0"],
        ["--data.val_fraction", "0", "--lr_scheduler", "ReduceLROnPlateau"],
        ["--trainer.limit_val_batches", "0", "--lr_scheduler", "ReduceLROnPlateau"],
        ["--trainer.check_val_every_n_epoch", "2"],
        ["--trainer.val_check_interval", "2"],
        ["--trainer.num_sanity_val_steps", "2"],
        ["--trainer.max_epochs", "-1", "--trainer.max_steps", "7"],
        ["--trainer.max_epochs", "0"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        ["--trainer.profiler", "simple"],
        ["--trainer.barebones", "true"],
        ["--trainer.enable_model_summary", "true"],
    ],
    ids=lambda arguments: " ".join(arguments).replace("--", ""),
)
def test_flag_works(small, arguments):
    result = fit(small(*arguments))
    assert all(np.isfinite(value) for value in result.metrics.values())
    tested = arguments[0] not in ("--trainer.limit_test_batches", "--trainer.barebones")
    assert ("test/loss" in result.metrics) == tested


def test_figures_are_those_of_the_checkpoint_that_is_tested(small):
    """Validated three times an epoch, the best checkpoint is seldom the last of its epoch."""
    arguments = ["--trainer.val_check_interval", "3", "--data.num_train", "640"]
    result = fit(small(*arguments, "--optimizer", "AdamW", "--optimizer.lr", "0.01"))
    assert title_of(result).startswith("within epoch ")
    assert title_of(fit(small())).startswith("epoch ")
    kept = torch.load(result.best_checkpoint, weights_only=True)
    (state,) = [state for key, state in kept["callbacks"].items() if "val/accuracy" in key]
    assert result.metrics["val/accuracy"] == state["best_model_score"].item()
    assert result.metrics["val/accuracy"] != result.history[result.best_epoch - 1]["val/accuracy"]


def test_epoch_without_validation_has_no_validation_figures(small):
    result = fit(small("--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "4"))
    assert ["val/loss" in epoch for epoch in result.history] == [False, True, False, True]


def test_plateau_waits_for_a_new_validation(small):
    """A threshold that nothing reaches: each validation after the first lowers the rate."""
    plateau = ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.patience", "0"]
    plateau += ["--lr_scheduler.threshold", "10", "--lr_scheduler.threshold_mode", "abs"]
    arguments = ["--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "6"]
    result = fit(small(*plateau, *arguments, "--optimizer.lr", "1e-4"))
    rates = [epoch["learning_rate"] for epoch in result.history]
    assert rates == pytest.approx([1e-4] * 4 + [1e-5] * 2)


def test_run_that_ends_before_its_first_validation_keeps_its_last_checkpoint(small):
    result = fit(small("--trainer.max_steps", "3"))
    assert result.best_checkpoint.endswith("last.ckpt")
    assert "val/loss" not in result.metrics


def test_a_second_run_of_a_name_overwrites_nothing(small, tmp_path):
    one, other = (fit(small("--run_name", "../same", "--trainer.max_epochs", "1")) for _ in "ab")
    folders = {Path(path).resolve().parent for path in (one.best_checkpoint, other.best_checkpoint)}
    assert len(folders) == 2
    assert all(folder.parent == tmp_path / "checkpoints" for folder in folders)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01"],
        ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"],
    ],
)
def test_callbacks_with_objects_among_their_defaults_work(small, arguments):
    assert len(fit(small(*arguments, "--trainer.max_epochs", "3")).history) == 3


def test_fast_dev_run_keeps_and_records_nothing(small, tmp_path):
    result = fit(small("--trainer.fast_dev_run", "true"))
    assert result.best_checkpoint is None
    assert not any(tmp_path.iterdir())


def test_sum_and_mean_report_the_same_loss_for_the_same_weights(small):
    still = ["--optimizer.lr", "0", "--trainer.max_epochs", "1"]
    mean, total = fit(small(*still)), fit(small(*still, "--model.loss.reduction", "sum"))
    for split in ("train", "val", "test"):
        assert mean.metrics[f"{split}/loss"] == pytest.approx(total.metrics[f"{split}/loss"], 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lr", "-1"], r"^optimizer\.lr is -1\.0, and SGD takes none such"),
        (["--data.batch_size", "0"], r"^data\.batch_size is 0"),
        (["--seed_everything", "-1"], r"^seed_everything is -1; it must be from 0 to"),
        (["--model.loss.label_smoothing", "2"], r"^model\.loss.*label_smoothing"),
        (["--model.loss.weight", "[1, 2]"], r"^model\.loss.*weight.*10 classes"),
        (["--model.network.num_classes", "7"], r"^model\.network\.num_classes is 7, and the data"),
        (["--model.network.activation", "Relu"], r"^model\.network.*activation.*ReLU"),
        (["--lr_scheduler", "LinearWarmupCosineAnnealingLR", "--lr_scheduler.warmup_fraction", "2"],
         r"^lr_scheduler.*warmup_fraction"),
        (["--model.network", "torch.nn.Identity", "--model.loss", "CrossEntropyLoss2d"],
         r"^model\.loss CrossEntropyLoss2d .*cell_scores"),
        (["--model.network", "torch.nn.Identity"], r"^model\.network: it returns \(2, 3, 32, 32\)"),
        (["--trainer.accelerator", "abacus"], r"^trainer: .*abacus"),
        (["--trainer.max_epochs", "-5"], r"^trainer: "),
        (["--trainer.accumulate_grad_batches", "0"], r"^trainer\.accumulate_grad_batches is 0; it"),
        (["--trainer.val_check_interval", "0"], r"^trainer\.val_check_interval is 0"),
        (["--trainer.val_check_interval", "2"],
         r"^trainer\.val_check_interval is 2, and an epoch is over after batch 1;"),
        (["--trainer.limit_train_batches", "0.1"],
         r"^trainer\.limit_train_batches is 0\.1, and leaves none of the 1 batches of train"),
        (["--trainer.limit_train_batches", "0"], r"^trainer\.limit_train_batches is 0, and"),
        (["--trainer.limit_test_batches", "0.1"], r"^trainer\.limit_test_batches is 0\.1, and"),
        (["--trainer.overfit_batches", "0.5"], r"^trainer\.overfit_batches is 0\.5, and"),
        (["--trainer.max_epochs", "-1", "--lr_scheduler", "OneCycleLR"],
         r"^lr_scheduler: .* this run has no end in steps"),
        (["--trainer.callbacks", "BatchSizeFinder"], r"^trainer: BatchSizeFinder would change"),
        (["--trainer.strategy", "ddp_spawn"], r"^trainer\.strategy is ddp_spawn.*choose ddp"),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=nope"],
         r"^trainer: EarlyStopping watches nope, .*there are train/loss"),
        (["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "0"], r"^lr_scheduler: "),
        (["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.mode", "max"],
         r"^lr_scheduler\.mode must be min"),
        (["--optimizer", "LBFGS", "--trainer.accumulate_grad_batches", "2"],
         r"^trainer\.accumulate_grad_batches must be 1 with LBFGS"),
        (["--optimizer", "LBFGS", "--optimizer.line_search_fn", "x"],
         r"^optimizer\.line_search_fn is x; it must be strong_wolfe or null"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_before_anything_is_recorded(
    small, tmp_path, arguments, message
):
    base = ["--data", "Synthetic", "--data.num_train", "64", "--data.num_test", "16"]
    configuration = small("--tracking_uri", "sqlite:///mlflow.db", *arguments, base=base)
    with pytest.raises(ConfigurationError, match=message):
        fit(configuration)
    assert not any(tmp_path.iterdir())
