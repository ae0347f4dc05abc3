"""L7: Answers, the half of an HTTP connection that answers: whole, piece by piece, or from a file.

Laws
1. One request is answered at a time, and each exactly once: so answers have the order of the requests.
2. `_answers` (a lock) guards which request is answered and how far that is. It is held across `send`, and
   never while code of the application runs.
3. A whole answer is one `send`. What does not fit into the write queue waits in the file, or with the
   application, for `on_drain`.
4. An answer that cannot be completed ends with a reset: nobody takes a part for the whole. So does a file
   that cannot be sent.
5. After an answer the connection goes on with the next request, unless one side said that it was the last,
   or the request had not come to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ._channel import Buffer, as_bytes
from ._errors import ConnectionClosedError
from ._httplimits import Limits
from ._httplog import Metrics, combined
from ._httpmessage import (
    CHUNKED,
    EMPTY,
    LAST_CHUNK,
    LENGTH,
    FileBody,
    Request,
    Response,
    chunk,
    compose_head,
    compress,
    problem,
)
from ._locks import lock_number, make_locks
from .connection import Connection

#: Bytes of a body up to which it is copied behind its head, which costs less than to gather both.
COPIED_MAX: Final = 16 * 1024

#: Where the reading of requests is: in a head; in a body; the application is being called; a complete request
#: waits for its answer; no more is read, because the connection closes or is somebody else's.
HEAD, BODY, CALLING, ANSWERING, LAST = 0, 1, 2, 3, 4
#: Where the answer to the current request is.
NOTHING, STARTED, DONE = 0, 1, 2

_LOCKS: Final = make_locks()


class Answers(Connection):
    """A connection that answers requests; HTTPConnection reads them."""

    limits: ClassVar[Limits] = Limits()
    server_name: ClassVar[str] = "iocp_ctypes"
    access_log: Callable[[str], object] | None = None
    metrics: ClassVar[Metrics | None] = None

    # What each connection begins with. Here, so that an application's `__init__` need not call ours.
    _phase = HEAD
    _request: Request | None = None
    _answer = DONE
    _requests = 0
    _status = 0
    _size = 0  # bytes of the body that were handed over
    _framing = EMPTY
    _left = 0  # bytes that Content-Length said and that are still to come
    _closes = False  # after this answer
    _ending = False  # the server stops, or the peer has sent its last request
    _file: FileBody | None = None
    _parts: list[tuple[bytes, int, int]] | None = None  # of the file, the next one last
    _head = b""  # of the answer, which goes with the first of them

    if TYPE_CHECKING:  # of HTTPConnection

        def _next(self) -> None: ...

    # -- for applications -----------------------------------------------------------------------------------

    def respond(self, response: Response, *, more: bool = False) -> bool:
        """Answer the request that on_request, or on_head, was called with.

        Args:
            response: the answer.
            more: the body goes on: `send_body` as often as needed, then `end`. It is sent in chunks, unless
                the response has a Content-Length field.

        Returns:
            False where more than `high_mark` bytes are waiting: better wait for on_drain.

        Raises:
            RuntimeError: there is no request to be answered. ConnectionClosedError: the connection is closed.
            TypeError, ValueError: the response has a header field that cannot be sent.

        Any thread; never blocks.
        """
        request = self._request
        if request is None:
            self._check_open()
            raise RuntimeError("there is no request to be answered")
        going = self._respond(request, response, more)
        if self._file is not None:
            self.call_soon(self._pump)
        return going

    def send_body(self, data: Buffer) -> bool:
        """Send a piece of the body that `respond(..., more=True)` has begun; empty: a no-op.

        Returns:
            False where more than `high_mark` bytes are waiting: better wait for on_drain.

        Raises:
            RuntimeError: no such answer is under way. ValueError: it would be more than Content-Length said.
            ConnectionClosedError: the connection is closed.

        Any thread; never blocks.
        """
        data = as_bytes(data)
        with self._answers:
            request = self._streamed()
            if self._framing == EMPTY and data:
                raise ValueError(f"an answer with status {self._status} has no body")
            if self._framing == LENGTH and len(data) > self._left:
                raise ValueError(f"{len(data)} bytes, and Content-Length leaves {self._left}")
            self._left -= len(data)
            self._size += len(data)
            if request.method == "HEAD" or not data:
                return self.write_buffer_size <= self.high_mark
            if self._framing != CHUNKED:
                return self.send(data)
            if len(data) <= COPIED_MAX:
                return self.send(chunk(data))
            return self.send_many((b"%x\r\n" % len(data), data, b"\r\n"))

    def end(self) -> None:
        """End the body that `respond(..., more=True)` has begun.

        Raises:
            RuntimeError: no such answer is under way; or it is shorter than Content-Length said, which aborts
                the connection. ConnectionClosedError: the connection is closed.

        Any thread; never blocks.
        """
        with self._answers:
            request = self._streamed()
            if self._framing == LENGTH and self._left and request.method != "HEAD":
                self.abort()
                raise RuntimeError(f"the body ended {self._left} bytes before what Content-Length said")
            if self._framing == CHUNKED and request.method != "HEAD":
                self.send(LAST_CHUNK)
            self._done()
        self._account(request)

    # -- inside ---------------------------------------------------------------------------------------------

    @property
    def _answers(self) -> Any:
        return _LOCKS[lock_number(self.id)]

    def _check_open(self) -> None:
        if self.closing or self.closed:
            raise ConnectionClosedError(f"connection {self.id} is closed")

    def _streamed(self) -> Request:
        """Return the request whose answer is being streamed, else raise RuntimeError."""
        request = self._request
        if request is None or self._answer != STARTED or self._file is not None:
            self._check_open()
            raise RuntimeError("no answer was begun by respond(..., more=True), or it has ended")
        return request

    def _respond(self, request: Request, response: Response, more: bool, close: bool = False) -> bool:
        """Send an answer, or its beginning. A file is left to `_pump`."""
        if not more:
            response = compress(request, response, self.limits.gzip_min)
        body = response.body
        whole = body.__class__ is bytes and not more
        length = None if more else len(body) if isinstance(body, bytes) else body.length
        with self._answers:
            if self._answer != NOTHING or self._request is not request:
                self._check_open()
                raise RuntimeError("this request has been answered")
            close = (
                close or self._ending or _wants_close(request) or self._requests >= self.limits.requests_max
            )
            head, self._framing, self._left, self._closes = compose_head(
                response.status,
                response.headers,
                length,
                http_10=request.http_version == "1.0",
                close=close or (self._phase == BODY and not more),
                server=self.server_name,
            )
            self._status = response.status
            self._answer = STARTED
            empty = request.method == "HEAD" or self._framing == EMPTY
            if isinstance(body, FileBody):
                self._file, self._head = body, head
                self._parts = [(b"", 0, 0)] if empty else [(body.tail, 0, 0), *reversed(body.parts)]
                return False
            if not whole:
                going = self.send(head)
                if body and not empty:
                    going = self.send_body(body)
                return going
            assert isinstance(body, bytes)
            if empty or not body:
                going = self.send(head)
            else:
                self._size = length or 0
                going = self.send(head + body) if len(body) <= COPIED_MAX else self.send_many((head, body))
            self._done()
        self._account(request)
        return going

    def _done(self) -> None:
        """The answer was handed over: go on. Under `_answers`."""
        self._answer = DONE
        if self._closes or self._ending or self._phase == BODY:
            self._phase = LAST
            self.close()
        elif self._phase == ANSWERING:
            self.call_soon(self._next)

    def _account(self, request: Request | None) -> None:
        """Write the log and count; no lock is held."""
        if self.access_log is not None:
            self.access_log(combined(request, self.peer_address[0], self._status, self._size))
        if self.metrics is not None:
            self.metrics.count("-" if request is None else request.method, self._status, self._size)

    def _refuse(self, status: int, text: str) -> None:
        """Answer with an error and close; where an answer is under way, reset. On the strand."""
        with self._answers:
            self._phase = LAST
            if self._answer == STARTED:
                self.abort()
                return
            request = self._request if self._answer == NOTHING else None
            response = problem(status, text)
            body = response.body
            assert isinstance(body, bytes)
            head = compose_head(status, response.headers, len(body), close=True, server=self.server_name)[0]
            is_head = request is not None and request.method == "HEAD"
            self._status, self._size, self._answer = status, 0 if is_head else len(body), DONE
            self.send(head if is_head else head + body)
            self.close()
        self._account(request)

    # -- files ----------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Hand over as much of the file as the write queue takes. On the strand."""
        body, parts = self._file, self._parts
        if body is None or parts is None or self.closing or self.closed:
            return
        while parts:
            before, offset, count = parts.pop()
            data, self._head = self._head + before, b""
            going = self.send_file(body.file, offset, count, header=data) if count else self.send(data)
            self._size += len(before) + count
            if not going:
                return
        request = self._request
        assert request is not None
        with self._answers:
            self._file = self._parts = None
            self._done()
        self._account(request)


def _wants_close(request: Request) -> bool:
    """Return whether the peer wants the connection to be closed after this request."""
    value = request.field(b"connection")
    if value is None:
        return request.http_version == "1.0"
    options = [option.strip() for option in value.lower().split(b",")]
    return b"close" in options or (request.http_version == "1.0" and b"keep-alive" not in options)
