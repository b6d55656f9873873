"""Several arms at once: every comparison corrected for the others, and a ranking that admits ties.

Of twenty comparisons of equal arms one comes out below 5 % by chance.  Holm's correction (Holm,
1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics
6; statsmodels' multipletests) keeps the chance of any such error at 5 %, whatever the arms have in
common.  Intervals stay those of the single comparison; those by which two arms may be called
equivalent are `simultaneous`, at a level of 1 - 5 % / comparisons, so that this errs as rarely.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from research.statistics.difference import Difference
from research.statistics.interval import Interval
from research.statistics.mean import LEVEL, mean_of
from research.statistics.paired import compare_paired, finite
from research.statistics.pairs import ALPHA, pairs_needed
from research.statistics.unpaired import compare_unpaired

# The values of an arm by what its runs are paired by: the seed, or the seeds of all streams.
Values = Mapping[Hashable, float]


@dataclass(frozen=True)
class Comparison:
    """Arm B against arm A, by their names; the difference is B minus A."""

    name_a: str
    name_b: str
    difference: Difference


@dataclass(frozen=True)
class Ranked:
    """An arm in the order of the means, best first.

    The true place lies between `best_place` and `worst_place`, counted from 1: at 95 % for all arms
    together.  `interval` is of the arm's own mean, None with a single run.
    """

    name: str
    mean: float
    interval: Interval | None
    standard_deviation: float
    n: int
    best_place: int
    worst_place: int


def compare_arms(
    a: Values,
    b: Values,
    *,
    level: float = LEVEL,
    seed: int = 0,
    higher_is_better: bool = True,
    comparisons: int = 1,
) -> Difference:
    """B minus A: over the seeds that both have where these are 2 or more, else unpaired.

    Of arms with one run each that share its seed, it is that single pair.  `comparisons` are all
    that are made together; `correct` adjusts their p-values.
    """
    shared = [key for key in a if key in b]
    if len(shared) >= 2 or len(a) == len(b) == len(shared) == 1:
        ones, others = [a[key] for key in shared], [b[key] for key in shared]
        return compare_paired(
            ones,
            others,
            level=level,
            seed=seed,
            higher_is_better=higher_is_better,
            comparisons=comparisons,
        )
    return compare_unpaired(
        list(a.values()),
        list(b.values()),
        level=level,
        higher_is_better=higher_is_better,
        comparisons=comparisons,
    )


def compare_several(
    arms: Mapping[str, Values],
    baseline: str | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
    higher_is_better: bool = True,
) -> list[Comparison]:
    """Every other arm against the baseline, or without one all pairs of arms; Holm-corrected."""
    if len(arms) < 2:
        raise ValueError(f"A comparison needs two arms or more, but there are {len(arms)}.")
    if baseline is not None and baseline not in arms:
        raise ValueError(
            f"The baseline {baseline!r} is none of the arms; these are {', '.join(arms)}."
        )
    for name, values in arms.items():
        finite(name, list(values.values()))
    if baseline is None:
        names = list(combinations(arms, 2))
    else:
        names = [(baseline, name) for name in arms if name != baseline]
    differences = [
        compare_arms(
            arms[a],
            arms[b],
            level=level,
            seed=seed,
            higher_is_better=higher_is_better,
            comparisons=len(names),
        )
        for a, b in names
    ]
    return [
        Comparison(a, b, difference)
        for (a, b), difference in zip(names, correct(differences, alpha=1 - level), strict=True)
    ]


def correct(differences: Sequence[Difference], *, alpha: float = ALPHA) -> list[Difference]:
    """The same differences with Holm's adjusted p-values, if there is more than one.

    Their `pairs_needed` are for the first and strictest of Holm's steps, a level of alpha over the
    number of comparisons, and so rather too many than too few.
    """
    from statsmodels.stats.multitest import multipletests

    if len(differences) < 2:
        return list(differences)
    adjusted = multipletests([each.p_value for each in differences], alpha, method="holm")[1]
    return [
        replace(
            each,
            adjusted_p_value=float(p_value),
            comparisons=len(differences),
            pairs_needed=pairs_needed(
                each.estimate,
                each.standard_deviation,
                alpha=alpha / len(differences),
                paired=each.paired,
            ),
        )
        for each, p_value in zip(differences, adjusted, strict=True)
    ]


def rank(
    arms: Mapping[str, Values],
    *,
    level: float = LEVEL,
    seed: int = 0,
    higher_is_better: bool = True,
) -> list[Ranked]:
    """The arms by their means, best first, with the places that each may truly have.

    An arm's best place is one behind all arms that are better by a Holm-corrected comparison of all
    pairs, its worst one before all that are worse so (as Al Mohamad, Goeman and van Zwet, 2022,
    "Simultaneous confidence intervals for ranks", Biometrics 78, do with Tukey's test).
    """
    better, worse = dict.fromkeys(arms, 0), dict.fromkeys(arms, 0)
    if len(arms) > 1:
        for each in compare_several(
            arms, level=level, seed=seed, higher_is_better=higher_is_better
        ):
            if each.difference.deciding_p_value > 1 - level:
                continue
            b_wins = (each.difference.estimate > 0) == higher_is_better
            winner, loser = (each.name_b, each.name_a) if b_wins else (each.name_a, each.name_b)
            worse[winner] += 1
            better[loser] += 1
    ranked = []
    for name, values in arms.items():
        mean = mean_of(finite(name, list(values.values())), level=level, seed=seed)
        ranked.append(
            Ranked(
                name=name,
                mean=mean.value,
                interval=mean.interval,
                standard_deviation=mean.standard_deviation,
                n=len(values),
                best_place=1 + better[name],
                worst_place=len(arms) - worse[name],
            )
        )
    return sorted(ranked, key=lambda each: each.mean, reverse=higher_is_better)
