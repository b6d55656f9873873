"""A judgement as a report: the same verdicts, with every run, curve and failure behind them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from research.comparison.judging import Contrast, Judgement, Standing
from research.comparison.racing import races_of
from research.comparison.searching import SearchPart
from research.statistics.arms import Arm
from research.statistics.mean import mean_of
from research.statistics.report import content

# Curves that mean the same for all arms; a loss does so only where all arms have the same one.
CURVES = ("val/accuracy", "train/accuracy", "val/loss", "train/loss")
ROWS, COLUMNS = "model.loss", "optimizer"
MACHINE = ("device", "processes", "threads", "Python", "torch", "torchvision", "Lightning", "CUDA")
TONES: Mapping[str, content.Tone] = {"better": "better", "worse": "worse"}


def report_of(
    judgement: Judgement, title: str, command: str, searched: SearchPart | None = None
) -> content.Report:
    """All that a comparison found; `command` makes it again, `searched` is what a search adds."""
    losses_differ = any(setting.key.startswith("model.loss") for setting in judgement.apart)
    names = [name for name in CURVES if not (losses_differ and name.endswith("loss"))]
    curves = (curves_of(judgement.arms, name, judgement.question.level) for name in names)
    report = content.Report(
        title=title,
        metric=judgement.metric,
        verdicts=verdicts_of(judgement),
        command=command,
        summary=summary_of(judgement),
        made_at=f"Made on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}.",
        higher_is_better=judgement.higher_is_better,
        level=judgement.question.level,
        warnings=judgement.cautions,
        remarks=(*judgement.remarks, *judgement.notes),
        arms=tuple(arm_result(each, judgement) for each in judgement.standings),
        contrasts=tuple(contrast_of(each, judgement.metric) for each in judgement.contrasts),
        grid=grid_of(judgement),
        curves=tuple(each for each in curves if each is not None),
        races=races_of({arm.name: arm.runs for arm in judgement.arms}),
        failures=tuple(failure for each in judgement.standings for failure in failures_of(each)),
        settings=judgement.apart,
        origins=judgement.origins,
        matches=tuple(match_of(each) for each in judgement.contrasts if each.difference.paired),
        machine=machine_of(judgement.arms),
    )
    if searched is None or searched.metric != judgement.metric:
        return report
    races = searched.races if all(len(arm.runs) == 1 for arm in judgement.arms) else report.races
    return replace(report, fans=searched.fans, best_of=searched.best_of, races=races)


def verdicts_of(judgement: Judgement) -> tuple[content.Verdict, ...]:
    """The headline; where it sums up several comparisons, each of these too."""
    each = [
        content.Verdict(f"{one.verdict}.", TONES.get(one.finding, "unclear"))
        for one in judgement.shown
    ]
    return tuple(each) if len(each) == 1 else (content.Verdict(f"{judgement.headline}."), *each)


def summary_of(judgement: Judgement) -> str:
    runs = sum(len(arm.runs) for arm in judgement.arms)
    better = "higher" if judgement.higher_is_better else "lower"
    return (
        f"{len(judgement.arms)} arms with {runs} runs, compared by {judgement.metric} ({better} is "
        f"better): {judgement.why_metric}."
    )


# ---- arms and their differences ------------------------------------------------------------------


def arm_result(standing: Standing, judgement: Judgement) -> content.ArmResult:
    ranked, deviation = standing.ranked, standing.ranked.standard_deviation
    return content.ArmResult(
        standing.arm.name,
        content.Estimate(ranked.mean, ranked.interval),
        tuple(run.metrics[judgement.metric] for run in standing.measured),
        tuple(run.seed_text for run in standing.measured),
        deviation if math.isfinite(deviation) else None,
        len(standing.left_out),
        standing.test_looks,
    )


def contrast_of(contrast: Contrast, metric: str) -> content.Contrast:
    pairs = contrast.pairing.pairs if contrast.difference.paired else ()
    return content.Contrast(
        contrast.b.name,
        contrast.a.name,
        contrast.difference,
        tuple(one.seed_text for one, _ in pairs),
        tuple(other.metrics[metric] - one.metrics[metric] for one, other in pairs),
    )


def match_of(contrast: Contrast) -> content.PairMatch:
    return content.PairMatch(contrast.b.name, contrast.a.name, contrast.weights, contrast.batches)


def failures_of(standing: Standing) -> list[content.Failure]:
    return [
        content.Failure(
            standing.arm.name,
            run.run_name,
            run.seed_text,
            run.status,
            run.failure or "it has no finite figure, or its seed came again later",
        )
        for run in standing.left_out
    ]


def grid_of(judgement: Judgement) -> content.Grid | None:
    """Loss by optimizer, where both differ among the arms and no two arms have the same of both."""
    keys = {setting.key for setting in judgement.apart}
    if not {ROWS, COLUMNS} <= keys:
        return None
    cells = []
    for standing in judgement.standings:
        settings = standing.arm.runs[0].settings
        row, column = str(settings.get(ROWS)), str(settings.get(COLUMNS))
        value = content.Estimate(standing.ranked.mean, standing.ranked.interval)
        cells.append(content.Cell(row, column, value, standing.ranked.n))
    places = {(cell.row, cell.column) for cell in cells}
    return content.Grid("loss", "optimizer", tuple(cells)) if len(places) == len(cells) else None


# ---- over the epochs -----------------------------------------------------------------------------


def curves_of(arms: Sequence[Arm], metric: str, level: float) -> content.Curves | None:
    """The mean over seeds at each epoch, of every arm that recorded the metric; None where none."""
    found = []
    for arm in arms:
        runs = [dict(run.curves[metric]) for run in arm.runs if run.curves.get(metric)]
        epochs = sorted({epoch for run in runs for epoch in run})
        points = [
            point_of(epoch, [run[epoch] for run in runs if epoch in run], level) for epoch in epochs
        ]
        if points:
            found.append(content.Curve(arm.name, tuple(points)))
    return content.Curves(metric, tuple(found)) if found else None


def point_of(epoch: float, values: Sequence[float], level: float) -> content.Point:
    if not all(map(math.isfinite, values)):
        return content.Point(epoch, math.nan, None, len(values))
    mean = mean_of(values, level=level)
    return content.Point(epoch, mean.value, mean.interval, len(values))


def machine_of(arms: Sequence[Arm]) -> dict[str, str]:
    """What the runs stood on; several values where it was not the same for all."""
    runs = [run for arm in arms for run in arm.runs]
    found = {}
    for key in MACHINE:
        values = dict.fromkeys(run.origins[key] for run in runs if key in run.origins)
        if values:
            found[key] = ", ".join(values)
    return found
