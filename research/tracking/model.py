"""A model of a run in MLflow: its metrics, its parameters and, where there is one, what serves it.

For the companion process: imports MLflow, never torch, and takes the client that it is given, so
that one process serves several stores. A run has one model of each name; recording it again, after
a failure half-way or with newer weights, goes on with that one.
"""

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

SERVING = Path(__file__).with_name("serving.py")
PACKAGES = ("torch", "numpy", "pandas", "pillow")  # what serving.py imports


def log_model(
    client: Any,  # mlflow.MlflowClient
    run_id: str,
    experiment_id: str,
    folder: Path | None,
    name: str,
    step: int,
    metrics: dict[str, float],
    params: dict[str, str],
    tags: dict[str, str],
) -> str:
    """Record a model of the run; its id. `runs:/<run id>/<name>` and `models:/<id>` address it.

    folder: what `recording.export.write_model` wrote; None for a model without files, whose
        tags say where its weights are.
    metrics: of these very weights, at `step`; the run gets those that it has not yet.

    On an error the model is left as FAILED.
    """
    run = client.get_run(run_id)
    model = find_model(client, run_id, experiment_id, name)
    if model is None:
        model = client.create_logged_model(experiment_id, name, source_run_id=run_id, params=params)
    model_id = model.model_id
    try:
        tags = origin(run) | ({} if folder is None else description(model_id)) | tags
        client.set_logged_model_tags(model_id, tags)
        link_to_run(client, run, model_id, step)
        if folder is not None:
            with tempfile.TemporaryDirectory() as scratch:
                files = Path(scratch) / "model"
                save_model(folder, files, run_id, model)
                client.log_model_artifacts(model_id, str(files))
        log_metrics(client, run, model_id, step, metrics)
        client.finalize_logged_model(model_id, "READY")
    except BaseException:
        with contextlib.suppress(Exception):  # the first error tells what is wrong
            client.finalize_logged_model(model_id, "FAILED")
        raise
    return model_id


def find_model(client: Any, run_id: str, experiment_id: str, name: str) -> Any:
    """The run's model of this name, None if there is none yet."""
    found = client.search_logged_models(
        [experiment_id], filter_string=f"name = '{name}' AND source_run_id = '{run_id}'"
    )
    return found[0] if found else None


def origin(run: Any) -> dict[str, str]:
    """Who recorded the run and with what, as MLflow tells it of a model too."""
    told = ("mlflow.user", "mlflow.source.")
    return {key: value for key, value in run.data.tags.items() if key.startswith(told)}


def description(model_id: str) -> dict[str, str]:
    """What the model's page says of it, in Markdown; the page shows no signature by itself."""
    text = (
        "Takes pictures in RGB, uint8 of shape (N, H, W, 3), of any height and width. Answers with "
        "`label`, its `probability`, and `probabilities` by class name.\n\n"
        f"    mlflow models serve -m models:/{model_id} --env-manager local --port 5001\n"
    )
    return {"mlflow.note.content": text}


def link_to_run(client: Any, run: Any, model_id: str, step: int) -> None:
    from mlflow.entities import LoggedModelOutput

    known = [output.model_id for output in run.outputs.model_outputs] if run.outputs else []
    if model_id not in known:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step)])


def log_metrics(client: Any, run: Any, model_id: str, step: int, metrics: dict[str, float]) -> None:
    """Tie the metrics to the model and to the dataset that they were measured on.

    MLflow records a model's metric for its run as well. Where the run has that value already, its
    step and time are taken, so that the run's curve does not get the point twice.
    """
    from mlflow.entities import Metric

    run_id = run.info.run_id
    datasets = by_context(run.inputs.dataset_inputs if run.inputs else [])
    now = int(1000 * time.time())
    rows = []
    for key, value in metrics.items():
        history = client.get_metric_history(run_id, key)
        points = [(m.step, m.timestamp) for m in history if same(m.value, value)]
        at, time_of = min(points, key=lambda point: abs(point[0] - step), default=(step, now))
        dataset = datasets.get(key.partition("/")[0])
        rows.append(
            Metric(
                key,
                value,
                time_of,
                at,
                model_id=model_id,
                dataset_name=dataset and dataset.name,
                dataset_digest=dataset and dataset.digest,
            )
        )
    if rows:
        client.log_batch(run_id, metrics=rows)


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def by_context(dataset_inputs: list[Any]) -> dict[str, Any]:
    """The datasets of a run by what they are for: train, val, test, as metrics' names begin."""
    return {
        tag.value: each.dataset
        for each in dataset_inputs
        for tag in each.tags
        if tag.key == "mlflow.data.context"
    }


def save_model(folder: Path, files: Path, run_id: str, model: Any) -> None:
    """Make an MLflow model, `files`, out of an exported one, `folder`."""
    import mlflow.pyfunc
    import numpy
    from mlflow.models import Model

    about = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    code = SERVING.read_bytes()
    # Python imports a name once: two models of different ages must not share it.
    module = f"picture_classifier_{hashlib.sha256(code).hexdigest()[:8]}"
    with tempfile.TemporaryDirectory() as scratch, only_given_packages():
        copied = Path(scratch) / f"{module}.py"
        copied.write_bytes(code)
        data = Path(scratch) / "exported"  # the same name each time: it becomes part of the model
        data.mkdir()
        for file in ("program.pt2", "classes.json"):
            shutil.copyfile(folder / file, data / file)
        mlflow.pyfunc.save_model(
            str(files),
            loader_module=module,
            data_path=str(data),
            code_paths=[str(copied)],
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                model_id=model.model_id,
                run_id=run_id,
            ),
            metadata={key: about[key] for key in ("class_names", "image_size", "epoch")},
            signature=signature(),
            input_example=numpy.load(folder / "examples.npy"),
            pip_requirements=requirements(),
        )


def signature() -> Any:
    """Bytes (-1, -1, -1, 3) in; label, probability, and probabilities by class name out."""
    import numpy
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Map

    pictures = TensorSpec(numpy.dtype("uint8"), (-1, -1, -1, 3))
    answers: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.string, "label"),
        ColSpec(DataType.double, "probability"),
        ColSpec(Map(DataType.double), "probabilities"),
    ]
    return ModelSignature(inputs=Schema([pictures]), outputs=Schema(answers))


def requirements() -> list[str]:
    """The packages that the model needs, as installed here, without a build's label (+cpu)."""
    packages = ("mlflow", *PACKAGES)
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]


@contextlib.contextmanager
def only_given_packages() -> Iterator[None]:
    """Keeps MLflow from adding a `uv.lock` that happens to lie in the working directory."""
    from mlflow.environment_variables import MLFLOW_UV_AUTO_DETECT

    before = MLFLOW_UV_AUTO_DETECT.get_raw()
    MLFLOW_UV_AUTO_DETECT.set(False)
    try:
        yield
    finally:
        if before is None:
            MLFLOW_UV_AUTO_DETECT.unset()
        else:
            MLFLOW_UV_AUTO_DETECT.set(before)
