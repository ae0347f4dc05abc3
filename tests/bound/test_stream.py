"""Stream and StreamServer: blocking reads and writes, their time-outs, and all ways to an end."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from program import Program
from support import (
    PATIENCE,
    Echo,
    Recorder,
    made,
    read_all,
    read_exactly,
    rst,
    serving,
    wait_until,
)
from targets import full_queue

from iocp_ctypes import (
    Connection,
    ConnectionClosedError,
    IncompleteReadError,
    Stream,
    _channel,
    open_stream,
)
from iocp_ctypes import stream as stream_module

STUCK = 12_000_000  # more bytes than the kernel takes for a peer that does not read
SHORT = 0.05  # seconds of a time-out that is expected
ABORTED = r"^close\(\): the connection was aborted before all that was written was sent$"


@contextlib.contextmanager
def pair(**options: Any) -> Iterator[tuple[Stream, socket.socket]]:
    """A stream and the plain socket at its other end; no server of ours is there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        stream = open_stream(listener.getsockname(), PATIENCE, **options)
        peer, _address = listener.accept()
    peer.settimeout(PATIENCE)
    try:
        yield stream, peer
    finally:
        stream.abort()
        peer.close()
        assert stream.connection.wait_closed(PATIENCE)


class Task(threading.Thread):
    """A call on a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._call = lambda: function(*args, **kwargs)
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as exc:
            self._error = exc

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._value


def reading(stream: Stream) -> bool:
    return stream._reading.locked()


def unread(stream: Stream, size: int) -> None:
    """Wait until so many bytes came."""
    wait_until(lambda: len(stream._feed.buffer) == size, what=f"{size} unread bytes")


# -- reading ------------------------------------------------------------------------------------------------


def test_read_what_is_there_what_comes_and_the_end() -> None:
    with pair() as (stream, peer):
        assert stream.read(0) == b""
        peer.sendall(b"hello world")
        unread(stream, 11)
        assert stream.read(5) == b"hello"
        assert stream.read(100) == b" world"
        task = Task(stream.read, 100)
        wait_until(lambda: reading(stream))
        peer.sendall(b"later")
        assert task.result() == b"later"
        peer.sendall(b"the rest")
        peer.shutdown(socket.SHUT_WR)
        assert stream.read() == b"the rest"
        assert stream.read() == b""
        assert stream.read(1) == b""


def test_readexactly() -> None:
    with pair() as (stream, peer):
        assert stream.readexactly(0) == b""
        task = Task(stream.readexactly, 10)
        for _ in range(5):
            peer.sendall(b"ab")
        assert task.result() == b"ababababab"
        peer.sendall(b"abc")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(
            IncompleteReadError, match="the peer ended after 3 bytes; wanted were 4"
        ) as caught:
            stream.readexactly(4)
        assert caught.value.partial == b"abc"
        assert stream.read() == b""


def test_readexactly_of_more_than_is_read_ahead() -> None:
    """Reading had paused with less in the buffer than is asked for."""
    size = stream_module.READ_AHEAD_MAX
    with pair() as (stream, peer):
        task = Task(peer.sendall, bytes(4 * size))
        wait_until(lambda: stream._feed.pausing)
        for count in (size + 100_000, size // 4, size + 100_000):
            assert len(stream.readexactly(count)) == count
        assert len(stream.readexactly(4 * size - 2 * (size + 100_000) - size // 4)) > 0
        task.result()


def test_readuntil_and_readline() -> None:
    with pair() as (stream, peer):
        peer.sendall(b"one\r\ntwo\r")
        assert stream.readuntil(b"\r\n") == b"one\r\n"
        task = Task(stream.readuntil, b"\r\n")
        wait_until(lambda: reading(stream))
        peer.sendall(b"\nthree\nrest")
        assert task.result() == b"two\r\n"
        assert stream.readline() == b"three\n"
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(IncompleteReadError) as caught:
            stream.readuntil(b"!")
        assert caught.value.partial == b"rest"
        assert stream.readline() == b""


def test_the_limit_of_readuntil() -> None:
    with pair() as (stream, peer):
        peer.sendall(b"12345678\n" + b"123456789\nx")
        unread(stream, 20)
        assert stream.readuntil(limit=9) == b"12345678\n"
        with pytest.raises(ValueError, match=r"no b'\\n' within limit=9 bytes"):
            stream.readuntil(limit=9)
        assert stream.readuntil(limit=10) == b"123456789\n"  # it was left to be read
        task = Task(stream.readline, limit=100)
        peer.sendall(b"x" * 99)
        with pytest.raises(ValueError, match="within limit=100 bytes"):
            task.result()
        assert stream.readexactly(100) == b"x" * 100
        for bad in (b"", "x", 3):
            with pytest.raises(ValueError, match="separator="):
                stream.readuntil(bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="limit=1: must be a whole number from 2"):
            stream.readuntil(b"\r\n", limit=1)


def test_iteration_by_lines() -> None:
    with pair() as (stream, peer):
        peer.sendall(b"one\ntwo\n\nlast")
        peer.shutdown(socket.SHUT_WR)
        assert list(stream) == [b"one\n", b"two\n", b"\n", b"last"]


def test_a_time_out_loses_nothing() -> None:
    with pair() as (stream, peer):
        peer.sendall(b"abc")
        unread(stream, 3)
        for call in (
            lambda: stream.readexactly(4, timeout=SHORT),
            lambda: stream.readuntil(timeout=SHORT),
            lambda: stream.readline(timeout=SHORT),
            lambda: stream.read(timeout=SHORT),
        ):
            with pytest.raises(TimeoutError, match=r"read\w*\(.*\): not done within timeout=0.05 s"):
                call()
        assert stream.read(10) == b"abc"
        stream.timeout = SHORT
        with pytest.raises(TimeoutError):
            stream.read(10)
        assert stream.timeout == SHORT
        task = Task(stream.read, 10, timeout=None)
        wait_until(lambda: reading(stream))
        peer.sendall(b"d")
        assert task.result() == b"d"


def test_a_second_reader_is_told_so() -> None:
    with pair() as (stream, peer):
        task = Task(stream.read, 10)
        wait_until(lambda: reading(stream))
        for call in (lambda: stream.read(1), stream.readline, lambda: stream.readexactly(1)):
            with pytest.raises(RuntimeError, match="another thread is reading from this stream"):
                call()
        stream.write(b"writing is another matter")
        assert read_exactly(peer, 25) == b"writing is another matter"
        peer.sendall(b"x")
        assert task.result() == b"x"
        peer.sendall(b"y")
        assert stream.read(10) == b"y"


def test_what_is_not_read_stays_with_the_peer() -> None:
    most = stream_module.READ_AHEAD_MAX + _channel.BULK_RECEIVE
    with pair() as (stream, peer):
        peer.settimeout(1)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 1 << 28:
                sent += peer.send(bytes(1 << 16))
        assert sent < 1 << 28
        assert len(stream._feed.buffer) <= most
        assert sent > most
        peer.settimeout(PATIENCE)
        got = 0
        while got < sent:
            got += len(stream.read(1 << 16))
            assert len(stream._feed.buffer) <= most
        assert got == sent


# -- writing ------------------------------------------------------------------------------------------------


def test_write_waits_for_a_peer_that_does_not_read_and_a_time_out_sends_nothing() -> None:
    with pair() as (stream, peer):
        block, written = bytes(100_000), 0

        def fill() -> None:
            nonlocal written
            while written < 1 << 28:
                stream.write(block, timeout=0.3)
                written += len(block)

        with pytest.raises(TimeoutError, match=r"write\(\): not done within"):
            fill()
        assert stream.connection.write_buffer_size <= 64 * 1024 + 100_000
        task = Task(stream.write, b"again", timeout=PATIENCE)
        assert len(read_exactly(peer, written)) == written
        task.result()
        assert read_exactly(peer, 5) == b"again"


def test_one_write_of_more_than_any_buffer() -> None:
    data = bytes(range(256)) * 100_000  # 25.6 MB; a connection of the other kind overflows at 16 MiB
    with pair() as (stream, peer):
        stream.write(memoryview(data))
        assert hashlib.sha256(read_exactly(peer, len(data))).digest() == hashlib.sha256(data).digest()


def test_the_bytes_of_one_write_stay_together() -> None:
    size, count = 50_000, 20
    with pair() as (stream, peer):

        def work(letter: bytes) -> None:
            for _ in range(count):
                stream.write(letter * size)

        tasks = [Task(work, letter) for letter in (b"a", b"b", b"c", b"d")]
        seen: dict[int, int] = {}
        for _ in range(4 * count):
            block = read_exactly(peer, size)
            assert block == block[:1] * size
            seen[block[0]] = seen.get(block[0], 0) + 1
        for task in tasks:
            task.result()
        assert set(seen.values()) == {count}


def test_what_write_takes() -> None:
    with pair() as (stream, peer):
        data = bytearray(b"abc")
        stream.write(data)
        data[:] = b"xyz"
        stream.write(b"")
        assert read_exactly(peer, 3) == b"abc"
        for bad in ("text", 5, None):
            with pytest.raises(TypeError, match="data is"):
                stream.write(bad)  # type: ignore[arg-type]


def test_50_mb_both_ways_with_a_slow_reader() -> None:
    size, block = 50_000_000, bytes(range(250)) * 400

    class Mirror(Echo):
        pass

    with serving(Mirror) as server, open_stream(server.address, 60) as stream:
        sent, got = hashlib.sha256(), hashlib.sha256()

        def send() -> None:
            for number in range(size // len(block)):
                piece = number.to_bytes(4, "big") + block[4:]
                sent.update(piece)
                stream.write(piece)
            stream.write_eof()

        task = Task(send)
        count = 0
        while data := stream.read(70_001):
            got.update(data)
            count += len(data)
            if count % 5_000_000 < len(data) and count < size - 1_000_000:
                wait_until(lambda: stream._feed.pausing)  # a reader so slow that all stands still
        task.join(PATIENCE)
        task.result()
        assert count == size
        assert got.digest() == sent.digest()


# -- the end ------------------------------------------------------------------------------------------------


def test_close_sends_what_was_written_and_waits_for_it() -> None:
    data = bytes(range(256)) * 20_000
    with pair() as (stream, peer):
        stream.write(data)
        assert stream.connection.write_buffer_size
        task = Task(stream.close, timeout=60)
        wait_until(lambda: stream.closed)
        assert task.is_alive()
        assert read_all(peer) == data
        peer.close()
        task.result()
        assert stream.connection.closed
        stream.close()


def test_close_times_out_and_goes_on() -> None:
    with pair() as (stream, peer):
        stream.write(bytes(5_000_000))
        with pytest.raises(TimeoutError, match=r"close\(\): not done within"):
            stream.close(timeout=SHORT)
        task = Task(stream.close)
        assert len(read_all(peer)) == 5_000_000
        peer.close()
        task.result()


def test_close_says_that_bytes_were_lost() -> None:
    with pair() as (stream, peer):
        stream.write(bytes(20_000_000))
        task = Task(stream.close)
        wait_until(lambda: stream.closed)
        rst(peer)
        with pytest.raises(ConnectionError):
            task.result()
        stream.close()  # said once


def test_a_close_after_one_that_timed_out_says_that_bytes_were_lost() -> None:
    with pair() as (stream, peer):
        stream.write(bytes(20_000_000))
        for _ in range(2):
            with pytest.raises(TimeoutError):
                stream.close(timeout=SHORT)
        rst(peer)
        with pytest.raises(ConnectionError):
            stream.close()
        stream.close()  # said once


@pytest.mark.parametrize("how", ["connection", "stream"])
@pytest.mark.parametrize("timed_out", [False, True])
def test_close_says_so_where_somebody_else_aborted(how: str, timed_out: bool) -> None:
    with pair() as (stream, _peer):
        stream.write(bytes(20_000_000))
        if timed_out:
            with pytest.raises(TimeoutError):
                stream.close(timeout=SHORT)
        task = Task(stream.close)
        wait_until(lambda: len(stream._feed.changed._waiters) == 1)  # type: ignore[attr-defined]
        (stream if how == "stream" else stream.connection).abort()
        with pytest.raises(ConnectionClosedError, match=ABORTED):
            task.result()
        stream.close()  # said once


def test_close_says_so_where_the_connection_was_aborted_before() -> None:
    with pair() as (stream, _peer):
        stream.write(bytes(20_000_000))
        stream.connection.abort()
        with pytest.raises(ConnectionClosedError, match=ABORTED):
            stream.close()
        stream.close()  # said once


def test_close_says_nothing_where_nothing_was_lost_or_this_stream_was_aborted_before() -> None:
    with pair() as (stream, peer):
        stream.write(b"x")
        assert read_exactly(peer, 1) == b"x"
        wait_until(lambda: not stream.connection.write_buffer_size)
        stream.connection.abort()
        stream.close()
    with pair() as (stream, _peer):
        stream.write(bytes(20_000_000))
        with pytest.raises(TimeoutError):
            stream.close(timeout=SHORT)
        stream.abort()
        stream.close()


def test_half_close_and_an_answer_after_it() -> None:
    with pair() as (stream, peer):
        stream.write(b"question")
        stream.write_eof()
        stream.write_eof()
        assert read_all(peer) == b"question"
        with pytest.raises(ConnectionClosedError, match=r"write\(\): after write_eof\(\)"):
            stream.write(b"more")
        peer.sendall(b"answer")
        assert stream.read(100) == b"answer"
        peer.close()
        assert stream.read() == b""


def test_writing_on_after_the_peers_end() -> None:
    with pair() as (stream, peer):
        peer.shutdown(socket.SHUT_WR)
        assert stream.read() == b""
        stream.write(b"still there")
        stream.write_eof()
        assert read_all(peer) == b"still there"


def test_a_reset_ends_a_read_and_all_that_follows() -> None:
    with pair() as (stream, peer):
        peer.sendall(b"before")
        unread(stream, 6)
        rst(peer)
        wait_until(lambda: stream._feed.over or stream._feed.ended)
        assert stream.read(100) == b"before"
        if stream._feed.over:  # Wine may show EOF
            for call in (
                lambda: stream.read(1),
                stream.read,
                lambda: stream.readexactly(1),
                lambda: stream.write(b"x"),
            ):
                with pytest.raises(ConnectionResetError):
                    call()


def test_a_reset_ends_a_write_that_waits() -> None:
    with pair() as (stream, peer):
        stream.write(bytes(20_000_000))
        task = Task(stream.write, b"waits")
        rst(peer)
        with pytest.raises(ConnectionError):
            task.result()


def test_use_after_close() -> None:
    with pair() as (stream, peer):
        peer.sendall(b"unread")
        unread(stream, 6)
        peer.close()
        stream.close()
        for call in (
            lambda: stream.read(1),
            stream.read,
            lambda: stream.readexactly(1),
            stream.readline,
            lambda: list(stream),
            lambda: stream.write(b"x"),
            stream.write_eof,
        ):
            with pytest.raises(ConnectionClosedError, match=r"\w+\(.*\): the stream is closed"):
                call()
        assert "closed" in repr(stream)
        stream.abort()


@pytest.mark.parametrize("how", ["close", "abort"])
def test_who_waits_is_told_of_a_close(how: str) -> None:
    with pair() as (stream, peer):
        stream.write(bytes(20_000_000))
        tasks = [Task(stream.read, 1), Task(stream.write, b"x")]
        wait_until(lambda: len(stream._feed.changed._waiters) == 2)  # type: ignore[attr-defined]
        closing = Task(getattr(stream, how))
        for task in tasks:
            with pytest.raises(ConnectionClosedError, match="the stream is closed"):
                task.result()
        if how == "close":
            assert len(read_all(peer)) == 20_000_000
            peer.close()
        closing.result()


def test_a_block_that_raises_aborts() -> None:
    def fail() -> None:
        with stream:
            stream.write(bytes(20_000_000))
            raise KeyError("mine")

    with pair() as (stream, _peer):
        with pytest.raises(KeyError):
            fail()
        assert stream.connection.wait_closed(PATIENCE)
        assert stream.connection.close_reason == "aborted"


def test_a_stream_that_nobody_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        streams = [open_stream(listener.getsockname(), PATIENCE)]
        feed = streams[0].connection
        with pytest.warns(ResourceWarning, match="unclosed <Stream <Feed"):
            streams.clear()
        assert feed.wait_closed(PATIENCE)


# -- opening ------------------------------------------------------------------------------------------------


def test_a_file_comes_between_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(3_000_000))
    with pair() as (stream, peer):
        stream.write(b"before ")
        with path.open("rb") as file:
            stream.send_file(file, 10, 2_000_000, header=b"<", trailer=b">")
        after = Task(stream.write, b" after")  # it waits until the file is sent
        expected = b"before <" + path.read_bytes()[10:2_000_010] + b"> after"
        assert hashlib.sha256(read_exactly(peer, len(expected))).digest() == hashlib.sha256(expected).digest()
        after.join(PATIENCE)
        stream.send_file(path)
        closing = Task(stream.close)
        assert len(read_exactly(peer, 3_000_000)) == 3_000_000
        peer.close()
        closing.join(PATIENCE)


def test_a_file_that_waits_too_long_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"file")
    with pair() as (stream, peer):
        stream.write(b"x" * STUCK)
        with pytest.raises(TimeoutError, match=r"send_file\(\): not done within"):
            stream.send_file(path, timeout=SHORT)
        path.rename(tmp_path / "nobody has it open")
        with pytest.raises(FileNotFoundError):
            stream.send_file(path)
        assert len(read_exactly(peer, STUCK)) == STUCK
        stream.write(b"next")
        assert read_exactly(peer, 4) == b"next"


def test_no_file_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"file")
    with pair() as (stream, _peer):
        stream.write_eof()
        with pytest.raises(ConnectionClosedError, match="after write_eof"):
            stream.send_file(path)
        stream.abort()
        with pytest.raises(ConnectionClosedError, match=r"send_file\(\): the stream is closed"):
            stream.send_file(path)


def test_a_file_that_shrinks_is_told_by_close(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(30_000_000))
    with pair() as (stream, peer):
        stream.send_file(path)
        with path.open("r+b") as file:
            file.truncate(1000)
        reader = Task(read_or_reset, peer)
        with pytest.raises(OSError, match="a file ended"):
            stream.close()
        reader.join(PATIENCE)


def read_or_reset(sock: socket.socket) -> None:
    """Read up to the end, whichever it is."""
    with contextlib.suppress(OSError):
        read_all(sock)


def test_refused() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # kept bound, and not listening
        with pytest.raises(ConnectionRefusedError) as caught:
            open_stream(sock.getsockname(), 10)
    assert caught.value.winerror == 10061  # type: ignore[attr-defined]


def test_not_answered() -> None:
    """On Windows a full queue refuses."""
    with full_queue() as address, pytest.raises((TimeoutError, ConnectionRefusedError)):
        open_stream(address, 0.2)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="timeout=0"):
        open_stream(("127.0.0.1", 1), 0)
    with pytest.raises(TypeError, match="unknown option colour"):
        open_stream(("127.0.0.1", 1), colour=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="write_buffer_max"):
        open_stream(("127.0.0.1", 1), write_buffer_max=1)
    with pytest.raises(TypeError, match="streams are made by open_stream"):
        Stream(Connection())
    with pair() as (stream, _peer):
        for bad in (
            lambda: stream.read(-2),
            lambda: stream.readexactly(-1),
            lambda: stream.read(1, timeout=-1),
        ):
            with pytest.raises(ValueError, match="must be"):
                bad()


def test_from_a_callback() -> None:
    problems: list[str] = []

    class Caller(Recorder):
        def got(self, data: bytes) -> None:
            for call in (
                lambda: open_stream(self.server.address, 5),
                lambda: stream.read(1),
                lambda: stream.write(b"x"),
                stream.close,
            ):
                try:
                    call()
                except RuntimeError as exc:
                    problems.append(str(exc))
            stream.abort()

    with serving(Caller, io_threads=0) as server:
        stream = open_stream(server.address, PATIENCE)
        stream.write(b"go")
        made(Caller)[0].until("data")
        assert stream.connection.wait_closed(PATIENCE)
        wait_until(lambda: len(problems) == 4)
    assert all("called from a callback" in problem for problem in problems), problems


def test_ctrl_c_ends_a_read() -> None:
    script = (
        "import iocp_ctypes, signal, sys, threading, time\n"
        "with iocp_ctypes.open_stream((sys.argv[1], int(sys.argv[2]))) as stream:\n"
        "    print('reading', flush=True)\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    begin = time.monotonic()\n"
        "    try:\n"
        "        threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()\n"
        "        stream.read()\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', time.monotonic() - begin < 20, flush=True)\n"
        "        raise SystemExit(0) from None\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        program = Program("-c", script, host, str(port))
        try:
            program.line("reading")
            program.line("interrupted True")
            assert program.ended() == (0, [])
        finally:
            program.kill()


def test_a_script_that_forgets_to_close() -> None:
    script = (
        "import iocp_ctypes, sys\n"
        "stream = iocp_ctypes.open_stream((sys.argv[1], int(sys.argv[2])))\n"
        "stream.write(b'hello')\n"
        "print(stream.read(5), flush=True)\n"
    )
    with serving(Echo) as server:
        host, port = server.address
        program = Program("-c", script, host, str(port))
        try:
            program.line("b'hello'")
            assert program.ended() == (0, [])
        finally:
            program.kill()
