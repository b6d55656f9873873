"""The network's graph as a picture and as a table: layers, shapes, parameters, who feeds whom.

One row for each layer, in the order in which they work, so that a chain reads from top to bottom;
an edge that passes rows by runs on their left. Drawn here as SVG rather than by torchview and
Graphviz: those know neither the layers' names nor their parameters, and make a tape of 3,900 points
out of a ResNet-18.
"""

from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from torch import nn

from research.pictures.style import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    PAPER,
    TIMES,
    VERMILION,
    tidy,
)
from research.pictures.trace import Graph, Node, trace

MOST_ROWS = 100
COLUMN_HEIGHT = 1000  # beyond it a further column is opened, where the graph can be parted
ROW, GAP, HEADING, BOX, COUNTS, LANE, TOP = 28, 10, 22, 408, 166, 13, 84
SPINE = BOX - 90  # where the chain runs: right of the headings
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"

# The edge and the fill of a box.
COLORS = {
    "input": (INK, "#eef1f4"),
    "convolution": (BLUE, "#e3eff8"),
    "linear": ("#8a5aa8", "#f1e9f6"),
    "pooling": (GREEN, "#e0f3ec"),
    "activation": (AMBER, "#fdf3dc"),
    "normalization": ("#8b97a5", "#f1f3f5"),
    "join": (VERMILION, "#fce9dd"),
    "other": ("#b4bdc7", "#f8f9fa"),
}


def draw_graph(network: nn.Module, image_shape: tuple[int, ...], path: Path) -> None:
    """Write the graph of a network that takes pictures of `image_shape`, (C, H, W), as SVG.

    Inner modules of a network of more than 100 layers are drawn as one. ValueError, in one
    sentence, if the network cannot be run on one such picture.
    """
    path.write_text(render(trace(network, image_shape, MOST_ROWS)), encoding="utf-8")


def summarize(network: nn.Module, image_shape: tuple[int, ...]) -> str:
    """A table of all layers: path, type, shape of the output for one picture, parameters.

    Functions between layers stand in brackets. ValueError as `draw_graph`.
    """
    graph = trace(network, image_shape)
    rows = [("layer", "type", "output", "parameters")]
    for node in graph.nodes:
        if node.kind == "input":
            rows.append(("input", "", show_shape(node.shape), ""))
        elif node.is_function:
            path = f"{node.scope}.({node.name})" if node.scope else f"({node.name})"
            rows.append((path, node.description, show_shape(node.shape), ""))
        else:
            count = f"{node.parameters:,}" if node.parameters else "-"
            rows.append((node.name, node.description, show_shape(node.shape), count))
    if graph.elsewhere:
        rows.append(("outside of these layers", "", "", f"{graph.elsewhere:,}"))
    rows.append(("total", "", "", f"{graph.parameters:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{layer:<{widths[0]}}  {kind:<{widths[1]}}  {shape:<{widths[2]}}  {count:>{widths[3]}}"
        for layer, kind, shape, count in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([graph.network, "", lines[0], rule, *lines[1:-1], rule, lines[-1], ""])


def show_shape(shape: tuple[int, ...]) -> str:
    return f" {TIMES} ".join(str(size) for size in shape)


# ---- where everything stands ---------------------------------------------------------------------


@dataclass
class Row:
    """A node's box; `ghost` repeats, at the top of a column, the last node of the one before."""

    number: int
    node: Node
    y: float
    ghost: bool = False


@dataclass
class Column:
    """Rows below each other, headings (y, text) between them, and edges that pass rows by."""

    rows: list[Row] = field(default_factory=list)
    headings: list[tuple[float, str]] = field(default_factory=list)
    detours: list[tuple[Row, Row, int]] = field(default_factory=list)  # from, to, lane
    height: float = 0
    left: float = 0

    @property
    def lanes(self) -> int:
        return 1 + max((lane for _, _, lane in self.detours), default=-1)


def lay_out(graph: Graph) -> list[Column]:
    """The columns, none much higher than COLUMN_HEIGHT where the graph can be parted there."""
    nodes = graph.nodes
    total = stack(nodes, 0, len(nodes)).height
    wanted = max(1, round(total / COLUMN_HEIGHT))
    cuts = [0]
    partings = find_partings(nodes)
    for number in range(1, wanted):
        ideal = len(nodes) * number / wanted
        near = [cut for cut in partings if cut > cuts[-1] and abs(cut - ideal) < len(nodes) / 4]
        if near:
            cuts.append(min(near, key=lambda cut: abs(cut - ideal)))
    columns = [stack(nodes, start, stop) for start, stop in pairwise([*cuts, len(nodes)])]
    left = 20.0
    for column in columns:
        column.detours = route(column)
        column.left = left + column.lanes * LANE + 10
        left = column.left + BOX + COUNTS
    return columns


def find_partings(nodes: tuple[Node, ...]) -> list[int]:
    """The places where only the result of the node before is still needed, best a block's end."""
    last_uses = [0] * len(nodes)
    for number, node in enumerate(nodes):
        for source in node.inputs:
            last_uses[source] = number
    places, last_use = [], 0
    for place in range(2, len(nodes)):
        last_use = max(last_use, last_uses[place - 2])
        if last_use < place and nodes[place].scope != nodes[place - 1].scope:
            places.append(place)
    return places


def stack(nodes: tuple[Node, ...], start: int, stop: int) -> Column:
    """The nodes start..stop-1 below each other, a heading wherever the module around changes."""
    column = Column()
    y = float(TOP)
    numbers = list(range(start, stop))
    if start > 0:
        column.rows.append(Row(start - 1, nodes[start - 1], y, ghost=True))
        y += ROW + GAP
    scope: str | None = ""
    for number in numbers:
        node = nodes[number]
        if node.scope != scope and node.scope:
            column.headings.append((y + HEADING - 8, node.scope))
            y += HEADING
        scope = node.scope
        column.rows.append(Row(number, node, y))
        y += ROW + GAP
    column.height = y
    return column


def route(column: Column) -> list[tuple[Row, Row, int]]:
    """The edges that pass rows by, each in a lane where it meets no other; short ones inside.

    The edges of one source are one line that ends several times.
    """
    place = {row.number: index for index, row in enumerate(column.rows)}
    ends: dict[int, list[int]] = {}
    for index, row in enumerate(column.rows):
        for source in () if row.ghost else row.node.inputs:
            if source in place and place[source] < index - 1:
                ends.setdefault(place[source], []).append(index)
    lanes: list[list[tuple[int, int]]] = []
    detours = []
    for start, stops in sorted(ends.items(), key=lambda item: (max(item[1]) - item[0], item[0])):
        stop = max(stops)
        free = [
            i for i, taken in enumerate(lanes) if all(stop <= a or b <= start for a, b in taken)
        ]
        lane = free[0] if free else len(lanes)
        if not free:
            lanes.append([])
        lanes[lane].append((start, stop))
        detours += [(column.rows[start], column.rows[end], lane) for end in stops]
    return detours


# ---- the drawing ---------------------------------------------------------------------------------


def render(graph: Graph) -> str:
    """The graph as the text of an SVG file."""
    columns = lay_out(graph)
    last = columns[-1]
    width, height = last.left + BOX + COUNTS, max(c.height for c in columns) + 14
    largest = max(1, *(node.parameters for node in graph.nodes))
    layers = sum(1 for node in graph.nodes if node.kind != "input")
    subtitle = (
        f"{show_shape(graph.nodes[0].shape)} in, {show_shape(graph.nodes[-1].shape)} out, "
        f"{layers} {'step' if layers == 1 else 'steps'}"
    )
    if graph.folded is not None:
        subtitle += f"; only the upper {graph.folded} levels of modules are drawn"
    if graph.elsewhere:
        subtitle += f"; {graph.elsewhere:,} parameters are in none of them"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{FONT}" font-size="13">',
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0.5 8 4 0 7.5z" fill="{MUTED}"/></marker>'
        f'<marker id="skip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0.5 8 4 0 7.5z" fill="{VERMILION}"/></marker></defs>',
        text(20, 30, f"{graph.network}: {graph.parameters:,} parameters", size=18, bold=True),
        text(20, 51, subtitle, color=MUTED),
    ]
    for number, column in enumerate(columns):
        if number > 0:
            parts.append(draw_passage(columns[number - 1], column))
        parts += draw_column(column, largest)
    return "\n".join([*parts, "</svg>", ""])


def draw_column(column: Column, largest: int) -> list[str]:
    """Headings, edges, then boxes, so that no line crosses a word."""
    spine = column.left + SPINE
    right = column.left + BOX
    parts = [
        text(right - 10, TOP - 8, "output", color=MUTED, size=11, anchor="end"),
        text(right + 84, TOP - 8, "parameters", color=MUTED, size=11, anchor="end"),
    ]
    parts += [text(column.left, y, tidy(name, 48), color=MUTED) for y, name in column.headings]
    for above, below in pairwise(column.rows):
        if above.number in below.node.inputs:
            parts.append(
                f'<path d="M{spine} {above.y + ROW}V{below.y - 1}" stroke="{MUTED}" fill="none" '
                f'marker-end="url(#tip)"/>'
            )
    for source, target, lane in column.detours:
        x = column.left - 10 - (lane + 0.5) * LANE
        start, stop = source.y + ROW - 7, target.y + ROW / 2
        parts.append(
            f'<path class="skip" data-from="{source.number}" data-to="{target.number}" '
            f'd="M{column.left} {start}H{x + 6}Q{x} {start} {x} {start + 6}V{stop - 6}'
            f'Q{x} {stop} {x + 6} {stop}H{column.left - 1}" stroke="{VERMILION}" fill="none" '
            f'stroke-width="1.5" marker-end="url(#skip)"/>'
        )
    for row in column.rows:
        parts += draw_row(row, column.left, largest)
    return parts


def draw_row(row: Row, left: float, largest: int) -> list[str]:
    """A box with name, what it is and the shape of its output; beside it its parameters."""
    node, y, base = row.node, row.y, row.y + ROW / 2 + 4.5
    edge, fill = COLORS[node.kind]
    name = node.name.removeprefix(f"{node.scope}.") if node.scope else node.name
    dashes = ' stroke-dasharray="3 3"' if row.ghost else ""
    about = "continued" if row.ghost else node.description
    hint = f"{node.name}: {node.description}, {node.parameters:,} parameters"
    parts = [
        f"<g><title>{escape(tidy(hint, 300))}</title>",
        f'<rect x="{left}" y="{y}" width="{BOX}" height="{ROW}" rx="4" '
        f'fill="{fill}" stroke="{edge}" stroke-opacity="0.55"{dashes}/>',
        f'<rect x="{left}" y="{y}" width="5" height="{ROW}" rx="2" fill="{edge}"/>',
        text(left + 14, base, tidy(name, 17), bold=True),
        text(left + 138, base, tidy(about, 24), color=MUTED),
        text(left + BOX - 10, base, show_shape(node.shape), anchor="end"),
        "</g>",
    ]
    if node.parameters and not row.ghost:
        right = left + BOX
        parts.append(text(right + 84, base, f"{node.parameters:,}", color=MUTED, anchor="end"))
        length = max(1.0, 60 * node.parameters / largest)
        parts.append(
            f'<rect x="{right + 92}" y="{y + 8}" width="{length:.1f}" height="{ROW - 16}" '
            f'fill="{edge}" fill-opacity="0.7"/>'
        )
    return parts


def draw_passage(column: Column, following: Column) -> str:
    """The edge from the last box of a column to the first of the next."""
    start, stop = column.rows[-1].y + ROW, following.rows[0].y
    across = following.left - following.lanes * LANE - 16
    return (
        f'<path d="M{column.left + SPINE} {start}V{start + 9}H{across}V{stop - 18}'
        f'H{following.left + SPINE}V{stop - 1}" stroke="{LINE}" stroke-width="2" fill="none" '
        f'stroke-linejoin="round"/>'
    )


def text(
    x: float,
    y: float,
    words: str,
    color: str = INK,
    size: int = 13,
    bold: bool = False,
    anchor: str = "start",
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    end = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}"{weight}{end}>'
        f"{escape(tidy(words, 160))}</text>"
    )
