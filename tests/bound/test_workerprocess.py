"""_workerprocess.py: a worker process by itself, and how it ends with its parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from typing import Any

import pytest
from forworkers import Telling
from program import Program, running
from support import LOOPBACK, ended, raw, wait_until
from test_processes import SLOW, ask, pid_of, runs

from iocp_ctypes import Server, _processes, _workerprocess
from iocp_ctypes._options import Settings
from iocp_ctypes._workerprocess import Recipe, Report, Role

PARENT = """
import json, sys, threading
sys.path.insert(0, "tests/bound")
from forworkers import Telling
import iocp_ctypes.server
from iocp_ctypes import Server

if __name__ == "__main__":
    iocp_ctypes.server.ABORT_TIMEOUT = 60  # for a busy machine: else a worker that is late is ended, and told
    server = Server(("127.0.0.1", 0), Telling, processes=2)
    server.start()
    pids = [worker.pid for worker in server._processes._workers]
    print(json.dumps([server.address, pids]), flush=True)
    threading.Event().wait()
"""


class Pipe:
    """The parent's end: what a worker is to hear, and what it says."""

    def __init__(self, *messages: Any) -> None:
        self.messages = list(messages)
        self.said: list[Any] = []
        self.heard = threading.Semaphore(0)
        self.closed = False

    def send(self, thing: Any) -> None:
        self.said.append(thing)

    def recv_bytes(self) -> bytes:
        text: bytes = self.recv()
        return text

    def recv(self) -> Any:
        if not self.messages:
            raise EOFError
        message = self.messages.pop(0)
        return message() if callable(message) else message

    def close(self) -> None:
        self.closed = True

    def reports(self) -> list[Report]:
        return [thing for thing in self.said if isinstance(thing, Report)]


def recipe(kind: Any = Server, *args: Any) -> bytes:
    """What a server with two processes would tell its workers."""
    settings = Settings(processes=2, max_connections=1, linger_timeout=0.2)
    address = ("192.0.2.1", 5)  # not ours: it would be noticed if a worker listened
    call = Recipe(kind, args or (address, Telling), {"processes": 2}, (address,), settings)
    return _processes._pickled(call)


@pytest.fixture(autouse=True)
def _interrupts() -> Any:
    """A worker ignores Ctrl-C; this process shall not."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_it_is_sent_it_serves_and_it_tells_what_became_of_it() -> None:
    left, right = socket.socketpair()
    gone, peer = socket.socketpair()
    peer.close()
    shared = left.share(os.getpid())
    pipe = Pipe(
        recipe(),
        ("serve", [(shared, "here", b"hel"), (b"nothing", "there", b"")]),
        ("settings", Settings(processes=2, idle_timeout=5)),
        lambda: (
            right.sendall(b"lo"),
            wait_until(lambda: right.recv(10, socket.MSG_PEEK) == b"hello"),
            ("close_clients", None),
        )[-1],
        lambda: (right.close(), wait_until(lambda: "127.0.0.1" in hosts(pipe)), ("stop", 5.0))[-1],
    )
    _workerprocess.main(pipe)
    left.close()
    gone.close()
    pid, ready, *_reports = pipe.said
    assert (pid, ready) == (os.getpid(), None)
    assert sum(report.opened for report in pipe.reports()) == 2
    assert sorted(hosts(pipe)) == ["127.0.0.1", "there"]
    last = pipe.reports()[-1]
    assert last.stopped is True
    assert last.stats is not None
    assert (last.stats.accepted, last.stats.accept_failed, last.stats.connections) == (1, 1, 0)
    assert pipe.closed


def hosts(pipe: Pipe) -> list[str]:
    """Those of the connections that have gone."""
    return [host for report in pipe.reports() for host in report.gone]


def test_one_that_cannot_make_its_server_says_why_and_ends() -> None:
    pipe = Pipe(recipe(Server, ("192.0.2.1", 5), 7))
    with pytest.raises(SystemExit) as left:
        _workerprocess.main(pipe)
    assert left.value.code == 1
    assert pipe.said[1].startswith("TypeError: handler=7: must be a subclass of Connection")


def test_one_without_a_parent_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", SLOW)  # or it would end this process
    pipe = Pipe()
    _workerprocess.main(pipe)
    assert len(pipe.said) == 1
    pipe = Pipe(recipe())
    _workerprocess.main(pipe)
    assert pipe.reports()[-1].stopped is True


def test_caps_and_context_are_not_taken_from_the_parent() -> None:
    given = Settings(processes=4, max_connections=3, max_per_host=2, idle_timeout=9)
    role = Role(Pipe(), Recipe(Server, (), {}, (), given))
    own = role.settings(Settings(idle_timeout=1))
    assert own == Settings(idle_timeout=9)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (SystemExit(3), SystemExit(3)),
        (SystemExit("why"), SystemExit("why")),
        (SystemExit(object()), SystemExit(1)),
        (KeyboardInterrupt("x"), KeyboardInterrupt()),
        (None, None),
    ],
)
def test_what_ends_the_program_can_be_told(raised: Any, told: Any) -> None:
    found = _workerprocess._told(raised)
    assert (type(found), getattr(found, "args", None)) == (type(told), getattr(told, "args", None))


def test_workers_end_when_their_parent_is_killed() -> None:
    program = Program("-c", PARENT)
    try:
        address, pids = json.loads(program.line(r"\[.*\]")[0])
        clients = [raw(address) for _ in range(4)]
        assert {pid_of(client) for client in clients} == set(pids)
        assert ask(clients[0], b"block") == b"blocking"
        assert all(map(runs, pids))
    finally:
        program.kill()
    wait_until(lambda: not any(map(runs, pids)), SLOW)
    for client in clients:
        assert ended(client) in ("eof", "reset")
        client.close()


def test_the_command_serves_with_several() -> None:
    with running("-m", "iocp_ctypes", "echo", "--port", "0", "--processes", "2") as program:
        address = program.listening()
        for _ in range(3):
            with raw(address) as client:
                assert ask(client, b"hello") == b"hello"


def test_a_folder_is_served_by_several_too() -> None:
    with running("-m", "iocp_ctypes", "http", "tests", "--port", "0", "--processes", "2") as program:
        address = program.listening()
        for _ in range(2):
            with raw(address) as client:
                assert ask(client, b"GET /windows.md HTTP/1.1\r\nHost: x\r\n\r\n").startswith(
                    b"HTTP/1.1 200 "
                )


def test_ctrl_c_ends_all() -> None:
    told = """
import signal, sys, threading, time
sys.path.insert(0, "tests/bound")
from forworkers import Telling
import iocp_ctypes.server
from iocp_ctypes import Server

if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Telling, processes=2)
    server.start()
    print(*(worker.pid for worker in server._processes._workers), flush=True)

    def interrupt():
        while not server._shutdown_wanted._cond._waiters:  # serve_forever waits
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    iocp_ctypes.server.ABORT_TIMEOUT = 60
    threading.Thread(target=interrupt).start()
    server.serve_forever()
    print("interrupted", server.stats().connections, flush=True)
"""
    program = Program("-c", told)
    try:
        pids = [int(pid) for pid in program.line(r"\d+ \d+")[0].split()]
        code, lines = program.ended()
    finally:
        program.kill()
    assert (code, lines) == (0, ["interrupted 0"])
    assert not any(map(runs, pids))


def test_a_script_that_forgets_to_stop_leaves_none() -> None:
    program = Program("-c", PARENT.replace("    threading.Event().wait()\n", ""))
    try:
        _address, pids = json.loads(program.line(r"\[.*\]")[0])
        assert program.ended() == (0, [])
    finally:
        program.kill()
    assert not any(map(runs, pids))


def test_loopback_is_what_a_worker_never_binds() -> None:
    role = Role(Pipe(), Recipe(Server, (), {}, (LOOPBACK,), Settings(processes=2)))
    server = Server.__new__(Server)
    server._role = role
    server.__init__(("192.0.2.1", 1), Telling, processes=2)  # type: ignore[misc]
    assert (server._sockets, server.addresses) == ([], (LOOPBACK,))
    assert server._processes is None
    server.stop()
