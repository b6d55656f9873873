"""From a configuration to the objects that train: data, network, classifier, trainer.

Whatever cannot be built is told as a fault of the setting that asked for it, and everything is
tried once on nothing before a run is recorded.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from research.classifier import Classifier
from research.configuration.compose import ConfigurationError
from research.configuration.schema import LEFT_OPEN, Configuration, is_torchvision
from research.data import ImageData
from research.networks import from_torchvision


def build_data(configuration: Configuration) -> ImageData:
    """The data set, on disk and in memory."""
    arguments = configuration.arguments("data")
    if arguments.get("seed", 0) is None:
        arguments["seed"] = configuration.values.seed_everything
    with faults_of("data"):
        data = configuration.classes["data"](**arguments)
        data.prepare_data()
        data.setup("fit")
    return data


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


def build_classifier(configuration: Configuration, data: ImageData) -> Classifier:
    """Network, loss, optimizer and schedule in one module, tried once on two black pictures."""
    network = build_network(configuration, data)
    with faults_of("model.loss"):
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
    with faults_of("optimizer"):
        made = classifier.build_optimizer()
    if (
        isinstance(made, torch.optim.LBFGS)
        and configuration.values.trainer.accumulate_grad_batches > 1
    ):
        raise ConfigurationError(
            "trainer.accumulate_grad_batches must be 1 with LBFGS, which evaluates a batch several "
            "times and would add its gradients up each time; choose a larger data.batch_size."
        )
    with faults_of("lr_scheduler"):
        # The length of the run is known once Lightning has the batches; here any long one does.
        classifier.build_lr_scheduler(made, total_steps=10**9, max_epochs=10**6)
    return classifier


def build_trainer(configuration: Configuration, callbacks: Sequence[Callback]) -> Trainer:
    """Lightning's Trainer by its own flags, with these callbacks before those it was given."""
    settings = configuration.trainer_arguments()
    given = settings.pop("callbacks") or []
    callbacks = [*callbacks, *(given if isinstance(given, list) else [given])]
    if settings["logger"] in (None, True):
        settings["logger"] = False  # the run's own logger is added once there is a run
    with faults_of("trainer"):
        return Trainer(**settings, callbacks=callbacks)


@contextlib.contextmanager
def faults_of(key: str) -> Iterator[None]:
    """What goes wrong inside is told as a ConfigurationError about the setting `key`."""
    try:
        yield
    except ConfigurationError:
        raise
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        text = str(error).strip() or type(error).__name__
        about = text.startswith((f"{key}.", f"{key}:", f"{key} "))
        raise ConfigurationError(text if about else f"{key}: {text}") from error
