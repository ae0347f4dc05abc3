"""Requests and answers without a connection: fields, paths, heads, compression."""

from __future__ import annotations

import gzip
import io
import time
from typing import Any

import pytest

from iocp_ctypes import _httpmessage as message
from iocp_ctypes._httpmessage import (
    CHUNKED,
    EMPTY,
    LENGTH,
    UNTIL_CLOSE,
    FileBody,
    Request,
    Response,
    accepts_gzip,
    chunk,
    compose_head,
    compress,
    header_line,
    is_text,
    problem,
)


def head(
    status: int = 200, headers: Any = (), length: int | None = 0, **options: Any
) -> tuple[list[bytes], int, int, bool]:
    """The lines of a head, without Date, and the rest of what compose_head returns."""
    made, *rest = compose_head(status, headers, length, **options)
    assert made.endswith(b"\r\n\r\n")
    lines = made[:-4].split(b"\r\n")
    assert sum(line.startswith(b"Date: ") for line in lines) == 1
    framing, left, close = rest
    return [line for line in lines if not line.startswith(b"Date: ")], framing, left, close


def test_a_request_has_its_fields_by_any_case() -> None:
    request = Request("GET", "/a?b=1&b=2&c=", [(b"host", b"x"), (b"accept", b"a"), (b"accept", b"b")])
    assert request.fields["Host"] == request.fields["hOST"] == "x"
    assert request.fields["ACCEPT"] == "a, b"
    assert request.field(b"accept") == b"a, b"
    assert request.fields.get("cookie") is None
    assert request.field(b"cookie") is None
    assert "Häder" not in request.fields
    assert sorted(request.fields) == ["accept", "host"]
    assert len(request.fields) == 2
    assert (request.raw_path, request.query) == ("/a", "b=1&b=2&c=")
    assert request.arguments == {"b": ["1", "2"], "c": [""]}


def test_cookies_of_several_fields_are_joined_as_cookies_are() -> None:
    assert Request("GET", "/", [(b"cookie", b"a=1"), (b"cookie", b"b=2")]).fields["cookie"] == "a=1; b=2"


def test_too_many_arguments_are_refused() -> None:
    fitting = "&".join(["a=1"] * message.ARGUMENTS_MAX)
    assert len(Request("GET", "/?" + fitting, []).arguments["a"]) == message.ARGUMENTS_MAX
    with pytest.raises(ValueError, match="fields"):
        _ = Request("GET", f"/?{fitting}&a=1", []).arguments


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/", "/"),
        ("/a%20b", "/a b"),
        ("/gr%C3%BC%C3%9F", "/grüß"),
        ("/a%2Fb%2fc", "/a%2Fb%2Fc"),
        ("/%2e%2e/x", "/../x"),
        ("/%FF", "/\ufffd"),
        ("/100%", "/100%"),
        ("/a?b%20", "/a"),
        ("*", "*"),
    ],
)
def test_paths_are_decoded_once_and_gain_no_separator(target: str, path: str) -> None:
    assert Request("GET", target, []).path == path


def test_a_whole_answer() -> None:
    lines, framing, left, close = head(200, [("X-One", "1")], 5, server="s")
    assert lines == [
        b"HTTP/1.1 200 OK",
        b"Server: s",
        b"X-One: 1",
        b"Content-Type: application/octet-stream",
        b"Content-Length: 5",
    ]
    assert (framing, left, close) == (LENGTH, 5, False)


def test_who_says_the_type_is_believed() -> None:
    assert head(200, [("content-type", "text/css")], 5)[0] == [
        b"HTTP/1.1 200 OK",
        b"content-type: text/css",
        b"Content-Length: 5",
    ]


@pytest.mark.parametrize("status", [204, 304])
def test_answers_that_have_no_body_say_nothing_of_its_length(status: int) -> None:
    lines, framing, _left, close = head(status, [], 0)
    assert len(lines) == 1
    assert (framing, close) == (EMPTY, False)


def test_a_body_of_unknown_length() -> None:
    assert head(200, [], None) == ([b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked"], CHUNKED, 0, False)
    old = head(200, [], None, http_10=True)
    assert old == ([b"HTTP/1.1 200 OK", b"Connection: close"], UNTIL_CLOSE, 0, True)
    assert head(200, [("Content-Length", "7")], None)[1:] == (LENGTH, 7, False)


def test_keeping_the_connection_is_said_to_who_would_not_know() -> None:
    assert head(200, [], 0)[0][1:] == [b"Content-Length: 0"]
    assert head(200, [], 0, http_10=True)[0][1:] == [b"Content-Length: 0", b"Connection: keep-alive"]
    assert head(200, [], 0, http_10=True, close=True)[0][1:] == [b"Content-Length: 0", b"Connection: close"]
    lines, _framing, _left, close = head(200, [("Connection", "Close")], 0)
    assert (lines[1:], close) == ([b"Content-Length: 0", b"Connection: close"], True)


def test_an_application_may_bring_date_and_server() -> None:
    made = compose_head(200, [("Date", "today"), ("Server", "mine")], 0, server="ours")[0]
    assert made.count(b"Date: ") == made.count(b"Server: ") == 1
    assert b"Date: today\r\n" in made
    assert b"Server: mine\r\n" in made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X", "a\r\nSet-Cookie: b"),
        ("X", "a\nb"),
        ("X", "a\rb"),
        ("X", "a\0b"),
        ("X", "a\x7fb"),
        ("X", "€"),
        ("X\r\nY", "a"),
        ("X Y", "a"),
        ("X:", "a"),
        ("", "a"),
        ("Ü", "a"),
        ("Transfer-Encoding", "chunked"),
        ("Content-Length", "6"),
        ("Content-Length", "five"),
    ],
)
def test_what_would_break_the_head_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="header field"):
        compose_head(200, [(name, value)], 5)


@pytest.mark.parametrize(("name", "value"), [(b"X", "a"), ("X", b"a"), ("X", 1), (None, "a")])
def test_fields_are_text(name: Any, value: Any) -> None:
    with pytest.raises(TypeError, match="both must be str"):
        compose_head(200, [(name, value)], 5)


def test_a_length_that_is_right_is_said_once() -> None:
    assert compose_head(200, [("Content-Length", "5")], 5)[0].count(b"Content-Length") == 1


def test_lines_are_kept_up_to_a_bound() -> None:
    for number in range(2 * message.HEADER_LINES_MAX):
        header_line("X-Number", str(number))
    assert header_line.cache_info().currsize == message.HEADER_LINES_MAX


def test_the_date_is_made_anew_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 784111777.9)
    assert b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n" in compose_head(200, [], 0)[0]
    monkeypatch.setattr(time, "time", lambda: 784111778.0)
    assert b"Date: Sun, 06 Nov 1994 08:49:38 GMT\r\n" in compose_head(200, [], 0)[0]


def test_responses_take_what_can_be_sent() -> None:
    assert Response("grüß").body == "grüß".encode()
    assert Response("x").headers == [("Content-Type", "text/plain; charset=utf-8")]
    assert Response("x", content_type="text/html").headers == [("Content-Type", "text/html")]
    assert Response(b"x").headers == []
    assert Response(headers={"A": "1"}).header("a") == "1"
    assert Response().header("a") is None
    for body in (None, 5, bytearray(b"x"), ["x"]):
        with pytest.raises(TypeError, match="must be bytes, str or FileBody"):
            Response(body)  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [199, 600, 0, -1])
def test_a_status_out_of_range_is_refused(status: int) -> None:
    with pytest.raises(ValueError, match=f"status={status}: must be a whole number from 200 to 599"):
        Response(status=status)


def test_a_status_is_a_number() -> None:
    with pytest.raises(TypeError, match="status='200'"):
        Response(status="200")  # type: ignore[arg-type]


def test_a_problem_says_what_it_is() -> None:
    assert problem(404).body == b"404 Not Found\n"
    assert problem(400, "no", [("A", "1")]).body == b"400 Bad Request\nno\n"
    assert problem(400, "no", [("A", "1")]).header("A") == "1"


def test_chunks() -> None:
    assert chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


def test_a_file_as_a_body_knows_its_length() -> None:
    file = io.BytesIO(b"0123456789")
    body = FileBody(file, [(b"ab", 0, 4), (b"c", 6, 2)], b"end")
    assert body.length == 2 + 4 + 1 + 2 + 3
    body.close()
    assert file.closed


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        (b"gzip", True),
        (b"GZIP", True),
        (b"deflate, gzip;q=0.5, br", True),
        (b"x-gzip", True),
        (b"*", True),
        (b"gzip;q=0", False),
        (b"gzip; q=0.0, *", False),
        (b"*;q=0", False),
        (b"br", False),
        (b"", False),
        (None, False),
        (b"gzipped", False),
        (b"gzip;q=1.1.1", False),
        (b"\xff;gzip", False),
    ],
)
def test_who_accepts_gzip(value: bytes | None, accepted: bool) -> None:
    assert accepts_gzip(value) is accepted


def test_long_texts_are_compressed_for_who_accepts_it() -> None:
    text = "text " * 1000
    asking = Request("GET", "/", [(b"accept-encoding", b"gzip")])
    made = compress(asking, Response(text, headers=[("ETag", '"1"')]), 1024)
    assert isinstance(made.body, bytes)
    assert gzip.decompress(made.body) == text.encode()
    assert made.header("Content-Encoding") == "gzip"
    assert made.header("Vary") == "Accept-Encoding"
    assert made.header("ETag") == 'W/"1"', "the bytes are others"
    plain = compress(Request("GET", "/", []), Response(text, headers=[("ETag", '"1"')]), 1024)
    assert plain.body == text.encode()
    assert plain.header("Vary") == "Accept-Encoding", "a cache must know"
    assert plain.header("ETag") == '"1"'


@pytest.mark.parametrize(
    "response",
    [
        Response("x" * 1024),
        Response(b"x" * 5000),
        Response(b"x" * 5000, content_type="image/png"),
        Response("x" * 5000, content_type="text/event-stream"),
        Response("x" * 5000, 206),
        Response("x" * 5000, headers=[("Content-Encoding", "br")]),
    ],
)
def test_others_are_left_as_they_are(response: Response) -> None:
    asking = Request("GET", "/", [(b"accept-encoding", b"gzip")])
    assert compress(asking, response, 1024) is response
    assert compress(asking, Response("x" * 5000), None).header("Content-Encoding") is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("text/html; charset=utf-8", True),
        ("application/json", True),
        ("application/problem+json", True),
        ("image/svg+xml", True),
        ("image/png", False),
        ("application/octet-stream", False),
        ("text/event-stream", False),
        (None, False),
    ],
)
def test_what_is_text(kind: str | None, text: bool) -> None:
    assert is_text(kind) is text
