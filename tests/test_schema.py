"""The configuration as a user meets it: what is known, what is refused and in which words."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from research.configuration.compose import CHOICES, ConfigurationError
from research.configuration.schema import known_classes, path_of, resolve
from research.fit import HELP, main, read_options

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))


def faults(*arguments):
    with pytest.raises(ConfigurationError) as caught:
        resolve(arguments)
    return caught.value.faults


def test_no_arguments_are_the_tutorial():
    tutorial = next(file for file in EXPERIMENTS if file.name == "tutorial.yaml")
    assert resolve(["--config", str(tutorial)]).yaml() == resolve().yaml()


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_experiment_loads_and_opens_with_its_claim(file):
    resolve(["--config", str(file)])
    lines = file.read_text().splitlines()
    claim = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    assert lines[0].startswith("# ")
    assert f"python -m research.fit --config experiments/{file.name}" in claim


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_whole_configuration_runs_again(file, tmp_path):
    first = resolve(["--config", str(file)])
    again = tmp_path / "config.yaml"
    again.write_text(first.yaml())
    assert resolve(["--config", str(again)]).yaml() == first.yaml()


def test_null_survives_the_way_through_a_file(tmp_path):
    first = resolve(["--optimizer", "Adafactor", "--optimizer.foreach", "false"])
    null = resolve(["--optimizer", "Adafactor", "--trainer.num_sanity_val_steps", "null"])
    for configuration in (first, null):
        file = tmp_path / "config.yaml"
        file.write_text(configuration.yaml())
        assert resolve(["--config", str(file)]).yaml() == configuration.yaml()


@pytest.mark.parametrize("key", CHOICES)
def test_every_known_class_is_found_by_name_and_by_path(key):
    known = {
        name: found
        for name, found in known_classes(key).items()
        # Not one that another test made up.
        if getattr(sys.modules[found.__module__], name, None) is found
    }
    assert known
    for name, found in known.items():
        try:
            chosen = resolve([f"--{key}", name])
        except ConfigurationError as error:
            # Some schedules need an argument, and two cannot be had: nothing else may be wrong.
            told = ("is missing; give it with", "is made of other schedules")
            assert all(line.startswith(key) for line in error.faults)
            assert all(any(words in line for words in told) for line in error.faults)
            continue
        assert chosen.classes[key] is found
        assert resolve([f"--{key}", path_of(found)]).classes[key] is found


def test_known_classes_are_all_of_torch():
    optimizers = {
        name
        for name, member in vars(torch.optim).items()
        if isinstance(member, type) and member is not torch.optim.Optimizer
    }
    assert optimizers <= set(known_classes("optimizer"))
    assert {"OneCycleLR", "ReduceLROnPlateau", "LinearWarmupCosineAnnealingLR"} <= set(
        known_classes("lr_scheduler")
    )


def test_choosing_another_optimizer_leaves_nothing_of_the_first(tmp_path):
    file = tmp_path / "adamw.yaml"
    settings = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.5, "weight_decay": 0.7}}}
    file.write_text(yaml.dump(settings))
    chosen = resolve(["--config", str(file), "--optimizer", "SGD"]).arguments("optimizer")
    torchs_own = torch.optim.SGD([torch.zeros(1, requires_grad=True)]).defaults
    assert (chosen["lr"], chosen["weight_decay"]) == (torchs_own["lr"], torchs_own["weight_decay"])


@pytest.mark.parametrize(
    ("arguments", "start", "part"),
    [
        (
            ["--model.loss", "MSELos"],
            'model.loss: there is no loss "MSELos"; did you mean MSELoss? Known: BCELoss, ',
            "TripletMarginWithDistanceLoss.",
        ),
        (
            ["--optimizer", "sgd"],
            'optimizer: there is no optimizer "sgd"; did you mean SGD?',
            "Muon",
        ),
        (["--model.network", "VGG"], 'model.network: there is no network "VGG"', "torchvision"),
        (["--data", "CIFAR"], 'data: there is no data set "CIFAR"; did you mean CIFAR10?', "Synth"),
        (["--model.loss", "no.such.Loss"], "model.loss: no.such.Loss cannot be imported", ""),
        (
            ["--optimizer.momentm", "1"],
            'optimizer.momentm: SGD has no argument "momentm"; did you mean momentum? It has lr, ',
            "",
        ),
        (["--optimizer.lr", "fast"], 'optimizer.lr: expected a number; came "fast".', ""),
        (["--seed_everything", "1.5"], "seed_everything: expected a whole number; came", ""),
        (
            ["--sed_everything", "1"],
            "sed_everything: there is no such setting; did you mean seed_everything?",
            "--full_help",
        ),
        (["--trainer.max_epoch", "1"], "trainer.max_epoch: there is no such", "max_epochs?"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs: expected a whole number or null", "x"),
        (["--trainer.precision", "17"], "trainer.precision: expected one of 64, 32,", "bf16-mixed"),
        (["--lr_scheduler", "StepLR"], "lr_scheduler.step_size is missing", "--lr_scheduler.step_"),
        (["--data.horizontal_flip", "maybe"], "data.horizontal_flip: expected true or false", ""),
        (["--model", "CNN"], "model: a value came where its settings belong", ""),
    ],
)
def test_fault_is_told_in_one_or_two_sentences(arguments, start, part):
    told = faults(*arguments)
    assert len(told) == 1
    assert told[0].startswith(start)
    assert part in told[0]
    assert "\n" not in told[0]


def test_full_help_tells_every_option_and_every_setting(capsys):
    assert main(["--full_help"]) == 0
    told = capsys.readouterr().out
    listed = set(re.findall(r"^ *(--[\w.]+)", told, re.MULTILINE))
    short = set(re.findall(r"^  (--[a-z_.]+) ", HELP, re.MULTILINE))
    options, _ = read_options([])
    plain = [key for key in resolve().flat() if not key.startswith(CHOICES)]
    assert {f"--{key}" for key in (*vars(options), *plain)} <= listed
    assert {"--seeds", "--trust", "--optimizer", "--scale_lr"} <= short
    assert {*short, "--config", "--print_config"} <= listed
    assert "adapt=None" in told  # of torchvision's networks


def test_all_faults_are_told_together():
    told = faults(
        *("--model.loss", "MSELos", "--optimizer.lr", "fast", "--optimizer.momentum", "slow"),
        *("--sed", "1", "--trainer.max_epochs", "x", "--data.batch_sice", "3"),
    )
    keys = [
        "model.loss",
        "optimizer.lr",
        "optimizer.momentum",
        "sed",
        "trainer.max_ep",
        "data.batch_s",
    ]
    assert len(told) == len(keys)
    assert all(any(line.startswith(key) for line in told) for key in keys)


def test_callbacks_are_given_as_lightning_takes_them():
    configuration = resolve(
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    )
    (callback,) = configuration.trainer_arguments()["callbacks"]
    assert callback.monitor == "val/loss"


def test_flat_settings_are_scalars_under_the_keys_one_types():
    flat = resolve(["--model.loss", "MSELoss", "--optimizer", "AdamW"]).flat()
    assert flat["model.loss"] == "MSELoss"
    assert flat["optimizer"] == "AdamW"
    assert flat["optimizer.betas"] == "[0.9, 0.999]"
    assert all(isinstance(v, str | int | float | bool) or v is None for v in flat.values())
    assert not any("init_args" in key or "class_path" in key for key in flat)


def test_torchvision_network_takes_the_arguments_of_its_class():
    arguments = ["--model.network", "torchvision.models.resnet18", "--model.network.groups", "1"]
    assert resolve(arguments).arguments("model.network")["groups"] == 1
    told = faults(*arguments[:2], "--model.network.depth", "3")
    assert told[0].startswith('model.network.depth: resnet18 has no argument "depth"')


@pytest.mark.parametrize(("typed", "meant"), [("1", int), ("1.0", float), ("0.5", float)])
def test_a_whole_number_of_batches_is_not_a_share_of_them(typed, meant):
    limit = resolve(["--trainer.limit_train_batches", typed]).values.trainer.limit_train_batches
    assert type(limit) is meant
    assert limit == float(typed)
