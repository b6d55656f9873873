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


def told_apart(row):
    """Written out from MLflow's rules, not taken from the code: what makes two rows the same."""
    name, value, step, _ = row
    if step > 0:
        return name, step
    text = "nan" if math.isnan(value) else repr(value).replace("inf", repr(LARGEST))
    return name, step, text


@given(row_lists, row_lists)
def test_what_is_let_through_is_new_whole_and_in_order(recorded, rows):
    kept = Repeats(recorded).new(rows)
    before, expected = {told_apart(row) for row in recorded}, []
    for row in rows:
        if told_apart(row) not in before:
            before.add(told_apart(row))
            expected.append(row)
    assert [*map(id, kept)] == [*map(id, expected)]  # NaN is not equal to itself


@given(row_lists, row_lists, st.integers(0, 20))
def test_it_makes_no_difference_in_how_many_parts_rows_come(recorded, rows, cut):
    parts, whole = Repeats(recorded), Repeats(recorded)
    kept = parts.new(rows[:cut]) + parts.new(rows[cut:])
    assert [*map(id, kept)] == [*map(id, whole.new(rows))]
    assert whole.new(rows) == []


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
    # Later, and of another value: past step 0 the step alone tells.
    assert repeats.new([(name, v + 1, step, at + 9) for name, v, step, at in epochs + odd]) == []
    fresh = [("val/0", 1.0, 301, 1), ("test/0", 0.1, 0, 1), ("test/1", 0.1, 0, 1), ("new", 1, 1, 1)]
    assert repeats.new(fresh) == fresh
