"""Who started this process, and which of how many it is; read from the environment, without torch.

The processes of a run, one for each device, are started by one of four:

    Lightning   the rest of one machine's, when the first begins to train; each is the same command
    by hand     the command once on each machine, with NODE_RANK, MASTER_ADDR and MASTER_PORT;
                Lightning starts the rest of that machine's
    torchrun    all of them
    SLURM       all of them, by `srun`
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

# Set by the process that lets Lightning start others: what they share lies under this name.
HOST_GROUP = "RESEARCH_HOST_GROUP"


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that torchrun or SLURM started for one run.

    `by` is the name of who did.  `rank` counts over all nodes, `local_rank` on this one.
    """

    by: str
    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    local_world_size: int
    num_nodes: int


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The place that torchrun or SLURM gave this process; None where neither started it."""
    if "TORCHELASTIC_RUN_ID" in environment:
        names = ("RANK", "LOCAL_RANK", "GROUP_RANK")
        sizes = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
        rank, local_rank, node_rank = (int(environment.get(name, "0")) for name in names)
        count, local, nodes = (int(environment.get(name, "1")) for name in sizes)
        return Launch("torchrun", rank, local_rank, node_rank, count, local, nodes)
    if is_slurm_task(environment):
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
        rank, local_rank, node_rank = (int(environment.get(name, "0")) for name in names)
        tasks = int(environment["SLURM_NTASKS"])
        nodes = int(environment.get("SLURM_NNODES", "1"))
        # "2(x3)" is two on each of three nodes; unequal numbers are refused in placement.py.
        by_step, by_job = "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
        told = environment.get(by_step) or environment.get(by_job) or ""
        per_node = re.split("[(,]", told)[0]
        local = int(per_node) if per_node.isdecimal() else -(-tasks // nodes)
        return Launch("SLURM", rank, local_rank, node_rank, tasks, local, nodes)
    return None


def is_slurm_task(environment: Mapping[str, str] = os.environ) -> bool:
    """True for one of several tasks of `srun`.

    A single one may start the rest itself; a shell of SLURM's for interactive work always does.
    """
    tasks = environment.get("SLURM_NTASKS", "1")
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return not interactive and tasks.isdecimal() and int(tasks) > 1


def is_rank_zero(environment: Mapping[str, str] = os.environ) -> bool:
    """False in all processes of a run but the first one, of the first node.

    Known from the beginning on; Lightning's own `rank_zero_only.rank` takes the first process of a
    second node for the first of all until the strategy is set up.
    """
    found = launch(environment)
    if found is not None:
        return found.rank == 0
    ranks = (environment.get(name, "0") for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))
    return all(rank == "0" for rank in ranks)


def host_group(environment: Mapping[str, str] = os.environ) -> str | None:
    """A name that the processes of this run on this machine have in common, and no others.

    None where this process is, or was until now, the only one of its run here.
    """
    found = launch(environment)
    if found is not None and found.local_world_size > 1:
        if found.by == "torchrun":  # the agent is the parent of all, and starts them anew
            again = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
            return f"torchrun-{os.getppid()}-{again}"
        parts = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return "-".join(["slurm", *(environment.get(part, "0") for part in parts)])
    return environment.get(HOST_GROUP)
