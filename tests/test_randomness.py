"""Runs with the same seeds draw the same numbers, whatever else they draw; their tags say so."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from torch import nn

from research.building import build_classifier, build_data, build_network
from research.configuration.compose import ConfigurationError
from research.configuration.schema import resolve
from research.data.augmentation import Augmentation
from research.data.kept import Kept
from research.data.normalization import normalize
from research.data.streams import stream
from research.data.synthetic import Synthetic
from research.faults.nonfinite import NonFiniteLoss
from research.losses import ClassificationLoss
from research.randomness import Seeds, drawing_from, seeds, seeds_of
from research.recording.identity import (
    hash_batches,
    hash_weights,
    hashes_of_beginning,
    parameters_of,
)
from research.together.training import fit_together
from research.tracking.runs import find_run
from research.training import fit
from tests.conftest import SMALL
from tests.test_capture import ASKED, Diverging, graphs  # noqa: F401  (a fixture)
from tests.test_epoch_loop import FEW
from tests.test_resume import begin, go_on, stopped
from tests.test_together import EXACT, assert_same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy

PARTS = ("weights", "order", "augmentation", "dropout")
DROPPING = [
    *("--model.network.dropout", "0.5", "--data.crop_padding", "2", "--data.cutout", "4"),
    *("--data.horizontal_flip", "true", "--data.num_train", "100", "--data.batch_size", "32"),
    *("--data.image_size", "16", "--trainer.limit_test_batches", "0"),
]
BATCHES = 3  # of an epoch, of 30 pictures each


class _NoisyLoss(ClassificationLoss):  # other tests train with every loss that has a public name
    """Draws when it is made, and each time it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1 + random.randrange(3)))
        self.numpy = np.random.rand()

    def compute(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        noise = 0.01 * torch.randn_like(scores) * self.weight.sum()
        return nn.functional.cross_entropy(scores + noise, labels)


class NoisySGD(torch.optim.SGD):
    """Draws when it is made, and at each step another number of times."""

    def __init__(self, params, lr: float = 0.01) -> None:
        super().__init__(params, lr)
        self.amount = torch.rand(3).sum() + random.random()
        self.steps = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"][: self.steps % 3]:
                parameter.data += 1e-4 * self.amount * torch.randn_like(parameter)
        return loss


class Witness(Callback):
    """What a training begins with, and what it draws."""

    direct = True

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.masks: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []

    def on_train_start(self, trainer, pl_module: LightningModule) -> None:
        state = pl_module.network.state_dict()
        self.weights = {name: tensor.clone() for name, tensor in state.items()}
        for module in pl_module.network.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(self.note)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append((batch[0].clone(), batch[1].clone()))
        self.states.append(torch.get_rng_state())

    def note(self, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if module.training:
            assert (inputs[0] != 0).all()
            self.masks.append(output != 0)


def witnessed(configuration, **more) -> Witness:
    witness = Witness()
    fit(configuration, callbacks=[witness], **more)
    return witness


def equal(one, other) -> bool:
    """Whether two nests of tensors are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(equal, one, other))


# ---- the settings --------------------------------------------------------------------------------

seed = st.integers(0, 2**32 - 1)


@given(seed, st.none() | seed, *[st.none() | seed] * 4)
def test_a_part_without_a_seed_follows(everything, data, weights, order, augmentation, dropout):
    found = seeds(everything, data, weights, order, augmentation, dropout)
    of_data = everything if data is None else data
    for name, given_seed, else_seed in (
        ("weights", weights, everything),
        ("order", order, of_data),
        ("augmentation", augmentation, of_data),
        ("dropout", dropout, everything),
    ):
        assert getattr(found, name) == (else_seed if given_seed is None else given_seed)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_a_seed_that_cannot_be_is_told_before_anything_is_built(small, part, wrong):
    with pytest.raises(ConfigurationError, match=rf"^random\.{part} is {wrong}; it must be from 0"):
        fit(small(f"--random.{part}", str(wrong)))
    with pytest.raises(ConfigurationError, match=rf"random\.{part}: expected a whole number or nu"):
        small(f"--random.{part}", "first")


def test_settings_of_before_have_the_same_seeds(small, tmp_path):
    """A config.yaml, or a checkpoint's configuration, that has no `random`."""
    text = small("--seed_everything", "3").yaml()
    without = text.replace(text[text.index("random:") : text.index("experiment:")], "")
    assert "random" not in without
    (tmp_path / "old.yaml").write_text(without)
    old = resolve(["--config", str(tmp_path / "old.yaml")])
    assert seeds_of(old) == Seeds(3, 3, 3, 3)
    assert old.yaml() == text


def test_seeds_are_recorded_as_they_count(small):
    configuration = small("--seed_everything", "5", "--data.seed", "6", "--random.weights", "0")
    parameters = parameters_of(configuration, nn.Linear(1, 1))
    found = {name: parameters[f"random.{name}"] for name in PARTS}
    assert found == {"weights": 0, "order": 6, "augmentation": 6, "dropout": 5}


def test_what_draws_from_a_stream_leaves_the_others_where_they_were():
    before = torch.rand(1), random.random(), np.random.rand()
    del before
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with drawing_from(2**40):
        first = torch.rand(3), random.random(), np.random.rand()
    with drawing_from(2**40):
        again = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))


# ---- common random numbers -----------------------------------------------------------------------

HERE = "tests.test_randomness"
ARMS = {
    "another loss": ["--model.loss", "MSELoss"],
    "another optimizer": ["--optimizer", "AdamW"],
    "both": ["--model.loss", "MultiMarginLoss", "--optimizer", "Muon"],
    "a loss that draws": ["--model.loss", f"{HERE}._NoisyLoss"],
    "an optimizer that draws": ["--optimizer", f"{HERE}.NoisySGD"],
    "validation within the epoch": ["--trainer.val_check_interval", "2"],
    "sanity check": ["--trainer.num_sanity_val_steps", "2"],
    "a schedule": ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"],
}


@pytest.fixture(scope="module")
def plain():
    """A run with dropout and augmentation that the others are compared with."""
    torch.set_num_threads(1)
    return witnessed(resolve([*SMALL, *DROPPING, "--tracking_uri", ""]))


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
def test_arms_differ_only_in_what_was_changed(small, plain, arm):
    """Weights, pictures, their order, crops and the masks of dropout, in every step."""
    witness = witnessed(small(*DROPPING, *arm))
    assert len(witness.batches) == 2 * BATCHES and len(witness.masks) == 2 * len(witness.batches)
    for part in ("weights", "batches", "masks", "states"):
        assert equal(getattr(witness, part), getattr(plain, part)), part
    assert not equal(witness.masks[0], witness.masks[2])  # each batch its own


@pytest.mark.parametrize("network", [["activation", "PReLU"], ["normalization", "BatchNorm2d"]])
def test_other_layers_leave_the_masks_of_dropout(small, plain, network):
    witness = witnessed(small(*DROPPING, f"--model.network.{network[0]}", network[1]))
    assert equal(witness.masks, plain.masks)
    assert not equal(witness.weights, plain.weights)  # it has more of them


def test_a_line_search_begins_each_batch_alike(small, plain):
    witness = witnessed(small(*DROPPING, "--optimizer", "LBFGS", "--optimizer.max_iter", "3"))
    assert equal(witness.states, plain.states)
    assert len(witness.masks) > len(plain.masks)


def test_seeds_come_to_what_they_came_to_before(small, plain):
    """Weights are those after `torch.manual_seed`, order and crops those of their own streams."""
    configuration = small(*DROPPING)
    data = build_data(configuration)
    torch.manual_seed(0)
    assert equal(plain.weights, build_network(configuration, data).state_dict())
    train = data.splits.train
    order = torch.randperm(len(train), generator=stream(0, "order", 0))
    offsets = torch.randint(5, (len(train), 2), generator=stream(0, "crop", 0))
    flips = torch.rand(len(train), generator=stream(0, "flip", 0)) < 0.5
    size = len(plain.batches[0][1])
    assert torch.equal(plain.batches[0][1], train.labels[order[:size]])
    drawn = data.augmentation.draw(len(train), 16, 16, 0, 0, order)
    assert torch.equal(drawn.offsets, offsets) and torch.equal(drawn.flips, flips)
    expected = data.augmentation(
        train.pixels[order[:size]], drawn[:size], data.normalization.color()
    )
    images = normalize(expected, *data.normalization.factors(16)).permute(0, 3, 1, 2)
    assert torch.equal(plain.batches[0][0], images)
    for batch, state in enumerate(plain.states):
        place = stream(0, "dropout", 0, batch // BATCHES, batch % BATCHES)
        assert torch.equal(state, place.get_state())


@pytest.mark.parametrize("part", PARTS)
def test_a_seed_of_a_part_changes_that_part_alone(small, plain, monkeypatch, part):
    drawn = []
    own = Augmentation.draw
    noted = lambda *a, **k: drawn.append(own(*a, **k)) or drawn[-1]  # noqa: E731
    monkeypatch.setattr(Augmentation, "draw", noted)

    def parts(witness):
        crops = [
            (each.offsets, each.flips, each.centers) for each in drawn if each.offsets is not None
        ]
        drawn.clear()
        labels = [labels for _, labels in witness.batches]
        whole = {"weights": witness.weights, "order": labels, "augmentation": crops}
        return whole | {"dropout": witness.masks}

    before = parts(witnessed(small(*DROPPING, "--seed_everything", "0")))
    assert equal(before["dropout"], plain.masks)
    changed = parts(witnessed(small(*DROPPING, f"--random.{part}", "7")))
    for name in PARTS:
        assert equal(before[name], changed[name]) == (name != part), name
    # What it changes to is what a run of that seed has; the split is the one of `data.seed`.
    others = [f for name in PARTS if name != part for f in (f"--random.{name}", "0")]
    typed = ["--seed_everything", "7", "--data.seed", "0", *others, f"--random.{part}", "7"]
    assert all(map(equal, parts(witnessed(small(*DROPPING, *typed))).values(), changed.values()))


def test_a_run_that_goes_on_draws_as_if_it_had_never_stopped(small, tmp_path):
    """In the middle of an epoch, with a loss and an optimizer that draw."""
    noisy = [*ARMS["a loss that draws"], *ARMS["an optimizer that draws"]]
    file = tmp_path / "middle.ckpt"

    class Save(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 1):
                trainer.save_checkpoint(file)

    ends = []

    class End(Callback):
        def on_train_end(self, trainer, pl_module):
            ends.append({k: v.clone() for k, v in pl_module.network.state_dict().items()})

    class Counted(Callback):  # the optimizer's own count, which no state of it has
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].steps = trainer.global_step

    whole, again = Witness(), Witness()
    fit(small(*DROPPING, *noisy), callbacks=[whole, Counted(), End(), Save()])
    fit(small(*DROPPING, *noisy), callbacks=[again, Counted(), End()], resume_from=file)
    assert equal(again.masks, whole.masks[-len(again.masks) :]) and len(again.masks) == 2 * 2
    assert equal(ends[0], ends[1])


def test_a_checkpoint_without_random_states_goes_on_with_the_same_masks(small, plain, tmp_path):
    """As one of before: what a batch draws needs no state."""
    fit(small(*DROPPING, "--trainer.max_epochs", "1", "--run_name", "first"))
    file = tmp_path / "checkpoints" / "first" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    del content["random_state"]
    torch.save(content, tmp_path / "old.ckpt")
    resumed = witnessed(small(*DROPPING), resume_from=tmp_path / "old.ckpt")
    assert equal(resumed.masks, plain.masks[len(plain.masks) // 2 :])


# ---- many at once, and as graphs -----------------------------------------------------------------


def test_members_with_one_seed_have_the_dropout_of_each_alone(small):
    arms = [[], ["--model.loss", "MSELoss", "--optimizer", "AdamW"], ["--random.order", "4"]]
    configurations = [small(*EXACT, "--model.network.dropout", "0.3", *arm) for arm in arms]
    for result, configuration in zip(fit_together(configurations), configurations, strict=True):
        assert_same(result, fit(configuration), tolerance=1e-3)


def test_members_with_seeds_of_their_own_repeat(small):
    shared = [*EXACT, "--model.network.dropout", "0.3", "--data.seed", "0", "--random.weights", "0"]
    runs = [
        fit_together([small(*shared, "--random.dropout", each) for each in ("0", "1")])
        for _ in range(2)
    ]
    losses = [[result.metrics["train/loss"] for result in run] for run in runs]
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


@pytest.mark.usefixtures("graphs")
def test_captured_steps_that_are_done_again_draw_again(small, monkeypatch, tmp_path):
    """The step before a loss of NaN, with dropout: as it is without graphs."""
    kept = []
    for asked in (ASKED, []):
        folder = tmp_path / str(len(asked))
        with monkeypatch.context() as patched:
            Diverging(patched, 12)
            with pytest.raises(NonFiniteLoss, match="at step 12 "):
                arguments = ["--model.network.dropout", "0.5", "--data.val_fraction", "0"]
                place = ["--trainer.default_root_dir", str(folder), "--data.num_train", "144"]
                fit(small(*FEW, *arguments, *place, *asked))
        kept.append(torch.load(next(folder.rglob("step.pt")), weights_only=True))
    assert equal(kept[0]["state_dict"], kept[1]["state_dict"])
    assert equal(kept[0]["random_state"], kept[1]["random_state"])


# ---- hashes --------------------------------------------------------------------------------------


KEPT = Kept(most=3)


def hashes(configuration) -> tuple[str, str]:
    data = build_data(configuration, KEPT)
    return hash_weights(build_classifier(configuration, data).network), hash_batches(data)


def test_hashes_tell_what_arms_have_in_common(small):
    begun = hashes(small(*DROPPING))
    for same in (
        *ARMS.values(),
        ["--random.dropout", "7"],
        ["--model.channels_last", "false"],
        ["--model.compile", "true"],
        ["--trainer.precision", "64-true", "--trainer.devices", "4", "--trainer.max_epochs", "1"],
        ["--model.network.dropout", "0.1"],
    ):
        assert hashes(small(*DROPPING, *same)) == begun, same
    for other in (["--random.weights", "7"], ["--model.network.hidden", "9"]):
        weights, batches = hashes(small(*DROPPING, *other))
        assert weights != begun[0] and batches == begun[1], other
    for other in (
        *(["--random.order", "7"], ["--random.augmentation", "7"], ["--data.seed", "7"]),
        *(["--data.batch_size", "48"], ["--data.cutout", "5"], ["--data.normalize", "false"]),
        *(["--data.val_fraction", "0.2"], ["--data.picture_seed", "1"]),
    ):
        weights, batches = hashes(small(*DROPPING, *other))
        assert weights == begun[0] and batches != begun[1], other
    assert begun[0] != hashes(small(*DROPPING, "--seed_everything", "7"))[0]


def test_weights_have_the_same_hash_wherever_and_however_they_lie():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU())
    known = hash_weights(network)
    assert hash_weights(network.to(memory_format=torch.channels_last)) == known
    network.compile()
    assert hash_weights(network) == known
    network[0].weight.data = (
        network[0].weight.data.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    )
    assert hash_weights(network) == known
    for change in (
        lambda: network[0].weight.data[3, 2, 2, 2].neg_(),
        lambda: network[1].num_batches_tracked.add_(1),
        lambda: network.to(torch.bfloat16),
        lambda: setattr(network[2], "weight", nn.Parameter(network[2].weight.data[None])),
        lambda: network.append(nn.PReLU()),
    ):
        change()
        assert hash_weights(network) != known
        known = hash_weights(network)


def test_first_batches_are_those_that_the_network_sees(small):
    """Asking for them disturbs neither the loader nor any generator."""
    data = build_data(small(*DROPPING, "--random.order", "3"))
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    found = list(data.first_batches(3, 20))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    loader = data.train_dataloader()
    hash_batches(data)
    for (size, pixels, labels), (images, all_labels) in zip(found, loader, strict=False):
        assert size == len(images) and len(pixels) == 20
        assert torch.equal(labels, all_labels[:20])
        seen = normalize(pixels, *data.normalization.factors(16)).permute(0, 3, 1, 2)
        assert torch.equal(seen, images[:20])
    assert len(found) == 3 and loader.state_dict()["epoch"] == 0


def test_nothing_is_said_of_batches_that_a_data_set_makes_by_itself():
    class _Own(Synthetic):  # not one to be chosen by its name
        def train_dataloader(self):
            return super().train_dataloader()

    data = _Own(num_train=20, num_test=10, image_size=8)
    assert hashes_of_beginning(nn.Linear(1, 1), data).keys() == {"initial_weights"}


@pytest.mark.slow
def test_run_is_tagged_at_its_beginning_and_keeps_that(recorder, uri, small):
    arguments = [*DROPPING, "--optimizer.momentum", "0.9"]
    expected = dict(
        zip(("initial_weights", "first_batches"), hashes(small(*arguments)), strict=True)
    )
    name = stopped(recorder, uri, 1, 1, *arguments)
    for end in (lambda: None, lambda: go_on(recorder, uri, name)):
        end()
        run = find_run(uri, name)
        assert {tag: run.tags[tag] for tag in expected} == expected
    other = begin(recorder, uri, *DROPPING, "--model.loss", "MSELoss", "--random.augmentation", "2")
    run = find_run(uri, other.run_id)
    assert run.tags["initial_weights"] == expected["initial_weights"]
    assert run.tags["first_batches"] != expected["first_batches"]
    file = Path(other.best_checkpoint).with_name("last.ckpt")
    longer = ["--trainer.max_epochs", "4", "--tracking_uri", uri, "--log_pictures", "false"]
    begun = fit(small(*DROPPING, *longer, "--log_model", "false"), recorder, resume_from=file)
    assert not expected.keys() & find_run(uri, begun.run_id).tags.keys()  # not its beginning
