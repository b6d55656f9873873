"""A command as a person types it, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.ratios import PROJECT


def python(
    arguments: Sequence[str],
    folder: Path,
    *,
    path: Sequence[Path] = (),
    environment: Mapping[str, str] = {},
) -> str:
    """What `python ARGUMENTS` prints in the folder; RuntimeError with its last words if it fails.

    path: where it looks for modules before it looks in the project.
    """
    looks_in = os.pathsep.join(map(str, (*path, PROJECT)))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": looks_in} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(arguments[-8:])} ended with {done.returncode}\n{done.stderr[-3000:]}"
        )
    return done.stdout
