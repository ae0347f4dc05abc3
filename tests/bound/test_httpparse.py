"""What is a request and what is refused: each row with what it is answered with, parsed alone.

That the connection is closed as well is in test_http.py, which sends the same rows to a server.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from program import ROOT
from smuggling import GOOD, REFUSED, VIA_BODY

from iocp_ctypes._httplimits import Limits
from iocp_ctypes._httpmessage import Request
from iocp_ctypes._httpparse import (
    CHUNK_LINES_MAX,
    CHUNK_OVERHEAD_FIRST,
    KEPT_HEAD_MAX,
    KEPT_HEADS,
    BodyReader,
    Refused,
    _parse_kept,
    check_partial,
    parse_head,
)

CLIENT = ("192.0.2.1", 5000)


def read(data: bytes, limits: Limits | None = None, pieces: int = 1 << 20) -> tuple[Request, bytes]:
    """Read one request as the connection does; returns it with its body, and what came behind it."""
    limits = limits or Limits()
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        check_partial(data, limits)
        raise AssertionError("the head is not complete")
    request, parser = parse_head(data[:end], limits, CLIENT)
    rest = data[end:]
    if request.length == 0:
        return request, rest
    reader = BodyReader(parser, request, limits.body_max)
    body: list[bytes] = []
    while not reader.done:
        piece, rest = rest[:pieces], rest[pieces:]
        body += reader.feed(piece)
        assert piece or reader.done
    request.body = b"".join(body)
    return request, reader.rest + rest


def refused(data: bytes, limits: Limits | None = None, pieces: int = 1 << 20) -> int:
    with pytest.raises(Refused) as caught:
        read(data, limits, pieces)
    assert caught.value.text
    assert caught.value.text.isascii()
    assert len(caught.value.text) < 200
    return caught.value.status


@pytest.mark.parametrize(("data", "status"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(data: bytes, status: int) -> None:
    assert refused(data) == status


@pytest.mark.parametrize(("data", "status"), VIA_BODY.values(), ids=VIA_BODY.keys())
def test_bodies_that_are_refused(data: bytes, status: int) -> None:
    assert refused(data) == status
    assert refused(data, pieces=1) == status


@pytest.mark.parametrize(("data", "method", "target", "body"), GOOD.values(), ids=GOOD.keys())
@pytest.mark.parametrize("pieces", [1, 1 << 20])
def test_what_is_good(data: bytes, method: str, target: str, body: bytes, pieces: int) -> None:
    request, rest = read(data + b"GET /next", pieces=pieces)
    assert (request.method, request.target, request.body) == (method, target, body)
    assert rest == b"GET /next"
    assert request.client == CLIENT


def test_fields_come_in_order_and_in_lower_case() -> None:
    request, _rest = read(b"GET / HTTP/1.1\r\nHost: a\r\nX-B: 1\r\nx-a:2\r\nX-b: \t3 \r\n\r\n")
    assert request.headers == [(b"host", b"a"), (b"x-b", b"1"), (b"x-a", b"2"), (b"x-b", b"3")]
    assert request.fields["X-B"] == "1, 3"
    assert all(type(part) is bytes for pair in request.headers for part in pair)


def test_a_head_that_came_before_is_the_same_request_and_another_object() -> None:
    head = b"GET /kept HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n"
    _parse_kept.cache_clear()
    first, _rest = read(head)
    first.headers.clear()
    first.user = "somebody"
    second, parser = parse_head(head, Limits(), ("192.0.2.2", 1))
    assert _parse_kept.cache_info()[:2] == (1, 1)
    assert parser is None
    assert (second.headers, second.user) == ([(b"host", b"a"), (b"x", b"y")], None)
    assert (second.field(b"x"), second.client) == (b"y", ("192.0.2.2", 1))
    assert refused(head, Limits(head_max=64, headers_max=1)) == 431, "limits count all the same"


def test_what_is_kept_is_bounded() -> None:
    for number in range(2 * KEPT_HEADS):
        read(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
    assert _parse_kept.cache_info().currsize == KEPT_HEADS
    _parse_kept.cache_clear()
    read(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * KEPT_HEAD_MAX + b"\r\n\r\n")
    for name in ("cl-te", "bare-lf-line"):
        refused(REFUSED[name][0])
    read(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
    assert _parse_kept.cache_info().currsize == 0


def test_a_get_with_a_body() -> None:
    data = b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    for _ in range(2):
        assert read(data)[0].body == b"abc"


def test_the_edges_of_the_limits() -> None:
    line = b"GET /" + b"x" * 100 + b" HTTP/1.1\r\n"
    head = line + b"Host: a\r\nX: " + b"y" * 300 + b"\r\n\r\n"
    exact = Limits(request_line_max=len(line) - 2, head_max=len(head), headers_max=2)
    assert read(head, exact)[0].target == "/" + "x" * 100
    assert refused(b"GET /x" + head[5:], exact) == 414
    assert refused(head.replace(b"X: ", b"X: y"), exact) == 431
    assert refused(head.replace(b"X: yyyyyyy", b"X: y\r\nY: "), exact) == 431
    assert read(head, Limits(headers_max=2))[0].field(b"x") == b"y" * 300


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"x" * 200, 414),
        (b"G" * 200, 414),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 1000, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 12, 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b" GET", 400),
        (b"\nGET", 400),
        (b"\0", 400),
        (b"GET / HTTP/1.1\nHost", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\rb", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b", 400),
        (b"GET / HTTP/1.1\r\nA\0", 400),
    ],
)
def test_what_will_never_be_good_is_refused_before_it_ends(data: bytes, status: int) -> None:
    limits = Limits(request_line_max=100, head_max=1000, headers_max=10)
    with pytest.raises(Refused) as caught:
        check_partial(data, limits)
    assert caught.value.status == status


@pytest.mark.parametrize("size", [1, 3, 14, 15, 16, 20, 25, 26, 27])
def test_a_good_beginning_is_waited_for(size: int) -> None:
    check_partial(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[:size], Limits())
    check_partial(b"\r", Limits())


def chunked(body: bytes) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body


def test_a_body_has_an_end_even_where_none_was_said() -> None:
    limits = Limits(body_max=10)
    assert read(chunked(b"a\r\n0123456789\r\n0\r\n\r\n"), limits)[0].body == b"0123456789"
    assert refused(chunked(b"a\r\n0123456789\r\n1\r\nx"), limits) == 413
    assert refused(chunked(b"fffff\r\n01234567890"), limits) == 413
    assert read(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n0123456789", limits)[0].length == 10
    assert refused(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n", limits) == 413


def test_tiny_chunks_with_long_lines_are_refused() -> None:
    waste = (b"1;" + b"x" * 1000 + b"\r\ny\r\n") * (CHUNK_OVERHEAD_FIRST // 1000 + 10)
    assert refused(chunked(waste)) == 400
    assert len(read(chunked(b"1\r\ny\r\n" * 30_000 + b"0\r\n\r\n"))[0].body) == 30_000


@pytest.mark.parametrize("begun", [b"1;", b"0\r\nX: "])
def test_lines_of_a_body_are_bounded(begun: bytes) -> None:
    assert refused(chunked(begun + b"x" * (CHUNK_LINES_MAX + 1))) in (400, 431)


def test_the_end_within_a_body() -> None:
    for data in (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", chunked(b"")):
        end = data.find(b"\r\n\r\n") + 4
        request, parser = parse_head(data[:end], Limits(), CLIENT)
        reader = BodyReader(parser, request, 100)
        reader.feed(data[end:] + (b"5\r\nab" if request.length is None else b"ab"))
        with pytest.raises(Refused) as caught:
            reader.feed(b"")
        assert caught.value.status == 400


def test_without_h11_it_is_said_what_to_install() -> None:
    program = (
        "import sys\nsys.modules['h11'] = None\nimport iocp_ctypes\n"
        "try:\n    import iocp_ctypes.http\nexcept ImportError as exc:\n    print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "the HTTP layer needs h11: pip install iocp-ctypes[http]"
    assert done.returncode == 0
