"""The live table and the plain lines say what is in the trials, at every width."""

import io
import os
import pty
from datetime import datetime, timedelta

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from research.search.display import (
    LiveDisplay,
    PlainDisplay,
    Rate,
    Snapshot,
    display_for,
    duration,
    render,
    settings_of,
)

SGD = {
    "optimizer": "SGD",
    "model.loss": "CrossEntropyLoss",
    "optimizer.SGD.lr": 0.0523456,
    "optimizer.SGD.momentum": 0.9,
    "data.batch_size": 128,
}


def trial(number, state, value=None, params=SGD, reported=None, seconds=12.0, **attrs):
    now = datetime.now()
    return FrozenTrial(
        number=number,
        state=state,
        value=value if not isinstance(value, list) else None,
        values=value if isinstance(value, list) else None,
        datetime_start=None if state == TrialState.WAITING else now - timedelta(seconds=seconds),
        datetime_complete=now if state.is_finished() else None,
        params=params,
        distributions={
            name: FloatDistribution(0, 1)
            if isinstance(held, float)
            else CategoricalDistribution([held])
            for name, held in params.items()
        },
        user_attrs=attrs,
        system_attrs={},
        intermediate_values=reported or {},
        trial_id=number,
    )


def snapshot(*trials, cell="", total=60, direction="maximize", **rest):
    objectives = rest.pop("objectives", [("val/accuracy", direction)])
    return Snapshot("loss_lr", objectives, {cell: trials}, total, 3, **rest)


MIXED = (
    trial(3, TrialState.COMPLETE, 0.83121),
    trial(4, TrialState.PRUNED, reported={1: 0.25}),
    trial(5, TrialState.FAIL, error="Traceback\nRuntimeError: boom"),
    trial(6, TrialState.RUNNING, reported={1: 0.4, 2: 0.61}),
    trial(7, TrialState.RUNNING),
    trial(8, TrialState.WAITING, params={}),
)


def text_of(shown, width, height=24):
    console = Console(file=io.StringIO(), width=width)
    console.print(render(shown, width, height))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 40])
def test_table_tells_best_counts_pace_and_what_runs_at_every_width(width):
    text = text_of(snapshot(*MIXED, per_minute=4.2, seconds_left=640), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "3 of 60 done: 1 complete, 1 pruned, 1 failed; 2 run" in words
    assert "4.2 trials/min, about 11 min left" in words
    assert "best val/accuracy 0.8312 trial 3" in words
    assert "SGD lr 0.0523" in words
    assert "2/3" in words and "0.61" in words  # trial 6
    assert "0/3" in words  # trial 7 has reported nothing yet
    assert text.count("\n") <= 10


@pytest.mark.parametrize("width", [80, 40])
def test_table_fits_the_terminal_however_many_trials_run(width):
    running = [trial(number, TrialState.RUNNING) for number in range(64)]
    text = text_of(snapshot(*running), width, height=20)
    assert len(text.splitlines()) <= 20
    rows = [line for line in text.splitlines() if "/3" in line]
    assert f"and {64 - len(rows)} more" in text


@pytest.mark.parametrize(("direction", "best"), [("maximize", "0.9"), ("minimize", "0.1")])
def test_best_is_best_in_the_direction_of_the_objective(direction, best):
    trials = [trial(n, TrialState.COMPLETE, value) for n, value in enumerate([0.5, 0.9, 0.1])]
    assert f"val/accuracy {best} " in text_of(snapshot(*trials, direction=direction), 80)


def test_each_of_several_objectives_has_its_best():
    objectives = [("val/accuracy", "maximize"), ("training_seconds", "minimize")]
    trials = [
        trial(0, TrialState.COMPLETE, [0.9, 20.0]),
        trial(1, TrialState.COMPLETE, [0.8, 5.0]),
    ]
    text = text_of(snapshot(*trials, objectives=objectives), 100)
    assert "best val/accuracy 0.9  trial 0" in text
    assert "best training_seconds 5  trial 1" in text


def test_what_a_class_brings_along_stands_behind_it():
    given = "SGD lr 0.0523 momentum 0.9 CrossEntropyLoss batch_size 128"
    assert settings_of(trial(0, TrialState.RUNNING)) == given


def test_settings_of_a_trial_that_was_pinned_are_told_as_others():
    settings = {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}, "seed_everything": 3}
    pinned = {"settings": settings, "candidate": ["MSELoss", 4], "seed": 3}
    told = settings_of(trial(0, TrialState.RUNNING, params={}, pinned=pinned))
    assert told == "MSELoss SGD lr 0.1 seed_everything 3"


def test_nothing_is_told_of_before_anything_ended():
    text = text_of(snapshot(trial(0, TrialState.WAITING, params={})), 80)
    assert text.split() == ["loss_lr", "0", "of", "60", "done"]


def test_plain_lines_tell_each_trial_once_when_it_ended():
    out = io.StringIO()
    display = PlainDisplay(out)
    display.show(snapshot(MIXED[0]))  # ended before this start
    display.show(snapshot(*MIXED))
    display.show(snapshot(*MIXED))
    pruned, failed = out.getvalue().splitlines()
    settings = "SGD lr 0.0523 momentum 0.9 CrossEntropyLoss batch_size 128"
    assert pruned == f"trial 4  0.25  PRUNED  {settings}  12 s  best 0.8312 (trial 3)"
    assert failed.startswith("trial 5  -  FAIL")
    assert "RuntimeError: boom" in failed


def test_plain_lines_name_the_cell():
    out = io.StringIO()
    display = PlainDisplay(out)
    display.show(snapshot(cell="AdamW"))
    display.show(snapshot(trial(2, TrialState.COMPLETE, 0.5), cell="AdamW"))
    assert out.getvalue().startswith("AdamW trial 2  0.5  COMPLETE")
    assert out.getvalue().rstrip().endswith("best 0.5 (AdamW trial 2)")


def test_plain_status_comes_at_most_once_a_minute():
    now, out = [0.0], io.StringIO()
    display = PlainDisplay(out, clock=lambda: now[0])
    for second in range(0, 180, 5):
        now[0] = float(second)
        display.show(snapshot(MIXED[3], per_minute=0.5))
    assert out.getvalue().splitlines() == ["0 of 60 done; 1 runs   30 trials/h"] * 2


def test_rate_is_that_of_the_last_trials():
    now = [0.0]
    rate = Rate(clock=lambda: now[0])
    rate.tell(7)  # of an earlier start
    assert rate.per_minute() is None
    for ended in range(100):  # one a second, then one each ten
        now[0] += 1 if ended < 50 else 10
        rate.tell(8 + ended)
    assert rate.per_minute() == pytest.approx(6, rel=0.1)
    assert rate.seconds_left(12) == pytest.approx(120, rel=0.1)
    now[0] += 1000  # nothing ends any more
    assert rate.per_minute() < 2


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (89, "89 s"), (600, "10 min"), (7500, "2 h 05 min"), (3 * 86400, "3 days")],
)
def test_durations_are_told_roughly(seconds, told):
    assert duration(seconds) == told


def test_live_only_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(display_for(io.StringIO()), PlainDisplay)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        assert isinstance(display_for(terminal), LiveDisplay)
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(display_for(terminal), PlainDisplay)
    os.close(leader)


def test_live_table_leaves_nothing_but_what_was_said():
    out = io.StringIO()
    with LiveDisplay(Console(file=out, force_terminal=True, width=80)) as display:
        display.show(snapshot(*MIXED[:2]))
        display.show(snapshot(*MIXED))
        display.say("a worker died")
    text = out.getvalue()
    assert "trial 5 failed: RuntimeError: boom" in text
    assert "a worker died" in text
    assert "\x1b[2K" in text[text.rindex("3 of 60 done") :]  # the table is erased at the end
