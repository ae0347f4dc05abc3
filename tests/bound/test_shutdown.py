"""How a program with a server ends: Ctrl-C, the end of the script, exceptions; and what its children keep.

Programs run in processes of their own. They measure inside, for a start takes Wine a while.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from support import (
    OWN_HOST,
    PATIENCE,
    Echo,
    echoes,
    ended,
    made,
    raw,
    reachable,
    read_exactly,
    serving,
    wait_until,
)

CHECKOUT = Path(__file__).resolve().parent.parent.parent

PREFACE = """\
import atexit, os, signal, socket, sys, threading, time
from iocp_ctypes import Connection, Server, engine, server as servers

servers.ABORT_TIMEOUT = engine.EXIT_TIMEOUT = 20.0  # on a busy machine threads may be held up

class Echo(Connection):
    def on_data(self, data):
        self.send(data)

def client(server):
    sock = socket.create_connection(server.address, timeout=10)
    sock.sendall(b"hello")
    assert sock.recv(5) == b"hello"
    return sock

"""


def run(program: str, *options: str) -> tuple[int, list[str], str]:
    """Run a program in Python's development mode; returns exit code, lines of stdout, and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-X", "dev", *options, "-c", PREFACE + textwrap.dedent(program)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


# -- Ctrl-C -------------------------------------------------------------------------------------------------

INTERRUPTED = """
    took = []
    while len(took) < 8 and min(took, default=1) >= 0.5:  # a busy machine may need more than one
        server = Server(("127.0.0.1", 0), Echo{options})
        server.start()
        clients = [client(server) for _ in range({clients})]

        def interrupt():
            while not server._shutdown_wanted._cond._waiters:  # serve_forever waits
                time.sleep(0.01)
            took.append(-time.monotonic())
            signal.raise_signal(signal.SIGINT)

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        server.serve_forever()
        took[-1] += time.monotonic()
        interrupting.join()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            again.bind(server.address)
        assert not server.connections
        for sock in clients:
            sock.close()
    print(took)
    print(min(took))
    print([thread.name for thread in threading.enumerate()])
"""


@pytest.mark.wine_differs("ctrl-c")
@pytest.mark.parametrize(
    ("options", "clients"), [("", 0), ("", 20), (", io_threads=4", 20), (", work_threads=2", 20)]
)
def test_ctrl_c_ends_serve_forever_at_once_and_cleanly(options: str, clients: int) -> None:
    code, lines, errors = run(INTERRUPTED.format(clients=clients, options=options))
    assert (code, errors) == (0, "")
    tries, took, threads = lines
    assert float(took) < 0.5, tries
    assert threads == "['MainThread']"


def test_ctrl_c_while_a_callback_is_busy() -> None:
    """It is waited for, a while; the program ends as soon as it returns."""
    code, lines, errors = run("""
        release = threading.Event()

        def interrupt():
            while not server._shutdown_wanted._cond._waiters:  # serve_forever waits
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

        class Busy(Connection):
            def on_data(self, data):
                threading.Thread(target=interrupt).start()
                release.wait(1)
                print("returned")

        server = Server(("127.0.0.1", 0), Busy)
        server.start()
        sock = socket.create_connection(server.address)
        sock.sendall(b"x")
        server.serve_forever()
        print("served")
        sock.close()
        """)
    assert (code, errors) == (0, "")
    assert sorted(lines) == ["returned", "served"]


def test_ctrl_c_elsewhere_is_the_programs_and_the_with_block_stops() -> None:
    code, lines, errors = run("""
        try:
            with Server(("127.0.0.1", 0), Echo) as server:
                with client(server):
                    threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
                    for _ in range(1000):
                        time.sleep(0.01)
        except KeyboardInterrupt:
            print("interrupted", len(server.connections), server.backlog.in_use)
        """)
    assert (code, lines, errors) == (0, ["interrupted 0 0"], "")


# -- the end of the script ----------------------------------------------------------------------------------

#: Printed after the I/O threads have ended: the interpreter calls atexit when it has waited for threads.
WATCH = """
    began = []
    atexit.register(lambda: print(time.monotonic() - began[0]))
"""


@pytest.mark.parametrize(
    "forgetting",
    [
        "Server(('127.0.0.1', 0), Echo)",
        "Server(('127.0.0.1', 0), Echo).start()",
        "servers = [Server(('127.0.0.1', 0), Echo, io_threads=n) for n in (0, 1, 4)];"
        " [server.start() for server in servers]",
        "server = Server(('127.0.0.1', 0), Echo, work_threads=2); server.start(); sock = client(server)",
        "server = Server(('127.0.0.1', 0), Echo); server.start(); socks = [client(server) for _ in range(9)];"
        " [connection.send(bytes(4_000_000)) for connection in server.connections]",
        "server = Server(('127.0.0.1', 0), Echo, accept_data=9, idle_timeout=60); server.start();"
        " sock = socket.create_connection(server.address)",
    ],
    ids=["unstarted", "idle", "several", "connected", "sending", "inside-acceptex"],
)
def test_a_script_that_forgets_to_stop_ends(forgetting: str) -> None:
    program = f"{WATCH}\n    {forgetting}\n    began.append(time.monotonic())\n"
    code, lines, errors = run(program, "-W", "ignore::ResourceWarning")  # of the sockets it forgot, too
    assert (code, errors) == (0, "")
    (took,) = lines
    assert float(took) < 30, "60 is how long a program may take here"


def test_a_script_that_ends_amid_traffic() -> None:
    code, lines, errors = run(
        WATCH
        + """
    server = Server(("127.0.0.1", 0), Echo, io_threads=4)
    server.start()
    turns = [0] * 4

    def talk(number):
        try:
            with client(server) as sock:
                while True:
                    sock.sendall(b"hello")
                    if not sock.recv(5):
                        return
                    turns[number] += 1
        except OSError:
            pass

    talking = [threading.Thread(target=talk, args=[number]) for number in range(4)]
    [thread.start() for thread in talking]
    while min(turns) < 20:
        time.sleep(0.01)
    began.append(time.monotonic())
"""
    )
    assert (code, errors) == (0, "")
    assert float(lines[0]) < 30


def test_a_callback_that_takes_a_second_is_waited_for() -> None:
    code, lines, errors = run("""
        class Slow(Connection):
            def on_data(self, data):
                print("begun", flush=True)
                begun.set()
                time.sleep(1)
                print("done", flush=True)

            def on_close(self, exc):
                print("closed", flush=True)

        begun = threading.Event()
        server = Server(("127.0.0.1", 0), Slow)
        server.start()
        sock = socket.create_connection(server.address)
        sock.sendall(b"x")
        begun.wait()
        sock.close()
        """)
    assert (code, errors) == (0, "")
    assert lines == ["begun", "done", "closed"]


def test_an_exception_of_the_script_is_all_that_is_printed() -> None:
    code, lines, errors = run("""
        server = Server(("127.0.0.1", 0), Echo)
        server.start()
        client(server).close()
        raise LookupError("the script's own")
        """)
    assert (code, lines) == (1, [])
    assert errors.strip().endswith("LookupError: the script's own")
    assert errors.count("Traceback") == 1


@pytest.mark.parametrize("where", ["main", "callback"])
def test_the_exit_code_is_the_scripts(where: str) -> None:
    code, lines, errors = run(f"""
        class Ending(Connection):
            def on_data(self, data):
                sys.exit(7)

        server = Server(("127.0.0.1", 0), Ending)
        server.start()
        sock = socket.create_connection(server.address)
        if {where!r} == "main":
            sys.exit(7)

        def later():
            while not server._serving:
                time.sleep(0.01)
            sock.sendall(b"x")

        threading.Thread(target=later).start()
        server.serve_forever()
        print("not reached")
        """)
    assert (code, lines) == (7, [])
    assert "Traceback" not in errors


def test_a_server_that_is_dropped_goes_on_until_it_is_stopped() -> None:
    """The engine keeps it: it ends by stop(), or with the program, never by a garbage collection."""
    code, lines, errors = run("""
        import gc

        def start():
            server = Server(("127.0.0.1", 0), Echo)
            server.start()
            return server.address

        address = start()
        for _ in range(3):
            gc.collect()
            sock = socket.create_connection(address, timeout=10)
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"
            sock.close()
        print("served")
        """)
    assert (code, lines, errors) == (0, ["served"], "")


def test_starting_while_the_interpreter_ends_is_no_hang() -> None:
    code, lines, _errors = run("""
        def late():
            try:
                server = Server(("127.0.0.1", 0), Echo)
                server.start()
                print("started", server.stop(20))
            except RuntimeError as exc:
                print("refused")

        atexit.register(late)
        """)
    assert code == 0
    assert lines in (["started True"], ["refused"])


# -- children -----------------------------------------------------------------------------------------------


def inherits() -> subprocess.Popen[bytes]:
    """Start a child that gets every handle that can be inherited, and keeps it until its stdin closes."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    )
    assert child.stdout is not None
    assert child.stdout.read(2) == b"up"
    return child


def let_go(child: subprocess.Popen[bytes]) -> None:
    child.communicate(timeout=30)


def listening(address: Any) -> bool:
    try:
        raw(address, timeout=3).close()
    except OSError:
        return False
    return True


def test_children_inherit_neither_port_nor_connections() -> None:
    with serving(Echo, (OWN_HOST, 0), backlog=4) as server, raw(server.address) as client:
        echoes(client)
        child = inherits()
        try:
            (connection,) = made(Echo)
            connection.abort()
            assert ended(client) == "reset"  # which comes when the last handle is closed
            server.server_close()
            wait_until(lambda: not listening(server.address))
            assert child.poll() is None
            with serving(Echo, server.address) as again:
                reachable(again.address)
        finally:
            let_go(child)


def test_a_child_does_inherit_what_is_inheritable() -> None:
    """So the test above can fail."""
    with socket.socket() as kept:
        kept.bind((OWN_HOST, 0))
        kept.listen()
        address = kept.getsockname()
        kept.set_inheritable(True)
        child = inherits()
    try:
        assert listening(address)
    finally:
        let_go(child)
    wait_until(lambda: not listening(address))


# -- on_shutdown ---------------------------------------------------------------------------------------------


class Polite(Echo):
    """Says goodbye when the server stops, and closes when the peer has answered."""

    reasons: list[Any] = []  # noqa: RUF012

    def on_shutdown(self) -> None:
        with self.record("shutdown"):
            self.reasons.append(self.close_reason)
            self.send(b"bye")

    def got(self, data: bytes) -> None:
        if data == b"bye":
            self.close()


def test_a_connection_may_say_goodbye_when_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", PATIENCE)
    Polite.reasons.clear()
    with serving(Polite) as server, raw(server.address) as answers, raw(server.address) as late:
        connections = made(Polite, 2)
        for connection in connections:
            connection.until("connect")
        stopped: list[bool] = []
        stopping = threading.Thread(target=lambda: stopped.append(server.stop(6.0)))
        stopping.start()
        for client in (answers, late):
            assert read_exactly(client, 3) == b"bye"
        answers.sendall(b"bye")
        assert ended(answers) == "eof"
        answers.close()
        stopping.join()
        assert stopped == [True]
        assert ended(late) in ("reset", "eof")
    assert Polite.reasons == [None, None], "it is still open then"
    for connection in connections:
        connection.check()
        assert connection.names.count("shutdown") == 1
        assert connection.close_reason == "shutdown"


def test_on_shutdown_does_not_overlap_and_comes_after_on_connect() -> None:
    begin, go = threading.Event(), threading.Event()

    class Slow(Polite):
        def connected(self) -> None:
            begin.set()
            assert go.wait(PATIENCE)

    with serving(Slow) as server, raw(server.address) as client:
        assert begin.wait(PATIENCE)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_until(lambda: server._stopping)
        go.set()
        assert read_exactly(client, 3) == b"bye"
        client.sendall(b"bye")
        assert ended(client) == "eof"
        client.close()
        stopping.join()
    (connection,) = Slow.made
    connection.check()
    assert connection.names[:2] == ["connect", "shutdown"]


def test_on_shutdown_that_raises_ends_its_connection(expects_errors: Any) -> None:
    class Bad(Echo):
        def on_shutdown(self) -> None:
            raise ZeroDivisionError

    with serving(Bad) as server, raw(server.address):
        made(Bad)[0].until("connect")
        assert server.stop(5) is True
    (connection,) = Bad.made
    connection.check()
    assert connection.close_reason == "shutdown"
