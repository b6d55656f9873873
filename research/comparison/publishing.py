"""Where a report goes: into a folder, and among the files of the parent run, where there is one."""

import re
from collections.abc import Mapping
from pathlib import Path

from research.comparison.asked import Asked
from research.statistics.report.content import Report
from research.statistics.report.files import write_report
from research.tracking.arms import Found
from research.tracking.run import DESCRIPTION, Recorder
from research.tracking.store import TrackingError, show_command

FOLDER = "comparisons"
RECORDED = "comparison"  # the report's folder among the parent's files
VERDICT = "comparison.verdict"  # the parent's tag


def publish(
    report: Report, name: str, asked: Asked, parent: Found | None, recorder: Recorder | None
) -> str:
    """Write the report and record it; where both are, a line each."""
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "report"
    folder = Path(FOLDER) / slug if asked.output is None else asked.output
    files = write_report(report, folder)
    lines = [f"report:   {files[0]}"]
    if parent is not None and recorder is not None:
        lines.append(f"recorded: {record(report, folder, files, parent, recorder)}")
    return "\n".join(lines)


def record(
    report: Report, folder: Path, files: list[Path], parent: Found, recorder: Recorder
) -> str:
    """The page of the parent run, or why it does not have the report; the files are written."""
    run = parent.run
    try:
        with recorder.open_run(run.tracking_uri, run.run_id) as opened:
            for file in files:
                inside = file.relative_to(folder).parent
                opened.log_artifact(file, (Path(RECORDED) / inside).as_posix())
            verdict = report.verdicts[0].text
            opened.set_tags({VERDICT: verdict, DESCRIPTION: begun_with(verdict, run.tags)})
    except TrackingError as error:
        return f"no, for the store refused it: {error}"
    return show_command(run.tracking_uri, run.run_id, run.experiment_id)


def begun_with(verdict: str, tags: Mapping[str, str]) -> str:
    """The run's description with the verdict before all else, in the place of an earlier one."""
    rest = tags.get(DESCRIPTION, "")
    if VERDICT in tags:
        rest = rest.removeprefix(bold(tags[VERDICT])).lstrip("\n")
    return f"{bold(verdict)}\n\n{rest}".rstrip() + "\n"


def bold(verdict: str) -> str:
    return f"**{verdict}**"
