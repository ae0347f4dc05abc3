"""Six thousand connections at once on one server process, each exchanging messages that are checked."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections import Counter

from bench.cycle import allow_descriptors, connect_many, named
from bench.load import LINGER_RESET
from bench.pollers import READ, WRITE, Poller, make_poller
from bench.usage import memory

from . import checks
from .process import ServerProcess

CONNECTIONS = 6000
MESSAGES = 5  # of each connection
MESSAGE_MAX = 4000  # bytes
LARGE_EVERY = 100  # each hundredth connection sends one message of …
LARGE = 300_000  # … so many bytes, more than a socket's buffer takes
EXCHANGE_MAX_S = 120.0
LEAVE_MAX_S = 60.0
SLICE = 1 << 16


class Talker:
    """One connection: message after message, each sent when the one before came back whole and right."""

    def __init__(self, sock: socket.socket, number: int, chance: random.Random) -> None:
        self.sock = sock
        self._messages = [self._make(number, message, chance) for message in range(MESSAGES)]
        self._sent = self._received = 0
        self.reason = ""  # why it failed

    @staticmethod
    def _make(number: int, message: int, chance: random.Random) -> bytes:
        large = message == 1 and number % LARGE_EVERY == 0
        head = struct.pack("<II", number, message)
        return head + chance.randbytes(LARGE if large else chance.randrange(MESSAGE_MAX))

    @property
    def done(self) -> bool:
        return not self._messages or bool(self.reason)

    def turn(self) -> int:
        """Send and receive what goes now; returns the events to wait for."""
        try:
            while self._messages:
                message = self._messages[0]
                if self._sent < len(message):
                    self._sent += self.sock.send(message[self._sent : self._sent + SLICE])
                    if self._sent < len(message):
                        if not self._take(message):
                            return READ | WRITE
                        continue
                if not self._take(message):
                    return READ
        except OSError as exc:
            self.reason = named(exc)
        return READ

    def _take(self, message: bytes) -> bool:
        """Receive a part of the echo; False where there is none yet."""
        try:
            data = self.sock.recv(SLICE)
        except BlockingIOError:
            return False
        end = self._received + len(data)
        if not data or message[self._received : end] != data:
            self.reason = "wrong echo" if data else "closed by the server"
            self._messages.clear()
            return True
        self._received = end
        if end == len(message):
            self._messages.pop(0)
            self._sent = self._received = 0
        return True


def talk(sockets: list[socket.socket], seed: int) -> Counter[str]:
    """Let all exchange their messages; returns what failed, by reason."""
    chance = random.Random(seed)
    talkers = {sock.fileno(): Talker(sock, number, chance) for number, sock in enumerate(sockets)}
    failures: Counter[str] = Counter()
    poller: Poller = make_poller()
    masks = dict.fromkeys(talkers, WRITE)
    for descriptor in talkers:
        poller.register(descriptor, WRITE)
    limit = time.monotonic() + EXCHANGE_MAX_S
    while talkers and time.monotonic() < limit:
        for descriptor, _events in poller.poll(0.25):
            talker = talkers[descriptor]
            try:
                wanted = talker.turn()
            except BlockingIOError:
                wanted = READ | WRITE
            if talker.done:
                poller.unregister(descriptor)
                del talkers[descriptor]
                if talker.reason:
                    failures[talker.reason] += 1
            elif wanted != masks[descriptor]:
                masks[descriptor] = wanted
                poller.modify(descriptor, wanted)
    failures["not done in time"] += len(talkers)
    poller.close()
    return +failures


def leave(sockets: list[socket.socket]) -> None:
    """Close all connections: two with FIN, one with RST, and so on."""
    for number, sock in enumerate(sockets):
        if number % 3 == 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        sock.close()


def run(python: str | None, seed: int, connections: int = CONNECTIONS) -> list[str]:
    """Run it all; returns the claims that failed."""
    report = checks.Report(f"many: {connections} connections at once, {MESSAGES} messages each, seed {seed}")
    wanted = allow_descriptors(connections)
    with ServerProcess(python, backlog=64) as server:
        before = memory([server.pid])
        began = time.monotonic()
        sockets, failures = connect_many(server.address, wanted)
        took = time.monotonic() - began
        report.claim(f"{connections} connect", len(sockets) == connections, dict(failures) or len(sockets))
        report.figure("connects a second, with one exchange each", round(len(sockets) / took))
        now = server.figures()
        report.claim("all are open at once", now.connections == len(sockets), now.connections)
        after = memory([server.pid])
        if before and after and sockets:
            each = (after.private_kib - before.private_kib) / len(sockets)
            report.claim("one takes 6 KiB of private memory at most", each <= 6, round(each, 2))
        began = time.monotonic()
        wrong = talk(sockets, seed)
        took = time.monotonic() - began
        report.claim("every message came back as it was sent", not wrong, dict(wrong) or "all")
        report.figure("exchanges a second", round(len(sockets) * MESSAGES / took))
        began = time.monotonic()
        leave(sockets)
        now = server.settled(lambda figures: not figures.connections and not figures.deadlines, LEAVE_MAX_S)
        report.figure("seconds until all were gone", round(time.monotonic() - began, 2))
        checks.served(report, now)
        checks.stopped(report, server.stop())
    return report.failed
