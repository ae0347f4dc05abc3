"""Connections to an echo server, many at a time: connect, exchange one message, hand over.

Owns: `Cycle`, the one way in which the load generator opens connections. A connection is only open to it once
its message came back, so that no measure begins with connections that wait in the server's listen queue.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable

from .pollers import READ, WRITE, make_poller

PAYLOAD_BYTES = 64
CONNECT_PARALLEL = 64  # well below the listen queue of 200, so that setting up never waits for a repeated SYN
CONNECT_MANY_S = 30.0
CONNECT_TIMEOUT_S = 15.0  # a SYN that finds the queue full is repeated after 1, 3, 7 and 15 s
SPARE_DESCRIPTORS = 50
CONNECTING = {0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0)}

Address = tuple[str, int]
clock = time.perf_counter


def named(number: int | None) -> str:
    """Returns: the name of an error number, the same on every system."""
    return errno.errorcode.get(number or 0, f"error {number}").removeprefix("WSA")


def payload(number: int) -> bytes:
    """Returns: a message that no other client sends, so that a mix-up of connections shows."""
    return f"{number:08d} ".encode() + bytes(range(64, 64 + PAYLOAD_BYTES - 9))


if sys.platform == "win32":

    def allow_descriptors(wanted: int) -> int:
        """Returns: `wanted`, there is no limit here."""
        return wanted

else:
    import resource

    def allow_descriptors(wanted: int) -> int:
        """Raises the soft limit of open files to the hard one. Returns: what it allows of `wanted`."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard - SPARE_DESCRIPTORS)


class Attempt:
    """A connection between its connect and the echo of its one message."""

    __slots__ = ("message", "received", "sent", "sock", "started")

    def __init__(self, sock: socket.socket, message: bytes, started: float) -> None:
        self.sock = sock
        self.message = message
        self.started = started
        self.sent = False
        self.received = b""


class Cycle:
    """Opens connections, at most `parallel` at a time, and hands each one over once its message came back.

    Args:
        finish: gets the socket; closes it or keeps it.
        timeout_s: from connect to echo, then the attempt counts as failed.
    """

    def __init__(self, address: Address, parallel: int, finish: Callable[[socket.socket], None],
                 timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._address = address
        self._parallel = parallel
        self._finish = finish
        self._timeout_s = timeout_s
        self._poller = make_poller()
        self._attempts: dict[int, Attempt] = {}  # by descriptor, oldest first: one timeout for all
        self._number = 0
        self.latencies_s: list[float] = []
        self.failures: Counter[str] = Counter()

    def skipped(self, count: int) -> None:
        """Counts attempts that there was no time to start as failures."""
        if count:
            self.failures["not started in time"] += count

    def run(self, seconds: float, count: int = sys.maxsize) -> int:
        """Starts attempts until `count` are started or `seconds` passed; does not wait for the last ones.

        Returns: how many of `count` were not started.
        """
        end = clock() + seconds
        while count > 0 and clock() < end:
            while count > 0 and len(self._attempts) < self._parallel:
                count -= 1
                if not self._start():
                    break  # a refusal comes back at once: look at the clock before the next one
            self._turn(min(0.25 if self._attempts else 0.005, end - clock()))
        return count

    def drain(self, seconds: float) -> None:
        """Waits for the attempts under way; those that do not end in time failed. Ends the poller."""
        end = clock() + seconds
        while self._attempts and clock() < end:
            self._turn(0.25)
        for attempt in list(self._attempts.values()):
            self._fail(attempt, "unfinished at the end")
        self._poller.close()

    def _start(self) -> bool:
        self._number += 1
        sock = socket.socket()
        sock.setblocking(False)
        attempt = Attempt(sock, payload(self._number), clock())
        error = sock.connect_ex(self._address)
        if error not in CONNECTING:
            self.failures["connect " + named(error)] += 1
            sock.close()
            return False
        fd = sock.fileno()
        self._attempts[fd] = attempt
        self._poller.register(fd, WRITE)
        if sys.platform == "linux":
            self._send(fd, attempt)  # on the loopback the handshake is over by now, unless the queue is full
        return True

    def _send(self, fd: int, attempt: Attempt) -> None:
        try:
            attempt.sock.send(attempt.message)  # so short a message fits whole into an empty send buffer
        except BlockingIOError:
            return
        except OSError as exc:
            # Windows says here only that it is not connected; the reason is in the socket.
            error = attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or exc.errno
            self._fail(attempt, "connect " + named(error))
            return
        attempt.sent = True
        self._poller.modify(fd, READ)

    def _turn(self, wait_s: float) -> None:
        for fd, _ in self._poller.poll(max(0.0, wait_s)):
            attempt = self._attempts[fd]
            if attempt.sent:
                self._receive(fd, attempt)
            else:
                self._send(fd, attempt)
        overdue = clock() - self._timeout_s
        while self._attempts and (oldest := next(iter(self._attempts.values()))).started < overdue:
            self._fail(oldest, "no echo in time" if oldest.sent else "no connection in time")

    def _receive(self, fd: int, attempt: Attempt) -> None:
        try:
            data = attempt.sock.recv(PAYLOAD_BYTES + 1)
        except BlockingIOError:
            return
        except OSError as exc:
            self._fail(attempt, "receive " + named(exc.errno))
            return
        attempt.received += data
        if attempt.received != attempt.message:
            if not data:
                self._fail(attempt, "closed by the server")
            elif not attempt.message.startswith(attempt.received):
                self._fail(attempt, "wrong echo")
            return
        self.latencies_s.append(clock() - attempt.started)
        self._poller.unregister(fd)
        del self._attempts[fd]
        self._finish(attempt.sock)

    def _fail(self, attempt: Attempt, reason: str) -> None:
        self.failures[reason] += 1
        fd = attempt.sock.fileno()
        self._poller.unregister(fd)
        del self._attempts[fd]
        attempt.sock.close()


def connect_many(address: Address, count: int) -> tuple[list[socket.socket], Counter[str]]:
    """Returns: the sockets that have exchanged one message, and what the others failed of."""
    sockets: list[socket.socket] = []
    cycle = Cycle(address, CONNECT_PARALLEL, sockets.append)
    cycle.skipped(cycle.run(CONNECT_MANY_S, allow_descriptors(count)))
    cycle.drain(CONNECT_TIMEOUT_S)
    return sockets, cycle.failures
