"""Delivers what a spool holds that nobody is left to deliver: after an outage, or a kill -9."""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

from research.tracking.beginning import forget_its_end
from research.tracking.companion import PATIENCE, QUIET
from research.tracking.delivery import Delivery, OpenRun, Source
from research.tracking.moved_spool import followed
from research.tracking.opening import preload
from research.tracking.spool import Spool


def deliver(spool: Spool, seconds: float = 30.0) -> str | None:
    """Bring what waits in a spool to the store, in this process, which imports MLflow.

    None when all is there and the spool is gone; else, in a sentence, why not. Where the store
    refused some records for good, the sentence says which, and the spool is gone all the same.
    A store that is away is tried again for `seconds`. A run that the store never heard of is made
    now; one that nobody finished becomes KILLED, and ended with its last record.
    """
    spool = followed(spool)
    if not spool.claim():
        return None if spool.is_gone() else f"Another process is delivering {spool.folder}."
    try:
        with _quiet(), contextlib.chdir(os.getcwd()):  # opening a store moves this process
            preload()
            return _Redelivery(spool, seconds).run()
    except OSError as error:
        return None if spool.is_gone() else f"{spool.folder} cannot be read: {error}"
    finally:
        spool.release()


class _Backlog(Source):
    """All that a spool holds from where delivery ended."""

    def __init__(self, spool: Spool, seconds: float) -> None:
        super().__init__()
        self._last: dict[str, Any] | None = None
        self.deadline = time.monotonic() + seconds
        self.number = next((message["run"] for message, _ in spool.read(0)), 0)
        self.read(self.number, spool)
        for message in spool.samples():
            super().put(message | {"run": self.number})
        if self._last is not None:
            super().put(self._last)
        self.messages.put(None)

    def put(self, message: dict[str, Any]) -> None:
        if message["op"] == "flush":  # nobody waits for its answer
            return
        if message["op"] == "finish":  # after the samples, which are in no order with the rest
            self._last = message
        else:
            super().put(message)


class _Redelivery(Delivery):
    def __init__(self, spool: Spool, seconds: float) -> None:
        super().__init__(_Backlog(spool, seconds))
        self.spool = spool
        self.reasons: list[str] = []

    def run(self) -> str | None:
        self.serve()
        self.reasons += self.unreached.values()
        return " ".join(self.reasons) or None

    def tags_at_start(self, message: dict[str, Any]) -> dict[str, str]:
        """What the recorder process knew when it tried; nobody records the run any more."""
        return self.spool.about.get("tags", {}) if message["op"] == "start" else {}

    def ended_at(self, run: OpenRun) -> int:
        return int(1000 * self.spool.written_at())

    def end_run(self, run: OpenRun, status: str, ended: int) -> None:
        super().end_run(run, status, ended)
        if run.about.is_ours and not run.gave_up:
            with contextlib.suppress(Exception):
                forget_its_end(run.client, run.run_id)
        self.reasons += run.problems
        if run.gave_up and run.away is not None:
            self.reasons.append(run.away)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow gives up soon on a store that is away, and says nothing of it by itself."""
    before = dict(os.environ)
    for name, value in (PATIENCE | QUIET).items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MLflow's own making
            yield
    finally:
        for name in PATIENCE | QUIET:
            if name not in before:
                os.environ.pop(name, None)
