"""Trains a classifier of small pictures, tests it once, and records all of it in MLflow.

    python -m research.fit [--config FILE ...] [--key value ...]

Without arguments: the tutorial's CNN on CIFAR-10 with cross entropy and plain SGD, 10 epochs.
`HELP` below is what `--help` prints; torch, Lightning and MLflow are imported only to train.
"""

import argparse
import contextlib
import math
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from research.command import exit_code_of, run_as_script
from research.configuration.compose import (
    CommandLine,
    ConfigurationError,
    compose,
    read_command_line,
)
from research.processes.launch import is_rank_zero, launch
from research.tracking.store import resolve_tracking_uri

if TYPE_CHECKING:
    from research.repetition.repeating import Repetition
    from research.tracking.run import Recorder
    from research.training import Result

HELP = """\
python -m research.fit [--config FILE ...] [--key value ...]

Train a network on pictures, validate each epoch, test the best checkpoint once, and record
everything in MLflow. Several --config files merge in order; keys on the command line win.

  --model.network NAME        CNN, ResNet9, Airbench94, or torchvision.models.resnet18, ...
  --model.loss NAME           a loss of torch.nn: CrossEntropyLoss, MSELoss, MultiMarginLoss, ...
  --optimizer NAME            an optimizer of torch.optim: SGD, AdamW, Muon, LBFGS, ...
  --lr_scheduler NAME         a schedule of torch.optim.lr_scheduler: OneCycleLR, ..., or null
  --data NAME                 CIFAR10, ImageFolder or Synthetic
  --KEY.ARGUMENT VALUE        an argument of what was chosen: --optimizer.lr 0.1
  --trainer.FLAG VALUE        any flag of Lightning's Trainer: max_epochs, devices, precision, ...
  --seed_everything N         the seed (0); apart: --random.weights, .order, .augmentation, .dropout
  --experiment, --run_name    names in MLflow
  --tracking_uri URI          where runs go (else MLFLOW_TRACKING_URI, mlflow.db); "": nowhere
  --checkpoint.save_top_k N   how many of the best checkpoints are kept (1); .monitor, .save_last
  --log_pictures false        no pictures in the record; also --log_model, --log_system_metrics
  --seeds 5 (or 1,2,3)        train on several seeds, tell mean and interval; again, it goes on.
                              Side by side: --workers N, --workers_per_gpu N, --together N
  --resume RUN                go on with a run (id or name); --allow_changes: by other settings
  --scale_lr linear           learning rates times the number of processes; sqrt: times its root
  --non_finite_loss ignore    train on after a loss of NaN or infinity, which else stops the run
  --trust                     let the files name classes of any package; --print_config: show all

Examples
  python -m research.fit --config experiments/quickstart.yaml
  python -m research.fit --model.loss MSELoss --optimizer AdamW --optimizer.lr 1e-3 --seeds 5
  python -m research.fit --data ImageFolder --data.root pictures --trainer.max_epochs 3

More: --help.TOPIC, of run, model, optimizer, lr_scheduler, data, trainer; --full_help: all of it
"""


OF_SEEDS = ("workers", "workers_per_gpu", "together")  # options beside --seeds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is one of `research.command`'s."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code_of(lambda: run(typed))


def run(arguments: Sequence[str]) -> int:
    topic = help_topic(arguments)
    if topic is not None:
        show_help(topic)
        return 0
    options, rest = read_options(arguments)
    command = read_command_line(rest)
    if command.print_config is not None:
        print_config(command)
        return 0
    settings = compose(*command.sources)
    if options.seeds is not None:
        return train_seeds(options, command, settings, arguments)
    first = is_rank_zero()  # asked now: Lightning makes this process a rank when it trains
    with recorder_for(settings) as recorder:
        from research.configuration.schema import resolve
        from research.faults.stopping import Stopped
        from research.processes.jobs import requeue
        from research.resumption import begin_anew, is_to_begin_anew, resume, run_of_job
        from research.training import fit

        configuration, resumption = resolve(command), None
        name = options.resume
        before = None if name is not None else run_of_job(configuration)
        if before is not None and before.status == "FINISHED":
            if first:
                print(f"{before.described()} of this job is finished; nothing is left to do.")
            return 0
        if before is not None and is_to_begin_anew(before):
            resumption = begin_anew(before)
        elif before is not None:
            name = before.run_id
        if name is not None:
            configuration, resumption = resume(name, command, options.allow_changes)
        if first and resumption is not None:
            print(resumption.described(), file=sys.stderr)
        try:
            result = fit(configuration, recorder, resumption=resumption)
        except Stopped as stopped:
            if stopped.signal == signal.SIGUSR1:  # SLURM's word that the time is nearly up
                told = requeue()
                if told is not None:
                    print(told, file=sys.stderr)
            raise
    if first:
        print(report(result, tracking_uri_of(settings)))
    return 0 if result.refused is None else 1


def read_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is about the run and no setting of it, and the rest of the arguments."""
    try:
        options, rest = option_parser().parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigurationError(
            "resume: the run's id, its first digits, or its name is missing: --resume RUN."
            if "resume" in str(error)
            else f"{error.argument_name}: a value is missing; write {error.argument_name} N."
        ) from error
    for name in OF_SEEDS:
        if options.seeds is None and getattr(options, name) is not None:
            raise ConfigurationError(f"{name}: it is for several seeds, beside --seeds.")
    return options, rest


def option_parser() -> argparse.ArgumentParser:
    """What `read_options` takes, and in which words `--full_help` tells of it."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    add = parser.add_argument
    add("--resume", metavar="RUN", help="go on with a run (its id, the first digits, its name)")
    add("--allow_changes", action="store_true", help="go on by other settings or with other code")
    add("--seeds", metavar="N", help="train on N seeds, from --seed_everything on, or on 1,2,3")
    add("--workers", metavar="N", help="processes that train them (one for each GPU, or one)")
    add("--workers_per_gpu", metavar="N", help="so many of them on each GPU (1)")
    add("--together", metavar="N", help="so many seeds trained at once in each of them (1)")
    return parser


# ---- several seeds -------------------------------------------------------------------------------


def train_seeds(
    options: argparse.Namespace,
    command: CommandLine,
    settings: Mapping[str, Any],
    arguments: Sequence[str],
) -> int:
    """Train the experiment on several seeds, side by side where the device allows."""
    from research.repetition.seeds import read_seeds, seeds_from

    asked = read_seeds(options.seeds)
    refuse_beside_seeds(options, command, asked)
    sizes = {name: whole(name, getattr(options, name)) for name in OF_SEEDS}
    with recorder_for(settings) as recorder:
        from research.configuration.schema import resolve
        from research.repetition.repeating import repeat
        from research.repetition.trainings import crossed

        configuration = resolve(command)
        wanted = crossed([""], seeds_from(asked, configuration.values.seed_everything))
        came = repeat(
            {"": configuration},
            wanted,
            recorder=recorder,
            command=shlex.join(["python", "-m", "research.fit", *arguments]),
            anew="give another --run_name",
            goes_on_with_other_code=options.allow_changes,
            workers=sizes["workers"],
            workers_per_gpu=sizes["workers_per_gpu"],
            together=sizes["together"] or 1,
        )
    print(report_of_seeds(came, tracking_uri_of(settings)))
    finished = {each.key for each in came.trained if each.finished}
    return 0 if finished.issuperset(training.key for training in wanted) else 1


def refuse_beside_seeds(
    options: argparse.Namespace, command: CommandLine, asked: int | list[int]
) -> None:
    """ConfigurationError for what does not go with several seeds."""
    if options.resume is not None:
        raise ConfigurationError(
            "seeds: --resume goes on with one run, --seeds trains several. To go on with several, "
            "give the command again that began them; to go on with one, leave out --seeds."
        )
    if isinstance(asked, list) and "seed_everything" in command.settings:
        raise ConfigurationError(
            "seeds: it names the seeds, and --seed_everything another. Leave out one of the two; "
            "--seeds 5 --seed_everything 10 means 10 to 14."
        )
    started = launch()
    if not is_rank_zero() or (started is not None and started.world_size > 1):
        by = "another process" if started is None else started.by
        raise ConfigurationError(
            f"seeds: {by} started several processes of this command, and --seeds starts those it "
            "needs by itself. Give the command once; --trainer.devices says how many devices each "
            "seed has, --workers how many seeds train at once."
        )


def whole(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise ConfigurationError(f"{name}: expected a whole number from 1 on, came {text!r}.")
    return int(text)


def report_of_seeds(came: "Repetition", tracking_uri: str | None) -> str:
    """The table that ends several seeds: each, what they have in common, and where to look."""
    from research.repetition.summary import table

    width = shutil.get_terminal_size((100, 24)).columns
    lines = [table(came.trained, width), "", *came.notes]
    if came.parent is not None and tracking_uri is not None:
        from research.tracking.store import show_command

        lines.append(f"{'show it:':<10}{show_command(tracking_uri, *came.parent)}")
    return "\n".join(lines)


# ---- what is asked for ---------------------------------------------------------------------------


def help_topic(arguments: Sequence[str]) -> str | None:
    """The part of the help that is asked for: "" for the one screen, None for none."""
    for argument in arguments:
        if argument in ("-h", "--help"):
            return ""
        if argument == "--full_help" or argument.startswith("--help."):
            return argument.removeprefix("--help.").removeprefix("--")
    return None


def show_help(topic: str) -> None:
    if not topic:
        print(HELP, end="")
        return
    from research.configuration.help import explain_topic  # needs torch to know torch's classes

    explained = explain_topic(topic)
    if topic in ("run", "full_help"):
        print(explain_options())
    print(explained)


def explain_options() -> str:
    """All that may be typed and is no setting, a line each."""
    parser = option_parser()
    add = parser.add_argument  # these `read_command_line` takes
    add("--config", metavar="FILE", help="a YAML file of settings; several merge in order")
    add("--print_config", action="store_true", help="print all settings, as YAML that runs again")
    add("--print_config=comments", action="store_true", help="the same, each below what it is")
    add("--print_config=skip_default", action="store_true", help="only those that differ")
    add("--trust", action="store_true", help="let the files name classes of any package")
    return parser.format_help()


def print_config(command: CommandLine) -> None:
    """Print the configuration that was typed; `=comments`, `=skip_default` are jsonargparse's."""
    from research.configuration.schema import resolve

    known = {"": {}, "comments": {"with_comments": True}, "skip_default": {"skip_default": True}}
    flag = command.print_config or ""
    if flag not in known:
        raise ConfigurationError(
            f'print_config: there is no "{flag}"; there are {", ".join(filter(None, known))}.'
        )
    print(resolve(command).yaml(**known[flag]), end="")


@contextlib.contextmanager
def recorder_for(settings: Mapping[str, Any]) -> "Iterator[Recorder | None]":
    """A recorder that starts now, so that MLflow is imported beside torch; None if not needed.

    A wrong tracking address is told here, before anything slow.
    """
    if tracking_uri_of(settings) is None or not is_rank_zero():
        yield None
        return
    from research.tracking.run import Recorder

    with Recorder.start() as recorder:
        yield recorder


def tracking_uri_of(settings: Mapping[str, Any]) -> str | None:
    typed = settings.get("tracking_uri")
    return resolve_tracking_uri(None if typed == "null" else typed)


def report(result: "Result", tracking_uri: str | None) -> str:
    """The table that ends a run: loss and accuracy on each split, speed, and where to look."""
    title = title_of(result)
    lines = [f"{title:<18}{'loss':>10}{'accuracy':>11}" if result.metrics else "nothing measured"]
    for split in ("train", "val", "test"):
        if f"{split}/loss" in result.metrics:
            loss, accuracy = result.metrics[f"{split}/loss"], result.metrics[f"{split}/accuracy"]
            lines.append(f"  {split:<16}{loss:>10.4f}{accuracy:>11.2%}")
    facts = []
    if any(math.isnan(value) for value in result.metrics.values()):
        facts.append(("warning", "the loss is not a number any more; try a smaller optimizer.lr"))
    if result.images_per_second is not None:
        speed = f"{result.images_per_second:,.0f} images/s in training"
        how = result.precision + (", CUDA graphs" if result.captured_steps else "")
        facts.append(("speed", f"{speed}, {how}"))
    facts.append(("time", f"{result.seconds:.0f} s"))
    if result.best_checkpoint is not None:
        facts.append(("checkpoint", result.best_checkpoint))
    if result.run_id is not None and tracking_uri is not None:
        from research.tracking.store import show_command

        facts.append(("run", f"{result.run_name} ({result.run_id})"))
        page = show_command(tracking_uri, result.run_id, result.experiment_id or "")
        facts.append(("show it", page))
        for what in (result.refused, result.waiting):
            if what is not None:
                facts.append(("record", what))
        if tracking_uri == resolve_tracking_uri(None) and result.best_checkpoint is not None:
            facts.append(("use it", f"python -m research.predict {result.run_id[:8]} PICTURE ..."))
    return "\n".join([*lines, *(f"{name + ':':<18}{fact}" for name, fact in facts)])


def title_of(result: "Result") -> str:
    """Whose figures they are; with several validations in an epoch, not always its end's."""
    if result.best_epoch is None:
        return "the last weights"
    ended = next((row for row in result.history if row["epoch"] == result.best_epoch), {})
    is_its_end = ended.get("val/accuracy") == result.metrics.get("val/accuracy")
    return f"{'' if is_its_end else 'within '}epoch {result.best_epoch}"


if __name__ == "__main__":
    run_as_script(main)
