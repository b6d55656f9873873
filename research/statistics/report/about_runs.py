"""Sections on what the numbers stand on: failures, settings, pairs, looks at test, the machine."""

from collections.abc import Iterable

from research.statistics.arms import Match
from research.statistics.report import numbers
from research.statistics.report.blocks import Section
from research.statistics.report.content import Report
from research.statistics.report.tables import Table


def failures(report: Report) -> Iterable[Section]:
    """Every run that has no part in the numbers, and why."""
    if not report.failures:
        return
    rows = tuple((f.arm, f.seed, f.status, f.reason, f.run) for f in report.failures)
    n = len(report.failures)
    words = "One run has" if n == 1 else f"{n} runs have"
    table = Table(
        "Runs without a part in the numbers", ("arm", "seed", "status", "why", "run"), rows,
        frozenset(range(5)),
    )  # fmt: skip
    yield Section("failures", "What failed", (f"{words} no part in the numbers above.", table))


def settings(report: Report) -> Iterable[Section]:
    """Everything in which the arms differ."""
    if not report.settings and not report.origins:
        return
    blocks: list[str | Table] = []
    if report.settings:
        names = [arm.name for arm in report.arms]
        count = max(len(each.values) for each in report.settings)
        names = names if len(names) == count else [f"arm {n}" for n in range(1, count + 1)]
        rows = tuple(
            (each.key, *(numbers.NONE if value is None else value for value in each.values))
            for each in report.settings
        )
        table = Table("Settings that are not the same in all arms", ("setting", *names), rows,
                      frozenset(range(count + 1)))  # fmt: skip
        blocks.append(turned(table) if count > 6 else table)
    if report.origins:
        rows = tuple((key, "; ".join(values)) for key, values in report.origins.items())
        blocks.append(
            Table("What the runs stood on, where it is not the same", ("what", "values"), rows,
                  frozenset({0, 1}))
        )  # fmt: skip
    yield Section("settings", "What differs between the arms", tuple(blocks))


def turned(table: Table) -> Table:
    """The table with its rows as columns, for many arms."""
    columns = list(zip(table.header, *table.rows, strict=True))
    header, rows = columns[0], columns[1:]
    return Table(
        table.caption, ("arm", *header[1:]), tuple(rows), frozenset(range(len(header))),
        notes=table.notes,
    )  # fmt: skip


def matches(report: Report) -> Iterable[Section]:
    """Whether the two runs of each pair began with the same weights and the same pictures."""
    if not report.matches:
        return
    rows = tuple(
        (each.arm, each.against, told(each.weights), told(each.batches)) for each in report.matches
    )
    found = [match for each in report.matches for match in (each.weights, each.batches)]
    if any(match.other for match in found):
        sentence = (
            "Some pairs did not begin alike: more than what was changed is in their difference."
        )
    elif any(match.unknown for match in found):
        sentence = "Hashes are missing: that all pairs began alike is not proved."
    else:
        sentence = "All pairs began with the same weights and saw the same first pictures."
    table = Table(
        "Pairs by the hashes of their initial weights and first batches",
        ("arm", "against", "initial weights", "first batches"), rows, frozenset(range(4)),
    )  # fmt: skip
    yield Section("pairs", "Whether pairs match", (sentence, table))


def told(match: Match) -> str:
    """`8 equal`, `6 equal, 2 not equal`, `8 not recorded`."""
    counts = {"equal": match.equal, "not equal": match.other, "not recorded": match.unknown}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or numbers.NONE


def test_looks(report: Report) -> Iterable[Section]:
    """How often each arm's test pictures were scored."""
    looks = sum(arm.test_looks for arm in report.arms)
    if not report.arms:
        return
    if looks == 0:
        yield Section("test", "Looks at test", ("No run of these arms was scored on test.",))
        return
    rows = tuple(
        (arm.name, str(len(arm.values) + arm.left_out), str(arm.test_looks)) for arm in report.arms
    )
    times = "once" if looks == 1 else f"{looks} times"
    words = (
        f"The test pictures were scored {times} in all. Every look after which something is still "
        "chosen makes the best test result look better than it is."
    )
    table = Table("Looks at test", ("arm", "runs", "looks"), rows)
    yield Section("test", "Looks at test", (words, table))


def machine(report: Report) -> Iterable[Section]:
    """Where and with what the numbers were made, and the command that makes them again."""
    if not report.machine:
        return
    rows = tuple((key, value) for key, value in report.machine.items())
    yield Section(
        "machine", "Machine and versions",
        (Table("Machine and versions", ("what", "value"), rows, frozenset({0, 1})),),
    )  # fmt: skip
