"""How long runs take to a target in validation accuracy, those that never reach it included."""

from collections.abc import Mapping, Sequence

from research.statistics.arms import Trained
from research.statistics.survival import Course, Race, race

METRIC = "val/accuracy"
# A run that was stopped or still runs might have gone on, as a pruned one.
ENDS = {"FINISHED": "finished", "PRUNED": "pruned", "RUNNING": "pruned", "KILLED": "pruned"}


def races_of(groups: Mapping[str, Sequence[Trained]]) -> tuple[Race, ...]:
    """In epochs, and in seconds where those were recorded; none where a group has no curve."""
    courses = {name: [course_of(run) for run in runs] for name, runs in groups.items()}
    if not all(any(course.values for course in own) for own in courses.values()):
        return ()
    by_epochs = race(courses, unit="epochs")
    if not any(course.seconds for own in courses.values() for course in own):
        return (by_epochs,)
    return by_epochs, race(courses, unit="seconds")


def course_of(run: Trained) -> Course:
    return Course(
        run.curves.get(METRIC, ()),
        run.curves.get("epoch_seconds", ()),
        ENDS.get(run.status, "failed"),  # type: ignore[arg-type]
    )
