"""The order of a search's trials, how sure it is, and the table that says so."""

import math
import statistics

import optuna
import pytest
from optuna.trial import TrialState
from scipy import stats

from research.search.ranking import (
    FreshSeeds,
    best_of_each,
    difference,
    pareto_front,
    ranked,
    standard_error,
    verdict,
)
from research.search.report import summary, table
from research.search.results import Results, counts, described, flat
from tests.ended import confirmation, ended, search, trial

SGD = {"model.loss": "MSELoss", "optimizer": "SGD", "data.batch_size": 64}
SGD |= {"optimizer.SGD.lr": 0.1, "optimizer.SGD.momentum": 0.5}


def of_values(values, **changes) -> Results:
    """A search whose trials reached these values, each with a learning rate of its own."""
    the_search = search(**changes)
    (cell,) = the_search.cells
    params = [SGD | {"optimizer.SGD.lr": 0.01 * (n + 1)} for n in range(len(values))]
    return Results(
        the_search,
        {
            "": [
                trial(cell, n, each, value, val_pictures=5000)
                for n, (each, value) in enumerate(zip(params, values, strict=True))
            ]
        },
    )


def two_cells(**changes):
    space = {"data.batch_size": [64, 128]}
    return search(each={"model.loss": {"MSELoss": {}, "L1Loss": {}}}, space=space, **changes)


def order_of(results) -> list[int]:
    return [entry.point.slot for entry in ranked(results)]


def test_the_best_comes_first_in_either_direction():
    assert order_of(of_values([0.3, 0.5, 0.4])) == [1, 2, 0]
    assert order_of(of_values([3.0, 5.0, 4.0], objective="training_seconds")) == [0, 2, 1]


def test_what_did_not_come_to_its_end_is_counted_and_not_ranked():
    results = ended(search(), 40)
    found = counts(results)
    assert (found["complete"], found["pruned"], found["diverged"], found["failed"]) == (36, 2, 1, 1)
    assert len(ranked(results)) == 36
    infinite = of_values([0.3, math.inf])
    assert counts(infinite)["diverged"] == 1 and order_of(infinite) == [0]


def test_a_trial_that_still_waits_breaks_nothing():
    the_search = search()
    waiting = trial(the_search.cells[0], 0, {}, state=optuna.trial.TrialState.WAITING)
    results = Results(the_search, {"": [waiting]})
    assert counts(results)["open"] == 1
    assert "nothing to compare" in table(results)


def test_equal_configurations_are_listed_once_with_their_best():
    the_search = search()
    (cell,) = the_search.cells
    trials = [trial(cell, n, SGD, value) for n, value in enumerate([0.3, 0.5, 0.4])]
    assert order_of(Results(the_search, {"": trials})) == [1]


def test_fresh_seeds_decide_among_those_that_have_them():
    results = of_values([0.70, 0.69, 0.68, 0.60])
    fresh = [*confirmation(("", 0), {1: 0.60, 2: 0.62}), *confirmation(("", 1), {1: 0.66, 2: 0.64})]
    order = ranked(Results(results.search, results.trials, fresh))
    assert [entry.point.slot for entry in order] == [1, 0, 2, 3]
    assert order[0].fresh is not None and order[0].fresh.mean == pytest.approx(0.65)
    # The value that was selected, 0.69, is no part of it.
    assert order[0].fresh.deviation == pytest.approx(statistics.stdev([0.66, 0.64]))


def test_what_waits_for_its_fresh_seeds_is_not_called_confirmed():
    results = of_values([0.70, 0.69])
    pinned = {"candidate": ["", 0], "seed": 1}
    waiting = [optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=pinned)]
    begun = Results(results.search, results.trials, waiting)
    assert ranked(begun) == ranked(results)
    assert "one run each" in table(begun)


def test_a_configuration_that_diverges_on_a_fresh_seed_goes_behind():
    results = of_values([0.70, 0.69])
    fresh = [
        *confirmation(("", 0), {1: 0.71, 2: None}),
        *confirmation(("", 1), {1: 0.66, 2: 0.64}),
    ]
    confirmed = Results(results.search, results.trials, fresh)
    assert order_of(confirmed) == [1, 0]
    assert "1 diverged" in table(confirmed)


def test_the_intervals_are_scipys():
    one, other = [0.66, 0.64, 0.67, 0.61], [0.60, 0.62, 0.61]
    first, second = FreshSeeds(dict(enumerate(one))), FreshSeeds(dict(enumerate(other)))
    mean = stats.t.interval(0.95, 3, loc=statistics.fmean(one), scale=stats.sem(one))
    assert first.interval() == pytest.approx(mean)
    welch = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert difference(first, second) == pytest.approx((welch.low, welch.high))


def test_seeds_without_spread_or_alone_give_no_false_certainty():
    alone = FreshSeeds({1: 0.5})
    assert alone.interval() is None and difference(alone, alone) is None
    same = FreshSeeds({1: 0.5, 2: 0.5})
    assert difference(same, FreshSeeds({1: 0.4, 2: 0.4})) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({1: 0.66, 2: 0.60, 3: 0.63}, {1: 0.62, 2: 0.64, 3: 0.60}, "not told apart"),
        ({1: 0.66, 2: 0.661, 3: 0.659}, {1: 0.60, 2: 0.601, 3: 0.599}, "differ on fresh seeds"),
        ({1: 0.66}, {1: 0.60}, "cannot be said"),
    ],
)
def test_the_verdict_says_no_more_than_the_seeds_do(first, second, said):
    results = of_values([0.70, 0.69])
    fresh = [*confirmation(("", 0), first), *confirmation(("", 1), second)]
    assert said in verdict(Results(results.search, results.trials, fresh))


def test_one_seed_tells_first_from_second_only_beyond_the_error_of_the_pictures():
    close, apart = of_values([0.700, 0.695]), of_values([0.70, 0.60])
    error = standard_error(close, close.complete[0])
    assert error == pytest.approx(math.sqrt(0.7 * 0.3 / 5000))
    assert "does not tell first from second" in verdict(close)
    assert "more than the number of validation pictures" in verdict(apart)
    for results in (close, apart):
        assert "likely optimistic" in verdict(results)
    assert standard_error(of_values([0.7], objective="training_seconds"), close.complete[0]) is None


def test_the_pareto_front_is_optunas():
    objective = {"val/accuracy": "maximize", "training_seconds": "minimize"}
    values = [(0.7, 30.0), (0.6, 10.0), (0.65, 40.0), (0.5, 5.0), (0.5, 6.0)]
    results = of_values(values, objective=objective)
    assert [point.slot for point in pareto_front(results)] == [0, 1, 3]
    assert order_of(results) == [0, 1, 3]
    assert "Pareto front" in table(results)


def test_each_loss_and_optimizer_has_its_best_with_its_learning_rate():
    results = ended(search(), 60)
    for key in ("model.loss", "optimizer"):
        best = best_of_each(results, key)
        values = [each.point.value() for each in best]
        assert values == sorted(values, reverse=True)
        assert sum(each.trials for each in best) == len(results.complete)
        for each in best:
            own = [p.value() for p in results.complete if p.settings[key] == each.name]
            assert each.point.value() == max(own)
            assert each.lr == each.point.settings["optimizer.lr"]


def test_cells_count_as_choices():
    results = ended(two_cells(), 10)
    names = [dimension.name for dimension in results.dimensions]
    assert names == ["model.loss", "data.batch_size"]
    assert {each.name for each in best_of_each(results, "model.loss")} == {"MSELoss", "L1Loss"}


def test_a_configuration_is_told_by_what_varied():
    results = of_values([0.5])
    told = described(results, results.complete[0])
    assert told == "MSELoss, SGD(lr=0.01, momentum=0.5), batch_size=64"


def test_settings_are_flattened_to_the_keys_of_the_command_line():
    nested = {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "a": {"b": 1},
    }
    assert flat(nested) == {"optimizer": "SGD", "optimizer.lr": 0.1, "a.b": 1}


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_keeps_to_its_width_and_the_summary_says_the_same(width):
    results = ended(search(), 60)
    fresh = confirmation(ranked(results)[0].key, {1: 0.66, 2: 0.64})
    for each in (results, Results(results.search, results.trials, fresh)):
        text = table(each, width)
        assert max(map(len, text.splitlines())) <= width
        page = summary(each)
        best = described(each, ranked(each)[0].point)
        assert best in page and best in " ".join(text.split())
        assert verdict(each) in page and verdict(each) in " ".join(text.split())


def test_a_class_with_which_nothing_came_to_its_end_is_told():
    the_search = search()
    (cell,) = the_search.cells
    trials = [
        trial(cell, 0, SGD, 0.5),
        trial(cell, 1, SGD | {"model.loss": "MultiMarginLoss"}, 0.4),
        trial(cell, 2, SGD | {"model.loss": "CrossEntropyLoss",
                              "model.loss.CrossEntropyLoss.label_smoothing": 0.1}, diverged=True),
    ]  # fmt: skip
    lines = table(Results(the_search, {"": trials})).splitlines()
    assert any(line.split()[:2] == ["CrossEntropyLoss", "-"] for line in lines)
