"""L7: requests out of bytes: h11 parses; what it lets pass for the sake of old peers is refused before.

Laws
1. What two parsers could read in two ways is refused with 400, and the connection closed: line ends that are
   not CR LF, folded lines, control characters, two lengths, a length beside a transfer coding, a coding that
   is not "chunked", more than one Host.
2. A head is parsed once it is complete. Before that only what shows that it will never be good is looked at.
3. Each request has an h11.Connection of its own, and what came behind it goes to the next: h11 parses, and
   how answers are framed is `_httpmessage`'s. The same head is not parsed again: it says the same.
Source: RFC 9112; h11.readthedocs.io
"""

from __future__ import annotations

import functools
import re
from typing import Final, NamedTuple

from ._addresses import Address
from ._httplimits import Limits
from ._httpmessage import Request

try:
    import h11
except ImportError as exc:  # the core has no dependency: only who serves HTTP needs it
    raise ImportError("the HTTP layer needs h11: pip install iocp-ctypes[http]") from exc

#: Bytes of a line of a chunked body that are kept while it is incomplete, and of all trailers.
CHUNK_LINES_MAX: Final = 8 * 1024
#: Bytes that came for each byte of a chunked body, and some more for the beginning: smaller chunks are an
#: attack on the processor.
CHUNK_OVERHEAD_MAX: Final = 16
CHUNK_OVERHEAD_FIRST: Final = 64 * 1024
#: Bytes of a head, and heads, that are kept parsed: less than 2 MiB in all.
KEPT_HEAD_MAX: Final = 1024
KEPT_HEADS: Final = 256

#: Whole lines without control characters, none of them folded: the one check that nearly all heads need.
_CLEAN: Final = re.compile(rb"(?:[\t\x20-\x7e\x80-\xff]*\r\n(?![ \t]))*")
_ALLOWED: Final = bytes([9, 10, 13, *range(32, 127), *range(128, 256)])
_START: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_HOST: Final = re.compile(rb"(?:[-A-Za-z0-9._~%!$&'()*+,;=]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_LONGEST_START: Final = re.compile(rb"[^ ]+ [^ ]+ HTTP/([0-9])\.[0-9]")
_CODINGS: Final = re.compile(rb"^transfer-encoding:[ \t]*(.*?)[ \t]*\r$", re.I | re.M)
_LENGTHS: Final = re.compile(rb"\ncontent-length:[ \t]*(.*?)[ \t]*\r", re.I)
_KNOWN_CODINGS: Final = {b"gzip", b"x-gzip", b"deflate", b"compress", b"x-compress"}
_ABSOLUTE: Final = re.compile(r"https?://([^/?#]*)", re.I)


class Refused(Exception):
    """A request that is answered with an error, after which the connection is closed."""

    def __init__(self, status: int, text: str) -> None:
        """Say the status and, for the peer, what is wrong."""
        super().__init__(status, text)
        self.status = status
        self.text = text


def check_partial(data: bytes, limits: Limits) -> None:
    """Look at the beginning of a head; Refused where it cannot become a good one."""
    if data and data[0] not in _START and data != b"\r":
        raise Refused(400, "a request begins with a method")
    line = data.find(b"\n")
    if line < 0 and len(data) > limits.request_line_max:
        raise Refused(414, "the request line is too long")
    if line > limits.request_line_max + 1:
        raise Refused(414, "the request line is too long")
    if len(data) >= limits.head_max or data.count(b"\r\n") > limits.headers_max + 1:
        raise Refused(431, "the header fields are too many or too long")
    _check_bytes(data[:-1] if data.endswith(b"\r") else data)


def _check_bytes(head: bytes) -> None:
    if _CLEAN.fullmatch(head):
        return
    ends = head.count(b"\r\n")
    if head.count(b"\n") != ends or head.count(b"\r") != ends:
        raise Refused(400, "lines end with CR LF")
    if b"\n " in head or b"\n\t" in head:
        raise Refused(400, "header lines must not be folded")
    if head.translate(None, _ALLOWED):
        raise Refused(400, "the head has control characters")


def parse_head(head: bytes, limits: Limits, client: Address) -> tuple[Request, h11.Connection | None]:
    """Return the request that a complete head is of, and the h11.Connection that goes on with its body.

    That is None where there is no body.

    Args:
        head: from the request line up to and with the blank line.
        limits: what is allowed.
        client: the peer's address, for the request.

    Raises:
        Refused: with 400, 414, 431, 501 or 505.

    Any thread; does not block.
    """
    if len(head) > limits.head_max or head.count(b"\n") > limits.headers_max + 2:
        if head.find(b"\n") > limits.request_line_max + 1:
            raise Refused(414, "the request line is too long")
        raise Refused(431, "the header fields are too many or too long")
    if len(head) > limits.request_line_max and head.find(b"\n") > limits.request_line_max + 1:
        raise Refused(414, "the request line is too long")
    parser = None
    if len(head) <= KEPT_HEAD_MAX and head.startswith((b"GET ", b"HEAD ")):
        parts = _parse_kept(head)
    else:
        parts, parser = _parse(head)
    if parts.length != 0 and parser is None:
        parts, parser = _parse(head)
    request = Request(parts.method, parts.target, list(parts.headers), parts.version, client)
    request.length = parts.length
    return request, parser


class _Parts(NamedTuple):
    """What a head says."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    version: str
    length: int | None


def _parse(head: bytes) -> tuple[_Parts, h11.Connection]:
    """Have h11 parse a head, and check what it leaves to us; Refused."""
    _check_bytes(head)
    parser = h11.Connection(h11.SERVER, CHUNK_LINES_MAX)
    parser.receive_data(head)
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError as exc:
        raise _why(head, exc) from exc
    if not isinstance(event, h11.Request):
        raise Refused(400, "this is no request")
    if event.http_version[:1] != b"1":
        raise Refused(505, "this server speaks HTTP/1.1")
    version = "1.0" if event.http_version == b"1.0" else "1.1"
    target = event.target.decode("ascii")
    if target[0] != "/":
        target = _origin_form(target, event.method)
    headers = tuple((name.lower(), value) for name, value in event.headers.raw_items())
    length = _check_fields(dict(headers), head, version)
    return _Parts(event.method.decode("ascii"), target, headers, version, length), parser


@functools.lru_cache(maxsize=KEPT_HEADS)
def _parse_kept(head: bytes) -> _Parts:
    """Return what a head says that may have come before: clients send the same one again and again."""
    return _parse(head)[0]


def _check_fields(fields: dict[bytes, bytes], head: bytes, version: str) -> int | None:
    """Check the fields that say how long a request is and for whom; returns its length, None for chunks."""
    host = fields.get(b"host")
    if host is not None and not _HOST.fullmatch(host):
        raise Refused(400, "the Host field is wrong")
    length, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
    if length is not None:
        if coding is not None:
            raise Refused(400, "Content-Length beside Transfer-Encoding")
        said = _LENGTHS.findall(head)  # h11 makes one of several that are the same
        if len(said) != 1 or not said[0].isdigit():
            raise Refused(400, "more than one Content-Length")
        return int(length)
    if coding is None:
        return 0
    if version == "1.0":
        raise Refused(400, "HTTP/1.0 has no Transfer-Encoding")
    return None


def _origin_form(target: str, method: bytes) -> str:
    """Return the target as a path where it came as a whole URL; others are refused."""
    if match := _ABSOLUTE.match(target):
        rest = target[match.end() :].partition("#")[0]
        return rest if rest.startswith("/") else "/" + rest
    if target == "*" and method == b"OPTIONS":
        return target
    if method == b"CONNECT":
        raise Refused(501, "this is no proxy")
    raise Refused(400, "the target must be a path")


def _why(head: bytes, exc: h11.RemoteProtocolError) -> Refused:
    """Say what h11 found wrong, by what it was."""
    line = head.partition(b"\r\n")[0]
    match = _LONGEST_START.fullmatch(line)
    if match and match[1] != b"1":
        return Refused(505, "this server speaks HTTP/1.1")
    if exc.error_status_hint == 501:
        # A coding that exists and is not ours is honest; all else could be read in two ways.
        values = _CODINGS.findall(head)
        codings = [coding.strip().lower() for coding in values[0].split(b",")] if len(values) == 1 else []
        if codings and codings[-1] == b"chunked" and set(codings[:-1]) <= _KNOWN_CODINGS and codings[:-1]:
            return Refused(501, "the only Transfer-Encoding here is chunked")
        return Refused(400, "the Transfer-Encoding is wrong")
    return Refused(400, str(exc))


class BodyReader:
    """The body of one request: bytes in, pieces out.

    Attributes:
        received: bytes of the body so far.
        done: whether it is complete; `rest` is then what came behind it.
    """

    __slots__ = ("_chunked", "_last", "_most", "_parser", "_wire", "done", "received", "rest")

    def __init__(self, parser: h11.Connection | None, request: Request, most: int) -> None:
        """Go on where `parse_head` stopped; Refused (413) where the body is said to be above `most` bytes."""
        assert parser is not None
        if request.length is not None and request.length > most:
            raise Refused(413, f"a body may have {most} bytes")
        self._parser = parser
        self._most = most
        self._chunked = request.length is None
        self._wire = 0
        self._last = b""  # the last bytes that came, for the end of the trailers
        self.received = 0
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take what came (b"": the peer's end) and return the pieces of the body in it.

        Raises:
            Refused: with 400, 413 or 431.
        """
        parser = self._parser
        self._wire += len(data)
        parser.receive_data(data)
        pieces: list[bytes] = []
        try:
            while (event := parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Data):
                    self.received += len(event.data)
                    if self.received > self._most:
                        raise Refused(413, f"a body may have {self._most} bytes")
                    pieces.append(bytes(event.data))
                    continue
                if not isinstance(event, h11.EndOfMessage):
                    raise Refused(400, "the body is not complete")
                self.done = True
                self.rest = parser.trailing_data[0]
                break
        except h11.RemoteProtocolError as exc:
            raise Refused(431 if exc.error_status_hint == 431 else 400, str(exc)) from exc
        if self._chunked:
            self._check_chunks(data)
        return pieces

    def _check_chunks(self, data: bytes) -> None:
        if self._wire > CHUNK_OVERHEAD_FIRST + CHUNK_OVERHEAD_MAX * (self.received + 1) and not self.done:
            raise Refused(400, "the chunks are too small")
        came = self._last + data
        if self.done and not came[: len(came) - len(self.rest)].endswith(b"\r\n\r\n"):
            raise Refused(400, "lines end with CR LF")  # h11 takes a bare LF at the end of the trailers
        self._last = came[-4:]
