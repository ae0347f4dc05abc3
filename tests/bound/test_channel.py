"""_channel.py: bytes in and bytes out, in every receive mode, with one I/O thread and with four."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import (
    PATIENCE,
    Echo,
    Recorder,
    echoes,
    ended,
    made,
    raw,
    read_all,
    read_exactly,
    rst,
    serving,
    wait_until,
)
from traffic import LONG, Counted, beside, chance, cut

from iocp_ctypes import Usage, _channel, _dispatcher, _lifetime, _win32

MODES = ("flow", "zero-byte", "auto", "burst")
SOON = 0.05  # seconds in which nothing may happen; too short a time can only hide a defect, never show one
MIB = 1 << 20
#: More than the kernel takes for a peer that does not read, and less than write_buffer_max.
STUCK = random.Random(1).randbytes(8 * MIB)
WSAENOBUFS = 10055
WSAEWOULDBLOCK = 10035


@pytest.fixture(params=MODES)
def recv_mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def options(recv_mode: str, io_threads: int) -> dict[str, Any]:
    """Options of a server: each receive mode, with one I/O thread and with four."""
    return {"recv_mode": recv_mode, "io_threads": io_threads, "recvburst": 8 if recv_mode == "burst" else 1}


@pytest.fixture
def pair() -> Iterator[tuple[Any, socket.socket]]:
    """A recorded connection and its client."""
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        yield connection, client


class Digest(Recorder):
    """Keeps every chunk, and looks at them only at the end: a buffer used again would show."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chunks: list[bytes] = []
        self.size = 0

    def on_data(self, data: bytes) -> None:
        self.chunks.append(data)
        self.size += len(data)

    @property
    def sha(self) -> str:
        return hashlib.sha256(b"".join(self.chunks)).hexdigest()


def receives_posted(server: Any) -> int:
    """How many operations the kernel has besides the AcceptEx."""
    return int(server.engine.ops_pending - server.backlog.in_use)


# -- receiving ----------------------------------------------------------------------------------------------


def test_idle_is_quiet_a_byte_is_data_and_fin_is_eof(options: dict[str, Any]) -> None:
    with serving(Recorder, **options) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        wait_until(lambda: receives_posted(server) == 1)
        time.sleep(SOON)
        assert connection.names == ["connect"]
        client.sendall(b"a")
        connection.until("data")
        wait_until(lambda: receives_posted(server) == 1)
        time.sleep(SOON)
        assert connection.names == ["connect", "data"]
        assert connection.received == b"a"
        client.close()
        connection.until("close")
        assert connection.names == ["connect", "data", "eof", "close"]


def test_what_an_idle_connection_keeps_posted(recv_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_channel, "BUSY_GAP", 3600.0)
    with serving(Echo, recv_mode=recv_mode, recv_size=32 * 1024) as server, raw(server.address) as client:
        for _ in range(3):
            echoes(client, b"x" * 100)
        (connection,) = made(Echo)
        wait_until(lambda: connection._reading == _lifetime.POSTED and receives_posted(server) == 1)
        (operation,) = [
            one
            for one in server.engine.proactor.pending.values()
            if getattr(getattr(one.handler, "func", one.handler), "__self__", None) is connection
        ]
        sizes = {"flow": 32 * 1024, "zero-byte": 0, "auto": 1024, "burst": 32 * 1024}
        assert operation.size == sizes[recv_mode]
        assert connection.recvburst == Usage(1, 1)


@pytest.mark.parametrize("size", [1, 65537])
def test_the_size_of_writes_does_not_matter(options: dict[str, Any], size: int) -> None:
    count = 500 if size == 1 else 40
    sent = random.Random(size).randbytes(size * count)
    with serving(Digest, **options) as server, raw(server.address) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(sent), size):
            client.sendall(sent[start : start + size])
        client.close()
        (connection,) = made(Digest)
        connection.until("close")
        assert connection.size == len(sent)
        assert connection.sha == hashlib.sha256(sent).hexdigest()
        assert connection.bytes_received == len(sent)
        connection.check()


def test_data_waits_for_on_connect_to_return(options: dict[str, Any]) -> None:
    let_go = threading.Event()

    class Slow(Recorder):
        def connected(self) -> None:
            assert let_go.wait(PATIENCE)
            self.data = "ready"

        def got(self, data: bytes) -> None:
            assert self.data == "ready"

    with serving(Slow, **options) as server, raw(server.address) as client:
        client.sendall(b"eager")
        client.shutdown(socket.SHUT_WR)
        (connection,) = made(Slow)
        connection.until("connect")
        time.sleep(SOON)
        assert connection.names == ["connect"]
        let_go.set()
        connection.until("data")
        client.close()
        connection.until("close")
        assert connection.received == b"eager"
        connection.check()


def test_a_paused_connection_gets_nothing_and_then_all_in_order(options: dict[str, Any]) -> None:
    class Pausing(Recorder):
        pauses = 0

        def got(self, data: bytes) -> None:
            self.pause_reading()
            self.pauses += 1

    sent = random.Random(2).randbytes(300_000)
    with serving(Pausing, **options) as server, raw(server.address) as client:
        with beside(lambda: client.sendall(sent)):
            (connection,) = made(Pausing)
            count = 0
            while len(connection.received) < len(sent):
                count += 1
                wait_until(lambda wanted=count: connection.pauses == wanted)
                if options["recv_mode"] != "burst":  # which reads ahead
                    wait_until(lambda: receives_posted(server) == 0)
                assert connection.names.count("data") == count
                connection.resume_reading()
        assert connection.received == sent
        wait_until(lambda: connection.pauses == connection.names.count("data"))
        connection.resume_reading()
        client.close()
        connection.until("close")
        connection.check()


def test_what_arrives_after_pausing_from_another_thread_is_kept(options: dict[str, Any]) -> None:
    with serving(Recorder, **options) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        wait_until(lambda: receives_posted(server) == 1)
        connection.pause_reading()  # one receive is posted already, and brings this
        client.sendall(b"one ")
        wait_until(lambda: receives_posted(server) == 0)
        wait_until(lambda: connection.recvburst.in_use == 0)
        client.sendall(b"two ")
        time.sleep(SOON)
        assert connection.names == ["connect"]
        client.sendall(b"three")
        client.shutdown(socket.SHUT_WR)
        connection.resume_reading()
        connection.until("close")
        assert connection.received == b"one two three"
        assert connection.names[-2:] == ["eof", "close"]
        connection.check()


def test_resuming_in_a_callback_posts_one_receive(options: dict[str, Any]) -> None:
    class Fidgety(Recorder):
        def got(self, data: bytes) -> None:
            for _ in range(10):
                self.pause_reading()
                self.resume_reading()
            self.data = max(self.data or 0, receives_posted(self.server))

    with serving(Fidgety, **options) as server, raw(server.address) as client:
        for number in range(20):
            client.sendall(b"%02d" % number)
            (connection,) = made(Fidgety)
            wait_until(lambda size=2 * number + 2, seen=connection: len(seen.received) == size)
            wait_until(
                lambda seen=connection: (
                    receives_posted(server) == 1 and not (seen._burst and seen._burst.delivering)
                )
            )
        ahead = options["recv_mode"] == "burst"
        assert connection.data == ahead, "no receive is posted while one is delivered, or one ahead"
        assert connection.received == b"".join(b"%02d" % number for number in range(20))


class Crowded(Recorder):
    """After its first bytes something happens before the next receive is posted."""

    happens: Callable[[Any], None]

    def got(self, data: bytes) -> None:
        if data == b"first":
            assert self._home.engine.dispatcher.defer(self.happened)

    def happened(self) -> None:
        Crowded.happens(self)
        self.data = "happened"


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A connection to which this happened before its next receive was posted, and its client."""
    monkeypatch.setattr(_dispatcher, "CROWD", 0)
    monkeypatch.setattr(_dispatcher, "STALL_CHECK", LONG)  # nobody takes over from a thread that has to wait

    @contextlib.contextmanager
    def connected(happens: Callable[[Any], None]) -> Iterator[tuple[Any, socket.socket]]:
        Crowded.happens = staticmethod(happens)
        with serving(Crowded, io_threads=1) as server, raw(server.address) as client:
            client.sendall(b"first")
            (connection,) = made(Crowded)
            wait_until(lambda: connection.data == "happened")
            yield connection, client
            client.close()
            connection.until("close")
            connection.check()

    return connected


def test_in_a_crowd_the_next_receive_is_posted_at_the_end_of_the_round(crowded: Any) -> None:
    seen: list[int] = []
    with crowded(lambda made: seen.append(receives_posted(made.server))) as (connection, client):
        assert seen == [0]
        wait_until(lambda: receives_posted(connection.server) == 1)
        client.sendall(b"second")
        wait_until(lambda: connection.received == b"firstsecond")


def test_pausing_before_the_next_receive_is_posted(crowded: Any) -> None:
    with crowded(lambda connection: connection.pause_reading()) as (connection, client):
        client.sendall(b"second")
        time.sleep(SOON)
        assert connection.received == b"first"
        connection.resume_reading()
        wait_until(lambda: connection.received == b"firstsecond")


def test_pausing_and_resuming_before_the_next_receive_is_posted(crowded: Any) -> None:
    def fidget(connection: Any) -> None:
        connection.pause_reading()
        connection.resume_reading()

    with crowded(fidget) as (connection, client):
        client.sendall(b"second")
        wait_until(lambda: connection.received == b"firstsecond")
        client.sendall(b"third")
        wait_until(lambda: connection.received == b"firstsecondthird")


@pytest.mark.parametrize("end", ["close", "abort"])
def test_ending_before_the_next_receive_is_posted(end: str, crowded: Any) -> None:
    with (
        crowded(lambda connection: getattr(connection, end)()) as (connection, client),
        contextlib.suppress(ConnectionResetError),
    ):
        assert read_all(client) == b""
    assert connection.received == b"first"


def test_detaching_before_the_next_receive_is_posted(crowded: Any) -> None:
    taken: list[socket.socket] = []

    def let_go(connection: Any) -> None:
        threads.append(threading.Thread(target=lambda: taken.append(connection.detach())))
        threads[0].start()

    threads: list[threading.Thread] = []
    with crowded(let_go) as (connection, client):
        threads[0].join(LONG)
        (mine,) = taken
        with mine:
            mine.settimeout(PATIENCE)
            client.sendall(b"second")
            assert read_exactly(mine, 6) == b"second"
    assert connection.received == b"first"


def test_a_stream_survives_pauses_at_random(options: dict[str, Any]) -> None:
    dice = chance()
    sent = dice.randbytes(20 * MIB)
    inner = random.Random(dice.random())

    class Fickle(Digest):
        def on_data(self, data: bytes) -> None:
            super().on_data(data)
            if inner.random() < 0.1:
                self.pause_reading()
                if inner.random() < 0.5:
                    self.call_soon(self.resume_reading)
                else:
                    self.resume_reading()

    with serving(Fickle, **options) as server, raw(server.address, timeout=LONG) as client:
        (connection,) = made(Fickle)

        def feed() -> None:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        def fidget() -> None:
            while not connection.closed:
                connection.pause_reading()
                if dice.random() < 0.5:
                    time.sleep(dice.random() * 0.002)
                connection.resume_reading()
                if dice.random() < 0.5:
                    time.sleep(dice.random() * 0.002)

        with beside(feed, fidget):
            assert connection.wait_closed(LONG)
        assert connection.size == len(sent)
        assert connection.sha == hashlib.sha256(sent).hexdigest()
        connection.check()


def test_a_paused_connection_that_closes_sees_the_peers_end(options: dict[str, Any]) -> None:
    with serving(Recorder, linger_timeout=LONG, **options) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        wait_until(lambda: receives_posted(server) == 1)
        connection.pause_reading()
        client.sendall(b"dropped")
        wait_until(lambda: receives_posted(server) == 0 or options["recv_mode"] == "zero-byte")
        connection.close()
        assert ended(client) == "eof"
        client.close()
        connection.until("close")
        assert connection.names == ["connect", "close"]


def test_a_paused_connection_that_sends_notices_a_reset(options: dict[str, Any]) -> None:
    with serving(Recorder, **options) as server:
        client = raw(server.address)
        (connection,) = made(Recorder)
        connection.until("connect")
        wait_until(lambda: receives_posted(server) == 1)
        connection.pause_reading()
        client.sendall(b"takes the receive that is posted")
        wait_until(lambda: receives_posted(server) == 0)
        rst(client)
        limit = time.monotonic() + PATIENCE
        while not connection.closing and not connection.closed and time.monotonic() < limit:
            with contextlib.suppress(ConnectionError):  # it may end between the look and this
                connection.send(b"anybody there?")
            time.sleep(0.005)
        connection.until("close")
        assert connection.close_reason in ("reset", "aborted")
        assert isinstance(connection.calls[-1].value, ConnectionError)
        assert connection.names == ["connect", "close"]


def receiving(connection: Any) -> None:
    """Wait until a receive is with the kernel."""
    wait_until(lambda: connection._reading == _lifetime.POSTED)
    with connection._lock:  # held from the note to the return of the call
        pass


def test_a_reset_is_told_once_and_as_such(options: dict[str, Any]) -> None:
    with serving(Recorder, **options) as server:
        for size in (0, 1, 100_000):
            client = raw(server.address)
            client.sendall(bytes(size))
            connection = made(Recorder)[-1]
            wait_until(lambda seen=connection, wanted=size: len(seen.received) == wanted)
            connection.until("connect")  # it is listed before it has its socket
            receiving(connection)  # posted later it may see EOF
            rst(client)
            assert isinstance(connection.until("close").value, ConnectionResetError)
            assert connection.close_reason == "reset"
            assert "eof" not in connection.names
            connection.check()
            Recorder.made.clear()


@pytest.mark.parametrize("accept_data", [1, 100, 4096])
def test_first_bytes_that_come_with_the_accept(options: dict[str, Any], accept_data: int) -> None:
    with serving(Echo, accept_data=accept_data, **options) as server:
        for size in (1, 99, 100, 101, 5000):
            sent = random.Random(size).randbytes(size)
            with raw(server.address) as client:
                assert len(Echo.made) == 0, "nobody is accepted before a byte came"
                echoes(client, sent)
                (connection,) = made(Echo)
                assert connection.received == sent
                assert connection.bytes_received == size
                echoes(client, b"and on")
            connection.until("close")
            connection.check()
            Echo.made.clear()
        with raw(server.address) as client:
            client.sendall(b"hello and ")
            client.sendall(b"good-bye")
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"hello and good-bye"


def test_first_bytes_of_a_connection_that_pauses_in_on_connect(recv_mode: str) -> None:
    class Pausing(Recorder):
        def connected(self) -> None:
            self.pause_reading()

    with serving(Pausing, accept_data=100, recv_mode=recv_mode) as server, raw(server.address) as client:
        client.sendall(b"first")
        (connection,) = made(Pausing)
        connection.until("connect")
        wait_until(lambda: connection._paused)
        time.sleep(SOON)
        assert connection.names == ["connect"]
        connection.resume_reading()
        connection.until("data")
        client.sendall(b" second")
        client.shutdown(socket.SHUT_WR)
        connection.until("close")
        assert connection.received == b"first second"


@pytest.mark.parametrize("code", [WSAENOBUFS, WSAEWOULDBLOCK])
def test_a_receive_that_the_system_has_no_resources_for_is_tried_again(
    recv_mode: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = Failures(monkeypatch, "hot_receive", code)
    with serving(Echo, recv_mode=recv_mode) as server, raw(server.address) as client:
        echoes(client)
        for _ in range(3):
            failures.coming = 2
            echoes(client)
            client.sendall(b"x")
            assert read_exactly(client, 1) == b"x"
            wait_until(lambda: failures.coming == 0)
        assert server.stats().engine.resource_retries == 6
        assert failures.made == 6


class Failures:
    """Lets the next calls of a native function fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
        self.coming = self.made = 0
        self._real: Callable[..., int] = getattr(_win32, name)
        self._code = code
        monkeypatch.setattr(_win32, name, self)

    def __call__(self, *args: Any) -> int:
        if not self.coming:
            return self._real(*args)
        self.coming -= 1
        self.made += 1
        ctypes.set_last_error(self._code)
        return -1


# -- sending ------------------------------------------------------------------------------------------------


def test_an_echo_of_16_mib_comes_back_whole_after_the_half_close(options: dict[str, Any]) -> None:
    sent = random.Random(3).randbytes(16 * MIB)
    with serving(Echo, **options) as server, raw(server.address, timeout=LONG) as client:

        def feed() -> None:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        with beside(feed):
            came = read_all(client)
        assert len(came) == len(sent)
        assert came == sent
        (connection,) = made(Echo)
        connection.until("close")
        assert connection.bytes_received == connection.bytes_sent == len(sent)
        assert connection.close_reason == "eof"
        connection.check()


def test_what_was_sent_before_close_arrives_whole_at_a_slow_reader(options: dict[str, Any]) -> None:
    class Farewell(Recorder):
        def connected(self) -> None:
            self.send(STUCK)
            self.close()

    with serving(Farewell, **options) as server, raw(server.address) as client:
        (connection,) = made(Farewell)
        wait_until(lambda: connection.closing)
        assert 0 < connection.write_buffer_size < len(STUCK), "progress is visible within one buffer"
        wait_until(lambda: connection.bytes_sent + connection.write_buffer_size == len(STUCK))
        time.sleep(SOON)
        came = []
        while part := client.recv(7001):
            came.append(part)
        assert b"".join(came) == STUCK
        client.close()
        assert connection.until("close").value is None
        assert connection.close_reason == "local"
        assert connection.bytes_sent == len(STUCK)


def test_a_reader_that_never_reads_ends_with_overflow_and_bounded_memory(io_threads: int) -> None:
    most, size = 2 * MIB, 64 * 1024
    with serving(Recorder, write_buffer_max=most, io_threads=io_threads) as server:
        with raw(server.address) as client:
            (connection,) = made(Recorder)
            connection.until("connect")
            kept = sent = 0
            while connection.send(Counted(bytes(size))) or not connection.closing | connection.closed:
                sent += size
                kept = max(kept, Counted.alive * size)
                assert connection.write_buffer_size <= most
                assert sent < 1000 * MIB, "it never overflowed"
            exc = connection.until("close").value
            assert isinstance(exc, OSError)
            assert "write_buffer_max" in str(exc)
            assert connection.close_reason == "overflow"
            assert sent > most
            print(f"{sent} bytes were sent, at most {kept} were kept for write_buffer_max={most}")
            # What the last sends pointed at may wait for use again.
            assert kept <= most + 64 * size
            assert len(cut(client)) < sent
        wait_until(lambda: Counted.alive * size <= 64 * size)
        assert connection.write_buffer_size == 0


def test_one_buffer_above_the_limit_is_overflow_and_one_at_the_limit_is_not() -> None:
    with serving(Recorder, write_buffer_max=MIB) as server:
        for size, reason in ((MIB, "local"), (MIB + 1, "overflow")):
            with raw(server.address) as client:
                connection = made(Recorder)[-1]
                connection.until("connect")
                assert connection.send(bytes(size)) is False or reason == "local"
                connection.close()
                assert (len(cut(client)) == size) == (reason == "local")
            connection.until("close")
            assert connection.close_reason == reason
            Recorder.made.clear()


def test_four_threads_send_framed_messages_intact_and_in_order(io_threads: int) -> None:
    dice = chance()
    threads, count = 4, 1000
    bodies = [dice.randbytes(dice.choice((0, 1, 50, 3000))) for _ in range(97)]
    with serving(Recorder, io_threads=io_threads, sendcap=2) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")

        def talk(thread: int) -> Callable[[], None]:
            def run() -> None:
                for number in range(count):
                    body = bodies[(thread + number) % len(bodies)]
                    head = struct.pack("<BII", thread, number, len(body))
                    if number % 3:
                        connection.send(head + body)
                    else:
                        connection.send_many([head, bytearray(body)])

            return run

        with beside(*(talk(thread) for thread in range(threads))):
            expected = [0] * threads
            stream = client.makefile("rb")
            for _ in range(threads * count):
                thread, number, length = struct.unpack("<BII", stream.read(9))
                assert number == expected[thread]
                expected[thread] += 1
                assert stream.read(length) == bodies[(thread + number) % len(bodies)]
            stream.close()
        assert expected == [count] * threads


def test_on_drain_comes_once_for_each_crossing(io_threads: int) -> None:
    marks = {"high_mark": MIB, "low_mark": MIB // 4}
    with serving(Recorder, io_threads=io_threads, **marks) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        for crossing in range(1, 6):
            size = 0
            while connection.send(bytes(MIB // 4)):
                size += MIB // 4
            size += MIB // 4
            for _ in range(5):
                assert connection.send(b"still above") is False
            assert connection.names.count("drain") == crossing - 1
            read_exactly(client, size + 5 * 11)
            connection.until("drain", crossing)
            wait_until(lambda: connection.write_buffer_size == 0)
            assert connection.send(b"x") is True
            read_exactly(client, 1)
        assert connection.names == ["connect", *["drain"] * 5]


@pytest.mark.parametrize("paused", [False, True])
def test_a_writer_that_waits_for_on_drain_hears_of_a_reset(options: dict[str, Any], paused: bool) -> None:
    with serving(Recorder, **options) as server:
        client = raw(server.address)
        (connection,) = made(Recorder)
        connection.until("connect")
        if paused:
            connection.pause_reading()
        else:
            receiving(connection)  # posted later it may see EOF
        while connection.send(bytes(MIB)):
            pass
        rst(client)
        assert isinstance(connection.until("close").value, ConnectionError)
        assert connection.close_reason in ("reset", "aborted")
        assert connection.names == ["connect", "close"]
        assert connection.write_buffer_size == 0


@pytest.mark.parametrize("cap", [1, 3])
def test_sendcap_is_never_exceeded(io_threads: int, cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Usage] = []
    real = _win32.hot_send

    def spy(*args: Any) -> Any:
        seen.append(connection.sendcap)  # this send is not counted yet
        return real(*args)

    options = {"io_threads": io_threads, "sendcap": cap, "write_buffer_max": 64 * MIB}
    with serving(Recorder, **options) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        monkeypatch.setattr(_win32, "hot_send", spy)

        def talk() -> None:
            for _ in range(100):  # more than the kernel takes for a peer that does not read
                connection.send(bytes(100_000))

        with beside(talk, talk, talk):
            assert len(read_exactly(client, 30_000_000)) == 30_000_000
        wait_until(lambda: connection.sendcap == Usage(cap, 0))
        monkeypatch.undo()
    assert {usage.cap for usage in seen} == {cap}
    assert max(usage.in_use for usage in seen) == cap - 1


def test_changing_modes_and_caps_while_data_flows_loses_nothing(io_threads: int) -> None:
    dice = chance()
    sent = dice.randbytes(12 * MIB)
    with serving(Echo, io_threads=io_threads) as server, raw(server.address, timeout=LONG) as client:
        (connection,) = made(Echo)
        changes = 0

        def feed() -> None:
            client.sendall(sent[: len(sent) // 2])
            wait_until(lambda: changes > 20, timeout=LONG)
            client.sendall(sent[len(sent) // 2 :])
            client.shutdown(socket.SHUT_WR)

        def change() -> None:
            nonlocal changes
            while not connection.closed:
                connection.recv_mode = dice.choice(MODES)
                connection.recvburst = dice.randint(1, 12)
                connection.sendcap = dice.randint(1, 8)
                connection.low_mark = dice.randrange(0, 32 * 1024)
                connection.high_mark = dice.randrange(32 * 1024, 256 * 1024)
                connection.nodelay = dice.random() < 0.5
                changes += 1
                time.sleep(0.0005)

        with beside(feed, change):
            came = read_all(client)
            client.close()
        assert len(came) == len(sent)
        assert came == sent
        assert changes > 20
        connection.until("close")
        connection.check()


def test_small_sends_do_not_wait_for_acknowledgements() -> None:
    class Twice(Recorder):
        def got(self, data: bytes) -> None:
            self.send(b"head")
            self.send(b"body")

    with serving(Twice) as server, raw(server.address) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(8):  # a busy machine may need more than one
            times = []
            for _ in range(100):
                began = time.monotonic()
                client.sendall(b"ping")
                assert read_exactly(client, 8) == b"headbody"
                times.append(time.monotonic() - began)
            if sorted(times)[25] < 0.035:
                break
        else:
            raise AssertionError("they waited 40 ms for a delayed acknowledgement")


@pytest.mark.parametrize("code", [WSAENOBUFS, WSAEWOULDBLOCK])
def test_a_send_that_the_system_has_no_resources_for_is_tried_again_in_order(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = Failures(monkeypatch, "hot_send", code)
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        failures.coming = 3
        with connection._lock:  # nobody tries again before we have looked
            connection.send(b"one ")
            assert connection.write_buffer_size == 4
        connection.send(b"two ")
        connection.send_many([b"thr", b"ee "])
        connection.send(bytes(MIB))
        connection.close()
        assert read_exactly(client, 14) == b"one two three "
        assert len(read_all(client)) == MIB
        assert failures.made == server.stats().engine.resource_retries == 3
        client.close()
        connection.until("close")
        assert connection.close_reason == "local"


def test_the_rest_of_a_send_that_took_a_part_goes_before_what_is_queued(
    pair: tuple[Recorder, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, client = pair
    connection.sendcap = 1
    real = _channel.Channel._sent
    cut_short: list[int] = []

    def half(self: Any, operation: Any, transferred: int, status: int) -> None:
        if not cut_short and not status:
            transferred //= 2
            cut_short.append(transferred)
        real(self, operation, transferred, status)

    monkeypatch.setattr(_channel.Channel, "_sent", half)
    before = 0
    while connection.write_buffer_size == 0:  # until a send stays with the kernel, and will have a packet
        connection.send(STUCK[: 64 * 1024])
        before += 1
    connection.send(b"then the tail")
    # The kernel took the whole send; told of half of it, the other half comes twice.
    whole = STUCK[: 64 * 1024] * before
    came = read_exactly(client, len(whole))
    assert came == whole
    assert read_exactly(client, 32 * 1024 + 13) == STUCK[32 * 1024 : 64 * 1024] + b"then the tail"
    assert cut_short == [32 * 1024]
    wait_until(lambda: connection.write_buffer_size == 0)


def test_a_send_cut_short_with_others_behind_it_ends_the_connection(
    pair: tuple[Recorder, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, client = pair
    real = _channel.Channel._sent

    def half(self: Any, operation: Any, transferred: int, status: int) -> None:
        real(self, operation, transferred // 2, status)

    monkeypatch.setattr(_channel.Channel, "_sent", half)
    monkeypatch.setattr(_channel, "ENDING_THREADS_DROP", False)  # as on Windows; this thread lives on
    connection.send(STUCK)
    assert connection.sendcap.in_use == connection.sendcap.cap
    cut(client)
    assert isinstance(connection.until("close").value, OSError)
    assert connection.close_reason == "aborted"


def test_a_peer_that_talks_but_does_not_read_cannot_hold_a_closing_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_lifetime, "DRAIN_PATIENCE_MIN", 0.5)

    class Closer(Recorder):
        def connected(self) -> None:
            self.send(STUCK)
            self.close()

    with serving(Closer, linger_timeout=0.1) as server, raw(server.address) as client:
        (connection,) = made(Closer)
        deadline = time.monotonic() + PATIENCE
        while not connection.closed and time.monotonic() < deadline:
            time.sleep(0.05)
            with contextlib.suppress(OSError):
                client.sendall(b"still here")
        assert connection.closed
        assert connection.close_reason == "local"
        assert isinstance(connection.until("close").value, TimeoutError)
