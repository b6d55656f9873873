"""Who started this process, and what Lightning's flags become for it; none is started here."""

import errno
import os
import socket

import psutil
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from research.building import build_trainer
from research.command import exit_code_of
from research.configuration.compose import ConfigurationError
from research.processes import placement
from research.processes.jobs import is_restarted, job_tags, tags_before
from research.processes.launch import HOST_GROUP, host_group, is_rank_zero, launch
from research.processes.placement import described, placed, tags_of
from research.training import fit
from tests.launched import torchrun

OPEN = {"devices": "auto", "num_nodes": 1, "plugins": None}


def slurm(rank: int, count: int, nodes: int = 1, **more: str) -> dict[str, str]:
    local = count // nodes
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(count),
        "SLURM_NNODES": str(nodes),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % local),
        "SLURM_NODEID": str(rank // local),
        **more,
    }


@pytest.fixture(autouse=True)
def nobody_started_it(monkeypatch):
    """Whatever starts the tests; and what a test sets itself is gone afterwards."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_", "GLOO_")) or name == "NODE_RANK":
            monkeypatch.delenv(name)
    rank = rank_zero_only.rank
    yield
    rank_zero_only.rank = rank  # which a strategy sets
    os.environ.clear()
    os.environ.update(before)


# ---- who started it ------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [torchrun, slurm])
@pytest.mark.parametrize(("rank", "count", "nodes"), [(0, 2, 1), (1, 2, 1), (0, 4, 2), (2, 4, 2)])
def test_each_process_knows_its_place(start, rank, count, nodes):
    environment = start(rank, count, nodes)
    found = launch(environment)
    assert (found.rank, found.world_size, found.num_nodes) == (rank, count, nodes)
    assert found.local_world_size == count // nodes
    assert (found.node_rank, found.local_rank) == divmod(rank, count // nodes)
    assert is_rank_zero(environment) == (rank == 0)


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),  # started by Lightning
        ({"NODE_RANK": "1"}, False),  # the first process of a second node
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
        (slurm(0, 1), True),
        ({**slurm(0, 1), "LOCAL_RANK": "1"}, False),  # Lightning's, within a single task
        ({**slurm(0, 2), "SLURM_JOB_NAME": "interactive", "LOCAL_RANK": "1"}, False),
    ],
)
def test_only_one_process_of_a_run_is_the_first(environment, first):
    assert is_rank_zero(environment) == first


def test_processes_of_one_run_on_one_machine_have_a_name_in_common():
    assert host_group(torchrun(0, 2)) == host_group(torchrun(1, 2)) is not None
    assert host_group(slurm(0, 4, 2)) == host_group(slurm(1, 4, 2)) is not None
    assert host_group(slurm(0, 2)) != host_group(slurm(0, 2, SLURM_JOB_ID="4712"))
    again = torchrun(0, 2, TORCHELASTIC_RESTART_COUNT="1")
    assert host_group(torchrun(0, 2)) != host_group(again)
    assert host_group({}) is None
    assert host_group(torchrun(0, 2, 2)) is None  # alone on its machine
    assert host_group({HOST_GROUP: "this"}) == "this"


# ---- what Lightning is told ----------------------------------------------------------------------


@pytest.mark.parametrize("start", [torchrun, slurm])
def test_what_is_left_open_is_filled_in_as_it_was_started(monkeypatch, start):
    for name, value in start(3, 8, 2).items():
        monkeypatch.setenv(name, value)
    filled = placed(OPEN)
    assert (filled["devices"], filled["num_nodes"]) == (4, 2)
    if start is slurm:  # without it Lightning refuses
        assert os.environ["SLURM_NTASKS_PER_NODE"] == "4"


def test_without_a_launcher_the_flags_stay():
    assert placed(OPEN) == OPEN
    assert placed({**OPEN, "devices": 2})["devices"] == 2


@pytest.mark.parametrize("start", [torchrun, slurm])
@pytest.mark.parametrize("flags", [["--trainer.devices", "3"], ["--trainer.num_nodes", "2"]])
def test_flags_that_contradict_the_launcher_are_refused(small, monkeypatch, start, flags):
    configuration = small(*flags)
    for name, value in start(0, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=r"started 2 x 1 = 2\. Leave both flags out"):
        build_trainer(configuration, [])


def test_trainer_gets_the_world_of_its_launcher(small, monkeypatch):
    configuration = small()
    for name, value in torchrun(1, 4, 2).items():
        monkeypatch.setenv(name, value)
    trainer = build_trainer(configuration, [])
    assert (trainer.world_size, trainer.global_rank, trainer.num_nodes) == (4, 1, 2)
    told = described(trainer, 62)
    assert told.startswith("4 processes (cpu on 2 nodes, DDP), 15 or 16 pictures of each batch")
    assert told.endswith("waiting for all at 127.0.0.1:29500")
    tags = tags_of(trainer, 62)
    assert tags["world_size"] == "4" and tags["batch_size_per_device"] == "15.5"


def test_step_of_srun_is_smaller_than_its_job():
    step = slurm(0, 2, SLURM_NTASKS_PER_NODE="4", SLURM_STEP_TASKS_PER_NODE="2")
    assert launch(step).local_world_size == 2
    assert launch(slurm(0, 6, 3, SLURM_TASKS_PER_NODE="2(x3)")).local_world_size == 2


def test_slurm_job_without_srun_is_refused(monkeypatch):
    for name, value in slurm(0, 4).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID")
    with pytest.raises(ConfigurationError, match=r"started once, not by srun\. Put srun in front"):
        placed(OPEN)


def test_unequal_nodes_are_refused(monkeypatch):
    for name, value in slurm(0, 5, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="SLURM started 5 processes on 2 nodes; each node"):
        placed(OPEN)


def test_a_single_task_of_slurm_starts_the_others_itself(small, monkeypatch):
    configuration = small("--trainer.devices", "2")
    for name, value in slurm(0, 1).items():
        monkeypatch.setenv(name, value)
    trainer = build_trainer(configuration, [])
    assert isinstance(trainer.strategy.cluster_environment, LightningEnvironment)
    assert trainer.strategy.launcher is not None
    with pytest.raises(ConfigurationError, match=r"SLURM runs one task of this job\. Put srun"):
        placed({**OPEN, "num_nodes": 2})


def test_nodes_that_cannot_find_each_other_are_refused(monkeypatch):
    with pytest.raises(ConfigurationError, match="NODE_RANK, MASTER_ADDR, MASTER_PORT of the env"):
        placed({**OPEN, "num_nodes": 2})
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "NODE_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="NODE_RANK is 2; it must be from 0 to 1"):
        placed({**OPEN, "num_nodes": 2})
    monkeypatch.setenv("NODE_RANK", "1")
    placed({**OPEN, "num_nodes": 2})


def test_first_node_that_does_not_exist_is_refused(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name, value in {"MASTER_ADDR": "nobody", "MASTER_PORT": "1", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="MASTER_ADDR is nobody, and there is no such"):
        placed({**OPEN, "num_nodes": 2})


def name_of(address: str) -> str:
    found = psutil.net_if_addrs().items()
    return next(name for name, all_ in found if address in [each.address for each in all_])


def test_gloo_takes_the_network_of_the_first_node(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("NODE_RANK", "0")
    placed({**OPEN, "num_nodes": 2})
    addresses = psutil.net_if_addrs()[os.environ["GLOO_SOCKET_IFNAME"]]
    assert "127.0.0.1" in [each.address for each in addresses]
    del os.environ["GLOO_SOCKET_IFNAME"]
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # as the own name of a machine often is
    monkeypatch.setattr(placement, "only_address_beside_loopback", lambda: None)
    placed({**OPEN, "num_nodes": 2})
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == name_of("127.0.0.1")
    os.environ["GLOO_SOCKET_IFNAME"] = "mine"
    placed({**OPEN, "num_nodes": 2})
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


# ---- started again -------------------------------------------------------------------------------


def test_restart_of_torchrun_is_known_by_its_agent(monkeypatch):
    for name, value in torchrun(0, 2).items():
        monkeypatch.setenv(name, value)
    assert not is_restarted() and tags_before() is None
    tags = job_tags()
    assert tags["torchrun.id"].startswith(f"none {socket.gethostname()} {os.getppid()} ")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert tags_before().items() < tags.items()
    assert job_tags()["job.attempt"] == "1"


def test_agents_of_several_machines_are_known_by_the_id_they_were_given(monkeypatch):
    for name, value in torchrun(0, 2, 2, TORCHELASTIC_RUN_ID="mine").items():
        monkeypatch.setenv(name, value)
    assert job_tags() == {"torchrun.id": "mine", "job.attempt": "0"}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert job_tags() == {}


# ---- what everybody was told the same ------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "error", "told"),
    [
        (0, ConfigurationError("data: no"), "error: data: no.\n"),
        (1, ConfigurationError("data: no"), ""),
        (2, ConfigurationError("data: no"), "error in process 2: data: no.\n"),  # another machine
        (3, ConfigurationError("data: no"), ""),
        (3, OSError(errno.ENOSPC, "No space left on device", "here"), "error in process 3: here:"),
    ],
)
def test_mistake_is_told_once_on_each_machine(monkeypatch, capsys, rank, error, told):
    for name, value in torchrun(rank, 4, 2).items():
        monkeypatch.setenv(name, value)

    def work():
        raise error

    assert exit_code_of(work) == (1 if isinstance(error, OSError) else 2)
    err = capsys.readouterr().err
    assert err.startswith(told) and bool(err) == bool(told)


def test_auto_takes_all_gpus_of_the_machine(small, monkeypatch):
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    configuration = small("--trainer.accelerator", "auto")
    trainer = build_trainer(configuration, [])
    assert (trainer.world_size, type(trainer.accelerator).__name__) == (4, "CUDAAccelerator")
    for name, value in torchrun(1, 2).items():  # two of the four
        monkeypatch.setenv(name, value)
    trainer = build_trainer(configuration, [])
    assert (trainer.world_size, trainer.strategy.root_device) == (2, torch.device("cuda:1"))


def test_more_processes_than_pictures_in_a_batch_are_refused_before_any_is_started(small):
    with pytest.raises(ConfigurationError, match=r"data\.batch_size is 64, for all 80 processes"):
        fit(small("--trainer.devices", "80"))
