"""The figures of a search: which there are, that odd searches are drawn, and what they show."""

import math

import numpy as np
import pytest
from PIL import Image

from research.configuration.schema import known_classes
from research.search.document import Objective
from research.search.figures import best_so_far, draw_figures
from research.search.importances import groups, shared
from research.search.learning_rates import best_in_bins, pieces
from research.search.ranking import ranked
from research.search.relations import columns_of, pages
from research.search.report import SUMMARY, write_report
from research.search.results import Results
from research.search.scales import window_for, window_of
from tests.ended import accuracy, confirmation, ended, search, trial

UP, DOWN = Objective("val/accuracy", "maximize"), Objective("training_seconds", "minimize")
EVERYTHING: dict[str, dict[str, dict[str, str]]] = {
    key: {name: {} for name in sorted(known_classes(key))} for key in ("optimizer", "model.loss")
}
ONE_SPACE = {"data.batch_size": [64, 128], "model.network.dropout": "0..0.5"}


def names_of(results, folder) -> set[str]:
    """The figures' names; each is a picture with something on it."""
    files, _ = draw_figures(results, folder)
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").resize((60, 60)).getcolors(3600) or ()) > 5
    assert len({file.name for file in files}) == len(files)
    return {file.stem for file in files}


@pytest.mark.slow
def test_a_search_of_losses_and_optimizers_has_all_figures(tmp_path):
    results = ended(search(), 60)
    fresh = confirmation(ranked(results)[0].key, {1: 0.66, 2: 0.64})
    assert names_of(Results(results.search, results.trials, fresh), tmp_path) == {
        "confirmation", "history", "importances", "learning_rate_by_loss",
        "learning_rate_by_optimizer", "loss_by_optimizer", "parallel_coordinates",
        "parallel_coordinates_AdamW", "parallel_coordinates_CrossEntropyLoss",
        "parallel_coordinates_SGD", "slice",
    }  # fmt: skip


def test_figures_that_have_nothing_to_show_are_not_made(tmp_path):
    results = ended(search(space=ONE_SPACE), 12)
    assert names_of(results, tmp_path) == {"history", "slice", "parallel_coordinates"}
    _, notes = groups(results)
    assert "fewer than 20" in notes[0]


def test_two_objectives_have_a_front_and_figures_of_each(tmp_path):
    objective = {"val/accuracy": "maximize", "training_seconds": "minimize"}
    the_search = search(space=ONE_SPACE, objective=objective)
    results = ended(the_search, 10, value=lambda settings: (0.5, settings["data.batch_size"] / 9))
    found = names_of(results, tmp_path)
    assert {"pareto_front", "history_val_accuracy", "history_training_seconds"} <= found


@pytest.mark.parametrize(
    "value",
    [
        lambda settings: 0.5,
        lambda settings: math.inf,
        lambda settings: 1e30 * settings["data.batch_size"],
        lambda settings: -1.0,
    ],
)
def test_odd_values_are_drawn(tmp_path, value):
    results = ended(search(space=ONE_SPACE, objective="training_seconds"), 8, value=value)
    assert "history" in names_of(results, tmp_path)


def test_a_search_without_a_complete_trial_still_has_a_history(tmp_path):
    the_search = search()
    (cell,) = the_search.cells
    params = {"model.loss": "MSELoss", "optimizer": "AdamW", "optimizer.AdamW.lr": 0.1}
    lost = trial(cell, 0, params | {"data.batch_size": 64}, diverged=True)
    assert names_of(Results(the_search, {"": [lost]}), tmp_path) == {"history"}
    assert draw_figures(Results(the_search, {"": []}), tmp_path)[0] == []


def test_the_report_is_a_summary_and_its_figures(tmp_path):
    results = ended(search(space=ONE_SPACE), 8)
    files = write_report(results, tmp_path / "new")
    assert files[0].name == SUMMARY and all(file.is_file() for file in files)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(
        file.name for file in files
    )


def test_axes_are_only_of_parameters_that_all_their_trials_have():
    results = ended(search(), 60)
    common = {each.name for each in shared(results, results.complete)}
    assert common == {"model.loss", "optimizer", "data.batch_size"}
    sgd = [point for point in results.complete if point.settings["optimizer"] == "SGD"]
    assert {each.name for each in shared(results, sgd)} == {
        "model.loss", "data.batch_size", "optimizer.SGD.lr", "optimizer.SGD.momentum",
    }  # fmt: skip


def test_importances_find_the_parameter_that_matters_within_its_branch():
    the_search = search(space={"optimizer": {"SGD": {"lr": "log 1e-3..1", "momentum": "0..0.9"},
                                             "AdamW": {"lr": "log 1e-5..0.1"}},
                               "data.batch_size": [64, 128]})  # fmt: skip
    found, _ = groups(ended(the_search, 120, seed=1))
    by_title = {group.title: group for group in found}
    sgd = by_title["SGD trials"]
    assert next(iter(sgd.shares)).name == "optimizer.SGD.lr"
    assert sgd.own == {"optimizer.SGD.lr", "optimizer.SGD.momentum"}
    assert {each.name for each in by_title["all trials"].shares} == {"optimizer", "data.batch_size"}
    for group in found:
        assert sum(group.shares.values()) == pytest.approx(1)
        assert all(share >= 0 for share in group.shares.values())


def test_one_trial_that_ran_away_does_not_rule_the_axis():
    values = [*np.linspace(1, 2, 30), 1e9]
    window = window_of(values, DOWN)
    assert window.high < 10 and window.poor == window.high and not window.holds(1e9)
    assert all(window.holds(value) for value in values[:-1])
    assert window_of([-v for v in values], UP).low > -10


@pytest.mark.parametrize("values", [[], [0.5], [0.5] * 20, [math.nan, 1.0], [-3.0, -2.0], [0.0]])
def test_any_values_have_a_window_that_holds_the_best(values):
    for objective in (UP, DOWN):
        window = window_of(values, objective)
        assert window.low < window.high and window.poor in (window.low, window.high)
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            assert window.holds(max(finite) if objective is UP else min(finite))


def test_the_best_so_far_never_gets_worse():
    results = ended(search(), 40)
    steps = best_so_far(results.points, 0, "maximize")
    values = [value for _, value in steps]
    assert values == sorted(values) and values[-1] == max(p.value() for p in results.complete)


def test_the_line_of_learning_rates_goes_through_the_best_of_each_third_of_a_decade():
    results = ended(search(), 200, value=accuracy)
    sgd = [point for point in results.points if point.settings["optimizer"] == "SGD"]
    window = window_for(results, 0)
    line = best_in_bins(sgd, 0, window)
    assert [rate for rate, _ in line] == sorted(rate for rate, _ in line)
    assert len(line) <= 10  # three decades
    assert max(line, key=lambda at: at[1])[0] == pytest.approx(0.1, rel=0.3)
    reached = {(p.settings["optimizer.lr"], p.value()) for p in sgd if p.state == "complete"}
    assert set(line) <= reached


def test_no_line_crosses_a_decade_without_a_trial():
    line = [(1e-4, 0.1), (5e-4, 0.2), (1e-2, 0.3), (2e-2, 0.4)]
    assert pieces(line) == [line[:2], line[2:]]


def test_every_parameter_has_a_slice_and_rows_are_not_too_wide():
    results = ended(search(space=EVERYTHING), 60)
    rows = [row for page in pages(results) for row in page]
    assert {each.name for row in rows for each in row} == {
        each.name
        for each in results.dimensions
        if any(each.name in point.varied for point in results.complete)
    }
    assert all(sum(map(columns_of, row)) <= 4 for row in rows)


@pytest.mark.slow
def test_every_loss_with_every_optimizer_is_drawn(tmp_path):
    the_search = search(space=EVERYTHING)
    results = ended(the_search, 100, value=lambda settings: 0.5)
    assert "loss_by_optimizer" in names_of(results, tmp_path)
