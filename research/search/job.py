"""What a worker is told: a line of JSON on its standard input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """The search, its studies, and where trials are recorded.

    `stages` are names of studies, all of the search's cells where none is named.  `tracking_uri` ""
    records nothing; None is the store that `research.fit` takes.  No trial begins after `stop_at`,
    in seconds since 1970.  `number` is the worker's.
    """

    document: Mapping[str, Any]
    storage: Any
    stages: Sequence[str] = ()
    tracking_uri: str | None = None
    parent_run_id: str | None = None
    stop_at: float | None = None
    number: int = 0
