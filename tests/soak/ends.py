"""How soon a WebSocket server sees the end of a peer: FIN, RST, silence; and what a bomb costs it.

Server and clients look at the same clock: the server notes when `on_close` was called, with which code.
"""

from __future__ import annotations

import random
import select
import socket
import threading
import time
import zlib
from typing import Any

from bench.load import LINGER_RESET
from bench.usage import memory

from . import checks
from .process import ServerProcess
from .websocket import REQUEST, open_many, opened

PEERS = 50
SOON_S = 0.1
PING_S = 2.0  # interval and timeout of the heartbeat
LATE_S = 1.0
SLOW_PONG_S = 1.5
WATCHED_S = 12.0
BOMB_MIB = 200
BOMB_MAX_KIB = 32 * 1024
TIMEOUT_CODE = 1006
DEFLATE = b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"


def ends(server: ServerProcess, count: int, code: int, seconds: float) -> list[float]:
    """Wait until so many have ended since the last call; returns when, in seconds since the epoch."""
    limit, found = time.monotonic() + seconds, []
    while len(found) < count and time.monotonic() < limit:
        time.sleep(0.05)
        found += [at for at, told in server.ask("moments")["moments"] if told == code]
    return found


def leave(server: ServerProcess, reset: bool) -> list[float]:
    """Have PEERS peers leave; returns how many seconds each was not noticed."""
    peers = open_many(server.address, PEERS)
    left: dict[int, float] = {}
    for number, peer in enumerate(peers):
        if reset:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        time.sleep(0.01)  # one after the other: what is measured is not how many the server ends in a second
        left[number] = time.time()
        peer.close()
    return [at - then for at, then in zip(ends(server, PEERS, 1006, 10), left.values(), strict=False)]


def answer_slowly(peer: socket.socket, stop: threading.Event) -> int:
    """Answer pings SLOW_PONG_S late; returns how many were answered before the connection ended."""
    answered = 0
    peer.settimeout(0.1)
    while not stop.is_set():
        try:
            data = peer.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            break
        if not data:
            break
        if data[0] == 0x89:
            time.sleep(SLOW_PONG_S)
            peer.sendall(bytes([0x8A, 0x80 | data[1]]) + bytes(4) + data[2 : 2 + data[1]])
            answered += 1
    return answered


def bomb() -> bytes:
    """Make a frame of zeros that inflates to BOMB_MIB MiB."""
    packer = zlib.compressobj(9, wbits=-15)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(BOMB_MIB)) + packer.flush(
        zlib.Z_SYNC_FLUSH
    )
    data = data[:-4]
    return bytes([0xC2, 0xFF]) + len(data).to_bytes(8, "big") + bytes(4) + data


def explode(server: ServerProcess) -> tuple[int, int]:
    """Send a bomb; returns the code of the Close, and how many KiB more the server had meanwhile."""
    before = memory([server.pid])
    with socket.create_connection(server.address, timeout=30) as peer:
        peer.sendall(REQUEST[:-2] + DEFLATE)
        assert opened(peer)
        peer.sendall(bomb())
        peak = 0
        while not select.select([peer], [], [], 0.005)[0]:
            now = memory([server.pid])
            peak = max(peak, now.resident_kib if now else 0)
        data = peer.recv(4096)
    code = int.from_bytes(data[2:4], "big") if data[:1] == b"\x88" else 0
    now = memory([server.pid])
    peak = max(peak, now.resident_kib if now else 0)
    return code, peak - (before.resident_kib if before else 0)


def run(python: str | None, seed: int) -> list[str]:
    """Run it all; returns the claims that failed."""
    report = checks.Report(f"ends: {PEERS} peers each, heartbeat {PING_S:g} and {PING_S:g} s")
    random.seed(seed)
    with ServerProcess(python, "soak.websocket_served", ping=PING_S) as server:
        for name, reset in (("FIN", False), ("RST", True)):
            late = sorted(leave(server, reset))
            good = len(late) == PEERS and late[-1] < SOON_S
            shown = f"{len(late)} of {PEERS}, {late[-1] * 1e3:.1f} ms at most" if late else "none"
            report.claim(f"on_close within {SOON_S:g} s of each {name}", good, shown)
        began = time.time()
        silent = open_many(server.address, PEERS)
        slow: Any = open_many(server.address, 1)[0]
        stop, answered = threading.Event(), []
        thread = threading.Thread(target=lambda: answered.append(answer_slowly(slow, stop)))
        thread.start()
        after = [at - began for at in ends(server, PEERS, TIMEOUT_CODE, WATCHED_S)]
        good = len(after) == PEERS and all(abs(at - 2 * PING_S) <= LATE_S for at in after)
        shown = f"{min(after):.2f} to {max(after):.2f} s" if after else "none"
        report.claim(f"who is silent is gone after {2 * PING_S:g} s, give or take {LATE_S:g}", good, shown)
        time.sleep(max(0.0, began + WATCHED_S - time.time()))
        still = server.ask("figures")["open"]
        report.claim(f"who answers {SLOW_PONG_S:g} s late stays", still == 1, f"{still} open")
        stop.set()
        thread.join()
        report.figure("pings that it answered", answered)
        for peer in (*silent, slow):
            peer.close()
        code, more = explode(server)
        report.claim("what inflates to 200 MiB is refused", code == 1009, code)
        report.claim(f"and costs less than {BOMB_MAX_KIB} KiB", more < BOMB_MAX_KIB, f"{more} KiB")
        left = server.stop_asked()
        report.claim("stop() returned True", left["stopped"], left["stopped"])
        report.claim("the log is empty", not left["records"], left["records"])
    return report.failed
