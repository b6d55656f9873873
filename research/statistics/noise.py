"""Where the noise of one experiment comes from, and the smallest difference worth reading in it.

What is random in a training has sources: the initial weights, the order of the pictures, their
augmentation, dropout, and the hardware, which is what remains when every seed is fixed. `design`
says which runs to make: some in which all seeds differ (backgrounds), and of each one a twin for
every source, in which the seed of this source alone is another (Bouthillier et al., 2021,
"Accounting for variance in machine learning benchmarks", MLSys). `estimate` reads the variances
off the runs' figures, and `readable` what they mean for a comparison at n seeds.

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
from collections.abc import Callable, Mapping, Sequence
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

    `overlap` is by how much the sources' shares exceed the whole, as a share of it: an interaction
    of m sources is in the shares of all m, and so m - 1 times too often. `least` and `most` bound
    the share of all interactions that follows. `overlap` below 0, which no variance is, means that
    the runs are too few.
    """

    overlap: float
    interval: Interval
    least: float
    most: float


@dataclass(frozen=True)
class Noise:
    """The noise of one experiment's figure, by source.

    `total` is of runs that differ in every seed, hardware included: what a comparison has to see
    through. `hardware` is None where no run was repeated; its part is then in all the others.
    `untested` are streams whose seed alone never changed. `failed` runs gave no figure; what is
    said holds for those that did. `notes` say it in sentences.
    """

    mean: float
    total: Component
    sources: tuple[Component, ...]
    hardware: Component | None
    interaction: Interaction | None
    untested: tuple[str, ...]
    failed: int
    notes: tuple[str, ...]


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
    if sources is None:
        sources = [s for s in streams if len({seeds[s] for seeds, _ in runs if s in seeds}) > 1]
    missing = [s for s in sources if any(s not in seeds for seeds, _ in finished)]
    if missing or not sources:
        told = f"some runs have no seed of {', '.join(missing)}" if missing else "no seed changes"
        raise ValueError(f"noise: {told}; make the runs that `design` names.")
    apart = differing_in_all(finished, sources)
    if len(apart) < 2:
        raise ValueError(
            f"noise: {len(apart)} finished run differs in all of {', '.join(sources)} from the "
            "others; two or more are needed for the variance of all together."
        )
    generator = np.random.default_rng(seed)
    whole = mean_square([apart])
    repeats = mean_square(list(grouped(finished, lambda seeds: tuple(sorted(seeds.items())))))
    variance, hardware_draws = draws(whole, generator), draws(repeats, generator)
    h = repeats.value if repeats is not None else 0.0
    assert whole is not None
    v = whole.value
    components, parts, estimates = [], [], []
    for source in sources:
        own = mean_square(twins_of(finished, source))
        if own is None:
            continue
        spread = draws(own, generator) - (0 if own.identical else hardware_draws)
        estimates.append(0.0 if own.identical else own.value - h)
        parts.append(spread)
        components.append(component(source, own, estimates[-1], spread, v, level))
    untested = tuple(s for s in sources if s not in {each.source for each in components})
    interaction = None
    if not untested and len(sources) > 1 and v > 0:
        overlap = (sum(estimates) - (v - h)) / v
        spread = (sum(parts) - (variance - hardware_draws)) / variance
        interaction = Interaction(
            overlap,
            ends(spread, level),
            min(max(overlap / (len(sources) - 1), 0), 1),
            min(max(overlap, 0), 1),
        )
    noise = Noise(
        mean=float(np.mean(apart)),
        total=component("all", whole, v, variance, v, level),
        sources=tuple(components),
        hardware=None
        if repeats is None
        else component(HARDWARE, repeats, h, hardware_draws, v, level),
        interaction=interaction,
        untested=untested,
        failed=len(runs) - len(finished),
        notes=(),
    )
    return Noise(**{**vars(noise), "notes": tuple(sentences(noise))})


def twins_of(runs: Sequence[tuple[Seeds, float]], source: str) -> list[list[float]]:
    """The figures of each group of runs that share all seeds but this one's, one for each seed."""
    groups: dict[tuple[tuple[str, int], ...], dict[int, float]] = {}
    for seeds, value in runs:
        others = tuple(sorted((stream, s) for stream, s in seeds.items() if stream != source))
        groups.setdefault(others, {}).setdefault(seeds[source], value)
    return [list(group.values()) for group in groups.values()]


def grouped(
    runs: Sequence[tuple[Seeds, float]], key: Callable[[Seeds], object]
) -> list[list[float]]:
    groups: dict[object, list[float]] = {}
    for seeds, value in runs:
        groups.setdefault(key(seeds), []).append(value)
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
    """What a reader of the numbers has to know."""
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
    if noise.untested:
        told.append(f"Never varied alone: {', '.join(noise.untested)}.")
    if noise.failed > 0:
        plural = "run" if noise.failed == 1 else "runs"
        told.append(f"{noise.failed} {plural} gave no figure; the noise is that of the others.")
    return told


# ---- what it means for a comparison --------------------------------------------------------------


@dataclass(frozen=True)
class Readable:
    """Means of n runs each have to differ by more than this to be worth reading.

    In the figure's unit. `paired` is where both arms use the same seeds (common random numbers),
    None where nothing is known of their correlation. The intervals say where the limits would lie
    if the standard deviation were known exactly: they are as wide as it is uncertain.
    """

    n: int
    unpaired: float
    unpaired_interval: Interval
    paired: float | None
    paired_interval: Interval | None


def readable(
    total: Component,
    *,
    counts: Sequence[int] = range(1, 21),
    differences: Sequence[float] | None = None,
    correlation: float | None = None,
    alpha: float = 0.05,
) -> tuple[Readable, ...]:
    """The smallest difference of two means worth reading, for each number of seeds per arm.

    Two arms that do not differ come out further apart in a share `alpha` of comparisons only:
    t * deviation * sqrt(2 / n), with Student's t by the degrees of freedom of `total`, since the
    deviation is known from these runs and not from the arms (so that n = 1 has an answer). It
    assumes that both arms are as noisy as this experiment and their figures normal. A difference
    that is to be found with 80 % probability must be larger: pairs.py.

    `paired` takes the standard deviation of `differences`, of pairs of runs of two such arms with
    the same seeds, or else the `correlation` of such pairs that is assumed, which takes
    sqrt(1 - correlation) off.
    """
    from scipy import stats

    if correlation is not None and not -1 <= correlation <= 1:
        raise ValueError(f"correlation must be from -1 to 1, but it is {correlation}.")
    level = total.interval.level

    def limit(square: MeanSquare, factor: float) -> tuple[float, Interval]:
        degrees, deviation = square.degrees_of_freedom, math.sqrt(square.value)
        t = float(stats.t.ppf(1 - alpha / 2, degrees))
        known = float(stats.norm.ppf(1 - alpha / 2)) * deviation * factor
        tails = stats.chi2.ppf([(1 + level) / 2, (1 - level) / 2], degrees)
        low, high = (known * math.sqrt(degrees / float(tail)) for tail in tails)
        return t * deviation * factor, Interval(low, high, level)

    own = MeanSquare(total.deviation**2, total.degrees_of_freedom, 1, total.runs, total.identical)
    of_pairs = None if differences is None else mean_square([differences])
    found = []
    for n in counts:
        unpaired = limit(own, math.sqrt(2 / n))
        paired: tuple[float | None, Interval | None] = (None, None)
        if of_pairs is not None:
            paired = limit(of_pairs, math.sqrt(1 / n))
        elif correlation is not None:
            paired = limit(own, math.sqrt(2 * (1 - correlation) / n))
        found.append(Readable(n, *unpaired, *paired))
    return tuple(found)
