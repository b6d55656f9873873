"""From a configuration to the objects that train: data, network, classifier, trainer.

Whatever cannot be built is told as a fault of the setting that asked for it, and everything is
tried once on nothing before a run is recorded.
"""

import contextlib
import functools
import math
import re
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from research.averaging import AveragingGoesOn
from research.checkpoints.io import DurableCheckpointIO
from research.classifier import Classifier
from research.configuration.compose import ConfigurationError
from research.configuration.schema import LEFT_OPEN, Configuration, is_torchvision
from research.data import ImageData
from research.data.batches import num_batches
from research.data.kept import Kept
from research.data.normalization import normalize
from research.data.streams import seed_of
from research.faults import memory
from research.faults.memory import OutOfMemory
from research.networks import from_torchvision
from research.processes.launch import host_group
from research.processes.placement import check_placed, placed
from research.processes.sharding import SharedStatistics, is_sharded, strategy_for
from research.randomness import Seeds, drawing_from, seeds_of
from research.speed import capture
from research.speed.epoch_loop import DirectEpochLoop


def build_data(configuration: Configuration, kept: Kept | None = None) -> ImageData:
    """The data set, on disk and in memory; not read again where `kept` has it."""
    arguments = configuration.arguments("data")
    if arguments.get("seed", 0) is None:
        arguments["seed"] = configuration.values.seed_everything
    drawn_by = checked_seeds(configuration)
    with faults_of("data"):
        data = configuration.classes["data"](**arguments)
        data.draw_by(drawn_by.order, drawn_by.augmentation)
        asked = data.asked()
        made = None if kept is None else kept.find(asked)
        if made is not None:
            data.take_over(made)
        else:
            if host_group() is None:  # else the process that reads for all of a machine prepares
                data.prepare_data()
            data.setup("fit")
            if kept is not None:
                kept.keep(asked, data)
    return data


def checked_seeds(configuration: Configuration) -> Seeds:
    """The seed of each thing that is random; ConfigurationError for one that cannot be."""
    with faults_of("random"):
        return seeds_of(configuration)


def build_network(configuration: Configuration, data: ImageData) -> nn.Module:
    """The network that was chosen, made for the data's classes and picture size."""
    key, found = "model.network", configuration.classes["model.network"]
    arguments = configuration.arguments(key)
    for name in LEFT_OPEN[key]:
        if name in arguments:
            given, needed = arguments[name], getattr(data, name)
            if given is not None and given != needed:
                raise ConfigurationError(
                    f"{key}.{name} is {given}, and the data has {needed}; leave it out, it is "
                    "taken from the data."
                )
            arguments[name] = needed
    make = functools.partial(from_torchvision, found) if is_torchvision(found) else found
    with faults_of(key):
        network = make(**arguments)
        if not isinstance(network, nn.Module):
            raise ValueError(f"{found.__name__} makes no torch.nn.Module.")
    return network


def prepare(network: nn.Module, data: ImageData, count: int = 5000) -> None:
    """Let a network that has a `prepare` look at the first training pictures, before it trains.

    It is given up to `count` of them (N, C, H, W), normalised and not altered.
    """
    if not hasattr(network, "prepare"):
        return
    pixels = data.splits.train.pixels[:count].cpu()
    with faults_of("model.network"):
        images = normalize(pixels, *data.normalization.factors(pixels.shape[2]))
        network.prepare(images.permute(0, 3, 1, 2))  # type: ignore[operator]


def build_classifier(configuration: Configuration, data: ImageData) -> Classifier:
    """Network, loss, optimizer and schedule in one module, tried once on two black pictures.

    The network's weights are those after `torch.manual_seed(random.weights)`.  The loss draws what
    it begins with from a stream of its own, and no generator is moved by any of it.
    """
    seed = checked_seeds(configuration).weights
    with drawing_from(seed):
        return build_drawing(configuration, data, seed)


def build_drawing(configuration: Configuration, data: ImageData, seed: int) -> Classifier:
    """`build_classifier` by the generators as they are."""
    network = build_network(configuration, data)
    with faults_of("model.loss"), drawing_from(seed_of(seed, "loss")):
        loss = configuration.classes["model.loss"](**configuration.arguments("model.loss"))
    optimizer, lr_scheduler = (
        functools.partial(configuration.classes[key], **configuration.arguments(key))
        if configuration.classes[key] is not None
        else None
        for key in ("optimizer", "lr_scheduler")
    )
    assert optimizer is not None
    with faults_of("model"):
        classifier = Classifier(
            network, loss, optimizer, lr_scheduler, **configuration.arguments("model")
        )
    with torch.no_grad(), isolate_rng():
        with faults_of("model.network"):
            # `network.forward`: not through a compiled call, a fault should cost no compilation.
            score = network.cell_scores if loss.per_cell else network.forward
            pictures = torch.zeros(2, data.in_channels, data.image_size, data.image_size)
            network.eval()
            scores = score(pictures)  # type: ignore[operator]
            network.train()
            if scores.shape[:2] != (2, data.num_classes):
                raise ValueError(
                    f"it returns {tuple(scores.shape)} for 2 pictures of {data.num_classes} "
                    f"classes; expected (2, {data.num_classes})."
                )
        with faults_of("model.loss"):
            loss(scores, torch.zeros(2, dtype=torch.int64))
    try_optimizer(configuration, classifier)
    return classifier


def try_optimizer(configuration: Configuration, classifier: Classifier) -> None:
    """Make the optimizer and the schedule once, and refuse what would only fail in training."""
    with faults_of("optimizer"):
        try:
            optimizer = classifier.build_optimizer()
        except ValueError as error:
            raise ValueError(name_the_setting(str(error), configuration)) from error
    trainer = configuration.values.trainer
    if isinstance(optimizer, torch.optim.LBFGS):
        if trainer.accumulate_grad_batches > 1:
            raise ConfigurationError(
                "trainer.accumulate_grad_batches must be 1 with LBFGS, which evaluates a batch "
                "several times and would add its gradients up each time; choose a larger "
                "data.batch_size."
            )
        if trainer.precision in (16, "16", "16-mixed"):
            raise ConfigurationError(
                "trainer.precision must not be 16-mixed with LBFGS, which cannot scale gradients; "
                "choose bf16-mixed or 32-true."
            )
        line_search = configuration.arguments("optimizer")["line_search_fn"]
        if line_search not in (None, "strong_wolfe"):
            raise ConfigurationError(
                f"optimizer.line_search_fn is {line_search}; it must be strong_wolfe or null."
            )
    with faults_of("lr_scheduler"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule minds being stepped before the optimizer
        # The length of the run is known once Lightning has the batches; here any long one does.
        has_steps, has_epochs = trainer.max_steps != -1, trainer.max_epochs != -1
        scheduler = classifier.build_lr_scheduler(
            optimizer,
            total_steps=10**9 if has_steps or has_epochs else math.inf,
            max_epochs=10**6 if has_epochs else -1,
        )
        if isinstance(scheduler, ReduceLROnPlateau):
            if scheduler.mode != "min":
                raise ValueError("lr_scheduler.mode must be min: it is the loss that is watched.")
        elif scheduler is not None:
            scheduler.step()


def name_the_setting(fault: str, configuration: Configuration) -> str:
    """torch's "Invalid learning rate: -1" with the key that was set and what it may be."""
    about = re.match(r"Invalid (.+?)(?: value| parameter.*)?: (\S+)$", fault)
    name = {"learning rate": "lr", "epsilon": "eps"}.get(about[1], about[1]) if about else ""
    if about is None or name not in configuration.arguments("optimizer"):
        return fault
    optimizer = configuration.classes["optimizer"].__name__
    return f"optimizer.{name} is {about[2]}, and {optimizer} takes none such; it must be 0 or more."


def build_trainer(configuration: Configuration, callbacks: Sequence[Callback]) -> Trainer:
    """Lightning's Trainer by its own flags, with these callbacks before those it was given."""
    values = configuration.values.trainer
    least = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0}
    for name, bound in least.items():
        if values[name] is not None and values[name] < bound:
            raise ConfigurationError(
                f"trainer.{name} is {values[name]}; it must be {bound} or more."
            )
    if values.val_check_interval == 0:
        raise ConfigurationError("trainer.val_check_interval is 0; it must be more.")
    if isinstance(values.strategy, str) and re.search("spawn|fork|notebook", values.strategy):
        raise ConfigurationError(
            f"trainer.strategy is {values.strategy}, which leaves the results in processes that "
            "end; choose ddp, which starts the command anew on each device."
        )
    with faults_of("trainer"):
        settings = placed(configuration.trainer_arguments())
        optimizer = configuration.classes["optimizer"]
        assert optimizer is not None
        settings["strategy"] = strategy_for(settings["strategy"], optimizer.__name__)
        given = settings.pop("callbacks") or []
        given = given if isinstance(given, list) else [given]
        for callback in given:
            check_callback(callback)
        plugins = settings["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(each, CheckpointIO) for each in plugins):
            settings["plugins"] = [*plugins, DurableCheckpointIO()]
        if settings["logger"] in (None, True):
            settings["logger"] = False  # the run's own logger is added once there is a run
        if not any(isinstance(each, ModelCheckpoint) for each in [*callbacks, *given]):
            settings["enable_checkpointing"] = False  # else Lightning adds one of its own
        averaging = [
            AveragingGoesOn(each) for each in given if isinstance(each, StochasticWeightAveraging)
        ]
        watching = [SharedStatistics(), *callbacks, *given, *averaging]
        trainer = Trainer(**settings, callbacks=watching)
        if is_sharded(trainer) and trainer.world_size == 1:  # nothing to part
            trainer = Trainer(**settings | {"strategy": "auto"}, callbacks=watching)
        check_placed(trainer)
        check_batch_norm_sync(trainer)
        return trainer


def place_loop(trainer: Trainer, classifier: Classifier) -> DirectEpochLoop:
    """Let the trainer run an epoch's steps in the fastest way that trains the same."""
    loop, asked = trainer.fit_loop.epoch_loop, classifier.cuda_graphs
    possible = capture.is_possible(trainer.strategy.root_device, classifier.network)
    if asked and not possible:
        raise ConfigurationError(
            "model.cuda_graphs is true, and that takes a CUDA device and model.compile false."
        )
    captured = possible and asked is not False
    placed = capture.CapturedEpochLoop(loop, asked) if captured else DirectEpochLoop(loop)
    trainer.fit_loop.epoch_loop = placed
    return placed


def check_lengths(trainer: Trainer, data: ImageData) -> None:
    """ConfigurationError where the trainer's flags leave no batch, or an epoch ends too soon.

    Lightning says most of it too, but when the run is recorded already.
    """
    taken: dict[str, int] = {}
    for split in ("train", "val", "test"):
        loader = f"{split}_dataloader"
        if getattr(type(data), loader) is not getattr(ImageData, loader):
            continue  # nobody knows yet how many batches it gives
        pictures = len(getattr(data.splits, split))
        given = num_batches(pictures, data.batch_size, trainer.world_size)
        limit: int | float = getattr(trainer, f"limit_{split}_batches")
        taken[split] = min(given, limit) if isinstance(limit, int) else int(given * limit)
        if given > 0 and taken[split] == 0 and (limit > 0 or split == "train"):
            is_overfit = getattr(trainer, "overfit_batches", 0) > 0 and split != "test"
            name = "overfit_batches" if is_overfit else f"limit_{split}_batches"
            raise ConfigurationError(
                f"trainer.{name} is {limit}, and leaves none of the {given} batches of {split} "
                f"pictures; it must be a whole number from 1, or a fraction from 1/{given}."
            )
    every = trainer.val_check_interval
    is_within_epoch = isinstance(every, int) and trainer.check_val_every_n_epoch is not None
    if is_within_epoch and trainer.limit_val_batches and 0 < taken.get("train", 0) < every:
        raise ConfigurationError(
            f"trainer.val_check_interval is {every}, and an epoch is over after batch "
            f"{taken['train']}; it must be at most that, or a fraction (0.5: twice in an epoch). "
            "To count batches across epochs, add --trainer.check_val_every_n_epoch null."
        )


def check_batch_norm_sync(trainer: Trainer) -> None:
    """ConfigurationError where batch norm cannot be what `trainer.sync_batchnorm` asks for."""
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if trainer.world_size > 1 and on_cpu and getattr(trainer.strategy, "_layer_sync", None):
        raise ConfigurationError(
            "trainer.sync_batchnorm is true, and torch can do that on GPUs only. Leave it out on "
            "CPUs, or train with one process."
        )


def told_of_batch_norm(trainer: Trainer, network: nn.Module, batch_size: int) -> str | None:
    """One line where each process normalises by its own pictures, None elsewhere."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    is_synced = getattr(trainer.strategy, "_layer_sync", None) is not None
    if trainer.world_size == 1 or is_synced or not norms:
        return None
    own = batch_size // trainer.world_size
    flag = "--trainer.sync_batchnorm true"
    can = trainer.strategy.root_device.type != "cpu"
    return (
        f"Batch norm: each process normalises by its own {own} pictures of the {batch_size} of a "
        f"batch, not by all as one process would; {flag} does that{'' if can else ' on GPUs'}."
    )


def check_callback(callback: Callback) -> None:
    """Raises ValueError for one that watches a metric which nothing logs, and for tuners."""
    if isinstance(callback, BatchSizeFinder | LearningRateFinder):
        raise ValueError(
            f"{type(callback).__name__} would change the settings of a run after they are "
            "recorded; leave it out. sweeps/learning_rate.yaml searches for a rate, and a batch "
            "that is too large for the memory is told with one that fits."
        )
    monitor = getattr(callback, "monitor", None)
    known = [f"{split}/{figure}" for split in ("train", "val") for figure in ("loss", "accuracy")]
    known += ["learning_rate", "epoch_seconds", "images_per_second"]
    known += ["gradient_norm", "update_to_weight_ratio"]
    if monitor is not None and monitor not in known:
        raise ValueError(
            f"{type(callback).__name__} watches {monitor}, and there is no such metric; there are "
            f"{', '.join(known)}."
        )


@contextlib.contextmanager
def faults_of(key: str) -> Iterator[None]:
    """What goes wrong inside is told, in a line, as a ConfigurationError about `key`.

    OutOfMemory where that is what went wrong.
    """
    try:
        yield
    except (ConfigurationError, OutOfMemory):
        raise
    except (*USERS_MISTAKES, MemoryError, MisconfigurationException) as error:
        shortage = memory.shortage_in(error)
        if shortage is not None:
            raise OutOfMemory(memory.told_of_setting(key, shortage)) from error
        text = str(error).strip() or type(error).__name__
        about = text.startswith((f"{key}.", f"{key}:", f"{key} "))
        fault = ConfigurationError(text if about else f"{key}: {text}")
        fault.exit_code = getattr(error, "exit_code", fault.exit_code)
        raise fault from error


USERS_MISTAKES = (ValueError, TypeError, RuntimeError, ArithmeticError, ImportError, ArgumentError)
