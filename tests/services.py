"""Servers that tests and benchmarks start for themselves, and end: PostgreSQL, Optuna's proxy."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROXY = """
import sys
from pathlib import Path
import optuna
from research.search.storage import open_storage
storage = open_storage(sys.argv[1], Path())
optuna.storages.run_grpc_proxy_server(storage, host="127.0.0.1", port=int(sys.argv[2]))
"""


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def postgresql_programs() -> Path | None:
    """The folder of Debian's newest initdb and pg_ctl; None if the package is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda p: int(p.parts[4]))
    if found:
        return found[-1].parent
    program = shutil.which("pg_ctl")
    return Path(program).parent if program and shutil.which("initdb") else None


@dataclass
class Database:
    """A PostgreSQL server with a folder of its own."""

    programs: Path
    folder: Path
    port: int
    as_user: dict[str, Any]

    @property
    def address(self) -> str:
        return f"postgresql://research@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        log = ["-l", str(self.folder / "server.log")]
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-w", *log, "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "fast", "stop")

    def run(self, program: str, *arguments: str) -> None:
        # Not a pipe: the server would keep it open.
        with (self.folder / "commands.log").open("ab") as log:
            subprocess.run(
                [self.programs / program, *arguments],
                **self.as_user,
                check=True,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )


@contextlib.contextmanager
def postgresql() -> Iterator[Database]:
    """A new PostgreSQL on a free port, that keeps what it is told as it does in earnest."""
    programs = postgresql_programs()
    assert programs is not None, "install Debian's package postgresql"
    with tempfile.TemporaryDirectory(prefix="postgresql-") as name:
        folder, as_user = Path(name), {}
        if os.getuid() == 0:  # which PostgreSQL refuses
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        database = Database(programs, folder, free_port(), as_user)
        database.run("initdb", "-D", str(folder / "data"), "-U", "research", "--auth=trust")
        database.start()
        try:
            yield database
        finally:
            database.stop()


@contextlib.contextmanager
def proxy(behind: str, port: int | None = None) -> Iterator[str]:
    """The address of Optuna's gRPC proxy, before the storage at `behind`."""
    port = port or free_port()
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", PROXY, behind, str(port)])
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
