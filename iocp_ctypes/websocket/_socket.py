"""L7: WebSocket, what users subclass: callbacks, methods, the heartbeat, the beginning and the end.

Laws
1. It owns its connection's callbacks and its deadline (`Connection.set_deadline`). Whoever carries the
   connection forwards `on_data on_eof on_drain on_timeout on_close on_shutdown`.
2. `on_close` comes exactly once for each `on_open`, as soon as it is known that no message will come any
   more; the connection may need a moment longer to go.
3. The first reason counts: what the peer's Close said; what it did wrong; 1006 where it said nothing.
4. A peer is gone when a ping was not answered in `ping_timeout` and nothing else came since either: who is
   busy sending a long message cannot answer.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from .._addresses import Address, format_address
from .._errors import ConnectionClosedError
from ._handshake import HEAD_MAX, Handshake, head_of, shake, timed_out, too_long
from ._hub import Hub, hub_of
from ._incoming import Incoming
from ._outgoing import (
    ABNORMAL,
    CLOSE,
    CLOSED,
    CLOSING,
    CONNECTING,
    GOING_AWAY,
    INTERNAL_ERROR,
    NO_CODE,
    NORMAL,
    OPEN,
    PING,
    POLICY,
    REASON_MAX,
    STATE_NAMES,
    build,
    close_payload,
)

if TYPE_CHECKING:
    from ..connection import Connection

#: Seconds for a peer to answer the Close of a server that stops; then its connection is closed.
GOODBYE_TIMEOUT: Final = 1.0

log = logging.getLogger("iocp_ctypes")


class WebSocket(Incoming):
    """One end of a WebSocket; subclass it and override the callbacks, all of which are optional.

    Callbacks of one WebSocket never overlap and come in order, as those of a Connection, and on its threads.
    Options are class attributes, see `iocp_ctypes.websocket._limits.Options`: `subprotocols`, `origins`,
    `compression`, `message_max`, `fragments_max`, `queue_max`, `slow_reader`, `slow_timeout`,
    `ping_interval`, `ping_timeout`, `ping_when`, `open_timeout`, `close_timeout`,
    `collect_sends`.

    A class serves by itself, `WebSocketServer(address, Chat)` or `Server(address, Chat.serve)`, as a route
    of an HTTP server, and as a client, `connect_websocket(url, Chat)`.

    Attributes:
        connection: the Connection that carries it.
        id: a number that no other WebSocket of this process has.
        data: yours; None at first.
        handshake: the client's request, on a server; None on a client.
        subprotocol: the one that was agreed on; None.
        latency: seconds that the answer to the last ping of the heartbeat took; None.
        close_code, close_reason: what on_close was told; None before.
        dropped: messages of broadcasts that were dropped because this peer reads too slowly.
    """

    #: For HTTP: a route of this class is not answered but upgraded.
    upgrades = "websocket"

    def __init__(self, connection: Connection) -> None:
        """Called by the package. Override `on_open` rather than this."""
        super().__init__(connection)
        self.data: Any = None
        self.handshake: Handshake | None = None
        self.subprotocol: str | None = None
        self.latency: float | None = None
        self.close_code: int | None = None
        self.close_reason: str | None = None
        self._head: bytearray | None = bytearray()  # of the request, until it is complete
        self._hub: Hub | None = None
        self._opened = False  # on_open was called
        self._stopping = False  # the server stops
        self._leaving = False  # the connection is closed as soon as nothing waits to be sent
        self._open_due: float | None = None
        self._close_due: float | None = None
        self._ping_due: float | None = None
        self._pong_due: float | None = None
        self._ping_sent = 0.0
        self._pings = 0
        self._reading = True
        self._piecewise = type(self).on_fragment is not WebSocket.on_fragment

    # -- callbacks ------------------------------------------------------------------------------------------

    def on_handshake(self, handshake: Handshake) -> None:
        """A client asks to open: look at its request, and refuse it, add headers, choose a subprotocol."""

    def on_open(self) -> None:
        """The WebSocket is open."""

    def on_message(self, message: Any) -> None:
        """A message came: text as str, binary as bytes."""

    def on_fragment(self, data: Any, last: bool) -> None:
        """A part of a message came; overridden, it gets those that come in several instead of on_message."""

    def on_ping(self, data: bytes) -> None:
        """A ping came; it has been answered."""

    def on_pong(self, data: bytes) -> None:
        """The answer to a ping came; or one that nobody asked for."""

    def on_drain(self) -> None:
        """`send` had returned False, and now nothing waits here any more: send on."""

    def on_close(self, code: int, reason: str) -> None:
        """The last callback, once for each on_open.

        Args:
            code: what the peer's Close said, 1005 where it said nothing; else what it did wrong (1002, 1007,
                1008, 1009); 1011 where a callback of ours raised; 1006 where the connection just ended.
            reason: the peer's, or ours for it.
        """

    # -- the end --------------------------------------------------------------------------------------------

    def close(self, code: int | None = NORMAL, reason: str = "") -> None:
        """Close: what was sent before goes first, then a Close; `on_close` comes with the peer's answer.

        Args:
            code: 1000 to 1014 where RFC 6455 lets it be sent, or 3000 to 4999; None: a Close without a code.
            reason: at most 123 bytes as UTF-8.

        No message is delivered any more. A peer that does not answer for `close_timeout` is cut off. Again is
        a no-op. ValueError where code or reason cannot be sent. Any thread; never blocks.
        """
        self._say_goodbye(close_payload(code, reason), self.close_timeout)

    def _say_goodbye(self, payload: bytes, timeout: float) -> None:
        with self._lock:
            if self._state == OPEN:
                self._state = CLOSING
                self._send_last(payload)
                self._close_due = monotonic() + timeout
                self._arm()
            elif self._state == CONNECTING:
                self.connection.close()

    def _send_last(self, payload: bytes) -> None:
        """Send a Close behind all data. Needs the lock."""
        frame = build(CLOSE, payload, self._mask)
        batch, self._batch = self._batch, None
        self._parked.clear()
        try:
            self._hand_over(b"".join([*(batch or ()), frame]))
        except ConnectionClosedError:
            pass  # the connection has ended: on_close is on its way

    def abort(self) -> None:
        """End at once: what waits is dropped, the peer sees a reset. Any thread; never blocks."""
        self.connection.abort()

    def _fail(self, code: int, reason: str) -> None:
        """The peer is at fault, or we are: tell it, and end. On the strand."""
        self._deaf = True
        with self._lock:
            if self._state == OPEN:
                self._state = CLOSING
                self._waiting.clear()
                self._waiting_bytes = 0
                self._send_last(close_payload(code, _cut(reason)))
        self._finish(code, reason)
        self._leave()

    def _close_received(self, code: int, reason: str) -> None:
        """The peer's Close came: answer it if ours is not out, and end. On the strand."""
        self._deaf = True
        with self._lock:
            if self._state == OPEN:
                self._state = CLOSING
                self._send_last(b"" if code == NO_CODE else close_payload(code, reason))
            self._close_due = monotonic() + self.close_timeout
        self._finish(code, reason)
        if not self._mask:
            self._leave()
        else:
            self._arm()  # it is the server that closes the connection (RFC 6455, section 7.1.1)

    def _leave(self) -> None:
        """Close the connection, as soon as nothing waits to be sent. On the strand."""
        with self._lock:
            self._leaving = True
            if self._waiting:
                if self._close_due is None:
                    self._close_due = monotonic() + self.close_timeout
                self._arm()
                return
        self.connection.close()

    def _finish(self, code: int, reason: str) -> None:
        """Tell on_close, once. On the strand."""
        with self._lock:
            before, self._state = self._state, CLOSED
            if before == CLOSED:
                return
            code, reason = self._fate or (code, reason)
            self._ping_due = self._pong_due = None
        self._deaf = True
        self.close_code, self.close_reason = code, reason
        if self._hub is not None:
            self._hub._remove(self)
        self._message = self._text = None
        self._parts = []
        if self._opened or self._mask:
            self._call(self.on_close, code, reason)

    def _report(self, exc: BaseException) -> None:
        """A callback raised: tell the server's handle_error, and close with 1011. On the strand."""
        if not isinstance(exc, Exception):
            raise exc
        if isinstance(exc, ConnectionClosedError) and self._state != OPEN:
            return  # it sent on a WebSocket that ended under it, which is nobody's mistake
        connection = self.connection
        if connection.server is not None:
            connection.server.handle_error(connection, exc)
        else:
            peer = format_address(connection.peer_address)
            log.error("WebSocket %d to %s: a callback raised", self.id, peer, exc_info=exc)
        if self._state != CONNECTING:
            self._fail(INTERNAL_ERROR, "")

    # -- the connection's callbacks -------------------------------------------------------------------------

    def _on_data(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._core is not None:
            self._receive(data)
        else:
            self._request_came(data)

    def _on_eof(self) -> bool | None:
        self._finish(ABNORMAL, "")
        return None  # what is with the connection is sent, then it closes

    def _on_drain(self) -> None:
        with self._lock:
            self._full = False
            self._slow_due = None
        pong, self._pong = self._pong, None
        if pong is not None:
            self._send_now(pong)
        if not self._drained():
            return
        if self._leaving:
            self.connection.close()
        elif self._state == OPEN:
            self._call(self.on_drain)

    def _on_timeout(self, kind: str) -> bool | None:
        if kind == "deadline":
            return self._tick()
        if self._state == CONNECTING:
            return False
        self._say_goodbye(close_payload(GOING_AWAY, kind), self.close_timeout)
        return True

    def _on_shutdown(self) -> None:
        """The server stops: every client is to see 1001."""
        self._stopping = True
        if self._state == OPEN:
            self._say_goodbye(close_payload(GOING_AWAY, "the server stops"), GOODBYE_TIMEOUT)
        elif self._state == CLOSING and self._close_due is not None:
            self._close_due = min(self._close_due, monotonic() + GOODBYE_TIMEOUT)
            self._arm()
        else:
            self.connection.close()

    def _on_close(self, exc: OSError | None) -> None:
        self._finish(ABNORMAL, "" if exc is None else str(exc))

    # -- reading --------------------------------------------------------------------------------------------

    def pause_reading(self) -> None:
        """Take in no more until `resume_reading`; messages of the same receive still come.

        The heartbeat asks nobody meanwhile, for an answer would not be seen. Any thread; never blocks.
        """
        self._reading = False
        self.connection.pause_reading()

    def resume_reading(self) -> None:
        """Go on. Any thread; never blocks."""
        with self._lock:
            self._heard = monotonic()
            self._reading = True
        self.connection.resume_reading()

    # -- others ---------------------------------------------------------------------------------------------

    @property
    def hub(self) -> Hub:
        """The WebSockets of this server: broadcast, topics. RuntimeError on a client, which has none."""
        if self.connection.server is None:
            raise RuntimeError("a client's WebSocket belongs to no server: there is nobody to broadcast to")
        return self._hub or hub_of(self.connection.server)

    def subscribe(self, pattern: str) -> None:
        """Get what is published to topics that fit: "news/sport", "news/+", "news/#". Any thread."""
        self.hub.subscribe(self, pattern)

    def unsubscribe(self, pattern: str) -> None:
        """Get it no more. Any thread."""
        self.hub.unsubscribe(self, pattern)

    @property
    def server(self) -> Any:
        """The Server that accepted it; None on a client."""
        return self.connection.server

    @property
    def peer_address(self) -> Address:
        """The peer's address."""
        address: Address = self.connection.peer_address
        return address

    @property
    def open(self) -> bool:
        """True from on_open until a Close was sent or came, or the connection ended."""
        return self._state == OPEN

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {STATE_NAMES[self._state]}>"

    # -- opening --------------------------------------------------------------------------------------------

    @classmethod
    def upgrade(cls, connection: Connection, request: Any, rest: bytes) -> Callbacks | None:
        """Take a connection over from HTTP: answer the request; return what gets its callbacks from now on.

        Args:
            connection: the one on whose strand this is called.
            request: with method, target, http_version, and headers as (name, value) in bytes.
            rest: what came behind the request's head.

        Returns:
            An object with `on_data on_eof on_drain on_timeout on_close on_shutdown`; None where the client
            was refused, has its answer, and the connection closes.
        """
        websocket = cls(connection)
        websocket._head = None
        if not websocket._accept(head_of(request), rest):
            return None
        return Callbacks(websocket)

    @classmethod
    def serve(cls, server: Any, peer_address: Address) -> Connection:
        """Make the connection of a client, for `Server(address, Chat.serve)`."""
        from ._server import WebSocketConnection

        return WebSocketConnection(server, peer_address, cls)

    def _begin(self) -> None:
        """Wait for a client's request. On the strand."""
        self._open_due = monotonic() + self.open_timeout
        self._arm()

    def _request_came(self, data: bytes) -> None:
        """Collect the head of a request; answer it when it is complete. On the strand."""
        head = self._head
        if head is None:
            return  # it was refused
        start = max(0, len(head) - 3)
        head += data
        end = head.find(b"\r\n\r\n", start) + 4
        if end > 3 and end <= HEAD_MAX:
            self._head = None
            self._accept(bytes(head[:end]), bytes(head[end:]))
        elif len(head) > HEAD_MAX:
            self._head = None
            self._refuse(too_long())

    def _refuse(self, answer: bytes) -> None:
        self._deaf = True
        self.connection.send(answer)
        self.connection.close()

    def _accept(self, head: bytes, rest: bytes) -> bool:
        """Answer a client's request; False where it was refused. On the strand."""
        core, answer = shake(self, head)
        if core is None:
            self._refuse(answer)
            return False
        self._core = core
        self.connection.send(answer)
        if self.handshake is not None:
            self.subprotocol = self.handshake.subprotocol
        self._hub = hub_of(self.connection.server) if self.connection.server is not None else None
        self._opening()
        if rest and not self._deaf:
            self._receive(rest)
        return True

    def _be_client(self) -> None:
        super()._be_client()
        self._open_due = monotonic() + self.open_timeout

    def _refused(self, reason: str) -> None:
        """The server does not open, or not as RFC 6455 says. On the strand."""
        self._finish(ABNORMAL, reason)
        self.connection.close()

    def _opening(self) -> None:
        """The handshake is done. On the strand."""
        if self._core.extensions:
            self._use(self._core.extensions[0])
        self._open_due = None
        with self._lock:
            self._state = OPEN
            if self._mask:
                self._full = False
                self._drained()
            self._heard = monotonic()
            if self.ping_interval is not None:
                self._ping_due = self._heard + self.ping_interval
            self._arm()
        if self._hub is not None:
            self._hub._add(self)
        self._opened = True
        self._call(self.on_open)

    # -- time -----------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Have the connection call on_timeout when something is due."""
        with self._lock:
            dues = (self._open_due, self._close_due, self._ping_due, self._pong_due, self._slow_due)
            due = min((at for at in dues if at is not None), default=None)
            self.connection.set_deadline(None if due is None else max(0.0, due - monotonic()))

    def _tick(self) -> bool:
        """Look what is due; False: end the connection. On the strand."""
        now = monotonic()
        if self._open_due is not None and self._open_due <= now:
            self._open_due = None
            self._deaf = True
            self._fate = (ABNORMAL, f"the handshake took more than {self.open_timeout:g} s")
            if not self._mask:
                self.connection.send(timed_out())
            return False
        with self._lock:
            if self._close_due is not None and self._close_due <= now:
                self._close_due = None
                if self._stopping:  # by FIN: a reset could take the Close along
                    self.connection.close()
                else:
                    self._give_up(ABNORMAL, "the peer did not answer the Close")
                return True
            if self._slow_due is not None and self._slow_due <= now:
                text = f"the peer reads too slowly: it caught up with nothing for {self.slow_timeout:g} s"
                self._give_up(POLICY, text)
                return True
        if self._pong_due is not None and self._pong_due <= now:
            self._judge(now)
        if self._ping_due is not None and self._ping_due <= now:
            self._beat(now)
        self._arm()
        return True

    def _judge(self, now: float) -> None:
        """A ping was not answered in time: is anybody there?"""
        assert self.ping_timeout is not None
        if not self._reading:
            self._pong_due = now + self.ping_timeout  # nobody looks
            return
        self._pong_due = max(self._ping_sent, self._heard) + self.ping_timeout
        if self._pong_due <= now:
            self._ping_due = self._pong_due = None
            with self._lock:
                self._give_up(ABNORMAL, f"nothing came for {self.ping_timeout:g} s after a ping")

    def _beat(self, now: float) -> None:
        """Send a ping, unless one is on its way or, where only quiet peers are asked, something came."""
        assert self.ping_interval is not None
        if self.ping_when == "quiet" and self._heard + self.ping_interval > now:
            self._ping_due = self._heard + self.ping_interval
            return
        self._ping_due = now + self.ping_interval
        if self._pong_due is None and self._reading:
            self._pings += 1
            self._ping_sent = now
            if self.ping_timeout is not None:
                self._pong_due = now + self.ping_timeout
            self._send_control(PING, b"%d" % self._pings)

    def _ponged(self, data: bytes) -> None:
        """A pong came: is it the answer to the heartbeat's last ping?"""
        if self._pings and data == b"%d" % self._pings:
            self.latency = monotonic() - self._ping_sent
            self._pong_due = None


class Callbacks:
    """A WebSocket as HTTP sees it: the callbacks of a connection, each of which goes to the WebSocket."""

    __slots__ = ("on_close", "on_data", "on_drain", "on_eof", "on_shutdown", "on_timeout", "websocket")

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.on_data = websocket._on_data
        self.on_eof = websocket._on_eof
        self.on_drain = websocket._on_drain
        self.on_timeout = websocket._on_timeout
        self.on_close = websocket._on_close
        self.on_shutdown = websocket._on_shutdown


def _cut(reason: str) -> str:
    """Return as much of a text as a Close carries."""
    return reason.encode()[:REASON_MAX].decode(errors="ignore")
