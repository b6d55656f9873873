"""Every loss, optimizer, schedule and experiment in a real training, by its name."""

from pathlib import Path

import pytest

from research.configuration.schema import known_classes, resolve
from research.training import fit
from tests.benchmarks.every_name import ARGUMENTS_OF_OPTIMIZER, runs

pytestmark = pytest.mark.slow

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
NEEDED = {
    "ConstantLR": [],
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
    result = fit(small(*settings, "--trainer.max_epochs", "4", base=base))
    assert result.metrics["test/accuracy"] > 0.2


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
    """On drawn pictures, as no others are there; batch size and augmentation are its own."""
    recipe = resolve(["--config", str(file)])
    same = {k: v for k, v in recipe.arguments("data").items() if k in ("batch_size", "cutout")}
    flags = [f"--data.{key}={value}" for key, value in same.items()]
    flags += [f"--data.{k}={recipe.arguments('data')[k]}" for k in ("crop_padding",)]
    arguments = ["--config", str(file), "--data", "Synthetic", "--data.num_train", "640", *flags]
    result = fit(small(*arguments, "--trainer.fast_dev_run", "1", base=[]))
    assert result.metrics["test/loss"] > 0


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Muon"])
@pytest.mark.parametrize("network", ["CNN", "ResNet9", "torchvision.models.resnet18"])
def test_network_compiles_and_keeps_clean_names(small, network, optimizer):
    import torch

    arguments = ["--model.network", network, "--model.compile", "true", "--optimizer", optimizer]
    base = ["--data", "Synthetic", "--data.num_train", "72", "--data.num_test", "64"]
    limits = ["--trainer.max_epochs", "1", "--data.batch_size", "64"]
    result = fit(small(*arguments, *ARGUMENTS_OF_OPTIMIZER.get("x", []), *limits, base=base))
    state = torch.load(result.best_checkpoint, weights_only=True)["state_dict"]
    assert not any("_orig_mod" in name for name in state)
