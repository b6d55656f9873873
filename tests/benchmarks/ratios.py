"""One table of ratios: two things taken in turn within one run, several times, against a target.

A machine that is busy, warm or slow today is so for both of the two, so a ratio means something
where seconds do not.  A row gives one ratio a round; the table has their median and their range,
and whether the median meets the row's target.  What cannot be measured here (no GPU, no compiler)
stands in the table as just that, never as an estimate.
"""

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from research.data.kept import Kept
from tests.benchmarks.machine import Machine

Pair = tuple[float, float]  # ours, theirs
PROJECT = Path(__file__).resolve().parents[2]
DISTURBED = 1.5  # times the median: somebody else had the processor


class NotMeasured(Exception):
    """A row that nothing can be measured for here; the message says why, in a few words."""


class Round(NamedTuple):
    """What one round came to, and the two things that it is a ratio of, in words."""

    ratio: float
    told: str


@dataclass(frozen=True)
class Target:
    """What the median has to be: at least, or at most, `bound`.

    `with_bf16`: only where the processor computes in bfloat16; elsewhere the ratio is reported.
    """

    sense: Literal["at least", "at most"]
    bound: float
    with_bf16: bool = False

    def is_met(self, ratio: float) -> bool:
        return ratio >= self.bound if self.sense == "at least" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.sense == 'at least' else '≤'} {self.bound:g}"


@dataclass
class Asked:
    """What a row is given: how many rounds, which pictures, an empty folder, and where to note."""

    rounds: int
    folder: Path
    data: list[str]  # arguments of research.fit that choose the pictures
    airbench: Path | None = None  # the peer's script, which is not ours to bring
    kept: Kept = field(default_factory=Kept)  # pictures, from one row to the next
    notes: list[str] = field(default_factory=list)  # stand under the table


@dataclass(frozen=True)
class Row:
    """One line of the table.  `measure` yields a Round as often as it is asked to."""

    name: str
    what: str
    against: str
    target: Target | None
    measure: Callable[[Asked], Iterator[Round]]
    rounds: int = 5
    on_gpu: bool = False


@dataclass
class Outcome:
    """What came of a row."""

    name: str
    what: str
    against: str
    target: Target | None
    ratios: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # of each round
    notes: list[str] = field(default_factory=list)
    not_measured: str | None = None  # why
    failed: str | None = None  # what was raised
    seconds: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        if self.failed is not None:
            return "failed"
        if self.not_measured is not None:
            return f"not measured ({self.not_measured})"
        if self.target is None:
            return "no target"
        return "met" if self.target.is_met(self.median) else "missed"

    def cells(self) -> list[str]:
        """Target, median, range and verdict, as the table shows them."""
        spread = ["", ""]
        if self.ratios:
            low, high = shown(min(self.ratios)), shown(max(self.ratios))
            spread = [shown(self.median), f"{low} .. {high} ({len(self.ratios)})"]
        return ["report" if self.target is None else str(self.target), *spread, self.verdict]


@dataclass
class Table:
    """All that was measured, and what it holds for."""

    machine: Machine
    outcomes: list[Outcome] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_plain(), indent=1, ensure_ascii=False) + "\n")

    def as_plain(self) -> dict[str, Any]:
        """As JSON has it; median, range and verdict stand beside what they are made of."""
        rows = []
        for outcome in self.outcomes:
            row = asdict(outcome) | {"verdict": outcome.verdict}
            if outcome.ratios:
                least, most = min(outcome.ratios), max(outcome.ratios)
                row |= {"median": outcome.median, "min": least, "max": most}
            rows.append(row)
        return {"machine": asdict(self.machine), "rows": rows}

    @classmethod
    def read(cls, path: Path) -> "Table":
        plain = json.loads(path.read_text())
        outcomes = []
        for row in plain["rows"]:
            row = {k: row[k] for k in row.keys() & Outcome.__dataclass_fields__.keys()}
            target = row.pop("target")
            outcomes.append(Outcome(**row, target=None if target is None else Target(**target)))
        return cls(Machine(**plain["machine"]), outcomes)

    def print(self, console: Console) -> None:
        drawn = RichTable(
            title="What things cost here, one against the other", title_justify="left"
        )
        for name in ("row", "what", "against"):
            drawn.add_column(name, overflow="fold")
        for name in ("target", "median", "least .. most (rounds)", "verdict"):
            drawn.add_column(name, no_wrap=name != "verdict")
        for outcome in self.outcomes:
            cells = [outcome.name, outcome.what, outcome.against, *outcome.cells()]
            drawn.add_row(*(escape(cell) for cell in cells))
        console.print(drawn)
        for outcome in self.outcomes:
            for note in [*outcome.notes, *filter(None, [outcome.failed])]:
                console.print(f"{outcome.name}: {note}", markup=False, highlight=False)
        console.print(self.machine.described(), markup=False, highlight=False)


def shown(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}"


# ---- measuring -----------------------------------------------------------------------------------


def measure(
    row: Row, asked: Asked, machine: Machine, tell: Callable[[str], None] = lambda line: None
) -> Outcome:
    """All rounds of a row; whatever goes wrong is part of the outcome and stops no other row."""
    target = row.target
    if target is not None and target.with_bf16 and not machine.bf16_units:
        target = None
    outcome = Outcome(row.name, row.what, row.against, target, notes=asked.notes)
    if row.on_gpu and machine.gpu is None:
        outcome.not_measured = "no GPU"
        return outcome
    began = time.perf_counter()
    try:
        for ratio, told in row.measure(asked):
            outcome.ratios.append(ratio)
            outcome.told.append(told)
            tell(f"{row.name} {len(outcome.ratios)}/{asked.rounds}: {shown(ratio)}  {told}")
    except NotMeasured as reason:
        outcome.not_measured = str(reason)
    except Exception as error:
        outcome.failed = f"{type(error).__name__}: {error}"
        tell(f"{row.name}: {''.join(traceback.format_exception(error))}")
    outcome.seconds = time.perf_counter() - began
    return outcome


def alternate(
    ours: Callable[[], float], others: Callable[[], float], rounds: int
) -> Iterator[Pair]:
    """What the two return, round by round; every second round the other one comes first."""
    for number in range(rounds):
        if number % 2 == 0:
            mine = ours()
            theirs = others()
        else:
            theirs = others()
            mine = ours()
        yield mine, theirs


def in_slices(ours: Callable[[], float], others: Callable[[], float], slices: int) -> Pair:
    """The means of what the two return, taken in turn, so that a busy moment is one for both."""
    return means(undisturbed(list(alternate(ours, others, slices))))


def undisturbed(pairs: Sequence[Pair]) -> list[Pair]:
    """Without the pairs in which either is far above its median: somebody else had the cores.

    What is left is for means and not for medians, which would not see what happens only every so
    many steps.
    """
    highest = [DISTURBED * statistics.median(side) for side in zip(*pairs, strict=True)]
    return [pair for pair in pairs if pair[0] <= highest[0] and pair[1] <= highest[1]]


def means(pairs: Sequence[Pair]) -> Pair:
    mine, theirs = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    return mine, theirs


def seconds_of(
    work: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """A function that does the work and returns how long it took."""

    def timed() -> float:
        began = clock()
        work()
        return clock() - began

    return timed


def chosen(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of these names, "fit" for all of fit-...; without names all.

    Raises ValueError for a name that no row has.
    """
    for name in names:
        if not any(is_named(row, name) for row in rows):
            raise ValueError(f'there is no row "{name}"; see --list')
    return [row for row in rows if not names or any(is_named(row, name) for name in names)]


def is_named(row: Row, name: str) -> bool:
    return row.name == name or row.name.startswith(f"{name}-")
