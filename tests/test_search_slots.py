"""Every slot of a budget gets exactly one result, whoever dies, stops, or comes when others do."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.samplers import BruteForceSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from research.search import slots as slots_module
from research.search.slots import MOST_ATTEMPTS, Slots
from research.search.storage import StorageError, close_storage, open_storage
from tests.benchmarks.storages import address_of, measure, open_slots
from tests.services import postgresql_programs

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING


def at(folder: Path, sampler=lambda slot: RandomSampler(seed=slot), **given) -> Slots:
    """The study in a journal of the folder, as a new process would open it."""
    storage = open_storage(None, folder / "a.journal")
    return Slots(storage, "s", ["maximize"], sampler, **given)


def draw(trial) -> dict:
    lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
    layers = trial.suggest_int("layers", 1, 8)
    optimizer = trial.suggest_categorical("optimizer", ["SGD", "AdamW"])
    return {"lr": lr, "layers": layers, "optimizer": optimizer}


def value(params: dict) -> float:
    return -abs(params["lr"] - 0.1) - params["layers"] / 10 + (params["optimizer"] == "SGD")


def run(slots: Slots, most: int = 1000) -> int:
    """Work on the slots as a worker; how many were finished."""
    for finished in range(most):
        ticket = slots.take()
        if ticket is None:
            return finished
        assert slots.finish(ticket, [value(draw(ticket.trial))], COMPLETE)
    return most


@pytest.fixture
def dead(monkeypatch):
    """A name by which a process takes trials that has died since."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    tags = slots_module.first_beat(process.pid)
    process.wait()

    def become(is_dead: bool) -> None:
        monkeypatch.setattr(
            slots_module,
            "first_beat",
            (lambda pid: {**tags, **slots_module.beat()}) if is_dead else first_beat,
        )

    first_beat = slots_module.first_beat
    become(True)
    return become


# ---- filling and taking --------------------------------------------------------------------------


def test_each_slot_of_the_budget_is_filled_once(tmp_path):
    slots = at(tmp_path)
    assert slots.fill(5) == 5
    assert slots.fill(5) == 0
    assert at(tmp_path).fill(7) == 2
    assert [t.user_attrs["slot"] for t in slots.trials()] == list(range(7))
    assert slots.counts().waiting == slots.counts().left == 7


def test_the_lowest_slot_is_taken_first_and_by_one_alone(tmp_path):
    one, other = at(tmp_path), at(tmp_path)
    one.fill(5)
    taken = [taker.take().slot for taker in (one, other, other, one, other)]
    assert taken == list(range(5))
    assert one.take() is None and other.take() is None
    assert one.counts().running == 5


def test_slots_beyond_a_lowered_budget_wait_and_what_finished_stays(tmp_path):
    slots = at(tmp_path)
    slots.fill(6)
    run(slots, 4)
    slots.fill(2)
    assert slots.take() is None
    assert (slots.counts().finished, slots.counts().left) == (4, 0)
    slots.fill(5)
    assert run(slots) == 1
    slots.fill(7)
    assert run(slots) == 2
    assert len(slots.study.trials) == 7


def test_pinned_settings_come_with_their_slots(tmp_path):
    slots = at(tmp_path)
    pinned = [
        {"settings": {"optimizer": {"lr": 0.1}}, "candidate": ["", 3], "seed": 7 + i}
        for i in (0, 1)
    ]
    slots.fill(2, pinned)
    first, second = slots.take(), slots.take()
    assert [first.pinned, second.pinned] == pinned
    slots.finish(first, [0.5], COMPLETE)
    attrs = slots.trials()[0].user_attrs
    assert attrs["candidate"] == ["", 3] and attrs["seed"] == 7


def test_the_study_is_made_once_and_keeps_its_attributes(tmp_path):
    at(tmp_path, attrs={"search": {"a": 1}})
    again = at(tmp_path, attrs={"search": {"a": 2}, "parent_run_id": "r"})
    assert again.study.user_attrs == {"search": {"a": 1}, "parent_run_id": "r"}
    with pytest.raises(StorageError, match="made to maximize, not to minimize"):
        Slots(again.storage, "s", ["minimize"], lambda slot: RandomSampler())


def test_no_pruner_prunes_nothing(tmp_path):
    assert isinstance(at(tmp_path).study.pruner, optuna.pruners.NopPruner)


def test_two_who_fill_at_once_leave_one_trial_to_a_slot(tmp_path):
    slots = at(tmp_path)
    slots.fill(3)
    for slot in (1, 2):  # what a second coordinator adds where no lock reaches both
        slots.study.add_trial(create_trial(state=WAITING, user_attrs={"slot": slot}))
    assert run(slots) == 3
    states = [t.state for t in slots.study.trials]
    assert states == [COMPLETE] * 3 + [FAIL] * 2
    assert slots.study.trials[4].user_attrs["surplus"] is True
    assert [t.number for t in slots.trials()] == [0, 1, 2]
    assert slots.counts().failed == 0


# ---- results -------------------------------------------------------------------------------------


def test_results_are_told_with_their_reasons(tmp_path):
    slots = at(tmp_path)
    slots.fill(3)
    for state, values in ((COMPLETE, [0.5]), (PRUNED, None), (FAIL, None)):
        ticket = slots.take()
        ticket.trial.report(0.25, 0)
        assert slots.finish(ticket, values, state, f"why {state.name}", {"epochs": 1})
        assert not slots.finish(ticket, values, state)
    counts = slots.counts()
    assert (counts.complete, counts.pruned, counts.failed, counts.left) == (1, 1, 1, 0)
    assert counts.finished == 3
    found = slots.trials()
    assert [t.value for t in found] == [0.5, 0.25, None]
    assert [t.user_attrs["reason"] for t in found] == ["why COMPLETE", "why PRUNED", "why FAIL"]
    assert all(t.user_attrs["epochs"] == 1 for t in found)


def test_several_objectives_are_told(tmp_path):
    storage = open_storage(None, tmp_path / "a.journal")
    slots = Slots(storage, "s", ["maximize", "minimize"], lambda slot: RandomSampler(seed=slot))
    slots.fill(1)
    ticket = slots.take()
    draw(ticket.trial)
    assert slots.finish(ticket, [0.5, 12.0], COMPLETE)
    assert slots.trials()[0].values == [0.5, 12.0]


# ---- deaths --------------------------------------------------------------------------------------


def test_a_trial_put_back_keeps_all_that_it_had(tmp_path):
    slots = at(tmp_path)
    slots.fill(2)
    ticket = slots.take()
    drawn = draw(ticket.trial)
    ticket.trial.report(0.25, 0)
    slots.remember_run(ticket, "r")
    assert slots.put_back(ticket, "stopped by Ctrl-C", counts=False)
    assert not slots.put_back(ticket, "again")
    again = at(tmp_path, sampler=lambda slot: RandomSampler(seed=99)).take()
    assert (again.slot, again.attempt, again.run_id) == (0, 1, "r")
    assert again.trial.number == ticket.trial.number
    assert draw(again.trial) == drawn
    again.trial.report(0.5, 1)
    slots.put_back(again, "died")
    third = slots.take()
    assert (third.slot, third.attempt) == (0, 2)
    assert draw(third.trial) == drawn
    slots.finish(third, [1.0], COMPLETE)
    (kept,) = [t for t in slots.study.trials if t.state == COMPLETE]
    assert kept.intermediate_values == {0: 0.25, 1: 0.5}
    assert [e["reason"] for e in kept.user_attrs["interrupted"].values()] == [
        "stopped by Ctrl-C",
        "died",
    ]


def test_the_dead_are_revived_and_the_living_left_alone(tmp_path, dead):
    slots = at(tmp_path)
    slots.fill(3)
    lost = slots.take()
    dead(False)
    mine = slots.take()
    assert at(tmp_path).revive_dead() == [lost.slot]
    assert at(tmp_path).revive_dead() == []
    assert [t.state for t in slots.trials()] == [WAITING, RUNNING, WAITING]
    assert slots.owns(mine) and not slots.owns(lost)
    assert "died" in str(slots.trials()[0].user_attrs["interrupted"])
    assert run(slots) == 2


def test_a_slot_whose_processes_die_again_and_again_fails_for_good(tmp_path, dead):
    slots = at(tmp_path)
    slots.fill(2)
    for attempt in range(1, MOST_ATTEMPTS + 1):
        ticket = slots.take()
        assert (ticket.slot, ticket.attempt) == (0, attempt)
        assert slots.revive_dead() == ([0] if attempt < MOST_ATTEMPTS else [])
    assert slots.take().slot == 1
    (failed,) = [t for t in slots.trials() if t.state == FAIL]
    assert "died" in failed.user_attrs["reason"]
    assert (slots.counts().failed, slots.counts().running) == (1, 1)


def test_stops_are_not_counted_as_deaths(tmp_path):
    slots = at(tmp_path)
    slots.fill(1)
    for _ in range(2 * MOST_ATTEMPTS):
        ticket = slots.take()
        assert ticket.attempt == 1
        assert slots.put_back(ticket, "stopped", counts=False)


def test_who_was_given_up_cannot_overwrite_his_successor(tmp_path, dead):
    slots = at(tmp_path)
    slots.fill(1)
    late = slots.take()
    at(tmp_path).revive_dead()
    assert not slots.beat(late) and not slots.finish(late, [0.0], COMPLETE)
    successor = at(tmp_path).take()
    assert not slots.beat(late) and not slots.finish(late, [0.0], COMPLETE)
    assert not slots.put_back(late, "late")
    assert slots.beat(successor)
    assert slots.finish(successor, [1.0], COMPLETE)
    assert not slots.finish(late, [0.0], COMPLETE) and not slots.beat(late)
    assert [t.value for t in slots.trials()] == [1.0]


def test_a_process_elsewhere_is_dead_when_it_was_silent_for_long(tmp_path, monkeypatch):
    slots = at(tmp_path)
    slots.fill(2)
    now = datetime.now(UTC)
    elsewhere = {"heartbeat.machine": "elsewhere", "heartbeat.host": "b", "heartbeat.pid": "1"}
    for minutes in (20, 20):
        last = (now - timedelta(minutes=minutes)).isoformat(timespec="milliseconds")
        monkeypatch.setattr(
            slots_module, "first_beat", lambda pid, last=last: {**elsewhere, "heartbeat.time": last}
        )
        ticket = slots.take()
    assert slots.beat(ticket)  # of the second, just now
    assert slots.revive_dead() == [0]


def nameless(slots: Slots) -> None:
    """Take the first slot, and be killed before the name is written."""
    slots._pop(slots.trials()[0])


def test_who_died_before_he_wrote_his_name_is_found_at_once_under_the_lock(tmp_path):
    slots = at(tmp_path)
    slots.fill(1)
    nameless(slots)
    assert at(tmp_path).revive_dead() == [0]
    assert slots.take().attempt == 2


def test_who_died_before_he_wrote_his_name_is_found_on_a_server_after_a_minute(
    tmp_path, monkeypatch
):
    clock = [1000.0]
    monkeypatch.setattr(slots_module, "alone", lambda storage: nullcontext(False))
    monkeypatch.setattr(slots_module.time, "monotonic", lambda: clock[0])
    slots = at(tmp_path)
    slots.fill(1)
    nameless(slots)
    assert slots.revive_dead() == []
    clock[0] += 30
    assert slots.revive_dead() == []
    clock[0] += 31
    assert slots.revive_dead() == [0]
    assert slots.revive_dead() == []


class Killed(BaseException):
    pass


WRITES = (
    "create_new_trial",
    "set_trial_user_attr",
    "set_trial_state_values",
    "set_study_user_attr",
)


def kill_before_write(storage, number: int) -> None:
    """Let the storage's write with this number, from 0, and all later ones, not come about."""
    left = [number]
    for name in WRITES:
        original = getattr(storage, name)

        def write(*args, original=original, **kwargs):
            if left[0] <= 0:
                raise Killed
            left[0] -= 1
            return original(*args, **kwargs)

        setattr(storage, name, write)


def test_killed_before_any_write_nothing_is_lost_or_doubled(tmp_path, dead):
    for number in range(60):
        folder = tmp_path / str(number)
        dead(True)
        victim = at(folder)
        kill_before_write(victim.storage, number)
        try:
            victim.fill(2)
            lost = victim.take()
            draw(lost.trial)
            victim.put_back(lost, "killed")  # as a coordinator, for a worker of its own
            run(victim)
            died = False
        except Killed:
            died = True
        dead(False)
        slots = at(folder)
        slots.fill(2)
        for _ in range(2):
            slots.revive_dead()
            run(slots)
        assert [t.state for t in slots.study.trials] == [COMPLETE] * 2, number
        assert [t.user_attrs["slot"] for t in slots.trials()] == [0, 1]
        assert all(set(t.params) == {"lr", "layers", "optimizer"} for t in slots.trials())
        if not died:
            break
    assert number > 10 and not died


def test_killed_for_real_a_worker_is_found_dead(tmp_path):
    slots = at(tmp_path)
    slots.fill(2)
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.test_search_slots import at, draw\n"
        "draw(at(Path(sys.argv[1])).take().trial)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    drawn = slots.trials()[0].params
    assert slots.revive_dead() == [0]
    assert draw(slots.take().trial) == drawn and len(drawn) == 3


# ---- samplers ------------------------------------------------------------------------------------


def tpe(slot: int) -> TPESampler:
    return TPESampler(seed=1000 + slot, n_startup_trials=4)


def drawn_by(slots: Slots) -> list[dict]:
    return [t.params for t in slots.trials()]


def test_one_worker_and_a_seed_draw_the_same_across_stops_and_deaths(tmp_path, dead):
    dead(False)
    unbroken = at(tmp_path / "unbroken", tpe)
    unbroken.fill(14)
    run(unbroken)
    broken = at(tmp_path / "broken", tpe)
    broken.fill(9)
    run(broken, 6)
    ticket = broken.take()
    draw(ticket.trial)
    broken.put_back(ticket, "stopped by Ctrl-C", counts=False)
    broken = at(tmp_path / "broken", tpe)
    broken.fill(14)
    run(broken, 3)
    dead(True)
    draw(broken.take().trial)
    dead(False)
    broken = at(tmp_path / "broken", tpe)
    broken.revive_dead()
    run(broken)
    assert drawn_by(broken) == drawn_by(unbroken)
    assert len({str(params) for params in drawn_by(broken)}) == 14


GRID = {"lr": [0.01, 0.1, 1.0], "layers": [1, 2]}


def grid(slot: int) -> GridSampler:
    return GridSampler(GRID, seed=0)


def brute(slot: int) -> BruteForceSampler:
    return BruteForceSampler(seed=slot)


def draw_grid(trial) -> tuple:
    return trial.suggest_categorical("lr", GRID["lr"]), trial.suggest_categorical("layers", [1, 2])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", [grid, brute])
def test_a_grid_smaller_than_the_budget_ends_with_each_point_tried_once(tmp_path, sampler):
    slots = at(tmp_path, sampler)
    slots.fill(10)
    tried = []
    while (ticket := slots.take()) is not None:
        tried.append(draw_grid(ticket.trial))
        assert slots.finish(ticket, [1.0], COMPLETE)
    assert len(tried) == len(set(tried)) == 6
    assert slots.exhausted
    assert (slots.counts().complete, slots.counts().left) == (6, 0)
    again = at(tmp_path, sampler)
    again.fill(12)
    assert again.take() is None
    again.reopen()
    assert again.take().slot == 6


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", [grid, brute])
def test_a_point_of_a_grid_whose_process_died_is_tried_nevertheless(tmp_path, sampler, dead):
    slots = at(tmp_path, sampler)
    slots.fill(8)
    lost = draw_grid(slots.take().trial)
    dead(False)
    tried = []
    for _ in range(2):
        while (ticket := slots.take()) is not None:
            tried.append(draw_grid(ticket.trial))
            assert slots.finish(ticket, [1.0], COMPLETE)
        slots.revive_dead()
    assert lost in tried
    assert len(set(tried)) == 6
    assert slots.counts().left == 0


def test_a_retried_trial_is_seen_once_by_the_pruner(tmp_path):
    slots = at(tmp_path, pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0))
    slots.fill(4)
    for score in (0.5, 0.7):
        ticket = slots.take()
        ticket.trial.report(score, 0)
        if score == 0.7:
            slots.put_back(ticket, "stopped", counts=False)
            ticket = slots.take()
        slots.finish(ticket, [score], COMPLETE)
    worse, better = slots.take(), slots.take()
    worse.trial.report(0.55, 0)  # the median of 0.5 and 0.7 is 0.6; were 0.7 there twice, 0.7
    better.trial.report(0.65, 0)
    assert worse.trial.should_prune() and not better.trial.should_prune()


# ---- many at once --------------------------------------------------------------------------------


def race(kind: str, folder: Path) -> None:
    """Eight processes that start afresh, and 200 trials that take no time."""
    with address_of(kind, folder) as address:
        _, errors = measure(address, 8, 200)
        assert errors == 0
        slots = open_slots(address)
        trials = slots.study.trials
        assert [t.state for t in trials] == [COMPLETE] * 200
        assert sorted(t.user_attrs["slot"] for t in trials) == list(range(200))
        assert all(len(t.params) == 3 and len(t.intermediate_values) == 3 for t in trials)
        tokens = {t.user_attrs["owner"]["token"] for t in trials}
        assert len(tokens) == 200
        assert slots.counts().finished == 200 and slots.counts().left == 0
        close_storage(slots.storage)


def work_until_killed(address: str, number: int) -> None:
    slots = open_slots(address)
    random.seed(number)
    while (ticket := slots.take()) is not None:
        draw(ticket.trial)
        time.sleep(random.uniform(0, 0.2))
        slots.finish(ticket, [1.0], COMPLETE)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_workers_killed_at_random_leave_every_slot_with_one_result(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(slots_module, "MOST_ATTEMPTS", 1000)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__spec__.name])
    chance = random.Random(0)
    with address_of(kind, tmp_path) as address:
        slots = open_slots(address)
        slots.fill(60)
        kills, held, workers = 0, 0, []
        while slots.counts().left:
            slots.revive_dead()
            workers = [worker for worker in workers if worker.is_alive()]
            while len(workers) < 4:
                workers.append(context.Process(target=work_until_killed, args=(address, kills)))
                workers[-1].start()
            if kills < 40:
                time.sleep(chance.uniform(0, 0.3))
                worker = chance.choice(workers)
                worker.kill()  # it may have ended by itself just now
                worker.join()
                running = [t for t in slots.study.get_trials() if t.state == TrialState.RUNNING]
                owners = [(t.user_attrs.get("owner") or {}).get("heartbeat.pid") for t in running]
                held += str(worker.pid) in owners
                kills += 1
            else:
                time.sleep(0.1)
        for worker in workers:
            worker.join()
        trials = slots.study.trials
        assert [t.state for t in trials] == [COMPLETE] * 60
        assert [t.user_attrs["slot"] for t in trials] == list(range(60))
        assert sum(len(t.user_attrs.get("interrupted", {})) for t in trials) >= held > 0
        close_storage(slots.storage)


@pytest.mark.slow
def test_eight_workers_share_a_journal(tmp_path):
    race("journal", tmp_path)


@pytest.mark.storages
@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "grpc"])
def test_eight_workers_share_a_database(tmp_path, kind):
    if kind != "sqlite" and postgresql_programs() is None:
        assert not os.environ.get("REQUIRE_POSTGRESQL")
        pytest.skip("Debian's package postgresql is not installed")
    race(kind, tmp_path)
