"""Sockets of the completion port: what is issued, what comes of it, and in which order things are done."""

from __future__ import annotations

import ctypes
import os
import random
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import pytest
from support import ended, handle_count, raw, wait_until

from iocp_ctypes import _sockops, _win32
from iocp_ctypes._addresses import parse_sockaddr
from iocp_ctypes._dispatcher import Dispatcher
from iocp_ctypes._flow import SEND_GATHER_MAX, Piece
from iocp_ctypes._listening import listen
from iocp_ctypes._options import KEEPALIVE_MAX
from iocp_ctypes._port import Batch, CompletionPort
from iocp_ctypes._proactor import COMPLETED, PENDING, Operation, Proactor
from iocp_ctypes._sockops import NOT_CONNECTED, ListeningSocket, OverlappedSocket, error_code
from iocp_ctypes.watchdog import Watchdog

PATIENCE_MS = 10_000
CANCELLED = 0xC0000120


class Table:
    """A port with its pending table, served by the test's own thread."""

    def __init__(self) -> None:
        self.port = CompletionPort()
        self.proactor = Proactor()
        self.sockets: list[OverlappedSocket] = []
        self.peers: list[socket.socket] = []

    def pair(self) -> tuple[OverlappedSocket, socket.socket]:
        """A connected socket of the port, and its peer."""
        left, right = socket.socketpair()
        made = OverlappedSocket(left.detach(), socket.AF_INET, self.proactor)
        made.associate(self.port)
        right.settimeout(10)
        self.sockets.append(made)
        self.peers.append(right)
        return made, right

    def listener(self, family: int = socket.AF_INET, host: str = "127.0.0.1") -> ListeningSocket:
        address = (host, 0) if family == socket.AF_INET else (host, 0, 0, 0)
        return ListeningSocket(listen(family, address, 10, True, False), self.proactor, self.port)

    def next(self) -> tuple[Operation, int, int]:
        """The next packet: its operation, bytes and status."""
        ready: deque[tuple[Any, int]] = deque()
        assert self.port.reap(Batch(1), PATIENCE_MS, ready) == 1
        address, transferred = ready.popleft()
        operation = self.proactor.pending.pop(address)
        return operation, transferred, operation.Internal

    def next_within(self, milliseconds: int) -> tuple[Operation, int, int] | None:
        """The next packet, where it comes in time."""
        ready: deque[tuple[Any, int]] = deque()
        if not self.port.reap(Batch(1), milliseconds, ready):
            return None
        address, transferred = ready.popleft()
        operation = self.proactor.pending.pop(address)
        return operation, transferred, operation.Internal

    def nothing_comes(self) -> bool:
        return self.port.reap(Batch(1), 0, deque()) == 0

    def end(self) -> None:
        for sock in self.sockets:
            sock.cancel()
            sock.close()
        for peer in self.peers:
            peer.close()
        while self.proactor.pending:
            self.next()
        assert self.nothing_comes(), "a packet of no operation"
        self.port.close()


@pytest.fixture(params=["skips", "packets"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    """In both modes: what completes at once has no packet, and it has one."""
    if request.param == "packets":
        monkeypatch.setattr(_sockops, "provider_is_ifs", lambda _handle, _family: False)
    made = Table()
    yield made
    made.end()


def sends(sock: OverlappedSocket, table: Table, data: bytes) -> None:
    """Send bytes and see them accepted, in whichever way."""
    operation = table.proactor.take_send()
    operation.load(data)
    retired: list[Operation] = []
    code = sock.send(operation, lambda op, _count, _status: retired.append(op))
    if code == COMPLETED:
        assert sock.skips
        assert operation.InternalHigh == len(data)
    else:
        assert code == PENDING
        done, transferred, status = table.next()
        assert (done, transferred, status) == (operation, len(data), 0)
    table.proactor.give_send(operation)


# -- receiving and sending ----------------------------------------------------------------------------------


def test_both_modes_are_what_they_say(table: Table, request: pytest.FixtureRequest) -> None:
    sock, _peer = table.pair()
    assert sock.skips is ("skips" in request.node.name)


def test_a_receive_that_finds_nothing_is_pending_until_something_comes(table: Table) -> None:
    sock, peer = table.pair()
    operation = Operation(100)
    assert sock.receive(operation) == PENDING
    assert table.nothing_comes()
    assert table.proactor.pending == {operation.address: operation}
    peer.sendall(b"hello")
    assert table.next() == (operation, 5, 0)
    assert operation.buffer[:5] == b"hello"


def test_a_receive_that_finds_something(table: Table) -> None:
    sock, peer = table.pair()
    peer.sendall(b"hello")
    operation = Operation(100)
    code = wait_for_data(table, sock, operation)
    if code == COMPLETED:
        assert sock.skips
        assert table.proactor.pending.pop(operation.address) is operation, "it stays until it is served"
        assert operation.InternalHigh == 5
    else:
        assert table.next() == (operation, 5, 0)
    assert operation.buffer[:5] == b"hello"


def wait_for_data(table: Table, sock: OverlappedSocket, operation: Operation) -> int:
    """Wait, by a receive of no bytes, until there is data; then receive it."""
    readable = Operation(0)
    if sock.receive(readable) == COMPLETED:
        table.proactor.pending.pop(readable.address)
    else:
        table.next()
    return sock.receive(operation)


def test_a_receive_of_no_bytes_tells_of_data_and_takes_none(table: Table) -> None:
    sock, peer = table.pair()
    operation = Operation(0)
    assert sock.receive(operation) == PENDING
    assert table.nothing_comes()
    peer.sendall(b"hello")
    assert table.next() == (operation, 0, 0)
    again = Operation(100)
    if sock.receive(again) == COMPLETED:
        table.proactor.pending.pop(again.address)
    else:
        table.next()
    assert again.buffer[:5] == b"hello"


def test_the_end_is_a_receive_of_nothing(table: Table) -> None:
    sock, peer = table.pair()
    operation = Operation(100)
    assert sock.receive(operation) == PENDING
    peer.shutdown(socket.SHUT_WR)
    assert table.next() == (operation, 0, 0)


def test_a_receive_may_be_used_again_at_once(table: Table) -> None:
    sock, peer = table.pair()
    operation = Operation(100)
    for number in range(20):
        assert sock.receive(operation) == PENDING
        peer.sendall(b"%d" % number)
        _operation, transferred, status = table.next()
        assert status == 0
        assert operation.buffer[:transferred] == b"%d" % number


def test_a_send_goes_out(table: Table) -> None:
    sock, peer = table.pair()
    for data in (b"x", b"hello", bytes(3000)):
        sends(sock, table, data)
        got = b""
        while len(got) < len(data):
            got += peer.recv(5000)
        assert got == data


def test_a_gathered_send_goes_out_in_one_call(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    hot_send = _win32.hot_send
    monkeypatch.setattr(_win32, "hot_send", lambda *args: (calls.append(args[2]), hot_send(*args))[1])
    sock, peer = table.pair()
    pieces = [Piece(b"<%d>" % number, 1, 1 + len(str(number))) for number in range(SEND_GATHER_MAX)]
    operation = table.proactor.take_send()
    vector, count = operation.load_pieces(pieces)
    code = sock.send(operation, lambda *_arguments: None, vector, count)
    expected = "".join(str(number) for number in range(SEND_GATHER_MAX)).encode()
    if code == PENDING:
        assert table.next() == (operation, len(expected), 0)
    assert operation.InternalHigh == operation.length == len(expected)
    assert calls == [SEND_GATHER_MAX]
    assert peer.recv(1000) == expected


def test_a_call_that_fails_leaves_nothing_pending(table: Table) -> None:
    sock, _peer = table.pair()
    sock.shutdown_send()
    operation = table.proactor.take_send()
    operation.load(b"too late")
    assert sock.send(operation, lambda *_arguments: None) == 10058
    assert not table.proactor.pending
    closed, _peer = table.pair()
    closed.close()
    receive = Operation(10)
    assert closed.receive(receive) not in (COMPLETED, PENDING)
    assert not table.proactor.pending


def test_a_reset_is_a_status_and_not_an_exception(table: Table) -> None:
    sock, peer = table.pair()
    operation = Operation(100)
    assert sock.receive(operation) == PENDING
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00")
    peer.close()
    done, transferred, status = table.next()
    assert (done, transferred) == (operation, 0)
    assert error_code(status) == 10054


# -- cancelling ---------------------------------------------------------------------------------------------


def test_cancelled_operations_have_their_packets(table: Table) -> None:
    sock, _peer = table.pair()
    operations = [Operation(10) for _ in range(3)]
    for operation in operations:
        assert sock.receive(operation) == PENDING
    sock.cancel()
    sock.cancel()  # nothing is pending any more, or their packets are on the way: no failure either way
    for _ in operations:
        _operation, transferred, status = table.next()
        assert (transferred, status) == (0, CANCELLED)
        assert error_code(status) == 995
    assert table.nothing_comes()


def test_cancelling_what_is_idle_or_closed_is_harmless(table: Table) -> None:
    sock, _peer = table.pair()
    sock.cancel()
    sock.close()
    sock.cancel()
    sock.shutdown_send()
    sock.reset_on_close()


def test_a_receive_after_a_cancel_works(table: Table) -> None:
    sock, peer = table.pair()
    operation = Operation(10)
    assert sock.receive(operation) == PENDING
    sock.cancel()
    table.next()
    assert sock.receive(operation) == PENDING
    peer.sendall(b"hello")
    assert table.next() == (operation, 5, 0)


def test_closing_twice_closes_once(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    closesocket = _win32.closesocket
    monkeypatch.setattr(_win32, "closesocket", lambda handle: (closed.append(handle), closesocket(handle))[1])
    sock, peer = table.pair()
    handle = sock._handle
    sock.close()
    sock.close()
    assert closed == [handle]
    assert ended(peer) == "eof"


# -- options ------------------------------------------------------------------------------------------------


def option(sock: OverlappedSocket, level: int, name: int, size: int = 4) -> bytes:
    """Read an option of a socket."""
    value, length = ctypes.create_string_buffer(size), ctypes.c_int(size)
    assert not _win32.getsockopt(sock._handle, level, name, value, ctypes.byref(length))
    return value.raw[: length.value]


def test_nodelay(table: Table) -> None:
    sock, _peer = table.pair()
    for on in (True, False, True):
        sock.set_nodelay(on)
        assert any(option(sock, _win32.IPPROTO_TCP, _win32.TCP_NODELAY)) is on
        assert sock._ask_nodelay() is on


def test_nodelay_is_set_where_it_is_not_known_to_be_so(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    sock, _peer = table.pair()
    calls: list[Any] = []
    monkeypatch.setattr(sock, "_nodelay", None)
    monkeypatch.setattr(_win32, "setsockopt", lambda *args: calls.append(args) or len(calls) == 2)
    sock.set_nodelay(False)
    sock.set_nodelay(False)
    assert len(calls) == 1
    with pytest.raises(OSError, match="TCP_NODELAY"):
        sock.set_nodelay(True)
    sock.set_nodelay(False)  # what a failed call left is not known
    assert len(calls) == 3


def test_an_accepted_socket_knows_what_it_has_of_the_listener(alone: Table) -> None:
    for nodelay in (True, False):
        made = listen(socket.AF_INET, ("127.0.0.1", 0), 10, True, False, nodelay)
        listener = ListeningSocket(made, alone.proactor, alone.port)
        for _ in range(2):
            with raw(listener.address):
                listener.accept(lambda *_arguments: None, 0, None)
                sock, _first = finished(alone, listener)
                assert sock._nodelay is sock._ask_nodelay()
                sock.close()
        listener.close()


def test_reset_on_close_sets_so_linger(table: Table) -> None:
    sock, _peer = table.pair()
    sock.reset_on_close()
    assert option(sock, _win32.SOL_SOCKET, _win32.SO_LINGER) == b"\x01\x00\x00\x00"


@pytest.mark.parametrize(
    ("keepalive", "expected"),
    [
        (None, (0, 1, 1000)),
        (30.0, (1, 30_000, 1000)),
        (0.0001, (1, 1, 1000)),
        ((60.0, 2.5), (1, 60_000, 2500)),
        ((0.0001, 0.0001), (1, 1, 1)),
        (KEEPALIVE_MAX, (1, 4_294_967_000, 1000)),
        ((KEEPALIVE_MAX, KEEPALIVE_MAX), (1, 4_294_967_000, 4_294_967_000)),
    ],
)
def test_keepalive_is_told_in_milliseconds(
    keepalive: Any, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int, int, int]] = []
    ioctl = _win32.WSAIoctl

    def spy(handle: int, code: int, values: Any, *rest: Any) -> int:
        given = values._obj
        told.append((code, given.onoff, given.keepalivetime, given.keepaliveinterval))
        return int(ioctl(handle, code, values, *rest))

    monkeypatch.setattr(_win32, "WSAIoctl", spy)
    table = Table()
    sock, _peer = table.pair()
    sock.set_keepalive(keepalive)
    assert told == [(_win32.SIO_KEEPALIVE_VALS, *expected)]
    table.end()


def test_options_of_a_closed_socket_are_an_os_error(table: Table) -> None:
    sock, _peer = table.pair()
    sock.close()
    with pytest.raises(OSError, match="TCP_NODELAY"):
        sock.set_nodelay(True)
    with pytest.raises(OSError, match="SIO_KEEPALIVE_VALS"):
        sock.set_keepalive(1.0)


def test_connect_time(table: Table) -> None:
    sock, _peer = table.pair()
    assert sock.connect_time() != NOT_CONNECTED
    sock.close()
    assert sock.connect_time() == NOT_CONNECTED


# -- the provider -------------------------------------------------------------------------------------------


def test_the_provider_is_asked_once_for_each_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sockops, "_ifs_families", {})
    asked: list[int] = []
    getsockopt = _win32.getsockopt

    def spy(handle: int, level: int, name: int, *rest: Any) -> int:
        asked.append(name)
        return int(getsockopt(handle, level, name, *rest))

    monkeypatch.setattr(_win32, "getsockopt", spy)
    with socket.socket() as sock:
        answers = {_sockops.provider_is_ifs(sock.fileno(), socket.AF_INET) for _ in range(3)}
    assert answers == {True}
    assert asked == [_win32.SO_PROTOCOL_INFOW]
    with socket.socket(socket.AF_INET6) as sock:
        assert _sockops.provider_is_ifs(sock.fileno(), socket.AF_INET6) is True
    assert asked == [_win32.SO_PROTOCOL_INFOW] * 2


@pytest.mark.parametrize(
    ("flags", "expected"), [(0, False), (_win32.XP1_IFS_HANDLES, True), (0xFFFFFFFF, True), (~0x20000, False)]
)
def test_only_a_provider_of_real_handles_counts(
    flags: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sockops, "_ifs_families", {})

    def answer(_handle: int, _level: int, _name: int, value: Any, _length: Any) -> int:
        value._obj.dwServiceFlags1 = flags & 0xFFFFFFFF
        return 0

    monkeypatch.setattr(_win32, "getsockopt", answer)
    assert _sockops.provider_is_ifs(1, 2) is expected


def test_a_provider_that_does_not_answer_is_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sockops, "_ifs_families", {})
    monkeypatch.setattr(_win32, "getsockopt", lambda *_arguments: -1)
    assert _sockops.provider_is_ifs(1, 2) is False
    monkeypatch.undo()
    with socket.socket() as sock:
        assert _sockops.provider_is_ifs(sock.fileno(), socket.AF_INET) is True


def test_a_provider_without_an_extension_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sockops, "_extensions", {})
    table = Table()
    with pytest.raises(OSError, match="the provider has no AcceptEx"):
        _sockops._extension(_win32.INVALID_SOCKET, socket.AF_INET, "AcceptEx")
    table.end()


# -- none twice, none lost ----------------------------------------------------------------------------------


class Mixed:
    """Connections that receive and send at random; counts what was issued and what was handled."""

    def __init__(self, seed: int, io_threads: int, goal: int) -> None:
        self.chosen = random.Random(seed)
        self.goal = goal
        self.port = CompletionPort()
        self.proactor = Proactor()
        self.watchdog = Watchdog()
        self.dispatcher = Dispatcher(self.port, self.proactor, io_threads, self.watchdog.later)
        self.lock = threading.Lock()
        self.issued: Counter[int] = Counter()
        self.handled: Counter[int] = Counter()
        self.at_once = 0
        self.number = 0
        self.wrong: list[str] = []
        self.watchdog.start()
        self.dispatcher.start()

    def receive(self, sock: OverlappedSocket) -> None:
        """Issue a receive; what was done at once is handed to the dispatcher, as a connection does."""
        operation = Operation(self.chosen.choice([0, 16, 512]))
        number = self.count(operation)
        operation.handler = lambda *told: self.retired(number, sock, *told)
        code = sock.receive(operation)
        if code == COMPLETED:
            with self.lock:
                self.at_once += 1
            self.dispatcher.completed(operation.address, operation.InternalHigh)
        elif code != PENDING:
            self.uncount(number)

    def send(self, sock: OverlappedSocket) -> None:
        operation = Operation()
        operation.load(b"x" * self.chosen.randrange(1, 600))
        number = self.count(operation)
        code = sock.send(operation, lambda *told: self.retired(number, None, *told))
        if code == COMPLETED:
            with self.lock:
                self.at_once += 1
            self.retired(number, None, operation, operation.InternalHigh, 0)
        elif code != PENDING:
            self.uncount(number)

    def count(self, _operation: Operation) -> int:
        with self.lock:
            self.number += 1
            self.issued[self.number] += 1
            return self.number

    def uncount(self, number: int) -> None:
        with self.lock:
            del self.issued[number]

    def retired(
        self, number: int, sock: OverlappedSocket | None, operation: Operation, count: int, status: int
    ) -> None:
        with self.lock:
            self.handled[number] += 1
            if not status and count != operation.InternalHigh:
                self.wrong.append(f"{count} bytes in the packet, {operation.InternalHigh} in the operation")
            going = self.number < self.goal
        if sock is not None and going and not status and (count or not operation.size):
            self.receive(sock)


@pytest.mark.parametrize("mode", ["skips", "packets"])
def test_each_operation_is_handled_once(mode: str, io_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed operations that are done at once and that are not: as many are handled as were issued."""
    if mode == "packets":
        monkeypatch.setattr(_sockops, "provider_is_ifs", lambda _handle, _family: False)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    mixed = Mixed(seed, io_threads, goal=2000)
    ends: list[OverlappedSocket] = []
    for _ in range(4):
        for end in socket.socketpair():
            sock = OverlappedSocket(end.detach(), socket.AF_INET, mixed.proactor)
            sock.associate(mixed.port)
            assert sock.skips is (mode == "skips")
            ends.append(sock)
            mixed.receive(sock)
    while mixed.number < mixed.goal:
        mixed.send(mixed.chosen.choice(ends))
    for sock in ends:
        sock.shutdown_send()
    wait_until(lambda: len(mixed.handled) == len(mixed.issued) or not mixed.proactor.pending)
    for sock in ends:
        sock.cancel()
    wait_until(lambda: not mixed.proactor.pending, what="operations that never came back")
    for sock in ends:
        sock.close()
    assert mixed.dispatcher.stop(10)
    assert mixed.watchdog.stop(10)
    assert mixed.handled == mixed.issued
    assert set(mixed.handled.values()) == {1}
    assert not mixed.wrong
    assert mixed.at_once > 500 if mode == "skips" else mixed.at_once == 0
    mixed.port.close()


# -- accepting ----------------------------------------------------------------------------------------------


def finished(table: Table, listener: ListeningSocket) -> tuple[OverlappedSocket, bytes]:
    """Finish the accept whose packet comes next."""
    operation, transferred, status = table.next()
    assert status == 0
    return listener.finish(operation, transferred)  # type: ignore[arg-type]


@pytest.fixture
def alone() -> Iterator[Table]:
    made = Table()
    yield made
    made.end()


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["v4", "v6"]
)
@pytest.mark.parametrize("data_size", [0, 10])
def test_an_accept_brings_a_socket_its_addresses_and_the_first_bytes(
    alone: Table, family: int, host: str, data_size: int
) -> None:
    listener = alone.listener(family, host)
    with raw(listener.address) as client:
        client.sendall(b"hello")
        operation, code = listener.accept(lambda *_arguments: None, data_size, "home")
        assert code == PENDING, "an accept never completes at once"
        assert operation is not None
        assert operation.home == "home"
        sock, first = finished(alone, listener)
        assert parse_sockaddr(sock.peer_raw) == client.getsockname()
        assert parse_sockaddr(sock.local_raw) == listener.address
        assert first == (b"hello" if data_size else b"")
        assert sock.family == family
        assert not os.get_handle_inheritable(sock._handle)
        sock.associate(alone.port)
        assert sock.skips
        sends(sock, alone, b"hi")
        assert client.recv(10) == b"hi"
        sock.close()
        assert ended(client) in ("eof", "reset")
    listener.close()


def test_first_bytes_are_no_more_than_were_asked_for(alone: Table) -> None:
    listener = alone.listener()
    with raw(listener.address) as client:
        client.sendall(b"hello world")
        listener.accept(lambda *_arguments: None, 5, None)
        sock, first = finished(alone, listener)
        assert first == b"hello"
        sock.associate(alone.port)
        receive = Operation(100)
        if sock.receive(receive) == COMPLETED:
            alone.proactor.pending.pop(receive.address)
        else:
            alone.next()
        assert receive.buffer[:6] == b" world"
        sock.close()
    listener.close()


def test_an_accept_waits_for_the_first_bytes(alone: Table) -> None:
    listener = alone.listener()
    operation, _code = listener.accept(lambda *_arguments: None, 10, None)
    assert operation is not None
    assert operation.socket.connect_time() == NOT_CONNECTED
    with raw(listener.address) as client:
        wait_until(lambda: operation.socket.connect_time() != NOT_CONNECTED)
        assert alone.nothing_comes()
        client.sendall(b"x")
        sock, first = finished(alone, listener)
        assert first == b"x"
        sock.close()
    listener.close()


def test_a_silent_accept_can_be_ended_alone(alone: Table) -> None:
    listener = alone.listener()
    operations = [listener.accept(lambda *_arguments: None, 10, None)[0] for _ in range(3)]
    assert all(operations)
    listener.reap(operations[1])  # type: ignore[arg-type]
    done, _transferred, status = alone.next()
    assert done is operations[1]
    assert status == CANCELLED
    assert [operation.reaped for operation in operations] == [False, True, False]  # type: ignore[union-attr]
    assert alone.nothing_comes()
    operations[1].socket.close()  # type: ignore[union-attr]
    listener.cancel()
    for _ in range(2):
        operation, _transferred, status = alone.next()
        assert status == CANCELLED
        operation.socket.close()  # type: ignore[attr-defined]
    listener.close()


def test_closing_the_listener_ends_its_accepts(alone: Table) -> None:
    listener = alone.listener()
    for _ in range(5):
        assert listener.accept(lambda *_arguments: None, 0, None)[1] == PENDING
    listener.close()
    for _ in range(5):
        operation, _transferred, status = alone.next()
        assert status != 0
        operation.socket.close()  # type: ignore[attr-defined]
    assert not alone.proactor.pending


@pytest.mark.parametrize("code", [10055, 10024, 8])
def test_a_socket_that_cannot_be_had_is_a_code(
    alone: Table, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> int:
        ctypes.set_last_error(code)
        return int(_win32.INVALID_SOCKET)

    listener = alone.listener()
    monkeypatch.setattr(_win32, "WSASocketW", refuse)
    assert listener.accept(lambda *_arguments: None, 0, None) == (None, code)
    assert not alone.proactor.pending
    listener.close()


def test_an_accept_that_fails_closes_its_socket(alone: Table) -> None:
    listener = alone.listener()
    listener.accept(lambda *_arguments: None, 0, None)
    before = handle_count()

    def refuse(*_arguments: Any) -> int:
        ctypes.set_last_error(10055)
        return 0

    listener._accept_ex, accept_ex = refuse, listener._accept_ex
    for _ in range(30):
        assert listener.accept(lambda *_arguments: None, 0, None) == (None, 10055)
    assert len(alone.proactor.pending) == 1
    assert handle_count() <= before + 5
    listener._accept_ex = accept_ex
    listener.close()
    alone.next()[0].socket.close()  # type: ignore[attr-defined]


def test_the_context_is_updated_with_the_listener_and_checked(
    alone: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, ...]] = []

    def fail(handle: int, level: int, name: int, value: Any, size: int) -> int:
        told.append((handle, level, name, value._obj.value, size))
        ctypes.set_last_error(10057)
        return -1

    listener = alone.listener()
    operation, _code = listener.accept(lambda *_arguments: None, 0, None)
    assert operation is not None
    with raw(listener.address):
        done, transferred, status = alone.next()
        assert (done, status) == (operation, 0)
        with monkeypatch.context() as patch:
            patch.setattr(_win32, "setsockopt", fail)
            with pytest.raises(ConnectionResetError, match="SO_UPDATE_ACCEPT_CONTEXT"):
                listener.finish(operation, transferred)
    word = ctypes.sizeof(ctypes.c_void_p)
    assert told == [(operation.socket._handle, 0xFFFF, 0x700B, listener._handle, word)]
    operation.socket.close()
    listener.close()


# -- listening ----------------------------------------------------------------------------------------------


def test_listening_is_exclusive_if_it_is_to_be() -> None:
    for exclusive in (True, False):
        with listen(socket.AF_INET, ("127.0.0.1", 0), 10, exclusive, False) as sock:
            assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE)) is exclusive
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            assert sock.get_inheritable() is False


def test_listening_on_ipv6_serves_ipv4_if_it_is_to() -> None:
    for dualstack in (True, False):
        with listen(socket.AF_INET6, ("::", 0, 0, 0), 10, True, dualstack) as sock:
            assert bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)) is not dualstack


def test_an_address_that_cannot_be_had_is_named_and_nothing_leaks() -> None:
    with listen(socket.AF_INET, ("127.0.0.1", 0), 10, True, False) as sock:
        address = sock.getsockname()
        before = handle_count()
        for _ in range(20):
            with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{address[1]}") as caught:
                listen(socket.AF_INET, address, 10, True, False)
            assert caught.value.winerror in (10048, 10013)
        assert handle_count() <= before + 5
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:80") as caught:
        listen(socket.AF_INET, ("192.0.2.1", 80), 10, True, False)
    assert caught.value.winerror == 10049


# -- codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (0xC000020D, 10054),
        (CANCELLED, 995),
        (0xC0000034, 2),  # OBJECT_NAME_NOT_FOUND: not in our table, ERROR_FILE_NOT_FOUND for the system
        (0xC0000034 - (1 << 32), 2),
        (0xC0000034 | (0xFFFFFFFF << 32), 2),
    ],
)
def test_a_status_becomes_a_code_of_ours_or_of_the_systems(status: int, code: int) -> None:
    assert error_code(status) == code


def test_a_send_has_its_handler_before_its_packet_can_come(table: Table) -> None:
    sock, _peer = table.pair()
    operation = table.proactor.take_send()
    operation.load(b"x")

    def handler(*_arguments: Any) -> None: ...

    code = sock.send(operation, handler)
    assert operation.handler is handler
    if code == PENDING:
        assert table.next() == (operation, 1, 0)
