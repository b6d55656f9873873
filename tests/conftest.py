"""What the tests share: a small fast experiment, and a machine that looks the same to all."""

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from research.tracking.run import Recorder, Run

SMALL = [
    *("--data", "Synthetic", "--data.num_train", "320", "--data.num_test", "64"),
    *("--model.network.widths", "[4,4,8]", "--model.network.hidden", "8"),
    *("--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.precision", "32-true"),  # else the processor chooses, and figures with it
]


# A shell that starts the tests in the background has them, and their children, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread_and_no_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Threads make small networks slower; a store named by the environment is not for tests.

    What waits for a store lies in a folder of the tests, not in the project.
    """
    monkeypatch.setenv("RESEARCH_SPOOL", str(tmp_path_factory.getbasetemp() / "spool"))
    torch.set_num_threads(1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def small(tmp_path, monkeypatch) -> Callable[..., Any]:
    """A configuration of a network and a data set that train in a second, nothing recorded."""
    from research.configuration.schema import resolve

    monkeypatch.chdir(tmp_path)

    def configure(*arguments: str, base: Sequence[str] = SMALL):
        return resolve([*base, "--tracking_uri", "", *arguments])

    return configure


@pytest.fixture(scope="module")
def recorder() -> "Iterator[Recorder]":
    """For what does not depend on how a recorder starts, which takes two seconds."""
    from research.tracking.run import Recorder

    with Recorder.start() as recorder:
        yield recorder


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that the tests of a file share, for it takes a second to make."""
    from research.tracking.store import sqlite_uri

    return sqlite_uri(tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture
def start(recorder: "Recorder", uri: str, request: pytest.FixtureRequest) -> Callable[..., "Run"]:
    """Starts a run in an experiment of the test's own."""

    def start(**settings: Any) -> "Run":
        return recorder.start_run(uri, request.node.name, **settings)

    return start
