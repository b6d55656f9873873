"""The learning-rate fan of one cell: the best rate, and how wide the basin of good rates is.

A method whose good rates span a decade is tuned in three trials; one with a narrow basin looks bad
wherever the search was coarse. From the values at a cell's rates this tells the best rate, the
width of the range in which the value is within a tolerance of the best, and whether the search has
seen the end of that range at all.

The best is taken from a smooth curve and not from the points: the best of many noisy points is
better than its rate is. The curve is a local parabola in log10 of the rate with Gaussian weights
(Cleveland and Devlin, 1988; Fan and Gijbels, 1996). They are as wide as can be while the rates of
the better half, left out, are predicted nearly as well as by any width: what lies beyond the cliff
must not say how smooth the top is. Fewer than 7 rates are joined by straight lines.

On simulated hills and cliffs with noise of up to a point, 10 to 40 rates drawn over 5 decades gave
the best rate to 0.3 decades and the width to 0.4 (root mean square); 6 rates to 0.5 and 0.7.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BANDWIDTHS = (0.04, 0.08, 0.16, 0.3, 0.5, 0.8)  # decades
FEWEST_TO_SMOOTH = 7  # rates
NEARLY = 1.25  # of the least squared error
STEPS_PER_DECADE = 100  # of the curve
SAME_RATE = 1e-6  # decades: rates nearer than this are one

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """What came of one learning rate: `values` of the runs that finished, and how many diverged."""

    rate: float
    values: tuple[float, ...]
    diverged: int

    @property
    def mean(self) -> float | None:
        return sum(self.values) / len(self.values) if self.values else None

    @property
    def mostly_diverged(self) -> bool:
        return self.diverged > 0 and self.diverged >= len(self.values)


@dataclass(frozen=True)
class Basin:
    """The fan of a cell.

    `curve` has (rate, value) of the smooth curve. `best_rate` is None where every run diverged.
    The basin is from `low` to `high`; `open_low` and `open_high`: the search ended there before
    the value fell, so that `decades` is a lower bound. `edge` says that the best rate itself is
    the last one tried on that side. `advice` is a sentence, empty where nothing is to be done.
    `runs` counts all, those too that were `stopped` early.
    """

    rates: tuple[Rate, ...]
    curve: tuple[tuple[float, float], ...]
    best_rate: float | None
    best_value: float | None
    low: float | None
    high: float | None
    decades: float
    open_low: bool
    open_high: bool
    edge: Literal["low", "high", "both"] | None
    tolerance: float
    runs: int
    diverged: int
    advice: str
    stopped: int = 0


def basin(
    points: Sequence[tuple[float, float | None]],
    *,
    tolerance: float = 0.01,
    higher_is_better: bool = True,
    stopped: Sequence[float] = (),
) -> Basin:
    """The basin, from (learning rate, value) of every run; None, nan and infinities diverged.

    Several runs of a rate are seeds and count by their mean. A rate counts as diverged where at
    least half of its runs did: no basin reaches across it. `tolerance`, in the value's unit, is
    what may be lost to the best: one point of accuracy, or the noise where that is larger.
    `stopped` are the rates of runs that were ended early: what these reached is no value of their
    rate, but the rates were tried.
    ValueError for a rate that is not positive.
    """
    tried = [*(rate for rate, _ in points), *stopped]
    wrong = [rate for rate in tried if not (rate > 0 and math.isfinite(rate))]
    if wrong:
        raise ValueError(f"A learning rate must be above 0 to have a logarithm; {wrong[0]} is not.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, but it is {tolerance}.")
    rates = gathered(points)
    runs, diverged = len(tried), sum(rate.diverged for rate in rates)
    alive = [rate for rate in rates if not rate.mostly_diverged]
    if not alive:
        advice = "Every run diverged: search lower rates." if points else "No run."
        if stopped:
            advice = "No run came to its end: all diverged or were stopped early."
        return Basin(
            rates, (), None, None, None, None, 0.0, False, False, None, tolerance, runs, diverged,
            advice, len(stopped),
        )  # fmt: skip
    sign = 1.0 if higher_is_better else -1.0
    places = np.log10([rate.rate for rate in alive])
    means = sign * np.array([rate.mean for rate in alive])
    grid = grid_over(places)
    smooth = smoothed(places, means, np.array([len(rate.values) for rate in alive]), grid)
    top = middle_of_top(smooth)
    good = smooth >= smooth[top] - tolerance
    for rate in rates:
        if rate.mostly_diverged:  # the curve knows nothing of what is beyond
            place = math.log10(rate.rate)
            good &= (grid < place) if grid[top] < place else (grid > place)
    first, last = top, top
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(grid) and good[last + 1]:
        last += 1
    lowest, highest = rates[0].rate, rates[-1].rate
    ends_low = math.isclose(10 ** grid[0], lowest, rel_tol=1e-9)
    ends_high = math.isclose(10 ** grid[-1], highest, rel_tol=1e-9)
    edge = edge_of(
        top == 0 and ends_low and min(tried) >= lowest,
        top == len(grid) - 1 and ends_high and max(tried) <= highest,
    )
    return Basin(
        rates=rates,
        curve=tuple((float(10**x), float(sign * y)) for x, y in zip(grid, smooth, strict=True)),
        best_rate=float(10 ** grid[top]),
        best_value=float(sign * smooth[top]),
        low=float(10 ** grid[first]),
        high=float(10 ** grid[last]),
        decades=float(grid[last] - grid[first]),
        open_low=first == 0 and ends_low,
        open_high=last == len(grid) - 1 and ends_high,
        edge=edge,
        tolerance=tolerance,
        runs=runs,
        diverged=diverged,
        advice=advice_for(edge, lowest, highest),
        stopped=len(stopped),
    )


def middle_of_top(smooth: Array) -> int:
    """Where the curve is highest: of a flat top the middle."""
    first = last = int(smooth.argmax())
    while last + 1 < len(smooth) and smooth[last + 1] >= smooth[first]:
        last += 1
    return (first + last) // 2


def edge_of(low: bool, high: bool) -> Literal["low", "high", "both"] | None:
    if low and high:
        return "both"
    return "low" if low else "high" if high else None


def advice_for(edge: str | None, lowest: float, highest: float) -> str:
    if edge == "both":
        return f"Only one rate was tried, {lowest:.3g}: search around it."
    if edge == "low":
        return f"The best rate is the lowest that was tried, {lowest:.3g}: search lower ones."
    if edge == "high":
        return f"The best rate is the highest that was tried, {highest:.3g}: search higher ones."
    return ""


def gathered(points: Sequence[tuple[float, float | None]]) -> tuple[Rate, ...]:
    """The rates, ascending, each with its runs."""
    found: list[Rate] = []
    for rate, value in sorted(points, key=lambda point: point[0]):
        gave = () if value is None or not math.isfinite(value) else (value,)
        if found and math.log10(rate / found[-1].rate) < SAME_RATE:
            last = found.pop()
            found.append(Rate(last.rate, last.values + gave, last.diverged + 1 - len(gave)))
        else:
            found.append(Rate(rate, gave, 1 - len(gave)))
    return tuple(found)


def grid_over(places: Array) -> Array:
    """Where the curve is drawn: at all rates, and evenly between the first and the last."""
    span = places[-1] - places[0]
    even = np.linspace(places[0], places[-1], max(math.ceil(span * STEPS_PER_DECADE), 1) + 1)
    return np.unique(np.concatenate([places, even]))


def smoothed(places: Array, values: Array, counts: Array, grid: Array) -> Array:
    """The curve at each place of the grid; `counts` runs are in each value."""
    if len(places) < FEWEST_TO_SMOOTH:
        return np.interp(grid, places, values)
    better = np.flatnonzero(values >= np.median(values))
    errors = []
    for bandwidth in BANDWIDTHS:
        error = 0.0
        for left_out in better:
            rest = np.arange(len(places)) != left_out
            there = local_parabola(
                places[rest], values[rest], counts[rest], places[left_out], bandwidth
            )
            error += counts[left_out] * (there - values[left_out]) ** 2
        errors.append(error)
    bandwidth = max(
        width for width, error in zip(BANDWIDTHS, errors, strict=True)
        if error <= NEARLY * min(errors)
    )  # fmt: skip
    return np.array([local_parabola(places, values, counts, at, bandwidth) for at in grid])


def local_parabola(
    places: Array, values: Array, counts: Array, at: float, bandwidth: float
) -> float:
    """The weighted parabola's value at `at`; it never leaves the range of all values."""
    distances = np.abs(places - at)
    # The three nearest rates carry weight however far they are.
    width = max(bandwidth, float(np.partition(distances, 2)[2]) / 4)
    weights = np.sqrt(counts * np.exp(-0.5 * (distances / width) ** 2))
    powers = np.vander(places - at, 3, increasing=True)
    solution = np.linalg.lstsq(powers * weights[:, None], values * weights, rcond=1e-6)[0]
    return float(np.clip(solution[0], values.min(), values.max()))
