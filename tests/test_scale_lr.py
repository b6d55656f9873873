"""Rates scaled with the number of processes: exactly by the factor, told, recorded, kept."""

import json
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from research.building import build_classifier, build_data, build_trainer
from research.configuration.compose import ConfigurationError
from research.configuration.schema import known_classes
from research.recording.identity import describe_data, hashes, parameters_of
from research.scaling import Scaling, scale_optimizer, scaling_of
from research.training import fit
from tests.conftest import SMALL
from tests.launched import launched

STEPS = 12


def halving(step: int) -> float:
    return 0.5 ** (step // 3)


# What has no default in torch, and rates other than 0 wherever the schedule has some.
ARGUMENTS = {
    "LambdaLR": {"lr_lambda": "tests.test_scale_lr.halving"},
    "MultiplicativeLR": {"lr_lambda": "tests.test_scale_lr.halving"},
    "StepLR": {"step_size": "2"},
    "MultiStepLR": {"milestones": "[2,5]"},
    "ExponentialLR": {"gamma": "0.8"},
    "CosineAnnealingLR": {"eta_min": "0.003"},
    "CosineAnnealingWarmRestarts": {"T_0": "3", "eta_min": "0.003"},
    "CyclicLR": {"base_lr": "0.001", "max_lr": "0.01", "step_size_up": "3"},
    "OneCycleLR": {"max_lr": "0.3"},
    "LinearWarmupCosineAnnealingLR": {"warmup_steps": "3", "eta_min": "0.003"},
    # The smallest change it makes, `eps`, is a rate too: 0.0125 -> 0.00625 is not made.
    "ReduceLROnPlateau": {"patience": "0", "factor": "0.5", "min_lr": "0.001", "eps": "0.007"},
}
COMPOSED = {"SequentialLR", "ChainedScheduler"}
SCHEDULES = sorted(set(known_classes("lr_scheduler")) - COMPOSED)


def flags(name, **arguments):
    typed = ["--lr_scheduler", name]
    for key, value in {**ARGUMENTS.get(name, {}), **arguments}.items():
        typed += [f"--lr_scheduler.{key}", value]
    return typed


def classifier_of(configuration):
    return build_classifier(configuration, build_data(configuration))


def rates_over_a_run(classifier, factor):
    """The rate of each group at each step of a run of `STEPS` steps, and after the last."""
    classifier.lr_factor = factor
    optimizer = classifier.build_optimizer()
    scheduler = classifier.build_lr_scheduler(optimizer, STEPS, STEPS)
    rates = take_steps(classifier, optimizer, scheduler, range(STEPS))
    return torch.tensor(rates, dtype=torch.float64)


def take_steps(classifier, optimizer, scheduler, steps):
    """The rates before the first of the steps and after each; a plateau's loss gets no better."""
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for step in steps:
        for parameter in classifier.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(lambda: 0.0)
        if scheduler is not None:
            scheduler.step(*([1.0 + step] if isinstance(scheduler, ReduceLROnPlateau) else []))
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rate_of_a_run_is_exactly_the_factor_times_the_unscaled(small, name):
    classifier = classifier_of(small("--optimizer.lr", "0.1", *flags(name)))
    plain = rates_over_a_run(classifier, 1.0)
    assert (plain != plain[0]).any(), "a schedule that moves nothing tests nothing"
    for factor in (4.0, math.sqrt(2), 3.0):
        scaled = rates_over_a_run(classifier, factor)
        torch.testing.assert_close(scaled, plain * factor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(known_classes("optimizer")))
def test_every_rate_of_every_optimizer_is_scaled(small, name):
    arguments = ["--optimizer", name, "--model.decay_biases_and_norms", "false"]
    lr = [] if name == "Muon" else ["--optimizer.lr", "0.1"]
    if "weight_decay" not in known_classes("optimizer")[name].__init__.__code__.co_varnames:
        arguments = arguments[:2]
    classifier = classifier_of(small(*arguments, *lr))
    plain = rates_over_a_run(classifier, 1.0)
    assert torch.equal(rates_over_a_run(classifier, 2.0), plain * 2)
    if name == "Muon":
        assert set(plain[0].tolist()) == {0.02, 1e-3}


def test_rates_given_for_each_group_are_all_scaled(small):
    cyclic = flags("CyclicLR", base_lr="[0.001,0.002]", max_lr="[0.01,0.02]")
    classifier = classifier_of(small("--optimizer", "Muon", *cyclic))
    plain = rates_over_a_run(classifier, 1.0)
    torch.testing.assert_close(rates_over_a_run(classifier, 8.0), plain * 8, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_a_checkpoint_replace_those_that_a_process_began_with(small, name):
    classifier = classifier_of(small("--optimizer.lr", "0.1", *flags(name)))
    scaled = rates_over_a_run(classifier, 4.0)
    for factor in (4.0, 1.0):  # the first saves after a few steps, the second goes on
        classifier.lr_factor = factor
        optimizer = classifier.build_optimizer()
        scheduler = classifier.build_lr_scheduler(optimizer, STEPS, STEPS)
        if factor == 4.0:
            rates = take_steps(classifier, optimizer, scheduler, range(5))
            saved = optimizer.state_dict(), scheduler.state_dict()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    rates += take_steps(classifier, optimizer, scheduler, range(5, STEPS))[1:]
    assert torch.equal(torch.tensor(rates, dtype=torch.float64), scaled)


def test_an_open_peak_is_the_scaled_rate_of_the_optimizer(small):
    open_peak = flags("OneCycleLR", max_lr="null", pct_start="0.25")  # the peak is step 2
    configuration = small("--optimizer.lr", "0.1", *open_peak)
    plain = rates_over_a_run(classifier_of(configuration), 1.0)
    scaled = rates_over_a_run(classifier_of(configuration), 4.0)
    assert scaled.max() == pytest.approx(0.4)
    torch.testing.assert_close(scaled, plain * 4, rtol=1e-12, atol=0)


def test_a_rate_that_groups_share_as_a_tensor_is_scaled_once_for_each():
    rate = torch.tensor(0.25)
    groups = [{"params": nn.Linear(2, 2).parameters()} for _ in range(2)]
    optimizer = scale_optimizer(torch.optim.SGD(groups, lr=rate), 2.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5]
    assert float(rate) == 0.25


def test_an_optimizer_without_a_rate_is_refused():
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match="Rateless has no lr"):
        scale_optimizer(Rateless(nn.Linear(2, 2).parameters()), 2.0)


# ---- the flag ------------------------------------------------------------------------------------


def test_factor_is_the_number_of_processes_or_its_root():
    assert Scaling(None, 4).factor == 1
    assert Scaling("linear", 4).factor == 4
    assert Scaling("sqrt", 4).factor == 2


def test_off_by_default_and_only_two_rules_are_known(small):
    assert small().values.scale_lr is None
    assert small("--scale_lr", "null").values.scale_lr is None
    with pytest.raises(ConfigurationError, match=r"scale_lr: expected one of linear, sqrt"):
        small("--scale_lr", "squared")


def test_line_names_every_rate(small):
    plain = classifier_of(small("--optimizer.lr", "0.1"))
    assert Scaling(None, 4).described(plain, None, 4) is None
    for rule, told in {
        "linear": "learning rate 0.1 x 4 processes = 0.4 (--scale_lr linear)",
        "sqrt": "learning rate 0.1 x sqrt(4 processes) = 0.2 (--scale_lr sqrt)",
    }.items():
        scaling = Scaling(rule, 4)
        plain.lr_factor = scaling.factor
        assert scaling.described(plain, rule, 4) == told
    muon = classifier_of(small("--optimizer", "Muon", *flags("CosineAnnealingLR")))
    muon.lr_factor = 2.0
    assert Scaling("linear", 2).described(muon, "linear", 2) == (
        "learning rate 0.02, 0.001 x 2 processes = 0.04, 0.002 (--scale_lr linear), "
        "lr_scheduler.eta_min = 0.006"
    )


def test_record_has_the_effective_rate_and_the_factor(small):
    network = nn.Linear(2, 2)
    plain = parameters_of(small("--optimizer.lr", "0.1"), network)
    assert "learning_rate.factor" not in plain and plain["Learning rate"] == 0.1
    scaled = parameters_of(small("--optimizer.lr", "0.1", "--scale_lr", "linear"), network, 4.0)
    assert scaled["scale_lr"] == "linear"
    assert scaled["learning_rate.factor"] == 4.0
    assert scaled["Learning rate"] == pytest.approx(0.4)
    assert scaled["optimizer.lr"] == 0.1


def test_runs_that_differ_in_the_factor_are_no_repeats(small):
    configuration = small("--scale_lr", "linear")
    inputs = describe_data(build_data(configuration))
    one, other = (hashes(configuration, inputs, factor) for factor in (2.0, 4.0))
    assert one["fingerprint"] != other["fingerprint"]
    assert one["fingerprint.configuration"] == other["fingerprint.configuration"]
    assert hashes(configuration, inputs) == hashes(configuration, inputs, 1.0)


def test_number_of_processes_is_known_before_they_start(small):
    assert build_trainer(small("--trainer.devices", "3"), []).world_size == 3


# ---- a training ----------------------------------------------------------------------------------


def rates_of(result):
    return [epoch["learning_rate"] for epoch in result.history]


def checkpoint_of(tmp_path, name):
    return tmp_path / "checkpoints" / name / "last.ckpt"


def begun_by(processes, monkeypatch):
    """Has `fit` believe that this many processes begin; one of them trains."""
    monkeypatch.setattr(
        "research.training.scaling_of",
        lambda asked, _, checkpoint: scaling_of(asked, processes, checkpoint),
    )


def test_a_run_goes_on_at_the_rates_it_began_with(small, tmp_path, monkeypatch, capfd):
    typed = ["--optimizer.lr", "0.01", *flags("CosineAnnealingLR", T_max="4")]
    typed += ["--checkpoint.save_last", "true"]
    plain = fit(small(*typed, "--trainer.max_epochs", "4"))
    assert "--scale_lr" not in capfd.readouterr().err

    typed += ["--scale_lr", "linear"]
    with monkeypatch.context() as patched:
        begun_by(4, patched)
        fit(small(*typed, "--run_name", "begun"))
        told = capfd.readouterr().err
    assert "learning rate 0.01 x 4 processes = 0.04 (--scale_lr linear)" in told
    assert "lr_scheduler.eta_min = 0.012" in told

    begun = checkpoint_of(tmp_path, "begun")
    resumed = fit(small(*typed, "--trainer.max_epochs", "4"), resume_from=begun)
    told = capfd.readouterr().err
    assert "x 4 processes = 0.04" in told and "keeps these rates with 1 process" in told
    assert rates_of(resumed) == pytest.approx([4 * rate for rate in rates_of(plain)], rel=1e-6)


def test_a_run_that_began_unscaled_stays_so(small, tmp_path, capfd):
    typed = ["--optimizer.lr", "0.01", "--checkpoint.save_last", "true"]
    fit(small(*typed, "--trainer.max_epochs", "1", "--run_name", "begun"))
    begun = checkpoint_of(tmp_path, "begun")
    resumed = fit(small(*typed, "--scale_lr", "linear"), resume_from=begun)
    assert "--scale_lr linear has no effect" in capfd.readouterr().err
    assert rates_of(resumed) == pytest.approx([0.01, 0.01])


def test_one_process_trains_as_without_the_flag(small, capfd):
    assert fit(small("--scale_lr", "sqrt")).metrics == fit(small()).metrics
    assert "x sqrt(1 process) = " in capfd.readouterr().err


SCRIPT = """
import json, os
from research.configuration.schema import resolve
from research.training import fit

result = fit(resolve(json.loads(os.environ["TYPED"])))
print(json.dumps([epoch["learning_rate"] for epoch in result.history]))
"""


@pytest.mark.devices
def test_two_processes_train_at_twice_the_rate_and_one_goes_on_at_it(small, tmp_path, capfd):
    typed = [*SMALL, "--tracking_uri", "", "--checkpoint.save_last", "true"]
    typed += ["--optimizer.lr", "0.01", *flags("CosineAnnealingLR", T_max="4")]
    plain = fit(small(*typed, "--trainer.max_epochs", "4"))
    typed += ["--scale_lr", "linear"]
    begun = [*typed, "--trainer.devices", "2", "--run_name", "begun"]
    environment = {"TYPED": json.dumps(begun)}
    outcomes = launched(2, SCRIPT, tmp_path / "two", environment=environment)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    for rank, outcome in enumerate(outcomes):
        rates = json.loads(outcome.out.splitlines()[-1])
        assert rates == pytest.approx([2 * rate for rate in rates_of(plain)[:2]], rel=1e-6)
        told = "learning rate 0.01 x 2 processes = 0.02 (--scale_lr linear)" in outcome.err
        assert told == (rank == 0)

    capfd.readouterr()
    checkpoint = checkpoint_of(tmp_path / "two", "begun")
    resumed = fit(small(*typed, "--trainer.max_epochs", "4"), resume_from=checkpoint)
    assert "keeps these rates with 1 process" in capfd.readouterr().err
    assert rates_of(resumed) == pytest.approx([2 * rate for rate in rates_of(plain)], rel=1e-6)
