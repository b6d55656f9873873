"""How long runs take to a target in validation accuracy, those that never reach it included."""

from collections.abc import Mapping, Sequence
from typing import Literal

from research.statistics.arms import Trained
from research.statistics.survival import Course, Race, race

METRIC = "val/accuracy"


def races_of(groups: Mapping[str, Sequence[Trained]], level: float) -> tuple[Race, ...]:
    """In epochs, and in seconds where those were recorded.

    None where a run came to its end without a curve, or so few did that there is no target.
    """
    courses = {name: [course_of(run) for run in runs] for name, runs in groups.items()}
    if any(
        each.ended == "finished" and not each.values for own in courses.values() for each in own
    ):
        return ()
    try:
        by_epochs = race(courses, unit="epochs", level=level)
    except ValueError:  # no arm has a final value in half of its runs
        return ()
    if not any(course.seconds for own in courses.values() for course in own):
        return (by_epochs,)
    return by_epochs, race(courses, unit="seconds", level=level)


def course_of(run: Trained) -> Course:
    return Course(run.curves.get(METRIC, ()), run.curves.get("epoch_seconds", ()), ended(run))


def ended(run: Trained) -> Literal["finished", "pruned", "failed"]:
    """A run that was stopped, crashed or still runs might have gone on, as a pruned one."""
    if run.finished:
        return "finished"
    return "failed" if run.diverged else "pruned"
