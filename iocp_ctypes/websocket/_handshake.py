"""L7: the opening handshake, as a server sees it.

Laws
1. The library reads the request and decides what RFC 6455 decides: method, version, key, origin, extensions.
   Only a request that it would accept comes to `on_handshake`.
2. One way for both kinds of server: what HTTP has parsed already is written down again as a head.
"""

from __future__ import annotations

import http
from collections.abc import Iterable
from typing import Any, Final

from websockets.exceptions import InvalidHandshake, NegotiationError
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.headers import parse_subprotocol

from .._addresses import Address
from .._options import KIB
from ._core import LOG, ServerCore
from ._limits import TOKEN, Deflate

#: Bytes of the head of a request; the library has limits for its lines as well.
HEAD_MAX: Final = 64 * KIB
SWITCHING: Final = 101
#: Bits of the smallest window that zlib compresses with.
WINDOW_BITS_MIN: Final = 9


class Handshake:
    """A client's request to open a WebSocket, and what `on_handshake` may do about it.

    Attributes:
        method, target, path, query, http_version: of the request, as they came; `query` without its "?".
        headers: list of (name in lower case, value), both bytes.
        peer_address: the client's.
        origin: the page that connects; None where the client says none.
        subprotocols: those that the client offers, in its order.
        subprotocol: the one that was chosen; may be set to another that is offered, or to None.
    """

    def __init__(self, request: Any, peer_address: Address, chosen: Iterable[str]) -> None:
        """Called by the package, with the library's request and the server's subprotocols."""
        self.method: str = getattr(request, "method", "GET")
        self.http_version = str(getattr(request, "protocol", "HTTP/1.1")).rpartition("/")[2]
        self.target: str = request.path
        self.path, _, self.query = self.target.partition("?")
        self.headers: list[tuple[bytes, bytes]] = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in request.headers.raw_items()
        ]
        self.peer_address = peer_address
        self.origin = self.header("Origin")
        self.subprotocols: list[str] = [
            offered
            for value in request.headers.get_all("Sec-WebSocket-Protocol")
            for offered in parse_subprotocol(value)
        ]
        self.subprotocol: str | None = next((name for name in chosen if name in self.subprotocols), None)
        self.refused: tuple[int, str] | None = None
        self._added: list[tuple[str, str]] = []

    def header(self, name: str) -> str | None:
        """Return the value of a header, whatever the case of its name; several joined; None: not there."""
        wanted = name.lower().encode("latin-1")
        values = [value.decode("latin-1") for key, value in self.headers if key == wanted]
        return ", ".join(values) if values else None

    def add_header(self, name: str, value: str) -> None:
        """Add a header to the answer, be it yes or no. ValueError where it could not be one."""
        if not TOKEN.fullmatch(name):
            raise ValueError(f"name={name!r}: is no name of a header")
        if not value.isprintable() or not value.isascii():
            raise ValueError(f"value={value!r}: a header's value is printable ASCII")
        self._added.append((name, value))

    def refuse(self, status: int, text: str = "") -> None:
        """Answer with a status, 300 to 599, and a short text in place of opening; the connection closes."""
        if not isinstance(status, int) or not 300 <= status < 600 or status not in STATUSES:
            raise ValueError(f"status={status!r}: must be a status of HTTP from 300 to 599")
        self.refused = (int(status), text)

    def dress(self, response: Any) -> None:
        """Add to the library's answer what was decided."""
        for name, value in self._added:
            response.headers[name] = value
        if response.status_code == SWITCHING and self.subprotocol is not None:
            if self.subprotocol not in self.subprotocols:
                raise ValueError(f"subprotocol={self.subprotocol!r}: the client offers {self.subprotocols}")
            response.headers["Sec-WebSocket-Protocol"] = self.subprotocol


STATUSES: Final = frozenset(int(status) for status in http.HTTPStatus)


class _Factory(ServerPerMessageDeflateFactory):
    """The library's, which before version 17 agreed on a window that zlib does not have."""

    def process_request_params(self, params: Any, accepted_extensions: Any) -> Any:
        """Negotiate; NegotiationError where the offer cannot be met."""
        try:
            answer, extension = super().process_request_params(params, accepted_extensions)
        except ValueError as exc:
            raise NegotiationError(str(exc)) from exc
        if extension.local_max_window_bits < WINDOW_BITS_MIN:
            raise NegotiationError("server_max_window_bits is less than zlib can do")
        return answer, extension


def server_extensions(deflate: Deflate | None) -> list[Any] | None:
    """Return what the library negotiates extensions with."""
    if deflate is None:
        return None
    return [
        _Factory(
            server_no_context_takeover=not deflate.takeover,
            client_no_context_takeover=not deflate.peer_takeover,
            server_max_window_bits=deflate.window_bits,
            client_max_window_bits=deflate.peer_window_bits,
            compress_settings=deflate.settings,
        )
    ]


def shake(websocket: Any, head: bytes) -> tuple[Any, bytes]:
    """Answer a request.

    Args:
        websocket: whose options count, and whose `on_handshake` is asked.
        head: the request, up to and with its empty line.

    Returns:
        The library's protocol object, open, or None where the client was refused; and the answer.
    """
    core = ServerCore(
        origins=websocket.origins,
        extensions=server_extensions(websocket.compression),
        max_size=websocket.message_max,
        logger=LOG,
    )
    core.receive_data(head)
    events = core.events_received()
    if not events:  # it could not read the request, and has said so or not
        written = b"".join(core.data_to_send())
        return None, written or core.reject(400, "This is no request of HTTP.\n").serialize()
    request: Any = events[0]
    response = core.accept(request)
    if response.status_code == SWITCHING:
        response = _decide(websocket, core, request, response)
    elif response.status_code == http.HTTPStatus.UPGRADE_REQUIRED and websocket.page is not None:
        response = core.reject(http.HTTPStatus.OK, websocket.page)
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "text/html; charset=utf-8"
    core.send_response(response)
    return core if response.status_code == SWITCHING else None, b"".join(core.data_to_send())


def _decide(websocket: Any, core: ServerCore, request: Any, response: Any) -> Any:
    """Ask on_handshake; return the answer: the library's or another."""
    if len(request.headers.get_all("Host")) != 1:  # RFC 9112, section 3.2; the library leaves it to us
        return core.reject(400, "There must be one Host header.\n")
    try:
        handshake = Handshake(request, websocket.connection.peer_address, websocket.subprotocols)
    except InvalidHandshake as exc:
        return core.reject(400, f"{exc}.\n")
    websocket.handshake = handshake
    try:
        websocket.on_handshake(handshake)
        if handshake.refused is not None:
            status, text = handshake.refused
            response = core.reject(status, text or f"{http.HTTPStatus(status).phrase}.\n")
        handshake.dress(response)
    except Exception as exc:
        websocket._report(exc)
        return core.reject(500, "The server failed to answer.\n")
    return response


def head_of(request: Any) -> bytes:
    """Write down again what HTTP has parsed: method, target, http_version and headers of a request."""
    lines = [b"%s %s HTTP/%s" % (_raw(request.method), _raw(request.target), _raw(request.http_version))]
    lines += [b"%s: %s" % (_raw(name), _raw(value)) for name, value in request.headers]
    return b"\r\n".join([*lines, b"", b""])


def _raw(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def timed_out() -> bytes:
    """Return the answer to a request that took too long."""
    core = ServerCore(logger=LOG)
    return bytes(core.reject(http.HTTPStatus.REQUEST_TIMEOUT, "The request took too long.\n").serialize())


def too_long() -> bytes:
    """Return the answer to a head that is longer than HEAD_MAX."""
    core = ServerCore(logger=LOG)
    status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    return bytes(core.reject(status, "The head is too long.\n").serialize())
