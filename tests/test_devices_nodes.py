"""One run however its processes are started: by Lightning, torchrun, SLURM, or by hand.

Real processes of the real command, on the CPU.  SLURM is its environment; two nodes are two network
namespaces where this machine allows them, else two addresses of the loopback.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import SMALL
from tests.launched import ROOT, free_port
from tests.test_placement import slurm

pytestmark = [
    pytest.mark.devices,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's of SQLAlchemy
]

STORE = "sqlite:///mlflow.db"
QUICK = ["--log_pictures", "false", "--log_model", "false", "--log_system_metrics", "false"]
FIT = ["-m", "research.fit", *SMALL, *QUICK, "--tracking_uri", STORE]


def start(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(
        [*prefix, sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **given},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(*processes: subprocess.Popen[str], seconds: float = 240) -> list[tuple[str, str]]:
    """What each printed, once all have ended well."""
    try:
        told = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process, (_, err) in zip(processes, told, strict=True):
        assert process.returncode == 0, err
    return told


def only_run(folder: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return run


def losses(folder: Path, run_id: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    history = client.get_metric_history(run_id, "train/loss")
    return [(metric.step, metric.value) for metric in history]


def is_one_record(folder: Path, told: Sequence[tuple[str, str]], world_size: int) -> Any:
    """The only run, which is whole; one table was printed, by the first process."""
    run = only_run(folder)
    assert run.info.status == "FINISHED"
    assert run.data.tags["world_size"] == str(world_size)
    out = "".join(out for out, _ in told)
    assert out.count("accuracy") == 1 and out.count(run.info.run_id) >= 1
    assert sum(err.count(f"{world_size} processes (cpu") for _, err in told) == 1
    steps = [step for step, _ in losses(folder, run.info.run_id)]
    assert steps == sorted(set(steps))  # each epoch once
    return run


def test_as_typed_and_on_another_number_of_processes_afterwards(tmp_path):
    told = ended(start([*FIT, "--trainer.devices", "2"], tmp_path))
    run = is_one_record(tmp_path, told, 2)
    assert run.data.tags["batch_size_per_device"] == "32"
    longer = ["--trainer.max_epochs", "3", "--allow_changes", "--trainer.devices", "1"]
    resume = ["-m", "research.fit", "--resume", run.info.run_id, "--tracking_uri", STORE]
    ended(start([*resume, *longer, "--trust"], tmp_path))
    run = only_run(tmp_path)
    assert run.info.status == "FINISHED" and run.data.tags["world_size"] == "1"
    changes = run.data.tags["resumed.1.changes"]
    assert "Processes: 2 -> 1." in changes and "trainer.devices: 2 -> 1" in changes
    assert [step for step, _ in losses(tmp_path, run.info.run_id)] == [1, 2, 3]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_torchrun_that_starts_all_again_goes_on_with_the_run(tmp_path):
    long = ["--trainer.max_epochs", "400", "--checkpoint.every_n_train_steps", "3"]
    process = start([*TORCHRUN, "--max-restarts", "1", *FIT, *long], tmp_path)
    second = rank_of(process, "1", checkpoint_in=tmp_path / "mlruns")
    second.kill()
    until = time.monotonic() + 120
    while time.monotonic() < until and only_run(tmp_path).data.tags.get("resumed") != "1":
        time.sleep(0.5)
    assert only_run(tmp_path).data.tags.get("resumed") == "1"
    assert only_run(tmp_path).info.status == "RUNNING"
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate(timeout=60)


def rank_of(process: subprocess.Popen[str], rank: str, checkpoint_in: Path) -> psutil.Process:
    """The process of this rank, once a checkpoint is written."""
    until = time.monotonic() + 120
    while not list(checkpoint_in.glob("**/last.ckpt")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    return next(c for c in children if c.environ().get("RANK") == rank)


def test_tasks_of_slurm_make_one_run(tmp_path):
    port = str(free_port())
    places = [slurm(rank, 2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in (0, 1)]
    run = is_one_record(tmp_path, ended(*(start(FIT, tmp_path, place) for place in places)), 2)
    assert run.data.tags["slurm.job_id"] == "4711"


@pytest.fixture
def networks() -> Iterator[list[tuple[list[str], str]]]:
    """For each of two nodes what to put before a command, and the address of the first node."""
    names = [f"research-{os.getpid()}-{side}" for side in "ab"]
    wires = [f"r{side}{os.getpid()}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
            for name, wire, last in zip(names, wires, (1, 2), strict=True):
                ip("link", "set", wire, "netns", name)
                ip("-n", name, "addr", "add", f"10.77.0.{last}/24", "dev", wire)
                ip("-n", name, "link", "set", wire, "up")
                ip("-n", name, "link", "set", "lo", "up")
            found = [(["ip", "netns", "exec", name], "10.77.0.1") for name in names]
        except (OSError, subprocess.CalledProcessError):
            found = [([], "127.0.0.2")] * 2
        yield found
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_nodes_started_by_hand_make_one_run(tmp_path, networks):
    flags = ["--trainer.num_nodes", "2", "--trainer.devices", "1"]
    port = str(free_port())
    nodes = []
    for rank, (prefix, address) in enumerate(networks):
        where = {"NODE_RANK": str(rank), "MASTER_ADDR": address, "MASTER_PORT": port}
        nodes.append(start([*FIT, *flags], tmp_path, where, prefix))
    told = ended(*nodes)
    run = is_one_record(tmp_path, told, 2)
    assert run.data.tags["num_nodes"] == "2"
    assert f"waiting for all at {networks[0][1]}:{port}" in told[0][1]
    assert told[1][0] == ""
