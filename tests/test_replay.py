"""The step that stopped a run, done again by the command, as a person types it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from research import replay
from research.building import build_classifier
from research.checkpoints.trained import settings_of
from research.configuration.compose import CommandLine
from research.configuration.schema import resolve
from research.faults import diagnosis
from research.tracking.store import sqlite_uri
from tests.conftest import SMALL
from tests.test_nonfinite import DIVERGING, Poison, read, stopped, train

# MLflow reads its own store with what SQLAlchemy calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kept_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    torch.set_num_threads(1)
    stopped(resolve([*SMALL, "--tracking_uri", "", *DIVERGING["sgd"]]), folder)
    return folder / "step.pt"


@pytest.fixture
def sgd(kept_once, tmp_path) -> Path:
    """A step that each test may change."""
    return Path(shutil.copy(kept_once, tmp_path))


def change(file: Path, **content) -> Path:
    """The same step with something else in it."""
    torch.save({**read(file), **content}, file)
    return file


# ---- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGING)
def test_step_is_reproduced(small, tmp_path, name, capsys):
    stopped(small(*DIVERGING[name]), tmp_path)
    kept = read(tmp_path / "step.pt")
    torch.manual_seed(99)  # of which nothing may depend
    assert replay.main([str(tmp_path / "step.pt")]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"loss +{kept['loss']} +{kept['loss']}  the same\n", told)
    assert ("evaluation" in told) == (kept["evaluation"] > 1)
    assert "Not as in the run" not in told


def test_finite_losses_are_the_same_to_the_last_bit(small, tmp_path, monkeypatch):
    """What nan hides: the loss that the step would have had, with dropout, from its own state."""
    finite = []

    class Witness(Poison):
        def on_before_backward(self, trainer, pl_module, loss):
            finite.append(loss.item())

    arguments = ["--model.network.dropout", "0.5", "--model.network.normalization", "BatchNorm2d"]
    arguments += ["--optimizer", "AdamW", "--data.horizontal_flip", "true"]
    configuration = small(*arguments)
    train(configuration, Witness(99), folder=False)
    # Only the guard is told that the fourth loss is no number.
    monkeypatch.setattr("research.faults.nonfinite.math", Unfinite(3))
    stopped(configuration, tmp_path)
    monkeypatch.undo()
    step = diagnosis.read_step(tmp_path / "step.pt")
    assert step.content["loss"] == finite[3]
    found = diagnosis.replay(step)
    assert found.loss == finite[3]
    assert diagnosis.is_reproduced(step, found)
    assert found.first is None


class Unfinite:
    """Stands for `math`: what it is asked `at` is not finite."""

    def __init__(self, at):
        self.left = at

    def isfinite(self, value):
        self.left -= 1
        return self.left >= 0


def test_layers_are_those_of_the_network_with_their_numbers(sgd, capsys):
    step = diagnosis.read_step(sgd)
    kept, found = step.content, diagnosis.replay(step)
    names = ["conv1", "pool1", "conv2", "pool2", "conv3", "pool3"]
    assert [layer.name for layer in found.layers] == [
        *(f"features.{name}" for name in names),
        *("head.flatten", "head.linear1", "head.linear2"),
    ]
    state = kept["state_dict"]
    largest = {
        layer.name: max(
            state[f"network.{layer.name}.{kind}"].abs().max().item() for kind in ("weight", "bias")
        )
        for layer in found.layers
        if f"network.{layer.name}.weight" in state
    }
    assert {layer.name: layer.weight.largest for layer in found.layers if layer.weight} == largest
    with torch.no_grad():
        convolved = rebuilt(step).network.features.conv1(kept["images"])
    assert found.layers[0].output.largest == pytest.approx(convolved.abs().max().item(), rel=1e-4)
    shares = [layer.output.not_finite for layer in found.layers]
    first = next(place for place, share in enumerate(shares) if share > 0)
    assert found.first is found.layers[first]
    assert replay.main([str(sgd)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "<- the first" in line]
    assert line.split()[0] == found.first.name


def rebuilt(step):
    """The classifier of the step, without what is tested here."""
    settings = {**settings_of(step.checkpoint), "lr_scheduler": None}
    classifier = build_classifier(resolve(CommandLine(files=[settings])), step.checkpoint.pictures)
    classifier.load_state_dict(step.content["state_dict"])
    return classifier


def test_gradients_are_those_of_the_batch(small, tmp_path, monkeypatch):
    configuration = small()
    monkeypatch.setattr("research.faults.nonfinite.math", Unfinite(2))
    stopped(configuration, tmp_path)
    monkeypatch.undo()
    step = diagnosis.read_step(tmp_path / "step.pt")
    found = diagnosis.replay(step)
    classifier = rebuilt(step)
    scores = classifier.network(step.content["images"])
    torch.nn.functional.cross_entropy(scores, step.content["labels"]).backward()
    for layer in found.layers:
        own = list(classifier.network.get_submodule(layer.name).parameters())
        if own:
            expected = max(parameter.grad.abs().max().item() for parameter in own)
            assert layer.gradient.largest == pytest.approx(expected, rel=1e-4)


def test_nothing_is_left_behind(sgd):
    state = torch.get_rng_state()
    content = sgd.read_bytes()
    assert replay.main([str(sgd)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert sgd.read_bytes() == content
    assert sorted(file.name for file in sgd.parent.iterdir()) == ["step.pt"]


# ---- what it suggests ----------------------------------------------------------------------------


def suggestion(file, capsys, code=0):
    assert replay.main([str(file)]) == code
    return capsys.readouterr().out.partition("\n\n")[2].partition("\n\n")[2]


def test_weights_that_grew_are_told(sgd, capsys):
    told = suggestion(sgd, capsys)
    assert re.match(r"(features|head)\.\w+ overflowed: finite numbers went in, and \d", told)
    assert "The weights were large before this step already (up to " in told
    assert "smaller optimizer.lr" in told


def test_bad_pictures_are_told(small, tmp_path, capsys):
    stopped(small(), tmp_path, Poison(2))
    told = suggestion(tmp_path / "step.pt", capsys)
    assert told.startswith("The pictures went in with numbers that are none (")
    assert "overflowed" not in told


def test_weights_that_were_bad_already_are_told(sgd, capsys):
    state = read(sgd)["state_dict"]
    state["network.features.conv2.weight"][0, 0] = torch.nan
    told = suggestion(change(sgd, state_dict=state), capsys)
    assert told.startswith("Weights were not finite before this already (features.conv2): the step")


def test_loss_itself_is_told(small, tmp_path, capsys):
    stopped(small(*DIVERGING["infinite"]), tmp_path)
    told = suggestion(tmp_path / "step.pt", capsys)
    assert re.match(
        r"Every layer's output is finite; it is the loss itself, MSELoss of scores", told
    )


@pytest.mark.parametrize(
    ("precision", "brightness", "advice"),
    [
        ("32-true", 1e38, "No weight is large (at most 0.1): look at what that layer computes"),
        ("16-true", 5e4, "float16 ends at 65504, and no weight is large: try --trainer.precision"),
    ],
)
def test_overflow_of_small_weights_is_told(sgd, precision, brightness, advice, capsys):
    step = read(sgd)
    small = {name: torch.full_like(weight, 0.1) for name, weight in step["state_dict"].items()}
    bright = torch.full_like(step["images"], brightness)
    change(sgd, state_dict=small, images=bright, precision=precision)
    told = suggestion(sgd, capsys)
    assert told.startswith("features.conv1 overflowed: finite numbers went in, and ")
    assert advice in told


def test_loss_that_is_finite_now_is_not_reproduced(sgd, capsys):
    state = {name: weight * 0 for name, weight in read(sgd)["state_dict"].items()}
    told = suggestion(change(sgd, state_dict=state), capsys, code=1)
    assert told.startswith("The loss is finite this time")


def test_other_loss_is_not_reproduced(sgd, capsys):
    assert replay.main([str(change(sgd, loss=float("inf")))]) == 1
    assert re.search(r"loss +inf +nan  not the same\n", capsys.readouterr().out)


def test_what_was_otherwise_is_told(sgd, capsys):
    machine = {**read(sgd)["machine"], "torch": "1.0", "accelerator": "abacus", "cudnn": "9"}
    told = suggestion(change(sgd, machine=machine, precision="16-mixed"), capsys)
    line = told.splitlines()[-1]
    assert line.startswith("Not as in the run: accelerator was abacus, is ")
    assert f"torch was 1.0, is {torch.__version__}" in line
    assert "cudnn was 9, is " in line
    if not torch.cuda.is_available():
        assert line.endswith("precision was 16-mixed, is bf16-mixed.")


def test_compiled_network_is_replayed_layer_by_layer(small, tmp_path, capsys):
    class Eager(Poison):
        """The run's network is not compiled here, which would take a minute."""

        def setup(self, trainer, pl_module, stage):
            for module in pl_module.network.modules():
                module._compiled_call_impl = None

    arguments = [*DIVERGING["sgd"], "--model.compile", "true"]
    stopped(small(*arguments), tmp_path, Eager(99))
    told = suggestion(tmp_path / "step.pt", capsys)
    assert told.endswith("the network was compiled, and is not here.\n")


# ---- the run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tuple[str, str, str]:
    """The address of a store with a run that has kept a step, and one that has not."""
    folder = tmp_path_factory.mktemp("store")
    uri = sqlite_uri(folder / "mlflow.db")
    client = MlflowClient(uri)
    experiment = client.create_experiment("replayed", (folder / "mlruns").as_uri())
    runs = [client.create_run(experiment, run_name=name) for name in ("lost", "well")]
    return uri, *(run.info.run_id for run in runs)


def test_run_is_found_by_its_name_and_by_its_id(store, sgd, monkeypatch, capsys):
    uri, lost, well = store
    MlflowClient(uri).log_artifact(lost, str(sgd), "non_finite")
    assert replay.main(["lost", "--tracking_uri", uri]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"run lost ({lost}), step 3 (epoch 1, batch 3), learning rate 10000, ")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert replay.main([lost[:12]]) == 0
    assert capsys.readouterr().out == told
    assert replay.main([well]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: run well ({well}) has kept no step: its loss never was NaN")


# ---- mistakes ------------------------------------------------------------------------------------


class Malicious:
    """Runs a command wherever it is unpickled without care."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_step_of_a_stranger_runs_nothing(sgd, monkeypatch, capsys):
    monkeypatch.chdir(sgd.parent)
    content = read(sgd)
    torch.save({**content, "extra": Malicious()}, "pickled.pt")
    named = content["origin"]["configuration"].replace("research.networks.CNN", "os.system")
    assert "os.system" in named
    named = re.sub(r"(class_path: os\.system\n +init_args:\n)( +)(?s:.*?)(?=\n  \w)",
                   r"\1\2command: touch hacked", named)  # fmt: skip
    assert "command: touch hacked" in named
    torch.save({**content, "origin": {**content["origin"], "configuration": named}}, "named.pt")
    for file in ("pickled.pt", "named.pt"):
        assert replay.main([file]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
    assert not Path("hacked").exists()


def test_network_of_ones_own_needs_trust_but_for_a_run_of_ones_own(
    store, sgd, monkeypatch, tmp_path, capsys
):
    """A file may be anyone's; the project's own store has what was run here already."""
    uri, lost, _ = store
    Path(tmp_path / "kept_step_networks.py").write_text(
        "from research.networks import CNN as Net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    origin = read(sgd)["origin"]
    named = origin["configuration"].replace("research.networks.CNN", "kept_step_networks.Net")
    change(sgd, origin={**origin, "configuration": named})
    assert replay.main([str(sgd)]) == 2
    assert "add --trust" in capsys.readouterr().err
    assert replay.main([str(sgd), "--trust"]) == 0
    MlflowClient(uri).log_artifact(lost, str(sgd), "non_finite")
    assert replay.main(["lost", "--tracking_uri", uri]) == 2  # a store that someone gave me
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert replay.main(["lost"]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "error: the following arguments are required: RUN"),
        (["step.pt", "other.pt"], "error: unrecognized arguments: other.pt"),
        (["step.pt", "--top", "1"], "error: unrecognized arguments: --top 1"),
        (["nowhere.pt"], "error: nowhere.pt: No such file or directory."),
        (["torn.pt"], "error: torn.pt is no "),
        (["text.txt"], "error: text.txt is no "),
        (["checkpoint.ckpt"], "error: checkpoint.ckpt is a checkpoint and no step that was kept"),
        (["other.pt"], "error: The weights in other.pt are not those of this network"),
        (["optimizer.pt"], "error: optimizer: "),
        (["lost", "--tracking_uri", ""], "error: tracking_uri is empty"),
    ],
)
def test_mistake_is_told_in_a_sentence(sgd, monkeypatch, arguments, told, capsys):
    monkeypatch.chdir(sgd.parent)
    content = read(sgd)
    Path("torn.pt").write_bytes(sgd.read_bytes()[:-100])
    Path("text.txt").write_text("no step")
    beside = ("epoch", "state_dict", "origin", "global_step")
    torch.save({name: content[name] for name in beside}, "checkpoint.ckpt")
    weights = {**content["state_dict"], "network.one_more": torch.zeros(1)}
    torch.save({**content, "state_dict": weights}, "other.pt")
    state = {"state": {}, "param_groups": []}
    torch.save({**content, "optimizer_state": state}, "optimizer.pt")
    assert replay.main(arguments) == (1 if "nowhere.pt" in arguments else 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(told)
    assert len(said.err.splitlines()) == 1


def test_help_is_one_screen_and_needs_no_torch():
    code = (
        "import sys, research.replay; assert research.replay.main(['--help']) == 0;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'mlflow', 'jsonargparse')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == replay.HELP
    assert len(replay.HELP.splitlines()) <= 30
    assert max(len(line) for line in replay.HELP.splitlines()) <= 100
