"""Pace and progress: what is measured, and what a person at a terminal sees."""

import functools
import io
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from research.callbacks import Keeper, Progress
from research.configuration.compose import ConfigurationError
from research.configuration.schema import resolve
from research.training import fit
from tests.conftest import SMALL


class Terminal(io.StringIO):
    def isatty(self):
        return True


class SlowValidation(Callback):
    def on_validation_batch_start(self, *_):
        time.sleep(3)


class SlowTraining(Callback):
    def on_train_batch_start(self, *_):
        time.sleep(0.1)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """What a training writes to this kind of standard error, each step shown, however fast."""

    @functools.cache
    def watch(kind):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("watched"))
            patch.setattr(sys, "stderr", out := kind())
            patch.setattr(Progress, "refresh_seconds", 0.0)
            asked = ["--tracking_uri", "", "--trainer.enable_progress_bar", "true"]
            fit(resolve([*SMALL, *asked]), callbacks=[SlowTraining()])
        return out.getvalue()

    return watch


def test_terminal_shows_a_bar_with_loss_accuracy_and_speed(watched):
    shown = watched(Terminal)
    pattern = r"epoch 1 +\d+% \|.*\| \d/5 \[.*\], loss \d\.\d{4}, accuracy [\d.]+%, [\d,]+ images/s"
    assert re.search(pattern, shown)
    assert re.search(r"test +\d+% \|", shown)


@pytest.mark.parametrize("out", [Terminal, io.StringIO], ids=["terminal", "file"])
def test_each_epoch_leaves_one_line(watched, out):
    shown = watched(out)
    lines = [line.rpartition("\r")[2] for line in shown.splitlines()]
    epochs = [line for line in lines if re.match(r"epoch \d/2 ", line)]
    pattern = (
        r"epoch \d/2   train loss \d\.\d{4} accuracy +[\d.]+%   val loss \d\.\d{4} "
        r"accuracy +[\d.]+%   [\d,]+ images/s   [\d.]+ s"
    )
    assert len(epochs) == 2
    assert all(re.fullmatch(pattern, line) for line in epochs)


def test_file_gets_no_bar(watched):
    assert "\r" not in watched(io.StringIO)


def test_pace_counts_training_and_not_validation(small):
    once = small("--trainer.max_epochs", "1")
    result = fit(once, callbacks=[SlowValidation(), SlowTraining()])
    (epoch,) = result.history
    batches, images = 5, 290
    assert 0.1 * batches <= epoch["epoch_seconds"] < 0.1 * batches + 2.5
    assert epoch["images_per_second"] == pytest.approx(images / epoch["epoch_seconds"], rel=1e-4)
    assert result.images_per_second == pytest.approx(epoch["images_per_second"], rel=1e-4)


def test_learning_rate_is_the_one_the_epoch_began_with(small):
    schedule = ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"]
    result = fit(small("--optimizer.lr", "0.5", *schedule))
    assert [epoch["learning_rate"] for epoch in result.history] == pytest.approx([0.5, 0.05])


def test_policy_of_checkpoints_is_kept(small):
    """save_top_k and save_last are Lightning's own: so many files, no more."""

    def folder(result):
        return sorted(file.name for file in Path(result.best_checkpoint).parent.iterdir())

    epochs = ("--trainer.max_epochs", "4")
    assert folder(fit(small(*epochs))) == ["best.ckpt", "last.ckpt"]
    assert folder(fit(small(*epochs, "--checkpoint.save_last", "false"))) == ["best.ckpt"]
    assert folder(fit(small(*epochs, "--checkpoint.save_top_k", "0"))) == ["last.ckpt"]
    every = fit(small(*epochs, "--checkpoint.save_top_k", "-1"))
    assert folder(every) == [*(f"epoch={n}.ckpt" for n in (1, 2, 3, 4)), "last.ckpt"]
    assert Path(every.best_checkpoint).name == f"epoch={every.best_epoch}.ckpt"


def test_nothing_is_kept_where_nothing_is_asked_for(small, tmp_path):
    result = fit(small("--checkpoint.save_top_k", "0", "--checkpoint.save_last", "false"))
    assert result.best_checkpoint is None
    assert not list(tmp_path.rglob("*.ckpt"))


def test_best_may_be_the_one_of_least_loss(small):
    result = fit(small("--checkpoint.monitor", "val/loss", "--trainer.max_epochs", "4"))
    least = min(result.history, key=lambda epoch: epoch["val/loss"])
    assert result.best_epoch == least["epoch"]


def test_impossible_policy_is_refused(small):
    with pytest.raises(ConfigurationError, match=r"checkpoint.save_top_k is -2; it must be -1"):
        fit(small("--checkpoint.save_top_k", "-2"))


def test_which_files_are_there_is_the_first_processs_word(tmp_path):
    """On another machine they are not, and processes that disagree would wait for each other."""
    state = {
        "best_k_models": {"elsewhere/best.ckpt": torch.tensor(0.5)},
        "best_model_path": "elsewhere/best.ckpt",
    }
    keeper = Keeper(dirpath=tmp_path, filename="best", monitor="val/accuracy", mode="max")
    best = str(tmp_path / "best.ckpt")
    keeper.from_first = lambda seen: {best}
    keeper.load_state_dict(state)
    assert (keeper.best_model_path, list(keeper.best_k_models)) == (best, [best])
    alone = Keeper(dirpath=tmp_path, filename="best", monitor="val/accuracy", mode="max")
    alone.load_state_dict(state)
    assert (alone.best_model_path, alone.best_k_models) == ("", {})
