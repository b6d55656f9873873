"""The space of a search: its notation, what it draws, and what it refuses."""

import json

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from research.search.parts import read_parts, write_out
from research.search.space import notation, number, read_list, read_range

REALS = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=1e-12, max_value=1e12)
WHOLES = st.integers(min_value=-(10**9), max_value=10**9)


def space_of(space, each=None, settings=None):
    faults = []
    document = {
        "settings": settings,
        "each": write_out("each", each, faults),
        "space": write_out("space", space, faults),
    }
    parts = read_parts(document, faults)
    assert not faults
    return parts


@given(low=REALS, high=REALS)
def test_real_range_reads_as_it_is_written(low, high):
    if low == high:
        return
    distribution = FloatDistribution(min(low, high), max(low, high))
    assert read_range(notation(distribution)) == distribution


@given(low=POSITIVE, high=POSITIVE)
def test_logarithmic_range_reads_as_it_is_written(low, high):
    if low == high:
        return
    distribution = FloatDistribution(min(low, high), max(low, high), log=True)
    assert read_range(notation(distribution)) == distribution


@given(low=WHOLES, span=st.integers(1, 10**6), step=st.integers(1, 10**6))
def test_whole_range_reads_as_it_is_written_and_ends_on_a_step(low, span, step):
    if step > span:
        with pytest.raises(ValueError, match="larger than the range"):
            read_range(f"int {low}..{low + span} step {step}")
        return
    distribution = read_range(f"int {low}..{low + span} step {step}")
    assert isinstance(distribution, IntDistribution)
    assert (distribution.high - low) % step == 0
    assert low + span - step < distribution.high <= low + span
    assert read_range(notation(distribution)) == distribution


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_number_reads_as_the_same_number(value):
    assert float(number(value)) == value


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("log 1e-4..1", FloatDistribution(1e-4, 1, log=True)),
        ("0..0.5 step 0.1", FloatDistribution(0, 0.5, step=0.1)),
        ("0..0.5 step 0.2", FloatDistribution(0, 0.4, step=0.2)),
        ("-1 .. 1", FloatDistribution(-1, 1)),
        ("int 1..8", IntDistribution(1, 8)),
        ("int log 16..512", IntDistribution(16, 512, log=True)),
        ("int 0..100 step 10", IntDistribution(0, 100, step=10)),
        ("int 1e2..1e3", IntDistribution(100, 1000)),
    ],
)
def test_range_is_optunas_distribution(text, distribution):
    assert read_range(text) == distribution


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1..0", "goes down; write the lower end first: 0..1"),
        ("1..1", "holds one number only"),
        ("log 0..1", "must begin above 0"),
        ("log -1..1", "must begin above 0"),
        ("log 1..8 step 2", "can have no step"),
        ("0..1 step 0", "must be above 0"),
        ("0..1 step 2", "larger than the range"),
        ("int 0..1.5", "whole numbers"),
        ("int 0..1e20", "a whole number above"),
        ("0..1e999", "too large"),
        ("log 1e-999..1", "must begin above 0"),
        ("1...5", "is no range"),
        ("0..x", "is no range"),
        ("log 1", "is no range"),
        ("0..1 step", "is no range"),
        ("log int 1..2", "is no range"),
    ],
)
def test_empty_or_broken_range_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        read_range(text)


@given(st.text(max_size=40))
def test_any_text_is_a_range_or_is_refused_in_a_sentence(text):
    try:
        distribution = read_range(text)
    except ValueError as error:
        assert len(str(error)) > 10
    else:
        assert read_range(notation(distribution)) == distribution


def test_list_of_what_optuna_cannot_hold_goes_by_its_text():
    choices, values = read_list([[8, 16], [16, 32]])
    assert choices == ("[8, 16]", "[16, 32]") and values == ([8, 16], [16, 32])
    assert read_list([1, True])[1] == (1, True)  # equal to Python, and not to a setting
    assert read_list([64, 128]) == ((64, 128), ())
    for values in ([], [1, 1]):
        with pytest.raises(ValueError):
            read_list(values)


def test_paths_are_no_ranges():
    space = space_of({"data": {"ImageFolder": {"root": "../data", "batch_size": [32, 64]}}}).space
    drawn = {"data": "ImageFolder", "data.ImageFolder.batch_size": 64}
    arguments = {"batch_size": 64, "root": "../data"}
    assert space.settings(drawn) == {"data": {"class_path": "ImageFolder", "init_args": arguments}}


SPACE = {
    "model.loss": {"CrossEntropyLoss": {"label_smoothing": "0..0.2"}, "MSELoss": {}},
    "optimizer": {
        "SGD": {"momentum": "0..0.99", "nesterov": True},
        "AdamW": {"weight_decay": "log 1e-5..1", "amsgrad": [True, False]},
    },
    "optimizer.lr": "log 1e-4..1",
    "lr_scheduler": [None, "CosineAnnealingLR"],
    "model.network.widths": [[8, 16, 16], [16, 32, 32]],
    "trainer.max_epochs": "int 1..3",
}


def test_settings_of_a_finished_trial_are_those_that_were_suggested():
    space = space_of(SPACE).space
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5))
    seen = set()
    for number_of_trial in range(30):
        trial = study.ask()
        settings = space.suggest(trial)
        assert space.settings(trial.params) == settings
        optimizer = settings["optimizer"]
        seen.add((optimizer["class_path"], settings["model"]["loss"]["class_path"]))
        own = {"momentum", "nesterov"} if optimizer["class_path"] == "SGD" else {"weight_decay"}
        assert own <= set(optimizer["init_args"]) and "lr" in optimizer["init_args"]
        assert ("nesterov" in optimizer["init_args"]) == (optimizer["class_path"] == "SGD")
        smoothed = "label_smoothing" in settings["model"]["loss"]["init_args"]
        assert smoothed == (settings["model"]["loss"]["class_path"] == "CrossEntropyLoss")
        assert settings["lr_scheduler"] is None or isinstance(settings["lr_scheduler"], dict)
        assert settings["model"]["network"]["init_args"]["widths"] in SPACE["model.network.widths"]
        study.tell(trial, number_of_trial)
    assert len(seen) == 4
    assert {name for trial in study.trials for name in trial.params} == {
        parameter.name for parameter in space.parameters()
    }


def test_parameters_go_by_their_class_where_only_it_has_them():
    space = space_of(SPACE).space
    momentum = space.parameter("optimizer.SGD.momentum")
    assert momentum.key == "optimizer.momentum" and momentum.condition == ("optimizer", "SGD")
    assert space.parameter("optimizer.lr").condition is None
    classes = space.parameter("optimizer").distribution
    assert isinstance(classes, CategoricalDistribution) and classes.choices == ("SGD", "AdamW")


def test_missing_parameter_is_told():
    with pytest.raises(ValueError, match=r"optimizer\.lr is missing among a trial's parameters"):
        space_of({"optimizer.lr": "0..1"}).space.settings({})


def test_canonical_form_knows_no_order_and_is_json():
    space, turned = space_of(SPACE).space, space_of(dict(reversed(SPACE.items()))).space
    assert json.loads(json.dumps(space.canonical())) == space.canonical() == turned.canonical()
    other = {**SPACE, "optimizer.lr": "log 1e-4..2"}
    assert space_of(other).space.canonical() != space.canonical()


@pytest.mark.parametrize(
    ("space", "points"),
    [
        ({"optimizer.lr": "0..1"}, None),
        ({"optimizer.lr": "0..1 step 0.1"}, 11),
        ({"optimizer.lr": "0.1..0.7 step 0.1", "data.batch_size": [32, 64]}, 14),
        ({"optimizer": {"SGD": {"lr": [0.1, 0.2]}, "Adam": {}}, "data.batch_size": [1, 2]}, 6),
        ({"optimizer": ["SGD", "Adam"], "model.loss": {"L1Loss": {}, "MSELoss": {}}}, 4),
        ({"trainer.max_epochs": "int 1..8"}, 8),
    ],
)
def test_points_are_counted_as_brute_force_visits_them(space, points):
    space = space_of(space).space
    assert space.points() == points
    if points is None:
        return
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        sampler = optuna.samplers.BruteForceSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: len(str(space.suggest(trial))), n_trials=2 * points)
    drawn = {json.dumps(trial.params, sort_keys=True) for trial in study.trials}
    assert len(study.trials) == len(drawn) == points
    assert not space.is_conditional() or points == 6
