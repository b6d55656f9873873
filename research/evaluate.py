"""Scores a recorded run again: on its own test pictures, or on another data set.

    python -m research.evaluate RUN [--checkpoint NAME] [--data NAME --data.ARGUMENT VALUE ...]

`HELP` below is what `--help` prints; torch is imported only to evaluate. On its own pictures the
best checkpoint gives the recorded figures again and nothing is recorded but that the test pictures
were looked at once more; anything else is added to the run under a name of its own. Pictures are
normalised as those that the network learned from.
"""

import contextlib
import inspect
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.command import run_as_script, run_or_help
from research.configuration.compose import CommandLine, ConfigurationError, read_command_line
from research.processes.launch import is_rank_zero

if TYPE_CHECKING:
    from research.checkpoints.trained import Checkpoint, Pictures
    from research.configuration.schema import Configuration
    from research.data import ImageData
    from research.evaluation import Predictions
    from research.tracking.runs import RecordedRun

HELP = """\
python -m research.evaluate RUN [--checkpoint NAME] [--data NAME --data.ARGUMENT VALUE ...]

Score the best checkpoint of a recorded run again, on the same test pictures or on others. On the
same ones the figures are compared with the recorded ones, and the run counts one more look at them.
Others are added to the run.

  RUN                    a run's id, the first 4 or more digits of it, its name, or a .ckpt file
                         (which has no run to add anything to)
  --checkpoint NAME      best (where nothing is said), last, or the name of a file
  --data NAME            another data set: CIFAR10, ImageFolder or Synthetic
  --data.ARGUMENT VALUE  an argument of it, or of the run's own data set
  --name NAME            add the figures as NAME/accuracy and so on (else the data set's name)
  --trainer.FLAG VALUE   accelerator, devices, precision and what else belongs to a machine
  --tracking_uri URI     where the run is (else MLFLOW_TRACKING_URI, mlflow.db)
  --trust                let a file, or a run of another store, name classes from anywhere

A folder of pictures is scored by its test/<class>/*, or else by its own class folders. The classes
must be those of the run.

Examples
  python -m research.evaluate my-run
  python -m research.evaluate 4f3a --data ImageFolder --data.root other-pictures
  python -m research.evaluate my-run --checkpoint last --name after-training
"""

OF_A_MACHINE = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "deterministic"),
    *("benchmark", "enable_progress_bar"),
)
TAKEN_NAMES = ("train", "val", "test", "best", "best_val", "system")


@dataclass(frozen=True)
class Asked:
    """What was typed; `settings` holds what the run's configuration is overridden by."""

    run: str
    checkpoint: str | None
    name: str | None
    tracking_uri: str | None
    settings: CommandLine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s."""
    return run_or_help(run, HELP, arguments)


def run(arguments: Sequence[str]) -> int:
    asked = read_arguments(arguments)
    first = is_rank_zero()  # asked now: Lightning makes this process a rank when it tests
    told = evaluate(asked, first)
    if first:
        print(told)
    return 0


# ---- what was typed ------------------------------------------------------------------------------


def read_arguments(arguments: Sequence[str]) -> Asked:
    """ConfigurationError with all that cannot be read, or would be another training."""
    runs: list[str] = []
    options: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            runs.append(token)
            continue
        options.append(token)
        takes_value = token != "--trust" and "=" not in token
        if takes_value and rest and not rest[0].startswith("--"):
            options.append(rest.pop(0))
    typed = read_command_line(options)
    own = {key: typed.settings.pop(key, None) for key in ("checkpoint", "name", "tracking_uri")}
    faults = [f"{key}: one value is expected." for key in own if isinstance(own[key], dict)]
    if len(runs) != 1:
        said = f"{len(runs)} came ({', '.join(runs)})" if runs else "none came"
        faults.append(f"One run must be named, and {said}: python -m research.evaluate RUN.")
    faults += refused_settings(typed)
    if faults:
        raise ConfigurationError(faults)
    return Asked(runs[0], own["checkpoint"], own["name"], own["tracking_uri"], typed)


def refused_settings(typed: CommandLine) -> list[str]:
    """A sentence for each setting that belongs to the training."""
    faults = []
    if typed.files or typed.print_config is not None:
        faults.append("config: the run's own configuration is used; no other can be given.")
    for key in typed.settings:
        if key != "data":
            faults.append(
                f"{key}: no such setting of an evaluation; a run keeps its own, only data and "
                "trainer may be given. To change it, train again: python -m research.fit."
            )
    for token in typed.passed_on:
        flag = token.removeprefix("--trainer.").partition("=")[0]
        if flag not in OF_A_MACHINE:
            faults.append(
                f"trainer.{flag}: nothing is trained here; what may be given of the trainer is "
                f"{', '.join(OF_A_MACHINE)}."
            )
    return faults


# ---- the evaluation ------------------------------------------------------------------------------


def evaluate(asked: Asked, is_first: bool) -> str:
    """Score, record what is new, and return the table; `is_first` of the processes records."""
    from lightning.pytorch import seed_everything

    from research import evaluation
    from research.building import build_classifier, build_trainer
    from research.callbacks import Pace, Progress
    from research.checkpoints.trained import (
        find_checkpoint,
        is_own_store,
        load_weights,
        read_checkpoint,
        settings_of,
    )
    from research.configuration.schema import resolve
    from research.faults import memory
    from research.training import endings, nothing_left_behind

    recorded, path = find_checkpoint(asked.run, asked.checkpoint, asked.tracking_uri)
    typed = asked.settings
    is_own = recorded is not None and is_own_store(recorded.tracking_uri)
    checkpoint = read_checkpoint(path, trust=typed.trust or is_own)
    settings, trust = settings_of(checkpoint), checkpoint.trust
    own = resolve(CommandLine(files=[settings], trust=trust))
    configuration = resolve(CommandLine([settings], typed.settings, typed.passed_on, trust=trust))
    is_other_data = not shows_same_pictures(own, configuration)
    limit = configuration.values.trainer.limit_test_batches
    if is_other_data or limit == 0:  # the run may have tested on fewer pictures, or on none
        configuration.values.trainer.limit_test_batches = limit = None
    if is_other_data:
        fill_in_image_size(configuration, typed.settings, checkpoint.pictures)
    is_best = recorded is None or path.name == recorded.checkpoint_name()
    is_new = is_other_data or not is_best or asked.name is not None
    if asked.name is not None and recorded is None:
        raise ConfigurationError(
            f"name: {path} is a file, and no run to add anything to; leave --name out, or give "
            "the run."
        )
    with nothing_left_behind():
        seed_everything(configuration.values.seed_everything, workers=False, verbose=False)
        data = build_pictures(configuration, checkpoint.pictures, is_other_data)
        name = None
        note = {**pictures_settings(configuration), "checkpoint": path.name}
        if is_new and recorded is not None:
            name = choose_name(asked.name, data, None if is_best else path.stem)
            refuse_taken(name, note, recorded.tags)
        classifier = build_classifier(configuration, data)
        load_weights(classifier, checkpoint.weights, path)
        shows_bar = configuration.values.trainer.enable_progress_bar is not False
        trainer = build_trainer(configuration, [Progress(Pace())] if shows_bar else [])
        if trainer.num_devices > 1:
            data.share_with_others()
        with endings(), memory.told_plainly(configuration, classifier.network, learns=False):
            figures, predictions = evaluation.test(trainer, classifier, data)
    if predictions is None or not is_first:
        return ""
    if name is not None:
        assert recorded is not None
        record(recorded, name, figures, predictions, data, note, is_other_data)
    looks = None if recorded is None or is_other_data else count_look(recorded)
    before = {} if recorded is None or is_new else recorded.metrics
    lines = [title(recorded, checkpoint, len(predictions.labels), data), *table(figures, before)]
    if limit is not None and limit != 1.0:
        lines.append(f"As in the run, trainer.limit_test_batches is {limit}: not all were scored.")
    if name is not None:
        lines.append(f"Added to the run as {name}/*, with files in evaluations/{name}/.")
    elif before:
        lines.append(compare(figures, before))
    if looks is not None:
        lines.append(looks)
    return "\n".join(lines)


def shows_same_pictures(own: "Configuration", other: "Configuration") -> bool:
    """True where two configurations test on the same pictures, however they are batched."""
    return own.classes["data"] is other.classes["data"] and pictures_settings(
        own
    ) == pictures_settings(other)


def pictures_settings(configuration: "Configuration") -> dict[str, Any]:
    """The data set by its name, and the settings that choose its test pictures."""
    from research.data import ImageData

    common = inspect.signature(ImageData.__init__).parameters
    arguments = configuration.arguments("data").items()
    name = configuration.classes["data"].__name__
    return {"data": name, **{key: value for key, value in arguments if key not in common}}


def fill_in_image_size(
    configuration: "Configuration", typed: Mapping[str, Any], pictures: "Pictures"
) -> None:
    """Other pictures are brought to the size that the network knows, unless another is asked for.

    ConfigurationError if it is: the network has learned from one size.
    """
    arguments = configuration.arguments("data")
    if "image_size" not in arguments:
        return
    was_typed = "image_size" in typed.get("data", {})
    if was_typed and arguments["image_size"] != pictures.image_size:
        raise ConfigurationError(
            f"data.image_size is {arguments['image_size']}, and the run's network has learned from "
            f"pictures of {pictures.image_size}; leave it out."
        )
    configuration.values["data.init_args.image_size"] = pictures.image_size


def build_pictures(
    configuration: "Configuration", pictures: "Pictures", is_other: bool
) -> "ImageData":
    """The data set with the run's order of classes and normalisation.

    ConfigurationError where it does not fit.
    """
    from research.building import build_data, faults_of
    from research.data import ImageFolder
    from research.data.gallery import _Gallery, find_gallery

    folder = None
    if is_other and configuration.classes["data"] is ImageFolder:
        arguments = configuration.arguments("data")
        with faults_of("data"):
            folder = find_gallery(Path(arguments["root"]).expanduser())
    if folder is None:
        data = build_data(configuration)
        refuse_other_pictures(data, pictures)
    else:
        of_run = (pictures.image_size, pictures.normalization)
        with faults_of("data"):
            data = _Gallery(folder, *of_run, arguments["batch_size"])
            refuse_other_pictures(data, pictures)
            data.setup()
    put_in_order(data, pictures.class_names)
    data.normalization = pictures.normalization
    return data


def refuse_other_pictures(data: "ImageData", pictures: "Pictures") -> None:
    if sorted(data.class_names) != sorted(pictures.class_names):
        raise ConfigurationError(
            f"data: the run's classes are {listed(pictures.class_names)}, and these pictures have "
            f"{listed(data.class_names)}. They must be the same."
        )
    if data.image_size != pictures.image_size:
        raise ConfigurationError(
            f"data: these pictures have {data.image_size} pixels a side, and the run's network "
            f"has learned from {pictures.image_size}. ImageFolder brings pictures to any size."
        )


def put_in_order(data: "ImageData", class_names: tuple[str, ...]) -> None:
    """Number the classes as in `class_names`: a folder's are sorted, those drawn are not."""
    import torch

    from research.data.split import Split, Splits

    if data.class_names == class_names:
        return
    numbers = torch.tensor([class_names.index(name) for name in data.class_names])
    splits = (data.splits.train, data.splits.val, data.splits.test)
    data.splits = Splits(*(Split(split.images, numbers[split.labels]) for split in splits))
    data.class_names = class_names


def listed(names: Sequence[str]) -> str:
    more = len(names) - 12
    return f"({', '.join(names[:12])}{f' and {more} more' if more > 0 else ''})"


# ---- the record ----------------------------------------------------------------------------------


def choose_name(typed: str | None, data: "ImageData", other_checkpoint: str | None) -> str:
    """The first part of the metrics' names; ConfigurationError for one that means something else.

    A name that was typed must be a good one; the data set's is made one.
    """
    from research.tracking.runs import recordable_names

    name = typed
    if name is None:
        parts = [data.dataset_name, *([] if other_checkpoint is None else [other_checkpoint])]
        (name,) = recordable_names(["-".join(parts)])
    if name in TAKEN_NAMES:
        raise ConfigurationError(
            f"name: {name} stands for figures of the training ({', '.join(TAKEN_NAMES)}); choose "
            "another with --name."
        )
    if recordable_names([name]) != [name]:
        raise ConfigurationError(
            f"name: {name!r} cannot be part of a metric's name; letters, digits, space and "
            "_ - . : can."
        )
    return name


def refuse_taken(name: str, note: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    """ConfigurationError where the run has figures of other pictures by this name already."""
    before = json.loads(tags.get(f"evaluation.{name}", "{}"))
    now = json.loads(json.dumps(note, default=str))
    changed = [key for key in now if key in before and before[key] != now[key]]
    if changed:
        told = "; ".join(f"{key} was {before[key]}, is {now[key]}" for key in changed)
        raise ConfigurationError(
            f"name: the run has figures of something else as {name}/* ({told}). Choose another "
            "name with --name."
        )


def record(
    recorded: "RecordedRun",
    name: str,
    figures: Mapping[str, float],
    predictions: "Predictions",
    data: "ImageData",
    note: Mapping[str, Any],
    is_other_data: bool,
) -> None:
    """Add the figures to the run as NAME/..., and what they are made of as files and a tag."""
    from research.evaluation import write_class_table
    from research.recording.album import leaving_out
    from research.recording.identity import describe_split
    from research.tracking.run import Recorder

    names = data.class_names
    note = {**note, "pictures": len(predictions.labels)}
    with contextlib.ExitStack() as stack:
        # Entered first: the files must stay until they are delivered.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        recorder = stack.enter_context(Recorder.start())
        run = stack.enter_context(recorder.open_run(recorded.tracking_uri, recorded.run_id))
        run.wait()
        named = {f"{name}/{key.removeprefix('test/')}": figures[key] for key in figures}
        run.log_metrics(named, step=0)  # as those of the test: figures of no epoch's axis
        if is_other_data:
            run.log_inputs([describe_split(data, "test", context=name)])
        run.set_tags({f"evaluation.{name}": json.dumps(note, default=str)})
        write_class_table(predictions, names, folder / "classes.csv")
        run.log_artifact(folder / "classes.csv", f"evaluations/{name}")
        with leaving_out("the confusion matrix"):
            from research.pictures.results import draw_confusion_matrix

            picture = folder / "confusion_matrix.png"
            draw_confusion_matrix(predictions.probabilities, predictions.labels, names, picture)
            run.log_artifact(picture, f"evaluations/{name}")


def count_look(recorded: "RecordedRun") -> str:
    """Add a look at the test pictures to those that the run counts; says how many there are.

    A store that cannot be written to is no reason to keep the figures back.
    """
    from research.tracking.arms import add_look_at_test
    from research.tracking.store import TrackingError

    try:
        looks = add_look_at_test(recorded)
    except TrackingError as error:
        return f"This look at the test pictures could not be counted: {error}"
    return f"The run counts {looks} look{'s' * (looks > 1)} at its test pictures now."


# ---- the table -----------------------------------------------------------------------------------


def title(
    recorded: "RecordedRun | None", checkpoint: "Checkpoint", count: int, data: "ImageData"
) -> str:
    who = f"{recorded.run_name} ({recorded.run_id})" if recorded else str(checkpoint.path)
    what = f"{checkpoint.path.name}, epoch {checkpoint.epoch}"
    return f"{who}: {what}, on {count:,} test pictures of {data.dataset_name}"


def table(figures: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """A line for each figure but those of single classes; with what was recorded, if it was."""
    shown = [name for name in figures if not name.startswith("test/accuracy/")]
    heads = ["recorded", "now"] if before else ["now"]
    lines = [" " * 32 + "".join(f"{head:>12}" for head in heads)]
    for name in sorted(shown, key=lambda name: name != "test/loss"):
        values = [before.get(name), figures[name]] if before else [figures[name]]
        cells = (shown_as(name, value).rjust(12) for value in values)
        lines.append(f"  {name.removeprefix('test/'):<30}{''.join(cells)}")
    return lines


def shown_as(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4f}"


def compare(figures: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Whether these are the recorded figures, to the last digit."""
    common = [name for name in figures if name in before]
    if not common:
        return (
            "No test figures were recorded to compare with, and nothing was added to the run; "
            "--name NAME adds these."
        )
    differing = [name for name in common if not same(figures[name], before[name])]
    apart = {name: abs(figures[name] - before[name]) for name in differing}
    if not apart:
        return f"The same as recorded: {len(common)} figures, to the last digit. Nothing was added."
    worst = max(apart, key=lambda name: apart[name])
    if apart[worst] < 1e-6:
        return (
            f"The same as recorded to within {apart[worst]:.0e}: another machine, batch size or "
            "number of devices adds up in another order. Nothing was added."
        )
    return (
        f"{len(apart)} of {len(common)} figures differ from those recorded, most {worst}: by "
        f"{apart[worst]:.1e}. Either the pictures have changed, or another machine or precision "
        "computes otherwise. Nothing was added."
    )


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


if __name__ == "__main__":
    run_as_script(main)
