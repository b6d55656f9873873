"""A judgement as text of at most 100 columns: the verdict, the arms, what differs, what to mind."""

import textwrap
from collections.abc import Sequence

from research.comparison.judging import Contrast, Judgement, Standing
from research.statistics.arms import Arm, Setting
from research.statistics.report import numbers

WIDTH = 100
LONGEST = 24  # of a cell
MOST_SETTINGS = 12
MOST_VERDICTS = 6
MOST_ARMS_ACROSS = 3  # of the table of settings
MOST_VALUES = 8


def screen(judgement: Judgement) -> str:
    """The verdict first; then the arms, the comparisons, what differs, cautions, notes."""
    parts = [
        wrapped(f"{judgement.headline}."),
        wrapped(decided_by(judgement)),
        arms_table(judgement),
    ]
    if len(judgement.shown) > 1:
        parts.append(verdicts_told(judgement))
    parts.append(settings_told(judgement))
    if judgement.cautions:
        parts.append("read with care\n" + "\n".join(map(item, judgement.cautions)))
    told = [*judgement.remarks, *judgement.notes]
    if told:
        parts.append("\n".join(map(item, told)))
    return "\n\n".join(part for part in parts if part)


def decided_by(judgement: Judgement) -> str:
    better = "higher" if judgement.higher_is_better else "lower"
    return f"Decided by {judgement.metric} ({better} is better): {judgement.why_metric}."


# ---- the arms ------------------------------------------------------------------------------------


def arms_table(judgement: Judgement) -> str:
    """An arm a line, best first: mean, spread, interval, place, and the looks at test."""
    with_one = {arm_of(each, judgement): each for each in judgement.shown}
    percent = numbers.unit(judgement.metric)
    unit = f" {percent}" if percent else ""
    level = f"{100 * judgement.question.level:g} % interval"
    header = ["arm", "n", f"mean ± sd{unit}", level]
    places = len(judgement.standings) > 2
    header += ["place"] if places else []
    header += ["difference", "p", "wins", "test looks"]
    rows = [header]
    for standing in judgement.standings:
        row = [shortened(standing.arm.name), count_of(standing), spread(standing, judgement)]
        row.append(numbers.interval(standing.ranked.interval, judgement.metric))
        row += [place_of(standing)] if places else []
        row += against(with_one.get(standing.arm.name), judgement)
        row.append(looks_of(standing.arm))
        rows.append(row)
    for arm in judgement.lost:
        row = [shortened(arm.name), f"0 of {len(arm.runs)}", numbers.NONE, numbers.NONE]
        rows.append([*row, *([""] if places else []), "", "", "", looks_of(arm)])
    return columns(rows)


def arm_of(contrast: Contrast, judgement: Judgement) -> str:
    """The arm whose line a comparison stands in: the one that is not the common one."""
    return contrast.b.name if judgement.baseline is not None else contrast.a.name


def count_of(standing: Standing) -> str:
    """`8`, or `7 of 8` where runs have no part in the mean."""
    n, runs = len(standing.measured), len(standing.arm.runs)
    return str(n) if n == runs else f"{n} of {runs}"


def spread(standing: Standing, judgement: Judgement) -> str:
    mean = numbers.bare(standing.ranked.mean, judgement.metric)
    if standing.ranked.n < 2:
        return mean
    return f"{mean} ± {numbers.bare(standing.ranked.standard_deviation, judgement.metric)}"


def place_of(standing: Standing) -> str:
    """`1`, or `2-4` where the arm is not told from its neighbours."""
    first, last = standing.ranked.best_place, standing.ranked.worst_place
    return str(first) if first == last else f"{first}-{last}"


def against(contrast: Contrast | None, judgement: Judgement) -> list[str]:
    """Difference, p-value and share of wins in an arm's line; the common arm's are empty."""
    if contrast is None:
        return ["", "", ""]
    found = contrast.difference
    estimate, wins = found.estimate, found.probability_of_improvement
    if judgement.baseline is None:  # the line is of A, and the difference that of B
        estimate, wins = -estimate, 1 - wins
    return [
        numbers.difference(estimate, judgement.metric),
        numbers.probability(found.deciding_p_value),
        numbers.share(wins),
    ]


def looks_of(arm: Arm) -> str:
    """How often the test pictures were scored with each run: `1`, `0-3`."""
    looks = sorted({run.test_looks for run in arm.runs})
    return str(looks[0]) if len(looks) == 1 else f"{looks[0]}-{looks[-1]}"


def verdicts_told(judgement: Judgement) -> str:
    """The first few verdicts, those of the arms that come nearest; the table has all figures."""
    lines = [item(f"{each.verdict}.") for each in judgement.shown[:MOST_VERDICTS]]
    more = len(judgement.shown) - MOST_VERDICTS
    return "\n".join(
        [*lines, *([f"  and {more} more, which the report lists"] if more > 0 else [])]
    )


# ---- settings ------------------------------------------------------------------------------------


def settings_told(judgement: Judgement) -> str:
    """Each setting that is not the same in all arms, with its value in each.

    First what was changed, then the arguments that came with it, those that all arms have before
    those of single classes.
    """
    settings, arms = judgement.apart, judgement.arms
    if not settings:
        return "No setting differs between the arms."
    order = sorted(settings, key=lambda each: (each.within is not None, None in each.values))
    shown = order[:MOST_SETTINGS]
    more = len(settings) - len(shown)
    last = [f"  and {more} more, which the report lists"] if more > 0 else []
    if len(arms) > MOST_ARMS_ACROSS:
        lines = [several(setting) for setting in shown]
        return "\n".join(["what differs", *lines, *last])
    rows = [["what differs", *(shortened(arm.name) for arm in arms)]]
    rows += [
        [shortened(each.key), *(shortened(text(value)) for value in each.values)] for each in shown
    ]
    return "\n".join([columns(rows), *last])


def several(setting: Setting) -> str:
    values = list(dict.fromkeys(text(value) for value in setting.values))
    shown = values[:MOST_VALUES]
    more = f" and {len(values) - MOST_VALUES} more" if len(values) > MOST_VALUES else ""
    return wrapped(f"  {setting.key}: {', '.join(shown)}{more}", "    ")


def text(value: str | None) -> str:
    """A setting's value, numbers to four digits; a dash where an arm has no such setting."""
    if value is None:
        return "-"
    try:
        return f"{float(value):.4g}" if "." in value or "e" in value else value
    except ValueError:
        return value


# ---- text ----------------------------------------------------------------------------------------


def item(sentence: str) -> str:
    return wrapped(f"- {sentence}", "  ")


def wrapped(sentence: str, indent: str = "") -> str:
    """The text in lines of WIDTH; all but the first are indented."""
    lines = textwrap.wrap(
        sentence, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(lines)


def shortened(name: str, longest: int = LONGEST) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows below their header, two spaces between columns; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
