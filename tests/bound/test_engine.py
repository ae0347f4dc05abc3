"""engine.py: who shares an engine, when it starts and stops, and what it counts."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import LOOPBACK, PATIENCE, Echo, Recorder, raw, reachable, serve_beside, serving, wait_until
from traffic import beside

from iocp_ctypes import Engine, Server, _dispatcher, connect
from iocp_ctypes import engine as engine_module
from iocp_ctypes._port import CompletionPort
from iocp_ctypes._proactor import Operation
from iocp_ctypes.engine import default_io_threads, enter_engine


def nothing() -> None:
    """An action at exit."""


def threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("iocp_ctypes"))


# -- its size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gil", "expected"), [(True, 1), (False, 7), (None, 1)])
def test_one_thread_under_a_gil_and_one_per_processor_without(
    monkeypatch: pytest.MonkeyPatch, gil: bool | None, expected: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    if gil is None:
        monkeypatch.delattr(sys, "_is_gil_enabled", raising=False)
    else:
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: gil, raising=False)
    assert default_io_threads() == expected


@pytest.mark.parametrize("processors", [None, 1])
def test_there_is_at_least_one_thread(monkeypatch: pytest.MonkeyPatch, processors: int | None) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert default_io_threads() == 1


@pytest.mark.parametrize(
    ("wrong", "exception"), [(-1, ValueError), (257, ValueError), ("4", TypeError), (True, TypeError)]
)
def test_a_wrong_number_is_refused(wrong: Any, exception: type[Exception]) -> None:
    with pytest.raises(exception, match=f"io_threads={wrong!r}: must be a whole number from 0 to 256"):
        Engine(wrong)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_it_has_as_many_threads_as_were_asked_for(count: int) -> None:
    engine = Engine(count)
    assert threads() == []
    engine.enter(engine, nothing)
    assert engine.stats().io_threads == count
    assert threads() == [
        *(f"iocp_ctypes I/O {number + 1}" for number in range(count)),
        "iocp_ctypes watchdog",
    ]
    assert engine.leave(engine, 6 * PATIENCE) is True
    assert threads() == []
    assert engine.stats().io_threads == 0


# -- its users ----------------------------------------------------------------------------------------------


def test_it_starts_with_the_first_user_and_stops_with_the_last() -> None:
    engine = Engine(1)
    one, two = object(), object()
    engine.enter(one, nothing)
    engine.enter(two, nothing)
    running = threads()
    assert engine.leave(one, 6 * PATIENCE) is True
    assert engine.leave(one, 6 * PATIENCE) is True  # it has left before
    assert engine.leave(object(), 6 * PATIENCE) is True  # it never was in
    assert threads() == running
    assert engine.running
    assert engine.leave(two, 6 * PATIENCE) is True
    assert threads() == []
    assert not engine.running
    with pytest.raises(RuntimeError, match="stopped: make another"):
        engine.enter(one, nothing)


def test_servers_may_share_a_given_engine() -> None:
    engine = Engine(2)
    with serving(Echo, engine=engine) as one:
        with serving(Echo, engine=engine) as two:
            assert one.engine is two.engine is engine
            reachable(one.address)
            reachable(two.address)
        reachable(one.address)
        assert engine.running
    assert not engine.running


def test_a_server_on_a_stopped_engine_says_so_and_can_be_stopped() -> None:
    engine = Engine(1)
    with serving(Echo, engine=engine):
        pass
    server = Server(LOOPBACK, Echo, engine=engine)
    with pytest.raises(RuntimeError, match="make another"):
        server.start()
    assert server.stop() is True


def test_the_shared_engine_is_made_anew_after_the_last_user() -> None:
    users = [object() for _ in range(3)]
    first = enter_engine(users[0], nothing, None, 0)
    assert enter_engine(users[1], nothing, None, 0) is first
    own = enter_engine(users[2], nothing, None, 2)
    assert own is not first
    for user in users[:2]:
        first.leave(user)
    own.leave(users[2])
    again = enter_engine(users[0], nothing, None, 0)
    assert again is not first
    again.leave(users[0])


def test_servers_of_one_process_come_and_go_at_once() -> None:
    """Nobody is handed an engine that stops at this moment."""

    def come_and_go() -> None:
        for _ in range(25):
            user = object()
            engine = enter_engine(user, nothing, None, 0)
            assert engine.leave(user, 6 * PATIENCE) is True

    with beside(*[come_and_go] * 4):
        pass
    assert threads() == []


def test_who_comes_as_the_last_user_leaves_has_a_running_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = object(), object()
    engine = enter_engine(first, nothing, None, 0)
    try_enter = Engine._try_enter

    def entering(self: Engine, *args: Any) -> bool:
        if self is engine:
            assert engine.leave(first, 6 * PATIENCE) is True
        return try_enter(self, *args)

    monkeypatch.setattr(Engine, "_try_enter", entering)
    another = enter_engine(second, nothing, None, 0)
    assert another is not engine
    assert (engine.running, another.running) == (False, True)
    assert another.leave(second, 6 * PATIENCE) is True
    assert threads() == []


def test_an_engine_that_is_given_up_closes_its_port(flat_handles: None) -> None:
    for _ in range(20):
        engine = Engine(1)
        engine.enter(engine, nothing)
        assert engine.leave(engine, 6 * PATIENCE) is True


# -- stopping -----------------------------------------------------------------------------------------------


def test_the_port_outlives_operations_that_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel still has, it may still write to: neither its memory nor its port goes."""
    closed: list[CompletionPort] = []
    close = CompletionPort.close
    monkeypatch.setattr(CompletionPort, "close", lambda port: closed.append(port) or close(port))

    class Lost(Operation):
        """One that can be referred to weakly."""

    kept: list[Any] = []
    monkeypatch.setattr(engine_module, "_abandoned", kept)
    engine = Engine(1)
    engine.proactor.pending = {}  # the guards keep the first one
    engine.enter(engine, nothing)
    port = engine.port
    lost = Lost(16)
    lost.handler = engine.leave  # as with every operation: something that knows the engine, and so the table
    engine.proactor.pending[lost.address] = lost
    still = weakref.ref(lost)
    engine.leave(engine, timeout=0.2)
    wait_until(lambda: threads() == [])
    assert closed == []
    assert engine.ops_pending == 1
    del engine, lost
    gc.collect()
    assert still() is not None, "the kernel may still write to it"
    assert [len(proactor.pending) for proactor in kept] == [1]
    kept.clear()
    gc.collect()
    assert still() is None, "so the above can fail"
    close(port)


def test_where_the_io_threads_failed_operations_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "EXIT_TIMEOUT", 0.05)
    monkeypatch.setattr(engine_module, "_abandoned", [])
    engine = Engine(1)
    engine.proactor.pending = {}  # the guards keep the first one
    engine.enter(engine, nothing)
    lost = Operation(16)
    engine.proactor.pending[lost.address] = lost
    engine._failed = True
    engine.leave(engine, timeout=3600)
    wait_until(lambda: threads() == [])
    assert engine.ops_pending == 1
    engine.port.close()


def test_operations_on_their_way_are_waited_for() -> None:
    engine = Engine(1)
    engine.enter(engine, nothing)
    late = Operation(16)
    engine.proactor.pending[late.address] = late
    engine.watchdog.later(0.1, lambda: engine.proactor.pending.pop(late.address))
    assert engine.leave(engine, 6 * PATIENCE) is True
    assert engine.ops_pending == 0
    with pytest.raises(OSError):  # noqa: PT011  # which code, Windows decides
        engine.port.post()


def test_stopping_says_when_a_thread_does_not_end() -> None:
    engine = Engine(1)
    engine.enter(engine, nothing)
    busy, release = threading.Event(), threading.Event()

    def stuck() -> None:
        busy.set()
        release.wait(30)

    engine.dispatcher.call_soon(stuck)
    assert busy.wait(10)
    assert engine.leave(engine, timeout=0.2) is False
    release.set()
    wait_until(lambda: threads() == [])


def test_when_the_interpreter_ends_all_users_are_told_and_all_ends() -> None:
    engine = Engine(1)
    told: list[str] = []
    one, two = object(), object()
    engine.enter(one, lambda: told.append("one"))
    engine.enter(two, lambda: (told.append("two"), engine.leave(two)))
    assert engine in engine_module._engines
    engine_module._at_exit()
    assert told == ["one", "two"]
    wait_until(lambda: threads() == [])
    assert engine not in engine_module._engines
    assert not engine.running
    engine_module._at_exit()
    assert told == ["one", "two"]


def test_when_the_interpreter_ends_servers_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", PATIENCE)
    with serving(Echo) as server:
        reachable(server.address)
        wait_until(lambda: not server.connections)
        engine_module._at_exit()
        wait_until(lambda: threads() == [])
        assert server.connections == []
        assert server.backlog.in_use == 0


class Breaking(CompletionPort):
    """Fails from some moment on."""

    __slots__ = ("broken",)

    def reap(self, *arguments: Any) -> int:
        count = super().reap(*arguments)
        if broken := getattr(self, "broken", None):
            raise broken
        return count


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], OSError]]:
    """Give all engines ports that a call of this breaks; what stays pending is cleaned up."""
    monkeypatch.setattr(engine_module, "CompletionPort", Breaking)
    monkeypatch.setattr(engine_module, "_abandoned", [])
    engines: list[Any] = []

    def break_port(engine: Any) -> OSError:
        engines.append(engine)
        engine.port.broken = broken = OSError("the port is broken")
        engine.port.post()
        return broken

    yield break_port
    for engine in engines:
        for operation in engine.proactor.pending.values():
            operation.socket.close()
        engine.proactor.pending.clear()
        engine.port.close()


def test_serve_forever_raises_what_the_io_threads_failed_with(
    breaking: Callable[[Any], OSError], expects_errors: Any
) -> None:
    server = Server(LOOPBACK, Echo, io_threads=1, backlog=2)
    server.start()
    thread, raised = serve_beside(server)
    wait_until(lambda: server._serving)
    broken = breaking(server.engine)
    thread.join(PATIENCE)
    assert raised == [broken]
    assert [record.levelname for record in expects_errors] == ["CRITICAL"]


def test_servers_stop_when_the_io_threads_have_failed(
    breaking: Callable[[Any], OSError], expects_errors: Any
) -> None:
    engine = Engine(2)
    servers = [Server(LOOPBACK, Echo, engine=engine, backlog=2) for _ in range(2)]
    for server in servers:
        server.start()
    broken = breaking(engine)
    for server in servers:
        assert server._stopped.wait(PATIENCE)
        assert server._fatal is broken
    assert not engine.running
    wait_until(lambda: sum(record.levelname == "ERROR" for record in list(expects_errors)) == 2)
    told = [record.getMessage() for record in expects_errors if record.levelname == "ERROR"]
    assert len(told) == 2
    assert all("serve_forever" in text for text in told)


def test_nobody_is_given_a_shared_engine_that_has_failed(
    breaking: Callable[[Any], OSError], expects_errors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "EXIT_TIMEOUT", PATIENCE)
    first, second, third = object(), object(), object()
    told: list[BaseException] = []
    engine = enter_engine(first, nothing, None, 0, failed=told.append)
    enter_engine(second, nothing, None, 0)
    broken = breaking(engine)
    wait_until(lambda: told == [broken])
    another = enter_engine(third, nothing, None, 0)
    assert another is not engine
    with pytest.raises(RuntimeError, match="make another"):
        engine.enter(third, nothing)
    assert another.leave(third, 6 * PATIENCE) is True
    assert engine.leave(first, 6 * PATIENCE) is True
    assert engine.leave(second, 6 * PATIENCE) is True


# -- its figures --------------------------------------------------------------------------------------------


def test_figures_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatcher, "STALL_CHECK", 3600.0)
    with serving(Echo, io_threads=1) as server:
        engine = server.engine
        before = engine.stats()
        reachable(server.address)
        wait_until(lambda: not server.stats().connections)
        after = engine.stats()
        assert after.packets > before.packets
        assert after.reaps > before.reaps
        assert after.packets - before.packets >= after.reaps - before.reaps
        assert after.ops_pending == engine.ops_pending == server.backlog.in_use
        assert (after.handoffs, after.stalled_threads) == (0, 0)
        engine.count_retry()
        assert engine.stats().resource_retries == after.resource_retries + 1


def test_figures_are_of_all_connections_whoever_made_them_and_stay_when_they_have_gone() -> None:
    engine = Engine(1)
    nothing_yet = engine.stats()
    assert (nothing_yet.bytes_received, nothing_yet.bytes_sent, nothing_yet.sends) == (0, 0, 0)
    with serving(Echo, engine=engine) as server:
        client = connect(server.address, Recorder, engine=engine)
        client.send(b"hello")
        wait_until(lambda: client.received == b"hello")
        wait_until(lambda: engine.stats().bytes_sent == 10)
        served = server.stats().receives
        during = engine.stats()
        assert (during.users, during.bytes_received, during.sends) == (2, 10, 2)
        assert during.receives >= served + 1
        client.close()
        wait_until(lambda: engine.stats().users == 1)
        assert (engine.stats().bytes_received, engine.stats().bytes_sent) == (10, 10)
        reachable(server.address)
    after = engine.stats()
    assert (after.users, after.bytes_received, after.bytes_sent, after.sends) == (0, 15, 15, 3)
    assert after.receives >= after.receives_at_once >= 0


def test_figures_tell_of_a_stalled_thread() -> None:
    release = threading.Event()

    class Slow(Echo):
        def got(self, data: bytes) -> None:
            if data == b"stall":
                release.wait(30)
            self.send(data)

    with serving(Slow, io_threads=1) as server:
        with raw(server.address) as stalled:
            stalled.sendall(b"stall")
            wait_until(lambda: server.stats().engine.stalled_threads == 1)
            stats = server.stats().engine
            assert stats.handoffs >= 1
            assert stats.io_threads >= 2
            reachable(server.address)
            release.set()
            assert stalled.recv(5) == b"stall"
        wait_until(lambda: server.stats().engine.stalled_threads == 0)
