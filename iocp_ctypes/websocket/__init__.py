"""L7: WebSocket servers and clients: RFC 6455 and permessage-deflate (RFC 7692).

The protocol is that of the library `websockets`, its part without I/O: it parses frames, inflates, negotiates
the handshake and builds frames. Here is what goes around: a `Connection` that carries the bytes, callbacks in
order, heartbeat, limits, the closing handshake, broadcast.

Laws of the package
1. It uses the public methods of Connection, Server and connect, and nothing below them.
2. What came is parsed on the connection's strand, and only there; sending is for any thread, under `_lock`.
3. A callback that raises closes its own WebSocket, with 1011. `on_close` comes exactly once, last.
4. Whatever a peer can make grow has a limit: the head, a message, its fragments, what waits to be sent.

    from iocp_ctypes.websocket import WebSocket, WebSocketServer

    class Echo(WebSocket):
        def on_message(self, message: str | bytes) -> None:
            self.send(message)

    WebSocketServer(("0.0.0.0", 9000), Echo).serve_forever()
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("websockets") is None:
    raise ImportError(
        "iocp_ctypes.websocket needs the library websockets: pip install iocp-ctypes[websocket]"
    )

from ._client import connect_websocket
from ._handshake import Handshake
from ._hub import Hub, hub_of
from ._limits import Deflate
from ._server import WebSocketConnection, WebSocketServer
from ._socket import WebSocket

__all__ = [
    "Deflate",
    "Handshake",
    "Hub",
    "WebSocket",
    "WebSocketConnection",
    "WebSocketServer",
    "connect_websocket",
    "hub_of",
]
