"""What speaks against reading a difference: each in a sentence or two, told beside the verdict."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from research.statistics.arms import Arm, Match, Setting, Trained, causes, origins_apart

if TYPE_CHECKING:
    from research.comparison.judging import Contrast

MOST = 4  # named one by one


def cautions_of(
    metric: str,
    arms: Sequence[Arm],
    contrasts: "Sequence[Contrast]",
    apart: Sequence[Setting],
    origins: Mapping[str, tuple[str, ...]],
    expected: Sequence[str],
) -> tuple[str, ...]:
    """All of them, what bears most on the verdict first; none for a clean comparison."""
    found = [
        *of_losses(metric, apart),
        *of_changes(contrasts, apart, origins, expected),
        *of_runs(arms, metric),
        *of_resumed(arms, metric),
        *of_repeats(arms, metric),
        *of_partners(contrasts, metric),
        *of_fixed_seeds(arms, metric),
        *of_beginnings(contrasts),
        *of_origins(origins),
        *of_looks(arms, metric, len(contrasts)),
    ]
    return tuple(dict.fromkeys(found))


# ---- the metric ----------------------------------------------------------------------------------


def of_losses(metric: str, apart: Sequence[Setting]) -> list[str]:
    """Where each arm is judged by a loss of its own."""
    losses = [each for each in apart if each.key.startswith("model.loss")]
    if not metric.endswith("/loss") or not losses:
        return []
    return [
        f"{metric} is what each run was trained for, and the arms' losses differ "
        f"({listed([each.key for each in losses])}): their figures say nothing of each other. "
        "Choose another by --metric."
    ]


# ---- what was changed ----------------------------------------------------------------------------


def of_changes(
    contrasts: "Sequence[Contrast]",
    apart: Sequence[Setting],
    origins: Mapping[str, tuple[str, ...]],
    expected: Sequence[str],
) -> list[str]:
    """Where the two arms of a comparison differ in more than one thing, or in nothing at all."""
    if not apart and not origins:
        return ["The arms have the same settings: all that differs between them is chance."]
    same = [each for each in contrasts if not each.apart and not origins_apart((each.a, each.b))]
    found = [
        f"{each.a.name} and {each.b.name} have the same settings: all that differs between them is "
        "chance."
        for each in same[:MOST]
    ]
    unmeant: dict[str, None] = {}
    several = 0
    for each in contrasts:
        changed = causes(each.apart)
        rest = [key for key in changed if not any(is_part(key, one) for one in expected)]
        if rest and len(changed) > 1:
            several += 1
            unmeant |= dict.fromkeys(rest)
    if not several:
        return found
    of_these = (
        "The arms" if len(contrasts) == 1 else f"In {several} of {len(contrasts)} comparisons"
    )
    whose = "differ" if len(contrasts) == 1 else "the arms differ"
    return [
        *found,
        f"{of_these} {whose} in more than one thing ({listed(list(unmeant))}), so the difference "
        "cannot be laid to any of them. What was meant to differ is said by --expect KEY.",
    ]


def is_part(key: str, expected: str) -> bool:
    return key == expected or key.startswith(f"{expected}.")


# ---- runs without a part in it -------------------------------------------------------------------


def of_runs(arms: Sequence[Arm], metric: str) -> list[str]:
    """Runs that failed, were stopped or pruned, still run, or lack the metric, arm by arm."""
    found = []
    for arm in arms:
        ended = [run for run in arm.runs if not run.finished]
        again = {run.seed_key for run in arm.measured(metric)}
        lost = [run for run in ended if run.seed_key not in again]
        counted = Counter(run.status for run in ended)
        if ended and len(ended) == len(arm.runs):
            seeds = listed([f"seed {run.seed_text}: {run.failure}" for run in ended])
            found.append(f"{arm.name}: no run finished, so it has no figure and no place. {seeds}.")
        elif ended:
            how = ", ".join(f"{number} {status}" for status, number in counted.items())
            made_up = len(ended) - len(lost)
            words = f"; {made_up} of these seeds finished in another run" if made_up else ""
            seeds = listed([f"seed {run.seed_text}: {run.failure}" for run in ended])
            found.append(
                f"{arm.name}: {len(ended)} of {len(arm.runs)} runs did not finish ({how}{words}) "
                f"and have no part in its mean, which may flatter it. {seeds}."
            )
        lacking = [run for run in arm.runs if run.finished and metric not in run.metrics]
        if lacking:
            found.append(
                f"{arm.name}: {len(lacking)} finished runs have no {metric} "
                f"({listed([run.run_name for run in lacking])})."
            )
    return found


def of_resumed(arms: Sequence[Arm], metric: str) -> list[str]:
    """Runs that went on with other settings than they began with."""
    found = []
    for arm in arms:
        for run in arm.measured(metric):
            if run.changes:
                found.append(
                    f"{arm.name}: {run.run_name} was resumed with changes "
                    f"({'; '.join(run.changes)}), and its settings are told as it began."
                )
    return found[:MOST] + [f"{len(found) - MOST} more runs were resumed so."] * (len(found) > MOST)


def of_repeats(arms: Sequence[Arm], metric: str) -> list[str]:
    found = []
    for arm in arms:
        measured = [run for run in arm.runs if run.finished and metric in run.metrics]
        extra = len(measured) - len(arm.measured(metric))
        if extra:
            found.append(
                f"{arm.name}: {extra} runs repeat a seed, or reached no finite {metric}; of each "
                "seed the last finite one counts."
            )
    return found


# ---- pairs ---------------------------------------------------------------------------------------


def of_partners(contrasts: "Sequence[Contrast]", metric: str) -> list[str]:
    """Which seeds have no partner in the other arm."""
    found = []
    for each in contrasts:
        alone = [(each.a, each.pairing.alone_a), (each.b, each.pairing.alone_b)]
        told = [f"{arm.name} {seeds_of(runs)}" for arm, runs in alone if runs]
        if told and each.difference.paired:
            found.append(f"Seeds without a partner, which are left out: {'; '.join(told)}.")
        elif told:
            found.append(
                f"{each.a.name} and {each.b.name} are not paired, for too few of their seeds "
                f"match: {'; '.join(told)}."
            )
    return found


def seeds_of(runs: Sequence[Trained]) -> str:
    return f"({listed([run.seed_text for run in runs])})"


def of_fixed_seeds(arms: Sequence[Arm], metric: str) -> list[str]:
    """Streams of random numbers that all runs of an arm share, though their seeds differ."""
    fixed: dict[str, list[str]] = {}
    for arm in arms:
        seeds = [run.seeds for run in arm.measured(metric)]
        streams = dict.fromkeys(stream for own in seeds for stream in own)
        same = [stream for stream in streams if len({own.get(stream) for own in seeds}) == 1]
        if len(seeds) > 1 and same:
            fixed.setdefault(listed(same), []).append(arm.name)
    return [
        f"{listed(names)}: all runs have the same seed of {streams} (data.seed or random.* is "
        "set), so the intervals do not contain what another would change."
        for streams, names in fixed.items()
    ]


def of_beginnings(contrasts: "Sequence[Contrast]") -> list[str]:
    """Whether the runs of a pair began with the same weights and pictures, as their hashes say."""
    paired = [each for each in contrasts if each.difference.paired]
    weights, batches = [each.weights for each in paired], [each.batches for each in paired]
    of_network = [keys_of(each, ("model.network",)) for each in paired]
    of_pictures = [keys_of(each, ("data", "trainer.", "scale_lr")) for each in paired]
    found = of_match(weights, "initial weights", of_network)
    found += of_match(batches, "first batches", of_pictures)
    pairs = sum(map(number_of, weights))
    unknown = max(sum(each.unknown for each in matches) for matches in (weights, batches))
    if unknown:
        found.append(
            f"{unknown} of {pairs} pairs recorded no hash of their initial weights and first "
            "batches: that they began alike is not proven."
        )
    return found


def number_of(match: Match) -> int:
    return match.equal + match.other + match.unknown


def keys_of(contrast: "Contrast", starts: tuple[str, ...]) -> list[str]:
    return [setting.key for setting in contrast.apart if setting.key.startswith(starts)]


def of_match(
    matches: Sequence[Match], what: str, explained_by: Sequence[Sequence[str]]
) -> list[str]:
    """Where pairs began otherwise, and whether a setting of their own two arms explains that."""
    pairs = sum(map(number_of, matches))
    explained, unexplained = 0, 0
    keys: dict[str, None] = {}
    for each, own in zip(matches, explained_by, strict=True):
        if each.other and own:
            explained += each.other
            keys |= dict.fromkeys(own)
        else:
            unexplained += each.other
    found = []
    if explained:
        found.append(
            f"{explained} of {pairs} pairs differ in their {what}, as they must where "
            f"{listed(list(keys))} differs: of that the pairs have nothing in common."
        )
    if unexplained:
        found.append(
            f"{unexplained} of {pairs} pairs differ in their {what}, which no setting explains: "
            "other code, versions or pictures. They are pairs by their seeds alone."
        )
    return found


# ---- what the runs stood on ----------------------------------------------------------------------


def of_origins(origins: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Code, device, versions that are not the same for all runs; other pictures within pairs."""
    found = []
    if "code" in origins:
        found.append(
            "The runs were not all made by the same code, so it may have its part in the "
            "difference; `git diff` between their commits shows what it is."
        )
    rest = [what for what in origins if what not in ("code", "pictures")]
    told = [f"{what}: {listed(origins[what])}" for what in rest]
    if told:
        found.append(f"The runs stood on different things. {'; '.join(told)}.")
    if "pictures" in origins:
        found.append(
            "Runs with the same seeds did not train and validate on the same pictures "
            f"({listed(origins['pictures'])})."
        )
    return found


# ---- looks at test -------------------------------------------------------------------------------


def of_looks(arms: Sequence[Arm], metric: str, comparisons: int) -> list[str]:
    """Where the test pictures were scored more than once, or decide among several arms."""
    found = []
    for arm in arms:
        often = [run for run in arm.runs if run.test_looks > 1]
        if often:
            most = max(run.test_looks for run in often)
            found.append(
                f"{arm.name}: the test pictures were scored more than once with "
                f"{listed([run.run_name for run in often])} (up to {most} times). What was chosen "
                "after a look at them makes test results too good."
            )
    if metric.startswith("test/") and comparisons > 1:
        found.append(
            f"{comparisons} comparisons are decided by the test pictures. Who then keeps the best "
            "arm has chosen on test: its own test figure is too good, and another test is due."
        )
    return found


def listed(names: Sequence[str]) -> str:
    """The first few by name, the others counted."""
    more = len(names) - MOST
    shown = list(names) if more <= 1 else list(names[:MOST])
    return f"{', '.join(shown)} and {more} more" if more > 1 else ", ".join(shown)
