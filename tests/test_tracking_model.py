"""Models in MLflow: recorded once whatever happens, tied to their figures, served without us."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from research.data.decoding import decode
from research.data.normalization import Normalization, normalize
from research.losses import CrossEntropyLoss
from research.networks import CNN
from research.recording.export import write_model
from research.tracking.model import log_model
from research.tracking.serving import _load_pyfunc, resize
from research.tracking.store import sqlite_uri

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy

SIZE = 16
NAMES = [f"class {letter}" for letter in "abcdefghij"]
NORMALIZATION = Normalization((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
FIGURES = {"val/accuracy": 0.625, "test/loss": 1.5}


def draw(count, height=SIZE, width=SIZE):
    shape = (count, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CNN(image_size=SIZE, activation="ReLU").eval()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_model(folder, network, CrossEntropyLoss(), NORMALIZATION, NAMES, draw(2), epoch=3)
    return folder


@pytest.fixture(scope="module")
def mlflow_client():
    """MLflow's own client class; imported late and once, for it takes seconds and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.pyfunc

        return mlflow.MlflowClient


@pytest.fixture(scope="module")
def client(mlflow_client, tmp_path_factory):
    """A store that the tests share; each has a run of its own."""
    place = tmp_path_factory.mktemp("store")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own making
        client = mlflow_client(sqlite_uri(place / "mlflow.db"))
        client.create_experiment("pictures", str(place / "mlruns"))
    return client


@pytest.fixture
def record(client, folder):
    """Records a model of the test's own run; `record.run_id` is that run's id."""
    experiment = client.get_experiment_by_name("pictures").experiment_id
    tags = {"mlflow.user": "somebody", "mlflow.source.name": "research.fit", "seed": "3"}
    run_id = client.create_run(experiment, tags=tags).info.run_id

    def record(folder=folder, name="best", step=3, metrics=FIGURES, tags=None):
        params = {"optimizer": "SGD"}
        return log_model(
            client, run_id, experiment, folder, name, step, metrics, params, tags or {}
        )

    record.run_id, record.experiment = run_id, experiment
    return record


def expected(network, pictures):
    """The probabilities of pictures that have the network's size."""
    images = normalize(torch.tensor(pictures), *NORMALIZATION.factors(SIZE)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return network(images).softmax(dim=1).numpy()


def table(answers):
    return np.array([[row["probabilities"][name] for name in NAMES] for row in answers])


def files_of(client, model_id):
    place = Path(client.get_logged_model(model_id).artifact_location.removeprefix("file://"))
    return sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())


# ---- what is recorded ----------------------------------------------------------------------------


def test_model_holds_signature_example_classes_and_exact_packages(client, record):
    from mlflow.models import Model

    model = client.get_logged_model(record())
    assert model.status == "READY" and model.name == "best"
    assert model.params == {"optimizer": "SGD"}
    saved = Model.load(model.artifact_location)
    [pictures] = saved.signature.inputs.inputs
    assert (pictures.type, pictures.shape) == (np.dtype("uint8"), (-1, -1, -1, 3))
    assert saved.signature.outputs.input_names() == ["label", "probability", "probabilities"]
    np.testing.assert_array_equal(saved.load_input_example(model.artifact_location), draw(2))
    assert saved.metadata == {"class_names": NAMES, "image_size": SIZE, "epoch": 3}
    lines = (Path(model.artifact_location) / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} == {
        *("mlflow", "torch", "numpy", "pandas", "pillow")
    }
    assert f"torch=={torch.__version__.partition('+')[0]}" in lines


def test_model_tells_who_made_it_and_how_it_is_used(client, record):
    model_id = record(tags={"checkpoint": "checkpoints/best.ckpt"})
    tags = client.get_logged_model(model_id).tags
    assert tags["mlflow.user"] == "somebody" and tags["mlflow.source.name"] == "research.fit"
    assert tags["checkpoint"] == "checkpoints/best.ckpt"
    assert "seed" not in tags
    assert f"mlflow models serve -m models:/{model_id} " in tags["mlflow.note.content"]


def test_metrics_are_tied_to_model_and_dataset_and_not_told_twice_by_the_run(client, record):
    from mlflow.entities import Dataset, DatasetInput, InputTag

    test = Dataset("CIFAR10", "0123abcd", "local", "{}")
    context = InputTag("mlflow.data.context", "test")
    client.log_inputs(record.run_id, [DatasetInput(test, [context])])
    for step, value in ((2, 0.5), (3, 0.625), (4, 0.625)):
        client.log_metric(record.run_id, "val/accuracy", value, timestamp=step, step=step)
    metrics = {metric.key: metric for metric in client.get_logged_model(record()).metrics}
    assert {key: metric.value for key, metric in metrics.items()} == FIGURES
    assert {metric.step for metric in metrics.values()} == {3}
    assert metrics["test/loss"].dataset_name == "CIFAR10"
    assert metrics["test/loss"].dataset_digest == "0123abcd"
    assert metrics["val/accuracy"].dataset_name is None
    history = client.get_metric_history(record.run_id, "val/accuracy")
    assert sorted((m.step, m.value) for m in history) == [(2, 0.5), (3, 0.625), (4, 0.625)]
    assert len(client.get_metric_history(record.run_id, "test/loss")) == 1


def test_model_without_files_is_known_by_its_figures(client, record):
    model_id = record(folder=None, name="last", tags={"checkpoint": "checkpoints/last.ckpt"})
    model = client.get_logged_model(model_id)
    assert model.status == "READY" and model.tags["checkpoint"] == "checkpoints/last.ckpt"
    assert {metric.key: metric.value for metric in model.metrics} == FIGURES
    assert files_of(client, model_id) == []
    assert record() != model_id  # of another name


@pytest.mark.parametrize("step", ["log_model_artifacts", "log_outputs", "log_batch"])
def test_failure_half_way_is_told_and_tried_again_with_the_same_model(
    client, record, step, monkeypatch
):
    def fail(*arguments, **keywords):
        raise OSError("no space left")

    def models():
        of_run = f"source_run_id = '{record.run_id}'"
        return client.search_logged_models([record.experiment], filter_string=of_run)

    with monkeypatch.context() as patch:
        patch.setattr(client, step, fail)
        with pytest.raises(OSError, match="no space"):
            record()
    [half] = models()
    assert half.status == "FAILED"
    ids = [record(), record()]
    assert ids == [half.model_id] * 2
    [whole] = models()
    assert whole.status == "READY"
    assert {metric.key: metric.value for metric in whole.metrics} == FIGURES
    assert len(client.get_metric_history(record.run_id, "test/loss")) == 1
    [output] = client.get_run(record.run_id).outputs.model_outputs
    assert (output.model_id, output.step) == (half.model_id, 3)
    assert len([f for f in files_of(client, half.model_id) if f.endswith(".pt2")]) == 1


def test_lock_file_that_lies_around_does_not_get_into_the_model(
    client, record, tmp_path, monkeypatch
):
    for name in ("uv.lock", "pyproject.toml"):
        (tmp_path / name).write_text("[project]\n")
    monkeypatch.chdir(tmp_path)
    assert not {"uv.lock", "pyproject.toml"} & set(files_of(client, record()))


# ---- what it answers -----------------------------------------------------------------------------


def test_served_pictures_of_any_size_are_cut_as_those_of_a_folder(tmp_path):
    for height, width in ((40, 40), (33, 50), (50, 21), (7, 9), (SIZE, 30)):
        [picture] = draw(1, height, width)
        file = tmp_path / f"{height}x{width}.png"
        Image.fromarray(picture).save(file)
        [decoded] = decode([str(file)], SIZE, resize=True)
        np.testing.assert_array_equal(resize(picture, SIZE), decoded)


def test_label_is_the_class_of_the_highest_probability(folder, network):
    model = _load_pyfunc(str(folder))
    pictures = draw(300)  # more than go through the network at once
    found = model.predict(pictures)
    probabilities = expected(network, pictures)
    np.testing.assert_allclose(table(found.to_dict("records")), probabilities, atol=1e-6)
    assert list(found["label"]) == [NAMES[row.argmax()] for row in probabilities]
    np.testing.assert_allclose(found["probability"], probabilities.max(axis=1), atol=1e-6)
    assert list(model.predict(draw(0)).columns) == list(found.columns)
    pictures.flags.writeable = False  # as Pillow hands them out
    reversed_rows = model.predict(pictures[::-1])
    assert list(reversed_rows["label"]) == list(found["label"])[::-1]


@pytest.mark.parametrize(
    "wrong", [draw(2)[0], draw(2)[..., :1], draw(2).astype(float), draw(2).astype(int)]
)
def test_other_arrays_are_refused_in_plain_words(folder, wrong):
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(N, H, W, 3\)"):
        _load_pyfunc(str(folder)).predict(wrong)


LOAD = """
import json, sys
import mlflow, numpy
pictures = numpy.load("pictures.npy")
answers = [mlflow.pyfunc.load_model(uri).predict(pictures) for uri in sys.argv[1:]]
assert not [name for name in sys.modules if name.partition(".")[0] == "research"]
json.dump([answer.to_dict("records") for answer in answers], open("answers.json", "w"))
"""


def environment(client):
    theirs = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    # `mlflow models serve` starts uvicorn by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"MLFLOW_TRACKING_URI": client.tracking_uri, "OMP_NUM_THREADS": "1", "PATH": path}
    return theirs | quiet | ours


@pytest.mark.slow
def test_model_is_loaded_without_this_code_and_in_silence(client, record, network, tmp_path):
    np.save(tmp_path / "pictures.npy", draw(3))
    uris = [f"models:/{record()}", f"runs:/{record.run_id}/best"]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, *uris],
        cwd=tmp_path,
        env=environment(client),
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout + loaded.stderr == ""
    for answers in json.loads((tmp_path / "answers.json").read_text()):
        np.testing.assert_allclose(table(answers), expected(network, draw(3)), atol=1e-5)


RECORD = """
import sys
from pathlib import Path
from mlflow.tracking import MlflowClient
from research.tracking.model import log_model
uri, run_id, experiment_id, folder = sys.argv[1:]
log_model(MlflowClient(uri), run_id, experiment_id, Path(folder), "best", 1, {}, {}, {})
assert "torch" not in sys.modules
"""


def test_recording_imports_no_torch_and_leaves_nothing_in_the_working_directory(
    client, record, folder, tmp_path
):
    arguments = [client.tracking_uri, record.run_id, record.experiment, str(folder)]
    ours = {"PYTHONPATH": str(Path(__file__).parents[1]), "MLFLOW_DISABLE_TELEMETRY": "true"}
    recorded = subprocess.run(
        [sys.executable, "-c", RECORD, *arguments],
        cwd=tmp_path,
        env=os.environ | ours,
        capture_output=True,
        text=True,
    )
    assert recorded.returncode == 0, recorded.stderr
    assert list(tmp_path.iterdir()) == []


# ---- MLflow's own commands -----------------------------------------------------------------------


def mlflow(*arguments):
    return [sys.executable, "-m", "mlflow", "models", *arguments, "--env-manager", "local"]


@pytest.mark.slow
def test_mlflow_models_predict_answers_raw_pictures(client, record, network, tmp_path):
    pictures = draw(2)
    (tmp_path / "input.json").write_text(json.dumps({"inputs": pictures.tolist()}))
    asked = subprocess.run(
        mlflow("predict", "-m", f"models:/{record()}", "-i", "input.json"),
        cwd=tmp_path,
        env=environment(client),
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr
    answers = json.loads(asked.stdout)["predictions"]
    np.testing.assert_allclose(table(answers), expected(network, pictures), atol=1e-5)


@pytest.mark.slow
def test_mlflow_models_serve_answers_pictures_over_http(client, record, network, tmp_path):
    record()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "serve.log"
    with open(log, "wb") as file:
        server = subprocess.Popen(
            mlflow("serve", "-m", f"runs:/{record.run_id}/best", "--port", str(port)),
            cwd=tmp_path,
            env=environment(client),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"

    def ask(pictures):
        request = urllib.request.Request(
            f"{address}/invocations",
            data=json.dumps({"inputs": pictures.tolist()}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)["predictions"]

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        np.testing.assert_allclose(table(ask(draw(2))), expected(network, draw(2)), atol=1e-5)
        [large] = draw(1, 40, 60)
        [answer] = ask(large[None])
        resized = expected(network, resize(large, SIZE)[None])
        np.testing.assert_allclose(table([answer]), resized, atol=1e-5)
        assert answer["label"] == NAMES[resized.argmax()]
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(np.full((1, 2, 2, 3), 300))
        assert "out of bounds for uint8" in refused.value.read().decode()
        refused.value.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.slow
def test_model_goes_through_a_tracking_server_and_back(mlflow_client, folder, network, tmp_path):
    from tests.test_tracking_server import Server

    server = Server(tmp_path)
    server.start()
    try:
        client = mlflow_client(server.uri)
        experiment = client.create_experiment("pictures")
        run_id = client.create_run(experiment).info.run_id
        client.log_metric(run_id, "val/accuracy", 0.625, step=3)
        arguments = (client, run_id, experiment, folder, "best", 3, FIGURES, {}, {})
        first = log_model(*arguments)
        assert log_model(*arguments) == first
        model = client.get_logged_model(first)
        assert model.status == "READY"
        assert {metric.key: metric.value for metric in model.metrics} == FIGURES
        assert len(client.get_metric_history(run_id, "val/accuracy")) == 1
        np.save(tmp_path / "pictures.npy", draw(3))
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, f"runs:/{run_id}/best"],
            cwd=tmp_path,
            env=environment(client),
            capture_output=True,
            text=True,
        )
        assert loaded.returncode == 0, loaded.stderr
        [answers] = json.loads((tmp_path / "answers.json").read_text())
        np.testing.assert_allclose(table(answers), expected(network, draw(3)), atol=1e-5)
    finally:
        server.stop()
