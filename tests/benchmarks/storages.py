"""How many trials a second each storage can keep, where the trials themselves take no time.

    python -m tests.benchmarks.storages [--workers 8] [--trials 200] [--repeats 3] [STORAGE ...]

For each of journal, sqlite, postgresql and grpc (before that PostgreSQL; both only where the
programs are installed) and each repeat: a fresh study, as many processes as said, each of which
takes slots until none is left, draws three parameters at random, reports three values, beats once,
and finishes.  Each takes what search/slots.py does, so this is the rate at which a sweep's
bookkeeping would become what limits it.  The clock runs from the moment when all processes stand
ready.  Printed: the median rate with its range, and the errors, of which there must be none.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from research.search.slots import Slots
from research.search.storage import close_storage, open_storage
from tests.services import postgresql, postgresql_programs, proxy

STORAGES = ("journal", "sqlite", "postgresql", "grpc")


@contextlib.contextmanager
def address_of(storage: str, folder: Path) -> Iterator[str]:
    """A new, empty storage of the kind."""
    if storage == "journal":
        yield str(folder / "study.journal")
    elif storage == "sqlite":
        yield f"sqlite:///{folder}/study.db"
    elif storage == "postgresql":
        with postgresql() as database:
            yield database.address
    else:
        with postgresql() as database, proxy(database.address) as address:
            yield address


def open_slots(address: str) -> Slots:
    storage = open_storage(address, Path())
    return Slots(storage, "study", ["maximize"], lambda slot: RandomSampler(seed=slot))


def work(address: str, ready: Barrier) -> None:
    """What a worker does with trials that need no training."""
    slots = open_slots(address)
    ready.wait()
    while (ticket := slots.take()) is not None:
        lr = ticket.trial.suggest_float("lr", 1e-4, 1.0, log=True)
        momentum = ticket.trial.suggest_float("momentum", 0.0, 0.99)
        ticket.trial.suggest_categorical("optimizer", ["SGD", "AdamW"])
        for epoch in range(3):
            ticket.trial.report(lr + momentum, epoch)
        slots.beat(ticket)
        slots.finish(ticket, [lr + momentum], TrialState.COMPLETE)
    close_storage(slots.storage)


def measure(address: str, workers: int, trials: int) -> tuple[float, int]:
    """Trials per second, and what went wrong: workers that failed, slots not complete once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["research.search.slots", "tests.services", "optuna.storages._rdb.models"]
    )
    ready = context.Barrier(workers + 1)
    processes = [context.Process(target=work, args=(address, ready)) for _ in range(workers)]
    slots = open_slots(address)
    slots.fill(trials)
    for process in processes:
        process.start()
    ready.wait(300)  # seconds: one that failed is not waited for
    started = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - started
    failed = sum(process.exitcode != 0 for process in processes)
    complete = [t for t in slots.study.trials if t.state == TrialState.COMPLETE]
    close_storage(slots.storage)
    wrong = {t.user_attrs["slot"] for t in complete} != set(range(trials))
    return trials / seconds, failed + wrong + abs(len(complete) - trials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("storages", nargs="*", metavar="STORAGE", default=[])
    for flag, default in {"--workers": 8, "--trials": 200, "--repeats": 3}.items():
        parser.add_argument(flag, type=int, default=default)
    chosen = parser.parse_args()
    print(f"{'storage':12} {'trials/s':>9} {'range':>15}  n errors", flush=True)
    for storage in chosen.storages or STORAGES:
        if storage in ("postgresql", "grpc") and postgresql_programs() is None:
            print(f"{storage:12} PostgreSQL is not installed")
            continue
        rates, errors = [], 0
        for _ in range(chosen.repeats):
            with (
                tempfile.TemporaryDirectory() as folder,
                address_of(storage, Path(folder)) as address,
            ):
                rate, wrong = measure(address, chosen.workers, chosen.trials)
            rates.append(rate)
            errors += wrong
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        print(
            f"{storage:12} {statistics.median(rates):9.1f} {spread:>15} {len(rates):2} {errors:6}",
            flush=True,
        )


if __name__ == "__main__":
    main()
