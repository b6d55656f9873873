"""Keeps a run that goes on from recording twice what it recorded before.

A resumed run repeats the steps since its checkpoint, and a delivery that was cut off is sent again:
MLflow would keep both rows of one step.
"""

import math
import sys
from collections import Counter
from typing import Any, Self

Rows = list[tuple[str, float, int, int]]  # name, value, step, milliseconds
SYSTEM = "system/"
OTHER_NODES = "system/node_"  # and its number; the first one's samples have no such name


class Repeats:
    """What a run has recorded already, by name and step.

    `since`, in milliseconds, is when the run was saved as it goes on now, and `until` when it went
    on.  What was recorded in between comes again: as many rows of a name and step are dropped as
    there are, for an epoch that is validated twice has two.  A row from before `since` (what a
    checkpoint remembers) is dropped if its name and step are there at all.

    At step 0 stand figures of no epoch's axis, which may be measured anew: only an equal value is
    a repeat there.
    """

    def __init__(self, recorded: Rows, since: int = 0, until: int = sys.maxsize) -> None:
        self._since = since
        self._seen = {_key(name, value, step) for name, value, step, _ in recorded}
        self._again = Counter((name, step) for name, _, step, at in recorded if since < at <= until)
        steps = [step for name, _, step, _ in recorded if name.startswith(SYSTEM)]
        self.next_system_step = 1 + max(steps, default=-1)

    @classmethod
    def of(cls, client: Any, run_id: str, since: int = 0, until: int = sys.maxsize) -> Self:
        """What the store has of this run; a request for each of its metrics."""
        recorded: Rows = []
        for name in client.get_run(run_id).data.metrics:
            history = client.get_metric_history(run_id, name)
            recorded += [(name, point.value, point.step, point.timestamp) for point in history]
        return cls(recorded, since, until)

    def new(self, rows: Rows) -> Rows:
        """The rows that are no repeats, in their order; they are remembered as recorded."""
        return [row for row in rows if self._is_new(*row)]

    def _is_new(self, name: str, value: float, step: int, at: int) -> bool:
        key = _key(name, value, step)
        if step == 0 or at <= self._since:
            is_new = key not in self._seen
        else:
            is_new = self._again[name, step] == 0
            self._again[name, step] -= not is_new
        self._seen.add(key)
        return is_new


def _key(name: str, value: float, step: int) -> tuple[str, int, float | None]:
    """What no two rows of a run share; the value counts at step 0 only, as MLflow returns it."""
    if step != 0:
        return name, step, None
    if math.isnan(value):
        return name, step, None
    return name, step, max(-sys.float_info.max, min(sys.float_info.max, float(value)))
