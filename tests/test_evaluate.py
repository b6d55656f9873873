"""Runs scored again by the command, and what lies in the store afterwards."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from research import evaluate, fit
from research.data import Synthetic
from research.tracking.run import Recorder
from research.tracking.runs import RecordedRun, find_run, open_store
from research.tracking.store import sqlite_uri

# MLflow reads its own store with what SQLAlchemy calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[1]
TINY = [
    *("--data", "Synthetic", "--data.num_train", "320", "--data.num_test", "64"),
    *("--model.network.widths", "[4,4,8]", "--model.network.hidden", "8"),
    *("--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--trainer.precision", "32-true"),
    *("--log_pictures", "false", "--log_model", "false", "--log_system_metrics", "false"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a store that all share: one run, named "run"."""
    folder = tmp_path_factory.mktemp("project")
    uri = sqlite_uri(folder / "mlflow.db")
    torch.set_num_threads(1)
    assert fit.main([*TINY, "--tracking_uri", uri, "--run_name", "run"]) == 0
    return folder


@pytest.fixture
def uri(project, recorder, monkeypatch, tmp_path) -> str:
    monkeypatch.setattr(Recorder, "start", lambda: contextlib.nullcontext(recorder))
    monkeypatch.chdir(tmp_path)
    uri = sqlite_uri(project / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def run(uri) -> RecordedRun:
    return find_run(uri, "run")


def fold(folder: Path, count: int = 40, size: int = 48, seed: int = 1) -> Path:
    """Picture files in class folders, of another size than the run's."""
    data = Synthetic(num_train=10, num_test=count, image_size=size, picture_seed=seed)
    data.setup()
    for place, (picture, label) in enumerate(
        zip(data.splits.test.pixels, data.splits.test.labels, strict=True)
    ):
        inside = folder / data.class_names[label]
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(inside / f"{place}.png")
    return folder


def metrics_under(run: RecordedRun, name: str) -> dict[str, float]:
    now = find_run(run.tracking_uri, run.run_id).metrics
    return {key: value for key, value in now.items() if key.startswith(f"{name}/")}


def looked_at_again(before: RecordedRun) -> RecordedRun:
    """The run with one more look at its test pictures, the training's own being the first."""
    looks = int(before.tags.get("test_looks", "1")) + 1
    return replace(before, tags={**before.tags, "test_looks": str(looks)})


# ---- the same again ------------------------------------------------------------------------------


def test_best_checkpoint_gives_the_recorded_figures_to_the_last_digit(run, capsys):
    before = find_run(run.tracking_uri, "run")
    assert "test/negative_log_likelihood" in before.metrics
    assert evaluate.main(["run"]) == 0
    told = capsys.readouterr().out
    count = sum(name.startswith("test/") for name in before.metrics)
    assert f"The same as recorded: {count} figures, to the last digit." in told
    assert "recorded         now" in told
    assert "best.ckpt, epoch" in told
    assert "64 test pictures of Synthetic" in told
    after = find_run(run.tracking_uri, "run")
    assert after == looked_at_again(before)
    assert f"The run counts {after.tags['test_looks']} looks at its test pictures now." in told


@pytest.mark.parametrize("other", [["--data.batch_size", "7"], ["--data.crop_padding", "2"]])
def test_settings_that_leave_the_pictures_alone_add_nothing(run, other, capsys):
    before = find_run(run.tracking_uri, "run")
    assert evaluate.main([run.run_id, *other]) == 0
    assert "recorded" in capsys.readouterr().out
    assert find_run(run.tracking_uri, "run") == looked_at_again(before)


def test_figures_that_differ_are_told(run, capsys):
    assert evaluate.main(["run", "--trainer.precision", "bf16-mixed"]) == 0
    assert "figures differ from those recorded, most test/" in capsys.readouterr().out


def test_checkpoint_file_is_scored_and_nothing_recorded(run, tmp_path, capsys):
    shutil.copy(run.checkpoint(), tmp_path / "mine.ckpt")
    before = find_run(run.tracking_uri, "run")
    assert evaluate.main(["mine.ckpt"]) == 0
    told = capsys.readouterr().out
    assert f"{run.metrics['test/accuracy']:.2%}" in told
    assert "mine.ckpt" in told
    assert find_run(run.tracking_uri, "run") == before
    assert [file.name for file in tmp_path.iterdir()] == ["mine.ckpt"]


# ---- something new -------------------------------------------------------------------------------


def test_other_data_is_added_to_the_run_under_its_name(run, tmp_path, capsys):
    fold(tmp_path / "photos" / "test")
    assert evaluate.main(["run", "--data", "ImageFolder", "--data.root", "photos"]) == 0
    told = capsys.readouterr().out
    assert "on 40 test pictures of photos" in told
    assert "Added to the run as photos/*" in told
    added = metrics_under(run, "photos")
    assert {"photos/loss", "photos/accuracy", "photos/macro_f1", "photos/accuracy/disc"} <= {*added}
    assert f"{added['photos/accuracy']:.2%}" in told
    (point,) = open_store(run.tracking_uri).get_metric_history(run.run_id, "photos/loss")
    assert point.step == 0  # as the test's own: a bar in MLflow's charts, no curve
    after = find_run(run.tracking_uri, "run")
    assert after.tags.get("test_looks") == run.tags.get("test_looks")  # those are other pictures
    note = json.loads(after.tags["evaluation.photos"])
    assert note == {
        "data": "ImageFolder",
        "root": "photos",
        "image_size": 32,
        "test_fraction": 0.1,
        "test_seed": 0,
        "checkpoint": "best.ckpt",
        "pictures": 40,
    }
    assert after.status == run.status == "FINISHED"
    assert {key: after.metrics[key] for key in run.metrics} == run.metrics
    with open(after.file("evaluations/photos/classes.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(Synthetic.class_names)
    assert sum(int(row["pictures"]) for row in rows) == 40
    with Image.open(after.file("evaluations/photos/confusion_matrix.png")) as matrix:
        assert min(matrix.size) > 200


def test_classes_of_a_folder_are_matched_by_name(run, tmp_path, capsys):
    """A folder's classes are sorted, those drawn are not; the figures are the same."""
    data = Synthetic(num_train=320, num_test=64)
    data.setup()
    for place, (picture, label) in enumerate(
        zip(data.splits.test.pixels, data.splits.test.labels, strict=True)
    ):
        inside = tmp_path / "flat" / data.class_names[label]
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(inside / f"{place}.png")
    assert evaluate.main(["run", "--data", "ImageFolder", "--data.root", "flat"]) == 0
    assert "on 64 test pictures of flat" in capsys.readouterr().out
    for name, value in metrics_under(run, "flat").items():
        assert value == pytest.approx(run.metrics[name.replace("flat/", "test/", 1)], abs=1e-5)


def test_folder_with_train_and_test_is_scored_by_its_test(run, tmp_path, capsys):
    fold(tmp_path / "both" / "train", 30, seed=2)
    fold(tmp_path / "both" / "test", 20, seed=3)
    arguments = ["--data", "ImageFolder", "--data.root", "both", "--name", "two halves"]
    assert evaluate.main(["run", *arguments]) == 0
    assert "on 20 test pictures of both" in capsys.readouterr().out
    assert metrics_under(run, "two halves")


@pytest.mark.slow
def test_other_settings_of_the_same_data_set_are_other_pictures(run, capsys):
    assert evaluate.main(["run", "--data.picture_seed", "5"]) == 0
    added = metrics_under(run, "Synthetic")
    assert added["Synthetic/loss"] != run.metrics["test/loss"]
    # The same again is welcome, others must not replace them.
    assert evaluate.main(["run", "--data.picture_seed", "5"]) == 0
    assert evaluate.main(["run", "--data.picture_seed", "6"]) == 2
    assert "as Synthetic/* (picture_seed was 5, is 6)" in capsys.readouterr().err
    assert metrics_under(run, "Synthetic") == added
    assert evaluate.main(["run", "--data.picture_seed", "6", "--name", "six"]) == 0
    assert metrics_under(run, "six")["six/loss"] != added["Synthetic/loss"]


def test_normalisation_is_that_of_the_training_pictures(run, capsys):
    """Darker pictures must stay darker: measured anew, they would look the same as before."""
    from research.checkpoints.trained import read_checkpoint, settings_of
    from research.configuration.compose import CommandLine
    from research.configuration.schema import resolve

    checkpoint = read_checkpoint(run.checkpoint())
    arguments = {"data": {"class_path": "Synthetic", "init_args": {"difficulty": 1.0}}}
    configuration = resolve(CommandLine([settings_of(checkpoint)], arguments))
    data = evaluate.build_pictures(configuration, checkpoint.pictures, is_other=True)
    assert data.normalization == checkpoint.pictures.normalization
    assert data.normalization != data.measure_normalization(data.splits.train)
    data.setup("test")
    assert data.normalization == checkpoint.pictures.normalization


def test_last_checkpoint_gets_a_name_of_its_own(run, capsys):
    before = find_run(run.tracking_uri, "run")
    assert evaluate.main(["run", "--checkpoint", "last"]) == 0
    told = capsys.readouterr().out
    assert "last.ckpt, epoch 2" in told
    assert "Added to the run as Synthetic-last/*" in told
    assert metrics_under(run, "Synthetic-last")
    tags = find_run(run.tracking_uri, "run").tags
    assert "evaluation.Synthetic-last" in tags
    assert tags["test_looks"] == looked_at_again(before).tags["test_looks"]


def test_name_has_the_same_figures_added(run):
    assert evaluate.main(["run", "--name", "again"]) == 0
    for name, value in metrics_under(run, "again").items():
        assert value == run.metrics[name.replace("again/", "test/", 1)]


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "error: One run must be named, and none came"),
        (["run", "other"], "error: One run must be named, and 2 came (run, other)"),
        (["rum"], 'error: There is no run "rum" in '),
        (["run", "--tracking_uri", ""], "error: tracking_uri is empty"),
        (["run", "--checkpoint", "first"], 'no checkpoint "first"; it has best.ckpt, last.ckpt.'),
        (["run", "--model.loss", "MSELoss"], "error: model: no such setting of an"),
        (["run", "--optimizer.lr", "1"], "error: optimizer: no such setting of an"),
        (["run", "--seed_everything", "1"], "error: seed_everything: no such setting of an"),
        (["run", "--trainer.max_epochs", "1"], "error: trainer.max_epochs: nothing is trained"),
        (["run", "--checkpoint.save_top_k", "1"], "error: checkpoint: one value is expected."),
        (["run", "--data.imge_size", "8"], "data.imge_size: Synthetic has no argument"),
        (["run", "--data", "Nothing"], 'error: data: there is no data set "Nothing"'),
        (["run", "--data", "ImageFolder", "--data.root", "nowhere"], "error: data.root is nowhere"),
        (["run", "--data.image_size", "64"], "error: data.image_size is 64, and the run's network"),
        (["run", "--name", "test"], "error: name: test stands for figures of the training"),
        (["run", "--name", "a/b"], "error: name: 'a/b' cannot be part of a metric's name"),
        (["run", "--data.root", "x"], "error: data.root: Synthetic has no argument"),
        (["wrong.ckpt"], "error: wrong.ckpt is no checkpoint of python -m research.fit, or it is"),
        (["wrong.ckpt", "--checkpoint", "last"], "error: checkpoint: wrong.ckpt is a checkpoint"),
        (["foreign.ckpt"], "error: foreign.ckpt is no checkpoint of python -m research.fit."),
        (["old.ckpt"], "error: old.ckpt was written by an older version"),
        (["other.ckpt"], "error: The weights in other.ckpt are not those of this network"),
        (
            ["run", "--data", "ImageFolder", "--data.root", "animals"],
            "these pictures have (cat, dog",
        ),
    ],
)
def test_mistake_is_told_in_a_sentence(run, tmp_path, arguments, told, capsys):
    (tmp_path / "wrong.ckpt").write_text("no weights at all")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    content = torch.load(run.checkpoint(), weights_only=True)
    weights = {**content["state_dict"], "network.one_more": torch.zeros(1)}
    torch.save({**content, "state_dict": weights}, tmp_path / "other.ckpt")
    del content["origin"]["pictures"]
    torch.save(content, tmp_path / "old.ckpt")
    for name in ("cat", "dog"):
        (tmp_path / "animals" / "test" / name).mkdir(parents=True)
    before = find_run(run.tracking_uri, "run")
    assert evaluate.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert told in said.err
    assert all(line.startswith("error: ") for line in said.err.splitlines())
    assert find_run(run.tracking_uri, "run") == before


def test_file_that_is_not_there_ends_with_exit_code_1(uri, capsys):
    assert evaluate.main(["nowhere.ckpt"]) == 1
    assert capsys.readouterr().err == "error: nowhere.ckpt: No such file or directory.\n"


def test_store_that_is_not_there_is_told_and_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["run", "--tracking_uri", "sqlite:///mlflow.db"]) == 2
    assert "There are no runs yet in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_is_one_screen_and_needs_no_torch():
    code = (
        "import sys, research.evaluate; assert research.evaluate.main(['--help']) == 0;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'mlflow', 'jsonargparse')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == evaluate.HELP
    assert len(evaluate.HELP.splitlines()) <= 30
    assert max(len(line) for line in evaluate.HELP.splitlines()) <= 100


@pytest.mark.slow
def test_two_processes_give_one_table_and_the_same_decisions(run, project):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    ran = subprocess.run(
        [sys.executable, "-m", "research.evaluate", "run", *devices, "--name", "in two"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("negative_log_likelihood") == 1
    for name, value in metrics_under(run, "in two").items():
        assert value == pytest.approx(run.metrics[name.replace("in two/", "test/", 1)], rel=1e-5)


def test_trust_takes_no_value():
    for typed in (["--trust", "abcd"], ["abcd", "--trust"], ["--trust", "--name", "x", "abcd"]):
        asked = evaluate.read_arguments(typed)
        assert asked.run == "abcd"
        assert asked.settings.trust
