"""L7: connect_websocket, the client side.

Laws
1. It never blocks: it returns a WebSocket that is not open yet. What is sent on it meanwhile goes when it is;
   on_open comes then. Where it cannot be opened, on_close is the only callback, with 1006 and why.
2. All arguments are checked before anything is begun.
"""

from __future__ import annotations

import ssl
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from websockets.exceptions import InvalidURI
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.protocol import State
from websockets.uri import WebSocketURI, parse_uri

from .._addresses import Address
from ..client import connect
from ..connection import Connection
from ._core import LOG, ClientCore
from ._limits import TOKEN, Deflate
from ._outgoing import CONNECTING
from ._socket import WebSocket


def client_extensions(deflate: Deflate | None) -> list[Any] | None:
    """Return what the library offers extensions with."""
    if deflate is None:
        return None
    return [
        ClientPerMessageDeflateFactory(
            server_no_context_takeover=not deflate.peer_takeover,
            client_no_context_takeover=not deflate.takeover,
            server_max_window_bits=deflate.peer_window_bits,
            client_max_window_bits=deflate.window_bits,
            compress_settings=deflate.settings,
        )
    ]


class _ClientConnection(Connection):
    """The connection of a client's WebSocket."""

    __slots__ = ("_headers", "_origin", "_uri", "websocket")

    def __init__(
        self,
        handler: Callable[[Connection], WebSocket],
        uri: WebSocketURI,
        origin: str | None,
        headers: list[tuple[str, str]],
    ) -> None:
        super().__init__()
        self._uri = uri
        self._origin = origin
        self._headers = headers
        self.websocket = handler(self)
        self.websocket._be_client()

    def on_connect(self) -> None:
        """Ask the server to open."""
        websocket = self.websocket
        core = ClientCore(
            self._uri,
            origin=self._origin,  # type: ignore[arg-type]  # a NewType of str
            extensions=client_extensions(websocket.compression),
            subprotocols=list(websocket.subprotocols) or None,  # type: ignore[arg-type]  # a NewType of str
            max_size=websocket.message_max,
            logger=LOG,
        )
        request = core.connect()
        for name, value in self._headers:
            request.headers[name] = value
        core.send_request(request)
        websocket._core = core
        self.send(b"".join(core.data_to_send()))

    def on_data(self, data: bytes) -> None:
        """The server's answer, then frames."""
        websocket = self.websocket
        if websocket._state != CONNECTING:
            websocket._on_data(data)
            return
        core = websocket._core
        core.receive_data(data)
        if core.handshake_exc is not None:
            websocket._refused(f"{core.handshake_exc}")
        elif core.state is not State.CONNECTING:
            events = core.events_received()
            websocket.subprotocol = core.subprotocol
            websocket._opening()
            websocket._work_off(events[1:])

    def on_eof(self) -> bool | None:
        """The server sends no more."""
        return self.websocket._on_eof()

    def on_drain(self) -> None:
        """The connection takes more."""
        self.websocket._on_drain()

    def on_timeout(self, kind: str) -> bool | None:
        """Something is due."""
        return self.websocket._on_timeout(kind)

    def on_close(self, exc: OSError | None) -> None:
        """The connection has ended."""
        self.websocket._on_close(exc)


def connect_websocket(
    url: str | Address,
    handler: Callable[[Connection], WebSocket] = WebSocket,
    *,
    origin: str | None = None,
    headers: Iterable[tuple[str, str]] = (),
    timeout: float | None = None,
    tls: ssl.SSLContext | None = None,
    **options: Any,
) -> WebSocket:
    """Open a WebSocket to a server; returns at once.

    Args:
        url: "ws://host:port/path?query" or "wss://...", or (host, port).
        handler: a subclass of WebSocket, whose options count: `subprotocols` are offered, `compression` too.
        origin: the Origin header; browsers send one, other clients need not.
        headers: more of the request, as (name, value).
        timeout: seconds for connecting; `open_timeout` of the handler is for that and the handshake together.
        tls: the ssl.SSLContext for "wss"; None: the system's certificates count.
        options: those of `connect`.

    Returns:
        The WebSocket. `on_open` follows, or `on_close` with 1006 and why it could not be opened.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what is allowed.

    Any thread; never blocks.
    """
    uri = _check_url(url)
    if uri.secure:
        options["tls"] = tls if tls is not None else ssl.create_default_context()
        options.setdefault("server_hostname", uri.host)
    elif tls is not None:
        raise ValueError(f"tls={tls!r}: is for a url that begins with wss://")
    more = [_check_header(name, value) for name, value in headers]

    def make(_server: Any, _peer_address: Address) -> Connection:
        return _ClientConnection(handler, uri, origin, more)

    connection: Any = connect((uri.host, uri.port), make, timeout=timeout, **options)
    websocket: WebSocket = connection.websocket
    websocket._arm()  # open_timeout counts from here
    return websocket


def _check_url(url: Any) -> WebSocketURI:
    if isinstance(url, tuple) and len(url) == 2:
        host, port = url
        url = f"ws://[{host}]:{port}/" if ":" in str(host) else f"ws://{host}:{port}/"
    if not isinstance(url, str):
        raise TypeError(f"url={url!r}: must be a str like 'ws://host:port/path', or (host, port)")
    try:
        if urllib.parse.urlsplit(url).port == 0:  # the library would take it for none at all
            raise ValueError("port 0 is nobody's")
        return parse_uri(url)
    except (InvalidURI, ValueError) as exc:
        raise ValueError(f"url={url!r}: must be like 'ws://host:port/path' or 'wss://...': {exc}") from None


def _check_header(name: Any, value: Any) -> tuple[str, str]:
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"headers: {(name, value)!r} must be two str")
    if not TOKEN.fullmatch(name) or not value.isascii() or not value.isprintable():
        raise ValueError(f"headers: {(name, value)!r} must be a token and printable ASCII (RFC 9110)")
    return name, value
