"""Searches for the best loss, optimizer and learning rate: in parallel, resumable, recorded.

    python -m research.sweep sweeps/loss_optimizer_lr.yaml

The file says what is searched (research/search/document.py); the same command goes on with a search
that was stopped, and joins one that runs.  `HELP` below is what `--help` prints; torch, Optuna and
MLflow are imported only when a file is to be read.
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.command import run_as_script, run_or_help
from research.configuration.compose import ConfigurationError, nearest
from research.tracking.store import resolve_tracking_uri

if TYPE_CHECKING:
    from research.search.document import Search
    from research.search.results import Results
    from research.search.studies import Studies
    from research.tracking.run import Recorder

HELP = """\
python -m research.sweep FILE [--workers N] [--key value ...]

Search for the best settings as FILE says (sweeps/*.yaml), by Optuna, each trial a run in MLflow.
Started again, it goes on; started on another machine with the same storage, it joins in.

  --workers N           processes that train (one for each GPU, or one)
  --workers_per_gpu N   so many on each GPU (1)
  --together N          trials that each of them trains at once, their networks stacked (1)
  --trials N            the budget, in trials of each study; more than before go on with it
  --hours H             no trial begins after that; the next start goes on
  --storage ADDRESS     where the studies are (a journal beside FILE); sqlite:///F, postgresql://...
  --tracking_uri URI    where runs go (else MLFLOW_TRACKING_URI, mlflow.db); "": nowhere
  --name NAME           of the search (that of FILE): another one begins anew
  --seed N              of the sampler (0)
  --extend              go on though the space has changed, where Optuna can
  --trust               let FILE name classes of any package, not only known ones

  --best                print the best configuration so far as an experiment, and stop
  --write FILE          write it, and stop
  --report              print the table and record the figures of what there is, and stop

Examples
  python -m research.sweep sweeps/quickstart.yaml
  python -m research.sweep sweeps/loss_optimizer_lr.yaml --workers 4
  python -m research.sweep sweeps/loss_optimizer_lr.yaml --write experiments/best.yaml
  python -m research.sweep sweeps/losses.yaml --storage postgresql://me@host/studies
"""

TYPED = ("name", "storage", "workers", "workers_per_gpu", "together", "trials", "hours", "seed")
TRACKED = ("tracking_uri", "write")
SWITCHES = ("extend", "trust", "best", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s."""
    return run_or_help(run, HELP, arguments, needs_any=True)


def run(arguments: Sequence[str]) -> int:
    options = read_options(arguments)
    file = Path(options.file)
    if not file.is_file():
        near = nearest(file.name, (path.name for path in sorted(file.parent.glob("*.yaml"))))
        raise ConfigurationError(f"there is no search file {file}{near}")
    tracking_uri = resolve_tracking_uri(options.tracking_uri)
    looks = options.best or options.write is not None or options.report
    if not looks:
        print(f"checking {file}", file=sys.stderr, flush=True)
    with recorder_for(None if looks and not options.report else tracking_uri) as recorder:
        quiet()
        from research.search.document import read_search

        search = read_search(file, {key: getattr(options, key) for key in TYPED}, options.trust)
        if looks:
            return look(options, search, file, tracking_uri, recorder)
        return conduct(options, search, file, tracking_uri, recorder, command_of(arguments))


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed; ConfigurationError, with what was meant, for what there is not."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("file", nargs="?")
    for name in (*TYPED, *TRACKED):
        parser.add_argument(f"--{name}")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    try:
        options, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigurationError(str(error)) from error
    if rest:
        known = [f"--{name}" for name in (*TYPED, *TRACKED, *SWITCHES)]
        what = rest[0].partition("=")[0]
        raise ConfigurationError(
            f"{rest[0]}: a search takes no such argument{nearest(what, known)} Settings of the "
            "trials stand in its file."
        )
    if options.file is None:
        raise ConfigurationError("the search file is missing: python -m research.sweep FILE")
    return options


def command_of(arguments: Sequence[str]) -> str:
    """What goes on with the search: the same that was typed."""
    return shlex.join(["python", "-m", "research.sweep", *arguments])


def quiet() -> None:
    """Keep what Optuna says of each study and trial to itself: the table says it."""
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@contextlib.contextmanager
def recorder_for(tracking_uri: str | None) -> "Iterator[Recorder | None]":
    """A recorder that starts now, so that MLflow is imported beside torch; None if not needed."""
    if tracking_uri is None:
        yield None
        return
    from research.tracking.run import Recorder

    with Recorder.start() as recorder:
        yield recorder


# ---- searching -----------------------------------------------------------------------------------


def conduct(
    options: argparse.Namespace,
    search: "Search",
    file: Path,
    tracking_uri: str | None,
    recorder: "Recorder | None",
    command: str,
) -> int:
    """Search, and print what came of it."""
    from research.search.coordinator import Coordinator

    coordinator = Coordinator(search, file, tracking_uri, recorder, command)
    ending = coordinator.run(options.extend)
    print_results(ending.results)
    for note in ending.notes:
        print(note)
    print_places(search, command, coordinator.studies, tracking_uri, ending.run)
    return 0


def print_results(results: "Results") -> None:
    from research.search.report import table

    print(table(results))
    print()


def print_places(
    search: "Search",
    command: str,
    studies: "Studies",
    tracking_uri: str | None,
    run: tuple[str, str] | None,
) -> None:
    """Where to look next: MLflow's page, Optuna's, the winner as an experiment.

    `command` is what was typed: the winner is found by the same storage and name.
    """
    from research.tracking.store import show_command

    facts = []
    if tracking_uri is not None and run is not None:
        facts.append(("runs", show_command(tracking_uri, *run)))
    if not studies.described.startswith("grpc:"):  # it asks databases and journals alone
        facts.append(("studies", f"optuna-dashboard {shlex.quote(studies.described)}"))
    if studies.counts().complete:
        write = f"experiments/{search.name}_best.yaml"
        facts.append(("the best", f"{command} --write {write}"))
    for name, fact in facts:
        print(f"{name + ':':<10}{fact}")


# ---- looking -------------------------------------------------------------------------------------


def look(
    options: argparse.Namespace,
    search: "Search",
    file: Path,
    tracking_uri: str | None,
    recorder: "Recorder | None",
) -> int:
    """What came of a search until now; nothing is started and no study changed."""
    from research.search.studies import find

    studies = find(search, file)
    results = studies.results()
    if options.report:
        print_results(results)
        record_report(studies, results, tracking_uri, recorder)
    if options.write is not None:
        write_winner(Path(options.write), results, search.name)
    elif options.best:
        print(winner_of(results, f"experiments/{search.name}_best.yaml"), end="")
    return 0


def winner_of(results: "Results", file: str) -> str:
    from research.search.winner import winner_yaml

    return winner_yaml(results, f"python -m research.fit --config {shlex.quote(file)}")


def write_winner(path: Path, results: "Results", name: str) -> None:
    """Write the winner; ConfigurationError rather than write over a file of somebody else's."""
    text = winner_of(results, str(path))
    if path.exists() and f"of the search {name}" not in " ".join(comment_of(path).split()):
        raise ConfigurationError(
            f"write: {path} is there already, and is no winner of the search {name}. Choose "
            "another name, or remove it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{path} has the best configuration; train it: python -m research.fit --config {path}")


def comment_of(path: Path) -> str:
    """The comment that the file begins with, without its marks."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    return "\n".join(lines)


def record_report(
    studies: "Studies",
    results: "Results",
    tracking_uri: str | None,
    recorder: "Recorder | None",
) -> None:
    """Put summary and figures into the parent run, or beside the studies where there is none."""
    from research.search import parent
    from research.search.report import description, write_report

    run_id = parent.run_id_of(studies.first, tracking_uri)
    if run_id is None or recorder is None or tracking_uri is None:
        folder = Path(f"{studies.search.name}_report")
        write_report(results, folder)
        print(f"summary and figures: {folder}")
        return
    from research.tracking.store import show_command

    with recorder.open_run(tracking_uri, run_id) as run:
        folder = run.scratch / "report"
        files = write_report(results, folder)
        told = parent.record_report(run, description(results), folder, files)
        experiment = run.wait().experiment_id
    print(f"recorded: {show_command(tracking_uri, run_id, experiment)}")
    if told is not None:
        print(told)


if __name__ == "__main__":
    run_as_script(main)
