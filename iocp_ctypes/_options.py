"""THE table of options: name, default, allowed values, meaning (layer P: pure).

Laws
1. An option is checked here and nowhere else; the command line, Server and Connection all read this table.
2. A refused value raises TypeError (wrong kind) or ValueError (out of range) that names the option, the
   value and what is allowed, and changes nothing.
3. Settings are immutable: a live change makes a new object, so a thread that reads one sees one state.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypedDict, TypeVar, overload

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

KIB: Final = 1024
MIB: Final = 1024 * 1024

RECV_MODES: Final = ("auto", "flow", "zero-byte", "burst")

KeepAlive = float | tuple[float, float] | None


class Usage(NamedTuple):
    """A live tunable: its cap, and how much of it is in use at this instant."""

    cap: int
    in_use: int


class ServerOptions(TypedDict, total=False):
    """The keyword options of Server, for type checkers; OPTIONS says what each allows."""

    backlog: int
    listen_backlog: int | None
    accept_data: int
    silent_timeout: float | None
    idle_timeout: float | None
    linger_timeout: float
    max_connections: int | None
    max_per_host: int | None
    sendcap: int
    recvburst: int
    recv_mode: str
    recv_size: int
    recv_buffer_max: int
    high_mark: int
    low_mark: int
    write_buffer_max: int
    io_threads: int
    work_threads: int
    processes: int
    nodelay: bool
    keepalive: KeepAlive
    exclusive: bool
    dualstack: bool | None
    trace: int
    tls: ssl.SSLContext | None
    tls_handshake_timeout: float
    reject_remote: bool
    pipe_security: str | None


class ClientOptions(TypedDict, total=False):
    """Those of a connection that is made by connect()."""

    idle_timeout: float | None
    linger_timeout: float
    sendcap: int
    recvburst: int
    recv_mode: str
    recv_size: int
    recv_buffer_max: int
    high_mark: int
    low_mark: int
    write_buffer_max: int
    nodelay: bool
    keepalive: KeepAlive
    trace: int
    tls: ssl.SSLContext | None
    tls_handshake_timeout: float


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The checked options of a server and of the connections it makes."""

    backlog: int = 64
    listen_backlog: int | None = None
    accept_data: int = 0
    silent_timeout: float | None = 120.0
    idle_timeout: float | None = None
    linger_timeout: float = 5.0
    max_connections: int | None = None
    max_per_host: int | None = None
    sendcap: int = 4
    recvburst: int = 1
    recv_mode: str = "auto"
    recv_size: int = 16 * KIB
    recv_buffer_max: int = MIB
    high_mark: int = 64 * KIB
    low_mark: int = 16 * KIB
    write_buffer_max: int = 16 * MIB
    io_threads: int = 0
    work_threads: int = 0
    processes: int = 1
    nodelay: bool = True
    keepalive: KeepAlive = None
    exclusive: bool = True
    dualstack: bool | None = None
    trace: int = 0
    tls: ssl.SSLContext | None = None
    tls_handshake_timeout: float = 10.0
    reject_remote: bool = True
    pipe_security: str | None = None


Check = Callable[[str, Any], Any]


class Option(NamedTuple):
    """One row: how a value is checked, and what the option means."""

    check: Check
    meaning: str


def _whole(low: int, high: int, none: bool = False) -> Check:
    allowed = f"a whole number from {low} to {high}" + (" or None" if none else "")

    def check(name: str, value: Any) -> Any:
        if value is None and none:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: must be {allowed}")
        if not low <= value <= high:
            raise ValueError(f"{name}={value!r}: must be {allowed}")
        return value

    return check


def _seconds(none: bool, zero: bool = False, high: float | None = None) -> Check:
    low, most = "0 or more" if zero else "more than 0", SECONDS_MAX if high is None else high
    allowed = f"a number of seconds ({low}, at most {most:.0f})" + (" or None" if none else "")

    def check(name: str, value: Any) -> Any:
        if value is None and none:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r}: must be {allowed}")
        if not 0 <= value <= most or (value == 0 and not zero):  # so put, NaN is refused as well
            raise ValueError(f"{name}={value!r}: must be {allowed}")
        return float(value)

    return check


def _flag(none: bool = False) -> Check:
    allowed = "True, False or None" if none else "True or False"

    def check(name: str, value: Any) -> Any:
        if value is None and none:
            return None
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be {allowed}")
        return value

    return check


def _choice(*choices: str) -> Check:
    allowed = "one of " + ", ".join(repr(choice) for choice in choices)

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r}: must be {allowed}")
        if value not in choices:
            raise ValueError(f"{name}={value!r}: must be {allowed}")
        return value

    return check


def _sddl(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: must be a str in SDDL, such as 'D:(A;;GA;;;WD)', or None")
    if value is not None and not value.startswith(("O:", "G:", "D:", "S:")):
        raise ValueError(f"{name}={value!r}: must be in SDDL, such as 'D:(A;;GA;;;WD)', or None")
    return value


def _keepalive(name: str, value: Any) -> Any:
    if value is None:
        return None
    one = _seconds(none=False, high=KEEPALIVE_MAX)
    parts = value if isinstance(value, tuple) else (value, value)
    allowed = f"seconds (more than 0, at most {KEEPALIVE_MAX:.0f}), (idle, interval) in such seconds, or None"
    try:
        idle, interval = (one(name, part) for part in parts)
    except (TypeError, ValueError) as exc:
        raise type(exc)(f"{name}={value!r}: must be {allowed}") from None
    return (idle, interval) if parts is value else idle


def _context(name: str, value: Any) -> Any:
    # Who has a context has imported `ssl`, which is slow to import and may be missing.
    if value is not None and not isinstance(value, getattr(sys.modules.get("ssl"), "SSLContext", ())):
        raise TypeError(f"{name}={value!r}: must be an ssl.SSLContext or None")
    return value


#: A year: longer timeouts are a mistake in the unit.
SECONDS_MAX: Final = 365 * 86400.0
#: 49 days: Windows takes these times as a DWORD of milliseconds.
KEEPALIVE_MAX: Final = 4_294_967.0

OPTIONS: Final[dict[str, Option]] = {
    "backlog": Option(_whole(1, 10_000), "AcceptEx operations kept posted by the server"),
    "listen_backlog": Option(
        _whole(1, 65_535, none=True), "length of the kernel's queue; None: max(200, backlog)"
    ),
    "accept_data": Option(
        _whole(0, 64 * KIB), "bytes AcceptEx waits for before a connection counts as accepted"
    ),
    "silent_timeout": Option(
        _seconds(none=True), "seconds after which a connection that never sent is reaped"
    ),
    "idle_timeout": Option(_seconds(none=True), "seconds without a byte in or out"),
    "linger_timeout": Option(_seconds(none=False, zero=True), "seconds that close() waits for the peer"),
    "max_connections": Option(_whole(1, 1_000_000, none=True), "connections at once; accepting pauses there"),
    "max_per_host": Option(
        _whole(1, 1_000_000, none=True), "connections at once of one host; more are refused"
    ),
    "sendcap": Option(_whole(1, 1_000), "concurrent WSASends of a connection"),
    "recvburst": Option(
        _whole(1, 10_000), "concurrent WSARecvs of a connection; above 1 bursts are detected"
    ),
    "recv_mode": Option(_choice(*RECV_MODES), "how receives are posted"),
    "recv_size": Option(_whole(64, 16 * MIB), "bytes of one receive"),
    "recv_buffer_max": Option(_whole(64, 1 << 40), "bytes received and unread in burst mode, at the most"),
    "high_mark": Option(_whole(0, 1 << 40), "send() returns False above this many unsent bytes"),
    "low_mark": Option(_whole(0, 1 << 40), "on_drain comes at this many unsent bytes"),
    "write_buffer_max": Option(
        _whole(1, 1 << 40), "unsent bytes above which a connection is closed with overflow"
    ),
    "io_threads": Option(_whole(0, 256), "running I/O threads; 0: sized from the processors"),
    "work_threads": Option(
        _whole(0, 256), "threads that connections are pinned to; 0: callbacks on the I/O threads"
    ),
    "processes": Option(
        _whole(1, 64), "processes that serve, each with a port of its own; 1: this one alone"
    ),
    "nodelay": Option(_flag(), "TCP_NODELAY"),
    "keepalive": Option(_keepalive, "seconds, or (idle, interval) in seconds; None: off"),
    "exclusive": Option(_flag(), "SO_EXCLUSIVEADDRUSE: nobody else binds over this server"),
    "dualstack": Option(_flag(none=True), "IPv6 sockets serve IPv4 too; None: only for the host ''"),
    "trace": Option(_whole(0, 1_000_000), "operations that the trace remembers; 0: no trace"),
    "tls": Option(_context, "an ssl.SSLContext: connections begin with a TLS handshake"),
    "tls_handshake_timeout": Option(_seconds(none=False), "seconds that a TLS handshake may take"),
    "reject_remote": Option(_flag(), "pipes refuse clients on other machines"),
    "pipe_security": Option(_sddl, "who may open a pipe, in SDDL; None: the user who serves it, nobody else"),
}

#: What `tune` sets: backlog, sendcap, recvburst.
PROFILES: Final[dict[str, tuple[int, int, int]]] = {"ftpd": (10, 20, 20), "httpd": (500, 1, 1)}


def check_profile(profile: Any) -> tuple[int, int, int]:
    """Return backlog, sendcap and recvburst of a profile; TypeError or ValueError names the profiles."""
    return PROFILES[_choice(*PROFILES)("profile", profile)]


def check_option(name: str, value: Any) -> Any:
    """Return the checked value of one option; TypeError or ValueError names option, value and range."""
    option = OPTIONS.get(name)
    if option is None:
        raise TypeError(f"unknown option {name}={value!r}: the options are {', '.join(OPTIONS)}")
    return option.check(name, value)


def check_timeout(name: str, value: Any) -> float | None:
    """Return a checked number of seconds, or None for no limit."""
    checked: float | None = _seconds(none=True)(name, value)
    return checked


def check_count(name: str, value: Any, low: int, high: int) -> int:
    """Return a checked whole number from `low` to `high`."""
    checked: int = _whole(low, high)(name, value)
    return checked


def make_settings(options: ServerOptions | ClientOptions | dict[str, Any]) -> Settings:
    """Check options and return the settings they make; see `check_option`."""
    return check_marks(Settings(**{name: check_option(name, value) for name, value in options.items()}))


def change(settings: Settings, **changes: Any) -> Settings:
    """Return settings with some options changed; nothing is changed where one is refused."""
    checked = {name: check_option(name, value) for name, value in changes.items()}
    return check_marks(dataclasses.replace(settings, **checked))


def check_marks(settings: Settings) -> Settings:
    """Return the settings where low_mark <= high_mark <= write_buffer_max, else raise ValueError."""
    if settings.low_mark > settings.high_mark:
        raise ValueError(
            f"low_mark={settings.low_mark}: must be from 0 to high_mark, which is {settings.high_mark}"
        )
    if settings.high_mark > settings.write_buffer_max:
        raise ValueError(
            f"high_mark={settings.high_mark}: must be from low_mark to write_buffer_max,"
            f" which is {settings.write_buffer_max}"
        )
    return settings


class Live(Generic[T]):
    """An option as an attribute that may be set while its owner runs.

    The owner's `_change` says what that does.
    """

    def __init__(self, name: str) -> None:
        """Name the option."""
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> Live[T]: ...
    @overload
    def __get__(self, owner: object, kind: type) -> T: ...
    def __get__(self, owner: Any, kind: type) -> Live[T] | T:
        """Read the option's value in the owner's settings."""
        if owner is None:
            return self
        value: T = getattr(owner._settings, self._name)
        return value

    def __set__(self, owner: Any, value: T) -> None:
        """Check and set it."""
        owner._change(self._name, value)
