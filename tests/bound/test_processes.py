"""_processes.py: servers whose connections worker processes serve."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from forworkers import Keeping, Picky, Quiet, Refusing, Telling, shouting
from namedpipes import new_name
from program import ROOT
from support import LOOPBACK, Recorder, ended, handle_count, raw, read_exactly, serve_beside, wait_until

from iocp_ctypes import Connection, Engine, Server, _dispatcher, _processes
from iocp_ctypes._processes import choose

#: Seconds for a worker process: its start takes seconds where the machine is busy.
SLOW = 60.0
SYNCHRONIZE = 0x0010_0000


def runs(pid: int) -> bool:
    """Whether a process with this id runs."""
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel32.OpenProcess.restype = ctypes.c_void_p
    kernel32.WaitForSingleObject.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    kernel32.CloseHandle.argtypes = [ctypes.c_void_p]
    handle = kernel32.OpenProcess(SYNCHRONIZE, False, pid)
    if not handle:
        return False
    try:
        return bool(kernel32.WaitForSingleObject(handle, 0) == 0x102)  # WAIT_TIMEOUT
    finally:
        kernel32.CloseHandle(handle)


def no_thread_is_left() -> bool:
    """Whether none of the library runs here."""
    return not [thread for thread in threading.enumerate() if thread.name.startswith("iocp_ctypes")]


@contextlib.contextmanager
def workers(handler: Any = Telling, *, made: Any = Server, **options: Any) -> Iterator[Any]:
    """A server with worker processes for a `with` block, of which none is left behind."""
    options = {"processes": 2, "linger_timeout": 0.2, **options}
    server = made(LOOPBACK, handler, **options)
    server.start()
    pids = [worker.pid for worker in server._processes._workers]
    try:
        yield server
        pids += [worker.pid for worker in server._processes._workers if worker is not None]
    finally:
        assert server.stop(SLOW)
        wait_until(lambda: not [pid for pid in pids if runs(pid)], SLOW, "no process is left behind")
        wait_until(lambda: server.stats().connections == 0, SLOW)
        wait_until(lambda: not server._hosts, SLOW)


def ask(client: socket.socket, question: bytes = b"pid") -> bytes:
    """The worker's answer."""
    client.settimeout(SLOW)
    client.sendall(question)
    return client.recv(1000)


def pid_of(client: socket.socket) -> int:
    """Which process serves a client."""
    return int(ask(client))


# -- choosing ---------------------------------------------------------------------------------------------


def test_the_smallest_load_is_chosen_and_of_equal_ones_each_in_its_turn() -> None:
    assert choose([3, 1, 2], 0) == 1
    assert [choose([0, 0, 0], last) for last in (-1, 0, 1, 2)] == [0, 1, 2, 0]
    assert choose([1, 0, 0, 1], 1) == 2
    assert choose([None, 5, None], 1) == 1
    assert choose([None, None], 0) is None


# -- serving ----------------------------------------------------------------------------------------------


def test_connections_are_shared_out_and_each_stays_where_it_is() -> None:
    with workers(processes=3) as server:
        clients = [raw(server.address) for _ in range(9)]
        pids = [pid_of(client) for client in clients]
        assert sorted(pids.count(pid) for pid in set(pids)) == [3, 3, 3]
        for client, pid in zip(clients, pids, strict=True):
            data = bytes(range(256)) * 1000
            sender = threading.Thread(target=client.sendall, args=(data,))
            sender.start()
            assert read_exactly(client, len(data)) == data
            sender.join()
            assert pid_of(client) == pid
        assert server.connections == []
        assert server.stats().connections == 9
        wait_until(lambda: server.stats().accepted == 9, SLOW)
        wait_until(lambda: server.stats().bytes_received == 9 * (len(data) + 6), SLOW)
        for client in clients:
            client.close()
        wait_until(lambda: server.stats().connections == 0, SLOW)
        wait_until(lambda: server.stats().closed == {"eof": 9}, SLOW)
        assert server.stats().bytes_received == 9 * (len(data) + 6)
        assert server.stats().connections_peak == 9
    assert server.stats().closed == {"eof": 9}, "what they did stays counted"


def test_first_bytes_caps_live_options_and_ends_of_clients() -> None:
    with workers(accept_data=100, max_connections=2, max_per_host=5) as server:
        first, second = raw(server.address), raw(server.address)
        assert len({pid_of(first), pid_of(second)}) == 2, "the bytes that AcceptEx brought are not lost"
        third = raw(server.address, SLOW)
        third.sendall(b"pid")
        wait_until(lambda: server.backlog.in_use == 0)
        assert ask(first, b"stats") == b"1"
        second.close()
        assert third.recv(10).isdigit(), "the cap is that of all processes together"
        server.max_per_host = 2
        server.max_connections = None
        server.idle_timeout = 77
        with raw(server.address) as fourth:
            fourth.sendall(b"idle")
            assert ended(fourth) in ("reset", "eof")
        third.close()
        wait_until(lambda: server.stats().connections == 1, SLOW)
        wait_until(lambda: not any(one._messages for one in server._processes._workers), SLOW)
        fifth = raw(server.address)
        assert ask(fifth, b"idle") == b"77.0"
        assert ask(first, b"idle") == b"None"
        with pytest.raises(ValueError, match="tls=None: cannot be changed with processes=2"):
            server.tls = None
        server.close_clients()
        assert ended(first) == "eof"
        assert ended(fifth) == "eof"
        wait_until(lambda: server.stats().connections == 0, SLOW)
        assert server.stats().refused == 1
        first.close()
        fifth.close()


def test_servers_of_other_classes_are_made_again_by_the_same_call() -> None:
    """Also: refusing is this process's business, what callbacks raise the worker's."""
    with workers(3, made=Quiet) as server:
        clients = []
        for _ in range(3):
            clients.append(raw(server.address))
            assert pid_of(clients[-1])
        with raw(server.address) as refused:
            assert ended(refused) in ("reset", "eof")
        clients[0].sendall(b"raise")
        assert ended(clients[0]) in ("reset", "eof")
        wait_until(lambda: server.stats().closed == {"error": 1}, SLOW)
        for client in clients:
            client.close()


def test_functions_that_block_are_served_too() -> None:
    server = shouting(LOOPBACK, processes=2)
    with server, raw(server.address) as one, raw(server.address) as two:
        one.sendall(b"hello\n")
        two.sendall(b"you\n")
        words = [client.makefile("rb").readline().split() for client in (one, two)]
        assert [word for _pid, word in words] == [b"HELLO", b"YOU"]
        assert words[0][0] != words[1][0]


def test_a_bound_socket_goes_with_it() -> None:
    with socket.socket() as listener:
        listener.bind(LOOPBACK)
        with Server(listener, Telling, processes=2) as server, raw(server.address) as client:
            assert pid_of(client)


def test_what_take_socket_takes_no_worker_gets() -> None:
    with workers(made=Keeping) as server, raw(server.address) as first:
        (kept,) = wait_until(lambda: server.kept)
        with raw(server.address) as second:
            assert pid_of(second)
        first.sendall(b"hello")
        assert read_exactly(kept, 5) == b"hello"
        kept.close()


# -- ends -------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_replaced_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    with workers() as server, caplog.at_level(logging.WARNING, "iocp_ctypes"):
        one, two = raw(server.address), raw(server.address)
        pids = pid_of(one), pid_of(two)
        one.sendall(b"die")
        assert ended(one) in ("reset", "eof")
        one.close()
        assert pid_of(two) == pids[1]
        wait_until(lambda: server.stats().connections == 1, SLOW)
        assert server.stats().closed == {"aborted": 1}
        wait_until(lambda: all(worker and worker.ready for worker in server._processes._workers), SLOW)
        with raw(server.address) as three:
            assert pid_of(three) not in pids
        two.close()
        wait_until(lambda: server.stats().connections == 0, SLOW)
    assert any("has ended: exit code 7; another is started" in text for text in caplog.messages)


def test_while_none_is_there_clients_wait() -> None:
    with workers(processes=2) as server:
        for _ in range(2):
            with raw(server.address, SLOW) as client:
                client.sendall(b"die")
                ended(client)
        wait_until(lambda: server.stats().connections == 0, SLOW)
        with raw(server.address) as client:
            assert pid_of(client)


def test_a_callback_may_end_the_server() -> None:
    with workers() as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        with raw(server.address) as client:
            client.sendall(b"shutdown")
            serving.join(SLOW)
            assert not serving.is_alive()
    server = Server(LOOPBACK, Telling, processes=2)
    serving, raised = serve_beside(server)
    wait_until(lambda: server._acceptor and server.backlog.in_use, SLOW)
    with raw(server.address) as client:
        client.sendall(b"exit")
        serving.join(SLOW)
    assert [(type(exc), exc.args) for exc in raised] == [(SystemExit, ("told to",))]


def test_stopping_under_load_leaves_no_process() -> None:
    over = threading.Event()
    with workers() as server:

        def load() -> None:
            while not over.is_set():
                try:
                    with raw(server.address) as client:
                        ask(client, bytes(1000))
                except ConnectionRefusedError:
                    return  # the port may be another run's next
                except OSError:
                    pass

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.stats().accepted > 20, SLOW)
        try:
            assert server.stop(SLOW)
        finally:
            over.set()
            for thread in threads:
                thread.join()


def test_a_worker_that_does_not_stop_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    with workers() as server:
        client = raw(server.address)
        assert pid_of(client)
        assert ask(client, b"block") == b"blocking"
        assert server.stop(0.1) is False
    assert "did not stop, and was ended" in caplog.text
    assert ended(client) in ("reset", "eof")
    client.close()


def test_stopping_while_they_start() -> None:
    server = Server(LOOPBACK, Telling, processes=2)
    stopper = threading.Timer(0.05, server.stop)
    stopper.start()
    with contextlib.suppress(RuntimeError):
        server.start()
    stopper.join()
    with pytest.raises(RuntimeError):
        server.start()
    wait_until(no_thread_is_left, SLOW)


def test_handles_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatcher, "STALL_CHECK", 3600.0)  # a thread in reserve has handles
    with workers() as server:

        def some() -> None:
            for _ in range(20):
                with raw(server.address) as client:
                    assert pid_of(client)
            wait_until(lambda: server.stats().connections == 0, SLOW)

        some()
        before = handle_count()
        some()
        some()
        wait_until(lambda: handle_count() <= before + 5)


# -- what cannot be ---------------------------------------------------------------------------------------


def test_what_no_other_process_can_have_is_refused_before_a_socket_exists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Local(Connection):
        pass

    def none(*_args: Any) -> Any:
        raise AssertionError("a socket was made")

    monkeypatch.setattr("iocp_ctypes.server.bind_all", none)
    top = "classes and functions must be at the top level of a module"
    for handler in (Local, lambda _server, _peer: Connection()):
        with pytest.raises(TypeError, match=rf"handler=.*Local.*|handler=.*lambda.* {top}") as caught:
            Server(LOOPBACK, handler, processes=2)
        assert "processes=2" in str(caught.value)
        assert top in str(caught.value)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(TypeError, match=r"tls=.*processes=3.*make the context in the constructor of a sub"):
        Server(LOOPBACK, Telling, tls=context, processes=3)
    engine = Engine()
    with pytest.raises(ValueError, match="processes=2: must be 1 where an engine is given"):
        Server(LOOPBACK, Telling, engine=engine, processes=2)
    engine.port.close()
    name = new_name()
    for address in (name, [LOOPBACK, name]):
        with pytest.raises(ValueError, match="processes=2: must be 1 for a pipe"):
            Server(address, Telling, processes=2)


def test_a_server_that_no_worker_can_make_does_not_start() -> None:
    server = Refusing(LOOPBACK, Telling, processes=2)
    with pytest.raises(
        RuntimeError,
        match="processes=2: a worker process could not start: ValueError: no second one of me",
    ):
        server.start()
    assert all(sock.fileno() == -1 for sock in server._sockets), "it still listens"
    wait_until(no_thread_is_left, SLOW)


@pytest.mark.parametrize("refusals", [1, 9])
def test_a_system_that_is_short_of_processes_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    """CreateProcess under Wine fails now and then (1359); on Windows where memory is short."""
    asked: list[Any] = []
    failed: list[OSError] = []
    start = multiprocessing.get_context("spawn").Process.start

    def refused(process: Any) -> None:
        asked.append(process)
        if len(asked) <= refusals:
            raise OSError(22, "not now")
        try:
            start(process)
        except OSError as exc:
            failed.append(exc)
            raise

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", refused)
    if refusals == 1:
        with workers() as server, raw(server.address) as client:
            assert pid_of(client)
        assert len(asked) == 3 + len(failed)
        return
    server = Server(LOOPBACK, Telling, processes=2)
    with pytest.raises(RuntimeError, match="could not start: no process could be made: OSError"):
        server.start()
    assert _processes.TRIES_MAX <= len(asked) <= 2 * _processes.TRIES_MAX


def test_one_that_is_never_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_processes, "START_TIMEOUT", 0.0)
    server = Server(LOOPBACK, Telling, processes=2)
    with pytest.raises(RuntimeError, match="could not start: it was not ready after 0 s"):
        server.start()
    wait_until(no_thread_is_left, SLOW)


def test_what_cannot_be_read_costs_the_worker(
    monkeypatch: pytest.MonkeyPatch, expects_errors: list[logging.LogRecord]
) -> None:
    def unreadable(*_args: Any) -> None:
        raise ValueError("what is this?")

    with workers() as server, raw(server.address) as client:
        pid = pid_of(client)
        (worker,) = [worker for worker in server._processes._workers if worker.pid == pid]
        monkeypatch.setattr(worker._conn, "recv", unreadable)
        assert ended(client) in ("reset", "eof")
        wait_until(lambda: all(one and one.ready for one in server._processes._workers), SLOW)
        assert pid not in [one.pid for one in server._processes._workers]
        assert not runs(pid)
    assert "cannot be read: it is replaced" in expects_errors[0].getMessage()


def test_a_handler_that_makes_none_costs_its_connection() -> None:
    with workers(Picky) as server:
        for _ in range(3):
            with raw(server.address, SLOW) as client:
                assert ended(client) in ("reset", "eof")
        wait_until(lambda: server.stats().handler_failed == 3, SLOW)
        wait_until(lambda: server.stats().connections == 0, SLOW)


def test_one_process_is_as_ever() -> None:
    server = Server(LOOPBACK, Recorder, processes=1)
    assert server._processes is None
    assert server._made_by == ((), {})
    wait_until(no_thread_is_left, SLOW)
    server.stop()


def test_a_program_without_its_guard_is_told(tmp_path: Any) -> None:
    program = tmp_path / "unguarded.py"
    program.write_text(
        "from iocp_ctypes import Connection, Server\n"
        "server = Server(('127.0.0.1', 0), Connection, processes=2)\n"
        "server.start()\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert 'must stand below `if __name__ == "__main__":`' in done.stderr
    assert "a worker process could not start: it ended with exit code 1" in done.stderr
