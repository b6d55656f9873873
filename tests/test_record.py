"""What a recorded run leaves in the store, and that none of it can end a training."""

import csv
from pathlib import Path

import pytest
import torch
import yaml

from research.configuration.schema import resolve
from research.recording.album import leaving_out
from research.recording.identity import files_of
from research.tracking.run import Recorder
from research.training import fit
from tests.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow reading SQL

PICTURES = {
    *("network.svg", "training_batch.png", "learning_curves.png", "confusion_matrix.png"),
    *("mistakes.png", "calibration.png", "feature_maps.png", "filters.png"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One recorder for all runs of this file, and where its store is."""
    folder = tmp_path_factory.mktemp("store")
    with Recorder.start() as recorder:
        yield recorder, f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def client(store):
    from mlflow.tracking import MlflowClient

    return MlflowClient(store[1])


def train(store, *arguments):
    recorder, uri = store
    torch.set_num_threads(1)
    return fit(resolve([*SMALL, "--tracking_uri", uri, *arguments]), recorder)


@pytest.fixture(scope="module")
def result(store):
    return train(store, "--run_name", "whole")


@pytest.fixture(scope="module")
def run(result, client):
    return client.get_run(result.run_id)


@pytest.fixture(scope="module")
def files(run, client):
    """All artifacts by their path."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    folder = Path(local_file_uri_to_path(run.info.artifact_uri))
    return {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}


def test_all_pictures_are_there_and_small(files):
    drawn = {name for name in files if name.startswith("pictures/")}
    assert drawn == {f"pictures/{name}" for name in PICTURES}
    assert sum(files[name].stat().st_size for name in drawn) < 3_000_000


def test_what_was_run_is_there(files, run):
    assert {"config.yaml", "network.txt", "environment/requirements.txt"} <= set(files)
    assert "environment/machine.yaml" in files
    assert yaml.safe_load(files["config.yaml"].read_text())["seed_everything"] == 0
    assert "torch==" in files["environment/requirements.txt"].read_text()
    assert {"fingerprint", "command", "seed", "device"} <= set(run.data.tags)
    assert {"initial_weights", "first_batches"} <= set(run.data.tags)
    assert run.data.params["random.dropout"] == "0"
    convolutions = (3 * 25 + 1) * 4 + (4 * 25 + 1) * 4 + (4 * 25 + 1) * 8
    assert run.data.params["num_parameters"] == str(convolutions + (8 * 16 + 1) * 8 + 9 * 10)


def test_each_split_is_an_input(run):
    inputs = {
        next(tag.value for tag in given.tags if tag.key == "mlflow.data.context"): given.dataset
        for given in run.inputs.dataset_inputs
    }
    assert set(inputs) == {"train", "val", "test"}
    assert {dataset.name for dataset in inputs.values()} == {"Synthetic"}
    assert len({dataset.digest for dataset in inputs.values()}) == 3
    assert "disc" in inputs["test"].profile


def test_figures_of_the_test_split_are_there(run, result):
    names = {"loss", "accuracy", "top3_accuracy", "macro_f1", "expected_calibration_error"}
    names |= {"brier_score", "negative_log_likelihood", "accuracy/disc"}
    for name in names:
        assert run.data.metrics[f"test/{name}"] == result.metrics[f"test/{name}"]


def test_figures_of_every_epoch_are_there(run, client):
    names = ["gradient_norm", "update_to_weight_ratio", "learning_rate", "epoch_seconds"]
    names += ["images_per_second", "train/loss", "val/loss", "train/accuracy", "val/accuracy"]
    for name in names:
        history = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == [1, 2], name


def test_classes_have_a_table(files):
    rows = list(csv.DictReader(files["test/classes.csv"].read_text().splitlines()))
    assert len(rows) == 10


def test_checkpoints_are_models_tied_to_their_figures(run, client, result, files):
    models = {
        model.name: model
        for model in client.search_logged_models(experiment_ids=[run.info.experiment_id])
        if model.source_run_id == run.info.run_id
    }
    assert set(models) == {"best", "last"}
    for name, model in models.items():
        assert model.tags["checkpoint"] == f"checkpoints/{name}.ckpt"
        assert model.tags["checkpoint"] in files
    figures = {metric.key: metric.value for metric in models["best"].metrics}
    assert figures["test/accuracy"] == result.metrics["test/accuracy"]
    assert figures["val/accuracy"] == result.metrics["val/accuracy"]
    figures = {metric.key: metric.value for metric in models["last"].metrics}
    assert figures["val/accuracy"] == result.history[-1]["val/accuracy"]


def test_checkpoints_lie_in_the_run_once(files):
    assert {name for name in files if name.endswith(".ckpt")} == {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }


def test_equal_runs_have_equal_fingerprints(store, client, run):
    def fingerprint(*arguments):
        off = ("--log_pictures", "false", "--log_model", "false", "--log_system_metrics", "false")
        return client.get_run(train(store, *off, *arguments).run_id).data.tags["fingerprint"]

    assert fingerprint("--run_name", "again") == run.data.tags["fingerprint"]
    assert fingerprint("--seed_everything", "1") != run.data.tags["fingerprint"]
    assert fingerprint("--data.picture_seed", "1") != run.data.tags["fingerprint"]


def test_switches_leave_pictures_and_model_out(store, client):
    without = train(store, "--log_pictures", "false", "--log_model", "false")
    names = {file.path for file in client.list_artifacts(without.run_id)}
    assert "pictures" not in names
    assert "checkpoints" in names
    found = client.search_logged_models([without.experiment_id])
    assert without.run_id not in {model.source_run_id for model in found}


def test_what_cannot_be_drawn_ends_nothing(store, client, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr("research.pictures.curves.draw_learning_curves", fail)
    monkeypatch.setattr("research.recording.export.write_model", fail)
    result = train(store)
    assert client.get_run(result.run_id).info.status == "FINISHED"
    told = [record.getMessage() for record in caplog.records]
    assert "Not recorded: pictures/learning_curves.png. no ink" in told
    assert "Not recorded: the model that can be served. no ink" in told


def test_left_out_things_are_told_in_one_line(caplog):
    with leaving_out("a picture"):
        raise ValueError("first line\nsecond line")
    assert [record.getMessage() for record in caplog.records] == [
        "Not recorded: a picture. first line"
    ]


def test_a_class_from_elsewhere_is_part_of_the_code(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from research.networks import CNN\n\n\nclass Mine(CNN):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    configuration = resolve([*SMALL, "--model.network", "mine.Mine"])
    assert files_of(configuration) == [tmp_path / "mine.py"]
    assert files_of(resolve(SMALL)) == []


def test_recorded_configuration_repeats_the_run(files, result, store):
    from research.configuration.compose import read_command_line

    recorder, _ = store
    again = fit(resolve(read_command_line(["--config", str(files["config.yaml"])])), recorder)
    assert again.metrics == result.metrics

    def figures(history):
        return [{k: v for k, v in epoch.items() if "second" not in k} for epoch in history]

    assert figures(again.history) == figures(result.history)


def test_a_diverged_run_has_each_point_once(store, client):
    arguments = ["--optimizer.lr", "1e30", "--non_finite_loss", "ignore"]
    result = train(store, *arguments, "--log_pictures", "false")
    for name in ("train/loss", "test/loss"):
        points = client.get_metric_history(result.run_id, name)
        assert len({point.step for point in points}) == len(points), name


def test_equal_splits_are_told_and_end_nothing(store, client, caplog, monkeypatch):
    from research.data import Synthetic

    monkeypatch.setattr(Synthetic, "read", lambda self: (self._draw(64, "test"),) * 2)
    result = train(store, "--data.val_fraction", "0", "--log_pictures", "false")
    assert "The test split has the same pictures as train." in caplog.text
    assert len(client.get_run(result.run_id).inputs.dataset_inputs) == 1


def test_without_a_best_checkpoint_the_last_one_is_tested_and_served(store, client):
    result = train(store, "--trainer.check_val_every_n_epoch", "5", "--log_pictures", "false")
    (model,) = [
        model
        for model in client.search_logged_models([result.experiment_id])
        if model.source_run_id == result.run_id
    ]
    assert model.name == "last"
    assert "test/accuracy" in {metric.key for metric in model.metrics}
    assert "serve" in model.tags["mlflow.note.content"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_going_on_from_the_end_is_no_fault(store, client):
    recorder, uri = store
    first = train(store, "--log_pictures", "false", "--log_model", "false")
    again = fit(
        resolve([*SMALL, "--tracking_uri", uri, "--log_pictures", "false"]),
        recorder,
        resume_from=Path(first.best_checkpoint).with_name("last.ckpt"),
    )
    assert client.get_run(again.run_id).info.status == "FINISHED"


def test_best_checkpoint_is_told_while_the_run_goes_on(store, client):
    from lightning.pytorch.callbacks import Callback

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("stopped")

    recorder, uri = store
    arguments = ["--checkpoint.save_top_k", "2", "--run_name", "cut short"]
    with pytest.raises(RuntimeError, match="stopped"):
        fit(resolve([*SMALL, "--tracking_uri", uri, *arguments]), recorder, [Stop()])
    (run,) = client.search_runs(["1"], "attributes.run_name = 'cut short'")
    assert run.info.status == "FAILED"
    assert run.data.tags["checkpoint.best"] == "checkpoints/epoch=1.ckpt"
    drawn = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert drawn == {"pictures/network.svg", "pictures/training_batch.png"}
