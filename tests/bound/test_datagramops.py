"""DatagramSocket: the calls one by one, on a port without threads; the trial of oversize receives."""

from __future__ import annotations

import ctypes
import socket
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from support import handle_count

from iocp_ctypes import _datagramops as ops
from iocp_ctypes import _win32
from iocp_ctypes._addresses import make_sockaddr, parse_sockaddr
from iocp_ctypes._port import Batch, CompletionPort
from iocp_ctypes._proactor import COMPLETED, PENDING, Operation, Proactor

LOCAL = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0, 0, 0)}


class Bench:
    """A port, a pending table, two sockets; `retire` does what a dispatcher does."""

    def __init__(self, family: int) -> None:
        self.port = CompletionPort()
        self.proactor = Proactor()
        self.one, self.two = (self.open(family) for _ in range(2))
        self.to_one = ops.Target(make_sockaddr(family, self.one.address), 65_507)

    def open(self, family: int) -> Any:
        made = ops.open_datagram(
            family, socket.SOCK_DGRAM, 0, LOCAL[socket.AddressFamily(family)], False, False
        )
        made.attach(self.proactor, self.port)
        return made

    def retire(self, timeout_ms: int = 10_000) -> list[tuple[Operation, int]]:
        """Take packets off the port and their operations out of the table."""
        ready: deque[tuple[Any, int]] = deque()
        self.port.reap(Batch(16), timeout_ms, ready)
        return [(self.proactor.pending.pop(address), count) for address, count in ready]

    def close(self) -> None:
        for sock in (self.one, self.two):
            sock.cancel()
        while self.proactor.pending:
            assert self.retire()
        for sock in (self.one, self.two):
            sock.close()
            sock.close()
        self.port.close()


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.close()


def receive_operation(size: int = 100) -> ops.DatagramReceive:
    return ops.DatagramReceive(size, lambda _operation, _transferred, _status: None)


def test_receives_are_filled_in_the_order_of_posting(bench: Bench) -> None:
    operations = [receive_operation() for _ in range(4)]
    for operation in operations:
        assert bench.one.receive(operation) == PENDING
        assert bench.proactor.pending[operation.address] is operation
    for number in range(4):
        assert bench.two.send_now(b"%d" % number, bench.to_one) == COMPLETED
    retired: list[tuple[Operation, int]] = []
    while len(retired) < 4:
        retired += bench.retire()
    for number, operation in enumerate(operations):
        assert operation.buffer[:1] == b"%d" % number
        assert operation.Internal == 0
        assert parse_sockaddr(bench.one.sender(operation)) == bench.two.address
    assert bench.proactor.pending == {}


def test_a_receive_that_completes_at_once_has_its_packet(bench: Bench) -> None:
    bench.two.send_now(b"", bench.to_one)
    bench.two.send_now(b"data", bench.to_one)
    wait_readable(bench.one)
    empty, full = receive_operation(), receive_operation()
    assert bench.one.receive(empty) == bench.one.receive(full) == PENDING
    retired: list[tuple[Operation, int]] = []
    while len(retired) < 2:
        retired += bench.retire()
    assert retired == [(empty, 0), (full, 4)]


def wait_readable(sock: Any) -> None:
    assert ops.select.select([sock._python], [], [], 5)[0]


@pytest.mark.wine_differs("udp-oversize")
@pytest.mark.parametrize("at_once", [True, False])
def test_oversize_has_one_packet_and_the_bytes_that_fitted(bench: Bench, at_once: bool) -> None:
    operation = receive_operation(64)
    if not at_once:
        assert bench.one.receive(operation) == PENDING
    assert bench.two.send_now(b"x" * 65, bench.to_one) == COMPLETED
    if at_once:
        wait_readable(bench.one)
        code = bench.one.receive(operation)
        assert code == (PENDING if ops.oversize_has_packet() else COMPLETED)
        if code == COMPLETED:
            del bench.proactor.pending[operation.address]
            assert (operation.Internal, operation.InternalHigh) == (ops.STATUS_BUFFER_OVERFLOW, 64)
            assert bench.retire(50) == []
            return
    assert bench.retire() == [(operation, 64)]
    assert operation.Internal & 0xFFFFFFFF == ops.STATUS_BUFFER_OVERFLOW
    assert operation.buffer[:64] == b"x" * 64
    assert bench.retire(50) == []


def test_oversize_where_the_trial_found_no_packet(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_trial", [False])

    def oversize(*_given: Any) -> int:
        ctypes.set_last_error(ops.WSAEMSGSIZE)
        return -1

    monkeypatch.setattr(_win32, "hot_receive_from", oversize)
    operation = receive_operation(64)
    assert bench.one.receive(operation) == COMPLETED
    assert (operation.Internal, operation.InternalHigh) == (ops.STATUS_BUFFER_OVERFLOW, 64)
    assert bench.proactor.pending.pop(operation.address) is operation, "the dispatcher is to find it"


def test_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    ops._try_oversize()  # what is made once is made now
    before = handle_count()
    answers = {ops._try_oversize() for _ in range(10)}
    assert len(answers) == 1
    if _win32.is_wine():
        assert answers == {True}
    assert handle_count() <= before + 2

    def late(*_given: Any) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr(ops.DatagramSocket, "address", property(lambda _self: ("127.0.0.1", 9)))
        assert ops._try_oversize(late) is True, "where nothing came, what the I/O manager does"
    monkeypatch.setattr(ops, "_trial", [])
    assert ops.oversize_has_packet() is answers.pop()


def test_an_overlapped_send_has_its_packet(bench: Bench) -> None:
    operation = Operation()
    assert bench.two.send(operation, lambda *_given: None, b"data", bench.to_one) == PENDING
    assert bench.retire() == [(operation, 4)]
    received = receive_operation()
    assert bench.one.receive(received) == PENDING
    assert bench.retire() == [(received, 4)]


def test_calls_that_fail_leave_nothing_pending(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: Any) -> int:
        ctypes.set_last_error(10055)
        return -1

    monkeypatch.setattr(_win32, "hot_receive_from", refuse)
    monkeypatch.setattr(_win32, "hot_send_to", refuse)
    assert bench.one.receive(receive_operation()) == 10055
    assert bench.two.send(Operation(), lambda *_given: None, b"data", bench.to_one) == 10055
    assert bench.two.send_now(b"data", bench.to_one) == 10055
    assert bench.proactor.pending == {}


def test_cancelled_receives_have_their_packets(bench: Bench) -> None:
    operations = [receive_operation() for _ in range(3)]
    for operation in operations:
        assert bench.one.receive(operation) == PENDING
    bench.one.cancel()
    retired: list[tuple[Operation, int]] = []
    while len(retired) < 3:
        retired += bench.retire()
    assert {operation.address for operation, _ in retired} == {operation.address for operation in operations}
    assert all(operation.Internal & 0xFFFFFFFF == 0xC0000120 for operation in operations)


def test_connected_sends_need_no_address(bench: Bench) -> None:
    family = bench.one.family
    bench.two.connect(make_sockaddr(family, bench.one.address))
    assert bench.two.send_now(b"data", ops.Target(b"", 65_507)) == COMPLETED
    received = receive_operation()
    assert bench.one.receive(received) == PENDING
    assert bench.retire() == [(received, 4)]
    with pytest.raises(OSError, match="cannot connect to"):
        bench.one.connect(b"\x05" * 16)


def test_a_large_send_is_not_kept(bench: Bench) -> None:
    assert bench.two.send_now(bytes(20_000), bench.to_one) == COMPLETED
    assert bench.two._direct.keep is None
    assert bench.two._direct.buf is None


def test_every_prototype_is_typed_and_its_twin_is_not() -> None:
    for name in ("WSARecvFrom", "WSASendTo", "connect"):
        function = getattr(_win32, name)
        assert function.argtypes
        assert function.restype is ctypes.c_int
    for twin in (_win32.hot_receive_from, _win32.hot_send_to):
        assert twin.argtypes is None
        assert twin in _win32.HOT
