"""Where the noise of one experiment comes from, as text and as a report.

text, report = noise_of(read(uri, parent), metric, level, command)
"""

import math
from collections.abc import Sequence

from research.comparison.account import made_now
from research.comparison.judging import VAL, choose_metric, common_metrics, is_higher_better
from research.comparison.screen import columns, item, wrapped
from research.configuration.compose import ConfigurationError
from research.statistics.arms import Arm
from research.statistics.noise import Component, Noise, estimate
from research.statistics.readable import Readable, readable
from research.statistics.report import content, numbers
from research.tracking.arms import Found

COUNTS = (1, 3, 5, 10, 20)  # seeds, on the terminal


def noise_of(
    found: Found, asked: str | None, level: float, command: str
) -> tuple[str, content.Report]:
    """What the runs below a parent say of their own noise; ConfigurationError for too few of them.

    A run that did not finish gave no figure, and is counted so.
    """
    runs = [each.trained for each in found.runs]
    arm = Arm(found.run.run_name, found.text, tuple(runs))
    if not any(run.finished for run in runs):
        raise ConfigurationError(
            f"{arm.name} has no finished run, so nothing is known of its noise."
        )
    metric, why = choose_metric([arm], asked)
    if asked is None and VAL in common_metrics([arm]):
        metric, why = VAL, "what is planned by it should not have seen the test pictures"
    values = [
        (run.seeds, run.metrics.get(metric, math.nan) if run.finished else math.nan) for run in runs
    ]
    try:
        noise = estimate(values, level=level)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    limits = readable(noise.total, alpha=1 - level)
    report = content.Report(
        title=f"Noise of {arm.name}",
        metric=metric,
        verdicts=(content.Verdict(f"{verdict(noise, limits, metric)}."),),
        command=command,
        summary=f"{len(runs)} runs of one experiment by {metric}: {why}.",
        made_at=made_now(),
        higher_is_better=is_higher_better(metric),
        level=level,
        remarks=tuple(noise.notes),
        noise=noise,
        readable=limits,
    )
    return text_of(noise, limits, metric, why), report


def verdict(noise: Noise, limits: Sequence[Readable], metric: str) -> str:
    """The whole deviation, and what can be read at three seeds."""
    at_three = next(limit for limit in limits if limit.n == 3)
    may_be = numbers.interval(at_three.unpaired_interval, metric)
    every = "every seed but that of the split" if "split" in noise.fixed else "every seed"
    return (
        f"Runs that differ in {every} deviate by {size(noise.total.deviation, metric)}; with 3 "
        f"seeds each, a difference below about {size(at_three.unpaired, metric)} ({may_be}) is not "
        "worth reading between arms on other seeds; paired by seed it may be less"
    )


def text_of(noise: Noise, limits: Sequence[Readable], metric: str, why: str) -> str:
    parts = [
        wrapped(f"{verdict(noise, limits, metric)}."),
        wrapped(f"Read by {metric}: {why}. Mean {numbers.value(noise.mean, metric)}."),
        sources_table(noise, metric),
        limits_table(limits, metric),
        "\n".join(item(note) for note in noise.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def sources_table(noise: Noise, metric: str) -> str:
    """The standard deviation by each source, its share of the whole variance."""
    rows = [["source", f"sd {numbers.unit(metric)}".strip(), "interval", "share", "runs"]]
    every: list[Component] = [*noise.sources]
    every += [noise.hardware] if noise.hardware is not None else []
    for each in [*every, noise.total]:
        rows.append(
            [
                each.source,
                numbers.bare(each.deviation, metric),
                numbers.interval(each.interval, metric),
                numbers.share(each.share),
                str(each.runs),
            ]
        )
    return columns(rows)


def limits_table(limits: Sequence[Readable], metric: str) -> str:
    """The smallest difference of two means worth reading, by the number of seeds of each arm."""
    shown = [limit for limit in limits if limit.n in COUNTS]
    rows = [
        ["seeds of each arm", *(str(limit.n) for limit in shown)],
        ["worth reading from", *(numbers.bare(limit.unpaired, metric) for limit in shown)],
        ["may be", *(numbers.interval(limit.unpaired_interval, metric) for limit in shown)],
    ]
    return columns(rows)


def size(value: float, metric: str) -> str:
    return f"{numbers.bare(value, metric)}{' points' if numbers.is_share(metric) else ''}"
