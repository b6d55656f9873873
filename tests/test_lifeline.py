"""The line between the processes of a run: each death is heard at once, and nothing else is one."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from research.processes import deaths
from research.processes.lifeline import (
    DONE,
    FAILED,
    STOPPED,
    Address,
    Death,
    Hub,
    Line,
    RankDied,
    frames_of,
    listen,
)
from research.tracking import monitoring
from research.tracking.run import Recorder
from research.tracking.runs import open_store
from research.tracking.store import sqlite_uri

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
SOON = 60.0  # a busy machine may be slow; what is waited for comes in milliseconds
QUIET = 0.8  # seconds in which something must not happen, or is seen not to


class First:
    """The hub of a test, and what it was told."""

    def __init__(self, grace=0.0, stopping=60.0):
        self.samples, self.deaths, self.codes = [], [], {}
        self.forced = threading.Event()
        self.hub = Hub(
            HOST,
            self.on_death,
            lambda node, rows: self.samples.append((node, rows)),
            lambda: dict(self.codes),
            grace,
            stopping,
        )

    def on_death(self, death):
        self.deaths.append(death)
        self.forced.set()

    def await_ranks(self, *ranks):
        wait_until(lambda: self.hub.ranks == set(ranks))


class Rank:
    """Another process of a test, in this one."""

    def __init__(self, hub, rank, stopping=60.0):
        self.ended = []
        self.left = threading.Event()
        self.line = Line(hub.address, HOST, rank, self.on_end, stopping)

    def on_end(self, why, is_told):
        self.ended.append((why, is_told))
        self.left.set()

    def die(self):
        """What the system does for a process that is killed."""
        self.line._connection.shutdown(socket.SHUT_RDWR)


def wait_until(condition):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def first():
    made = []

    def make(**bounds):
        made.append(First(**bounds))
        return made[-1]

    yield make
    for each in made:
        each.hub.close()
        assert not each.hub._thread.is_alive()


# ---- what is a death -----------------------------------------------------------------------------


def test_a_line_that_ends_without_a_word_is_a_death(first):
    one = first()
    ranks = [Rank(one.hub, number) for number in (1, 2)]
    one.await_ranks(1, 2)
    assert one.hub.wait_for_death(QUIET) is None
    ranks[1].die()
    assert one.forced.wait(SOON)
    assert one.deaths == [one.hub.death]
    assert one.hub.death.rank == 2
    place = f"rank 2 (process {os.getpid()} on {socket.gethostname()})"
    assert one.hub.death.told.startswith(f"{place} died without a word")


def test_who_says_that_it_is_done_is_not_dead(first):
    one = first()
    rank = Rank(one.hub, 1)
    one.await_ranks(1)
    rank.line.done()
    rank.die()
    one.codes = {1: 1}  # whatever its last breath was
    assert one.hub.wait_for_death(QUIET) is None


def test_the_first_words_count_and_not_what_follows_from_them(first):
    one = first(grace=60.0)
    ranks = [Rank(one.hub, number) for number in (1, 2)]
    one.await_ranks(1, 2)
    try:
        raise RuntimeError("no such picture")
    except RuntimeError as error:
        assert ranks[1].line.failed("RuntimeError: no such picture", error, is_bug=True)
    ranks[1].die()
    ranks[0].die()
    death = one.hub.wait_for_death(SOON)
    assert death.rank == 2
    error = death.error()
    assert isinstance(error, RankDied) and error.exit_code == 1
    assert str(error).endswith("): RuntimeError: no such picture")
    assert "raise RuntimeError" in str(error.__cause__)
    assert "no such picture" in str(error.__cause__)
    assert error.__notes__[0].startswith('  File "') and "raise Runt" in error.__notes__[0]


def test_a_mistake_of_the_users_is_told_without_places_in_the_code(first):
    one = first(grace=60.0)
    rank = Rank(one.hub, 1)
    assert rank.line.failed("The memory is full.", MemoryError(), is_bug=False)
    error = one.hub.wait_for_death(SOON).error()
    assert not hasattr(error, "__notes__")


def test_the_end_of_a_child_tells_what_it_died_of(first):
    one = first()
    one.codes = {1: None}
    rank = Rank(one.hub, 1)
    one.await_ranks(1)
    rank.die()
    assert one.hub.wait_for_death(QUIET) is None  # the system is about to tell the code
    one.codes = {1: -signal.SIGKILL}
    told = one.hub.wait_for_death(SOON).told
    assert "was killed by SIGKILL. If nobody did that, the machine's memory was full" in told


@pytest.mark.parametrize(
    "code, told",
    [
        (3, "rank 1 ended with exit code 3 before training began. What it said is above."),
        (-signal.SIGSEGV, "rank 1 was killed by SIGSEGV before training began."),
    ],
)
def test_a_child_that_dies_before_it_has_a_line_is_found_by_its_exit_code(first, code, told):
    one = first(grace=60.0)
    one.codes = {1: None, 2: 0}
    assert one.hub.wait_for_death(QUIET) is None
    one.codes = {1: code, 2: 0}
    assert one.hub.wait_for_death(SOON) == Death(1, told)


@pytest.mark.parametrize("code", [-signal.SIGINT, 130])
def test_ctrl_c_that_only_children_can_hear_is_ctrl_c(first, code):
    one = first(grace=60.0)
    one.codes = {1: code}
    assert isinstance(one.hub.wait_for_death(SOON).error(), KeyboardInterrupt)


def test_one_that_is_stopped_alone_stops_the_run_after_a_while(first):
    patient, hasty = first(grace=60.0), first(grace=60.0, stopping=0.2)
    for one in (patient, hasty):
        rank = Rank(one.hub, 1)
        rank.line.stopped(signal.SIGTERM)
        rank.die()
    error = hasty.hub.wait_for_death(SOON).error()
    assert isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM
    assert patient.hub.wait_for_death(QUIET) is None


# ---- real processes ------------------------------------------------------------------------------

JOIN = """
import os, sys, time
from research.processes.lifeline import Address, Line
line = Line(Address(int(sys.argv[1]), sys.argv[2]), "127.0.0.1", 1, lambda *_: os._exit(7))
if sys.argv[3] == "fork" and os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(600)
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def joined(first):
    started = []

    def join(one, how):
        address = one.hub.address
        process = subprocess.Popen(
            [sys.executable, "-c", JOIN, str(address.port), address.token, how],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        )
        started.append(process)
        one.await_ranks(1)
        return process

    yield join
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_process_is_heard_though_one_that_it_forked_lives_on(first, joined):
    one = first()
    process = joined(one, "fork")
    fork = int(process.stdout.readline())
    try:
        process.kill()
        assert one.hub.wait_for_death(SOON).rank == 1
        os.kill(fork, 0)  # it was there all the time
    finally:
        os.kill(fork, signal.SIGKILL)


def test_a_process_that_is_halted_is_not_dead(first, joined):
    one = first()
    process = joined(one, "alone")
    process.send_signal(signal.SIGSTOP)
    assert one.hub.wait_for_death(2 * QUIET) is None
    process.send_signal(signal.SIGCONT)
    assert one.hub.wait_for_death(QUIET) is None
    process.kill()
    assert one.hub.wait_for_death(SOON) is not None


def test_a_process_leaves_at_once_when_the_first_says_that_it_failed(first, joined):
    one = first()
    process = joined(one, "alone")
    one.hub.end(FAILED)
    assert process.wait(SOON) == 7


# ---- how the first one ends ----------------------------------------------------------------------


def test_an_end_of_its_own_is_not_replaced(first):
    one = first(grace=0.3)
    rank = Rank(one.hub, 1)
    one.await_ranks(1)
    rank.die()
    assert one.hub.wait_for_death(SOON) is not None
    assert one.hub.end(STOPPED) and not one.hub.is_forced
    assert not one.forced.wait(2 * QUIET)


def test_one_that_is_stuck_is_ended_and_then_has_no_end_of_its_own(first):
    one = first(grace=QUIET)
    rank = Rank(one.hub, 1)
    one.await_ranks(1)
    rank.die()
    assert one.hub.wait_for_death(SOON) is not None and not one.forced.is_set()
    assert one.forced.wait(SOON)
    assert not one.hub.end(DONE) and one.hub.is_forced


def test_all_others_are_told_how_the_first_one_ends(first):
    for how, ends in (
        (DONE, []),
        (FAILED, [("rank 0 ends the run", True)]),
        (STOPPED, [("rank 0 was told to stop", True)]),
    ):
        one = first()
        ranks = [Rank(one.hub, number, stopping=0.1) for number in (1, 2)]
        one.await_ranks(1, 2)
        one.hub.end(how)
        one.hub.close()
        for rank in ranks:
            assert rank.left.wait(SOON if ends else QUIET) == bool(ends)
            assert rank.ended == ends and rank.line.over.is_set() == bool(ends)


def test_a_first_one_that_dies_ends_the_others_with_a_word_to_the_user(first):
    one = first()
    ranks = [Rank(one.hub, number) for number in (1, 2)]
    one.await_ranks(1, 2)
    ranks[1].line.done()
    one.hub.close()
    assert ranks[0].left.wait(SOON)
    assert ranks[0].ended == [("rank 0 died without a word, and ends this run with it", False)]
    assert not ranks[1].left.wait(QUIET)


def test_who_is_stopping_too_is_left_alone(first):
    one = first()
    rank = Rank(one.hub, 1, stopping=QUIET)
    one.await_ranks(1)
    one.hub.end(STOPPED)
    rank.line.stopped(signal.SIGTERM)
    assert not rank.left.wait(2 * QUIET)


def test_an_error_on_all_processes_is_told_by_the_first_alone(first):
    one = first(grace=60.0)
    rank = Rank(one.hub, 1)
    one.await_ranks(1)
    one.hub.end(FAILED)
    one.hub.close()
    wait_until(rank.line._heard.is_set)
    assert rank.line.failed("The loss is nan.", FloatingPointError(), is_bug=False)


# ---- who may join --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [
        b'{"token": "guessed", "rank": 1, "pid": 1, "host": "x"}\n',
        b'{"token": 5, "rank": 1, "pid": 1, "host": "x"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b"\xff\n",
        b"x" * 20_000,
        b"",
    ],
)
def test_a_stranger_is_not_heard_and_his_leaving_is_no_death(first, greeting):
    one = first()
    rank = Rank(one.hub, 1)
    one.await_ranks(1)
    with socket.create_connection((HOST, one.hub.address.port)) as stranger:
        stranger.settimeout(SOON)
        stranger.sendall(greeting)
        if greeting:
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""  # he is shown the door
    assert one.hub.wait_for_death(QUIET) is None
    assert one.hub.ranks == {1}
    rank.die()
    assert one.hub.wait_for_death(SOON).rank == 1


def test_a_hub_that_is_not_there_is_an_error_of_the_system(first):
    one = first()
    one.hub.close()
    with pytest.raises(OSError):
        Line(Address(one.hub.address.port, "x"), HOST, 1, lambda *_: None)


def test_an_address_is_listened_at_and_for_a_name_all_addresses():
    with listen("127.0.0.2") as server:
        assert server.getsockname()[0] == "127.0.0.2"
        port = server.getsockname()[1]
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), 5)
    for name in ("localhost", "192.0.2.1"):  # the second is nobody's, as one that is translated
        with listen(name) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.3", port), 5).close()


def test_the_places_of_a_traceback_end_with_the_last_and_are_not_too_many():
    def deep(level):
        if level:
            deep(level - 1)
        raise KeyError("where")

    with pytest.raises(KeyError) as caught:
        deep(100)
    import traceback

    text = "".join(traceback.format_exception(caught.value))
    places = frames_of(text, longest=600)
    assert 0 < len(places) <= 600
    assert places.rstrip("^ \n").endswith('raise KeyError("where")') and places.startswith("  File")
    assert "KeyError: " not in places


# ---- Lightning's own watch -----------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
def test_lightnings_observer_kills_the_first_process_unless_we_watch_instead(watched):
    main, child = (
        subprocess.Popen([sys.executable, "-c", code])
        for code in ("import time; time.sleep(600)", "raise SystemExit(3)")
    )
    launcher = SimpleNamespace(procs=[child])
    trainer = SimpleNamespace(global_rank=0, strategy=SimpleNamespace(launcher=launcher))
    children = deaths.Children(trainer)
    observer = _ChildProcessObserver(main.pid, launcher.procs, sleep_period=1)
    observer.start()
    try:
        if watched:
            wait_until(lambda: children.codes() == {1: 3})
            observer.join(SOON)
            assert not observer.is_alive() and main.poll() is None
        else:
            assert main.wait(SOON) == -signal.SIGKILL
    finally:
        main.kill()
        main.wait()
        observer.join(SOON)


def test_children_that_do_not_leave_are_killed(monkeypatch):
    monkeypatch.setattr(deaths, "LEAVING_SECONDS", -1.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    launcher = SimpleNamespace(procs=[child])
    trainer = SimpleNamespace(global_rank=4, strategy=SimpleNamespace(launcher=launcher))
    children = deaths.Children(trainer)
    assert children.codes() == {5: None}
    children.end()
    assert child.wait(SOON) == -signal.SIGKILL


@pytest.mark.parametrize(
    "error, follows",
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("NCCL error: remote process exited"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
        (RuntimeError("the gloomy loss"), False),
    ],
)
def test_errors_that_may_follow_from_a_death_are_known(error, follows):
    assert deaths.is_of_connection(error) is follows
    outer = Exception()
    outer.__cause__ = error
    assert deaths.is_of_connection(outer) is follows


def test_one_process_alone_has_no_line():
    trainer = SimpleNamespace(world_size=1, callbacks=[])
    before = threading.active_count()
    with deaths.bound_together(trainer):
        assert threading.active_count() == before and trainer.callbacks == []
    assert deaths.PARENT not in os.environ


# ---- measurements of other nodes -----------------------------------------------------------------


def test_samples_pass_over_the_line(first):
    one = first()
    rank = Rank(one.hub, 3)
    rows = [["system/cpu", 1.5, 0, 1000]]
    rank.line.sample(1, rows)
    wait_until(lambda: one.samples == [(1, rows)])
    rank.line.done()


def test_another_node_is_sampled_in_a_process_of_its_own():
    taken = []
    stop = monitoring.start_sampler(taken.append, "0.1")
    try:
        wait_until(lambda: len(taken) >= 3)
    finally:
        before = threading.active_count()
        stop()
    wait_until(lambda: threading.active_count() < before)  # it has ended, and its pipes are closed
    names = {name for name, *_ in taken[-1]}
    assert "system/cpu_utilization_percentage" in names
    assert [rows[0][2] for rows in taken[:3]] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy
def test_nodes_are_told_apart_also_in_a_run_that_goes_on(tmp_path):
    uri = sqlite_uri(tmp_path / "mlflow.db")
    name = "system/cpu_utilization_percentage"
    with Recorder.start() as recorder:
        run = recorder.start_run(uri, "nodes")
        run.log_samples_of(1, [(name, 10.0, 0, 1000)])  # before anything of the run's own
        run.log_metrics({"train/loss": 1.0}, step=1)
        run.log_samples_of(1, [[name, 11.0, 1, 2000]])
        run.log_samples_of(2, [(name, 20.0, 0, 1000)])
        run_id = run.wait().run_id
        run.finish("FAILED")
        again = recorder.resume_run(uri, run_id, since=time.time())
        again.log_metrics({"train/loss": 0.5}, step=2)
        again.log_samples_of(1, [(name, 12.0, 0, int(1000 * time.time()))])
        again.finish()
    client = open_store(uri)
    found = {
        node: [(row.step, row.value) for row in client.get_metric_history(run_id, path)]
        for node in (1, 2)
        for path in [f"system/node_{node}/cpu_utilization_percentage"]
    }
    assert found == {1: [(0, 10.0), (1, 11.0), (2, 12.0)], 2: [(0, 20.0)]}
    assert name not in client.get_run(run_id).data.metrics
