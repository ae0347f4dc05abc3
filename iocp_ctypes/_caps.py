"""Caps that shrink while the system is short of resources, and come back (layer P: pure, no clock, no locks).

Laws
1. A shortage halves a cap, counted from what was in use; never below 1. What was assigned is remembered.
2. Once a call works again the cap is doubled, step by step, up to what was assigned.
3. A shortage between two steps doubles the time from one step to the next, from STEP_FIRST to STEP_MAX: so a
   system that stays short is asked seldom, and one that has recovered is used again in a moment.
"""

from __future__ import annotations

from typing import Final

#: Seconds from one step of recovering to the next: doubled by each shortage that comes in between.
STEP_FIRST: Final = 0.010
STEP_MAX: Final = 1.0


class Recovery:
    """Caps that have shrunk, by name. The caller keeps the caps in force, and the time."""

    __slots__ = ("assigned", "delay", "due")

    def __init__(self) -> None:
        self.assigned: dict[str, int] = {}  # what the caps were that are less now
        self.delay = STEP_FIRST
        self.due: float | None = None  # when the next step is; None while calls fail

    def shrink(self, name: str, cap: int, in_use: int) -> int:
        """Note a shortage at a cap in force with so many in use; returns the cap in force from now on."""
        if self.due is not None:
            self.delay = min(STEP_MAX, 2 * self.delay)
            self.due = None
        less = max(1, min(cap, in_use) // 2)
        if less < cap:
            self.assigned.setdefault(name, cap)
        return less

    def begin(self, now: float) -> None:
        """Note that a call worked again: the next step comes after a while."""
        if self.due is None:
            self.due = now + self.delay

    def step(self, name: str, cap: int) -> int:
        """Return the cap in force after a step."""
        assigned = self.assigned.get(name, cap)
        if 2 * cap >= assigned:
            self.assigned.pop(name, None)
        return min(assigned, 2 * cap)

    def forget(self, name: str) -> None:
        """A new value was assigned: it holds."""
        self.assigned.pop(name, None)
