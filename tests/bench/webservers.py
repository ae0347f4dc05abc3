"""HTTP, ours against waitress and uvicorn (h11): `python3 tests/bench/webservers.py [--measure file]`.

Measure "small": native clients ask for 1 KiB over connections that are kept, each as soon as it has its
answer. Measure "file": a file of 10 MiB, over and over. Rounds alternate, and begin with another server each
time. `--servers wsgi,waitress` compares our WSGI server. `--check` ends with code 1 on a failure or where a
goal is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import secrets
import selectors
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # as a program it finds its package first
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import placement
from bench.servers import Kind, Server, make_starter, version_line
from bench.usage import cpu

STALL_S = 10.0
FILE_MIB = 10
#: Ratios of answers a second, or of MB a second, that ours has to reach.
WANTED = {"small": {"waitress": 1.2, "uvicorn": 1.6}, "file": {"waitress": 2.0}}
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.I)


class Failed(Exception):
    """A server that did not answer as it should."""


@dataclasses.dataclass
class Round:
    """One server in one round."""

    answers: int
    size: int  # bytes of the bodies
    seconds: float
    user_us: float | None  # user-mode processor time of the server per answer


class Client:
    """A connection that asks, and asks again when it has its answer."""

    def __init__(self, server: Server, path: str, vary: bool) -> None:
        self.sock = socket.create_connection(server.address, timeout=STALL_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._path, self._vary = path, vary
        self._number = 0
        self._head = b""
        self._left = -1  # bytes of the body that are to come; -1: the head is
        self.size = 0
        self._buffer = bytearray(256 * 1024)

    def ask(self) -> None:
        self._number += 1
        path = f"{self._path}?{self.sock.fileno()}.{self._number}" if self._vary else self._path
        self.sock.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode()
        )

    def receive(self) -> bool:
        """Take what came; returns whether it completed an answer."""
        count = self.sock.recv_into(self._buffer)
        if not count:
            raise Failed("the connection was closed")
        if self._left < 0:
            self._head += self._buffer[:count]
            head, blank, body = self._head.partition(b"\r\n\r\n")
            if not blank:
                return False
            found = _LENGTH.search(head + b"\r\n")
            if not head.startswith(b"HTTP/1.1 200 ") or not found:
                raise Failed(f"answered {head[:200]!r}")
            self.size = int(found[1])
            self._left, count, self._head = self.size, len(body), b""
        self._left -= count
        if self._left < 0:
            raise Failed("more came than the head said")
        if self._left:
            return False
        self._left = -1
        return True


def measure(server: Server, clients: int, seconds: float, path: str, vary: bool) -> Round:
    """Measure one server for some seconds."""
    with selectors.DefaultSelector() as poller:
        connected = [Client(server, path, vary) for _ in range(clients)]
        for client in connected:
            poller.register(client.sock, selectors.EVENT_READ, client)
        watched = server.watched().server
        before, start = cpu(watched), time.perf_counter()
        end, answers, size, waiting = start + seconds, 0, 0, clients
        for client in connected:
            client.ask()
        while waiting:
            ready = poller.select(STALL_S)
            if not ready:
                raise Failed(f"{waiting} clients have waited for {STALL_S:g} s")
            going = time.perf_counter() < end
            for key, _events in ready:
                client = key.data
                if client.receive():
                    answers += 1
                    size += client.size
                    if going:
                        client.ask()
                    else:
                        waiting -= 1
        took, after = time.perf_counter() - start, cpu(watched)
        for client in connected:
            client.sock.close()
    used = (after.user_s - before.user_s) / max(1, answers) * 1e6 if before and after else None
    return Round(answers, size, took, used)


def rate(one: Round, what: str) -> float:
    """Answers a second, or MB a second."""
    return one.answers / one.seconds if what == "small" else one.size / one.seconds / 1e6


def middle(values: list[float]) -> str:
    """Write the median with the least and the largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(results: dict[str, list[Round]], what: str) -> tuple[str, bool]:
    """Write what was measured; returns it and whether all goals are reached."""
    lines, good = [], True
    unit = "answers/s" if what == "small" else "MB/s"
    for name, rounds in results.items():
        used = [one.user_us for one in rounds if one.user_us is not None]
        user = f"{statistics.median(used):.1f} us user CPU an answer" if used else "CPU unknown"
        lines.append(f"{name:9}{statistics.median([rate(one, what) for one in rounds]):9.1f} {unit}, {user}")
    ours = "ours" if "ours" in results else "wsgi"
    for name, wanted in WANTED[what].items():
        if name not in results or ours not in results:
            continue
        pairs = list(zip(results[ours], results[name], strict=True))
        ratios = [rate(one, what) / max(1e-9, rate(other, what)) for one, other in pairs]
        reached = statistics.median(ratios) >= wanted
        lines.append(f"{unit}, {ours} over {name}: {middle(ratios)}, wanted {wanted}")
        used = [one.user_us / other.user_us for one, other in pairs if one.user_us and other.user_us]
        if used:
            lines.append(f"user CPU an answer, {ours} over {name}: {middle(used)}")
            reached = reached and (what != "small" or statistics.median(used) < 1.0)
        good = good and reached
    return "\n".join(lines), good


def kinds(file: str) -> dict[str, Kind]:
    """The servers, each with the file that it may be asked for."""
    return {
        "ours": Kind("ours", ("-m", "bench.peers.web_ours", file), ("h11",)),
        "wsgi": Kind("wsgi", ("-m", "bench.peers.web_wsgi", file), ("h11",)),
        "waitress": Kind("waitress", ("-m", "bench.peers.web_waitress", file), ("waitress",)),
        "uvicorn": Kind("uvicorn", ("-m", "bench.peers.web_uvicorn"), ("uvicorn", "h11")),
    }


def main() -> int:
    """Returns: 0; with --check 1 where a server failed or a goal is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", help="version of the Windows Python (under Wine)")
    parser.add_argument("--placement", choices=placement.CHOICES, default="split", help=placement.HELP)
    parser.add_argument("--native", action="store_true", help="run on this Python (to try it out)")
    parser.add_argument("--measure", choices=list(WANTED), default="small", help="default: %(default)s")
    parser.add_argument("--servers", default="ours,waitress,uvicorn", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=16, help="default: %(default)s; 2 for files")
    parser.add_argument("--vary", action="store_true", help="no request is like another")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a goal is missed")
    options = parser.parse_args()
    what = options.measure
    clients, path = (
        (options.clients, "/") if what == "small" else (min(options.clients, 2), "/files/large.bin")
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "large.bin")
        file.write_bytes(secrets.token_bytes(FILE_MIB * 1024 * 1024))
        every = kinds(str(file))
        chosen = [every[name] for name in options.servers.split(",") if what == "small" or name != "uvicorn"]
        packages = sorted({package for kind in chosen for package in kind.packages})
        starter = make_starter(options.python, packages, options.native)
        place = placement.take_sides(options.placement)
        servers = {kind.name: Server(kind, starter, secrets.token_hex(8), place) for kind in chosen}
        results: dict[str, list[Round]] = {name: [] for name in servers}
        try:
            for server in servers.values():
                server.start()
                measure(server, clients, 0.3, path, options.vary)
            for turn in range(options.rounds):
                for name in list(servers)[:: -1 if turn % 2 else 1]:
                    results[name].append(measure(servers[name], clients, options.seconds, path, options.vary))
        except Failed as exc:
            print(f"failed: {exc}", file=sys.stderr)
            return 1
        finally:
            for server in servers.values():
                server.end()
    text, good = report(results, what)
    print(f"{version_line(starter)}, {clients} clients, {options.rounds} rounds, measure {what}")
    print(placement.described(place))
    print(text)
    return 1 if options.check and not good else 0


if __name__ == "__main__":
    sys.exit(main())
