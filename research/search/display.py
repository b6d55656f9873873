"""What a person sees of a search that runs: a live table on a terminal, else plain lines.

    display = display_for(sys.stderr)
    with display:
        display.show(Snapshot(...))         # as often as there is something new
        display.say("one worker died; ...") # a line that stays

A Snapshot holds everything that is shown, made from Optuna's trials alone: those of other machines
are in it too.  The plain lines are one for each trial that ended and at most one a minute of where
the search stands.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

RECENT = 20  # trials: how fast it goes is told by the last so many
STATUS_SECONDS = 60.0
LINES_BESIDE_ROWS = 6
NARROW = 60  # columns: below this the settings of a trial get a line of their own
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Snapshot:
    """Where a search stands.

    `trials` has, for each cell, the one that counts of each slot, whatever its state.
    `max_epochs` is what trials are trained for where their own settings do not say; `starting` are
    the workers that have no trial yet.
    `per_minute` is None before anything ended in this start; `seconds_left` where nobody can tell.
    """

    name: str
    objectives: Sequence[tuple[str, Direction]]
    trials: Mapping[str, Sequence[FrozenTrial]]
    total: int
    max_epochs: int | None = None
    per_minute: float | None = None
    seconds_left: float | None = None
    starting: int = 0
    what: str = ""  # beside the name, where it is not the search itself: "confirmation"

    def all(self) -> list[tuple[str, FrozenTrial]]:
        return [(cell, trial) for cell, found in self.trials.items() for trial in found]

    def of(self, *states: TrialState) -> list[tuple[str, FrozenTrial]]:
        return [(cell, trial) for cell, trial in self.all() if trial.state in states]

    @property
    def finished(self) -> int:
        return len(self.of(*FINISHED))


# ---- words ---------------------------------------------------------------------------------------


def name_of(cell: str, trial: FrozenTrial) -> str:
    """The trial as its MLflow run is called."""
    pinned = trial.user_attrs.get("pinned") or {}
    if "name" in pinned:
        return str(pinned["name"])
    return f"{cell} trial {trial.number}" if cell else f"trial {trial.number}"


def short_name_of(cell: str, trial: FrozenTrial) -> str:
    """The same without the word."""
    return name_of(cell, trial).replace(f"trial {trial.number}", str(trial.number))


def settings_of(trial: FrozenTrial) -> str:
    """The settings that vary, short: `CrossEntropyLoss SGD lr 0.0523 batch_size 64`."""
    pinned = trial.user_attrs.get("pinned") or {}
    if "name" in pinned:
        return ""  # which says it
    params = trial.params or leaves(pinned.get("settings", {}))
    words: dict[str, list[str]] = {}
    for name, value in params.items():
        # What a class brings along stands behind the class: "optimizer.SGD.lr" behind "optimizer".
        owner = next((key for key in words if name.startswith(f"{key}.{params[key]}.")), name)
        word = short(value) if is_class(value) else f"{name.rpartition('.')[2]} {short(value)}"
        words.setdefault(owner, []).append(word)
    cell = pinned.get("candidate", [""])[0]
    return " ".join([cell] * bool(cell) + [word for found in words.values() for word in found])


def leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys; a class choice by the key of its choice."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= leaves(value, prefix if key == "init_args" else f"{prefix}{key}.")
        elif value is not None:
            found[prefix.rstrip(".") if key == "class_path" else f"{prefix}{key}"] = value
    return found


def is_class(value: Any) -> bool:
    return isinstance(value, str) and value.rpartition(".")[2][:1].isupper()


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value.rpartition(".")[2] if is_class(value) else str(value)


def figures(values: Sequence[float] | None) -> str:
    return "-" if not values else ", ".join(f"{value:.4g}" for value in values)


def values_of(trial: FrozenTrial) -> list[float] | None:
    """Its values; of one that has none (yet), the last that it reported."""
    if trial.values is not None:
        return list(trial.values)
    if trial.intermediate_values:
        return [trial.intermediate_values[max(trial.intermediate_values)]]
    return None


def duration(seconds: float) -> str:
    """`12 s`, `4 min`, `2 h 05 min`, `3 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes / 60 / 24:.0f} days"


def counted(snapshot: Snapshot) -> str:
    """`12 of 60 done: 10 complete, 2 pruned; 2 run`."""
    parts = []
    for state, word in zip(FINISHED, ("complete", "pruned", "failed"), strict=True):
        count = len(snapshot.of(state))
        if count:
            parts.append(f"{count} {word}")
    running = len(snapshot.of(TrialState.RUNNING))
    text = f"{snapshot.finished} of {snapshot.total} done"
    text += f": {', '.join(parts)}" if parts else ""
    text += f"; {running} {'runs' if running == 1 else 'run'}" if running else ""
    if snapshot.starting and not running:
        text += f"; {snapshot.starting} worker{'s start' if snapshot.starting > 1 else ' starts'}"
    return text


def paced(snapshot: Snapshot) -> str:
    """`4.2 trials/min, about 11 min left`; nothing while nothing is known."""
    parts = []
    if snapshot.per_minute is not None:
        fast = snapshot.per_minute >= 1
        rate = snapshot.per_minute if fast else 60 * snapshot.per_minute
        parts.append(f"{rate:.3g} trials/{'min' if fast else 'h'}")
    if snapshot.seconds_left is not None and snapshot.finished < snapshot.total:
        parts.append(f"about {duration(snapshot.seconds_left)} left")
    return ", ".join(parts)


def best_of(snapshot: Snapshot) -> list[tuple[str, str, FrozenTrial]]:
    """For each objective its best trial: (metric, cell, trial); none before one is complete."""
    found = []
    complete = [] if snapshot.what else snapshot.of(TrialState.COMPLETE)  # no choosing of seeds
    for place, (metric, direction) in enumerate(snapshot.objectives):
        known = [(c, t) for c, t in complete if t.values is not None and len(t.values) > place]
        if known:
            sign = 1 if direction == "minimize" else -1
            cell, trial = min(known, key=lambda pair: sign * pair[1].values[place])
            found.append((metric, cell, trial))
    return found


def best_words(snapshot: Snapshot) -> str:
    """`best 0.83 (trial 3)`, or that of each objective."""
    metrics = [metric for metric, _ in snapshot.objectives]
    parts = []
    for metric, cell, trial in best_of(snapshot):
        what = f"{metric} " if len(metrics) > 1 else ""
        value = trial.values[metrics.index(metric)]
        parts.append(f"{what}{value:.4g} ({name_of(cell, trial)})")
    return f"best {', '.join(parts)}" if parts else ""


def reason_of(trial: FrozenTrial) -> str:
    """Why it failed, or that its loss was no number; "" where there is nothing to say."""
    for name in ("error", "reason"):
        told = trial.user_attrs.get(name)
        if isinstance(told, str) and told.strip():
            return told.strip().splitlines()[-1]
    return "diverged" if trial.user_attrs.get("diverged") else ""


def ended_line(snapshot: Snapshot, cell: str, trial: FrozenTrial) -> str:
    """`trial 7  0.8123  COMPLETE  SGD lr 0.1  12 s  best 0.83 (trial 3)`."""
    parts = [name_of(cell, trial), figures(values_of(trial)), trial.state.name]
    parts.append(settings_of(trial))
    if trial.state != TrialState.COMPLETE:
        parts.append(reason_of(trial))
    if trial.duration is not None:
        parts.append(duration(trial.duration.total_seconds()))
    parts.append(best_words(snapshot))
    return "  ".join(filter(None, parts))


class Rate:
    """How fast trials end, by the last of them; one number for all machines together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.seen: deque[tuple[float, int]] = deque()  # when so many were finished, oldest first

    def tell(self, finished: int) -> None:
        """That so many are finished now."""
        if not self.seen or finished != self.seen[-1][1]:
            self.seen.append((self.clock(), finished))
        while len(self.seen) > 2 and self.seen[-1][1] - self.seen[1][1] >= RECENT:
            self.seen.popleft()

    def per_minute(self) -> float | None:
        """None before anything ended."""
        if len(self.seen) < 2:
            return None
        (since, before), (_, now) = self.seen[0], self.seen[-1]
        return 60 * (now - before) / max(self.clock() - since, 1e-3)

    def seconds_left(self, unfinished: int) -> float | None:
        rate = self.per_minute()
        return None if not rate else 60 * unfinished / rate


# ---- the table -----------------------------------------------------------------------------------


def render(snapshot: Snapshot, width: int, height: int = 24) -> RenderableType:
    """The live table for a terminal of so many columns and lines."""
    title = f"{snapshot.name} {snapshot.what}".strip()
    lines: list[RenderableType] = [
        Text.assemble((title, "bold"), "  ", counted(snapshot), overflow="fold")
    ]
    if paced(snapshot):
        lines.append(Text(paced(snapshot), style="dim"))
    for metric, cell, trial in best_of(snapshot):
        place = [name for name, _ in snapshot.objectives].index(metric)
        value = (f"{trial.values[place]:.4g}", "bold green")
        head = Text.assemble("best ", metric, " ", value, "  ", name_of(cell, trial))
        settings = settings_of(trial)
        if width >= NARROW:
            head.append(f"  {settings}")
            lines.append(one_line(head))
        else:
            lines += [one_line(head), one_line(Text(f"  {settings}"))]
    running = snapshot.of(TrialState.RUNNING)
    if running:
        lines.append(running_table(snapshot, running, width, max(3, height - LINES_BESIDE_ROWS)))
    return Group(*lines)


def one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def running_table(
    snapshot: Snapshot, running: Sequence[tuple[str, FrozenTrial]], width: int, most: int
) -> RenderableType:
    """A row for each trial that runs, with its settings below it where the terminal is narrow."""
    narrow = width < NARROW
    most = most // 2 if narrow else most
    shown = running if len(running) <= most else running[: max(1, most - 1)]
    metric = snapshot.objectives[0][0]
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=True, pad_edge=False)
    table.add_column("trial", no_wrap=True, overflow="ellipsis", max_width=max(12, width // 3))
    if not narrow:
        table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column(metric, justify="right", no_wrap=True, overflow="ellipsis", max_width=16)
    table.add_column("for", justify="right", no_wrap=True)
    rows: list[RenderableType] = []
    for cell, trial in shown:
        name = short_name_of(cell, trial)
        facts = [epoch_of(trial, snapshot.max_epochs), figures(values_of(trial)), age_of(trial)]
        table.add_row(name, *([] if narrow else [settings_of(trial)]), *facts)
    rows.append(table)
    if narrow:
        for cell, trial in shown:
            name = short_name_of(cell, trial)
            rows.append(one_line(Text(f"{name}: {settings_of(trial)}", style="dim")))
    if len(shown) < len(running):
        rows.append(Text(f"and {len(running) - len(shown)} more", style="dim"))
    return Group(*rows)


def epoch_of(trial: FrozenTrial, max_epochs: int | None) -> str:
    """`2/3`: of the last validation, and how many there will be."""
    done = max(trial.intermediate_values, default=0)
    of = trial.params.get("trainer.max_epochs", max_epochs)
    return f"{done}" if of is None or of < 1 else f"{done}/{of}"


def age_of(trial: FrozenTrial) -> str:
    if trial.datetime_start is None:
        return ""
    return duration(max(0.0, (datetime.now() - trial.datetime_start).total_seconds()))


# ---- where it is shown ---------------------------------------------------------------------------


def display_for(out: TextIO) -> "Display":
    """The live table on a terminal that can move its cursor, plain lines for all else."""
    console = Console(file=out, highlight=False)
    moves = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(console) if moves else PlainDisplay(out)


class Display:
    """Shows a search; a block of `with` is the time it is shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def show(self, snapshot: Snapshot) -> None:
        raise NotImplementedError

    def say(self, line: str) -> None:
        """A line that stays."""
        raise NotImplementedError


class News:
    """The trials that ended since the last look; those of before the first are no news."""

    def __init__(self) -> None:
        self.told: dict[str, set[tuple[str, int]]] = {}

    def of(self, snapshot: Snapshot) -> list[tuple[str, FrozenTrial]]:
        ended = snapshot.of(*FINISHED)
        keys = {(cell, trial.number) for cell, trial in ended}
        told = self.told.setdefault(snapshot.what, keys)
        fresh = [pair for pair in ended if (pair[0], pair[1].number) not in told]
        self.told[snapshot.what] = told | keys
        return sorted(fresh, key=lambda pair: pair[1].datetime_complete or datetime.min)


class LiveDisplay(Display):
    """A table that is drawn over itself; what failed gets a line above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.news = News()
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def show(self, snapshot: Snapshot) -> None:
        for cell, trial in self.news.of(snapshot):
            if trial.state == TrialState.FAIL:
                self.say(f"{name_of(cell, trial)} failed: {reason_of(trial) or 'no reason given'}")
        size = self.console.size
        self.live.update(render(snapshot, size.width, size.height), refresh=True)

    def say(self, line: str) -> None:
        self.console.print(Text(line))


class PlainDisplay(Display):
    """A line for each trial that ended, and one a minute at most of where the search stands."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.out = out
        self.clock = clock
        self.news = News()
        self.status_at = clock()

    def show(self, snapshot: Snapshot) -> None:
        for cell, trial in self.news.of(snapshot):
            self.say(ended_line(snapshot, cell, trial))
        if self.clock() - self.status_at >= STATUS_SECONDS:
            self.status_at = self.clock()
            self.say("   ".join(filter(None, (counted(snapshot), paced(snapshot)))))

    def say(self, line: str) -> None:
        print(line, file=self.out, flush=True)
