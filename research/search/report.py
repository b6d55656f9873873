"""How a search ends: a table for the terminal, and a summary with figures for MLflow's page.

Both say the same, out of one list of sections: which configurations were best, whether the first
is told from the second, and what the best was with each loss and each optimizer.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from research.search.ranking import (
    Best,
    Ranked,
    best_of_each,
    ranked,
    shown,
    spread,
    standard_error,
    verdict,
)
from research.search.results import Results, counts, described, short

LISTED = 5  # configurations, on the terminal
LISTED_ON_PAGE = 20
SUMMARY = "summary.md"


@dataclass(frozen=True)
class Section:
    """A heading, rows below a line of their names, and sentences about them.

    Where `is_spacious`, a row's last field is long and goes on a line of its own on the terminal.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    is_spacious: bool = False


def table(results: Results, width: int = 80) -> str:
    """What came of the search as text of at most `width` columns, but for names that are longer."""
    lines = [*textwrap.wrap(headline(results), width)]
    for section in sections(results, LISTED):
        lines += ["", section.title]
        lines += rows_as_text(section, width)
        for note in section.notes:
            lines += textwrap.wrap(note, width)
    return "\n".join(lines)


def summary(results: Results, notes: Sequence[str] = ()) -> str:
    """The same in Markdown, which MLflow's page previews; `notes` are about the figures."""
    lines = [f"# {results.search.name}", "", headline(results)]
    for section in sections(results, LISTED_ON_PAGE):
        lines += ["", f"## {section.title}", "", *markdown_lines(section)]
    if notes:
        lines += ["", "## Figures", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines).rstrip().replace("\n\n\n", "\n\n") + "\n"


def description(results: Results) -> str:
    """The best of it in Markdown, for the top of the page, which shows a few lines of it."""
    best = sections(results, LISTED)[0]
    return "\n".join([headline(results), "", *markdown_lines(best)]).rstrip() + "\n"


def markdown_lines(section: Section) -> list[str]:
    """Its rows and notes, without its title."""
    lines: list[str] = []
    if section.rows:
        lines += [markdown_row(section.names), markdown_row(["---"] * len(section.names))]
        lines += [*map(markdown_row, section.rows), ""]
    return lines + [line for note in section.notes for line in (note, "")]


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write the summary and the figures that have something to show; returns the files."""
    from research.search.figures import draw_figures

    folder.mkdir(parents=True, exist_ok=True)
    files, notes = draw_figures(results, folder)
    file = folder / SUMMARY
    file.write_text(summary(results, notes), encoding="utf-8")
    return [file, *files]


# ---- what is said --------------------------------------------------------------------------------


def headline(results: Results) -> str:
    """What was searched for, and how the trials ended."""
    goals = {"maximize": "higher is better", "minimize": "lower is better"}
    wanted = " and ".join(
        f"{objective.metric} ({goals[objective.direction]})"
        for objective in results.search.objectives
    )
    found = counts(results)
    words = {"open": "not finished"}
    ended = ", ".join(f"{n} {words.get(state, state)}" for state, n in found.items() if n)
    total = sum(found.values())
    return f"{results.search.name}: {wanted}. {total} trials: {ended or 'none yet'}."


def sections(results: Results, listed: int) -> list[Section]:
    order = ranked(results)
    found = [section_of_best(results, order, listed)]
    for key, title in (("model.loss", "By loss"), ("optimizer", "By optimizer")):
        best = best_of_each(results, key)
        if len(best) > 1:
            found.append(section_of_each(results, best, key, title))
    return found


def section_of_best(results: Results, order: Sequence[Ranked], listed: int) -> Section:
    objectives = results.search.objectives
    if len(objectives) > 1:
        names = ["", *(objective.metric for objective in objectives), "trial", "configuration"]
        rows = []
        for entry in order[: 2 * listed]:
            values = zip(entry.point.values or (), objectives, strict=True)
            told = [shown(value, objective.metric) for value, objective in values]
            rows.append(
                [str(entry.place), *told, entry.point.title, described(results, entry.point)]
            )
        notes = [verdict(results), *fresh_of_front(results, order)]
        return Section("Pareto front", names, rows, notes, is_spacious=True)
    if any(entry.fresh is not None for entry in order):
        return section_of_confirmed(results, order, listed)
    metric = results.objective.metric
    names = ["", metric, "trial", "configuration"]
    rows = []
    for entry in order[:listed]:
        error = standard_error(results, entry.point)
        value = shown(entry.point.value(), metric)
        if error is not None:
            value = f"{value.removesuffix(' %')} ± {100 * error:.2f} %"
        rows.append([str(entry.place), value, entry.point.title, described(results, entry.point)])
    notes = [verdict(results)]
    if order and standard_error(results, order[0].point) is not None:
        pictures = order[0].point.trial.user_attrs["val_pictures"]
        notes.append(
            f"±: one standard error, from the {pictures:,} validation pictures alone; what another "
            "seed changes comes on top."
        )
    return Section("Best configurations, one run each", names, rows, notes, is_spacious=True)


def section_of_confirmed(results: Results, order: Sequence[Ranked], listed: int) -> Section:
    metric = results.objective.metric
    names = ["", "fresh seeds", "in the search", "trial", "configuration"]
    rows, notes = [], [verdict(results)]
    for entry in order[:listed]:
        rows.append(
            [
                str(entry.place),
                "-" if entry.fresh is None else spread(entry.fresh, metric),
                shown(entry.point.value(), metric),
                entry.point.title,
                described(results, entry.point),
            ]
        )
        if entry.fresh is not None and entry.fresh.diverged + entry.fresh.failed > 0:
            notes.append(
                f"{entry.point.title}: on fresh seeds {entry.fresh.diverged} diverged and "
                f"{entry.fresh.failed} failed; its mean is of the others."
            )
    notes.append(
        "Fresh seeds: mean ± standard deviation of a run over n seeds. The value in the search was "
        "selected for being good, and is no part of the mean."
    )
    return Section("Best configurations, confirmed", names, rows, notes, is_spacious=True)


def fresh_of_front(results: Results, order: Sequence[Ranked]) -> list[str]:
    """What fresh seeds said of the first objective of configurations on the front."""
    metric = results.objective.metric
    return [
        f"{entry.point.title} on fresh seeds: {metric} {spread(entry.fresh, metric)}."
        for entry in order
        if entry.fresh is not None
    ]


def section_of_each(results: Results, best: Sequence[Best], key: str, title: str) -> Section:
    """The best with each loss or optimizer, and what it was reached with."""
    metric = results.objective.metric
    other_key, other_name = ("optimizer", "optimizer")
    if key == "optimizer":
        other_key, other_name = "model.loss", "loss"
    others = {each.point.settings.get(other_key) for each in best}
    has_other, has_lr = len(others) > 1, any(each.lr is not None for each in best)
    names = [title.removeprefix("By "), "best", *(["lr"] if has_lr else []), "trials"]
    names += [other_name] if has_other else []
    rows = []
    for each in best:
        row = [each.name, shown(each.point.value(), metric)]
        row += [short(each.lr) if each.lr is not None else "-"] if has_lr else []
        row.append(str(each.trials))
        row += [str(each.point.settings.get(other_key, "-"))] if has_other else []
        rows.append(row)
    tried = {str(point.settings[key]) for point in results.points if key in point.settings}
    blank = ["-"] * (len(names) - 1)
    rows += [[name, *blank] for name in sorted(tried - {each.name for each in best})]
    notes = ["Each is the best single run of its complete trials, so not an average."]
    if len({each.trials for each in best}) > 1:
        notes = [f"{notes[0]} Where more were tried, the best is the higher for that alone."]
        if results.objective.direction == "minimize":
            notes = [notes[0].replace("the higher", "the lower")]
    if len(tried) > len(best):
        notes.append("-: no trial came to its end.")
    return Section(f"{title}: the best {metric}", names, rows, notes)


# ---- how it is written ---------------------------------------------------------------------------


def rows_as_text(section: Section, width: int) -> list[str]:
    """Columns two spaces apart, numbers to the right; a spacious row's last field goes below."""
    if not section.rows:
        return []
    names, rows = list(section.names), [list(row) for row in section.rows]
    below: list[str] = [row.pop() for row in rows] if section.is_spacious else []
    names = names[:-1] if section.is_spacious else names
    widths = [
        max(len(row[column]) for row in [names, *rows])
        if column < len(names)
        else 0
        for column in range(len(names))
    ]  # fmt: skip

    def line(fields: Sequence[str]) -> str:
        cells = [
            field.rjust(size) if is_right(column) else field.ljust(size)
            for column, (field, size) in enumerate(zip(fields, widths, strict=True))
        ]
        return f" {'  '.join(cells)}".rstrip()

    def is_right(column: int) -> bool:
        return all(row[column][:1] in "0123456789+-?" for row in rows)

    lines = [line(names)]
    indent = " " * (widths[0] + 3)
    for number, row in enumerate(rows):
        lines.append(line(row))
        if below:
            lines += textwrap.wrap(
                below[number],
                width,
                initial_indent=indent,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def markdown_row(fields: Sequence[str]) -> str:
    escaped = (field.replace("\\", "\\\\").replace("|", "\\|") for field in fields)
    return f"| {' | '.join(escaped)} |"
