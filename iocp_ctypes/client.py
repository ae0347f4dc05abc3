"""L6: connect, the client side.

Laws
1. connect() never blocks: it returns a Connection that is not connected yet. What is sent on it meanwhile
   is sent once it is; on_connect comes then. Where connecting fails, on_close is the only callback, with
   why.
2. A connection keeps its engine running until its on_close has returned.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from ._addresses import Address, check_address, format_address
from ._connector import Connector
from ._lifetime import Home
from ._options import ClientOptions, check_timeout, make_settings
from .connection import Connection
from .engine import Engine, enter_engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

log = logging.getLogger("iocp_ctypes")


class _Client:
    """What a client connection has in place of a server."""

    def __init__(self, engine: Engine | None, connection: Connection) -> None:
        self.connection = connection
        self.engine = enter_engine(self, self.at_exit, engine, 0)

    def at_exit(self) -> None:
        """The interpreter ends."""
        self.connection.abort()
        self.connection.wait_closed(1.0)

    def gone(self, _connection: Connection) -> None:
        """on_close has returned: leave the engine, on a thread that may wait for the I/O threads to end."""
        threading.Thread(target=self.engine.leave, args=(self,), name="iocp_ctypes leave").start()

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
    **options: Unpack[ClientOptions],
) -> Connection:
    """Connect to an address; returns at once.

    Args:
        address: (host, port). All addresses of a name are tried, with a staggered start (RFC 8305).
        handler: a Connection subclass, or a factory called with (None, address) that returns a Connection.
        timeout: seconds for all of it, the look-up included; None: as long as the system tries.
        local_address: (host, port) to connect from; None: any.
        engine: whose threads to use; None: the engine of the process.
        options: the options of Server that make sense for a connection.

    Returns:
        The connection. `on_connect` follows when it is connected; `on_close`, with the exception and a
        close_reason, when it cannot be.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what is allowed.

    Any thread; never blocks. ConnectEx:
    learn.microsoft.com/windows/win32/api/mswsock/nc-mswsock-lpfn_connectex
    """
    place = check_address(address)
    local = None if local_address is None else check_address(local_address)
    settings = make_settings({"silent_timeout": None, **options})
    check_timeout("timeout", timeout)
    connection: Any = handler(None, place)
    if not isinstance(connection, Connection):
        raise TypeError(f"handler={handler!r}: must make a Connection, and made {connection!r}")
    client = _Client(engine, connection)
    shared = client.engine
    home = Home(shared, client.gone, client.failed, None, shared.dispatcher.is_io_thread)
    connector = Connector(shared, place, local, timeout, connection._connect_done)
    connection._attach_client(home, connector, settings, place)
    connector.start()
    return connection
