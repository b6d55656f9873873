"""What Lightning imports by way of torchmetrics, and that all of it is still there."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

SPARING = """
import sys
from research.speed.spared import SPARED, spare
spare()
spare()
import torchmetrics
found = [name for name in SPARED if name in sys.modules]
assert not found, found
assert not any("spared" in type(finder).__module__ for finder in sys.meta_path)

import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
labels = torch.tensor([0, 1, 2, 1])
scores = torch.eye(3)[labels]
assert multiclass_accuracy(scores, labels, 3) == 1
assert multiclass_calibration_error(scores, labels, 3) == 0

import importlib.util
from scipy import special
assert all(importlib.util.find_spec(name) for name in SPARED)
from lightning_utilities.core.imports import RequirementCache
assert all(RequirementCache(name) for name in SPARED)
"""


def run(program: str, *folders: Path) -> None:
    path = os.pathsep.join(map(str, [*folders, PROJECT]))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr


def test_torchmetrics_comes_without_what_is_spared_and_others_can_have_it():
    run(SPARING)


def test_a_torchmetrics_that_cannot_do_without_is_imported_whole(tmp_path):
    (tmp_path / "scipy.py").write_text("")
    (tmp_path / "torchmetrics").mkdir()
    (tmp_path / "torchmetrics" / "__init__.py").write_text("from torchmetrics import image")
    (tmp_path / "torchmetrics" / "image.py").write_text("import scipy")
    program = """
import sys
from research.speed.spared import spare
spare()
import torchmetrics
assert torchmetrics.image.scipy is sys.modules["scipy"]
"""
    run(program, tmp_path)
