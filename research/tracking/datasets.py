"""A split of a data set as an input of a run: checked, handed over, shown on MLflow's page.

The page's drawer prints each entry of the profile on a line of its own, cut after 80 characters;
hence one entry for each class where there are few.
"""

import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from research.tracking.store import redact

LIMITS = {"name": 500, "context": 500, "digest": 36, "source": 10_000}  # MLflow's, in characters
FEW_CLASSES = 20
MAX_PROFILE = 16_000_000  # MLflow's limit is 16,777,215 characters


@dataclass(frozen=True)
class DatasetInput:
    """What a run was given: one split of a data set.

    `context` is train, val or test. `digest`, of at most 36 characters, tells the split's content;
    MLflow takes two inputs of one name and digest, in one experiment, for the same data set, and
    keeps what the first said of it. `source` is a folder, an address, or words. `picture_shape` is
    height, width, channels. `counts` is the number of pictures of each class.
    """

    name: str
    context: str
    digest: str
    source: str
    num_pictures: int
    picture_shape: tuple[int, int, int]
    counts: Mapping[str, int]


def dataset_records(inputs: Sequence[DatasetInput]) -> list[dict[str, Any]]:
    """What is handed to the companion.

    Raises ValueError on what MLflow refuses, and on two splits that it would take for one.
    """
    names = [(given.name, given.digest) for given in inputs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"inputs {names}: two have the same name and digest, and MLflow keeps one of them."
        )
    return [_record(given) for given in inputs]


def _record(given: DatasetInput) -> dict[str, Any]:
    for name, limit in LIMITS.items():
        value = getattr(given, name)
        if not 0 < len(value) <= limit:
            raise ValueError(
                f"{name} of the input {given.name[:60]!r} has {len(value)} characters; "
                f"MLflow takes 1 to {limit}."
            )
    is_folder = os.path.isabs(given.source) or os.path.isdir(given.source)
    return {
        "name": given.name,
        "context": given.context,
        "digest": given.digest,
        "source": os.path.abspath(given.source) if is_folder else given.source,
        "is_folder": is_folder,
        "num_pictures": operator.index(given.num_pictures),
        "picture_shape": [operator.index(size) for size in given.picture_shape],
        "counts": {name: operator.index(count) for name, count in given.counts.items()},
    }


def dataset_entity(record: Mapping[str, Any]) -> Any:
    """MLflow's own DatasetInput of a record; the only function here that imports MLflow."""
    from mlflow import entities

    source_type, source = _source(record["source"], record["is_folder"])
    dataset = entities.Dataset(
        name=record["name"],
        digest=record["digest"],
        source_type=source_type,
        source=json.dumps(source),
        schema=_schema(record["picture_shape"]),
        profile=_profile(record, shown=source_type in ("local", "http", "s3")),
    )
    context = entities.InputTag("mlflow.data.context", record["context"])
    return entities.DatasetInput(dataset, [context])


def _source(source: str, is_folder: bool) -> tuple[str, dict[str, Any]]:
    """Type and content as MLflow's own classes write them, so that `mlflow.data` reads them."""
    if is_folder:
        return "local", {"uri": source}
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme in ("http", "https"):
        return "http", {"url": redact(source)}
    if scheme:
        return scheme, {"uri": redact(source)}
    return "code", {"tags": {"mlflow.source.name": source}}  # words; shown from the profile


def _schema(picture_shape: list[int]) -> str:
    """What MLflow's TensorDatasetSchema gives for uint8 pictures and int64 labels."""

    def tensor(dtype: str, *shape: int) -> str:
        return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}])

    specification = {
        "features": tensor("uint8", -1, *picture_shape),
        "targets": tensor("int64", -1),
    }
    return json.dumps({"mlflow_tensorspec": specification})


def _profile(record: Mapping[str, Any], shown: bool) -> str:
    """What the page prints of a data set; its source too, where that is not `shown` by itself."""
    counts: dict[str, int] = record["counts"]
    profile: dict[str, Any] = {
        "num_pictures": record["num_pictures"],
        "height_width_channels": record["picture_shape"],
        "num_classes": len(counts),
    }
    if not shown:
        profile["source"] = redact(record["source"])
    if len(counts) <= FEW_CLASSES:
        return json.dumps(profile | {f"pictures of {name}": n for name, n in counts.items()})
    profile["fewest_pictures_of_a_class"] = min(counts.values())
    profile["most_pictures_of_a_class"] = max(counts.values())
    whole = json.dumps(profile | {"pictures_of": counts})
    return whole if len(whole) <= MAX_PROFILE else json.dumps(profile)


def log_inputs(client: Any, run_id: str, inputs: Sequence[Any]) -> None:
    """Say that the run uses these data sets.

    MLflow looks whether the experiment has them and then adds them: of several runs that begin at
    the same moment all but one are refused, and find them when they ask again.
    """
    try:
        client.log_inputs(run_id, datasets=inputs)
    except Exception as error:
        words = str(error).lower()
        if "unique" not in words and "duplicate" not in words:
            raise
        client.log_inputs(run_id, datasets=inputs)
