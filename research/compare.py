"""Was it real? Which of several ways to train is better, by how much, and how sure that is.

    python -m research.compare A B [C ...] [--option value ...]

`HELP` below is what `--help` prints; MLflow, scipy and torch are imported only to compare.
"""

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.command import exit_code_of, run_as_script
from research.configuration.compose import ConfigurationError, nearest, read_command_line
from research.tracking.store import resolve_tracking_uri

if TYPE_CHECKING:
    from research.comparison.judging import Judgement
    from research.comparison.training import Means
    from research.statistics.report.content import Report
    from research.tracking.arms import Found
    from research.tracking.run import Recorder

HELP = """\
python -m research.compare A B [C ...] [--option value ...]
python -m research.compare FILE FILE [FILE ...] [--seeds N] [--key value ...]
python -m research.compare SEARCH --confirm K [--seeds N]
python -m research.compare RUN --noise [--runs N]

Say whether a difference is real: arms paired by seed, with intervals, tests, and a verdict.

  A B ...            runs (id, its first digits, name), parents of several runs (fit --seeds, an
                     earlier comparison), searches; runs that differ in their seed alone are one arm
  FILE ...           experiments, which are trained first, all on the same seeds, side by side
  --key value        a setting of research.fit for all of these
  --seeds N          how many seeds, or which (1,2,3), for what is trained (5)
  --confirm K        train the best K of a search on fresh seeds, and test each run once
  --noise            train one run or file N times: how much do weights, order, augmentation,
                     dropout and the hardware each change it, and what can be read at n seeds?
  --runs N           how many, for that (25)
  --workers N        processes that train (one for each GPU, or one)

  --metric NAME      what decides (test/accuracy where test was scored once, else val/accuracy)
  --baseline A       the arm that all others are compared with (two arms: the first; else all pairs)
  --margin SIZE      the smallest difference that would matter, as 0.002: allows "equivalent"
  --level 0.95       of intervals and verdicts
  --expect KEY       a setting that is meant to differ (again for more)
  --cross_losses     score every trained network under every loss, on its validation pictures
  --output FOLDER    for the report (comparisons/NAME)
  --tracking_uri URI where runs are (else MLFLOW_TRACKING_URI, mlflow.db)
  --trust            let files, and runs of another store, name classes of any package

Examples
  python -m research.compare adam sgd --baseline sgd
  python -m research.compare experiments/cnn.yaml experiments/resnet9.yaml --seeds 8
  python -m research.compare loss_optimizer_lr --confirm 3
"""

VALUES = ("seeds", "confirm", "runs", "workers", "metric", "baseline", "margin", "level")
PLACES = ("output", "tracking_uri")
SWITCHES = ("noise", "cross_losses", "trust")
SEEDS = "5"
RUNS = 25
FOLDER = "comparisons"
RECORDED = "comparison"  # the folder of the report among a parent run's files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code_of(lambda: run(typed))


def run(arguments: Sequence[str]) -> int:
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(HELP, end="")
        return 0 if arguments else 2
    options, settings = read_options(arguments)
    files = files_in(options.arms)
    refuse(options, settings, files)
    uri = resolve_tracking_uri(options.tracking_uri)
    if uri is None:
        raise ConfigurationError("tracking_uri is empty, so there is no store to compare runs of.")
    command = shlex.join(["python", "-m", "research.compare", *arguments])
    with recorder() as recording:
        if options.noise:
            return measure_noise(options, settings, files, uri, recording, command)
        return compare(options, settings, files, uri, recording, command)


# ---- what was typed ------------------------------------------------------------------------------


def read_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What was typed, and the settings of the training among it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*VALUES, *PLACES):
        parser.add_argument(f"--{name}")
    parser.add_argument("--expect", action="append", default=[])
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    try:
        options, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        name = str(error.argument_name)
        raise ConfigurationError(f"{name}: a value is missing; write {name} VALUE.") from error
    options.arms, settings = [], []
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            options.arms.append(token)
            continue
        settings.append(token)
        if "=" not in token and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return options, settings


def files_in(arms: Sequence[str]) -> list[Path]:
    """The experiments among what was named; ConfigurationError for a file that is not there."""
    files = [Path(arm) for arm in arms if arm.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            near = nearest(file.name, (path.name for path in sorted(file.parent.glob("*.y*ml"))))
            raise ConfigurationError(f"there is no file {file}{near}")
    return files


def refuse(options: argparse.Namespace, settings: Sequence[str], files: Sequence[Path]) -> None:
    """ConfigurationError for what does not go together, or says nothing."""
    arms, faults = options.arms, []
    if not arms:
        faults.append("Nothing was named to compare: python -m research.compare A B.")
    if files and len(files) < len(arms):
        faults.append(
            "Files are trained and runs are read; name either, or compare the files first and then "
            "the parent run that they leave."
        )
    if settings and not files:
        what = settings[0].partition("=")[0]
        known = [f"--{name}" for name in (*VALUES, *PLACES, "expect", *SWITCHES)]
        faults.append(
            f"{what}: there is no such option{nearest(what, known)} Settings are for files; a run "
            "keeps its own."
        )
    if (options.noise or options.confirm is not None) and len(arms) > 1:
        which = "--noise" if options.noise else "--confirm"
        faults.append(f"{which} is of one, and {len(arms)} were named: {', '.join(arms)}.")
    if len(files) == 1 and not options.noise:
        faults.append(f"{files[0]} is a single arm; name another to compare it with.")
    if options.confirm is not None and (files or options.noise):
        faults.append("confirm: it trains the best of a search again; name the search alone.")
    trains = bool(files) or options.confirm is not None
    if options.seeds is not None and (not trains or options.noise):
        faults.append(
            "seeds: they are for what is trained: files, or --confirm. Runs have theirs; more are "
            "made by python -m research.fit --seeds N."
        )
    if options.runs is not None and not options.noise:
        faults.append("runs: it is for --noise.")
    faults += numbers_refused(options)
    if faults:
        raise ConfigurationError(faults)


def numbers_refused(options: argparse.Namespace) -> list[str]:
    faults = []
    for name in ("confirm", "runs", "workers"):
        text = getattr(options, name)
        if text is not None and not (text.isdecimal() and 1 <= int(text) <= 1000):
            faults.append(f"{name}: expected a whole number from 1 on, came {text!r}.")
    for name, most in (("level", 1.0), ("margin", float("inf"))):
        text = getattr(options, name)
        if text is not None and not is_between(text, most):
            bound = "a number between 0 and 1" if most == 1 else "a number above 0"
            faults.append(f"{name}: expected {bound}, came {text!r}.")
    return faults


def is_between(text: str, most: float) -> bool:
    try:
        return 0 < float(text) < most
    except ValueError:
        return False


# ---- comparing -----------------------------------------------------------------------------------


def compare(
    options: argparse.Namespace,
    settings: Sequence[str],
    files: Sequence[Path],
    uri: str,
    recorder: "Recorder",
    command: str,
) -> int:
    """Train what is to be trained, read the arms, print the verdict, write the report."""
    from research.tracking.arms import read

    found = (
        [read(uri, trained(options, settings, files, uri, recorder, command))]
        if (files or options.confirm is not None)
        else [read(uri, name) for name in dict.fromkeys(options.arms)]
    )
    from research.comparison.account import report_of
    from research.comparison.gathering import gather
    from research.comparison.judging import Question, judge
    from research.comparison.screen import screen
    from research.comparison.searching import search_part

    gathered = gather(found)
    question = Question(
        options.metric,
        level_of(options),
        None if options.margin is None else float(options.margin),
        options.baseline,
        tuple(options.expect),
    )
    judgement = judge(gathered, question)
    print(screen(judgement))
    searched = search_part(gathered.searches[0], question.level) if gathered.searches else None
    report = report_of(judgement, title_of(judgement, found), command, searched)
    if options.cross_losses:
        report = with_cross_losses(report, judgement, uri, options.trust)
    parent = found[0] if len(found) == 1 else None
    publish(report, name_of(judgement, found), options, parent, uri, recorder)
    return 0


def trained(
    options: argparse.Namespace,
    settings: Sequence[str],
    files: Sequence[Path],
    uri: str,
    recorder: "Recorder",
    command: str,
) -> str:
    """The id of the parent run below which the arms were trained."""
    from research.comparison.training import confirm, train_files
    from research.repetition.seeds import read_seeds
    from research.tracking.arms import read

    seeds = read_seeds(options.seeds or SEEDS)
    means = means_of(options, uri, recorder, command)
    if files:
        came = train_files(files, read_command_line(settings), seeds, means)
    else:
        search = read(uri, options.arms[0])
        if not search.is_search:
            raise ConfigurationError(
                f"confirm: {search.run.described()} is no search; --confirm trains the best of one."
            )
        came = confirm(search, int(options.confirm), seeds, means)
    for note in came.notes:
        print(note, file=sys.stderr)
    assert came.parent_run_id is not None
    return came.parent_run_id


def means_of(options: argparse.Namespace, uri: str, recorder: "Recorder", command: str) -> "Means":
    from research.checkpoint import is_own_store
    from research.comparison.training import Means

    workers = None if options.workers is None else int(options.workers)
    return Means(uri, recorder, command, workers, options.trust or is_own_store(uri))


def with_cross_losses(report: "Report", judgement: "Judgement", uri: str, trust: bool) -> "Report":
    """The report with every trained network scored under every loss, on validation pictures."""
    from dataclasses import replace

    from research.checkpoint import is_own_store
    from research.statistics.cross_loss import Recorded, score_recorded
    from research.tracking.runs import find_run

    trusted = trust or is_own_store(uri)
    recorded = [
        Recorded(standing.arm.name, find_run(uri, run.run_id).checkpoint(), trusted)
        for standing in judgement.standings
        for run in standing.measured
    ]
    return replace(report, cross_losses=score_recorded(recorded))


def measure_noise(
    options: argparse.Namespace,
    settings: Sequence[str],
    files: Sequence[Path],
    uri: str,
    recorder: "Recorder",
    command: str,
) -> int:
    """Train one experiment over and over, and print which source of noise does how much."""
    from research.comparison.noise import noise_of
    from research.comparison.training import again, configured, train_noise
    from research.tracking.arms import read

    means = means_of(options, uri, recorder, command)
    if files:
        configuration = configured(read_command_line(settings), files[0], means)
        name = files[0].stem
    else:
        asked = read(uri, options.arms[0])
        configuration, name = again(asked.runs[0].trained.run_id, {}, means), asked.run.run_name
    came = train_noise(configuration, int(options.runs or RUNS), means, name)
    for note in came.notes:
        print(note, file=sys.stderr)
    assert came.parent_run_id is not None
    found = read(uri, came.parent_run_id)
    told, report = noise_of(found, options.metric, level_of(options), command)
    print(told)
    publish(report, f"{name}-noise", options, found, uri, recorder)
    return 0


def level_of(options: argparse.Namespace) -> float:
    return 0.95 if options.level is None else float(options.level)


@contextlib.contextmanager
def recorder() -> "Iterator[Recorder]":
    """Starts at once, so that MLflow is imported there while this process reads and trains."""
    from research.tracking.run import Recorder

    with Recorder.start() as started:
        yield started


# ---- the report ----------------------------------------------------------------------------------


def title_of(judgement: "Judgement", found: "Sequence[Found]") -> str:
    names = [arm.name for arm in judgement.arms]
    return " vs ".join(names) if len(names) < 5 else f"{found[0].run.run_name}: {len(names)} arms"


def name_of(judgement: "Judgement", found: "Sequence[Found]") -> str:
    """What the folder of the report is called."""
    return found[0].run.run_name if len(found) == 1 else title_of(judgement, found)


def publish(
    report: "Report",
    name: str,
    options: argparse.Namespace,
    parent: "Found | None",
    uri: str,
    recorder: "Recorder",
) -> None:
    """Write the report, record it on the parent run where there is one, and say where both are."""
    from research.statistics.report.files import write_report
    from research.tracking.store import show_command

    slug = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "report"
    folder = Path(options.output) if options.output is not None else Path(FOLDER) / slug
    files = write_report(report, folder)
    print(f"\nreport:   {files[0]}")
    if parent is None or not parent.is_parent:
        return
    with recorder.open_run(uri, parent.run.run_id) as opened:
        for file in files:
            inside = file.relative_to(folder).parent
            opened.log_artifact(file, (Path(RECORDED) / inside).as_posix())
        opened.set_tags({"comparison.verdict": report.verdicts[0].text})
        page = show_command(uri, parent.run.run_id, parent.run.experiment_id)
    print(f"recorded: {page}")


if __name__ == "__main__":
    run_as_script(main)
