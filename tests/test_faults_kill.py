"""Killed at any moment, a training goes on as if nothing had been: over 50 kills, bit for bit.

Trainings are forked from a process that has imported torch, Lightning and MLflow (this file, run as
a program), because importing takes longer than training.  Otherwise each is what `python -m
research.fit` is, with a recorder process of its own and a store in SQLite.  It tells in a file how
far it is; some are killed by a system call in the midst of writing a checkpoint, the others from
outside at a random place and moment.  FAULTS_SEED=N draws the same places again.
"""

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from research.checkpoints.io import newest_whole, progress_of
from research.tracking import heartbeat
from research.tracking.runs import find_run, open_store
from research.tracking.store import sqlite_uri
from tests.conftest import SMALL
from tests.test_resume import HARD, OF_TIME

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's of SQLAlchemy
]

PROJECT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 300.0
EVERY = 3  # steps between two checkpoints
EPOCHS = 8
STEPS_OF_EPOCH = 19
ARGUMENTS = [
    *(*SMALL, *HARD, "--data.batch_size", "16", "--trainer.max_epochs", str(EPOCHS)),
    *("--checkpoint.every_n_train_steps", str(EVERY), "--experiment", "kill"),
    *("--log_pictures", "false", "--log_model", "false", "--log_system_metrics", "false"),
]
# How often each run is killed, for two at a time: one of them dozens of times.
PLANS = ((26,), (9, 7, 5, 4, 3))
RANDOM_KILLS = 50
# What a process says of itself, and for how many seconds from then on it may live.
STARTING = [("begun", 2.0), ("recorder", 1.0), ("run", 0.5)]
TRAINING = [("step", 0.05), ("saving", 0.02), ("saved", 0.01), ("validating", 0.05)]
ENDING = [("testing", 0.2), ("tested", 0.1), ("finishing", 0.1)]


# ---- the process that trainings are forked from --------------------------------------------------


def serve():
    """Fork a training for each line of standard input, and wait for it at the next line."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    from mlflow.tracking import MlflowClient  # noqa: F401

    import research.configuration.help
    import research.configuration.schema
    import research.training  # noqa: F401

    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would copy one thread of several"
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            train(**json.loads(line))
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def train(arguments, log, phases, place):
    """Be `python -m research.fit`; what it prints goes to `log`, how far it is to `phases`."""
    for descriptor, target in enumerate((os.devnull, log, log)):
        opened = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    told = os.open(phases, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(*words):
        os.write(told, f"{' '.join(map(str, words))}\n".encode())

    tell("begun")
    watch(tell, Armed(**place) if place else None)
    from research import fit

    code = 1
    try:
        code = fit.main(arguments)
    finally:
        tell("end", code)
    sys.exit(code)


def watch(tell, armed):
    """Let the parts of a training tell when they begin and end."""
    from research import evaluation, training
    from research.callbacks import Pace
    from research.checkpoints.io import DurableCheckpointIO
    from research.tracking.run import Recorder, Run

    def around(owner, name, before=None, after=None):
        inner = getattr(owner, name)

        def outer(*arguments, **named):
            if before is not None:
                tell(*before(*arguments))
            result = inner(*arguments, **named)
            if after is not None:
                tell(*after(*arguments, result))
            return result

        setattr(owner, name, outer)

    around(Recorder, "_launch", after=lambda recorder, _: ("recorder", recorder.pid))
    around(Run, "wait", after=lambda *rest: ("run", rest[-1].run_id))
    around(Pace, "on_train_batch_end", after=lambda _, trainer, *__: ("step", trainer.global_step))
    around(Pace, "on_validation_start", before=lambda *_: ("validating",))
    around(evaluation, "test", lambda *_: ("testing",), lambda *_: ("tested",))
    around(training, "finish", lambda *_: ("finishing",), lambda *_: ("finished",))
    if armed is not None:
        armed.arm(DurableCheckpointIO)
    around(
        DurableCheckpointIO,
        "save_checkpoint",
        lambda _, content, path, *__: ("saving", Path(path).name, content["global_step"]),
        lambda _, content, path, *__: ("saved", Path(path).name, content["global_step"]),
    )


class Armed:
    """Kills this process in the `save`th write of `file`, at the `nth` call of `call` in it."""

    def __init__(self, file, save, call, nth, when):
        self.file, self.save, self.call, self.nth, self.when = file, save, call, nth, when
        self.saves = self.calls = 0
        self.is_near = False

    def arm(self, writer):
        write = writer.save_checkpoint

        def save_checkpoint(itself, checkpoint, path, **rest):
            self.saves += Path(path).name == self.file
            self.is_near = Path(path).name == self.file and self.saves == self.save
            write(itself, checkpoint, path, **rest)
            self.is_near = False

        writer.save_checkpoint = save_checkpoint
        owner = torch if self.call == "save" else os
        inner = getattr(owner, self.call)

        def outer(*arguments, **named):
            self.calls += self.is_near
            if not self.is_near or self.calls != self.nth:
                return inner(*arguments, **named)
            if self.when == "half":
                content, file = arguments
                whole = io.BytesIO()
                inner(content, whole)
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
            elif self.when == "after":
                inner(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, self.call, outer)


# ---- a training to be killed ---------------------------------------------------------------------


class Forks:
    """The process that trainings are forked from, seen from outside; one at a time."""

    def __init__(self):
        left_out = {"RESEARCH_SPOOL", "MLFLOW_TRACKING_URI"}
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        environment |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow's allocator
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.test_faults_kill"],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.child = None

    def fork(self, **request):
        if self.child is None:
            assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.child = int(self.process.stdout.readline())

    def kill(self):
        os.kill(self.child, signal.SIGKILL)  # nobody else: it stays a zombie until it is reaped

    def reap(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        self.child = 0
        return code

    def close(self):
        if self.child:
            self.kill()
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


class Victim:
    """A training in a store of its own, started as often as it takes to come to its end."""

    def __init__(self, forks, folder):
        self.forks, self.folder = forks, folder
        self.uri = sqlite_uri(folder / "mlflow.db")
        self.run_id = None
        self.starts = 0
        self.recorders = {}  # when each was started, by its number
        folder.mkdir()

    def start(self, place=None):
        """Start it, or go on with it if there is anything to go on from."""
        self.starts += 1
        if self.run_id is None or self.newest is None:
            self.run_id = None
            self.saved = self.steps = 0
            arguments = [*ARGUMENTS, "--run_name", f"{self.folder.name} {self.starts}"]
        else:
            arguments = ["--resume", self.run_id]
        self.phases = self.folder / f"{self.starts}.phases"
        self.log = self.folder / f"{self.starts}.log"
        self.forks.fork(
            arguments=[*arguments, "--tracking_uri", self.uri],
            log=str(self.log),
            phases=str(self.phases),
            place=place,
        )

    def finish(self):
        """Wait for its good end; it may have been killed right behind that, too."""
        code = self.reap()
        said = self.log.read_text()
        assert code == 0 or (code == 2 and "is finished, there is nothing to go on" in said), said

    def reap(self):
        code = self.forks.reap()
        for phase, *rest in self.told():
            match phase:
                case "run":
                    (self.run_id,) = rest
                case "recorder":
                    self.recorders[int(rest[0])] = heartbeat.started(int(rest[0]))
                case "step":
                    self.steps = int(rest[0])
                case "saved":
                    self.saved = int(rest[1])
        return code

    def kill_recorder(self):
        """Kill the recorder process too, once it knows which run it records; whether it did."""
        told = self.told()
        if not any(words[0] == "run" for words in told):
            return False
        (number,) = (int(words[1]) for words in told if words[0] == "recorder")
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:  # the run had ended, and the process with it
            return False
        return True

    def told(self):
        if not self.phases.exists():
            return []
        return [line.split() for line in self.phases.read_text().splitlines()]

    def await_phase(self, phase, nth):
        """False if it ended before it came to the `nth` such phase."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            told = [words[0] for words in self.told()]
            if "end" in told:
                return False
            if told.count(phase) >= nth:
                return True
            time.sleep(0.001)
        raise AssertionError(f"{phase} does not come:\n{self.log.read_text()}")

    @property
    def checkpoints(self):
        (folder,) = self.folder.glob(f"mlruns/*/{self.run_id}/artifacts")
        return folder / "checkpoints"

    @property
    def newest(self):
        return newest_whole(self.checkpoints)[0]

    def check_killed(self):
        """There is a whole checkpoint, not too old, and none that is torn."""
        if self.run_id is None:
            return
        newest, torn = newest_whole(self.checkpoints)
        assert torn == []
        if self.saved > 0:
            steps, _ = progress_of(newest)
            assert steps >= self.saved
            assert self.steps - steps <= EVERY, f"killed in step {self.steps}, has {steps}"

    def check_record(self):
        """The store does not take it for alive, and has no more epochs than one can go on from."""
        if self.run_id is None:
            return
        run = find_run(self.uri, self.run_id)
        assert run.status in ("KILLED", "FINISHED")
        epochs = max((row[0] for row in histories(self).get("train/loss", ())), default=0)
        if self.newest is not None:
            _, ended = progress_of(self.newest)
            assert epochs - ended <= 1

    def check_nothing_left(self):
        """No side file, no spool, no process, no run that seems to be alive."""
        names = {path.name for path in self.checkpoints.iterdir()}
        assert names == {"last.ckpt", "best.ckpt"}
        spools = self.folder / "mlruns" / ".spool"
        eventually(lambda: not list(spools.glob("*")), f"{spools} is not empty")
        eventually(lambda: not self.living(), "a recorder process is still there")
        client = open_store(self.uri)
        assert find_run(self.uri, self.run_id).status == "FINISHED"
        found = client.search_runs([find_run(self.uri, self.run_id).experiment_id])
        others = {run.info.status for run in found if run.info.run_id != self.run_id}
        assert others <= {"KILLED"}

    def living(self):
        running = {n: began for n, began in self.recorders.items() if began is not None}
        return [n for n, began in running.items() if heartbeat.started(n) == began]


def eventually(condition, words):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, words
        time.sleep(0.05)


# ---- what must be equal --------------------------------------------------------------------------


def histories(victim):
    """Every metric's values as (step, value) in the order of steps; of times only the steps."""
    client = open_store(victim.uri)
    found = {}
    for name in client.get_run(victim.run_id).data.metrics:
        rows = client.get_metric_history(victim.run_id, name)
        found[name] = sorted((row.step, 0 if name in OF_TIME else row.value) for row in rows)
    return found


def assert_equal(unbroken, victim):
    assert histories(victim) == histories(unbroken)
    for name in ("last.ckpt", "best.ckpt"):
        expected, found = (
            torch.load(each.checkpoints / name, weights_only=True) for each in (unbroken, victim)
        )
        for key in ("global_step", "epoch", "lr_schedulers", "validation"):
            assert found[key] == expected[key], (name, key)
        assert found["state_dict"].keys() == expected["state_dict"].keys()
        for key, weight in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][key], weight), (name, key)
        for one, other in zip(expected["optimizer_states"], found["optimizer_states"], strict=True):
            assert one["param_groups"] == other["param_groups"]
            assert one["state"].keys() == other["state"].keys()
            for key, state in one["state"].items():
                assert state.keys() == other["state"][key].keys()
                for part, value in state.items():
                    other_value = other["state"][key][part]
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(other_value))
        assert torch.equal(expected["random_state"]["cpu"], found["random_state"]["cpu"])
    one, other = (find_run(each.uri, each.run_id) for each in (unbroken, victim))
    for name in ("fingerprint.configuration", "fingerprint.data", "checkpoint.best"):
        assert one.tags[name] == other.tags[name]
    assert open_params(unbroken) == open_params(victim)
    if victim.told()[-1] == ["end", "0"]:  # and was not killed when all but this was done
        assert table(unbroken) == table(victim)


def open_params(victim):
    params = open_store(victim.uri).get_run(victim.run_id).data.params
    return {k: v for k, v in params.items() if k not in ("run_name", "tracking_uri")}


def table(victim):
    """Which epoch was the best, and its figures, as they were printed."""
    lines = [line.split() for line in victim.log.read_text().splitlines()]
    return [
        words
        for words in lines
        if words and words[0] in ("train", "val", "test", "epoch") and "/" not in words[1]
    ]


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_forks():
    found = [Forks(), Forks()]
    yield found
    for forks in found:
        forks.close()


@pytest.fixture(scope="module")
def unbroken(two_forks, tmp_path_factory):
    victim = Victim(two_forks[0], tmp_path_factory.mktemp("kill") / "unbroken")
    victim.start()
    victim.finish()
    victim.check_nothing_left()
    assert victim.steps == EPOCHS * STEPS_OF_EPOCH
    assert len(table(victim)) == 4
    assert [step for step, _ in histories(victim)["val/loss"]] == list(range(1, EPOCHS + 1))
    return victim


def in_parallel(work, *lists):
    """Call `work` with the first of each list in one thread, with the second in another."""
    warnings.simplefilter("ignore")  # of MLflow's own making, in every thread
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, *lists))


def kill_and_resume(forks, folder, plan, unbroken, draw, counts):
    """Train as many runs as `plan` has numbers, each of them killed so many times."""
    numbers = itertools.count()
    for kills in plan:
        while kills > 0:  # a run may end before all of them have come
            victim = Victim(forks, folder / f"{kills} kills {next(numbers)}")
            kills -= kill_often(victim, kills, draw, counts)
            victim.check_nothing_left()
            assert_equal(unbroken, victim)


def kill_often(victim, kills, draw, counts):
    """Start a run again and again until it has been killed so many times, and let it end."""
    reach = 2 * EPOCHS * STEPS_OF_EPOCH // (kills + 1)
    for number in range(kills):
        kind, phase, nth, seconds = next_place(draw, reach, is_last=number == kills - 1)
        victim.start()
        if not victim.await_phase(phase, nth):
            victim.finish()
            return number
        time.sleep(seconds)
        victim.forks.kill()
        if victim.saved > 0 and draw.random() < 0.3:  # as when memory runs out, or the machine dies
            counts["recorders"] += victim.kill_recorder()
        if victim.reap() != -signal.SIGKILL:
            return number  # it was at its end
        counts[kind, (victim.told() or [["nothing"]])[-1][0]] += 1
        victim.check_killed()
        if draw.random() < 0.5:  # the others go on while the recorder still does its last work
            victim.check_record()
    victim.start()
    victim.finish()
    return kills


def next_place(draw, reach, is_last):
    """When to kill next: its kind, which phase, the how-manieth, and how long after its start."""
    if is_last and draw.random() < 0.7:
        (phase, seconds), nth, kind = draw.choice(ENDING), 1, "ending"
    elif draw.random() < 0.15:
        (phase, seconds), nth, kind = draw.choice(STARTING), 1, "starting"
    else:
        (phase, seconds), nth, kind = draw.choice(TRAINING), 1, "training"
        spacing = {"step": 1, "saving": EVERY, "saved": EVERY, "validating": STEPS_OF_EPOCH}[phase]
        nth = 1 + draw.randrange(max(1, reach // spacing))
    return kind, phase, nth, draw.uniform(0, seconds)


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(unbroken, two_forks, tmp_path):
    seed = int(os.environ.get("FAULTS_SEED", time.time_ns() % 2**32))
    print(f"FAULTS_SEED={seed}")
    counts = Counter()

    def work(forks, plan, number):
        folder = tmp_path / str(number)
        folder.mkdir()
        kill_and_resume(forks, folder, plan, unbroken, random.Random(seed + number), counts)

    in_parallel(work, two_forks, PLANS, (1, 2))
    print(f"{counts.pop('recorders', 0):4} of the recorder processes killed as well")
    for (kind, phase), count in sorted(counts.items()):
        print(f"{count:4} kills when {kind}: {phase}")
    kinds = Counter()
    for (kind, _), count in counts.items():
        kinds[kind] += count
    assert kinds.total() >= RANDOM_KILLS
    assert kinds["training"] > kinds.total() / 2


LAST, BEST = "last.ckpt", "best.ckpt"
# Every call to the system that the writing of a checkpoint consists of; the last writes its second
# file after it has given the first another name.
PLACES = [
    *((LAST, 2, "save", 1, when) for when in ("before", "half", "after")),
    *(
        (LAST, 2, "fsync", 1, "after"),
        (LAST, 3, "link", 1, "before"),
        (LAST, 3, "link", 1, "after"),
    ),
    *((LAST, 2, "replace", 1, "before"), (LAST, 2, "replace", 1, "after")),
    *((LAST, 4, "replace", 2, "before"), (LAST, 3, "replace", 2, "after")),
    *((LAST, 2, "fsync", 2, "before"), (LAST, 2, "fsync", 2, "after")),
    *((BEST, 1, "save", 1, "half"), (BEST, 1, "fsync", 1, "after")),
    *((BEST, 1, "replace", 1, "before"), (BEST, 1, "replace", 1, "after")),
]
FIRST = [(LAST, 1, "save", 1, "half"), (LAST, 1, "replace", 1, "before")]
FIRST += [(LAST, 1, "replace", 1, "after")]


def test_killed_within_the_writing_of_a_checkpoint_it_has_the_one_before(
    unbroken, two_forks, tmp_path
):
    def work(forks, number):
        victim = Victim(forks, tmp_path / str(number))
        for place in [*FIRST[number::2], *PLACES[number::2]]:
            file, save, call, nth, when = place
            victim.start(dict(file=file, save=save, call=call, nth=nth, when=when))
            assert victim.reap() == -signal.SIGKILL, (place, victim.log.read_text())
            assert victim.told()[-1][:2] == ["saving", file]
            victim.check_killed()
            if place in FIRST:
                assert (victim.newest is None) == (when != "after")
            if number:
                victim.check_record()
        victim.start()
        victim.finish()
        victim.check_nothing_left()
        assert_equal(unbroken, victim)

    in_parallel(work, two_forks, (0, 1))


if __name__ == "__main__":
    serve()
