"""StreamServer: functions that may block, their threads, what they raise, how they end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import PATIENCE, ended, raw, read_all, rst, wait_until

from iocp_ctypes import ConnectionClosedError, IncompleteReadError, Stream, StreamServer, open_stream
from iocp_ctypes.stream_server import _Pool


@contextlib.contextmanager
def serving_streams(function: Any, **options: Any) -> Iterator[StreamServer]:
    server = StreamServer(("127.0.0.1", 0), function, **options)
    server.start()
    try:
        yield server
        wait_until(lambda: not server._pool._threads)  # stop() gives them one second
    finally:
        assert server.stop(PATIENCE)


def upper(stream: Stream) -> None:
    for line in stream:
        stream.write(line.upper())


def test_a_function_serves_connections() -> None:
    with serving_streams(upper) as server, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(open_stream(server.address, 10)) for _ in range(20)]
        for number, stream in enumerate(streams):
            stream.write(b"line %d\nand" % number)
        for number, stream in enumerate(streams):
            assert stream.readline() == b"LINE %d\n" % number
        for stream in streams:
            stream.write_eof()
            assert stream.read() == b"AND"


def test_more_connections_than_threads_wait_their_turn() -> None:
    running: list[int] = []
    most: list[int] = []
    lock = threading.Lock()

    def hold(stream: Stream) -> None:
        with lock:
            running.append(1)
            most.append(len(running))
        stream.write(stream.readexactly(1))
        with lock:
            running.pop()

    with serving_streams(hold, threads=3) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(raw(server.address)) for _ in range(9)]
        wait_until(lambda: len(running) == 3)
        for client in clients:
            client.sendall(b"x")
        for client in clients:
            assert read_all(client) == b"x"
    assert max(most) == 3
    assert len(most) == 9


def test_a_function_that_raises(expects_errors: Any) -> None:
    def broken(stream: Stream) -> None:
        raise KeyError(stream.read(1))

    with serving_streams(broken) as server, raw(server.address) as client:
        client.sendall(b"x")
        ended(client)
    wait_until(lambda: expects_errors)
    assert "a callback raised" in expects_errors[0].getMessage()
    assert len(expects_errors) == 1


def test_the_end_of_the_peer_is_no_mistake_of_the_function() -> None:
    """Nothing is logged as an error; see the guards."""
    problems: list[BaseException] = []

    def wanting(stream: Stream) -> None:
        try:
            stream.readexactly(10, timeout=2.0 if len(problems) == 1 else PATIENCE)
        except BaseException as exc:
            problems.append(exc)
            raise

    with serving_streams(wanting) as server:
        with raw(server.address) as client:
            client.sendall(b"abc")
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                assert read_all(client) == b""
        with raw(server.address) as client:
            client.sendall(b"abc")
            ended(client)  # a time-out
        client = raw(server.address)
        client.sendall(b"abc")
        rst(client)
        wait_until(lambda: len(problems) == 3)
    assert isinstance(problems[0], IncompleteReadError)
    assert isinstance(problems[1], TimeoutError)


def test_nor_is_it_where_another_thread_of_the_function_was_told_of_it_since() -> None:
    """Nothing is logged as an error; see the guards."""
    caught: list[BaseException] = []

    def reading(stream: Stream) -> None:
        try:
            stream.read(1, timeout=0.05)
        except TimeoutError as exc:
            caught.append(exc)

    def two(stream: Stream) -> None:
        try:
            stream.readexactly(10)
        finally:  # a helper meets the end after this thread has, and before it lets go
            helper = threading.Thread(target=reading, args=(stream,))
            helper.start()
            helper.join()

    with serving_streams(two, timeout=0.05) as server, raw(server.address) as client:
        ended(client)
    wait_until(lambda: caught)


def test_an_error_of_another_stream_is_the_functions_own(expects_errors: Any) -> None:
    """What it does with other streams is its own business, and its own mistake."""
    kept: list[Stream] = []

    def asking(stream: Stream) -> None:
        if kept:
            kept[0].read(1, timeout=0.05)
        kept.append(stream)
        stream.read(1)

    with serving_streams(asking) as server, raw(server.address):
        wait_until(lambda: kept)
        with raw(server.address) as client:
            ended(client)
        wait_until(lambda: expects_errors)


def test_no_thread_for_a_task_that_others_have_done_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, done = _Pool(2), threading.Event()
    start = threading.Thread.start

    def fails(thread: threading.Thread) -> None:
        if len(pool._threads) == 1:
            start(thread)
            return
        gate.set()  # the other thread goes on, does this task as well, and ends
        wait_until(lambda: len(pool._threads) == 1)
        raise RuntimeError("can't start new thread")

    gate = threading.Event()
    monkeypatch.setattr(threading.Thread, "start", fails)
    pool.run(gate.wait)  # type: ignore[arg-type]
    pool.run(done.set)
    assert done.is_set()
    assert pool.wait(5)


def test_an_error_of_the_functions_own_is_not_taken_for_the_peers(expects_errors: Any) -> None:
    def broken(_stream: Stream) -> None:
        raise TimeoutError("of a database")

    with serving_streams(broken) as server, raw(server.address) as client:
        ended(client)
    wait_until(lambda: expects_errors)


def test_stop_ends_functions_that_wait() -> None:
    problems: list[BaseException] = []

    def wait(stream: Stream) -> None:
        try:
            stream.read()
        except BaseException as exc:
            problems.append(exc)
            raise

    server = StreamServer(("127.0.0.1", 0), wait)
    server.start()
    with raw(server.address), raw(server.address):
        wait_until(lambda: len(server.connections) == 2)
        wait_until(lambda: len(server._pool._threads) == 2)
        began = time.monotonic()
        server.stop(0.2)
        assert time.monotonic() - began < PATIENCE
        wait_until(lambda: not server._pool._threads)
    assert [type(problem) for problem in problems] == [ConnectionClosedError] * 2
    assert "shutdown" in str(problems[0])


def test_stop_from_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", PATIENCE)
    stopped: list[bool] = []

    def stop(stream: Stream) -> None:
        stream.readline()
        stopped.append(server.stop(0.2))

    server = StreamServer(("127.0.0.1", 0), stop)
    with server, raw(server.address) as client:
        client.sendall(b"\n")
        assert read_all(client) == b""
        wait_until(lambda: stopped)
    assert stopped == [True]


def test_a_stream_is_closed_when_its_function_returns() -> None:
    kept: list[Stream] = []
    with serving_streams(kept.append) as server, raw(server.address) as client:
        assert ended(client) == "eof"
        with pytest.raises(ConnectionClosedError):
            kept[0].read()


def test_streams_leave_nothing(flat_handles: None) -> None:
    with serving_streams(upper, threads=4) as server:
        for _ in range(200):
            with open_stream(server.address, 10) as stream:
                stream.write(b"x\n")
                assert stream.readline() == b"X\n"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="function=5"):
        StreamServer(("127.0.0.1", 0), 5)  # type: ignore[arg-type]
    for threads in (0, 10_001):
        with pytest.raises(ValueError, match=f"threads={threads}: must be a whole number from 1 to 10000"):
            StreamServer(("127.0.0.1", 0), print, threads=threads)
