"""_pipeconnector.py: connecting to pipes, waiting for a free instance, giving up; nobody's thread waits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fakes import FakeEngine
from namedpipes import Plain, new_name
from support import PATIENCE, Echo, made, serving, wait_until
from targets import Asked

from iocp_ctypes import Server, _dispatcher, _pipeconnector, connect, open_stream
from iocp_ctypes import engine as engine_module
from iocp_ctypes._errors import ERROR_PIPE_BUSY
from iocp_ctypes._pipeconnector import BUSY_FIRST, BUSY_MAX, PipeConnector


def test_connecting_talking_closing(io_threads: int) -> None:
    name = new_name()
    with serving(Echo, name, io_threads=io_threads) as server:
        client = connect(name, Asked)
        assert client.peer_address[0] == name  # the number is 0 until it is connected
        client.send(b"hello")  # before it is connected, or a moment after
        wait_until(lambda: client.received == b"hello")
        assert client.peer_address[0] == name
        assert client.peer_address == client.local_address
        assert client.server is None
        client.close()
        assert client.wait_closed(PATIENCE)
        assert client.names == ["connect", "data", "close"]
        wait_until(lambda: not server.connections)


def test_no_such_pipe() -> None:
    client = connect(new_name(), Asked)
    assert client.wait_closed(PATIENCE)
    client.check_failed(FileNotFoundError, "refused")
    assert "cannot connect to" in str(client.calls[0].value)
    with pytest.raises(FileNotFoundError):
        open_stream(new_name(), timeout=PATIENCE)


def test_a_pipe_of_others_that_we_may_not_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pipeconnector, "open_pipe", lambda *_: (None, 5))
    client = connect(new_name(), Asked)
    assert client.wait_closed(PATIENCE)
    client.check_failed(PermissionError, "aborted")


def test_a_busy_pipe_is_waited_for_up_to_the_timeout() -> None:
    name = new_name()
    server = Server(name, Echo)  # it has not started: nobody waits for clients
    clients = [connect(name, Asked, timeout=0.3) for _ in range(20)]
    for client in clients:
        assert client.wait_closed(PATIENCE)
        client.check_failed(TimeoutError, "timeout")
        assert "no free instance within timeout=0.3 s" in str(client.calls[0].value)
    with pytest.raises(TimeoutError):
        open_stream(name, timeout=0.2)
    server.server_close()


def test_a_busy_pipe_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything shares the one I/O thread, which nobody relieves; while 50 wait, others are served."""
    monkeypatch.setattr(_dispatcher, "STALL_CHECK", 3600.0)
    busy, name = new_name(), new_name()
    blocked = Server(busy, Echo)
    engine = engine_module.Engine(io_threads=1)
    with serving(Echo, name, engine=engine):
        waiting = [connect(busy, Asked, engine=engine) for _ in range(50)]
        for _ in range(20):
            with Plain(name) as client:
                client.write(b"hello")
                assert client.read_exactly(5) == b"hello"
        for one in waiting:
            assert one.names == []
            one.abort()
        for one in waiting:
            assert one.wait_closed(PATIENCE)
            one.check_failed(None, "aborted")
    blocked.server_close()


def test_closing_while_it_waits_gives_up() -> None:
    name = new_name()
    server = Server(name, Echo)
    client = connect(name, Asked)
    client.close()
    assert client.wait_closed(PATIENCE)
    client.check_failed(None, "local")
    server.server_close()


def test_connecting_and_giving_up_at_the_same_time() -> None:
    name = new_name()
    with serving(Echo, name) as server:
        for _ in range(40):
            client = connect(name, Asked)
            thread = threading.Thread(target=client.abort)
            thread.start()
            assert client.wait_closed(PATIENCE)
            thread.join()
            assert client.names in (["close"], ["connect", "close"])
        wait_until(lambda: not server.connections and server.backlog.in_use == server.backlog.cap)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("NAME",), {}, "a pipe's name is "),
        ((r"\\host\pipe\NAME",), {}, "a pipe's name is "),
        ((r"\\.\pipe" + "\\",), {}, "a pipe's name is "),
        ((r"\\.\pipe\a",), {"local_address": ("127.0.0.1", 0)}, "local_address=.*: a pipe has none"),
        ((r"\\.\pipe\a",), {"timeout": 0}, "timeout=0"),
    ],
)
def test_bad_arguments(arguments: Any, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        connect(*arguments, **options)
    assert not list(engine_module._engines)


# -- on fakes -----------------------------------------------------------------------------------------------


class FakePipe:
    closed = False

    def close(self) -> None:
        self.closed = True


class Connecting:
    """A connector whose attempts find what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout: float | None = None) -> None:
        self.engine = FakeEngine()
        self.found: Any = (None, ERROR_PIPE_BUSY)
        self.attempts: list[float] = []
        self.told: list[Any] = []
        monkeypatch.setattr(_pipeconnector, "open_pipe", self._open)
        engine: Any = self.engine
        self.connector = PipeConnector(engine, "NAME", timeout, lambda *told: self.told.append(told))
        self.connector.start()
        self.engine.dispatcher.run()

    def _open(self, *_: Any) -> Any:
        self.attempts.append(self.engine.clock())
        return self.found() if callable(self.found) else self.found

    def advance(self, seconds: float) -> None:
        self.engine.watchdog.advance(seconds)
        self.engine.dispatcher.run()


def test_a_busy_pipe_is_looked_at_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Connecting(monkeypatch)
    for _ in range(1000):
        made.advance(BUSY_FIRST)
    pairs = zip(made.attempts, made.attempts[1:], strict=False)
    gaps = [later - earlier for earlier, later in pairs]
    assert gaps[:5] == pytest.approx([BUSY_FIRST * 2**n for n in range(5)], abs=1.1 * BUSY_FIRST)
    assert gaps[-1] == pytest.approx(BUSY_MAX, abs=1.1 * BUSY_FIRST)
    assert made.told == []
    pipe = FakePipe()
    made.found = pipe, 0
    made.advance(BUSY_MAX)
    assert made.told == [(pipe, None)]
    assert len(made.engine.watchdog) == 0
    made.connector.cancel()
    made.engine.dispatcher.run()
    assert len(made.told) == 1
    assert not pipe.closed


def test_a_timeout_ends_the_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Connecting(monkeypatch, timeout=1.0)
    made.advance(1.0)
    assert [type(error) for _pipe, error in made.told] == [TimeoutError]
    assert len(made.engine.watchdog) == 0
    count = len(made.attempts)
    made.advance(10)
    assert len(made.attempts) == count


def test_what_connects_too_late_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Connecting(monkeypatch, timeout=1.0)
    pipe = FakePipe()

    def meanwhile() -> Any:
        made.connector.cancel()
        return pipe, 0

    made.found = meanwhile
    made.advance(BUSY_FIRST)
    assert pipe.closed
    assert [error.winerror for _pipe, error in made.told] == [995]
    made.connector.close()
    made.connector.reset_on_close()
    made.connector.set_nodelay(True)
    made.connector.set_keepalive(1.0)
    assert len(made.engine.watchdog) == 0


def test_the_server_side_is_made_once(io_threads: int) -> None:
    name = new_name()
    with serving(Echo, name, io_threads=io_threads):
        for number in range(1, 20):
            client = connect(name, Asked)
            client.until("connect")
            assert len(made(Echo, number)) == number
            client.abort()
            assert client.wait_closed(PATIENCE)
