"""The examples, each run as its first lines say, with plain sockets as clients."""

from __future__ import annotations

import contextlib
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PATIENCE, ended, raw, read_all, read_exactly

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


class Program:
    """An example that runs; its output comes line by line."""

    def __init__(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"examples.{name}", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        host, port = self.line(r"listening on ([0-9.]+):(\d+)").groups()
        self.address = (host, int(port))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip())

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for the next line of output, which must match."""
        line = self._lines.get(timeout=3 * PATIENCE)
        match = re.fullmatch(pattern, line)
        assert match, f"{line!r} is not like {pattern!r}"
        return match

    def end(self) -> list[str]:
        """End the program; returns the lines that nobody asked for."""
        assert self.process.poll() is None, f"it had ended by itself: {list(self._lines.queue)}"
        self.process.kill()
        self._reader.join(PATIENCE)
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return list(self._lines.queue)


@contextlib.contextmanager
def running(name: str, *arguments: str) -> Iterator[Program]:
    """Run an example for a `with` block; it writes nothing, above all no traceback, that is not asked for."""
    program = Program(name, *arguments)
    try:
        yield program
    except BaseException:
        program.process.kill()
        raise
    assert program.end() == []


def line_of(sock: socket.socket) -> bytes:
    """Read one line; what comes after it stays."""
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        assert byte, f"the end came after {line!r}"
        line += byte
    return line


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"`py -m examples.{name} [--port N]" in text


def test_echo() -> None:
    with running("echo_server") as program, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(raw(program.address)) for _ in range(5)]
        for client in clients:
            program.line(rf"hello \('127\.0\.0\.1', {client.getsockname()[1]}\)")
        for number, client in enumerate(clients):
            client.sendall(b"number %d" % number)
        for number, client in enumerate(clients):
            assert read_exactly(client, 8) == b"number %d" % number
        first = clients[0]
        first.shutdown(socket.SHUT_WR)
        assert read_all(first) == b""
        program.line(rf"bye \('127\.0\.0\.1', {first.getsockname()[1]}\) eof")
        for client in clients[1:]:
            client.close()
        for _ in clients[1:]:
            program.line(r"bye .* eof")


def test_echo_to_a_client_that_reads_late() -> None:
    size = 12_000_000
    with running("echo_server") as program, raw(program.address) as client:
        program.line("hello .*")
        sender = threading.Thread(target=client.sendall, args=(bytes(size),))
        sender.start()
        sender.join(0.5)
        assert sender.is_alive(), "the server took everything, though nobody read what it sent back"
        assert read_exactly(client, size) == bytes(size)
        sender.join(PATIENCE)
        client.close()
        program.line("bye .* eof")


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
    with running("chat_server") as program:
        with enter(program.address, "Ann") as ann, enter(program.address, "Bob") as bob:
            assert line_of(ann) == b"* Bob is here\n"
            with enter(program.address, "Cleo") as cleo:
                for other in (ann, bob):
                    assert line_of(other) == b"* Cleo is here\n"
                ann.sendall(b"hello, ")
                ann.sendall("all of you: grüß Gott\r\nand good bye\n".encode())
                for other in (bob, cleo):
                    assert line_of(other) == "Ann: hello, all of you: grüß Gott\n".encode()
                    assert line_of(other) == b"Ann: and good bye\n"
                bob.sendall(b"/who\n")
                assert line_of(bob) == b"* Ann, Bob, Cleo\n"
                cleo.sendall(b"x" * 5000)  # longer than a line may be
                with contextlib.suppress(ConnectionResetError):
                    assert read_all(cleo) == b""
            for other in (ann, bob):
                assert line_of(other) == b"* Cleo has left: aborted\n"


def test_chat_drops_who_does_not_read() -> None:
    line = b"x" * 4000
    with running("chat_server") as program:
        with enter(program.address, "Ann") as ann, enter(program.address, "Slow", 4096) as slow:
            assert line_of(ann) == b"* Slow is here\n"
            with enter(program.address, "Bob") as bob:
                assert line_of(ann) == b"* Bob is here\n"
                said = 0
                for said in range(1, 10_000):  # 40 MB at the most: more than any system keeps for a socket
                    ann.sendall(line + b"\n")
                    heard = line_of_many(bob)
                    if heard == b"* Slow has left: overflow\n":
                        break
                    assert heard == b"Ann: " + line + b"\n"
                else:
                    pytest.fail("a guest that reads nothing was kept")
                assert said * len(line) > 256 * 1024, "it was dropped too early"
                assert line_of(ann) == b"* Slow has left: overflow\n"
                ann.sendall(b"still here?\n")
                heard = [line_of_many(bob), line_of_many(bob)]
                assert b"Ann: still here?\n" in heard
            with contextlib.suppress(ConnectionResetError):
                read_all(slow)


def line_of_many(sock: socket.socket) -> bytes:
    """Read one line where many long ones come: in pieces as they are there, and nothing of the next."""
    line = b""
    while not line.endswith(b"\n"):
        waiting = sock.recv(65536, socket.MSG_PEEK)
        end = waiting.find(b"\n") + 1
        line += read_exactly(sock, end or len(waiting))
    return line


def test_lines() -> None:
    with running("line_server") as program, raw(program.address) as one, raw(program.address) as two:
        one.sendall(b"set colour dark blue\r\nget colour\nget taste\nwhat\nget\nset x\n")
        answers = b"ok\ndark blue\n?\nerror\nerror\nerror\n"
        assert read_exactly(one, len(answers)) == answers
        two.sendall(b"get col")
        two.sendall(b"our\nquit\nget colour\n")
        assert read_all(two) == b"dark blue\n"
        one.sendall(b"x" * 3000)
        assert ended(one) == "reset"


def test_line_deadline_is_not_moved_by_single_bytes() -> None:
    with running("line_server", "--seconds", "1") as program, raw(program.address) as slow:
        began = time.monotonic()
        with raw(program.address) as quick:
            stop = threading.Event()

            def drip() -> None:
                with contextlib.suppress(OSError):
                    while not stop.wait(0.1):
                        slow.sendall(b"g")

            dripping = threading.Thread(target=drip)
            dripping.start()
            try:
                for _ in range(8):  # whole lines, over 1.6 s, move the deadline
                    time.sleep(0.2)
                    quick.sendall(b"get x\n")
                    assert line_of(quick) == b"?\n"
                assert read_all(slow) == b"too slow\n"
            finally:
                stop.set()
                dripping.join()
        assert 1 <= time.monotonic() - began
