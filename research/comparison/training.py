"""What a comparison trains: arms out of files, a recorded run again, the noise of one experiment.

Each is a repetition (research/repetition/): all trainings below one parent run, seed by seed, and
started again it goes on with what is missing. The parent is then read like any other.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from research.checkpoints.trained import is_own_store
from research.comparison.judging import Question, refuse_unknown
from research.configuration.compose import CommandLine, ConfigurationError, nearest, read_file
from research.configuration.schema import Configuration, resolve
from research.repetition.repeating import Repetition, metric_of, repeat
from research.repetition.seeds import seeds_from
from research.repetition.trainings import Training, by_stream, crossed
from research.resumption import settings_in
from research.search.winner import FORCED
from research.statistics.noise import SOURCES, design
from research.tracking.arms import Found, read
from research.tracking.run import Recorder
from research.tracking.runs import RecordedRun, find_run

SEARCH_STORAGE = "search.storage"  # a tag of every search's run
# What a training may record, the figures of single classes apart.
RECORDED = (
    *("val/accuracy", "val/loss", "test/accuracy", "test/loss", "test/top3_accuracy"),
    *("test/macro_f1", "test/expected_calibration_error", "test/brier_score"),
    *("test/negative_log_likelihood", "train/accuracy", "train/loss", "training_seconds"),
    *("num_parameters", "epoch_seconds", "images_per_second", "learning_rate", "gradient_norm"),
    *("update_to_weight_ratio", "best_val/accuracy", "best_val/epoch"),
)
# What makes a data set's augmentation draw nothing.
STILL = {"crop_padding": 0, "horizontal_flip": False, "cutout": 0, "alternating_flip": False}


@dataclass(frozen=True)
class Means:
    """How it is trained and recorded: `command` is what a person types to go on with it.

    `trust`: files and other stores' runs may name classes of any package.
    `allow_changes`: what was begun with other code is gone on with.
    """

    tracking_uri: str
    recorder: Recorder
    command: str
    workers: int | None = None
    trust: bool = False
    allow_changes: bool = False


# ---- files ---------------------------------------------------------------------------------------


def train_files(
    files: Sequence[Path],
    typed: CommandLine,
    seeds: int | list[int],
    means: Means,
    question: Question,
) -> Repetition:
    """Train each file's experiment on the same seeds; `typed` are settings for all of them."""
    arms = {
        name: configured(typed, file, means)
        for name, file in zip(names_of(files), files, strict=True)
    }
    refuse_unanswerable(question, arms)
    first = next(iter(arms.values())).values.seed_everything
    return repeated(arms, crossed(list(arms), seeds_from(seeds, first)), means)


def refuse_unanswerable(question: Question, arms: Mapping[str, Configuration]) -> None:
    """ConfigurationError for what these arms cannot answer however they are trained.

    Code of one's own may record more of train, val and test than is known here.
    """
    keys = {key for configuration in arms.values() for key in configuration.flat()}
    refuse_unknown(question.expected, keys)
    metric = question.metric
    if metric is not None and is_never_recorded(metric):
        raise ConfigurationError(
            f"metric: no training records {metric}{nearest(metric, RECORDED)} There are "
            f"{', '.join(RECORDED)}, test/accuracy/CLASS, and what else is logged as val/..."
        )
    for name, configuration in arms.items():
        if (metric or "").startswith("val/") and metric_of([configuration]) != "val/accuracy":
            raise ConfigurationError(
                f"metric: {metric} is never measured, for {name or 'the experiment'} has no "
                "validation (data.val_fraction, trainer.limit_val_batches)."
            )


def is_never_recorded(metric: str) -> bool:
    """True for a name without a split that is not known, or one that is but misspelt."""
    split, _, name = metric.partition("/")
    if metric in RECORDED or metric.startswith("test/accuracy/"):
        return False
    alike = [known for known in RECORDED if known.startswith(f"{split}/")]
    is_of_split = split in ("train", "val", "test") and name != ""
    return not is_of_split or bool(get_close_matches(metric, alike, n=1, cutoff=0.85))


def names_of(files: Sequence[Path]) -> list[str]:
    """The files' names without their ending; with their folders where two have the same."""
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(f.with_suffix("")) for f in files]
    if len(set(names)) < len(names):
        raise ConfigurationError("The same file was named twice; a comparison needs two arms.")
    return names


def configured(typed: CommandLine, file: Path, means: Means) -> Configuration:
    """The file's experiment with what was typed for all laid over it, `--config` files first."""
    settings = {**typed.settings, "tracking_uri": means.tracking_uri}
    files = [read_file(file), *typed.files]
    trust = typed.trust or means.trust
    return resolve(replace(typed, files=files, settings=settings, trust=trust))


# ---- a recorded run again ------------------------------------------------------------------------


def again(run_id: str, settings: Mapping[str, Any], means: Means) -> Configuration:
    """The configuration of a recorded run, without what a search forces upon its trials."""
    recorded = find_run(means.tracking_uri, run_id)
    before = settings_in(recorded.configuration(), means.tracking_uri)
    if is_trial(recorded):
        for key in FORCED:
            drop(before, key)
    drop(before, "run_name")
    # What stands in the store of this project has been trained here before.
    trust = means.trust or is_own_store(means.tracking_uri)
    return resolve(CommandLine([before], dict(settings), trust=trust))


def is_trial(recorded: RecordedRun) -> bool:
    """Whether a search drew it; the seeds of a repetition have a parent, too, and are none."""
    parent = recorded.tags.get("mlflow.parentRunId")
    return parent is not None and SEARCH_STORAGE in find_run(recorded.tracking_uri, parent).tags


def drop(settings: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings[parent]
    settings.pop(last, None)


# ---- the noise of one experiment -----------------------------------------------------------------


def train_noise(
    configuration: Configuration, runs: int, means: Means, name: str, metric: str | None = None
) -> Repetition:
    """Train one experiment `runs` times, its seeds varied one by one and all together.

    `metric` is what will be asked of it.
    """
    refuse_unanswerable(Question(metric), {"": configuration})
    planned = design(runs, sources=sources_of(configuration))
    # With all streams the split changes as well, as it does between the seeds of a comparison.
    trainings = by_stream([{"split": each.background, **each.seeds} for each in planned])
    tags = {"noise": str(runs)}
    # Noise is read by val/accuracy: the test pictures stay unseen.
    return repeated({"": configuration}, trainings, means, f"{name} noise", tags, is_tested=False)


def sources_of(configuration: Configuration) -> list[str]:
    """What draws random numbers in this experiment, as far as its settings tell."""
    data, network = configuration.arguments("data"), configuration.arguments("model.network")
    still = all(data.get(name, value) == value for name, value in STILL.items())
    lacking = {"augmentation"} if still else set()
    if network.get("dropout") == 0:
        lacking.add("dropout")
    return [source for source in SOURCES if source not in lacking]


def repeated(
    arms: Mapping[str, Configuration],
    trainings: Sequence[Training],
    means: Means,
    name: str | None = None,
    tags: Mapping[str, str] = {},
    is_tested: bool = True,
) -> Repetition:
    """All of it trained and recorded; ConfigurationError where nothing would be recorded."""
    came = repeat(
        arms,
        trainings,
        name=name,
        recorder=means.recorder,
        command=means.command,
        workers=means.workers,
        is_tested=is_tested,
        goes_on_with_other_code=means.allow_changes,
        tags=tags,
    )
    if came.parent_run_id is None:
        raise ConfigurationError(
            "trainer: these settings record nothing (logger, fast_dev_run or barebones), and a "
            "comparison reads what was recorded. Leave them out."
        )
    return came


def read_trained(came: Repetition, tracking_uri: str) -> Found:
    """The parent of what was trained; what there is to say of it goes to the terminal."""
    for note in came.notes:
        print(note, file=sys.stderr)
    assert came.parent_run_id is not None
    return read(tracking_uri, came.parent_run_id)
