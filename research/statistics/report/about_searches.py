"""Sections on searches and their cost: fans, best of k, time to a target, every loss, noise."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from research.statistics.basin import Basin
from research.statistics.best_of import BestOf
from research.statistics.figures.lines import at_risk, draw_best_of, draw_race, round_times
from research.statistics.figures.noise import components, draw_readable, draw_sources
from research.statistics.figures.panels import finite
from research.statistics.figures.trials import draw_fans
from research.statistics.noise import Component, Noise
from research.statistics.readable import Readable
from research.statistics.report import numbers
from research.statistics.report.about_differences import level
from research.statistics.report.blocks import Figure, Section
from research.statistics.report.content import Report
from research.statistics.report.tables import Table
from research.statistics.survival import Race, Survival

if TYPE_CHECKING:
    from research.statistics.cross_loss import CrossLosses

BUDGETS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # of the best of k, in the table
COUNTS = (1, 2, 3, 5, 8, 10, 15, 20)  # seeds, in the table of noise
SMOOTH = (
    "Curve: a local parabola in log10 of the rate (Cleveland and Devlin, 1988), below 7 rates "
    "straight lines; the best rate and the basin are read off the curve, not off single runs"
)
DODGE = (
    "Expected best of k of the trials (Dodge et al., 2019; Tang et al., 2020), the interval by a "
    "bootstrap over trials, up to half of their number. Of trials as this search drew them: where "
    "its sampler learns from them, k fresh ones would differ. Those that were stopped early count "
    "by what they had reached; those that diverged gave nothing, and the expectation is over the k "
    "that gave something"
)
KAPLAN_MEIER = (
    "Kaplan and Meier (1958): a run that ended, was stopped or crashed before the target counts as "
    "not there yet, not as missing; one that diverged counts as never arriving. Trials that a "
    "search ended early did badly, so that the estimate favours an arm with many of them. Log-rank "
    "test: Mantel (1966)"
)
JANSEN = (
    "Variance that remains when all other seeds are held (total effect: Jansen, 1999; Bouthillier "
    "et al., 2021); generalized intervals (Weerahandi, 1993). Shares need not sum to 100 %"
)


# ---- learning rates ------------------------------------------------------------------------------


def fans(report: Report) -> Iterable[Section]:
    """How much the learning rate matters in each cell."""
    if not report.fans:
        return
    metric, higher = metric_of_trials(report)
    panels = draw_fans(report.fans, metric, higher_is_better=higher)
    tolerances = sorted({fan.tolerance for fan in report.fans.values()})
    within = " or ".join(numbers.bare(each, metric) for each in tolerances)
    unit = " points" if numbers.is_share(metric) else ""
    figure = Figure(
        tuple(panels),
        f"{metric} by learning rate. Dot: a run. Line: smooth curve. Green: the best rate, "
        f"and the rates within {within}{unit} of it. Triangle: worse than the axis reaches. Cross: "
        f"diverged.{told_stopped(report)}",
        f"{SMOOTH}.",
    )
    yield Section("learning-rates", "Learning rates", (figure, fans_table(report)))


def told_stopped(report: Report) -> str:
    stopped = sum(fan.stopped for fan in report.fans.values())
    return f" Not shown: {stopped} that were stopped early, short of their end." if stopped else ""


def fans_table(report: Report) -> Table:
    metric, _ = metric_of_trials(report)
    rows = tuple(fan_cells(name, fan, metric) for name, fan in report.fans.items())
    unit = numbers.unit(metric)
    header = (
        "cell",
        "runs",
        "diverged",
        "stopped early",
        "best rate",
        f"value there {unit}".strip(),
    )
    advice = tuple(f"{name}: {fan.advice}" for name, fan in report.fans.items() if fan.advice)
    return Table(
        "Learning rates of each cell", (*header, "good from", "to", "decades"), rows,
        notes=("≤, ≥: no rate beyond was tried to the end: the range may be wider.", *advice),
    )  # fmt: skip


def fan_cells(name: str, fan: Basin, metric: str) -> tuple[str, ...]:
    low, high = (
        numbers.NONE if end is None else f"{mark * is_open}{numbers.rate(end)}"
        for end, mark, is_open in (
            (fan.low, "≤ ", fan.open_low),
            (fan.high, "≥ ", fan.open_high),
        )
    )
    decades = f"{'≥ ' * (fan.open_low or fan.open_high)}{fan.decades:.2f}"
    best = numbers.NONE if fan.best_rate is None else numbers.rate(fan.best_rate)
    value = numbers.bare(fan.best_value, metric)
    counts = str(fan.runs), str(fan.diverged), str(fan.stopped)
    return name, *counts, best, value, low, high, decades


def metric_of_trials(report: Report) -> tuple[str, bool]:
    """What trials are read by, and whether more of it is better."""
    if report.search_metric is None:
        return report.metric, report.higher_is_better
    return report.search_metric, report.search_higher_is_better


# ---- best of k -----------------------------------------------------------------------------------


def best_of(report: Report) -> Iterable[Section]:
    """What to expect of the best of k trials."""
    if not report.best_of:
        return
    metric, _ = metric_of_trials(report)
    unit = f" in {numbers.unit(metric)}" if numbers.unit(metric) else ""
    most = max(each.trials for each in report.best_of.values())
    budgets = [k for k in BUDGETS if k <= most]
    table = Table(
        f"Expected best {metric}{unit} of k trials",
        ("cell", "trials", "failed", *(f"k = {k}" for k in budgets)),
        tuple(
            (name, str(each.trials), str(each.failed), *best_cells(each, budgets, metric))
            for name, each in report.best_of.items()
        ),
        notes=tuple(nothing_told(report)),
    )
    figure = Figure(
        tuple(draw_best_of(report.best_of, metric)),
        f"Line: the best result to be expected of k trials. Band: {level(report)} interval. Where "
        "lines cross, which is better depends on how many trials one can pay for.",
        f"{DODGE}.",
    )
    yield Section("best-of-k", "Best of k trials", (figure, table))


def nothing_told(report: Report) -> Iterable[str]:
    """Of each cell with failures how probable it is that one trial, or two, give nothing."""
    for name, found in report.best_of.items():
        if not found.points:
            yield f"{name}: no trial gave anything."
        elif found.failed > 0:
            told = [
                f"{numbers.share(point.nothing)} at k = {point.k}" for point in found.points[:2]
            ]
            yield f"{name}: chance that none of k gives anything: {', '.join(told)}."


def best_cells(found: BestOf, budgets: Iterable[int], metric: str) -> list[str]:
    by_k = {point.k: point.expected for point in found.points}
    return [numbers.bare(by_k.get(k), metric) for k in budgets]


# ---- time to a target ----------------------------------------------------------------------------


def targets(report: Report) -> Iterable[Section]:
    """How soon runs reach a target, those that never do told apart."""
    blocks: list[str | Table | Figure] = []
    metric = report.race_metric
    for number, race in enumerate(report.races, start=1):
        title = f"Reached {numbers.value(race.target, metric)}"
        why = "" if race.reason == "as asked" else f" ({race.reason})"
        caption = (
            f"Share of runs that have reached {goal(race, metric)}{why}, by {race.unit}. "
            f"A tick: a run seen no further, short of the target. Band: {level(report)} interval."
        )
        panels = tuple(draw_race(race, title, number))
        blocks += [Figure(panels, caption, f"{KAPLAN_MEIER}."), race_table(race, metric)]
        if len(race.tests) > 0:
            blocks.append(tests_table(race))
    if blocks:
        yield Section("targets", "Time to a target", tuple(blocks))


def goal(race: Race, metric: str) -> str:
    """`val/accuracy of 60.00 % or more`."""
    side = "more" if race.higher_is_better else "less"
    return f"{metric} of {numbers.value(race.target, metric)} or {side}"


def race_table(race: Race, metric: str) -> Table:
    """Runs, how many reached it, the median time, and how many were at risk at round times."""
    times = round_times(race)
    risk = at_risk(race, times)
    rows = []
    for arm in race.arms:
        censored = arm.runs - arm.reached
        row = [arm.name, str(arm.runs), str(arm.reached), str(censored), median(arm)]
        rows.append((*row, restricted(arm), *(str(count) for count in risk[arm.name])))
    header = ["arm", "runs", "reached it", "censored", f"median {race.unit}", "restricted mean"]
    horizon = "" if race.horizon is None else f" up to {numbers.time(race.horizon)} {race.unit}"
    return Table(
        f"{race.unit.capitalize()} to {goal(race, metric)}",
        (*header, *(f"at risk at {numbers.time(each)}" for each in times)),
        tuple(rows),
        notes=(
            f"Restricted mean: mean time short of the target{horizon} (Royston and Parmar, 2013). "
            "At risk: runs still on their way.",
        ),
    )


def median(arm: Survival) -> str:
    """`12 (10 to 15)`; an end that was not seen is no number."""
    if arm.median is None:
        return arm.median_text
    if arm.median_interval is None:
        return numbers.time(arm.median)
    ends = (arm.median_interval.low, arm.median_interval.high)
    low, high = (numbers.time(end) if finite([end]) else "∞" for end in ends)
    return f"{numbers.time(arm.median)} ({low} to {high})"


def restricted(arm: Survival) -> str:
    if arm.restricted_mean is None:
        return numbers.NONE
    told = numbers.significant(arm.restricted_mean)
    found = arm.restricted_mean_interval
    if found is None:
        return told
    return f"{told} ({numbers.significant(found.low)} to {numbers.significant(found.high)})"


def tests_table(race: Race) -> Table:
    rows = tuple(
        (
            test.a, test.b, numbers.probability(test.p_value),
            numbers.probability(test.adjusted_p_value),
        )
        for test in race.tests
    )  # fmt: skip
    header = ("arm", "against", "p", "adjusted p")
    notes = ("Adjusted p: Holm (1979), over all pairs of arms.",)
    return Table("Log-rank tests", header, rows, frozenset({0, 1}), notes=notes)


# ---- every loss ----------------------------------------------------------------------------------


def cross_losses(report: Report) -> Iterable[Section]:
    """Each trained network under every loss."""
    if report.cross_losses is None or not report.cross_losses.rows:
        return
    table = cross_table(report.cross_losses)
    blocks: list[str | Table | Figure] = [table]
    failed = report.cross_losses.failed
    if failed:
        rows = tuple(failed.items())
        blocks.append(Table("Not scored", ("checkpoint", "why"), rows, frozenset({0, 1})))
    yield Section("cross-losses", "Under every loss", tuple(blocks))


def cross_table(found: "CrossLosses") -> Table:
    from research.statistics.cross_loss import lower_is_better

    averages = found.averages()
    rows, strong = [], set()
    for number, average in enumerate(averages):
        cells = [numbers.bare(average.mean[each], each) for each in found.measures]
        rows.append((average.arm, average.trained_on, str(average.rows), *cells))
        for column, measure in enumerate(found.measures, start=3):
            values = finite(each.mean[measure] for each in averages)
            pick = min if lower_is_better(measure) else max
            if len(averages) > 1 and values and average.mean[measure] == pick(values):
                strong.add((number, column))
    measures = [f"{each} {numbers.unit(each)}".strip() for each in found.measures]
    left_out = [f"{loss} has no column: {why}." for loss, why in found.left_out.items()]
    return Table(
        "Networks (rows) scored in every measure (columns), on their validation pictures",
        ("arm", "trained with", "n", *measures),
        tuple(rows),
        frozenset({0, 1}),
        frozenset(strong),
        (
            "Means over seeds; the best of each column stands out. Every loss with its default "
            "settings; but for accuracy, lower is better.",
            *left_out,
        ),
    )


# ---- noise ---------------------------------------------------------------------------------------


def noise(report: Report) -> Iterable[Section]:
    """Where the variance of one experiment comes from."""
    if report.noise is None:
        return
    panels = [draw_sources(report.noise, report.metric)]
    if report.readable:
        panels.append(draw_readable(report.readable, report.metric))
    figure = Figure(
        tuple(panels),
        "How much one source alone moves the result of a run, with its "
        f"{level(report)} interval; and by how much the means of two arms must differ to be "
        "worth reading.",
        f"{JANSEN}.",
    )
    blocks: list[str | Table | Figure] = [figure, noise_table(report.noise, report)]
    if report.readable:
        blocks.append(readable_table(report.readable, report.metric))
    yield Section("noise", "Noise", tuple(blocks))


def noise_table(found: Noise, report: Report) -> Table:
    def cells(each: Component) -> tuple[str, ...]:
        deviation = numbers.bare(each.deviation, report.metric)
        within = numbers.interval(each.interval, report.metric)
        return each.source, str(each.runs), deviation, within, numbers.share(each.share)

    points = ", points" if numbers.is_share(report.metric) else ""
    return Table(
        f"Standard deviation of {report.metric} by source{points}",
        ("source", "runs", "sd", f"{level(report)} interval", "of the variance"),
        tuple(cells(each) for each in components(found)),
        notes=tuple(found.notes),
    )


def readable_table(found: tuple[Readable, ...], metric: str) -> Table:
    shown = [each for each in found if each.n in COUNTS]
    within = [numbers.interval(each.unpaired_interval, metric) for each in shown]
    rows = [
        ("other seeds in each arm", *(numbers.bare(each.unpaired, metric) for each in shown)),
        ("may be", *within),
    ]
    if any(each.paired is not None for each in shown):
        rows.append(("paired by seed", *(numbers.bare(each.paired, metric) for each in shown)))
        within = [numbers.interval(each.paired_interval, metric) for each in shown]
        rows.append(("may be", *within))
    points = ", points" if numbers.is_share(metric) else ""
    return Table(
        f"Smallest difference of two means worth reading{points}",
        ("", *(f"n = {each.n}" for each in shown)),
        tuple(rows),
        notes=(
            "May be: the limit, were the noise known exactly; as wide as the noise is uncertain.",
        ),
    )
