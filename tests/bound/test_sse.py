"""Server-sent events, read as the specification says."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from support import PATIENCE, serving, wait_until
from web import Client

from iocp_ctypes import http
from iocp_ctypes.http import EventStream, HTTPConnection, Limits, Request, Response, encode_event


def parsed(stream: bytes) -> list[dict[str, str]]:
    """Read events as a browser does (section 9.2.6); comments are kept under ":"."""
    events: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    for line in re.split("\r\n|\r|\n", stream.decode()):
        if not line:
            if fields:
                events.append(fields)
            fields = {}
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        name = name or ":"
        fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
    return events


@pytest.mark.parametrize(
    ("arguments", "event"),
    [
        ({"data": "hello"}, {"data": "hello"}),
        ({"data": "two\nlines\r\nor three\rfour"}, {"data": "two\nlines\nor three\nfour"}),
        ({"data": ""}, {"data": ""}),
        ({"data": " space"}, {"data": " space"}),
        ({"data": "grüß", "event": "greet", "id": "7"}, {"event": "greet", "id": "7", "data": "grüß"}),
        ({"data": "x", "retry": 1.5}, {"retry": "1500", "data": "x"}),
        ({"data": "data: x\n\nevent: y"}, {"data": "data: x\n\nevent: y"}),
    ],
)
def test_events_come_out_as_they_went_in(arguments: Any, event: dict[str, str]) -> None:
    assert parsed(encode_event(**arguments)) == [event]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"data": b"x"}, TypeError),
        ({"event": "a\nb"}, ValueError),
        ({"id": "a\0"}, ValueError),
        ({"id": 5}, TypeError),
        ({"retry": -1}, ValueError),
        ({"retry": "1"}, TypeError),
    ],
)
def test_what_is_no_event(arguments: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        encode_event(**arguments)


class Streaming(HTTPConnection):
    """Makes a stream of each request; they are in `streams`."""

    streams: list[EventStream] = []  # noqa: RUF012
    ended: list[EventStream] = []  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012

    def on_request(self, request: Request) -> Response | None:
        if request.path == "/plain":
            return Response("plain")
        stream = EventStream(request, **self.options)
        stream.on_close = self.ended.append
        self.streams.append(stream)
        return None


@pytest.fixture(autouse=True)
def _empty() -> Any:
    Streaming.streams.clear()
    Streaming.ended.clear()
    yield
    Streaming.streams.clear()
    Streaming.ended.clear()
    Streaming.options = {}


def begin(client: Client, method: str = "GET", **headers: str) -> Any:
    lines = [f"{method} / HTTP/1.1", "Host: a", *(f"{name}: {value}" for name, value in headers.items())]
    client.send("\r\n".join([*lines, "", ""]).encode())
    return client.head()


def stream_of(number: int = 0) -> EventStream:
    """Return a stream, which is noted a moment after its head was sent."""
    wait_until(lambda: len(Streaming.streams) > number)
    return Streaming.streams[number]


def chunk_of(client: Client) -> bytes:
    size = int(client.until(b"\r\n"), 16)
    data = client.exactly(size)
    assert client.exactly(2) == b"\r\n"
    return data


def test_a_stream() -> None:
    Streaming.options = {"retry": 2.0, "headers": [("X-Mine", "1")]}
    with serving(Streaming) as server, Client(server.address) as client:
        answer = begin(client, **{"Last-Event-ID": "41"})
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-mine"] == "1"
        assert chunk_of(client) == b"retry: 2000\n\n"
        stream = stream_of()
        assert stream.last_event_id == "41"
        assert stream.send("one", id="42") is True
        assert stream.send_encoded(encode_event("two")) is True
        assert parsed(chunk_of(client) + chunk_of(client)) == [{"id": "42", "data": "one"}, {"data": "two"}]
        assert not stream.closed
        stream.close()
        assert stream.closed
        assert Streaming.ended == [stream]
        assert client.exactly(5) == b"0\r\n\r\n"
        assert stream.send("three") is False
        stream.close()
        assert Streaming.ended == [stream]
        assert client.ask("/plain").body == b"plain", "the connection goes on"


def test_comments_keep_a_silent_stream_alive() -> None:
    class Hasty(Streaming):
        limits = Limits(keepalive_timeout=0.1, send_timeout=0.1)

    Streaming.options = {"heartbeat": 0.2}
    with serving(Hasty) as server, Client(server.address) as client:
        began = time.monotonic()
        begin(client)
        for _ in range(3):
            assert chunk_of(client) == b":\n\n"
        assert 0.4 < time.monotonic() - began < PATIENCE


def test_a_page_that_is_closed_ends_its_stream_at_once() -> None:
    with serving(Streaming) as server:
        with Client(server.address) as client:
            begin(client)
            client.half_close()
            wait_until(lambda: len(Streaming.ended) == 1)
        with Client(server.address) as client:
            begin(client)
        wait_until(lambda: len(Streaming.ended) == 2)
        wait_until(lambda: not server.connections)
        assert all(stream.closed for stream in Streaming.streams)
        assert [stream.send("x") for stream in Streaming.streams] == [False, False]


def test_head_and_old_clients() -> None:
    with serving(Streaming) as server:
        with Client(server.address) as client:
            assert begin(client, "HEAD").status == 200
            assert stream_of().closed
            assert client.ask("/plain").body == b"plain"
        with Client(server.address) as client:
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            assert client.head().headers["connection"] == "close"
            stream_of(1).send("old")
            stream_of(1).close()
            assert parsed(client.rest()) == [{"data": "old"}]


def test_who_does_not_read_is_closed_with_overflow() -> None:
    with serving(Streaming, write_buffer_max=1_000_000) as server, Client(server.address) as client:
        begin(client)
        stream = stream_of()
        sent = 0
        while not stream.closed and sent < 100_000_000:
            if not stream.send("x" * 100_000):
                time.sleep(0.01)  # on_close comes on another thread
            sent += 100_000
        wait_until(lambda: stream.closed)
        assert sent < 100_000_000
        wait_until(lambda: not server.connections)
        assert server.stats().closed == {"overflow": 1}


def test_stopping_does_not_wait_for_streams() -> None:
    with serving(Streaming, linger_timeout=0.2) as server:
        client = Client(server.address)
        begin(client)
        began = time.monotonic()
        assert server.stop(30.0) is True
        assert time.monotonic() - began < 20.0
        client.sock.close()


@pytest.mark.parametrize("heartbeat", [None, 0, -1, "x"])
def test_a_heartbeat_that_is_none(heartbeat: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="heartbeat="):
        EventStream(Request("GET", "/", []), heartbeat=heartbeat)


def test_the_names_are_those_of_the_http_layer() -> None:
    assert {"EventStream", "encode_event"} <= set(http.__all__)
