"""Functions that take turns: each in a thread of its own, and never two of them at work.

    turns = [Turn(work) for work in works]          # work(turn) -> anything
    question = turn.go_on()                         # lets it work until it asks, None: it is over
    question = turn.go_on(answer)                   # `turn.ask(question)` in there returns this

So a long function, such as a training, can stop in the middle for what is done for many at once, as
if it were a generator, and nothing in it has to know.  What a process has once for all (random
states, torch's switches) each function finds as it left it.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch

from research.checkpoints.content import random_state, set_random_state


class Turn(threading.Thread):
    """One of the functions; `result` or `error` is what came of it.

    An answer that is an exception is raised by `ask`.  `ends_by` is what a function that has not
    begun yet, and looks (`hearing`), ends with.
    """

    def __init__(self, work: Callable[["Turn"], Any]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.ends_by: BaseException | None = None
        self.questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.surroundings: Surroundings | None = None

    def go_on(self, answer: Any = None) -> Any:
        """What it asks next; None if it has come to its end."""
        if self.surroundings is not None:
            self.surroundings.restore()
        if not self.has_begun:
            self.start()
        self.answers.put(answer)
        question = self.questions.get()
        self.surroundings = Surroundings.of_now()
        if question is None:
            self.join()
        return question

    def run(self) -> None:
        self.answers.get()
        try:
            self.result = self.work(self)
        except BaseException as error:
            self.error = error
        finally:
            self.questions.put(None)

    @property
    def has_begun(self) -> bool:
        return self.ident is not None

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        if self.ends_by is not None:
            raise self.ends_by
        yield

    def ask(self, question: Any) -> Any:
        """The answer, after the others had their turns; called by the function itself."""
        self.questions.put(question)
        answer = self.answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer


@dataclass(frozen=True)
class Surroundings:
    """What all threads of a process share and a training changes."""

    random: dict[str, Any]
    is_deterministic: bool
    warns_only: bool
    benchmarks: bool

    @classmethod
    def of_now(cls) -> Self:
        return cls(
            random_state(device()),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
        )

    def restore(self) -> None:
        set_random_state(self.random, device())
        torch.use_deterministic_algorithms(self.is_deterministic, warn_only=self.warns_only)
        torch.backends.cudnn.benchmark = self.benchmarks


def device() -> torch.device:
    """That whose random state counts beside the CPU's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
