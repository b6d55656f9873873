"""Sections on the arms: their values, the grid, the curves."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from research.statistics.figures.arms import draw_arms
from research.statistics.figures.grid import best_cell, draw_grid, names_of
from research.statistics.figures.lines import MOST_MULTIPLES, draw_curves
from research.statistics.figures.panels import COLORS
from research.statistics.report import numbers
from research.statistics.report.about_differences import (
    EFRON,
    contrast_cells,
    contrast_header,
    contrast_notes,
    in_order,
    level,
    with_reference,
)
from research.statistics.report.blocks import Figure, Section
from research.statistics.report.content import ArmResult, Cell, Curves, Report
from research.statistics.report.tables import Table


def arms(report: Report) -> Iterable[Section]:
    """The table of the arms, best first, each with its difference, and every run as a dot."""
    if not report.arms:
        return
    ordered = in_order(report)
    figure = Figure(
        tuple(draw_arms(ordered, report.metric)),
        f"Dot: a run. Diamond: the mean. Bar: {level(report)} interval of the mean.",
        f"{EFRON}.",
    )
    yield Section("arms", "The arms", (arms_table(report, ordered), figure))


def arms_table(report: Report, ordered: Sequence[ArmResult]) -> Table:
    metric, unit = report.metric, numbers.unit(report.metric)
    reference, shown = with_reference(report)
    # Each arm at the rate that is best for it: without the rates nobody could do it again.
    rates_differ = len({arm.learning_rate for arm in ordered}) > 1
    header = ["arm", *(["learning rate"] if rates_differ else []), "n"]
    header += [f"mean ± sd {unit}".strip(), f"{level(report)} interval"]
    header += contrast_header(report) if shown else []
    rows = []
    for arm in ordered:
        row = [arm.name, *([arm.learning_rate or numbers.NONE] if rates_differ else [])]
        row += [str(len(arm.values)), spread(arm, metric)]
        row += [numbers.interval(arm.mean.interval, metric)]
        if shown:
            row += contrast_cells(shown.get(arm.name), metric)
        rows.append(tuple(row))
    notes = ["sd: standard deviation of one run, over seeds."]
    if any(arm.left_out for arm in ordered):
        count = sum(arm.left_out for arm in ordered)
        notes.append(f"{count} run{'s have' if count > 1 else ' has'} no value: see What failed.")
    if shown:
        notes += contrast_notes(report)
    caption = f"{metric} of the arms, best first"
    if shown:
        caption += f"; differences to {reference}"
    strong = frozenset({(0, 0), (0, 2 + rates_differ)}) if len(rows) > 1 else frozenset()
    return Table(caption, tuple(header), tuple(rows), strong=strong, notes=tuple(notes))


def spread(arm: ArmResult, metric: str) -> str:
    """`66.31 ± 0.24`; the mean alone of one run."""
    if not arm.values:
        return numbers.NONE
    mean = numbers.bare(arm.mean.value, metric)
    if arm.standard_deviation is None or not math.isfinite(arm.standard_deviation):
        return mean
    return f"{mean} ± {numbers.bare(arm.standard_deviation, metric)}"


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
    """Learning curves with bands: a panel for each metric, or of many arms for each arm."""
    if not report.curves:
        return
    is_many = len(report.arms) > len(COLORS)
    drawn = (best_first(report, report.curves[0]),) if is_many else report.curves
    panels = tuple(panel for each in drawn for panel in draw_curves(each))
    counts = {point.n for each in drawn for curve in each.curves for point in curve.points}
    runs = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    caption = f"Line: mean of {runs} runs. Band: {level(report)} interval of the mean."
    if counts == {1}:
        caption = "Every line is one run: there is no interval."
    if is_many:
        caption += f" {drawn[0].metric}, best arms first, all others in grey."
    if len(drawn[0].curves) > MOST_MULTIPLES:
        caption += f" The {MOST_MULTIPLES} best of {len(drawn[0].curves)} are drawn."
    method = f"Each epoch by itself, nothing is smoothed. {EFRON}."
    yield Section("curves", "Learning curves", (Figure(panels, caption, method),))


def best_first(report: Report, curves: Curves) -> Curves:
    places = {arm.name: place for place, arm in enumerate(in_order(report))}
    found = sorted(curves.curves, key=lambda curve: places.get(curve.arm, len(places)))
    return replace(curves, curves=tuple(found))
