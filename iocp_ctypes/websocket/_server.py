"""L7: servers that speak WebSocket and nothing else.

Laws
1. The connection is a thin one: every callback goes to its WebSocket.
2. A server is a Server; what it adds is told by its hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .._addresses import Address
from ..connection import Connection
from ..server import Server
from ._hub import Hub, hub_of
from ._socket import WebSocket

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import ServerOptions
    from ..engine import Engine


class WebSocketConnection(Connection):
    """A Connection whose first bytes are a request to open a WebSocket.

    Subclass it with `handler` set, and give it to Server; `Chat.serve` makes one for a class of WebSockets.

    Attributes:
        handler: the class of its WebSocket.
        websocket: its WebSocket.
    """

    __slots__ = ("websocket",)
    handler: type[WebSocket] = WebSocket

    def __init__(
        self,
        server: Any = None,
        peer_address: Address | None = None,
        handler: type[WebSocket] | None = None,
    ) -> None:
        """Called by the server; `handler` in place of the class's."""
        super().__init__(server, peer_address)
        self.websocket = (handler or self.handler)(self)

    def on_connect(self) -> None:
        """Wait for the request."""
        self.websocket._begin()

    def on_data(self, data: bytes) -> None:
        """Bytes for the WebSocket."""
        self.websocket._on_data(data)

    def on_eof(self) -> bool | None:
        """The peer sends no more."""
        return self.websocket._on_eof()

    def on_drain(self) -> None:
        """The connection takes more."""
        self.websocket._on_drain()

    def on_timeout(self, kind: str) -> bool | None:
        """Something is due."""
        return self.websocket._on_timeout(kind)

    def on_shutdown(self) -> None:
        """The server stops."""
        self.websocket._on_shutdown()

    def on_close(self, exc: OSError | None) -> None:
        """The connection has ended."""
        self.websocket._on_close(exc)


class WebSocketServer(Server):
    """A server of WebSockets, of one class."""

    def __init__(
        self,
        address: Any,
        handler: type[WebSocket],
        *,
        engine: Engine | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        """Bind and listen, as Server does.

        Args:
            address: as for Server.
            handler: a subclass of WebSocket.
            engine: as for Server.
            options: those of Server.

        Raises:
            TypeError: the handler is no class of WebSockets. Else as Server.
        """
        if not (isinstance(handler, type) and issubclass(handler, WebSocket)):
            raise TypeError(f"handler={handler!r}: must be a subclass of WebSocket")
        super().__init__(address, handler.serve, engine=engine, **options)

    @property
    def hub(self) -> Hub:
        """The open WebSockets: enumeration, broadcast, topics."""
        return hub_of(self)

    @property
    def websockets(self) -> list[WebSocket]:
        """The WebSockets of this instant that are open."""
        return self.hub.websockets

    def broadcast(  # type: ignore[override]  # messages in place of bytes: see Hub.broadcast
        self,
        message: str | bytes,
        to: Iterable[WebSocket] | Callable[[WebSocket], bool] | None = None,
        exclude: Iterable[WebSocket] | WebSocket = (),
    ) -> int:
        """Send a message to many: see `Hub.broadcast`."""
        return self.hub.broadcast(message, to, exclude)

    def publish(self, topic: str, message: str | bytes, exclude: Iterable[WebSocket] | WebSocket = ()) -> int:
        """Send a message to all who have subscribed to a topic: see `Hub.publish`."""
        return self.hub.publish(topic, message, exclude)
