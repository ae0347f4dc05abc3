"""L7: the WSGI server, for Flask, Django and the like (needs h11: pip install iocp-ctypes[http]).

    from iocp_ctypes.wsgi import serve
    from shop import app

    serve(app, "127.0.0.1", 8000)

Laws
1. An application is called when the body of its request has come, which by then is in memory or on disk: it
   never waits for the network to read.
2. Its blocks are asked for while the write queue has room, and again from on_drain: a peer that reads slowly
   holds no thread. Each request has a contextvars.Context of its own, for others run on its thread meanwhile.
3. Only `write` of start_response, and `holds_threads`, wait on the thread; the kernel takes bytes meanwhile
   without it, and who takes none for `send_timeout` is cut off.
4. `close` of what the application returned is called once, whatever happened.
5. An answer that is not what its head said ends with a reset, and one that has not begun with 500.
Source: peps.python.org/pep-3333
"""

from __future__ import annotations

import contextvars
import io
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ._httpmessage import FileBody, Request, Response, header_line
from ._wsgienviron import Environs, ErrorLog
from .http import METHODS, HTTPConnection, Limits
from .server import Server

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import ServerOptions
    from .engine import Engine

#: Work threads where the user names no number: applications wait for data bases more than they compute.
WORK_THREADS: Final = 8
#: Bytes of a body that are kept in memory; more go to a file.
SPOOL_MAX: Final = 1024 * 1024
#: Bytes of a block that are handed over at a time: what one WSASend takes.
BLOCK_SLICE: Final = 256 * 1024
#: Seconds between two looks whether a peer has taken what `write` waits for.
LOOK_INTERVAL: Final = 0.005

#: What belongs to one connection and not to an answer; an application must not set it.
HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "trailers",
        "transfer-encoding",
        "upgrade",
    }
)
_STATUS: Final = re.compile(r"([2-5]\d\d)(?: [\t\x20-\x7e\x80-\xff]*)?", re.A)
_DAV: Final = "TRACE PROPFIND PROPPATCH MKCOL COPY MOVE LOCK UNLOCK REPORT SEARCH"

Application = Callable[..., Iterable[bytes]]

log = logging.getLogger("iocp_ctypes")


class FileWrapper:
    """wsgi.file_wrapper: a file as an answer; a binary one on disk is sent without being read here."""

    def __init__(self, filelike: Any, block_size: int = 8192) -> None:
        """Take anything with `read`."""
        self.filelike = filelike
        self.block_size = block_size

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        block: bytes = self.filelike.read(self.block_size)
        if not block:
            raise StopIteration
        return block

    def close(self) -> None:
        """Close the file, if it can be closed."""
        close = getattr(self.filelike, "close", None)
        if close is not None:
            close()


def _left_in(file: Any) -> tuple[int, int] | None:
    """Return where a file stands and how many bytes follow; None where it is no plain file on disk.

    Others may look like one: a GzipFile has the `fileno` of what it reads from.
    """
    raw = file.raw if type(file) in (io.BufferedReader, io.BufferedRandom) else file
    if type(raw) is not io.FileIO or not raw.seekable():
        return None
    offset: int = file.tell()
    return offset, max(0, os.fstat(raw.fileno()).st_size - offset)


class _Run:
    """One request in the application. On the strand, but for `write`."""

    def __init__(self, connection: WSGIConnection, request: Request, environ: dict[str, Any]) -> None:
        self._connection = connection
        self._request = request
        self._environ = environ
        self._errors: ErrorLog = environ["wsgi.errors"]  # an application may put another there
        self._context = contextvars.copy_context()
        self._response: Response | None = None  # what start_response was called with
        self._left: int | None = None  # bytes that Content-Length leaves
        self._begun = False  # the head is sent
        self._whole = False  # and the body with it
        self._over = False  # no more blocks are wanted
        self._rest: bytes | memoryview = b""  # of a block
        self._iterable: Any = None
        self._blocks: Iterator[bytes] = iter(())
        self._file = False  # the connection sends a file
        self._closed = False

    def start(self, app: Application) -> None:
        """Call the application, and answer as far as the write queue takes it."""
        self._step(self._call, app)

    def go_on(self) -> None:
        """Go on answering: the write queue has room."""
        if not self._file:
            self._step(self._answer)

    def _step(self, function: Callable[..., bool], *args: Any) -> None:
        try:
            done = self._context.run(function, *args)
        except BaseException as exc:
            self.close()
            if not self._whole or not isinstance(exc, Exception):
                raise
            self._connection.server.handle_error(self._connection, exc)  # the peer has all there is
            return
        if done:
            self.close()

    def close(self) -> None:
        """The request is over."""
        if self._closed:
            return
        self._closed = True
        close = getattr(self._iterable, "close", None)
        try:
            if close is not None:
                self._context.run(close)
        except Exception as exc:
            self._connection.server.handle_error(self._connection, exc)
        finally:
            self._errors.flush()
            self._connection._ended(self)

    # -- what the application calls -------------------------------------------------------------------------

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """Take status and header fields; see PEP 3333."""
        if exc_info:
            try:
                if self._begun:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # it refers to this very frame
        elif self._response is not None:
            raise RuntimeError("start_response was called before; a second time takes exc_info")
        self._response, self._left = _check_start(status, headers)
        return self.write

    def write(self, data: bytes) -> None:
        """Send a block, and wait until it is sent but for `high_mark` bytes."""
        if self._closed:
            raise RuntimeError("write() was called when the request was over")
        self._take(data)
        while self._rest:
            if not self._send_slice():
                self._wait()

    # -- the answer -----------------------------------------------------------------------------------------

    def _call(self, app: Application) -> bool:
        iterable = self._iterable = app(self._environ, self.start_response)
        if type(iterable) is FileWrapper and self._respond_file(iterable.filelike):
            return False
        if type(iterable) in (list, tuple) and not self._begun and self._response is not None:
            iterable = self._join(iterable)
        self._blocks = iter(iterable)
        return self._answer()

    def _join(self, blocks: Any) -> Any:
        """Say how long a list of blocks is, and make one of them, where that is a small one."""
        response = self._response
        assert response is not None
        for block in blocks:
            _check_block(block)
        size = sum(map(len, blocks))
        if self._left is not None:
            if size < self._left and not self._bodiless:
                raise RuntimeError(f"the body has {size} bytes, and Content-Length said {self._left}")
        elif response.status not in (204, 304) and (size or self._request.method != "HEAD"):
            self._left = size
            response.headers.append(("Content-Length", str(size)))
        return (b"".join(blocks),) if size <= BLOCK_SLICE else blocks

    def _answer(self) -> bool:
        """Hand over blocks until the write queue is full; returns whether that was all."""
        while True:
            if self._rest:
                if not self._send_slice():
                    if not self._connection.holds_threads:
                        return False
                    self._wait()
                continue
            block = None if self._over else next(self._blocks, None)
            if block is None:
                break
            self._take(block)
        self._finish()
        return True

    @property
    def _bodiless(self) -> bool:
        response = self._response
        assert response is not None
        return self._request.method == "HEAD" or response.status in (204, 304)

    def _take(self, block: bytes) -> None:
        """Begin the answer with its first block that is not empty; leave in `_rest` what is to be sent."""
        _check_block(block)
        response = self._response
        if response is None:
            raise RuntimeError("the application gave a block before it called start_response")
        if not block or self._over:
            return
        if self._bodiless:
            self._over = True
            if self._request.method != "HEAD":
                log.error("%r: an answer with status %d has no body", self._request, response.status)
        elif self._left is not None and len(block) > self._left:
            self._over = True
            text = "%r: the application gave %d bytes more than Content-Length said; they are left out"
            log.error(text, self._request, len(block) - self._left)
            block = block[: self._left]
        if not self._begun:
            if not self._bodiless and len(block) == self._left and len(block) <= BLOCK_SLICE:
                self._left = 0
                self._respond_whole(block)
                return
            self._begun = True
            self._connection.respond(response, more=True)
        if not self._bodiless:
            if self._left is not None:
                self._left -= len(block)
            self._rest = block

    def _send_slice(self) -> bool:
        """Send of `_rest` what fits into one send; returns as `send`."""
        rest, self._rest = self._rest, b""
        if len(rest) > BLOCK_SLICE:
            view = memoryview(rest)
            rest, self._rest = view[:BLOCK_SLICE], view[BLOCK_SLICE:]
        return self._connection.send_body(rest)

    def _wait(self) -> None:
        """Wait on this thread until the write queue has room. ConnectionClosedError."""
        connection = self._connection
        taken, since = connection.bytes_sent, time.monotonic()
        while connection.write_buffer_size > connection.low_mark:
            connection._check_open()
            time.sleep(LOOK_INTERVAL)
            if connection.bytes_sent != taken:
                taken, since = connection.bytes_sent, time.monotonic()
            elif time.monotonic() - since > connection.limits.send_timeout:
                connection.abort()
        connection._check_open()

    def _respond_whole(self, body: bytes) -> None:
        response = self._response
        assert response is not None
        self._begun = True
        self._connection.respond(Response(body, response.status, response.headers))
        self._whole = True

    def _finish(self) -> None:
        """All blocks were handed over."""
        response = self._response
        if response is None:
            raise RuntimeError("the application returned without having called start_response")
        if not self._begun and not self._bodiless:
            if self._left:
                raise RuntimeError(f"the application returned no body, and Content-Length said {self._left}")
            self._respond_whole(b"")
        elif not self._begun:
            self._begun = True
            self._connection.respond(response, more=True)
        if not self._whole:
            self._connection.end()
            self._whole = True

    def _respond_file(self, file: Any) -> bool:
        """Have the connection send a file; False where it has to be read as blocks."""
        response = self._response
        if response is None or self._begun:
            return False
        found = _left_in(file)
        if found is None:
            return False
        offset, count = found
        if self._left is not None:
            if self._left > count:
                return False  # it will be found too short
            count = self._left
        self._begun = self._file = True
        body = FileBody(file, [(b"", offset, count)])
        self._connection.respond(Response(body, response.status, response.headers))
        return True


def _check_block(block: Any) -> None:
    if not isinstance(block, bytes):
        raise TypeError(f"the application gave a block of type {type(block).__name__}: must be bytes")


def _check_start(status: Any, headers: Any) -> tuple[Response, int | None]:
    """Return the arguments of start_response as a Response, and what Content-Length says; else raise."""
    if not isinstance(status, str):
        raise TypeError(f"status={status!r}: must be a str such as '200 OK'")
    match = _STATUS.fullmatch(status)
    if match is None:
        raise ValueError(f"status={status!r}: must be such as '200 OK', from 200 to 599")
    length = None
    for name, value in headers:
        lower = header_line(name, value)[0]
        if lower in HOP_BY_HOP:
            raise ValueError(f"header field {name}: it belongs to the connection, and that to the server")
        if lower == "content-length":
            if not (value.isascii() and value.isdecimal()) or length not in (None, int(value)):
                raise ValueError(f"header field {name}: {value!r}: must be one whole number")
            length = int(value)
    return Response(b"", int(match[1]), headers), length


class WSGIConnection(HTTPConnection):
    """A connection of a WSGIServer; subclass it to set what HTTPConnection has in the class.

    What `routes` has is answered by it, all else by the application. Its answers are compressed where they
    are texts that come whole and `limits.gzip_min` is a number; here it is None.

    Attributes:
        holds_threads: True: the work thread of a connection waits with it while its peer reads slowly. For
            applications that keep something with the thread between two blocks of an answer.
    """

    methods = METHODS.union(_DAV.split())
    limits = Limits(gzip_min=None)
    holds_threads: ClassVar[bool] = False

    _spool: Any = None  # the body, as far as it has come; then that of the request in the application
    _current: _Run | None = None

    def on_head(self, request: Request) -> Response | None:
        """A request's head came; see HTTPConnection."""
        request.streaming = self._target is None
        return super().on_head(request)

    def on_body_chunk(self, request: Request, data: bytes) -> None:
        """Keep a piece of the body, in memory or on disk."""
        if self._spool is None:
            self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_MAX)  # noqa: SIM115
        self._spool.write(data)

    def on_request(self, request: Request) -> Response | None:
        """Call the application, or what `routes` has."""
        if self._target is not None:
            return super().on_request(request)
        server: WSGIServer = self.server
        length = 0
        if self._spool is None:
            self._spool = io.BytesIO()
        else:
            length = self._spool.tell()
            self._spool.seek(0)
        local = self.local_address or server.address
        environ = server.environs.make(request, local, self.tls is not None, self._spool, length)
        environ["wsgi.file_wrapper"] = FileWrapper
        self._current = _Run(self, request, environ)
        self._current.start(server.app)
        return None

    def _ended(self, run: _Run) -> None:
        """The application is done with a request."""
        if self._current is run:
            self._current = None
            self._close_spool()

    def _close_spool(self) -> None:
        spool, self._spool = self._spool, None
        if spool is not None:
            spool.close()

    def _pump(self) -> None:
        super()._pump()
        if self._file is None and self._current is not None:
            self._current.close()

    def on_drain(self) -> None:
        """The write queue has fallen to the low mark; see `Connection.on_drain`."""
        super().on_drain()
        if self._current is not None:
            self._current.go_on()

    def on_close(self, exc: OSError | None) -> None:
        """The connection is closed; see `Connection.on_close`."""
        super().on_close(exc)
        if self._current is not None:
            self._current.close()
        self._close_spool()


class WSGIServer(Server):
    """A server of a WSGI application, whose callbacks run on work threads: it may block."""

    def __init__(
        self,
        address: Any,
        app: Application,
        *,
        trusted: Iterable[str] = (),
        script_name: str = "",
        handler: type[WSGIConnection] = WSGIConnection,
        engine: Engine | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        """Bind and listen; nothing is accepted before `start`.

        Args:
            address: as for Server.
            app: the application, as PEP 3333 defines it; called on several threads at a time.
            trusted: networks of proxies whose X-Forwarded-For, -Proto and -Host count, such as "10.0.0.0/8";
                from others these fields are left out of the environ.
            script_name: the path below which the application is, such as "/shop"; it is taken from the
                beginning of a path where it is there, so a proxy may have done so before.
            handler: WSGIConnection or a subclass.
            engine: as for Server.
            options: as for Server; `work_threads` is WORK_THREADS where it is left out.

        Raises:
            TypeError, ValueError, OSError: as Server.

        May ask the name service for the host, and blocks while it does.
        """
        if not callable(app):
            raise TypeError(f"app={app!r}: must be callable, with environ and start_response")
        if not (isinstance(handler, type) and issubclass(handler, WSGIConnection)):
            raise TypeError(f"handler={handler!r}: must be a subclass of WSGIConnection")
        if options.setdefault("work_threads", WORK_THREADS) == 0:
            raise ValueError("work_threads=0: an application blocks, and needs 1 or more")
        self.app = app
        several = options.get("processes", 1) != 1
        self.environs = Environs(trusted, script_name, handler.server_name, several)
        super().__init__(address, handler, engine=engine, **options)


def serve(app: Application, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve an application until Ctrl-C.

    Args:
        app: the application.
        host: where to listen; "" is every interface.
        port: 0 is any that is free.
        options: as for WSGIServer.

    Blocks; from the main thread.
    """
    WSGIServer((host, port), app, **options).serve_forever()
