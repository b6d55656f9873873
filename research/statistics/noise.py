"""Where the noise of one experiment comes from: its variance, split by source.

What is random in a training has sources: the initial weights, the order of the pictures, their
augmentation, dropout, and the hardware, which is what remains when every seed is fixed. `design`
says which runs to make: some in which all seeds differ (backgrounds), and of each one a twin for
every source, in which the seed of this source alone is another (Bouthillier et al., 2021,
"Accounting for variance in machine learning benchmarks", MLSys). `estimate` reads the variances
off the runs' figures; what they mean for a comparison at n seeds is in readable.py.

What is estimated for a source is the variance that is left when all other seeds are known, averaged
over the backgrounds: E[Var(figure | other seeds)], the total effect of a variance-based sensitivity
analysis, and half the mean squared difference of twins is its classic estimate (Jansen, 1999;
Saltelli et al., 2010). One background would give the variance around that one setting of the other
seeds; many average it. It holds the source's own effect and all its interactions with others, so
that shares need not sum to 1. In the training of networks they rarely do: a change of any one seed,
even in the last bit of a weight, sets off much the same spread as a change of all of them (Summers
and Dinneen, 2021, "Nondeterminism and instability in neural network optimization", ICML).

Intervals are generalized confidence intervals (Weerahandi, 1993): each mean square is a variance
times chi-square by its degrees of freedom, as it is of figures that are normally distributed with
the same variance in every background; for one mean square this is the chi-square interval.

    s    a source's mean square: variance within the groups that share all other seeds
    h    the mean square of repeats with all seeds fixed: the hardware
    v    the variance of runs that differ in every seed
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from research.statistics.interval import Interval

SOURCES = ("weights", "order", "augmentation", "dropout")
HARDWARE = "hardware"
DRAWS = 20_000

Seeds = Mapping[str, int]
Draw = NDArray[np.float64]


# ---- which runs to make --------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A run to make: the seed of each stream, and what it is for.

    `purpose` is "background", the source that alone is another than in its background, or
    "hardware" for a repeat of a background.
    """

    seeds: Seeds
    purpose: str
    background: int


def design(
    budget: int,
    *,
    sources: Sequence[str] = SOURCES,
    backgrounds: int | None = None,
    repeats: int | None = None,
    first_seed: int = 0,
) -> tuple[Setting, ...]:
    """The runs to make, at most `budget`, each background followed by its twins and repeats.

    A background has one seed for all streams, from `first_seed` on, so that it is also a run of
    `--seeds`. By default there are as many as the budget allows, each with one twin per source and
    one repeat: no other way to spend it gives a source as many degrees of freedom from as many
    backgrounds. Fewer `backgrounds` get more twins each. `repeats` in all, by default one for each
    background; where the hardware repeats bit by bit two are enough. Leave out of `sources` what
    the experiment lacks, as dropout. The variance of all seeds together, by which differences are
    read, gets as many degrees of freedom as a source, and what is left of the budget.

    ValueError where a source would get fewer than two.
    """
    count = len(sources)
    if count == 0 or len(set(sources)) < count or HARDWARE in sources:
        raise ValueError(
            f"sources must be one or more different streams, such as {', '.join(SOURCES)}, but "
            f"they are {', '.join(sources) or 'none'}; {HARDWARE} is repeats, and always in it."
        )
    if backgrounds is None:
        per_background = count + (2 if repeats is None else 1)
        backgrounds = max((budget - 1 - (repeats or 0)) // per_background, 2)
    if backgrounds < 1 or (repeats is not None and repeats < 0):
        raise ValueError(
            f"backgrounds must be at least 1 and repeats at least 0, but they are {backgrounds} "
            f"and {repeats}."
        )
    repeats = backgrounds if repeats is None else repeats
    twins = (budget - 1 - repeats) // (backgrounds * (count + 1))
    if backgrounds * twins < 2:
        least = 1 + repeats + max(backgrounds, 2) * (count + 1)
        raise ValueError(
            f"noise: {budget} runs are too few to tell {count} sources apart; allow {least} or "
            "more, or name fewer sources."
        )
    rest = budget - repeats - backgrounds * (1 + twins * count)
    fresh = itertools.count(first_seed + backgrounds + rest)  # seeds that no background has
    settings = []
    for background in range(backgrounds + rest):
        own = dict.fromkeys(sources, first_seed + background)
        settings.append(Setting(own, "background", background))
        if background < backgrounds:
            repeated = len(range(background, repeats, backgrounds))
            alone = [source for source in sources for _ in range(twins)]
            settings += [Setting({**own, s: next(fresh)}, s, background) for s in alone]
            settings += [Setting(own, HARDWARE, background)] * repeated
    return tuple(settings)


# ---- what the runs say ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Component:
    """What one source does to the figure.

    `deviation` is the standard deviation by this source, in the figure's unit, with its interval;
    `share` of the variance of all seeds together; shares need not sum to 1. It is read off `groups`
    of runs that share all other seeds. `identical`: in each group all runs gave the same figure, to
    the last bit, so that the source does nothing here.
    """

    source: str
    deviation: float
    interval: Interval
    share: float
    runs: int
    groups: int
    degrees_of_freedom: int
    identical: bool


@dataclass(frozen=True)
class Interaction:
    """How much of the variance comes of sources together rather than of any alone.

    `overlap` is by how much the sources' parts exceed the whole, hardware aside, as a share of the
    whole: an interaction of m sources is in the parts of all m, and so m - 1 times too often. All
    interactions together make up from overlap / (sources - 1) to overlap of the variance. Below 0
    it is what the sources leave unexplained: by chance, or because something else differed too.
    """

    overlap: float
    interval: Interval


@dataclass(frozen=True)
class Noise:
    """The noise of one experiment's figure, by source.

    `total` is of runs that differ in every seed, hardware included: what a comparison has to see
    through. `hardware` is None where no run was repeated; its part is then in all the others.
    `untested` are streams whose seed alone never changed, `fixed` those whose seed never changed at
    all (as that of the split): where the arms of a comparison vary it, they vary more. `failed`
    runs gave no figure; what is said holds for those that did.
    """

    mean: float
    total: Component
    sources: tuple[Component, ...]
    hardware: Component | None
    interaction: Interaction | None
    untested: tuple[str, ...]
    fixed: tuple[str, ...]
    failed: int

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers has to know, in sentences."""
        return sentences(self)


@dataclass(frozen=True)
class MeanSquare:
    """A pooled variance within groups; `groups` with at least two runs, `runs` in them."""

    value: float
    degrees_of_freedom: int
    groups: int
    runs: int
    identical: bool


def estimate(
    runs: Sequence[tuple[Seeds, float]],
    *,
    sources: Sequence[str] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Noise:
    """The variances by source, from runs as (seeds by stream, figure); nan: it gave none.

    The groups are found by the seeds alone, whoever planned the runs: for a source those that share
    all other seeds, for the hardware those that share all. By default a source is every stream
    that has more than one seed. ValueError where fewer than two runs differ in all of them.
    """
    finished = [(seeds, value) for seeds, value in runs if math.isfinite(value)]
    streams = dict.fromkeys(stream for seeds, _ in runs for stream in seeds)
    used = {stream: {seeds.get(stream) for seeds, _ in runs} for stream in streams}
    fixed = tuple(stream for stream in streams if len(used[stream]) == 1)
    sources = [s for s in streams if s not in fixed] if sources is None else sources
    missing = [source for source in sources if None in used.get(source, {None})]
    if missing or not sources:
        told = f"some runs have no seed of {', '.join(missing)}" if missing else "no seed changes"
        raise ValueError(f"noise: {told}; make the runs that `design` names.")
    apart = differing_in_all(finished, sources)
    whole, repeats = mean_square([apart]), mean_square(repeats_of(finished))
    if whole is None:
        raise ValueError(
            f"noise: {len(apart)} finished run differs from the others in all of "
            f"{', '.join(sources)}; two or more are needed for the variance of all together."
        )
    generator = np.random.default_rng(seed)
    all_draws, hardware_draws = draws(whole, generator), draws(repeats, generator)
    v, h = whole.value, repeats.value if repeats is not None else 0.0
    parts: dict[str, float] = {}
    spreads: dict[str, Draw] = {}
    components = []
    for source in sources:
        own = mean_square(twins_of(finished, source))
        if own is None:
            continue
        # Where nothing changes the hardware does not either, whatever it does elsewhere.
        parts[source] = 0.0 if own.identical else own.value - h
        spreads[source] = draws(own, generator) - (0 if own.identical else hardware_draws)
        components.append(component(source, own, parts[source], spreads[source], v, level))
    interaction = None
    if len(parts) == len(sources) > 1 and v > 0:
        overlap = (sum(parts.values()) - (v - h)) / v
        spread = (sum(spreads.values()) - (all_draws - hardware_draws)) / all_draws
        interaction = Interaction(overlap, ends(spread, level))
    return Noise(
        mean=float(np.mean(apart)),
        total=component("all", whole, v, all_draws, v, level),
        sources=tuple(components),
        hardware=None
        if repeats is None
        else component(HARDWARE, repeats, h, hardware_draws, v, level),
        interaction=interaction,
        untested=tuple(source for source in sources if source not in parts),
        fixed=fixed,
        failed=len(runs) - len(finished),
    )


def twins_of(runs: Sequence[tuple[Seeds, float]], source: str) -> list[list[float]]:
    """The figures of each group of runs that share all seeds but this one's, one for each seed."""
    groups: dict[frozenset[tuple[str, int]], dict[int, float]] = {}
    for seeds, value in runs:
        others = frozenset(seeds.items()) - {(source, seeds[source])}
        groups.setdefault(others, {}).setdefault(seeds[source], value)
    return [list(group.values()) for group in groups.values()]


def repeats_of(runs: Sequence[tuple[Seeds, float]]) -> list[list[float]]:
    """The figures of each group of runs that share all seeds."""
    groups: dict[frozenset[tuple[str, int]], list[float]] = {}
    for seeds, value in runs:
        groups.setdefault(frozenset(seeds.items()), []).append(value)
    return list(groups.values())


def differing_in_all(runs: Sequence[tuple[Seeds, float]], sources: Sequence[str]) -> list[float]:
    """The figures of runs of which no two share a seed of any source, the first ones first."""
    taken: dict[str, set[int]] = {source: set() for source in sources}
    found = []
    for seeds, value in runs:
        if all(seeds[source] not in taken[source] for source in sources):
            found.append(value)
            for source in sources:
                taken[source].add(seeds[source])
    return found


def mean_square(groups: Sequence[Sequence[float]]) -> MeanSquare | None:
    """The variance within the groups, pooled; None where no group has two runs."""
    larger = [np.asarray(group, dtype=float) for group in groups if len(group) > 1]
    if not larger:
        return None
    degrees = sum(len(group) - 1 for group in larger)
    identical = all(bool((group == group[0]).all()) for group in larger)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in larger)
    return MeanSquare(
        0.0 if identical else squares / degrees,
        degrees,
        len(larger),
        sum(len(group) for group in larger),
        identical,
    )


def draws(square: MeanSquare | None, generator: np.random.Generator) -> Draw:
    """What the true variance may be: draws of its generalized pivot, zeros where nothing varies."""
    if square is None or square.identical:
        return np.zeros(DRAWS)
    degrees = square.degrees_of_freedom
    return square.value * degrees / generator.chisquare(degrees, DRAWS)


def ends(spread: Draw, level: float) -> Interval:
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def component(
    source: str, square: MeanSquare, variance: float, spread: Draw, whole: float, level: float
) -> Component:
    within = ends(np.sqrt(np.maximum(spread, 0)), level)
    return Component(
        source=source,
        deviation=math.sqrt(max(variance, 0)),
        interval=within,
        share=max(variance, 0) / whole if whole > 0 else 0.0,
        runs=square.runs,
        groups=square.groups,
        degrees_of_freedom=square.degrees_of_freedom,
        identical=square.identical,
    )


def sentences(noise: Noise) -> list[str]:
    told = []
    hardware = noise.hardware
    if hardware is None:
        told.append(
            "No run was repeated with all seeds fixed: the part of the hardware is in every other."
        )
    elif hardware.identical:
        pairs = hardware.degrees_of_freedom
        told.append(
            f"Hardware: {pairs} of {pairs} repeats with all seeds fixed gave the same figure to "
            "the last bit, so its part is 0."
        )
    for each in noise.sources:
        if each.identical:
            told.append(
                f"{each.source}: no change of its seed changed the figure ({each.runs} runs); "
                "this experiment draws nothing there."
            )
    if any(each.groups == 1 for each in noise.sources):
        told.append(
            "A source was varied around one setting of the others' seeds only; around another it "
            "may do more or less."
        )
    if noise.interaction is not None and noise.interaction.interval.low > 0:
        told.append(
            f"The parts exceed the whole by {noise.interaction.overlap:.0%} of it: what sources do "
            "together is in the share of each."
        )
    if noise.interaction is not None and noise.interaction.interval.high < 0:
        told.append(
            f"{-noise.interaction.overlap:.0%} of the variance is explained by no source: "
            "something else differs between the runs."
        )
    if noise.fixed:
        told.append(f"The same in all runs, so not in these numbers: {', '.join(noise.fixed)}.")
    if noise.untested:
        told.append(f"Never varied alone: {', '.join(noise.untested)}.")
    if noise.failed > 0:
        plural = "run" if noise.failed == 1 else "runs"
        told.append(f"{noise.failed} {plural} gave no figure; the noise is that of the others.")
    return told
