"""Keeps a run that goes on from recording twice what it recorded before.

A resumed run repeats the steps since its checkpoint, and a delivery that was cut off is sent again:
MLflow would keep both rows of one step.

What comes again is known by its place, never by its time: a run that goes on saves what it went on
from once more, later than rows of its last process that will come again all the same; and clocks
are set.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

Rows = list[tuple[str, float, int, int]]  # name, value, step, milliseconds
Places = Mapping[str, Sequence[int]]  # of each name the latest step, and how many rows stand there
SYSTEM = "system/"
OTHER_NODES = "system/node_"  # and its number; the first one's samples have no such name


class Repeats:
    """What a run has recorded already, by name and step.

    `recorded` is what its earlier processes recorded.  Of that, `behind` is what the run had logged
    when it was saved as it goes on now; all beyond comes again.  So many rows of a name and step
    are dropped, and no more, for an epoch that is validated twice has two.  A row of the time
    `since`, in milliseconds, is one that the checkpoint remembers; it is dropped if its name and
    step are there at all.

    At step 0 stand figures of no epoch's axis, which may be measured anew: only an equal value is
    a repeat there.
    """

    def __init__(self, recorded: Rows, since: int = 0, behind: Places | None = None) -> None:
        self._since = since
        self._seen = {_key(name, value, step) for name, value, step, _ in recorded}
        self._again = Counter((name, step) for name, _, step, _ in recorded)
        for name, (step, count) in (behind or {}).items():
            self._again[name, step] -= count
        steps = [step for name, _, step, _ in recorded if name.startswith(SYSTEM)]
        self.next_system_step = 1 + max(steps, default=-1)

    @classmethod
    def of(
        cls,
        client: Any,
        run_id: str,
        since: int = 0,
        behind: Places | None = None,
        own: Iterable[Sequence[Any]] = (),
    ) -> Self:
        """What the store has of this run; a request for each of its metrics.

        `own` are rows that this process of the run was told, some of which it may have delivered.
        """
        mine = {(name, step, at) for name, _, step, at in own}
        recorded: Rows = []
        for name in client.get_run(run_id).data.metrics:
            for row in client.get_metric_history(run_id, name):
                if (name, row.step, row.timestamp) not in mine:
                    recorded.append((name, row.value, row.step, row.timestamp))
        return cls(recorded, since, behind)

    def new(self, rows: Rows) -> Rows:
        """The rows that are no repeats, in their order; they are remembered as recorded."""
        return [row for row in rows if self._is_new(*row)]

    def _is_new(self, name: str, value: float, step: int, at: int) -> bool:
        key = _key(name, value, step)
        if step == 0 or at == self._since:
            is_new = key not in self._seen
        else:
            is_new = self._again[name, step] <= 0
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
