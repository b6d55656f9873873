"""MLflow's system metrics of this machine, as records like any other.

MLflow's own SystemMetricsMonitor asks the store for the run's status at each sample, writes past
our delivery and holds up whoever stops it; its monitors of CPU, memory, disk, network and GPU are
used here, and what they find goes into the inbox. Together with its delivery to SQLite that takes
0.2 % of a core.

`python -m research.tracking.monitoring` prints them as JSON lines until its standard input ends:
on the other machines of a run, where nobody else imports MLflow.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

FIRST_SECONDS = 1.0
INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
Rows = list[tuple[str, float, int, int]]  # name, value, step, milliseconds


def sampling_interval(elapsed: float) -> float:
    """Seconds until the next sample of a run that is `elapsed` seconds old.

    5 s in the first quarter of an hour, later half a percent of the time that has passed, at most a
    minute: a run of a week leaves 11,000 samples of 8 metrics.
    """
    return min(max(5.0, elapsed / 200), 60.0)


def start_sampling(put: Callable[[Rows], None], first_step: int = 0) -> Callable[[], None]:
    """Call `put` with one sample after the other, in a thread; returns what ends that.

    Samples count from `first_step`: a run that goes on has some already.

    Nothing comes where psutil, which MLflow measures with, is not installed.
    """
    ended = threading.Event()
    threading.Thread(target=_sample, args=(put, ended, first_step), daemon=True).start()
    return ended.set


def _sample(put: Callable[[Rows], None], ended: threading.Event, step: int) -> None:
    with contextlib.suppress(Exception):  # a driver that fails later must not be heard of
        monitors = _monitors()
        _collect(monitors)  # MLflow's figure of the CPU is the mean since the sample before
        interval = min(FIRST_SECONDS, _fixed_interval() or FIRST_SECONDS)
        began = time.monotonic()
        while monitors and not ended.wait(interval):
            at = int(1000 * time.time())
            put([(f"system/{name}", value, step, at) for name, value in _collect(monitors)])
            step += 1
            interval = _fixed_interval() or sampling_interval(time.monotonic() - began)


def _fixed_interval() -> float | None:
    from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

    return MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get()


def _monitors() -> list[Any]:
    """MLflow's monitors of all that can be measured here."""
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor
    except ImportError:  # psutil is not installed
        return []
    monitors: list[Any] = []
    kind: type[Any]
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor):
        with contextlib.suppress(Exception):  # /proc may be closed in a container
            monitors.append(kind())
    for kind in (GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # no such GPU, or no package to ask it
            monitors.append(kind())
            break
    return monitors


def _collect(monitors: list[Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for monitor in monitors:
        with contextlib.suppress(Exception):
            monitor.collect_metrics()
            found += [(name, float(value)) for name, value in monitor.aggregate_metrics().items()]
        monitor.clear_metrics()
    return found


# ---- on another machine of the run ---------------------------------------------------------------


def start_sampler(put: Callable[[Rows], None], interval: str | None) -> Callable[[], None]:
    """Call `put`, in a thread, with samples that a process of their own takes; returns its end.

    interval: what MLflow's setting of that name is to be; None for none.
    """
    from research.tracking.companion import quiet_environment

    environment = quiet_environment()
    environment.pop(INTERVAL, None)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "research.tracking.monitoring"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment | ({} if interval is None else {INTERVAL: interval}),
        start_new_session=True,
    )
    threading.Thread(target=_pass_on, args=(process, put), daemon=True).start()
    return process.kill  # it has nothing to lose


def _pass_on(process: subprocess.Popen[bytes], put: Callable[[Rows], None]) -> None:
    with process:
        assert process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in process.stdout:
                put(json.loads(line))


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # for the training process, which ends this one
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # MLflow prints to standard output on some occasions

    def put(rows: Rows) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps(rows), file=answers, flush=True)

    start_sampling(put)
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
