"""A study that never ran, with all that a report may tell of one."""

import math
from dataclasses import replace

import numpy as np

from research.statistics.arms import Arm, Trained
from research.statistics.basin import basin
from research.statistics.best_of import best_of
from research.statistics.cross_loss import CrossLosses, Row
from research.statistics.noise import estimate
from research.statistics.readable import readable
from research.statistics.report.study import report_of
from research.statistics.several import compare_several
from research.statistics.survival import Course, race

METRIC = "val/accuracy"
COMMAND = "python -m research.compare runs/a runs/b --metric val/accuracy"
ORIGINS = {"machine": "2 cores, no GPU", "torch": "2.11.0", "Python": "3.11.2", "data": "CIFAR-10"}


def trained(arm, seed, accuracy, *, epochs=6, settings=None, **changes):
    """A run of the arm whose curves climb to the accuracy."""
    random = np.random.default_rng([seed, len(arm)])
    climb = [(e, accuracy * (1 - 0.6 * math.exp(-e / 3))) for e in range(1, epochs + 1)]
    values = tuple((e, value + random.normal(0, 0.004)) for e, value in climb)
    losses = tuple((e, 2.3 * (1.02 - value)) for e, value in values)
    run = Trained(
        run_id=f"{arm}-{seed}",
        run_name=f"{arm} {seed}",
        seeds=dict.fromkeys(("weights", "order", "augmentation", "dropout"), seed),
        status="FINISHED",
        metrics={METRIC: accuracy},
        curves={METRIC: values, "val/loss": losses},
        seconds=60.0,
        initial_weights=f"w{seed}",
        first_batches=f"b{seed}",
        settings={"optimizer": arm, "optimizer.lr": 0.1, **(settings or {})},
        test_looks=0,
        origins=ORIGINS,
    )
    return replace(run, **changes)


def arm(name, mean, seeds=8, *, spread=0.004, settings=None):
    """An arm of so many seeds, some of whose noise all arms of a seed share."""
    runs = []
    for seed in range(seeds):
        shared = np.random.default_rng(seed).normal(0, spread)
        own = np.random.default_rng([seed, *name.encode("utf-8", "replace")]).normal(0, spread / 2)
        runs.append(trained(name, seed, mean + shared + own, settings=settings))
    return Arm(name, f"runs/{name}", tuple(runs))


def compared(arms, *, baseline=True, **options):
    """The report of these arms, all against the first, or else every one with every other."""
    values = {each.name: each.values(METRIC) for each in arms if each.measured(METRIC)}
    comparisons = (
        [] if len(values) < 2 else compare_several(values, arms[0].name if baseline else None)
    )
    options = {"title": "Which optimizer?", "command": COMMAND, **options}
    return report_of(arms, comparisons, METRIC, **options)


def study():
    """Three arms with one run that failed and one that was scored on test."""
    arms = [arm("SGD", 0.660), arm("Adam", 0.668), arm("RMSprop", 0.661)]
    failed = replace(
        arms[1].runs[0],
        run_id="f", run_name="Adam 8", seeds={"weights": 8, "order": 8}, status="FAILED",
        metrics={}, failure="the loss was not finite in epoch 3, step 17",
    )  # fmt: skip
    arms[1] = replace(arms[1], runs=(*arms[1].runs, failed))
    looked = (replace(arms[0].runs[0], test_looks=1), *arms[0].runs[1:])
    arms[0] = replace(arms[0], runs=looked)
    return arms


def grid_of_arms(losses=4, optimizers=5):
    """An arm for each loss and optimizer, three seeds each; one of them without any value."""
    found = []
    for i in range(losses):
        for j in range(optimizers):
            settings = {"model.loss": f"{'CrossEntropy' if i == 0 else f'Number{i}'}Loss"}
            settings["optimizer"] = f"Optimizer{j}" if j else "SGD"
            name = f"{settings['model.loss']} {settings['optimizer']}"
            mean = 0.66 - 0.02 * i - 0.01 * j * (i + 1) ** 0.5
            found.append(arm(name, mean, 3, settings=settings))
    worst = found[-1]
    runs = tuple(replace(run, status="FAILED", metrics={}) for run in worst.runs)
    found[-1] = replace(worst, runs=runs)
    return found


def with_searches(report):
    """The report with all that searches add."""
    random = np.random.default_rng(0)
    fans, trials = {}, {}
    for number, name in enumerate(("CrossEntropyLoss SGD", "MSELoss SGD", "CrossEntropyLoss Adam")):
        rates = 10 ** random.uniform(-4, 0, 24)
        values = [
            0.66 - 0.05 * (np.log10(rate) + 1.5 + number / 2) ** 2 + random.normal(0, 0.01)
            if rate < 0.4
            else math.nan
            for rate in rates
        ]
        fans[name] = basin(list(zip(rates.tolist(), values, strict=True)))
        trials[name] = best_of(values, resamples=200)
    courses = {
        name: [
            Course(tuple((e, top * (1 - math.exp(-e / pace))) for e in range(1, 13)))
            for top, pace in zip(
                random.normal(0.66, 0.03, 8), random.normal(3, 0.5, 8), strict=True
            )
        ]
        for name in ("SGD", "Adam", "RMSprop")
    }
    return replace(
        report,
        fans=fans,
        best_of=trials,
        races=(race(courses, target=0.6),),
        cross_losses=cross_table(),
        **noise_of(random),
    )


def cross_table():
    measures = ("accuracy", "expected_calibration_error", "CrossEntropyLoss", "MSELoss")
    rows = tuple(
        Row(name, name, {"CrossEntropyLoss": own, "MSELoss": own / 10}, own,
            {"accuracy": 0.7 - own / 10, "expected_calibration_error": own / 20}, 5000)
        for name, own in (("CrossEntropyLoss", 0.9), ("MSELoss", 1.4), ("CTCLoss", math.nan))
    )  # fmt: skip
    return CrossLosses(rows, measures, {"MyLoss": "it has no default for margin"}, {})


def noise_of(random):
    streams = ("weights", "order", "augmentation")
    runs = []
    for background in range(6):
        own = dict.fromkeys(streams, background)
        runs += [(own, 0.66 + random.normal(0, 0.004)), (own, 0.66)]
        runs += [
            ({**own, stream: 100 + 10 * background + number}, 0.66 + random.normal(0, 0.003))
            for number, stream in enumerate(streams)
        ]
    found = estimate(runs)
    return {"noise": found, "readable": readable(found.total, correlation=0.6)}


def everything():
    """A report with all sections."""
    grid = compared(grid_of_arms()).grid
    return replace(with_searches(compared(study(), warnings=["It is invented."])), grid=grid)
