"""Whether arms can be compared, by which metric, how far they are apart, what speaks against it.

    judgement = judge(gathered, Question())

What cannot be compared at all is refused in a sentence (ConfigurationError). All else is told as a
caution beside the verdict: nothing is left out in silence.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from research.comparison.cautions import cautions_of
from research.comparison.gathering import Aim, Gathered
from research.comparison.grouping import IGNORED
from research.configuration.compose import ConfigurationError, nearest
from research.statistics.arms import (
    DERIVED,
    Arm,
    Match,
    Pairing,
    Setting,
    Trained,
    match,
    origins_apart,
    pair,
    settings_apart,
)
from research.statistics.difference import Difference
from research.statistics.report.numbers import is_share
from research.statistics.several import Ranked, compare_several, rank
from research.statistics.verdict import Finding, finding, remarks, verdict

BEGINNINGS = "initial_weights", "first_batches"
VAL = "val/accuracy"
MOST_NAMED = 6
LOWER_IS_BETTER = (
    *("loss", "error", "brier", "likelihood", "calibration", "seconds", "epoch", "parameters"),
)


@dataclass(frozen=True)
class Question:
    """What is asked of the arms.

    `metric`: None takes val/accuracy, or what the search was for that the arms come from; and that
    figure of the test pictures where these were scored once with every run. `margin` is the
    smallest difference that would matter, in the metric's own unit; without one no two arms are
    called equivalent. `baseline` names the arm that all others are compared with; `expected` the
    settings that are meant to differ.
    """

    metric: str | None = None
    level: float = 0.95
    margin: float | None = None
    baseline: str | None = None
    expected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standing:
    """An arm with the runs that have the metric, their mean, and the places it may truly have."""

    arm: Arm
    measured: tuple[Trained, ...]
    ranked: Ranked

    @property
    def left_out(self) -> tuple[Trained, ...]:
        """The runs that have no part in the mean."""
        return tuple(run for run in self.arm.runs if run not in self.measured)

    @property
    def test_looks(self) -> int:
        return sum(run.test_looks for run in self.arm.runs)


@dataclass(frozen=True)
class Contrast:
    """How far arm B lies from arm A, in numbers and words, and whether its pairs began alike.

    `apart` is in what settings these two differ, whatever the others of a comparison do.
    """

    a: Arm
    b: Arm
    apart: tuple[Setting, ...]
    pairing: Pairing
    weights: Match
    batches: Match
    difference: Difference
    finding: Finding
    verdict: str


@dataclass(frozen=True)
class Judgement:
    """All that came of a comparison.

    `arms` are as they were named, which is how `apart` has its values; `standings` best first, of
    those that have a finished run.
    `cautions` speak against reading the difference as that of one change, `remarks` say how far the
    statistics reach, `notes` where the arms came from.

    `why_metric` says in words why this metric decides.
    """

    metric: str
    why_metric: str
    higher_is_better: bool
    question: Question
    baseline: str | None
    arms: tuple[Arm, ...]
    standings: tuple[Standing, ...]
    contrasts: tuple[Contrast, ...]
    apart: tuple[Setting, ...]
    origins: dict[str, tuple[str, ...]]
    cautions: tuple[str, ...]
    remarks: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def lost(self) -> tuple[Arm, ...]:
        """The arms of which no run finished."""
        standing = {each.arm.name for each in self.standings}
        return tuple(arm for arm in self.arms if arm.name not in standing)

    @property
    def shown(self) -> tuple[Contrast, ...]:
        """The comparisons that are told one by one: with the baseline, or with the best arm."""
        best = self.standings[0].arm
        with_best = tuple(each for each in self.contrasts if each.b is best)
        return self.contrasts if self.baseline is not None else with_best

    @property
    def headline(self) -> str:
        """The one verdict, or what came of several in a sentence."""
        if len(self.shown) == 1:
            return self.shown[0].verdict
        return summary(self.shown, self.baseline)


def judge(gathered: Gathered, question: Question) -> Judgement:
    """The verdicts on these arms, with all that is to be known of them."""
    arms = gathered.arms
    lasting = lasting_of(arms, question.baseline)
    refuse_unknown(question.expected, keys_of(arms))
    metric, why = choose_metric(lasting, question.metric, gathered.aims)
    higher = is_higher_better(metric, gathered.aims)
    apart = settings_apart(arms, IGNORED)
    origins = origins_apart(arms)
    expected = (*question.expected, *gathered.meant)
    refuse_other_data(arms, origins, expected)
    standings = ranked(lasting, metric, question.level, higher)
    baseline = baseline_of(lasting, question)
    contrasts = contrasts_of(standings, baseline, metric, question, higher)
    cautions = cautions_of(metric, arms, contrasts, apart, origins, expected)
    return Judgement(
        metric,
        why,
        higher,
        question,
        baseline,
        tuple(arms),
        standings,
        contrasts,
        tuple(apart),
        origins,
        cautions,
        remarks_on(contrasts, metric, question.level),
        gathered.notes,
    )


# ---- what cannot be compared ---------------------------------------------------------------------


def lasting_of(arms: Sequence[Arm], baseline: str | None) -> list[Arm]:
    """The arms with a finished run; ConfigurationError where these are not two, or not the
    baseline."""
    lasting = [arm for arm in arms if any(run.finished for run in arm.runs)]
    for arm in arms:
        if arm not in lasting and (len(lasting) < 2 or baseline in (arm.name, arm.source)):
            ends = ", ".join(f"{run.run_name} {run.status}: {run.failure}" for run in arm.runs[:3])
            more = f" and {len(arm.runs) - 3} more" if len(arm.runs) > 3 else ""
            raise ConfigurationError(
                f"{arm.name} has no finished run, so there is nothing to compare ({ends}{more})."
            )
    return lasting


def refuse_unknown(expected: Sequence[str], keys: Collection[str]) -> None:
    """ConfigurationError for what is expected to differ and is no setting of any arm."""
    known = {*keys, *(start for key in keys for start in starts_of(key))}
    for each in expected:
        if each not in known:
            ending = sorted(key for key in known if key.endswith(f".{each}"))
            near = f"; did you mean {ending[0]}?" if ending else nearest(each, sorted(known))
            raise ConfigurationError(
                f"expect: no arm has a setting {each}{near} Expected are "
                "settings of research.fit, or the first part of their keys (data, optimizer)."
            )


def keys_of(arms: Sequence[Arm]) -> set[str]:
    return {key for arm in arms for run in arm.runs for key in run.settings}.difference(DERIVED)


def starts_of(key: str) -> list[str]:
    """`a` and `a.b` of `a.b.c`."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def refuse_other_data(
    arms: Sequence[Arm], origins: dict[str, tuple[str, ...]], expected: Sequence[str]
) -> None:
    """ConfigurationError where arms were tested on other pictures, unless `data` may differ."""
    for what in ("data set", "test pictures"):
        values = [value for value in origins.get(what, ()) if value != "?"]
        if len(values) > 1 and "data" not in expected:
            which = "; ".join(f"{arm.name} on {', '.join(values_in(arm, what))}" for arm in arms)
            raise ConfigurationError(
                f"The arms were tested on other pictures ({what}: {which}), so their figures say "
                "nothing of each other. Where other data is what was changed: --expect data."
            )


def values_in(arm: Arm, what: str) -> list[str]:
    return list(dict.fromkeys(run.origins.get(what, "?") for run in arm.runs))


# ---- the metric ----------------------------------------------------------------------------------


def choose_metric(
    arms: Sequence[Arm], asked: str | None, aims: Sequence[Aim] = ()
) -> tuple[str, str]:
    """The metric that decides, and why it does; ConfigurationError where not all arms have it."""
    common = common_metrics(arms)
    if asked is not None:
        if asked not in common:
            lacking = [arm.name for arm in arms if not arm.measured(asked)]
            raise ConfigurationError(
                f"metric: {', '.join(lacking)} has no {asked}{nearest(asked, common)} All arms "
                f"have {', '.join(told_metrics(common)) or 'none in common'}."
            )
        return asked, "as asked"
    if len(aims) > 1:
        told = ", ".join(dict.fromkeys(aim.metric for aim in aims))
        raise ConfigurationError(
            f"metric: the searches were for different things ({told}); say by --metric NAME which "
            "decides."
        )
    aim = aims[0].metric if aims else VAL
    purpose = "" if aim == VAL else "the search was for it, and "
    if aim in common and not aim.startswith("val/"):
        return aim, "the search was for it"
    test = on_test(aim)
    finished = [run for arm in arms for run in arm.runs if run.finished]
    if test in common and all(test in run.metrics and run.test_looks == 1 for run in finished):
        return test, f"{purpose}the test pictures were scored once with every run"
    if aim in common:
        times = {run.test_looks for run in finished}
        if times == {0}:
            why = "no run has looked at the test pictures"
        elif min(times) == 0:
            why = "not every run was scored on the test pictures"
        else:
            why = "the test pictures were scored more than once, and test no longer decides"
        return aim, f"{purpose}{why}"
    if not told_metrics(common):
        raise ConfigurationError(
            "The arms have no metric in common: "
            + "; ".join(
                f"{arm.name} has {', '.join(told_metrics(common_metrics([arm])))}" for arm in arms
            )
            + "."
        )
    raise ConfigurationError(
        f"metric: the arms have no {aim} in common; choose by --metric one of "
        f"{', '.join(told_metrics(common))}."
    )


def common_metrics(arms: Sequence[Arm]) -> list[str]:
    """The metrics of which every arm has a figure."""
    named = dict.fromkeys(name for arm in arms for run in arm.runs for name in run.metrics)
    each = [{name for name in named if arm.measured(name)} for arm in arms]
    return sorted(set.intersection(*each))


def told_metrics(names: Sequence[str]) -> list[str]:
    """Those that may decide: no figures of single classes, nothing of the last epoch's pace."""
    return [name for name in names if name.count("/") == 1 and not name.startswith("best_val/")]


def on_test(metric: str) -> str:
    """The same figure of the test pictures."""
    return f"test/{metric.removeprefix('val/')}"


def is_higher_better(metric: str, aims: Sequence[Aim] = ()) -> bool:
    """As a search says of what it is for, and else by the metric's name."""
    for aim in aims:
        if metric in (aim.metric, on_test(aim.metric)):
            return not aim.is_minimized
    name = metric.rpartition("/")[2]
    return not any(word in name for word in LOWER_IS_BETTER)


# ---- the differences -----------------------------------------------------------------------------


def ranked(
    arms: Sequence[Arm], metric: str, level: float, higher_is_better: bool
) -> tuple[Standing, ...]:
    """Each arm's mean over its seeds, the best first."""
    by_name = {arm.name: arm for arm in arms}
    values = {name: arm.values(metric) for name, arm in by_name.items()}
    order = rank(values, level=level, higher_is_better=higher_is_better)
    return tuple(
        Standing(by_name[each.name], by_name[each.name].measured(metric), each) for each in order
    )


def baseline_of(arms: Sequence[Arm], question: Question) -> str | None:
    """The name of the arm that all others are compared with; None: every arm with every other."""
    if question.baseline is not None:
        named = [arm.name for arm in arms if question.baseline in (arm.name, arm.source)]
        if len(named) != 1:
            names = [arm.name for arm in arms]
            raise ConfigurationError(
                f"baseline: there is no one arm {question.baseline}"
                f"{nearest(question.baseline, names)} There are {', '.join(names)}."
            )
        return named[0]
    return arms[0].name if len(arms) == 2 else None


def contrasts_of(
    standings: Sequence[Standing],
    baseline: str | None,
    metric: str,
    question: Question,
    higher_is_better: bool,
) -> tuple[Contrast, ...]:
    """Every comparison that counts, corrected for their number (Holm), the best arm's first.

    Without a baseline that is every arm with every other, for which of them is the best was not
    said before; B is the better of the two.
    """
    order = [standing.arm.name for standing in standings]
    by_name = {standing.arm.name: standing.arm for standing in standings}
    values = {name: by_name[name].values(metric) for name in reversed(order)}
    compared = compare_several(
        values, baseline, level=question.level, higher_is_better=higher_is_better
    )
    compared.sort(key=lambda each: (order.index(each.name_b), order.index(each.name_a)))
    alpha, share = 1 - question.level, is_share(metric)
    contrasts = []
    for each in compared:
        a, b = by_name[each.name_a], by_name[each.name_b]
        pairing = pair(a, b, metric)
        words = verdict(
            a.name,
            b.name,
            each.difference,
            unit="points" if share else "",
            scale=100 if share else 1,
            alpha=alpha,
            margin=question.margin,
        )
        found = finding(each.difference, alpha=alpha, margin=question.margin)
        weights, batches = (match(pairing.pairs, what) for what in BEGINNINGS)
        apart = tuple(settings_apart((a, b), IGNORED))
        contrasts.append(
            Contrast(a, b, apart, pairing, weights, batches, each.difference, found, words)
        )
    return tuple(contrasts)


def remarks_on(contrasts: Sequence[Contrast], metric: str, level: float) -> tuple[str, ...]:
    """What is to be known of a single comparison besides its verdict."""
    if len(contrasts) != 1:
        return ()
    unit, scale = ("points", 100) if is_share(metric) else ("", 1)
    return tuple(remarks(contrasts[0].difference, unit=unit, scale=scale, alpha=1 - level))


def summary(contrasts: Sequence[Contrast], baseline: str | None) -> str:
    """What came of several comparisons with one arm: who is better, worse, or not told from it."""
    found: dict[Finding, list[str]] = {}
    for each in contrasts:
        other = each.b if baseline is not None else each.a
        found.setdefault(each.finding, []).append(other.name)
    if baseline is not None:
        said = {
            "better": f"better than {baseline}",
            "worse": f"worse than {baseline}",
            "equivalent": f"equivalent to {baseline}",
            "unclear": f"not told from {baseline}",
        }
        parts = [f"{words}: {listed(found[key])}" for key, words in said.items() if key in found]
        return capital("; ".join(parts))
    best = contrasts[0].b.name
    parts = []
    if "better" in found:
        parts.append(f"better than {listed(found['better'])}")
    if "equivalent" in found:
        parts.append(f"equivalent to {listed(found['equivalent'])}")
    if "unclear" in found:
        parts.append(f"not told from {listed(found['unclear'])}")
    if "worse" in found:  # means are over all runs, differences over the seeds of both
        parts.append(f"worse than {listed(found['worse'])} on the seeds that both have")
    return f"{best} has the best mean; it is {'; '.join(parts)}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def listed(names: Sequence[str]) -> str:
    """The names in a sentence; of many the first few, the others counted."""
    more = len(names) - MOST_NAMED
    shown = list(names) if more <= 1 else [*names[:MOST_NAMED], f"{more} more"]
    *firsts, last = shown
    return f"{', '.join(firsts)} and {last}" if firsts else last
