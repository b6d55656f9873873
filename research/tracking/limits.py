"""What MLflow takes: other names are refused at the call, longer values are cut for all to see.

Standard library only: the training process checks before it hands a record over.
"""

import posixpath
import re
from collections.abc import Iterable, Mapping

# MLflow's own limits, in characters (mlflow/utils/validation.py).
MAX_NAME = 250
MAX_PARAM = 6000
MAX_TAG = 8000

good_names: set[str] = set()


def check_name(kind: str, name: str) -> None:
    """Raises ValueError on a name that MLflow refuses for a metric, parameter or tag."""
    path = posixpath.normpath(name)
    if (
        not re.fullmatch(r"[/\w.\- :]+", name)
        or path != name
        or path == "."
        or path.startswith(("..", "/"))
    ):
        raise ValueError(
            f"{kind} name {name!r}: MLflow allows letters, digits, _ - . : / and space, "
            "and the name must read as a plain relative path."
        )
    if len(name) > MAX_NAME:
        raise ValueError(f"{kind} name {name[:60]!r}... is longer than {MAX_NAME} characters.")
    good_names.add(name)


def check_path(path: str) -> str:
    if not path or posixpath.isabs(path) or ".." in path.split("/") or "\\" in path:
        raise ValueError(f"artifact path {path!r}: it must be relative, inside the run's folder.")
    return posixpath.normpath(path)


def check_names(kind: str, names: Iterable[str]) -> None:
    for name in names:
        check_name(kind, name)


def _cut(value: str, limit: int, whole: str) -> str:
    value = value.encode(errors="replace").decode()  # an odd file name is no valid text
    if len(value) <= limit:
        return value
    mark = f"… ({len(value)} characters{whole})"
    return value[: limit - len(mark)] + mark


def param_texts(params: Mapping[str, str | float | bool | None]) -> dict[str, str]:
    check_names("parameter", params)
    whole = "; whole in config.yaml"
    return {name: _cut(str(value), MAX_PARAM, whole) for name, value in params.items()}


def tag_texts(tags: Mapping[str, str]) -> dict[str, str]:
    check_names("tag", tags)
    return {name: _cut(str(value), MAX_TAG, "") for name, value in tags.items()}
