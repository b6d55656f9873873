"""What a run stood on, as two files: `requirements.txt` and `machine.yaml`.

Collected in the companion process, off the way of the training. What cannot be found out is left
out.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

SMI_SECONDS = 10.0
GIB = 2**30


def requirements() -> str:
    """Exact version of every installed package, one a line, as `pip install -r` reads them.

    Packages from version control name their commit. Those of a folder of this machine, which no
    other machine could install, stand in comments.
    """
    lines: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # The headers by hand: the standard library parses each whole description, 8 times slower.
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        name = re.search(r"^Name: *(\S+)", text, re.MULTILINE)
        version = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
        if name is None or version is None:
            continue
        key = re.sub(r"[-_.]+", "-", name[1]).lower()
        if key not in lines:  # else hidden by the first of its name, as for `import`
            origin = distribution.read_text("direct_url.json")
            lines[key] = _requirement(name[1], version[1], origin)
    return "".join(f"{lines[key]}\n" for key in sorted(lines))


def _requirement(name: str, version: str, origin: str | None) -> str:
    if origin is not None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # no origin as the standard says
            source = json.loads(origin)
            url = _without_user(source["url"])
            if "vcs_info" in source:
                kind, commit = source["vcs_info"]["vcs"], source["vcs_info"]["commit_id"]
                return f"{name} @ {kind}+{url}@{commit}"
            if url.startswith("file:"):
                return f"# {name}=={version} from {url}"
            return f"{name} @ {url}"
    return f"{name}=={version}"


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def machine() -> str:
    """The computer, as YAML.

    `usable_cores` are those that this process may run on; a container's limits stand beside the
    whole machine's figures.
    """
    import yaml

    facts: dict[str, Any] = {
        "host": platform.node(),
        "os": platform.platform(),
        "architecture": platform.machine(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "cpu": cpu_model(),
        "physical_cores": _physical_cores(),
        "logical_cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "core_limit": _core_limit(),
        "memory_gib": _memory(),
        "memory_limit_gib": _memory_limit(),
        "gpus": _gpus(),
    }
    known = {name: fact for name, fact in facts.items() if fact not in (None, "", [])}
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True)


def cpu_model() -> str:
    """The processor by its maker's name; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: *(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found is not None:
            return found[1].strip()
    return platform.processor()


def _physical_cores() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return psutil.cpu_count(logical=False)


def _usable_cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return None if affinity is None else len(affinity(0))


def _memory() -> float | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # of Unix only
        return gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return None


def _core_limit() -> float | None:
    quota, _, period = _control_group("cpu.max").partition(" ")
    return round(int(quota) / int(period), 2) if quota.isdigit() else None


def _memory_limit() -> float | None:
    limit = _control_group("memory.max")
    return gib(int(limit)) if limit.isdigit() else None


def gib(count: int) -> float:
    return round(count / GIB, 1)


def _control_group(setting: str) -> str:
    """What Linux limits a container to; "max" or nothing where it does not."""
    with contextlib.suppress(OSError):
        return Path("/sys/fs/cgroup", setting).read_text().strip()
    return ""


def _gpus() -> list[dict[str, Any]]:
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            ["nvidia-smi", *query],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    return [
        # nvidia-smi counts in MiB, and says [N/A] of memory that a GPU shares with the machine.
        {"name": name, "memory_gib": round(int(mib) / 1024, 1) if mib.isdigit() else mib}
        | {"driver": driver}
        for name, mib, driver in (row for row in rows if len(row) == 3)
    ]
