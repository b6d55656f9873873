"""The same science on one, two and four processes: losses, weights, figures, and random numbers."""

import math
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from research.configuration.schema import resolve
from research.data.streams import stream
from research.faults.diagnosis import is_reproduced, read_step, replay, suggest
from research.faults.nonfinite import NonFiniteLoss
from research.losses import ClassificationLoss
from research.processes import shares
from research.training import fit
from tests.conftest import SMALL
from tests.launched import launched

pytestmark = pytest.mark.devices

# 333 pictures leave 301 to train on: 6 batches of 50 or 51, which neither 2 nor 4 divide.
BASE = [
    *SMALL,
    *("--tracking_uri", "", "--data.num_train", "333", "--data.num_test", "67"),
    *("--data.batch_size", "51", "--data.crop_padding", "2", "--data.horizontal_flip", "true"),
    *("--trainer.precision", "64-true", "--trainer.enable_checkpointing", "false"),
]
WEIGHTS = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"
CASES = {
    "plain": [],
    "class-weights": ["--model.loss.weight", WEIGHTS, "--model.loss.ignore_index", "3"],
    "sum": ["--model.loss.reduction", "sum", "--optimizer.lr", "1e-3"],
    "sum-clipped": [
        *("--model.loss.reduction", "sum", "--optimizer.lr", "0.1", "--optimizer.momentum", "0.9"),
        *("--trainer.gradient_clip_val", "0.5"),
    ],
    "accumulated": [
        *("--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.05"),
        *("--optimizer.lr", "0.5", "--model.loss.weight", WEIGHTS),
    ],
    "lbfgs": [
        *("--optimizer", "LBFGS", "--optimizer.line_search_fn", "strong_wolfe"),
        *("--optimizer.max_iter", "3", "--model.loss.weight", WEIGHTS),
    ],
    "per-cell": ["--model.loss", "CrossEntropyLoss2d", "--optimizer.lr", "0.3"],
    "plateau": ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.patience", "0"],
    "often-validated": [
        *("--trainer.val_check_interval", "2", "--trainer.num_sanity_val_steps", "1"),
        *("--trainer.limit_train_batches", "5", "--trainer.accumulate_grad_batches", "4"),
    ],
    "overfit": ["--trainer.overfit_batches", "2"],
    "unmoved-float32": ["--optimizer.lr", "0", "--trainer.precision", "32-true"],
    "bf16-mixed": ["--trainer.precision", "bf16-mixed"],
}
DROPOUT = ["--model.network.dropout", "0.5"]
SCRIPT = "from tests.test_devices_science import train_all; train_all()"


class Witness(Callback):
    """Notes each loss and the random numbers to come, and saves in the middle of an epoch."""

    def __init__(self, save_to: Path | None = None) -> None:
        self.losses: list[float] = []
        self.random_states: list[torch.Tensor] = []
        self.save_to = save_to

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.random_states.append(torch.get_rng_state())
        if self.save_to is not None and (trainer.current_epoch, batch_idx) == (1, 2):
            trainer.save_checkpoint(self.save_to)

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(loss.item())

    def on_train_end(self, trainer, pl_module):
        self.weights = {name: w.detach().clone() for name, w in pl_module.state_dict().items()}


class Bad(Callback):
    """Spoils the second batch of one process, in one way or another."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx != 1:
            return
        if self.how == "together":
            pl_module.loss = infinite_together()
        elif trainer.global_rank == trainer.world_size - 1:
            images, labels = batch
            if self.how == "pictures":
                images[0] = math.inf
            elif self.how == "ignored":  # all of them: 0 / 0 on this share alone
                labels.fill_(3)


def infinite_together() -> ClassificationLoss:
    """A loss that is infinite for more pictures than a share of two processes has."""

    class InfiniteTogether(ClassificationLoss):  # in here: other tests train with every loss
        def compute(self, scores, labels):
            return scores.exp().mean() * (math.inf if len(labels) > 26 else 1)

    return InfiniteTogether()


class UnknownSizes(Callback):
    """As if the loader were none of ours."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.share_sizes = lambda split, batch_idx: None


def train(name, *arguments, world_size, rank, folder, save_to=None, resume_from=None, callbacks=()):
    """What a training came to on this process, kept as NAME.RANK.pt."""
    witness = Witness(save_to)
    configuration = resolve([*BASE, "--trainer.devices", str(world_size), *arguments])
    result = fit(configuration, callbacks=[witness, *callbacks], resume_from=resume_from)
    figures = {k: v for k, v in result.metrics.items() if "per_second" not in k}
    told = {
        "losses": witness.losses,
        "random_states": witness.random_states,
        "weights": witness.weights,
        "metrics": {name: v for name, v in figures.items() if name != "epoch_seconds"},
    }
    torch.save(told, folder / f"{name}.{rank}.pt")


def stop(how, *arguments, world_size, rank, folder):
    """What a training said that the guard stopped, kept as HOW.RANK.pt."""
    base = [*BASE, "--trainer.devices", str(world_size), "--run_name", how, *arguments]
    try:
        fit(resolve(base), callbacks=[Bad(how)])
    except (NonFiniteLoss, SystemExit) as error:
        # Processes other than the first leave quietly, having the first one tell it.
        found = error.__context__ if isinstance(error, SystemExit) else error
        assert isinstance(found, NonFiniteLoss)
        torch.save(str(found), folder / f"{how}.{rank}.pt")


def join_shares(name, world_size, rank, folder):
    """Shares of 3, 2, 3, 2 rows, kept as joined, with the gradient that goes back to the own."""
    sizes = [3, 2, 3, 2]
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(10, 5, 2, 4, generator=generator).bfloat16()
    known = torch.randint(0, 5, (10, 2, 4), generator=generator)
    own = whole.split(sizes)[rank].to(memory_format=torch.channels_last).requires_grad_()
    scores, labels = shares.join(own, known.split(sizes)[rank], sizes)
    (scores.float() * torch.arange(10).view(10, 1, 1, 1)).sum().backward()
    with torch.inference_mode():
        tested, _ = shares.join(own * 1, known.split(sizes)[rank], sizes)
        tested = torch.equal(tested, whole)
    told = {
        "same": torch.equal(scores, whole) and torch.equal(labels, known) and tested,
        "contiguous": scores.is_contiguous() and labels.is_contiguous(),
        "gradient": own.grad.float().mean(dim=(1, 2, 3)).tolist(),
        "sizes": shares.sizes_of_all(sizes[rank], torch.device("cpu")),
    }
    torch.save(told, folder / f"{name}.{rank}.pt")


def train_all():
    """Every case, and what a resumption is compared with."""
    world_size, rank, folder = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), Path.cwd()
    place = {"world_size": world_size, "rank": rank, "folder": folder}
    for name, arguments in CASES.items():
        train(name, *arguments, **place)
    train("whole", save_to=folder / "middle.ckpt", **place)
    train("dropout", *DROPOUT, save_to=folder / "dropout.ckpt", **place)
    if world_size == 4:
        join_shares("joined", **place)
        return
    train("dropout-resumed", *DROPOUT, resume_from=folder / "dropout.ckpt", **place)
    if world_size == 2:
        one = folder.parent / "1"
        train("from-one", resume_from=one / "middle.ckpt", **place)
        train("dropout-from-one", *DROPOUT, resume_from=one / "dropout.ckpt", **place)
        train("dropout-from-one-again", *DROPOUT, resume_from=one / "dropout.ckpt", **place)
        train("unknown-sizes", callbacks=[UnknownSizes()], **place)
        ignoring = ["--model.loss.ignore_index", "3"]
        train("ignored", *ignoring, callbacks=[Bad("ignored")], **place)
        stop("pictures", **place)
        stop("together", **place)


class Found:
    """What the processes kept, by number of processes, name and rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, world_size: int, name: str, rank: int = 0):
        return torch.load(self.folder / str(world_size) / f"{name}.{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("science")
    for world_size in (1, 2, 4):
        outcomes = launched(world_size, SCRIPT, folder / str(world_size), timeout=400)
        assert [o.code for o in outcomes] == [0] * world_size, outcomes[0].err
    return Found(folder)


def largest_difference(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def assert_close(one, other, within):
    """Losses, weights and figures, of which other processes than the first have only a few."""
    assert largest_difference(one["losses"], other["losses"]) <= within
    for name, weight in one["weights"].items():
        assert (weight - other["weights"][name]).abs().max() <= within
    assert {"test/loss", "test/accuracy", "train/loss", "val/loss"} <= other["metrics"].keys()
    for name, figure in other["metrics"].items():
        assert figure == pytest.approx(one["metrics"][name], abs=within), name


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_losses_weights_and_figures_are_those_of_one_process(found, name, world_size):
    within = 1e-2 if name == "bf16-mixed" else 1e-9
    assert_close(found(1, name), found(world_size, name), within)


@pytest.mark.parametrize("name", CASES)
def test_all_processes_have_the_same_loss_and_weights_to_the_last_bit(found, name):
    first = found(4, name)
    for rank in range(1, 4):
        other = found(4, name, rank)
        assert other["losses"] == first["losses"]
        assert all(torch.equal(other["weights"][k], w) for k, w in first["weights"].items())
        assert all(first["metrics"][k] == figure for k, figure in other["metrics"].items())


def test_the_cases_learn_and_differ(found):
    """What is compared above moves, and the line search is asked more than once a step."""
    last = {name: found(1, name)["losses"][-1] for name in CASES}
    assert len(set(last.values())) >= len(last) - 2
    assert len(found(1, "lbfgs")["losses"]) > 2 * len(found(1, "plain")["losses"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_same_weights_are_tested_to_the_same_accuracy(found, world_size):
    one, other = (found(w, "unmoved-float32")["metrics"] for w in (1, world_size))
    assert other["test/accuracy"] == one["test/accuracy"]
    assert other["test/loss"] == pytest.approx(one["test/loss"], rel=1e-6)
    assert other["test/brier_score"] == pytest.approx(one["test/brier_score"], rel=1e-6)


def test_a_loader_that_does_not_tell_its_shares_is_asked_for_them(found):
    assert_close(found(1, "plain"), found(2, "unknown-sizes"), 1e-9)


def test_shares_are_joined_in_order_whatever_their_type_and_layout(found):
    for rank, places in enumerate(torch.arange(10.0).split([3, 2, 3, 2])):
        joined = found(4, "joined", rank)
        assert joined["same"] and joined["contiguous"]
        assert joined["gradient"] == places.tolist()
        assert joined["sizes"] == [3, 2, 3, 2]


# ---- random numbers ------------------------------------------------------------------------------


def test_each_process_draws_its_own_dropout(found):
    states = [found(4, "dropout", rank)["random_states"][0] for rank in range(4)]
    # The first one's numbers are those of a run of one process.
    assert torch.equal(states[0], stream(0, "dropout", 0, 0, 0).get_state())
    assert torch.equal(states[0], found(1, "dropout")["random_states"][0])
    assert len({tuple(state.tolist()) for state in states}) == 4
    assert torch.equal(states[1], found(2, "dropout", 1)["random_states"][0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_with_as_many_processes_to_the_last_bit(found, world_size):
    for rank in range(world_size):
        whole, resumed = (found(world_size, n, rank) for n in ("dropout", "dropout-resumed"))
        assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
        assert 0 < len(resumed["losses"]) < len(whole["losses"])
        assert all(torch.equal(resumed["weights"][k], w) for k, w in whole["weights"].items())
        assert resumed["metrics"] == whole["metrics"]
        for before, after in zip(
            reversed(whole["random_states"]), reversed(resumed["random_states"]), strict=False
        ):
            assert torch.equal(before, after)


def test_a_run_of_one_process_goes_on_with_two(found):
    """In the middle of an epoch, whose figures are of all its batches."""
    whole, resumed = found(1, "whole"), found(2, "from-one")
    assert len(resumed["losses"]) == 4
    assert_close(whole | {"losses": whole["losses"][-4:]}, resumed, 1e-9)


def test_a_run_of_two_processes_goes_on_with_one(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = {"world_size": 1, "rank": 0, "folder": tmp_path}
    train("plain", resume_from=found.folder / "2" / "middle.ckpt", **place)
    whole, resumed = found(2, "whole"), torch.load(tmp_path / "plain.0.pt", weights_only=True)
    assert len(resumed["losses"]) == 4
    assert largest_difference(whole["losses"][-4:], resumed["losses"]) <= 1e-9
    for name, figure in whole["metrics"].items():
        assert resumed["metrics"][name] == pytest.approx(figure, abs=1e-9)
    train("dropout", *DROPOUT, resume_from=found.folder / "2" / "dropout.ckpt", **place)
    resumed = torch.load(tmp_path / "dropout.0.pt", weights_only=True)
    assert torch.equal(resumed["random_states"][0], found(2, "dropout")["random_states"][-4])


def test_a_process_that_was_not_there_before_gets_random_numbers_of_its_own(found):
    first, second = (found(2, "dropout-from-one", rank)["random_states"][0] for rank in (0, 1))
    assert torch.equal(first, found(1, "dropout")["random_states"][-4])
    assert not torch.equal(first, second)
    again = found(2, "dropout-from-one-again", 1)["random_states"][0]
    assert torch.equal(second, again)
    assert not torch.equal(second, found(2, "dropout", 1)["random_states"][0])
    # Those that it would have had, had it been there all the time.
    assert torch.equal(second, found(2, "dropout", 1)["random_states"][-4])


# ---- a loss that is no number --------------------------------------------------------------------


def test_a_share_whose_own_loss_is_none_does_not_stop_a_sound_batch(found):
    losses = found(2, "ignored")["losses"]
    assert len(losses) == len(found(2, "plain")["losses"])
    assert all(map(math.isfinite, losses))


def test_the_process_whose_share_is_bad_keeps_it(found):
    told = [found(2, "pictures", rank) for rank in (0, 1)]
    assert told[0] == told[1]
    assert "The loss became nan at step 2 (epoch 1, batch 2)" in told[0]
    step = read_step(found.folder / "2" / "checkpoints" / "pictures" / "step.pt")
    assert not step.content["images"].isfinite().all()
    assert len(step.content["images"]) == 26
    assert is_reproduced(step, replay(step))


def test_a_loss_that_only_all_shares_together_give_is_kept_by_the_first(found):
    assert "The loss became inf at step 2" in found(2, "together", 1)
    step = read_step(found.folder / "2" / "checkpoints" / "together" / "step.pt")
    assert math.isfinite(step.content["loss"])
    assert len(step.content["images"]) == 25
    assert "all 2 processes" in suggest(step, replay(step))
