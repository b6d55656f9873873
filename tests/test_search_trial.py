"""What becomes of a trial, in the study and in the record; and that it is like any other run."""

import contextlib
import os
import signal

import pytest
import torch
from optuna.trial import TrialState

from research.classifier import Classifier
from research.data.kept import Kept
from research.data.module import ImageData
from research.search import trial as trial_module
from research.search.storage import StorageAwayError
from research.search.trial import Reporter
from research.tracking.runs import find_run, open_store
from research.training import fit
from tests.searched import desk_at, document, job, work

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy


def run_of(desk, trial):
    return find_run(desk.job.tracking_uri, trial.user_attrs["run_id"])


def checkpoints_of(run):
    return sorted(path.name for path in (run.artifact_dir / "checkpoints").glob("*"))


def weights_of(run):
    path = run.artifact_dir / "checkpoints" / "best.ckpt"
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def runs_in(desk):
    client = open_store(desk.job.tracking_uri)
    return client.search_runs([each.experiment_id for each in client.search_experiments()])


class Stopping:
    """Sends this process a signal after a batch of the next training, once."""

    def __init__(self, monkeypatch, epoch=1, batch=2, number=signal.SIGTERM):
        self.place, self.number, self.done = (epoch, batch), number, False

        def on_train_batch_end(reporter, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx + 1) == self.place and not self.done:
                self.done = True
                os.kill(os.getpid(), self.number)

        monkeypatch.setattr(Reporter, "on_train_batch_end", on_train_batch_end)


def take_and_stop(desk, recorder, monkeypatch, **place):
    Stopping(monkeypatch, **place)
    ticket = desk.slots.take()
    with pytest.raises(SystemExit) as stopped:
        desk.do(ticket, recorder, Kept(), contextlib.nullcontext)
    assert stopped.value.code == 128 + signal.SIGTERM
    return ticket


def test_trials_run_to_their_end(tmp_path, recorder):
    desk = desk_at(job(tmp_path), 2)
    trials = work(desk, recorder)
    assert [trial.state for trial in trials] == 2 * [TrialState.COMPLETE]
    for trial in trials:
        assert trial.user_attrs["val_pictures"] == 30  # a tenth of each class
        assert trial.user_attrs["versions"]["torch"] == torch.__version__
        run = run_of(desk, trial)
        assert (run.status, run.tags["trial.state"]) == ("FINISHED", "COMPLETE")
        assert trial.value == run.metrics["best_val/accuracy"]
        assert list(trial.intermediate_values) == [1, 2, 3]
        assert max(trial.intermediate_values.values()) == trial.value
        assert checkpoints_of(run) == ["best.ckpt"]
        assert run.run_name == f"trial {trial.number}"
        assert [run.tags[name] for name in ("study", "slot")] == ["small", str(trial.number)]
        assert not any(name.startswith("test/") for name in run.metrics)


def test_a_trial_among_others_is_the_same_training_alone(tmp_path, recorder):
    desk = desk_at(job(tmp_path, settings={"model.network.dropout": 0.5}), 2)
    last = work(desk, recorder)[-1]
    settings = desk.cell.space.settings(last.params) | {"tracking_uri": desk.job.tracking_uri}
    alone = fit(desk.search.configuration(desk.cell, settings), recorder)
    assert alone.metrics["val/accuracy"] == last.value
    run, own = run_of(desk, last), find_run(desk.job.tracking_uri, alone.run_id)
    assert same_weights(weights_of(run), weights_of(own))
    assert run.metrics["train/loss"] == own.metrics["train/loss"]


def test_no_test_picture_is_ever_handed_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a trial asked for the test split")

    monkeypatch.setattr(ImageData, "test_dataloader", refuse)
    place = ImageData._place

    def place_others(self, name, device):
        return refuse() if name == "test" else place(self, name, device)

    monkeypatch.setattr(ImageData, "_place", place_others)
    (trial,) = work(desk_at(job(tmp_path, recorded=False), 1))
    assert trial.state == TrialState.COMPLETE


def test_a_pruned_trial_ends_early_and_leaves_no_checkpoint(tmp_path, recorder):
    pruner = {"class_path": "ThresholdPruner", "upper": -1.0, "n_warmup_steps": 2}
    desk = desk_at(job(tmp_path, pruner=pruner), 1)
    (trial,) = work(desk, recorder)
    run = run_of(desk, trial)
    assert trial.state == TrialState.PRUNED and list(trial.intermediate_values) == [1, 2]
    assert (run.status, run.tags["trial.state"]) == ("FINISHED", "PRUNED")
    assert checkpoints_of(run) == []


@pytest.mark.slow
def test_a_trial_is_not_pruned_after_its_last_epoch(tmp_path):
    pruner = {"class_path": "ThresholdPruner", "upper": -1.0, "n_warmup_steps": 3}
    (trial,) = work(desk_at(job(tmp_path, recorded=False, pruner=pruner), 1))
    assert trial.state == TrialState.COMPLETE


def test_a_loss_that_is_no_number_is_pruned_and_known_as_diverged(tmp_path, recorder):
    space = {"optimizer": {"SGD": {"lr": "1e37..1e38"}}, "data.batch_size": [32, 64]}
    desk = desk_at(job(tmp_path, space=space), 1)
    (trial,) = work(desk, recorder)
    run = run_of(desk, trial)
    assert trial.state == TrialState.PRUNED and trial.user_attrs["diverged"]
    assert (run.status, run.tags["trial.state"]) == ("FAILED", "PRUNED")
    assert checkpoints_of(run) == []


@pytest.mark.slow
def test_settings_that_nothing_can_be_built_from_fail_with_the_sentence(tmp_path, recorder):
    desk = desk_at(job(tmp_path, settings={"model.loss.weight": [1.0, 2.0]}), 2)
    trials = work(desk, recorder)
    assert [trial.state for trial in trials] == 2 * [TrialState.FAIL]  # and the worker goes on
    assert trials[0].user_attrs["error"].startswith("model.loss")
    runs = runs_in(desk)
    assert [run.info.status for run in runs] == 2 * ["FAILED"]
    assert {run.data.tags["trial.state"] for run in runs} == {"FAIL"}
    found = find_run(desk.job.tracking_uri, runs[0].info.run_id)
    assert "model.loss" in found.file("traceback.txt").read_text()


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(KeyError("a bug"), id="bug", marks=pytest.mark.slow),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory."), id="memory"),
    ],
)
def test_an_error_fails_one_trial_and_the_next_is_clean(tmp_path, recorder, monkeypatch, error):
    desk = desk_at(job(tmp_path), 2)
    step, failed = Classifier.training_step, []

    def fail_once(self, *args):
        if len(failed) == 0:
            failed.append(torch.ones(()))
            raise error
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", fail_once)
    first, second = work(desk, recorder)
    run = run_of(desk, first)
    assert first.state == TrialState.FAIL and second.state == TrialState.COMPLETE
    assert ("a bug" if isinstance(error, KeyError) else "memory") in first.user_attrs["error"]
    assert (run.status, run.tags["trial.state"]) == ("FAILED", "FAIL")
    assert type(error).__name__ in run.file("traceback.txt").read_text()
    assert checkpoints_of(run) == []


def test_a_stopped_trial_goes_on_as_if_it_had_never_stopped(tmp_path, recorder, monkeypatch):
    settings = {"model.network.dropout": 0.5, "data.crop_padding": 2}
    unbroken = desk_at(job(tmp_path / "one", settings=settings), 1)
    (whole,) = work(unbroken, recorder)
    desk = desk_at(job(tmp_path / "other", settings=settings), 1)
    ticket = take_and_stop(desk, recorder, monkeypatch, epoch=1, batch=3)
    run = find_run(desk.job.tracking_uri, desk.slots.trials()[0].user_attrs["run_id"])
    assert run.status == "KILLED" and "last.ckpt" in checkpoints_of(run)
    (trial,) = work(desk, recorder)
    assert trial.number == ticket.trial.number and trial.state == TrialState.COMPLETE
    assert trial.user_attrs["run_id"] == run.run_id and len(runs_in(desk)) == 1
    assert trial.intermediate_values == whole.intermediate_values and trial.value == whole.value
    again, once = run_of(desk, trial), run_of(unbroken, whole)
    assert again.status == "FINISHED" and checkpoints_of(again) == ["best.ckpt"]
    assert same_weights(weights_of(again), weights_of(once))
    figures = [name for name in once.metrics if name.startswith(("train/", "val/", "best_val/"))]
    assert {name: again.metrics[name] for name in figures} == {
        name: once.metrics[name] for name in figures
    }


@pytest.mark.slow
def test_a_trial_that_is_not_recorded_begins_anew(tmp_path, monkeypatch):
    (whole,) = work(desk_at(job(tmp_path / "one", recorded=False), 1))
    desk = desk_at(job(tmp_path / "other", recorded=False), 1)
    monkeypatch.chdir(tmp_path)
    take_and_stop(desk, None, monkeypatch, epoch=2, batch=1)
    assert list(desk.slots.trials()[0].intermediate_values) == [1, 2]
    (trial,) = work(desk)
    assert trial.state == TrialState.COMPLETE and trial.value == whole.value
    assert trial.intermediate_values == whole.intermediate_values


@pytest.mark.slow
def test_what_was_recorded_before_its_process_died_is_not_trained_again(
    tmp_path, recorder, monkeypatch
):
    desk = desk_at(job(tmp_path), 1)
    ticket = desk.slots.take()
    told = []

    def be_away(self, *args):
        told.append(args)
        raise StorageAwayError("away")

    with monkeypatch.context() as patch, pytest.raises(StorageAwayError):
        patch.setattr(type(desk.slots), "finish", be_away)
        desk.do(ticket, recorder, Kept(), contextlib.nullcontext)
    desk.slots.put_back(ticket, "died")
    monkeypatch.setattr(trial_module, "fit", None)
    (trial,) = work(desk, recorder)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, list(told[0][1]))
    assert len(runs_in(desk)) == 1


def test_several_objectives_are_told_at_the_end_alone(tmp_path):
    objective = {"val/accuracy": "maximize", "training_seconds": "minimize"}
    objective["num_parameters"] = "minimize"
    (trial,) = work(desk_at(job(tmp_path, recorded=False, objective=objective), 1))
    accuracy, seconds, parameters = trial.values
    assert 0 <= accuracy <= 1 and seconds > 0 and parameters == int(parameters) > 100
    assert trial.intermediate_values == {}


@pytest.mark.slow
def test_a_metric_that_no_trial_has_fails_with_what_there_is(tmp_path):
    (trial,) = work(desk_at(job(tmp_path, recorded=False, objective="val/kappa"), 1))
    assert trial.state == TrialState.FAIL
    assert "no val/kappa; it has val/accuracy" in trial.user_attrs["reason"]


@pytest.mark.slow
def test_a_pinned_trial_trains_its_own_settings(tmp_path, recorder):
    the_job = job(tmp_path, **{"confirm": {"best": 1, "seeds": 1}})
    the_job = type(the_job)(**{**vars(the_job), "stages": ["small/confirmation"]})
    settings = {"optimizer": {"class_path": "SGD", "lr": 0.25}, "seed_everything": 1000}
    desk = desk_at(the_job, 0)
    desk.slots.fill(1, [{"settings": settings, "candidate": ["", 0], "seed": 1000}])
    (trial,) = work(desk, recorder)
    assert trial.state == TrialState.COMPLETE and trial.user_attrs["candidate"] == ["", 0]
    written = run_of(desk, trial).configuration()
    assert "seed_everything: 1000" in written and "lr: 0.25" in written


def test_the_document_of_a_job_is_plain(tmp_path):
    import json

    assert json.loads(json.dumps(vars(job(tmp_path))))["document"] == document()
