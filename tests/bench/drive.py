"""Runs the load generator, a process of its own, on a server that is up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from .servers import TESTS, Server

LOAD_MAX_S = 150.0  # the longest measure, a storm that fails, ends itself before


def drive(server: Server, arguments: Sequence[str]) -> tuple[dict[str, Any] | None, str | None]:
    """Runs one measure; `arguments` as on the command line of load.py, without the address.

    Returns: its result, and what went wrong.
    """
    watched = server.watched()
    host, port = server.address
    command = [sys.executable, "-m", "bench.load", arguments[0], f"{host}:{port}", *arguments[1:]]
    for pid in watched.server:
        command += ["--server", str(pid)]
    for pid in watched.wineserver:
        command += ["--wineserver", str(pid)]
    try:
        done = subprocess.run(command, cwd=str(TESTS), timeout=LOAD_MAX_S, check=False,
                              stdin=subprocess.DEVNULL, capture_output=True)
    except subprocess.TimeoutExpired:
        return None, f"the load generator did not end in {LOAD_MAX_S:g} s"
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        return None, f"the load generator failed: {lines[-1]}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result, None
