"""The WSGI server over sockets; applications are wrapped in wsgiref.validate, which checks both sides."""

from __future__ import annotations

import contextvars
import functools
import gzip
import importlib
import io
import logging
import re
import tempfile
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest
from secure import client_context, server_context
from support import LOOPBACK, PATIENCE, Echo, raw, read_all, rst, serving, wait_until
from web import Answer, Client

from iocp_ctypes import ConnectionClosedError, Server, wsgi
from iocp_ctypes.http import Limits, Request, Response
from iocp_ctypes.wsgi import BLOCK_SLICE, SPOOL_MAX, FileWrapper, WSGIConnection, WSGIServer

TEXT = [("Content-Type", "text/plain")]
App = Callable[..., Iterable[bytes]]


def serving_app(
    app: App, checked: bool = True, handler: type[WSGIConnection] = WSGIConnection, **options: Any
) -> Any:
    """Serve an application for a `with` block, wrapped in the validator."""
    server: Any = functools.partial(WSGIServer, handler=handler)
    return serving(validator(app) if checked else app, server=server, **options)


class Blocks:
    """An iterable that is no list, and notes its end."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.blocks = iter(blocks)
        self.asked = 0
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.asked += 1
        return next(self.blocks)

    def close(self) -> None:
        self.closed += 1


def answering(
    blocks: Iterable[bytes], *headers: tuple[str, str], status: str = "200 OK", typed: bool = True
) -> App:
    """An application that always gives the same."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response(status, [*(TEXT if typed else []), *headers])
        return blocks

    return app


def cut_off(client: Client) -> bytes:
    """Read up to a reset, or to an end that comes too early; returns what came after the head."""
    head = client.head()
    try:
        data = client.rest()
    except ConnectionResetError:
        return b""
    if head.headers.get("transfer-encoding") == "chunked":
        assert not data.endswith(b"0\r\n\r\n"), "it looks whole"
    else:
        assert len(data) < int(head.headers["content-length"]), "it looks whole"
    return data


# -- requests -----------------------------------------------------------------------------------------------


def test_a_request_and_its_answer() -> None:
    seen: list[dict[str, Any]] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(environ)
        start_response("200 OK", TEXT)
        return [b"hello ", environ["PATH_INFO"].encode("latin-1"), b"\n"]

    with serving_app(app) as server, Client(server.address) as client:
        for number in range(3):
            answer = client.ask(f"/%C3%BC/{number}?a=b", X_Shop="1")
            assert (answer.status, answer.body) == (200, f"hello /ü/{number}\n".encode())
            assert answer.headers["content-type"] == "text/plain"
        environ = seen[0]
        assert environ["QUERY_STRING"] == "a=b"
        assert environ["HTTP_X_SHOP"] == "1"
        assert environ["SERVER_PORT"] == str(server.address[1])
        assert environ["REMOTE_PORT"] == str(client.sock.getsockname()[1])
        assert environ["wsgi.url_scheme"] == "http"


@pytest.mark.parametrize("size", [1, SPOOL_MAX, SPOOL_MAX + 1, 5_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_read_whole_and_large_ones_from_disk(size: int, chunked: bool) -> None:
    rolled: list[bool] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"]
        rolled.append(body._rolled)
        assert environ["CONTENT_LENGTH"] == str(size)
        first = body.read(10)
        rest = body.read()
        assert body.read(100) == b""
        start_response("200 OK", TEXT)
        return [str(len(first + rest)).encode(), b" ", (first + rest)[-1:]]

    data = b"x" * (size - 1) + b"y"
    with serving_app(app, checked=False) as server, Client(server.address) as client:
        for _ in range(2):  # and the connection goes on
            if chunked:
                client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
                client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (size, data))
                answer = client.answer()
            else:
                answer = client.ask("/", "POST", data)
            assert answer.body == b"%d y" % size
    assert rolled == [size > SPOOL_MAX] * 2


def test_lines_of_a_body() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"]
        parts = [body.readline(), body.readline(2), *body.readlines(1), *body]
        start_response("200 OK", TEXT)
        return [repr(parts).encode()]

    with serving_app(app) as server, Client(server.address) as client:
        assert (
            client.ask("/", "POST", b"a\nbc\nd\ne\nf").body
            == repr([b"a\n", b"bc", b"\n", b"d\n", b"e\n", b"f"]).encode()
        )
        assert client.ask("/").body == repr([b"", b""]).encode()


def test_the_application_is_called_when_the_body_has_come() -> None:
    called = threading.Event()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        called.set()
        start_response("200 OK", TEXT)
        return [environ["wsgi.input"].read(5)]

    with serving_app(app) as server, Client(server.address) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert client.head().status == 100
        client.send(b"1234")
        wait_until(lambda: server.connections[0].bytes_received > 4 and server.connections[0]._spool)
        assert not called.is_set()
        client.send(b"5")
        assert client.answer().body == b"12345"


def test_a_body_above_the_limit_is_refused_and_one_that_ends_early_too() -> None:
    class Small(WSGIConnection):
        limits = Limits(body_max=1000)

    def never(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        raise AssertionError("it was called")

    with serving_app(never, handler=Small) as server:
        with Client(server.address) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n")
            assert client.answer().status == 413
        with Client(server.address) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n12345")
            wait_until(lambda: any(connection._spool for connection in server.connections))
            spool = next(connection._spool for connection in server.connections if connection._spool)
            client.half_close()
            assert client.answer().status == 400
        wait_until(lambda: spool.closed, what="the spooled body is closed")


def test_routes_and_guards_of_the_handler_come_first() -> None:
    class Web(WSGIConnection):
        routes = {"/fixed": lambda request: Response(f"fixed {len(request.body)}\n")}  # noqa: RUF012
        guards = (lambda request: Response("no", 403) if request.path == "/secret" else None,)

    with (
        serving_app(answering([b"app"]), checked=False, handler=Web) as server,
        Client(server.address) as client,
    ):
        assert client.ask("/fixed", "POST", b"123").body == b"fixed 3\n"
        assert client.ask("/fixed/more").body == b"app"
        assert client.ask("/secret").status == 403
        assert client.ask("/", "PROPFIND").body == b"app"


def test_trusted_proxies_and_script_name() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        names = ("REMOTE_ADDR", "wsgi.url_scheme", "SCRIPT_NAME", "PATH_INFO")
        return [" ".join(environ[name] for name in names).encode()]

    headers = {"X_Forwarded_For": "203.0.113.5", "X_Forwarded_Proto": "https"}
    with (
        serving_app(app, trusted=["127.0.0.0/8"], script_name="/shop") as server,
        Client(server.address) as client,
    ):
        assert client.ask("/shop/a", **headers).body == b"203.0.113.5 https /shop /a"
    with serving_app(app, trusted=["10.0.0.0/8"]) as server, Client(server.address) as client:
        assert client.ask("/shop/a", **headers).body == b"127.0.0.1 http  /shop/a"


# -- answers ------------------------------------------------------------------------------------------------


def test_answers_of_every_shape() -> None:
    def stream() -> Iterator[bytes]:
        yield b""
        yield b"one"
        yield b""
        yield b"two"

    shapes: list[tuple[Callable[[], Any], list[tuple[str, str]], bytes, str | None]] = [
        (lambda: [b"x"], [], b"x", "1"),
        (lambda: (b"x", b"y"), [], b"xy", "2"),
        (list, [], b"", "0"),
        (lambda: [b""], [("Content-Length", "0")], b"", "0"),
        (lambda: Blocks([]), [], b"", "0"),
        (stream, [], b"onetwo", None),
        (stream, [("Content-Length", "6")], b"onetwo", "6"),
        (lambda: Blocks([b"whole"]), [("Content-Length", "5")], b"whole", "5"),
        (lambda: [b"a" * BLOCK_SLICE, b"b"], [], b"a" * BLOCK_SLICE + b"b", str(BLOCK_SLICE + 1)),
        (lambda: Blocks([b"c" * 20_000_000]), [], b"c" * 20_000_000, None),
        (lambda: [b"d" * 20_000_000], [], b"d" * 20_000_000, "20000000"),
    ]

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        make, headers, _body, _length = shapes[int(environ["PATH_INFO"][1:])]
        start_response("200 OK", TEXT + headers)
        return make()

    with serving_app(app, checked=False) as server, Client(server.address) as client:
        for number, (_make, _headers, body, length) in enumerate(shapes):
            answer = client.ask(f"/{number}")
            assert answer.body == body, number
            assert answer.headers.get("content-length") == length, number
        for number, (_make, _headers, _body, length) in enumerate(shapes):
            head = client.ask(f"/{number}", "HEAD")
            assert head.status == 200
            assert head.headers.get("content-length") in (length, None), number


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
@pytest.mark.parametrize("blocks", [[], [b""], ()])
def test_answers_without_a_body(status: str, blocks: Any) -> None:
    app = answering(blocks, ("ETag", '"1"'), status=status, typed=False)
    with serving_app(app) as server, Client(server.address) as client:
        for _ in range(2):
            answer = client.ask()
            assert answer.status == int(status[:3])
            assert answer.headers["etag"] == '"1"'
            assert not {"content-length", "transfer-encoding", "content-type"} & set(answer.headers)


def test_a_body_where_there_must_be_none_is_left_out(expects_errors: list[logging.LogRecord]) -> None:
    app = answering([b"body"], status="304 Not Modified", typed=False)
    with serving_app(app, checked=False) as server, Client(server.address) as client:
        assert [client.ask().status for _ in range(2)] == [304, 304]
    assert "has no body" in expects_errors[0].getMessage()


def test_head_with_the_length_of_the_body_that_there_would_be() -> None:
    app = answering([], ("Content-Length", "1234"))
    with serving_app(app) as server, Client(server.address) as client:
        assert client.ask("/", "HEAD").headers["content-length"] == "1234"
        assert client.ask("/", "HEAD").status == 200


def test_http_10_without_a_length_ends_with_the_connection() -> None:
    with serving_app(answering(Blocks([b"a", b"b"]))) as server, Client(server.address) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        answer = client.answer()
        assert answer.body == b"ab"
        assert answer.headers["connection"] == "close"


def test_pipelined_requests_are_answered_in_order() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return Blocks([environ["PATH_INFO"].encode(), b"!" * 1000])

    with serving_app(app) as server, Client(server.address) as client:
        client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % n for n in range(100)))
        for number in range(100):
            assert client.answer().body == b"/%d" % number + b"!" * 1000


def test_too_much_is_cut_and_logged(expects_errors: list[logging.LogRecord]) -> None:
    made: list[Blocks] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "5")])
        made.append(
            Blocks([[b"123", b"4567", b"8"], [b"12345", b"6"], [b"123456"]][int(environ["PATH_INFO"][1:])])
        )
        return made[-1]

    with serving_app(app) as server, Client(server.address) as client:
        for number in range(3):
            assert client.ask(f"/{number}").body == b"1234567"[:5]
        wait_until(lambda: [blocks.closed for blocks in made] == [1, 1, 1])
    assert [record.getMessage().split(": ")[1] for record in expects_errors] == [
        f"the application gave {count} bytes more than Content-Length said; they are left out"
        for count in (2, 1, 1)
    ]


def test_too_little_aborts_the_connection(expects_errors: list[logging.LogRecord]) -> None:
    blocks = Blocks([b"123"])
    with serving_app(answering(blocks, ("Content-Length", "5"))) as server, Client(server.address) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert cut_off(client) in (b"", b"123")
        wait_until(lambda: blocks.closed)
    assert "2 bytes before what Content-Length said" in str(expects_errors[0].exc_info)


@pytest.mark.parametrize("blocks", [[], [b"123"], Blocks([])])
def test_too_little_that_is_known_before_the_head_is_500(
    blocks: Any, expects_errors: list[logging.LogRecord]
) -> None:
    app = answering(blocks, ("Content-Length", "5"))
    with serving_app(app, checked=False) as server, Client(server.address) as client:
        assert client.ask().status == 500
    assert "Content-Length said 5" in str(expects_errors[0].exc_info)


BAD_STARTS: list[tuple[Any, Any, str]] = [
    ("200 OK", [("Connection", "close")], "belongs to the connection"),
    ("200 OK", [("transfer-encoding", "chunked")], "belongs to the connection"),
    ("200 OK", [("Upgrade", "x")], "belongs to the connection"),
    ("200 OK", [("X", "a\r\nb: c")], "no header may have"),
    ("200 OK", [("a b", "c")], "must be a token"),
    ("200 OK", [("X", 1)], "must be str"),
    ("200 OK", [("X", "\u20ac")], "no header may have"),
    ("200 OK", [("Content-Length", "-1")], "one whole number"),
    ("200 OK", [("Content-Length", "1"), ("Content-Length", "2")], "one whole number"),
    (200, [], "must be a str"),
    ("100 Continue", [], "from 200 to 599"),
    ("OK", [], "from 200 to 599"),
    ("200 OK\r\nX: y", [], "from 200 to 599"),
]


def test_what_start_response_refuses(expects_errors: list[logging.LogRecord]) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        status, headers, _told = BAD_STARTS[int(environ["PATH_INFO"][1:])]
        start_response(status, headers)
        return [b"x"]

    with serving_app(app, checked=False) as server:
        for number, (_status, _headers, told) in enumerate(BAD_STARTS):
            with Client(server.address) as client:
                assert client.ask(f"/{number}").status == 500
                assert client.closed()
            assert told in str(expects_errors[-1].exc_info), number


# -- applications that fail ---------------------------------------------------------------------------------


def fails(message: str) -> Any:
    raise ZeroDivisionError(message)


def late(*blocks: bytes) -> Iterator[bytes]:
    """Blocks, then a failure."""
    yield from blocks
    fails("late")


def not_bytes(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", TEXT)
    return ["text"]


def twice(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", TEXT)
    start_response("200 OK", TEXT)
    return [b""]


@pytest.mark.parametrize(
    ("app", "told"),
    [
        (lambda environ, start_response: fails("early"), "early"),
        (answering(Blocks(late(b"", b""))), "late"),
        (lambda environ, start_response: [b"x"], "called start_response"),
        (lambda environ, start_response: [], "called start_response"),
        (lambda environ, start_response: None, "NoneType"),
        (not_bytes, "must be bytes"),
        (answering(Blocks([1])), "must be bytes"),  # type: ignore[list-item]
        (twice, "was called before"),
    ],
)
def test_a_failure_before_the_head_is_500_and_logged(
    app: Any, told: str, expects_errors: list[logging.LogRecord]
) -> None:
    with serving_app(app, checked=False) as server, Client(server.address) as client:
        answer = client.ask()
        assert answer.status == 500
        assert told not in answer.body.decode()
        assert client.closed()
    assert told in str(expects_errors[0].exc_info)
    assert "Traceback" in logging.Formatter().format(expects_errors[0])


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_a_failure_in_the_middle_aborts_the_connection(
    size: int, expects_errors: list[logging.LogRecord]
) -> None:
    blocks = Blocks(late(b"x" * size))
    with serving_app(answering(blocks)) as server:
        with Client(server.address) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            cut_off(client)
        wait_until(lambda: blocks.closed == 1)
        wait_until(lambda: not server.connections)
        assert server.stats().closed["error"] == 1
    assert "late" in str(expects_errors[0].exc_info)


def test_a_failure_when_all_was_sent_is_logged_and_no_more(expects_errors: list[logging.LogRecord]) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "5")])
        return late(b"12345")

    with serving_app(app) as server, Client(server.address) as client:
        assert [client.ask().body for _ in range(2)] == [b"12345"] * 2
    assert "late" in str(expects_errors[0].exc_info)


def test_a_close_that_fails_is_logged(expects_errors: list[logging.LogRecord]) -> None:
    class Bad(Blocks):
        def close(self) -> None:
            fails("close")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return Bad([b"12345"])

    with serving_app(app, checked=False) as server, Client(server.address) as client:
        assert [client.ask().body for _ in range(2)] == [b"12345"] * 2
        wait_until(lambda: len(expects_errors) == 2)


def test_exc_info_replaces_an_answer_that_has_not_begun() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        import sys

        start_response("200 OK", [*TEXT, ("Content-Length", "1000")])
        try:
            fails("replaced")
        except ZeroDivisionError:
            start_response("503 Later", TEXT, sys.exc_info())
        return [b"later"]

    with serving_app(app) as server, Client(server.address) as client:
        answer = client.ask()
        assert (answer.status, answer.body) == (503, b"later")


def test_exc_info_is_raised_again_when_the_answer_has_begun(expects_errors: list[logging.LogRecord]) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        import sys

        start_response("200 OK", TEXT)
        yield b"begun"
        try:
            fails("again")
        except ZeroDivisionError:
            start_response("500 No", TEXT, sys.exc_info())
        yield b"never"

    with serving_app(app) as server, Client(server.address) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"never" not in cut_off(client)
    assert "again" in str(expects_errors[0].exc_info)


def test_wsgi_errors_is_the_log(expects_errors: list[logging.LogRecord]) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["wsgi.errors"].write("first\nsec")
        environ["wsgi.errors"].write("ond")
        start_response("200 OK", TEXT)
        return [b"x"]

    with serving_app(app) as server, Client(server.address) as client:
        client.ask()
        wait_until(lambda: len(expects_errors) == 2)
    assert [record.getMessage() for record in expects_errors] == ["first", "second"]


# -- slow readers -------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_back_the_application_and_no_thread() -> None:
    blocks = Blocks(b"%08d" % number * 8192 for number in range(1000))  # 64 MiB

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return blocks if environ["PATH_INFO"] == "/large" else [b"small"]

    with (
        serving_app(app, checked=False, work_threads=1) as server,
        Client(server.address) as slow,
        Client(server.address) as other,
    ):
        slow.send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: any(c.write_buffer_size > c.high_mark for c in server.connections))
        for _ in range(20):
            assert other.ask("/").body == b"small"  # on the very same thread
        assert blocks.asked < 900, "it was asked for everything though nobody reads"
        assert all(c.write_buffer_size <= c.high_mark + BLOCK_SLICE for c in server.connections)
        body = slow.answer().body
        assert body == b"".join(b"%08d" % number * 8192 for number in range(1000))
        wait_until(lambda: blocks.closed == 1)
        assert slow.ask("/").body == b"small"


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("way", ["write", "hold"])
def test_waiting_on_the_thread_for_a_slow_reader(way: str, tls: bool) -> None:
    most: list[int] = []

    class Holding(WSGIConnection):
        holds_threads = way == "hold"

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        write = start_response("200 OK", TEXT)

        def blocks() -> Iterator[bytes]:
            for number in range(200):
                most.append(max(connection.write_buffer_size for connection in server.connections))
                yield b"%08d" % number * 8192

        if way == "hold":
            return blocks()
        for block in blocks():
            write(block)
        return [b"", b"end"]

    options = {"tls": server_context()} if tls else {}
    with serving_app(app, checked=False, handler=Holding, **options) as server:
        sock = raw(server.address)
        if tls:
            sock = client_context().wrap_socket(sock, server_hostname="localhost")
        client = Client.__new__(Client)
        client.sock, client.waiting = sock, b""
        with client:
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: server.connections and server.connections[0].write_buffer_size > 65536)
            expected = b"".join(b"%08d" % number * 8192 for number in range(200))
            assert client.answer().body == expected + (b"end" if way == "write" else b"")
    assert max(most) <= 65536 + BLOCK_SLICE


@pytest.mark.parametrize("way", ["write", "blocks"])
def test_a_reader_that_takes_nothing_is_cut_off(way: str) -> None:
    class Short(WSGIConnection):
        limits = Limits(send_timeout=0.3)

    raised: list[BaseException] = []
    blocks = Blocks(b"x" * 65536 for _ in range(100_000))

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        write = start_response("200 OK", TEXT)
        if way == "write":
            try:
                for block in blocks:
                    write(block)
            except ConnectionClosedError as exc:
                raised.append(exc)
                raise
        return blocks

    with serving_app(app, checked=False, handler=Short) as server, Client(server.address) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: blocks.asked)
        wait_until(lambda: not server.connections, what="the connection is gone")
        assert server.stats().closed["aborted"] == 1
    assert len(raised) == (way == "write")
    assert blocks.closed == (way == "blocks")


def test_close_is_called_when_the_peer_goes() -> None:
    blocks = Blocks(b"x" * 65536 for _ in range(100_000))
    with serving_app(answering(blocks)) as server:
        client = Client(server.address)
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.head()
        rst(client.sock)
        wait_until(lambda: blocks.closed == 1)
        wait_until(lambda: not server.connections)


def test_stopping_ends_an_answer_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", PATIENCE)
    blocks = Blocks(b"x" * 65536 for _ in range(100_000))
    with (
        serving_app(answering(blocks), checked=False, stop_timeout=0.2) as server,
        Client(server.address) as client,
    ):
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.head()
        server.stop(0.2)
        wait_until(lambda: not server.connections)
    assert blocks.closed == 1


def test_each_request_has_a_context_of_its_own() -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen: list[str] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        name = environ["PATH_INFO"]
        seen.append(who.get())
        token = who.set(name)
        start_response("200 OK", TEXT)
        for _ in range(200):
            assert who.get() == name
            yield name.encode() * 16384
        who.reset(token)

    with serving_app(app, work_threads=1) as server:
        clients = [Client(server.address) for _ in range(3)]
        for number, client in enumerate(clients):
            client.send(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
        for client in clients:  # all of them are in the middle
            client.head()
        for number, client in reversed(list(enumerate(clients))):
            assert b"".join(client.chunks()) == b"/%d" % number * 16384 * 200
            client.sock.close()
    assert seen == ["nobody"] * 3


def test_write_before_and_after() -> None:
    kept: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        write = start_response("200 OK", TEXT)
        write(b"one ")
        write(b"two ")
        kept.append(write)
        return Blocks([b"three"])

    with serving_app(app) as server, Client(server.address) as client:
        for _ in range(2):
            assert client.ask().body == b"one two three"
        with pytest.raises(RuntimeError, match="the request was over"):
            wait_until(lambda: not server.connections[0]._current) and kept[0](b"more")


# -- files --------------------------------------------------------------------------------------------------


def file_app(opened: list[Any], make: Callable[[], Any], *headers: tuple[str, str]) -> App:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, *headers])
        opened.append(make())
        return environ["wsgi.file_wrapper"](opened[-1], 8192)

    return app


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.bin"
    path.write_bytes(b"0123456789abcdef" * 65536 * 3)
    return path


@pytest.mark.parametrize("tls", [False, True])
def test_a_file_is_sent_by_the_connection(large: Path, tls: bool) -> None:
    opened: list[Any] = []
    options = {"tls": server_context()} if tls else {}
    app = file_app(opened, lambda: large.open("rb"))
    with serving_app(app, checked=False, **options) as server:
        sock = raw(server.address)
        if tls:
            sock = client_context().wrap_socket(sock, server_hostname="localhost")
        client = Client.__new__(Client)
        client.sock, client.waiting = sock, b""
        with client:
            for method in ("GET", "HEAD", "GET"):
                answer = client.ask("/", method)
                assert answer.headers["content-length"] == str(3 << 20)
                assert answer.body == (large.read_bytes() if method == "GET" else b"")
            wait_until(lambda: all(file.closed for file in opened))
    assert len(opened) == 3


def test_where_the_connection_can_send_files_it_does(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    original = WSGIConnection.send_file

    def send_file(self: Any, file: Any, offset: int = 0, count: int | None = None, **more: Any) -> bool:
        assert count is not None
        calls.append((offset, count))
        return original(self, file, offset, count, **more)

    def make() -> Any:
        file = large.open("rb")
        file.seek(1000)
        return file

    monkeypatch.setattr(WSGIConnection, "send_file", send_file)
    opened: list[Any] = []
    with (
        serving_app(file_app(opened, make, ("Content-Length", "5000")), checked=False) as server,
        Client(server.address) as client,
    ):
        assert client.ask().body == large.read_bytes()[1000:6000]
        wait_until(lambda: opened[0].closed)
    assert calls == [(1000, 5000)]


def test_files_that_only_look_like_one_are_read(large: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(large.read_bytes()))
    makers: list[Callable[[], Any]] = [
        lambda: io.BytesIO(large.read_bytes()),
        lambda: gzip.open(packed),  # noqa: SIM115
        lambda: tempfile.SpooledTemporaryFile(),  # noqa: SIM115
    ]
    for make in makers:
        opened: list[Any] = []
        with serving_app(file_app(opened, make)) as server, Client(server.address) as client:
            expected = b"" if make is makers[2] else large.read_bytes()
            assert client.ask().body == expected
            wait_until(lambda opened=opened: opened[0].closed)


def test_a_file_shorter_than_content_length_said_aborts(
    large: Path, expects_errors: list[logging.LogRecord]
) -> None:
    opened: list[Any] = []
    app = file_app(opened, lambda: large.open("rb"), ("Content-Length", str((3 << 20) + 1)))
    with serving_app(app, checked=False) as server, Client(server.address) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        cut_off(client)
        wait_until(lambda: opened[0].closed)


def test_the_file_wrapper_by_itself() -> None:
    wrapper = FileWrapper(io.BytesIO(b"12345"), 2)
    assert list(wrapper) == [b"12", b"34", b"5"]
    wrapper.close()
    assert wrapper.filelike.closed
    FileWrapper(object()).close()


# -- the server ---------------------------------------------------------------------------------------------


def test_over_tls_the_scheme_is_https() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        return [environ["wsgi.url_scheme"].encode()]

    with serving_app(app, tls=server_context()) as server:
        sock = client_context().wrap_socket(raw(server.address), server_hostname="localhost")
        with sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_all(sock).endswith(b"\r\n\r\nhttps")


def test_applications_run_on_work_threads_and_may_block() -> None:
    here = threading.Barrier(wsgi.WORK_THREADS)
    names: set[str] = set()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        names.add(threading.current_thread().name)
        here.wait(PATIENCE)  # all of them at the same time
        start_response("200 OK", TEXT)
        return [b"x"]

    with serving_app(app) as server:
        clients = [Client(server.address) for _ in range(wsgi.WORK_THREADS)]
        wait_until(lambda: len(server.connections) == len(clients))
        for client in clients:
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        for client in clients:
            assert client.answer().body == b"x"
            client.sock.close()
    assert len(names) == wsgi.WORK_THREADS
    assert all(re.fullmatch(r"iocp_ctypes work \d+", name) for name in names)


def test_texts_are_compressed_only_for_who_asks_for_it() -> None:
    class Packing(WSGIConnection):
        limits = Limits(gzip_min=100)

    def asked(handler: type[WSGIConnection]) -> Answer:
        app = answering([b"x" * 5000])
        with serving_app(app, checked=False, handler=handler) as server, Client(server.address) as client:
            return client.ask("/", Accept_Encoding="gzip")

    assert "content-encoding" not in asked(WSGIConnection).headers
    assert asked(Packing).headers["content-encoding"] == "gzip"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"app": None}, "app=None: must be callable"),
        ({"work_threads": 0}, "work_threads=0"),
        ({"handler": Echo}, "subclass of WSGIConnection"),
        ({"trusted": ["x"]}, "'x'"),
        ({"script_name": "x"}, "script_name='x'"),
        ({"backlog": 0}, "backlog=0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        WSGIServer(LOOPBACK, **{"app": answering([]), **arguments})


def at_top_level(environ: Any, start_response: Any) -> Any:
    raise AssertionError("the server is not started, so nobody calls this")


@pytest.mark.parametrize("processes", [1, 2])
def test_an_application_knows_whether_others_call_it_in_other_processes(processes: int) -> None:
    server = WSGIServer(LOOPBACK, at_top_level, processes=processes)
    server.server_close()
    request = Request("GET", "/", [], client=("127.0.0.1", 1))
    environ = server.environs.make(request, ("127.0.0.1", 2), False, io.BytesIO(), 0)
    assert environ["wsgi.multiprocess"] is (processes > 1)


def test_serve_is_the_server_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Server] = []

    class Noted(WSGIServer):
        def serve_forever(self, poll_interval: float = 0.25) -> None:
            made.append(self)
            super().serve_forever(0.01)

    monkeypatch.setattr(wsgi, "WSGIServer", Noted)
    thread = threading.Thread(
        target=wsgi.serve, args=(answering([b"x"]),), kwargs={"port": 0, "work_threads": 2}
    )
    thread.start()
    server = wait_until(lambda: made)[0]
    with Client(server.address) as client:
        assert client.ask().body == b"x"
    server.shutdown()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_access_log_has_the_request() -> None:
    lines: list[str] = []

    class Logged(WSGIConnection):
        access_log = lines.append

    def guard(request: Request) -> None:
        request.user = "Ann"

    Logged.guards = (guard,)

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("404 Not Found", TEXT)
        return [environ["REMOTE_USER"].encode()]

    with serving_app(app, handler=Logged) as server, Client(server.address) as client:
        assert client.ask("/x?y").body == b"Ann"
        wait_until(lambda: lines)
    assert re.fullmatch(r'127\.0\.0\.1 - Ann \[.*\] "GET /x\?y HTTP/1\.1" 404 3 "-" "-"', lines[0])


def test_django(tmp_path: Path, large: Path) -> None:
    django: Any = pytest.importorskip(
        "django",
        reason="Django is no requirement of the tests: python3 tests/windows.py --with django -m pytest",
    )
    conf: Any = importlib.import_module("django.conf")
    web: Any = importlib.import_module("django.http")
    paths: Any = importlib.import_module("django.urls")
    urls: Any = types.ModuleType("urls_of_this_test")

    def upload(request: Any) -> Any:
        return web.HttpResponse(f"{len(request.FILES['file'].read())} {request.POST['name']}")

    urls.urlpatterns = [
        paths.path("", lambda request: web.HttpResponse(request.build_absolute_uri())),
        paths.path("file", lambda request: web.FileResponse(large.open("rb"))),
        paths.path("stream", lambda request: web.StreamingHttpResponse(b"%d" % n for n in range(1000))),
        paths.path("upload", upload),
        paths.path("fail", lambda request: fails("django")),
    ]
    conf.settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=urls,
        SECRET_KEY="x",
        LOGGING_CONFIG=None,
        FILE_UPLOAD_TEMP_DIR=str(tmp_path),
    )
    django.setup()
    app = importlib.import_module("django.core.wsgi").get_wsgi_application()
    with serving_app(app) as server, Client(server.address) as client:
        assert client.ask("/?a=1").body == b"http://test/?a=1"
        assert client.ask("/file").body == large.read_bytes()
        assert client.ask("/stream").body == b"".join(b"%d" % n for n in range(1000))
        parts = (
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nAnn\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        )
        body = parts + b"x" * 5_000_000 + b"\r\n--b--\r\n"
        answer = client.ask("/upload", "POST", body, Content_Type="multipart/form-data; boundary=b")
        assert answer.body == b"5000000 Ann"
        assert client.ask("/fail").status == 500  # Django's own
        assert client.ask("/").status == 200
    with serving_app(app, checked=False) as server, Client(server.address) as client:
        assert client.ask("/file").body == large.read_bytes()
