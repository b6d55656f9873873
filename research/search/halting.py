"""Ctrl-C and SIGTERM, heard by a process that has workers: once in order, twice at once."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

ECHO_SECONDS = 0.5  # one Ctrl-C may come twice: from the terminal, and passed on by another
SHOW_CURSOR = b"\x1b[?25h\n"


class Ears:
    """Hears signals inside `listening`.

    `on_first` takes the signal's number where it can be handled in order; where it is None, the
    first signal is an exception. `at_once` is called before a second one ends the process.
    """

    def __init__(self, at_once: Callable[[], None]) -> None:
        self.at_once = at_once
        self.on_first: Callable[[int], None] | None = None
        self._heard_at: dict[int, float] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # What is ignored stays so, as Ctrl-C in a command that a script started behind it.
        before = {number: heard for number, heard in before.items() if heard != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, heard in before.items():
                signal.signal(number, signal.SIG_DFL if heard is None else heard)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now, last = time.monotonic(), self._heard_at.get(number)
        if last is not None and now - last < ECHO_SECONDS:
            return
        self._heard_at[number] = now
        if last is not None:
            self.at_once()
            with contextlib.suppress(OSError):
                os.write(2, SHOW_CURSOR if os.isatty(2) else b"")  # the live table hid it
            os._exit(128 + number)
        if self.on_first is None:
            raise ending(number)
        self.on_first(number)


def ending(number: int) -> BaseException:
    """What ends this process by a signal, as research.command knows it."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
