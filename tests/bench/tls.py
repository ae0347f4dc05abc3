"""TLS echo, ours against asyncio's TLS: `python3 tests/bench/tls.py`.

Two measures, driven by one native process: `tls64`, 64 connections with one message of 64 bytes outstanding
each, and `handshakes`, one connection after the other that shakes hands in full, exchanges a message and
closes. Rounds alternate, and begin with the other server each time, so that what else happens on the machine
hits both. `--check` ends with code 1 on a failure, or where the median ratio of paired rounds of tls64 is
below RATIO_WANTED. Nobody's certificate is verified: that is the load generator's time, not the servers'.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # as a program it finds its package first
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parents[2])]

from bench import placement
from bench.cycle import Address
from bench.load import Client, _exchange
from bench.pollers import READ, make_poller
from bench.servers import Kind, Server, make_starter, ours, version_line
from bench.usage import Watched, cpu
from iocp_ctypes.certificate import throwaway_certificate

CLIENTS = 64
HANDSHAKE_TIMEOUT_S = 15.0
RATIO_WANTED = 1.3
OURS, THEIRS = "ours", "asyncio"
NOTHING = Watched()


class Socket(ssl.SSLSocket):
    """Says that there is nothing to read in the way of plain sockets."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None


def trusting_context() -> ssl.SSLContext:
    """Returns: the context of a client that takes any server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = Socket
    return context


class Round(NamedTuple):
    """One server in one round of one measure."""

    done: int
    seconds: float
    user_us: float | None  # user-mode processor time of the server for each
    failures: dict[str, int]

    @property
    def rate(self) -> float:
        """So many a second."""
        return self.done / self.seconds


def secured(address: Address, context: ssl.SSLContext) -> Any:
    """Returns: a socket that has shaken hands. Blocks."""
    return context.wrap_socket(socket.create_connection(address, timeout=HANDSHAKE_TIMEOUT_S))


def exchange(address: Address, seconds: float, watched: Watched = NOTHING, clients: int = CLIENTS) -> Round:
    """Measures exchanges of 64 bytes: `clients` connections, one message outstanding each."""
    context, failures = trusting_context(), Counter[str]()
    poller = make_poller()
    everyone = [Client(secured(address, context), number) for number in range(clients)]
    try:
        alive = {client.sock.fileno(): client for client in everyone}
        for fd, client in alive.items():
            client.sock.setblocking(False)
            poller.register(fd, READ)
            client.sent_at = time.perf_counter()
            client.send(client.message)
        latencies_s: list[float] = []
        _exchange(alive, poller, min(0.3, seconds), latencies_s, failures)
        latencies_s.clear()
        before, started = cpu(watched.server), time.perf_counter()
        _exchange(alive, poller, seconds, latencies_s, failures)
        took, after = time.perf_counter() - started, cpu(watched.server)
    finally:
        poller.close()
        for client in everyone:
            client.sock.close()
    used = (after.user_s - before.user_s) / max(1, len(latencies_s)) * 1e6 if before and after else None
    return Round(len(latencies_s), took, used, dict(failures))


def handshakes(address: Address, seconds: float, watched: Watched = NOTHING) -> Round:
    """Measures connections in a row: a full handshake, a message there and back, the end."""
    context, failures, done = trusting_context(), Counter[str](), 0
    before, started = cpu(watched.server), time.perf_counter()
    while time.perf_counter() - started < seconds:
        try:
            with secured(address, context) as sock:
                sock.sendall(b"hello")
                if sock.recv(5) != b"hello":
                    raise OSError("wrong echo")
            done += 1
        except OSError as exc:
            failures[type(exc).__name__] += 1
    took, after = time.perf_counter() - started, cpu(watched.server)
    used = (after.user_s - before.user_s) / max(1, done) * 1e6 if before and after else None
    return Round(done, took, used, dict(failures))


MEASURES = {"tls64": exchange, "handshakes": handshakes}


def middle(values: Sequence[float]) -> str:
    """Writes the median with the least and the largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratios(results: dict[str, list[Round]]) -> list[float]:
    """Returns: our rate over theirs, round by round."""
    pairs: list[tuple[Round, Round]] = list(zip(results[OURS], results[THEIRS], strict=True))
    return [one.rate / max(1e-9, other.rate) for one, other in pairs]


def report(measure: str, results: dict[str, list[Round]]) -> str:
    """Writes what was measured."""
    lines = [f"{measure}:"]
    for name, rounds in results.items():
        rate = statistics.median(one.rate for one in rounds)
        used = [one.user_us for one in rounds if one.user_us is not None]
        user = f"{statistics.median(used):.1f} us user CPU each" if used else "CPU unknown"
        failed = sum((Counter(one.failures) for one in rounds), Counter[str]())
        lines.append(f"  {name:8} {rate:8.0f} a second, {user}")
        if failed:
            lines.append(f"    failed: {dict(failed)}")
    lines.append("  ratio of rates: " + middle(ratios(results)))
    pairs: list[tuple[Any, Any]] = list(zip(results[OURS], results[THEIRS], strict=True))
    used = [one.user_us / other.user_us for one, other in pairs if one.user_us and other.user_us]
    if used:
        lines.append("  ratio of user CPU: " + middle(used))
    return "\n".join(lines)


def main() -> int:
    """Returns: 0; with --check 1 on a failure or a ratio that is too small."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", help="version of the Windows Python (under Wine)")
    parser.add_argument("--placement", choices=placement.CHOICES, default="split", help=placement.HELP)
    parser.add_argument("--native", action="store_true", help="run asyncio's on this Python (to try it out)")
    parser.add_argument("--ours", default="", metavar="OPTIONS", help="further options of our echo command")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a goal is missed")
    options = parser.parse_args()
    starter = make_starter(options.python, (), options.native)
    results: dict[str, dict[str, list[Round]]] = {
        measure: {OURS: [], THEIRS: []} for measure in MEASURES
    }
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "pair.pem")
        made = throwaway_certificate()
        path.write_text(made.key + made.certificate, encoding="ascii")
        path.chmod(0o600)
        kinds = (
            ours(OURS, ("--tls-cert", str(path), *options.ours.split())),
            Kind(THEIRS, ("-m", "bench.peers.asyncio_tls", str(path))),
        )
        place = placement.take_sides(options.placement)
        servers = {kind.name: Server(kind, starter, secrets.token_hex(8), place) for kind in kinds}
        for server in servers.values():
            stack.callback(server.end)
            server.start()
            exchange(server.address, 0.1)
        for turn in range(options.rounds):
            for measure, measured in MEASURES.items():
                for name in list(servers)[:: -1 if turn % 2 else 1]:
                    server = servers[name]
                    one = measured(server.address, options.seconds, server.watched())
                    results[measure][name].append(one)
    print(f"{version_line(starter)}, {ssl.OPENSSL_VERSION} at the clients, {options.rounds} rounds")
    print(placement.described(place))
    for measure, found in results.items():
        print(report(measure, found))
    failed = any(one.failures for found in results.values() for one in found[OURS])
    slow = statistics.median(ratios(results["tls64"])) < RATIO_WANTED
    return 1 if options.check and (failed or slow) else 0


if __name__ == "__main__":
    sys.exit(main())
