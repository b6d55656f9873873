"""What a report says, section by section, whatever it is written as.

The verdict stands before all of them. What has no data has no section.
"""

from dataclasses import replace

from research.statistics.report import about_arms, about_runs, about_searches
from research.statistics.report.blocks import Section
from research.statistics.report.content import Report

ORDER = (
    about_arms.arms,
    about_arms.differences,
    about_arms.grid,
    about_arms.curves,
    about_searches.fans,
    about_searches.best_of,
    about_searches.targets,
    about_searches.cross_losses,
    about_searches.noise,
    about_runs.failures,
    about_runs.settings,
    about_runs.matches,
    about_runs.test_looks,
    about_runs.machine,
)


def sections(report: Report) -> list[Section]:
    """All sections that have something to tell, each with the command that reproduces it."""
    return [
        replace(section, command=report.commands.get(section.slug, report.command))
        for part in ORDER
        for section in part(report)
    ]
