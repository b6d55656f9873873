"""The report as one HTML file: no network, no script, opens from disk.

Everything is escaped by the template: names come from users. The policy in its head forbids the
page to load anything.
"""

import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from research.statistics.figures.panels import Panel, to_inline
from research.statistics.report.blocks import Figure, Section
from research.statistics.report.content import Report
from research.statistics.report.styles import CSS
from research.statistics.report.tables import Table, one_line

MOST_VERDICTS = 6  # that are shown at once
LONG = 40  # rows of a table, above which it is folded
WIDEST_PANEL = 420  # pixels; a wider one keeps its size and scrolls

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ report.title }}</title>
<link rel="icon" href="data:,">
<style>{{ css }}</style>
</head>
<body>
<main>
<header>
<h1>{{ report.title }}</h1>
<p class="lead">{{ report.summary }}</p>
</header>
{% if report.verdicts -%}
<div class="verdicts" id="verdict"><ul>
{% for verdict in report.verdicts[:most] -%}
<li class="{{ verdict.tone }}">{{ verdict.text }}</li>
{% endfor -%}
</ul>
{% if report.verdicts[most:] -%}
<details><summary>{{ report.verdicts[most:]|length }} more</summary><ul>
{% for verdict in report.verdicts[most:] -%}
<li class="{{ verdict.tone }}">{{ verdict.text }}</li>
{% endfor -%}
</ul></details>
{% endif -%}
</div>
{% endif -%}
{% if report.warnings -%}
<section class="warnings" id="warnings">
<h2>Read with care</h2>
<ul>
{% for warning in report.warnings -%}
<li>{{ warning }}</li>
{% endfor -%}
</ul>
</section>
{% endif -%}
{% if parts -%}
<nav aria-label="Sections">
{% for section in parts -%}
<a href="#{{ section.slug }}">{{ section.title }}</a>
{% endfor -%}
</nav>
{% endif -%}
{% for section in parts -%}
<section id="{{ section.slug }}">
<h2>{{ section.title }}</h2>
{% for block in section.blocks -%}
{% if block is string -%}
<p>{{ block }}</p>
{% elif is_figure(block) -%}
{{ figure(block) }}
{% else -%}
{{ table(block, section.title) }}
{% endif -%}
{% endfor -%}
{% if section.command -%}
<pre class="command">{{ section.command }}</pre>
{% endif -%}
</section>
{% endfor -%}
<footer><p>{{ report.made_at }}</p></footer>
</main>
</body>
</html>
"""

FIGURE = """\
<figure{{ alone }}>
{% if small -%}
<div class="{{ 'panels small' if smallest else 'panels' }}">
{% for panel in small -%}
<div class="panel">{{ inline(panel) }}</div>
{% endfor -%}
</div>
{% endif -%}
{% for panel in wide -%}
<div class="wide" tabindex="0">{{ inline(panel) }}</div>
{% endfor -%}
<figcaption>{{ figure.caption }}<br><span class="how">{{ figure.method }}</span></figcaption>
</figure>
"""

TABLE = """\
{% if is_long -%}
<details><summary class="caption">{{ table.caption }}: {{ table.rows|length }} rows</summary>
{% elif table.caption != title -%}
<p class="caption">{{ table.caption }}</p>
{% endif -%}
<div class="scroll" tabindex="0"><table aria-label="{{ table.caption }}">
<thead><tr>
{%- for name in table.header -%}
<th scope="col"{{ text(loop.index0) }}>{{ name }}</th>
{%- endfor -%}
</tr></thead>
<tbody>
{% for row in table.rows -%}
{% set number = loop.index0 -%}
<tr>
{%- for cell in row -%}
{% set tag = 'td' if loop.index0 else 'th' -%}
<{{ tag }}{{ text(loop.index0) }}{{ ' scope="row"'|safe if tag == 'th' }}>
{%- if (number, loop.index0) in table.strong -%}
<strong>{{ shown(cell, loop.index0) }}</strong>
{%- else -%}
{{ shown(cell, loop.index0) }}
{%- endif -%}
</{{ tag }}>
{%- endfor -%}
</tr>
{% endfor -%}
</tbody></table></div>
{% for note in table.notes -%}
<p class="note">{{ note }}</p>
{% endfor -%}
{% if is_long -%}
</details>
{% endif -%}
"""


def to_html(report: Report, parts: Sequence[Section]) -> str:
    """The whole page."""
    return render(
        TEMPLATE,
        report=report,
        parts=parts,
        most=MOST_VERDICTS,
        css=Markup(CSS),
        is_figure=lambda block: isinstance(block, Figure),
        figure=figure_to_html,
        table=table_to_html,
    )


def figure_to_html(figure: Figure) -> Markup:
    """Panels beside each other where there is room; a wide one scrolls by itself."""
    small = [panel for panel in figure.panels if panel.width <= WIDEST_PANEL]
    wide = [panel for panel in figure.panels if panel.width > WIDEST_PANEL]
    return Markup(
        render(
            FIGURE,
            figure=figure,
            small=small,
            wide=wide,
            alone=Markup(' class="alone"' if len(small) == 1 and not wide else ""),
            smallest=all(panel.width <= 300 for panel in small),
            inline=inline,
        )
    )


def inline(panel: Panel) -> Markup:
    """The panel's SVG, its own texts escaped by matplotlib; a wide one in its own size."""
    svg = to_inline(panel)
    if panel.width > WIDEST_PANEL:
        svg = svg.replace("<svg ", f'<svg style="width: {panel.width}px" ', 1)
    return Markup(svg)


def table_to_html(table: Table, title: str) -> Markup:
    """The table with its caption, unless that is the section's title, and its notes."""

    def text(column: int) -> Markup:
        return Markup(' class="text"' if column in table.text_columns else "")

    def shown(cell: str, column: int) -> str:
        return breakable(cell) if column in table.text_columns else cell

    return Markup(
        render(
            TABLE,
            table=table,
            title=title,
            text=text,
            shown=shown,
            is_long=len(table.rows) > LONG,
        )
    )


def breakable(name: str) -> Markup:
    """The name, escaped, that may go on in a new line at its humps: CrossEntropy, Loss."""
    humps = re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[a-z][._/])(?=[a-z])", one_line(name))
    return Markup("<wbr>").join(humps)


def render(template: str, **values: Any) -> str:
    """The template with the values, every text escaped and without what HTML cannot have."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: one_line(value) if type(value) is str else value,
    )
    return environment.from_string(template).render(**values)
