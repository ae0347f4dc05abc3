"""Helpers of the tests that move much data: work beside the test, chance with a seed, bytes that count."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

#: Seconds for what moves megabytes; only a failing test waits so long.
LONG = 60.0


@contextlib.contextmanager
def beside(*functions: Callable[[], Any]) -> Iterator[None]:
    """Run functions, each on a thread of its own, while the block runs; what they raise is raised here."""
    failures: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as exc:
            failures.append(exc)

    threads = [
        threading.Thread(target=run, args=(function,), name=f"beside {function!r}", daemon=True)
        for function in functions
    ]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(LONG)
    if failures:
        raise failures[0]
    running = [thread.name for thread in threads if thread.is_alive()]
    assert not running, f"still running: {running}"


def chance() -> random.Random:
    """Make a source of chance; its seed is printed, and IOCP_CTYPES_TEST_SEED sets it."""
    seed = int(os.environ.get("IOCP_CTYPES_TEST_SEED") or secrets.randbelow(1 << 32))
    print(f"IOCP_CTYPES_TEST_SEED={seed}")
    return random.Random(seed)


def cut(client: socket.socket) -> bytes:
    """Read until the end, be it EOF or a reset, and return what came before."""
    parts: list[bytes] = []
    with contextlib.suppress(ConnectionResetError, ConnectionAbortedError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


class Counted(bytes):
    """Bytes that know how many of them are alive."""

    alive = 0
    _counting = threading.Lock()

    def __new__(cls, data: bytes) -> Counted:
        made = super().__new__(cls, data)
        with cls._counting:
            Counted.alive += 1
        return made

    def __del__(self) -> None:
        with self._counting:
            Counted.alive -= 1
