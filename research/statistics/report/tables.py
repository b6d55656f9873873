"""A table that a report shows, as Markdown and as LaTeX (booktabs).

The cells are texts already. What is written by users is escaped here for each format.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "±": r"$\pm$", "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{MINUS SIGN}": r"$-$",
    "≤": r"$\le$", "≥": r"$\ge$", "≠": r"$\ne$", "∞": r"$\infty$", "✓": r"$\checkmark$",
    "\N{EN DASH}": "--", "—": "---", "…": r"\dots{}", "\N{THIN SPACE}": r"\,",
    "[": "{[}",  # at a row's beginning it would be an argument of the \\ before
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A caption, the names of the columns, and rows of as many texts.

    `text_columns` are set to the left, all others (numbers) to the right. `strong` has the (row,
    column) of cells that stand out, both from 0.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: frozenset[int] = frozenset({0})
    strong: frozenset[tuple[int, int]] = frozenset()
    notes: tuple[str, ...] = ()


def to_markdown(table: Table) -> str:
    """A GitHub table below its caption, notes after it."""
    marks = [":--" if column in table.text_columns else "--:" for column in range(width(table))]
    lines = [f"**{escape_markdown(table.caption)}**", ""]
    lines += [markdown_row([escape_markdown(name) for name in table.header]), markdown_row(marks)]
    for number, row in enumerate(table.rows):
        cells = [escape_markdown(text) for text in row]
        strong = [column for column in range(len(row)) if (number, column) in table.strong]
        for column in strong:
            cells[column] = f"**{cells[column]}**" if cells[column] else ""
        lines.append(markdown_row(cells))
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return "\n".join(lines)


def to_latex(table: Table, label: str) -> str:
    """A table environment for `booktabs`; `label` is for \\ref and has letters and hyphens."""
    columns = "".join(
        "l" if column in table.text_columns else "r" for column in range(width(table))
    )
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape_latex(table.caption)}}}",
        rf"  \label{{tab:{label}}}",
        rf"  \begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        f"    {latex_row([escape_latex(name) for name in table.header])}",
        r"    \midrule",
    ]
    for number, row in enumerate(table.rows):
        cells = [escape_latex(text) for text in row]
        for column in range(len(row)):
            if (number, column) in table.strong and cells[column]:
                cells[column] = rf"\textbf{{{cells[column]}}}"
        lines.append(f"    {latex_row(cells)}")
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    for note in table.notes:
        lines.append(rf"  \par\smallskip{{\footnotesize {escape_latex(note)}\par}}")
    return "\n".join([*lines, r"\end{table}"])


def width(table: Table) -> int:
    return len(table.header)


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex_row(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"


def escape_markdown(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would read."""
    text = re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escape_latex(text: str) -> str:
    """The text on one line, with LaTeX's special characters written out."""
    return "".join(LATEX.get(letter, letter) for letter in one_line(text))


def one_line(text: str) -> str:
    """The text without line breaks and what cannot be written."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]+", " ", text).strip()
