"""Files and flags laid over one another: who wins, and what another class leaves behind."""

import subprocess
import sys

import pytest
import yaml

from research.configuration.compose import (
    DEFAULTS,
    ConfigurationError,
    compose,
    read_command_line,
    read_file,
)

# A choice, a class with an argument that the other class takes too.
OTHERS = [
    ("model.network", "CNN", "ResNet9", "num_classes"),
    ("model.loss", "CrossEntropyLoss", "NLLLoss", "ignore_index"),
    ("optimizer", "AdamW", "SGD", "weight_decay"),
    ("lr_scheduler", "StepLR", "ExponentialLR", "gamma"),
    ("data", "CIFAR10", "ImageFolder", "batch_size"),
]


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def at(settings, key):
    for part in key.split("."):
        settings = settings[part]
    return settings


def typed(*arguments):
    return read_command_line(arguments).settings


@pytest.mark.parametrize(("key", "one", "other", "argument"), OTHERS)
@pytest.mark.parametrize("by", ["file", "flag"])
def test_another_class_inherits_no_argument(key, one, other, argument, by):
    first = nested(key, {"class_path": one, "init_args": {argument: 3}})
    second = nested(key, other) if by == "file" else typed(f"--{key}", other)
    assert at(compose(first, second), key) == {"class_path": other, "init_args": {}}


@pytest.mark.parametrize(("key", "one", "other", "argument"), OTHERS)
def test_same_class_keeps_its_arguments_and_new_ones_win(key, one, other, argument):
    first = nested(key, {"class_path": one, "init_args": {argument: 3, "kept": 1}})
    second = typed(f"--{key}", one, f"--{key}.{argument}", "4")
    assert at(compose(first, second), key)["init_args"] == {argument: "4", "kept": 1}


def test_short_name_and_import_path_are_the_same_class():
    settings = compose({"optimizer": {"class_path": "torch.optim.SGD", "momentum": 0.9}}, {})
    settings = compose(settings, {"optimizer": "SGD"})
    assert settings["optimizer"]["init_args"] == {"lr": 0.01, "momentum": 0.9}


def test_order_on_the_command_line_does_not_matter():
    after = compose(typed("--optimizer", "AdamW", "--optimizer.lr", "0.1"))
    before = compose(typed("--optimizer.lr", "0.1", "--optimizer", "AdamW"))
    assert after == before
    assert after["optimizer"] == {"class_path": "AdamW", "init_args": {"lr": "0.1"}}


def test_argument_alone_changes_the_class_in_force():
    assert compose(typed("--optimizer.lr=0.5"))["optimizer"] == {
        "class_path": "SGD",
        "init_args": {"lr": "0.5"},
    }


def test_later_files_win_and_flags_win_over_files():
    files = [{"seed_everything": 1, "trainer": {"max_epochs": 1, "devices": 1}}]
    files.append({"seed_everything": 2, "trainer": {"max_epochs": 2}})
    settings = compose(*files, typed("--seed_everything", "3"))
    assert settings["seed_everything"] == "3"
    assert settings["trainer"] == {"max_epochs": 2, "devices": 1}


def test_sources_and_defaults_stay_as_they_were():
    source = {"optimizer": {"class_path": "SGD", "init_args": {"lr": 1.0}}}
    before, defaults = yaml.dump(source), repr(DEFAULTS)
    settings = compose(source)
    settings["optimizer"]["init_args"]["lr"] = 2.0
    settings["model"]["network"]["init_args"]["hidden"] = 3
    assert yaml.dump(source) == before
    assert repr(DEFAULTS) == defaults


def test_schedule_can_be_taken_away_again():
    with_one = {"lr_scheduler": {"class_path": "StepLR", "init_args": {"step_size": 3}}}
    assert compose(with_one, typed("--lr_scheduler", "null"))["lr_scheduler"] is None
    assert compose(with_one, {"lr_scheduler": None})["lr_scheduler"] is None


def test_arguments_without_a_class_are_refused():
    with pytest.raises(ConfigurationError, match=r"lr_scheduler: arguments came \(step_size\)"):
        compose(typed("--lr_scheduler.step_size", "3"))


def test_values_are_kept_as_typed():
    command = read_command_line(["--run_name", "007", "--tracking_uri", "", "--a.b=c=d"])
    assert command.settings == {"run_name": "007", "tracking_uri": "", "a": {"b": "c=d"}}


def test_negative_number_is_a_value():
    assert typed("--optimizer.lr", "-1") == {"optimizer": {"lr": "-1"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello"], '"hello" was not expected'),
        (["--seed_everything"], "seed_everything: a value is missing"),
        (["--seed_everything", "--run_name", "x"], "seed_everything: a value is missing"),
        (["--experiment=x", "--experiment.more=y"], "experiment was given a value"),
    ],
)
def test_command_line_faults_are_told(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        read_command_line(arguments)


def test_all_faults_of_a_command_line_are_told_together():
    with pytest.raises(ConfigurationError) as caught:
        read_command_line(["one", "two", "--seed_everything"])
    assert len(caught.value.faults) == 3


def test_numbers_in_files_may_have_exponents(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("optimizer:\n  class_path: SGD\n  init_args:\n    lr: 1e-3\n")
    assert read_file(file)["optimizer"]["init_args"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", r"is not YAML \(line "),
        ("just words", "holds no settings"),
        ("- a\n- b\n", "holds no settings"),
        ("1: 2\n", "holds no settings"),
    ],
)
def test_file_that_is_no_configuration_is_named(tmp_path, text, message):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_file(file)
    assert "broken.yaml" in str(caught.value)
    assert len(caught.value.faults) == 1


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "tutorial.yaml").touch()
    with pytest.raises(ConfigurationError, match=r"did you mean tutorial\.yaml\?"):
        read_file(tmp_path / "tutorail.yaml")


def test_folder_and_binary_file_cannot_be_read(tmp_path):
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path, binary):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_file(file)


def test_dotted_keys_in_a_file_are_the_nested_ones(tmp_path):
    dotted, nested_ = tmp_path / "dotted.yaml", tmp_path / "nested.yaml"
    dotted.write_text(
        "optimizer.lr: 0.2\noptimizer: AdamW\nmodel.loss: MSELoss\ntrainer.max_epochs: 2"
    )
    nested_.write_text(
        "optimizer: {class_path: AdamW, init_args: {lr: 0.2}}\n"
        "model: {loss: MSELoss}\ntrainer: {max_epochs: 2}"
    )
    assert compose(read_file(dotted)) == compose(read_file(nested_))
    dotted.write_text("optimizer.lr: 0.2")  # of whatever class is in force
    assert compose({"optimizer": "Adam"}, read_file(dotted))["optimizer"] == {
        "class_path": "Adam",
        "init_args": {"lr": 0.2},
    }


def test_value_where_settings_belong_is_refused(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("model: CNN")
    with pytest.raises(ConfigurationError, match="model: a value came where its settings belong"):
        compose(read_file(file))


def test_empty_file_changes_nothing(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert compose(read_file(file)) == compose()


def test_composing_imports_neither_torch_nor_mlflow():
    code = (
        "import sys, research.fit, research.configuration.compose as c;"
        "c.compose(c.read_command_line(['--optimizer', 'SGD']).settings);"
        "print([m for m in ('torch', 'lightning', 'mlflow', 'jsonargparse') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
