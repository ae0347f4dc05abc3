"""Requests, answers, and an answer's head as bytes (layer P: pure).

Laws
1. No byte of an application ends a header line or a head: names are tokens, values have no controls.
2. How long a message is, is said once, and by us: Content-Length, chunks, or the connection's end.
3. What is the same for many answers is made once: header lines, and status line, Server and Date each second.
4. A path never gains a separator by decoding: `%2F` stays as it is.
Source: RFC 9110, RFC 9112
"""

from __future__ import annotations

import functools
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qs, unquote

from ._addresses import Address

#: Header lines that are kept made: applications send the same few again and again.
HEADER_LINES_MAX: Final = 512
#: Fields of a query that `Request.arguments` reads.
ARGUMENTS_MAX: Final = 1000

REASONS: Final = {status.value: status.phrase for status in HTTPStatus}

_TOKEN: Final = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_SEPARATOR: Final = re.compile("%2f", re.I)
_CODING: Final = re.compile(r"\s*([-\w*]+)\s*(?:;\s*q\s*=\s*([0-9.]+)\s*)?")

#: How an answer's body ends.
EMPTY, LENGTH, CHUNKED, UNTIL_CLOSE = 0, 1, 2, 3

HeaderPairs = Iterable[tuple[str, str]] | Mapping[str, str]


class Fields(Mapping[str, str]):
    """The header fields of a request by name, whatever its case; several of one name are joined by commas."""

    __slots__ = ("_fields",)

    def __init__(self, fields: dict[bytes, bytes]) -> None:
        """Show fields whose names are lower-case bytes."""
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower().encode("latin-1", "replace")].decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class Request:
    """A request.

    Attributes:
        method: "GET" and the like, as it came.
        target: what stands between method and version in the request line.
        raw_path: the target's path, not decoded; begins with "/" (or is "*").
        query: what follows the "?", not decoded.
        http_version: "1.0" or "1.1".
        headers: list of (lower-case name, value), both bytes, in the order in which they came.
        client: the peer's address, (host, port, ...).
        connection: the HTTPConnection that it came on; None where there is none.
        body: the whole body, once it has come; b"" where it is streamed.
        length: bytes of the body; None: chunked.
        route: the key of `HTTPConnection.routes` that it matched; "/" where none did.
        streaming: whether the body goes to `on_body_chunk` piece by piece; may be set in `on_head`.
        user: who asks, once a guard has found out.
        data: yours; None at first.
    """

    __slots__ = (
        "_fields",
        "_path",
        "body",
        "client",
        "connection",
        "data",
        "headers",
        "http_version",
        "length",
        "method",
        "query",
        "raw_path",
        "route",
        "streaming",
        "target",
        "user",
    )

    def __init__(
        self,
        method: str,
        target: str,
        headers: list[tuple[bytes, bytes]],
        http_version: str = "1.1",
        client: Address = ("", 0),
    ) -> None:
        """Make a request of its parts; `target` in origin form ("/path?query") or "*"."""
        self.method = method
        self.target = target
        self.raw_path, _, self.query = target.partition("?")
        self.headers = headers
        self.http_version = http_version
        self.client = client
        self.connection: Any = None
        self.body = b""
        self.length: int | None = 0
        self.route = "/"
        self.streaming = False
        self.user: str | None = None
        self.data: Any = None
        self._path: str | None = None
        self._fields = dict(headers)
        if len(self._fields) != len(headers):
            self._join_fields()

    def _join_fields(self) -> None:
        self._fields = {}
        for name, value in self.headers:
            before = self._fields.get(name)
            between = b"; " if name == b"cookie" else b", "
            self._fields[name] = value if before is None else before + between + value

    @property
    def path(self) -> str:
        """The path, decoded; `%2F` stays, for it is no separator. What is no UTF-8 is shown as U+FFFD."""
        if self._path is None:
            raw = self.raw_path
            self._path = raw if "%" not in raw else "%2F".join(map(unquote, _SEPARATOR.split(raw)))
        return self._path

    @property
    def fields(self) -> Fields:
        """The header fields by name, whatever its case; values are str, of several joined by ", "."""
        return Fields(self._fields)

    def field(self, name: bytes) -> bytes | None:
        """Return the value of a header field by its lower-case name; None where it did not come."""
        return self._fields.get(name)

    @property
    def arguments(self) -> dict[str, list[str]]:
        """The query's fields, each with its values. ValueError where there are more than ARGUMENTS_MAX."""
        return parse_qs(self.query, keep_blank_values=True, max_num_fields=ARGUMENTS_MAX)

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.target}>"


class FileBody:
    """Parts of a file as a body: before each part some bytes, and some after the last.

    The file is closed when nobody refers to this object any more, or by `close`.
    """

    __slots__ = ("file", "length", "parts", "tail")

    def __init__(self, file: Any, parts: list[tuple[bytes, int, int]], tail: bytes = b"") -> None:
        """Take what `send_file` takes as a file, and (bytes before, offset, count) for each part."""
        self.file = file
        self.parts = parts
        self.tail = tail
        self.length = sum(len(before) + count for before, _offset, count in parts) + len(tail)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Response:
    """An answer.

    Args:
        body: bytes; or str, which is sent as UTF-8; or a FileBody.
        status: 200 to 599.
        headers: pairs (name, value) of str, or a mapping. Content-Length, Transfer-Encoding, Connection, Date
            and Server are made by the server.
        content_type: the media type; None: text/plain for a str, application/octet-stream for other bodies.

    Raises:
        TypeError, ValueError: a part cannot be sent; header fields are looked at when it is sent.
    """

    __slots__ = ("body", "headers", "status")

    def __init__(
        self,
        body: bytes | str | FileBody = b"",
        status: int = 200,
        headers: HeaderPairs = (),
        *,
        content_type: str | None = None,
    ) -> None:
        """See the class."""
        if status.__class__ is not int and not isinstance(status, int):
            raise TypeError(f"status={status!r}: must be a whole number from 200 to 599")
        if not 200 <= status <= 599:
            raise ValueError(f"status={status!r}: must be a whole number from 200 to 599")
        self.status = int(status)
        self.headers = list(headers.items() if isinstance(headers, Mapping) else headers)
        if isinstance(body, str):
            body = body.encode()
            content_type = content_type or "text/plain; charset=utf-8"
        elif not isinstance(body, (bytes, FileBody)):
            raise TypeError(f"body is of type {type(body).__name__}: must be bytes, str or FileBody")
        self.body: bytes | FileBody = body
        if content_type is not None:
            self.headers.append(("Content-Type", content_type))

    def header(self, name: str) -> str | None:
        """Return the first header field of a name, whatever its case; None where there is none."""
        name = name.lower()
        return next((value for other, value in self.headers if other.lower() == name), None)

    def __repr__(self) -> str:
        return f"<Response {self.status}>"


def problem(status: int, text: str = "", headers: HeaderPairs = ()) -> Response:
    """Return a short answer in plain text for a status."""
    body = f"{status} {REASONS.get(status, '')}\n" + (f"{text}\n" if text else "")
    return Response(body, status, headers)


@functools.lru_cache(maxsize=HEADER_LINES_MAX)
def header_line(name: str, value: str) -> tuple[str, bytes]:
    """Return the lower-case name and the line of a header field; TypeError, ValueError where it is none."""
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"header field {name!r}: {value!r}: both must be str")
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"header field {name!r}: the name must be a token (letters, digits, hyphens ...)")
    if not _VALUE.fullmatch(value):
        raise ValueError(f"header field {name}: {value!r}: the value has characters that no header may have")
    return name.lower(), f"{name}: {value.strip()}\r\n".encode("latin-1")


_starts: tuple[int, dict[tuple[int, str], bytes]] = (0, {})


def _start(status: int, server: str) -> bytes:
    """Return status line, Server and Date; made once a second."""
    global _starts
    second = int(time.time())
    made = _starts
    if made[0] != second:
        made = _starts = (second, {})
    start = made[1].get((status, server))
    if start is None:
        reason = REASONS.get(status, "")
        line = f"HTTP/1.1 {status} {reason}\r\n".encode()
        named = header_line("Server", server)[1] if server else b""
        start = made[1][status, server] = line + named + b"Date: " + http_date(second) + b"\r\n"
    return start


def http_date(seconds: float) -> bytes:
    """Return an instant of time.time() as HTTP writes it."""
    return formatdate(seconds, usegmt=True).encode()


def compose_head(
    status: int,
    headers: Iterable[tuple[str, str]],
    length: int | None,
    *,
    http_10: bool = False,
    close: bool = False,
    server: str = "",
) -> tuple[bytes, int, int, bool]:
    """Return an answer's head.

    Args:
        status: its status.
        headers: header fields. Content-Length counts where `length` is None; Connection may say "close".
        length: bytes of the body; None: not known yet.
        http_10: the peer speaks HTTP/1.0 and knows no chunks.
        close: the connection is closed after this answer.
        server: the Server field; "": none.

    Returns:
        The head; how the body ends (EMPTY, LENGTH, CHUNKED, UNTIL_CLOSE); its length where that is LENGTH;
        and whether the connection has to be closed after it.

    Raises:
        TypeError, ValueError: a field cannot be sent.
    """
    lines = []
    typed = False
    start = _start(status, server)
    for name, value in headers:
        lower, line = header_line(name, value)
        if lower == "content-type":
            typed = True
        elif lower in _OURS:
            if lower == "date" or lower == "server":
                start = _start_without(start, lower)
            elif lower == "connection":
                close = close or "close" in value.lower()
                continue
            elif lower == "content-length" and value.strip().isdecimal() and length in (None, int(value)):
                length = int(value)
                continue
            else:
                raise ValueError(f"header field {name}: {value}: the server says itself how long a body is")
        lines.append(line)
    framing = LENGTH
    if status == 204 or status == 304:
        framing, length = EMPTY, 0
    elif length is not None:
        if not typed and length:
            lines.append(b"Content-Type: application/octet-stream\r\n")
        lines.append(b"Content-Length: %d\r\n" % length)
    elif http_10:
        framing, close = UNTIL_CLOSE, True
    else:
        framing = CHUNKED
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if close:
        lines.append(b"Connection: close\r\n")
    elif http_10:
        lines.append(b"Connection: keep-alive\r\n")
    lines.append(b"\r\n")
    return start + b"".join(lines), framing, length or 0, close


_OURS: Final = frozenset({"content-length", "transfer-encoding", "connection", "date", "server"})


def _start_without(start: bytes, lower: str) -> bytes:
    """Return what `_start` made without the field that the application brings itself."""
    kept = [line for line in start.split(b"\r\n") if not line.lower().startswith(lower.encode() + b":")]
    return b"\r\n".join(kept)


def chunk(data: bytes) -> bytes:
    """Return a chunk of the chunked transfer coding; `data` must not be empty, for that would be the end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK: Final = b"0\r\n\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


def accepts_gzip(value: bytes | None) -> bool:
    """Return whether an Accept-Encoding field allows gzip."""
    if not value:
        return False
    accepted: dict[str, float] = {}
    for part in value.decode("latin-1").lower().split(","):
        if match := _CODING.fullmatch(part):
            try:
                accepted[match[1]] = float(match[2] or 1)
            except ValueError:
                continue
    return accepted.get("gzip", accepted.get("x-gzip", accepted.get("*", 0.0))) > 0


_TEXT: Final = re.compile(
    r"text/|application/(json|javascript|xml|xhtml\+xml|wasm|[-\w.+]*\+(json|xml))|image/svg", re.I
)


def is_text(content_type: str | None) -> bool:
    """Return whether a media type is one that gzip makes smaller, and that is no stream of events."""
    return bool(content_type and _TEXT.match(content_type)) and "event-stream" not in str(content_type)


def gzipped(data: bytes) -> bytes:
    """Return bytes in the gzip format, without a time, so that the same bytes stay the same."""
    packer = zlib.compressobj(5, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def compress(request: Request, response: Response, above: int | None) -> Response:
    """Return the response, its body compressed where it is a long text and the peer accepts that."""
    body = response.body
    if above is None or not isinstance(body, bytes) or len(body) <= above or response.status in (206, 304):
        return response
    if not is_text(response.header("Content-Type")) or response.header("Content-Encoding") is not None:
        return response
    kept = [
        (name, f"W/{value}" if name.lower() == "etag" and value.startswith('"') else value)
        for name, value in response.headers
        if name.lower() != "content-length"
    ]
    if accepts_gzip(request.field(b"accept-encoding")):
        made = Response(gzipped(body), response.status, kept)
        made.headers.append(("Content-Encoding", "gzip"))
    else:
        made = Response(body, response.status, response.headers)
    made.headers.append(("Vary", "Accept-Encoding"))
    return made
