"""Rows help and first-step: what a person waits for before anything happens.

Commands as they are typed, each a process of its own, clocked from its start, against the import
line that every training has to wait for.  The first of each is for the system's caches.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.benchmarks.ratios import PROJECT, Asked, Round, Row, Target, alternate
from tests.benchmarks.typed import python

IMPORT_LINE = ["-c", "import torch, lightning.pytorch"]
HELP = ["-m", "research.fit", "--help"]
# The whole of a recorded run, cut short after the first steps, which nothing is left out of.
QUICKSTART = [
    *("--config", str(PROJECT / "experiments" / "quickstart.yaml"), "--trainer.max_epochs", "1"),
    *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1"),
]
# `python -m research.fit` that writes the time at which an optimizer has first made a step.
WATCHED = """
import importlib.util, runpy, sys, time

class AfterFirstStep:
    def find_spec(self, name, path, target=None):
        if name != "torch.optim.optimizer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def watched(module):
            execute(module)

            def note(optimizer, arguments, keywords):
                handle.remove()
                with open(first_step, "w") as file:
                    file.write(repr(time.time()))

            handle = module.register_optimizer_step_post_hook(note)

        spec.loader.exec_module = watched
        return spec

first_step = sys.argv.pop(1)
sys.meta_path.insert(0, AfterFirstStep())
runpy.run_module("research.fit", run_name="__main__", alter_sys=True)
"""


def run(arguments: list[str], folder: Path) -> float:
    """Seconds of `python ARGUMENTS`."""
    began = time.time()
    python(arguments, folder)
    return time.time() - began


def show_help(folder: Path) -> float:
    return run(HELP, folder)


def train_a_step(folder: Path) -> float:
    """Seconds from the start of the command to the end of its first step."""
    noted = folder / "first_step"
    record = ["--tracking_uri", f"sqlite:///{folder / 'mlflow.db'}"]
    began = time.time()
    run(["-c", WATCHED, str(noted), *QUICKSTART, *record], folder)
    seconds = float(noted.read_text()) - began
    noted.unlink()
    return seconds


def against_import(command: str, asked: Asked) -> Iterator[Round]:
    ours = partial({"help": show_help, "first-step": train_a_step}[command], asked.folder)
    imports = partial(run, IMPORT_LINE, asked.folder)
    ours(), imports()
    for mine, theirs in alternate(ours, imports, asked.rounds):
        yield Round(mine / theirs, f"{mine:.2f} s, imports {theirs:.2f} s")


ROWS = [
    Row(
        name="help",
        what="python -m research.fit --help",
        against='python -c "import torch, lightning.pytorch"',
        target=Target("at most", 0.2),
        measure=partial(against_import, "help"),
    ),
    Row(
        name="first-step",
        what="command to first training step, quickstart, everything recorded",
        against='python -c "import torch, lightning.pytorch"',
        target=Target("at most", 1.5),
        measure=partial(against_import, "first-step"),
    ),
]
