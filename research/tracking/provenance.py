"""What was run, where, and by what: the tags that let a run be understood a month later.

MLflow's own tag names where it has one (its pages show them), short names of ours elsewhere.
Nothing here raises: what cannot be found out is left out.
"""

import contextlib
import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from research.tracking.store import redact

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "mlflow", "optuna")
GIT_SECONDS = 10.0


def collect(command: Sequence[str], script: str, folder: Path) -> dict[str, str]:
    """Tags for a run of `command`, whose main file is `script`, of the code kept in `folder`."""
    tags = {
        "command": command_line(command),
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


def command_line(command: Sequence[str]) -> str:
    """The command as one would type it, without passwords."""
    return redact(shlex.join(command)).encode(errors="replace").decode()


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
    answer = git(folder, *arguments, seconds=GIT_SECONDS)
    return None if answer is None else answer.decode(errors="replace")


def git(
    folder: Path,
    *arguments: str,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    lines: bytes = b"",
) -> bytes | None:
    """What git prints, given `lines`; None if it is not installed, refuses, or takes too long."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            input=lines,
            capture_output=True,
            timeout=max(0.0, seconds),
            check=True,
            # Reading must not take the index lock away from a commit made at the same moment.
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"} | dict(environment or {}),
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


def hash_code(folder: Path, extra: Iterable[Path] = ()) -> str:
    """All Python files in `folder` and below, and the `extra` ones, as 16 hexadecimal digits.

    The same on every machine and in every place: paths count from `folder` on, of an extra file
    only its name does, and lines may end as they like.  Raises OSError on a file that is not there.
    """
    package = sorted(
        (path.relative_to(folder).as_posix(), path)
        for path in folder.rglob("*.py")
        if path.is_file() and not path.name.startswith(".")  # an editor's lock is a broken link
    )
    beside = sorted((path.name, path) for path in set(extra))
    return hash_of(
        [[(name, _hash_file(path)) for name, path in part] for part in (package, beside)]
    )


def fingerprint(configuration: str, data: Mapping[str, str], code: str) -> str:
    """What decides a run's figures, as 16 hexadecimal digits: equal for runs that are repeats.

    `data` holds a digest for each split, `code` is what `hash_code` gave.
    """
    return hash_of([configuration, sorted(data.items()), code])


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def hash_of(value: object) -> str:
    """Anything that JSON can write, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
