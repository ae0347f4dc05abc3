"""Where a server's time goes: one server under cProfile while clients exchange messages.

Owns: the run and its table. Profiling makes each Python call slower, so the figures compare functions of one
run with each other, and show how often each is called for one exchange; they are no measure of speed.
A ctypes call counts as time of the function that makes it.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import replace
from typing import Any

from .drive import drive
from .profiled import MARK
from .servers import Kind, NotStarted, Server, Starter

DELAY_S = 5.0  # from the start of the server to the window: it starts, clients connect and warm up
AFTER_S = 3.0
ROWS = 40


def profile(kind: Kind, starter: Starter, clients: int, seconds: float) -> str:
    """Returns: the table, or why there is none. Blocks for the window and some ten seconds more."""
    module = kind.arguments[1]  # after the -m
    arguments = ("-m", "bench.profiled", str(DELAY_S), str(seconds), module, *kind.arguments[2:])
    server = Server(replace(kind, arguments=arguments), starter, secrets.token_hex(8))
    try:
        server.start()
        result, error = drive(server, ["exchange", "--clients", str(clients), "--seconds",
                                       str(DELAY_S + seconds + AFTER_S)])
        found = None
        end = time.monotonic() + AFTER_S
        while found is None and time.monotonic() < end:
            found = next((line for line in server.last_lines() if line.startswith(MARK)), None)
            time.sleep(0.1)
    except NotStarted as exc:
        return f"{kind.name} did not start: {exc}"
    finally:
        server.end()
    if error or result is None or found is None:
        return f"{kind.name}: {error or server.last_words()}"
    return table(json.loads(found.removeprefix(MARK)), result["per_s"] * seconds)


def table(rows: list[list[Any]], exchanges: float) -> str:
    """Returns: the functions with the most time of their own, in µs for an exchange."""
    rows.sort(key=lambda row: -row[2])
    lines = [f"about {exchanges:.0f} exchanges; per exchange, slowed by the profiler:",
             f"{'calls':>9} {'own µs':>9} {'total µs':>9}  function"]
    lines += [f"{calls / exchanges:9.3f} {own * 1e6 / exchanges:9.2f} {total * 1e6 / exchanges:9.2f}  {name}"
              for name, calls, own, total in rows[:ROWS]]
    calls = sum(row[1] for row in rows) / exchanges
    return "\n".join([*lines, f"{calls:9.3f} {'':9} {'':9}  all calls"])
