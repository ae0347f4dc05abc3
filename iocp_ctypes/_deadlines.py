"""Deadlines over an injected clock (layer P: pure; no thread, no sleeping, no locks).

Laws
1. A deadline is an instant of the clock, in seconds; a timeout is a duration and becomes a deadline where
   it is armed.
2. Setting costs O(log n), cancelling O(1), looking at the clock O(what expired).
3. A cancelled entry stays in the heap until it comes up or until dead entries outnumber the living ones,
   then the heap is built anew: memory is bounded by twice the living entries plus a constant.
The caller holds a lock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

#: Below this many dead entries a rebuild is not worth its time.
DEAD_MIN: Final = 64


class Deadline:
    """One entry: an instant and what to call then."""

    __slots__ = ("action", "due")

    def __init__(self, due: float, action: Callable[[], None]) -> None:
        self.due = due
        self.action: Callable[[], None] | None = action


class Deadlines:
    """A heap of deadlines, by instant and then by age; of tuples, which compare without running Python."""

    __slots__ = ("_dead", "_heap", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Deadline]] = []
        self._number = 0
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def add(self, due: float, action: Callable[[], None]) -> Deadline:
        """Call `action` once the clock reaches `due`."""
        self._number += 1
        entry = Deadline(due, action)
        heapq.heappush(self._heap, (due, self._number, entry))
        return entry

    def cancel(self, entry: Deadline) -> None:
        """Forget an entry; one that was cancelled or has come up is left alone."""
        if entry.action is None:
            return
        entry.action = None  # drops the reference now, not when the instant comes
        self._dead += 1
        self._rebuild()

    def _rebuild(self) -> None:
        """Make the heap anew where too much of it is dead."""
        if self._dead > DEAD_MIN and self._dead * 2 > len(self._heap):
            self._heap = [living for living in self._heap if living[2].action is not None]
            heapq.heapify(self._heap)
            self._dead = 0

    def next_due(self) -> float | None:
        """Return the earliest instant, or None where nothing is set."""
        heap = self._heap
        while heap and heap[0][2].action is None:
            heapq.heappop(heap)
            self._dead -= 1
        return heap[0][0] if heap else None

    def take_due(self, now: float) -> list[Callable[[], None]]:
        """Remove what is due at `now` and return its actions, earliest first."""
        due: list[Callable[[], None]] = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            entry = heapq.heappop(heap)[2]
            if entry.action is None:
                self._dead -= 1
            else:
                due.append(entry.action)
                entry.action = None
        self._rebuild()  # the living ones may have come up before the dead ones
        return due
