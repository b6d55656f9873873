"""Many small trainings at once on one device: `fit_together(configurations)`.

Each member is a training as `fit` does it, with a run, checkpoints, figures and an end of its own:
`fit` itself, in a thread that waits wherever an epoch is to be trained (turns.py).  When all that
still train wait, the epoch is trained and validated for all of them by one stack of their networks
(stacking.py), with each member's own loss, optimizer, schedule and clipping.  Then each goes on by
itself, one after another: figures, checkpoints, pruning, the next epoch, the test at the end.

Members may differ in seed, loss, optimizer and schedule (`groups_of` says who can be together).
Whoever leaves, since it has ended, was pruned, or its loss is no number any more, leaves the rest
to go on.  What cannot be stacked is trained one after another, what does not fit into the memory at
once in halves (halves.py).
"""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from research.callbacks import Pace
from research.configuration.compose import ConfigurationError
from research.configuration.schema import Configuration
from research.data.kept import Kept
from research.faults.stopping import Stopped, ending_of, listening
from research.recording.identity import WITHOUT_EFFECT
from research.recording.record import is_recorded
from research.together.halves import Company
from research.together.shared_epoch import Member, SharedEpochLoop, callbacks_of, train_epochs
from research.together.turns import Surroundings, Turn
from research.tracking.run import Recorder
from research.training import Result, endings, fit, nothing_left_behind, prints_by_itself

# What members need not have in common: each has its own.
OWN = ("seed_everything", "random", "data.seed", "model.loss", "optimizer", "lr_scheduler")
OWN_TOO = ("model.decay_biases_and_norms", *WITHOUT_EFFECT)
# What a training in common does as Lightning does it by itself.
PLAIN: Mapping[str, Sequence[Any]] = {
    "model.compile": (False,),
    "checkpoint.every_n_train_steps": (None,),
    "trainer.strategy": ("auto",),
    "trainer.num_nodes": (1,),
    "trainer.fast_dev_run": (False,),
    "trainer.max_steps": (-1,),
    "trainer.min_steps": (None,),
    "trainer.max_time": (None,),
    "trainer.val_check_interval": (None, 1.0),
    "trainer.num_sanity_val_steps": (0,),
    "trainer.profiler": (None,),
    "trainer.detect_anomaly": (False,),
    "trainer.barebones": (False,),
    "trainer.plugins": (None,),
    "trainer.sync_batchnorm": (False,),
    "trainer.reload_dataloaders_every_n_epochs": (0,),
    "trainer.precision": (None, 32, "32", "32-true", "bf16-mixed"),
}
# Their steps ask for the loss several times.
ASKS_AGAIN = ("LBFGS",)

Ending = Result | Exception
Watch = Callable[[int, Mapping[str, float]], bool]


# ---- who can be together -------------------------------------------------------------------------


def why_alone(configuration: Configuration) -> str | None:
    """Why a training can have no company, in half a sentence; None if it can."""
    settings = configuration.flat()
    for key, allowed in PLAIN.items():
        if settings[key] not in allowed:
            return f"{key} is {settings[key]}"
    if settings["optimizer"].rpartition(".")[2] in ASKS_AGAIN:
        return f"the optimizer is {settings['optimizer']}, which asks for a loss several times"
    if not asks_for_one_device(settings["trainer.devices"], settings["trainer.accelerator"]):
        return f"trainer.devices is {settings['trainer.devices']}"
    return None


def asks_for_one_device(devices: Any, accelerator: Any) -> bool:
    if str(devices) in ("auto", "-1"):
        return accelerator == "cpu" or torch.cuda.device_count() < 2
    return str(devices) in ("1", "[0]")


def in_common(configuration: Configuration) -> str:
    """What members must have in common; equal texts can be trained together."""
    settings = {
        key: value
        for key, value in configuration.flat().items()
        if key not in OWN_TOO and not any(key == own or key.startswith(f"{own}.") for own in OWN)
    }
    loss: Any = configuration.classes["model.loss"]
    return json.dumps(settings | {"per_cell": loss.per_cell}, sort_keys=True)


def loss_in(configuration: Configuration) -> str:
    """The loss and its settings; equal texts are equal losses."""
    loss = configuration.classes["model.loss"]
    return repr((loss, sorted(configuration.arguments("model.loss").items())))


def groups_of(configurations: Sequence[Configuration]) -> list[list[int]]:
    """The places of those that can be trained together; a group of one trains alone."""
    groups: dict[str, list[int]] = {}
    for place, configuration in enumerate(configurations):
        is_alone = why_alone(configuration) is not None
        key = f"alone {place}" if is_alone else in_common(configuration)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def refuse_strangers(configurations: Sequence[Configuration]) -> None:
    """ConfigurationError unless all can be trained together."""
    for configuration in configurations:
        reason = why_alone(configuration)
        if reason is not None:
            raise ConfigurationError(f"This can only be trained by itself: {reason}.")
    if len({in_common(configuration) for configuration in configurations}) > 1:
        one, *others = [configuration.flat() for configuration in configurations]
        keys = [key for key in one if any(one[key] != other.get(key) for other in others)]
        own = [key for key in keys if not key.startswith(OWN) and key not in OWN_TOO]
        raise ConfigurationError(
            f"These cannot be trained together: they differ in {', '.join(own) or 'the loss'}. "
            "Networks, batches and epochs must be the same; seeds, optimizers, schedules and "
            "losses (of pictures, or of cells) may differ."
        )


# ---- the whole of it -----------------------------------------------------------------------------


def fit_together(
    configurations: Sequence[Configuration],
    recorder: Recorder | None = None,
    *,
    kept: Kept | None = None,
    tags: Mapping[str, str] = {},
    on_epoch: Watch | None = None,
) -> list[Ending]:
    """What `fit` returns of each, in their order; of one that failed, what it was that failed.

    recorder: a warm one; None starts one if anything is to be recorded.
    kept: pictures that an earlier call in this process has read.
    tags: of each record, beside its own.
    on_epoch: told a member's place and its figures of validation after each epoch; False ends it.

    ConfigurationError, before anything is recorded, where they cannot be trained together.
    KeyboardInterrupt after Ctrl-C and SystemExit after SIGTERM, once each has saved `last.ckpt`.
    """
    refuse_strangers(configurations)
    kept = Kept(most=len(configurations)) if kept is None else kept
    tags = {"trained_together": str(len(configurations)), **tags}
    with contextlib.ExitStack() as stack:
        if recorder is None and any(is_recorded(each) for each in configurations):
            recorder = stack.enter_context(Recorder.start())

        def work(place: int, turn: Turn) -> Result:
            callbacks: list[Callback] = [Seat(turn, configurations[place])]
            if on_epoch is not None:
                callbacks.append(Watcher(functools.partial(on_epoch, place)))
            with turn.hearing():
                return fit(configurations[place], recorder, callbacks, tags=tags, kept=kept)

        works = [functools.partial(work, place) for place in range(len(configurations))]
        quiet = not any(prints_by_itself(each.values.trainer) for each in configurations)
        return train_in_turns(works, quiet)


def train_in_turns(works: Sequence[Callable[[Turn], Any]], quiet: bool = True) -> list[Any]:
    """What each function returns, or the exception it ends with; each may `fit` with a Seat.

    KeyboardInterrupt or SystemExit after a signal, once all have ended in order.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(nothing_left_behind(quiet))
        stack.enter_context(endings())
        stopper = stack.enter_context(listening())
        stopper.training = True  # a signal is heard, and waits for the end of the step
        turns = [Turn(work) for work in works]
        waiting: dict[Turn, Member | None] = {turn: None for turn in turns}
        stack.callback(end_all, waiting)
        answers: dict[Turn, Exception | None] = {}
        seen: dict[str, Company] = {}
        own: Surroundings | None = None  # of what is done for all, from where the last one began
        while waiting:
            for turn in list(waiting):
                if stopper.heard is not None and not turn.has_begun:
                    turn.ends_by = ending_of(Stopped(stopper.heard))
                waiting[turn] = turn.go_on(answers.get(turn))
                if waiting[turn] is None:
                    del waiting[turn]
            members = [member for member in waiting.values() if member is not None]
            if own is not None:
                own.restore()
            train_epochs(members, stopper, seen)
            own = Surroundings.of_now()
            answers = {turn: member.error for turn, member in waiting.items() if member}
        if stopper.heard is not None:
            raise ending_of(Stopped(stopper.heard))
        for turn in turns:
            if turn.error is not None and not isinstance(turn.error, Exception):
                raise turn.error
        return [turn.result if turn.error is None else turn.error for turn in turns]


def end_all(waiting: Mapping[Turn, Any]) -> None:
    """Let nobody wait for ever where this process fails in between."""
    for turn in waiting:
        turn.ends_by = RuntimeError("What was trained together with others was given up.")
        while turn.go_on(turn.ends_by) is not None:
            pass


# ---- a member's end ------------------------------------------------------------------------------


class Seat(Callback):
    """A training's place among others: lets them train its epochs with theirs."""

    def __init__(self, turn: Turn, configuration: Configuration) -> None:
        self.turn = turn
        self.company = in_common(configuration)
        self.loss = loss_in(configuration)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            own = trainer.fit_loop.epoch_loop
            shared = SharedEpochLoop(own, self.turn, self.company, self.loss)
            trainer.fit_loop.epoch_loop = shared


class Watcher(Callback):
    """Ends a training where `goes_on`, told the figures of a validated epoch, says no."""

    def __init__(self, goes_on: Callable[[Mapping[str, float]], bool]) -> None:
        self.goes_on = goes_on

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(each.validated for each in callbacks_of(trainer) if isinstance(each, Pace)):
            return
        named = trainer.callback_metrics.items()
        figures = {name: value.item() for name, value in named if name.startswith("val/")}
        if not self.goes_on({"epoch": trainer.current_epoch + 1, **figures}):
            trainer.should_stop = True
