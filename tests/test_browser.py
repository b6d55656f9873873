"""What a person sees: a dozen runs, and one of them, in a bare `mlflow ui` in headless Chromium.

`SCREENSHOTS=FOLDER nox -s browser` keeps a picture of every page.
"""

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

from tests.conftest import SMALL

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
QUICK = [*SMALL, "--data.difficulty", "0.2"]
PICTURES = [
    *("network.svg", "training_batch.png", "learning_curves.png", "confusion_matrix.png"),
    *("mistakes.png", "calibration.png", "feature_maps.png", "filters.png"),
]
FILES = {  # and a word that the preview shows
    "config.yaml": "seed_everything",
    "network.txt": "Conv2d",
    "environment/requirements.txt": "torch==",
    "environment/machine.yaml": "cpu",
    "test/classes.csv": "crescent",
}
# Losses, optimizers and learning rates; what takes long is left to the run that is typed.
ELEVEN_RUNS = """
import sys
from research.configuration.schema import resolve
from research.tracking.run import Recorder
from research.training import fit

rates = {"SGD": ["0.01", "0.1", "0.3"], "AdamW": ["3e-4", "1e-3", "3e-3"]}
losses = ["CrossEntropyLoss", "MSELoss", "MultiMarginLoss"]
chosen = [(loss, o, rate) for loss in losses for o in rates for rate in rates[o]]
chosen = chosen[:10] + [("MultiMarginLoss", "SGD", "0.01")]
with Recorder.start() as recorder:
    for loss, optimizer, rate in chosen:
        name = f"{loss.removesuffix('Loss')} {optimizer} {rate}"
        flags = ["--model.loss", loss, "--optimizer", optimizer, "--optimizer.lr", rate]
        flags += ["--run_name", name, "--log_model", "false", "--log_pictures", "false"]
        fit(resolve([*sys.argv[1:], *flags]), recorder)
"""
PLOT = """
    const plot = document.querySelector('.pcp-plot.js-plotly-plot, .pcp-plot .js-plotly-plot')
        || [...document.querySelectorAll('.js-plotly-plot')].find(p => p.data);
    const data = plot && plot.data;
    return data && ({})
"""


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
    for flag in [*flags.split(), *quiet.split(), "window-size=1800,1200"]:
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


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with a dozen runs; its root is where `mlflow ui` is typed."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("research", "experiments", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "mlruns").mkdir()
    (folder / "eleven.py").write_text(ELEVEN_RUNS)
    run(folder, "eleven.py", *QUICK)
    return folder


@pytest.fixture(scope="module")
def route(project):
    """Where the page shows the one run that was typed and has pictures and a model."""
    told = run(project, "-m", "research.fit", *QUICK, "--run_name", "look-at-me")
    page = next(line for line in told.splitlines() if line.startswith("show it:"))
    assert "mlflow ui  # then open http://127.0.0.1:5000/#/experiments/" in page
    return page.rpartition("#/")[2].partition("?")[0]


@pytest.fixture(scope="module")
def browser(project, route, tmp_path_factory):
    """Chromium, and the address of the bare page of the project."""
    with mlflow_ui(project) as address, chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(address)
        # The assistant opens by itself, over a third of the page, in a browser it does not know.
        keys = ("fab.autoOpenedOnFirstLoad_v1", "true"), ("panelOpen_v1", "false")
        for key, value in keys:
            driver.execute_script(f"localStorage['mlflow.assistant.{key}'] = '{value}'")
        yield driver, address


@pytest.fixture
def look(browser, route, tmp_path):
    """Opens a page of the run, or the experiment's, once it shows what is waited for."""
    driver, address = browser

    def open_page(path, *texts):
        experiment = route.partition("/runs/")[0]
        place = f"{experiment}{path}" if path.startswith(("/runs", "/models")) else route + path
        driver.get("about:blank")  # so that the same page is loaded anew
        driver.get(f"{address}/#/{place}")
        wait_for_text(driver, *texts)
        return driver

    return open_page


@pytest.fixture
def save(browser, tmp_path):
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    return lambda name: browser[0].save_screenshot(str(folder / f"{name}.png"))


def run(folder, *arguments):
    environment = {name: v for name, v in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def eventually(driver, script, *arguments, seconds=60):
    """What `script` returns in the page, once that is true."""
    until = time.monotonic() + seconds
    while not (found := driver.execute_script(script, *arguments)):
        assert time.monotonic() < until, f"never true in the page: {script}"
        time.sleep(0.5)
    return found


def click(driver, selector, text=""):
    """Click the first element there that has this text."""
    script = """
        const [selector, text] = arguments;
        const found = [...document.querySelectorAll(selector)]
            .find(element => !text || element.textContent.trim() === text);
        if (found) found.click();
        return Boolean(found);
    """
    eventually(driver, script, selector, text, seconds=20)


def press(driver, text):
    """As a mouse does it: tabs and artifacts listen to more than a click."""
    from selenium.webdriver.common.by import By

    words = f"//*[normalize-space(text())='{text}']"
    until = time.monotonic() + 20
    while True:
        try:
            driver.find_elements(By.XPATH, words)[-1].click()
            return
        except Exception:
            assert time.monotonic() < until, f"{text} cannot be pressed"
            time.sleep(0.5)


def test_runs_show_their_data_and_models(look, save):
    driver = look("/runs", "look-at-me", "12 matching runs", "Synthetic (")
    grid = "document.querySelector('.ag-body-horizontal-scroll-viewport')"
    eventually(
        driver, f"{grid}.scrollLeft = 9999; return true"
    )  # columns out of sight are not there
    models = "return [...document.querySelectorAll('[col-id*=Models]')].map(e => e.innerText)"
    eventually(driver, models + ".some(text => /best|last/.test(text))")
    save("runs")


def test_the_saved_view_lists_settings_beside_figures(look, save):
    driver = look("/runs?viewStateShareKey=comparison", "look-at-me", "12 matching runs")
    wait_for_text(driver, "Loss, optimizer, learning rate", "Sort: test/accuracy")
    headers = eventually(
        driver,
        """const shown = [...document.querySelectorAll('[role=columnheader]')]
            .map(header => header.textContent.trim());
        return shown.includes('test/accuracy') && shown""",
    )
    assert {"test/accuracy", "val/accuracy"} <= set(headers)
    save("view")


def test_compare_opens_with_what_was_varied(look, save):
    driver = look("/runs", "look-at-me", "12 matching runs")
    click(driver, "input[aria-label='Select all runs']")
    click(driver, "button", "Compare")
    wait_for_text(driver, "Comparing 12 Runs from 1 Experiment", "Parallel Coordinates Plot")
    axes = eventually(driver, PLOT.format("data[0].dimensions.map(axis => axis.label)"))
    assert axes == ["Learning rate", "Loss", "Optimizer", "val/accuracy"]
    values = driver.execute_script(PLOT.format("data[0].dimensions.map(axis => axis.values)"))
    assert [len(column) for column in values] == [12] * 4
    rates, losses, optimizers, accuracies = values
    assert len(set(rates)) == 6  # numbers, not names
    assert max(rates) == 0.3
    assert (len(set(losses)), len(set(optimizers))) == (3, 2)
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    drawn = "return [...document.querySelectorAll('.pcp-plot canvas')].some(c => c.width > 0)"
    assert eventually(driver, drawn)
    save("compare")
    press(driver, "Scatter Plot")
    points = eventually(driver, PLOT.format("data[0].x && [data[0].x, data[0].y]"))
    assert {float(rate) for rate in points[0]} == set(rates)
    assert all(0 <= accuracy <= 1 for accuracy in points[1])
    wait_for_text(driver, "Learning rate", "best_val/accuracy")
    save("scatter")
    shown = driver.find_element("tag name", "body").text
    for name in ("Learning rate", "model.loss.label_smoothing", "optimizer.momentum"):
        assert name in shown
    assert "trainer.limit_train_batches" in shown
    click(driver, "button[role=switch]")  # show what differs only
    hidden = "return !document.body.innerText.includes('trainer.limit_train_batches')"
    assert eventually(driver, hidden)
    shown = driver.find_element("tag name", "body").text
    assert "optimizer.momentum" in shown
    assert "MultiMarginLoss" in shown


def test_charts_draw_bars_of_test_figures_and_curves_of_the_others(look, save):
    driver = look("/runs?compareRunsMode=CHART", "look-at-me", "12 matching runs", "best_val")
    kinds = """
        const plots = [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.data);
        const bars = plots.filter(p => p.data.some(trace => trace.type === 'bar'));
        return bars.length > 1 && bars.map(p => p.data[0].x.length)
    """
    assert eventually(driver, kinds)[0] == 10  # the first ten runs are shown
    save("charts")


def test_run_tells_what_it_was_and_what_came_of_it(look, save):
    driver = look("", "look-at-me", "Finished", "Datasets", "Synthetic (", "fingerprint")
    for text in (
        "Learning rate",
        "optimizer.lr",
        "test/accuracy",
        "Logged models",
        "checkpoint.best",
    ):
        eventually(driver, f"return document.body.textContent.includes({text!r})")
    save("run")


def test_curves_stand_on_an_axis_of_epochs(look, save):
    driver = look("/model-metrics", "look-at-me", "best_val", "test")
    epochs = """
        document.querySelectorAll('main *').forEach(e => e.scrollTop += 500);
        for (const plot of document.querySelectorAll('.js-plotly-plot'))
            for (const trace of plot.data || [])
                if (trace.type.startsWith('scatter') && trace.x.length > 1) return [...trace.x];
    """
    assert eventually(driver, epochs) == [1, 2]
    save("metrics")


def test_system_metrics_are_drawn(look, save):
    driver = look("/system-metrics", "look-at-me", "cpu_utilization")
    eventually(driver, "return document.querySelectorAll('.js-plotly-plot').length > 2")
    save("system")


def test_files_are_previewed(look, save):
    driver = look("/artifacts", "look-at-me", "config.yaml", "network.txt")
    for path, text in FILES.items():
        for name in path.split("/"):
            press(driver, name)
        wait_for_text(driver, text, seconds=30)
        save(path.replace("/", "-"))


def test_pictures_are_previewed(look, save):
    driver = look("/artifacts", "look-at-me", "pictures")
    press(driver, "pictures")
    shown = set()
    new = """
        const shown = arguments[0];
        const image = [...document.images]
            .find(image => image.naturalWidth > 300 && !shown.includes(image.src));
        return image && [image.src, image.naturalWidth]
    """
    for picture in PICTURES:
        press(driver, picture)
        source, width = eventually(driver, new, list(shown), seconds=30)
        shown.add(source)
        assert 300 < width < 3000
        save(Path(picture).stem)


def test_models_are_those_of_the_run(look, save):
    driver = look("/models", "best", "last", "look-at-me", "Ready")
    click(driver, "a", "best")
    wait_for_text(driver, "look-at-me", "Ready", "test/accuracy", "optimizer")
    save("model")
