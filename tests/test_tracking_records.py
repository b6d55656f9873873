"""What else a run takes: provenance, data sets, system metrics, models; and runs opened again."""

import contextlib
import importlib.metadata
import json
import sys
import time
import warnings

import pytest
import yaml

from research.tracking import monitoring
from research.tracking.datasets import dataset_entity, dataset_records, log_inputs
from research.tracking.limits import MAX_TAG
from research.tracking.run import DatasetInput, Recorder
from research.tracking.store import TrackingError, sqlite_uri
from tests.test_tracking_run import client_of, eventually, steps_and_values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy


@pytest.fixture(scope="module")
def client(uri):
    return client_of(uri)


def split(context="train", **changes):
    settings = {
        "name": "Pets",
        "context": context,
        "digest": f"digest of {context}",
        "source": "https://me:secret@example.org/pets.zip",
        "num_pictures": 5,
        "picture_shape": (32, 40, 3),
        "counts": {"cat": 3, "polar_bear": 2},
    }
    return DatasetInput(**settings | changes)


# ---- provenance ----------------------------------------------------------------------------------


def test_every_run_tells_what_it_stood_on(start, client):
    for run in (start(), start()):
        run.finish()
        folder = run.wait().artifact_dir
        lines = (folder / "environment" / "requirements.txt").read_text().splitlines()
        assert f"torch=={importlib.metadata.version('torch')}" in lines
        assert yaml.safe_load((folder / "environment" / "machine.yaml").read_text())["cpu"]
        tags = client.get_run(run.wait().run_id).data.tags
        patch = folder / "code" / "uncommitted.patch.txt"
        assert patch.exists() == (tags.get("git.clean") == "false")
        if patch.exists():
            commit = tags["mlflow.source.git.commit"]
            assert f"from commit {commit}" in patch.read_text(errors="replace")


def test_command_that_is_too_long_for_a_tag_is_whole_in_a_file(tmp_path, monkeypatch, uri, client):
    words = ["python", *(f"--key.{number}={'x' * 90}" for number in range(100))]
    monkeypatch.setattr(sys, "orig_argv", words)
    with Recorder.start() as recorder, recorder.start_run(uri, "long") as run:
        info = run.wait()
    whole = (info.artifact_dir / "environment" / "command.txt").read_text()
    assert whole == " ".join(words)
    shown = client.get_run(info.run_id).data.tags["command"]
    assert len(shown) == MAX_TAG
    assert shown.endswith(f"({len(whole)} characters)")


# ---- data sets -----------------------------------------------------------------------------------


def test_inputs_come_back_as_mlflow_keeps_them(start, client, tmp_path):
    run = start()
    run.log_inputs([split(), split("val", source=str(tmp_path)), split("test", source="drawn")])
    run.log_inputs([split()])  # again: nothing new
    run.finish()
    inputs = client.get_run(run.wait().run_id).inputs.dataset_inputs
    found = {given.tags[0].value: given.dataset for given in inputs}
    assert {given.tags[0].key for given in inputs} == {"mlflow.data.context"}
    assert len(inputs) == len(found) == 3
    assert (found["train"].name, found["train"].digest) == ("Pets", "digest of train")
    profile = json.loads(found["train"].profile)
    assert profile["num_pictures"] == 5
    assert profile["height_width_channels"] == [32, 40, 3]
    assert (profile["pictures of cat"], profile["pictures of polar_bear"]) == (3, 2)
    assert profile["num_classes"] == 2
    assert json.loads(found["test"].profile)["source"] == "drawn"  # the page shows it nowhere else
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.data
        from mlflow.data.schema import TensorDatasetSchema

        source = {name: mlflow.data.get_source(dataset) for name, dataset in found.items()}
        schema = TensorDatasetSchema.from_dict(json.loads(found["train"].schema))
    assert source["train"].url == "https://me:***@example.org/pets.zip"
    assert source["val"].uri == str(tmp_path)
    assert source["test"].to_dict() == {"tags": {"mlflow.source.name": "drawn"}}
    assert schema.features.inputs[0].shape == (-1, 32, 40, 3)
    assert schema.targets.inputs[0].shape == (-1,)


@pytest.mark.parametrize("words", ["UNIQUE constraint failed: datasets", "no such run"])
def test_data_sets_that_another_run_adds_just_now_are_asked_for_again(words):
    class Racing:
        calls = 0

        def log_inputs(self, run_id, datasets):
            self.calls += 1
            if self.calls == 1 or "UNIQUE" not in words:
                raise RuntimeError(words)

    client = Racing()
    with contextlib.nullcontext() if "UNIQUE" in words else pytest.raises(RuntimeError):
        log_inputs(client, "run", [])
    assert client.calls == (2 if "UNIQUE" in words else 1)


def test_a_thousand_classes_have_their_counts(start, client):
    counts = {f"n{number:08} ünusual": number for number in range(1000)}
    run = start()
    run.log_inputs([split(counts=counts)])
    run.finish()
    (given,) = client.get_run(run.wait().run_id).inputs.dataset_inputs
    profile = json.loads(given.dataset.profile)
    assert profile["pictures_of"] == counts
    assert (profile["fewest_pictures_of_a_class"], profile["most_pictures_of_a_class"]) == (0, 999)
    assert len(profile) < 10  # lines that the page would print one under the other


def test_schema_and_sources_are_those_of_mlflows_own_classes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import numpy
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.numpy_dataset import from_numpy

        for address in (str(tmp_path), "https://example.org/pets.zip", "s3://bucket/pets"):
            pictures = numpy.zeros((2, 32, 40, 3), numpy.uint8)
            labels = numpy.zeros(2, numpy.int64)
            theirs = from_numpy(pictures, resolve_dataset_source(address), labels).to_dict()
            ours = dataset_entity(dataset_records([split(source=address)])[0]).dataset
            assert (ours.source_type, ours.source) == (theirs["source_type"], theirs["source"])
            assert json.loads(ours.schema) == json.loads(theirs["schema"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": "x" * 37}, "digest .* 37 characters; MLflow takes 1 to 36"),
        ({"digest": ""}, "digest .* 0 characters"),
        ({"name": "x" * 501}, "name .* 501 characters"),
        ({"digest": "digest of train"}, "same name and digest"),
    ],
)
def test_inputs_that_mlflow_refuses_or_confuses_are_refused_at_the_call(start, changes, words):
    run = start()
    with pytest.raises(ValueError, match=words):
        run.log_inputs([split(), split("val", **changes)])
    run.finish()


# ---- system metrics ------------------------------------------------------------------------------


def test_system_metrics_come_from_the_first_second_until_the_end(start, client, uri):
    run, other = start(log_system_metrics=True), start()
    run.log_metrics({"loss": 1.0}, step=7)
    name = "system/cpu_utilization_percentage"
    assert eventually(lambda: steps_and_values(uri, run, name), 20)
    begin = time.monotonic()
    run.finish()
    assert time.monotonic() - begin < 3  # waits for no sample
    other.finish()
    metrics = client.get_run(run.wait().run_id).data.metrics
    assert {"system/system_memory_usage_megabytes", "system/disk_usage_percentage"} <= set(metrics)
    assert metrics["loss"] == 1.0
    (step, value), *_ = steps_and_values(uri, run, name)
    assert step == 0
    assert 0 <= value <= 100
    assert not client.get_run(other.wait().run_id).data.metrics


def test_samples_follow_each_other_until_they_are_ended(monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    samples = []
    end = monitoring.start_sampling(samples.append)
    assert eventually(lambda: len(samples) > 3)
    end()
    time.sleep(1)  # one may be on its way
    before = len(samples)
    time.sleep(0.5)
    assert len(samples) == before
    assert [rows[0][2] for rows in samples] == list(range(before))
    assert all(rows[0][0].startswith("system/") for rows in samples)


def test_short_runs_have_some_samples_and_long_ones_not_too_many():
    elapsed, moments = monitoring.FIRST_SECONDS, []
    while elapsed < 7 * 24 * 3600:
        moments.append(elapsed)
        elapsed += monitoring.sampling_interval(elapsed)
    assert sum(moment <= 20 for moment in moments) >= 4
    assert len(moments) < 12_000


def test_without_psutil_nothing_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.system_metrics.metrics.cpu_monitor", None)
    samples = []
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    end = monitoring.start_sampling(samples.append)
    time.sleep(1)
    end()
    assert samples == []


# ---- models and folders --------------------------------------------------------------------------


def test_model_is_tied_to_its_run_and_its_metrics(start, client):
    run = start()
    run.log_inputs([split()])
    run.log_metrics({"train/loss": 0.5}, step=3)
    run.log_model("best", 3, {"train/loss": 0.5}, params={"epoch": 3}, tags={"of": "the last"})
    run.log_model("best", 4, {"train/loss": 0.25})
    run.flush()
    run.finish()
    info = run.wait()
    (model,) = client.search_logged_models([info.experiment_id])
    assert (model.name, model.source_run_id) == ("best", info.run_id)
    assert model.params == {"epoch": "3"}
    assert model.tags["of"] == "the last"
    assert {(metric.step, metric.value) for metric in model.metrics} == {(3, 0.5), (4, 0.25)}


def test_model_without_its_folder_is_refused_at_the_call(start, tmp_path):
    run = start()
    with pytest.raises(ValueError, match="is no folder"):
        run.log_model("best", 1, {}, folder=tmp_path / "nothing")
    with pytest.raises(ValueError, match="metric name"):
        run.log_model("best", 1, {"a,b": 1.0})
    run.finish()


def test_model_that_cannot_be_recorded_is_told_and_costs_nothing_else(start, client, tmp_path):
    run = start()
    run.log_model("best", 1, {"loss": 1.0}, folder=tmp_path)  # nothing in it
    run.log_metrics({"loss": 2.0}, step=2)
    with pytest.raises(TrackingError, match="model best refused"):
        run.finish()
    stored = client.get_run(run.wait().run_id)
    assert (stored.info.status, stored.data.metrics["loss"]) == ("FINISHED", 2.0)


def test_folder_is_recorded_with_all_that_lies_below(start, tmp_path):
    files = {"a.txt": "a", "deep/er/b.txt": "b", ".hidden": "c"}
    for name, text in files.items():
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name).write_text(text)
    run = start()
    run.log_artifact(tmp_path / "notes", "in")
    (tmp_path / "notes" / "a.txt").write_text("a, later")
    run.log_artifact(tmp_path / "notes", "in")
    run.finish()
    folder = run.wait().artifact_dir / "in" / "notes"
    found = {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == files | {"a.txt": "a, later"}


# ---- runs opened again ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed(recorder, uri):
    """What the store says of a run that is over."""
    run = recorder.start_run(uri, "over", "the first", params={"lr": 0.1})
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish("FAILED")
    return run.wait()


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt()])
def test_opened_run_takes_records_and_stays_what_it_was(recorder, uri, client, failed, error):
    before = client.get_run(failed.run_id)
    name = f"again/{type(error).__name__}"
    ending = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with ending, recorder.open_run(uri, failed.run_id) as run:
        assert run.wait() == failed
        assert run.experiment == "over"
        run.log_metrics({name: 0.5}, step=2)
        run.log_text("more", "more.txt")
        run.set_tags({"evaluated": "yes"})
        if error is not None:
            raise error
    after = client.get_run(failed.run_id)
    assert vars(after.info) == vars(before.info)
    assert after.info.status == "FAILED"
    assert after.data.metrics == before.data.metrics | {name: 0.5}
    assert after.data.params == {"lr": "0.1"}
    assert after.data.tags == before.data.tags | {"evaluated": "yes"}
    assert (failed.artifact_dir / "more.txt").read_text() == "more"


def test_opened_run_stays_what_it_was_when_its_process_ends(uri, client, failed):
    before = client.get_run(failed.run_id)
    with Recorder.start() as recorder:
        run = recorder.open_run(uri, failed.run_id)
        run.wait()
        run.log_metrics({"orphan": 1.0}, step=1)
    after = client.get_run(failed.run_id)
    assert vars(after.info) == vars(before.info)
    assert after.data.metrics["orphan"] == 1.0
    with pytest.raises(TrackingError, match="closed"):
        run.finish()


def test_parameter_of_an_opened_run_cannot_change(recorder, uri, failed):
    run = recorder.open_run(uri, failed.run_id)
    run.log_params({"lr": 0.2})
    with pytest.raises(TrackingError, match=r"parameter refused: .*Changing param"):
        run.finish()


def test_runs_that_cannot_be_opened_are_refused(recorder, start, uri, client, tmp_path):
    gone = start()
    gone.finish()
    run_id = gone.wait().run_id
    client.delete_run(run_id)
    with pytest.raises(TrackingError, match=rf"{run_id}\) was deleted.*mlflow runs restore"):
        recorder.open_run(uri, run_id).wait()
    with pytest.raises(TrackingError, match='There is no run "0123"'):
        recorder.open_run(uri, "0123").wait()
    with pytest.raises(TrackingError, match="There is no store at"):
        recorder.open_run(sqlite_uri(tmp_path / "sub" / "mlflow.db"), run_id).wait()
    assert not (tmp_path / "sub").exists()
    lost = recorder.open_run(uri, "0123")
    with pytest.raises(TrackingError, match="There is no run"):
        lost.finish()
