"""The verdict in words: which arm is better and by how much, or what it would take to know.

    B is better than A: +0.61 points (95 % 0.35 to 0.88, n=8 pairs)
    B and A are indistinguishable at n=5 pairs: +0.21 points (95 % -0.12 to 0.54); about 14 pairs
    would show a difference of this size

The p-value decides that agrees with the interval, after Holm's correction where several arms were
compared at once.  Failing to tell two arms apart never makes them equal; that needs a margin, the
smallest difference that would matter, and an interval that lies within it (Schuirmann, 1987;
Lakens, 2017, "Equivalence tests", Social Psychological and Personality Science 8).  Among several
comparisons it is the simultaneous one, and what more runs would show is told for their level too.
"""

import math
from typing import Literal

from research.statistics.difference import Difference
from research.statistics.interval import Interval
from research.statistics.mean import FEWEST_FOR_BOOTSTRAP
from research.statistics.paired import smallest_p_value
from research.statistics.pairs import (
    ALPHA,
    MOST_PAIRS,
    pairs_needed,
    smallest_difference,
    spread_limits,
)

Finding = Literal["better", "worse", "equivalent", "unclear"]


def finding(
    difference: Difference, *, alpha: float = ALPHA, margin: float | None = None
) -> Finding:
    """What is shown of B against A; `margin` is in the metric's own unit, as the estimate is."""
    if difference.deciding_p_value <= alpha and difference.estimate != 0:
        return "better" if (difference.estimate > 0) == difference.higher_is_better else "worse"
    return "equivalent" if is_within(difference, margin) else "unclear"


def verdict(
    name_a: str,
    name_b: str,
    difference: Difference,
    *,
    unit: str = "points",
    scale: float = 100,
    alpha: float = ALPHA,
    margin: float | None = None,
) -> str:
    """One sentence on B against A, without a full stop.

    Numbers are told times `scale` in `unit`: points for a fraction of 1, and for a loss "" and 1.
    `margin`, in the metric's own unit, is the smallest difference that would matter.
    """
    told = Told(difference, unit, scale)
    found = finding(difference, alpha=alpha, margin=margin)
    if found in ("better", "worse"):
        sentence = f"{name_b} is {found} than {name_a}: {told.result()}"
        if is_within(difference, margin):
            sentence += f", but by less than the {told.size(margin)} that would matter"
        return sentence
    if found == "equivalent":
        return f"{name_b} and {name_a} are equivalent within {told.size(margin)}: {told.within()}"
    if difference.estimate == 0 and difference.standard_deviation == 0:
        where = "every pair" if difference.paired else "every run"
        return f"{name_b} and {name_a} gave the same in {where} (n={told.count()})"
    sentence = f"{name_b} and {name_a} are indistinguishable at n={told.count()}: {told.estimate()}"
    if difference.interval is not None:
        sentence += f" ({told.ends(difference.interval)}{told.correction()})"
    return f"{sentence}; {told.outlook(alpha, margin)}"


def remarks(
    difference: Difference,
    *,
    unit: str = "points",
    scale: float = 100,
    alpha: float = ALPHA,
) -> list[str]:
    """What a careful reader should know of this comparison besides its verdict: full sentences."""
    told = Told(difference, unit, scale)
    said = []
    if not difference.paired:
        said.append(
            "Unpaired: the seeds of the arms do not match, so that their noise does not cancel. "
            "Runs on the same seeds may show more."
        )
    elif difference.method == "Student's t":
        least = smallest_p_value(difference.n)
        doubt = "cannot" if difference.n < FEWEST_FOR_BOOTSTRAP else "can hardly"
        limit = (
            f"; a sign-flip test, which does not, cannot get below p={probability(least)} with so "
            "few"
        )
        said.append(
            f"Student's t takes the differences for roughly normal, which {told.count()} {doubt} "
            f"show{limit if least > alpha / difference.comparisons else ''}."
        )
    if tests_disagree(difference, alpha):
        assert difference.permutation_p_value is not None
        decided = "Student's t" if difference.method == "Student's t" else "the bootstrap"
        said.append(
            f"A close call: {decided} and the sign-flip test do not agree "
            f"(p={probability(difference.p_value)} and "
            f"p={probability(difference.permutation_p_value)})."
        )
    if difference.deciding_p_value > alpha >= difference.p_value:
        said.append(
            f"On its own this comparison would pass (p={probability(difference.p_value)}), but not "
            "among the others that were made with it (Holm)."
        )
    if finding(difference, alpha=alpha) == "unclear" and difference.standard_deviation > 0:
        said.append(readable(difference, told, alpha))
    return said


def tests_disagree(difference: Difference, alpha: float) -> bool:
    """Whether a sign-flip test that could tell them apart says otherwise."""
    other, strictest = difference.permutation_p_value, alpha / difference.comparisons
    if other is None or smallest_p_value(difference.n) > strictest:
        return False
    return (other <= strictest) != (difference.p_value <= strictest)


def readable(difference: Difference, told: "Told", alpha: float) -> str:
    """How small a difference this study could have shown, as well as its runs can tell."""
    freedom = difference.n - 1 if difference.paired else sum(difference.runs) - 2
    spread = spread_limits(difference.standard_deviation, freedom)
    least, low, high = (
        smallest_difference(
            each,
            difference.n,
            alpha=alpha / difference.comparisons,
            paired=difference.paired,
        )
        for each in (difference.standard_deviation, spread.low, spread.high)
    )
    return (
        f"So many runs show a difference of about {told.size(least)} in 4 of 5 studies; as they "
        f"tell their own spread only roughly, it may be {told.number(low)} to {told.size(high)}."
    )


def is_within(difference: Difference, margin: float | None) -> bool:
    """Whether the whole interval lies less than the margin away from 0."""
    interval = difference.deciding_interval
    if margin is None or interval is None:
        return False
    if not margin > 0:
        raise ValueError(
            f"margin, the smallest difference that would matter, must be above 0, but is {margin}."
        )
    return -margin < interval.low and interval.high < margin


class Told:
    """The numbers of a difference in words and in one unit, all with as many decimals."""

    def __init__(self, difference: Difference, unit: str, scale: float) -> None:
        self.difference, self.unit, self.scale = difference, unit, scale
        self.decimals = decimals(difference, scale)

    def result(self) -> str:
        """`+0.61 points (95 % 0.35 to 0.88, n=8 pairs)`"""
        brackets = [f"n={self.count()}{self.correction()}"]
        if self.difference.interval is not None:
            brackets.insert(0, self.ends(self.difference.interval))
        elif self.difference.standard_deviation == 0:
            brackets.insert(0, "in every pair")
        return f"{self.estimate()} ({', '.join(brackets)})"

    def within(self) -> str:
        """`+0.21 points (99.5 % -0.12 to 0.54, one of 10 comparisons, n=5 pairs)`"""
        interval, comparisons = self.difference.deciding_interval, self.difference.comparisons
        assert interval is not None
        among = "" if comparisons == 1 else f", one of {comparisons} comparisons"
        return f"{self.estimate()} ({self.ends(interval)}{among}, n={self.count()})"

    def estimate(self) -> str:
        return self.with_unit(f"{self.rounded(self.difference.estimate):+.{self.decimals}f}")

    def ends(self, interval: Interval) -> str:
        """`95 % 0.35 to 0.88`"""
        ends = f"{self.number(interval.low)} to {self.number(interval.high)}"
        return f"{100 * interval.level:.4g} % {ends}"

    def size(self, value: float | None) -> str:
        assert value is not None
        return self.with_unit(self.number(value))

    def number(self, value: float) -> str:
        return f"{self.rounded(value):.{self.decimals}f}"

    def rounded(self, value: float) -> float:
        return round(value * self.scale, self.decimals) + 0.0  # no -0.00

    def with_unit(self, number: str) -> str:
        return f"{number} {self.unit}".rstrip()

    def count(self) -> str:
        """`8 pairs`, or `5 and 6 runs, unpaired`."""
        if self.difference.paired:
            return "1 pair" if self.difference.n == 1 else f"{self.difference.n} pairs"
        a, b = self.difference.runs
        runs = f"{a} and {b} runs" if a != b else "1 run each" if a == 1 else f"{a} runs each"
        return f"{runs}, unpaired"

    def correction(self) -> str:
        adjusted = self.difference.adjusted_p_value
        return "" if adjusted is None else f", p={probability(adjusted)} by Holm"

    def outlook(self, alpha: float, margin: float | None) -> str:
        """What it would take to know."""
        difference = self.difference
        if difference.n == 1:
            few = "one pair has" if difference.paired else "a single run has"
            return f"{few} no spread to judge by"
        if difference.standard_deviation == 0:
            return "without any spread there is nothing to judge by"
        if difference.interval is None:
            return "too many of the differences are the same to judge by the others"
        if margin is None:
            needed, size = difference.pairs_needed, "a difference of this size"
        else:
            needed = pairs_needed(
                margin,
                difference.standard_deviation,
                alpha=alpha / difference.comparisons,
                paired=difference.paired,
            )
            size = f"a difference of {self.size(margin)}"
        what = "pairs" if difference.paired else "runs of each"
        if needed is None:
            return f"even {MOST_PAIRS} {what} would not show {size}"
        if needed <= difference.n:
            return f"{size} would mostly have been found with so many {what}"
        return f"about {needed} {what} would show {size}"


def decimals(difference: Difference, scale: float) -> int:
    """As many as give the interval's half width two significant digits; from 2 to 6."""
    interval = difference.interval
    width = abs(difference.estimate) if interval is None else (interval.high - interval.low) / 2
    width *= scale
    return 2 if width == 0 else min(max(2, 1 - math.floor(math.log10(width))), 6)


def probability(value: float) -> str:
    """A p-value to read: 0.06, 0.031, 0.0021, below 0.0001."""
    if value < 0.0001:
        return "<0.0001"
    return f"{value:.2g}" if value < 0.995 else "1"
