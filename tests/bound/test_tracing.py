"""The trace of what runs: off there is nothing in the way, on it says what happened."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import AtOnce, Before, Fail, FakeEngine, FakeSocket, Hold
from perfetto import read_trace
from support import LOOPBACK, OWN_HOST, Echo, Recorder, echoes, made, raw, rst, serving, wait_until

from iocp_ctypes import Connection, Datagram, Engine, Server, TraceRecord, connect, open_stream
from iocp_ctypes._proactor import COMPLETED, PENDING, Operation
from iocp_ctypes._sockops import ListeningSocket, OverlappedSocket
from iocp_ctypes._trace import Ring
from iocp_ctypes._tracing import Trace, TracedListener, TracedSocket, rings_of, traced

WSAENOBUFS = 10055


def steps(records: list[TraceRecord], *, of: int | None = None) -> list[tuple[str, str]]:
    """(operation, step) of records, in their order; of one connection."""
    return [(record.operation, record.step) for record in records if of is None or record.connection == of]


def consistent(records: list[TraceRecord]) -> None:
    """Assert what holds for every trace of which nothing was pushed out."""
    assert records == sorted(records, key=lambda record: record.time_ns)
    submits = {record.number: record for record in records if record.step == "submit"}
    retires = {record.number: record for record in records if record.step == "retire"}
    assert len(submits) + len(retires) == sum(record.step != "call" for record in records), "a number twice"
    for number, retire in retires.items():
        submit = submits[number]
        assert (submit.operation, submit.connection) == (retire.operation, retire.connection)
        assert submit.time_ns <= retire.time_ns
        assert submit.status in (0, PENDING)
    for record in records:
        assert record.duration_ns >= 0
        assert record.thread
        assert record.thread_name
        assert record.bytes >= 0
        for in_use in (record.backlog, record.sendcap, record.recvburst, record.queued):
            assert in_use is None or in_use >= 0, record


def complete(scope: Any, *retired: str) -> list[TraceRecord]:
    """Wait until the records of what has happened are there, for a step is recorded after it had its effect.

    Every retirement has its submit then, and every submit of the operations `retired` its retirement.
    """

    def look() -> list[TraceRecord] | None:
        records: list[TraceRecord] = scope.trace_records()
        submits = {record.number for record in records if record.step == "submit"}
        retires = {record.number for record in records if record.step == "retire"}
        due = {
            record.number
            for record in records
            if record.step == "submit"
            and record.operation in retired
            and (record.status == PENDING or record.operation == "receive")
        }
        return records if retires <= submits and due <= retires else None

    found: list[TraceRecord] = wait_until(look, what="complete records")
    return found


def waiting(connection: Any) -> None:
    """Wait until a connection has posted its next receive."""
    wait_until(lambda: connection.stats().recvburst.in_use == 1)


# -- off ----------------------------------------------------------------------------------------------------


def test_off_there_is_nothing_in_front_of_the_socket() -> None:
    with serving(Echo) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        assert type(connection._socket) is OverlappedSocket
        assert type(server._acceptor._pools[0].listening) is ListeningSocket
        assert server.trace == connection.trace == server.engine.trace == 0
        assert server.trace_records() == connection.trace_records() == server.engine.trace_records() == []


def test_switched_off_again_there_is_nothing_either() -> None:
    with serving(Echo, trace=100) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        assert type(connection._socket) is TracedSocket
        assert type(server._acceptor._pools[0].listening) is TracedListener
        server.trace = 0
        assert type(connection._socket) is OverlappedSocket
        assert type(server._acceptor._pools[0].listening) is ListeningSocket
        for _ in range(3):  # the receive that was in flight brings its handler back
            echoes(client)
        assert connection._operation.handler == connection._received
        wait_until(lambda: ("accept", "retire") in steps(server.trace_records()))
        kept = complete(server, "receive", "send")
        assert ("receive", "retire") in steps(kept)
        echoes(client)
        assert server.trace_records() == kept, "what was recorded stays, and nothing is added"


# -- what is recorded ---------------------------------------------------------------------------------------


def test_a_server_records_the_life_of_its_connections() -> None:
    with serving(Echo, trace=1000, recv_mode="flow", recv_size=4096, backlog=3) as server:
        with raw(server.address) as client:
            echoes(client, b"12345")
            echoes(client, b"1234567")
        (connection,) = made(Echo)
        assert connection.wait_closed(5)
    records = server.trace_records()
    consistent(records)
    mine = [record for record in records if record.connection == connection.id]
    received = [record for record in mine if (record.operation, record.step) == ("receive", "retire")]
    assert [record.bytes for record in received] == [5, 7, 0]
    assert all(record.status == 0 for record in received)
    assert {record.bytes for record in mine if record.operation == "receive" and record.step == "submit"} == {
        4096
    }
    sent = [record for record in mine if (record.operation, record.step) == ("send", "submit")]
    assert [record.bytes for record in sent] == [5, 7]
    assert steps(mine)[-1] == ("close", "call")
    assert mine[-1].sendcap == mine[-1].recvburst == mine[-1].queued == 0
    accepts = [record for record in records if record.operation == "accept"]
    assert len({record.connection for record in accepts}) == 1
    assert accepts[0].connection < 0
    assert [record.backlog for record in accepts][:3] == [1, 2, 3]
    done = [record for record in accepts if record.step == "retire" and not record.status]
    assert len(done) == 1
    assert done[0].thread_name.startswith("iocp_ctypes I/O")
    # The last to end, which need not be the last to begin: several threads retire them.
    left = [record.backlog for record in accepts if record.step == "retire" and record.status]
    assert 0 in left, "all are cancelled at the end"


def test_what_fails_is_recorded_with_its_status() -> None:
    with serving(Recorder, trace=100, recv_mode="flow") as server:
        client = raw(server.address)
        (connection,) = made(Recorder)
        connection.until("connect")
        waiting(connection)
        connection.abort()
        assert connection.wait_closed(5)
        rst(client)
        operations = [record for record in complete(connection, "receive") if record.operation == "receive"]
        assert [record.step for record in operations] == ["submit", "retire"]
        assert operations[0].status == PENDING
        assert operations[1].status >= 0x80000000, "cancelled"
        assert [name for name, step in steps(connection.trace_records()) if step == "call"] == [
            "cancel",
            "close",
        ]


def test_a_ring_keeps_the_newest() -> None:
    with serving(Echo, trace=50) as server, raw(server.address) as client:
        for number in range(100):
            echoes(client, bytes(number + 1))

        def sent() -> list[int]:
            return [record.bytes for record in server.trace_records() if record.operation == "send"]

        wait_until(lambda: sent()[-1] == 100)  # the client may be ahead of the record
        assert len(server.trace_records()) == 50
        sizes = sent()
        assert sizes == list(range(101 - len(sizes), 101))


def test_callbacks_on_a_work_thread_have_a_track_of_their_own() -> None:
    with serving(Echo, trace=1000, work_threads=1) as server, raw(server.address) as client:
        echoes(client)
        wait_until(lambda: ("send", "submit") in steps(server.trace_records()))
        by_thread = {record.thread_name for record in server.trace_records() if record.operation == "send"}
        assert by_thread == {"iocp_ctypes work 1"}


def test_a_connection_alone() -> None:
    class Chosen(Echo):
        def connected(self) -> None:
            if len(self.made) == 2:
                self.trace = 1000

    with serving(Chosen) as server, raw(server.address) as one:
        echoes(one)
        with raw(server.address) as two:
            echoes(two)
            echoes(one)
        first, second = made(Chosen, 2)
        assert second.wait_closed(5)
        assert server.trace_records() == first.trace_records() == []
        records = complete(second)
        consistent(records)
        assert {record.connection for record in records} == {second.id}
        assert ("send", "submit") in steps(records)


def test_a_connection_finds_itself_in_its_servers_trace_and_in_the_engines() -> None:
    engine = Engine(1, trace=1000)
    with serving(Echo, engine=engine) as server, raw(server.address) as one, raw(server.address) as two:
        echoes(one)
        echoes(two)
        for connection in made(Echo, 2):
            waiting(connection)
            complete(engine, "send")
            wait_until(
                lambda connection=connection: (
                    steps(connection.trace_records()) == steps(engine.trace_records(), of=connection.id) != []
                )
            )
        server.trace = 500
        before = len(engine.trace_records())
        echoes(one)
        wait_until(lambda: len(engine.trace_records()) > before, what="the engine's goes on")
        for connection in made(Echo, 2):
            waiting(connection)
            wait_until(
                lambda connection=connection: (
                    steps(connection.trace_records()) == steps(server.trace_records(), of=connection.id)
                )
            )
        made(Echo, 2)[0].trace = 5
        assert made(Echo, 2)[0].trace_records() == []
        assert engine.trace == 1000


def test_an_engine_records_servers_clients_and_datagrams(tmp_path: Path) -> None:
    class Answer(Datagram):
        def on_datagram(self, data: bytes, address: Any) -> None:
            self.send_to(data, address)

    engine = Engine(2, trace=10_000)
    with serving(Echo, engine=engine) as one, serving(Recorder, engine=engine) as two:
        with open_stream(one.address, 5, engine=engine) as stream:
            stream.write(b"hello")
            assert stream.readexactly(5) == b"hello"
        with raw(two.address) as client:
            client.sendall(b"x")
            wait_until(lambda: made(Recorder)[0].received == b"x")
        with Answer(LOOPBACK, engine=engine) as answer, datagram_client() as plain:
            plain.sendto(b"datagram", answer.address)
            assert plain.recv(100) == b"datagram"
    records = engine.trace_records()
    consistent(records)
    assert {"accept", "connect", "receive", "send", "close"} <= {record.operation for record in records}
    connected = [record for record in records if record.operation == "connect"]
    assert [record.step for record in connected] == ["submit", "retire"]
    others = {record.connection for record in records if record.connection < 0}
    assert len(others) == 3, "two listeners and the datagram socket"
    datagrams = [record for record in records if record.connection < 0 and record.operation == "receive"]
    assert 8 in {record.bytes for record in datagrams if record.step == "retire"}
    assert 8 in {record.bytes for record in records if record.connection < 0 and record.operation == "send"}
    assert engine.write_trace(tmp_path / "engine.json") == len(records)
    assert read_trace(tmp_path / "engine.json").arrows == sum(record.step == "retire" for record in records)


def test_a_traced_datagram_can_do_what_another_can() -> None:
    with Datagram(LOOPBACK, engine=Engine(trace=100)) as traced_one, datagram_client() as plain:
        traced_one.join("239.255.77.2")
        traced_one.leave("239.255.77.2")
        traced_one.ttl = 5
        traced_one.broadcast = True
        assert (traced_one.ttl, traced_one.broadcast, traced_one.multicast_loop) == (5, True, True)
        assert traced_one.multicast_interface == "0.0.0.0"
        traced_one.connect(plain.getsockname())
        assert traced_one.send_to(b"x")
        assert plain.recv(100) == b"x"


@contextlib.contextmanager
def datagram_client() -> Iterator[Any]:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(LOOPBACK)
        sock.settimeout(10)
        yield sock


def test_a_client_records_itself_from_the_connecting_on() -> None:
    with serving(Echo) as server:
        connection = connect(server.address, Recorder, trace=1000)
        connection.send(b"hello")
        wait_until(lambda: connection.received == b"hello")
        connection.close()
        assert connection.wait_closed(5)
        records = complete(connection, "connect")
        consistent(records)
        assert steps(records)[:2] == [("connect", "submit"), ("connect", "retire")]
        assert {record.connection for record in records} == {connection.id}
        assert steps(records)[-1] == ("close", "call")
        assert server.trace_records() == []


def test_a_refused_connect_is_recorded_too() -> None:
    with Server((OWN_HOST, 0), Echo, io_threads=1) as server:
        nobody = server.address
    connection = connect(nobody, Recorder, trace=10)
    assert connection.wait_closed(10)
    records = [record for record in complete(connection, "connect") if record.operation == "connect"]
    assert [record.step for record in records] == ["submit", "retire"]
    assert records[1].status


# -- switching while it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["engine", "server", "connection"])
def test_switching_while_data_flows_loses_nothing(scope: str, io_threads: int) -> None:
    rounds = 60
    failed: list[BaseException] = []

    def talk(client: Any) -> None:
        try:
            number = 0
            while number < rounds or switches < 3:
                echoes(client, (number % 60_000).to_bytes(2, "big") * 50)
                number += 1
        except BaseException as exc:
            failed.append(exc)

    engine = Engine(io_threads)
    with serving(Echo, engine=engine) as server:
        clients = [raw(server.address) for _ in range(4)]
        switched = {"engine": [engine], "server": [server], "connection": made(Echo, 4)}[scope]
        for connection in made(Echo, 4):
            connection.until("connect")
        switches = 0
        threads = [threading.Thread(target=talk, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for one in switched:
                one.trace = 0 if switches % 2 else 100
            switches += 1
            time.sleep(0.001)  # or whoever else needs the GIL waits for it
        for thread in threads:
            thread.join()
        assert not failed, failed
        assert switches > 2
        for one in switched:
            one.trace = 0
        for client in clients:
            echoes(client)
            client.close()
    for connection in made(Echo, 4):
        connection.check()
        assert type(connection._socket) is OverlappedSocket


def test_what_was_in_flight_when_it_was_switched_off_has_its_retirement() -> None:
    with serving(Echo, recv_mode="flow") as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        waiting(connection)
        connection.trace = 100
        echoes(client)  # by the receive posted before; the next one is recorded
        wait_until(lambda: steps(connection.trace_records())[-1:] == [("receive", "submit")])
        connection.trace = 0
        echoes(client)
        wait_until(lambda: steps(connection.trace_records())[-1] == ("receive", "retire"))
        consistent(complete(connection))


@pytest.mark.parametrize("wrong", [-1, 1_000_001, "5", True, None, 2.0])
def test_a_wrong_size_is_refused_and_changes_nothing(wrong: Any) -> None:
    with serving(Echo, trace=7) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        connection.trace = 8
        for scope, size in ((server, 7), (connection, 8), (server.engine, 0)):
            with pytest.raises((ValueError, TypeError), match=f"trace={wrong!r}: must be a whole number"):
                scope.trace = wrong
            assert scope.trace == size
        for make in (lambda: Engine(1, trace=wrong), lambda: connect(server.address, Echo, trace=wrong)):
            with pytest.raises((ValueError, TypeError), match=f"trace={wrong!r}"):
                make()


def test_before_the_start_and_after_the_end() -> None:
    server = Server(LOOPBACK, Echo, io_threads=1)
    assert server.trace_records() == []
    server.trace = 100
    with server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
    assert server.trace_records()
    server.trace = 200
    connection.trace = 10
    assert server.trace_records() == connection.trace_records() == []
    assert type(connection._socket) is OverlappedSocket


# -- the file -----------------------------------------------------------------------------------------------


def test_the_file_of_a_server(tmp_path: Path) -> None:
    with serving(Echo, trace=10_000, backlog=5) as server:
        clients = [raw(server.address) for _ in range(3)]
        for client in clients:
            for _ in range(10):
                echoes(client)
        for client in clients:
            client.close()
        wait_until(lambda: not server.stats().connections)
        complete(server, "receive", "send")
        wait_until(lambda: steps(server.trace_records()).count(("accept", "retire")) == 3)
        written = server.write_trace(tmp_path / "server.json")
    found = read_trace(tmp_path / "server.json")
    assert len(found.slices) == written
    assert found.names["retire receive"] >= 33
    assert found.names["send"] == 30
    assert found.names["close"] == 3
    assert found.arrows >= 33 + 3
    assert any(name.startswith("iocp_ctypes I/O ") for name in found.threads.values())
    assert max(found.counters["backlog in use"]) == 5
    assert 1 <= max(found.counters["recvburst in use"]) <= 3
    for name in ("recvburst in use", "sendcap in use", "queue bytes"):
        assert min(found.counters[name][-3:]) == 0, (
            "two threads may end a step in another order than they read"
        )


def test_the_file_shows_what_is_queued(tmp_path: Path) -> None:
    class Floods(Recorder):
        def connected(self) -> None:
            self.send(bytes(12_000_000))

    with serving(Floods, trace=10_000, sendcap=3) as server, raw(server.address) as client:
        (connection,) = made(Floods)
        connection.until("connect")
        wait_until(lambda: connection.sendcap.in_use == 3)
        left = 12_000_000
        while left:
            left -= len(client.recv(1 << 16))
        wait_until(lambda: not connection.write_buffer_size)
        consistent(complete(connection, "send"))
        connection.write_trace(tmp_path / "flood.json")
    found = read_trace(tmp_path / "flood.json")
    assert max(found.counters["sendcap in use"]) == 3
    assert max(found.counters["queue bytes"]) > 3_000_000
    for name in ("sendcap in use", "queue bytes"):
        assert min(found.counters[name][-3:]) == 0
    assert found.names["retire send"] >= 1


def test_writing_while_traffic_flows(tmp_path: Path, io_threads: int) -> None:
    over = threading.Event()
    failed: list[BaseException] = []

    def talk() -> None:
        try:
            while not over.is_set():
                with raw(server.address) as client:
                    for _ in range(20):
                        echoes(client, bytes(100))
        except BaseException as exc:
            failed.append(exc)

    with serving(Echo, trace=500, io_threads=io_threads) as server:
        threads = [threading.Thread(target=talk) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(server.trace_records()) == 500)
            for number in range(20):
                file = tmp_path / f"{number}.json"
                assert server.write_trace(file) == 500
                found = read_trace(file)
                assert len(found.slices) == 500
                assert found.arrows
        finally:
            over.set()
            for thread in threads:
                thread.join()
    assert not failed, failed


# -- what it leaves -----------------------------------------------------------------------------------------


def without_collector(freed: Any) -> bool:
    """Whether it is freed. Without a GIL the collector may be needed for what another thread let go last."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        gc.collect()
    return bool(freed())


def test_traced_connections_leave_nothing() -> None:
    living: weakref.WeakSet[Any] = weakref.WeakSet()

    class Ephemeral(Connection):
        def __init__(self, server: Any, peer_address: Any) -> None:
            living.add(self)

        def on_data(self, data: bytes) -> None:
            self.send(data)
            if data == b"abort":
                self.abort()

    with serving(Ephemeral, trace=1000) as server:
        gc.collect()
        gc.disable()
        try:
            for end in (b"abort", b"x"):
                clients = [raw(server.address) for _ in range(10)]
                for client in clients:
                    client.sendall(end)
                for client in clients:
                    client.recv(5) if end == b"x" else None
                    client.close()
                wait_until(lambda: without_collector(lambda: not living), what="all are freed")
            connection: Any = connect(server.address, lambda _server, _address: Recorder(), trace=10)
            dead = weakref.ref(connection)
            connection.send(b"x")
            wait_until(lambda: dead().received == b"x")
            connection.abort()
            assert connection.wait_closed(5)
            Recorder.made.clear()
            connection = None
            wait_until(lambda: without_collector(lambda: dead() is None), what="a client is, too")
        finally:
            gc.enable()


# -- the stand-in alone -------------------------------------------------------------------------------------


class Rig:
    """A stand-in before a fake socket."""

    def __init__(self, skips: bool = True) -> None:
        self.engine = FakeEngine()
        self.sock = FakeSocket(self.engine, skips)
        self.trace = Trace(100)
        self.stand_in = traced(TracedSocket, self.sock, rings_of(self.trace), 5, lambda: (None, 2, 1, 30))
        self.handled: list[tuple[Any, int, int]] = []

    def handler(self, operation: Operation, transferred: int, status: int) -> None:
        assert operation.handler == self.handler or operation.size == 0
        self.handled.append((operation, transferred, status))

    def receive(self) -> tuple[Operation, int]:
        operation = Operation(64)
        operation.handler = self.handler
        return operation, self.stand_in.receive(operation)


def test_a_receive_that_fails_has_its_handler_back() -> None:
    rig = Rig()
    rig.sock.plan(receives=[Fail(WSAENOBUFS)])
    operation, code = rig.receive()
    assert code == WSAENOBUFS
    assert operation.handler == rig.handler
    (record,) = rig.trace.records()
    assert (record.operation, record.step, record.status, record.bytes) == ("receive", "submit", code, 64)
    assert (record.sendcap, record.recvburst, record.queued, record.backlog) == (2, 1, 30, None)


@pytest.mark.parametrize("behaviour", [AtOnce(), Hold(), Before()], ids=repr)
def test_a_receive_is_retired_once_by_its_own_handler(behaviour: Any) -> None:
    rig = Rig()
    rig.sock.plan(receives=[behaviour])
    rig.sock.incoming.append(b"abc")
    operation, code = rig.receive()
    if code == COMPLETED:
        rig.engine.dispatcher.completed(operation.address, 3)
    for thread in rig.sock.threads:
        thread.join()
    rig.engine.dispatcher.run()
    assert rig.handled == [(operation, 3, 0)]
    assert operation.handler == rig.handler
    consistent(rig.trace.records())
    assert sorted(steps(rig.trace.records())) == [("receive", "retire"), ("receive", "submit")]


@pytest.mark.parametrize(
    ("behaviour", "code", "size", "sends"),
    [
        (AtOnce(), COMPLETED, 5, 2),
        (AtOnce(2), COMPLETED, 2, 2),
        (Hold(), PENDING, 5, 3),
        (Fail(10054), 10054, 5, 2),
    ],
    ids=repr,
)
def test_a_send_says_what_became_of_it(behaviour: Any, code: int, size: int, sends: int) -> None:
    rig = Rig()
    rig.sock.plan(sends=[behaviour])
    operation = Operation()
    operation.load(b"hello")
    assert rig.stand_in.send(operation, rig.handler) == code
    (record,) = rig.trace.records()
    assert (record.status, record.bytes, record.sendcap) == (code, size, sends)
    rig.sock.finish_cancel()
    rig.engine.dispatcher.run()
    assert len(rig.handled) == (code == PENDING)


def test_a_handler_that_raises_is_recorded_and_still_raises() -> None:
    rig = Rig()

    def broken(_operation: Operation, _transferred: int, _status: int) -> None:
        raise ZeroDivisionError

    operation = Operation(64)
    operation.handler = broken
    rig.stand_in.receive(operation)
    rig.sock.receives.clear()
    rig.engine.proactor.pending.clear()
    with pytest.raises(ZeroDivisionError):
        operation.handler(operation, 1, 0)
    assert steps(rig.trace.records()) == [("receive", "submit"), ("receive", "retire")]


def test_a_stand_in_is_its_socket_in_all_else() -> None:
    rig = Rig()
    assert rig.stand_in.family == rig.sock.family
    assert rig.stand_in.sends_at_once == 0
    rig.stand_in.set_nodelay(True)
    rig.stand_in.shutdown_send()
    rig.stand_in.cancel()
    rig.stand_in.close()
    assert rig.sock.calls == ["nodelay True", "shutdown_send", "cancel", "close"]
    assert steps(rig.trace.records()) == [("shutdown", "call"), ("cancel", "call"), ("close", "call")]
    with pytest.raises(AttributeError):
        rig.stand_in.no_such_thing  # noqa: B018


def test_the_cancel_of_one_receive_is_recorded_as_well() -> None:
    rig = Rig()
    operation, _code = rig.receive()
    rig.stand_in.cancel_receive(operation)
    assert rig.sock.calls == ["cancel_receive"]
    assert steps(rig.trace.records()) == [("receive", "submit"), ("cancel", "call")]
    rig.sock.finish_cancel()
    rig.engine.dispatcher.run()
    assert [given for given, _transferred, _status in rig.handled] == [operation]
    assert steps(rig.trace.records())[-1] == ("receive", "retire")


def test_standing_in_twice_is_once() -> None:
    rig = Rig()
    again = traced(TracedSocket, rig.stand_in, rings_of(rig.trace), 5, rig.stand_in._knobs)
    assert again.inner is rig.sock
    assert traced(TracedSocket, again, (), 5, rig.stand_in._knobs) is rig.sock
    assert traced(TracedSocket, rig.sock, (), 5, rig.stand_in._knobs) is rig.sock


def test_a_record_goes_to_all_who_want_it() -> None:
    one, two, off = Trace(5), Trace(1), Trace()
    assert off.size == 0
    assert not off.was_on
    rings = rings_of(one, None, off, two)
    assert [type(ring) for ring in rings] == [Ring, Ring]
    rig = Rig()
    stand_in = traced(TracedSocket, rig.sock, rings, 9, rig.stand_in._knobs)
    stand_in.cancel()
    stand_in.close()
    assert [record.operation for record in one.records()] == ["cancel", "close"]
    assert [record.operation for record in two.records()] == ["close"]


def test_times_are_those_of_the_fine_clock() -> None:
    # time.monotonic() ticks every 15.6 ms before Python 3.13: a whole exchange would have one time.
    before = time.perf_counter_ns()
    rig = Rig()
    rig.stand_in.close()
    (record,) = rig.trace.records()
    assert before <= record.time_ns <= record.time_ns + record.duration_ns <= time.perf_counter_ns()
