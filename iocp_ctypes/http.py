"""L7: the HTTP/1.1 server: HTTPConnection, and what belongs to it (needs h11: pip install iocp-ctypes[http]).

    from iocp_ctypes import Server
    from iocp_ctypes.http import HTTPConnection, Response

    class Hello(HTTPConnection):
        def on_request(self, request):
            return Response("hello\\n")

    Server(("127.0.0.1", 8000), Hello).serve_forever()

Laws
1. Requests are read one at a time: while one waits for its answer, what came behind it waits, too, and above
   READ_AHEAD_MAX bytes the peer is held back.
2. What is not clearly a request is answered with an error and the connection closed: nobody knows where it
   ends.
3. Whoever is slow is cut off at a deadline that single bytes do not move: heads at theirs, bodies and answers
   by their rate.
4. The connection's own deadline (`set_deadline`) is ours, and is set rarely: `_due` says what is due.
5. After an upgrade every callback is the other protocol's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, ClassVar, Final, Protocol

from ._detect import detect
from ._errors import ConnectionClosedError
from ._httpanswer import ANSWERING, BODY, CALLING, DONE, HEAD, LAST, NOTHING, STARTED, Answers
from ._httpfiles import StaticFiles
from ._httplimits import Limits
from ._httplog import Metrics
from ._httpmessage import CONTINUE, FileBody, Request, Response, problem
from ._httpparse import BodyReader, Refused, check_partial, parse_head
from ._sse import EventStream, encode_event

__all__ = [
    "EventStream",
    "FileBody",
    "HTTPConnection",
    "Limits",
    "Metrics",
    "Request",
    "Response",
    "StaticFiles",
    "Switched",
    "detect",
    "encode_event",
    "problem",
]

#: Bytes behind a request that are kept until it is answered; then the peer is held back.
READ_AHEAD_MAX: Final = 64 * 1024
#: The methods that are handed to the application; others are answered with 501.
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

#: What is due at `_due`: the next request; the rest of a head; bytes of a body; that the peer takes something
#: of an answer; a sign of life in a stream of events.
NEXT, HEADER, BYTES, TAKEN, BEAT = "next", "header", "bytes", "taken", "beat"


class Switched(Protocol):
    """What a connection's callbacks are handed to after an upgrade; as those of Connection."""

    def on_data(self, data: bytes) -> None:
        """Bytes came."""

    def on_eof(self) -> bool | None:
        """The peer will send no more."""

    def on_drain(self) -> None:
        """The write queue has fallen to the low mark."""

    def on_timeout(self, kind: str) -> bool | None:
        """A time-out or the deadline ran out."""

    def on_close(self, exc: OSError | None) -> None:
        """The last callback."""


class HTTPConnection(Answers):
    """A connection of an HTTP server; subclass it, and set what is below in the class.

    A subclass that overrides a callback of Connection calls ours (`super().on_drain()` and so on).

    Attributes:
        limits: what a peer may ask; see Limits.
        routes: handlers by path: a function of a request that returns a Response, or None where it will call
            `request.connection.respond` later; StaticFiles; Metrics; a class with `upgrades = "websocket"`.
            A path that ends with "/" stands for all below it, too; the longest that fits is taken.
        guards: functions of a request, called in turn before its body is read: the first Response that one
            returns is the answer; see iocp_ctypes.access.
        methods: the methods that there are; others are answered with 501.
        server_name: the Server field; "": none.
        access_log: called with a line in the combined format for each request, on the thread that answers.
        metrics: counts answers; see Metrics.
    """

    routes: ClassVar[Mapping[str, Any]] = {}
    guards: ClassVar[Sequence[Callable[[Request], Response | None]]] = ()
    methods: ClassVar[frozenset[str]] = METHODS

    _streams: ClassVar[bool] = False  # whether the class has its own on_body_chunk
    _switched: Switched | None = None
    _waiting = b""  # the beginning of a head, or what came behind a request that is not answered yet
    _held = False  # we hold the peer back
    _halted = False  # the application does
    _target: Any = None
    _reader: BodyReader | None = None
    _pieces: list[bytes]
    _body_began = 0.0
    _body_before = 0  # bytes of it that had come by then
    _eof = False
    _due: float | None = None
    _due_kind = NEXT
    _armed = math.inf  # when the deadline that is set will come
    _taken = -1  # bytes that the peer had taken when it was looked at last
    _stream: EventStream | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._streams = cls.on_body_chunk is not HTTPConnection.on_body_chunk
        if not isinstance(cls.limits, Limits):
            raise TypeError(f"{cls.__name__}.limits={cls.limits!r}: must be a Limits object")
        for path, target in cls.routes.items():
            if not path.startswith("/"):
                raise ValueError(f"{cls.__name__}.routes: {path!r}: must begin with '/'")
            if not callable(target):
                raise TypeError(f"{cls.__name__}.routes: {path!r}: {target!r} is no function and no class")
        for guard in cls.guards:
            if not callable(guard):
                raise TypeError(f"{cls.__name__}.guards: {guard!r} is no function of a request")

    # -- for applications -----------------------------------------------------------------------------------

    def on_head(self, request: Request) -> Response | None:
        """A request's head came; its body has not been read, and "100 Continue" not been sent.

        Return a Response to answer at once; the connection is closed then, if there is a body. Set
        `request.streaming` to choose whether the body goes to on_body_chunk. By default the guards decide.
        """
        for guard in self.guards:
            response = guard(request)
            if response is not None:
                return response
        return None

    def on_body_chunk(self, request: Request, data: bytes) -> None:
        """A piece of the body came; a class that overrides this gets all bodies so, unless on_head says else.

        `pause_reading` holds the peer back.
        """

    def on_request(self, request: Request) -> Response | None:
        """A request came to its end; `request.body` has its body, unless that was streamed.

        Return a Response; or None and call `respond`, now or later and from any thread. By default what
        `routes` has for the path is called; without, 404. What is raised is logged and answered with 500;
        once the answer has begun, the connection is aborted.
        """
        target = self._target
        if target is None:
            if request.path + "/" in self.routes:
                query = f"?{request.query}" if request.query else ""
                return problem(308, headers=[("Location", request.raw_path + "/" + query)])
            return problem(404)
        answer: Response | None = target(request)
        return answer

    def switch(self, protocol: Switched) -> None:
        """Hand every further callback to another object: this connection speaks HTTP no more.

        On the thread of a callback. The deadline is cleared.
        """
        self._clear_deadline()
        self._hand_over(protocol)

    def _clear_deadline(self) -> None:
        self._due = None
        if self._armed != math.inf:
            self._armed = math.inf
            self.set_deadline(None)

    def _hand_over(self, protocol: Switched) -> None:
        self._switched = protocol
        self._phase = LAST
        self._answer = DONE
        self._waiting = b""

    # -- reading --------------------------------------------------------------------------------------------

    def on_data(self, data: bytes) -> None:
        """Bytes came."""
        if self._switched is not None:
            self._switched.on_data(data)
            return
        if self._waiting and self._phase == HEAD:
            data, self._waiting = self._waiting + data, b""
        self._go_on(data)

    def _go_on(self, data: bytes) -> None:
        """Read request by request, as far as it goes."""
        try:
            while data:
                phase = self._phase
                if phase == HEAD:
                    data = self._read_head(data)
                elif phase == BODY:
                    data = self._read_body(data)
                elif phase == ANSWERING:
                    self._waiting += data
                    if len(self._waiting) > READ_AHEAD_MAX and not self._held:
                        self._held = True
                        super().pause_reading()
                    return
                else:
                    return  # the connection closes, or is somebody else's
        except Refused as exc:
            self._refuse(exc.status, exc.text)
            return
        if self._eof and self._phase == HEAD:
            self.close()

    def _read_head(self, data: bytes) -> bytes:
        """Take a request from the beginning of `data`, and return what is left; Refused."""
        if data[:2] == b"\r\n":  # RFC 9112 section 2.2: some peers send it behind a body
            return data[2:]
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            check_partial(data, self.limits)
            if self._due_kind != HEADER or self._due is None:
                self._set_due(HEADER, self.limits.header_timeout)
            self._waiting = data
            return b""
        head, rest = (data, b"") if end == len(data) else (data[:end], data[end:])
        self._answer, self._request = DONE, None
        request, parser = parse_head(head, self.limits, self.peer_address)
        request.connection = self
        self._request, self._answer, self._due = request, NOTHING, None
        self._requests += 1
        self._size = 0
        if request.method not in self.methods:
            raise Refused(501, "there is no such method here")
        reader = BodyReader(parser, request, self.limits.body_max) if request.length != 0 else None
        self._phase = CALLING if reader is None else BODY
        expect = request.field(b"expect")
        if expect is not None and expect.lower() != b"100-continue":
            raise Refused(417, "the only expectation there is is 100-continue")
        if self.routes:
            self._target = self._find(request)
        request.streaming = self._streams
        if not self._call_application(request, self.on_head):
            self._settle()
            return rest
        if hasattr(self._target, "upgrades"):
            if reader is not None:
                raise Refused(400, "an upgrade has no body")
            return self._upgrade(request, rest)
        if reader is None:
            self._call_application(request, self.on_request)
            self._settle()
            return rest
        self._reader, self._pieces = reader, []
        self._begin_rate(0)
        if expect is not None and not rest and request.http_version != "1.0" and self._answer == NOTHING:
            self.send(CONTINUE)
        return self._read_body(rest) if rest else b""

    def _read_body(self, data: bytes) -> bytes:
        """Take what is the body's from `data`, and return what is left; Refused."""
        reader, request = self._reader, self._request
        assert reader is not None
        assert request is not None
        pieces = reader.feed(data)
        if request.streaming:
            for piece in pieces:
                if not self._call_application(request, self._chunk_caller(piece)):
                    return b""  # answered before its end, so the connection closes
        else:
            self._pieces += pieces
        if not reader.done:
            self._set_due(BYTES, self._rate_allows(reader))
            return b""
        request.body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._reader, self._pieces, self._due = None, [], None
        self._phase = CALLING
        self._call_application(request, self.on_request)
        self._settle()
        return reader.rest

    def _chunk_caller(self, piece: bytes) -> Callable[[Request], None]:
        return lambda request: self.on_body_chunk(request, piece)

    def _call_application(self, request: Request, function: Callable[[Request], Response | None]) -> bool:
        """Call the application and send what it returns; returns whether to go on with this request."""
        try:
            response = function(request)
            if response is not None:
                self._respond(request, response, False)
                if self._file is not None:
                    self._pump()
        except Exception as exc:
            if self._answer != NOTHING:
                raise  # the connection is aborted: a part must not be taken for the whole
            if isinstance(exc, ConnectionClosedError) and (self.closing or self.closed):
                raise  # it was this one, and is nobody's mistake
            self.server.handle_error(self, exc)
            self._respond(request, problem(500), False, True)
        return self._answer == NOTHING or (self._answer == STARTED and self._file is None)

    def _settle(self) -> None:
        """The application has been called: wait for its answer, or for the next request. On the strand."""
        with self._answers:
            if self._phase != CALLING:
                return
            if self._answer != DONE:
                self._phase = ANSWERING
                if self._answer == STARTED:
                    self._watch_taking()
                return
            self._phase = HEAD
        self._set_due(NEXT, self.limits.keepalive_timeout)

    def _next(self) -> None:
        """Go on with the next request. On the strand."""
        if self._phase != ANSWERING or self._answer != DONE:
            return
        self._phase = HEAD
        self._stream = None
        self._set_due(NEXT, self.limits.keepalive_timeout)
        data, self._waiting = self._waiting, b""
        if self._held:
            self._held = False
            if not self._halted:
                super().resume_reading()
        self._go_on(data)

    def _find(self, request: Request) -> Any:
        """Return what `routes` has for a request's path; None where there is nothing."""
        routes, path = self.routes, request.path
        if path in routes:
            request.route = path
            return routes[path]
        at = min(len(path), max(map(len, routes)))
        while (at := path.rfind("/", 0, at)) >= 0:
            if path[: at + 1] in routes:
                request.route = path[: at + 1]
                return routes[request.route]
        return None

    def _upgrade(self, request: Request, rest: bytes) -> bytes:
        """Let another protocol take over, or refuse; returns what is left for us."""
        self._clear_deadline()  # before: it may set its own
        switched = self._target.upgrade(self, request, rest)
        if switched is None:
            self._settle()
            return rest
        self._hand_over(switched)
        self._status = 101
        self._account(request)
        return b""

    # -- time -----------------------------------------------------------------------------------------------

    def _set_due(self, kind: str, seconds: float) -> None:
        """Have `_expired` called with `kind` in so many seconds; costs next to nothing when put off."""
        now = monotonic()
        self._due_kind, self._due = kind, now + seconds
        if self._due < self._armed:
            self._armed = self._due
            self.set_deadline(seconds)

    def on_timeout(self, kind: str) -> bool | None:
        """A time-out ran out; see `Connection.on_timeout`."""
        if self._switched is not None:
            return self._switched.on_timeout(kind)
        if kind != "deadline":
            return None
        self._armed = math.inf
        if self._due is None:
            return True
        left = self._due - monotonic()
        if left > 0:
            self._set_due(self._due_kind, left)
        else:
            self._due = None
            self._expired(self._due_kind)
        return True

    def _expired(self, kind: str) -> None:
        if kind == HEADER:
            self._refuse(408, "the head took too long")
        elif kind == BYTES:
            if self._halted:
                self._set_due(BYTES, self.limits.body_grace)
            else:
                self._refuse(408, "the body comes too slowly")
        elif kind == BEAT and self._stream is not None:
            self._stream.beat()
            self._set_due(BEAT, self._stream.heartbeat)
        elif self.write_buffer_size or self._file is not None:  # an answer still waits to be taken
            if self._taken == self.bytes_sent:
                self.abort()
                return
            self._taken = self.bytes_sent
            self._set_due(kind, self.limits.send_timeout)
        elif kind == NEXT:
            self.close()
        else:
            self._set_due(kind, self.limits.send_timeout)

    def _watch_taking(self) -> None:
        """An answer is under way: look every so often whether the peer takes any of it."""
        self._taken = -1
        stream = self._stream
        if stream is not None:
            self._set_due(BEAT, stream.heartbeat)
        else:
            self._set_due(TAKEN, self.limits.send_timeout)

    def _begin_rate(self, received: int) -> None:
        """Measure the rate of the body from now on."""
        self._body_began, self._body_before = monotonic(), received
        if self.limits.body_rate_min:
            self._set_due(BYTES, self.limits.body_grace)

    def _rate_allows(self, reader: BodyReader) -> float:
        """Return for how many seconds what has come suffices."""
        rate = self.limits.body_rate_min
        if not rate:
            return math.inf
        enough = self.limits.body_grace + (reader.received - self._body_before) / rate
        return max(0.0, self._body_began + enough - monotonic())

    def pause_reading(self) -> None:
        """As that of Connection; the rate of a body is not measured meanwhile."""
        self._halted = True
        super().pause_reading()

    def resume_reading(self) -> None:
        """As that of Connection."""
        if self._halted and self._reader is not None:
            self._begin_rate(self._reader.received)
        self._halted = False
        super().resume_reading()

    # -- the rest of the callbacks --------------------------------------------------------------------------

    def on_drain(self) -> None:
        """The write queue has fallen to the low mark; see `Connection.on_drain`."""
        if self._switched is not None:
            self._switched.on_drain()
        elif self._file is not None:
            self._pump()

    def on_eof(self) -> bool | None:
        """The peer will send no more; what it asked for is answered."""
        if self._switched is not None:
            return self._switched.on_eof()
        self._eof = True
        if self._phase == BODY:
            self._refuse(400, "the body is not complete")
        return self._phase == ANSWERING and self._stream is None

    def on_close(self, exc: OSError | None) -> None:
        """The connection is closed; see `Connection.on_close`."""
        if self._switched is not None:
            self._switched.on_close(exc)
            return
        request, self._request = self._request, None
        stream, self._stream = self._stream, None
        self._file = self._parts = None
        if request is not None and self._answer == STARTED:
            self._answer = DONE
            self._account(request)
        if stream is not None:
            stream.ended()

    def on_shutdown(self) -> None:
        """The server stops: what is being answered is answered first; streams of events are cut off."""
        if self._switched is not None:
            told = getattr(self._switched, "on_shutdown", self.close)
            told()
            return
        if self._stream is None:
            with self._answers:
                if self._request is not None and self._answer != DONE:
                    self._ending = True
                    return
        self.close()
