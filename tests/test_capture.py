"""Captured steps train as the direct ones do, and end where those end at a loss of NaN.

What a CUDA graph does is done here, on the CPU, by a stand-in: it runs the same work again, reads
the batch and writes loss and gradients in the places that were there at the capture.
"""

import pytest
import torch
from lightning.pytorch import Callback

from research.configuration.compose import ConfigurationError
from research.faults.nonfinite import NonFiniteLoss
from research.speed import capture
from research.speed.capture import CapturedEpochLoop, CapturedStep
from research.training import fit
from tests.test_epoch_loop import FEW, WAYS, Seen, without_time

ASKED = ["--model.cuda_graphs", "true"]


class StandIn(CapturedStep):
    """Work that writes where a CUDA graph would write."""

    def __init__(self, loop, batch, batch_idx):
        named = loop.trainer.lightning_module.named_parameters()
        self.names = {id(parameter): name for name, parameter in named}
        super().__init__(loop, batch, batch_idx)

    def record(self, work):
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, torch.nan)  # of no use before a replay
            if "idle" in self.names[id(parameter)]:
                parameter.grad = None
        loss = torch.full((), torch.nan)

        def again():
            for gradient in self.gradients:
                if gradient is not None:
                    gradient.zero_()
            loss.copy_(work())

        return loss, again


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(capture, "is_possible", lambda *_: True)
    monkeypatch.setattr(capture, "CapturedStep", StandIn)


def train(configuration, folder):
    seen = Seen()
    for name in capture.MEANWHILE:
        setattr(seen, name, None)  # hooks within a step would keep it from being captured
    result = fit(configuration, callbacks=[seen])
    last = next(folder.rglob("last.ckpt"))
    return result, torch.load(last, weights_only=True)


@pytest.mark.parametrize(
    "way",
    [
        *("momentum and a schedule", "adamw, clipped by norm", "validation within the epoch"),
        *("checkpoints within the epoch", "max_steps", "fewer batches", "bf16-mixed"),
        "dropout and batch norm",
    ],
)
def test_captured_steps_train_as_direct_ones(small, graphs, tmp_path, way):
    ends = []
    for asked in ("true", "false"):
        folder = tmp_path / asked
        place = ["--trainer.default_root_dir", str(folder), "--model.cuda_graphs", asked]
        result, saved = train(small(*FEW, *WAYS[way], *place), folder)
        assert (result.captured_steps > 0) == (asked == "true")
        ends.append((without_time(result.history), saved))
    assert ends[0][0] == ends[1][0]
    for part in ("state_dict", "optimizer_states", "sums"):
        torch.testing.assert_close(ends[0][1][part], ends[1][1][part], rtol=0, atol=0)
    for part in ("loops", "lr_schedulers", "random_state"):
        assert repr(ends[0][1][part]) == repr(ends[1][1][part])


def test_all_but_the_ends_of_an_epoch_and_the_warm_up_is_captured(small, graphs):
    assert fit(small(*FEW, *ASKED)).captured_steps == 2 * (18 - 2) - capture.WARM_UP


def test_short_run_is_not_captured_unless_asked(small, graphs, monkeypatch):
    by_length = ["--model.cuda_graphs", "null"]
    assert fit(small(*FEW, *by_length)).captured_steps == 0
    monkeypatch.setattr(capture, "PAYS_FROM", 36)
    assert fit(small(*FEW, *by_length)).captured_steps > 0
    assert fit(small(*FEW)).captured_steps == 0


@pytest.mark.parametrize("way", ["a line search", "gradients of four batches added up"])
def test_steps_that_no_graph_can_hold_run_directly(small, graphs, way):
    assert fit(small(*FEW, *WAYS[way], *ASKED)).captured_steps == 0


class Diverging:
    """Makes the loss of one batch NaN, counted over the run."""

    def __init__(self, monkeypatch, batch: int) -> None:
        from research.data.batches import Batches

        own, seen = Batches.__iter__, []

        def iterate(batches):
            for images, labels in own(batches):
                seen.append(1)
                yield (images * torch.nan if len(seen) == batch else images), labels

        monkeypatch.setattr(Batches, "__iter__", iterate)


@pytest.mark.parametrize(
    ("batch", "between", "optimizer"),
    [
        *((1, 4, "SGD"), (6, 4, "AdamW"), (8, 4, "SGD"), (17, 32, "AdamW")),
        *((18, 32, "SGD"), (19, 4, "AdamW"), (30, 32, "AdamW")),
    ],
)
def test_loss_of_nan_ends_the_run_before_its_step(
    small, graphs, monkeypatch, tmp_path, batch, between, optimizer
):
    monkeypatch.setattr(capture, "BEFORE_LOOKING", between)
    kept = []
    for asked in ("true", "false"):
        folder = tmp_path / asked
        with monkeypatch.context() as patched:
            Diverging(patched, batch)
            with pytest.raises(NonFiniteLoss, match=f"at step {batch} "):
                fit(
                    small(
                        *(*FEW, "--optimizer", optimizer, "--lr_scheduler", "LinearLR"),
                        *("--trainer.default_root_dir", str(folder)),
                        *("--model.cuda_graphs", asked, "--data.val_fraction", "0"),
                        *("--data.num_train", "144"),
                    )
                )
        kept.append(torch.load(next(folder.rglob("step.pt")), weights_only=True))
    for part in ("images", "state_dict", "optimizer_state"):
        exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(kept[0][part], kept[1][part], **exactly)
    for part in ("epoch", "batch_idx", "global_step", "random_state", "learning_rates"):
        assert repr(kept[0][part]) == repr(kept[1][part])


def test_checkpoint_in_the_middle_of_an_epoch_is_never_saved_after_a_loss_of_nan(
    small, graphs, monkeypatch, tmp_path
):
    """A checkpoint is due at step 10, and step 6 was NaN, at which nobody has looked yet."""
    Diverging(monkeypatch, 6)
    folder = ["--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(NonFiniteLoss, match="at step 6 "):
        fit(small(*FEW, *ASKED, *folder, "--checkpoint.every_n_train_steps", "10"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_ignored_losses_are_not_looked_at(small, graphs, monkeypatch):
    Diverging(monkeypatch, 6)
    monkeypatch.setattr(CapturedEpochLoop, "look", lambda _: None)
    result = fit(small(*FEW, *ASKED, "--non_finite_loss", "ignore"))
    assert len(result.history) == 2


def test_step_that_cannot_be_captured_is_run_directly_and_told(small, graphs, monkeypatch, caplog):
    def fail(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    plain = fit(small(*FEW))
    monkeypatch.setattr(StandIn, "record", fail)
    result = fit(small(*FEW, *ASKED))
    assert result.captured_steps == 0
    assert without_time(result.history) == without_time(plain.history)
    assert "cannot be captured: operation not permitted when stream is capturing" in caplog.text


class Freezing(Callback):
    """Lets the first convolution learn in the first epoch only."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.network.features.conv1.requires_grad_(trainer.current_epoch == 0)


class Accumulating(Callback):
    """From the second epoch on four batches make a step."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.accumulate_grad_batches = 1 if trainer.current_epoch == 0 else 4


@pytest.mark.parametrize("change", [Freezing, Accumulating])
def test_what_changes_between_epochs_changes_the_graphs(small, graphs, change):
    """`change` is no hook of a step, so that steps are captured."""
    direct = fit(small(*FEW, "--model.cuda_graphs", "false"), callbacks=[change()])
    result = fit(small(*FEW, *ASKED), callbacks=[change()])
    assert result.captured_steps > 0
    assert without_time(result.history) == without_time(direct.history)


def test_parameters_without_a_part_in_the_loss_leave_the_others_theirs(small, graphs, monkeypatch):
    """The gradient of the first one is None in a graph and after an eager step alike."""
    from research.networks import CNN

    own = CNN.__init__

    def with_idle_parameter(self, *args, **kwargs):
        own(self, *args, **kwargs)
        layers = dict(self._modules)
        self._modules.clear()
        self.idle = torch.nn.Linear(1, 1)
        self._modules.update(layers)

    monkeypatch.setattr(CNN, "__init__", with_idle_parameter)
    ends = [fit(small(*FEW, "--model.cuda_graphs", asked)) for asked in ("true", "false")]
    assert ends[0].captured_steps > 0
    assert without_time(ends[0].history) == without_time(ends[1].history)


def test_graphs_are_refused_where_there_is_no_gpu(small):
    with pytest.raises(ConfigurationError, match=r"model\.cuda_graphs is true"):
        fit(small(*ASKED))


def test_loop_is_the_direct_one_without_a_gpu(small):
    assert not capture.is_possible(torch.device("cpu"), torch.nn.Linear(1, 1))
    assert capture.is_possible(torch.device("cuda"), torch.nn.Linear(1, 1))
    compiled = torch.nn.Linear(1, 1)
    compiled.compile()
    assert not capture.is_possible(torch.device("cuda"), compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("network", [[], ["--model.network.normalization", "BatchNorm2d"]])
def test_graphs_on_a_gpu_train_as_direct_steps(small, network):
    ends = []
    for asked in ("true", "false"):
        settings = ["--trainer.accelerator", "cuda", "--model.cuda_graphs", asked, *network]
        ends.append(fit(small(*FEW, *settings)))
    assert ends[0].captured_steps > 0
    for one, other in zip(ends[0].history, ends[1].history, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
