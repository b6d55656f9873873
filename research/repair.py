"""Mends a store by hand what the next training on it would mend by itself.

    python -m research.repair [--tracking_uri URI]

For `mlflow ui` right after a project was moved, a machine has died, or a server was away.  `HELP`
below is what `--help` prints.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.command import run_as_script, run_or_help
from research.configuration.compose import ConfigurationError, read_command_line
from research.tracking.store import TrackingError, resolve_tracking_uri, sqlite_path

if TYPE_CHECKING:
    from research.tracking.spool import Spool

HELP = """\
python -m research.repair [--tracking_uri URI]

Mend what runs that died, servers that were away and folders that were moved have left in a store.

  --tracking_uri URI     the store (else MLFLOW_TRACKING_URI, mlflow.db)

- In a folder that was moved or copied with its mlflow.db and mlruns/, runs find their files again.
- What a run could not deliver, to a server that was away or because it was killed, is delivered.
- A run whose process is gone is marked KILLED; on another machine, when it was silent for long.

The next training on the store does the same by itself. The exit code is 1 if something is left that
cannot be delivered now.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s."""
    return run_or_help(run, HELP, arguments)


def run(arguments: Sequence[str]) -> int:
    return repair(read_arguments(arguments))


def read_arguments(arguments: Sequence[str]) -> str:
    """The address of the store; ConfigurationError for anything else that was typed."""
    typed = read_command_line(arguments)
    flag = typed.settings.pop("tracking_uri", None)
    others = [*typed.settings, *(["config"] if typed.files else []), *typed.passed_on]
    if others or isinstance(flag, dict):
        raise ConfigurationError(
            f"{(others or ['tracking_uri'])[0]} is not known here; only --tracking_uri URI is."
        )
    uri = resolve_tracking_uri(flag)
    if uri is None:
        raise ConfigurationError(
            "tracking_uri is empty, which records nothing, so there is nothing to repair."
        )
    return uri


def repair(uri: str) -> int:
    """Do all that is to be done, and tell it; 1 if something could not be delivered, else 0."""
    from research.tracking.heartbeat import end_dead_runs
    from research.tracking.runs import open_store, place_of, told_in_a_sentence

    spools = spools_of(uri)
    try:
        done = follow_folder(uri, may_be_missing=bool(spools))
    except TrackingError as error:  # tried once, and not again for each spool
        if not spools:
            raise
        print(f"error: {error}", file=sys.stderr)
        tell(f"what {amount(len(spools), 'run')} could not deliver still waits")
        return 1
    # Before the dead are looked for: a run may have ended well and not been heard.
    is_well = all([deliver(spool, place, len(spools)) for place, spool in enumerate(spools, 1)])
    if not is_there(uri):
        return 1
    with told_in_a_sentence(uri):
        for run in end_dead_runs(open_store(uri), uri):
            done += tell(f"marked as KILLED: run {run}, which nobody records any more")
    if not done and not spools:
        tell(f"nothing to repair in {place_of(uri)}")
    return 0 if is_well else 1


def follow_folder(uri: str, may_be_missing: bool) -> int:
    """Let paths lead to where the store is now; how many lines were told.

    TrackingError for a store that is away, and for one that was never made, if it may not be.
    """
    from research.tracking.lookup import all_experiments
    from research.tracking.moved import repair_paths
    from research.tracking.runs import open_store, told_in_a_sentence

    if may_be_missing and not is_there(uri):
        return 0
    with told_in_a_sentence(uri):
        client = open_store(uri)
        database = sqlite_path(uri)
        lines = [] if database is None else repair_paths(database)
        all_experiments(client)
    return sum(tell(line) for line in lines)


def is_there(uri: str) -> bool:
    database = sqlite_path(uri)
    return database is None or database.exists()


def spools_of(uri: str) -> "list[Spool]":
    """What waits for this store, and nobody delivers; the oldest first."""
    from research.tracking.moved_spool import address_of, followed
    from research.tracking.spool import spool_root, waiting

    found = [followed(spool) for spool in waiting(spool_root(uri))]
    return [spool for spool in found if is_same_store(address_of(spool), uri)]


def is_same_store(one: str | None, other: str) -> bool:
    from research.tracking.moved import is_same

    here, there = sqlite_path(one or ""), sqlite_path(other)
    if one == other or here is None or there is None:
        return one == other
    return is_same(here, there)


def deliver(spool: "Spool", place: int, of: int) -> bool:
    """Deliver a spool and tell what came of it; whether all of it was taken."""
    from research.tracking import redelivery

    who = named(spool.about, spool.folder)
    which = f"{place} of {of}: " if of > 1 else ""
    tell(f"{which}delivering {amount(spool.count(), 'record')} of {who}")
    reason = redelivery.deliver(spool)
    if reason is None and spool.is_gone():
        return True
    tell(f"  {'lost' if spool.is_gone() else 'still waits'}: {reason or 'it could not be read'}")
    return False


def named(about: dict[str, Any], folder: Path) -> str:
    if "run_id" in about:
        return f"run {about['run_name']} ({about['run_id']})"
    return f"a run that never began there ({folder.name})"


def amount(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def tell(line: str) -> int:
    """1, for what was done and told."""
    print(line, flush=True)
    return 1


if __name__ == "__main__":
    run_as_script(main)
