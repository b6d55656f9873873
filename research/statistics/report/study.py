"""A report made of arms and their comparisons.

What searches and noise add (fans, best of k, races, every loss) is put in by `dataclasses.replace`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from research.statistics.arms import (
    Arm,
    Trained,
    match,
    origins_apart,
    pair,
    settings_apart,
    value_in,
)
from research.statistics.mean import LEVEL, Mean, mean_of
from research.statistics.report import numbers
from research.statistics.report.content import (
    ArmResult,
    Cell,
    Contrast,
    Curve,
    Curves,
    Estimate,
    Failure,
    Grid,
    PairMatch,
    Point,
    Report,
    Tone,
    Verdict,
)
from research.statistics.several import Comparison
from research.statistics.verdict import finding, remarks, verdict

CURVES = ("val/accuracy", "val/loss", "train/loss", "train/accuracy")
GRID = ("model.loss", "optimizer")
MANY = 6  # comparisons, above which all are summed up, and remarks on each too many to read
OVER_SEEDS = (
    "Intervals and tests are over seeds alone: all runs are scored on the same pictures. Other "
    "pictures would move every figure as well; at 80 %, 10,000 of them leave a standard error of "
    "0.4 points."
)
TONES: Mapping[str, Tone] = {"better": "better", "worse": "worse"}


def report_of(
    arms: Sequence[Arm],
    comparisons: Sequence[Comparison],
    metric: str,
    *,
    title: str,
    command: str,
    higher_is_better: bool = True,
    level: float = LEVEL,
    margin: float | None = None,
    warnings: Sequence[str] = (),
    machine: Mapping[str, str] | None = None,
    made_at: str = "",
) -> Report:
    """The report of arms in one metric; `comparisons` are by the arms' names.

    Without `machine` it has what all runs tell alike: data, code, device, versions.
    """
    by_name = {arm.name: arm for arm in arms}
    contrasts = [contrast(each, by_name, metric) for each in comparisons]
    unit, scale = ("points", 100.0) if numbers.is_share(metric) else ("", 1.0)
    results = [result(arm, metric, level) for arm in arms]
    runs = sum(len(each.values) for each in results)
    direction = "higher" if higher_is_better else "lower"
    verdicts = overview(results, comparisons, metric, higher_is_better, level)
    for each in comparisons:
        names, found = (each.name_a, each.name_b), each.difference
        words = verdict(*names, found, unit=unit, scale=scale, alpha=1 - level, margin=margin)
        tone = TONES.get(finding(found, alpha=1 - level, margin=margin), "unclear")
        verdicts.append(Verdict(f"{words}.", tone))
    return Report(
        title=title,
        metric=metric,
        verdicts=tuple(verdicts),
        command=command,
        summary=f"{metric} of {len(arms)} arms, {runs} runs; {direction} is better.",
        made_at=made_at,
        higher_is_better=higher_is_better,
        level=level,
        warnings=tuple(warnings),
        remarks=(*remarks_on(comparisons, unit, scale, 1 - level), OVER_SEEDS),
        arms=tuple(results),
        contrasts=tuple(contrasts),
        grid=grid(arms, metric, level),
        curves=tuple(curves(arms, metric, level)),
        failures=tuple(failure for arm in arms for failure in failures(arm, metric)),
        settings=tuple(settings_apart(arms)),
        origins=origins_apart(arms),
        matches=tuple(pair_match(each, by_name, metric) for each in contrasts if each.values),
        machine=common_origins(arms) if machine is None else machine,
    )


def overview(
    results: Sequence[ArmResult],
    comparisons: Sequence[Comparison],
    metric: str,
    higher_is_better: bool,
    level: float,
) -> list[Verdict]:
    """Where there are many comparisons, a sentence on all of them; none where there are few."""
    alive = [each for each in results if math.isfinite(each.mean.value)]
    if len(comparisons) <= MANY or not alive:
        return []
    pick = max if higher_is_better else min
    best = pick(alive, key=lambda each: each.mean.value)
    apart = sum(finding(each.difference, alpha=1 - level) in TONES for each in comparisons)
    return [
        Verdict(
            f"{best.name} has the best mean, {numbers.value(best.mean.value, metric)}. "
            f"{apart} of {len(comparisons)} comparisons tell their arms apart, corrected for their "
            "number by Holm."
        )
    ]


def remarks_on(
    comparisons: Sequence[Comparison], unit: str, scale: float, alpha: float
) -> list[str]:
    """What a careful reader should know, each said once with the comparisons that it is said of."""
    if len(comparisons) > MANY:
        return []
    said: dict[str, list[str]] = {}
    for each in comparisons:
        for remark in remarks(each.difference, unit=unit, scale=scale, alpha=alpha):
            said.setdefault(remark, []).append(f"{each.name_b} against {each.name_a}")
    return [
        remark if len(names) == len(comparisons) else f"{', '.join(names)}: {remark}"
        for remark, names in said.items()
    ]


def result(arm: Arm, metric: str, level: float) -> ArmResult:
    measured = arm.measured(metric)
    values = [run.metrics[metric] for run in measured]
    mean = mean_of(values, level=level) if values else None
    return ArmResult(
        name=arm.name,
        mean=Estimate(math.nan) if mean is None else estimate(mean),
        values=tuple(values),
        seeds=tuple(run.seed_text for run in measured),
        standard_deviation=None if mean is None else mean.standard_deviation,
        left_out=len(failures(arm, metric)),
        test_looks=sum(run.test_looks for run in arm.runs),
        learning_rate=rate_of(arm),
    )


def rate_of(arm: Arm) -> str:
    """The learning rate as it is told; empty where the arm's runs have none."""
    given = value_in(arm, "optimizer.lr") or ""
    try:
        return numbers.rate(float(given))
    except ValueError:  # several, or none
        return given


def estimate(mean: Mean) -> Estimate:
    return Estimate(mean.value, mean.interval)


def finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def contrast(comparison: Comparison, arms: Mapping[str, Arm], metric: str) -> Contrast:
    """The comparison with its pairs, the arm minus what it is compared with."""
    names = comparison.name_b, comparison.name_a
    if not comparison.difference.paired:
        return Contrast(*names, comparison.difference)
    pairs = pair(arms[comparison.name_a], arms[comparison.name_b], metric).pairs
    differences = tuple(own.metrics[metric] - other.metrics[metric] for other, own in pairs)
    seeds = tuple(other.seed_text for other, _ in pairs)
    return Contrast(*names, comparison.difference, seeds, differences)


def pair_match(each: Contrast, arms: Mapping[str, Arm], metric: str) -> PairMatch:
    pairs = pair(arms[each.against], arms[each.arm], metric).pairs
    return PairMatch(
        each.arm, each.against, match(pairs, "initial_weights"), match(pairs, "first_batches")
    )


# ---- runs without a part -------------------------------------------------------------------------


def failures(arm: Arm, metric: str) -> list[Failure]:
    """The arm's runs that have no part in the numbers, and why."""
    counted = {run.run_id for run in arm.measured(metric)}
    return [
        Failure(arm.name, run.run_name, run.seed_text, run.status, reason(run, metric))
        for run in arm.runs
        if run.run_id not in counted
    ]


def reason(run: Trained, metric: str) -> str:
    if run.failure:
        return run.failure
    if not run.finished:
        return "it did not come to its end"
    if metric not in run.metrics:
        return f"it has no {metric}"
    if not math.isfinite(run.metrics[metric]):
        return f"its {metric} is not finite"
    return "a newer run of the same seed counts"


# ---- curves and cells ----------------------------------------------------------------------------


def curves(arms: Sequence[Arm], metric: str, level: float) -> list[Curves]:
    """The curves that there are, of the runs that count; those of the metric itself first."""
    runs = {arm.name: arm.measured(metric) for arm in arms}
    found = []
    for name in dict.fromkeys([metric, *CURVES]):
        own = [curve(arm, each, name, level) for arm, each in runs.items()]
        if any(len(each.points) > 1 for each in own):
            found.append(Curves(name, tuple(each for each in own if each.points)))
    return found


def curve(arm: str, runs: Sequence[Trained], metric: str, level: float) -> Curve:
    """Mean and interval over the runs at each epoch; a run without a finite value has no part."""
    by_epoch: dict[float, list[float]] = {}
    for run in runs:
        for epoch, value in run.curves.get(metric, ()):
            by_epoch.setdefault(epoch, []).append(value)
    points = []
    for epoch in sorted(by_epoch):
        values = finite(by_epoch[epoch])
        if values:
            mean = mean_of(values, level=level)
            points.append(Point(epoch, mean.value, mean.interval, len(values)))
        else:
            points.append(Point(epoch, math.nan, None, 0))
    return Curve(arm, tuple(points))


def grid(arms: Sequence[Arm], metric: str, level: float) -> Grid | None:
    """Loss by optimizer, where both vary and no two arms share a cell; None otherwise."""
    places = [tuple(value_in(arm, key) for key in GRID) for arm in arms]
    several = all(len({place[side] for place in places}) > 1 for side in (0, 1))
    if not several or None in {each for place in places for each in place}:
        return None
    if max(Counter(places).values()) > 1:
        return None
    cells = []
    for arm, (loss, optimizer) in zip(arms, places, strict=True):
        own = result(arm, metric, level)
        value = own.mean if own.values else None
        note = "" if value is not None else failed_as(arm)
        cells.append(Cell(str(loss), str(optimizer), value, len(own.values), note))
    return Grid("loss", "optimizer", tuple(cells))


def failed_as(arm: Arm) -> str:
    """Why a cell is empty, in a word or two."""
    states = Counter(run.status.lower() for run in arm.runs if not run.finished)
    if states:
        return states.most_common(1)[0][0]
    return "not finite" if arm.runs else "no run"


def common_origins(arms: Sequence[Arm]) -> dict[str, str]:
    """What all runs stood on alike."""
    apart = origins_apart(arms)
    return {
        key: value
        for arm in arms
        for run in arm.runs
        for key, value in run.origins.items()
        if key not in apart
    }
