"""What a person sees: a run, in a bare `mlflow ui`, in headless Chromium."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def mlflow_ui(folder):
    """The address of `mlflow ui` started in `folder` with no flag but its port."""
    port = free_port()
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_WORKERS": "1"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # 2 processes instead of 15
    environment.pop("MLFLOW_TRACKING_URI", None)
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "ui", "--port", str(port)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            assert server.poll() is None, "mlflow ui ended by itself"
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(30)


@contextlib.contextmanager
def chromium(profile):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-quic"
    quiet = "disable-background-networking disable-component-update disable-sync"
    for flag in [*flags.split(), *quiet.split(), "window-size=1500,1100"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.binary_location = shutil.which("chromium") or "/usr/bin/chromium"
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait_for_text(driver, *texts, seconds=90):
    """Wait until the page shows all of them; what is missing is told."""
    from selenium.webdriver.common.by import By

    missing = list(texts)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            shown = driver.find_element(By.TAG_NAME, "body").text
            missing = [text for text in texts if text not in shown]
            if not missing:
                return
        time.sleep(0.5)
    raise AssertionError(f"the page never showed {missing}; it showed {shown[:2000]}")


def test_run_shows_in_a_bare_mlflow_ui(tmp_path):
    # A copy of the project: its root is where `mlflow.db` goes and where `mlflow ui` is typed.
    for name in ("research", "experiments", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "mlruns").mkdir()
    environment = {name: v for name, v in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    arguments = ["--data", "Synthetic", "--data.num_train", "320", "--data.num_test", "64"]
    arguments += ["--trainer.max_epochs", "2", "--run_name", "look-at-me"]
    ran = subprocess.run(
        [sys.executable, "-m", "research.fit", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    page = next(line for line in ran.stdout.splitlines() if line.startswith("show it:"))
    assert "mlflow ui  # then open http://127.0.0.1:5000/#/experiments/" in page
    route = page.rpartition("#/")[2]
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with mlflow_ui(tmp_path) as address, chromium(tmp_path / "profile") as driver:
        experiment = route.partition("/runs/")[0]
        driver.get(f"{address}/#/{experiment}/runs")
        wait_for_text(driver, "look-at-me", "cifar10")
        driver.save_screenshot(str(pictures / "runs.png"))
        driver.get(f"{address}/#/{route}")
        wait_for_text(driver, "look-at-me", "optimizer.lr", "test/accuracy", "Finished")
        driver.save_screenshot(str(pictures / "run.png"))
        driver.get(f"{address}/#/{route}/model-metrics")
        wait_for_text(driver, "Model metrics", "train", "val")
        time.sleep(3)  # the curves are drawn after their titles
        driver.save_screenshot(str(pictures / "metrics.png"))
        driver.get(f"{address}/#/{route}/artifacts")
        wait_for_text(driver, "checkpoints", "config.yaml")
        driver.save_screenshot(str(pictures / "artifacts.png"))
