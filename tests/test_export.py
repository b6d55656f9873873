"""An exported network: the same answers from raw bytes, and nothing of the original changed."""

import json
import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from research.classifier import Classifier
from research.data.batches import Batches
from research.data.normalization import Normalization
from research.data.split import Split
from research.losses import CrossEntropyLoss, CrossEntropyLoss2d, MSELoss
from research.networks import CNN, ResNet9, from_torchvision
from research.recording.export import Deployable, export_program, write_model

SIZE = 16
NORMALIZATION = Normalization((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
CASES = {
    "CNN": (lambda: CNN(image_size=SIZE, activation="ReLU", dropout=0.5), CrossEntropyLoss),
    "cells": (lambda: CNN(image_size=SIZE, activation="ReLU"), CrossEntropyLoss2d),
    "ResNet9": (lambda: ResNet9(image_size=SIZE, width=4), MSELoss),
    "torchvision": (lambda: from_torchvision("squeezenet1_1", image_size=32), CrossEntropyLoss),
}


def draw(count, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11's, of a buffer of its own
        return torch.export.load(path).module()


def answers_of(network, loss, pixels):
    """The probabilities as training would have them: from a batch, by the classifier itself."""
    split = Split(pixels.permute(0, 3, 1, 2), torch.zeros(len(pixels), dtype=torch.int64))
    classifier = Classifier(network, loss, torch.optim.SGD).eval()
    (images, _), *rest = Batches(split, len(pixels), NORMALIZATION)
    assert not rest
    with torch.no_grad():
        return loss.probabilities(classifier(images))


@pytest.mark.parametrize("case", CASES)
def test_program_answers_as_the_classifier_does_for_any_number_of_pictures(case, tmp_path):
    make, loss = CASES[case][0](), CASES[case][1]()
    size = 32 if case == "torchvision" else SIZE
    with torch.no_grad():  # batch statistics that are not those of a new network
        make(torch.randn(8, 3, size, size) * 2 + 1)
    export_program(make, loss, NORMALIZATION, size, tmp_path / "program.pt2")
    program = load(tmp_path / "program.pt2")
    for count in (1, 2, 5):
        pixels = draw(count, size)
        found = program(pixels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(dim=1), torch.ones(count))
        torch.testing.assert_close(found, answers_of(make, loss, pixels), atol=1e-6, rtol=1e-5)


def test_export_leaves_the_network_and_the_random_state_as_they_were(tmp_path):
    network = ResNet9(image_size=SIZE, width=4).to(memory_format=torch.channels_last)
    network(draw(4).permute(0, 3, 1, 2).float()).sum().backward()
    network.head.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    modes = [module.training for module in network.modules()]
    gradients = [p.grad.clone() for p in network.parameters()]
    strides = [p.stride() for p in network.parameters()]
    random_state = torch.get_rng_state()
    export_program(network, CrossEntropyLoss(), NORMALIZATION, SIZE, tmp_path / "program.pt2")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert [module.training for module in network.modules()] == modes
    assert [p.stride() for p in network.parameters()] == strides
    assert all(p.requires_grad for p in network.parameters())
    torch.testing.assert_close([p.grad for p in network.parameters()], gradients, rtol=0, atol=0)
    assert all(p is parameters[name] for name, p in network.named_parameters())
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


def test_compiled_network_is_exported_as_a_plain_one(tmp_path):
    def refuse(graph, inputs):
        raise AssertionError("the compiled network was called")

    network = CNN(image_size=SIZE)
    network.compile(backend=refuse)
    network.features.compile(backend=refuse)
    export_program(network, CrossEntropyLoss(), NORMALIZATION, SIZE, tmp_path / "program.pt2")
    pixels = draw(3)
    plain = CNN(image_size=SIZE)
    plain.load_state_dict(network.state_dict())
    expected = answers_of(plain, CrossEntropyLoss(), pixels)
    torch.testing.assert_close(load(tmp_path / "program.pt2")(pixels), expected)
    deployable = Deployable(network, CrossEntropyLoss(), NORMALIZATION, SIZE)
    torch.testing.assert_close(deployable(pixels), expected)
    assert network._compiled_call_impl is not None


def test_network_in_half_precision_is_deployed_in_float32():
    network = CNN(image_size=SIZE).to(torch.bfloat16)
    deployable = Deployable(network, CrossEntropyLoss(), NORMALIZATION, SIZE)
    assert {p.dtype for p in deployable.parameters()} == {torch.float32}
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert deployable(draw(2)).dtype == torch.float32


def test_weights_that_are_shared_stay_shared():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    network[2].weight = network[1].weight
    copied = Deployable(network, CrossEntropyLoss(), NORMALIZATION, SIZE).network
    assert copied[1].weight is copied[2].weight
    assert copied[1].weight is not network[1].weight


class Undecided(nn.Module):
    """Its steps depend on the pictures, which no graph can tell."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, 10)

    def forward(self, x):
        scores = self.linear(x.flatten(1))
        return scores if scores.sum() > 0 else -scores


class ForTwo(Undecided):
    """Takes two pictures at a time, no more and no less."""

    def forward(self, x):
        return self.linear(x.reshape(2, -1))


@pytest.mark.parametrize("network", [Undecided, ForTwo])
def test_network_that_cannot_be_exported_is_refused_in_plain_words(network, tmp_path, capfd):
    level = logging.getLogger("torch").level
    with pytest.raises(ValueError, match=f"{network.__name__} cannot be exported.*torch.where"):
        export_program(network(), CrossEntropyLoss(), NORMALIZATION, SIZE, tmp_path / "program.pt2")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch").level == level
    assert not list(tmp_path.iterdir())


def test_model_folder_tells_what_the_program_is_about(tmp_path):
    names = ["grün", *"abcdefghi"]
    examples = draw(2).numpy()
    folder = tmp_path / "new" / "model"
    network = CNN(image_size=SIZE)
    write_model(folder, network, CrossEntropyLoss(), NORMALIZATION, names, examples, epoch=3)
    about = json.loads((folder / "classes.json").read_text("utf-8"))
    assert about["class_names"] == names
    assert (about["image_size"], about["epoch"]) == (SIZE, 3)
    assert about["mean"] == list(NORMALIZATION.mean) and about["std"] == list(NORMALIZATION.std)
    np.testing.assert_array_equal(np.load(folder / "examples.npy"), examples)
    assert load(folder / "program.pt2")(draw(1)).shape == (1, 10)
