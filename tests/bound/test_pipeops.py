"""_pipeops.py: names, instances, both ends of a pipe on the port, and who may open them."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from namedpipes import Plain, beside, new_name
from support import handle_count, wait_until

from iocp_ctypes import _pipeops, _win32, _win32files
from iocp_ctypes._flow import Piece
from iocp_ctypes._pipeops import PIPE_BUFFER, ListeningPipe, OverlappedPipe, PipeName, open_pipe
from iocp_ctypes._port import Batch, CompletionPort
from iocp_ctypes._proactor import COMPLETED, PENDING, Operation, Proactor
from iocp_ctypes._sockops import NOT_CONNECTED, AcceptOperation

PATIENCE_MS = 10_000
CANCELLED, BROKEN, DISCONNECTED = 0xC0000120, 0xC000014B, 0xC00000B0
ERROR_ACCESS_DENIED, ERROR_BROKEN_PIPE, ERROR_PIPE_BUSY, ERROR_NO_DATA = 5, 109, 231, 232
ERROR_PIPE_NOT_CONNECTED = 233


class Table:
    """A port with its pending table, and a name that listens on it."""

    def __init__(self) -> None:
        self.port = CompletionPort()
        self.proactor = Proactor()
        self.name = new_name()
        self.listening = ListeningPipe(PipeName(self.name, None, True), self.proactor, self.port)
        self.ends: list[OverlappedPipe] = []

    def accept(self) -> AcceptOperation:
        operation, code = self.listening.accept(lambda *_: None, 0, None)
        assert code == PENDING
        assert operation is not None
        return operation

    def open(self) -> OverlappedPipe:
        pipe, code = open_pipe(self.name, self.proactor, self.port)
        assert (code, pipe is not None) == (0, True)
        assert pipe is not None
        self.ends.append(pipe)
        return pipe

    def pair(self) -> tuple[OverlappedPipe, OverlappedPipe]:
        """The server's and the client's end of a pipe."""
        operation = self.accept()
        client = self.open()
        assert self.next() == (operation, 0, 0)
        server, first = self.listening.finish(operation, 0)
        assert first == b""
        self.ends.append(server)
        return server, client

    def next(self, milliseconds: int = PATIENCE_MS) -> tuple[Any, int, int]:
        ready: deque[tuple[Any, int]] = deque()
        assert self.port.reap(Batch(1), milliseconds, ready) == 1
        address, transferred = ready.popleft()
        operation = self.proactor.pending.pop(address)
        return operation, transferred, operation.Internal

    def nothing_comes(self) -> bool:
        return self.port.reap(Batch(1), 0, deque()) == 0

    def end(self) -> None:
        self.listening.cancel()
        self.listening.close()
        for pipe in self.ends:
            pipe.cancel()
        while self.proactor.pending:
            operation = self.next()[0]
            if isinstance(operation, AcceptOperation):
                operation.socket.close()
        for pipe in self.ends:
            pipe.close()
        assert self.nothing_comes()
        self.port.close()


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table()
    yield made
    made.end()


def send(table: Table, pipe: OverlappedPipe, data: bytes) -> None:
    """Send bytes that fit the pipe's buffer, and see them accepted."""
    operation = table.proactor.take_send()
    operation.load(data)
    if pipe.send(operation, lambda *_: None) == PENDING:
        assert table.next() == (operation, len(data), 0)
    else:
        assert operation.InternalHigh == len(data)


def receive(table: Table, pipe: OverlappedPipe, size: int = 100) -> bytes | int:
    """Receive what is there: bytes, or the code or status of what failed."""
    operation = Operation(size)
    code = pipe.receive(operation)
    if code == COMPLETED:
        del table.proactor.pending[operation.address]
        return bytes(operation.buffer[: operation.InternalHigh])
    if code != PENDING:
        return code
    done, transferred, status = table.next()
    assert done is operation
    return status or bytes(operation.buffer[:transferred])


# -- both ends ----------------------------------------------------------------------------------------------


def test_bytes_go_both_ways(table: Table) -> None:
    server, client = table.pair()
    for one, other in ((server, client), (client, server)):
        send(table, one, b"hello")
        send(table, one, b" you")
        assert receive(table, other) == b"hello you"
    assert server.peer_raw == client.peer_raw == (table.name, os.getpid())
    assert server.local_raw == client.local_raw == (table.name, os.getpid())
    assert server.connect_time() == NOT_CONNECTED


def test_a_receive_waits_for_bytes_and_one_of_no_bytes_for_the_first(table: Table) -> None:
    server, client = table.pair()
    for size in (0, 10):
        operation = Operation(size)
        assert server.receive(operation) == PENDING
        assert table.nothing_comes()
        send_operation = Operation()
        send_operation.load(b"abc")
        packets = {id(operation): (operation, size and 3, 0)}
        if client.send(send_operation, lambda *_: None) == PENDING:
            packets[id(send_operation)] = (send_operation, 3, 0)
        seen = [table.next() for _ in packets]
        assert {id(packet[0]): packet for packet in seen} == packets
        if not size:
            assert receive(table, server) == b"abc"
        else:
            assert operation.buffer[:3] == b"abc"


def test_a_send_above_the_buffer_waits_for_the_reader(table: Table) -> None:
    server, client = table.pair()
    data = os.urandom(5 * PIPE_BUFFER)
    operation = Operation()
    operation.load(data)
    assert server.send(operation, lambda *_: None) == PENDING
    got = b""
    while len(got) < len(data):
        receiving = Operation(PIPE_BUFFER)
        code = client.receive(receiving)
        if code == COMPLETED:
            del table.proactor.pending[receiving.address]
            got += receiving.buffer[: receiving.InternalHigh]
            continue
        assert code == PENDING
        while receiving.address in table.proactor.pending:
            done, transferred, status = table.next()
            assert status == 0
            if done is receiving:
                got += receiving.buffer[:transferred]
    if operation.address in table.proactor.pending:
        assert table.next() == (operation, len(data), 0)
    assert got == data


def test_a_part_of_an_object_is_sent_uncopied(table: Table) -> None:
    server, client = table.pair()
    operation = Operation()
    vector, count = operation.load_pieces([Piece(b"0123456789", 3, 7)])
    if server.send(operation, lambda *_: None, vector, count) == PENDING:
        table.next()
    assert receive(table, client) == b"3456"


def test_a_cancelled_receive_has_its_packet(table: Table) -> None:
    server, client = table.pair()
    operation = Operation(10)
    assert server.receive(operation) == PENDING
    server.cancel()
    assert table.next() == (operation, 0, CANCELLED)
    send(table, client, b"later")
    assert receive(table, server) == b"later"


@pytest.mark.parametrize("closes", ["server", "client"])
def test_what_was_sent_before_a_close_can_be_read_and_then_the_end(table: Table, closes: str) -> None:
    ends = dict(zip(("server", "client"), table.pair(), strict=True))
    closing = ends.pop(closes)
    (other,) = ends.values()
    send(table, closing, b"the last words")
    closing.close()
    closing.close()
    assert receive(table, other) == b"the last words"
    assert receive(table, other) == ERROR_BROKEN_PIPE
    operation = Operation()
    operation.load(b"too late")
    assert other.send(operation, lambda *_: None) == ERROR_NO_DATA
    assert not table.proactor.pending


def test_a_receive_in_flight_is_told_of_the_end(table: Table) -> None:
    server, client = table.pair()
    operation = Operation(10)
    assert server.receive(operation) == PENDING
    client.close()
    assert table.next() == (operation, 0, BROKEN)


def test_a_servers_reset_takes_back_what_was_not_read(table: Table) -> None:
    server, client = table.pair()
    send(table, server, b"never mind")
    server.reset_on_close()
    server.close()
    assert receive(table, client) == ERROR_PIPE_NOT_CONNECTED


def test_a_client_cannot_reset(table: Table) -> None:
    server, client = table.pair()
    send(table, client, b"read this")
    client.reset_on_close()
    client.close()
    assert receive(table, server) == b"read this"
    assert receive(table, server) == ERROR_BROKEN_PIPE


def test_options_of_sockets_mean_nothing(table: Table) -> None:
    server, _client = table.pair()
    server.set_nodelay(True)
    server.set_keepalive((1, 1))
    server.associate(table.port)
    server.shutdown_send()
    assert (server.half_closes, server.detachable, server.transmits) == (False, False, False)
    assert server.gather_max == 1


# -- listening ----------------------------------------------------------------------------------------------


def test_a_client_before_connectnamedpipe_is_served(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = _win32files.ConnectNamedPipe
    clients: list[Any] = []

    def late(handle: int, address: int) -> Any:
        clients.append(Plain(table.name))
        return connect(handle, address)

    monkeypatch.setattr(_win32files, "ConnectNamedPipe", late)
    operation = table.accept()
    assert table.next() == (operation, 0, 0)
    server, _first = table.listening.finish(operation, 0)
    table.ends.append(server)
    clients[0].write(b"early")
    assert receive(table, server) == b"early"
    clients[0].close()


def test_a_client_that_came_wrote_and_left_before_is_read(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = _win32files.ConnectNamedPipe

    def late(handle: int, address: int) -> Any:
        with Plain(table.name) as client:
            client.write(b"was here")
        return connect(handle, address)

    monkeypatch.setattr(_win32files, "ConnectNamedPipe", late)
    operation = table.accept()
    assert table.next() == (operation, 0, 0)
    server, _first = table.listening.finish(operation, 0)
    table.ends.append(server)
    assert receive(table, server) == b"was here"
    assert receive(table, server) == ERROR_BROKEN_PIPE


def test_without_an_instance_that_waits_a_client_finds_the_pipe_busy(table: Table) -> None:
    assert open_pipe(table.name, table.proactor, table.port) == (None, ERROR_PIPE_BUSY)
    operation = table.accept()
    table.listening.cancel()
    assert table.next() == (operation, 0, CANCELLED)
    operation.socket.close()
    assert open_pipe(table.name, table.proactor, table.port) == (None, ERROR_PIPE_BUSY)
    table.pair()
    assert open_pipe(table.name, table.proactor, table.port) == (None, ERROR_PIPE_BUSY)


def test_when_it_is_closed_the_name_is_gone(table: Table) -> None:
    table.listening.close()
    table.listening.close()
    pipe, code = open_pipe(table.name, table.proactor, table.port)
    assert (pipe, code) == (None, 2)
    assert table.listening.accept(lambda *_: None, 0, None)[0] is None


def test_several_wait_and_each_client_gets_one(table: Table) -> None:
    operations = [table.accept() for _ in range(5)]
    clients = [table.open() for _ in range(5)]
    seen = {id(table.next()[0]) for _ in operations}
    assert seen == {id(operation) for operation in operations}
    for operation in operations:
        table.ends.append(table.listening.finish(operation, 0)[0])
    assert len({id(client) for client in clients}) == 5


@pytest.mark.parametrize("function", ["CreateNamedPipeW", "ConnectNamedPipe"])
def test_what_cannot_be_made_is_told(table: Table, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fails(*_: Any) -> int:
        ctypes.set_last_error(1450)
        return _win32.INVALID_HANDLE_VALUE if function == "CreateNamedPipeW" else 0

    before = handle_count()
    monkeypatch.setattr(_win32files, function, fails)
    for _ in range(10):
        assert table.listening.accept(lambda *_: None, 0, None) == (None, 1450)
    assert handle_count() <= before + 2
    assert not table.proactor.pending


def test_a_port_that_is_closed_is_told(table: Table) -> None:
    port = CompletionPort()
    port.close()
    closed = ListeningPipe(PipeName(new_name(), None, True), table.proactor, port)
    assert closed.accept(lambda *_: None, 0, None) == (None, 10038)
    closed.close()
    operation = table.accept()
    assert open_pipe(table.name, table.proactor, port) == (None, 10038)
    wait_until(lambda: table.next()[0] is operation)
    operation.socket.close()


# -- names and who may open them ----------------------------------------------------------------------------


@pytest.mark.wine_differs("first-pipe-instance")
def test_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    create, calls = _win32files.CreateNamedPipeW, []

    def spy(*arguments: Any) -> int:
        calls.append(arguments)
        return int(create(*arguments))

    monkeypatch.setattr(_win32files, "CreateNamedPipeW", spy)
    name = new_name()
    first = PipeName(name, None, True)
    assert calls[0][0] == name
    assert calls[0][1] == 3 | _win32files.FILE_FLAG_OVERLAPPED | _win32files.FILE_FLAG_FIRST_PIPE_INSTANCE
    if not _win32.is_wine():
        with pytest.raises(PermissionError, match="the name is taken"):
            PipeName(name, None, True)
    _win32.CloseHandle(first.instance())
    assert not calls[-1][1] & _win32files.FILE_FLAG_FIRST_PIPE_INSTANCE
    first.close()
    first.close()

    def denied(*_: Any) -> int:
        ctypes.set_last_error(ERROR_ACCESS_DENIED)
        return _win32.INVALID_HANDLE_VALUE

    monkeypatch.setattr(_win32files, "CreateNamedPipeW", denied)
    with pytest.raises(PermissionError, match=r"cannot listen on .*; the name is taken"):
        PipeName(name, None, True)


@pytest.mark.parametrize(("reject", "mode"), [(True, 8), (False, 0)])
def test_remote_clients_are_refused_unless_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, reject: bool, mode: int
) -> None:
    create, modes = _win32files.CreateNamedPipeW, []

    def spy(*arguments: Any) -> int:
        modes.append(arguments[2])
        return int(create(*arguments))

    monkeypatch.setattr(_win32files, "CreateNamedPipeW", spy)
    PipeName(new_name(), None, reject).close()
    assert modes == [mode]


def test_only_the_user_who_serves_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    convert, texts = _win32files.ConvertStringSecurityDescriptorToSecurityDescriptorW, []

    def spy(text: str, *arguments: Any) -> Any:
        texts.append(text)
        return convert(text, *arguments)

    monkeypatch.setattr(_win32files, "ConvertStringSecurityDescriptorToSecurityDescriptorW", spy)
    PipeName(new_name(), None, True).close()
    PipeName(new_name(), "D:(A;;GA;;;WD)", True).close()
    sid = _pipeops._own_sid()
    assert sid.startswith("S-1-5-")
    assert texts == [f"D:P(A;;GA;;;{sid})", "D:(A;;GA;;;WD)"]


@pytest.mark.wine_differs("pipe-descriptor")
def test_the_descriptor_is_that_of_every_instance(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    create, seen = _win32files.CreateNamedPipeW, []

    def spy(*arguments: Any) -> int:
        attributes = _win32files.SECURITY_ATTRIBUTES.from_address(arguments[7])
        seen.append((attributes.nLength, attributes.lpSecurityDescriptor, attributes.bInheritHandle))
        return int(create(*arguments))

    monkeypatch.setattr(_win32files, "CreateNamedPipeW", spy)
    nobody = PipeName(new_name(), "D:P", True)  # an access list without anybody in it
    handle = nobody.instance()
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0][0] == ctypes.sizeof(_win32files.SECURITY_ATTRIBUTES)
    assert seen[0][1]
    assert not seen[0][2]
    if _win32.is_wine():
        _win32.CloseHandle(handle)
    else:
        assert handle == _win32.INVALID_HANDLE_VALUE
        assert ctypes.get_last_error() == ERROR_ACCESS_DENIED
        assert open_pipe(nobody.name, table.proactor, table.port) == (None, ERROR_ACCESS_DENIED)
    nobody.close()


def test_a_wrong_descriptor_is_a_value_error() -> None:
    before = handle_count()
    for _ in range(5):
        with pytest.raises(ValueError, match=r"pipe_security=.* is not a security descriptor"):
            PipeName(new_name(), "D:(A;;GA;;;NOBODY AT ALL)", True)
    assert handle_count() <= before + 2


def test_a_client_lets_a_server_know_it_and_not_act_for_it(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, calls = _win32files.CreateFileW, []

    def spy(*arguments: Any) -> int:
        calls.append(arguments)
        return int(create(*arguments))

    monkeypatch.setattr(_win32files, "CreateFileW", spy)
    table.pair()
    assert calls[-1][5] == 0x40000000 | 0x00100000 | 0x00010000


def test_handles_do_not_pile_up(table: Table) -> None:
    def once() -> None:
        server, client = table.pair()
        server.close()
        client.close()
        table.ends.clear()

    once()
    before = handle_count()
    for _ in range(30):
        once()
    assert handle_count() <= before + 3


def test_waiting_on_another_thread_is_no_hindrance(table: Table) -> None:
    operation = table.accept()
    thread = beside(lambda: Plain(table.name).close())
    assert table.next() == (operation, 0, 0)
    thread.join()
    table.ends.append(table.listening.finish(operation, 0)[0])
