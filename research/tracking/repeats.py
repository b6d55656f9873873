"""Keeps a run that goes on from recording twice what it recorded before.

A resumed run repeats the steps since its checkpoint, and a delivery that was cut off is sent again:
MLflow would keep both rows of one step.
"""

import math
import sys
from typing import Any, Self

Rows = list[tuple[str, float, int, int]]  # name, value, step, milliseconds
SYSTEM = "system/"


class Repeats:
    """What a run has recorded already, by name and step.

    At step 0 stand figures of no epoch's axis, which may be measured anew: only an equal value is
    a repeat there.
    """

    def __init__(self, recorded: Rows) -> None:
        self._seen = {_key(name, value, step) for name, value, step, _ in recorded}
        steps = [step for name, _, step, _ in recorded if name.startswith(SYSTEM)]
        self.next_system_step = 1 + max(steps, default=-1)

    @classmethod
    def of(cls, client: Any, run_id: str) -> Self:
        """What the store has of this run; a request for each of its metrics."""
        recorded: Rows = []
        for name in client.get_run(run_id).data.metrics:
            history = client.get_metric_history(run_id, name)
            recorded += [(name, point.value, point.step, point.timestamp) for point in history]
        return cls(recorded)

    def new(self, rows: Rows) -> Rows:
        """The rows that are no repeats, in their order; they are remembered as recorded."""
        kept = []
        for row in rows:
            name, value, step, _ = row
            key = _key(name, value, step)
            if key not in self._seen:
                self._seen.add(key)
                kept.append(row)
        return kept


def _key(name: str, value: float, step: int) -> tuple[str, int, float | None]:
    """What no two rows of a run share; the value counts at step 0 only, as MLflow returns it."""
    if step != 0:
        return name, step, None
    if math.isnan(value):
        return name, step, None
    return name, step, max(-sys.float_info.max, min(sys.float_info.max, float(value)))
