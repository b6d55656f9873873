"""Sections on the arms: their values, their differences, the grid, the curves."""

import math
from collections.abc import Iterable, Sequence

from research.statistics.figures.arms import draw_arms, draw_differences, draw_pairs, versus
from research.statistics.figures.grid import best_cell, draw_grid, names_of
from research.statistics.figures.lines import MOST_MULTIPLES, draw_curves
from research.statistics.report import numbers
from research.statistics.report.blocks import Figure, Section
from research.statistics.report.content import ArmResult, Cell, Contrast, Report
from research.statistics.report.tables import Table

MOST_PAIRS = 4  # comparisons, above which their pairs are not drawn each by itself
HOLM = "Holm (1979)"
EFRON = (
    "Interval of a mean: symmetric studentized bootstrap (Efron and Tibshirani, 1993) from 6 runs "
    "on, Student's t below"
)


def arms(report: Report) -> Iterable[Section]:
    """The table of the arms, best first, each with its difference, and every run as a dot."""
    if not report.arms:
        return
    ordered = in_order(report)
    figure = Figure(
        (draw_arms(ordered, report.metric),),
        f"Dot: a run. Diamond: the mean. Bar: {level(report)} interval of the mean.",
        f"{EFRON}.",
    )
    yield Section("arms", "The arms", (arms_table(report, ordered), figure))


def in_order(report: Report) -> list[ArmResult]:
    """The arms, best first; those without a value at the end."""
    sign = -1 if report.higher_is_better else 1

    def place(arm: ArmResult) -> tuple[bool, float]:
        value = arm.mean.value
        return (True, 0.0) if not math.isfinite(value) else (False, sign * value)

    return sorted(report.arms, key=place)


def arms_table(report: Report, ordered: Sequence[ArmResult]) -> Table:
    metric, unit = report.metric, numbers.unit(report.metric)
    shown = first_of_each(report.contrasts)
    header = ["arm", "n", f"mean ± sd {unit}".strip(), f"{level(report)} interval"]
    others = {each.against for each in shown.values()}
    if len(others) > 1:
        header.append("against")
    header += contrast_header(report) if shown else []
    rows = []
    for arm in ordered:
        row = [arm.name, str(len(arm.values)), spread(arm, metric)]
        row += [numbers.interval(arm.mean.interval, metric)]
        if shown:
            own = shown.get(arm.name)
            row += [numbers.NONE if own is None else own.against] if len(others) > 1 else []
            row += contrast_cells(own, metric)
        rows.append(tuple(row))
    notes = ["sd: standard deviation of one run, over seeds."]
    if any(arm.left_out for arm in ordered):
        count = sum(arm.left_out for arm in ordered)
        notes.append(f"{count} run{'s have' if count > 1 else ' has'} no value: see What failed.")
    if shown:
        notes += contrast_notes(report)
    caption = f"{metric} of the arms, best first"
    if len(others) == 1:
        caption += f"; differences to {next(iter(others))}"
    return Table(
        caption, tuple(header), tuple(rows), frozenset({0, 4} if len(others) > 1 else {0}),
        frozenset({(0, 0), (0, 2)}) if len(rows) > 1 else frozenset(), tuple(notes),
    )  # fmt: skip


def first_of_each(contrasts: Sequence[Contrast]) -> dict[str, Contrast]:
    """The first comparison of each arm: only one finds room in its row."""
    return {each.arm: each for each in reversed(contrasts)}


def spread(arm: ArmResult, metric: str) -> str:
    """`66.31 ± 0.24`; the mean alone of one run."""
    if not arm.values:
        return numbers.NONE
    mean = numbers.bare(arm.mean.value, metric)
    if arm.standard_deviation is None or not math.isfinite(arm.standard_deviation):
        return mean
    return f"{mean} ± {numbers.bare(arm.standard_deviation, metric)}"


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
        "(Agarwal et al., 2021). Needed: pairs that would show a difference of this size with "
        "80 % power."
    ]
    if any(not each.difference.paired for each in report.contrasts):
        notes.append("*: not paired, the seeds do not match.")
    return notes


def differences(report: Report) -> Iterable[Section]:
    """Every comparison: the pairs' differences as dots, and the pairs themselves as lines."""
    if not report.contrasts:
        return
    by_name = {arm.name: arm for arm in report.arms}
    panels = [draw_differences(report.contrasts, report.metric)]
    few = report.contrasts if len(report.contrasts) <= MOST_PAIRS else ()
    for number, each in enumerate(few, start=1):
        ends = by_name.get(each.against), by_name.get(each.arm)
        if each.values and ends[0] is not None and ends[1] is not None:
            panels.append(draw_pairs(each, ends[0], ends[1], report.metric, number))
    methods = dict.fromkeys(each.difference.method.rstrip(".") for each in report.contrasts)
    words = "Dot: the difference of a pair of runs with the same seeds. Diamond and bar: mean and "
    blocks: list[str | Table | Figure] = [
        Figure(
            tuple(panels),
            f"{words}{level(report)} interval, of each comparison by itself."
            + (" Lines: the pairs, the thick one their means." if len(panels) > 1 else ""),
            f"Differences: {'; '.join(methods)}. {EFRON}.",
        )
    ]
    blocks += report.remarks
    if len(first_of_each(report.contrasts)) < len(report.contrasts):
        blocks.append(contrasts_table(report))
    if any(each.values for each in report.contrasts):
        blocks.append(pairs_table(report))
    yield Section("differences", "The differences", tuple(blocks))


def contrasts_table(report: Report) -> Table:
    """All comparisons, where an arm has more than one."""
    rows = tuple(
        (each.arm, each.against, str(each.difference.n), *contrast_cells(each, report.metric))
        for each in report.contrasts
    )
    header = ("arm", "against", "n", *contrast_header(report))
    notes = tuple(contrast_notes(report))
    return Table("All comparisons", header, rows, frozenset({0, 1}), notes=notes)


def pairs_table(report: Report) -> Table:
    """Each pair's difference, by seed."""
    paired = [each for each in report.contrasts if each.values]
    seeds = list(dict.fromkeys(seed for each in paired for seed in each.seeds))
    others = list(dict.fromkeys(each.against for each in paired))
    rows = []
    for each in paired:
        by_seed = dict(zip(each.seeds, each.values, strict=True))
        cells = [numbers.difference(by_seed.get(seed), report.metric) for seed in seeds]
        rows.append((versus(each) if len(others) > 1 else each.arm, *cells))
    to = f" to {others[0]}" if len(others) == 1 else ""
    header = ("arm", *(f"seed {seed}" for seed in seeds))
    return Table(f"Difference of each pair{to}, by seed", header, tuple(rows))


def grid(report: Report) -> Iterable[Section]:
    """The heat map, and its numbers as a table."""
    if report.grid is None or not report.grid.cells:
        return
    found, metric = report.grid, report.metric
    rows, columns = names_of(found)
    best = best_cell(found, report.higher_is_better)
    cells = {(cell.row, cell.column): cell for cell in found.cells}
    texts = tuple(
        (row, *(cell_text(cells.get((row, column)), metric) for column in columns)) for row in rows
    )
    strong = frozenset(
        (r, c + 1)
        for r, row in enumerate(rows)
        for c, column in enumerate(columns)
        if best is not None and cells.get((row, column)) is best
    )
    panel = draw_grid(found, metric, higher_is_better=report.higher_is_better)
    figure = Figure(
        (panel,),
        f"Mean and {level(report)} interval over seeds; n where there is none. The bluer, the "
        "better (half by rank, half by value); the best cell is framed.",
        found.method or f"{EFRON}.",
    )
    unit = numbers.unit(metric)
    table = Table(
        f"{metric} {f'in {unit} ' if unit else ''}by {found.row_title} and {found.column_title}",
        (found.row_title, *columns), texts, strong=strong,
    )  # fmt: skip
    yield Section(
        "grid",
        f"{found.row_title} {numbers.TIMES} {found.column_title}".capitalize(),
        (figure, table),
    )


def cell_text(cell: Cell | None, metric: str) -> str:
    """`66.31 (66.02 to 66.60)`; why where there is no value; a dash where nothing was tried."""
    if cell is None:
        return numbers.NONE
    if cell.value is None:
        return cell.note or numbers.NONE
    told = numbers.interval(cell.value.interval, metric)
    mean = numbers.bare(cell.value.value, metric)
    return mean if told == numbers.NONE else f"{mean} ({told})"


def curves(report: Report) -> Iterable[Section]:
    """Learning curves with bands, a panel or several for each metric."""
    panels = [panel for each in report.curves for panel in draw_curves(each)]
    if not panels:
        return
    counts = {point.n for each in report.curves for c in each.curves for point in c.points}
    runs = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    caption = f"Line: mean of {runs} runs. Band: {level(report)} interval of the mean."
    if counts == {1}:
        caption = "Every line is one run: there is no interval."
    if any(len(each.curves) > MOST_MULTIPLES for each in report.curves):
        caption += f" The first {MOST_MULTIPLES} arms are drawn."
    method = f"Each epoch by itself, nothing is smoothed. {EFRON}."
    yield Section("curves", "Learning curves", (Figure(tuple(panels), caption, method),))


def level(report: Report) -> str:
    return f"{100 * report.level:g} %"
