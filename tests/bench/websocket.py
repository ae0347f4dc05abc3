"""WebSocket echo of 64 bytes, ours against `websockets` on asyncio: `python3 tests/bench/websocket.py`.

Native clients, each with one message outstanding, send the next when the echo is there. Rounds alternate, and
begin with the other server each time, so that what else happens on the machine hits both. `--check` ends with
code 1 on a wrong echo, or where the median ratio of paired rounds misses RATE_WANTED or CPU_WANTED.
"""

from __future__ import annotations

import argparse
import secrets
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # as a program it finds its package first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import placement
from bench.datagrams import middle
from bench.pollers import READ, make_poller
from bench.servers import Kind, Server, make_starter, version_line
from bench.usage import cpu

SIZE = 64
SILENT_MAX_S = 10.0
RATE_WANTED = 1.5
CPU_WANTED = 0.5
OURS, THEIRS = "ours", "websockets"
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Round(NamedTuple):
    """One server in one round."""

    echoes: int
    wrong: int
    seconds: float
    user_us: float | None  # user-mode processor time of the server per echo
    requests: float | None  # round trips to wineserver per echo

    @property
    def rate(self) -> float:
        """Echoes a second."""
        return self.echoes / self.seconds


class Client:
    """A WebSocket with one message outstanding, which no other client sends."""

    def __init__(self, address: Any, number: int) -> None:
        self.sock = socket.create_connection(address, timeout=SILENT_MAX_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(REQUEST)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.sock.recv(1) or b"\r\n\r\n"
        if not head.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(f"not opened: {head!r}")
        data = f"{number:08d}".encode() + secrets.token_bytes(SIZE - 8)
        mask = secrets.token_bytes(4)
        masked = bytes(byte ^ mask[place % 4] for place, byte in enumerate(data))
        self.frame = bytes([0x82, 0x80 | SIZE]) + mask + masked
        self.echo = bytes([0x82, SIZE]) + data


def without_pings(sock: socket.socket, data: bytes) -> bytes:
    """Answer the heartbeat, which may come before, behind or without an echo; return what else is there."""
    rest = b""
    while len(data) >= 2 and len(data) >= (size := 2 + (data[1] & 0x7F)):  # all of them are short
        frame, data = data[:size], data[size:]
        if frame[0] == 0x89:
            sock.send(bytes([0x8A, 0x80 | frame[1]]) + bytes(4) + frame[2:])
        else:
            rest += frame
    return rest + data


def exchange(server: Server, clients: list[Client], seconds: float) -> Round:
    """Measure one server for some seconds."""
    poller = make_poller()
    known = {client.sock.fileno(): client for client in clients}
    for descriptor in known:
        poller.register(descriptor, READ)
    watched = server.watched().server
    before, start = cpu(watched), time.perf_counter()
    for client in clients:
        client.sock.send(client.frame)
    end, waiting, echoes, wrong = start + seconds, len(clients), 0, 0
    limit = end + SILENT_MAX_S
    while waiting and (now := time.perf_counter()) < limit:
        for descriptor, _events in poller.poll(0.25):
            client = known[descriptor]
            received = client.sock.recv(4096)
            if not received:
                raise ConnectionError("the server ended a connection")
            if not (data := without_pings(client.sock, received)):
                continue
            wrong += data != client.echo
            echoes += 1
            if now < end:
                client.sock.send(client.frame)
            else:
                waiting -= 1
    took, after = time.perf_counter() - start, cpu(watched)
    poller.close()
    if not before or not after:
        return Round(echoes, wrong + waiting, took, None, None)
    count = max(1, echoes)
    requests = (after.writes - before.writes) / count if after.writes is not None and before.writes else None
    return Round(echoes, wrong + waiting, took, (after.user_s - before.user_s) / count * 1e6, requests)


def ratios(results: dict[str, list[Round]]) -> tuple[list[float], list[float]]:
    """Returns: of echoes a second, and of user CPU an echo, ours to theirs, round by round."""
    pairs = list(zip(results[OURS], results[THEIRS], strict=True))
    rates = [one.rate / max(1e-9, other.rate) for one, other in pairs]
    return rates, [one.user_us / other.user_us for one, other in pairs if one.user_us and other.user_us]


def report(results: dict[str, list[Round]]) -> str:
    """Write what was measured."""
    lines = []
    for name, rounds in results.items():
        used = [one.user_us for one in rounds if one.user_us is not None]
        user = f"{statistics.median(used):.1f} us user CPU an echo" if used else "CPU unknown"
        asked = [one.requests for one in rounds if one.requests is not None]
        trips = f", {statistics.median(asked):.2f} requests to wineserver" if asked else ""
        rate = statistics.median(one.rate for one in rounds)
        lines.append(
            f"{name:10} {rate:8.0f} echoes/s, {user}{trips}, {sum(one.wrong for one in rounds)} wrong"
        )
    rates, used_ratios = ratios(results)
    lines.append("ratio of echoes/s: " + middle(rates))
    if used_ratios:
        lines.append("ratio of user CPU an echo: " + middle(used_ratios))
    return "\n".join(lines)


def main() -> int:
    """Returns: 0; with --check 1 on a wrong echo or a goal that is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", help="version of the Windows Python (under Wine)")
    parser.add_argument("--placement", choices=placement.CHOICES, default="split", help=placement.HELP)
    parser.add_argument("--native", action="store_true", help="run theirs on this Python (to try it out)")
    parser.add_argument("--io-threads", type=int, default=0, help="of ours (default: as the library's)")
    parser.add_argument("--clients", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a goal is missed")
    options = parser.parse_args()
    starter = make_starter(options.python, ("websockets",), options.native)
    kinds = (
        Kind(OURS, ("-m", "bench.peers.websocket_ours", str(options.io_threads))),
        Kind(THEIRS, ("-m", "bench.peers.websocket_asyncio")),
    )
    place = placement.take_sides(options.placement)
    servers = {kind.name: Server(kind, starter, secrets.token_hex(8), place) for kind in kinds}
    results: dict[str, list[Round]] = {name: [] for name in servers}
    clients: dict[str, list[Client]] = {}
    try:
        for name, server in servers.items():
            server.start()
            clients[name] = [Client(server.address, number) for number in range(options.clients)]
            exchange(server, clients[name], 0.3)
        for turn in range(options.rounds):
            for name in list(servers)[:: -1 if turn % 2 else 1]:
                results[name].append(exchange(servers[name], clients[name], options.seconds))
    finally:
        for server in servers.values():
            server.end()
    print(f"{version_line(starter)}, {options.clients} clients, {options.rounds} rounds")
    print(placement.described(place))
    print(report(results))
    rates, used = ratios(results)
    missed = statistics.median(rates) < RATE_WANTED or bool(used and statistics.median(used) > CPU_WANTED)
    wrong = any(one.wrong for one in results[OURS])
    return 1 if options.check and (wrong or missed) else 0


if __name__ == "__main__":
    sys.exit(main())
