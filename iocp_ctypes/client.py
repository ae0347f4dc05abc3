"""L6: connect, the client side.

Laws
1. connect() never blocks: it returns a Connection that is not connected yet. What is sent on it meanwhile
   is sent once it is; on_connect comes then. Where connecting fails, on_close is the only callback, with
   why.
2. All arguments are checked before anything is begun.
3. A connection keeps its engine running until its on_close has returned.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from ._addresses import (
    PIPE_PREFIX,
    Address,
    check_address,
    check_pipe_name,
    format_address,
    numeric_family,
    parse_sockaddr,
)
from ._channel import Buffer, as_bytes
from ._connector import Connector
from ._handover import set_options
from ._lifetime import Home
from ._options import ClientOptions, Settings, check_timeout, make_settings
from ._pipeconnector import PipeConnector
from ._sockops import adopt_socket, check_adoptable
from ._stats import Traffic
from ._tlschannel import make_codec
from ._tracing import Trace
from .connection import Connection
from .engine import Engine, enter_engine

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from typing_extensions import Unpack

    from .tls import TLSCodec

log = logging.getLogger("iocp_ctypes")


class _Client:
    """What a client connection has in place of a server."""

    __slots__ = ("connection", "engine", "past")

    def __init__(self, engine: Engine | None) -> None:
        self.connection: Connection | None = None  # from its attaching to its on_close: no cycle is left then
        self.past = Traffic()  # of the connection when it has gone
        self.engine = enter_engine(self, self.at_exit, engine, 0, retrace=self.retrace, moved=self.moved)

    def at_exit(self) -> None:
        """The interpreter ends."""
        connection = self.connection
        if connection is not None:
            connection.abort()

    def retrace(self) -> None:
        """The engine's trace was switched."""
        connection = self.connection
        if connection is not None:
            with connection._lock:
                connection._retrace()

    def home(self) -> Home:
        """What the connection knows of it."""
        engine = self.engine
        return Home(engine, self.gone, self.failed, None, engine.dispatcher.is_io_thread)

    def moved(self) -> Traffic:
        """What the connection has moved until now."""
        connection = self.connection
        if connection is None:
            return self.past
        traffic = Traffic()
        traffic.add(connection)
        return traffic

    def gone(self, _connection: Connection) -> None:
        """on_close has returned."""
        self.past = self.moved()
        self.connection = None
        self.engine.leave_soon(self)

    def failed(self, connection: Connection, exc: BaseException) -> None:
        """A callback raised."""
        local, peer = format_address(connection.local_address), format_address(connection.peer_address)
        log.error("connection %d from %s to %s: a callback raised", connection.id, local, peer, exc_info=exc)


def connect(
    address: Any,
    handler: type[Connection] | Callable[[Any, Address], Connection] = Connection,
    *,
    timeout: float | None = None,
    local_address: Any = None,
    engine: Engine | None = None,
    server_hostname: str | None = None,
    tls_session: ssl.SSLSession | None = None,
    **options: Unpack[ClientOptions],
) -> Connection:
    r"""Connect to an address; returns at once.

    Args:
        address: (host, port). All addresses of a name are tried, with a staggered start (RFC 8305);
            from a fixed local port one after the other, each with its share of `timeout`. Or the name of a
            pipe, such as r"\\.\pipe\NAME"; where all its instances are taken, one is waited for.
        handler: a Connection subclass, or a factory called with (None, address) that returns a Connection.
        timeout: seconds until it is connected, the look-up included; None: as long as the system tries. A
            TLS handshake has its own, `tls_handshake_timeout`.
        local_address: (host, port) to connect from, with a numeric host and port 0 for any; only addresses
            of its family are tried. None: any. Not for pipes.
        engine: whose threads to use; None: the engine of the process.
        server_hostname: with `tls`, whom the context verifies and who is named to the server; None: the host
            of `address`, of a pipe nobody; "": nobody, which only a context without check_hostname accepts.
        tls_session: with `tls`, a session to resume: `tls.session` of an earlier connection.
        options: the options of Server that make sense for a connection.

    Returns:
        The connection. `on_connect` follows when it is connected; `on_close`, with the exception and a
        close_reason, when it cannot be. `close` and `abort` give up connecting; on_close(None) follows.

    Raises:
        TypeError, ValueError, ssl.SSLError: an argument is wrong; the message says what is allowed.
        RuntimeError: the given engine has been stopped.

    Any thread; never blocks. ConnectEx:
    learn.microsoft.com/windows/win32/api/mswsock/nc-mswsock-lpfn_connectex
    """
    pipe = check_pipe_name(address) if isinstance(address, str) else None
    if pipe is not None and local_address is not None:
        raise ValueError(f"local_address={local_address!r}: a pipe has none; leave it out")
    place = (pipe, 0) if pipe is not None else _check_target(address)
    local = None if local_address is None else _check_local(local_address)
    check_timeout("timeout", timeout)
    settings = _client_settings(options)
    if engine is not None and not isinstance(engine, Engine):
        raise TypeError(f"engine={engine!r}: must be an Engine or None")
    codec = _make_codec(settings, place, server_hostname, tls_session)
    connection = _make(handler, place)
    client = _Client(engine)
    shared = client.engine
    done = connection._connect_done
    connector = (
        Connector(shared, place, local, timeout, done)
        if pipe is None
        else PipeConnector(shared, pipe, timeout, done)
    )
    connection._attach_client(client.home(), connector, settings, place)
    connection._tls = codec
    client.connection = connection
    connector.start()
    return connection


def _make_codec(
    settings: Settings, place: Address, server_hostname: str | None, session: ssl.SSLSession | None
) -> TLSCodec | None:
    """Make what the handshake will need, so that what is wrong with it is known at once."""
    if settings.tls is None:
        if server_hostname is not None or session is not None:
            raise ValueError("server_hostname and tls_session mean something with tls= only")
        return None
    if server_hostname is None:
        host = str(place[0])
        server_hostname = "" if host.startswith(PIPE_PREFIX) else host.partition("%")[0]  # without a zone
    return make_codec("tls", settings.tls, False, server_hostname, session)


def _adopt(
    engine: Engine, sock: Any, handler: Any, data: Buffer, options: ClientOptions | dict[str, Any]
) -> Connection:
    """What Engine.adopt does."""
    settings, first = _client_settings(options), as_bytes(data)
    if settings.tls is not None:
        raise ValueError("tls=: adopt() cannot know which side this is; call start_tls in on_connect")
    peer = check_adoptable(sock)
    connection = _make(handler, peer)
    client = _Client(engine)
    try:
        adopted = adopt_socket(sock, engine.proactor, engine.port)
        try:
            set_options(adopted, settings)
        except OSError:
            adopted.close()
            raise
    except BaseException:
        client.engine.leave_soon(client)
        raise
    peer = parse_sockaddr(adopted.peer_raw) or peer
    connection._attach(None, client.home(), adopted, settings, peer)
    if settings.trace:
        connection._trace = Trace(settings.trace)
    client.connection = connection
    engine.dispatcher.call_soon(functools.partial(connection._start, first))
    return connection


# The engine is below connections and cannot name them: it is handed what makes them.
Engine._adopter = _adopt


def _client_settings(options: ClientOptions | dict[str, Any]) -> Settings:
    for name, value in options.items():
        if name not in ClientOptions.__annotations__:
            known = ", ".join(ClientOptions.__annotations__)
            raise TypeError(f"unknown option {name}={value!r}: those of a client are {known}")
    return make_settings({"silent_timeout": None, **options})


def _check_target(address: Any) -> Address:
    place = check_address(address)
    if not place[0]:
        raise ValueError(f"address={address!r}: names no host to connect to")
    if not place[1]:
        raise ValueError(f"address={address!r}: port 0 is nobody's; it must be from 1 to 65535")
    return place


def _check_local(address: Any) -> Address:
    try:
        place = check_address(address)
    except (TypeError, ValueError) as exc:
        raise type(exc)(f"local_{exc}") from None
    if numeric_family(place[0]) is None:
        raise ValueError(f"local_address={address!r}: the host must be numeric, like '127.0.0.1' or '::1'")
    return place


def _make(handler: Any, place: Address) -> Connection:
    good = issubclass(handler, Connection) if isinstance(handler, type) else callable(handler)
    if not good:
        raise TypeError(
            f"handler={handler!r}: must be a subclass of Connection, or a function of (None, address)"
        )
    connection: Any = handler(None, place)
    if not isinstance(connection, Connection):
        raise TypeError(f"handler={handler!r}: must make a Connection, and made {connection!r}")
    if hasattr(connection, "_state"):
        raise ValueError(f"handler={handler!r}: must make a new Connection, and made {connection!r}")
    return connection
