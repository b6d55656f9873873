"""Loss by optimizer as a heat map: mean, interval and number of runs in every cell."""

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from research.pictures.style import INK, LINE, MUTED, VERMILION, tidy
from research.statistics.figures.panels import Panel, finish, finite, new_panel, short
from research.statistics.report import numbers
from research.statistics.report.content import Cell, Grid

CELL_WIDTH, CELL_HEIGHT = 92, 46
# Not style's blue, which a page turns into a lighter one on dark paper. Nowhere is it deeper than
# DEEPEST, so that dark letters on light paper and light ones on dark are read on it alike.
FILL, DEEPEST = "#0072b3", 0.62


def names_of(grid: Grid) -> tuple[list[str], list[str]]:
    """The rows and the columns in the order in which they come."""
    rows = list(dict.fromkeys(cell.row for cell in grid.cells))
    return rows, list(dict.fromkeys(cell.column for cell in grid.cells))


def best_cell(grid: Grid, higher_is_better: bool) -> Cell | None:
    """The cell of the best value; None where none has one."""
    found = [cell for cell in grid.cells if cell.value is not None and finite([cell.value.value])]
    sign = 1 if higher_is_better else -1
    return max(found, key=lambda cell: sign * (cell.value.value if cell.value else 0), default=None)


def draw_grid(grid: Grid, metric: str, *, higher_is_better: bool = True) -> Panel:
    """A cell for each pair: the bluer the better; the best is framed, what failed is told."""
    rows, columns = names_of(grid)
    longest = max(len(short(name, 26)) for name in rows)
    left = 22 + round(6.9 * longest)
    slanted = max(len(name) for name in columns) > 13
    top = 128 if slanted else 60
    figure, axes = new_panel(
        f"{grid.row_title} {numbers.TIMES} {grid.column_title}: {metric}",
        width=max(left + CELL_WIDTH * len(columns) + (60 if slanted else 12), 300),
        height=top + CELL_HEIGHT * len(rows) + 14,
        left=left,
        right=60 if slanted else 12,
        top=top,
        bottom=14,
    )
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.set_yticks(range(len(rows)), [short(r, 26) for r in rows], color=INK, parse_math=False)
    axes.xaxis.tick_top()
    axes.set_xticks(
        range(len(columns)), [tidy(c, 22) for c in columns], color=INK, parse_math=False
    )
    if slanted:
        for label in axes.get_xticklabels():
            label.set(rotation=32, ha="left", rotation_mode="anchor")
    best = best_cell(grid, higher_is_better)
    for cell in grid.cells:
        at = columns.index(cell.column), rows.index(cell.row)
        draw_cell(axes, at, cell, shade(grid, cell, higher_is_better), metric, cell is best)
    words = f"{metric} of {len(rows)} by {len(columns)} cells"
    if best is not None and best.value is not None:
        words += f"; best: {best.row} with {best.column}, {numbers.value(best.value.value, metric)}"
    return finish("grid", figure, words)


def shade(grid: Grid, cell: Cell, higher_is_better: bool) -> float | None:
    """0 for the worst cell and 1 for the best, by rank and value half each; None for no value.

    By value alone, one cell that failed would make all others look the same.
    """
    found = sorted(finite(each.value.value for each in grid.cells if each.value is not None))
    if cell.value is None or not finite([cell.value.value]):
        return None
    if found[0] == found[-1]:
        return 1.0
    value = cell.value.value
    by_value = (value - found[0]) / (found[-1] - found[0])
    below = sum(each < value for each in found) + (found.count(value) - 1) / 2
    depth = (by_value + below / (len(found) - 1)) / 2
    return depth if higher_is_better else 1 - depth


def draw_cell(
    axes: Axes,
    at: tuple[int, int],
    cell: Cell,
    depth: float | None,
    metric: str,
    is_best: bool,
) -> None:
    x, y = at
    place = (x - 0.48, y - 0.46)
    # Shares of opacity, not mixed colours: they are right on light and on dark paper.
    color, opacity = (FILL, 0.04 + (DEEPEST - 0.04) * depth) if depth is not None else (LINE, 0.5)
    axes.add_patch(Rectangle(place, 0.96, 0.92, facecolor=color, alpha=opacity, linewidth=0))
    if is_best:
        axes.add_patch(Rectangle(place, 0.96, 0.92, fill=False, edgecolor=VERMILION, linewidth=2.2))
    if cell.value is None or depth is None:
        write(axes, x, y, tidy(cell.note or "no value", 16), 7.5, MUTED)
        return
    found = cell.value.interval
    write(axes, x, y - 0.14, numbers.bare(cell.value.value, metric), 9, INK, weight="bold")
    below = numbers.interval(found, metric) if found is not None else f"n={cell.n}"
    write(axes, x, y + 0.24, below, 7, INK)


def write(
    axes: Axes, x: float, y: float, text: str, size: float, color: str, weight: str = "normal"
) -> None:
    axes.text(
        x, y, text, size=size, color=color, weight=weight, ha="center", va="center",
        parse_math=False,
    )  # fmt: skip
