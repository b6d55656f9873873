"""Rows that a run has already are dropped, all others go through once, in their order."""

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.tracking.repeats import Repeats

INFINITY = float("inf")
LARGEST = 1.7976931348623157e308
NAN = float("nan")

names = st.sampled_from(["train/loss", "val/loss", "test/accuracy", "system/cpu"])
values = st.sampled_from([0.0, 1.0, 1 / 3, NAN, INFINITY, -INFINITY, LARGEST, -LARGEST])
steps = st.integers(0, 4)
row_lists = st.lists(st.tuples(names, values, steps, st.integers(0, 10**13)), max_size=20)


moments = st.integers(0, 8)
row_lists = st.lists(st.tuples(names, values, steps, moments), max_size=20)


def told_apart(row):
    """Written out from MLflow's rules, not taken from the code: what makes two rows the same."""
    name, value, step, _ = row
    if step > 0:
        return name, step
    text = "nan" if math.isnan(value) else repr(value).replace("inf", repr(LARGEST))
    return name, step, text


def expected(recorded, rows, since, behind):
    """By taking recorded rows away, one by one, as their repeats come."""
    known = [told_apart(row) for row in recorded]
    again = [row[:3:2] for row in recorded]
    for name, (step, count) in behind.items():
        for _ in range(min(count, again.count((name, step)))):
            again.remove((name, step))
    kept = []
    for row in rows:
        if row[2] == 0 or row[3] == since:
            if told_apart(row) not in known:
                kept.append(row)
        elif row[:3:2] in again:
            again.remove(row[:3:2])
        else:
            kept.append(row)
        known.append(told_apart(row))
    return kept


places = st.dictionaries(names, st.tuples(st.integers(1, 4), st.integers(1, 3)))


@given(row_lists, row_lists, moments, places)
def test_what_is_let_through_is_new_whole_and_in_order(recorded, rows, since, behind):
    kept = Repeats(recorded, since, behind).new(rows)
    # By identity: NaN is not equal to itself.
    assert [*map(id, kept)] == [*map(id, expected(recorded, rows, since, behind))]


@given(row_lists, row_lists, st.integers(0, 20), moments)
def test_it_makes_no_difference_in_how_many_parts_rows_come(recorded, rows, cut, since):
    parts, whole = Repeats(recorded, since), Repeats(recorded, since)
    kept = parts.new(rows[:cut]) + parts.new(rows[cut:])
    assert [*map(id, kept)] == [*map(id, whole.new(rows))]


@given(row_lists, moments)
def test_what_was_recorded_may_come_again_and_nothing_of_it_is_new(recorded, since):
    assert Repeats(recorded, since).new(recorded) == []


@st.composite
def rows_of_a_run(draw):
    """Names and steps in the order in which a run logs them: of each name the steps never sink."""
    rows, at = [], dict.fromkeys(("train/loss", "val/loss"), 1)
    for name, further in draw(st.lists(st.tuples(st.sampled_from([*at]), st.integers(0, 1)))):
        at[name] += further
        rows.append((name, at[name]))
    return rows


def behind(rows):
    """Of each name its latest step, and how often it stands there."""
    last = dict(rows)
    return {name: (step, rows.count((name, step))) for name, step in last.items()}


@given(rows_of_a_run(), st.data())
def test_however_often_killed_and_by_whatever_clock_each_row_is_recorded_once(rows, data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    store, saved = [], [0]
    for is_last in [False] * draw(0, 4) + [True]:
        begin = data.draw(st.sampled_from(saved))  # an older one, where later ones are damaged
        since = draw(0, 50)
        repeats = Repeats(list(store), since, behind(rows[:begin]))
        remembered = [(name, 1.0, step, since) for name, step in dict.fromkeys(rows[:begin])]
        assert repeats.new(remembered) == []
        # What is behind a checkpoint is on disk, and is delivered before the run goes on; beyond
        # that it was killed somewhere, and what it had logged last is lost.
        checkpoint = draw(begin, len(rows))
        delivered = len(rows) if is_last else draw(checkpoint, len(rows))
        clock = st.sampled_from([at for at in range(50) if at != since])
        told = [(name, 1.0, step, data.draw(clock)) for name, step in rows[begin:delivered]]
        store += repeats.new(told)
        saved.append(checkpoint)
    assert sorted((name, step) for name, _, step, _ in store) == sorted(rows)


def test_row_that_came_again_twice_is_recorded_once():
    """Its process is killed; the next saves what it goes on from, repeats it, and is killed too."""
    recorded = [("val/loss", 2.5, 1, 1000)]
    for saved_at in (900, 2000):  # at both times 18 of the 19 steps of the first epoch were made
        assert Repeats(recorded, saved_at).new([("val/loss", 2.5, 1, saved_at + 100)]) == []


@given(row_lists)
def test_samples_of_the_machine_go_on_behind_the_last(recorded):
    before = [step for name, _, step, _ in recorded if name.startswith("system/")]
    assert Repeats(recorded).next_system_step == (max(before) + 1 if before else 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_mlflow_keeps_of_a_run_is_known_again(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        experiment = client.create_experiment("one", str(tmp_path / "files"))
    run_id = client.create_run(experiment).info.run_id
    assert Repeats.of(client, run_id).next_system_step == 0
    epochs = [(f"val/{n}", e + n / 7, e, 10 * e) for e in range(1, 301) for n in range(4)]
    odd = [("val/odd", value, step, 5) for step, value in enumerate([NAN, INFINITY, -INFINITY], 1)]
    test = [(f"test/{n}", v, 0, 6) for n, v in enumerate([1 / 3, NAN, INFINITY, -INFINITY, 5e-324])]
    anew = [("test/0", 2 / 3, 0, 7)]
    samples = [("system/cpu", 50.0, step, step) for step in range(9)]
    rows = epochs + odd + test + anew + samples
    for at in range(0, len(rows), 1000):
        part = rows[at : at + 1000]
        client.log_batch(run_id, [Metric(name, v, at, step) for name, v, step, at in part])

    repeats = Repeats.of(client, run_id)

    assert repeats.next_system_step == 9
    assert repeats.new(rows) == []
    # Later, of other values: past step 0 the step alone tells, once for each row that is there.
    later = [(name, v + 1, step, at + 10**5) for name, v, step, at in epochs + odd]
    repeats = Repeats.of(client, run_id)
    assert repeats.new(later) == []
    assert repeats.new(later) == later
    fresh = [("val/0", 1.0, 301, 1), ("test/0", 0.1, 0, 1), ("test/1", 0.1, 0, 1), ("new", 1, 1, 1)]
    assert repeats.new(fresh) == fresh
