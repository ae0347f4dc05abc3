"""_filechannel.py: files among the bytes of a connection, transmitted and read, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import STATUS_RESET, AtOnce, Fail, FakeEngine, Hold
from support import (
    PATIENCE,
    Recorder,
    ended,
    handle_count,
    made,
    raw,
    read_all,
    read_exactly,
    rst,
    serving,
    wait_until,
)
from test_faults import Rig

from iocp_ctypes import (
    ConnectionClosedError,
    _channel,
    _filechannel,
    _fileops,
    _lifetime,
    _sockops,
    _win32files,
    connect,
)
from iocp_ctypes import connection as connection_module
from iocp_ctypes._filechannel import (
    CANCEL_AGAIN,
    FILE_AHEAD,
    FILES_MAX,
    LOOK_AGAIN,
    TRANSMIT_FIRST,
    TRANSMIT_MAX,
    TRANSMIT_QUICK,
)
from iocp_ctypes._lifetime import RETRY_FIRST

MIB = 1 << 20
WSAENOBUFS, WSAEOPNOTSUPP, WSAECONNRESET = 10055, 10045, 10054
STATUS_END_OF_FILE = 0xC0000011
#: More than the kernel takes for a peer that does not read.
LARGE = 24 * MIB


@pytest.fixture(params=["transmit", "read", "duplicate"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How files are sent: by TransmitFile; read through the port; read from a handle that blocks."""
    way = str(request.param)
    if way != "transmit":
        monkeypatch.setattr(_sockops, "TRANSMITS_FREELY", False)
    if way == "duplicate":
        invalid = (1 << (8 * _fileops.sizeof(_fileops.c_void_p))) - 1
        monkeypatch.setattr(_win32files, "ReOpenFile", lambda *_: invalid)
    return way


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(random.Random(5).randbytes(LARGE))
    return path


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Sender(Recorder):
    """Does something when it is connected."""

    act: Callable[[Any], object] = staticmethod(lambda _connection: None)

    def connected(self) -> None:
        type(self).act(self)


def sending(act: Callable[[Any], object]) -> type[Sender]:
    return type("One", (Sender,), {"act": staticmethod(act)})


# -- what arrives -------------------------------------------------------------------------------------------


def test_a_large_file_arrives_whole(way: str, large: Path, io_threads: int) -> None:
    def act(connection: Any) -> None:
        with large.open("rb") as file:
            assert connection.send_file(file, header=b"<", trailer=b">") is False
        connection.close()

    handler = sending(act)
    with serving(handler, io_threads=io_threads) as server, raw(server.address) as client:
        data = read_all(client)
        assert sha(data) == sha(b"<" + large.read_bytes() + b">")
        client.close()  # else closing lingers
        (connection,) = made(handler)
        connection.until("close")
        assert connection.close_reason == "local"
        assert connection.bytes_sent == LARGE + 2
        connection.check()


def test_bytes_and_files_arrive_in_the_order_of_the_calls(way: str, tmp_path: Path) -> None:
    rng = random.Random(7)
    parts: list[bytes] = []

    def act(connection: Any) -> None:
        for number in range(60):
            size = rng.choice([0, 1, 10, 5000, 300_000])
            data = rng.randbytes(size)
            kind = rng.randrange(4)
            if kind == 0:
                path = tmp_path / str(number)
                path.write_bytes(b"skipped" + data + b"left out")
                head, tail = rng.randbytes(rng.choice([0, 3])), rng.randbytes(rng.choice([0, 3]))
                connection.send_file(path, 7, size, header=head, trailer=tail)
                data = head + data + tail
            elif kind == 1:
                connection.send_file(io.BytesIO(data))
            elif kind == 2:
                connection.send(data)
            else:
                connection.send_many([data[:7], data[7:]])
            parts.append(data)
        connection.send_eof()

    handler = sending(act)
    with serving(handler) as server, raw(server.address) as client:
        assert sha(read_all(client)) == sha(b"".join(parts))
        client.close()
        (connection,) = made(handler)
        connection.until("close")
        connection.check()


def test_many_threads_send_files_and_each_arrives_in_one_piece(way: str, tmp_path: Path) -> None:
    files = []
    for number in range(8):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * 100_000)
        files.append(path)
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        threads = [threading.Thread(target=connection.send_file, args=(path,)) for path in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        data = read_exactly(client, 800_000)
        seen = [data[start] for start in range(0, 800_000, 100_000)]
        assert sorted(seen) == list(range(8))
        assert data == b"".join(bytes([number]) * 100_000 for number in seen)


def test_offset_and_count(way: str, large: Path) -> None:
    content = large.read_bytes()
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        for offset, count in ((0, 10), (LARGE - 10, None), (LARGE // 2 + 1, 700_001), (LARGE, None)):
            connection.send_file(large, offset, count)
            expected = content[offset:] if count is None else content[offset : offset + count]
            assert read_exactly(client, len(expected)) == expected


def test_nothing_to_send_is_a_no_op(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        assert connection.send_file(empty) is True
        assert connection.send_file(io.BytesIO()) is True
        assert connection.send_file(empty, header=b"head", trailer=b"tail") is False
        assert read_exactly(client, 8) == b"headtail"
        connection.until("drain")
        assert connection.send(b"after") is True
        assert read_exactly(client, 5) == b"after"


def test_what_was_handed_over_before_it_is_connected_is_sent_then(way: str, large: Path) -> None:
    with serving(Recorder) as server:
        connection = connect(server.address, Recorder)
        connection.send(b"first ")
        connection.send_file(large)
        connection.send(b" last")
        (server_side,) = [one for one in made(Recorder, 2) if one is not connection]
        wait_until(
            lambda: sum(len(call.value) for call in server_side.calls if call.name == "data") == LARGE + 11,
            timeout=60,
        )
        assert sha(server_side.received) == sha(b"first " + large.read_bytes() + b" last")
        connection.abort()


# -- flow control -------------------------------------------------------------------------------------------


def test_a_file_is_no_bytes_in_memory_and_on_drain_comes_when_it_is_sent(way: str, large: Path) -> None:
    with serving(Recorder, write_buffer_max=4 * MIB) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        assert connection.send_file(large, header=b"12345", trailer=b"678") is False
        assert connection.send(b"x" * 10) is False
        assert connection.write_buffer_size <= 2 * FILE_AHEAD + 18
        assert "drain" not in connection.names
        assert len(read_exactly(client, 5 + LARGE + 3 + 10)) == LARGE + 18
        connection.until("drain")
        wait_until(lambda: connection.write_buffer_size == 0)
        assert connection.send(b"y") is True
        assert connection.names.count("drain") == 1


def test_what_waits_behind_a_file_is_bounded(way: str, large: Path) -> None:
    with serving(Recorder, write_buffer_max=1 * MIB) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(large)
        connection.send(bytes(300_000))
        assert connection.closing is connection.closed is False
        assert connection.send(bytes(800_000)) is False
        connection.until("close")
        assert connection.close_reason == "overflow"
        with pytest.raises(ConnectionClosedError):
            connection.send_file(large)
        client.close()


def test_files_that_wait_are_bounded(tmp_path: Path, large: Path, flat_handles: None) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x")
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(large)
        for _ in range(FILES_MAX - 1):
            connection.send_file(small)
        assert not connection.closing
        connection.send_file(small)
        connection.until("close")
        assert connection.close_reason == "overflow"
        client.close()


def test_header_and_trailer_count(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x")
    with serving(Recorder, write_buffer_max=100_000) as server, raw(server.address):
        (connection,) = made(Recorder)
        connection.until("connect")
        assert connection.send_file(small, header=bytes(60_000), trailer=bytes(60_000)) is False
        connection.until("close")
        assert connection.close_reason == "overflow"


def test_files_in_memory_count_as_bytes_do(large: Path) -> None:
    with serving(Recorder, write_buffer_max=1 * MIB) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(large)
        connection.send_file(io.BytesIO(bytes(600_000)))
        connection.send_file(io.BytesIO(bytes(10 * MIB)), 5 * MIB, 100_000)
        assert not connection.closing
        assert connection.send_file(io.BytesIO(bytes(600_000))) is False
        connection.until("close")
        assert connection.close_reason == "overflow"
        assert connection.write_buffer_size == 0
        client.close()


def test_one_file_in_memory_may_be_larger_than_what_may_wait() -> None:
    content = random.Random(5).randbytes(5 * MIB)
    with serving(Recorder, write_buffer_max=1 * MIB) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        with connection._lock:  # none of it goes out in between
            assert connection.send_file(io.BytesIO(content)) is False
            assert connection.write_buffer_size > 1 * MIB
        assert sha(read_exactly(client, len(content))) == sha(content)
        connection.until("drain")
        wait_until(lambda: connection.write_buffer_size == 0)
        with connection._lock:
            connection.send_file(io.BytesIO(content))
            assert connection.send(b"more") is False
        connection.until("close")
        assert connection.close_reason == "overflow"
        client.close()


def test_what_is_in_memory_is_counted_until_it_is_sent(way: str, large: Path) -> None:
    content = random.Random(4).randbytes(2 * MIB)
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        before = connection.stats()
        connection.send_file(large)
        connection.send_file(io.BytesIO(content), 100, MIB, header=b"12345", trailer=b"678")
        connection.send_file(io.BytesIO(content))
        waiting = MIB + 8 + len(content)
        assert waiting <= connection.write_buffer_size <= waiting + 2 * FILE_AHEAD
        assert connection.stats().bytes_held >= before.bytes_held + waiting
        assert len(read_exactly(client, LARGE)) == LARGE
        expected = b"12345" + content[100 : 100 + MIB] + b"678" + content
        assert sha(read_exactly(client, len(expected))) == sha(expected)
        connection.until("drain")
        wait_until(lambda: connection.write_buffer_size == 0)
        assert connection._flow.held == 0
        assert connection.send(b"x" * 100) is True


def test_a_header_that_is_large_goes_as_bytes_do(way: str, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"file")
    head, tail = random.Random(1).randbytes(2 * MIB), random.Random(2).randbytes(MIB)
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(small, header=head, trailer=bytearray(tail))
        assert sha(read_exactly(client, 3 * MIB + 4)) == sha(head + b"file" + tail)


# -- the ends -----------------------------------------------------------------------------------------------


def test_close_sends_what_is_queued_first(way: str, large: Path) -> None:
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(large)
        connection.send(b"the end")
        connection.close()
        wait_until(lambda: connection.closing)  # where an I/O thread is held up in it, it comes later
        with pytest.raises(ConnectionClosedError):
            connection.send_file(large)
        assert sha(read_all(client)) == sha(large.read_bytes() + b"the end")


@pytest.mark.parametrize("end", ["abort", "reset", "close"])
def test_ending_in_the_middle_lets_the_files_go(
    way: str, large: Path, end: str, flat_handles: None, tmp_path: Path
) -> None:
    with serving(Recorder) as server:
        for _ in range(5):
            Recorder.made.clear()
            client = raw(server.address)
            (connection,) = made(Recorder)
            connection.until("connect")
            for _ in range(3):
                connection.send_file(large)
                connection.send(b"behind")
            read_exactly(client, 500_000)
            if end == "abort":
                connection.abort()
            elif end == "reset":
                rst(client)
            else:
                client.close()
            connection.until("close")
            connection.check()
            wait_until(lambda: server.engine.ops_pending == server.backlog.in_use)
            client.close()
    large.rename(tmp_path / "nobody has it open")


def test_abort_while_the_peer_reads(way: str, large: Path) -> None:
    """The cancel meets a TransmitFile that is in full swing, which Wine may lose it in."""
    with serving(Recorder) as server:
        for _ in range(10):
            Recorder.made.clear()
            client = raw(server.address)
            (connection,) = made(Recorder)
            connection.until("connect")
            connection.send_file(large)
            reader = threading.Thread(target=_read_what_comes, args=(client,))
            reader.start()
            wait_until(lambda connection=connection: connection.bytes_sent > 0 or way == "transmit")
            connection.abort()
            connection.until("close")
            reader.join(PATIENCE)
            assert not reader.is_alive()
            client.close()
            connection.check()


def _read_what_comes(sock: socket.socket) -> None:
    try:
        while sock.recv(1 << 16):
            pass
    except OSError:
        pass


def test_stop_ends_files_too(way: str, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", PATIENCE)
    with serving(Recorder, stop_timeout=0.2) as server:
        client = raw(server.address)  # which outlives the server
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(large)
    client.close()
    assert connection.close_reason == "shutdown"
    connection.check()


def test_a_file_that_becomes_shorter_resets_the_connection(way: str, large: Path) -> None:
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(large, trailer=b"the end")
        with large.open("r+b") as file:
            file.truncate(LARGE // 2)
        reader = threading.Thread(target=_read_what_comes, args=(client,))
        reader.start()
        error = connection.until("close").value
        reader.join(PATIENCE)
        assert connection.close_reason == "error"
        assert isinstance(error, OSError)
        assert error.errno == errno.EIO
        assert "a file ended" in str(error)
        assert "shorter while it was sent" in str(error)
        connection.check()


def test_wrong_arguments_leave_the_connection_as_it_was(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"0123456789")
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        for wrong in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(OSError, match=r"directory|No such file"):
                connection.send_file(wrong)
        for arguments in ((5,), (small, "0"), (small, 0, 1.5), (io.StringIO("x"),)):
            with pytest.raises(TypeError):
                connection.send_file(*arguments)
        for arguments in ((small, 11), (small, 5, 6), (small, -1)):
            with pytest.raises(ValueError, match=r"offset=|count="):
                connection.send_file(*arguments)
        with pytest.raises(TypeError, match="bytes"):
            connection.send_file(small, header="text")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            connection.send_file(small, 0, None, b"header")  # type: ignore[misc]
        assert connection.send(b"well") is True
        assert read_exactly(client, 4) == b"well"


def test_after_send_eof_no_file_is_taken(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x")
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_eof()
        before = handle_count()
        for _ in range(20):
            with pytest.raises(ConnectionClosedError, match="closed for sending"):
                connection.send_file(small)
        assert handle_count() <= before + 5
        assert ended(client) == "eof"


# -- on fakes: what the kernel may do and seldom does -------------------------------------------------------


class FileRig(Rig):
    """A rig with a file of a thousand bytes."""

    small: Path


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """An engine whose clock all look at; whichever thread sends does as on Windows."""
    engine = FakeEngine()
    for module in (_lifetime, _channel, _filechannel, connection_module):
        monkeypatch.setattr(module, "monotonic", engine.clock)
    monkeypatch.setattr(_channel, "ENDING_THREADS_DROP", False)
    return engine


@pytest.fixture
def rig(tmp_path: Path, fakes: FakeEngine) -> Iterator[FileRig]:
    made = FileRig(engine=fakes)
    made.small = tmp_path / "small"
    made.small.write_bytes(bytes(1000))
    yield made
    if not made.sock.closed:
        made.end()


class Sized:
    """A source of any size, of which nothing is read."""

    def __init__(self, left: int, position: int = 0) -> None:
        self.left, self.position = left, position
        self.in_memory = False
        self.closed = 0
        self._handle = 1

    def advance(self, size: int) -> None:
        self.left -= size
        self.position += size

    def close(self) -> None:
        self.closed += 1


def send_sized(
    rig: FileRig, monkeypatch: pytest.MonkeyPatch, size: int, position: int = 0, **more: Any
) -> Sized:
    source = Sized(size, position)
    monkeypatch.setattr("iocp_ctypes._filechannel.open_source", lambda *_: source)
    rig.serve(lambda: rig.connection.send_file("name", **more))
    return source


def test_slices_stay_below_two_gigabytes_and_grow_while_the_peer_is_quick(
    rig: FileRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, start = 20 << 30, (5 << 30) + 3
    source = send_sized(rig, monkeypatch, size, start, header=b"head", trailer=b"tail")
    while rig.sock.sends:
        rig.complete()
    offsets = [offset for offset, _amount in rig.sock.transmitted]
    amounts = [amount for _offset, amount in rig.sock.transmitted]
    assert sum(amounts) == size
    assert offsets == [start + sum(amounts[:number]) for number in range(len(amounts))]
    assert amounts[:4] == [TRANSMIT_FIRST, 4 * TRANSMIT_FIRST, 16 * TRANSMIT_FIRST, 64 * TRANSMIT_FIRST]
    assert max(amounts) == TRANSMIT_MAX - 4  # the trailer is in the same call
    assert all(length <= TRANSMIT_MAX for length in rig.sock.lengths)
    assert rig.sock.sent.startswith(b"headF")
    assert rig.sock.sent.endswith(b"Ftail")
    assert rig.connection.bytes_sent == size + 8
    assert source.closed == 1
    assert rig.connection.names == ["connect", "drain"]


def test_slices_shrink_when_the_peer_is_slow_and_its_progress_counts(
    rig: FileRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_sized(rig, monkeypatch, 1 << 30)
    for seconds in (0.0, 0.0, TRANSMIT_QUICK * 2, TRANSMIT_QUICK * 5, 100.0, 100.0):
        rig.engine.watchdog.clock.now += seconds
        rig.complete()
        assert rig.connection.last_activity == rig.engine.clock()
    amounts = [amount // TRANSMIT_FIRST for _offset, amount in rig.sock.transmitted]
    assert amounts == [1, 4, 16, 16, 4, 1, 1]


def test_header_file_and_trailer_are_one_call(rig: FileRig) -> None:
    rig.serve(lambda: rig.connection.send_file(rig.small, header=b"head", trailer=b"tail"))
    assert rig.sock.transmitted == [(0, 1000)]
    assert rig.sock.lengths == [1008]
    assert rig.connection.sendcap.in_use == 1
    assert rig.connection.write_buffer_size == 8
    rig.complete()
    assert rig.connection.write_buffer_size == 0


def test_a_file_waits_for_all_sends_before_it(rig: FileRig) -> None:
    rig.sock.plan(sends=[Hold(), Hold()])
    rig.serve(lambda: (rig.connection.send(b"one"), rig.connection.send(b"two")))
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.serve(lambda: rig.connection.send(b"three"))
    assert rig.sock.transmitted == []
    rig.complete()
    assert rig.sock.transmitted == []
    rig.complete()
    assert rig.sock.transmitted == [(0, 1000)]
    assert len(rig.sock.sends) == 1, "nothing is sent beside a file"
    rig.complete()
    assert rig.held() == [b"three"]


def test_a_transmit_that_completes_at_once(rig: FileRig) -> None:
    rig.sock.plan(sends=[AtOnce(), AtOnce()])
    rig.serve(lambda: rig.connection.send_file(rig.small, header=b"head"))
    rig.serve(lambda: rig.connection.send(b"behind"))
    assert bytes(rig.sock.sent[:4]) == b"head"
    assert rig.connection.names == ["connect", "drain"]
    assert rig.connection.bytes_sent in (1004, 1010)


def test_short_of_buffers_the_file_goes_on_where_it_was(rig: FileRig) -> None:
    rig.sock.plan(sends=[Fail(WSAENOBUFS)])
    rig.serve(lambda: rig.connection.send_file(rig.small, header=b"head", trailer=b"tail"))
    assert rig.sock.sends == []
    assert rig.engine.retries == 1
    rig.advance(RETRY_FIRST)
    rig.complete(part=10, status=0xC000009A)  # and again, after a part: the header and six bytes
    assert rig.engine.retries == 2
    rig.advance(1)
    assert rig.sock.transmitted == [(0, 1000), (0, 1000), (6, 994)]
    assert rig.sock.lengths[-1] == 998
    rig.complete()
    assert rig.connection.bytes_sent == 1008
    assert bytes(rig.sock.sent) == b"head" + b"F" * 1000 + b"tail"


def test_a_provider_that_does_not_transmit_has_the_file_read(rig: FileRig) -> None:
    rig.sock.plan(sends=[Fail(WSAEOPNOTSUPP)])
    rig.engine.port.associate = lambda _handle: None  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fileops, "_own_handle", _plain_duplicate)
        rig.serve(lambda: rig.connection.send_file(rig.small, header=b"head", trailer=b"tail"))
    while rig.sock.sends:
        rig.complete()
    assert bytes(rig.sock.sent) == b"head" + bytes(1000) + b"tail"
    assert rig.connection.names == ["connect", "drain"]


def _plain_duplicate(handle: int) -> tuple[int, bool]:
    """A handle that reads at once: a fake port brings no packets of files."""
    own = _win32files.HANDLE()
    process = _fileops._win32.GetCurrentProcess()
    assert _win32files.DuplicateHandle(process, handle, process, _fileops.byref(own), 0, False, 2)
    return int(own.value), False


def test_a_transmit_that_brings_too_little_is_a_file_that_shrank(rig: FileRig) -> None:
    rig.serve(lambda: rig.connection.send_file(rig.small, trailer=b"tail"))
    rig.complete(part=600)
    assert rig.connection.close_reason == "error"
    assert "a file ended 400 bytes early" in str(rig.connection.calls[-1].value)
    assert "reset_on_close" in rig.sock.calls


def test_the_systems_own_word_for_it_says_the_same(rig: FileRig) -> None:
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.complete(part=600, status=STATUS_END_OF_FILE)
    assert rig.connection.close_reason == "error"
    assert "400 bytes early" in str(rig.connection.calls[-1].value)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_peer_that_is_gone_is_no_matter_of_the_file(rig: FileRig, at_once: bool) -> None:
    if at_once:
        rig.sock.plan(sends=[Fail(WSAECONNRESET)])
    rig.serve(lambda: rig.connection.send_file(rig.small))
    if not at_once:
        rig.complete(part=0, status=STATUS_RESET)
    assert rig.connection.close_reason == "reset"
    assert isinstance(rig.connection.calls[-1].value, ConnectionResetError)


def test_a_reset_that_the_call_does_not_tell_of(rig: FileRig) -> None:
    """Wine lets a TransmitFile wait for ever where it had seen the reset before the call."""
    rig.sock.reset_unseen = True
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.run()
    assert rig.connection.close_reason == "reset"
    assert isinstance(rig.connection.calls[-1].value, ConnectionResetError)
    rig.ended()


def test_a_reset_that_the_waiting_call_is_never_told_of(
    rig: FileRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wine forgets it where the reset comes while a part of the file is just being sent."""
    monkeypatch.setattr(_filechannel, "RESETS_GET_LOST", True)
    rig.sock.cancels_at_once = False
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.advance(2 * LOOK_AGAIN)
    assert not rig.connection.closing
    rig.sock.reset_unseen = True
    rig.advance(LOOK_AGAIN)
    assert rig.connection.close_reason == "reset"
    cancels = rig.sock.calls.count("cancel")
    rig.advance(CANCEL_AGAIN)
    assert rig.sock.calls.count("cancel") == cancels + 1
    rig.sock.finish_cancel()
    rig.run()
    assert isinstance(rig.connection.calls[-1].value, ConnectionResetError)
    rig.ended()


def test_the_second_file_is_looked_after_as_well(rig: FileRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_filechannel, "RESETS_GET_LOST", True)
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.complete()
    rig.advance(2 * LOOK_AGAIN)
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.sock.reset_unseen = True
    rig.advance(LOOK_AGAIN)
    assert rig.connection.close_reason == "reset"
    rig.ended()


def test_nobody_looks_where_resets_do_not_get_lost(rig: FileRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_filechannel, "RESETS_GET_LOST", False)
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.sock.reset_unseen = True
    rig.advance(10 * LOOK_AGAIN)
    assert not rig.connection.closing
    rig.complete()
    assert rig.connection.names == ["connect", "drain"]


def test_an_operation_that_the_system_dropped_ends_the_connection(rig: FileRig) -> None:
    """Wine does so where the thread ends that issued it; how much was sent nobody knows."""
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.complete(part=0, status=0x103)
    assert rig.connection.close_reason == "aborted"


def test_abort_before_the_call_is_made(rig: FileRig) -> None:
    rig.connection.send_file(rig.small)  # it waits for the I/O thread
    rig.connection.abort()
    rig.run()
    assert rig.sock.transmitted == []
    rig.ended()


def test_a_cancel_that_is_lost_is_repeated(rig: FileRig) -> None:
    rig.sock.cancels_at_once = False
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.connection.abort()
    rig.run()
    for number in range(1, 5):
        assert rig.sock.calls.count("cancel") == number
        assert not rig.connection.closed
        rig.advance(CANCEL_AGAIN)
    rig.sock.finish_cancel()
    rig.run()
    rig.ended()


def test_abort_during_the_call_cancels_it(rig: FileRig, monkeypatch: pytest.MonkeyPatch) -> None:
    issue = rig.sock.transmit

    def transmit(operation: Any, handler: Any) -> int:
        rig.sock.cancels_at_once = False
        rig.connection.abort()  # whose cancel finds nothing to cancel yet
        rig.sock.cancels_at_once = True
        return issue(operation, handler)

    monkeypatch.setattr(rig.sock, "transmit", transmit)
    rig.serve(lambda: rig.connection.send_file(rig.small))
    rig.ended()


def test_a_slow_reader_is_not_read_ahead_for(rig: FileRig) -> None:
    rig.sock.transmits = False
    content = random.Random(3).randbytes(10 * FILE_AHEAD)
    rig.serve(lambda: rig.connection.send_file(io.BytesIO(content)))
    flow, cut = rig.connection._flow, []
    while rig.sock.sends:
        cut.append(flow.size - flow.held)
        assert rig.connection.write_buffer_size == len(content) - rig.connection.bytes_sent
        rig.complete()
    assert max(cut) <= 2 * FILE_AHEAD
    assert flow.size == flow.held == 0
    assert sha(bytes(rig.sock.sent)) == sha(content)
    assert rig.connection.names == ["connect", "drain"]


def test_what_changes_bytes_on_their_way_gets_all_of_them_in_order(fakes: FakeEngine) -> None:
    """As a layer above TCP would: it says that sockets do not transmit, and `_push` sees each byte once."""

    class Upper(Recorder):
        _transmits = property(lambda _self: False)

        def _push(self, data: bytes) -> None:
            super()._push(data.upper())

    rig = Rig(Upper, engine=fakes)

    def act() -> None:
        rig.connection.send_file(io.BytesIO(b"memory "), header=b"head ", trailer=b"tail ")
        rig.connection.send(b"behind ")
        rig.connection.send_file(io.BytesIO(b"again "))

    rig.serve(act)
    while rig.sock.sends:
        rig.complete()
    assert bytes(rig.sock.sent) == b"HEAD MEMORY TAIL BEHIND AGAIN "
    rig.end()
