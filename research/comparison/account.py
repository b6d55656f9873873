"""A judgement as a report: the same verdicts, with every run, curve and failure behind them."""

from dataclasses import replace
from datetime import datetime

from research.comparison.judging import Judgement
from research.comparison.racing import races_of
from research.comparison.searching import SearchPart
from research.statistics.report import study
from research.statistics.report.content import Report, Verdict
from research.statistics.several import Comparison


def report_of(
    judgement: Judgement, title: str, command: str, searched: SearchPart | None = None
) -> Report:
    """All that a comparison found; `command` makes it again, `searched` is what a search adds."""
    report = study.report_of(
        judgement.arms,
        [Comparison(each.a.name, each.b.name, each.difference) for each in judgement.contrasts],
        judgement.metric,
        title=title,
        command=command,
        higher_is_better=judgement.higher_is_better,
        level=judgement.question.level,
        margin=judgement.question.margin,
        warnings=judgement.cautions,
        made_at=made_now(),
    )
    verdicts = report.verdicts
    if len(judgement.shown) > 1:
        each = verdicts[-len(judgement.contrasts) :]
        verdicts = (Verdict(f"{judgement.headline}."), *each)
    # A loss means the same for all arms only where all have the same one.
    losses_differ = any(setting.key.startswith("model.loss") for setting in judgement.apart)
    curves = [each for each in report.curves if not (losses_differ and "loss" in each.metric)]
    report = replace(
        report,
        verdicts=verdicts,
        summary=f"{report.summary} Decided by {judgement.metric}: {judgement.why_metric}.",
        remarks=(*report.remarks, *judgement.notes),
        curves=tuple(curves),
        races=races_of(
            {arm.name: arm.counted(judgement.metric) for arm in judgement.arms},
            judgement.question.level,
        ),
        settings=judgement.apart,
    )
    if searched is None:
        return report
    races = searched.races if all(len(arm.runs) == 1 for arm in judgement.arms) else report.races
    return replace(
        report,
        search_metric=searched.metric,
        search_higher_is_better=not searched.is_minimized,
        fans=searched.fans,
        best_of=searched.best_of,
        races=races,
        remarks=(*report.remarks, *searched.notes),
    )


def made_now() -> str:
    return f"Made on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}."
