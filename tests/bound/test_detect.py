"""HTTP and something else on one port."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from support import Echo, Recorder, made, serving, wait_until
from web import Client

from iocp_ctypes import Connection
from iocp_ctypes._detect import Detecting, is_http
from iocp_ctypes.http import HTTPConnection, Request, Response, detect


class Web(HTTPConnection):
    def __init__(self, server: Any = None, peer_address: Any = None) -> None:
        super().__init__(server, peer_address)
        self.mine = peer_address

    def on_request(self, request: Request) -> Response:
        return Response(
            f"{request.method} {request.target} {len(request.body)} {self.mine == request.client}"
        )


class Lines(Recorder):
    """Answers with what came, all of it, and its length."""

    def got(self, data: bytes) -> None:
        self.send(b"%d:%b" % (len(data), data))


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (b"GET / HTTP/1.1", True),
        (b"GET ", True),
        (b"PROPFIND /", True),
        (b"GET", None),
        (b"G", None),
        (b"P", None),
        (b"OPTIONS", None),
        (b"", None),
        (b"GETA", False),
        (b"get /", False),
        (b"\x16\x03\x01", False),
        (b"SSH-2.0", False),
        (b"hello", False),
        (b"GET\r\n", False),
        (b"\r\n", False),
    ],
)
def test_what_begins_like_a_request(first: bytes, told: bool | None) -> None:
    assert is_http(first) is told


def test_both_on_one_port() -> None:
    with serving(detect(Web, Lines)) as server:
        with Client(server.address) as web, Client(server.address) as plain:
            assert web.ask("/a").body == b"GET /a 0 True"
            plain.send(b"hello")
            assert plain.exactly(7) == b"5:hello"
            assert web.ask("/b", "POST", b"xy").body == b"POST /b 2 True"
            plain.send(b"GET / HTTP/1.1\r\n\r\n")
            assert plain.exactly(21).startswith(b"18:GET"), "it stays what it is"
        connection = made(Lines)[0]
        connection.until("close")
        assert connection.names == ["connect", "data", "data", "eof", "close"]
        connection.check()


def test_byte_by_byte() -> None:
    with serving(detect(Web, Echo)) as server:
        with Client(server.address) as client:
            for byte in b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n":
                client.send(bytes([byte]))
                time.sleep(0.002)
            assert client.answer().body == b"GET /slow 0 True"
        with Client(server.address) as client:
            for byte in b"GEX":
                client.send(bytes([byte]))
                time.sleep(0.02)
            assert client.exactly(3) == b"GEX"
        assert made(Echo)[0].until("data").value == b"GEX", "all bytes, from the first one on"


def test_who_says_nothing_is_the_others() -> None:
    class Speaking(Echo):
        def connected(self) -> None:
            self.send(b"220 hello\r\n")

    with serving(detect(Web, Speaking, timeout=0.2)) as server:
        with Client(server.address) as client:
            assert client.until(b"\n") == b"220 hello\r\n"
            client.send(b"GE")
            assert client.exactly(2) == b"GE"
        with Client(server.address) as client:
            client.send(b"GE")
            assert client.until(b"\n") == b"220 hello\r\n"
            assert client.exactly(2) == b"GE"


def test_the_end_before_it_is_clear() -> None:
    with serving(detect(Web, Lines)) as server:
        with Client(server.address) as client:
            client.send(b"GET")
            client.half_close()
            assert client.rest() == b"3:GET"
        wait_until(lambda: not server.connections)
        assert made(Lines)[0].names == ["connect", "data", "eof", "close"]


def test_who_leaves_without_a_word() -> None:
    with serving(detect(Web, Lines)) as server:
        Client(server.address).sock.close()
        wait_until(lambda: server.stats().closed)
    assert [connection.names for connection in Lines.made] == [["connect", "eof", "close"]]


def test_a_class_that_raises_when_it_is_made(expects_errors: list[logging.LogRecord]) -> None:
    class Raising(Connection):
        def __init__(self, server: Any, peer_address: Any) -> None:
            raise ZeroDivisionError

    with serving(detect(Web, Raising)) as server:
        with Client(server.address) as client:
            client.send(b"hello")
            assert client.closed()
        with Client(server.address) as client:
            assert client.ask("/").status == 200
    assert len(expects_errors) == 1


def test_a_class_that_closes_in_on_connect_gets_no_data() -> None:
    class Closing(Recorder):
        def connected(self) -> None:
            self.close()

    with serving(detect(Web, Closing)) as server:
        with Client(server.address) as client:
            client.send(b"hello")
            assert client.closed()
        made(Closing)[0].until("close")
        assert made(Closing)[0].names == ["connect", "close"]


def test_on_work_threads() -> None:
    with serving(detect(Web, Echo), work_threads=2) as server, Client(server.address) as client:
        assert client.ask("/").status == 200


class Slotted(Connection):
    __slots__ = ("mine",)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "told"),
    [
        ((int, Echo), {}, TypeError, "http="),
        ((Web, "Echo"), {}, TypeError, "other="),
        ((Web, Slotted), {}, TypeError, "__slots__"),
        ((Web, Echo), {"timeout": 0}, ValueError, "timeout=0"),
        ((Web, Echo), {"timeout": None}, TypeError, "timeout=None"),
    ],
)
def test_what_cannot_be_told_apart(arguments: Any, options: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        detect(*arguments, **options)


def test_each_detect_is_a_class_of_its_own() -> None:
    one, other = detect(Web, Echo), detect(Web, Lines, timeout=1)
    assert one is not other
    assert issubclass(one, Detecting)
