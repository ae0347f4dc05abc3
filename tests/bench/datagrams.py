"""Datagram echo at a depth, ours against asyncio's datagram endpoint: `python3 tests/bench/datagrams.py`.

A native socket keeps `depth` datagrams of 64 bytes under way and sends the next for each that comes back;
one that is not back after LOST_S is lost. Rounds alternate, and begin with the other server each time, so
that what else happens on the machine hits both. `--check` ends with code 1 on a loss, or where the median
ratio of paired rounds is below RATIO_WANTED.
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
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import placement
from bench.servers import Kind, Server, make_starter, version_line
from bench.usage import cpu

SIZE = 64
LOST_S = 2.0
RATIO_WANTED = 1.3
OURS, THEIRS = "ours", "asyncio"


class Round(NamedTuple):
    """One server in one round."""

    echoes: int
    lost: int
    foreign: int  # datagrams that were not sent, or came twice
    seconds: float
    user_us: float | None  # user-mode processor time of the server per echo

    @property
    def rate(self) -> float:
        """Echoes a second."""
        return self.echoes / self.seconds


def exchange(server: Server, depth: int, seconds: float) -> Round:
    """Measure one server for some seconds."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(server.address)
        sock.settimeout(LOST_S)
        padding = secrets.token_bytes(SIZE - 8)
        for number in range(depth):
            sock.send(number.to_bytes(8, "big") + padding)
        under_way = set(range(depth))
        watched = server.watched().server
        before, start = cpu(watched), time.perf_counter()
        end, sent, echoes, lost, foreign = start + seconds, depth, 0, 0, 0
        while (now := time.perf_counter()) < end or under_way:
            try:
                data = sock.recv(2048)
            except (TimeoutError, ConnectionError):
                lost += len(under_way)
                under_way.clear()
                if now >= end or lost > 10 * depth:
                    break
                refill = depth
            else:
                number = int.from_bytes(data[:8], "big")
                if number not in under_way or data[8:] != padding:
                    foreign += 1
                    continue
                under_way.discard(number)
                echoes += 1
                refill = 1
            for _ in range(refill if now < end else 0):
                sock.send(sent.to_bytes(8, "big") + padding)
                under_way.add(sent)
                sent += 1
        took, after = time.perf_counter() - start, cpu(watched)
    used = (after.user_s - before.user_s) / max(1, echoes) * 1e6 if before and after else None
    return Round(echoes, lost, foreign, took, used)


def middle(values: list[float]) -> str:
    """Write the median with the least and the largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(results: dict[str, list[Round]]) -> str:
    """Write what was measured."""
    lines = []
    for name, rounds in results.items():
        rate = statistics.median(one.rate for one in rounds)
        used = [one.user_us for one in rounds if one.user_us is not None]
        user = f"{statistics.median(used):.1f} us user CPU an echo" if used else "CPU unknown"
        lost, foreign = sum(one.lost for one in rounds), sum(one.foreign for one in rounds)
        lines.append(f"{name:8} {rate:8.0f} echoes/s, {user}, {lost} lost, {foreign} foreign")
    pairs: list[tuple[Any, Any]] = list(zip(results[OURS], results[THEIRS], strict=True))
    lines.append("ratio of echoes/s: " + middle([one.rate / max(1e-9, other.rate) for one, other in pairs]))
    ratios = [one.user_us / other.user_us for one, other in pairs if one.user_us and other.user_us]
    if ratios:
        lines.append("ratio of user CPU an echo: " + middle(ratios))
    return "\n".join(lines)


def main() -> int:
    """Returns: 0; with --check 1 on a loss or a ratio that is too small."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", help="version of the Windows Python (under Wine)")
    parser.add_argument("--placement", choices=placement.CHOICES, default="split", help=placement.HELP)
    parser.add_argument("--native", action="store_true", help="run asyncio's on this Python (to try it out)")
    parser.add_argument("--io-threads", type=int, default=0, help="of ours (default: as the library's)")
    parser.add_argument("--depth", type=int, default=8, help="datagrams under way (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a goal is missed")
    options = parser.parse_args()
    starter = make_starter(options.python, (), options.native)
    kinds = (
        Kind(OURS, ("-m", "bench.peers.datagram_ours", str(options.io_threads))),
        Kind(THEIRS, ("-m", "bench.peers.datagram_asyncio")),
    )
    place = placement.take_sides(options.placement)
    servers = {kind.name: Server(kind, starter, secrets.token_hex(8), place) for kind in kinds}
    results: dict[str, list[Round]] = {name: [] for name in servers}
    try:
        for server in servers.values():
            server.start()
            exchange(server, options.depth, 0.3)
        for turn in range(options.rounds):
            for name in list(servers)[:: -1 if turn % 2 else 1]:
                results[name].append(exchange(servers[name], options.depth, options.seconds))
    finally:
        for server in servers.values():
            server.end()
    print(f"{version_line(starter)}, depth {options.depth}, {options.rounds} rounds")
    print(placement.described(place))
    print(report(results))
    ratio = statistics.median(
        one.rate / max(1e-9, other.rate) for one, other in zip(results[OURS], results[THEIRS], strict=True)
    )
    lost = any(one.lost or one.foreign for one in results[OURS])
    return 1 if options.check and (lost or ratio < RATIO_WANTED) else 0


if __name__ == "__main__":
    sys.exit(main())
