"""The commands: what they serve, print and return."""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import random
import re
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from perfetto import read_trace
from program import Program, running
from support import LOOPBACK, PATIENCE, raw, reachable, wait_until
from web import Client
from websockets.sync.client import connect

from iocp_ctypes import Server, _commands, _win32, wsgi
from iocp_ctypes.__main__ import main
from iocp_ctypes.certificate import throwaway_certificate


def free_port() -> int:
    """A port that nobody listens on, or did a moment ago."""
    for port in random.sample(range(20_000, 32_000), 100):  # below what systems hand out by themselves
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a stop by Ctrl-C wait for threads that a busy machine holds up."""
    monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", PATIENCE)


class Waited(threading.Event):
    """Tells when serve_forever waits: from then on Ctrl-C ends it as it should."""

    def __init__(self, tell: Callable[[], object]) -> None:
        super().__init__()
        self.tell = tell

    def wait(self, timeout: float | None = None) -> bool:
        self.tell()
        return super().wait(timeout)


class Noted(Server):
    """A server that can be found again."""

    made: list[Any] = []  # noqa: RUF012

    def __init__(self, address: Any, handler: Any, **options: Any) -> None:
        super().__init__(address, handler, **options)
        self.options = options

    def serve_forever(self, poll_interval: float = 0.25) -> None:
        self._shutdown_wanted = Waited(lambda: self.made.__setitem__(slice(None), [self]))
        super().serve_forever(poll_interval)


def echo_until_interrupted(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, meanwhile: Callable[[Noted], object]
) -> int:
    """Run the command `echo` as `until_interrupted` does."""
    monkeypatch.setattr(_commands, "Server", Noted)
    return until_interrupted(["echo", *arguments], meanwhile)


def until_interrupted(words: list[str], meanwhile: Callable[[Noted], object]) -> int:
    """Run a command in this thread, `meanwhile` in another, then press Ctrl-C."""
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
        code = main(words)
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
    words = "--port 0 --io-threads 2 --work-threads 3 --backlog 5 --sendcap 6 --recvburst 7 --recv-mode burst"
    options: dict[str, object] = {}
    code = echo_until_interrupted(
        monkeypatch, *words.split(), meanwhile=lambda server: options.update(server.options)
    )
    assert code == 0
    assert options == {
        "io_threads": 2,
        "work_threads": 3,
        "backlog": 5,
        "sendcap": 6,
        "recvburst": 7,
        "recv_mode": "burst",
    }


def test_echo_prints_figures_if_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_commands, "STATS_INTERVAL", 600.0)

    def meanwhile(server: Noted) -> None:
        for _ in range(3):
            reachable(server.address, b"12345")

    assert echo_until_interrupted(monkeypatch, "--port", "0", "--stats", meanwhile=meanwhile) == 0
    listening, *figures = capsys.readouterr().out.splitlines()
    assert listening.startswith("listening on 127.0.0.1:")
    told = dict(line.split(": ", 1) for line in figures)
    assert (told["accepted"], told["bytes_received"], told["bytes_sent"]) == ("3", "15", "15")
    assert told["engine.ops_pending"] == "0"


class Told(list[str]):
    """Standard output that a thread may read while another prints, which pytest's is not."""

    write = list.append

    def flush(self) -> None: ...


def test_echo_prints_a_line_of_figures_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_commands, "STATS_INTERVAL", 0.05)
    monkeypatch.setattr(sys, "stdout", told := Told())

    def meanwhile(server: Noted) -> None:
        with raw(server.address) as client:
            client.sendall(b"12345")
            wait_until(lambda: "1 accepted" in "".join(told))

    assert echo_until_interrupted(monkeypatch, "--port", "0", "--stats", meanwhile=meanwhile) == 0
    lines = "".join(told).splitlines()[1:]
    figures = [line for line in lines if "receives/s" in line]
    pattern = (
        r"(\d+) connections \(peak \d+\), \d+ accepted, 0 failed, 0 refused, 0 reaped;"
        r" \d+ receives/s, \d+\.\d\d MiB/s in, \d+\.\d\d MiB/s out;"
        r" backlog \d+ of 64, \d+ sends in flight, \d+ bytes queued, \d+\.\d packets/reap"
    )
    assert figures
    assert all(re.fullmatch(pattern, line) for line in figures), figures
    assert any(line.startswith("1 connections") for line in figures)
    assert "accepted: 1" in lines, "all figures come at the end as well"
    assert not [thread for thread in threading.enumerate() if thread.name == "iocp_ctypes figures"]


def test_a_line_of_figures_tells_rates() -> None:
    with Server(LOOPBACK, _commands.Echo, io_threads=1) as server:
        before = server.stats()
        now = dataclasses.replace(before, receives=before.receives + 40, bytes_sent=4 << 20)
        assert "; 20 receives/s, 0.00 MiB/s in, 2.00 MiB/s out;" in _commands.figures_line(before, now, 2.0)


def test_echo_writes_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "echo.json"
    words = ["--port", "0", "--trace", str(file)]
    assert (
        echo_until_interrupted(monkeypatch, *words, meanwhile=lambda server: reachable(server.address)) == 0
    )
    told = re.fullmatch(r"(\d+) records of the trace are in (.*)", capsys.readouterr().out.splitlines()[-1])
    assert told is not None
    assert told[2] == str(file)
    found = read_trace(file)
    assert len(found.slices) == int(told[1])
    assert found.names["send"] == 1


def test_a_trace_that_cannot_be_written_is_told_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["echo", "--port", "0", "--trace", str(tmp_path / "missing" / "trace.json")])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


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


def test_echo_over_tls(tmp_path: Path) -> None:
    made = throwaway_certificate()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(made.certificate)
    key.write_text(made.key)
    files = ["--tls-cert", str(cert), "--tls-key", str(key)]
    with running("-m", "iocp_ctypes", "echo", "--port", "0", *files) as program:
        address = program.listening()
        with raw(address) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while plain.recv(100):
                pass
        with made.client_context().wrap_socket(raw(address), server_hostname="localhost") as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
    # `running` asserts that nothing else was printed: no traceback for who does not speak TLS.


def test_echo_to_a_client_that_reads_late() -> None:
    size = 12_000_000
    with (
        running("-m", "iocp_ctypes", "echo", "--port", "0") as program,
        raw(program.listening(), 60) as client,
    ):
        sender = threading.Thread(target=client.sendall, args=(bytes(size),))
        sender.start()
        sender.join(0.5)
        held_back = sender.is_alive()
        left = size
        while left:
            left -= len(client.recv(65536))
        sender.join()
    assert held_back, "the server took everything, though nobody read what it sent back"


def test_http_serves_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "large.bin").write_bytes(bytes(3_000_000))
    arguments = ("http", str(tmp_path), "--port", "0", "--log")
    with running("-m", "iocp_ctypes", *arguments) as program, Client(program.listening()) as client:
        assert client.ask("/a.txt").body == b"text"
        program.line(r'127\.0\.0\.1 - - \[.*\] "GET /a\.txt HTTP/1\.1" 200 4 "-" "-"')
        assert client.ask("/large.bin").body == bytes(3_000_000)
        program.line(r'.* "GET /large\.bin HTTP/1\.1" 200 3000000 "-" "-"')
        assert b"./a.txt" in client.ask("/").body
        program.line(r'.* "GET / HTTP/1\.1" 200 \d+ "-" "-"')
        assert client.ask("/b%22.txt").status == 404
        program.line(r'.* "GET /b%22\.txt HTTP/1\.1" 404 14 "-" "-"')
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        assert client.answer().status == 400
        program.line(r'.* "GET / HTTP/1\.1" 400 .*|.* "-" 400 .*')


def test_http_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["http", "no-such-folder", "--port", "0"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "python -m iocp_ctypes: error: no such folder: no-such-folder\n"


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

    def noted(self: Any) -> None:
        self._shutdown_wanted = Waited(serving.set)
        serve(self)

    monkeypatch.setattr(Server, "serve_forever", noted)
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


SHOP = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    keys = ("REMOTE_ADDR", "SCRIPT_NAME", "PATH_INFO")
    return [" ".join(environ[key] for key in keys).encode()]

class Holder:
    inner = staticmethod(app)

text = "no application"
"""


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make a folder with modules the current directory, for one test."""
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "broken.py").write_text("x = 1\nraise ValueError('two\\nlines')\n")
    (tmp_path / "needs.py").write_text("import nothing_like_it\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("shop", "broken", "needs"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["shop"], "'shop': must be MODULE:APP, such as shop:app"),
        ([":app"], "':app': must be MODULE:APP"),
        (["no_such_shop:app"], "'no_such_shop:app': there is no module 'no_such_shop'"),
        (["shop.sub:app"], "there is no module 'shop.sub'"),
        (["shop:nothing"], "'shop:nothing': 'shop' has no 'nothing'"),
        (["shop:Holder.outer"], "'shop' has no 'Holder.outer'"),
        (["shop:text"], "is of type str, which cannot be called"),
        (["broken:app"], "importing 'broken' raised ValueError: two lines (broken.py, line 2)"),
        (["needs:app"], "importing 'needs' raised ModuleNotFoundError: No module named 'nothing_like_it'"),
        (["shop:app", "--trusted", "office"], "'office' does not appear to be"),
        (["shop:app", "--script-name", "shop"], "script_name='shop'"),
        (["shop:app", "--work-threads", "0"], "work_threads=0"),
    ],
)
def test_wsgi_tells_in_one_line_what_is_wrong(
    shop: None, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["wsgi", *arguments, "--port", "0"])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("python -m iocp_ctypes: error: ")
    assert told in err


def test_wsgi_serves_until_ctrl_c(
    shop: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NotedWSGI(wsgi.WSGIServer):
        def serve_forever(self, poll_interval: float = 0.25) -> None:
            self._shutdown_wanted = Waited(lambda: Noted.made.__setitem__(slice(None), [self]))
            super().serve_forever(poll_interval)

    monkeypatch.setattr(wsgi, "WSGIServer", NotedWSGI)
    bodies: list[bytes] = []

    def meanwhile(server: Noted) -> None:
        with Client(server.address) as client:
            bodies.append(client.ask("/shop/a", X_Forwarded_For="203.0.113.5").body)

    words = "wsgi shop:Holder.inner --port 0 --script-name /shop --trusted 127.0.0.1 --trusted ::1 --log"
    assert until_interrupted(words.split(), meanwhile) == 0
    out, err = capsys.readouterr()
    listening, line = out.splitlines()
    assert listening.startswith("listening on 127.0.0.1:")
    assert '"GET /shop/a HTTP/1.1" 200' in line
    assert err == ""
    assert bodies == [b"203.0.113.5 /shop /a"]
