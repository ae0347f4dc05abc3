"""The commands: what they serve, print and return."""

from __future__ import annotations

import _thread
import contextlib
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from program import Program, running
from support import LOOPBACK, PATIENCE, raw, reachable, wait_until
from websockets.sync.client import connect

from iocp_ctypes import Server, _commands, _win32
from iocp_ctypes.__main__ import main


def free_port() -> int:
    """A port that nobody listens on, or did a moment ago."""
    with socket.socket() as sock:
        sock.bind(LOOPBACK)
        port: int = sock.getsockname()[1]
    return port


class Noted(Server):
    """A server that can be found again."""

    made: list[Any] = []  # noqa: RUF012

    def __init__(self, address: Any, handler: Any, **options: Any) -> None:
        super().__init__(address, handler, **options)
        self.options = options

    def serve_forever(self, poll_interval: float = 0.25) -> None:
        self.made[:] = [self]
        super().serve_forever(poll_interval)


def echo_until_interrupted(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, meanwhile: Callable[[Noted], object]
) -> int:
    """Run the command in this thread, `meanwhile` in another, then press Ctrl-C."""
    monkeypatch.setattr(_commands, "Server", Noted)
    Noted.made.clear()
    failures: list[BaseException] = []

    def other() -> None:
        try:
            server = wait_until(lambda: Noted.made)[0]
            meanwhile(server)
        except BaseException as exc:
            failures.append(exc)
        finally:
            _thread.interrupt_main()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        code = main(["echo", *arguments])
    finally:
        thread.join()
    if failures:
        raise failures[0]
    return code


def test_echo_serves_until_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    code = echo_until_interrupted(
        monkeypatch, "--port", str(port), meanwhile=lambda server: reachable(server.address)
    )
    assert code == 0
    out, err = capsys.readouterr()
    assert out == f"listening on 127.0.0.1:{port}\n"
    assert err == ""


def test_echo_hands_its_options_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--port 0 --io-threads 2 --work-threads 3 --backlog 5 --sendcap 6 --recv-mode flow"
    options: dict[str, object] = {}
    code = echo_until_interrupted(
        monkeypatch, *words.split(), meanwhile=lambda server: options.update(server.options)
    )
    assert code == 0
    assert options == {"io_threads": 2, "work_threads": 3, "backlog": 5, "sendcap": 6, "recv_mode": "flow"}


def test_echo_prints_figures_if_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def meanwhile(server: Noted) -> None:
        for _ in range(3):
            reachable(server.address, b"12345")

    assert echo_until_interrupted(monkeypatch, "--port", "0", "--stats", meanwhile=meanwhile) == 0
    listening, *figures = capsys.readouterr().out.splitlines()
    assert listening.startswith("listening on 127.0.0.1:")
    told = dict(line.split(": ", 1) for line in figures)
    assert (told["accepted"], told["bytes_received"], told["bytes_sent"]) == ("3", "15", "15")
    assert told["engine.ops_pending"] == "0"


def test_echo_names_every_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def meanwhile(server: Noted) -> None:
        port = server.address[1]
        reachable(("127.0.0.1", port))
        reachable(("::1", port))

    assert echo_until_interrupted(monkeypatch, "--host", "", "--port", "0", meanwhile=meanwhile) == 0
    assert re.fullmatch(r"listening on \[::\]:\d+\n", capsys.readouterr().out)


def test_echo_in_a_process_of_its_own() -> None:
    with running("-m", "iocp_ctypes", "echo", "--port", "0") as program:
        address = program.listening()
        reachable(address, bytes(100_000))
        reachable(address)


def test_echo_to_a_client_that_reads_late() -> None:
    size = 12_000_000
    with running("-m", "iocp_ctypes", "echo", "--port", "0") as program, raw(program.listening()) as client:
        sender = threading.Thread(target=client.sendall, args=(bytes(size),))
        sender.start()
        sender.join(0.5)
        held_back = sender.is_alive()
        left = size
        while left:
            left -= len(client.recv(65536))
        sender.join()
    assert held_back, "the server took everything, though nobody read what it sent back"


def test_websocket_in_a_process_of_its_own() -> None:
    with running("-m", "iocp_ctypes", "websocket", "--port", "0", "--io-threads", "2") as program:
        host, port = program.listening()
        with connect(f"ws://{host}:{port}/", max_size=None) as client:
            assert client.protocol.extensions, "it compresses where the client can"
            for message in ("text", b"bytes", "x" * (16 << 20)):
                client.send(message)
                assert client.recv() == message
            client.send(["x"] * 65536)
            assert client.recv() == "x" * 65536


def test_websocket_serves_until_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve, serving = Server.serve_forever, threading.Event()
    monkeypatch.setattr(Server, "serve_forever", lambda self: (serving.set(), serve(self)))
    thread = threading.Thread(target=lambda: serving.wait(PATIENCE) and _thread.interrupt_main())
    thread.start()
    assert main(["websocket", "--port", "0", "--stats"]) == 0
    thread.join()
    out, err = capsys.readouterr()
    assert out.startswith("listening on 127.0.0.1:")
    assert "accepted: 0" in out
    assert err == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.1", "no-such-host.invalid"])
def test_cannot_listen(capsys: pytest.CaptureFixture[str], host: str) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        taken.bind(LOOPBACK)
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            main(["echo", "--host", host, "--port", str(port)])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"cannot listen on {host}:{port}: " in err
    assert err.count("\n") == 1


def test_demo_as_in_the_readme() -> None:
    program = Program("-m", "iocp_ctypes", "demo")
    try:
        program.listening()
        program.line(r"connections   1000, \d+ of them at once")
        program.line(r"exchanges     5000 of 5000 came back as they were sent")
        threads = program.line(r"threads       (\d+) ran the callbacks of all connections")
        calls = program.line(r"native calls  (\d+), ([\d.]+) an exchange: (.*) \.\.\.")
        sent = sum(len(f"message {m} of client {c}\n") for m in range(5) for c in range(1000))
        program.line(f"bytes         {sent} received, {sent} sent")
        program.line(r"time          [\d.]+ s with the clients in the same process")
        assert program.ended() == (0, [])
    finally:
        program.kill()
    assert 1 <= int(threads[1]) < 100
    # At least a receive and a send for each exchange, an AcceptEx and a closesocket for each connection.
    assert int(calls[1]) >= 2 * 5000 + 2 * 1000
    assert float(calls[2]) == pytest.approx(int(calls[1]) / 5000, abs=0.051)
    most = {name: int(count) for count, name in (call.split(" ") for call in calls[3].split(", "))}
    assert most["WSARecv"] >= 5000, most
    assert most["WSASend"] >= 5000, most


def test_demo_that_gets_something_else_back_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        _commands.Echo,
        "on_data",
        lambda self, data: self.send(data.replace(b"1 of client 2\n", b"x of client 2\n")),
    )
    assert main(["demo", "--clients", "5", "--messages", "3"]) == 1
    assert "exchanges     14 of 15 came back as they were sent" in capsys.readouterr().out


def test_demo_that_hangs_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_commands, "DEMO_TIMEOUT", 0.5)
    monkeypatch.setattr(_commands.Echo, "on_data", lambda self, data: None)
    assert main(["demo", "--clients", "3"]) == 1
    assert re.fullmatch(r"failed: TimeoutError.*\n", capsys.readouterr().err)


def test_demo_whose_connections_break_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_commands.Echo, "on_data", lambda self, data: self.close())
    assert main(["demo", "--clients", "3"]) == 1
    assert re.fullmatch(r"failed: IncompleteReadError.*\n", capsys.readouterr().err)


def test_counting_native_calls_leaves_no_trace() -> None:
    before = dict(vars(_win32))
    with contextlib.suppress(ZeroDivisionError), _commands.counted_calls() as calls:
        with Server(LOOPBACK, _commands.Echo, backlog=3, io_threads=1) as server:
            reachable(server.address)
        raise ZeroDivisionError
    assert vars(_win32) == before
    assert calls["AcceptEx"] == calls["WSASocketW"] == 4
    assert calls["WSASend"] == 1
    assert calls["closesocket"] == 4
