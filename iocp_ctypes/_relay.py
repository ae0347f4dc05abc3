"""A relay: what many connections are given at once goes out in turn, on the I/O threads (layer P: pure).

A broadcast to thousands is as many system calls. Who broadcasts only queues; the relay walks from one
connection to the next, and what came for it meanwhile goes out in the same call: broadcasts that come
faster than the calls can be made cost fewer calls, and not ever more time.

Laws
1. Who came first has the first turn. The caller sees to it that a connection waits for one turn at a time.
2. A call of `execute` serves ROUND of them and hands the rest to the next, behind what others have to do. A
   turn runs nothing that may block: all who wait would wait for it.
3. While somebody waits, exactly one call of `execute` is under way: it has the token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

#: Connections served in one call of `execute`: some milliseconds, where each has a send or two.
ROUND: Final = 32
#: Up to so many who broadcasts sends to itself: it is done sooner, and needs no other thread.
DIRECT_MAX: Final = 64


class Relay:
    """Those that wait for their turn."""

    __slots__ = ("_execute", "_token", "_waiting")

    def __init__(self, execute: Callable[[Callable[[], None]], None]) -> None:
        """Make a relay; `execute` runs a callable soon on an I/O thread, after what is ready."""
        self._execute = execute
        self._waiting: deque[Callable[[], None]] = deque()
        self._token = [True]  # as that of a strand

    def add(self, turn: Callable[[], None]) -> None:
        """Let `turn` be called when those before it were; it must not raise. Any thread; never blocks."""
        self._waiting.append(turn)
        if self._take():
            self._execute(self._walk)

    def _take(self) -> bool:
        try:
            return self._token.pop()
        except IndexError:
            return False

    def _walk(self) -> None:
        waiting = self._waiting
        try:
            for _ in range(min(len(waiting), ROUND)):
                waiting.popleft()()
        finally:
            self._go_on()

    def _go_on(self) -> None:
        """Hand the rest on, with the token, or give that back."""
        waiting = self._waiting
        if not waiting:
            self._token.append(True)
            if not waiting or not self._take():  # somebody may have come before the token was back
                return
        self._execute(self._walk)
