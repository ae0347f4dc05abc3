"""The examples, each run as its first lines say, with plain sockets as clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import tempfile
import threading
import time
from pathlib import Path

import pytest
from program import ROOT, Program, running
from support import PATIENCE, Echo, ended, raw, read_all, read_exactly, serving
from support import made as made_connections
from traffic import LONG
from web import Client
from websockets.sync.client import connect

from iocp_ctypes import open_stream
from iocp_ctypes.certificate import throwaway_certificate

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def example(name: str, *arguments: str) -> contextlib.AbstractContextManager[Program]:
    """Run an example for a `with` block."""
    return running("-m", f"examples.{name}", "--port", "0", *arguments)


def line_of(sock: socket.socket) -> bytes:
    """Read one line, and nothing of the next."""
    line = b""
    while not line.endswith(b"\n"):
        waiting = sock.recv(65536, socket.MSG_PEEK)
        assert waiting, f"the end came after {line!r}"
        line += read_exactly(sock, waiting.find(b"\n") + 1 or len(waiting))
    return line


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"`py -m examples.{name} {'HOST' if name == 'ping' else '[--port N]'}" in text


def test_echo() -> None:
    with example("echo_server") as program, contextlib.ExitStack() as stack:
        address = program.listening()
        clients = []
        for _ in range(5):
            clients.append(client := stack.enter_context(raw(address)))
            program.line(rf"hello \('127\.0\.0\.1', {client.getsockname()[1]}\)")
        for number, client in enumerate(clients):
            client.sendall(b"number %d" % number)
        for number, client in enumerate(clients):
            assert read_exactly(client, 8) == b"number %d" % number
        first, *others = clients
        first.shutdown(socket.SHUT_WR)
        assert read_all(first) == b""
        program.line(rf"bye \('127\.0\.0\.1', {first.getsockname()[1]}\): eof")
        for client in others:
            client.close()
            program.line(r"bye \('127\.0\.0\.1', \d+\): eof")


def test_echo_to_a_client_that_reads_late() -> None:
    size = 80_000_000  # more than two connections can hold whose buffers have grown
    with example("echo_server") as program, raw(program.listening(), LONG) as client:
        program.line("hello .*")
        sender = threading.Thread(target=client.sendall, args=(bytes(size),))
        sender.start()
        sender.join(0.5)
        held_back = sender.is_alive()
        assert read_exactly(client, size) == bytes(size)
        sender.join(LONG)
        client.close()
        program.line("bye .*: eof")
    assert held_back, "the server took everything, though nobody read what it sent back"


def enter(address: tuple[str, int], name: str, receive_buffer: int = 0) -> socket.socket:
    """Join the chat."""
    sock = socket.socket()
    sock.settimeout(PATIENCE)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(address)
    assert line_of(sock) == b"your name?\n"
    sock.sendall(f"{name}\n/who\n".encode())
    assert name.encode() in line_of(sock)
    return sock


def test_chat() -> None:
    with example("chat_server") as program:
        address = program.listening()
        with enter(address, "Ann") as ann, enter(address, "Bob") as bob, enter(address, "Cleo") as cleo:
            assert [line_of(ann), line_of(ann)] == [b"* Bob is here\n", b"* Cleo is here\n"]
            assert line_of(bob) == b"* Cleo is here\n"
            ann.sendall(b"hello, ")
            ann.sendall("all of you: grüß Gott\r\nand good bye\n".encode())
            for other in (bob, cleo):
                assert line_of(other) == "Ann: hello, all of you: grüß Gott\n".encode()
                assert line_of(other) == b"Ann: and good bye\n"
            bob.sendall(b"/who\n")
            assert line_of(bob) == b"* Ann, Bob, Cleo\n"
            cleo.sendall(b"x" * 5000)  # longer than a line may be
            assert ended(cleo) in ("reset", "eof")
            for other in (ann, bob):
                assert line_of(other) == b"* Cleo has left: aborted\n"


def test_chat_drops_who_does_not_read() -> None:
    line = b"x" * 4000 + b"\n"
    with example("chat_server") as program:
        address = program.listening()
        with (
            enter(address, "Ann") as ann,
            enter(address, "Slow", receive_buffer=4096) as slow,
            enter(address, "Bob") as bob,
        ):
            assert [line_of(ann), line_of(ann)] == [b"* Slow is here\n", b"* Bob is here\n"]
            said = 0
            heard = b"Ann: " + line
            while heard == b"Ann: " + line:
                assert said < 40_000_000, "who reads nothing was kept"  # no system keeps so much for a socket
                ann.sendall(line)
                said += len(line)
                heard = line_of(bob)
            assert heard == line_of(ann) == b"* Slow has left: overflow\n"
            assert said > 256 * 1024, "it was dropped too early"
            assert line_of(bob) == b"Ann: " + line, "another guest missed something"
            with contextlib.suppress(ConnectionResetError):
                assert len(read_all(slow)) < said


def test_lines() -> None:
    with example("line_server") as program:
        address = program.listening()
        with raw(address) as one, raw(address) as two:
            one.sendall(b"set colour dark blue\r\nget colour\nget taste\nwhat\nget\nset x\n")
            answers = b"ok\ndark blue\n?\nerror\nerror\nerror\n"
            assert read_exactly(one, len(answers)) == answers
            two.sendall(b"get col")
            two.sendall(b"our\nquit\nget colour\n")
            assert read_all(two) == b"dark blue\n"
            one.sendall(b"x" * 3000)  # longer than a line may be
            assert ended(one) in ("reset", "eof")


def test_line_deadline_is_not_moved_by_single_bytes() -> None:
    stop = threading.Event()

    def drip(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                sock.sendall(b"g")

    with example("line_server", "--seconds", "6") as program:
        address = program.listening()
        with raw(address, 30) as slow, raw(address, 30) as quick:
            dripping = threading.Thread(target=drip, args=(slow,))
            dripping.start()
            try:
                for _ in range(14):  # over 7 s
                    time.sleep(0.5)
                    quick.sendall(b"get x\n")
                    assert line_of(quick) == b"?\n", "whole lines move it"
                assert line_of(slow) == b"too slow\n"  # never, while it drips, were it moved
            finally:
                stop.set()
                dripping.join()
            assert line_of(quick) == b"too slow\n", "a quick client that stops is cut as well"


def test_tls_proxy() -> None:
    made = throwaway_certificate()
    block = bytes(range(256)) * 256
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pair = Path(folder, "pair.pem")
        pair.write_text(made.key + made.certificate)
        inner = stack.enter_context(serving(Echo))
        to = "{}:{}".format(*inner.address)
        program = stack.enter_context(example("tls_proxy", "--to", to, "--cert", str(pair)))
        address = program.listening()
        context = made.client_context()
        for _ in range(2):
            with open_stream(address, timeout=LONG, tls=context, server_hostname="localhost") as stream:
                sender = threading.Thread(target=lambda s=stream: [s.write(block) for _ in range(100)])
                sender.start()
                sender.join(0.3)
                assert stream.readexactly(100 * len(block)) == 100 * block
                sender.join()
                stream.write_eof()
                assert stream.read() == b"", "the inner server's end comes through"
        for inner_side in made_connections(Echo, 2):
            inner_side.until("close")
            assert inner_side.close_reason == "eof"
        with context.wrap_socket(raw(address), server_hostname="localhost") as cut_off:
            cut_off.sendall(b"hello")
            assert cut_off.recv(5) == b"hello"
            cut_off.shutdown(socket.SHUT_WR)  # without close_notify: a part must not pass for the whole
            third = made_connections(Echo, 3)[2]
            third.until("close")
            third.check()  # by a reset, which a receive under Wine may find to be EOF


def test_tls_proxy_holds_back_who_sends_faster_than_the_other_reads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        to = "{}:{}".format(*listener.getsockname())
        with example("tls_proxy", "--to", to) as program:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(raw(program.listening())) as client:
                inner, _peer = listener.accept()
                with inner:
                    client.settimeout(1)
                    with pytest.raises(TimeoutError):
                        client.sendall(bytes(100_000_000))
                    assert read_exactly(inner, 100_000) == bytes(100_000)


def test_client() -> None:
    with example("client") as server:
        _host, port = server.listening()
        for times in (1, 2):
            asking = Program("-m", "examples.client", "--port", str(port), "--ask", "tea", "milk", "tea")
            try:
                asking.line(f"tea {2 * times - 1}")
                asking.line(f"milk {times}")
                asking.line(f"tea {2 * times}")
                assert asking.ended() == (0, [])
            finally:
                asking.kill()


def test_http_files() -> None:
    arguments = ("--folder", "examples", "--password", "ann:pw")
    with example("http_files", *arguments) as program, Client(program.listening()) as client:
        assert client.ask("/").status == 401
        ann = {"Authorization": "Basic YW5uOnB3"}
        listing = client.ask("/", **ann)
        assert b'<a href="./http_files.py">http_files.py</a>' in listing.body
        source = client.ask("/http_files.py", **ann)
        assert source.body == (ROOT / "examples" / "http_files.py").read_bytes()
        assert client.ask("/http_files.py", **ann, If_None_Match=source.headers["etag"]).status == 304
        assert client.ask("/http_files.py", **ann, Range="bytes=0-2").body == b'"""'
        assert len(client.ask("/time", **ann).body) == 9
        assert client.ask("/echo", "POST", b"as it was", **ann).body == b"as it was"
        assert client.ask("/echo", **ann).status == 405
        figures = client.ask("/metrics", **ann).body.decode()
        assert 'iocp_ctypes_http_requests_total{method="GET",status="401"} 1\n' in figures
        assert client.ask("/../README.md", **ann).status == 404


def test_sse_clock() -> None:
    with example("sse_clock", "--every", "0.05") as program:
        address = program.listening()
        pages = [http.client.HTTPConnection(*address, timeout=PATIENCE) for _ in range(3)]
        heard = []
        for page in pages:
            page.request("GET", "/events")
            events = page.getresponse()
            assert events.getheader("Content-Type") == "text/event-stream"
            lines = [events.readline() for _ in range(2 + 2 * 4)]
            assert lines[:2] == [b"retry: 2000\n", b"\n"]
            heard.append(lines[2:])
        for lines in heard:
            for number in (0, 4):
                assert lines[number] == b"event: tick\n"
                assert lines[number + 1].startswith(b"id: ")
                assert time.strptime(lines[number + 2].decode(), "data: %H:%M:%S\n")
                assert lines[number + 3] == b"\n"
        for page in pages:
            page.close()
        with Client(address) as client:
            assert b"EventSource" in client.ask("/").body


def test_https_hello() -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with example("https_hello") as program:
        host, port = program.listening()
        client = http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context)
        for _ in range(3):
            client.request("GET", "/")
            assert client.getresponse().read() == b"hello 127.0.0.1, this is TLSv1.3\n"
        client.close()


def test_websocket_chat() -> None:
    with example("websocket_chat") as program:
        address = program.listening()
        with raw(address) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\nHost: chat\r\n\r\n")
            head, _, page = read_all(browser).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"Content-Type: text/html; charset=utf-8" in head
            assert f"Content-Length: {len(page)}".encode() in head
            assert b"new WebSocket(`ws://${location.host}/chat`)" in page
        url = f"ws://127.0.0.1:{address[1]}/chat"
        with connect(url) as ann:
            told = [json.loads(ann.recv(PATIENCE))]  # then she is among those that are told
            with connect(url) as bob:
                told.append(json.loads(ann.recv(PATIENCE)))
                assert [message["text"] for message in told] == ["is here", "is here"]
                assert json.loads(bob.recv(PATIENCE))["text"] == "is here"
                ann.send("grüß Gott")
                for guest in (ann, bob):
                    assert json.loads(guest.recv(PATIENCE)) == {"who": told[0]["who"], "text": "grüß Gott"}
                ann.close()
                assert json.loads(bob.recv(PATIENCE)) == {"who": told[0]["who"], "text": "has left (1000)"}


def test_flask() -> None:
    with example("flask_app") as program, Client(program.listening()) as client:
        assert client.ask("/").body == b"hello 127.0.0.1\n"
        answer = client.ask("/count", "POST", b"one\ntwo\n" * 500_000)
        assert json.loads(answer.body) == {"bytes": 4_000_000, "lines": 1_000_000}
        assert client.ask("/nothing").status == 404
        client.send(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.head().headers["transfer-encoding"] == "chunked"
        assert client.until(b"line 0\n\r\n").endswith(b"line 0\n\r\n")  # before there is another


def get(address: tuple[str, int], target: str, method: str = "GET") -> tuple[str, bytes]:
    """Ask the file server: the status line and the body."""
    with raw(address) as client:
        client.sendall(f"{method} {target} HTTP/1.0\r\nHost: here\r\n\r\n".encode("latin-1"))
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), body


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    (folder / "inner").mkdir(parents=True)
    big = bytes(range(256)) * 40_000
    (folder / "inner" / "big file.bin").write_bytes(big)
    (folder / "empty").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"nobody's business")
    with example("file_server", str(folder)) as program:
        address = program.listening()
        assert get(address, "/inner/big%20file.bin?query") == ("HTTP/1.0 200 OK", big)
        assert get(address, "/empty") == ("HTTP/1.0 200 OK", b"")
        for hidden in (
            "/",
            "/nothing",
            "/inner",
            "/../secret",
            "/%2e%2e/secret",
            "/..%5csecret",
            "/inner/..%5C..%5Csecret",
            "//secret",
            f"/{tmp_path}\\secret".replace("\\", "%5C"),
            "/NUL",
            "/empty::$DATA",
            "/C:/Windows/win.ini",
        ):
            assert get(address, hidden) == ("HTTP/1.0 404 Not Found", b""), hidden
        assert get(address, "/empty", "POST") == ("HTTP/1.0 400 Bad Request", b"")
        with raw(address) as client:
            client.sendall(b"x" * 9000)
            assert client.recv(100).startswith(b"HTTP/1.0 400 ")
