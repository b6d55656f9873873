"""Recorded runs as a comparison reads them: each with its seeds, figures, curves, what it stood on.

    found = read(tracking_uri, "my-run")

A run is read as it is; a parent (several seeds of one experiment, a comparison, a search) is read
with all runs below it, also those that failed, were stopped, or still run.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from research.statistics.arms import Trained
from research.tracking.heartbeat import ENDED_BY
from research.tracking.lookup import all_experiments
from research.tracking.runs import (
    RecordedRun,
    as_recorded,
    find_run,
    open_store,
    told_in_a_sentence,
)
from research.tracking.store import TrackingError

PARENT = "mlflow.parentRunId"
OF_PARENTS = ("search.storage", "repetition.storage")  # tags
ARM = "arm"  # tag of a run below a comparison: the arm that it belongs to
CONFIRMATION = "/confirmation"  # ends the study's name of a search's confirming trials
TEST_LOOKS = "test_looks"  # tag: how often the run's test pictures were scored, the first included
NON_FINITE = "NonFiniteLoss"  # the error of a run that diverged; its module needs torch
PAGE = 1000
STREAMS = ("weights", "order", "augmentation", "dropout")
OF_DATA = ("order", "augmentation")  # what `data.seed` fixes, where it is set
# Tags that say what a run stood on, by the words that they are told in.
ORIGINS = {
    "code": "fingerprint.code",
    "pictures": "fingerprint.data",
    "device": "device",
    "processes": "world_size",
    "Python": "python",
    "torch": "torch",
    "torchvision": "torchvision",
    "Lightning": "lightning",
    "CUDA": "cuda",
    "cuDNN": "cudnn",
    "threads": "torch.num_threads",
}


@dataclass(frozen=True)
class Read:
    """A run below a parent, or by itself: what it is as a part of an arm, and its tags."""

    trained: Trained
    tags: Mapping[str, str] = field(repr=False)

    @property
    def arm(self) -> str | None:
        """The arm that it was trained for; None where none is recorded."""
        return self.tags.get(ARM)

    @property
    def study(self) -> str:
        return self.tags.get("study", "")

    @property
    def confirms(self) -> bool:
        """Whether it ran a search's winner again, on a fresh seed."""
        return self.study.endswith(CONFIRMATION)


@dataclass(frozen=True)
class Found:
    """What a name stands for in the store: a run by itself, or a parent and the runs below it.

    `objective` and whether it `is_minimized` are a search's, by the file that it was begun with.
    """

    text: str
    run: RecordedRun = field(repr=False)
    runs: tuple[Read, ...]
    is_parent: bool = False
    is_search: bool = False
    objective: str = "val/accuracy"
    is_minimized: bool = False


def read(tracking_uri: str, text: str) -> Found:
    """What `text` (a run's id, its first digits, or its name) stands for; TrackingError for none.

    So it is for a parent that has no run below it.
    """
    recorded = find_run(tracking_uri, text)
    with told_in_a_sentence(tracking_uri):
        client = open_store(tracking_uri)
        below = list(descendants(client, all_experiments(client), recorded.run_id))
        is_search = "search.storage" in recorded.tags
        own = client.get_run(recorded.run_id)
        if not below and trains_nothing(own):
            what = (
                "a search without a single trial yet"
                if is_search
                else "the parent of several runs, and none has begun below it yet"
            )
            raise TrackingError(f"{recorded.described()} is {what}.")
        runs = below or [(own, None)]
        reads = tuple(read_run(client, run, tracking_uri, arm) for run, arm in runs)
    objective, is_minimized = objective_of(recorded) if is_search else ("val/accuracy", False)
    return Found(text, recorded, reads, bool(below), is_search, objective, is_minimized)


def descendants(
    client: Any, experiments: Sequence[str], run_id: str, arm: str | None = None
) -> Iterator[tuple[Any, str | None]]:
    """The runs below a parent, oldest first, each with the name of the parent between, if any."""
    for run in children(client, experiments, run_id):
        # A parent trains nothing itself, so it has no seed.
        below = []
        if "seed" not in run.data.tags:
            below = list(descendants(client, experiments, run.info.run_id, run.info.run_name))
        if below:
            yield from below
        elif not trains_nothing(run):
            yield run, arm


def trains_nothing(run: Any) -> bool:
    """Whether it is a parent by what it recorded, with runs below it or without."""
    if "seed" in run.data.tags:
        return False
    is_empty = not run.data.params and not run.data.metrics
    return is_empty or any(tag in run.data.tags for tag in OF_PARENTS)


def children(client: Any, experiments: Sequence[str], run_id: str) -> list[Any]:
    condition, oldest_first = f"tags.`{PARENT}` = '{run_id}'", ["attributes.start_time ASC"]
    found: list[Any] = []
    token = None
    while token != "":
        page = client.search_runs(list(experiments), condition, 1, PAGE, oldest_first, token)
        found += page
        token = page.token or ""
    return found


# ---- one run -------------------------------------------------------------------------------------


def read_run(client: Any, run: Any, tracking_uri: str, arm: str | None = None) -> Read:
    """A run as MLflow has it; `arm` is used where it names none itself."""
    tags, params, latest = dict(run.data.tags), dict(run.data.params), dict(run.data.metrics)
    curves = {
        name: curve_of(client, run.info.run_id, name)
        for name in latest
        if name.startswith(("train/", "val/")) or name == "epoch_seconds"
    }
    epochs = curves.get("epoch_seconds", ())
    seconds = sum(seconds for _, seconds in epochs) if epochs else None
    status = status_of(run.info.status, tags)
    failure = None if status == "FINISHED" else why(run, status, tags, tracking_uri)
    trained = Trained(
        run_id=run.info.run_id,
        run_name=run.info.run_name or run.info.run_id[:8],
        seeds=seeds_of(params, tags),
        status=status,
        metrics=at_best_checkpoint(latest, curves) | of_the_whole(params, seconds),
        curves=curves,
        seconds=seconds,
        initial_weights=tags.get("initial_weights"),
        first_batches=tags.get("first_batches"),
        settings={name: value_of(text) for name, text in params.items()},
        test_looks=looks_at_test(tags, latest),
        failure=failure,
        origins=origins_of(run, tags),
        diverged=status == "FAILED" and has_diverged(tags, failure),
        changes=changes_of(tags),
    )
    return Read(trained, tags if arm is None else {ARM: arm, **tags})


def curve_of(client: Any, run_id: str, name: str) -> tuple[tuple[float, float], ...]:
    """(epoch, value) in order; of what was recorded twice, as after a resume, the last."""
    history = client.get_metric_history(run_id, name)
    values = {point.step: point.value for point in sorted(history, key=lambda p: p.timestamp)}
    return tuple((float(step), values[step]) for step in sorted(values))


def at_best_checkpoint(
    latest: Mapping[str, float], curves: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, float]:
    """Train and validation figures of the epoch that was kept as the best, and all others."""
    best = latest.get("best_val/epoch")
    figures = dict(latest)
    for name, curve in curves.items():
        figures[name] = latest[name] if best is None else dict(curve).get(best, latest[name])
    if "best_val/accuracy" in latest:  # validation may come several times an epoch
        figures["val/accuracy"] = latest["best_val/accuracy"]
    return figures


def of_the_whole(params: Mapping[str, str], seconds: float | None) -> dict[str, float]:
    """What a search may have for its objective and no epoch has: training time, parameters."""
    figures = {
        "training_seconds": seconds,
        "num_parameters": number_in(params.get("num_parameters")),
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


def seeds_of(params: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, int]:
    """The seed of each stream; those that are not set apart follow the seed of the run."""
    seed = number_in(params.get("seed_everything", tags.get("seed"))) or 0
    of_data = number_in(params.get("data.seed"))
    data_seed = seed if of_data is None else of_data
    seeds = {}
    for stream in STREAMS:
        own = number_in(params.get(f"random.{stream}"))
        follows = data_seed if stream in OF_DATA else seed
        seeds[stream] = follows if own is None else own
    return seeds | {"split": data_seed}


def number_in(text: str | None) -> int | None:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else None


def value_of(text: str) -> Any:
    """A parameter as it was before it became a text; what is no literal stays a text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def status_of(status: str, tags: Mapping[str, str]) -> str:
    """MLflow's, but PRUNED for a trial that its search ended early, which MLflow has finished."""
    state = tags.get("trial.state")
    if state == "PRUNED" and status == "FINISHED":
        return "PRUNED"
    return "FAILED" if state == "FAIL" else status


def has_diverged(tags: Mapping[str, str], failure: str | None) -> bool:
    """Whether a run that failed did so by its loss, and not by its machine or its settings."""
    return tags.get("trial.state") == "PRUNED" or NON_FINITE in (failure or "")


def changes_of(tags: Mapping[str, str]) -> tuple[str, ...]:
    """With what the run went on that it had not begun with; its parameters say how it began."""
    times = number_in(tags.get("resumed")) or 0
    told = (tags.get(f"resumed.{count}.changes") for count in range(1, times + 1))
    return tuple(each for each in told if each is not None)


def looks_at_test(tags: Mapping[str, str], latest: Mapping[str, float]) -> int:
    """How often the run's test pictures were scored: by its training once, then by evaluations."""
    counted = number_in(tags.get(TEST_LOOKS))
    return counted if counted is not None else int(has_tested(latest))


def add_look_at_test(run: RecordedRun) -> int:
    """Count one more look at the run's test pictures; how many there are now.

    TrackingError where the store cannot be written to.
    """
    looks = looks_at_test(run.tags, run.metrics) + 1
    with told_in_a_sentence(run.tracking_uri):
        open_store(run.tracking_uri).set_tag(run.run_id, TEST_LOOKS, str(looks))
    return looks


def has_tested(metrics: Mapping[str, float]) -> bool:
    return any(name.startswith("test/") for name in metrics)


def origins_of(run: Any, tags: Mapping[str, str]) -> dict[str, str]:
    """What the run stood on: data, code, device, versions; only what it recorded."""
    found = {words: tags[tag] for words, tag in ORIGINS.items() if tag in tags}
    for given in run.inputs.dataset_inputs if run.inputs else ():
        context = {tag.key: tag.value for tag in given.tags}.get("mlflow.data.context")
        if context == "test":
            found["data set"] = given.dataset.name
            found["test pictures"] = given.dataset.digest
    return found


def why(run: Any, status: str, tags: Mapping[str, str], tracking_uri: str) -> str:
    """Why a run did not finish, in a line."""
    if status == "PRUNED":
        return "its search ended it early"
    if tags.get("trial.state") == "PRUNED":
        return "it diverged"
    if status == "RUNNING":
        return "it still runs"
    if ENDED_BY in tags:
        return tags[ENDED_BY]
    try:
        file = as_recorded(run, tracking_uri).file("traceback.txt")
        lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except (TrackingError, OSError):
        lines = []
    told = [line for line in lines if line and not line.startswith((" ", "\t"))]
    words = " ".join(told[-1].split())[:200] if told else ""
    return words or ("it was stopped" if status == "KILLED" else "no reason is recorded")


# ---- a search ------------------------------------------------------------------------------------


def objective_of(parent: RecordedRun) -> tuple[str, bool]:
    """The metric that a search chose by, and whether less of it is better."""
    try:
        document = yaml.safe_load(parent.file("search.yaml").read_text(encoding="utf-8"))
    except (TrackingError, OSError, yaml.YAMLError):
        document = None
    asked = document if isinstance(document, dict) else {}
    objective, direction = asked.get("objective", "val/accuracy"), asked.get("direction")
    if isinstance(objective, dict):  # several, of which the first sorts
        objective, direction = next(iter(objective.items()), ("val/accuracy", None))
    if direction is None:
        words = ("loss", "seconds", "error", "parameters")
        direction = "minimize" if any(word in str(objective) for word in words) else "maximize"
    return str(objective), direction == "minimize"
