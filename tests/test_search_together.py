"""Trials that a worker trains at once come to what they come to one after another."""

import contextlib
import gc
import itertools
import os
import signal

import pytest
import torch
from optuna.trial import TrialState

from research.classifier import Classifier
from research.configuration.compose import ConfigurationError
from research.data.kept import Kept
from research.search.desk import do_together
from research.search.document import Search
from research.search.trial import Reporter
from research.search.worker import Interruption, take_all
from research.together import shared_epoch
from research.tracking.runs import find_run
from tests.searched import desk_at, document, job, work
from tests.test_search_worker import Started, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy

SMALL = {
    "trainer.precision": "32-true",
    "data": {"class_path": "Synthetic", "num_train": 160, "num_test": 32, "image_size": 16},
}


@pytest.fixture(autouse=True)
def trained_by_stacks(monkeypatch):
    """How many networks each stack had that trained an epoch."""
    sizes = []
    train_epoch = shared_epoch.train_epoch

    def counted(group, stopper):
        sizes.append(len(group))
        train_epoch(group, stopper)

    monkeypatch.setattr(shared_epoch, "train_epoch", counted)
    gc.freeze()  # as a worker does; looking through all that is imported takes long
    yield sizes
    gc.unfreeze()


@pytest.fixture
def interruption():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Interruption()
    for number, heard in before.items():
        signal.signal(number, heard)


def trained(desk, interruption, recorder=None):
    """The trials once a worker has done all, and what it said."""
    said = []
    take_all(
        [desk],
        desk.job,
        recorder,
        Kept(),
        lambda event, **of: said.append((event, of)),
        interruption,
    )
    return desk.slots.trials(), said


def run_of(desk, trial):
    return find_run(desk.job.tracking_uri, trial.user_attrs["run_id"])


def test_a_search_has_the_same_table_with_four_at_once(tmp_path, interruption, trained_by_stacks):
    """Same slots, parameters, reports, values; trials of other sizes of batch train apart."""
    changes = {"recorded": False, "settings": SMALL | {"trainer.max_epochs": 2}}
    alone = desk_at(job(tmp_path / "one", **changes), 5)
    together = desk_at(job(tmp_path / "four", together=4, **changes), 5)
    expected = work(alone)
    found, said = trained(together, interruption)
    assert trained_by_stacks and max(trained_by_stacks) <= 4
    assert [event for event, _ in said[:5]] == 4 * ["took"] + ["ended"]
    assert sorted(of["slot"] for event, of in said if event == "ended") == list(range(5))
    for one, other in zip(found, expected, strict=True):
        assert one.state == other.state == TrialState.COMPLETE
        assert one.params == other.params and one.user_attrs["slot"] == other.user_attrs["slot"]
        assert one.values == pytest.approx(other.values, abs=0.05)
        assert one.intermediate_values == pytest.approx(other.intermediate_values, abs=0.05)


class Early(Reporter):
    """Ends the trial of one learning rate after its first epoch."""

    def ask(self, value, step, max_epochs):
        super().ask(value, step, max_epochs)
        return self.judge.params["optimizer.lr"] == 0.02


@pytest.mark.slow
def test_trials_that_end_early_leave_the_others_going(
    tmp_path, interruption, recorder, monkeypatch
):
    """Pruned, diverged or failed: each is told and recorded as it is by itself."""
    monkeypatch.setattr("research.search.trial.Reporter", Early)
    space = {"optimizer.lr": [0.01, 0.02, 1e30, -1.0]}
    settings = SMALL | {"optimizer": "SGD", "data.batch_size": 64}
    the_job = job(tmp_path, space=space, settings=settings, together=4, sampler="GridSampler")
    desk = desk_at(the_job, 4)
    trials, _ = trained(desk, interruption, recorder)
    ends = {trial.params["optimizer.lr"]: trial for trial in trials}
    states = {rate: trial.state.name for rate, trial in ends.items()}
    assert states == {0.01: "COMPLETE", 0.02: "PRUNED", 1e30: "PRUNED", -1.0: "FAIL"}
    assert list(ends[0.02].intermediate_values) == [1]
    assert ends[1e30].user_attrs["diverged"] and not ends[1e30].intermediate_values
    recorded = {rate: run_of(desk, ends[rate]).status for rate in (0.01, 0.02, 1e30)}
    assert recorded == {0.01: "FINISHED", 0.02: "FINISHED", 1e30: "FAILED"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trials_that_are_stopped_go_on_one_by_one(
    tmp_path, interruption, recorder, monkeypatch, number, trained_by_stacks
):
    """A signal in the middle of an epoch: all are put back, KILLED, each with its last.ckpt."""
    fixed = {"optimizer": "SGD", "data.batch_size": 32}
    changes = {"space": {"optimizer.lr": "log 1e-3..1e-1"}, "settings": SMALL | fixed}
    expected = work(desk_at(job(tmp_path / "whole", recorded=False, **changes), 3))
    desk = desk_at(job(tmp_path, together=3, **changes), 3)
    batches = []

    def send(reporter, trainer, module, outputs, batch, batch_idx):
        batches.append((trainer.current_epoch, batch_idx))
        if batches.count((1, 2)) == 1 and batches[-1] == (1, 2):
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "on_train_batch_end", send, raising=False)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as ending:
            trained(desk, interruption, recorder)
    code = getattr(ending.value, "code", 128 + signal.SIGINT)
    assert code == 128 + number and trained_by_stacks == [3, 3]
    for trial in desk.slots.trials():
        assert trial.state == TrialState.WAITING
        assert run_of(desk, trial).status == "KILLED"
        assert (run_of(desk, trial).artifact_dir / "checkpoints" / "last.ckpt").is_file()
    runs = [trial.user_attrs["run_id"] for trial in desk.slots.trials()]
    for one, other in zip(work(desk, recorder), expected, strict=True):
        assert one.state == TrialState.COMPLETE and one.params == other.params
        assert one.values == pytest.approx(other.values, abs=0.05)
        assert one.intermediate_values == pytest.approx(other.intermediate_values, abs=0.05)
        assert run_of(desk, one).status == "FINISHED"
    assert [trial.user_attrs["run_id"] for trial in desk.slots.trials()] == runs


def test_trials_that_do_not_fit_at_once_get_their_results_in_halves(
    tmp_path, interruption, trained_by_stacks, monkeypatch
):
    """Only the trial that is too large by itself has none."""
    fixed = {"optimizer": "SGD", "data.batch_size": 32}
    changes = {"space": {"optimizer.lr": "log 1e-3..1e-1"}, "settings": SMALL | fixed}
    expected = work(desk_at(job(tmp_path / "alone", recorded=False, **changes), 3))
    desk = desk_at(job(tmp_path, together=3, recorded=False, **changes), 3)
    step = shared_epoch.step

    def narrow(member, hooks):
        step(member, hooks)
        if trained_by_stacks[-1] == 3:
            raise MemoryError

    def narrower(classifier, batch, batch_idx):  # what is no part of a stack
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(shared_epoch, "step", narrow)
    monkeypatch.setattr(Classifier, "training_step", narrower)
    *fitting, large = trained(desk, interruption)[0]
    assert trained_by_stacks == [3, 2, 2, 2]
    assert large.state == TrialState.FAIL
    assert "with batches of 32. Try --data.batch_size 16" in large.user_attrs["error"]
    for one, other in zip(fitting, expected[:2], strict=True):
        assert one.state == TrialState.COMPLETE
        assert one.values == pytest.approx(other.values, abs=0.05)


def test_trials_gone_on_with_that_do_not_fit_at_once_lose_no_batch(
    tmp_path, interruption, recorder, monkeypatch, trained_by_stacks
):
    """From the middle of an epoch, where the failed attempt had taken batches already."""
    fixed = {"optimizer": "SGD", "data.batch_size": 32}
    changes = {"space": {"optimizer.lr": "log 1e-3..1e-1"}, "settings": SMALL | fixed}
    desk = desk_at(job(tmp_path, together=3, **changes), 3)
    step, labels, room = shared_epoch.step, {}, []

    def note(reporter, trainer, module, outputs, batch, batch_idx):
        place = (reporter.judge.number, trainer.current_epoch, batch_idx)
        labels.setdefault(place, []).append(batch[1].tolist())
        if place == (2, 1, 1) and not room:
            os.kill(os.getpid(), signal.SIGINT)
            room.append(4)  # steps until the memory is full

    def narrow(member, hooks):
        if room:
            room[0] -= 1
            if room[0] == 0:
                raise MemoryError
        step(member, hooks)

    monkeypatch.setattr(Reporter, "on_train_batch_end", note, raising=False)
    with pytest.raises(KeyboardInterrupt):
        trained(desk, interruption, recorder)
    monkeypatch.setattr(shared_epoch, "step", narrow)
    interruption.number = None
    trials, _ = trained(desk, interruption, recorder)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert trained_by_stacks == [3, 3, 3, 2, 2]
    assert [len(labels[number, 1, 2]) for number in (0, 1, 2)] == [2, 2, 2]  # one in vain
    places = list(itertools.product(range(3), range(5)))
    assert sorted({key[1:] for key in labels}) == places
    for place in places:
        of_all = [each for number in (0, 1, 2) for each in labels[number, *place]]
        assert all(each == of_all[0] for each in of_all)


def test_a_signal_that_came_before_puts_back_what_was_taken(tmp_path, interruption):
    desk = desk_at(job(tmp_path, recorded=False, together=2), 2)
    taken = [(desk, desk.slots.take()) for _ in range(2)]
    interruption.number = signal.SIGTERM
    with pytest.raises(SystemExit):
        do_together(taken, None, Kept(), interruption.heard, lambda *_: None)
    assert desk.slots.counts().waiting == 2


def test_how_long_a_trial_takes_is_no_objective_of_those_at_once():
    objective = {"val/accuracy": "maximize", "training_seconds": "minimize"}
    with contextlib.suppress(KeyError), pytest.raises(ConfigurationError, match="together"):
        Search.from_document(document(together=4, objective=objective))
    assert Search.from_document(document(objective=objective)).together == 1


@pytest.mark.faults
def test_trials_of_a_killed_worker_go_on_together(tmp_path):
    """SIGKILL: the slots wait again, and each run goes on from its own last.ckpt."""
    data = SMALL["data"] | {"num_train": 1600}
    fixed = {"data": data, "optimizer": "SGD", "data.batch_size": 32, "trainer.max_epochs": 12}
    changes = {"space": {"optimizer.lr": "log 1e-3..1e-1"}, "settings": SMALL | fixed}
    desk = desk_at(job(tmp_path, together=3, **changes), 3)
    with Started(desk.job, tmp_path) as worker:
        wait_for(lambda: all(len(t.intermediate_values) >= 2 for t in desk.slots.trials()))
        worker.process.kill()
        worker.process.wait()
    runs = [trial.user_attrs["run_id"] for trial in desk.slots.trials()]
    wait_for(lambda: all(run_of(desk, t).status == "KILLED" for t in desk.slots.trials()))
    assert desk.slots.revive_dead() == [0, 1, 2]
    with Started(desk.job, tmp_path) as worker:
        worker.events()
        assert worker.end() == 0
    for trial, run_id in zip(desk.slots.trials(), runs, strict=True):
        assert trial.state == TrialState.COMPLETE and trial.user_attrs["run_id"] == run_id
        assert list(trial.intermediate_values) == list(range(1, 13))
        assert run_of(desk, trial).tags["resumed"] == "1"
