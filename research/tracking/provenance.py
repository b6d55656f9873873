"""What was run, where, and by what: the tags that let a run be understood a month later.

MLflow's own tag names where it has one (its pages show them), short names of ours elsewhere.
Nothing here raises: what cannot be found out is left out.
"""

import contextlib
import getpass
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from research.tracking.store import redact

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "mlflow", "optuna")
GIT_SECONDS = 10.0


def collect(command: Sequence[str], script: str, folder: Path) -> dict[str, str]:
    """Tags for a run of `command`, whose main file is `script`, of the code kept in `folder`."""
    tags = {
        "command": redact(shlex.join(command)).encode(errors="replace").decode(),
        "host": platform.node(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "mlflow.source.name": script,
        "mlflow.source.type": "LOCAL",
    }
    for package in PACKAGES:
        try:
            tags[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # A user id without a name, as in some containers, raises.
    with contextlib.suppress(OSError, KeyError, ImportError):
        tags["mlflow.user"] = getpass.getuser()
    return tags | git_tags(folder)


def git_tags(folder: Path) -> dict[str, str]:
    """Commit, branch and whether the work tree equals the commit; empty outside of a checkout.

    `git.clean` is "true" or "false"; new files that git does not ignore make it "false".
    """
    status = _git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=normal")
    if status is None:  # too slow on a huge tree, or no checkout at all
        commit = _git(folder, "rev-parse", "--verify", "HEAD")
        return {"mlflow.source.git.commit": commit.strip()} if commit else {}
    lines = status.splitlines()
    branch = dict(
        line.removeprefix("# branch.").split(" ", 1) for line in lines if line.startswith("# ")
    )
    tags = {"git.clean": str(not any(not line.startswith("#") for line in lines)).lower()}
    if branch.get("oid", "(initial)") != "(initial)":
        tags["mlflow.source.git.commit"] = branch["oid"]
    if branch.get("head", "(detached)") != "(detached)":
        tags["mlflow.source.git.branch"] = branch["head"]
    return tags


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it is not installed, refuses, or takes too long."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_SECONDS,
            check=True,
            # Reading must not take the index lock away from a commit made at the same moment.
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.decode(errors="replace")
