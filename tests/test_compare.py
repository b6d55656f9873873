"""The command: what may be typed, what it prints, where its report is, what it trains."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, Adam

from research import compare
from research.comparison.conducting import arm_of_file
from research.comparison.publishing import begun_with
from research.comparison.training import RECORDED, Means, configured, is_never_recorded
from research.configuration.compose import read_command_line
from research.evaluation import Predictions, judge
from research.statistics.arms import Trained
from research.tracking import store as store_module
from research.tracking.arms import read
from research.tracking.runs import find_all_tagged, find_run
from tests.recorded import Store, make_store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's of SQLAlchemy

TINY = """
seed_everything: 0
model: {network: {class_path: CNN, init_args: {widths: [4, 4, 8], hidden: 8}}}
optimizer: {class_path: Adam, init_args: {lr: 0.005}}
data: {class_path: Synthetic, init_args: {num_train: 320, num_test: 64}}
trainer: {max_epochs: 1, accelerator: cpu, precision: 32-true}
log_pictures: false
log_model: false
log_system_metrics: false
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in (("one", TINY), ("other", TINY.replace("Adam", "SGD"))):
        Path(f"{name}.yaml").write_text(text)
    return tmp_path


# ---- what is typed -------------------------------------------------------------------------------


def test_help_is_one_screen_that_names_every_option_and_imports_nothing_slow():
    code = (
        "import sys; from research import compare; compare.main(['--help']); "
        "print(sorted({'torch', 'mlflow', 'scipy', 'matplotlib', 'lightning'} & {*sys.modules}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, imported = told.stdout.splitlines()
    assert imported == "[]"
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    for option in (*compare.VALUES, *compare.PLACES, *compare.SWITCHES, "expect"):
        assert f"--{option}" in told.stdout


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ([], ""),
        (["--metric", "val/accuracy"], "Nothing was named"),
        (["a", "b", "--metrc", "x"], "did you mean --metric?"),
        (["a", "b", "--metric"], "--metric: a value is missing"),
        (["a", "one.yaml"], "Files are trained and runs are read"),
        (["one.yaml"], "one.yaml is a single arm"),
        (["one.yaml", "ther.yaml"], "there is no file ther.yaml; did you mean other.yaml?"),
        (["a", "b", "--noise"], "--noise is of one, and 2 were named"),
        (["one.yaml", "other.yaml", "--confirm", "2"], "name the search alone"),
        (["a", "--confirm", "0"], "confirm: expected a whole number from 1 on, or each"),
        (["a", "b", "--seeds", "3"], "seeds: they are for what is trained"),
        (["one.yaml", "other.yaml", "--seeds", "x"], "seeds: expected how many"),
        (["a", "b", "--runs", "3"], "runs: it is for --noise"),
        (["a", "b", "--workers", "2"], "workers: it is for what is trained"),
        (["a", "b", "--allow_changes"], "allow_changes: it is for what is trained"),
        (["a", "--noise", "--baseline", "a"], "baseline: it is for a comparison, and --noise has"),
        (["a", "--noise", "--margin", "0.1"], "margin: it is for a comparison"),
        (["a", "--noise", "--expect", "data"], "expect: it is for a comparison"),
        (["a", "--noise", "--cross_losses"], "cross_losses: it is for a comparison"),
        (["a", "--noise=1"], "--noise: it takes no value; write --noise alone. How many runs is"),
        (["a", "b", "--trust=1"], "--trust: it takes no value; write --trust alone."),
        (["a", "--noise", "--metric", "test/accuracy"], "unseen; choose val/accuracy"),
        (["one.yaml", "other.yaml", "--expect", "optimzer"], "did you mean optimizer?"),
        (["one.yaml", "other.yaml", "--metric", "val/acuracy"], "did you mean val/accuracy?"),
        (["one.yaml", "--noise", "--metric", "acc"], "metric: no training records acc"),
        (
            ["one.yaml", "other.yaml", "--metric", "val/loss", "--data.val_fraction", "0"],
            "metric: val/loss is never measured, for one has no validation",
        ),
        (["a", "b", "--level", "95"], "level: expected a number between 0 and 1"),
        (["a", "b", "--margin", "-1"], "margin: expected a number above 0"),
        (["a", "b", "--optimizer.lr", "1"], "Settings are for files"),
        (["a", "b", "--tracking_uri", ""], "no store to compare runs of"),
        (["one.yaml", "other.yaml", "--print_config"], "print_config: it is for python -m"),
        (["one.yaml", "other.yaml", "--baseline", "othr"], "did you mean other? There are one, ot"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(here, typed, told, capsys):
    assert compare.main(typed) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert all(line.startswith("error: ") for line in said.err.splitlines())


def test_names_that_training_records_are_known_before_and_ones_own_are_let_through():
    predictions = Predictions(torch.eye(3), torch.arange(3))
    for name in judge(predictions, ["cat", "dog", "ship"]):
        assert not is_never_recorded(f"test/{name}")
    assert not is_never_recorded("val/top3_accuracy")
    for misspelt in ("val/acuracy", "accuracy", "test/macro_f", "train/los", "val/"):
        assert is_never_recorded(misspelt)


def test_file_may_name_known_classes_only_also_beside_a_store_of_ones_own(
    here, monkeypatch, capsys
):
    (here / "strange.py").write_text(
        "import torch\nprint('it ran')\nclass Mine(torch.optim.SGD):\n    pass\n"
    )
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr(store_module, "project_root", lambda: here)  # its store is one's own
    Path("bad.yaml").write_text(TINY.replace("class_path: Adam", "class_path: strange.Mine"))
    assert compare.main(["one.yaml", "bad.yaml", "--seeds", "1"]) == 2
    said = capsys.readouterr()
    assert "strange.Mine" in said.err and "--trust" in said.err
    assert "it ran" not in said.out


def test_settings_typed_for_all_are_laid_over_each_file(here):
    Path("more.yaml").write_text("trainer: {max_epochs: 7}\noptimizer: {init_args: {lr: 0.5}}\n")
    typed = read_command_line(["--config", "more.yaml", "--trainer.max_epochs", "3"])
    means = Means("sqlite:///x.db", None, "")
    for name, optimizer in (("one", Adam), ("other", SGD)):
        configuration = configured(typed, Path(f"{name}.yaml"), means)
        assert configuration.classes["optimizer"] is optimizer
        assert configuration.arguments("optimizer")["lr"] == 0.5
        assert configuration.values.trainer.max_epochs == 3


@pytest.mark.parametrize("typed", ["one", "one.yaml", "./one.yaml"])
def test_file_is_a_baseline_as_it_was_typed(here, typed):
    assert arm_of_file(typed, [Path("other.yaml"), Path("one.yaml")]) == "one"


def test_same_file_twice_is_refused_and_files_of_one_name_go_by_their_folders(here):
    from research.comparison.training import names_of
    from research.configuration.compose import ConfigurationError

    assert names_of([Path("a/x.yaml"), Path("b/x.yaml")]) == ["a/x", "b/x"]
    assert names_of([Path("a/x.yaml"), Path("b/y.yaml")]) == ["x", "y"]
    with pytest.raises(ConfigurationError, match="The same file was named twice"):
        names_of([Path("a/x.yaml"), Path("a/x.yaml")])


# ---- what it prints and leaves -------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def parent(store) -> str:
    parent = store.run("sgd vs adam", None)
    for arm, plus in (("sgd", 0.0), ("adam", 0.05)):
        for seed in range(6):
            value = 0.5 + seed % 3 / 100 + plus * (1 + seed / 50)
            store.run(f"{arm} seed {seed}", seed, value, value, curve=[0.3, value], parent=parent,
                      tags={"arm": arm}, settings={"optimizer": arm})  # fmt: skip
    return parent


def test_verdict_is_printed_first_and_the_report_is_written_and_recorded(
    here, store, parent, capsys
):
    assert compare.main([parent, "--tracking_uri", store.uri]) == 0
    told = capsys.readouterr().out
    assert told.startswith("adam is better than sgd: +5.25 points (95 % ")
    page = here / "comparisons" / "sgd-vs-adam" / "report.html"
    assert f"report:   {page.relative_to(here)}" in told
    assert "adam is better than sgd" in page.read_text()
    run = find_run(store.uri, parent)
    assert run.tags["comparison.verdict"].startswith("adam is better than sgd")
    assert run.tags["mlflow.note.content"] == f"**{run.tags['comparison.verdict']}**\n"
    assert run.file("comparison/report.html").read_text() == page.read_text()
    assert run.file("comparison/figures/arms.svg").stat().st_size > 0


def test_page_of_the_parent_begins_with_the_last_verdict_above_what_it_said_before():
    before = {"mlflow.note.content": "| seed | accuracy |\n"}
    first = begun_with("B is better.", before)
    assert first == "**B is better.**\n\n| seed | accuracy |\n"
    again = begun_with(
        "A is.", {"mlflow.note.content": first, "comparison.verdict": "B is better."}
    )
    assert again == "**A is.**\n\n| seed | accuracy |\n"


def test_options_reach_the_verdict_and_single_runs_are_not_recorded_on(here, store, parent, capsys):
    ids = [one.trained.run_id for one in read(store.uri, parent).runs]
    more = ["--metric", "val/accuracy", "--level", "0.9", "--output", "there", "--baseline", "adam"]
    more += ["--expect", "optimizer", "--tracking_uri", store.uri]
    assert compare.main([*ids, *more]) == 0
    told = capsys.readouterr().out
    assert told.startswith("sgd is worse than adam: -5.25 points (90 % ")
    assert "Decided by val/accuracy (higher is better): as asked." in told
    assert "recorded:" not in told
    assert (here / "there" / "report.md").is_file()


def test_unknown_run_is_told_with_the_nearest(here, store, parent, capsys):
    assert compare.main(["sgd sed 0", parent, "--tracking_uri", store.uri]) == 2
    assert "The nearest: sgd seed 0" in capsys.readouterr().err


# ---- what it trains ------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_are_trained_on_the_same_seeds_and_pairs_began_alike(here, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/mlflow.db")
    typed = [
        "one.yaml",
        "other.yaml",
        "--seeds",
        "2",
        "--workers",
        "1",
        "--trainer.max_epochs",
        "2",
    ]
    assert compare.main(typed) == 0
    told = capsys.readouterr().out
    assert "n=2 pairs" in told and "no hash" not in told and "differ in their" not in told
    assert "Decided by test/accuracy" in told
    run = find_run(f"sqlite:///{here}/mlflow.db", "one vs other")
    assert "comparison.verdict" in run.tags
    found = read(run.tracking_uri, run.run_id)
    assert {(one.arm, one.trained.seeds["weights"]) for one in found.runs} == {
        ("one", 0), ("one", 1), ("other", 0), ("other", 1)
    }  # fmt: skip
    assert all(one.trained.settings["trainer.max_epochs"] == 2 for one in found.runs)
    names = {name for one in found.runs for name in one.trained.metrics}
    assert {each for each in names if not each.startswith("test/accuracy/")} == {*RECORDED}
    # Read again, nothing is trained and the verdict is the same.
    assert compare.main([run.run_id]) == 0
    assert capsys.readouterr().out.splitlines()[0] == told.splitlines()[0]


@pytest.mark.slow
def test_best_of_a_search_is_trained_again_on_fresh_seeds_and_tested_once(
    here, monkeypatch, capsys
):
    from research import sweep

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/mlflow.db")
    Path("small.yaml").write_text(
        "name: small\nbase: one.yaml\nspace: {optimizer.lr: log 1e-3..1e-1}\n"
        "budget: {trials: 3}\nsampler: RandomSampler\n"
    )
    assert sweep.main(["small.yaml", "--workers", "1"]) == 0
    assert compare.main(["small", "--confirm", "2", "--seeds", "2", "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "tested once" in told and "more than one thing" not in told
    uri = f"sqlite:///{here}/mlflow.db"
    search = read(uri, find_run(uri, "small").run_id)
    confirmed = read(uri, find_run(uri, "small confirmed").run_id)
    assert {one.trained.test_looks for one in search.runs} == {0}
    assert {one.trained.test_looks for one in confirmed.runs} == {1}
    assert {one.trained.seeds["weights"] for one in confirmed.runs} == {1000, 1001}
    ranked = sorted(search.runs, key=lambda one: -one.trained.metrics["val/accuracy"])
    best = {one.trained.settings["optimizer.lr"] for one in ranked[:2]}
    assert {one.trained.settings["optimizer.lr"] for one in confirmed.runs} == best
    # How the search came by them stands beside.
    assert "## Learning rates" in Path("comparisons/small-confirmed/report.md").read_text()


@pytest.mark.slow
def test_what_was_confirmed_before_is_neither_trained_nor_tested_again(here, monkeypatch, capsys):
    from research import sweep

    uri = f"sqlite:///{here}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    Path("small.yaml").write_text(
        "name: small\nbase: one.yaml\nspace: {optimizer.lr: log 1e-3..1e-1}\n"
        "budget: {trials: 4}\nsampler: RandomSampler\n"
    )
    assert sweep.main(["small.yaml", "--workers", "1"]) == 0

    def runs() -> dict[str, Trained]:
        parents = find_all_tagged(uri, {"confirms": find_run(uri, "small").run_id})
        below = [one.trained for parent in parents for one in read(uri, parent.run_id).runs]
        return {run.run_id: run for run in below}

    def confirmed(*typed: str) -> str:
        assert compare.main(["small", "--confirm", *typed, "--workers", "1"]) == 0
        said = capsys.readouterr()
        return said.out + said.err

    confirmed("2", "--seeds", "1")
    first = runs()
    assert len(first) == 2
    told = confirmed("4", "--seeds", "1")
    second = runs()
    assert len(second) == 4 and set(first) < set(second)
    assert "2 of 4 configurations were confirmed before" in told
    told = confirmed("3", "--seeds", "2")  # the second seed of three is new
    third = runs()
    assert len(third) == 7 and set(second) < set(third)
    assert "3 of 3 configurations were confirmed before" in told and "n=2 pairs" in told
    confirmed("4", "--seeds", "1")
    assert set(runs()) == set(third)
    assert {run.test_looks for run in third.values()} == {1}
    names = {
        run.run_name for run in find_all_tagged(uri, {"confirms": find_run(uri, "small").run_id})
    }
    assert names == {"small confirmed", "small confirmed 2"}


@pytest.mark.slow
def test_noise_is_split_by_source_and_says_what_can_be_read(here, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/mlflow.db")
    assert compare.main(["one.yaml", "--noise", "--runs", "9", "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "with 3 seeds each, a difference below" in told
    rows = [line.split()[0] for line in told.splitlines() if line]
    assert {"weights", "order", "hardware", "all"} <= {*rows}
    uri = f"sqlite:///{here}/mlflow.db"
    runs = [one.trained for one in read(uri, find_run(uri, "one noise").run_id).runs]
    assert len(runs) == 9 and {run.test_looks for run in runs} == {0}
    assert not any(name.startswith("test/") for run in runs for name in run.metrics)
    assert (here / "comparisons" / "one-noise" / "report.html").is_file()
