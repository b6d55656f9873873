"""What a search adds to a report: learning-rate fans, the best of k trials, times to a target.

A trial that diverged counts, for it is part of what a search costs; one that crashed, was stopped
or still runs says nothing of its settings, and is only told. All of it is read by the search's own
objective, a figure of the validation pictures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from research.comparison.racing import races_of
from research.comparison.selection import searched
from research.statistics.arms import CHOICES, Trained
from research.statistics.basin import Basin, basin
from research.statistics.best_of import BestOf, best_of
from research.statistics.report.numbers import is_share
from research.statistics.survival import Race
from research.tracking.arms import Found, Read

RATE = "optimizer.lr"
FEWEST_RATES = 3  # two make a line
TOLERANCE = 0.01  # of accuracy; of other metrics the same share of the best value


@dataclass(frozen=True)
class SearchPart:
    """Of each cell its fan and its best of k, by `metric`; times to a target, if trials tell.

    `notes` are on the trials that have no part in it, or say why there is nothing.
    """

    metric: str
    is_minimized: bool = False
    fans: Mapping[str, Basin] = field(default_factory=dict)
    best_of: Mapping[str, BestOf] = field(default_factory=dict)
    races: tuple[Race, ...] = ()
    notes: tuple[str, ...] = ()


def search_part(searches: Sequence[Found], level: float) -> SearchPart:
    """What the trials tell, search by search, cell by cell; the confirming runs are no part of it.

    Searches for different things have no figure that is read for all of them: a note says so.
    """
    first = searches[0]
    if len({(each.objective, each.is_minimized) for each in searches}) > 1:
        told = ", ".join(f"{each.text} for {each.objective}" for each in searches)
        note = (
            f"The searches were for different things ({told}): name each alone to see its learning "
            "rates and the best of k trials."
        )
        return SearchPart(first.objective, first.is_minimized, notes=(note,))
    fans: dict[str, Basin] = {}
    curves: dict[str, BestOf] = {}
    all_cells: dict[str, list[Trained]] = {}
    notes: list[str] = []
    for found in searches:
        tried = [each for each in found.runs if not each.confirms]
        kept = [each for each in tried if is_told(each.trained)]
        notes += left_out(found, len(tried) - len(kept))
        for cell, runs in best_first(found, cells_of(found, kept)):
            name = cell if len(searches) == 1 else f"{found.text}: {cell}"
            all_cells[name] = runs
            fan = fan_of(found, runs)
            if fan is not None:
                fans[name] = fan
            if len(runs) > 1:
                values = [value_of(found, run) for run in runs]
                curves[name] = best_of(values, higher_is_better=not found.is_minimized, level=level)
    races = races_of(all_cells, level)
    return SearchPart(first.objective, first.is_minimized, fans, curves, races, tuple(notes))


def is_told(run: Trained) -> bool:
    """Whether it is known what came of the run's settings."""
    return run.diverged or run.status in ("FINISHED", "PRUNED")


def left_out(found: Found, number: int) -> tuple[str, ...]:
    if number == 0:
        return ()
    return (
        f"{found.text}: trials that crashed, were stopped or still run have no part in the "
        f"learning rates, the best of k and the times to a target: {number}.",
    )


def cells_of(found: Found, tried: Sequence[Read]) -> dict[str, list[Trained]]:
    """The trials by the classes that the search chose among: `MSELoss Adam`."""
    varied = set(searched(tried))
    choices = [choice for choice in CHOICES if choice in varied]
    cells: dict[str, list[Trained]] = {}
    for each in tried:
        settings = each.trained.settings
        name = " ".join(str(settings.get(choice)) for choice in choices) or found.run.run_name
        cells.setdefault(name, []).append(each.trained)
    return cells


def best_first(found: Found, cells: Mapping[str, list[Trained]]) -> list[tuple[str, list[Trained]]]:
    """The cells in the order of their best trials; those without a value last, as they came."""

    def place(runs: list[Trained]) -> float:
        values = [value for run in runs if (value := value_of(found, run)) is not None]
        if found.is_minimized:
            return min(values, default=math.inf)
        return -max(values, default=-math.inf)

    return sorted(cells.items(), key=lambda cell: place(cell[1]))


def value_of(found: Found, run: Trained) -> float | None:
    """What the trial reached, also if it was stopped early; None where it diverged."""
    value = None if run.diverged else run.metrics.get(found.objective)
    return value if value is not None and math.isfinite(value) else None


def fan_of(found: Found, runs: list[Trained]) -> Basin | None:
    """Results by learning rate; None where too few rates were tried to the end to make a curve.

    What a trial had reached when its search ended it early is not what its rate reaches.
    """
    rated = [run for run in runs if is_rate(run.settings.get(RATE))]
    early = [run for run in rated if run.status == "PRUNED"]
    points = [
        (float(run.settings[RATE]), value_of(found, run)) for run in rated if run not in early
    ]
    if len({rate for rate, _ in points}) < FEWEST_RATES:
        return None
    values = [value for _, value in points if value is not None]
    best = abs((min if found.is_minimized else max)(values, default=1.0))
    tolerance = TOLERANCE if is_share(found.objective) else TOLERANCE * best
    return basin(
        points,
        tolerance=tolerance,
        higher_is_better=not found.is_minimized,
        stopped=[float(run.settings[RATE]) for run in early],
    )


def is_rate(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf
