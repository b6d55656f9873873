"""Eight trainings that start at the same moment where there is nothing yet: no store, no cache."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from research.data.image_folder import ImageFolder
from research.tracking.store import sqlite_uri

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's of SQLAlchemy
]

PROJECT = Path(__file__).resolve().parents[1]
PROCESSES = 8
SECONDS = 600.0
TINY = [
    *("--model.network.widths", "[4,4,8]", "--model.network.hidden", "8"),
    *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--log_pictures", "false", "--log_model", "false"),
]
SYNTHETIC = ["--data", "Synthetic", "--data.num_train", "160", "--data.num_test", "40"]
CLASSES = ("dark", "light")
PICTURES = 40  # of each class


def start_together(folder, *arguments):
    """Run PROCESSES trainings in `folder` to their good end; each cache that was seen meanwhile."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    database = folder / "runs" / "mlflow.db"
    command = [sys.executable, "-m", "research.fit", *TINY, *arguments]
    command += ["--tracking_uri", sqlite_uri(database), "--experiment", "together"]
    logs = [folder / f"{number}.log" for number in range(PROCESSES)]
    running = []
    for log in logs:
        with open(log, "wb") as output:
            running.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
    seen = set()
    deadline = time.monotonic() + SECONDS
    try:
        while any(process.poll() is None for process in running):
            assert time.monotonic() < deadline, f"not at an end after {SECONDS:.0f} s"
            for cache in folder.glob("pictures/.cache/*.npz"):
                state = cache.stat()
                seen.add((cache, state.st_ino, state.st_mtime_ns))
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()
            process.wait()
    codes = [process.returncode for process in running]
    assert codes == [0] * PROCESSES, "\n".join(log.read_text() for log in logs)
    return seen


def runs_of(database):
    """All runs of the store; it has no experiment but MLflow's own and the one asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(sqlite_uri(database))
    experiments = {found.name: found.experiment_id for found in client.search_experiments()}
    assert set(experiments) == {"Default", "together"}
    assert list(client.search_runs([experiments["Default"]])) == []
    return list(client.search_runs([experiments["together"]]))


def check_runs(database):
    runs = runs_of(database)
    assert [run.info.status for run in runs] == ["FINISHED"] * PROCESSES
    for run in runs:
        assert {"train/loss", "val/loss", "test/accuracy"} <= set(run.data.metrics)
        files = database.parent / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts"
        assert Path(run.info.artifact_uri) == files
        assert (files / "config.yaml").stat().st_size > 0
        assert (files / "checkpoints" / "best.ckpt").stat().st_size > 0
    # The same settings and the same seed: nobody was disturbed by another.
    assert len({run.data.metrics["test/loss"] for run in runs}) == 1
    left = {path.name for path in database.parent.iterdir()}
    assert left - {"mlflow.db.lock"} == {"mlflow.db", "mlruns"}


def test_eight_first_starts_share_one_store_and_one_experiment(tmp_path):
    start_together(tmp_path / "empty", *SYNTHETIC)
    check_runs(tmp_path / "empty" / "runs" / "mlflow.db")


def test_eight_first_starts_decode_a_folder_once_and_all_use_it(tmp_path):
    root = tmp_path / "cold" / "pictures"
    random = np.random.default_rng(0)
    expected = []
    for label, name in enumerate(CLASSES):
        (root / "train" / name).mkdir(parents=True)
        for number in range(PICTURES):
            pixels = random.integers(128 * label, 128 * label + 128, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number:03}.png")
            expected.append(pixels)

    seen = start_together(tmp_path / "cold", "--data", "ImageFolder", "--data.root", str(root))

    check_runs(tmp_path / "cold" / "runs" / "mlflow.db")
    ((cache, _, made_at),) = seen
    assert {path.name for path in cache.parent.iterdir()} - {"pictures.lock"} == {"pictures.npz"}
    folder = ImageFolder(root=str(root))
    folder.prepare_data()
    learn, test = folder.read()
    assert cache.stat().st_mtime_ns == made_at  # whole: nobody needs to make it again
    images = np.concatenate([learn.images.numpy(), test.images.numpy()])
    kept = {image.transpose(1, 2, 0).tobytes() for image in images}
    assert kept == {pixels.tobytes() for pixels in expected}
    assert len(images) == len(CLASSES) * PICTURES
