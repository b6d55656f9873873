"""What came of a repetition: each training, then mean, standard deviation and interval of each arm.

The same as a table for the terminal, as Markdown for MLflow's page, and as metrics of the parent
run: `val/accuracy` (the mean), `val/accuracy_std` (n - 1), `val/accuracy_low` and `_high` (95 %
interval of the mean, research/statistics/mean.py says which), `seeds` (n).  With several arms the
arm's name stands before: `Adam/val/accuracy`.  Trainings that share some of their seeds are no
sample (`is_sample` False): of these there is the mean alone.
"""

from collections.abc import Sequence
from dataclasses import replace

from optuna.trial import TrialState

from research.repetition.trainings import TrainingResult
from research.search.display import duration
from research.search.ranking import plus_minus
from research.search.report import Section, markdown_lines, rows_as_text
from research.statistics.mean import Mean, mean_of
from research.tracking.runs import recordable_names

FIGURES = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "training_seconds")
WITHOUT_LOSSES = tuple(figure for figure in FIGURES if not figure.endswith("/loss"))
TITLES = {"training_seconds": "training"}


def arms_of(trained: Sequence[TrainingResult]) -> dict[str, list[TrainingResult]]:
    """By the arm's name, in the order in which they came."""
    arms: dict[str, list[TrainingResult]] = {}
    for each in trained:
        arms.setdefault(each.arm, []).append(each)
    return arms


def means_of(trained: Sequence[TrainingResult]) -> dict[str, Mean]:
    """Of each figure that trainings which came to their end have, over these."""
    found = {}
    for figure in FIGURES:
        values = [each.metrics[figure] for each in trained if figure in each.metrics]
        if values:
            found[figure] = mean_of(values)
    return found


def metrics_of(trained: Sequence[TrainingResult], is_sample: bool = True) -> dict[str, float]:
    """What the parent run has as metrics."""
    arms = arms_of(trained)
    found: dict[str, float] = {}
    for name, own in zip(recordable_names(list(arms)), arms.values(), strict=True):
        prefix = f"{name}/" if len(arms) > 1 else ""
        for figure, mean in means_of(own).items():
            found[f"{prefix}{figure}"] = mean.value
            if not is_sample:
                continue
            if sum(figure in each.metrics for each in own) > 1:
                found[f"{prefix}{figure}_std"] = mean.standard_deviation
            if mean.interval is not None:
                found[f"{prefix}{figure}_low"] = mean.interval.low
                found[f"{prefix}{figure}_high"] = mean.interval.high
        if is_sample:
            found[f"{prefix}seeds"] = sum(each.finished for each in own)
    return found


# ---- as text -------------------------------------------------------------------------------------


def table(trained: Sequence[TrainingResult], width: int = 100) -> str:
    """A row for each that finished, then what these have in common; losses where there is room."""
    lines: list[str] = []
    for section in sections(trained, FIGURES if width >= 100 else WITHOUT_LOSSES):
        lines += [section.title] if section.title else []
        lines += rows_as_text(section, width)
        lines += [f" {note}" for note in section.notes]
    return "\n".join(lines)


def markdown(trained: Sequence[TrainingResult], is_sample: bool = True) -> str:
    """What they have in common first: MLflow's page shows five lines, the rest when asked."""
    lines: list[str] = []
    for (arm, own), section in zip(
        arms_of(trained).items(), sections(trained, is_sample=is_sample), strict=True
    ):
        n = sum(each.finished for each in own)
        rows = [*section.rows[n:], *section.rows[:n]]
        lines += [f"## {arm}", ""] if arm else []
        lines += markdown_lines(replace(section, rows=rows))
    return "\n".join(lines)


def sections(
    trained: Sequence[TrainingResult], figures: Sequence[str] = FIGURES, is_sample: bool = True
) -> list[Section]:
    return [section_of(arm, own, figures, is_sample) for arm, own in arms_of(trained).items()]


def section_of(
    arm: str, trained: Sequence[TrainingResult], figures: Sequence[str], is_sample: bool
) -> Section:
    means = {figure: mean for figure, mean in means_of(trained).items() if figure in figures}
    finished = [each for each in trained if each.finished]
    rows = [[each.label, *(shown(each, figure) for figure in means)] for each in finished]
    n = len(finished)
    if n > 1 and not is_sample:
        rows.append([f"mean (n={n})", *(number(f, mean.value) for f, mean in means.items())])
    elif n > 1:
        spreads = [plus_minus(m.value, m.standard_deviation, f) for f, m in means.items()]
        rows.append([f"mean ± sd (n={n})", *spreads])
    if is_sample and any(mean.interval is not None for mean in means.values()):
        rows.append(["95 % of the mean", *(ends(f, mean) for f, mean in means.items())])
    notes = [f"{each.label}: {ending_of(each)}" for each in trained if not each.finished]
    names = ["", *(TITLES.get(figure, figure.replace("/", " ")) for figure in means)]
    return Section(arm, names, rows, notes)


def ending_of(trained: TrainingResult) -> str:
    """How one ended that has no figures, or that it has not."""
    if trained.state == TrialState.FAIL:
        return f"failed: {trained.reason or 'no reason was given'}"
    if trained.state == TrialState.PRUNED:
        return f"no part of the mean: {trained.reason or 'diverged'}"
    return "not finished"


def shown(trained: TrainingResult, figure: str) -> str:
    return number(figure, trained.metrics[figure]) if figure in trained.metrics else "-"


def number(figure: str, value: float) -> str:
    if figure.endswith("accuracy"):
        return f"{100 * value:.2f} %"
    return duration(value) if figure.endswith("seconds") else f"{value:.4f}"


def ends(figure: str, mean: Mean) -> str:
    if mean.interval is None or figure.endswith("seconds"):
        return "-"
    low, high = mean.interval.low, mean.interval.high
    if figure.endswith("accuracy"):
        return f"{100 * low:.2f} to {100 * high:.2f} %"
    return f"{low:.3f} to {high:.3f}"
