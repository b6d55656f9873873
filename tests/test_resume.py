"""A run that is stopped and goes on is the run that was never stopped: weights, metrics, record."""

import os
import shutil
import signal
import sqlite3
import uuid

import pytest
import torch
from lightning.pytorch import Callback

from research import fit as command
from research.configuration.compose import CommandLine, ConfigurationError, read_command_line
from research.configuration.schema import resolve
from research.resumption import begin_anew, is_to_begin_anew, resume
from research.tracking.arms import looks_at_test
from research.tracking.runs import find_run, open_store
from research.tracking.store import sqlite_path
from research.training import fit
from tests.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy

RECORDED = [
    *SMALL,
    *("--trainer.max_epochs", "3", "--experiment", "resume", "--data.batch_size", "64"),
    *("--log_pictures", "false", "--log_model", "false", "--log_system_metrics", "false"),
]
# Whatever could carry something over from one step to the next.
HARD = [
    *("--optimizer.momentum", "0.9", "--lr_scheduler", "OneCycleLR"),
    *("--model.network.dropout", "0.5", "--model.network.normalization", "BatchNorm2d"),
    *("--data.crop_padding", "2", "--data.horizontal_flip", "true", "--data.cutout", "4"),
]
OF_TIME = ("epoch_seconds", "images_per_second")


class Signal(Callback):
    """Sends this process a signal before a batch, as a person or a scheduler would."""

    def __init__(self, epoch, batch, number=signal.SIGINT):
        self.place, self.number = (epoch, batch), number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx + 1) == self.place:
            os.kill(os.getpid(), self.number)


def begin(recorder, uri, *arguments, callbacks=()):
    configuration = resolve([*RECORDED, "--tracking_uri", uri, *arguments])
    return fit(configuration, recorder, callbacks)


def go_on(recorder, uri, run, *arguments, allow=False):
    typed = read_command_line(["--tracking_uri", uri, *arguments])
    configuration, resumption = resume(run, typed, allow)
    return fit(configuration, recorder, resumption=resumption)


def stopped(recorder, uri, epoch, batch, *arguments, number=signal.SIGINT):
    """The name of a run that a signal ended there."""
    name = f"stopped {uuid.uuid4()}"
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ending:
        begin(
            recorder, uri, *arguments, "--run_name", name, callbacks=[Signal(epoch, batch, number)]
        )
    assert any("--resume" in note for note in ending.value.__notes__)
    assert find_run(uri, name).status == "KILLED"
    return name


def recorded_metrics(uri, run_id):
    """All values of every metric of a run, as (step, value), in the order in which they came."""
    client = open_store(uri)
    names = [name for name in client.get_run(run_id).data.metrics if name not in OF_TIME]
    history = {name: client.get_metric_history(run_id, name) for name in names}
    return {name: [(row.step, row.value) for row in rows] for name, rows in history.items()}


def checkpoint(uri, run_id, name="last.ckpt"):
    return find_run(uri, run_id).artifact_dir / "checkpoints" / name


def assert_same_run(uri, one, other):
    assert recorded_metrics(uri, one.run_id) == recorded_metrics(uri, other.run_id)
    for name in ("last.ckpt", "best.ckpt"):
        before, after = (
            torch.load(checkpoint(uri, run.run_id, name), weights_only=True) for run in (one, other)
        )
        assert before["state_dict"].keys() == after["state_dict"].keys()
        for key, weight in before["state_dict"].items():
            assert torch.equal(weight, after["state_dict"][key]), key
        assert str(before["optimizer_states"]) == str(after["optimizer_states"])
        assert before["lr_schedulers"] == after["lr_schedulers"]
    assert one.metrics == other.metrics
    untimed = [
        [{name: value for name, value in row.items() if name not in OF_TIME} for row in run.history]
        for run in (one, other)
    ]
    assert untimed[0] == untimed[1]


@pytest.fixture(scope="module")
def unbroken(recorder, uri):
    """Runs that nothing stopped, made once for each list of arguments."""
    made = {}

    def unbroken(*arguments):
        if arguments not in made:
            made[arguments] = begin(recorder, uri, *arguments)
        return made[arguments]

    return unbroken


VARIANTS = {
    "hard": HARD,
    "accumulated": [*HARD, "--trainer.accumulate_grad_batches", "2"],
    "validated-twice": [*HARD, "--trainer.val_check_interval", "3"],
    "plateau": ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.patience", "0"],
    "averaged": [
        *("--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.02"),
        *("--trainer.callbacks.swa_epoch_start=2", "--trainer.callbacks.annealing_epochs=3"),
        *("--optimizer.momentum", "0.9", "--model.network.normalization", "BatchNorm2d"),
        *("--lr_scheduler", "CosineAnnealingLR", "--lr_scheduler.T_max", "3"),
    ],
    "steps": [*HARD, "--trainer.max_epochs", "-1", "--trainer.max_steps", "13"],
}


CASES = [("hard", place) for place in ((0, 2), (1, 3), (1, 5), (2, 1))]
CASES += [(name, place) for name in VARIANTS if name != "hard" for place in ((1, 3), (1, 5))]
CASES += [("averaged", (2, 1)), ("averaged", (3, 2))]  # the last: batch norm, ends first


@pytest.mark.parametrize(("variant", "place"), CASES, ids=str)
def test_run_that_goes_on_is_the_run_that_was_never_stopped(
    recorder, uri, unbroken, variant, place
):
    arguments = VARIANTS[variant]
    name = stopped(recorder, uri, *place, *arguments)
    run_id = find_run(uri, name).run_id
    resumed = go_on(recorder, uri, name)
    assert resumed.run_id == run_id
    run = find_run(uri, run_id)
    assert run.status == "FINISHED"
    assert run.tags["resumed"] == "1"
    assert_same_run(uri, unbroken(*arguments), resumed)
    assert not checkpoint(uri, run_id, "previous.ckpt").exists()


def test_it_may_be_stopped_again_and_again(recorder, uri, unbroken):
    name = stopped(recorder, uri, 0, 3, *HARD)
    for place in ((1, 1), (1, 4), (2, 2)):
        configuration, resumption = resume(name, CommandLine(settings={"tracking_uri": uri}))
        with pytest.raises(SystemExit) as ending:
            fit(configuration, recorder, [Signal(*place, signal.SIGTERM)], resumption=resumption)
        assert ending.value.code == 143
    assert_same_run(uri, unbroken(*HARD), go_on(recorder, uri, name))
    assert find_run(uri, name).tags["resumed"] == "4"


def test_what_was_saved_within_an_epoch_is_gone_on_from_exactly(recorder, uri, unbroken, tmp_path):
    """As after kill -9: nothing is saved at the end, the record has more than the checkpoint."""
    arguments = [*HARD, "--checkpoint.every_n_train_steps", "2"]
    kept = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            folder = trainer.checkpoint_callback.dirpath
            if batch_idx in (0, 3) and trainer.current_epoch > 0:
                kept[trainer.current_epoch, batch_idx] = shutil.copytree(
                    folder, tmp_path / f"{trainer.current_epoch}-{batch_idx}"
                )

    whole = begin(recorder, uri, *arguments, callbacks=[Keep()])
    before = recorded_metrics(uri, whole.run_id)
    assert set(kept) == {(1, 0), (1, 3), (2, 0), (2, 3)}
    for folder in kept.values():
        shutil.copytree(folder, checkpoint(uri, whole.run_id).parent, dirs_exist_ok=True)
        open_store(uri).update_run(whole.run_id, status="KILLED")
        again = go_on(recorder, uri, whole.run_id)
        assert recorded_metrics(uri, whole.run_id) == before
        assert_same_run(uri, unbroken(*HARD), again)


def test_metrics_that_were_not_handed_over_are_there_afterwards(recorder, uri, unbroken):
    name = stopped(recorder, uri, 2, 2, *HARD)
    run_id = find_run(uri, name).run_id
    columns = "key, value, timestamp, step, is_nan, run_uuid"
    with sqlite3.connect(sqlite_path(uri)) as database:  # as if a kill had been faster
        for table in ("metrics", "latest_metrics"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ? AND step = 2", (run_id,))
        database.execute(
            f"INSERT OR IGNORE INTO latest_metrics ({columns}) SELECT {columns} FROM metrics "
            "WHERE run_uuid = ? AND step = 1",
            (run_id,),
        )
    database.close()
    resumed = go_on(recorder, uri, name)
    recorded = recorded_metrics(uri, run_id)
    expected = recorded_metrics(uri, unbroken(*HARD).run_id)
    assert {name: sorted(rows) for name, rows in recorded.items()} == expected
    assert resumed.metrics == unbroken(*HARD).metrics


def test_other_settings_are_refused_unless_asked_for_and_then_recorded(recorder, uri):
    name = stopped(recorder, uri, 1, 2)
    with pytest.raises(ConfigurationError, match=r"optimizer\.lr was 0\.01, now 0\.5") as refused:
        go_on(recorder, uri, name, "--optimizer.lr", "0.5")
    assert "--allow_changes" in str(refused.value)
    assert find_run(uri, name).status == "KILLED"
    go_on(recorder, uri, name, "--optimizer.weight_decay", "0.5", allow=True)
    run = find_run(uri, name)
    assert run.tags["resumed.1.changes"] == "optimizer.weight_decay: 0.0 -> 0.5"
    assert "optimizer.weight_decay" in run.file("resumed/1.txt").read_text()
    assert "weight_decay: 0.5" in run.file("resumed/1.config.yaml").read_text()
    assert "weight_decay: 0.0" in run.configuration()


def test_what_cannot_change_a_figure_may_be_another(recorder, uri):
    name = stopped(recorder, uri, 1, 2)
    go_on(recorder, uri, name, "--trainer.enable_progress_bar", "true", "--log_pictures", "false")
    assert "resumed.1.changes" not in find_run(uri, name).tags


def test_a_finished_run_is_trained_longer_on_demand_only(recorder, uri, unbroken):
    whole = begin(recorder, uri)
    with pytest.raises(ConfigurationError, match=r"is finished.*--trainer\.max_epochs N"):
        go_on(recorder, uri, whole.run_id)
    longer = go_on(recorder, uri, whole.run_id, "--trainer.max_epochs", "4", allow=True)
    expected = unbroken("--trainer.max_epochs", "4")  # no schedule: the length changes nothing else
    steps = recorded_metrics(uri, whole.run_id)
    assert steps["train/loss"] == recorded_metrics(uri, expected.run_id)["train/loss"]
    assert longer.metrics == expected.metrics
    assert looks(uri, expected.run_id) == 1


def test_each_time_a_run_goes_on_to_its_end_is_a_look_at_test(recorder, uri):
    name = stopped(recorder, uri, 1, 2)
    assert looks(uri, name) == 0
    for epochs, expected in (("3", 1), ("4", 2), ("5", 3)):
        go_on(recorder, uri, name, "--trainer.max_epochs", epochs, allow=True)
        assert looks(uri, name) == expected
    whole = "--trainer.max_epochs", "6", "--trainer.limit_test_batches", "0"
    go_on(recorder, uri, name, *whole, allow=True)
    assert looks(uri, name) == 3


def looks(uri, run):
    recorded = find_run(uri, run)
    return looks_at_test(recorded.tags, recorded.metrics)


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "empty"])
def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken(
    recorder, uri, unbroken, caplog, damage
):
    name = stopped(recorder, uri, 2, 2, *HARD)
    path = checkpoint(uri, name)
    content = path.read_bytes()
    middle = len(content) // 2
    torn = {
        "truncated": content[:middle],
        "zeroed": content[:middle] + bytes(4096) + content[middle + 4096 :],
        "empty": b"",
    }
    path.write_bytes(torn[damage])
    resumed = go_on(recorder, uri, name)
    assert f"{path} is torn or damaged and is skipped for previous.ckpt" in caplog.text
    assert "skipped, damaged: last.ckpt" in find_run(uri, name).file("resumed/1.txt").read_text()
    assert_same_run(uri, unbroken(*HARD), resumed)


def test_with_no_whole_checkpoint_it_says_what_to_do(recorder, uri):
    name = stopped(recorder, uri, 1, 1)
    for path in checkpoint(uri, name).parent.iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(ConfigurationError, match=r"no checkpoint to go on from.*config\.yaml"):
        go_on(recorder, uri, name)


def test_a_run_that_is_alive_is_left_alone(recorder, uri):
    run = recorder.start_run(uri, "resume", "alive")
    run.wait()
    with pytest.raises(ConfigurationError, match=f"still running: process {os.getpid()} on "):
        go_on(recorder, uri, "alive")
    run.finish()


def test_the_command_goes_on_and_says_so(recorder, uri, unbroken, capsys):
    name = stopped(recorder, uri, 1, 2, *HARD)
    capsys.readouterr()
    assert command.main(["--resume", name, "--tracking_uri", uri]) == 0
    told = capsys.readouterr()
    assert f"going on with run {name}" in told.err
    assert "from last.ckpt: step 7, 1 epochs ended" in told.err
    assert "test" in told.out
    assert recorded_metrics(uri, find_run(uri, name).run_id) == recorded_metrics(
        uri, unbroken(*HARD).run_id
    )


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--resume"], "the run's id"),
        (["--resume", "nobody"], 'no run "nobody"'),
        (["--resume", "x", "--tracking_uri", ""], "tracking_uri is empty"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(uri, capsys, typed, words):
    typed = typed if "--tracking_uri" in typed else [*typed, f"--tracking_uri={uri}"]
    assert command.main(typed) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


# ---- a job that is started again before its run had a checkpoint ---------------------------------


class Dies(Callback):
    def on_train_start(self, trainer, pl_module):
        raise ZeroDivisionError


def test_run_without_a_checkpoint_is_begun_anew_and_stays_the_only_one(small, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    quick = ["--log_pictures", "false", "--log_model", "false"]
    configuration = small("--tracking_uri", uri, "--run_name", "begun", *quick)
    with pytest.raises(ZeroDivisionError):
        fit(configuration, callbacks=[Dies()])
    run = find_run(uri, "begun")
    assert run.status == "FAILED" and is_to_begin_anew(run)
    resumption = begin_anew(run)
    assert resumption.described().endswith("anew: it had no checkpoint yet")
    result = fit(configuration, resumption=resumption)
    assert result.run_id == run.run_id and len(result.history) == 2
    run = find_run(uri, "begun")
    assert run.status == "FINISHED" and not is_to_begin_anew(run)
    assert run.file("resumed/1.txt").read_text().count("checkpoint: none yet, after 0 steps") == 1
