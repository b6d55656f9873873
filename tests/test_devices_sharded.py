"""Two processes: weights that are parted, statistics of batch norm, files that one does not see."""

import json

import pytest
import torch

from tests.launched import launched

pytestmark = pytest.mark.devices

# Rank 1 works in a folder of its own, as on another machine: it sees no checkpoint.
SCRIPT = """
import json
import os
from pathlib import Path

import torch
from lightning.pytorch import Callback

from research.configuration.schema import resolve
from research.training import fit
from tests.conftest import SMALL

FEW = [*SMALL, "--tracking_uri", "", "--trainer.devices", "2", "--data.batch_size", "32"]
RESNET = ["--data", "Synthetic", "--data.num_train", "320", "--data.num_test", "64"]
RESNET += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
RESNET += ["--trainer.max_epochs", "1", "--tracking_uri", "", "--trainer.devices", "2"]
RESNET += ["--data.batch_size", "32", "--model.network", "ResNet9", "--model.network.width", "4"]
ADAMW = ["--optimizer", "AdamW", "--optimizer.lr", "0.01", "--optimizer.weight_decay", "1.0"]
ADAMW += ["--model.decay_biases_and_norms", "false"]
VARIANTS = {
    "plain": [],
    "adamw": ADAMW,
    "adagrad": ["--optimizer", "Adagrad", "--optimizer.lr", "0.01"],
    "clipped": ["--trainer.gradient_clip_val", "0.01"],
    "clipped by value": [
        "--trainer.gradient_clip_val", "0.001", "--trainer.gradient_clip_algorithm", "value"
    ],
    "accumulated": ["--trainer.accumulate_grad_batches", "3"],
    "bfloat16": ["--trainer.precision", "bf16-mixed"],
    "saved at steps": ["--checkpoint.every_n_train_steps", "3"],
    "nothing kept": ["--checkpoint.save_top_k", "0", "--checkpoint.save_last", "false"],
}
found = {}
first = Path.cwd()
if rank == 1:
    os.mkdir("elsewhere")
    os.chdir("elsewhere")


class Tested(Callback):
    def on_test_end(self, trainer, pl_module):
        # Of all processes together where weights are parted, which the first then has.
        state = trainer.strategy.lightning_module_state_dict()
        self.state = {name: tensor.clone() for name, tensor in state.items()}


def go(name, strategy, arguments, base=FEW, callbacks=(), **given):
    tested = Tested()
    run_name = f"{name} {strategy}".replace(" ", "_")
    flags = [*arguments, "--trainer.strategy", strategy, "--run_name", run_name]
    result = fit(resolve([*base, *flags]), callbacks=[tested, *callbacks], **given)
    entry = {"metrics": result.metrics, "history": result.history, "best": result.best_checkpoint}
    if result.best_checkpoint is not None and tested.state:
        assert Path(result.best_checkpoint).is_file() == (rank == 0)
        best = first / result.best_checkpoint
        kept = torch.load(best, weights_only=True)["state_dict"]
        last = best.with_name("last.ckpt")
        entry["is_best"] = all(torch.equal(kept[k], tested.state[k]) for k in kept)
        entry["is_last"] = False
        if last.is_file():
            weights = torch.load(last, weights_only=True)["state_dict"]
            entry["is_last"] = all(torch.equal(weights[k], tested.state[k]) for k in kept)
    found[f"{name} {strategy}"] = entry
    return result


for name, arguments in VARIANTS.items():
    for strategy in ("ddp", "fsdp"):
        go(name, strategy, arguments)

for name in ("plain", "adamw"):
    for begun in ("ddp", "fsdp"):
        one_epoch = [*VARIANTS[name], "--trainer.max_epochs", "1"]
        result = go(f"{name} begun", begun, one_epoch)
        last = Path(result.best_checkpoint).with_name("last.ckpt")
        for strategy in ("ddp", "fsdp"):
            go(f"{name} from {begun}", strategy, VARIANTS[name], resume_from=last)
try:
    fit(resolve([*FEW, "--trainer.strategy", "ddp"]), resume_from="nowhere.ckpt")
except (FileNotFoundError, SystemExit) as error:
    # Processes other than the first leave quietly, having the first one tell it.
    told = error.__context__ if isinstance(error, SystemExit) else error
    assert isinstance(told, FileNotFoundError)
    found["nowhere"] = str(told)


class Statistics(Callback):
    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append([b.double().sum().item() for b in pl_module.buffers()])


between = ["--trainer.accumulate_grad_batches", "3", "--trainer.val_check_interval", "4"]
for strategy in ("ddp", "fsdp"):
    statistics = Statistics()
    go("statistics", strategy, between, RESNET, [statistics])
    found[f"statistics {strategy}"]["buffers"] = statistics.seen
(first / f"found.{rank}").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of all runs, on each of two ranks, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("sharded")
    outcomes = launched(2, SCRIPT, folder)
    told = "\n".join(outcome.err for outcome in outcomes)
    assert [outcome.code for outcome in outcomes] == [0, 0], told
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in (0, 1)], folder, told


def figures(run):
    """All numbers of a run but the times."""
    of_time = ("epoch_seconds", "images_per_second")
    rows = [{k: v for k, v in row.items() if k not in of_time} for row in run["history"]]
    names = ("test/loss", "test/accuracy", "val/loss", "train/loss")
    return [*rows, {name: run["metrics"][name] for name in names}]


def assert_alike(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize(
    "variant",
    [
        "plain",
        "adamw",
        "adagrad",
        "clipped",
        "clipped by value",
        "accumulated",
        "bfloat16",
        "saved at steps",
        "nothing kept",
        "statistics",
    ],
)
def test_parted_weights_learn_what_whole_ones_learn(found, variant):
    runs = found[0][0]
    assert_alike(figures(runs[f"{variant} fsdp"]), figures(runs[f"{variant} ddp"]))


def test_the_variants_differ_so_that_each_flag_was_heard(found):
    runs = found[0][0]
    losses = {runs[f"{name} fsdp"]["history"][-1]["train/loss"] for name in runs_of_two_epochs()}
    assert len(losses) == len(runs_of_two_epochs())


def runs_of_two_epochs():
    return ("plain", "adamw", "adagrad", "clipped", "clipped by value", "accumulated", "bfloat16")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_test_the_best_weights_though_one_alone_reads_them(found, strategy):
    ranks = found[0]
    assert ranks[0][f"plain {strategy}"]["is_best"]
    assert not ranks[0][f"plain {strategy}"]["is_last"]
    if strategy == "ddp":  # where each has all of them
        assert ranks[1]["plain ddp"]["is_best"]
    for name in ("test/loss", "test/accuracy", "val/loss"):
        assert len({rank[f"plain {strategy}"]["metrics"][name] for rank in ranks}) == 1


def test_checkpoints_of_both_have_the_same_names_and_an_optimizer_of_one_process(found):
    folder = found[1]
    one, other = (
        torch.load(folder / f"checkpoints/adamw_begun_{s}/last.ckpt", weights_only=True)
        for s in ("ddp", "fsdp")
    )
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight)
    one, other = one["optimizer_states"][0], other["optimizer_states"][0]
    assert [g["params"] for g in one["param_groups"]] == [
        g["params"] for g in other["param_groups"]
    ]
    assert [g["weight_decay"] for g in one["param_groups"]] == [1.0, 0.0]
    assert one["state"].keys() == other["state"].keys()
    for number, values in one["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(other["state"][number][name], value)


@pytest.mark.parametrize("name", ["plain", "adamw"])
@pytest.mark.parametrize("begun", ["ddp", "fsdp"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_either_goes_on_from_the_others_file_that_one_process_does_not_see(
    found, name, begun, strategy
):
    for runs in found[0]:
        gone_on, unbroken = runs[f"{name} from {begun} {strategy}"], runs[f"{name} ddp"]
        assert_alike(figures(gone_on)[:2], figures(unbroken)[:2])


def test_a_checkpoint_that_the_first_process_lacks_is_told_by_all(found):
    for runs in found[0]:
        assert "nowhere.ckpt" in runs["nowhere"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_validate_with_the_same_running_statistics(found, strategy):
    first, second = (runs[f"statistics {strategy}"]["buffers"] for runs in found[0])
    assert len(first) == 2  # after 4 and 8 batches, the first in the middle of a step
    assert first == second


def test_each_process_normalising_for_itself_is_told_once(found):
    assert found[2].count("Batch norm: each process normalises by its own 16 pictures") == 2
