"""What SLURM or torchrun starts again goes on with the run that it was, and makes no second one.

A run's tags name the job that began it.  A job of SLURM that is requeued keeps its number; the
processes that torchrun starts anew (`--max-restarts`) have the same agent as those before.
"""

import contextlib
import os
import socket
import subprocess
from pathlib import Path

import psutil

from research.processes.launch import is_rank_zero, launch

ATTEMPT = "job.attempt"  # in which a run began


def job_tags() -> dict[str, str]:
    """What a run's tags say of the job that began it."""
    tags = slurm_tags() | torchrun_tags()
    return tags | {ATTEMPT: attempt()} if tags else {}


def attempt() -> str:
    """How often this job has been started before: "0" at first."""
    name = "SLURM_RESTART_COUNT"
    found = launch()
    if found is not None and found.by == "torchrun":
        name = "TORCHELASTIC_RESTART_COUNT"
    return os.environ.get(name) or "0"


def tags_before() -> dict[str, str] | None:
    """The tags of the run that this process goes on with, if its job has been started before."""
    if is_restarted():
        return torchrun_tags() or None
    return slurm_tags() if is_requeued() else None


# ---- torchrun ------------------------------------------------------------------------------------


def torchrun_tags() -> dict[str, str]:
    """What names this start of `torchrun`: its own id where one was given, and who runs it.

    The agent's process is the same for all ranks of one machine, and over all restarts.  The agents
    of several machines have nothing in common but the id.
    """
    found = launch()
    if found is None or found.by != "torchrun":
        return {}
    given = os.environ["TORCHELASTIC_RUN_ID"]
    if found.num_nodes > 1:
        return {} if given == "none" else {"torchrun.id": given}
    agent = os.getppid()
    return {"torchrun.id": f"{given} {socket.gethostname()} {agent} {started(agent)}"}


def started(process: int) -> str:
    """When a process began, by a clock that nobody sets, where the system tells it."""
    with contextlib.suppress(OSError, IndexError):
        about = Path(f"/proc/{process}/stat").read_text()
        return about.rpartition(")")[2].split()[19]  # after the name, which may hold anything
    with contextlib.suppress(psutil.Error):
        return f"{psutil.Process(process).create_time():.0f}"
    return "?"


def is_restarted() -> bool:
    """True in processes that torchrun starts again after some of them failed."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    found = launch()
    return found is not None and found.by == "torchrun" and count.isdecimal() and int(count) > 0


# ---- SLURM ---------------------------------------------------------------------------------------


def in_slurm() -> bool:
    return "SLURM_JOB_ID" in os.environ


def slurm_job() -> str | None:
    """What `scontrol` calls this job, None outside SLURM; a requeued job keeps it."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def slurm_tags() -> dict[str, str]:
    """What a run's tags say of its job."""
    job = slurm_job()
    return {} if job is None else {"slurm.job_id": job}


def is_requeued() -> bool:
    """True in a job that SLURM has started before."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return in_slurm() and count.isdecimal() and int(count) > 0


def requeue() -> str | None:
    """Ask SLURM to start this job again; returns what came of it in a sentence to print.

    None outside SLURM and on all ranks but the first.  To be called last: SLURM ends the job.
    """
    job = slurm_job()
    if job is None or not is_rank_zero():
        return None
    try:
        ran = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60
        )
        trouble = None if ran.returncode == 0 else ran.stderr.strip() or f"exit {ran.returncode}"
    except subprocess.TimeoutExpired:
        trouble = "no answer within a minute"
    except OSError as error:
        trouble = error.strerror or str(error)
    if trouble is not None:
        return f"SLURM job {job} could not be requeued (scontrol: {trouble}); submit it again."
    return f"SLURM job {job} is requeued and will go on from the checkpoint."
