"""The command as a person types it: exit codes, words, and what lies in the store afterwards."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from research.fit import HELP, main
from research.tracking.run import Recorder

# MLflow reads its own store with what SQLAlchemy calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[1]
TINY = [
    *("--data", "Synthetic", "--data.num_train", "320", "--data.num_test", "64"),
    *("--model.network.widths", "[4,4,8]", "--model.network.hidden", "8"),
    *("--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
]


PLAIN = ["--log_pictures", "false", "--log_model", "false", "--log_system_metrics", "false"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "research.fit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **more,
    )


def store(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def only_run(folder, experiment="cifar10"):
    client = store(folder)
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    return client, run


# ---- help ----------------------------------------------------------------------------------------


def test_help_is_one_screen_and_needs_no_torch():
    code = (
        "import sys, research.fit; assert research.fit.main(['--help']) == 0;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'mlflow', 'jsonargparse')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == HELP
    assert len(HELP.splitlines()) <= 30
    assert max(len(line) for line in HELP.splitlines()) <= 100


def test_help_names_what_there_is():
    from research.configuration.schema import known_classes

    for key in ("model.network", "model.loss", "optimizer", "lr_scheduler", "data"):
        line = next(line for line in HELP.splitlines() if line.startswith(f"  --{key} "))
        words = line.split("NAME")[1].replace(",", " ").split()
        names = [word for word in words if word[0].isupper() and word != "NAME"]
        assert names
        assert set(names) <= set(known_classes(key))


@pytest.mark.parametrize("topic", ["run", "model", "optimizer", "lr_scheduler", "data", "trainer"])
def test_help_topic_tells_classes_arguments_and_defaults(topic, capsys):
    assert main([f"--help.{topic}"]) == 0
    told = capsys.readouterr().out
    expected = {
        "run": ["--seeds N", "--checkpoint.save_top_k (1): a whole number. how many of the best"],
        "model": ["CNN", "label_smoothing=0.0", "--model.channels_last (True): true or false"],
        "optimizer": ["AdamW", "betas=(0.9, 0.999)"],
        "lr_scheduler": ["OneCycleLR", "step_size"],
        "data": ["Synthetic", "batch_size=64"],
        "trainer": ["--trainer.max_epochs (10): a whole number or null"],
    }[topic]
    assert all(part in told for part in expected)


def test_unknown_help_topic_is_refused(capsys):
    assert main(["--help.optimiser"]) == 2
    assert "did you mean optimizer?" in capsys.readouterr().err


def test_print_config_prints_a_configuration_that_runs(tmp_path, capsys):
    assert main([*TINY, "--print_config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert main(["--config", "printed.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "printed.yaml").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["printed.yaml"]


def test_print_config_with_comments_tells_what_each_setting_is_and_reads_back(tmp_path, capsys):
    """Also texts that some YAML takes for something else: yes, 1e-3, 1_000."""
    odd = ["--run_name", "yes", "--experiment", "1_000", "--optimizer.lr", "1e-7"]
    odd += ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "1e-3"]
    assert main([*TINY, *odd, "--print_config"]) == 0
    plain = capsys.readouterr().out
    assert main([*TINY, *odd, "--print_config=comments"]) == 0
    commented = capsys.readouterr().out
    lines = [line.strip() for line in commented.splitlines()]
    words = [
        ("hidden: 8", "features between the two linear layers."),  # CNN's docstring
        ("log_model: true", "record a model to be served"),
        ("save_top_k: 1", "how many of the best are kept; 0 for none, -1 for every epoch's"),
    ]
    for setting, said in words:
        assert lines[lines.index(setting) - 1].startswith(f"# {said}")
    (tmp_path / "printed.yaml").write_text(commented)
    assert main(["--config", "printed.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == plain


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--trainer", "3"], "error: trainer: a value came where its settings belong"),
        (["--model.loss", "torch.nn.MSELoss"], "error: model.loss: torch.nn.MSELoss is no Class"),
        (["--trainer.precision", "transformer-engine"], "error: trainer: "),
        (["--model.loss", "MSELos"], 'error: model.loss: there is no loss "MSELos"; did you mean'),
        (
            ["--optimizer.lr", "-1"],
            "error: optimizer.lr is -1.0, and SGD takes none such; it must be 0 or more.",
        ),
        (["--data.batch_size", "0"], "error: data.batch_size is 0"),
        (["--config", "nowhere.yaml"], "error: config: there is no file nowhere.yaml"),
        (["--config", "broken.yaml"], "error: config: broken.yaml is not YAML (line "),
        (["--tracking_uri", "file:./mlruns"], "error: --tracking_uri: "),
        (["--data", "CIFAR10"], "error: data"),
        (["--data", "ImageFolder", "--data.root", "one"], "error: data"),
        (["--data", "ImageFolder", "--data.root", "nothing"], "error: data"),
        (["hello"], 'error: "hello" was not expected'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_plain_message_and_exit_code_2(tmp_path, capsys, arguments, start):
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    (tmp_path / "one" / "train" / "cats").mkdir(parents=True)
    small = TINY if "--data" not in arguments else TINY[-4:]
    code = main([*small, "--tracking_uri", "sqlite:///mlflow.db", *arguments])
    told = capsys.readouterr()
    assert code == 2
    assert told.err.startswith(start)
    assert "Traceback" not in told.err
    assert told.out == ""
    assert not (tmp_path / "mlflow.db").exists()


def test_mistake_at_the_terminal_shows_no_traceback():
    process = command("--optimizer", "SGDD", "--tracking_uri", "")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith('error: optimizer: there is no optimizer "SGDD"; did you mean SGD?')
    assert len(err.splitlines()) == 1
    assert out == ""


def test_fault_of_our_own_is_shown_whole(monkeypatch):
    """A ValueError out of torch or Python is a bug, not a mistake of the user's: no hiding it."""
    import research.training

    monkeypatch.setattr(research.training, "fit", lambda *_, **__: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main([*TINY, "--tracking_uri", ""])


# ---- the record ----------------------------------------------------------------------------------


def test_run_is_recorded_whole(tmp_path, capsys, recorder, monkeypatch):
    arguments = ["--tracking_uri", "sqlite:///mlflow.db", "--run_name", "first", "--model.loss"]
    assert main([*TINY, *arguments, "MSELoss"]) == 0
    told = capsys.readouterr()
    client, run = only_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    params = run.data.params
    assert (params["model.loss"], params["optimizer"], params["optimizer.lr"]) == (
        "MSELoss",
        "SGD",
        "0.01",
    )
    assert run.data.tags["seed"] == "0"
    assert "mlflow.source.git.commit" in run.data.tags or not (ROOT / ".git").exists()
    per_epoch = ["train/loss", "train/accuracy", "val/loss", "val/accuracy", "learning_rate"]
    for name in [*per_epoch, "images_per_second", "epoch_seconds"]:
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2], name
    for name in ("test/loss", "test/accuracy"):
        assert len(client.get_metric_history(run.info.run_id, name)) == 1
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert folder.is_relative_to(tmp_path / "mlruns")
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files >= {"config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    # What the person saw is what is recorded.
    assert f"{run.data.metrics['test/accuracy']:.2%}" in told.out
    assert str(folder / "checkpoints" / "best.ckpt") in told.out
    assert run.info.run_id in told.out
    assert "mlflow ui" in told.out
    lines = [line for line in told.err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert all("train loss" in line and "images/s" in line for line in lines)
    # And can be done again.
    monkeypatch.setattr(Recorder, "start", lambda: contextlib.nullcontext(recorder))
    again = ["--config", str(folder / "config.yaml"), "--run_name", "again", *PLAIN]
    assert main(again) == 0
    other = {r.info.run_name: r for r in client.search_runs([run.info.experiment_id])}["again"]
    same = ("train/loss", "val/loss", "val/accuracy", "test/loss", "test/accuracy")
    assert {name: other.data.metrics[name] for name in same} == {
        name: run.data.metrics[name] for name in same
    }


def test_environment_names_the_store_when_the_run_starts(tmp_path, recorder, monkeypatch, capsys):
    import research.training  # noqa: F401  (imported before the variable is set)

    monkeypatch.setattr(Recorder, "start", lambda: contextlib.nullcontext(recorder))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere/mlflow.db")
    assert main([*TINY, *PLAIN, "--experiment", "mine"]) == 0
    _, run = only_run(tmp_path / "elsewhere", "mine")
    assert run.info.status == "FINISHED"


def test_untracked_run_needs_no_mlflow_and_prints_what_is_asked_for(tmp_path):
    """An mlflow that cannot be imported stands first on the path."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "mlflow.py").write_text("raise ImportError('not here')")
    code = (
        "import sys; sys.path.insert(0, 'broken');"
        "from research.fit import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    asked = ["--trainer.profiler", "simple", "--trainer.enable_model_summary", "true"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *TINY, "--tracking_uri", "", "--run_name", "free", *asked],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "checkpoints"]
    assert "run_training_epoch" in ran.stdout + ran.stderr
    assert "Trainable params" in ran.stdout + ran.stderr


def test_exception_leaves_a_failed_run(tmp_path, recorder, monkeypatch):
    from research.classifier import Classifier

    def fail(*_):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(Recorder, "start", lambda: contextlib.nullcontext(recorder))
    monkeypatch.setattr(Classifier, "on_train_epoch_end", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        main([*TINY, "--tracking_uri", "sqlite:///mlflow.db"])
    _, run = only_run(tmp_path)
    assert run.info.status == "FAILED"


def test_ctrl_c_leaves_a_killed_run_and_exit_code_130(tmp_path):
    arguments = ["--tracking_uri", "sqlite:///mlflow.db", "--trainer.max_epochs", "100000"]
    # A shell that starts the tests in the background has them, and their children, ignore Ctrl-C.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = command(*TINY, *arguments, start_new_session=True, preexec_fn=listen)
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped by Ctrl-C" in err
    assert "Traceback" not in err
    _, run = only_run(tmp_path)
    assert run.info.status == "KILLED"


@pytest.mark.faults
def test_sigterm_leaves_a_killed_run_and_exit_code_143(tmp_path):
    arguments = ["--tracking_uri", "sqlite:///mlflow.db", "--trainer.max_epochs", "100000"]
    process = command(*TINY, *arguments)
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM" in err
    assert "Traceback" not in err
    assert only_run(tmp_path)[1].info.status == "KILLED"


@pytest.mark.slow
def test_two_devices_make_one_run_and_one_table(tmp_path):
    arguments = ["--tracking_uri", "sqlite:///mlflow.db", "--trainer.devices", "2"]
    process = command(*TINY, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("accuracy") == 1
    assert only_run(tmp_path)[1].info.status == "FINISHED"


@pytest.mark.faults
def test_killed_process_leaves_no_running_run(tmp_path):
    arguments = ["--tracking_uri", "sqlite:///mlflow.db", "--trainer.max_epochs", "100000"]
    process = command(*TINY, *arguments)
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    process.kill()
    process.communicate()
    until = time.monotonic() + 30
    while (status := only_run(tmp_path)[1].info.status) == "RUNNING" and time.monotonic() < until:
        time.sleep(0.2)
    assert status == "KILLED"
