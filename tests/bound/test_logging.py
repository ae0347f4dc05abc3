"""The log: lifecycle at DEBUG, problems above, nothing for a message, no handler of its own."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support import OWN_HOST, PATIENCE, Echo, Recorder, echoes, made, raw, reachable, serving, wait_until

from iocp_ctypes import Server, _dispatcher, _lifetime, connect

LOG = logging.getLogger("iocp_ctypes")


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, level: int = logging.DEBUG) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno == level]


@pytest.fixture
def debug() -> Iterator[Kept]:
    """The library's log at DEBUG."""
    kept, before = Kept(), LOG.level
    LOG.addHandler(kept)
    LOG.setLevel(logging.DEBUG)
    try:
        yield kept
    finally:
        LOG.setLevel(before)
        LOG.removeHandler(kept)


def test_the_life_of_a_server_and_a_connection(debug: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatcher, "STALL_CHECK", 3600.0)
    with serving(Echo) as server:
        with raw(server.address) as client:
            echoes(client, bytes(10))
            port = client.getsockname()[1]
        (connection,) = made(Echo)
        assert connection.wait_closed(PATIENCE)
        here = f"127.0.0.1:{server.address[1]}"
    number, peer = connection.id, f"127.0.0.1:{port}"
    assert debug.lines() == [
        f"listening on {here}",
        f"connection {number} is open: {peer}, here {here}",
        f"connection {number} with {peer} is closed: eof, 10 bytes received, 10 sent",
        "an engine has stopped, and its threads have ended",
        f"stopped serving {here}: all has ended",
    ]
    assert {record.name for record in debug.records} == {"iocp_ctypes"}


def test_a_client_that_is_refused(debug: Kept) -> None:
    with Server((OWN_HOST, 0), Echo, io_threads=1) as server:
        nobody = server.address
    connection = connect(nobody, Recorder)
    assert connection.wait_closed(10)
    closed = [line for line in debug.lines() if line.startswith(f"connection {connection.id} ")]
    assert len(closed) == 1
    pattern = (
        rf"connection \d+ with {re.escape(OWN_HOST)}:{nobody[1]} is closed: "
        r"refused, 0 bytes received, 0 sent \(.+\)"
    )
    assert re.fullmatch(pattern, closed[0])


def test_a_thread_that_is_handed_over_from(debug: Kept) -> None:
    going = threading.Event()
    held: list[str] = []

    class Blocks(Echo):
        def got(self, data: bytes) -> None:
            if data == b"block":
                held.append(threading.current_thread().name)
                going.wait(10)

    with serving(Blocks, io_threads=1) as server, raw(server.address) as client:
        client.sendall(b"block")
        wait_until(
            lambda: [
                record
                for record in list(debug.records)
                if held
                and record.getMessage() == f"{held[0]} is held up: another took over"
                and str(record.threadName).startswith("iocp_ctypes I/O")
                and record.threadName != held[0]
            ],
            what="told by who took over, not by the watchdog",
        )
        going.set()


def test_handing_over_without_a_log_posts_nothing() -> None:
    # What is not logged must cost nothing: no call goes to the I/O threads for it.
    assert not _dispatcher.log.isEnabledFor(logging.DEBUG)
    going = threading.Event()

    class Blocks(Echo):
        def got(self, data: bytes) -> None:
            inside.set()
            going.wait(10)

    inside = threading.Event()
    with serving(Blocks, io_threads=1) as server, raw(server.address) as client:
        client.sendall(b"block")
        assert inside.wait(PATIENCE)
        wait_until(lambda: server.engine.stats().stalled_threads >= 1)
        ready = list(server.engine.dispatcher._ready)
        going.set()
        assert ready == []


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
def test_a_connection_asks_once_and_a_message_never(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Spy:
        def isEnabledFor(self, wanted: int) -> bool:
            asked.append(wanted)
            return wanted >= level

        def debug(self, text: str, *args: Any) -> None:
            told.append(text % args)

    told: list[str] = []
    monkeypatch.setattr(_lifetime, "log", Spy())
    with serving(Echo) as server:
        with raw(server.address) as client:
            for _ in range(50):
                echoes(client)
        (connection,) = made(Echo)
        assert connection.wait_closed(PATIENCE)
    assert asked == [logging.DEBUG]
    assert len(told) == (2 if level == logging.DEBUG else 0)


def test_no_handler_and_no_level_of_its_own() -> None:
    with serving(Echo) as server:
        reachable(server.address)
        assert [type(handler).__name__ for handler in LOG.handlers] == ["_Errors"], "the tests' own"
        assert LOG.level == logging.NOTSET
        assert LOG.propagate


def test_no_logging_handler_runs_under_a_lock(debug: Kept) -> None:
    """What is logged in a connection's life comes with no lock held: a handler may use the connection."""

    class Asks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for connection in Echo.made:
                if hasattr(connection, "_pause_asked"):  # it is made
                    held.append(connection._lock._is_owned())
                    connection.stats()

    held: list[bool] = []
    asks = Asks()
    LOG.addHandler(asks)
    try:
        with serving(Echo) as server:
            reachable(server.address)
            (connection,) = made(Echo)
            assert connection.wait_closed(PATIENCE)
    finally:
        LOG.removeHandler(asks)
    assert len(held) >= 2
    assert not any(held)
    assert debug.records
