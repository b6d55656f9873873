"""What the README shows works as it stands there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import research.data
import research.losses
import research.networks
import research.optimizers
from research import compare
from research import fit as fit_command
from research.configuration.compose import read_command_line
from research.configuration.schema import resolve
from research.search.document import read_search
from research.sweep import read_options
from research.training import fit

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SWEEPS = re.findall(r"^python -m research\.sweep ?(.*?)(?:\s+#.*)?$", TEXT, re.MULTILINE)
COMPARISONS = re.findall(r"^python -m research\.compare ?(.*?)(?:\s+#.*)?$", TEXT, re.MULTILINE)
COMMANDS = re.findall(r"^python -m research\.fit ?(.*?)(?:\s+#.*)?$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "choose"),
    [
        (research.losses, ["--model.loss", "FocalLoss", "--model.loss.gamma", "3"]),
        (research.optimizers, ["--optimizer", "SignSGD", "--optimizer.lr", "1e-3"]),
        (research.networks, ["--model.network", "Linear"]),
        (research.data, ["--data", "Noise", "--data.num_train", "200"]),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else "",
)
def test_class_of_your_own_is_found_by_its_name_and_trains(small, monkeypatch, module, choose):
    name = choose[1]
    (block,) = [block for block in BLOCKS if f"class {name}(" in block]
    assert len(block.strip().splitlines()) <= 16
    namespace = sys.modules[f"{module.__name__}.synthetic" if name == "Noise" else module.__name__]
    scope = dict(vars(namespace))
    exec(compile(block, str(README), "exec"), scope)
    scope[name].__module__ = module.__name__
    monkeypatch.setattr(module, name, scope[name], raising=False)
    base = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    if name != "Noise":
        base += ["--data", "Synthetic", "--data.num_train", "200"]
    result = fit(small(*choose, base=base))
    assert result.metrics["train/loss"] > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted(command, monkeypatch):
    monkeypatch.chdir(README.parent)
    if "--help" in command or "mlruns/" in command or "--resume" in command:
        return  # tested where help is, in test_record.py and in test_resume.py
    _, settings = fit_command.read_options(command.split())
    resolve(read_command_line(settings))


@pytest.mark.parametrize("command", COMPARISONS)
def test_comparison_is_accepted(command, monkeypatch):
    monkeypatch.chdir(README.parent)
    asked = compare.read_arguments(shlex.split(command))
    assert all(file.is_file() for file in asked.files)


@pytest.mark.parametrize("command", SWEEPS)
def test_search_is_accepted(command):
    options = read_options(shlex.split(command))
    read_search(README.parent / options.file, {"workers": options.workers})


def test_search_file_that_is_shown_is_one(tmp_path):
    (block,) = re.findall(r"```yaml\n(base:.*?)```", TEXT, re.DOTALL)
    (tmp_path / "shown.yaml").write_text(
        block.replace("experiments/", f"{README.parent}/experiments/")
    )
    search = read_search(tmp_path / "shown.yaml")
    assert (search.trials, len(search.cells), search.confirm.best) == (60, 1, 3)
    assert {each.condition for each in search.cells[0].space.parameters()} > {("optimizer", "SGD")}


def test_file_map_names_what_is_there():
    block = re.search(r"## Files\n\n```\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    for line in block[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folder = README.parent / ("research" if indent else "")
        if name.rstrip(",") not in ("mlruns/", "mlflow.db"):
            assert (folder / name.rstrip(",")).exists(), name


def test_no_placeholder_is_left_and_pictures_are_there():
    texts = [README, *README.parent.glob("experiments/*"), *README.parent.glob("sweeps/*.yaml")]
    for file in texts:
        assert not re.search(r"\b(CLAIM|RESULTS|TODO|FIXME|XXX)\b", file.read_text()), file
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (README.parent / target).exists(), target
