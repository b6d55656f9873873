"""Pictures labelled by the command, as a person types it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from research import fit, predict
from research.data import Synthetic
from research.tracking.runs import RecordedRun, find_run
from research.tracking.store import sqlite_uri
from tests.test_evaluate import TINY

# MLflow reads its own store with what SQLAlchemy calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a store that all share: one run, named "run"."""
    folder = tmp_path_factory.mktemp("project")
    uri = sqlite_uri(folder / "mlflow.db")
    torch.set_num_threads(1)
    settings = ["--optimizer", "AdamW", "--optimizer.lr", "1e-2", "--model.loss", "BCELoss"]
    assert fit.main([*TINY, *settings, "--tracking_uri", uri, "--run_name", "run"]) == 0
    return folder


@pytest.fixture
def run(project, monkeypatch, tmp_path) -> RecordedRun:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(project / "mlflow.db"))
    return find_run(sqlite_uri(project / "mlflow.db"), "run")


@pytest.fixture(scope="module")
def drawn() -> Synthetic:
    data = Synthetic(num_train=320, num_test=64)
    data.setup()
    return data


def save(array, file) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(file)


# ---- answers -------------------------------------------------------------------------------------


def test_labels_of_the_test_pictures_are_those_of_the_test(run, drawn, capsys):
    """As many are right as the run recorded; order and probabilities are those of the files."""
    for place, picture in enumerate(drawn.splits.test.pixels):
        save(picture, f"pictures/{place:02}.png")
    assert predict.main(["run", "pictures", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [entry["file"] for entry in said] == [f"pictures/{place:02}.png" for place in range(64)]
    labels = [drawn.class_names[label] for label in drawn.splits.test.labels]
    right = sum(entry["label"] == label for entry, label in zip(said, labels, strict=True))
    assert right / 64 == run.metrics["test/accuracy"]
    nats = 0.0
    for entry, label in zip(said, labels, strict=True):
        assert set(entry) == {"file", "label", "probability", "probabilities"}
        assert list(entry["probabilities"]) == list(drawn.class_names)
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert entry["probability"] == max(entry["probabilities"].values())
        assert entry["probabilities"][entry["label"]] == entry["probability"]
        nats -= np.log(entry["probabilities"][label])
    assert nats / 64 == pytest.approx(run.metrics["test/negative_log_likelihood"], rel=1e-4)


def test_table_tells_file_label_probability_and_the_next_best(run, drawn, capsys):
    save(drawn.splits.test.pixels[0], "a.png")
    assert predict.main(["run", "a.png", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    ranked = sorted(entry["probabilities"].items(), key=lambda pair: -pair[1])
    assert predict.main(["run", "a.png"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "label", "probability", "next", "best"]
    expected = ", ".join(f"{name} {probability:.1%}" for name, probability in ranked[1:3])
    assert line.split(maxsplit=3) == ["a.png", ranked[0][0], f"{ranked[0][1]:.1%}", expected]
    assert predict.main(["run", "a.png", "--top", "1"]) == 0
    assert "next best" not in capsys.readouterr().out
    assert predict.main(["run", "--top", "99", "a.png"]) == 0
    assert capsys.readouterr().out.count("%") == 10


def test_any_size_and_mode_is_labelled(run, drawn, capsys):
    picture = Image.fromarray(drawn.splits.test.pixels[0].numpy())
    picture.save("plain.png")
    picture.resize((64, 64), Image.Resampling.NEAREST).save("large.png")
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste(picture, (32, 0))  # the middle is what counts
    wide.save("wide.png")
    picture.convert("L").save("grey.bmp")
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save("palette.gif")
    picture.convert("RGBA").save("transparent.webp", lossless=True)
    picture.convert("CMYK").save("print.jpg")
    picture.resize((1, 300)).save("line.tif")
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64).save("sixteen.png")
    files = sorted(str(file) for file in Path().iterdir())
    assert predict.main(["run", *files, "--json"]) == 0
    said = {entry["file"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert len(said) == len(files) == 9
    plain = said["plain.png"]["probabilities"]
    for same in ("wide.png", "transparent.webp", "large.png"):
        near = pytest.approx(plain, abs=0.0 if same != "large.png" else 0.1)
        assert said[same]["probabilities"] == near


def test_folders_are_searched_to_the_bottom(run, drawn, capsys):
    for file in ("b/2.png", "b/deep/er/1.JPG", "b/.hidden/3.png", "b/.4.png", "c.png"):
        save(drawn.splits.test.pixels[0], file)
    Path("b/notes.txt").write_text("no picture")
    assert predict.main(["run", "c.png", "b", "b/2.png", "--json"]) == 0
    said = [entry["file"] for entry in json.loads(capsys.readouterr().out)]
    assert said == ["c.png", "b/2.png", "b/deep/er/1.JPG"]


def test_many_pictures_come_in_order_with_the_faulty_ones_left_out(run, drawn, capsys, monkeypatch):
    monkeypatch.setattr(predict, "FILES_AT_ONCE", 24)
    monkeypatch.setattr(predict, "PICTURES_AT_ONCE", 5)
    for place in range(50):
        save(drawn.splits.test.pixels[place], f"many/{place:02}.png")
    assert predict.main(["run", "many", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    for place in (0, 7, 8, 49):
        Path(f"many/{place:02}.png").write_text("no picture")
    assert predict.main(["run", "many", "--json"]) == 1
    said = capsys.readouterr()
    rest = json.loads(said.out)
    assert [row["file"] for row in rest] == [
        row["file"] for row in whole if row["file"][5:7] not in ("00", "07", "08", "49")
    ]
    for row in rest:
        (other,) = [entry for entry in whole if entry["file"] == row["file"]]
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert [line[:11] for line in said.err.splitlines()] == [
        f"many/{place}.png" for place in ("00", "07", "08", "49")
    ]


def test_checkpoint_file_needs_neither_store_nor_data(run, drawn, tmp_path, monkeypatch, capsys):
    save(drawn.splits.test.pixels[0], "a.png")
    assert predict.main(["run", "a.png"]) == 0
    told = capsys.readouterr().out
    shutil.copy(run.checkpoint("best"), "mine.ckpt")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nowhere.db")
    monkeypatch.setattr(Synthetic, "read", None)
    assert predict.main(["mine.ckpt", "a.png"]) == 0
    assert capsys.readouterr().out == told
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "mine.ckpt"]


def test_other_checkpoint_gives_other_answers(run, drawn, capsys):
    save(drawn.splits.test.pixels[0], "a.png")
    told = []
    for name in ("best", "last"):
        shutil.copy(run.checkpoint(name), f"{name}.ckpt")
        assert predict.main(["run", "a.png", "--checkpoint", name, "--json"]) == 0
        told.append(capsys.readouterr().out)
        assert predict.main([f"{name}.ckpt", "a.png", "--json"]) == 0
        assert capsys.readouterr().out == told[-1]
    epochs = [torch.load(f"{name}.ckpt", weights_only=True)["epoch"] for name in ("best", "last")]
    assert (told[0] == told[1]) == (epochs[0] == epochs[1])


# ---- mistakes ------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_told_and_the_others_labelled(run, drawn, capsys):
    save(drawn.splits.test.pixels[0], "good.png")
    Path("bad.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:200])
    Path("empty").mkdir()
    assert predict.main(["run", "bad.png", "good.png", "nowhere.png", "empty", "cut.png"]) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line.split()[0] for line in lines] == ["nowhere.png", "empty", "bad.png", "cut.png"]
    assert all(line.endswith(".") for line in lines)
    assert [line.split()[0] for line in said.out.splitlines()] == ["file", "good.png"]


def test_nothing_to_label_ends_with_exit_code_1(run, capsys):
    assert predict.main(["run", "nowhere.png"]) == 1
    assert capsys.readouterr() == ("", "nowhere.png is not there.\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "error: the following arguments are required: RUN"),
        (["run"], "error: the following arguments are required: PICTURE"),
        (["run", "a.png", "--top", "0"], "error: top is 0; it must be 1 or more."),
        (["run", "a.png", "--top", "many"], "error: argument --top: invalid int value: 'many'"),
        (["run", "a.png", "--jsn"], "error: unrecognized arguments: --jsn"),
        (["rum", "a.png"], 'error: There is no run "rum" in '),
        (["run", "a.png", "--checkpoint", "frist"], 'no checkpoint "frist"; it has best.ckpt'),
        (["old.ckpt", "a.png"], "error: old.ckpt was written by an older version"),
        (["other.ckpt", "a.png"], "error: The weights in other.ckpt are not those of this network"),
    ],
)
def test_mistake_is_told_in_a_sentence(run, drawn, arguments, told, capsys):
    save(drawn.splits.test.pixels[0], "a.png")
    content = torch.load(run.checkpoint(), weights_only=True)
    weights = {**content["state_dict"], "network.one_more": torch.zeros(1)}
    torch.save({**content, "state_dict": weights}, "other.ckpt")
    del content["origin"]["pictures"]
    torch.save(content, "old.ckpt")
    assert predict.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert told in said.err
    assert all(line.startswith("error: ") for line in said.err.splitlines())


def test_help_is_one_screen_and_needs_no_torch():
    code = (
        "import sys, research.predict; assert research.predict.main(['--help']) == 0;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'mlflow', 'jsonargparse')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == predict.HELP
    assert len(predict.HELP.splitlines()) <= 30
    assert max(len(line) for line in predict.HELP.splitlines()) <= 100
