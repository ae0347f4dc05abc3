"""Operations and the pending table: who keeps what alive, and that no address is ever in it twice."""

from __future__ import annotations

import ctypes
import gc
import itertools
import random
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from support import wait_until

from iocp_ctypes import _proactor, _win32
from iocp_ctypes._errors import STATUS_PENDING
from iocp_ctypes._flow import SEND_GATHER_MAX, Piece
from iocp_ctypes._port import Batch, CompletionPort
from iocp_ctypes._proactor import (
    COMPLETED,
    KEPT_BYTES_MAX,
    KEPT_DATA_MAX,
    KEPT_MAX,
    PENDING,
    Operation,
    Proactor,
)
from iocp_ctypes._sockops import OverlappedSocket


class Table(dict[int, Any]):
    """A pending table that refuses to lose an operation by registering another at its address."""

    def __setitem__(self, address: int, operation: Any) -> None:
        assert address not in self, f"two operations at {address:#x}"
        assert operation.address == address
        super().__setitem__(address, operation)


class Counted(Operation):
    """An operation whose end is counted."""

    __slots__ = ()
    ended = 0

    def __del__(self) -> None:
        Counted.ended += 1


@pytest.fixture
def proactor() -> Iterator[Proactor]:
    made = Proactor()
    made.pending = Table()
    yield made
    assert not made.pending


def sent_by(operation: Operation, count: int) -> bytes:
    """What the kernel would send of a gather list, read through the pointers that it gets."""
    return b"".join(ctypes.string_at(part.buf, part.len) for part in operation.vector[:count])


# -- operations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 64, 1024, 1 << 20])
def test_a_new_operation_is_blank_and_points_at_its_own_buffer(size: int) -> None:
    operation = Operation(size)
    assert operation.address == ctypes.addressof(operation)
    assert (operation.Internal, operation.InternalHigh, operation.hEvent, operation.flags) == (0, 0, 0, 0)
    assert (operation.Offset, operation.OffsetHigh) == (0, 0)
    assert operation.len == operation.size == size
    raw = _win32.WSABUF.from_buffer(operation, _win32.TRANSFER.len.offset)
    assert raw.len == size
    assert (raw.buf or 0) == (ctypes.addressof(operation.buffer) if size else 0)


def test_it_is_done_unless_its_status_says_pending() -> None:
    operation = Operation(10)
    for status, done in ((STATUS_PENDING, False), (0, True), (0xC0000120, True), (0x103, False)):
        operation.Internal = status
        assert operation.done is done


def test_the_ready_made_arguments_are_its_addresses() -> None:
    operation = Operation(10)
    parts = {
        "overlapped": operation.address,
        "wsabuf": operation.address + _win32.TRANSFER.len.offset,
        "flags_argument": operation.address + _win32.TRANSFER.flags.offset,
    }
    identity = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda value: value)
    for name, address in parts.items():
        bare = ctypes.cast(identity, ctypes.CFUNCTYPE(ctypes.c_void_p))
        bare.argtypes = None
        assert bare(getattr(operation, name)) == address, name


def test_buffers_are_not_shared() -> None:
    operations = [Operation(100) for _ in range(50)]
    spans = sorted((ctypes.addressof(operation.buffer), 100) for operation in operations)
    for (low, size), (high, _size) in itertools.pairwise(spans):
        assert low + size <= high


@pytest.mark.parametrize("length", [1, 2, 1000, KEPT_DATA_MAX, KEPT_DATA_MAX + 1, 1 << 18])
def test_loading_points_at_the_very_object(length: int) -> None:
    operation, data = Operation(), random.randbytes(length)
    operation.load(data)
    raw = _win32.WSABUF.from_buffer(operation, _win32.TRANSFER.len.offset)
    assert raw.len == operation.length == length
    assert ctypes.string_at(raw.buf, raw.len) == data
    assert raw.buf == ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value, "it was copied"
    assert operation.keep is data


def test_loading_again_forgets_what_was_loaded_before() -> None:
    operation = Operation()
    for data in (b"first", b"and a longer one", b"x", b"y", b"zz"):
        operation.load(data)
        raw = _win32.WSABUF.from_buffer(operation, _win32.TRANSFER.len.offset)
        assert (raw.len, ctypes.string_at(raw.buf, raw.len), operation.length) == (len(data), data, len(data))


@pytest.mark.parametrize("count", [1, 2, SEND_GATHER_MAX])
def test_a_gather_list_points_into_the_very_objects(count: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    pieces = []
    for _ in range(count):
        data = chosen.randbytes(chosen.randrange(1, 5000))
        start = chosen.randrange(len(data))
        pieces.append(Piece(data, start, chosen.randrange(start, len(data)) + 1))
    operation = Operation()
    _argument, loaded = operation.load_pieces(pieces)
    expected = b"".join(data[start:stop] for data, start, stop in pieces)
    assert loaded == count
    assert operation.length == len(expected)
    assert sent_by(operation, count) == expected
    for part, (data, start, _stop) in zip(operation.vector, pieces, strict=False):
        assert part.buf == (ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0) + start
    assert operation.keep is pieces


def test_one_buffer_after_a_gather_list_and_the_other_way_round() -> None:
    operation = Operation()
    operation.load(b"one")
    _argument, count = operation.load_pieces([Piece(b"abcdef", 1, 3), Piece(b"xyz", 0, 3)])
    assert (sent_by(operation, count), operation.length) == (b"bcxyz", 5)
    operation.load(b"three")
    raw = _win32.WSABUF.from_buffer(operation, _win32.TRANSFER.len.offset)
    assert (ctypes.string_at(raw.buf, raw.len), operation.length) == (b"three", 5)


# -- who keeps what alive -----------------------------------------------------------------------------------


def test_the_pending_table_is_what_keeps_an_operation(proactor: Proactor) -> None:
    gc.collect()
    gc.disable()  # a cycle would keep it until the next collection
    try:
        before = Counted.ended
        operation = Counted(100)
        operation.handler = lambda *_arguments: None
        operation.load(b"data")
        address = operation.address
        proactor.pending[address] = operation
        del operation
        assert Counted.ended == before
        del proactor.pending[address]
        assert Counted.ended == before + 1
    finally:
        gc.enable()


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="getrefcount tells only a part of the count without a GIL",
)
def test_what_is_sent_is_kept_until_it_is_sent_and_no_longer() -> None:
    proactor = Proactor()
    for length in (10, KEPT_DATA_MAX, KEPT_DATA_MAX + 1, 1 << 17):
        for gathered in (False, True):
            data = random.randbytes(length)
            alone = sys.getrefcount(data)
            operation = proactor.take_send()
            if gathered:
                operation.load_pieces([Piece(data, 0, length)])
            else:
                operation.load(data)
            assert sys.getrefcount(data) > alone
            proactor.give_send(operation)
            kept = sys.getrefcount(data) - alone
            assert kept == 0 or (length <= KEPT_DATA_MAX and kept == 1), (length, gathered)
            assert proactor.take_send() is operation
            operation.load(b"another")
            assert sys.getrefcount(data) == alone
            proactor.give_send(operation)


def test_what_is_given_back_keeps_no_handler(proactor: Proactor) -> None:
    for operation, give in (
        (proactor.take_send(), proactor.give_send),
        (proactor.take_receive(100), proactor.give_receive),
    ):
        operation.handler = lambda *_arguments: None
        give(operation)
        assert operation.handler is None
        assert operation.keep is None


# -- used again ---------------------------------------------------------------------------------------------


def test_operations_are_used_again_and_receives_by_their_size(proactor: Proactor) -> None:
    small, large = proactor.take_receive(64), proactor.take_receive(4096)
    send = proactor.take_send()
    proactor.give_receive(small)
    proactor.give_receive(large)
    proactor.give_send(send)
    assert proactor.take_receive(4096) is large
    assert proactor.take_receive(4096) is not large
    assert proactor.take_receive(64) is small
    assert proactor.take_send() is send
    assert proactor.take_send() is not send
    zero = proactor.take_receive(0)
    proactor.give_receive(zero)
    assert proactor.take_receive(0) is zero
    assert proactor.take_send() is not zero, "sends and receives are kept apart"


def test_bytes_are_counted_where_they_are(proactor: Proactor) -> None:
    assert proactor.bytes_pending == proactor.bytes_kept == 0
    receive, send, large = proactor.take_receive(100), proactor.take_send(), proactor.take_send()
    send.load(bytes(30))
    large.load(bytes(KEPT_DATA_MAX + 1))
    for operation in (receive, send, large):
        proactor.pending[operation.address] = operation
    assert proactor.bytes_pending == 100 + 30 + KEPT_DATA_MAX + 1
    assert proactor.bytes_kept == 0
    for operation in (receive, send, large):
        del proactor.pending[operation.address]
    proactor.give_receive(receive)
    proactor.give_send(send)
    proactor.give_send(large)
    assert proactor.bytes_pending == 0
    assert proactor.bytes_kept == 100 + 30, "the large one forgot its data"


def test_what_is_kept_is_bounded(proactor: Proactor) -> None:
    for _ in range(KEPT_MAX + 5):
        proactor.give_send(Operation())
        proactor.give_receive(Operation(64))
    assert len(proactor.sends) == KEPT_MAX
    assert len(proactor._receives[64]) == KEPT_MAX


@pytest.mark.parametrize(
    "size", [KEPT_BYTES_MAX // 4, KEPT_BYTES_MAX // 4 + 1, KEPT_BYTES_MAX, KEPT_BYTES_MAX + 1]
)
def test_what_is_kept_of_large_buffers_is_bounded_by_their_bytes(proactor: Proactor, size: int) -> None:
    for operation in [Operation(size) for _ in range(6)]:
        proactor.give_receive(operation)
    assert len(proactor._receives[size]) == KEPT_BYTES_MAX // size


def test_threads_that_take_and_give_never_share_one() -> None:
    proactor = Proactor()
    shared: list[str] = []

    def work(number: int) -> None:
        for _ in range(1500):
            send, receive = proactor.take_send(), proactor.take_receive(64)
            send.length = receive.length = number
            if (send.keep, receive.keep) != (None, None):
                shared.append("somebody else has it")
            send.keep = receive.keep = number
            if (send.length, receive.length) != (number, number):
                shared.append("somebody else wrote to it")
            receive.keep = None
            proactor.give_send(send)
            proactor.give_receive(receive)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shared
    kept = proactor.sends + proactor._receives[64]
    assert len({id(operation) for operation in kept}) == len(kept) <= 2 * KEPT_MAX + 8


# -- the pending table --------------------------------------------------------------------------------------


def test_settle_leaves_a_pending_operation_where_it_is(proactor: Proactor) -> None:
    operation = Operation(10)
    proactor.pending[operation.address] = operation
    ctypes.set_last_error(997)
    assert proactor.settle(operation) == PENDING
    assert proactor.pending == {operation.address: operation}
    proactor.pending.clear()


@pytest.mark.parametrize("code", [10054, 10055, 10035, 64, 6])
def test_settle_retires_an_operation_whose_call_failed(proactor: Proactor, code: int) -> None:
    operation = Operation(10)
    proactor.pending[operation.address] = operation
    ctypes.set_last_error(code)
    assert proactor.settle(operation) == code
    assert not proactor.pending


def test_the_results_of_issuing_are_no_error_codes() -> None:
    assert COMPLETED == 0
    assert PENDING == 997
    assert _proactor.WSA_IO_PENDING == PENDING


class Traffic:
    """Pairs of sockets that receive, send, cancel and close at random, on one port."""

    def __init__(self, chosen: random.Random, proactor: Proactor, skips: bool) -> None:
        self.chosen = chosen
        self.proactor = proactor
        self.port = CompletionPort()
        self.batch = Batch(16)
        self.handled = self.issued = 0
        self.skips = skips
        self.sockets: list[tuple[OverlappedSocket, socket.socket]] = []

    def open(self) -> None:
        left, right = socket.socketpair()
        right.setblocking(False)
        family = left.family
        sock = OverlappedSocket(left.detach(), family, self.proactor)
        if self.skips:
            sock.associate(self.port)
        else:
            self.port.associate(sock._handle)
        self.sockets.append((sock, right))

    def receive(self) -> None:
        sock, _peer = self.chosen.choice(self.sockets)
        operation = self.proactor.take_receive(self.chosen.choice([0, 64, 1024]))
        operation.handler = self.retired
        self.count(sock.receive(operation), operation, self.proactor.give_receive, leaves=False)

    def send(self) -> None:
        sock, _peer = self.chosen.choice(self.sockets)
        operation = self.proactor.take_send()
        operation.load(b"x" * self.chosen.randrange(1, 3000))
        self.count(sock.send(operation, self.retired), operation, self.proactor.give_send, leaves=True)

    def count(self, code: int, operation: Operation, give: Any, leaves: bool) -> None:
        if code == PENDING:
            self.issued += 1
        elif code == COMPLETED:
            if not leaves:  # a receive stays in the table until the dispatcher serves it
                assert self.proactor.pending.pop(operation.address) is operation
            give(operation)
        else:
            assert operation.address not in self.proactor.pending
            give(operation)

    def retired(self, operation: Operation, _transferred: int, _status: int) -> None:
        self.handled += 1
        if operation.size or operation.length == 0:
            self.proactor.give_receive(operation)
        else:
            self.proactor.give_send(operation)

    def peer(self) -> None:
        _sock, peer = self.chosen.choice(self.sockets)
        try:
            if self.chosen.random() < 0.5:
                peer.send(b"y" * self.chosen.randrange(1, 3000))
            else:
                peer.recv(5000)
        except OSError:
            pass  # it would block, or the other end is gone

    def cancel(self) -> None:
        self.chosen.choice(self.sockets)[0].cancel()

    def close(self) -> None:
        if len(self.sockets) > 3:
            sock, peer = self.sockets.pop(self.chosen.randrange(len(self.sockets)))
            sock.cancel()
            self.reap(0)
            sock.close()
            peer.close()

    def reap(self, timeout_ms: int = 0) -> None:
        ready: deque[tuple[Any, int]] = deque()
        self.port.reap(self.batch, timeout_ms, ready)
        for address, transferred in ready:
            operation = self.proactor.pending.pop(address)  # a packet of no operation is a KeyError
            operation.handler(operation, transferred, operation.Internal)

    def end(self) -> None:
        for sock, peer in self.sockets:
            sock.cancel()
            sock.close()
            peer.close()

        def all_back() -> bool:
            self.reap(10)
            return not self.proactor.pending

        wait_until(all_back, what="operations that never came back")
        self.port.close()


@pytest.mark.parametrize("skips", [True, False])
def test_addresses_stay_unique_however_operations_are_used_again(proactor: Proactor, skips: bool) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    traffic = Traffic(random.Random(seed), proactor, skips)
    for _ in range(5):
        traffic.open()
    moves = [traffic.receive] * 6 + [traffic.send] * 6 + [traffic.peer] * 8 + [traffic.reap] * 4
    moves += [traffic.cancel, traffic.close, traffic.open]
    for _ in range(1500):
        traffic.chosen.choice(moves)()
        if traffic.chosen.random() < 0.05:
            proactor.sends.clear()  # so that memory is freed and its addresses come again
            proactor._receives.clear()
            Operation(64)
    traffic.end()
    assert traffic.handled == traffic.issued > 30
