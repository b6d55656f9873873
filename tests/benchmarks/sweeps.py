"""The same search three ways: trials per minute of ours, a plain Optuna loop, and Hydra's sweeper.

    python -m tests.benchmarks.sweeps --hydra FOLDER [--trials N] [--rounds N] [--json FILE]

Two losses x two optimizers x a learning rate, on drawn pictures, two trials at a time with one
thread each, every trial recorded in MLflow (a fresh SQLite file for each way and round):

    sweep   python -m research.sweep, two workers that stay warm
    loop    what a script with `study.optimize(n_jobs=2)` does that starts `python -m research.fit`
            for each trial; Optuna 5, TPE, SQLite
    hydra   hydra-optuna-sweeper (TPE) with the joblib launcher, two jobs, on a function that calls
            the same `research.training.fit` with the same settings

`FOLDER` has what `pip install --target FOLDER hydra-core hydra-optuna-sweeper
hydra-joblib-launcher` puts there; it goes on the path of the third way alone, for its Optuna is an
old one.  A round takes the three one after the other, every second one backwards; what is counted
is from the command's start to its end, imports and all.  The training alone, in the first of
them, stands beside: what no way can be faster than.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml

from research.tracking.environment import cpu_model
from research.tracking.store import sqlite_uri
from tests.benchmarks.ratios import PROJECT
from tests.benchmarks.typed import python

AT_A_TIME = 2
LOSSES, OPTIMIZERS, RATES = ("CrossEntropyLoss", "MultiMarginLoss"), ("SGD", "AdamW"), (1e-3, 1e-1)
EXPERIMENT: dict[str, Any] = {
    "model": {"network": "CNN"},
    "data": {"class_path": "Synthetic", "init_args": {"num_train": 2000, "num_test": 200}},
    "trainer": {"max_epochs": 2, "limit_test_batches": 0, "enable_progress_bar": False},
    "log_pictures": False,
    "log_model": False,
    "log_system_metrics": False,
}


def by_sweep(folder: Path, trials: int, hydra: Path | None) -> None:
    base = {
        **EXPERIMENT,
        "trainer": {k: v for k, v in EXPERIMENT["trainer"].items() if k[0] != "l"},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(base))
    search = {
        "name": "sweep",
        "base": "experiment.yaml",
        "space": {
            "model.loss": list(LOSSES),
            "optimizer": list(OPTIMIZERS),
            "optimizer.lr": "log 1e-3..1e-1",
        },
        "objective": "val/accuracy",
        "budget": {"trials": trials},
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(search))
    store = sqlite_uri(folder / "mlflow.db")
    command = ["-m", "research.sweep", str(folder / "search.yaml"), "--tracking_uri", store]
    run(folder, [*command, "--workers", str(AT_A_TIME)])


def by_loop(folder: Path, trials: int, hydra: Path | None) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    store = sqlite_uri(folder / "mlflow.db")

    def objective(trial: optuna.Trial) -> float:
        arguments = {
            "--model.loss": trial.suggest_categorical("loss", LOSSES),
            "--optimizer": trial.suggest_categorical("optimizer", OPTIMIZERS),
            "--optimizer.lr": str(trial.suggest_float("lr", *RATES, log=True)),
            "--tracking_uri": store,
        }
        flags = [text for pair in arguments.items() for text in pair]
        said = run(folder, ["-m", "research.fit", "--config", "experiment.yaml", *flags])
        found = re.search(r"^  val .* ([\d.]+)%$", said, re.MULTILINE)
        assert found is not None, said
        return float(found[1]) / 100

    study = optuna.create_study(storage=sqlite_uri(folder / "study.db"), direction="maximize")
    study.optimize(objective, n_trials=trials, n_jobs=AT_A_TIME)


def by_hydra(folder: Path, trials: int, hydra: Path | None) -> None:
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    settings = {
        "file": folder / "experiment.yaml",
        "store": sqlite_uri(folder / "mlflow.db"),
        "loss": f"choice({','.join(LOSSES)})",
        "optimizer": f"choice({','.join(OPTIMIZERS)})",
        "lr": f"tag(log, interval({RATES[0]}, {RATES[1]}))",
    }
    own = {
        "hydra/sweeper": "optuna",
        "hydra/launcher": "joblib",
        "hydra.launcher.n_jobs": AT_A_TIME,
        "hydra.sweeper.n_jobs": AT_A_TIME,
        "hydra.sweeper.n_trials": trials,
        "hydra.sweeper.direction": "maximize",
        "hydra.sweep.dir": folder / "multirun",
    }
    flags = [f"+{key}={value}" for key, value in settings.items()]
    flags += [f"{key}={value}" for key, value in own.items()]
    run(folder, [str(PROJECT / "tests/benchmarks/hydra_app.py"), "--multirun", *flags], hydra)


WAYS = {"sweep": by_sweep, "loop": by_loop, "hydra": by_hydra}


def run(folder: Path, arguments: list[str], first_on_path: Path | None = None) -> str:
    """What the command prints."""
    return python(
        ["-W", "ignore", *arguments],
        folder,
        path=[] if first_on_path is None else [first_on_path],
        environment={
            "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "HYDRA_FULL_ERROR": "1",
        },
    )


def trained(folder: Path) -> tuple[int, float]:
    """How many runs of the store were trained, and for how many seconds together."""
    import sqlite3

    with sqlite3.connect(folder / "mlflow.db") as store:
        (runs,) = store.execute(
            "select count(distinct run_uuid) from metrics where key = 'val/accuracy'"
        ).fetchone()
        (seconds,) = store.execute(
            "select sum(value) from metrics where key = 'epoch_seconds'"
        ).fetchone()
    return runs, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hydra", type=Path, help="leave it out to leave out Hydra")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = [way for way in WAYS if way != "hydra" or options.hydra is not None]
    rates: dict[str, list[float]] = {way: [] for way in ways}
    shares: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.rounds):
        for way in ways[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                began = time.perf_counter()
                hydra = None if options.hydra is None else options.hydra.absolute()
                WAYS[way](folder, options.trials, hydra)
                seconds = time.perf_counter() - began
                runs, training = trained(folder)
            assert runs == options.trials, f"{way} recorded {runs} runs"
            rates[way].append(60 * runs / seconds)
            shares[way].append(training / seconds / AT_A_TIME)
            print(f"round {number + 1}  {way:<6}{rates[way][-1]:7.1f} trials/min", flush=True)
    print(f"\n{'':8}{'trials/min':>22}{'against loop':>14}{'of it training':>16}")
    for way in ways:
        low, high = min(rates[way]), max(rates[way])
        ratio = statistics.median(
            one / other for one, other in zip(rates[way], rates["loop"], strict=True)
        )
        told = f"{statistics.median(rates[way]):.1f} ({low:.1f} to {high:.1f})"
        print(f"{way:<8}{told:>22}{ratio:>14.2f}{statistics.median(shares[way]):>16.0%}")
    about: dict[str, Any] = {
        "when": datetime.now().date().isoformat(),
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "optuna": optuna.__version__,
        "trials": options.trials,
        "rates": rates,
    }
    print(
        f"{options.rounds} rounds of {options.trials} trials; {about['cpu']}, "
        f"torch {torch.__version__}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
