"""What a report says, section by section, whatever it is written as.

The verdict stands before all of them. What has no data has no section.
"""

from dataclasses import replace

from research.statistics.report import about_arms, about_differences, about_runs, about_searches
from research.statistics.report.blocks import Section
from research.statistics.report.content import Report

NUMBERS = (
    about_arms.grid,
    about_arms.arms,
    about_differences.differences,
    about_arms.curves,
    about_searches.fans,
    about_searches.best_of,
    about_searches.targets,
    about_searches.cross_losses,
    about_searches.noise,
)
GROUND = (
    about_runs.failures,
    about_runs.settings,
    about_runs.matches,
    about_runs.test_looks,
    about_runs.machine,
)


def sections(report: Report) -> list[Section]:
    """All sections that have something to tell; numbers with the command that reproduces them."""
    found = [(each, report.command) for part in NUMBERS for each in part(report)]
    found += [(each, "") for part in GROUND for each in part(report)]
    return [replace(each, command=report.commands.get(each.slug, own)) for each, own in found]
