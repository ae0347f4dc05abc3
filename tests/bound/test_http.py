"""Requests over sockets: what is read, refused, cut off and handed over."""

from __future__ import annotations

import http.client
import logging
import re
import threading
import time
from typing import Any

import pytest
from smuggling import GOOD, REFUSED, VIA_BODY
from support import PATIENCE, raw, rst, serving, wait_until
from web import Client

from iocp_ctypes import Connection, ConnectionClosedError, access
from iocp_ctypes import http as module
from iocp_ctypes.http import HTTPConnection, Limits, Metrics, Request, Response, problem


class Told(HTTPConnection):
    """Answers with what it was asked."""

    def on_request(self, request: Request) -> Response | None:
        return Response(f"{request.method} {request.target} {len(request.body)}\n")


def test_a_request_and_its_answer() -> None:
    with serving(Told) as server, Client(server.address) as client:
        answer = client.ask("/a?b")
        assert (answer.status, answer.body) == (200, b"GET /a?b 0\n")
        assert answer.headers["server"] == "iocp_ctypes"
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["date"])
        assert "connection" not in answer.headers


def test_a_client_of_the_standard_library() -> None:
    with serving(Told) as server:
        client = http.client.HTTPConnection(*server.address, timeout=PATIENCE)
        for number in range(3):
            client.request("POST", f"/{number}", b"x" * number * 1000, {"X": "y"})
            answer = client.getresponse()
            assert answer.read() == f"POST /{number} {number * 1000}\n".encode()
        client.request("PUT", "/chunks", iter([b"a" * 5000, b"b" * 70_000]), encode_chunked=True)
        assert client.getresponse().read() == b"PUT /chunks 75000\n"
        client.close()


def test_keep_alive_and_its_end() -> None:
    with serving(Told) as server:
        with Client(server.address) as client:
            for number in range(5):
                assert client.ask(f"/{number}").body == f"GET /{number} 0\n".encode()
            answer = client.ask("/", Connection="close")
            assert answer.headers["connection"] == "close"
            assert client.closed()
        with Client(server.address) as client:
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            assert client.answer().headers["connection"] == "close"
            assert client.closed()
        with Client(server.address) as client:
            for _ in range(3):
                client.send(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
                assert client.answer().headers["connection"] == "keep-alive"


def test_requests_of_one_connection_are_counted() -> None:
    class Few(Told):
        limits = Limits(requests_max=3)

    with serving(Few) as server, Client(server.address) as client:
        assert ["connection" in client.ask().headers for _ in range(3)] == [False, False, True]
        assert client.closed()


def test_pipelined_requests_are_answered_in_order() -> None:
    with serving(Told) as server, Client(server.address) as client:
        asked = [b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(500)]
        asked[100] = b"POST /100 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
        asked[200] = (
            b"\r\nPOST /200 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
        )
        sender = threading.Thread(target=client.send, args=(b"".join(asked),))
        sender.start()
        for number in range(500):
            method, size = {100: ("POST", 3), 200: ("POST", 1)}.get(number, ("GET", 0))
            assert client.answer().body == f"{method} /{number} {size}\n".encode()
        sender.join()


def test_pipelined_requests_wait_for_slow_answers() -> None:
    """Answers come from other threads, in another time than the requests; their order stays."""

    class Slow(HTTPConnection):
        def on_request(self, request: Request) -> None:
            delay = 0.05 if request.target.endswith("0") else 0.0
            threading.Timer(delay, self.respond, (Response(request.target),)).start()

    with serving(Slow) as server, Client(server.address) as client:
        client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(30)))
        assert [client.answer().body for _ in range(30)] == [b"/%d" % number for number in range(30)]


def test_who_sends_on_without_an_answer_is_held_back() -> None:
    waiting: list[Request] = []

    class Never(HTTPConnection):
        def on_request(self, request: Request) -> None:
            waiting.append(request)

    one = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    with serving(Never) as server, Client(server.address) as client:
        sender = threading.Thread(target=client.send, args=(one * 400_000,))
        sender.start()
        wait_until(lambda: waiting)
        connection = waiting[0].connection
        wait_until(lambda: connection._held)
        sender.join(0.3)
        assert sender.is_alive(), "10 MB were taken, and nothing was answered"
        assert len(connection._waiting) <= 2 * module.READ_AHEAD_MAX
        assert len(waiting) == 1
        connection.respond(Response("one"))
        assert client.answer().body == b"one"
        wait_until(lambda: len(waiting) == 2)
        connection.abort()
        sender.join()


@pytest.fixture(autouse=True)
def _no_thread_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's thread that is cut off has nothing to report."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


def refusal(client: Client, status: int) -> None:
    """Assert that the connection brings one error and ends."""
    answer = client.answer()
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert answer.body.startswith(b"%d " % status)
    assert len(answer.body) < 300
    assert client.closed()


def test_what_could_be_read_in_two_ways_is_refused_and_the_connection_closed() -> None:
    with serving(Told) as server:
        for name, (data, status) in {**REFUSED, **VIA_BODY}.items():
            with Client(server.address) as client:
                client.send(data)
                answer = client.answer()
                assert answer.status == status, name
                assert answer.headers["connection"] == "close", name
                assert client.closed(), name


def test_what_is_good_is_answered_however_it_comes() -> None:
    with serving(Told) as server:
        for pieces in (1 << 20, 7, 1):
            for name, (data, method, target, body) in GOOD.items():
                if pieces == 1 and len(data) > 100:
                    continue
                with Client(server.address) as client:
                    for start in range(0, len(data), pieces):
                        client.send(data[start : start + pieces])
                    assert client.answer().body == f"{method} {target} {len(body)}\n".encode(), name


def test_limits_of_heads() -> None:
    class Small(Told):
        limits = Limits(request_line_max=100, head_max=1000, headers_max=10)

    head = "GET / HTTP/1.1\r\nHost: a\r\n"
    with serving(Small) as server:
        for data, status in (
            ("GET /" + "x" * 100 + " HTTP/1.1\r\nHost: a\r\n\r\n", 414),
            ("G" * 101, 414),
            (head + "X: " + "y" * 1000 + "\r\n\r\n", 431),
            (head + "X: " + "y" * 1000, 431),
            (head + "X: y\r\n" * 10 + "\r\n", 431),
        ):
            with Client(server.address) as client:
                client.send(data.encode())
                refusal(client, status)
        with Client(server.address) as client:
            client.send((head + "X: y\r\n" * 9 + "\r\n").encode())
            assert client.answer().status == 200


def test_limits_of_bodies() -> None:
    class Small(Told):
        limits = Limits(body_max=1000)

    post = b"POST / HTTP/1.1\r\nHost: a\r\n"
    with serving(Small) as server:
        with Client(server.address) as client:
            assert client.ask("/", "POST", b"x" * 1000).body == b"POST / 1000\n"
        with Client(server.address) as client:
            client.send(post + b"Content-Length: 1001\r\n\r\n")  # before a byte of it came
            refusal(client, 413)
        with Client(server.address) as client:
            client.send(post + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + b"x" * 1000 + b"\r\n1\r\ny")
            refusal(client, 413)


def test_who_sends_a_large_body_that_is_refused_reads_why() -> None:
    """The rest of the body is read and dropped; a reset would take the answer away."""

    class Small(Told):
        limits = Limits(body_max=1000)

    with serving(Small, linger_timeout=60.0) as server, Client(server.address) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000)
        assert client.answer().status == 413


def test_expect_continue() -> None:
    class Picky(Told):
        def on_head(self, request: Request) -> Response | None:
            return problem(403) if request.path == "/no" else None

    head = "POST {} HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: {}\r\n\r\n"
    with serving(Picky) as server:
        with Client(server.address) as client:
            client.send(head.format("/yes", "100-Continue").encode())
            assert client.head().head == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"hello")
            assert client.answer().body == b"POST /yes 5\n"
            client.send(head.format("/yes", "100-continue").encode() + b"hello")
            assert client.answer().body == b"POST /yes 5\n", "it need not be told any more"
        with Client(server.address) as client:
            client.send(head.format("/no", "100-continue").encode())
            answer = client.answer()
            assert (answer.status, answer.headers["connection"]) == (403, "close")
        with Client(server.address) as client:
            client.send(head.format("/yes", "200-ok").encode())
            refusal(client, 417)
        with Client(server.address) as client:
            client.send(head.format("/old", "100-continue").replace("HTTP/1.1", "HTTP/1.0").encode())
            client.send(b"hello")
            assert client.answer().status == 200, "HTTP/1.0 knows no 100"


def test_head_has_no_body() -> None:
    with serving(Told) as server, Client(server.address) as client:
        whole = client.ask("/a")
        head = client.ask("/a", "HEAD")
        assert head.headers["content-length"] == str(len(b"HEAD /a 0\n"))
        assert head.status == whole.status
        assert client.ask("/b").body == b"GET /b 0\n", "nothing was left over"
        client.send(b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n")
        refusal(client, 501)


# -- the application -----------------------------------------------------------------------------------------


def hello(request: Request) -> Response:
    return Response(f"hello {request.route}")


def test_routes() -> None:
    class Routed(HTTPConnection):
        routes = {"/": hello, "/a": hello, "/a/": hello, "/a/b": hello, "/deep/er/": hello}  # noqa: RUF012

    expected = {
        "/": "/",
        "/x": "/",
        "/a": "/a",
        "/a/": "/a/",
        "/a/x/y": "/a/",
        "/a/b": "/a/b",
        "/a/b/": "/a/",
    }
    expected |= {
        "/deep/er/x": "/deep/er/",
        "/deep": "/",
        "/a%2Fb": "/",
        "/%61/b": "/a/b",
        "/" + "/" * 5000: "/",
    }
    with serving(Routed) as server, Client(server.address) as client:
        for path, route in expected.items():
            assert client.ask(path).body == b"hello " + route.encode(), path


def test_without_a_route() -> None:
    class Routed(HTTPConnection):
        routes = {"/a/": hello}  # noqa: RUF012

    with serving(Routed) as server, Client(server.address) as client:
        assert client.ask("/").status == 404
        answer = client.ask("/a?b=c")
        assert (answer.status, answer.headers["location"]) == (308, "/a/?b=c")
        assert client.ask("/a/").status == 200


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"limits": {}}, TypeError),
        ({"routes": {"a": hello}}, ValueError),
        ({"routes": {"/a": "text"}}, TypeError),
        ({"guards": [None]}, TypeError),
    ],
)
def test_what_a_class_has_is_checked_when_it_is_made(attributes: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="Wrong"):
        type("Wrong", (HTTPConnection,), attributes)


def test_an_application_that_raises(expects_errors: list[logging.LogRecord]) -> None:
    class Raising(HTTPConnection):
        def on_request(self, request: Request) -> Response:
            if request.path == "/header":
                return Response("x", headers=[("X", "a\r\nb")])
            raise ZeroDivisionError("nobody's business")

    with serving(Raising) as server:
        for path in ("/", "/header"):
            with Client(server.address) as client:
                answer = client.ask(path)
                assert (answer.status, answer.headers["connection"]) == (500, "close")
                assert b"business" not in answer.body
                assert client.closed()
    assert [record.exc_info[0] for record in expects_errors if record.exc_info] == [
        ZeroDivisionError,
        ValueError,
    ]


def test_another_connection_that_is_closed_is_an_error_like_any(
    expects_errors: list[logging.LogRecord],
) -> None:
    """Only of this connection is it what happens when a peer goes."""

    class Asks(HTTPConnection):
        def on_request(self, request: Request) -> None:
            raise ConnectionClosedError("the data base has gone")

    with serving(Asks) as server, Client(server.address) as client:
        assert client.ask().status == 500
    assert len(expects_errors) == 1


def test_an_application_that_raises_amid_its_answer(expects_errors: list[logging.LogRecord]) -> None:
    class Raising(HTTPConnection):
        def on_request(self, request: Request) -> None:
            self.respond(Response("beginning", content_type="text/plain"), more=True)
            raise ZeroDivisionError

    with serving(Raising) as server, Client(server.address) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        try:
            sent = client.rest()
        except OSError:
            sent = b""
        assert not sent.endswith(b"0\r\n\r\n"), "nobody must take it for the whole"
    assert len(expects_errors) == 1


def test_bodies_piece_by_piece() -> None:
    pieces: list[bytes] = []

    class Streaming(HTTPConnection):
        def on_body_chunk(self, request: Request, data: bytes) -> None:
            pieces.append(data)

        def on_request(self, request: Request) -> Response:
            assert request.body == b""
            return Response(f"{sum(map(len, pieces))}")

    with serving(Streaming) as server, Client(server.address) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
        wait_until(lambda: pieces == [b"abc"])
        client.send(b"defghij")
        assert client.answer().body == b"10"
        assert b"".join(pieces) == b"abcdefghij"
        assert all(type(piece) is bytes for piece in pieces)
        pieces.clear()
        client.send(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"
        )
        assert client.answer().body == b"4"


def test_on_head_chooses_whether_a_body_is_streamed() -> None:
    class Choosing(HTTPConnection):
        seen = b""

        def on_head(self, request: Request) -> None:
            request.streaming = request.path == "/stream"

        def on_body_chunk(self, request: Request, data: bytes) -> None:
            self.seen += data

        def on_request(self, request: Request) -> Response:
            return Response(self.seen + b"|" + request.body)

    with serving(Choosing) as server, Client(server.address) as client:
        assert client.ask("/stream", "POST", b"abc").body == b"abc|"
        assert client.ask("/whole", "POST", b"def").body == b"abc|def"


def test_an_answer_while_the_body_comes() -> None:
    class Upper(HTTPConnection):
        def on_head(self, request: Request) -> None:
            self.respond(Response(), more=True)

        def on_body_chunk(self, request: Request, data: bytes) -> None:
            self.send_body(data.upper())

        def on_request(self, request: Request) -> None:
            self.end()

    with serving(Upper) as server, Client(server.address) as client:
        for _ in range(2):
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\n")
            assert client.head().headers["transfer-encoding"] == "chunked"
            for piece in (b"abc", b"def"):
                client.send(piece)
                assert client.exactly(8) == b"3\r\n" + piece.upper() + b"\r\n"
            assert client.exactly(5) == b"0\r\n\r\n"


def test_an_answer_before_the_end_of_the_body_is_the_last() -> None:
    class Early(HTTPConnection):
        def on_body_chunk(self, request: Request, data: bytes) -> None:
            self.respond(Response("enough"))

    with serving(Early) as server, Client(server.address) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
        answer = client.answer()
        assert (answer.body, answer.headers["connection"]) == (b"enough", "close")
        assert client.closed()


def test_guards_come_before_body_and_upgrade() -> None:
    upgraded: list[Any] = []

    class Socket:
        upgrades = "websocket"

        @staticmethod
        def upgrade(*arguments: Any) -> None:
            upgraded.append(arguments)

    class Guarded(HTTPConnection):
        guards = [access.Networks(allow=["127.0.0.0/8"]), access.Basic({"ann": "pw"})]  # noqa: RUF012
        routes = {"/": lambda request: Response(request.user), "/ws": Socket}  # noqa: RUF012

    ann = "Basic YW5uOnB3"
    with serving(Guarded) as server:
        with Client(server.address) as client:
            answer = client.ask()
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Basic realm=")
            assert client.ask(Authorization=ann).body == b"ann"
            assert client.ask("/ws", Connection="Upgrade", Upgrade="websocket").status == 401
            assert upgraded == []
        with Client(server.address) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n")
            answer = client.answer()
            assert (answer.status, answer.headers["connection"]) == (401, "close")


def test_a_rate_limit() -> None:
    class Limited(Told):
        guards = [access.RateLimit(0.001, 2)]  # noqa: RUF012

    with serving(Limited) as server, Client(server.address) as client:
        assert [client.ask().status for _ in range(3)] == [200, 200, 429]
        assert int(client.ask().headers["retry-after"]) > 900


# -- other protocols -----------------------------------------------------------------------------------------


class Backwards:
    """A protocol after an upgrade: sends back what comes, backwards."""

    upgrades = "websocket"
    made: list[Any] = []  # noqa: RUF012

    def __init__(self, connection: HTTPConnection) -> None:
        self.connection = connection
        self.calls: list[Any] = []

    @classmethod
    def upgrade(cls, connection: HTTPConnection, request: Request, rest: bytes) -> Backwards | None:
        if request.fields.get("upgrade") != "backwards":
            connection.respond(problem(426))
            return None
        connection.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: backwards\r\nConnection: Upgrade\r\n\r\n"
        )
        self = cls(connection)
        cls.made.append(self)
        if rest:
            self.on_data(rest)
        return self

    def on_data(self, data: bytes) -> None:
        self.calls.append(data)
        if data == b"deadline":
            self.connection.set_deadline(0.01)
            return
        if data == b"fill":
            self.connection.send(bytes(12_000_000))
        self.connection.send(data[::-1])

    def on_eof(self) -> bool | None:
        self.calls.append("eof")
        return None

    def on_drain(self) -> None:
        self.calls.append("drain")

    def on_timeout(self, kind: str) -> bool | None:
        self.calls.append(kind)
        self.connection.send(kind.encode())
        return True

    def on_close(self, exc: OSError | None) -> None:
        self.calls.append("close")

    def on_shutdown(self) -> None:
        self.calls.append("shutdown")
        self.connection.send(b"bye")
        self.connection.close()


class Upgrading(HTTPConnection):
    routes = {"/b": Backwards, "/": lambda request: Response("plain")}  # noqa: RUF012


UPGRADE = b"GET /b HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: backwards\r\n\r\n"


def test_after_an_upgrade_every_callback_is_the_other_protocols() -> None:
    Backwards.made.clear()
    with serving(Upgrading) as server:
        with Client(server.address) as client:
            assert client.ask("/").body == b"plain"
            client.send(UPGRADE + b"early")
            assert client.head().status == 101
            assert client.exactly(5) == b"ylrae"
            client.send(b"GET / HTTP/1.1\r\n\r\n")
            assert client.exactly(18) == b"\n\r\n\r1.1/PTTH / TEG"
            client.send(b"deadline")
            assert client.exactly(8) == b"deadline"
            client.send(b"fill")
            assert client.exactly(12_000_004)[-4:] == b"llif"
            wait_until(lambda: "drain" in Backwards.made[0].calls)
            client.half_close()
            assert client.closed()
        protocol = Backwards.made[0]
        wait_until(lambda: "close" in protocol.calls)
    assert protocol.calls[:2] == [b"early", b"GET / HTTP/1.1\r\n\r\n"]
    assert "drain" in protocol.calls
    assert protocol.calls[-2:] == ["eof", "close"]
    Backwards.made.clear()


def test_a_refused_upgrade_is_an_answer_as_others() -> None:
    with serving(Upgrading) as server, Client(server.address) as client:
        client.send(b"GET /b HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.answer().status == 426
        assert client.answer().body == b"plain"
        client.send(b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nUpgrade: backwards\r\n\r\nx")
        refusal(client, 400)


def test_the_other_protocol_is_told_that_the_server_stops() -> None:
    Backwards.made.clear()
    with serving(Upgrading) as server:
        client = Client(server.address)
        client.send(UPGRADE)
        assert client.head().status == 101
        stopping = threading.Thread(target=server.stop, args=(3 * PATIENCE,))
        stopping.start()
        assert client.exactly(3) == b"bye"
        assert client.closed()
        client.sock.close()
        stopping.join()
    Backwards.made.clear()


# -- time ----------------------------------------------------------------------------------------------------


class Hasty(Told):
    limits = Limits(
        header_timeout=0.4, keepalive_timeout=0.4, body_rate_min=1000, body_grace=0.4, send_timeout=0.4
    )


def drip(client: Client, data: bytes, stop: threading.Event) -> threading.Thread:
    """Send a byte every so often until it is stopped or cut off."""

    def run() -> None:
        try:
            for place in range(len(data)):
                client.send(data[place : place + 1])
                if stop.wait(0.05):
                    return
        except OSError:
            return

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * 1000,
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + b"x" * 999,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3E8\r\n" + b"x" * 999,
    ],
    ids=["head", "body", "chunks"],
)
def test_single_bytes_hold_nobody(data: bytes) -> None:
    stop = threading.Event()
    begun = data.find(b"\r\n\r\n") + 4 if b"Content" in data or b"Transfer" in data else 16
    with serving(Hasty) as server, Client(server.address) as client:
        client.send(data[:begun])
        thread = drip(client, data[begun:], stop)
        try:
            began = time.monotonic()
            refusal(client, 408)
            assert time.monotonic() - began < 3 * PATIENCE
        finally:
            stop.set()
            thread.join()


def test_who_is_quick_enough_is_not_cut_off() -> None:
    with serving(Hasty, recv_mode="flow", recv_size=65536) as server, Client(server.address) as client:
        block = b"x" * 10_000  # lasts for ten seconds, from the receive on that brings it with the head
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 80000\r\n\r\n" + block)
        for _ in range(7):
            time.sleep(0.1)
            client.send(block)
        assert client.answer().body == b"POST / 80000\n"


def test_a_connection_that_asks_nothing_more_is_closed() -> None:
    class Patient(Hasty):
        limits = Limits(keepalive_timeout=5.0)

    with serving(Patient) as server, Client(server.address, 30) as client:
        assert client.ask().status == 200
        began = time.monotonic()
        time.sleep(1.0)
        assert client.ask().status == 200
        assert client.closed()
        assert time.monotonic() - began > 5.8, "it is measured from the last answer on"


def test_an_answer_may_take_its_time() -> None:
    class Slow(Hasty):
        def on_request(self, request: Request) -> None:
            threading.Timer(0.8, self.respond, (Response("late"),)).start()

    with serving(Slow) as server, Client(server.address) as client:
        assert client.ask().body == b"late"


def test_while_the_application_reads_nothing_the_peer_is_not_slow() -> None:
    class Busy(Told):
        limits = Limits(body_rate_min=1000, body_grace=4.0)

        def on_body_chunk(self, request: Request, data: bytes) -> None:
            if data[:1] == b"x":
                self.pause_reading()
                threading.Timer(6.0, self.resume_reading).start()

        def on_request(self, request: Request) -> Response:
            return Response("all")

    with serving(Busy) as server, Client(server.address, 30) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nx")
        time.sleep(0.3)
        client.send(b"y")
        assert client.answer().body == b"all"


def test_who_reads_no_answer_is_cut_off() -> None:
    class Large(Hasty):
        def on_request(self, request: Request) -> Response:
            return Response(bytes(10_000_000))

    with serving(Large) as server, Client(server.address) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: server.stats().accepted)
        wait_until(lambda: not server.connections)
        with pytest.raises((OSError, AssertionError)):
            assert len(client.rest()) > 10_000_000


# -- ends ----------------------------------------------------------------------------------------------------


def test_who_half_closes_gets_what_was_asked_for() -> None:
    class Slow(HTTPConnection):
        def on_request(self, request: Request) -> None:
            threading.Timer(0.1, self.respond, (Response(request.target),)).start()

    with serving(Slow) as server, Client(server.address) as client:
        client.send(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
        client.half_close()
        assert client.answer().body == b"/1"
        assert client.answer().body == b"/2"
        assert client.closed()


def test_who_half_closes_amid_a_body_or_a_head() -> None:
    with serving(Told) as server:
        with Client(server.address) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabc")
            client.half_close()
            refusal(client, 400)
        with Client(server.address) as client:
            client.send(b"GET / HT")
            client.half_close()
            assert client.closed()


def test_answering_who_is_gone() -> None:
    told: list[Exception] = []
    asked: list[Request] = []

    class Late(HTTPConnection):
        def on_request(self, request: Request) -> None:
            asked.append(request)

        def on_close(self, exc: OSError | None) -> None:
            super().on_close(exc)
            try:
                self.respond(Response("late"))
            except Exception as error:
                told.append(error)

    with serving(Late) as server:
        client = raw(server.address)
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: asked and asked[0].connection.recvburst.in_use)
        rst(client)
        wait_until(lambda: told)
    assert type(told[0]).__name__ == "ConnectionClosedError"


def test_stopping_lets_answers_come_to_their_end() -> None:
    asked: list[Request] = []

    class Slow(HTTPConnection):
        def on_request(self, request: Request) -> None:
            asked.append(request)

    with serving(Slow) as server:
        busy, idle = Client(server.address), Client(server.address)
        busy.send(b"GET /busy HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: asked)
        stopping = threading.Thread(target=server.stop, args=(3 * PATIENCE,))
        stopping.start()
        assert idle.closed()
        wait_until(lambda: asked[0].connection._ending)
        asked[0].connection.respond(Response("done"))
        answer = busy.answer()
        assert (answer.body, answer.headers["connection"]) == (b"done", "close")
        assert busy.closed()
        idle.sock.close()
        busy.sock.close()
        stopping.join()


def test_access_log_and_metrics() -> None:
    lines: list[str] = []
    counted = Metrics()

    class Logged(HTTPConnection):
        access_log = staticmethod(lines.append)
        metrics = counted
        routes = {"/metrics": counted, "/hello": hello}  # noqa: RUF012

    with serving(Logged) as server:
        with Client(server.address) as client:
            client.ask("/hello", User_Agent="me")
            client.ask("/nothing")
            text = client.ask("/metrics").body.decode()
            client.send(b"nonsense\r\n\r\n")
            client.rest()
        wait_until(lambda: len(lines) == 4)
    assert [re.sub(r"\[.*\]", "[]", line) for line in lines[:2]] == [
        '127.0.0.1 - - [] "GET /hello HTTP/1.1" 200 12 "-" "me"',
        '127.0.0.1 - - [] "GET /nothing HTTP/1.1" 404 14 "-" "-"',
    ]
    assert '"-" 400 ' in lines[3]
    assert 'http_requests_total{method="GET",status="404"} 1' in text
    assert "iocp_ctypes_connections 1\n" in text


def test_many_clients_at_once(io_threads: int) -> None:
    failures: list[BaseException] = []

    def work(address: Any, number: int) -> None:
        try:
            with Client(address) as client:
                for turn in range(20):
                    size = (number * 977 + turn * 131) % 5000
                    expected = f"POST /{number}/{turn} {size}\n".encode()
                    if size:
                        assert client.ask(f"/{number}/{turn}", "POST", b"x" * size).body == expected
        except BaseException as exc:
            failures.append(exc)

    with serving(Told, io_threads=io_threads) as server:
        threads = [threading.Thread(target=work, args=(server.address, number)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def test_on_work_threads() -> None:
    with serving(Told, work_threads=2) as server, Client(server.address) as client:
        assert client.ask("/", "POST", b"x" * 100_000).body == b"POST / 100000\n"


def test_an_upgrade_is_no_subclass_of_connection() -> None:
    assert not issubclass(Backwards, Connection)
