"""Was it real? Which of several ways to train is better, by how much, and how sure that is.

    python -m research.compare A B [C ...] [--option value ...]

`HELP` below is what `--help` prints; MLflow, scipy and torch are imported only to compare.
"""

import argparse
import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from research.command import run_as_script, run_or_help
from research.comparison.asked import Asked
from research.configuration.compose import ConfigurationError, nearest, read_command_line
from research.repetition.seeds import read_seeds
from research.tracking.store import resolve_tracking_uri

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
  --confirm K        train the best K of a search on fresh seeds, and test each run once;
                     each: the best of every cell (loss, optimizer, ...)
  --noise            train one run or file N times: how much do weights, order, augmentation,
                     dropout and the hardware each change it, and what can be read at n seeds?
  --runs N           how many, for that (25)
  --workers N        processes that train (one for each GPU, or one)
  --allow_changes    go on with what was begun by other code, instead of beginning anew

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
  python -m research.compare loss_optimizer_lr --confirm each --seeds 5
"""

VALUES = ("seeds", "confirm", "runs", "workers", "metric", "baseline", "margin", "level")
PLACES = ("output", "tracking_uri")
SWITCHES = ("noise", "cross_losses", "trust", "allow_changes")
SEEDS = "5"
RUNS = "25"
EACH = "each"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s."""
    return run_or_help(run, HELP, arguments, needs_any=True)


def run(arguments: Sequence[str]) -> int:
    asked = read_arguments(arguments)
    # Only what is trained is recorded, and a comparison on its own parent, if it has one.
    records = asked.trains or len(asked.arms) == 1
    with contextlib.ExitStack() as stack:
        recorder = None
        if records:  # started now, so that MLflow is imported there beside torch here
            from research.tracking.run import Recorder

            recorder = stack.enter_context(Recorder.start())
        from research.comparison.conducting import compare, measure_noise

        for text in (measure_noise if asked.noise else compare)(asked, recorder):
            print(text, end="\n\n", flush=True)
    return 0


# ---- what was typed ------------------------------------------------------------------------------


def read_arguments(arguments: Sequence[str]) -> Asked:
    """What is asked for; ConfigurationError with all that cannot be."""
    options, settings = read_options(arguments)
    files = files_in(options.arms)
    refuse(options, settings, files)
    uri = resolve_tracking_uri(options.tracking_uri)
    if uri is None:
        raise ConfigurationError("tracking_uri is empty, so there is no store to compare runs of.")
    return Asked(
        arms=tuple(dict.fromkeys(options.arms)),
        files=tuple(files),
        settings=read_command_line(settings),
        seeds=read_seeds(options.seeds or SEEDS),
        confirm=confirmed(options.confirm),
        noise=options.noise,
        runs=int(options.runs or RUNS),
        workers=None if options.workers is None else int(options.workers),
        metric=options.metric,
        baseline=options.baseline,
        margin=None if options.margin is None else float(options.margin),
        level=float(options.level or 0.95),
        expected=tuple(options.expect),
        cross_losses=options.cross_losses,
        output=None if options.output is None else Path(options.output),
        tracking_uri=uri,
        trust=options.trust,
        allow_changes=options.allow_changes,
        command=shlex.join(["python", "-m", "research.compare", *arguments]),
    )


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
        if name.removeprefix("--") not in SWITCHES:
            raise ConfigurationError(f"{name}: a value is missing; write {name} VALUE.") from error
        more = " How many runs is said by --runs N." if name == "--noise" else ""
        raise ConfigurationError(f"{name}: it takes no value; write {name} alone.{more}") from error
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
    if any(setting.partition("=")[0] == "--print_config" for setting in settings):
        faults.append("print_config: it is for python -m research.fit --config FILE.")
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
    if not trains and not options.noise:
        faults += [
            f"{name}: it is for what is trained (files, --confirm, --noise), and runs are only "
            "read; leave it out."
            for name in ("workers", "allow_changes")
            if getattr(options, name)
        ]
    if options.noise:
        faults += noise_refused(options)
    faults += numbers_refused(options)
    if faults:
        raise ConfigurationError(faults)


def noise_refused(options: argparse.Namespace) -> list[str]:
    """What is of a comparison, and says nothing of the noise of one experiment."""
    given = [name for name in ("baseline", "margin", "expect", "cross_losses")
             if getattr(options, name)]  # fmt: skip
    faults = [
        f"{name}: it is for a comparison, and --noise has one arm; leave it out." for name in given
    ]
    if (options.metric or "").startswith("test/"):
        faults.append(
            f"metric: {options.metric} cannot be had, for --noise leaves the test pictures unseen; "
            f"choose val/{options.metric.removeprefix('test/')}."
        )
    return faults


def numbers_refused(options: argparse.Namespace) -> list[str]:
    faults = []
    for name in ("confirm", "runs", "workers"):
        text = getattr(options, name)
        is_each = name == "confirm" and text == EACH
        if text is not None and not is_each and not (text.isdecimal() and 1 <= int(text) <= 1000):
            more = f", or {EACH}" if name == "confirm" else ""
            faults.append(f"{name}: expected a whole number from 1 on{more}, came {text!r}.")
    for name, most in (("level", 1.0), ("margin", float("inf"))):
        text = getattr(options, name)
        if text is not None and not is_between(text, most):
            bound = "a number between 0 and 1" if most == 1 else "a number above 0"
            faults.append(f"{name}: expected {bound}, came {text!r}.")
    return faults


def confirmed(text: str | None) -> int | None:
    """How many of a search are confirmed; 0: the best of each cell."""
    return None if text is None else 0 if text == EACH else int(text)


def is_between(text: str, most: float) -> bool:
    try:
        return 0 < float(text) < most
    except ValueError:
        return False


if __name__ == "__main__":
    run_as_script(main)
