"""Where studies live: Optuna's own storages, opened so that many processes can start at once.

Which storage is for what:

- A journal (a file; the default): any number of workers on one machine.  By far the fastest here,
  readable, appended to only.  Not for network drives.
- SQLite (`sqlite:///file.db`): the same, where a database is wanted to be asked in SQL.
- PostgreSQL (`postgresql://user@host/database`): workers on many machines.  MySQL works alike.
- Optuna's gRPC proxy (`grpc://host:port`): workers on many machines that may not reach the
  database, or too many of them for it; put a PostgreSQL behind it.

Taking a waiting trial is atomic in all of them but SQLite, where Optuna reads the state and writes
it in two steps: the lock of `alone` makes one of these for all processes of a machine.  A proxy
before an SQLite file is therefore for a single coordinator's trials on one machine at most.

`tests/benchmarks/storages.py` measures their rates; where trials take no time, 8 workers on 2 busy
cores finished 86 a second on a journal, 14 on SQLite, 13 on PostgreSQL, 8 through the proxy.

`optuna-dashboard ADDRESS` reads each of them; of the proxy, the database behind it.
"""

import contextlib
import importlib.util
import inspect
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import optuna
from filelock import BaseFileLock, FileLock
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalRedisBackend
from optuna.storages.journal._file import BaseJournalFileLock

from research.tracking.store import redact, sqlite_path, sqlite_uri

ALLOWED = (
    "a path that ends in .journal, sqlite:///path/to/study.db, postgresql://user@host/database, "
    "mysql://user@host/database, grpc://host:port"
)
LOCK_SECONDS = 300.0
BUSY_SECONDS = 60.0  # SQLite: how long a writer waits for the others
CONNECT_SECONDS = 10
PATIENCE_SECONDS = 300.0  # a server that is restarted must not cost the hours of a trial
DRIVERS = {  # of a database, the modules that speak to it, best first, and what to install
    "postgresql": (("psycopg", "psycopg2"), "psycopg[binary]"),
    "mysql": (("MySQLdb", "pymysql"), "pymysql"),
}
DRIVER_NAMES = {"MySQLdb": "mysqldb"}  # where SQLAlchemy's name is not the module's
CLASSES: dict[str, type] = {
    "RDBStorage": RDBStorage,
    "GrpcStorageProxy": GrpcStorageProxy,
    "JournalStorage": JournalStorage,
    "JournalFileBackend": JournalFileBackend,
    "JournalRedisBackend": JournalRedisBackend,
}
ANSWERED_LATER = ("UNAVAILABLE", "DEADLINE_EXCEEDED")  # status codes of gRPC

Returned = TypeVar("Returned")


class StorageError(ValueError):
    """A storage cannot be used as it was asked for; the message says why and what to do."""

    exit_code = 2


class StorageAwayError(StorageError):
    """A storage that should be there does not answer, or cannot store."""

    exit_code = 1


# ---- addresses -----------------------------------------------------------------------------------


def storage_address(address: str | Mapping[str, Any] | None, default: Path) -> str | dict[str, Any]:
    """The same storage by an address that holds in every folder and every process.

    `address` is one of ALLOWED, or Optuna's class name with its arguments:
    {"class_path": "RDBStorage", "url": ...}; None means a journal at `default`.  Raises
    StorageError on anything else; nothing is opened.
    """
    if address is None:
        return str(default.absolute())
    if isinstance(address, Mapping):
        _class_and_arguments(address)
        return dict(address)
    address = address.strip()
    scheme, separator, rest = address.partition("://")
    if not separator:
        if Path(address).suffix in (".journal", ".log"):
            return str(Path(address).absolute())
        raise StorageError(f"storage: {address!r} is no address. Allowed: {ALLOWED}.")
    database, _, driver = scheme.lower().partition("+")
    if database == "grpc":
        _host_and_port(address)
        return address
    if database == "sqlite":
        path = sqlite_path(address)
        if path is None or not path.name or path.name == ":memory:" or path.is_dir():
            raise StorageError(
                f"storage: {address!r} names no file (a database in memory could not be shared "
                "by processes). Allowed: sqlite:///path/to/study.db."
            )
        return sqlite_uri(path)
    database = "postgresql" if database == "postgres" else database
    if database not in DRIVERS or not rest.strip("/"):
        raise StorageError(f"storage: {redact(address)!r} is no address. Allowed: {ALLOWED}.")
    return f"{database}+{driver or _driver(database)}://{rest}"


def described(address: str | Mapping[str, Any] | None) -> str:
    """The address for the terminal, without a password."""
    if address is None:
        return "a journal beside the search file"
    if isinstance(address, Mapping):
        arguments = ", ".join(f"{k}={v}" for k, v in address.items() if k != "class_path")
        return redact(f"{address.get('class_path')}({arguments})")
    return redact(address)


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise StorageError(f"storage: {redact(address)!r} is not of the form grpc://host:port.")
    return host, port


def _driver(database: str) -> str:
    modules, package = DRIVERS[database]
    for module in modules:
        if importlib.util.find_spec(module) is not None:
            return DRIVER_NAMES.get(module, module)
    raise StorageError(
        f"storage: there is no driver for {database} here. Install one: pip install '{package}'"
    )


def _class_and_arguments(given: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    arguments = {key: value for key, value in given.items() if key != "class_path"}
    arguments |= dict(arguments.pop("init_args", {}))
    name = str(given.get("class_path", "")).rpartition(".")[2]
    if name not in CLASSES:
        raise StorageError(
            f"storage: {given.get('class_path')!r} is none of Optuna's storages. "
            f"Allowed as class_path: {', '.join(CLASSES)}; or an address: {ALLOWED}."
        )
    inner = arguments.get("log_storage")
    if isinstance(inner, Mapping):
        _class_and_arguments(inner)
    try:
        inspect.signature(CLASSES[name]).bind(**arguments)
    except TypeError as error:
        raise StorageError(f"storage: {name} cannot be made of these arguments: {error}.") from None
    return CLASSES[name], arguments


# ---- opening -------------------------------------------------------------------------------------


def open_storage(address: str | Mapping[str, Any] | None, default: Path) -> BaseStorage:
    """The storage at `address` (see `storage_address`), made where it does not exist yet.

    Many processes may open a new one at the same moment.  Calls to a server wait for
    PATIENCE_SECONDS when it is away (see `patiently`); opening does not.  Raises StorageError.
    """
    place = storage_address(address, default)
    # Optuna greets everybody who opens a study, also in the middle of a live table.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if isinstance(place, dict):
            return _of_class(place)
        if "://" not in place:
            return _journal(Path(place))
        if place.startswith("grpc:"):
            host, port = _host_and_port(place)
            return _proxy(GrpcStorageProxy, {"host": host, "port": port})
        return _database(place)


def _of_class(place: Mapping[str, Any]) -> BaseStorage:
    kind, arguments = _class_and_arguments(place)
    if kind is RDBStorage:
        url = str(storage_address(arguments.pop("url"), Path()))
        return _database(url, **arguments)
    if kind is GrpcStorageProxy:
        return _proxy(kind, arguments)
    backend = arguments["log_storage"] if kind is JournalStorage else place
    if isinstance(backend, BaseJournalBackend):
        return JournalStorage(backend)
    kind, arguments = _class_and_arguments(backend)
    if kind is JournalFileBackend and "lock_obj" not in arguments:
        return _journal(Path(arguments["file_path"]).absolute())
    return _made_patient(JournalStorage(kind(**arguments)))


def _journal(path: Path) -> BaseStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))
    except OSError:
        raise
    except Exception as error:  # what its lines make Optuna stumble over, whatever that is
        raise StorageError(
            f"storage: {path} is not a journal of Optuna's, or it is damaged ({error}). Move it "
            "away, or name another storage."
        ) from error


def _database(
    url: str, engine_kwargs: Mapping[str, Any] | None = None, **arguments: Any
) -> BaseStorage:
    given = dict(engine_kwargs or {})
    path = sqlite_path(url)
    if path is None:
        connect = {"connect_timeout": CONNECT_SECONDS}
        given = {"pool_pre_ping": True, "connect_args": connect, **given}
        return _made_patient(_tables_made(url, given, **arguments))
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {"connect_args": {"timeout": BUSY_SECONDS}, **given}
    with file_lock(path):
        storage = _tables_made(url, given, **arguments)
        _write_ahead(storage)
    return _made_patient(storage)


def _write_ahead(storage: RDBStorage) -> None:
    """Let readers and writers not wait for each other.

    What was committed survives a kill; a power failure may take the last of it, and nothing else.
    """
    from sqlalchemy import event

    @event.listens_for(storage.engine, "connect")
    def set_up(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    storage.engine.dispose()  # the connection that has made the tables


def _tables_made(url: str, engine_kwargs: dict[str, Any], **arguments: Any) -> RDBStorage:
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    braces_kept = url.replace("{", "{{").replace("}", "}}")  # Optuna formats the address
    for attempts_left in (4, 3, 2, 1, 0):
        try:
            return RDBStorage(braces_kept, engine_kwargs, **arguments)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise StorageError(
                f"storage: {redact(url)!r} cannot be used ({_first_line(error)})."
            ) from error
        except RuntimeError as error:
            raise StorageError(
                f"storage: {redact(url)!r} was written by another version of Optuna. Bring it up "
                f"to date: optuna storage upgrade --storage '{redact(url)}'"
            ) from error
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            # Where several make the tables of an empty database at once, all but one fail.
            if attempts_left == 0 or is_outage(error):
                raise StorageAwayError(
                    f"storage: {redact(url)!r} cannot be used: {_first_line(error)}"
                ) from error
            time.sleep(0.2)
    raise AssertionError


def _proxy(kind: type[GrpcStorageProxy], arguments: Mapping[str, Any]) -> BaseStorage:
    try:
        storage = kind(**arguments)
        storage.wait_server_ready(timeout=CONNECT_SECONDS)
    except ImportError as error:
        raise StorageError(
            f"storage: Optuna's gRPC proxy needs grpc ({error}). Install it: "
            "pip install grpcio protobuf"
        ) from error
    except ConnectionError as error:
        where = "{host}:{port}".format(**{"host": "localhost", "port": 13000, **arguments})
        raise StorageAwayError(
            f"storage: no gRPC proxy of Optuna's answers at {where}. Start one there "
            "(optuna.storages.run_grpc_proxy_server), or correct the address."
        ) from error
    return _made_patient(storage)


def close_storage(storage: BaseStorage) -> None:
    """Close its connections."""
    backend = getattr(storage, "_backend", storage)
    if isinstance(backend, RDBStorage):
        backend.scoped_session.remove()
        backend.engine.dispose()
    elif isinstance(backend, GrpcStorageProxy):
        backend.close()


# ---- files and their locks -----------------------------------------------------------------------


def file_lock(path: Path) -> BaseFileLock:
    """The lock beside a storage's file, to be entered, again by who holds it; other threads wait.

    The kernel frees it when its holder dies, however that happens.
    """
    return FileLock(f"{path}.flock", timeout=LOCK_SECONDS, poll_interval=0.002, is_singleton=True)


@contextlib.contextmanager
def alone(storage: BaseStorage) -> Iterator[bool]:
    """Nobody else changes the slots of a storage on this machine meanwhile.

    Gives True where that is so, False where a server keeps the storage and no lock reaches all.
    """
    path = file_of(storage)
    if path is None:
        yield False
    else:
        with file_lock(path):
            yield True


def file_of(storage: BaseStorage) -> Path | None:
    """The file in which the storage keeps everything; None if a server does."""
    backend = getattr(storage, "_backend", storage)
    if isinstance(backend, RDBStorage):
        return sqlite_path(str(backend.engine.url))
    path = getattr(backend, "_file_path", None)
    return None if path is None else Path(path).absolute()


class JournalLock(BaseJournalFileLock):
    """Who writes to a journal.

    Optuna's own locks are files that a killed process leaves behind, for which everybody else then
    waits 30 seconds; and whoever waits, looks rarely.  A line that a killed process wrote in part,
    or for which there was no room on the disk, would make the whole journal unreadable as soon as
    another follows: it is taken back.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, file_lock(path)

    def acquire(self) -> bool:
        self.lock.acquire()
        try:
            _take_back_torn_line(self.path)
        except BaseException:
            self.lock.release()
            raise
        return True

    def release(self) -> None:
        self.lock.release()


def _take_back_torn_line(journal: Path) -> None:
    with journal.open("r+b") as file:
        size = end = file.seek(0, 2)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start if newline < 0 else start + newline + 1
            if newline >= 0:
                break
        if end < size:
            file.truncate(end)


# ---- outages -------------------------------------------------------------------------------------


def patiently(call: Callable[..., Returned], *args: Any, **kwargs: Any) -> Returned:
    """What the call returns, made again while the storage is away, for PATIENCE_SECONDS.

    A call may thus have been carried out twice.  Raises StorageAwayError in the end.
    """
    give_up, pause = time.monotonic() + PATIENCE_SECONDS, 0.1
    told = False
    while True:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not is_outage(error):
                raise
            if time.monotonic() + pause > give_up:
                raise StorageAwayError(
                    f"The storage of the study did not answer for {PATIENCE_SECONDS:.0f} seconds: "
                    f"{_first_line(error)}"
                ) from error
            if not told and pause > 1:
                told = True
                print(
                    f"The storage of the study is away ({_first_line(error)}); trying again for "
                    f"{PATIENCE_SECONDS:.0f} seconds.",
                    file=sys.stderr,
                )
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def is_outage(error: BaseException | None) -> bool:
    """Whether the error says that the storage is away, or busy, for now."""
    import sqlalchemy.exc

    while error is not None:
        if isinstance(error, sqlalchemy.exc.DBAPIError):
            if "sqlite" in type(error.orig).__module__:
                return bool(re.search("locked|busy", str(error.orig)))
            operational = sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError
            return isinstance(error, operational) or error.connection_invalidated
        code = getattr(error, "code", None)
        if callable(code) and getattr(code(), "name", None) in ANSWERED_LATER:
            return True
        if isinstance(error, ConnectionError) or type(error).__module__ == "redis.exceptions":
            return True
        error = error.__cause__
    return False


def _made_patient(storage: BaseStorage) -> BaseStorage:
    """The storage, each of whose calls is made patiently: Optuna's own ones are then, too."""
    storage = optuna.storages.get_storage(storage)  # databases get a cache
    for name, member in vars(BaseStorage).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            setattr(storage, name, _patient(getattr(storage, name)))
    return storage


def _patient(method: Callable[..., Returned]) -> Callable[..., Returned]:
    def call(*args: Any, **kwargs: Any) -> Returned:
        return patiently(method, *args, **kwargs)

    return call


def _first_line(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    details = getattr(cause, "details", None)
    text = str(details() if callable(details) else cause).strip() or type(cause).__name__
    return redact(text.splitlines()[0])
