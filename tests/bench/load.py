"""The load generator: one process that drives an echo server on the loopback and says what it measured.

Owns: the measures. Each is a function that takes the server's address and limits, and returns a dataclass.
Laws: (i) standard library only, non-blocking sockets, one poller, nothing made in the hot loop that can be
made before, so that the server is the bottleneck; (ii) a failure is counted under a name and never hidden:
`failures` of each result; (iii) everything ends: each wait has a limit; (iv) processor time is read at the
edges of the measured window, here, so that warm-up and connecting are not in it.

As a command, from the folder `tests`: `python3 -m bench.load MEASURE HOST:PORT [options]` prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from .cycle import (
    CONNECT_TIMEOUT_S,
    PAYLOAD_BYTES,
    Address,
    Cycle,
    allow_descriptors,
    clock,
    connect_many,
    named,
    payload,
)
from .pollers import READ, WRITE, Poller, make_poller
from .usage import Cost, Meter, Watched, cpu, memory

STALL_S = 10.0  # a bulk echo without progress for so long has failed
STORM_MAX_S = 60.0
BULK_BUFFER_BYTES = 256 << 10
RESET_PAUSE_S = 0.5  # for the server to find the resets
DRAIN_S = 5.0  # time for connections under way when a window ends
QUIET_S = 0.3  # a server that used next to no processor time for so long has settled …
QUIET_SHARE = 0.1  # … next to none: this share of one processor …
QUIET_MAX_S = 10.0  # … and after so long it is taken as it is

NOTHING = Watched()
BEGUN = b"all have begun"
LINGER_RESET = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 0)


@dataclass(frozen=True)
class Exchanged:
    """Clients with one message outstanding each, for a fixed time."""

    clients: int
    seconds: float
    exchanges: int
    per_s: float
    p50_us: float | None
    p99_us: float | None
    longest_us: float | None
    fairness: float  # smallest count of a client over the mean count
    starved: int  # clients without one exchange in the window
    cost: Cost
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cycled:
    """Connections that connect, exchange one message and close, the client first."""

    connections: int
    seconds: float
    per_s: float
    p50_us: float | None
    p99_us: float | None
    longest_us: float | None
    cost: Cost
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Streamed:
    """One client that sends as fast as it can while it reads the echo; the cost is for a MiB."""

    bytes: int
    seconds: float
    mb_per_s: float | None
    intact: bool
    cost: Cost
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rested:
    """Connections that exchanged one message and then wait; KiB for each of them."""

    connections: int
    private_kib: float | None
    resident_kib: float | None
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Survived:
    """Clients that reset at once, then a normal one: served or not, and after how long."""

    resets: int
    served_before: bool  # a normal client before all that
    served: bool
    seconds: float
    failures: dict[str, int] = field(default_factory=dict)


Result = Exchanged | Cycled | Streamed | Rested | Survived


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Returns: the nearest-rank percentile of ascending values, `share` from 0 to 1; None of no values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def fairness(counts: Sequence[int]) -> float:
    """Returns: smallest over mean; 1.0 is fair, 0.0 is a client that got nothing (or nobody got anything)."""
    return min(counts) * len(counts) / sum(counts) if counts and sum(counts) else 0.0


class Client:
    """A connection with one message outstanding. The bound methods spare the hot loop two look-ups a call."""

    __slots__ = ("count", "message", "received", "recv", "send", "sent_at", "sock")

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.recv = sock.recv
        self.send = sock.send
        self.message = payload(number)
        self.received = b""
        self.count = 0
        self.sent_at = 0.0


def _take(client: Client, data: bytes) -> str | None:
    """Takes a part of an echo. Returns: None if it is whole now, "" while more is to come, else a reason."""
    client.received += data
    if client.received == client.message:
        client.received = b""
        return None
    if not data:
        return "closed by the server"
    return "" if client.message.startswith(client.received) else "wrong echo"


def _exchange(clients: dict[int, Client], poller: Poller, seconds: float, latencies_s: list[float],
              failures: Counter[str]) -> None:
    """The hot loop: each client sends its message again as soon as it came back, until `seconds` passed."""
    note = latencies_s.append
    size = PAYLOAD_BYTES + 1
    end = clock() + seconds
    while clients and (left := end - clock()) > 0:
        for fd, _ in poller.poll(min(left, 0.25)):
            client = clients[fd]
            try:
                data = client.recv(size)
                reason = None if data == client.message else _take(client, data)
                if reason is None:
                    now = clock()
                    note(now - client.sent_at)
                    client.count += 1
                    client.sent_at = now
                    client.send(client.message)
            except BlockingIOError:
                continue
            except OSError as exc:
                reason = "exchange " + named(exc.errno)
            if reason:
                failures[reason] += 1
                poller.unregister(fd)
                clients.pop(fd).sock.close()


def settle(watched: Watched) -> None:
    """Waits until the server, and wineserver, use next to no processor time; for a bounded time.

    Wineserver is busy for a second and more with 1,000 connections that closed, and serves nobody meanwhile:
    that belongs to the measure before.
    """
    end, mark, since = clock() + QUIET_MAX_S, _used_s(watched), clock()
    while mark is not None and clock() < end:
        time.sleep(0.05)
        used = _used_s(watched)
        if used is None or (used - mark <= QUIET_SHARE * QUIET_S and clock() - since >= QUIET_S):
            return
        if used - mark > QUIET_SHARE * QUIET_S:
            mark, since = used, clock()


def _used_s(watched: Watched) -> float | None:
    used = cpu(watched.server + watched.wineserver)
    return used.user_s + used.system_s if used else None


def _begin(address: Address, clients: int) -> tuple[list[Client], Poller, Counter[str]]:
    """Connects, and has each client send its first message. Returns: those connected, and what failed."""
    sockets, failures = connect_many(address, clients)
    everyone = [Client(sock, number) for number, sock in enumerate(sockets)]
    poller = make_poller()
    for client in everyone:
        poller.register(client.sock.fileno(), READ)
        client.sent_at = clock()
        client.send(client.message)
    return everyone, poller, failures


def exchange(address: Address, clients: int, seconds: float, warmup: float,
             watched: Watched = NOTHING) -> Exchanged:
    """Measures exchanges of 64 bytes: `clients` connections, one message outstanding each, for `seconds`."""
    everyone, poller, failures = _begin(address, clients)
    alive = {client.sock.fileno(): client for client in everyone}
    latencies_s: list[float] = []
    _exchange(alive, poller, warmup, latencies_s, failures)
    latencies_s.clear()
    for client in everyone:
        client.count = 0
    meter, started = Meter(watched), clock()
    _exchange(alive, poller, seconds, latencies_s, failures)
    took = clock() - started
    cost = meter.cost(len(latencies_s))
    poller.close()
    for client in everyone:
        client.sock.close()
    counts = [client.count for client in everyone] + [0] * (clients - len(everyone))
    return Exchanged(clients, took, len(latencies_s), len(latencies_s) / took, *_tails_us(latencies_s),
                     fairness(counts), counts.count(0), cost, dict(failures))


def _tails_us(latencies_s: list[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    """Sorts. Returns: the median, the 99th percentile and the longest in µs."""
    latencies_s.sort()
    middle, high = percentile(latencies_s, 0.5), percentile(latencies_s, 0.99)
    if middle is None or high is None:
        return None, None, None
    return middle * 1e6, high * 1e6, latencies_s[-1] * 1e6


def churn(address: Address, parallel: int, seconds: float, warmup: float,
          watched: Watched = NOTHING) -> Cycled:
    """Measures connect, echo, close in `parallel` loops for `seconds`; what ends later does not count."""
    cycle = Cycle(address, parallel, socket.socket.close)
    cycle.run(warmup)
    cycle.latencies_s.clear()
    meter, started = Meter(watched), clock()
    cycle.run(seconds)
    took, latencies_s = clock() - started, cycle.latencies_s.copy()
    cost = meter.cost(len(latencies_s))
    cycle.drain(DRAIN_S)
    return Cycled(len(latencies_s), took, len(latencies_s) / took, *_tails_us(latencies_s), cost,
                  dict(cycle.failures))


def storm(address: Address, count: int, parallel: int, watched: Watched = NOTHING,
          begun: Callable[[], object] | None = None) -> Cycled:
    """Measures `count` times connect, echo, close, `parallel` at a time, to the end of the last one.

    Calls `begun` when all have begun: what comes then is waiting for those that are served late or never.
    """
    cycle = Cycle(address, allow_descriptors(parallel), socket.socket.close)
    meter, started = Meter(watched), clock()
    cycle.skipped(cycle.run(STORM_MAX_S, count))
    if begun:
        begun()
    cycle.drain(CONNECT_TIMEOUT_S)
    took, done = clock() - started, len(cycle.latencies_s)
    return Cycled(done, took, done / took, *_tails_us(cycle.latencies_s), meter.cost(done),
                  dict(cycle.failures))


def besieged(address: Address, clients: int, count: int, parallel: int) -> Exchanged:
    """Measures the exchanges of `clients` connections while a process of its own storms: see `storm`.

    Until the last connection of the storm has begun: a server that leaves some of them waiting for seconds is
    at rest meanwhile. What fails in the storm is among the failures; what an exchange costs is not told, as
    both are served.
    """
    command = [sys.executable, "-m", "bench.load", "storm", "{}:{}".format(*address),
               "--count", str(count), "--clients", str(parallel), "--say-when-begun"]
    everyone, poller, failures = _begin(address, clients)
    alive = {client.sock.fileno(): client for client in everyone}
    latencies_s: list[float] = []
    with subprocess.Popen(command, cwd=Path(__file__).resolve().parent.parent, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE) as storming:
        begun, said = threading.Event(), list[bytes]()
        reader = threading.Thread(target=_listen, args=(storming.stdout, begun, said))
        reader.start()
        started, end = clock(), clock() + STORM_MAX_S + 2 * CONNECT_TIMEOUT_S
        while alive and not begun.is_set() and clock() < end:
            _exchange(alive, poller, 0.05, latencies_s, failures)
        took = clock() - started
        now = clock()
        waiting = [now - client.sent_at for client in alive.values()]
        reader.join(2 * CONNECT_TIMEOUT_S)
        storming.kill()
        reader.join()
    poller.close()
    for client in everyone:
        client.sock.close()
    stormed = json.loads(said[-1]) if said else {"failures": {"the storm did not end": 1}}
    for reason, times in stormed["failures"].items():
        failures["storm: " + reason] += times
    counts = [client.count for client in everyone] + [0] * (clients - len(everyone))
    served = len(latencies_s)
    # Who waits at the end has waited at least so long: without these, who is served least would count least.
    return Exchanged(clients, took, served, served / took, *_tails_us(latencies_s + waiting),
                     fairness(counts), counts.count(0), Cost(), dict(failures))


def _listen(pipe: IO[bytes] | None, begun: threading.Event, said: list[bytes]) -> None:
    """Collects what the storm says after the line that all has begun; says so, also where it dies."""
    assert pipe
    if pipe.readline().strip() == BEGUN:
        begun.set()
        said += pipe.readlines()
    begun.set()


def bulk(address: Address, mib: int, watched: Watched = NOTHING) -> Streamed:
    """Measures the echo of `mib` MiB on one connection, sent and read as fast as the server lets."""
    # A length no buffer size divides: a buffer that is repeated, lost or swapped changes the checksum.
    block = memoryview(random.Random(1).randbytes(1_000_003))
    total = mib << 20
    expected = 0
    for start in range(0, total, len(block)):
        expected = zlib.crc32(block[:total - start], expected)
    sockets, failures = connect_many(address, 1)
    meter, started, checksum = Meter(watched), clock(), None
    for sock in sockets:
        try:
            checksum = _stream(sock, block, total)
        except OSError as exc:
            failures["bulk " + (named(exc.errno) if exc.errno else str(exc))] += 1
    took, cost = clock() - started, meter.cost(mib)
    for sock in sockets:
        sock.close()
    if checksum is None:
        return Streamed(0, took, None, False, Cost(), dict(failures))
    if checksum != expected:
        failures["wrong echo"] += 1
    return Streamed(total, took, total / 1e6 / took, checksum == expected, cost, dict(failures))


def _stream(sock: socket.socket, block: memoryview, total: int) -> int:
    """Returns: the CRC-32 of the `total` bytes that came back. Raises: OSError, also when nothing moves."""
    poller = make_poller()
    poller.register(sock.fileno(), READ | WRITE)
    buffer = memoryview(bytearray(BULK_BUFFER_BYTES))
    sent = received = checksum = 0
    stalled_at = clock() + STALL_S
    try:
        while received < total:
            for _, events in poller.poll(0.25):
                if events & WRITE and sent < total:
                    start = sent % len(block)
                    sent += sock.send(block[start:start + min(total - sent, BULK_BUFFER_BYTES)])
                    if sent == total:
                        poller.modify(sock.fileno(), READ)
                if events & ~WRITE:
                    if not (size := sock.recv_into(buffer)):
                        raise OSError("closed by the server")
                    checksum = zlib.crc32(buffer[:size], checksum)
                    received += size
                    stalled_at = clock() + STALL_S
            if clock() > stalled_at:
                raise OSError("stalled")
    finally:
        poller.close()
    return checksum


def idle(address: Address, connections: int, watched: Watched = NOTHING) -> Rested:
    """Measures the memory of connections that exchanged one message; wants a server that is fresh.

    A quarter more are opened first: they take up what starting left free in the server's heap, which would
    otherwise make the first connections look like nothing.
    """
    opened, failures = connect_many(address, connections // 4)
    settle(watched)
    before = memory(watched.server)
    sockets, more = connect_many(address, connections)
    settle(watched)
    after = memory(watched.server)
    for sock in opened + sockets:
        sock.close()
    failures.update(more)
    if not before or not after or not sockets:
        return Rested(len(sockets), None, None, dict(failures))
    return Rested(len(sockets), (after.private_kib - before.private_kib) / len(sockets),
                  (after.resident_kib - before.resident_kib) / len(sockets), dict(failures))


def resets(address: Address, count: int, wait: float) -> Survived:
    """Resets `count` connections at once; then: does a normal client get its echo within `wait` seconds?"""
    served_before, _, failures = _serves(address, wait)
    for _ in range(count):
        try:
            with socket.create_connection(address, timeout=wait) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        except OSError as exc:
            failures["connect to reset " + named(exc.errno)] += 1
    time.sleep(RESET_PAUSE_S)
    served, seconds, more = _serves(address, wait)
    return Survived(count, served_before, served, seconds, dict(failures + more))


def _serves(address: Address, wait: float) -> tuple[bool, float, Counter[str]]:
    """Returns: whether a normal client gets its echo, after how many seconds, and what it failed of."""
    started = clock()
    cycle = Cycle(address, 1, socket.socket.close, wait)
    cycle.skipped(cycle.run(wait, 1))
    cycle.drain(wait)
    return bool(cycle.latencies_s), clock() - started, cycle.failures


def _say_begun() -> None:
    print(BEGUN.decode(), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m bench.load", description=str(__doc__).splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("measure",
                        choices=("exchange", "churn", "storm", "besieged", "bulk", "idle", "resets"))
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--clients", type=int, default=64, help="connections, or how many at a time")
    parser.add_argument("--count", type=int, default=5000, help="connections in all, or resets")
    parser.add_argument("--established", type=int, default=16, help="connections in the midst of a storm")
    parser.add_argument("--say-when-begun", action="store_true", help="when all of a storm have begun")
    parser.add_argument("--mib", type=int, default=64, help="size of the bulk echo")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the window")
    parser.add_argument("--warmup", type=float, default=0.5, help="seconds before the window")
    parser.add_argument("--server", type=int, action="append", default=[], help="process to watch")
    parser.add_argument("--wineserver", type=int, action="append", default=[], help="its process id")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    host, _, port = options.address.rpartition(":")
    address = (host, int(port))
    watched = Watched(tuple(options.server), tuple(options.wineserver))
    measures: dict[str, Callable[[], Result]] = {
        "exchange": lambda: exchange(address, options.clients, options.seconds, options.warmup, watched),
        "churn": lambda: churn(address, options.clients, options.seconds, options.warmup, watched),
        "storm": lambda: storm(address, options.count, options.clients, watched,
                               _say_begun if options.say_when_begun else None),
        "besieged": lambda: besieged(address, options.established, options.count, options.clients),
        "bulk": lambda: bulk(address, options.mib, watched),
        "idle": lambda: idle(address, options.count, watched),
        "resets": lambda: resets(address, options.count, options.seconds),
    }
    settle(watched)
    gc.disable()  # nothing here makes cycles worth collecting, and a collection would show in the tail
    print(json.dumps(asdict(measures[options.measure]())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
