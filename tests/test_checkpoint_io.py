"""Checkpoints: whole whenever a run is killed, and known for broken where a disk broke them."""

import os
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from research.checkpoints import io as checkpoint_io
from research.checkpoints.io import (
    DurableCheckpointIO,
    discard_previous,
    is_whole,
    newest_whole,
    progress_of,
)


def content(step: int, epochs: int = 0) -> dict:
    """What Lightning puts into a checkpoint, as far as it matters here."""
    return {
        "global_step": step,
        "state_dict": {"weight": torch.full((40,), float(step))},
        "loops": {"fit_loop": {"epoch_progress": {"total": {"processed": epochs}}}},
    }


def save(folder: Path, step: int, name: str = "last.ckpt", epochs: int = 0) -> Path:
    DurableCheckpointIO().save_checkpoint(content(step, epochs), folder / name)
    return folder / name


def step_of(path: Path) -> int:
    return DurableCheckpointIO().load_checkpoint(path)["global_step"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- writing -------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path):
    path = save(tmp_path / "new" / "folder", 3)
    loaded = DurableCheckpointIO().load_checkpoint(path)
    assert loaded["global_step"] == 3
    assert torch.equal(loaded["state_dict"]["weight"], torch.full((40,), 3.0))
    assert names(path.parent) == ["last.ckpt"]


def test_only_the_last_keeps_the_one_before(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
        save(tmp_path, step, "best.ckpt")
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert step_of(tmp_path / "last.ckpt") == 3
    assert step_of(tmp_path / "previous.ckpt") == 2


class Snapshots:
    """A copy of the folder before and after each thing that changes it: what a kill leaves."""

    def __init__(self, folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.copies = folder, copies
        self.taken: list[Path] = []
        for name in ("link", "replace", "unlink", "fsync"):
            monkeypatch.setattr(os, name, self.around(getattr(os, name)))

    def around(self, call):
        def watched(*arguments, **options):
            self.take()
            try:
                return call(*arguments, **options)
            finally:
                self.take()

        return watched

    def take(self) -> None:
        self.taken.append(self.copies / str(len(self.taken)))
        shutil.copytree(self.folder, self.taken[-1])


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_kill_at_any_point_leaves_a_whole_last_one(tmp_path, monkeypatch, hard_links):
    folder = tmp_path / "run"
    save(folder, 1), save(folder, 2)
    if not hard_links:
        monkeypatch.setattr(os, "link", without_links)
    with monkeypatch.context() as patch:
        snapshots = Snapshots(folder, tmp_path / "copies", patch)
        save(folder, 3)
    assert len(snapshots.taken) > 8
    steps, leftovers = [], 0
    for killed in snapshots.taken:
        assert is_whole(killed / "last.ckpt")
        assert is_whole(killed / "previous.ckpt")
        steps.append(step_of(killed / "last.ckpt"))
        assert newest_whole(killed) == (killed / "last.ckpt", [])
        leftovers += len(list(killed.glob(".*")))
        # And the next run writes over what lies there.
        save(killed, 4)
        assert names(killed) == ["last.ckpt", "previous.ckpt"]
        assert step_of(killed / "last.ckpt") == 4
        assert step_of(killed / "previous.ckpt") == steps[-1]
    assert sorted(set(steps)) == [2, 3]
    assert leftovers > 0


def without_links(*_, **__):
    raise OSError(95, "Operation not supported")


def test_a_kill_between_two_names_of_one_file_harms_nothing(tmp_path):
    save(tmp_path, 1)
    os.link(tmp_path / "last.ckpt", tmp_path / "previous.ckpt")
    save(tmp_path, 2)
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    assert step_of(tmp_path / "last.ckpt") == 2
    assert step_of(tmp_path / "previous.ckpt") == 1


def test_a_torn_last_one_does_not_take_the_place_of_the_one_before(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    truncate(tmp_path / "last.ckpt")
    save(tmp_path, 3)
    assert step_of(tmp_path / "previous.ckpt") == 1
    assert step_of(tmp_path / "last.ckpt") == 3


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    save(tmp_path, 1)
    for name in (".best.ckpt.part", ".last.ckpt.part", ".previous.ckpt.part"):
        (tmp_path / name).write_bytes(b"half of it")
    save(tmp_path, 2, "best.ckpt")
    assert names(tmp_path) == ["best.ckpt", "last.ckpt"]


class Unpicklable:
    def __reduce__(self):
        raise TypeError("not for a file")


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError])
def test_any_error_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    save(tmp_path, 1)
    before = (tmp_path / "last.ckpt").read_bytes()
    bad = content(2)
    if error is TypeError:
        bad["callbacks"] = Unpicklable()
    else:
        monkeypatch.setattr(checkpoint_io, "sync", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        DurableCheckpointIO().save_checkpoint(bad, tmp_path / "last.ckpt")
    assert names(tmp_path) == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_file_that_cannot_grow_is_an_error_of_the_system_with_its_name(tmp_path):
    resource = pytest.importorskip("resource")
    path = save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN  # Python's own choice
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError) as told:
            DurableCheckpointIO().save_checkpoint({"weight": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (told.value.errno, told.value.filename) == (27, str(path))
    assert names(tmp_path) == ["last.ckpt"]
    assert step_of(path) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_is_told_by_its_number_and_the_file(tmp_path, monkeypatch, size):
    """/dev/full refuses at the first write, or where all fits the buffer, when that is flushed."""
    path = save(tmp_path, 1)
    real = open

    def full(name, *arguments, **options):
        return real("/dev/full" if str(name).endswith(".part") else name, *arguments, **options)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError) as told:
        DurableCheckpointIO().save_checkpoint({"weight": torch.zeros(size)}, path)
    assert (told.value.errno, told.value.filename) == (28, str(path))
    monkeypatch.undo()
    assert names(tmp_path) == ["last.ckpt"]
    assert step_of(path) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as told:
        save(tmp_path, 1)
    assert told.value.filename == str(tmp_path / "last.ckpt")


# ---- reading -------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_file_is_torn_wherever_it_ends(tmp_path):
    path = save(tmp_path, 1)
    whole = path.read_bytes()
    assert is_whole(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert not is_whole(path), length


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path = save(tmp_path, 1)
    whole, loaded = path.read_bytes(), torch.load(path, weights_only=True)
    noticed = 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place * 5 % 8
        path.write_bytes(flipped)
        if not is_whole(path):
            noticed += 1
            continue
        again = torch.load(path, weights_only=True)
        assert torch.equal(again["state_dict"]["weight"], loaded["state_dict"]["weight"]), place
        assert again["global_step"] == loaded["global_step"]
        assert again["loops"] == loaded["loops"]
    assert noticed > len(whole) / 4


def test_what_is_no_checkpoint_is_not_whole(tmp_path):
    assert not is_whole(tmp_path / "missing.ckpt")
    assert not is_whole(tmp_path)
    for number, text in enumerate((b"", b"PK", b"not a zip archive" * 100)):
        (tmp_path / f"{number}.ckpt").write_bytes(text)
        assert not is_whole(tmp_path / f"{number}.ckpt")
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("readme.txt", "a zip archive of something else")
    assert not is_whole(tmp_path / "other.ckpt")
    with zipfile.ZipFile(tmp_path / "grows.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    assert not is_whole(tmp_path / "grows.ckpt")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("asked", [None, True, False])
def test_loading_runs_no_code(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    torch.save(content(1) | {"callbacks": Trap()}, "last.ckpt")
    assert is_whole(tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="mkdir"):
        DurableCheckpointIO().load_checkpoint("last.ckpt", weights_only=asked)
    assert newest_whole(tmp_path) == (None, [tmp_path / "last.ckpt"])
    assert names(tmp_path) == ["last.ckpt"]


def test_the_newest_is_the_one_furthest_on(tmp_path):
    save(tmp_path, 3, "previous.ckpt"), save(tmp_path, 5, "epoch=1.ckpt"), save(tmp_path, 4)
    assert newest_whole(tmp_path) == (tmp_path / "epoch=1.ckpt", [])


def test_of_those_of_one_step_the_newest_is_the_one_that_ended_its_epoch(tmp_path):
    save(tmp_path, 6), save(tmp_path, 6, "best.ckpt", epochs=1)
    assert newest_whole(tmp_path)[0] == tmp_path / "best.ckpt"
    assert progress_of(tmp_path / "best.ckpt") == (6, 1)


def test_of_those_equally_far_the_last_comes_before_the_previous_and_others(tmp_path):
    for name in ("best.ckpt", "last.ckpt", "previous.ckpt", "zero.ckpt"):
        save(tmp_path, 6, name)
    assert newest_whole(tmp_path)[0] == tmp_path / "last.ckpt"
    (tmp_path / "last.ckpt").unlink()
    assert newest_whole(tmp_path)[0] == tmp_path / "previous.ckpt"


def test_torn_ones_are_skipped_and_named(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2), save(tmp_path, 3, "best.ckpt")
    truncate(tmp_path / "last.ckpt")
    (tmp_path / "best.ckpt").write_bytes(b"")
    (tmp_path / ".last.ckpt.part").write_bytes(b"hidden, and none of these")
    torn = {tmp_path / "last.ckpt", tmp_path / "best.ckpt"}
    newest, skipped = newest_whole(tmp_path)
    assert newest == tmp_path / "previous.ckpt"
    assert set(skipped) == torn
    truncate(newest)
    newest, skipped = newest_whole(tmp_path)
    assert newest is None
    assert set(skipped) == torn | {tmp_path / "previous.ckpt"}


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert newest_whole(tmp_path) == (None, [])
    assert newest_whole(tmp_path / "missing") == (None, [])


def test_the_previous_one_goes_only_where_the_last_is_whole(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    truncate(tmp_path / "last.ckpt")
    discard_previous(tmp_path)
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    save(tmp_path, 3)
    discard_previous(tmp_path)
    assert names(tmp_path) == ["last.ckpt"]
    discard_previous(tmp_path / "missing")


# ---- with Lightning ------------------------------------------------------------------------------


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.linear(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_saves_and_resumes_by_it(tmp_path):
    def trainer(epochs):
        return Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[DurableCheckpointIO()],
            callbacks=[
                ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False),
            ],
        )

    batches = DataLoader([torch.ones(4)] * 6, batch_size=2)
    model = Line()
    trainer(2).fit(model, batches)
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    assert progress_of(tmp_path / "last.ckpt") == (6, 2)
    assert progress_of(tmp_path / "previous.ckpt") == (3, 1)
    other = Line()
    with pytest.warns(UserWarning, match="exists and is not empty"):
        trainer(2).fit(other, batches, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert torch.equal(model.linear.weight, other.linear.weight)
