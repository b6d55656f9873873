"""The direct loop trains, counts and saves what Lightning's own loop does, bit for bit."""

import copy
import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim.optimizer import register_optimizer_step_post_hook

from research.callbacks import Pace
from research.classifier import Classifier
from research.optimizers import Muon, MuonSGD
from research.speed import epoch_loop
from research.speed.epoch_loop import HOOKS, DirectEpochLoop, step_of
from research.training import fit

FEW = ["--data.num_train", "160", "--data.batch_size", "8"]  # 18 batches, 16 for validation
WAYS = {
    "sgd": [],
    "momentum and a schedule": [
        *("--optimizer.momentum", "0.9", "--lr_scheduler", "OneCycleLR"),
        *("--lr_scheduler.max_lr", "0.1"),
    ],
    "adamw, clipped by norm": [
        *("--optimizer", "AdamW", "--trainer.gradient_clip_val", "0.5"),
    ],
    "clipped by value": [
        *("--trainer.gradient_clip_val", "0.01", "--trainer.gradient_clip_algorithm", "value"),
    ],
    "gradients of four batches added up": [
        *("--trainer.accumulate_grad_batches", "4", "--lr_scheduler", "OneCycleLR"),
        *("--lr_scheduler.max_lr", "0.1"),
    ],
    "a line search": ["--optimizer", "LBFGS", "--optimizer.max_iter", "3"],
    "a schedule by the validation loss": ["--lr_scheduler", "ReduceLROnPlateau"],
    "validation within the epoch": ["--trainer.val_check_interval", "0.3"],
    "validation across epochs": [
        *("--trainer.val_check_interval", "7", "--trainer.check_val_every_n_epoch", "null"),
    ],
    "checkpoints within the epoch": ["--checkpoint.every_n_train_steps", "5"],
    "max_steps": ["--trainer.max_steps", "23"],
    "max_steps of several batches each": [
        *("--trainer.max_steps", "7", "--trainer.accumulate_grad_batches", "4"),
    ],
    "fewer batches": ["--trainer.limit_train_batches", "7"],
    "bf16-mixed": ["--trainer.precision", "bf16-mixed"],
    "bf16-true": ["--trainer.precision", "bf16-true"],
    "64-true": ["--trainer.precision", "64-true"],
    "dropout and batch norm": [
        *("--model.network.dropout", "0.3", "--model.network.normalization", "BatchNorm2d"),
    ],
    "a loss of cells": ["--model.loss", "CrossEntropyLoss2d"],
    "a loss that is no number": ["--optimizer.lr", "1e9", "--non_finite_loss", "ignore"],
}


class Seen(Callback):
    """Which hooks came, with which batch, at which counts."""

    direct = True

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.loops: dict = {}

    def on_train_end(self, trainer, pl_module):
        self.loops = copy.deepcopy(trainer.fit_loop.state_dict())


def note(name):
    def hook(self, trainer, pl_module, *args):
        numbers = [each for each in args if isinstance(each, int)]
        losses = [each.item() for each in args if isinstance(each, torch.Tensor)]
        counts = trainer.global_step, trainer.fit_loop.batch_idx, trainer.fit_loop.total_batch_idx
        self.calls.append((name, counts, numbers, losses))

    return hook


for _name in HOOKS:
    setattr(Seen, _name, note(_name))


def train(configuration, monkeypatch, directly, callbacks=()):
    """The result, what was seen, and how many steps went the direct way."""
    seen, steps = Seen(), []
    with monkeypatch.context() as patched:
        own = DirectEpochLoop.step
        patched.setattr(DirectEpochLoop, "step", lambda *a: (steps.append(1), own(*a)))
        if not directly:
            patched.setattr(epoch_loop, "hooks_of", lambda *_: None)
        result = fit(configuration, callbacks=[seen, *callbacks])
    return result, seen, len(steps)


def without_time(history):
    timed = ("epoch_seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in history]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_direct_steps_are_lightnings(small, monkeypatch, tmp_path, way):
    results, states = [], []
    for directly in (True, False):
        folder = tmp_path / str(directly)
        configuration = small(*FEW, *way, "--trainer.default_root_dir", str(folder))
        result, seen, steps = train(configuration, monkeypatch, directly)
        assert (steps > 0) == directly
        results.append((without_time(result.history), seen.calls, seen.loops))
        last = next(folder.rglob("last.ckpt"))
        states.append(torch.load(last, weights_only=True))
    assert repr(results[0]) == repr(results[1])  # NaN equals NaN
    for part in ("state_dict", "optimizer_states", "sums"):
        exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(states[0][part], states[1][part], **exactly)
    for part in ("loops", "lr_schedulers", "random_state"):
        assert repr(states[0][part]) == repr(states[1][part])


class Ends(Callback):
    """Asks for the end of the training after some batch of the second epoch."""

    direct = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.current_epoch == 1 and batch_idx == 5


def test_a_callback_ends_the_training_where_lightning_would(small, monkeypatch):
    ways = [
        train(small(*FEW, "--trainer.max_epochs", "3"), monkeypatch, directly, [Ends()])
        for directly in (True, False)
    ]
    (_, seen, steps), (_, by_lightning, _) = ways
    assert steps > 0
    assert seen.calls == by_lightning.calls and seen.loops == by_lightning.loops
    last = max(counts[2] for _, counts, _, _ in seen.calls)
    assert last == 18 + 5


def test_lightning_is_asked_what_follows_only_where_something_may(small, monkeypatch):
    asked = []
    own = DirectEpochLoop.on_advance_end
    noting = lambda self, fetcher: (asked.append(self.batch_idx), own(self, fetcher))  # noqa: E731
    monkeypatch.setattr(DirectEpochLoop, "on_advance_end", noting)
    train(small(*FEW, "--trainer.val_check_interval", "6"), monkeypatch, directly=True)
    assert asked == 2 * [0, 5, 11, 16, 17]


class Saves(Callback):
    """Writes a checkpoint at the end of the first validation of the second epoch."""

    direct = True

    def __init__(self, path) -> None:
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("every", ["0.25", "0.4"])
def test_all_is_validated_after_a_resumption_from_a_validation_within_an_epoch(
    small, tmp_path, every
):
    saved = tmp_path / "validated.ckpt"
    settings = [*FEW, "--trainer.val_check_interval", every]
    whole = fit(small(*settings), callbacks=[Saves(saved)])
    resumed = fit(small(*settings), resume_from=saved)
    assert without_time(resumed.history) == without_time(whole.history)


def test_every_batch_but_the_first_and_the_last_goes_directly(small, monkeypatch):
    _, seen, steps = train(small(*FEW), monkeypatch, directly=True)
    assert steps == 2 * (18 - 2)
    assert sum(name == "on_train_batch_end" for name, *_ in seen.calls) == 2 * 18


class Strange(Callback):
    """One that nobody here knows, and that looks at every batch."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        pl_module.log("seen", float(self.batches), on_step=False, on_epoch=True)


def test_callback_of_the_users_own_is_run_by_lightning(small, monkeypatch):
    strange = Strange()
    result, _, steps = train(small(*FEW), monkeypatch, True, [strange])
    assert (steps, strange.batches) == (0, 36)
    assert result.history[0]["seen"] == pytest.approx(
        9.5, rel=0.05
    )  # batches differ in size by one


def test_step_that_logs_is_run_by_lightning(small, monkeypatch):
    own = Classifier.training_step

    def logging_step(self, batch, batch_idx):
        loss = own(self, batch, batch_idx)
        self.log("twice", 2 * loss.detach(), on_step=False, on_epoch=True)
        return loss

    monkeypatch.setattr(Classifier, "training_step", logging_step)
    result, _, steps = train(small(*FEW), monkeypatch, True)
    assert steps == 0
    row = result.history[0]
    assert row["twice"] == pytest.approx(2 * row["train/loss"], rel=1e-5)


@pytest.mark.parametrize("hook", ["on_after_backward", "optimizer_step", "on_train_batch_start"])
def test_module_with_a_hook_of_its_own_is_run_by_lightning(small, monkeypatch, hook):
    calls = []

    def own(self, *args, **kwargs):
        calls.append(hook)
        return getattr(super(Classifier, self), hook)(*args, **kwargs)

    monkeypatch.setattr(Classifier, hook, own, raising=False)
    _, _, steps = train(small(*FEW), monkeypatch, True)
    assert (steps, len(calls)) == (0, 36)


def test_step_may_return_a_mapping_as_lightning_allows(small, monkeypatch):
    plain, _, _ = train(small(*FEW), monkeypatch, True)
    own = Classifier.training_step
    monkeypatch.setattr(Classifier, "training_step", lambda *a: {"loss": own(*a), "more": 1})
    mapped, _, steps = train(small(*FEW), monkeypatch, True)
    assert steps > 0
    assert without_time(mapped.history) == without_time(plain.history)


def test_profiled_training_is_run_by_lightning(small, monkeypatch):
    assert train(small(*FEW, "--trainer.profiler", "simple"), monkeypatch, True)[2] == 0


def test_own_callbacks_may_all_be_called_directly():
    ours = [Pace(), *Trainer(logger=False, enable_progress_bar=True).callbacks]
    assert all(epoch_loop.may_be_called_directly(each) for each in ours)
    assert not epoch_loop.may_be_called_directly(Strange())


# ---- the optimizer's step ------------------------------------------------------------------------


def one_parameter(kind):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 0.5)
    return weight, kind([weight], lr=0.1)


def with_schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, Muon, MuonSGD])
@pytest.mark.parametrize("scheduled", [False, True])
def test_step_is_spared_nothing_but_the_record_around_it(kind, scheduled, recwarn):
    (direct, optimizer), (usual, reference) = one_parameter(kind), one_parameter(kind)
    schedules = [with_schedule(each) for each in (optimizer, reference) if scheduled]
    for _ in range(2):
        step = step_of(optimizer)
        assert step.func is type(optimizer).step.__wrapped__
        assert step(lambda: 7.0) == reference.step(lambda: 7.0) == 7.0
        for schedule in schedules:
            schedule.step()
    assert torch.equal(direct, usual)
    assert not torch.equal(direct, torch.ones(3))
    assert [str(warning.message) for warning in recwarn] == []


def test_hooks_of_an_optimizer_are_called():
    called = []
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        _, optimizer = one_parameter(torch.optim.SGD)
        getattr(optimizer, register)(lambda *_, name=register: called.append(name))
        step_of(optimizer)()
    assert called == ["register_step_pre_hook", "register_step_post_hook"]
    _, optimizer = one_parameter(torch.optim.SGD)
    handle = register_optimizer_step_post_hook(lambda *_: called.append("of all"))
    step_of(optimizer)()
    handle.remove()
    assert called[2:] == ["of all"]


def test_step_that_somebody_wraps_is_called_as_a_whole():
    called = []

    class Told(torch.optim.SGD):
        @functools.wraps(torch.optim.SGD.step)
        def step(self, closure=None):
            called.append("class")
            return super().step(closure)

    weight, optimizer = one_parameter(Told)
    step_of(optimizer)()
    assert called == ["class"]
    assert torch.equal(weight, torch.full((3,), 0.95))
    weight, optimizer = one_parameter(torch.optim.SGD)
    own = optimizer.step
    optimizer.step = lambda closure=None: (called.append("instance"), own(closure))
    step_of(optimizer)()
    assert called == ["class", "instance"]
    assert torch.equal(weight, torch.full((3,), 0.95))
