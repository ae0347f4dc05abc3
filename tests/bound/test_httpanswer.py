"""Answers: whole, in pieces, from files, and such that cannot be completed."""

from __future__ import annotations

import gzip
import hashlib
import logging
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from support import serving, wait_until
from web import Client

from iocp_ctypes import ConnectionClosedError
from iocp_ctypes._filechannel import FILE_AHEAD
from iocp_ctypes._httpanswer import COPIED_MAX
from iocp_ctypes.http import FileBody, HTTPConnection, Request, Response, StaticFiles

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def application(function: Any, **attributes: Any) -> type[HTTPConnection]:
    """A connection whose on_request is a function of (connection, request)."""
    return type("Application", (HTTPConnection,), {"on_request": function, **attributes})


@pytest.mark.parametrize("size", [0, 1, COPIED_MAX, COPIED_MAX + 1, 3_000_000])
def test_whole_answers_of_any_size(size: int) -> None:
    data = bytes(size)
    with (
        serving(application(lambda self, request: Response(data))) as server,
        Client(server.address) as client,
    ):
        for _ in range(2):
            answer = client.ask()
            assert answer.headers["content-length"] == str(size)
            assert answer.body == data


def test_a_whole_answer_is_one_send(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = HTTPConnection.send

    def spy(self: HTTPConnection, data: bytes) -> bool:
        sent.append(len(data))
        return send(self, data)

    monkeypatch.setattr(HTTPConnection, "send", spy)
    kind = application(lambda self, request: Response(bytes(1024)))
    with serving(kind) as server, Client(server.address) as client:
        for _ in range(3):
            client.ask()
    assert len(sent) == 3


def test_an_answer_in_pieces() -> None:
    def stream(self: HTTPConnection, request: Request) -> None:
        self.respond(Response(b"first", content_type="text/plain"), more=True)
        assert self.send_body(b"second") is True
        assert self.send_body(b"") is True, "an empty chunk would be the end"
        self.send_body(bytearray(b"x" * (COPIED_MAX + 1)))
        self.end()

    with serving(application(stream)) as server:
        with Client(server.address) as client:
            for _ in range(2):
                client.send(GET)
                answer = client.head()
                assert answer.headers["transfer-encoding"] == "chunked"
                assert "content-length" not in answer.headers
                assert client.chunks() == [b"first", b"second", b"x" * (COPIED_MAX + 1)]
            head = client.ask("/", "HEAD")
            assert head.headers["transfer-encoding"] == "chunked"
            assert client.ask().status == 200, "HEAD left nothing over"
        with Client(server.address) as client:
            client.send(GET.replace(b"1.1", b"1.0"))
            answer = client.answer()
            assert "transfer-encoding" not in answer.headers
            assert answer.headers["connection"] == "close"
            assert answer.body == b"firstsecond" + b"x" * (COPIED_MAX + 1)


def test_pieces_of_a_length_that_was_said() -> None:
    raised: list[str] = []

    def stream(self: HTTPConnection, request: Request) -> None:
        self.respond(Response(headers=[("Content-Length", "6")]), more=True)
        self.send_body(b"abc")
        try:
            self.send_body(b"defg")
        except ValueError as exc:
            raised.append(str(exc))
        if request.path == "/short":
            try:
                self.end()
            except RuntimeError as exc:
                raised.append(str(exc))
            return
        self.send_body(b"def")
        self.end()

    with serving(application(stream)) as server, Client(server.address) as client:
        answer = client.ask()
        assert (answer.headers["content-length"], answer.body) == ("6", b"abcdef")
        assert raised == ["4 bytes, and Content-Length leaves 3"]
        client.send(GET.replace(b"/ ", b"/short "))
        try:
            assert not client.rest().endswith(b"def")
        except OSError:
            pass
        wait_until(lambda: len(raised) == 3)
        assert raised[2] == "the body ended 3 bytes before what Content-Length said"


def test_calls_out_of_order_are_told() -> None:
    raised: list[str] = []

    def attempt(function: Any, *arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except (RuntimeError, ValueError) as exc:
            raised.append(f"{type(exc).__name__}: {exc}")

    def wrong(self: HTTPConnection, request: Request) -> None:
        attempt(self.send_body, b"x")
        attempt(self.end)
        self.respond(Response(status=204), more=True)
        attempt(self.respond, Response())
        attempt(self.send_body, b"x")
        self.end()
        attempt(self.end)
        attempt(self.respond, Response())

    with serving(application(wrong)) as server, Client(server.address) as client:
        assert client.ask().status == 204
        assert client.ask().status == 204
    begun = "RuntimeError: no answer was begun by respond(..., more=True), or it has ended"
    answered = "RuntimeError: this request has been answered"
    no_body = "ValueError: an answer with status 204 has no body"
    assert raised == [begun, begun, answered, no_body, begun, answered] * 2


def test_answers_from_another_thread_with_backpressure() -> None:
    pieces, size = 400, 50_000

    class Streaming(HTTPConnection):
        room = threading.Event()

        def on_drain(self) -> None:
            super().on_drain()
            self.room.set()

        def on_request(self, request: Request) -> None:
            threading.Thread(target=self.work).start()

        def work(self) -> None:
            most = 0
            self.respond(Response(), more=True)
            for number in range(pieces):
                self.room.clear()
                if not self.send_body(bytes([number % 256]) * size):
                    assert self.room.wait(10)
                most = max(most, self.write_buffer_size)
            self.end()
            self.data = most

    with serving(Streaming) as server, Client(server.address) as client:
        client.send(GET)
        connection: Any = wait_until(lambda: server.connections)[0]
        answer = client.answer()
        assert answer.body == b"".join(bytes([number % 256]) * size for number in range(pieces))
        wait_until(lambda: connection.data is not None)
        assert connection.data < 4 * size, "it was waited for the peer"


def test_texts_are_compressed_on_the_way() -> None:
    text = "grüße " * 1000
    with (
        serving(application(lambda self, request: Response(text))) as server,
        Client(server.address) as client,
    ):
        answer = client.ask(Accept_Encoding="gzip, deflate")
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["vary"] == "Accept-Encoding"
        assert gzip.decompress(answer.body) == text.encode()
        assert client.ask().body == text.encode()


def test_a_field_that_cannot_be_sent_from_another_thread() -> None:
    raised: list[Exception] = []

    def work(connection: HTTPConnection) -> None:
        try:
            connection.respond(Response("x", headers=[("X Y", "z")]))
        except ValueError as exc:
            raised.append(exc)
            connection.respond(Response("good"))

    def later(self: HTTPConnection, request: Request) -> None:
        threading.Thread(target=work, args=(self,)).start()

    with serving(application(later)) as server, Client(server.address) as client:
        assert client.ask().body == b"good"
    assert len(raised) == 1


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "large.bin").write_bytes(bytes(range(256)) * 40_000)
    (tmp_path / "small.txt").write_bytes(b"small")
    return tmp_path


def served(folder: Path) -> type[HTTPConnection]:
    return type("Files", (HTTPConnection,), {"routes": {"/": StaticFiles(folder)}})


def test_a_large_file_arrives_and_the_connection_goes_on(folder: Path) -> None:
    whole = (folder / "large.bin").read_bytes()
    assert len(whole) > 10 * FILE_AHEAD
    with serving(served(folder)) as server, Client(server.address) as client:
        for _ in range(2):
            answer = client.ask("/large.bin")
            assert answer.headers["content-length"] == str(len(whole))
            assert hashlib.sha256(answer.body).digest() == hashlib.sha256(whole).digest()
        assert client.ask("/small.txt").body == b"small"
        assert client.ask("/large.bin", "HEAD").headers["content-length"] == str(len(whole))
        part = client.ask("/large.bin", Range="bytes=1000000-1999999")
        assert (part.status, part.body) == (206, whole[1_000_000:2_000_000])
        parts = client.ask("/large.bin", Range="bytes=0-9,-300000")
        assert parts.status == 206
        assert whole[-300_000:] in parts.body
        assert client.ask("/small.txt", Connection="close").body == b"small"
        assert client.closed()


def test_files_of_pipelined_requests_are_not_mixed(folder: Path) -> None:
    whole = (folder / "large.bin").read_bytes()
    with serving(served(folder)) as server, Client(server.address) as client:
        large, small = GET.replace(b"/ ", b"/large.bin "), GET.replace(b"/ ", b"/small.txt ")
        client.send(small + large + small + large)
        assert [client.answer().body == body for body in (b"small", whole, b"small", whole)] == [True] * 4


def test_who_reads_slowly_costs_little_memory(folder: Path) -> None:
    with serving(served(folder)) as server, Client(server.address) as client:
        client.send(GET.replace(b"/ ", b"/large.bin "))
        connection = wait_until(lambda: server.connections)[0]
        wait_until(lambda: connection._file is not None)
        assert connection.write_buffer_size < 4 * FILE_AHEAD
        assert len(client.answer().body) == 10_240_000


def test_a_file_that_becomes_shorter_is_no_whole_answer(
    tmp_path: Path, expects_errors: list[logging.LogRecord]
) -> None:
    (tmp_path / "short").write_bytes(b"x" * 999)

    def answer(self: HTTPConnection, request: Request) -> Response:
        return Response(FileBody(tmp_path / "short", [(b"", 0, 999), (b"", 0, 1000)]))

    with serving(application(answer)) as server, Client(server.address) as client:
        client.send(GET)
        try:
            assert client.rest().count(b"x") <= 999
        except OSError:
            pass
        wait_until(lambda: not server.connections)
    assert "has 999 bytes" in str(expects_errors[0].exc_info)


def test_what_is_no_file_is_an_error_and_no_answer(expects_errors: list[logging.LogRecord]) -> None:
    def answer(self: HTTPConnection, request: Request) -> Response:
        return Response(FileBody(object(), [(b"", 0, 5)]))

    lines: list[str] = []
    with serving(application(answer, access_log=lines.append)) as server, Client(server.address) as client:
        client.send(GET)
        try:
            assert client.rest() == b""
        except OSError:
            pass
        wait_until(lambda: not server.connections)
        wait_until(lambda: lines)
    assert not re.search(r" -[0-9]", lines[0]), "the head was counted, and never sent"
    assert "must be a path" in str(expects_errors[0].exc_info)


def test_the_head_and_a_file_are_one_call(folder: Path) -> None:
    asked: list[Any] = []

    class Sending(HTTPConnection):
        routes = {"/": StaticFiles(folder)}  # noqa: RUF012

        def send_file(self, *arguments: Any, **options: Any) -> bool:
            asked.append((*arguments[1:], options["header"][:8]))
            return super().send_file(*arguments, **options)

    with serving(Sending) as server, Client(server.address) as client:
        assert len(client.ask("/large.bin").body) == 10_240_000
        client.ask("/large.bin", Range="bytes=5-9,100-")
    assert asked == [
        (0, 10_240_000, b"HTTP/1.1"),
        (5, 5, b"HTTP/1.1"),
        (100, 10_239_900, b"\r\n--" + asked[2][2][4:]),
    ]


def test_a_peer_that_goes_amid_a_file_leaves_nothing_open(folder: Path) -> None:
    with serving(served(folder)) as server:
        with Client(server.address) as client:
            client.send(GET.replace(b"/ ", b"/large.bin "))
            client.head()
        wait_until(lambda: not server.connections)
    (folder / "large.bin").unlink()  # Windows refuses that while it is open


def test_respond_with_a_file_from_another_thread(folder: Path) -> None:
    files = StaticFiles(folder)

    def later(self: HTTPConnection, request: Request) -> None:
        threading.Thread(target=lambda: self.respond(files(request))).start()

    with serving(application(later)) as server, Client(server.address) as client:
        assert len(client.ask("/large.bin").body) == 10_240_000
        assert client.ask("/small.txt").body == b"small"


def test_answering_after_the_end() -> None:
    raised: list[Exception] = []

    def ends(self: HTTPConnection, request: Request) -> None:
        self.respond(Response(), more=True)
        self.close()
        for call in (lambda: self.send_body(b"x"), self.end):
            try:
                call()
            except Exception as exc:
                raised.append(exc)

    with serving(application(ends)) as server, Client(server.address) as client:
        client.send(GET)
        client.rest()
    assert [type(exc) for exc in raised] == [ConnectionClosedError] * 2
