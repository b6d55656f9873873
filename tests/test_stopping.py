"""Signals end a training with nothing lost, and what goes on from there is as if never stopped."""

import contextlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from research.checkpoints.io import DurableCheckpointIO, is_whole, progress_of
from research.data import Synthetic
from research.faults import stopping
from research.faults.stopping import (
    Interrupted,
    Stopped,
    ending_of,
    listening,
)
from research.processes.jobs import is_requeued, requeue, slurm_tags

ROOT = Path(__file__).parents[1]

# Lightning's own words about its own code, and about what a test leaves out on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def signals_are_heard(monkeypatch):
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    asked = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in asked.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- a small training ----------------------------------------------------------------------------


class Notes(Logger):
    """What was logged at which step."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_, **__):
        pass


class Line(LightningModule):
    """A linear classifier that notes what it was shown and when it was validated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3 * 8 * 8, 10)
        self.seen: list[tuple[int, float]] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.trainer.current_epoch, images.double().sum().item()))
        loss = torch.nn.functional.cross_entropy(self.linear(images.flatten(1)), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.global_step)
            self.log("val", self.linear.weight.sum())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class SendAt(Callback):
    """Sends this process a signal in a hook, once; of the epoch and batch (from 0) if given."""

    def __init__(
        self, number: int, hook: str, epoch: int | None = None, batch: int | None = None
    ) -> None:
        self.sent = False
        self.ended: list[str] = []

        def send(trainer, *_, **__):
            here = epoch in (None, trainer.current_epoch)
            if here and batch in (None, trainer.fit_loop.batch_idx) and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)

        setattr(self, hook, send)

    def on_train_end(self, trainer, pl_module):
        self.ended.append("train")


def small() -> Synthetic:
    """Six batches an epoch."""
    return Synthetic(
        num_train=100,
        num_test=20,
        image_size=8,
        batch_size=16,
        crop_padding=2,
        horizontal_flip=True,
    )


class Ran:
    """A training, as far as it came, and what ended it."""

    def __init__(
        self,
        folder: Path | None,
        *callbacks: Callback,
        resume: Path | None = None,
        keep: bool = True,
        sanity: int = 0,
        **limits: Any,
    ) -> None:
        self.model, self.notes = Line(), Notes()
        self.ended_by: BaseException | None = None
        keeper = ModelCheckpoint(
            folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True
        )
        with listening() as self.stopper:
            self.stopper.folder = folder
            self.trainer = Trainer(
                accelerator="cpu",
                logger=self.notes,
                log_every_n_steps=1,
                num_sanity_val_steps=sanity,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=keep,
                callbacks=[self.stopper, *callbacks, *[keeper] * keep],
                plugins=[DurableCheckpointIO()],
                **limits,
            )
            try:
                self.trainer.fit(self.model, small(), ckpt_path=resume, weights_only=True)
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                self.ended_by = error


# ---- what goes on is as if never stopped ---------------------------------------------------------

LIMITS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 3},
    "accumulated": {"max_epochs": 3, "accumulate_grad_batches": 3},
    "accumulated-unevenly": {"max_epochs": 3, "accumulate_grad_batches": 4},
    "validated-often": {"max_epochs": 3, "val_check_interval": 2},
    "validated-across-epochs": {
        "max_epochs": 3,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
    },
    "validated-seldom": {"max_epochs": 3, "check_val_every_n_epoch": 2},
    "steps": {"max_epochs": -1, "max_steps": 17},
    "steps-and-epochs": {"max_epochs": 3, "max_steps": 17},
    "accumulated-steps": {"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 3},
    "one-batch-an-epoch": {"max_epochs": 3, "limit_train_batches": 1},
}
IN_MIDST = [
    ("on_train_batch_end", 0, 0),
    ("on_train_batch_end", 1, 3),
    ("on_train_batch_end", 1, 4),
]
AT_END = [
    ("on_train_batch_end", 1, 5),
    ("on_validation_start", 1, 5),
    ("on_train_epoch_end", 1, 5),
    ("on_train_epoch_start", 1, None),
    ("on_train_batch_start", 2, 0),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    runs: dict[str, Ran] = {}

    def run(name: str) -> Ran:
        if name not in runs:
            runs[name] = Ran(tmp_path_factory.mktemp(name), **LIMITS[name])
            assert runs[name].ended_by is None
        return runs[name]

    return run


def assert_goes_on_as(whole: Ran, folder: Path, keep: bool, *sender: Callback, **limits) -> None:
    first = Ran(folder, *sender, keep=keep, **limits)
    assert isinstance(first.ended_by, Stopped)
    assert first.ended_by.checkpoint == folder / "last.ckpt"
    second = Ran(folder, resume=folder / "last.ckpt", keep=keep, **limits)
    assert second.ended_by is None
    assert first.model.seen + second.model.seen == whole.model.seen
    assert first.model.validated + second.model.validated == whole.model.validated
    assert first.notes.rows + second.notes.rows == whole.notes.rows
    assert torch.equal(second.model.linear.weight, whole.model.linear.weight)
    assert second.trainer.fit_loop.epoch_progress == whole.trainer.fit_loop.epoch_progress
    counts = [run.trainer.fit_loop.epoch_loop.batch_progress for run in (second, whole)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("limits", [name for name in LIMITS if "one" not in name])
@pytest.mark.parametrize("place", [IN_MIDST[1]])
def test_a_run_stopped_in_an_epoch_goes_on_exactly(tmp_path, unbroken, limits, place):
    sender = SendAt(signal.SIGTERM, *place)
    assert_goes_on_as(unbroken(limits), tmp_path, True, sender, **LIMITS[limits])


@pytest.mark.parametrize("place", [IN_MIDST[0], IN_MIDST[2]])
@pytest.mark.parametrize("limits", ["accumulated", "validated-across-epochs"])
def test_a_run_stopped_at_its_first_or_before_a_last_batch_goes_on(
    tmp_path, unbroken, limits, place
):
    sender = SendAt(signal.SIGTERM, *place)
    assert_goes_on_as(unbroken(limits), tmp_path, True, sender, **LIMITS[limits])


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("limits", LIMITS)
def test_a_run_stopped_at_the_end_of_an_epoch_goes_on_exactly(tmp_path, unbroken, limits, keep):
    last = 0 if limits == "one-batch-an-epoch" else 5
    sender = SendAt(signal.SIGTERM, "on_train_batch_end", 1, last)
    assert_goes_on_as(unbroken(limits), tmp_path, keep, sender, **LIMITS[limits])


@pytest.mark.parametrize("place", AT_END, ids=lambda place: place[0])
def test_where_one_epoch_ends_and_the_next_begins_it_goes_on_exactly(tmp_path, unbroken, place):
    sender = SendAt(signal.SIGTERM, *place)
    assert_goes_on_as(unbroken("epochs"), tmp_path, True, sender, **LIMITS["epochs"])


def test_a_run_can_be_stopped_again_and_again(tmp_path, unbroken):
    whole, limits = unbroken("validated-often"), LIMITS["validated-often"]
    seen, resume = [], None
    for place in [(0, 1), (0, 4), (1, 2), (2, 0)]:
        ran = Ran(
            tmp_path, SendAt(signal.SIGTERM, "on_train_batch_end", *place), resume=resume, **limits
        )
        assert isinstance(ran.ended_by, Stopped)
        seen += ran.model.seen
        resume = tmp_path / "last.ckpt"
    ran = Ran(tmp_path, resume=resume, **limits)
    seen += ran.model.seen
    assert ran.ended_by is None
    assert seen == whole.model.seen
    assert torch.equal(ran.model.linear.weight, whole.model.linear.weight)


# ---- where it stops ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "place", "saved"),
    [
        ("epochs", ("on_train_batch_start", 0, 0), (1, 0)),
        ("epochs", ("on_train_batch_start", 1, 2), (9, 1)),
        ("epochs", ("on_train_batch_end", 1, 2), (9, 1)),
        ("epochs", ("on_validation_start", 0, 5), (6, 1)),
        ("epochs", ("on_validation_epoch_end", 0, 5), (6, 1)),
        ("epochs", ("on_train_batch_end", 0, 5), (6, 1)),
        ("epochs", ("on_train_epoch_start", 1, None), (6, 1)),
        ("epochs", ("on_train_batch_end", 2, 5), (18, 3)),
        ("accumulated", ("on_train_batch_end", 1, 0), (3, 1)),
        ("accumulated", ("on_train_batch_end", 1, 2), (3, 1)),
        ("accumulated", ("on_train_batch_end", 1, 3), (4, 2)),
        ("validated-often", ("on_validation_start", 1, 3), (10, 1)),
    ],
)
def test_it_stops_after_the_step_and_the_validation_under_way(tmp_path, limits, place, saved):
    sender = SendAt(signal.SIGTERM, *place)
    ran = Ran(tmp_path, sender, **LIMITS[limits])
    assert isinstance(ran.ended_by, Stopped)
    assert (ran.ended_by.signal, ran.ended_by.code) == (signal.SIGTERM, 143)
    assert is_whole(tmp_path / "last.ckpt")
    assert progress_of(tmp_path / "last.ckpt") == saved
    steps = ran.trainer.global_step
    assert steps == saved[0]
    if place[0].startswith("on_validation"):
        assert ran.model.validated[-1] == steps


def test_in_the_last_steps_the_training_ends_and_nothing_is_saved_twice(tmp_path):
    sender = SendAt(signal.SIGTERM, "on_train_batch_end", 2, 5)
    saved: list[int] = []

    class Counts(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append(checkpoint["global_step"])

    ran = Ran(tmp_path, sender, Counts(), max_epochs=3)
    assert isinstance(ran.ended_by, Stopped)
    assert saved == [6, 12, 18]
    assert ran.model.validated == [6, 12, 18]
    assert sender.ended == ["train"]  # a line for the last epoch is printed there


def test_in_the_last_steps_it_is_saved_where_nothing_else_does(tmp_path):
    ran = Ran(
        tmp_path, SendAt(signal.SIGTERM, "on_train_batch_end", 0, 5), keep=False, max_epochs=1
    )
    assert isinstance(ran.ended_by, Stopped)
    assert progress_of(tmp_path / "last.ckpt") == (6, 1)


def test_without_a_folder_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = Ran(None, SendAt(signal.SIGTERM, "on_train_batch_end", 0, 2), keep=False, max_epochs=1)
    assert isinstance(ran.ended_by, Stopped)
    assert ran.ended_by.checkpoint is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_printed_and_how_it_ends(tmp_path, capfd, number):
    ran = Ran(tmp_path, SendAt(number, "on_train_batch_end", 0, 2), max_epochs=1)
    told = capfd.readouterr().err
    assert "stopping after this step" in told
    assert ("Ctrl-C again to stop at once" in told) == (number == signal.SIGINT)
    assert isinstance(ran.ended_by, Stopped)
    assert ran.ended_by.code == 128 + number
    ending = ending_of(ran.ended_by)
    assert isinstance(ending, KeyboardInterrupt if number == signal.SIGINT else SystemExit)
    assert ending.checkpoint == tmp_path / "last.ckpt"
    assert ending.signal == number
    assert ran.trainer.interrupted


# ---- outside the training loop -------------------------------------------------------------------


def test_while_nothing_trains_a_signal_ends_it_at_once():
    with pytest.raises(Interrupted), listening():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    with pytest.raises(Stopped) as told, listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert (told.value.code, told.value.checkpoint) == (143, None)


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_validation_batch_start"])
def test_before_the_first_step_a_signal_ends_it_at_once(tmp_path, hook):
    """Lightning makes SystemExit of KeyboardInterrupt, and keeps it as the context."""
    ran = Ran(tmp_path, SendAt(signal.SIGINT, hook), sanity=1, max_epochs=1)
    assert isinstance(ran.ended_by, SystemExit)
    assert isinstance(ran.ended_by.__context__, Interrupted)
    ran = Ran(tmp_path, SendAt(signal.SIGTERM, hook), sanity=1, max_epochs=1)
    assert isinstance(ran.ended_by, Stopped)
    assert ran.model.seen == []
    assert list(tmp_path.iterdir()) == []


def test_in_the_test_a_signal_ends_it_at_once_and_says_where_the_checkpoint_is(tmp_path):
    sender = SendAt(signal.SIGTERM, "on_test_batch_start")
    with listening() as stopper:
        stopper.folder = tmp_path
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[stopper, sender, ModelCheckpoint(tmp_path, filename="last")],
        )
        model, data = Line(), small()
        trainer.fit(model, data)
        with pytest.raises(Stopped) as told:
            trainer.test(model, data, verbose=False)
    assert told.value.checkpoint == tmp_path / "last.ckpt"
    assert not trainer.received_sigterm


# ---- hearing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_heard_before_hears_again(tmp_path, number):
    def own(*_):
        raise AssertionError("not while the training listens")

    signal.signal(number, own)
    ran = Ran(tmp_path, SendAt(number, "on_train_batch_end", 0, 1), max_epochs=1)
    assert isinstance(ran.ended_by, Stopped)
    assert signal.getsignal(number) is own
    Ran(tmp_path, max_epochs=1)
    assert signal.getsignal(number) is own


def test_what_is_ignored_stays_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ran = Ran(tmp_path, SendAt(signal.SIGINT, "on_train_batch_end", 0, 1), max_epochs=1)
    assert ran.ended_by is None
    assert len(ran.model.seen) == 6
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_listened_to(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found = []

    def train():
        with listening() as stopper:
            found.append(stopper.signals)
            found.append([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])
        found.append(Ran(tmp_path, max_epochs=1).ended_by)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [(), before, None]


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_of_a_kind_ends_the_process_and_an_echo_does_not(monkeypatch, number):
    clock = itertools.count(step=0.3)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(stopping.os, "_exit", end)
    with listening() as stopper:
        stopper.training = True
        signal.raise_signal(number)  # at 0
        signal.raise_signal(number)  # at 0.3: the same one, told twice
        other = signal.SIGTERM if number == signal.SIGINT else signal.SIGINT
        signal.raise_signal(other)  # at 0.6: the first of its kind, and it is stopping already
        assert stopper.heard == number
        with pytest.raises(Ended) as told:
            signal.raise_signal(number)  # at 0.9
    assert told.value.args == (128 + number,)


SLEEPS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
import tests.test_stopping as t

class Sleeps(t.Line):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            print("sleeping", flush=True)
            until = time.monotonic() + 300
            while time.monotonic() < until:  # a signal ends a sleep early
                time.sleep(until - time.monotonic())
        return super().training_step(batch, batch_idx)

t.Line = Sleeps
try:
    t.Ran(Path("run"), max_epochs=1)
finally:
    print("not at once", flush=True)
"""


def start(arguments: list[str], folder: Path, **options: Any) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.faults
def test_the_second_ctrl_c_ends_a_step_that_hangs(tmp_path):
    process = start(["-c", SLEEPS], tmp_path)
    try:
        for line in process.stdout:
            if line == "sleeping\n":
                break
        process.send_signal(signal.SIGINT)
        for line in process.stderr:
            if "Ctrl-C again" in line:
                break
        assert process.poll() is None
        time.sleep(stopping.ECHO_SECONDS + 0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "not at once" not in out
    assert list((tmp_path / "run").glob("*")) == []


TWO = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
import tests.test_stopping as t

class Slow(t.Line):
    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        if step == 4:
            os.write(1, f"rank {self.trainer.global_rank} is {os.getpid()}\\n".encode())
            time.sleep(300 if len(sys.argv) > 1 else 0)
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

t.Line = Slow
ran = t.Ran(Path("run"), max_epochs=10_000, devices=2, strategy="ddp")
os.write(1, f"rank {ran.trainer.global_rank} stopped {ran.trainer.global_step}\\n".encode())
raise t.ending_of(ran.ended_by)
"""


def ranks(lines, word: str) -> dict[str, int]:
    """The number that each of the two ranks told after the word, as soon as both have."""
    told: dict[str, int] = {}
    for line in lines:
        if line.startswith("rank ") and word in line:
            _, rank, _, number = line.split()
            told[rank] = int(number)
        if len(told) == 2:
            break
    return told


def assert_gone(pids) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        status = {
            process.pid: process.info["status"] for process in psutil.process_iter(["status"])
        }
        left = [pid for pid in pids if status.get(pid, "zombie") != psutil.STATUS_ZOMBIE]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"{left} are still there")


@pytest.mark.faults
@pytest.mark.parametrize("hangs", [False, True])
def test_two_processes_end_together(tmp_path, hangs):
    """Only the first is told; both stop in the same step, or at once where the step hangs."""
    (tmp_path / "two.py").write_text(TWO)
    process = start(["two.py", *["hang"] * hangs], tmp_path, start_new_session=True)
    try:
        pids = ranks(process.stdout, " is ")
        assert pids["0"] == process.pid
        process.send_signal(signal.SIGINT if hangs else signal.SIGTERM)
        if hangs:
            for line in process.stderr:
                if "Ctrl-C again" in line:
                    break
            time.sleep(stopping.ECHO_SECONDS + 0.1)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
        assert process.returncode == (130 if hangs else 143), err
        assert_gone(pids.values())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    steps = set(ranks(out.splitlines(), "stopped").values())
    if hangs:
        assert steps == set()
    else:
        assert len(steps) == 1
        assert progress_of(tmp_path / "run" / "last.ckpt")[0] in steps


# ---- SLURM ---------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Writes a program of this name; returns the file that a script may note its arguments in."""

    def write(script: str = 'echo "$@" >> "$0.called"') -> Path:
        folder = tmp_path / "programs"
        folder.mkdir(exist_ok=True)
        program = folder / "scontrol"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return folder / "scontrol.called"

    return write


def test_a_job_is_requeued_by_its_number(tmp_path, scontrol, monkeypatch):
    called = scontrol()
    assert requeue() is None
    assert not called.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert requeue() == "SLURM job 4711 is requeued and will go on from the checkpoint."
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert "4700_0 is requeued" in requeue()
    assert called.read_text().splitlines() == ["requeue 4711", "requeue 4700_0"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo 'Access denied' >&2; exit 1", "Access denied"), ("exit 3", "exit 3")],
)
def test_a_job_that_cannot_be_requeued_is_told_in_a_sentence(scontrol, monkeypatch, script, reason):
    scontrol(script)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    told = requeue()
    assert told == f"SLURM job 4711 could not be requeued (scontrol: {reason}); submit it again."


def test_a_missing_scontrol_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert "could not be requeued (scontrol: No such file" in requeue()


def test_only_the_first_rank_requeues(scontrol, monkeypatch):
    called = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert requeue() is None
    assert not called.exists()


def test_a_run_knows_its_job(monkeypatch):
    assert slurm_tags() == {}
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert slurm_tags() == {"slurm.job_id": "12"}
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_tags() == {"slurm.job_id": "10_2"}


@pytest.mark.parametrize(
    ("count", "requeued"), [(None, False), ("", False), ("0", False), ("1", True), ("x", False)]
)
def test_a_requeued_job_is_known(monkeypatch, count, requeued):
    if count is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    assert not is_requeued()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert is_requeued() == requeued


@pytest.mark.parametrize("by_srun", [False, True])
def test_before_its_time_is_up_a_job_is_stopped_and_saved(
    tmp_path, scontrol, monkeypatch, unbroken, by_srun
):
    """Under srun Lightning has a handler of its own, which must not save and requeue beside."""
    called = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    if by_srun:
        for name in ("PROCID", "LOCALID", "NODEID"):
            monkeypatch.setenv(f"SLURM_{name}", "0")
        monkeypatch.setenv("SLURM_NTASKS", "1")
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    before = signal.getsignal(signal.SIGUSR1)
    run = tmp_path / "run"
    sender = SendAt(signal.SIGUSR1, "on_train_batch_end", 1, 3)
    ran = Ran(run, sender, max_epochs=3, default_root_dir=tmp_path / "root")
    environment = type(ran.trainer._accelerator_connector.cluster_environment).__name__
    assert (environment == "SLURMEnvironment") == by_srun
    assert isinstance(ran.ended_by, Stopped)
    assert ran.ended_by.signal == signal.SIGUSR1
    assert ran.ended_by.code == 128 + signal.SIGUSR1
    assert progress_of(run / "last.ckpt") == (10, 1)
    assert not list(tmp_path.rglob("hpc*"))
    assert not called.exists()  # the command asks for it, when the run is recorded as stopped
    assert signal.getsignal(signal.SIGUSR1) == before
    again = Ran(
        run,
        SendAt(signal.SIGTERM, "on_train_batch_end", 2, 1),
        resume=run / "last.ckpt",
        max_epochs=3,
    )
    assert isinstance(again.ended_by, Stopped)
    assert again.ended_by.signal == signal.SIGTERM
    assert progress_of(run / "last.ckpt") == (14, 2)


def test_outside_slurm_its_signal_is_nobodys():
    before = signal.getsignal(signal.SIGUSR1)
    with listening() as stopper:
        assert signal.SIGUSR1 not in stopper.signals
        assert signal.getsignal(signal.SIGUSR1) == before


# ---- waiting for other processes -----------------------------------------------------------------

WAITING = """
import sys
import torch.distributed
from research.faults import stopping
stopping.STUCK_SECONDS = float(sys.argv[1])
with stopping.listening() as stopper:
    stopper.waits = True
    print("waiting", flush=True)
    torch.distributed.TCPStore("127.0.0.1", 0, world_size=2, is_master=True)
"""


@pytest.mark.parametrize(("seconds", "signals"), [("600", 2), ("0.5", 1)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_who_waits_for_other_processes_can_be_stopped(seconds, signals, number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, seconds],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.5)
    for _ in range(signals):
        process.send_signal(number)
        time.sleep(0.7)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "this process was waiting for others" in told
