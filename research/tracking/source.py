"""Where a delivery's records come from, in order, and how long it may be tried.

What the recorder process gets from a training process (recorder.py) and what is left in a spool
that nobody writes to (redelivery.py) reach the delivery (delivery.py) alike.
"""

import queue
import time
from typing import Any

from research.tracking.spool import Spool


class Source:
    """Messages in order, and how long delivery may be tried.

    Those that come from a spool carry, as `end`, where they end in it.
    """

    def __init__(self) -> None:
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.deadline: float | None = None  # for all; once nobody sends any more
        self.give_up_at: dict[int, float] = {}  # by run, once it is being finished
        self.spools: dict[int, Spool] = {}
        self._read_to: dict[int, int] = {}
        self._extra: dict[int, float] = {}
        self._done: set[int] = set()

    def seconds_left(self, run: int) -> float:
        """How long delivery for this run may still be tried."""
        ends = [self.give_up_at[run]] if run in self.give_up_at else []
        if self.deadline is not None:
            ends.append(self.deadline)
        return min(ends) + self._extra.get(run, 0.0) - time.monotonic() if ends else float("inf")

    def allow(self, run: int, seconds: float) -> None:
        self._extra[run] = self._extra.get(run, 0.0) + seconds

    def forget(self, run: int) -> Spool | None:
        self._done.add(run)
        self.give_up_at.pop(run, None)
        return self.spools.pop(run, None)

    def put(self, message: dict[str, Any]) -> None:
        self.messages.put(message)

    def read(self, number: int, spool: Spool) -> None:
        """Put what is new in the spool; at first what is known of the run, if it has begun."""
        if number in self._done:
            return
        if number not in self.spools:
            spool.claim()
            self.spools[number] = spool
            self._read_to[number] = 0
            if "run_id" in spool.about:
                self.put(
                    {"op": "adopt", "run": number, "tracking_uri": spool.about["tracking_uri"]}
                )
        delivered, _ = spool.delivered
        for message, end in self.spools[number].read(self._read_to[number]):
            self._read_to[number] = end
            # What is to be done at the end is done then, however much is delivered before.
            if end > delivered or message["op"] == "keep":
                self.put(message | {"run": number, "end": end})
