"""Networks under every loss: the columns, the own loss, and what recorded runs have logged."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from research.configuration.schema import resolve
from research.data import Synthetic
from research.data.module import ImageData
from research.losses import (
    ClassificationLoss,
    CrossEntropyLoss,
    CrossEntropyLoss2d,
    MSELoss,
    MultiMarginLoss,
    NLLLoss,
)
from research.networks import CNN
from research.statistics import cross_loss
from research.statistics.cross_loss import (
    Recorded,
    Trainee,
    every_loss,
    lower_is_better,
    score,
    score_recorded,
)
from research.training import fit
from tests.conftest import SMALL

NAMES = [f"class {place}" for place in range(10)]
LABELS = torch.arange(40) % 10


class Said(nn.Module):
    """Puts out what it is given: the pictures' first row is the scores."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0]


def pictures_of(scores: Tensor) -> Tensor:
    return scores[:, None, None, :].expand(-1, 3, 2, -1)


def trainee(scores: Tensor, loss: ClassificationLoss, arm: str = "A") -> Trainee:
    """In uneven batches, as they come."""
    images = pictures_of(scores)
    batches = [(images[:17], LABELS[:17]), (images[17:], LABELS[17:])]
    return Trainee(arm, Said(), loss, batches, NAMES)


def drawn(seed: int) -> Tensor:
    return torch.randn(40, 10, generator=torch.Generator().manual_seed(seed))


# ---- the table -----------------------------------------------------------------------------------


def test_each_column_is_the_loss_of_all_pictures():
    scores = drawn(0)
    found = score([trainee(scores, CrossEntropyLoss())])
    losses, left_out = every_loss()
    assert len(losses) >= 20 and left_out == {} == found.left_out
    assert found.measures == (*cross_loss.JUDGED, *losses)
    (row,) = found.rows
    for name, loss in losses.items():
        if not loss.per_cell:
            assert row.losses[name] == pytest.approx(loss(scores, LABELS).item()), name
    assert row.losses["NLLLoss"] == pytest.approx(row.losses["CrossEntropyLoss"])
    assert row.losses["CrossEntropyLoss2d"] == pytest.approx(row.losses["CrossEntropyLoss"])
    assert row.judged["negative_log_likelihood"] == pytest.approx(row.losses["NLLLoss"], rel=1e-5)
    assert row.judged["accuracy"] == (scores.argmax(dim=1) == LABELS).sum().item() / 40
    assert (row.trained_on, row.pictures) == ("CrossEntropyLoss", 40)


def test_sure_and_right_is_accurate_and_calibrated_sure_and_wrong_is_neither():
    sure = 50 * torch.nn.functional.one_hot(LABELS, 10).float()
    right, wrong = score([trainee(sure, NLLLoss()), trainee(sure.roll(1, dims=1), NLLLoss())]).rows
    assert right.judged["accuracy"] == 1 and wrong.judged["accuracy"] == 0
    assert right.judged["expected_calibration_error"] == pytest.approx(0, abs=1e-6)
    assert wrong.judged["expected_calibration_error"] == pytest.approx(1, abs=1e-6)
    assert lower_is_better("expected_calibration_error") and not lower_is_better("accuracy")


def test_own_loss_is_as_it_was_set_and_as_a_run_logs_it():
    scores = drawn(1)
    own = MultiMarginLoss(p=2, margin=3.0, reduction="sum")
    (row,) = score([trainee(scores, own)]).rows
    assert row.own_loss == pytest.approx(own(scores, LABELS).item() / 40)
    assert row.losses["MultiMarginLoss"] == pytest.approx(MultiMarginLoss()(scores, LABELS).item())


def test_network_of_cells_decides_by_their_mean_vote():
    torch.manual_seed(0)
    network = CNN(widths=(4, 4, 8), hidden=8, activation="ReLU")
    images = torch.rand(40, 3, 32, 32)
    own = CrossEntropyLoss2d()
    (row,) = score([Trainee("A", network, own, [(images, LABELS)], NAMES)]).rows
    cells = network.cell_scores(images)
    votes = cells.mean(dim=(2, 3))
    assert row.own_loss == pytest.approx(own(cells, LABELS).item())
    assert row.losses["CrossEntropyLoss"] == pytest.approx(CrossEntropyLoss()(votes, LABELS).item())
    assert row.losses["CrossEntropyLoss2d"] == pytest.approx(row.losses["CrossEntropyLoss"])


def test_losses_that_have_no_column_are_told(monkeypatch):
    class _Asking(CrossEntropyLoss):
        def __init__(self, gamma: float) -> None:
            super().__init__()

    class _Learning(CrossEntropyLoss):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

    class _Refusing(CrossEntropyLoss):
        def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
            raise ValueError("not of ten classes")

    known = {"A": _Asking, "L": _Learning, "R": _Refusing, "MSELoss": MSELoss}
    monkeypatch.setattr(cross_loss, "known_classes", lambda key: known)
    found = score([trainee(drawn(0), CrossEntropyLoss()), trainee(drawn(1), CrossEntropyLoss())])
    assert found.measures == (*cross_loss.JUDGED, "MSELoss")
    assert "no default for gamma" in found.left_out["A"]
    assert "parameters of its own" in found.left_out["L"]
    assert found.left_out["R"] == "not of ten classes"


def test_seeds_of_an_arm_are_averaged():
    rows = [trainee(drawn(seed), MSELoss(), arm) for seed, arm in enumerate("AAB")]
    table = score(rows, {"MSELoss": MSELoss()})
    a, b = table.averages()
    values = [row.losses["MSELoss"] for row in table.rows]
    assert (a.arm, a.rows, b.arm, b.rows) == ("A", 2, "B", 1)
    assert a.mean["MSELoss"] == pytest.approx((values[0] + values[1]) / 2)
    assert a.deviation["MSELoss"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert math.isnan(b.deviation["accuracy"]) and b.mean["MSELoss"] == values[2]


# ---- recorded runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By loss and seed: the best checkpoint and the figures that its run had."""
    torch.set_num_threads(1)
    found = {}
    for loss in ("CrossEntropyLoss", "MSELoss"):
        for seed in ("0", "1"):
            folder = tmp_path_factory.mktemp("run")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                settings = ["--tracking_uri", "", "--seed_everything", seed]
                settings += ["--model.loss", loss, "--data.val_fraction", "0.3"]
                result = fit(resolve([*SMALL, *settings]))
            found[loss, seed] = folder / result.best_checkpoint, result.metrics
    return found


def test_runs_are_scored_on_the_pictures_that_each_kept(runs, monkeypatch):
    """A network on the other seed's split would see pictures it has learned from."""

    def refuse(self):
        raise AssertionError("the test split was looked at")

    reads = []
    read = Synthetic.read
    monkeypatch.setattr(ImageData, "test_dataloader", refuse)
    monkeypatch.setattr(Synthetic, "read", lambda self: reads.append(1) or read(self))
    table = score_recorded([Recorded(loss, path) for (loss, _), (path, _) in runs.items()])
    assert table.failed == {}
    assert len(reads) == 2  # once for each split, though its runs do not follow each other
    for row, ((loss, _), (_, metrics)) in zip(table.rows, runs.items(), strict=True):
        assert (row.arm, row.trained_on, row.pictures) == (loss, loss, 100)
        assert row.judged["accuracy"] == pytest.approx(metrics["val/accuracy"])
        assert row.own_loss == pytest.approx(metrics["val/loss"], rel=1e-5)
        assert row.losses[loss] == pytest.approx(row.own_loss)
    assert [(each.arm, each.rows) for each in table.averages()] == [
        ("CrossEntropyLoss", 2),
        ("MSELoss", 2),
    ]


def test_checkpoint_that_cannot_be_scored_is_told(runs, tmp_path, small):
    kept_nothing = fit(small("--data.val_fraction", "0", "--trainer.max_epochs", "1"))
    path = tmp_path / str(kept_nothing.best_checkpoint)
    (tmp_path / "torn.ckpt").write_bytes(b"no checkpoint")
    whole, _ = runs["MSELoss", "0"]
    asked = [Path("gone.ckpt"), tmp_path / "torn.ckpt", path, whole]
    table = score_recorded([Recorded("A", each) for each in asked])
    assert [row.trained_on for row in table.rows] == ["MSELoss"]
    assert list(table.failed) == [str(each) for each in asked[:3]]
    assert "No such file" in table.failed["gone.ckpt"]
    assert "kept no pictures" in table.failed[str(path)]
