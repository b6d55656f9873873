"""What a section of a report is made of: sentences, tables and figures."""

from dataclasses import dataclass

from research.statistics.figures.panels import Panel
from research.statistics.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, and below them how they were computed."""

    panels: tuple[Panel, ...]
    caption: str
    method: str


@dataclass(frozen=True)
class Section:
    """A title, a slug for links, and blocks in their order.

    `command` reproduces it.
    """

    slug: str
    title: str
    blocks: tuple[str | Table | Figure, ...]
    command: str = ""
