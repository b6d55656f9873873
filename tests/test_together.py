"""Many trainings at once come to what each of them comes to by itself."""

import functools
import os
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from research.configuration.compose import ConfigurationError
from research.configuration.schema import known_classes, resolve
from research.evaluate import main as evaluate
from research.faults.nonfinite import NonFiniteLoss
from research.together import shared_epoch
from research.together.stacking import joined, may_be_stacked, refusal, stacked
from research.together.training import Seat, fit_together, groups_of, train_in_turns
from research.together.turns import Turn
from research.tracking.run import Recorder
from research.tracking.runs import find_run, open_store
from research.training import Result, fit
from tests.conftest import SMALL

EXACT = (
    *("--trainer.precision", "32-true"),  # half precision would hide what differs
    *("--data.num_train", "160", "--data.num_test", "32", "--data.image_size", "16"),
    *("--data.batch_size", "32"),
)


def content(result):
    return torch.load(result.best_checkpoint, map_location="cpu", weights_only=True)


def assert_same(together, single, tolerance=1e-4):
    """Weights, figures of every epoch and what else a checkpoint holds are those of one alone."""
    assert isinstance(together, Result), together
    one, other = content(together), content(single)
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=0, atol=tolerance)
    assert one.keys() == other.keys()
    assert one["loops"]["fit_loop"] | {"state_dict": 0} == other["loops"]["fit_loop"] | {
        "state_dict": 0
    }
    assert [epoch.keys() for epoch in together.history] == [e.keys() for e in single.history]
    timed = ("epoch_seconds", "images_per_second")
    for own, alone in zip(together.history, single.history, strict=True):
        assert {k: v for k, v in own.items() if k not in timed} == pytest.approx(
            {k: v for k, v in alone.items() if k not in timed}, rel=1e-3, abs=1e-4
        )
    assert together.metrics.keys() == single.metrics.keys()
    assert together.metrics == pytest.approx(single.metrics, rel=1e-3, abs=1e-4)
    assert together.best_epoch == single.best_epoch


# ---- the stack -----------------------------------------------------------------------------------


def networks(count=3):
    torch.manual_seed(0)
    return [
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),  # the norm takes its mean away again
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 5),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("shares_pictures", [True, False])
def test_stack_scores_and_learns_as_each_network_does(shares_pictures):
    """Scores, gradients and running statistics; ordinary optimizers move each network's weights."""
    together, alone = networks(), networks()
    pictures = torch.randn(3, 6, 3, 8, 8)
    labels = torch.randint(0, 5, (3, 6))
    if shares_pictures:
        pictures[:], labels[:] = pictures[0].clone(), labels[0].clone()
    optimizers = [torch.optim.Adam(n.parameters(), lr=0.01 * i) for i, n in enumerate(together, 1)]
    others = [torch.optim.Adam(n.parameters(), lr=0.01 * i) for i, n in enumerate(alone, 1)]
    with stacked(together) as stack:
        for _ in range(3):
            scores = stack(pictures[0] if shares_pictures else pictures)
            expected = torch.stack([n(x) for n, x in zip(alone, pictures, strict=True)])
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
            sum(map(nn.functional.cross_entropy, scores, labels)).backward()
            sum(map(nn.functional.cross_entropy, expected, labels)).backward()
            stack.share_gradients()
            for one, other in zip(together, alone, strict=True):
                gradients = [p.grad for p in one.parameters()]
                torch.testing.assert_close(
                    gradients, [p.grad for p in other.parameters()], rtol=1e-4, atol=1e-5
                )
            for optimizer in optimizers:
                optimizer.step()
            stack.zero_grad()
            for optimizer in others:
                optimizer.step()
                optimizer.zero_grad()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-3, atol=1e-4)
        assert one[1].num_batches_tracked.item() == 3


def test_networks_own_their_weights_again_after_the_stack():
    """In the memory and the memory format they had; a checkpoint holds one network, not all."""
    members = [n.to(memory_format=torch.channels_last) for n in networks()]
    places = [p.data_ptr() for n in members for p in n.parameters()]
    with stacked(members) as stack, torch.no_grad():
        stack.parameters["0.weight"] += 1
    assert [p.data_ptr() for n in members for p in n.parameters()] == places
    assert members[2][0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(members[2][0].weight, networks()[2][0].weight + 1)


def test_networks_that_know_no_stack_say_so():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            y = self.linear(x.flatten(1))
            return y if y.sum() > 0 else -y

    assert refusal([Branching(), Branching()], torch.zeros(2, 1, 2, 2)) is not None
    assert refusal(networks(2), torch.zeros(2, 3, 8, 8)) is None


def test_what_all_get_is_one():
    images = torch.zeros(4, 3, 2, 2)
    assert joined([images] * 3) is images
    assert joined([images, images.clone()]).shape == (2, 4, 3, 2, 2)


@pytest.mark.parametrize("name", sorted(known_classes("model.loss")))
def test_a_loss_that_may_be_stacked_is_each_networks_own(name):
    loss = known_classes("model.loss")[name]()
    shape = (3, 4, 5, 2, 2) if loss.per_cell else (3, 4, 5)
    scores, labels = torch.randn(shape, requires_grad=True), torch.randint(0, 5, (3, 4))
    if not may_be_stacked(loss, scores):
        assert name not in ("CrossEntropyLoss", "MSELoss")
        return
    together = torch.vmap(loss)(scores, labels)
    alone = torch.stack([loss(own, true) for own, true in zip(scores, labels, strict=True)])
    torch.testing.assert_close(together, alone)
    (one,), (other,) = (torch.autograd.grad(x.sum(), scores) for x in (together, alone))
    torch.testing.assert_close(one, other)


# ---- turns ---------------------------------------------------------------------------------------


def test_functions_take_turns_and_find_the_random_state_they_left():
    seen = []

    def draw(seed, turn):
        torch.manual_seed(seed)
        for count in range(3):
            seen.append((seed, torch.rand(1).item()))
            assert turn.ask(count) == count + 1
        return seed

    turns = [Turn(lambda turn, seed=seed: draw(seed, turn)) for seed in (1, 2)]
    asked = [turn.go_on() for turn in turns]
    for _ in range(3):
        asked = [turn.go_on(count + 1) for turn, count in zip(turns, asked, strict=True)]
    assert asked == [None, None] and [turn.result for turn in turns] == [1, 2]
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert [x for s, x in seen if s == seed] == [torch.rand(1).item() for _ in range(3)]


# ---- trainings -----------------------------------------------------------------------------------


def test_members_are_what_they_are_alone(small):
    """Other losses, optimizers, rates, schedules, seeds, clipping; the same weights and figures."""
    own = [
        ["--optimizer", "SGD", "--optimizer.lr", "0.05"],
        ["--optimizer", "AdamW", "--model.loss", "MSELoss", "--optimizer.weight_decay", "0.1"],
        ["--optimizer", "RMSprop", "--model.loss", "MSELoss", "--optimizer.lr", "0.001"],
        ["--seed_everything", "3", "--lr_scheduler", "OneCycleLR", "--lr_scheduler.max_lr", "0.01"],
        ["--optimizer", "SGD", "--lr_scheduler", "ReduceLROnPlateau", "--optimizer.lr", "0.1"],
        ["--seed_everything", "1", "--data.seed", "0", "--optimizer", "SparseAdam"],
    ]
    shared = [*EXACT, "--trainer.gradient_clip_val", "0.5", "--data.horizontal_flip", "true"]
    shared += ["--model.network.normalization", "BatchNorm2d"]
    configurations = [small(*shared, *each) for each in own]
    together = fit_together(configurations)
    for result, configuration in zip(together, configurations, strict=True):
        assert_same(result, fit(configuration), tolerance=1e-3)


def test_gradients_add_up_and_losses_of_cells_are_learnt_as_alone(small):
    shared = [
        *EXACT,
        "--model.loss",
        "CrossEntropyLoss2d",
        "--trainer.accumulate_grad_batches",
        "2",
    ]
    shared += ["--trainer.check_val_every_n_epoch", "2", "--trainer.limit_train_batches", "3"]
    configurations = [small(*shared, "--seed_everything", seed) for seed in ("0", "1")]
    for result, configuration in zip(fit_together(configurations), configurations, strict=True):
        assert_same(result, fit(configuration))


class Saves(Callback):
    """Writes a checkpoint after the second batch of the second epoch."""

    direct = True

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.save_checkpoint(self.path)


def test_members_go_on_within_an_epoch_as_each_does_alone(small, tmp_path):
    configurations = [small(*EXACT, "--seed_everything", seed) for seed in ("0", "1")]
    saved = [tmp_path / f"{place}.ckpt" for place in range(2)]
    for configuration, path in zip(configurations, saved, strict=True):
        fit(configuration, callbacks=[Saves(path)])

    def go_on(place, turn):
        seat = Seat(turn, configurations[place])
        with turn.hearing():
            return fit(configurations[place], callbacks=[seat], resume_from=saved[place])

    together = train_in_turns([functools.partial(go_on, place) for place in range(2)])
    for result, configuration, path in zip(together, configurations, saved, strict=True):
        assert_same(result, fit(configuration, resume_from=path))


def test_a_member_that_ends_leaves_the_others_going(small):
    """Pruned after its first epoch, or no number any more: the others are what they are alone."""
    configurations = [
        small(*EXACT, "--seed_everything", "1"),
        small(*EXACT, "--optimizer", "SGD", "--optimizer.lr", "1e30"),
        small(*EXACT, "--seed_everything", "2"),
        small(*EXACT, "--seed_everything", "4"),
    ]
    told = []

    def goes_on(member, figures):
        told.append((member, figures["epoch"], figures["val/accuracy"]))
        return member != 2

    first, diverged, pruned, last = fit_together(configurations, on_epoch=goes_on)
    assert isinstance(diverged, NonFiniteLoss) and "epoch 1" in str(diverged)
    assert [epoch["epoch"] for epoch in pruned.history] == [1]
    assert_same(first, fit(configurations[0]))
    assert_same(last, fit(configurations[3]))
    assert [each[:2] for each in told] == [(0, 1), (2, 1), (3, 1), (0, 2), (3, 2)]
    assert [row["val/accuracy"] for row in last.history] == [v for m, _, v in told if m == 3]


def test_whatever_cannot_be_stacked_is_trained_one_after_another(small, caplog):
    shared = [*EXACT, "--model.network", "tests.test_together.Doubtful"]
    configurations = [small(*shared, "--seed_everything", s, base=BARE) for s in ("0", "1")]
    together = fit_together(configurations)
    assert "one after another" in caplog.text
    for result, configuration in zip(together, configurations, strict=True):
        assert_same(result, fit(configuration), tolerance=0)


# ---- memory --------------------------------------------------------------------------------------

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4.00 GiB"


@pytest.fixture
def room_for(monkeypatch):
    """Memory for so many at once: a larger stack fails at its second step, half of it done."""
    sizes = []

    def room(most):
        train_epoch, step = shared_epoch.train_epoch, shared_epoch.step
        done = {}

        def counted(group, stopper):
            sizes.append(len(group))
            done.update({"steps": 0, "most": 3 * len(group) // 2 if len(group) > most else None})
            train_epoch(group, stopper)

        def narrow(member, hooks):
            if done["steps"] == done["most"]:
                raise torch.OutOfMemoryError(FULL)
            done["steps"] += 1
            step(member, hooks)

        monkeypatch.setattr(shared_epoch, "train_epoch", counted)
        monkeypatch.setattr(shared_epoch, "step", narrow)
        return sizes

    return room


@pytest.mark.parametrize(
    ("most", "tried", "words"),
    [
        (2, [4, 2, 2, 2, 2], ["full with 4 trained at once", "2 at once. With --together 2"]),
        (1, [4, 2], ["full with 2 trained at once", "one after another. With no --together"]),
    ],
)
def test_what_does_not_fit_at_once_is_trained_in_halves(
    most, tried, words, small, room_for, caplog
):
    """As if it had never been tried: momentum, schedules, norms, and what callbacks gather."""
    own = [
        ["--optimizer", "SGD", "--optimizer.momentum", "0.9"],
        ["--optimizer", "AdamW", "--data.seed", "7"],
        ["--seed_everything", "3", "--lr_scheduler", "OneCycleLR", "--lr_scheduler.max_lr", "0.01"],
        ["--seed_everything", "4"],
    ]
    shared = [*EXACT, "--model.network.normalization", "BatchNorm2d"]
    configurations = [small(*shared, *each) for each in own]
    sizes = room_for(most)
    together = fit_together(configurations)
    assert sizes == tried
    assert all(part in caplog.text for part in words)
    assert "GPU 0 is full" in caplog.text and "(2.0 GiB more were asked for)" in caplog.text
    for result, configuration in zip(together, configurations, strict=True):
        assert_same(result, fit(configuration), tolerance=1e-3)
        assert result.history[0]["gradient_norm"] > 0


def test_another_error_fails_all_who_met_it(small, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(shared_epoch, "step", fail)
    results = fit_together([small(*EXACT, "--seed_everything", s) for s in ("0", "1")])
    assert [str(result) for result in results] == ["a bug of ours"] * 2


# ---- who may be together, and what is left of it -------------------------------------------------

# SMALL without its settings of the network
BARE = [
    *("--data", "Synthetic", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
]


class Doubtful(nn.Module):
    """Its way depends on the numbers in it."""

    def __init__(self, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.linear(x.flatten(1))
        return scores if scores.abs().max() < 100 else scores / 2


def test_dropout_draws_for_each_member(small):
    """Members alike in all but the weights' seed train, and not alike."""
    shared = [*EXACT, "--model.network.dropout", "0.3", "--data.seed", "0"]
    results = fit_together([small(*shared, "--seed_everything", s) for s in ("0", "1")])
    assert results[0].metrics["train/loss"] != results[1].metrics["train/loss"]


def test_dropout_goes_on_drawing_from_epoch_to_epoch(small, monkeypatch):
    began = []
    train_epoch = shared_epoch.train_epoch

    def noted(group, stopper):
        began.append(torch.get_rng_state())
        train_epoch(group, stopper)

    monkeypatch.setattr(shared_epoch, "train_epoch", noted)
    shared = [*EXACT, "--model.network.dropout", "0.3"]
    fit_together([small(*shared, "--seed_everything", s) for s in ("0", "1")])
    assert len(began) == 2 and not torch.equal(*began)


def test_groups_hold_who_may_be_together(small):
    configurations = [
        small("--optimizer.lr", "0.1"),
        small("--model.network.widths", "[4,4,4]"),
        small("--seed_everything", "5", "--model.loss", "MSELoss", "--optimizer", "SGD"),
        small("--optimizer", "LBFGS"),
        small("--model.loss", "CrossEntropyLoss2d"),
        small("--trainer.max_epochs", "3"),
        small("--optimizer", "LBFGS"),
        small("--data.batch_size", "32"),
        small("--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"),
    ]
    assert groups_of(configurations) == [[0, 2, 8], [1], [3], [4], [5], [6], [7]]


def test_strangers_are_refused_before_anything_is_trained(small):
    with pytest.raises(ConfigurationError, match=r"differ in model\.network\.widths"):
        fit_together([small(), small("--model.network.widths", "[4,4,4]")])
    with pytest.raises(ConfigurationError, match="LBFGS"):
        fit_together([small(), small("--optimizer", "LBFGS")])
    assert not list(Path().glob("**/*.ckpt"))


def test_a_setting_that_nothing_can_be_built_from_ends_its_member_alone(small):
    results = fit_together([small(*EXACT), small(*EXACT, "--optimizer.lr", "-1")])
    assert isinstance(results[0], Result)
    assert isinstance(results[1], ConfigurationError)


def test_whoever_waits_is_ended_where_the_others_fail(small, monkeypatch):
    def fail(*_):
        raise AssertionError("a bug of ours")

    monkeypatch.setattr("research.together.training.train_epochs", fail)
    with pytest.raises(AssertionError, match="a bug of ours"):
        fit_together([small(*EXACT), small(*EXACT, "--seed_everything", "1")])
    assert not any(isinstance(thread, Turn) for thread in threading.enumerate())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy
@pytest.mark.slow
def test_the_record_is_that_of_a_single_run(tmp_path):
    """Parameters, tags, metrics, artifacts; what reads a run reads these."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recorded = [*SMALL, *EXACT, "--tracking_uri", uri]
    configurations = [resolve([*recorded, "--seed_everything", s]) for s in ("0", "1")]
    with Recorder.start() as recorder:
        together = fit_together(configurations, recorder)
        alone = [fit(configuration, recorder) for configuration in configurations]
    client = open_store(uri)
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)
        run, single = client.get_run(one.run_id), client.get_run(other.run_id)
        assert run.info.status == single.info.status == "FINISHED"
        assert run.data.params == single.data.params
        own = {"trained_together", "mlflow.runName"}
        assert run.data.tags.keys() - own == single.data.tags.keys() - own
        assert run.data.tags["trained_together"] == "2"
        for name in ("fingerprint.configuration", "fingerprint.data", "checkpoint.best", "seed"):
            assert run.data.tags[name] == single.data.tags[name]
        named = {name for name in single.data.metrics if not name.startswith("system/")}
        assert {name for name in run.data.metrics if not name.startswith("system/")} == named
        for name in named:
            steps = [
                [row.step for row in client.get_metric_history(found.info.run_id, name)]
                for found in (run, single)
            ]
            assert steps[0] == steps[1], name
        assert files_of(find_run(uri, one.run_id)) == files_of(find_run(uri, other.run_id))
    assert evaluate([together[1].run_id, "--tracking_uri", uri]) == 0


def files_of(run):
    folder = run.artifact_dir
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith("evaluations")}


def test_nothing_is_left_behind(small):
    state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    filters = list(warnings.filters)
    environment = dict(os.environ)
    fit_together([small(), small("--seed_everything", "1")])
    assert torch.equal(state, torch.get_rng_state())
    assert signal.getsignal(signal.SIGINT) is handler
    assert list(warnings.filters) == filters and dict(os.environ) == environment
    assert not any(isinstance(thread, Turn) for thread in threading.enumerate())
