"""How a network decides on a split: confusion matrix, most confident mistakes, calibration.

N pictures of H rows and W columns, C classes. A network's decision is the class of the largest
probability; that probability is its confidence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from research.pictures.sheet import MARGIN, TITLE_HEIGHT, Sheet, fit_tiles, load_font
from research.pictures.style import (
    AMBER,
    BLUE,
    INK,
    LINE,
    MUTED,
    PAPER,
    SKY,
    VERMILION,
    add_axes,
    new_figure,
    percent,
    save,
    tidy,
)

MOST_NUMBERED = 20  # classes, above which the numbers in the cells could not be read
MOST_LABELLED = 60  # classes, above which the names at the axes could not be read
MOST_LISTED = 16  # pairs of classes that are named beside a large matrix


# ---- confusion -----------------------------------------------------------------------------------


def count_confusions(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How many pictures of each class (row) were taken for each class (column): int64 (C, C)."""
    num_classes = probabilities.shape[1]
    pairs = labels.cpu() * num_classes + probabilities.cpu().argmax(dim=1)
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def draw_confusion_matrix(
    probabilities: Tensor, labels: Tensor, class_names: Sequence[str], path: Path
) -> None:
    """Write the confusion matrix as PNG, each row coloured by its shares.

    Probabilities (N, C), labels (N,). The diagonal is blue; mistakes are vermilion, on a scale of
    their own, because in a good network they are pale otherwise. Up to 20 classes the cells say
    their share in percent; beyond, the most frequent confusions are listed.
    """
    counts = count_confusions(probabilities, labels)
    num_classes, total = len(counts), int(counts.sum())
    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    wrong = shares - shares.diag().diag()
    right = int(counts.diag().sum())
    is_large = num_classes > MOST_NUMBERED

    names = [tidy(name, 20) for name in class_names]
    labelled = num_classes <= MOST_LABELLED
    longest = max(len(name) for name in names)
    size = 9.0 if num_classes <= 30 else 7.0
    margin = 40 + (0.68 if labelled else 0.62) * longest * size * 100 / 72
    side = max(360, 52 * num_classes) if not is_large else min(max(800, num_classes), 1200)
    left, top = 20 + margin, 86
    width = left + side + (380 if is_large else 110)
    bottom = 40 + max(60.0, 0.75 * margin)
    subtitle = "row: true class, column: decision"
    if not is_large:
        subtitle += "; numbers: % of the row, and at its end the class's pictures"
    figure = new_figure(
        round(width),
        round(top + side + bottom),
        f"{percent(right / max(total, 1), 1)} right: {right:,} of {total:,} pictures",
        subtitle,
    )
    axes = add_axes(figure, left, top, side, side)
    axes.imshow(color_cells(shares), interpolation="auto" if num_classes > side else "nearest")
    axes.spines[:].set_visible(False)
    mark_classes(axes, names, labelled, size)
    axes.set_xlabel("decision", color=MUTED, size=9)
    axes.set_ylabel("true class", color=MUTED, size=9)
    if is_large:
        list_confusions(axes, counts, wrong, names)
    else:
        number_cells(axes, counts, shares)
    save(figure, path)


def color_cells(shares: Tensor) -> np.ndarray:
    """Shares (C, C) of the rows as colours (C, C, 3): white at 0, grey for a class of no picture.

    The diagonal is blue, full at 1. The rest is vermilion, full at its largest share, but not below
    a twentieth: rare mistakes stay pale.
    """
    paper, blue, vermilion = (rgb(color) for color in (PAPER, BLUE, VERMILION))
    diagonal = np.eye(len(shares), dtype=bool)[..., None]
    values = shares.numpy()[..., None]
    largest = max(float(np.where(diagonal, 0, values).max()), 0.05)
    right = paper + (blue - paper) * values
    wrong = paper + (vermilion - paper) * 0.85 * (values / largest) ** 0.75
    cells = np.where(diagonal, right, wrong)
    cells[shares.sum(dim=1).numpy() == 0] = rgb("#eef0f2")
    return cells.clip(0, 1)


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def mark_classes(axes: Axes, names: Sequence[str], labelled: bool, size: float) -> None:
    """Names at both axes, all of them or every so many."""
    step = 1 if labelled else math.ceil(len(names) / 40)
    places = list(range(0, len(names), step))
    chosen = [names[place] for place in places]
    axes.set_xticks(
        places,
        chosen,
        size=size,
        color=INK,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        parse_math=False,
    )
    axes.set_yticks(places, chosen, size=size, color=INK, parse_math=False)


def number_cells(axes: Axes, counts: Tensor, shares: Tensor) -> None:
    """Each cell's share in percent, and beside each row how many pictures it has."""
    num_classes = len(counts)
    largest = max(float((shares - shares.diag().diag()).max()), 0.05)
    for row in range(num_classes):
        for column in range(num_classes):
            share = float(shares[row, column])
            if share == 0:
                continue
            is_dark = share > 0.55 if row == column else share > 0.7 * largest
            axes.text(
                column,
                row,
                f"{100 * share:.0f}" if share >= 0.01 else "<1",
                ha="center",
                va="center",
                size=9.5,
                color=PAPER if is_dark else INK,
                weight="bold" if row == column else "normal",
            )
        axes.text(num_classes - 0.35, row, f"{counts[row].sum():,}", va="center", size=9, c=MUTED)
    edges = np.arange(num_classes + 1) - 0.5
    axes.hlines(edges, -0.5, num_classes - 0.5, color=PAPER, linewidth=1)
    axes.vlines(edges, -0.5, num_classes - 0.5, color=PAPER, linewidth=1)


def list_confusions(axes: Axes, counts: Tensor, wrong: Tensor, names: Sequence[str]) -> None:
    """The largest shares of a class that are taken for another, beside the matrix."""
    lines = []
    for place in wrong.flatten().argsort(descending=True, stable=True)[:MOST_LISTED].tolist():
        row, column = divmod(place, len(names))
        if counts[row, column] > 0:
            lines += [
                f"{names[row]} taken for {names[column]}",
                f"    {percent(float(wrong[row, column]))}, {show_count(int(counts[row, column]))}",
            ]
    title = "Most frequent confusions" if lines else "No mistake at all"
    for height, words, weight in [(1.0, title, "bold"), (0.965, "\n".join(lines), "normal")]:
        axes.text(
            1.04,
            height,
            words,
            transform=axes.transAxes,
            va="top",
            size=9,
            weight=weight,
            color=INK,
            linespacing=1.5,
            parse_math=False,
        )


def show_count(count: int) -> str:
    return f"{count:,} {'picture' if count == 1 else 'pictures'}"


# ---- mistakes ------------------------------------------------------------------------------------


def find_mistakes(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The places of the wrong decisions, the most confident first: int64.

    A decision without a confidence, of a network that diverged, comes last.
    """
    probabilities, labels = probabilities.cpu().float(), labels.cpu()
    confidences, decisions = probabilities.max(dim=1)
    places = (decisions != labels).nonzero().squeeze(1)
    order = confidences[places].nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
    return places[order]


def draw_mistakes(
    pixels: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    path: Path,
    count: int = 24,
) -> None:
    """Write a sheet of the `count` most confident wrong decisions as PNG.

    Pixels uint8 (N, H, W, 3), probabilities (N, C), labels (N,). Below each picture stands what the
    network said and what it is, each with its probability. A split without mistakes has a sheet
    that says so.
    """
    mistakes = find_mistakes(probabilities, labels)
    total = len(labels)
    columns, cell, caption = 6, 150, 46
    shown = mistakes[:count]
    rows = max(1, math.ceil(len(shown) / columns))
    title = "The most confident mistakes" if len(shown) > 0 else "No mistake at all"
    share = percent(len(mistakes) / max(total, 1), 1)
    subtitle = f"{len(shown)} of {len(mistakes):,} wrong decisions on {total:,} pictures ({share})"
    if len(shown) == 0:
        sheet = Sheet(2 * MARGIN + 520, TITLE_HEIGHT + MARGIN, title, f"on {total:,} pictures")
        sheet.save(path)
        return
    tiles = fit_tiles(pixels[shown.to(pixels.device)].cpu().numpy(), 128)
    height = max(tile.shape[0] for tile in tiles)
    sheet = Sheet(
        2 * MARGIN + columns * cell - (cell - 128),
        TITLE_HEIGHT + rows * (height + caption) + MARGIN // 2,
        title,
        subtitle,
    )
    for number, (tile, place) in enumerate(zip(tiles, shown.tolist(), strict=True)):
        x = MARGIN + cell * (number % columns)
        y = TITLE_HEIGHT + (height + caption) * (number // columns)
        sheet.paste(tile, x, y)
        chances, label = probabilities[place], int(labels[place])
        decision = int(chances.argmax())
        for line, (word, which, color) in enumerate(
            [("said", decision, VERMILION), ("is", label, BLUE)]
        ):
            below = y + height + 5 + 16 * line
            chance = percent(float(chances[which]))
            sheet.write(chance, x + 130, below, 12, MUTED, anchor="ra")
            space = 126 - load_font(12).getlength(chance)
            name = f"{word} {tidy(class_names[which], 40)}"
            sheet.write(name, x, below, 12, color, space=space)
    sheet.save(path)


# ---- calibration ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bins:
    """Decisions in bins (a, b] of confidence: share of all, mean confidence, accuracy, each (M,).

    An empty bin has share 0 and nan for the others.
    """

    edges: Tensor
    shares: Tensor
    confidences: Tensor
    accuracies: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al., 2017, equation 3), 0..1."""
        gaps = (self.confidences - self.accuracies).abs().nan_to_num(nan=0.0)
        return float((self.shares * gaps).sum())


def bin_confidences(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Bins:
    """The decisions by confidence, in `bins` bins of equal width; those without one are left out.

    Source: On Calibration of Modern Neural Networks (Guo et al., 2017), section 2.
    """
    confidences, decisions = probabilities.cpu().double().max(dim=1)
    right = (decisions == labels.cpu()).double()
    known = confidences.isfinite()
    confidences, right = confidences[known], right[known]
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    places = torch.bucketize(confidences, edges[1:-1])
    counts = torch.bincount(places, minlength=bins).double()
    return Bins(
        edges,
        counts / max(len(confidences), 1),
        torch.bincount(places, confidences, minlength=bins) / counts,
        torch.bincount(places, right, minlength=bins) / counts,
    )


def draw_calibration(probabilities: Tensor, labels: Tensor, path: Path) -> None:
    """Write a reliability diagram as PNG: accuracy against confidence, and how many have which.

    Probabilities (N, C), labels (N,). A calibrated network's bars end at the dashed line: of the
    decisions it is 80 % sure of, 80 % are right.
    """
    bins = bin_confidences(probabilities, labels)
    confidence = float((bins.shares * bins.confidences.nan_to_num(nan=0.0)).sum())
    accuracy = float((bins.shares * bins.accuracies.nan_to_num(nan=0.0)).sum())
    known = float(bins.shares.sum()) > 0
    tendency = "too sure" if confidence > accuracy else "not sure enough"
    figure = new_figure(
        640,
        720,
        f"Expected calibration error: {percent(bins.error if known else math.nan, 1)}",
        f"{percent(confidence, 1)} sure on average, {percent(accuracy, 1)} right: {tendency} by "
        f"{100 * abs(confidence - accuracy):.1f} points"
        if known
        else "no decision has a confidence",
    )
    lower, width = bins.edges[:-1].numpy(), float(bins.edges[1])
    middles = lower + width / 2
    axes = add_axes(figure, 80, 96, 520, 380, "How often it is right")
    axes.grid(color=LINE, linewidth=0.7)
    filled = bins.shares.numpy() > 0
    sure, right = bins.confidences.numpy()[filled], bins.accuracies.numpy()[filled]
    axes.bar(middles[filled], right, 0.92 * width, color=BLUE)
    for color, gap in [(AMBER, sure > right), (SKY, sure < right)]:
        bottom, height = np.minimum(sure, right)[gap], np.abs(sure - right)[gap]
        axes.bar(middles[filled][gap], height, 0.92 * width, bottom, color=color)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    handles = [
        Patch(color=BLUE, label="the lesser of accuracy and confidence"),
        Patch(color=AMBER, label="up to the confidence: too sure"),
        Patch(color=SKY, label="up to the accuracy: not sure enough"),
        Line2D([], [], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="calibrated"),
    ]
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=9, labelcolor=INK)

    below = add_axes(figure, 80, 526, 520, 120, "How many pictures")
    below.grid(axis="y", color=LINE, linewidth=0.7)
    below.bar(middles, bins.shares.numpy(), 0.92 * width, color="#9aa5b1")
    for each in (axes, below):
        each.set_xlim(0, 1)
        each.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        each.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_ylim(0, 1)
    below.set_ylim(bottom=0)
    axes.set_ylabel("right", color=MUTED, size=9)
    below.set_ylabel("of all", color=MUTED, size=9)
    below.set_xlabel("confidence", color=MUTED, size=9)
    save(figure, path)
