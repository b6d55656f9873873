"""A comparison from start to end: trained where that is asked for, read, judged, written down.

    for text in compare(asked, recorder): print(text)

The verdict comes before the report is drawn: nobody waits for pictures, nor loses it with them.
Training is imported only where something is to be trained: to read runs needs no torch.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from research.comparison.account import report_of
from research.comparison.asked import Asked
from research.comparison.gathering import CONFIRMS, gather
from research.comparison.grouping import arms_by_settings
from research.comparison.judging import Judgement, Question, judge
from research.comparison.noise import noise_of
from research.comparison.publishing import publish
from research.comparison.screen import screen
from research.comparison.searching import search_part
from research.configuration.compose import ConfigurationError, nearest
from research.tracking.arms import Found, read
from research.tracking.run import Recorder
from research.tracking.store import TrackingError

if TYPE_CHECKING:
    from research.comparison.training import Means
    from research.statistics.cross_loss import CrossLosses


def compare(asked: Asked, recorder: Recorder | None) -> Iterator[str]:
    """The verdict on what was named, with all that belongs to it, and where the report is."""
    baseline = asked.baseline
    if baseline is not None and asked.files:
        baseline = arm_of_file(baseline, asked.files)
    question = Question(asked.metric, asked.level, asked.margin, baseline, asked.expected)
    found, owner = train(asked, recorder, question) if asked.trains else named(asked)
    gathered = gather(found)
    judgement = judge(gathered, question)
    yield screen(judgement)
    searches = [*gathered.searches, *confirmed_by(found)]
    searched = search_part(searches, asked.level) if searches else None
    report = report_of(judgement, title_of(judgement, found), asked.command, searched)
    if asked.cross_losses:
        report = replace(report, cross_losses=cross_losses(asked, judgement))
    name = report.title if owner is None else owner.run.run_name
    yield publish(report, name, asked, owner, recorder)


def named(asked: Asked) -> tuple[list[Found], Found | None]:
    """What was named, and the parent that the report belongs to, where it is the only one."""
    found = [read(asked.tracking_uri, name) for name in asked.arms]
    return found, found[0] if len(found) == 1 and found[0].is_parent else None


def confirmed_by(found: Sequence[Found]) -> Iterator[Found]:
    """The searches whose best were trained again: no arms, but how their rates were chosen."""
    named = [(each.run.tracking_uri, each.run.tags.get(CONFIRMS)) for each in found]
    for tracking_uri, run_id in dict.fromkeys(named):
        if run_id is not None:
            with contextlib.suppress(TrackingError):  # deleted since
                yield read(tracking_uri, run_id)


def measure_noise(asked: Asked, recorder: Recorder | None) -> Iterator[str]:
    """Train one experiment over and over; which source of noise does how much, in words."""
    from research.comparison.training import again, configured, read_trained, train_noise

    means = means_of(asked, recorder)
    if asked.files:
        name = asked.files[0].stem
        configuration = configured(asked.settings, asked.files[0], means)
    else:
        one = read(asked.tracking_uri, asked.arms[0])
        name = one.run.run_name
        if len(arms_by_settings([each.trained for each in one.runs], one.text)) > 1:
            raise ConfigurationError(
                f"noise: {one.run.described()} has several arms below it; name a run of one."
            )
        configuration = again(one.runs[0].trained.run_id, {}, means)
    came = train_noise(configuration, asked.runs, means, name, asked.metric)
    found = read_trained(came, asked.tracking_uri)
    told, report = noise_of(found, asked.metric, asked.level, asked.command)
    yield told
    yield publish(report, f"{name}-noise", asked, found, recorder)


# ---- training ------------------------------------------------------------------------------------


def train(
    asked: Asked, recorder: Recorder | None, question: Question
) -> tuple[list[Found], Found | None]:
    """The parents of what was trained, every file's experiment or the best of a search again, and
    the one that the report belongs to."""
    from research.comparison.confirming import confirm
    from research.comparison.training import read_trained, train_files

    means = means_of(asked, recorder)
    if asked.files:
        came = train_files(asked.files, asked.settings, asked.seeds, means, question)
        found = read_trained(came, asked.tracking_uri)
        return [found], found
    assert asked.confirm is not None
    search = read(asked.tracking_uri, asked.arms[0])
    if not search.is_search:
        raise ConfigurationError(
            f"confirm: {search.run.described()} is no search; --confirm trains the best of one."
        )
    confirmed = confirm(search, asked.confirm, asked.seeds, means, question)
    return list(confirmed.found), confirmed.owner


def arm_of_file(typed: str, files: Sequence[Path]) -> str:
    """The name that the arm of a file will have; told before anything is trained."""
    from research.comparison.training import names_of

    names = names_of(files)
    for name, file in zip(names, files, strict=True):
        if typed == name or Path(typed) == file:
            return name
    raise ConfigurationError(
        f"baseline: there is no arm {typed}{nearest(typed, names)} There are {', '.join(names)}."
    )


def means_of(asked: Asked, recorder: Recorder | None) -> "Means":
    from research.comparison.training import Means

    assert recorder is not None
    return Means(
        asked.tracking_uri,
        recorder,
        asked.command,
        asked.workers,
        trust=asked.trust,
        allow_changes=asked.allow_changes,
    )


# ---- the report ----------------------------------------------------------------------------------


def title_of(judgement: Judgement, found: Sequence[Found]) -> str:
    names = [arm.name for arm in judgement.arms]
    return " vs ".join(names) if len(names) < 5 else f"{found[0].run.run_name}: {len(names)} arms"


def cross_losses(asked: Asked, judgement: Judgement) -> "CrossLosses":
    """Every trained network under every loss, on the pictures that its run kept for validation."""
    from research.checkpoints.trained import is_own_store
    from research.statistics.cross_loss import Recorded, score_recorded
    from research.tracking.runs import find_run

    trust = asked.trust or is_own_store(asked.tracking_uri)
    recorded = [
        Recorded(standing.arm.name, find_run(asked.tracking_uri, run.run_id).checkpoint(), trust)
        for standing in judgement.standings
        for run in standing.measured
    ]
    return score_recorded(recorded)
