"""The completion port: its four verbs, on real packets and on posted ones."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import pytest
from support import handle_count, wait_until

from iocp_ctypes import _win32
from iocp_ctypes._port import KEY_IO, KEY_WAKE, Batch, CompletionPort
from iocp_ctypes._proactor import PENDING, Operation, Proactor
from iocp_ctypes._sockops import OverlappedSocket

SECOND_MS = 10_000


@pytest.fixture
def port() -> Iterator[CompletionPort]:
    made = CompletionPort()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def put(port: CompletionPort, address: int, transferred: int) -> None:
    """Queue a packet as the kernel does."""
    assert _win32.PostQueuedCompletionStatus(port._handle, transferred, KEY_IO, address)


def reap(port: CompletionPort, size: int = 64, timeout_ms: int = SECOND_MS) -> list[tuple[Any, int]]:
    """Take packets once."""
    ready: deque[tuple[Any, int]] = deque()
    count = port.reap(Batch(size), timeout_ms, ready)
    assert count == len(ready)
    return list(ready)


# -- associate ----------------------------------------------------------------------------------------------


def test_a_socket_has_one_port_for_life(port: CompletionPort, pair: Any) -> None:
    sock = pair[0]
    port.associate(sock.fileno())
    other = CompletionPort()
    for again in (other, port):
        with pytest.raises(OSError, match="the socket already belongs to another completion port") as caught:
            again.associate(sock.fileno())
        assert caught.value.winerror == 10022
    other.close()


def test_a_duplicate_belongs_to_the_port_of_the_original(port: CompletionPort, pair: Any) -> None:
    port.associate(pair[0].fileno())
    other = CompletionPort()
    with pair[0].dup() as duplicate, pytest.raises(OSError, match="already belongs to another"):
        other.associate(duplicate.fileno())
    other.close()


def test_what_is_no_handle_is_refused(port: CompletionPort, pair: Any) -> None:
    port.associate(pair[0].fileno())
    pair[0].close()
    with pytest.raises(OSError, match="CreateIoCompletionPort"):
        port.associate(_win32.INVALID_SOCKET - 12345)


# -- post and reap ------------------------------------------------------------------------------------------


def test_a_post_wakes_with_a_packet_that_belongs_to_nothing(port: CompletionPort) -> None:
    port.post()
    assert reap(port) == [(0, 0)]
    assert reap(port, timeout_ms=0) == []


@pytest.mark.parametrize("size", [1, 2, 7, 8, 64])
def test_a_batch_takes_no_more_than_its_size_and_in_order(port: CompletionPort, size: int) -> None:
    for number in range(1, 20):
        put(port, number << 4, number)
    taken: list[tuple[Any, int]] = []
    while packets := reap(port, size, 0):
        assert len(packets) <= size
        taken += packets
    assert taken == [(number << 4, number) for number in range(1, 20)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_addresses_and_counts_come_whole(port: CompletionPort, count: int) -> None:
    # The widest of both: an address is pointer-sized, a count is an unsigned DWORD.
    address = (1 << (8 * _win32.ctypes.sizeof(_win32.ULONG_PTR))) - 16
    for _ in range(count):
        put(port, address, 0xFFFFFFFF)
    assert reap(port) == [(address, 0xFFFFFFFF)] * count


def test_a_batch_forgets_what_it_took_before(port: CompletionPort) -> None:
    batch, ready = Batch(4), deque[tuple[Any, int]]()
    for number in (1, 2, 3):
        put(port, number << 4, number)
    assert port.reap(batch, SECOND_MS, ready) == 3
    put(port, 4 << 4, 4)
    assert port.reap(batch, SECOND_MS, ready) == 1
    assert ready == deque((number << 4, number) for number in (1, 2, 3, 4))


@pytest.mark.parametrize("timeout_ms", [0, 1, 20])
def test_a_time_out_takes_nothing(port: CompletionPort, timeout_ms: int) -> None:
    ready: deque[tuple[Any, int]] = deque([("before", 0)])
    assert port.reap(Batch(8), timeout_ms, ready) == 0
    assert list(ready) == [("before", 0)]


def test_a_waiting_thread_is_woken_by_a_post(port: CompletionPort) -> None:
    woken: list[Any] = []
    thread = threading.Thread(target=lambda: woken.extend(reap(port, timeout_ms=_win32.INFINITE)))
    thread.start()
    port.post()
    thread.join(10)
    assert not thread.is_alive()
    assert woken == [(0, 0)]


def test_our_own_packets_have_their_own_kind() -> None:
    assert KEY_IO != KEY_WAKE
    assert 0 not in (KEY_IO, KEY_WAKE)


def test_threads_with_batches_of_their_own_lose_nothing_and_take_nothing_twice(port: CompletionPort) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    addresses = [number << 4 for number in range(1, 3001)]
    taken: list[list[Any]] = [[] for _ in range(4)]

    def take(mine: list[Any], size: int) -> None:
        batch, ready = Batch(size), deque[tuple[Any, int]]()
        while True:
            port.reap(batch, _win32.INFINITE, ready)
            while ready:
                packet = ready.popleft()
                if packet[0] == 0:
                    mine.extend(ready)
                    port.post()  # the packets after it have been counted; the next thread ends too
                    return
                mine.append(packet)

    threads = [threading.Thread(target=take, args=(mine, chosen.choice([1, 3, 8, 64]))) for mine in taken]
    for thread in threads:
        thread.start()
    chosen.shuffle(addresses)
    for address in addresses:
        put(port, address, address & 0xFFF)
    port.post()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    everything = Counter(packet for mine in taken for packet in mine if packet[0])
    assert everything == Counter((address, address & 0xFFF) for address in addresses)


# -- packets of the kernel ----------------------------------------------------------------------------------


def test_a_receive_comes_back_with_its_address_and_its_bytes(port: CompletionPort, pair: Any) -> None:
    proactor = Proactor()
    sock = OverlappedSocket(pair[0].fileno(), pair[0].family, proactor)
    port.associate(pair[0].fileno())
    operation = Operation(100)
    assert sock.receive(operation) == PENDING
    pair[1].sendall(b"hello")
    assert reap(port) == [(operation.address, 5)]
    assert operation.Internal == 0
    assert operation.buffer[:5] == b"hello"
    assert proactor.pending.pop(operation.address) is operation


def test_a_packet_says_nothing_about_success(port: CompletionPort, pair: Any) -> None:
    # The call that took it succeeded; the operation did not, and only the operation says so.
    proactor = Proactor()
    sock = OverlappedSocket(pair[0].fileno(), pair[0].family, proactor)
    port.associate(pair[0].fileno())
    operation = Operation(100)
    assert sock.receive(operation) == PENDING
    sock.cancel()
    assert reap(port) == [(operation.address, 0)]
    assert operation.Internal == 0xC0000120
    assert proactor.pending.pop(operation.address) is operation


def test_good_and_failed_packets_come_in_one_batch(port: CompletionPort) -> None:
    proactor = Proactor()
    pairs = [socket.socketpair() for _ in range(6)]
    operations: dict[int, tuple[Operation, bool]] = {}
    for number, (left, right) in enumerate(pairs):
        sock = OverlappedSocket(left.fileno(), left.family, proactor)
        port.associate(left.fileno())
        operation = Operation(10)
        assert sock.receive(operation) == PENDING
        good = number % 2 == 0
        operations[operation.address] = operation, good
        if good:
            right.sendall(b"x")
        else:
            sock.cancel()
    taken: list[Any] = []

    def all_came() -> bool:
        taken.extend(reap(port, 8, 10))
        return len(taken) == len(pairs)

    wait_until(all_came)
    for address, transferred in taken:
        operation, good = operations.pop(address)
        assert (transferred, operation.Internal) == ((1, 0) if good else (0, 0xC0000120))
    assert not operations
    for left, right in pairs:
        left.close()
        right.close()


# -- close --------------------------------------------------------------------------------------------------


def test_a_closed_port_refuses_everything(pair: Any) -> None:
    port = CompletionPort()
    port.post()
    port.close()
    port.close()
    with pytest.raises(OSError, match="PostQueuedCompletionStatus") as caught:
        port.post()
    assert caught.value.winerror == 10038
    with pytest.raises(OSError, match="GetQueuedCompletionStatusEx"):
        reap(port, timeout_ms=0)
    with pytest.raises(OSError, match="the completion port is closed"):
        port.associate(pair[0].fileno())
    other = CompletionPort()
    other.associate(pair[0].fileno())  # the refusal has left the socket as it was
    other.close()


def test_a_closed_port_does_not_touch_what_got_its_number() -> None:
    # The system gives the number of a closed handle to the next one that is made.
    ports = [CompletionPort() for _ in range(20)]
    numbers = {port._handle for port in ports}
    for port in ports:
        port.close()
    others = [CompletionPort() for _ in range(20)]
    assert numbers & {other._handle for other in others}, "no number came again: this shows nothing"
    for other in others:
        other.post()
    for port in ports:
        with pytest.raises(OSError, match="GetQueuedCompletionStatusEx"):
            reap(port, timeout_ms=0)
    for other in others:
        assert reap(other) == [(0, 0)]
        other.close()


def test_ports_leave_no_handles() -> None:
    CompletionPort().close()
    before = handle_count()
    for _ in range(50):
        CompletionPort().close()
    assert handle_count() <= before + 5
