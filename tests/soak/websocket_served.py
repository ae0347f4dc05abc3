"""The server of the soak run `websocket`, a program for Windows: it broadcasts when it is told to.

Started by `process.py`; it reads commands from stdin, one a line, and answers each with one line of JSON:
    figures            what the server looks like now
    broadcast N SIZE   send N messages of SIZE bytes to all, ten a second; answers when the last was sent
    moments            when on_close was called since this was asked last, and with which code
    stop               stop the server; then as `figures`; the program ends
A message is its number, the time when it was sent, and a filler that is the same in all of them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from typing import Any, ClassVar

from iocp_ctypes.websocket import Deflate, WebSocket, WebSocketServer

from .served import Records

PERIOD_S = 0.1


class Guest(WebSocket):
    """Listens; counts with which codes WebSockets closed."""

    codes: ClassVar[Counter[int]] = Counter()
    longest: ClassVar[int] = 0
    queue_max = 32 * 1024
    slow_reader = "close"
    compression = Deflate()  # where the client offers it
    moments: ClassVar[list[tuple[float, int]]] = []

    def on_close(self, code: int, reason: str) -> None:
        Guest.codes[code] += 1
        Guest.moments.append((time.time(), code))


def message(number: int, size: int) -> str:
    """Make the message of a number."""
    head = f"{number:08d} {time.time():017.6f} "
    return head + "x" * (size - len(head))


def broadcast(server: WebSocketServer, count: int, size: int) -> dict[str, Any]:
    """Send them, and say how long a round took and how much waited."""
    began = time.monotonic()
    rounds: list[float] = []
    for number in range(count):
        left = began + number * PERIOD_S - time.monotonic()
        if left > 0:
            time.sleep(left)
        start = time.monotonic()
        server.broadcast(message(number, size))
        rounds.append(time.monotonic() - start)
        if number % 10 == 9:
            waits = max((websocket.write_buffer_size for websocket in server.websockets), default=0)
            Guest.longest = max(Guest.longest, waits)
    rounds.sort()
    return {
        "seconds": time.monotonic() - began,
        "round_median_s": rounds[len(rounds) // 2],
        "round_max_s": rounds[-1],
    }


def figures(server: WebSocketServer, records: Records) -> dict[str, Any]:
    stats = server.stats()
    return {
        "open": len(server.websockets),
        "connections": stats.connections,
        "codes": {str(code): count for code, count in Guest.codes.items()},
        "longest_queue": Guest.longest,
        "records": records.texts,
        "ops_pending": stats.engine.ops_pending,
    }


def main() -> None:
    records = Records()
    logging.getLogger("iocp_ctypes").addHandler(records)
    options = {"high_mark": 64 * 1024, "backlog": 64, **json.loads(sys.argv[1])}
    Guest.ping_interval = Guest.ping_timeout = options.pop("ping", 60.0)
    server = WebSocketServer(("127.0.0.1", 0), Guest, **options)
    server.start()
    print(json.dumps({"address": list(server.address)}), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "stop":
            break
        if command == "broadcast":
            answer = broadcast(server, *map(int, numbers))
        elif command == "moments":
            answer = {"moments": [Guest.moments.pop(0) for _ in range(len(Guest.moments))]}
        else:
            answer = figures(server, records)
        print(json.dumps(answer), flush=True)
    began = time.monotonic()
    stopped = server.stop(5)
    answer = {"stopped": stopped, "seconds": time.monotonic() - began, **figures(server, records)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
