"""Which strategies are taken, and what of them can be seen in one process."""

from types import SimpleNamespace

import lightning.pytorch.strategies as lightning_strategies
import pytest
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from torch import nn

from research.building import build_trainer, told_of_batch_norm
from research.configuration.compose import ConfigurationError
from research.networks import CNN, ResNet9
from research.param_groups import parameter_groups
from research.processes import sharding
from research.processes.sharding import FSDPStrategy, named, numbered, strategy_for

TWO = ("--trainer.devices", "2", "--data.batch_size", "32")


def refused(configuration) -> str:
    with pytest.raises(ConfigurationError) as error:
        build_trainer(configuration, [])
    return str(error.value)


# ---- which strategies are taken ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true"])
@pytest.mark.parametrize("optimizer", ["SGD", "Muon", "LBFGS"])
def test_strategies_with_whole_weights_are_left_alone(name, optimizer):
    assert strategy_for(name, optimizer) == name


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad", "NAdam", "Rprop", "ASGD"])
def test_fsdp_is_ours_on_any_device(small, optimizer):
    trainer = build_trainer(small("--optimizer", optimizer, *TWO, "--trainer.strategy", "fsdp"), [])
    assert type(trainer.strategy) is FSDPStrategy
    assert trainer.strategy.root_device.type == "cpu"
    assert trainer.world_size == 2


@pytest.mark.parametrize("optimizer", sharding.NEEDS_WHOLE_WEIGHTS)
def test_fsdp_refuses_optimizers_that_need_whole_weights(small, optimizer):
    told = refused(small("--optimizer", optimizer, *TWO, "--trainer.strategy", "fsdp"))
    assert told.startswith("trainer.strategy fsdp parts every weight among the processes")
    assert optimizer in told and "ddp" in told


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_3", "fsdp_cpu_offload"])
def test_strategies_whose_checkpoints_nothing_reads_are_refused_before_a_package_is_missing(
    small, name
):
    told = refused(small("--trainer.strategy", name, *TWO))
    assert told.startswith(f"trainer.strategy is {name}, which writes checkpoints that")
    assert told.endswith("Choose fsdp, which parts weights, gradients and optimizer state, or ddp.")


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy"])
def test_lightnings_own_sharded_strategies_are_refused(name):
    with pytest.raises(ValueError, match=f"trainer.strategy is {name}"):
        strategy_for(getattr(lightning_strategies, name)(), "SGD")


def test_unknown_strategy_is_told_with_those_there_are(small):
    told = refused(small("--trainer.strategy", "nonsense", *TWO))
    assert told == "trainer.strategy is nonsense; choose auto, ddp or fsdp."


def test_one_process_has_nothing_to_part(small):
    trainer = build_trainer(small("--trainer.strategy", "fsdp", "--trainer.devices", "1"), [])
    assert type(trainer.strategy) is lightning_strategies.SingleDeviceStrategy


def test_mixed_precision_rounds_what_it_rounds_in_one_process(small):
    flags = ("--trainer.strategy", "fsdp", "--trainer.precision", "bf16-mixed")
    strategy = build_trainer(small(*flags, *TWO), []).strategy
    assert isinstance(strategy.precision_plugin, FSDPPrecision)
    assert strategy.mixed_precision_config is None  # neither weights nor running statistics
    with strategy.precision_plugin.forward_context():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


# ---- the optimizer -------------------------------------------------------------------------------


def test_flat_shares_decay_as_the_weights_they_are_of():
    network = CNN(num_classes=10)
    whole = parameter_groups(network, decay_biases_and_norms=False)
    for parameter in network.parameters():
        parameter.whole_ndim = parameter.ndim
        parameter.data = parameter.data.flatten()
    shares = parameter_groups(network, decay_biases_and_norms=False)
    assert [len(group["params"]) for group in shares] == [len(group["params"]) for group in whole]
    for one, other in zip(shares, whole, strict=True):
        assert all(a is b for a, b in zip(one["params"], other["params"], strict=True))


def test_numbers_and_names_of_an_optimizer_in_two_groups_lead_to_each_other():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(parameter_groups(module, decay_biases_and_norms=False))
    module(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    by_name = named(state, optimizer, module)
    assert [group["params"] for group in by_name["param_groups"]] == [
        ["0.weight", "1.weight"],
        ["0.bias", "1.bias"],
    ]
    for name, parameter in module.named_parameters():
        assert by_name["state"][name]["exp_avg"].shape == parameter.shape
    again = numbered(by_name, optimizer, module)
    assert again["param_groups"] == state["param_groups"]
    assert again["state"].keys() == state["state"].keys()
    assert all(again["state"][n]["exp_avg"] is state["state"][n]["exp_avg"] for n in again["state"])


# ---- batch norm ----------------------------------------------------------------------------------


def test_batch_norm_is_synced_on_gpus_only_and_that_is_told_before_training(small):
    told = refused(small("--trainer.sync_batchnorm", "true", *TWO))
    assert told.startswith("trainer.sync_batchnorm is true, and torch can do that on GPUs only.")


def test_one_process_has_nothing_to_sync(small):
    build_trainer(small("--trainer.sync_batchnorm", "true", "--trainer.devices", "1"), [])


def trainer_of(processes: int, device: str = "cuda", synced: bool = False):
    strategy = SimpleNamespace(
        root_device=torch.device(device), _layer_sync=object() if synced else None
    )
    return SimpleNamespace(world_size=processes, strategy=strategy)


def test_processes_that_normalise_for_themselves_are_told_of_the_flag():
    told = told_of_batch_norm(trainer_of(4), ResNet9(num_classes=10, width=4), 512)
    assert told is not None
    assert "own 128 pictures of the 512" in told
    assert told.endswith("--trainer.sync_batchnorm true does that.")
    told = told_of_batch_norm(trainer_of(4, "cpu"), ResNet9(num_classes=10, width=4), 512)
    assert told is not None and told.endswith("on GPUs.")


@pytest.mark.parametrize(
    ("trainer", "network"),
    [
        (trainer_of(1), ResNet9(num_classes=10, width=4)),
        (trainer_of(4, synced=True), ResNet9(num_classes=10, width=4)),
        (trainer_of(4), CNN(num_classes=10)),
    ],
)
def test_nothing_is_told_where_nothing_differs_from_one_process(trainer, network):
    assert told_of_batch_norm(trainer, network, 512) is None
