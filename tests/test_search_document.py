"""A search file: what it makes, what it refuses, and how two of them differ."""

import json
import math
from functools import cache
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.samplers import GridSampler, QMCSampler, TPESampler
from torch import Tensor

from research.configuration.compose import ConfigurationError, compose
from research.configuration.schema import known_classes
from research.losses import ClassificationLoss
from research.search import document
from research.search.document import (
    Cell,
    Confirmation,
    Difference,
    Objective,
    Search,
    differences,
    read_search,
)
from research.search.strategies import seed_of

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))

SMALL = {
    "base": "experiments/quickstart.yaml",
    "space": {"optimizer": {"SGD": {"lr": "log 1e-3..1"}, "AdamW": {"lr": "log 1e-5..0.1"}}},
    "budget": {"trials": 8},
}


@cache
def shipped(file: Path) -> Search:
    return read_search(file)


@pytest.fixture
def written(tmp_path):
    def write(search=SMALL, typed=None, trust=False, **changed) -> Search:
        file = tmp_path / "small.yaml"
        kept = {k: v for k, v in {**search, **changed}.items() if v != "absent"}
        file.write_text(yaml.safe_dump(kept, sort_keys=False))
        return read_search(file, typed or {}, trust)

    return write


@pytest.fixture
def faults(written):
    def told(**changed) -> list[str]:
        with pytest.raises(ConfigurationError) as caught:
            written(**changed)
        return caught.value.faults

    return told


def drawn(search: Search, cell: Cell, slot: int = 0, trials: int = 1) -> list[dict]:
    study = optuna.create_study(sampler=search.sampler(slot, cell))
    return [cell.space.suggest(study.ask()) for _ in range(trials)]


# ---- the shipped files ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_shipped_search_loads_and_opens_with_its_claim(file):
    search = shipped(file)
    lines = file.read_text().splitlines()
    claim = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    assert lines[0].startswith("# ")
    assert f"python -m research.sweep sweeps/{file.name}" in claim
    assert str(search.trials) in claim and search.name == file.stem
    assert Search.from_document(json.loads(json.dumps(search.document))) == search
    assert json.loads(json.dumps(search.canonical())) == search.canonical()
    assert isinstance(search.pruner(), optuna.pruners.BasePruner)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_shipped_search_makes_a_trial_that_never_sees_the_test_split(file):
    search = shipped(file)
    cell = search.cells[-1]
    settings = drawn(search, cell)[0]
    configuration = search.configuration(cell, settings)
    assert configuration.values.trainer.limit_test_batches == 0
    assert configuration.values.experiment == search.name
    assert not configuration.values.log_model and not configuration.values.log_pictures
    lr = compose(cell.settings, settings)["optimizer"]["init_args"]["lr"]
    assert configuration.arguments("optimizer")["lr"] == lr


def test_shipped_searches_know_every_loss_and_every_optimizer():
    losses, optimizers = (shipped(ROOT / "sweeps" / f"{n}.yaml") for n in ("losses", "optimizers"))
    ours = {name for name, known in known_classes("model.loss").items()
            if known.__module__ == "research.losses"}  # fmt: skip
    assert ours <= {cell.name for cell in losses.cells}
    assert {cell.name for cell in optimizers.cells} == set(known_classes("optimizer"))
    for search in (losses, optimizers):
        assert all(p.key == "optimizer.lr" for cell in search.cells for p in cell.space.drawn)


# ---- what a file makes ---------------------------------------------------------------------------


def test_short_file_gets_its_defaults(written):
    search = written()
    assert search.name == "small" and search.trials == 8 and search.hours is None
    assert search.objectives == (Objective("val/accuracy", "maximize"),)
    assert [cell.name for cell in search.cells] == [""]
    assert search.study_name(search.cells[0]) == "small"
    assert isinstance(search.sampler(0), TPESampler)
    assert isinstance(search.pruner(), optuna.pruners.NopPruner)


def test_what_is_typed_wins(written):
    typed = {"trials": "3", "hours": 0.5, "name": "other", "storage": None, "workers": 2}
    search = written(typed=typed)
    assert (search.trials, search.hours, search.name, search.workers) == (3, 0.5, "other", 2)
    assert Search.from_document(search.document) == search


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("val/loss", "minimize"), ("training_seconds", "minimize"), ("val/accuracy", "maximize")],
)
def test_direction_follows_the_metric(written, metric, direction):
    assert written(objective=metric).objectives == (Objective(metric, direction),)


def test_several_objectives_and_confirmation(written):
    objective = {"val/accuracy": "maximize", "training_seconds": "minimize"}
    search = written(objective=objective, confirm={"best": 2, "seeds": 4})
    assert [o.direction for o in search.objectives] == ["maximize", "minimize"]
    assert search.confirm == Confirmation(2, 4)


def test_each_makes_the_product_of_its_cells(written):
    each = {
        "model.loss": {"MSELoss": {}, "CrossEntropyLoss": {"label_smoothing": "0..0.2"}},
        "data.batch_size": [32, 64],
    }
    search = written(each=each)
    names = [cell.name for cell in search.cells]
    assert names == [
        *("MSELoss batch_size=32", "MSELoss batch_size=64"),
        *("CrossEntropyLoss batch_size=32", "CrossEntropyLoss batch_size=64"),
    ]
    cell = search.cell("CrossEntropyLoss batch_size=64")
    assert search.study_name(cell) == "small/CrossEntropyLoss batch_size=64"
    assert "model.loss.label_smoothing" in {p.name for p in cell.space.parameters()}
    configuration = search.configuration(cell, drawn(search, cell)[0])
    assert configuration.arguments("data")["batch_size"] == 64
    assert 0 <= configuration.arguments("model.loss")["label_smoothing"] <= 0.2


def test_all_stands_for_every_class_that_is_not_named(written):
    class LossOfATest(ClassificationLoss):
        def compute(self, scores: Tensor, labels: Tensor) -> Tensor:
            return scores.sum()

    try:
        search = written(each={"model.loss": {"MSELoss": {}, "all": {"reduction": "sum"}}})
        assert "LossOfATest" in {cell.name for cell in search.cells}
        assert len(search.cells) == len(known_classes("model.loss"))
        for cell in search.cells:
            arguments = cell.settings["model"]["loss"]["init_args"]
            assert arguments == ({} if cell.name == "MSELoss" else {"reduction": "sum"})
    finally:
        LossOfATest.__name__ = "_Gone"  # what is private is no choice


def test_argument_beside_the_classes_goes_to_whichever_is_drawn(written):
    space = {"optimizer": ["SGD", "AdamW"], "optimizer.lr": "log 1e-4..1"}
    search = written(space=space, settings={"optimizer.weight_decay": 0.125})
    for slot in range(6):
        settings = drawn(search, search.cells[0], slot)[0]
        arguments = search.configuration(search.cells[0], settings).arguments("optimizer")
        assert arguments["weight_decay"] == 0.125
        assert arguments["lr"] == settings["optimizer"]["init_args"]["lr"]


def test_argument_beside_the_classes_of_each_reaches_every_cell(written):
    search = written(
        each={"optimizer": ["SGD", "AdamW"]},
        space={"optimizer.lr": "log 1e-4..1"},
        settings={"optimizer.weight_decay": 0.125},
    )
    for cell in search.cells:
        arguments = search.configuration(cell, drawn(search, cell)[0]).arguments("optimizer")
        assert arguments["weight_decay"] == 0.125 and 1e-4 <= arguments["lr"] <= 1


def test_no_schedule_is_a_choice_too(written):
    search = written(space={"lr_scheduler": [None, "CosineAnnealingLR"]})
    seen = {
        search.configuration(search.cells[0], {"lr_scheduler": choice}).classes["lr_scheduler"]
        for choice in (None, "CosineAnnealingLR")
    }
    assert None in seen and len(seen) == 2
    assert search.cells[0].space.settings({"lr_scheduler": "none"}) == {"lr_scheduler": None}


def test_base_lies_beside_the_search_too_and_travels_inside_it(written, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer: {max_epochs: 77}\n")
    search = written(base=["experiments/quickstart.yaml", "mine.yaml"])
    mine.unlink()
    again = Search.from_document(json.loads(json.dumps(search.document)))
    assert again.configuration(again.cells[0], {}).values.trainer.max_epochs == 77


# ---- samplers and pruners ------------------------------------------------------------------------


def test_slot_has_one_stream_of_draws_and_no_other_slot_has_it(written):
    search, again = written(), written()
    first = [drawn(search, search.cells[0], slot)[0] for slot in range(8)]
    assert first == [drawn(again, again.cells[0], slot)[0] for slot in range(8)]
    assert len({json.dumps(settings) for settings in first}) == 8
    other = written(seed=1)
    assert drawn(other, other.cells[0])[0] != first[0]


def test_cells_draw_differently_and_alike_in_every_process(written):
    search = written(each={"model.loss": ["MSELoss", "L1Loss"]})
    one, other = (drawn(search, cell)[0] for cell in search.cells)
    assert one != other
    # A number that Python's own hash would make anew in every process.
    assert seed_of(0, "MSELoss", 3) == 2288913857


def test_grid_is_visited_once_with_a_sampler_for_each_slot(written):
    space = {"optimizer.lr": [0.1, 0.2, 0.4], "data.batch_size": "int 32..64 step 16"}
    search = written(space=space, sampler="GridSampler", budget="absent")
    assert search.trials == 9
    study = optuna.create_study()
    seen = set()
    for slot in range(9):
        study.sampler = search.sampler(slot)
        assert isinstance(study.sampler, GridSampler)
        trial = study.ask()
        seen.add(json.dumps(search.cells[0].space.suggest(trial)))
        study.tell(trial, 0.5)  # the sampler's own end would raise here
    assert len(seen) == 9


def test_brute_force_visits_every_branch_once(written):
    space = {
        "optimizer": {"SGD": {"momentum": [0.0, 0.9]}, "AdamW": {}},
        "data.batch_size": [8, 16],
    }
    search = written(space=space, sampler="BruteForceSampler", budget={"hours": 1})
    assert search.trials == 6
    study = optuna.create_study()
    for slot in range(6):
        study.sampler = search.sampler(slot)
        trial = study.ask()
        search.cells[0].space.suggest(trial)
        study.tell(trial, 0.5)
    assert len({json.dumps(trial.params) for trial in study.trials}) == 6


def test_quasi_random_slots_share_one_sequence(written):
    search = written(
        space={"optimizer.lr": "log 1e-4..1"},
        sampler={"class_path": "QMCSampler", "scramble": True},
        budget={"trials": 9},
    )
    study = optuna.create_study()
    values = []
    for slot in range(9):
        study.sampler = search.sampler(slot)
        assert isinstance(study.sampler, QMCSampler)
        trial = study.ask()
        search.cells[0].space.suggest(trial)
        values.append(trial.params["optimizer.lr"])
        study.tell(trial, 0.5)
    # The first is a random one; of eight points of the sequence one lies in each eighth.
    eighths = {int(2 * (4 + math.log10(value))) for value in values[1:]}
    assert eighths == set(range(8))


def test_nested_pruner_is_made(written):
    wrapped = {"class_path": "MedianPruner", "n_warmup_steps": 2}
    pruner = written(
        pruner={"class_path": "PatientPruner", "patience": 3, "wrapped_pruner": wrapped}
    ).pruner()
    assert isinstance(pruner, optuna.pruners.PatientPruner)
    assert isinstance(pruner._wrapped_pruner, optuna.pruners.MedianPruner)


@pytest.mark.parametrize("name", ["GPSampler", "NSGAIISampler", "RandomSampler", "TPESampler"])
def test_sampler_of_optuna_is_made_without_a_warning(written, name):
    assert type(written(sampler=name).sampler(0)).__name__ == name


# ---- faults --------------------------------------------------------------------------------------


def test_all_faults_are_told_at_once(faults):
    told = faults(
        base="experiments/tutoral.yaml",
        settigns={},
        settings={"trainer.limit_test_batches": 3, "data.batch_size": 32, "trainer.max_epoch": 1},
        each={"data.batch_size": [32, 64]},
        space={
            "optimizer": {
                "SGD": {"lr": "log 0..1", "momentun": "0..0.99", "nesterov": "0..1"},
                "AdamV": {},
                "Muon": {"ns_steps": "1..8", "momentum": "1..0", "eps": "0..1 step 2"},
            },
            "model.loss": {"MSELoss": {}, "CrossEntropyLoss": {"label_smoothing": "0..2"}},
            "model.network.hidden": [],
        },
        objective="test/accuracy",
        budget={"trials": 0},
        sampler={"class_path": "TPESampler", "multivarate": True},
        pruner="MedianPrune",
    )
    expected = [
        "settigns: a search has no such key; did you mean settings?",
        "base: there is no file",
        "settings.trainer.limit_test_batches: a trial never sees the test split",
        "settings.data.batch_size: it is fixed, and each names it too",
        "settings.trainer.max_epoch: there is no such setting; did you mean trainer.max_epochs?",
        'space.optimizer.SGD.lr: "log 0..1" is logarithmic, so it must begin above 0.',
        'space.optimizer.SGD.momentun: SGD has no argument "momentun"; did you mean momentum?',
        "space.optimizer.SGD.nesterov: expected true or false, and a range of numbers came, 0..1.",
        'space.optimizer: there is no optimizer "AdamV"; did you mean Adam',
        "space.optimizer.Muon.ns_steps: it is a whole number, and 1..8 is a range of real ones; "
        "write int 1..8.",
        'space.optimizer.Muon.momentum: "1..0" goes down',
        'space.optimizer.Muon.eps: "0..1 step 2" has a step that is larger than the range.',
        "space.model.loss.CrossEntropyLoss: CrossEntropyLoss: label_smoothing must be",
        "space.model.network.hidden: the list is empty",
        "objective: test/accuracy is of the test split",
        "budget.trials: expected a whole number, 1 or more; came 0.",
        'sampler.multivarate: TPESampler has no argument "multivarate"; did you mean multivariate?',
        'pruner: Optuna has no pruner "MedianPrune"; did you mean MedianPruner?',
    ]
    for start in expected:
        assert sum(fault.startswith(start) for fault in told) == 1, (start, told)
    assert len(told) == len(expected)
    assert "did you mean tutorial.yaml?" in next(f for f in told if f.startswith("base"))


@pytest.mark.parametrize(
    ("changed", "start"),
    [
        ({"space": {}}, "space: there is nothing to search"),
        ({"space": [1]}, "space: expected keys"),
        ({"space": {"optimizer": "SGD"}}, "space.optimizer: expected classes"),
        ({"space": {"optimizer": {"class_path": "SGD"}}}, "space.optimizer: expected classes"),
        ({"space": {"optimizer.lr": 0.1}}, "space.optimizer.lr: one value alone is no choice"),
        ({"space": {"seed_everything": "0..9"}}, "space.seed_everything: it is a whole number"),
        ({"space": {"data.bach_size": [1]}}, "space.data.bach_size: Synthetic has no argument"),
        ({"space": {"data.batch_size": [32, "x"]}}, "space.data.batch_size: expected a whole"),
        ({"each": {"optimizer": ["SGD", "Adam"]}}, "space.optimizer: each names it too"),
        ({"each": {"data.batch_size": "int 1..8"}}, "each.data.batch_size: expected a list"),
        ({"settings": {"optimizer": "SGD"}}, "settings.optimizer: it is fixed, and space names it"),
        ({"settings": {"optimizer.lr": 0.1}}, "space.optimizer.SGD.lr: optimizer.lr stands beside"),
        ({"settings": {"experiment": "x"}}, "settings.experiment: the trials' experiment goes by"),
        ({"settings": 3}, "settings: expected keys of the command line"),
        (
            {"space": {"optimizer": ["SGD", "Adam"], "optimizer.momentum": "0..0.9"}},
            'space.optimizer.momentum: Adam has no argument "momentum"',
        ),
        ({"objective": "val/acuracy"}, "objective: a trial has no val/acuracy; did you mean val/a"),
        ({"objective": "speed"}, "objective: a trial has no speed."),
        ({"objective": {"val/accuracy": "up"}}, "objective.val/accuracy: expected minimize or"),
        ({"direction": "up"}, "direction: expected minimize or maximize, came 'up'."),
        (
            {"objective": "val/loss", "each": {"model.loss": ["MSELoss", "L1Loss"]}},
            "objective: val/loss cannot be compared where the loss itself is searched",
        ),
        (
            {"pruner": "MedianPruner", "objective": {"val/accuracy": None, "val/loss": None}},
            "pruner: a trial with several objectives cannot be pruned",
        ),
        (
            {"pruner": "MedianPruner", "objective": "training_seconds"},
            "pruner: training_seconds is known at a trial's end only",
        ),
        (
            {"confirm": {"best": 1}, "space": {"seed_everything": [0, 1]}},
            "confirm: the seed is searched itself",
        ),
        ({"each": {"data.root": ["a/b", "a_b"]}}, "each: two studies would be called root=a_b"),
        ({"budget": "absent"}, "budget.trials: the number of trials is missing"),
        ({"budget": 3}, "budget: expected a mapping"),
        ({"budget": {"trials": 3, "hour": 1}}, "budget.hour: there is no such key; did you mean"),
        ({"budget": {"trials": 3, "hours": 0}}, "budget.hours: expected a number above 0"),
        ({"budget": {"trials": True}}, "budget.trials: expected a whole number"),
        ({"confirm": {"best": 0}}, "confirm.best: expected a whole number, 1 or more; came 0."),
        ({"seed": -1}, "seed: expected a whole number, 0 or more; came -1."),
        ({"workers": 0}, "workers: expected a whole number, 1 or more; came 0."),
        ({"name": "a/b"}, "name: expected a name without slashes, came 'a/b'."),
        ({"storage": 3}, "storage: expected an address"),
        ({"sampler": 3}, "sampler: expected the name of Optuna's class"),
        ({"sampler": "TPESample"}, 'sampler: Optuna has no sampler "TPESample"; did you mean TPE'),
        ({"sampler": "GridSampler"}, "sampler: GridSampler knows no arguments that only some"),
        ({"sampler": "QMCSampler"}, "sampler: QMCSampler knows no arguments that only some"),
        ({"sampler": "BruteForceSampler"}, "sampler: BruteForceSampler tries every point, and "),
        ({"sampler": {"class_path": "TPESampler", "seed": 1}}, "sampler.seed: the sampler's seeds"),
        ({"sampler": {"class_path": "os.system"}}, "sampler: os.system"),
        ({"pruner": "PercentilePruner"}, "pruner.percentile is missing"),
        (
            {"pruner": {"class_path": "PercentilePruner", "percentile": "x"}},
            "pruner.percentile: expected a number",
        ),
        (
            {"pruner": {"class_path": "PercentilePruner", "percentile": 101}},
            "pruner: PercentilePruner cannot be made: Percentile must be between 0 and 100",
        ),
    ],
)
def test_fault_names_the_key_and_what_is_allowed(written, monkeypatch, changed, start):
    told = []
    for signatures_too in (False, True):  # what the file itself shows takes no parser to see
        if not any(fault.startswith(start) for fault in told):
            with monkeypatch.context() as patched:
                if not signatures_too:
                    patched.setattr(document, "check", lambda *_: None)
                try:
                    written(**changed)
                except ConfigurationError as error:
                    told = error.faults
    assert any(fault.startswith(start) for fault in told), told


def test_grid_smaller_than_the_budget_is_told(faults):
    told = faults(space={"optimizer.lr": [0.1, 0.2]}, sampler="BruteForceSampler")
    assert told == ["budget.trials: came 8, and there are only 2 different ones; write 2, or leave "
                    "it out."]  # fmt: skip


def test_file_may_name_strangers_only_when_trusted(written, faults):
    changed = {"space": {"optimizer": {"SGD": {}, "subprocess.Popen": {}}}}
    assert any("may not be named in a file" in fault for fault in faults(**changed))
    with pytest.raises(ConfigurationError) as caught:
        written(trust=True, **changed)
    assert "subprocess.Popen" in str(caught.value)  # found no optimizer, or never to be imported


def test_missing_file_is_told(tmp_path):
    (tmp_path / "losses.yaml").write_text("")
    with pytest.raises(ConfigurationError, match=r"did you mean losses.yaml\?"):
        read_search(tmp_path / "loses.yaml")
    with pytest.raises(ConfigurationError, match="holds no search"):
        read_search(tmp_path / "losses.yaml")


@pytest.mark.parametrize("text", ["a: [", "- 1", "3", "space: {1: 2}", "a: &a [*a]", "\x00", "?"])
def test_any_text_is_refused_in_a_sentence(tmp_path, text):
    file = tmp_path / "search.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError):
        read_search(file)


# ---- differences ---------------------------------------------------------------------------------


def canonical(search: Search):
    return json.loads(json.dumps(search.canonical()))


def test_equal_searches_do_not_differ(written):
    assert differences(canonical(written()), canonical(written())) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"budget": {"trials": 9}}, Difference("trials", 8, 9, True)),
        ({"budget": {"trials": 8, "hours": 2}}, Difference("hours", None, 2.0, True)),
        ({"confirm": {"best": 2, "seeds": 3}},
         Difference("confirm", None, {"best": 2, "seeds": 3}, True)),
        ({"seed": 3}, Difference("seed", 0, 3, True)),
        ({"settings": {"trainer.max_epochs": 3}},
         Difference("settings.trainer.max_epochs", 8, 3, False)),
        ({"objective": {"val/accuracy": "minimize"}},
         Difference("objective.val/accuracy", "maximize", "minimize", False)),
    ],
)  # fmt: skip
def test_difference_says_whether_the_study_can_go_on(written, changed, expected):
    assert differences(canonical(written()), canonical(written(**changed))) == [expected]


@pytest.mark.parametrize(
    ("optimizer", "extends"),
    [
        ({"SGD": {"lr": "log 1e-3..10"}, "AdamW": {"lr": "log 1e-5..0.1"}}, True),
        ({"SGD": {"lr": "1e-3..1"}, "AdamW": {"lr": "log 1e-5..0.1"}}, False),
        ({"SGD": {"lr": [0.1, 1]}, "AdamW": {"lr": "log 1e-5..0.1"}}, False),
        ({"SGD": {"lr": 0.1}, "AdamW": {"lr": "log 1e-5..0.1"}}, False),
        ({"SGD": {"lr": "log 1e-3..1"}, "Adam": {"lr": "log 1e-5..0.1"}}, False),
        ({"SGD": {"lr": "log 1e-3..1", "momentum": "0..0.9"}, "AdamW": {"lr": "log 1e-5..0.1"}},
         False),
    ],
)  # fmt: skip
def test_ranges_may_move_and_nothing_else_in_the_space(written, optimizer, extends):
    old, new = canonical(written()), canonical(written(space={"optimizer": optimizer}))
    found = differences(old, new)
    assert found and all(difference.key.startswith("space.") for difference in found)
    assert all(difference.extends for difference in found) == extends


def test_cells_come_and_go(written):
    one, more = (
        canonical(written(each={"model.loss": losses}))
        for losses in (["MSELoss"], ["MSELoss", "L1Loss"])
    )
    (come,), (gone,) = differences(one, more), differences(more, one)
    assert come.key == gone.key == "each.L1Loss" and come.extends and gone.extends
    assert not all(difference.extends for difference in differences(canonical(written()), more))
