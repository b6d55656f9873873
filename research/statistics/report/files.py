"""A report as files: the page, the same in Markdown and LaTeX, and each figure by itself."""

import re
from collections.abc import Sequence
from pathlib import Path

from research.statistics.figures.panels import Panel
from research.statistics.report.blocks import Figure, Section
from research.statistics.report.content import Report
from research.statistics.report.page import to_html
from research.statistics.report.sections import sections
from research.statistics.report.tables import Table, escape_markdown, to_latex, to_markdown

PAGE, MARKDOWN, LATEX = "report.html", "report.md", "report.tex"
FIGURES = "figures"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.html, report.md, report.tex and figures/*.svg; returns the files, page first."""
    pictures = folder / FIGURES
    pictures.mkdir(parents=True, exist_ok=True)
    parts = sections(report)
    files = [
        write(folder / PAGE, to_html(report, parts)),
        write(folder / MARKDOWN, markdown(report, parts)),
        write(folder / LATEX, latex(parts)),
    ]
    for panel in panels_of(parts):
        files.append(write(pictures / file_name(panel), panel.svg))
    return files


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def panels_of(parts: Sequence[Section]) -> list[Panel]:
    blocks = [block for section in parts for block in section.blocks]
    return [panel for block in blocks if isinstance(block, Figure) for panel in block.panels]


def file_name(panel: Panel) -> str:
    """The panel's name in letters that every file system and every link allows."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', panel.name).strip('-').lower()[:80]}.svg"


def markdown(report: Report, parts: Sequence[Section]) -> str:
    """The report in Markdown, the figures as links to their files."""
    lines = [f"# {escape_markdown(report.title)}", "", escape_markdown(report.summary), ""]
    for number, verdict in enumerate(report.verdicts):
        text = escape_markdown(verdict.text)
        lines.append(f"- **{text}**" if number == 0 else f"- {text}")
    if report.warnings:
        lines += ["", "## Read with care", ""]
        lines += [f"- {escape_markdown(warning)}" for warning in report.warnings]
    for section in parts:
        lines += ["", f"## {escape_markdown(section.title)}", ""]
        for block in section.blocks:
            lines += [markdown_block(block), ""]
        lines += fenced(section.command) if section.command else []
    lines += ["", escape_markdown(report.made_at)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def markdown_block(block: str | Table | Figure) -> str:
    if isinstance(block, Table):
        return to_markdown(block)
    if isinstance(block, Figure):
        links = [
            f"![{escape_markdown(panel.words)}]({FIGURES}/{file_name(panel)})"
            for panel in block.panels
        ]
        return "\n".join([*links, "", escape_markdown(f"{block.caption} {block.method}")])
    return escape_markdown(block)


def fenced(command: str) -> list[str]:
    """The command as a block of code, in a fence that it does not end itself."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, command, fence]


def latex(parts: Sequence[Section]) -> str:
    """All tables, to \\input into a paper."""
    lines = [
        r"% \usepackage{booktabs} in the preamble; LuaLaTeX or XeLaTeX for names in other scripts.",
    ]
    for section in parts:
        tables = [block for block in section.blocks if isinstance(block, Table)]
        for number, table in enumerate(tables, start=1):
            label = section.slug if len(tables) == 1 else f"{section.slug}-{number}"
            lines += ["", to_latex(table, label)]
    return "\n".join(lines) + "\n"
