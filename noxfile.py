"""What CI runs, and what you run before you commit: `nox`, or `nox -s tests` for one of them.

The sessions use the environment that nox itself runs in (requirements-dev.txt has all they need):
a PyTorch for each session of its own would cost minutes and gigabytes.
"""

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]
nox.needs_version = ">=2025.2.9"

# Over the cores, a thread for each; the tests of a file share what they have set up.
SPREAD = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and common mistakes, by ruff."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, by mypy."""
    session.run("mypy", "research", "noxfile.py")


@nox.session
def tests(session: nox.Session) -> None:
    """The fast tests: minutes on two cores, no network, no services."""
    session.run("python", "-m", "pytest", *SPREAD, *session.posargs, env=ONE_THREAD)


@nox.session
def slow(session: nox.Session) -> None:
    """The long tests: every loss, optimizer and experiment in a training of its own."""
    session.run("python", "-m", "pytest", "-m", "slow", *SPREAD, *session.posargs, env=ONE_THREAD)


@nox.session
def faults(session: nox.Session) -> None:
    """What must survive: real processes killed and signalled, real servers that go away."""
    session.run("python", "-m", "pytest", "-m", "faults", *session.posargs)


@nox.session
def devices(session: nox.Session) -> None:
    """One run on several processes, nodes and networks, on the CPU."""
    session.run("python", "-m", "pytest", "-m", "devices", *session.posargs)


@nox.session
def storages(session: nox.Session) -> None:
    """Searches on every storage: journal, SQLite, gRPC, PostgreSQL (Debian's, started here)."""
    session.run("python", "-m", "pytest", "-m", "storages", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """What a person sees: a bare `mlflow ui` in headless Chromium (needs chromium-driver)."""
    session.run("python", "-m", "pytest", "-m", "browser", *session.posargs)


@nox.session
def benchmark(session: nox.Session) -> None:
    """What things cost here, a table of ratios: all 25 minutes of it, or `-- ROW ...`."""
    session.run("python", "-m", "tests.benchmarks", *session.posargs)


@nox.session
def pins(session: nox.Session) -> None:
    """Compile requirements.txt and requirements-dev.txt anew from pyproject.toml (needs uv)."""
    compile_ = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    plain = ["--no-header", "--no-annotate", "--no-emit-index-url", *session.posargs]
    session.run(*compile_, *plain, "pyproject.toml", "-o", "requirements.txt", external=True)
    groups = [f"--group={group}" for group in ("test", "storages", "browser", "lint", "types")]
    dev = [*plain, *groups, "-c", "requirements.txt", "-o", "requirements-dev.txt"]
    session.run(*compile_, "pyproject.toml", *dev, external=True)
