"""Several processes of one run, as torchrun starts them, for the price of importing torch once.

    outcomes = launched(3, SCRIPT, folder)
    outcomes = launched(4, SCRIPT, folder, nodes=2)     # two of them on each of two nodes

A fresh Python imports torch, Lightning and this package, forks itself for each rank, gives each
torchrun's environment, and lets it run SCRIPT (with `rank` known) in the folder.  `python -m
torch.distributed.run` does the same and imports everything in every process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    """What one process came to: its exit code (minus the signal's number), and what it printed."""

    code: int
    out: str
    err: str


def launched(
    count: int,
    script: str,
    folder: Path,
    *,
    nodes: int = 1,
    timeout: float = 240,
    environment: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """What came of `script` in each of `count` processes, by rank."""
    process = start(count, script, folder, nodes=nodes, environment=environment)
    try:
        process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcomes(count, folder)


def start(
    count: int,
    script: str,
    folder: Path,
    *,
    nodes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """The process that starts the others; `pid.R` in the folder is that of rank R."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(script)
    given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(count), str(nodes), "script.py"],
        cwd=folder,
        env={**os.environ, **given},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def outcomes(count: int, folder: Path) -> list[Outcome]:
    """What came of all of them, once the process that started them has ended."""
    codes = json.loads((folder / "codes.json").read_text())
    told = [
        [(folder / f"{name}.{rank}").read_text() for name in ("out", "err")]
        for rank in range(count)
    ]
    return [Outcome(code, *texts) for code, texts in zip(codes, told, strict=True)]


def torchrun(rank: int, count: int, nodes: int = 1, **more: str) -> dict[str, str]:
    """The environment that torchrun gives to one of `count` processes; `more` is set otherwise."""
    local = count // nodes
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "GROUP_RANK": str(rank // local),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_WORLD_SIZE": str(nodes),
        **more,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    count, nodes, script = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    assert count % nodes == 0
    sys.path[0] = str(ROOT)
    import torch

    torch.set_num_threads(1)
    import lightning.pytorch  # noqa: F401

    import research.training  # noqa: F401

    port = free_port()
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ |= torchrun(
                rank, count, nodes, TORCHELASTIC_RUN_ID="test", MASTER_PORT=str(port)
            )
            Path(f"pid.{rank}").write_text(str(os.getpid()))
            source = Path(script).read_text()
            try:
                exec(compile(source, script, "exec"), {"__name__": "__main__", "rank": rank})
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    codes: dict[int, int] = {}
    while len(codes) < count:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    Path("codes.json").write_text(json.dumps([codes[rank] for rank in range(count)]))


if __name__ == "__main__":
    main()
