"""What a search adds to a report: learning-rate fans, the best of k trials, times to a target.

Every trial counts: one that diverged or failed is part of what a search costs. All of it is read
by the search's own objective, a figure of the validation pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from research.comparison.racing import races_of
from research.comparison.selection import searched
from research.statistics.arms import CHOICES, Trained
from research.statistics.basin import Basin, basin
from research.statistics.best_of import BestOf, best_of
from research.statistics.report.numbers import is_share
from research.statistics.survival import Race
from research.tracking.arms import Found

RATE = "optimizer.lr"
FEWEST_RATES = 3  # two make a line
TOLERANCE = 0.01  # of accuracy; of other metrics the same share of the best value


@dataclass(frozen=True)
class SearchPart:
    """Of each cell its fan and its best of k, by `metric`; times to a target, if trials tell."""

    metric: str
    fans: Mapping[str, Basin] = field(default_factory=dict)
    best_of: Mapping[str, BestOf] = field(default_factory=dict)
    races: tuple[Race, ...] = ()


def search_part(found: Found, level: float) -> SearchPart:
    """What the trials of a search tell, cell by cell; the confirming runs are no part of it."""
    cells = cells_of(found)
    fans = {name: fan for name, runs in cells.items() if (fan := fan_of(found, runs)) is not None}
    curves = {
        name: best_of(
            [value_of(found, run) for run in runs],
            higher_is_better=not found.is_minimized,
            level=level,
        )
        for name, runs in cells.items()
        if len(runs) > 1
    }
    return SearchPart(found.objective, fans, curves, races_of(cells))


def cells_of(found: Found) -> dict[str, list[Trained]]:
    """The trials by the classes that the search chose among: `MSELoss Adam`."""
    tried = [each for each in found.runs if not each.confirms]
    varied = set(searched(tried))
    choices = [choice for choice in CHOICES if choice in varied]
    cells: dict[str, list[Trained]] = {}
    for each in tried:
        settings = each.trained.settings
        name = " ".join(str(settings.get(choice)) for choice in choices) or found.run.run_name
        cells.setdefault(name, []).append(each.trained)
    return cells


def value_of(found: Found, run: Trained) -> float | None:
    """What the trial reached, also if it was pruned; None where it diverged or failed."""
    ended = run.status in ("FINISHED", "PRUNED")
    return run.metrics.get(found.objective) if ended else None


def fan_of(found: Found, runs: list[Trained]) -> Basin | None:
    """Results by learning rate; None where too few rates were tried to make a curve."""
    points = [
        (float(run.settings[RATE]), value_of(found, run))
        for run in runs
        if isinstance(run.settings.get(RATE), int | float) and run.settings[RATE] > 0
    ]
    if len({rate for rate, _ in points}) < FEWEST_RATES:
        return None
    values = [value for _, value in points if value is not None]
    best = max((abs(value) for value in values), default=1.0)
    tolerance = TOLERANCE if is_share(found.objective) else TOLERANCE * best
    return basin(points, tolerance=tolerance, higher_is_better=not found.is_minimized)
