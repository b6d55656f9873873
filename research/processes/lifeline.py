"""A line from every process of a run to the first one, by which each learns at once that one died.

    hub = Hub(host, on_death)                    in the first process
    address = hub.address                        which every other is told
    line = Line(address, host, rank, on_end)     in each of the others

A process that ends as it should says so first.  A connection that ends without a word is a process
that has died, whatever it died of: the system closes what a process had open.  There is no pulse to
be missed, so that one that is stopped, or starved by others, is never taken for dead; of a machine
that has lost its power or its network TCP's own probes tell within half a minute.

Nobody can join who was not told the token.  Lines are JSON.  Standard library only.
"""

import contextlib
import errno
import ipaddress
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# After the death of a process the first one's own error may come, and is then the way it ends.
GRACE_SECONDS = 5.0
# A process that was told to stop says so, and the others should be stopping too.
STOPPING_SECONDS = 30.0
JOINING_SECONDS = 30.0
TICK_SECONDS = 0.2
# A machine that answers nothing for 10 + 3 * 5 seconds is gone.
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
HEARD_SECONDS = 5.0
LONGEST_GREETING = 10_000  # bytes of one who has not said the token
FAR = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}

DONE, STOPPED, FAILED = "done", "stopped", "failed"  # how a process says that it ends


class RankDied(Exception):
    """Another process of the run has died, or has failed; a message for the user."""

    exit_code = 1


class ElsewhereError(Exception):
    """The traceback of another process, in the place of the error that it had."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


@dataclass(frozen=True)
class Address:
    """Where the hub listens, and the word that opens it."""

    port: int
    token: str


@dataclass(frozen=True)
class Death:
    """How a process of the run ended that should not have.

    `told` is a sentence.  `traceback` is that of its error, if it could say it, and `is_bug` is
    False where `told` says all of it.  `signal` is the one it was stopped by, if it was not alone
    in that.
    """

    rank: int
    told: str
    traceback: str = ""
    is_bug: bool = False
    signal: int | None = None

    def error(self) -> BaseException:
        """What ends the first process because of it."""
        if self.signal == signal.SIGINT:
            return KeyboardInterrupt()
        if self.signal is not None:
            return SystemExit(128 + self.signal)
        error = RankDied(self.told)
        if self.traceback:
            error.__cause__ = ElsewhereError(self.traceback)
        if self.is_bug:
            error.add_note(frames_of(self.traceback))
        return error


def frames_of(told: str, longest: int = 1800) -> str:
    """The last places of a traceback, without its last words, which are told already."""
    places: list[str] = []
    for line in told.splitlines():
        if line.startswith("  File "):
            places.append(line)
        elif line.startswith("    ") and places:
            places[-1] += f"\n{line}"
    while len(places) > 1 and sum(len(place) + 1 for place in places) > longest:
        del places[0]
    return "\n".join(places)


# ---- the first process ---------------------------------------------------------------------------


@dataclass
class Member:
    """Another process as the hub knows it; `rank` is None until it has said its token."""

    connection: socket.socket
    rank: int | None = None
    unread: bytes = b""


class Hub:
    """Hears all other processes, and finds out which of them died first.

    on_death: called in a thread of ours with the Death, `grace` seconds after it, if this process
    has not said by `end` that it ends; it should not return.
    on_sample: what is done with measurements of another node: its number, rows.
    children: the exit codes, by rank, of processes that this one started; None for one that runs.
    stopping: seconds that this process may go on after another was told to stop.
    """

    def __init__(
        self,
        host: str,
        on_death: Callable[[Death], None],
        on_sample: Callable[[int, list[Any]], None] = lambda node, rows: None,
        children: Callable[[], dict[int, int | None]] = dict,
        grace: float = GRACE_SECONDS,
        stopping: float = STOPPING_SECONDS,
    ) -> None:
        self.death: Death | None = None
        self._on_death, self._on_sample, self._children = on_death, on_sample, children
        self._grace, self._stopping = grace, stopping
        self._found = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.RLock()
        self._ending = False
        self.is_forced = False  # `on_death` is at it
        self._died_at = 0.0
        self._stopped: tuple[Death, float] | None = None  # who was told to stop, and when
        self._lost: dict[int, tuple[str, float]] = {}  # whose line ended without a word, and when
        self._places: dict[int, str] = {}  # of all that ever had a line
        self._members: list[Member] = []
        self._server = listen(host)
        self.address = Address(self._server.getsockname()[1], secrets.token_hex(16))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="lifeline", daemon=True)
        self._thread.start()

    @property
    def ranks(self) -> set[int]:
        """Those who have, or had, a line to this process."""
        return set(self._places)

    def wait_for_death(self, timeout: float) -> Death | None:
        """The Death that is known, or becomes known within `timeout` seconds."""
        self._found.wait(timeout)
        return self.death

    def end(self, how: str) -> bool:
        """Tell all others that this process ends; False where `on_death` is about to end it.

        DONE: they end by themselves.  STOPPED: they should be stopping too.  FAILED: they end now.
        """
        with self._lock:
            if self._ending:
                return False
            self._ending = True
        self.tell(how)
        return True

    def tell(self, how: str) -> None:
        with self._lock:
            for member in self._members:
                if member.rank is not None:
                    send(member.connection, {"say": how})

    def close(self) -> None:
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    # ---- what is heard ---------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(TICK_SECONDS):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.data)
            self._look()
        for member in list(self._members):
            self._drop(member)
        self._selector.close()
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            prepare(connection)
            member = Member(connection)
            self._selector.register(connection, selectors.EVENT_READ, member)
            with self._lock:
                self._members.append(member)

    def _drop(self, member: Member) -> None:
        with self._lock:
            self._members.remove(member)
        self._selector.unregister(member.connection)
        member.connection.close()

    def _read(self, member: Member) -> None:
        why = "died without a word: it was killed, or crashed in a library"
        try:
            data = member.connection.recv(65536)
        except OSError as error:
            data = b""
            if error.errno in FAR:
                why = "cannot be reached any more: its machine or the network is down"
        *lines, member.unread = (member.unread + data).split(b"\n")
        try:
            for line in lines:
                if member.rank is None and len(line) > LONGEST_GREETING:
                    raise ValueError
                self._hear(member, json.loads(line))
        # Whoever speaks otherwise is none of ours; brackets within brackets exhaust the parser.
        except (ValueError, KeyError, TypeError, RecursionError):
            self._drop(member)
            return
        if not data or (member.rank is None and len(member.unread) > LONGEST_GREETING):
            self._drop(member)
            if member.rank is not None:
                self._lost[member.rank] = why, time.monotonic()

    def _hear(self, member: Member, message: dict[str, Any]) -> None:
        if member.rank is None:
            if not secrets.compare_digest(message["token"], self.address.token):
                raise ValueError
            rank = int(message["rank"])
            self._places[rank] = f" (process {int(message['pid'])} on {message['host']})"
            with self._lock:
                member.rank = rank
            return
        if message["say"] == "sample":
            with contextlib.suppress(Exception):  # measurements must not end what they measure
                self._on_sample(message["node"], message["rows"])
            return
        self._part(member.rank, message)
        send(member.connection, {"say": "heard"})
        member.rank = None  # it has said all; how it ends is its own affair

    def _part(self, rank: int, message: dict[str, Any]) -> None:
        """A process says that it ends, and how."""
        if message["say"] == FAILED:
            self._die(rank, f": {message['told']}", message["traceback"], message["is_bug"])
        elif message["say"] == STOPPED and self._stopped is None:
            death = self._death(rank, " was told to stop", signal=int(message["signal"]))
            self._stopped = death, time.monotonic()

    # ---- what nobody says ------------------------------------------------------------------------

    def _look(self) -> None:
        now = time.monotonic()
        codes = self._children()
        for rank, (why, since) in list(self._lost.items()):
            if codes.get(rank, 0) is None and now - since < 2:
                continue  # the system closes the line before it tells the exit code
            del self._lost[rank]
            self._die(rank, f" {ended(codes.get(rank)) or why}.{hint_at(codes.get(rank))}")
        for rank, code in codes.items():
            if code and rank not in self._places:
                self._die_early(rank, code)
        if self._stopped is not None and now - self._stopped[1] > self._stopping:
            self._settle(self._stopped[0])
        if self.death is not None and now - self._died_at > self._grace:
            with self._lock:
                if self._ending:
                    return
                self._ending = self.is_forced = True
            self._on_death(self.death)

    def _die_early(self, rank: int, code: int) -> None:
        by = -code if code < 0 else code - 128
        if by in (signal.SIGINT, signal.SIGTERM):
            self._settle(self._death(rank, " was told to stop", signal=by))
        else:
            said = " What it said is above." if code > 0 else hint_at(code)
            self._die(rank, f" {ended(code)} before training began.{said}")

    def _die(self, rank: int, told: str, traceback: str = "", is_bug: bool = False) -> None:
        self._settle(self._death(rank, told, traceback=traceback, is_bug=is_bug))

    def _death(self, rank: int, told: str, **rest: Any) -> Death:
        return Death(rank, f"rank {rank}{self._places.get(rank, '')}{told}", **rest)

    def _settle(self, death: Death) -> None:
        if self.death is None:
            self.death = death
            self._died_at = time.monotonic()
            self._found.set()


def ended(code: int | None) -> str | None:
    """How a process ended, from its exit code."""
    if not code:
        return None
    if code > 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def hint_at(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return " If nobody did that, the machine's memory was full: see dmesg."
    return ""


# ---- the others ----------------------------------------------------------------------------------


class Line:
    """The line of another process to the hub.

    on_end: called in a thread of ours with why this process should end now; `told` is False where
    nobody else can tell the user.  `over` is set before that.
    Raises OSError where the hub cannot be reached.
    """

    def __init__(
        self,
        address: Address,
        host: str,
        rank: int,
        on_end: Callable[[str, bool], None],
        stopping: float = STOPPING_SECONDS,
    ) -> None:
        self.over = threading.Event()
        self._on_end, self._stopping = on_end, stopping
        self._parted = threading.Event()
        self._heard = threading.Event()
        self._lock = threading.Lock()
        self._connection = socket.create_connection((host, address.port), JOINING_SECONDS)
        self._connection.settimeout(None)
        prepare(self._connection)
        me = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
        self._say({"token": address.token, **me})
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def sample(self, node: int, rows: list[Any]) -> None:
        """Hand measurements of this node over: name, value, step, milliseconds each."""
        self._say({"say": "sample", "node": node, "rows": rows})

    def done(self) -> None:
        """This process ends as it should."""
        self._part({"say": DONE})

    def stopped(self, number: int) -> None:
        """This process was stopped by a signal."""
        self._part({"say": STOPPED, "signal": number})

    def failed(self, told: str, error: BaseException, is_bug: bool) -> bool:
        """This process ends by an error; True if the first one knows it and tells the user."""
        text = "".join(traceback.format_exception(error))
        return self._part({"say": FAILED, "told": told, "traceback": text, "is_bug": is_bug})

    def close(self) -> None:
        self._parted.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _part(self, message: dict[str, Any]) -> bool:
        self._parted.set()
        self._say(message)
        return self._heard.wait(HEARD_SECONDS)

    def _say(self, message: dict[str, Any]) -> None:
        with self._lock:
            send(self._connection, message)

    def _listen(self) -> None:
        word = ""
        lines = self._connection.makefile("rb")
        with contextlib.suppress(OSError, ValueError), self._connection, lines:
            for line in lines:
                word = json.loads(line)["say"]
                if word in ("heard", FAILED, DONE):  # which the first one tells, whatever it is
                    self._heard.set()
                if word == FAILED or (word == STOPPED and not self._parted.is_set()):
                    break
        if word == DONE or self._parted.is_set():
            return  # this process ends by itself, or will
        if word == STOPPED:
            if not self._parted.wait(self._stopping):
                self._leave("rank 0 was told to stop", True)
        elif word == FAILED:
            self._leave("rank 0 ends the run", True)
        else:
            self._leave("rank 0 died without a word, and ends this run with it", False)

    def _leave(self, why: str, told: bool) -> None:
        self.over.set()
        self._on_end(why, told)


# ---- sockets -------------------------------------------------------------------------------------

# A process forked from this one would keep the line open when this one is dead.
_own_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def _close_in_fork() -> None:
    for each in list(_own_sockets):
        with contextlib.suppress(OSError):
            os.close(each.detach())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


def listen(host: str) -> socket.socket:
    """A socket at a free port of `host`.

    The name of a machine may mean another address to itself than to others, and an address may be
    one that is translated on the way: it is then a port of all its addresses, as torch's own is.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        server = socket.create_server((host, 0), family=family, backlog=1024)
    except (ValueError, OSError):
        if socket.has_dualstack_ipv6():
            server = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
        else:
            server = socket.create_server(("", 0), backlog=1024)
    _own_sockets.add(server)
    return server


def prepare(connection: socket.socket) -> None:
    """Have the system find out when the other machine is gone."""
    _own_sockets.add(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a line; that nobody is there any more is found out by reading."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")
