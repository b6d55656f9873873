"""Every loss, optimizer, schedule and experiment in a real training, by its name."""

from pathlib import Path

import pytest
import torch

from research.configuration.schema import known_classes, resolve
from research.training import fit
from tests.benchmarks.every_name import runs

pytestmark = pytest.mark.slow

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
NEEDED = {
    "CyclicLR": ["base_lr", "1e-3", "max_lr", "1e-2"],
    "ExponentialLR": ["gamma", "0.9"],
    "LambdaLR": ["lr_lambda", "tests.test_names.halve"],
    "MultiplicativeLR": ["lr_lambda", "tests.test_names.halve"],
    "MultiStepLR": ["milestones", "[1]"],
    "StepLR": ["step_size", "1"],
    "CosineAnnealingWarmRestarts": ["T_0", "1"],
}
# These are made of other schedules, and refused with a sentence.
REFUSED = {"ChainedScheduler", "SequentialLR"}


def halve(epoch: int) -> float:
    return 0.5**epoch


@pytest.mark.parametrize(("name", "settings"), list(runs()), ids=lambda value: str(value)[:40])
def test_name_trains_above_chance(small, name, settings):
    base = ["--data", "Synthetic", "--data.num_train", "4000", "--data.num_test", "1000"]
    # Batch norm lets one learning rate serve drawn and real pictures alike.
    network = ["--model.network.activation", "ReLU", "--model.network.normalization", "BatchNorm2d"]
    result = fit(small(*settings, *network, "--trainer.max_epochs", "3", base=base))
    assert result.metrics["test/accuracy"] > 0.15  # chance: 0.1, give or take 0.01


@pytest.mark.parametrize("name", sorted(known_classes("lr_scheduler")))
def test_schedule_trains_by_name(small, name):
    given = NEEDED.get(name, [])
    keys = [f"--lr_scheduler.{word}" if i % 2 == 0 else word for i, word in enumerate(given)]
    arguments = ["--lr_scheduler", name, *keys, "--optimizer.momentum", "0.9"]
    if name in REFUSED:
        with pytest.raises(ValueError, match="made of other schedules"):
            fit(small(*arguments))
        return
    result = fit(small(*arguments))
    assert len(result.history) == 2


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_experiment_runs_for_a_step(small, file):
    """On drawn pictures, which are there; batch size and augmentation are the experiment's own."""
    recipe = resolve(["--config", str(file)]).arguments("data")
    common = ("batch_size", "crop_padding", "horizontal_flip", "cutout", "alternating_flip")
    data = ["--data", "Synthetic", *(f"--data.{name}={recipe[name]}" for name in common)]
    result = fit(small("--config", str(file), *data, "--trainer.fast_dev_run", "1", base=[]))
    assert result.metrics["test/loss"] > 0


@pytest.mark.parametrize("network", ["CNN", "ResNet9", "torchvision.models.resnet18"])
def test_network_compiles_and_keeps_clean_names(small, network):
    arguments = ["--model.network", network, "--model.compile", "true", "--data.batch_size", "32"]
    base = ["--data", "Synthetic", "--data.num_train", "72", "--data.num_test", "64"]
    result = fit(small(*arguments, "--trainer.max_epochs", "1", base=base))
    state = torch.load(result.best_checkpoint, weights_only=True)["state_dict"]
    assert all(name.startswith("network.") and "_orig_mod" not in name for name in state)
