"""The command: what it refuses, and a tiny search from its start to the winner's own run."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from research import sweep
from research.tracking.runs import open_store
from research.tracking.store import sqlite_uri

PROJECT = Path(__file__).resolve().parents[1]
TINY = {
    "settings": {
        "data": "Synthetic",
        "data.num_train": 320,
        "data.num_test": 20,
        "model.network": "CNN",
        "model.network.widths": [4, 4, 8],
        "model.network.hidden": 8,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
    },
    "space": {"optimizer": {"SGD": {"lr": "log 1e-3..1e-1"}, "AdamW": {"lr": "log 1e-4..1e-2"}}},
    "budget": {"trials": 3},
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(TINY))
    return path


def run(*arguments, folder=PROJECT):
    return subprocess.run(
        [sys.executable, "-m", "research.sweep", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
    )


# ---- what is refused -----------------------------------------------------------------------------


def test_help_names_every_option(capsys):
    assert sweep.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in (*sweep.TYPED, *sweep.TRACKED, *sweep.SWITCHES):
        assert f"--{name}" in out
    assert max(map(len, out.splitlines())) <= 100
    assert sweep.main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.yaml"], "there is no search file nowhere.yaml"),
        (["tini.yaml"], "did you mean tiny.yaml?"),
        (["--workers", "2"], "the search file is missing"),
        (["tiny.yaml", "--worker", "2"], "--workers"),
        (["tiny.yaml", "--optimizer.lr", "0.1"], "Settings of the trials stand in its file"),
        (["tiny.yaml", "--workers"], "--workers"),
        (["tiny.yaml", "--workers", "none"], "workers: expected a whole number"),
        (["tiny.yaml", "--trials", "0"], "budget.trials: expected a whole number, 1 or more"),
        (["tiny.yaml", "--tracking_uri", "runs"], "is a folder"),
        (["tiny.yaml", "--storage", "runs", "--best"], "storage: 'runs' is no address"),
        (["tiny.yaml", "--best"], "Start it: python -m research.sweep tiny.yaml"),
    ],
)
def test_mistake_is_told_in_a_sentence(file, capsys, arguments, told):
    assert sweep.main(arguments) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_all_faults_of_a_file_are_told_together(file, capsys):
    broken = {**TINY, "spaces": {}, "objective": "test/accuracy", "budget": {"trials": -1}}
    file.write_text(json.dumps(broken))
    assert sweep.main([str(file)]) == 2
    said = capsys.readouterr().err
    for word in ("spaces", "test/accuracy", "budget.trials"):
        assert word in said


def test_what_it_works_on_is_said_before_anything_slow(file):
    """Nothing is imported before that which takes long."""
    script = "\n".join(
        [
            "import sys",
            "from research import sweep",
            "sweep.quiet = lambda: sys.exit(0)",
            f"sweep.main([{str(file)!r}, '--tracking_uri', ''])",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert f"checking {file}" in done.stderr
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.M))
    assert "research.sweep" in imported
    assert not imported & {"torch", "lightning", "mlflow", "optuna", "rich"}


# ---- a search ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy
def test_search_from_its_start_to_the_winners_own_run(file):
    document = {**TINY, "confirm": {"best": 1, "seeds": 2}, "pruner": "MedianPruner"}
    file.write_text(json.dumps(document))
    uri = sqlite_uri(file.parent / "mlflow.db")
    arguments = [file, "--tracking_uri", uri]
    first = run(*arguments, "--workers", "2")
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr
    assert "search tiny: 3 trials; 2 workers" in first.stderr
    assert len(re.findall(r"^trial \d  [\d.]+  (COMPLETE|PRUNED)", first.stderr, re.M)) == 5
    assert "Best configurations, confirmed" in first.stdout
    assert f"optuna-dashboard {file.parent / 'tiny.journal'}" in first.stdout

    client = open_store(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3 + 2 + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_name == "tiny"
    page = parent.data.tags["mlflow.note.content"]
    assert page.startswith("tiny: val/accuracy (higher is better). 3 trials") and "| 1 |" in page
    assert parent.data.params["sampler"] == "TPESampler"
    assert parent.data.params["pruner"] == "MedianPruner"
    assert parent.data.params["budget"] == "3 trials"
    history = client.get_metric_history(parent.info.run_id, "search/best_val_accuracy")
    assert [row.step for row in history] == [1, 2, 3]
    values = [row.value for row in history]
    assert values == sorted(values)
    names = {entry.path for entry in client.list_artifacts(parent.info.run_id)}
    assert {"search.yaml", "summary.md"} <= names
    assert any(name.endswith((".png", ".svg")) for name in names)
    for each in runs:
        assert not any(name.startswith("test/") for name in each.data.metrics)

    again = run(*arguments)
    assert again.returncode == 0
    assert "Nothing is left to do." in again.stdout
    assert "trial" not in again.stderr
    assert len(client.search_runs([experiment.experiment_id])) == 6

    best = run(file, "--best")
    assert best.returncode == 0, best.stderr
    target = file.parent / "best.yaml"
    written = run(file, "--write", target)
    assert written.returncode == 0, written.stderr
    assert yaml.safe_load(best.stdout) == yaml.safe_load(target.read_text())
    assert f"python -m research.fit --config {target}" in target.read_text()
    assert run(file, "--write", target).returncode == 0  # its own, which it may write again
    refused = run(file, "--write", file)
    assert refused.returncode == 2
    assert "is there already" in refused.stderr
    trained = subprocess.run(
        [
            *(sys.executable, "-m", "research.fit", "--config", str(target)),
            *("--tracking_uri", "", "--trainer.max_epochs", "1"),
        ],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert trained.returncode == 0, trained.stderr

    before = parent.info.end_time
    report = run(*arguments, "--report")
    assert report.returncode == 0, report.stderr
    assert "recorded: " in report.stdout
    assert client.get_run(parent.info.run_id).info.end_time == before


@pytest.mark.slow
def test_without_a_record_nothing_of_mlflow_is_made(file):
    done = run(file, "--tracking_uri", "")
    assert done.returncode == 0, done.stderr
    assert "mlflow ui" not in done.stdout
    assert not list(file.parent.glob("mlflow.db*"))


@pytest.mark.slow
def test_file_that_does_not_fit_the_data_ends_in_a_sentence(file):
    """Every trial fails alike: the budget is not burnt."""
    broken = {**TINY, "budget": {"trials": 50}}
    broken["settings"] = {**TINY["settings"], "trainer.limit_val_batches": 0}
    file.write_text(json.dumps(broken))
    began = time.monotonic()
    done = run(file, "--tracking_uri", "")
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 300
    assert len(re.findall("FAIL", done.stderr)) < 10


def test_the_winners_command_repeats_what_was_typed(capsys):
    studies = SimpleNamespace(described="x.journal", counts=lambda: SimpleNamespace(complete=1))
    command = sweep.command_of(["a.yaml", "--storage", "x.journal"])
    sweep.print_places(SimpleNamespace(name="a"), command, studies, None, None)
    told = capsys.readouterr().out.splitlines()
    start = "python -m research.sweep a.yaml --storage x.journal"
    assert told[-1].endswith(f"{start} --write experiments/a_best.yaml")
