"""A broadcast to two thousand WebSockets, ten times a second, while ten of them never read.

The clients are plain sockets of a native process. Each checks that every message comes, whole and in order,
and notes how long it was on its way; the ten are to be closed by the server's policy; at the end the server
stops, and every client is to see 1001.
"""

from __future__ import annotations

import array
import socket
import threading
import time
from collections import Counter
from typing import Any

from bench.cycle import CONNECT_PARALLEL, allow_descriptors
from bench.load import percentile
from bench.pollers import READ, make_poller
from bench.usage import cpu, memory

from . import checks
from .process import ServerProcess

CLIENTS = 2000
STUCK = 10  # of them never read
MESSAGES = 200  # ten a second
SIZE = 1024  # bytes of each
BROADCAST_MAX_S = 300.0
LATE_MAX_S = 60.0  # after the last was sent
SLOW_P99_S = 1.0
MEMORY_MAX_KIB = 64 * 1024  # more than before the broadcasts
STOP_MAX_S = 7.0
SMALL_SEGMENT = 536  # bytes: with a small window the system of the server keeps little for such a client
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: soak\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TEXT, CLOSE, PING = 0x81, 0x88, 0x89
CLOSED_BY_STOP = b"\x03\xe9"  # 1001


class Client:
    """A WebSocket that reads; the bytes of its stream that are not worked off yet."""

    __slots__ = ("bytes", "end", "expected", "reason", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.bytes = b""
        self.expected = 0
        self.reason = ""  # why it failed
        self.end = b""  # the code of the Close that came

    def take(self, data: bytes, now: float, latencies: array.array[float]) -> None:
        """Work off what came."""
        data = self.bytes + data
        start = 0
        while len(data) - start >= 2:
            size, head = data[start + 1], 2
            if size == 126:
                size, head = int.from_bytes(data[start + 2 : start + 4], "big"), 4
            if len(data) - start < head + size or head == 4 > len(data) - start:
                break
            self._frame(data[start], data[start + head : start + head + size], now, latencies)
            start += head + size
        self.bytes = data[start:]

    def _frame(self, kind: int, payload: bytes, now: float, latencies: array.array[float]) -> None:
        if kind == TEXT:
            if int(payload[:8]) != self.expected or len(payload) != SIZE or payload[27:].strip(b"x"):
                self.reason = self.reason or f"message {payload[:8]!r} where {self.expected} was expected"
            self.expected += 1
            latencies.append(now - float(payload[9:26]))
        elif kind == PING:
            self.sock.sendall(bytes([0x8A, 0x80 | len(payload)]) + bytes(4) + payload)
        elif kind == CLOSE:
            self.end = payload[:2]
            self.sock.sendall(bytes([0x88, 0x80 | len(payload)]) + bytes(4) + payload)
        else:
            self.reason = f"frame {kind:#x}"


class Crowd:
    """All clients that read, on a thread of their own."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.clients = {sock.fileno(): Client(sock) for sock in sockets}
        self.latencies: array.array[float] = array.array("d")
        self.failures: Counter[str] = Counter()
        self.ended: Counter[bytes] = Counter()
        self._poller = make_poller()
        self._open = dict(self.clients)
        for descriptor in self.clients:
            self._poller.register(descriptor, READ)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._open and not self._stopping.is_set():
            for descriptor, _events in self._poller.poll(0.25):
                client = self._open[descriptor]
                try:
                    data = client.sock.recv(1 << 16)
                    client.take(data, time.time(), self.latencies)
                except BlockingIOError:
                    continue
                except OSError as exc:
                    data = b""
                    self.failures[type(exc).__name__] += 1
                if not data:
                    self._poller.unregister(descriptor)
                    del self._open[descriptor]
                    self.ended[client.end] += 1
                    client.sock.close()

    def missing(self) -> int:
        """How many messages have not come yet."""
        return sum(MESSAGES - client.expected for client in self.clients.values())

    def left(self) -> int:
        """How many connections are open."""
        return len(self._open)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._poller.close()


def open_one(address: Any, stuck: bool) -> socket.socket:
    """Connect and ask to open; the answer is read later."""
    sock = socket.socket()
    sock.settimeout(30)
    if stuck:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        if hasattr(socket, "TCP_MAXSEG"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
    sock.connect(address)
    sock.sendall(REQUEST)
    return sock


def opened(sock: socket.socket) -> bool:
    """Read the answer, and nothing behind it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            return False
        head += byte
    return head.startswith(b"HTTP/1.1 101 ")


def open_many(address: Any, count: int, stuck: bool = False) -> list[socket.socket]:
    """Open so many; those that fail are missing."""
    good: list[socket.socket] = []
    while count:
        some = [open_one(address, stuck) for _ in range(min(count, CONNECT_PARALLEL))]
        good += [sock for sock in some if opened(sock)]
        count -= len(some)
    return good


def wait(condition: Any, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.1)


def run(python: str | None, seed: int, clients: int = CLIENTS) -> list[str]:
    """Run it all; returns the claims that failed. Nothing is random here."""
    what = f"{MESSAGES} messages of {SIZE} bytes to {clients} clients, {STUCK} of them stuck"
    report = checks.Report(f"websocket: {what}")
    clients = allow_descriptors(clients)
    with ServerProcess(python, "soak.websocket_served") as server:
        stuck = open_many(server.address, STUCK, stuck=True)
        sockets = open_many(server.address, clients - STUCK)
        for sock in sockets:
            sock.setblocking(False)
        now = server.ask("figures")
        report.claim(f"{clients} WebSockets are open", now["open"] == clients, now["open"])
        crowd = Crowd(sockets)
        before = memory([server.pid])
        used = cpu([server.pid])
        sent = server.ask(f"broadcast {MESSAGES} {SIZE}", BROADCAST_MAX_S)
        after = memory([server.pid])
        wait(lambda: crowd.missing() <= 0, LATE_MAX_S)
        report.figure("seconds of the broadcasts", round(sent["seconds"], 1))
        if used and (now_used := cpu([server.pid])):
            each = 1e6 / (MESSAGES * clients)
            user, system = now_used.user_s - used.user_s, now_used.system_s - used.system_s
            report.figure(
                "CPU of a message, user and system", f"{user * each:.1f} and {system * each:.1f} us"
            )
        rounds = [round(sent[f"round_{which}_s"], 3) for which in ("median", "max")]
        report.figure("seconds of one, median and longest", rounds)
        wrong = Counter(client.reason for client in crowd.clients.values() if client.reason)
        good = crowd.missing() == 0 and not wrong and not crowd.failures
        shown = dict(wrong + crowd.failures) or f"{crowd.missing()} missing"
        report.claim(f"{len(sockets)} got every message, whole and in order", good, shown)
        ordered = sorted(crowd.latencies)
        tails = {share: round(percentile(ordered, share) or 0.0, 3) for share in (0.5, 0.99, 1.0)}
        report.claim(f"p99 is under {SLOW_P99_S:g} s", tails[0.99] < SLOW_P99_S, f"{tails} s")
        now = server.ask("figures")
        codes = now["codes"]
        report.claim(f"the {STUCK} that never read were closed", codes == {"1008": STUCK}, codes)
        report.figure("most bytes that waited for one of those that were open", now["longest_queue"])
        if before and after:
            more = after.private_kib - before.private_kib
            claim = f"memory grew by less than {MEMORY_MAX_KIB} KiB"
            report.claim(claim, more < MEMORY_MAX_KIB, f"{more} KiB")
        left = server.stop_asked()
        wait(lambda: not crowd.left(), 10)
        in_time = left["stopped"] and left["seconds"] < STOP_MAX_S
        report.claim(f"stop(5) returned True within {STOP_MAX_S:g} s", in_time, f"{left['seconds']:.1f} s")
        seen = {int.from_bytes(code, "big"): count for code, count in crowd.ended.items()}
        report.claim("every client saw 1001", seen == {1001: len(sockets)}, seen)
        report.claim("no connection is left", left["connections"] == 0, left["connections"])
        report.claim("the log is empty", not left["records"], left["records"])
        crowd.stop()
        for sock in stuck:
            sock.close()
    return report.failed
