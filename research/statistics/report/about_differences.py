"""The section on differences: how far arms are apart, pair by pair and in all.

A few comparisons are told one by one. Of many, as of every arm with every other, the figures show
those with one arm, the reference: the one that all are compared with, or else the best.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from research.statistics.figures.arms import draw_differences, draw_pairs, versus
from research.statistics.figures.panels import Panel
from research.statistics.interval import Interval
from research.statistics.mean import FEWEST_BEYOND, FEWEST_FOR_BOOTSTRAP, LEVEL, RESAMPLES
from research.statistics.report import numbers
from research.statistics.report.blocks import Figure, Section
from research.statistics.report.content import ArmResult, Contrast, Report
from research.statistics.report.tables import Table

FEW = 10  # comparisons that a figure shows all
MOST_PAIRS = 4  # comparisons, above which their pairs are not drawn each by itself
HOLM = "Holm (1979)"
EFRON = (
    "Interval of a mean: Student's t; symmetric studentized bootstrap (Efron and Tibshirani, 1993) "
    f"from {FEWEST_FOR_BOOTSTRAP} runs on and, at {100 * LEVEL:g} %, for up to "
    f"{round((1 - LEVEL) * (RESAMPLES + 1) / FEWEST_BEYOND)} comparisons"
)


def in_order(report: Report) -> list[ArmResult]:
    """The arms, best first; those without a value at the end."""
    sign = -1 if report.higher_is_better else 1

    def place(arm: ArmResult) -> tuple[bool, float]:
        value = arm.mean.value
        return (True, 0.0) if not math.isfinite(value) else (False, sign * value)

    return sorted(report.arms, key=place)


def with_reference(report: Report) -> tuple[str, dict[str, Contrast]]:
    """The arm that all are compared with, or else the best; and each arm's difference to it."""
    if not report.contrasts:
        return "", {}
    others = {each.against for each in report.contrasts}
    reference = next(iter(others)) if len(others) == 1 else in_order(report)[0].name
    found = {each.against: turned(each) for each in report.contrasts if each.arm == reference}
    found |= {each.arm: each for each in report.contrasts if each.against == reference}
    return reference, found


def turned(contrast: Contrast) -> Contrast:
    """The same comparison seen from the other arm."""
    found = contrast.difference
    improvement = mirrored(found.improvement_interval, 1.0)
    assert improvement is not None
    difference = replace(
        found,
        estimate=-found.estimate,
        interval=mirrored(found.interval, 0.0),
        simultaneous=mirrored(found.simultaneous, 0.0),
        probability_of_improvement=1 - found.probability_of_improvement,
        improvement_interval=improvement,
        runs=(found.runs[1], found.runs[0]),
    )
    values = tuple(-value for value in contrast.values)
    return Contrast(contrast.against, contrast.arm, difference, contrast.seeds, values)


def mirrored(interval: Interval | None, total: float) -> Interval | None:
    if interval is None:
        return None
    return Interval(total - interval.high, total - interval.low, interval.level)


def told(report: Report) -> list[Contrast]:
    """The comparisons that are told one by one."""
    if len(report.contrasts) <= FEW:
        return list(report.contrasts)
    _, found = with_reference(report)
    return [found[arm.name] for arm in in_order(report) if arm.name in found]


def contrast_header(report: Report) -> list[str]:
    return [
        "difference",
        f"{level(report)} interval",
        "p",
        "adjusted p",
        "wins a pair",
        "pairs needed",
    ]


def contrast_cells(contrast: Contrast | None, metric: str) -> list[str]:
    if contrast is None:
        return [numbers.NONE] * 6
    found = contrast.difference
    return [
        numbers.difference(found.estimate, metric) + ("" if found.paired else " *"),
        numbers.interval(found.interval, metric, sign=True),
        numbers.probability(found.p_value),
        numbers.probability(found.adjusted_p_value),
        numbers.shares(found.probability_of_improvement, found.improvement_interval),
        numbers.NONE if found.pairs_needed is None else str(found.pairs_needed),
    ]


def contrast_notes(report: Report) -> list[str]:
    """What the columns of a comparison mean."""
    points = ", in points" if numbers.is_share(report.metric) else ""
    notes = [
        f"Difference: arm minus the other{points}. Adjusted p: {HOLM}, over all comparisons. Wins "
        "a pair: the probability that a run of the arm is better than the other's of the same seed "
        "(Bouthillier et al., 2021). Needed: pairs that would show a difference of this size with "
        "80 % power."
    ]
    if any(not each.difference.paired for each in report.contrasts):
        notes.append(
            "*: not paired, the seeds do not match; wins are of any run of the arm against any of "
            "the other's (Agarwal et al., 2021)."
        )
    return notes


def differences(report: Report) -> Iterable[Section]:
    """The pairs' differences as dots, and the pairs themselves as lines."""
    if not report.contrasts:
        return
    shown = told(report)
    pairs = pair_panels(report, shown)
    methods = dict.fromkeys(each.difference.method.rstrip(".") for each in report.contrasts)
    words = "Dot: the difference of a pair of runs with the same seeds. Diamond and bar: mean and "
    blocks: list[str | Table | Figure] = [
        Figure(
            (*draw_differences(shown, report.metric), *pairs),
            f"{words}{level(report)} interval, of each comparison by itself."
            + (" Lines: the pairs, the thick one their means." if pairs else ""),
            f"Differences: {'; '.join(methods)}. {EFRON}.",
        )
    ]
    blocks += report.remarks
    if len(with_reference(report)[1]) < len(report.contrasts):
        blocks.append(contrasts_table(report))
    paired = [each for each in shown if each.values]
    if paired:
        blocks.append(pairs_table(paired, report.metric))
    yield Section("differences", "The differences", tuple(blocks))


def pair_panels(report: Report, shown: Sequence[Contrast]) -> list[Panel]:
    """The pairs of each comparison by itself, where these are few."""
    by_name = {arm.name: arm for arm in report.arms}
    return [
        draw_pairs(each, by_name[each.against], by_name[each.arm], report.metric, number)
        for number, each in enumerate(shown, start=1)
        if each.values and len(shown) <= MOST_PAIRS
    ]


def contrasts_table(report: Report) -> Table:
    """All comparisons, where an arm has more than one."""
    rows = tuple(
        (each.arm, each.against, str(each.difference.n), *contrast_cells(each, report.metric))
        for each in report.contrasts
    )
    header = ("arm", "against", "n", *contrast_header(report))
    notes = tuple(contrast_notes(report))
    return Table("All comparisons", header, rows, frozenset({0, 1}), notes=notes)


def pairs_table(paired: Sequence[Contrast], metric: str) -> Table:
    """Each pair's difference, by seed."""
    seeds = list(dict.fromkeys(seed for each in paired for seed in each.seeds))
    others = list(dict.fromkeys(each.against for each in paired))
    rows = []
    for each in paired:
        by_seed = dict(zip(each.seeds, each.values, strict=True))
        cells = [numbers.difference(by_seed.get(seed), metric) for seed in seeds]
        rows.append((versus(each) if len(others) > 1 else each.arm, *cells))
    to = f" to {others[0]}" if len(others) == 1 else ""
    header = ("arm", *(f"seed {seed}" for seed in seeds))
    return Table(f"Difference of each pair{to}, by seed", header, tuple(rows))


def level(report: Report) -> str:
    return f"{100 * report.level:g} %"
