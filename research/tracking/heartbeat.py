"""Signs of life: tags of a run that tell later whether whoever recorded it is still there.

A process that is killed cannot say so, and its run would stay RUNNING for ever.  On the machine
that a run was on, its process is looked up; from any other machine only its silence tells.
"""

import contextlib
import os
import socket
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from research.tracking.lock import store_lock
from research.tracking.lookup import all_experiments
from research.tracking.store import sqlite_path

BEAT_SECONDS = 30.0
SILENT_SECONDS = 300.0  # ten beats: a store that is away for a while, clocks that differ a little
PAGE = 1000
ENDED_BY = "ended_by"


def first_beat(pid: int) -> dict[str, str]:
    """The tags that name a process, and the first sign of its life."""
    return {
        "heartbeat.host": socket.gethostname(),
        "heartbeat.machine": machine(),
        "heartbeat.pid": str(pid),
        "heartbeat.started": started(pid) or "",
        **beat(),
    }


def beat() -> dict[str, str]:
    """The tag to be set again every BEAT_SECONDS."""
    return {"heartbeat.time": datetime.now(UTC).isoformat(timespec="milliseconds")}


def is_dead(tags: Mapping[str, str], now: datetime | None = None) -> bool:
    """Whether the process that these tags name is gone, or silent for too long where unseen.

    False where there are no such tags: somebody else's run, of which nothing is known.
    """
    try:
        pid, last = int(tags["heartbeat.pid"]), _last_beat(tags)
    except (KeyError, ValueError):
        return False
    if tags.get("heartbeat.machine") == machine():
        found = started(pid)
        if found != "":
            return found is None or found != tags.get("heartbeat.started")
    return (now or datetime.now(UTC)) - last > timedelta(seconds=SILENT_SECONDS)


def end_dead_runs(client: Any, tracking_uri: str) -> list[str]:
    """Mark the dead among the runs that are RUNNING as KILLED; returns "name (id)" of each.

    They end with their last sign of life, and a tag says why.
    """
    dead = [run for run in _running(client) if is_dead(run.data.tags)]
    if not dead:
        return []
    database = sqlite_path(tracking_uri)
    # Several processes that look at the same moment end each run once.
    with contextlib.nullcontext() if database is None else store_lock(database):
        return [f"{run.info.run_name} ({run.info.run_id})" for run in dead if _end(client, run)]


def _running(client: Any) -> list[Any]:
    """Every run that is RUNNING and has had a heartbeat; all pages, before any run is changed."""
    from mlflow.entities import ViewType

    experiments = all_experiments(client)
    if not experiments:
        return []
    condition = "attributes.status = 'RUNNING' AND tags.`heartbeat.pid` LIKE '%'"
    found, page = [], None
    while page != "":
        part = client.search_runs(
            experiments, condition, ViewType.ACTIVE_ONLY, PAGE, page_token=page
        )
        found += list(part)
        page = part.token or ""
    return found


def _end(client: Any, run: Any) -> bool:
    """End a run that was found dead; False if it was ended, resumed or deleted meanwhile."""
    from mlflow.exceptions import MlflowException

    run_id = run.info.run_id
    try:
        run = client.get_run(run_id)  # what its process did last, and nobody else will do
        if run.info.status != "RUNNING" or not is_dead(run.data.tags):
            return False
        # The reason first: who is killed in between leaves a run that is found again.
        client.set_tag(run_id, ENDED_BY, _reason(run.data.tags))
        last = int(1000 * _last_beat(run.data.tags).timestamp())
        client.set_terminated(run_id, "KILLED", end_time=max(last, run.info.start_time))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False  # deleted
        raise
    return True


def _reason(tags: Mapping[str, str]) -> str:
    who = f"process {os.getpid()} on {socket.gethostname()}"
    process = f"process {tags['heartbeat.pid']} on {tags.get('heartbeat.host', '?')}"
    if tags.get("heartbeat.machine") == machine():
        return f"found dead by {who}: {process} is gone"
    return f"found dead by {who}: nothing was heard of {process} after {tags['heartbeat.time']}"


def _last_beat(tags: Mapping[str, str]) -> datetime:
    last = datetime.fromisoformat(tags["heartbeat.time"])
    return last if last.tzinfo is not None else last.replace(tzinfo=UTC)


# ---- this machine and its processes --------------------------------------------------------------


@cache
def machine() -> str:
    """What tells this machine, since it was started, from all whose processes we cannot see.

    Containers share the machine's start and have process numbers of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        import psutil

        # Where this comes out otherwise next time, the run is judged by its silence: no harm.
        return f"{uuid.getnode():012x} {psutil.boot_time():.0f}"


def started(pid: int) -> str | None:
    """When the process started, in a form that is only compared; None if it is gone.

    "" where there is such a process and no more can be told (another user's, and /proc hides it).
    Never a time of day: clocks are set, and psutil's answer on Linux moves with them.
    """
    if pid <= 0:
        return None
    if Path("/proc/self/stat").exists():
        return _started_on_linux(pid)
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return ""


def _started_on_linux(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        # Behind the command, which is in brackets and may contain anything, brackets too.
        state, *fields = line.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # of all, the 22nd: ticks since the boot
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return ""
