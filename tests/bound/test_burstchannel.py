"""_burstchannel.py with real sockets: order, bounds, growth and ends. On fakes: test_burstfaults.py."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from typing import Any

import pytest
from support import PATIENCE, Echo, Recorder, made, raw, read_all, read_exactly, rst, serving, wait_until
from traffic import LONG, beside, chance

from iocp_ctypes import Usage, _burstchannel
from iocp_ctypes._burst import Burst
from iocp_ctypes._sockops import OverlappedSocket

MIB = 1 << 20


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the bytes that each burst held whenever something came: unread, and unread with all buffers."""
    held = [0, 0]
    arrive = Burst.arrive

    def noting(self: Burst, number: int, what: Any) -> None:
        arrive(self, number, what)
        held[0] = max(held[0], self.unread)
        held[1] = max(held[1], self.unread + self.reserved)

    monkeypatch.setattr(Burst, "arrive", noting)
    return held


@pytest.mark.parametrize("work_threads", [0, 2])
def test_a_slow_reader_costs_no_more_than_the_limit_and_loses_nothing(
    io_threads: int, work_threads: int, bounded: list[int]
) -> None:
    limit = 200_000
    sent = random.Random(5).randbytes(8 * MIB)
    stuck, go_on = threading.Event(), threading.Event()

    class Slow(Recorder):
        digest: Any = None
        size = 0

        def on_data(self, data: bytes) -> None:
            if not self.size:
                self.digest = hashlib.sha256()
                stuck.set()
                assert go_on.wait(LONG)
            self.digest.update(data)
            self.size += len(data)

    options = {"recv_mode": "burst", "recvburst": 16, "recv_buffer_max": limit, "recv_size": 20_000}
    with (
        serving(Slow, io_threads=io_threads, work_threads=work_threads, **options) as server,
        raw(server.address, timeout=LONG) as client,
    ):

        def feed() -> None:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        with beside(feed):
            (connection,) = made(Slow)
            assert stuck.wait(LONG)
            # What on_data does not take in fills the limit, and then stays with the peer.
            wait_until(lambda: bounded[0] > limit // 2)
            go_on.set()
            connection.until("close")
        assert connection.size == len(sent)
        assert connection.digest.hexdigest() == hashlib.sha256(sent).hexdigest()
    assert bounded[0] <= bounded[1] <= limit


def test_many_receives_under_load_and_one_after_it(io_threads: int) -> None:
    sent = random.Random(6).randbytes(16 * MIB)
    with (
        serving(Echo, io_threads=io_threads, recv_mode="burst", recvburst=8) as server,
        raw(server.address, timeout=LONG) as client,
    ):
        (connection,) = made(Echo)
        seen: set[int] = set()
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                usage = connection.recvburst
                assert usage.cap == 8
                seen.add(usage.in_use)
                time.sleep(0.001)  # or whoever else needs the GIL waits for it

        with beside(lambda: client.sendall(sent), look):
            came = read_exactly(client, len(sent))
            done.set()
        assert came == sent
        assert max(seen, default=0) <= 8
        wait_until(lambda: connection.recvburst == Usage(8, 1))
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
        wait_until(lambda: server.recvburst == Usage(8, 1))


def test_more_receives_are_posted_where_on_data_is_slower_than_the_flow(io_threads: int) -> None:
    """A client that sends all it has, and an on_data that takes its time: the burst is seen."""
    sent = random.Random(7).randbytes(4 * MIB)

    class Slow(Recorder):
        most = 0

        def on_data(self, data: bytes) -> None:
            self.most = max(self.most, self.recvburst.in_use)
            hashlib.sha256(data * 20).digest()
            self.data = (self.data or 0) + len(data)

    with (
        serving(Slow, io_threads=io_threads, recv_mode="burst", recvburst=6) as server,
        raw(server.address, timeout=LONG) as client,
    ):
        client.sendall(sent)
        (connection,) = made(Slow)
        wait_until(lambda: connection.data == len(sent), timeout=LONG)
        assert 2 <= connection.most <= 6
        wait_until(lambda: connection.recvburst.in_use == 1)


def test_a_stream_of_numbers_stays_in_order_with_sixteen_receives(io_threads: int) -> None:
    count = 2_000_000
    sent = b"".join(number.to_bytes(4, "little") for number in range(count))

    class Checking(Recorder):
        def on_data(self, data: bytes) -> None:
            digest, size = self.data or (hashlib.sha256(), 0)
            digest.update(data)
            self.data = digest, size + len(data)

    with (
        serving(Checking, io_threads=io_threads, recv_mode="burst", recvburst=16) as server,
        raw(server.address, timeout=LONG) as client,
    ):
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        (connection,) = made(Checking)
        connection.until("close")
        digest, size = connection.data
        assert size == len(sent)
        assert digest.hexdigest() == hashlib.sha256(sent).hexdigest()


def test_the_cap_is_changed_while_data_flows(io_threads: int) -> None:
    dice = chance()
    sent = dice.randbytes(12 * MIB)
    with (
        serving(Echo, io_threads=io_threads, recv_mode="burst", recvburst=2) as server,
        raw(server.address, timeout=LONG) as client,
    ):
        (connection,) = made(Echo)

        def change() -> None:
            while not connection.closed:
                connection.recvburst = dice.randint(1, 30)
                threading.Event().wait(0.001)

        def feed() -> None:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        with beside(feed, change):
            assert read_all(client) == sent  # to the end, that is after the shutdown
            client.close()
        connection.until("close")
        connection.check()


def test_cancelling_the_surplus_while_data_comes_loses_nothing(
    io_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With almost no patience the surplus is cancelled all the time, in every moment there is."""
    monkeypatch.setattr(_burstchannel, "QUIET", 0.0005)
    dice = chance()
    sent = dice.randbytes(6 * MIB)
    cancelled = [0]
    cancel = OverlappedSocket.cancel_receive

    def counting(self: OverlappedSocket, operation: Any) -> None:
        cancelled[0] += 1
        cancel(self, operation)

    monkeypatch.setattr(OverlappedSocket, "cancel_receive", counting)

    class Widening(Recorder):
        digest: Any = None
        size = 0

        def on_data(self, data: bytes) -> None:
            self.digest = self.digest or hashlib.sha256()
            self.digest.update(data)
            self.size += len(data)
            if self._burst is not None:
                self._burst.wanted = 8  # as if the flow had been ahead

    with (
        serving(Widening, io_threads=io_threads, recv_mode="burst", recvburst=8, recv_size=1000) as server,
        raw(server.address, timeout=LONG) as client,
    ):

        def feed() -> None:
            start = 0
            while start < len(sent):
                size = dice.choice([1, 10, 1000, 30_000])
                client.sendall(sent[start : start + size])
                start += size
                if dice.random() < 0.5:
                    time.sleep(dice.random() * 0.004)
            client.shutdown(socket.SHUT_WR)

        with beside(feed):
            (connection,) = made(Widening)
            assert connection.wait_closed(LONG)
        assert connection.size == len(sent)
        assert connection.digest.hexdigest() == hashlib.sha256(sent).hexdigest()
        connection.check()
    print(f"{cancelled[0]} receives were to be cancelled")
    assert cancelled[0] > 20


@pytest.mark.parametrize("how", ["reset", "abort", "stop"])
def test_ends_in_the_middle_of_a_burst(io_threads: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that end while many receives are outstanding: all come back, on_close comes once."""

    class Taking(Recorder):
        def on_data(self, data: bytes) -> None:
            self.data = (self.data or 0) + len(data)

    with serving(Taking, io_threads=io_threads, recv_mode="burst", recvburst=12) as server:
        clients = [raw(server.address) for _ in range(8)]
        for client in clients:
            client.sendall(bytes(300_000))
        connections = made(Taking, 8)
        wait_until(lambda: all(connection.data for connection in connections))
        for client, connection in zip(clients, connections, strict=True):
            if how == "reset":
                rst(client)
            elif how == "abort":
                connection.abort()
        if how != "stop":
            for connection in connections:
                connection.until("close")
                connection.check()
        else:
            monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", PATIENCE)
            assert server.stop(0.1)
        for client in clients:
            client.close()


def test_ten_thousand_receives_allowed_do_not_recurse(io_threads: int) -> None:
    """A cap far above the recursion limit: what completes at once is served in its turn, in a loop."""
    sent = random.Random(8).randbytes(2 * MIB)
    options = {"recv_mode": "burst", "recvburst": 10_000, "recv_size": 64, "recv_buffer_max": 64 * MIB}
    with (
        serving(Echo, io_threads=io_threads, **options) as server,
        raw(server.address, LONG) as client,
        beside(lambda: client.sendall(sent)),
    ):
        assert read_exactly(client, len(sent)) == sent
