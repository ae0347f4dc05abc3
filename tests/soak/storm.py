"""Connect, echo, close five thousand times, 500 at a time; then resets, at once and under load.

Then ten thousand times, 700 at a time, with a pool of 700.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from dataclasses import asdict

from bench import load
from bench.cycle import Address, connect_many, named

from . import checks
from .process import ServerProcess

CONNECTIONS = 5000
PARALLEL = 500
BACKLOG = 64
LARGE = 10_000
LARGE_BACKLOG = 700
RESETS_AT_ONCE = 30
RESETS_UNDER_LOAD = 200
LOAD_CLIENTS = 32
LOAD_S = 6.0
WAIT_S = 10.0
LEAVE_MAX_S = 30.0


def reset_somehow(address: Address, chance: random.Random) -> None:
    """Connect and reset at one of the moments that make a difference to the server."""
    moment = chance.randrange(5)
    with socket.create_connection(address, timeout=WAIT_S) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, load.LINGER_RESET)
        if moment >= 1:  # 0: at once
            sock.sendall(chance.randbytes(1000))
        if moment == 2:  # after the first byte of the echo, the rest unread
            sock.recv(1)
        if moment >= 3:  # in the middle of an echo that we do not read
            sock.settimeout(0.05)
            try:
                sock.sendall(bytes(1_000_000))
            except TimeoutError:
                pass  # both sides' buffers are full: now
        if moment == 4:
            sock.shutdown(socket.SHUT_WR)


def under_load(address: Address, chance: random.Random) -> tuple[load.Exchanged, Counter[str]]:
    """Reset many connections while others exchange messages; returns how these fared, and what failed."""
    outcome: list[load.Exchanged] = []
    others = threading.Thread(
        target=lambda: outcome.append(load.exchange(address, LOAD_CLIENTS, LOAD_S, 0.5)), daemon=True
    )
    others.start()
    failures: Counter[str] = Counter()
    for _ in range(RESETS_UNDER_LOAD):
        try:
            reset_somehow(address, chance)
        except OSError as exc:
            failures["connect " + named(exc)] += 1
    others.join(LOAD_S + 10 * WAIT_S)
    if not outcome:
        raise OSError("the exchange under load did not end")
    return outcome[0], failures


def still_serves(report: checks.Report, server: ServerProcess, when: str) -> None:
    """Claim that 100 new clients get their echo."""
    began = time.monotonic()
    sockets, failures = connect_many(server.address, 100)
    took = time.monotonic() - began
    for sock in sockets:
        sock.close()
    report.claim(
        f"100 clients are served {when}", len(sockets) == 100, dict(failures) or f"after {took:.2f} s"
    )


def run(python: str | None, seed: int) -> list[str]:
    """Run it all; returns the claims that failed."""
    report = checks.Report(
        f"storm: {CONNECTIONS} connections, {PARALLEL} at a time, backlog={BACKLOG}, seed {seed}"
    )
    chance = random.Random(seed)
    with ServerProcess(python, backlog=BACKLOG) as server:
        cycled = load.storm(server.address, CONNECTIONS, PARALLEL)
        report.claim("0 failures", cycled.connections == CONNECTIONS and not cycled.failures, cycled.failures)
        report.figure("connections a second", round(cycled.per_s))
        report.figure("p50, p99 in ms", [round((us or 0) / 1e3, 1) for us in (cycled.p50_us, cycled.p99_us)])
        still_serves(report, server, "after the storm")
        survived = load.resets(server.address, RESETS_AT_ONCE, WAIT_S)
        report.claim(
            f"a client is served after {RESETS_AT_ONCE} resets at once", survived.served, asdict(survived)
        )
        exchanged, failures = under_load(server.address, chance)
        report.claim(f"{RESETS_UNDER_LOAD} connect and reset under load", not failures, dict(failures) or 0)
        report.claim("the others lost nothing", not exchanged.failures, exchanged.failures or 0)
        report.claim("nobody starved", exchanged.starved == 0, f"fairness {exchanged.fairness:.2f}")
        report.figure("exchanges a second meanwhile", round(exchanged.per_s))
        still_serves(report, server, "after the resets")
        now = server.settled(lambda figures: not figures.connections and not figures.deadlines, LEAVE_MAX_S)
        checks.served(report, now)
        report.figure("accepts that failed, and were replaced", now.accept_failed)
        checks.stopped(report, server.stop())
    return report.failed + large(python)


def large(python: str | None) -> list[str]:
    """Run the seed's promise: its "httpd" backlog, and a storm as large as that."""
    report = checks.Report(f"storm: {LARGE} connections, {LARGE_BACKLOG} at a time, backlog={LARGE_BACKLOG}")
    with ServerProcess(python, backlog=LARGE_BACKLOG, listen_backlog=2 * LARGE_BACKLOG) as server:
        cycled = load.storm(server.address, LARGE, LARGE_BACKLOG)
        report.claim("0 failures", cycled.connections == LARGE and not cycled.failures, cycled.failures or 0)
        report.figure("connections a second", round(cycled.per_s))
        now = server.settled(lambda figures: not figures.connections and not figures.deadlines, LEAVE_MAX_S)
        checks.served(report, now)
        checks.stopped(report, server.stop())
    return report.failed
