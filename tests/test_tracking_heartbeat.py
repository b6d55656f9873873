"""The living and the dead: real processes that are killed, in a store of MLflow's own."""

import os
import shutil
import signal
import subprocess
import threading
import warnings
from datetime import UTC, datetime, timedelta

import psutil
import pytest

from research.tracking import heartbeat
from research.tracking.heartbeat import beat, end_dead_runs, first_beat, is_dead, started
from research.tracking.opening import Stores

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy
LATER = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
def process():
    sleeping = subprocess.Popen(["sleep", "600"])
    yield sleeping
    sleeping.kill()
    sleeping.wait()


# ---- one process ---------------------------------------------------------------------------------


def test_process_is_alive_until_it_is_killed(process):
    tags = first_beat(process.pid)
    assert set(tags) == {
        f"heartbeat.{part}" for part in ("host", "machine", "pid", "started", "time")
    }
    assert all(isinstance(value, str) and value for value in tags.values())
    # Here it can be seen; a laptop that was asleep for a night ends no run.
    assert not is_dead(tags, now=LATER)
    process.send_signal(signal.SIGSTOP)
    assert not is_dead(tags, now=LATER)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(tags)  # nobody has waited for it yet: a zombie
    process.wait()
    assert is_dead(tags)


def test_another_process_with_the_same_number_is_not_taken_for_it(process):
    tags = first_beat(process.pid)
    assert is_dead(tags | {"heartbeat.started": str(int(tags["heartbeat.started"]) - 1)})
    assert started(2**22 + 1) is None
    assert is_dead(tags | {"heartbeat.pid": "0"})
    assert is_dead(tags | {"heartbeat.pid": str(10**30)})


def test_start_is_that_of_the_process_and_no_time_of_day(process):
    if not psutil.LINUX:
        pytest.skip("ticks since the boot are Linux's")
    ticks = int(started(process.pid))
    since_boot = psutil.Process(process.pid).create_time() - psutil.boot_time()
    assert ticks / os.sysconf("SC_CLK_TCK") == pytest.approx(since_boot, abs=1.1)
    assert started(process.pid) == str(ticks)


def test_command_of_any_name_is_no_hindrance(tmp_path):
    odd = tmp_path / "a) Z 1 (b"
    shutil.copy(shutil.which("sleep"), odd)
    with subprocess.Popen([odd, "600"]) as process:
        tags = first_beat(process.pid)
        assert not is_dead(tags)
        assert 0 <= int(tags["heartbeat.started"]) - int(started(os.getpid())) < 10**6
        process.kill()
    assert is_dead(tags)


@pytest.mark.parametrize(
    ("seconds", "dead"), [(-600, False), (0, False), (299, False), (301, True)]
)
def test_on_another_machine_only_silence_tells(process, seconds, dead):
    tags = first_beat(process.pid)
    now = datetime.fromisoformat(tags["heartbeat.time"]) + timedelta(seconds=seconds)
    for other in ("", "another boot pid:[4026531836]"):
        assert is_dead(tags | {"heartbeat.machine": other}, now) is dead
    restarted = {**tags, "heartbeat.machine": "other", **beat()}
    assert not is_dead(restarted)


def test_process_that_is_hidden_from_us_is_judged_by_its_silence(process, monkeypatch):
    tags = first_beat(process.pid)
    process.kill()
    process.wait()

    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)  # /proc without other users' processes
    assert not is_dead(tags)
    assert is_dead(tags, now=LATER)


@pytest.mark.parametrize(
    "change",
    [
        {"heartbeat.pid": None},
        {"heartbeat.pid": "many"},
        {"heartbeat.time": None},
        {"heartbeat.time": "yesterday"},
    ],
)
def test_run_of_which_nothing_is_known_is_never_dead(process, change):
    assert not is_dead({}, now=LATER)
    assert not is_dead({"mlflow.user": "ada"}, now=LATER)
    tags = first_beat(process.pid) | {"heartbeat.machine": "other"} | change
    assert not is_dead({key: value for key, value in tags.items() if value is not None}, now=LATER)


# ---- a store -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(uri):
    """A client and the ids of two experiments, in a store that all tests share."""
    folder = os.getcwd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client, one = Stores().experiment(uri, "one")
        other = client.create_experiment("other")
    os.chdir(folder)
    return client, one, other


@pytest.fixture
def dead_tags(process):
    tags = first_beat(process.pid)
    process.kill()
    process.wait()
    return tags


def test_dead_runs_become_killed_and_all_others_stay(store, uri, dead_tags):
    client, one, other = store
    alive = first_beat(os.getpid())
    silent = dead_tags | {"heartbeat.machine": "x", "heartbeat.time": "2026-01-02T03:04:05.678Z"}
    begun = 1_000_000_000_000
    cases = {
        "killed": client.create_run(one, begun, dead_tags, "killed"),
        "silent": client.create_run(other, begun, silent, "silent"),
        "alive": client.create_run(one, begun, alive, "alive"),
        "elsewhere": client.create_run(one, begun, alive | {"heartbeat.machine": "x"}, "elsewhere"),
        "of others": client.create_run(one, begun, {"a": "b"}, "of others"),
        "finished": client.create_run(one, begun, dead_tags, "finished"),
        "deleted": client.create_run(one, begun, dead_tags, "deleted"),
    }
    ids = {name: run.info.run_id for name, run in cases.items()}
    client.set_terminated(ids["finished"], end_time=begun + 1)
    client.delete_run(ids["deleted"])

    told = end_dead_runs(client, uri)

    assert sorted(told) == [f"{name} ({ids[name]})" for name in ("killed", "silent")]
    now = {name: client.get_run(run_id) for name, run_id in ids.items()}
    assert {name: run.info.status for name, run in now.items()} == {
        "killed": "KILLED",
        "silent": "KILLED",
        "alive": "RUNNING",
        "elsewhere": "RUNNING",
        "of others": "RUNNING",
        "finished": "FINISHED",
        "deleted": "RUNNING",
    }
    at = datetime.fromisoformat(dead_tags["heartbeat.time"])
    assert now["killed"].info.end_time == round(1000 * at.timestamp())
    assert now["silent"].info.end_time == 1767323045678
    gone = f"process {dead_tags['heartbeat.pid']} on {dead_tags['heartbeat.host']} is gone"
    assert now["killed"].data.tags["ended_by"].endswith(gone)
    assert "nothing was heard of process" in now["silent"].data.tags["ended_by"]
    assert [name for name, run in now.items() if "ended_by" in run.data.tags] == [
        "killed",
        "silent",
    ]
    assert now["finished"].info.end_time == begun + 1
    assert end_dead_runs(client, uri) == []
    for name in ("alive", "elsewhere", "of others"):
        client.set_terminated(ids[name])


def test_many_dead_runs_are_ended_once_by_all_who_look_at_the_same_moment(
    store, uri, dead_tags, monkeypatch
):
    client, one, _ = store
    monkeypatch.setattr(heartbeat, "PAGE", 3)
    ids = {client.create_run(one, tags=dead_tags).info.run_id for _ in range(8)}
    told, problems = [], []

    def look():
        try:
            told.extend(end_dead_runs(client, uri))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert sorted(line[-33:-1] for line in told) == sorted(ids)
    assert {client.get_run(run_id).info.status for run_id in ids} == {"KILLED"}


class Meanwhile:
    """A client beside which somebody else does something, right after the dead were looked for."""

    def __init__(self, client, happens):
        self.client, self.happens = client, happens

    def __getattr__(self, name):
        return getattr(self.client, name)

    def search_runs(self, *arguments, **options):
        found = self.client.search_runs(*arguments, **options)
        self.happens()
        return found


def test_run_that_ends_by_itself_meanwhile_keeps_its_end(store, uri, dead_tags):
    client, one, _ = store
    run_id = client.create_run(one, tags=dead_tags).info.run_id
    end = Meanwhile(client, lambda: client.set_terminated(run_id, "FAILED", end_time=7))
    assert end_dead_runs(end, uri) == []
    run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FAILED", 7)
    assert "ended_by" not in run.data.tags


def test_run_that_is_resumed_meanwhile_goes_on(store, uri, dead_tags):
    client, one, _ = store
    run_id = client.create_run(one, tags=dead_tags).info.run_id

    def resume():
        for key, value in first_beat(os.getpid()).items():
            client.set_tag(run_id, key, value)

    assert end_dead_runs(Meanwhile(client, resume), uri) == []
    assert client.get_run(run_id).info.status == "RUNNING"
    client.set_terminated(run_id)


def test_run_that_is_deleted_meanwhile_is_passed_over(store, uri, dead_tags):
    client, one, _ = store
    gone, next_one = (client.create_run(one, tags=dead_tags).info.run_id for _ in range(2))
    told = end_dead_runs(Meanwhile(client, lambda: client.delete_run(gone)), uri)
    assert [line[-33:-1] for line in told] == [next_one]


def test_only_what_may_be_dead_is_fetched(store, uri):
    """However many runs the store has: it answers by status, and only for runs with a heartbeat."""
    client, one, _ = store
    for number in range(3):
        client.create_run(one)
        client.set_terminated(client.create_run(one, tags=first_beat(os.getpid())).info.run_id)
        client.create_run(one, tags=first_beat(os.getpid()), run_name=f"fetched {number}")
    fetched = []

    class Counting(Meanwhile):
        def search_runs(self, *arguments, **options):
            found = self.client.search_runs(*arguments, **options)
            fetched.extend(run.info.run_name for run in found)
            return found

    assert end_dead_runs(Counting(client, None), uri) == []
    assert sorted(fetched) == ["fetched 0", "fetched 1", "fetched 2"]
