"""The precision that is chosen where none was: by the device and the optimizer, and recorded."""

import pytest
import torch

from research.configuration.schema import resolve
from research.speed import precision
from research.speed.precision import fastest_precision
from research.training import fit


@pytest.fixture
def bfloat16(monkeypatch, request):
    """A processor that computes in bfloat16, or not."""
    monkeypatch.setattr(precision, "processor_computes_in_bfloat16", lambda: request.param)
    return request.param


both = pytest.mark.parametrize("bfloat16", [True, False], indirect=True)


@both
def test_open_precision_is_the_processors_own(bfloat16):
    values = resolve(["--trainer.accelerator", "cpu"]).values
    assert values.trainer.precision == ("bf16-mixed" if bfloat16 else "32-true")


@both
def test_typed_precision_stays(bfloat16):
    for typed in ("64-true", "32-true", "bf16-mixed"):
        assert resolve(["--trainer.precision", typed]).values.trainer.precision == typed


@both
def test_line_search_is_never_rounded(bfloat16):
    settings = ["--optimizer", "LBFGS", "--trainer.accelerator", "cpu"]
    assert resolve(settings).values.trainer.precision == "32-true"


def test_configuration_tells_the_precision_to_whoever_runs_it_again(monkeypatch):
    monkeypatch.setattr(precision, "processor_computes_in_bfloat16", lambda: True)
    first = resolve(["--trainer.accelerator", "cpu"])
    monkeypatch.setattr(precision, "processor_computes_in_bfloat16", lambda: False)
    settings = {"trainer": {"accelerator": "cpu", "precision": first.flat()["trainer.precision"]}}
    assert resolve([], settings).yaml() == first.yaml()


def test_processor_that_torch_cannot_tell_of_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert fastest_precision("cpu", torch.optim.SGD) == "32-true"


def test_gpu_of_an_older_kind_trains_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_units in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_units: has
        )
        chosen = fastest_precision("auto", torch.optim.AdamW)
        assert chosen == ("bf16-mixed" if has_units else "32-true")


def test_mixed_training_keeps_weights_in_float32_and_learns_as_float32_does(small):
    """The first steps go the same way up to bfloat16's three digits."""
    settings = ["--trainer.max_epochs", "3", "--optimizer.lr", "0.05"]
    ends = {}
    for chosen in ("32-true", "bf16-mixed"):
        result = fit(small(*settings, "--trainer.precision", chosen))
        assert result.precision == chosen
        ends[chosen] = [row["train/loss"] for row in result.history]
    assert ends["bf16-mixed"] == pytest.approx(ends["32-true"], rel=0.02)
    assert ends["bf16-mixed"] != ends["32-true"]
