"""By how much callbacks that block delay others, and how soon a program with a server ends.

A delay is a client's, from its message to the echo. The longest while callbacks block is held against the
longest while nobody does, which is no small one where server, wineserver and load share two processors.
An end is timed from its cause, SIGINT or the script's last statement. A machine that is busy with other
things misses the marks.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from typing import Any

from bench import load
from bench.cycle import Address, connect_many

from . import checks
from .process import ServerProcess

CLIENTS = 64
CROWD = 1000
BLOCKED_S = 2.0
DELAY_MAX_S = 0.2
INTERRUPTED_MAX_S = 0.5
INTERRUPTED_CROWD_MAX_S = 3.0  # wineserver takes half a second and more to end a thousand connections
FORGOTTEN_MAX_S = 3.0
WINDOW_S = 4.0
WARMUP_S = 0.5
BLOCK_AT_S = 1.0  # in the window
SETTLE_S = 1.0
ENDS_MAX_S = 60.0
#: In which ways a callback blocks; see `delays_served`.
WAYS = ("sleep", "lock", "database")
MANY = WAYS + ("sleep",) * 5


def block(address: Address, ways: tuple[str, ...], took_s: list[float]) -> None:
    """Have one callback block in each of these ways, all at once; notes how long each did."""
    peers = [socket.create_connection(address, timeout=ENDS_MAX_S) for _ in ways]
    began = time.monotonic()
    for peer, way in zip(peers, ways, strict=True):
        peer.sendall(way.encode())
    for peer in peers:
        if peer.recv(16) == b"done":
            took_s.append(time.monotonic() - began)
        peer.close()


def watched(address: Address, ways: tuple[str, ...]) -> tuple[load.Exchanged, list[float]]:
    """Exchange messages while callbacks block; returns how that went, and how long they blocked."""
    took_s: list[float] = []
    blocking = threading.Timer(WARMUP_S + BLOCK_AT_S, block, (address, ways, took_s))
    blocking.start()
    exchanged = load.exchange(address, CLIENTS, WINDOW_S, WARMUP_S)
    blocking.join()
    return exchanged, took_s


def told(exchanged: load.Exchanged) -> str:
    p99, longest = ((us or 0) / 1e3 for us in (exchanged.p99_us, exchanged.longest_us))
    return (
        f"{longest:.0f} ms the longest, p99 {p99:.0f} ms, {exchanged.per_s:.0f} exchanges/s, "
        f"{exchanged.starved} without one, failures {exchanged.failures or 0}"
    )


def blocked(python: str | None, options: dict[str, Any]) -> list[str]:
    """Claim that callbacks that block delay nobody else; for comparison, with nobody who blocks."""
    report = checks.Report(
        f"delays: {CLIENTS} clients while callbacks block for {BLOCKED_S:g} s, {options or 'defaults'}"
    )
    with ServerProcess(python, "soak.delays_served", block=BLOCKED_S, **options) as server:
        alone = watched(server.address, ())[0]
        report.figure("nobody blocks", told(alone))
        for ways in (*((way,) for way in WAYS), MANY):
            exchanged, took_s = watched(server.address, ways)
            name = ways[0] if len(ways) == 1 else f"{len(ways)} at once"
            did = len(took_s) == len(ways) and min(took_s) >= 0.95 * BLOCKED_S
            report.claim(f"{name}: blocked so long", did, [round(seconds, 2) for seconds in took_s])
            more = (exchanged.longest_us or math.inf) - (alone.longest_us or 0)
            report.claim(
                f"{name}: nobody else waited for {DELAY_MAX_S * 1e3:g} ms more",
                more < DELAY_MAX_S * 1e6 and not exchanged.starved and not exchanged.failures,
                told(exchanged),
            )
        report.figure("one computes for so long", told(watched(server.address, ("compute",))[0]))
        server.tell("stop")
        ended = server.ended(ENDS_MAX_S)
        report.claim("exit code 0, nothing printed", ended == (0, []), ended)
    return report.failed


class Talk:
    """Clients that exchange messages until their server ends."""

    def __init__(self, address: Address, clients: int) -> None:
        self._exchanged: list[load.Exchanged] = []
        self._thread = threading.Thread(target=self._run, args=(address, clients))
        self._thread.start()

    def _run(self, address: Address, clients: int) -> None:
        self._exchanged.append(load.exchange(address, clients, ENDS_MAX_S, 0.0))

    def count(self) -> int:
        """Wait for their end; returns how many messages came back."""
        self._thread.join()
        return self._exchanged[0].exchanges


def interrupted(report: checks.Report, server: ServerProcess, who: str, limit_s: float) -> None:
    """Claim that Ctrl-C ends `serve_forever` soon; the program fails where the port is not free then."""
    answer = server.ask("interrupt")
    report.claim(
        f"Ctrl-C, {who}: serve_forever returned within {limit_s:g} s, no connection was left",
        answer["seconds"] < limit_s and not answer["connections"],
        f"{answer['seconds']:.3f} s, {answer['connections']} left",
    )
    ended = server.ended(ENDS_MAX_S)
    report.claim(f"Ctrl-C, {who}: exit code 0, nothing printed", ended == (0, []), ended)


def forgotten(report: checks.Report, server: ServerProcess, who: str, limit_s: float) -> None:
    """Claim that a script that does not stop its server ends all the same."""
    began = time.monotonic()
    server.tell("forget")
    ended = server.ended(ENDS_MAX_S)
    took_s = time.monotonic() - began
    report.claim(
        f"forgot to stop, {who}: the program ended within {limit_s:g} s",
        took_s < limit_s,
        f"{took_s:.2f} s",
    )
    report.claim(f"forgot to stop, {who}: exit code 0, nothing printed", ended == (0, []), ended)


def ends(python: str | None) -> list[str]:
    """End programs whose clients rest, or talk until the end."""
    report = checks.Report("delays: how soon a program ends")
    for end, serve, limits_s in (
        (interrupted, True, (INTERRUPTED_MAX_S, INTERRUPTED_CROWD_MAX_S)),
        (forgotten, False, (FORGOTTEN_MAX_S, FORGOTTEN_MAX_S)),
    ):
        for clients, talk in ((0, False), (CLIENTS, False), (CLIENTS, True), (CROWD, False)):
            who = f"{clients} clients that {'talk' if talk else 'rest'}"
            with ServerProcess(python, "soak.delays_served", serve=serve) as server:
                sockets, _failures = connect_many(server.address, 0 if talk else clients)
                talking = Talk(server.address, clients if talk else 0)
                time.sleep(SETTLE_S)
                end(report, server, who, limits_s[clients > CLIENTS])
                served = len(sockets) + talking.count()
                report.claim(f"{who}: they had been served", served >= clients, f"{served} messages")
                for sock in sockets:
                    sock.close()
    return report.failed


def run(python: str | None, seed: int) -> list[str]:
    """Run it all; returns the claims that failed. Nothing in it is random."""
    failed: list[str] = []
    for options in ({}, {"io_threads": 1}, {"io_threads": 4}):
        failed += blocked(python, options)
    return failed + ends(python)
