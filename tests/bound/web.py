"""A plain HTTP client of the tests: it sends what it is told to, and reads answers to the byte."""

from __future__ import annotations

import socket
from typing import Any, NamedTuple

from support import PATIENCE, raw


class Answer(NamedTuple):
    """An answer, its body taken out of chunks."""

    status: int
    headers: dict[str, str]
    body: bytes
    head: bytes


class Client:
    """A connection to an HTTP server."""

    def __init__(self, address: Any, timeout: float = PATIENCE) -> None:
        self.sock = raw(address, timeout)
        self.waiting = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def until(self, end: bytes) -> bytes:
        """Read up to and with `end`; what came by then, where the connection ends before."""
        while end not in self.waiting:
            data = self.sock.recv(65536)
            if not data:
                break
            self.waiting += data
        found, between, self.waiting = self.waiting.partition(end)
        return found + between

    def exactly(self, count: int) -> bytes:
        while len(self.waiting) < count:
            data = self.sock.recv(65536)
            assert data, f"the end came after {len(self.waiting)} of {count} bytes"
            self.waiting += data
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def rest(self) -> bytes:
        """Read up to the end of the connection."""
        while data := self.sock.recv(65536):
            self.waiting += data
        taken, self.waiting = self.waiting, b""
        return taken

    def head(self) -> Answer:
        """Read an answer without its body."""
        head = self.until(b"\r\n\r\n")
        assert head.endswith(b"\r\n\r\n"), f"the end came after {head!r}"
        first, *lines = head[:-4].split(b"\r\n")
        version, status, _reason = first.split(b" ", 2)
        assert version == b"HTTP/1.1"
        headers: dict[str, str] = {}
        for line in lines:
            name, value = line.decode("latin-1").split(": ", 1)
            assert name.lower() not in headers, f"{name} came twice"
            headers[name.lower()] = value
        return Answer(int(status), headers, b"", head)

    def answer(self, method: str = "GET") -> Answer:
        """Read an answer."""
        answer = self.head()
        if method == "HEAD" or answer.status in (204, 304) or answer.status < 200:
            return answer
        if "content-length" in answer.headers:
            return answer._replace(body=self.exactly(int(answer.headers["content-length"])))
        if answer.headers.get("transfer-encoding") == "chunked":
            return answer._replace(body=b"".join(self.chunks()))
        return answer._replace(body=self.rest())

    def chunks(self) -> list[bytes]:
        """Read a chunked body."""
        chunks = []
        while size := int(self.until(b"\r\n"), 16):
            chunks.append(self.exactly(size))
            assert self.exactly(2) == b"\r\n"
        assert self.exactly(2) == b"\r\n"
        return chunks

    def ask(self, target: str = "/", method: str = "GET", body: bytes = b"", **headers: str) -> Answer:
        """Send a request and read its answer."""
        lines = [f"{method} {target} HTTP/1.1", "Host: test"]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return self.answer(method)

    def closed(self) -> bool:
        """Wait for the end of the connection; bytes before it are an AssertionError."""
        assert self.waiting == b""
        try:
            data = self.sock.recv(1)
        except (ConnectionResetError, ConnectionAbortedError):
            return True
        assert data == b"", f"{data!r} came where the end was expected"
        return True

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)
