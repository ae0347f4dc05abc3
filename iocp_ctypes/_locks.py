"""Locks that many objects share, each by its number (layer P: pure).

CPython on Windows makes a kernel semaphore for every lock, and these are held only for moments that never
block, so thousands of objects do with a few. Reentrant, because a garbage collection inside may run a
finalizer that closes some other object.

Laws
1. Objects whose numbers differ by a multiple of LOCKS share a lock. Nobody holds two of one kind at a time:
   in the other order they would be a deadlock.
2. Who sends to many does so by `lock_number`: in any other order each that shares its lock with the one
   another thread is at costs a wait, for that and for the GIL.
"""

from __future__ import annotations

import threading
from typing import Any, Final

LOCKS: Final = 64


def make_locks() -> tuple[Any, ...]:
    """Make the locks of one kind of object: RLocks, whose type has no name before Python 3.13."""
    return tuple(threading.RLock() for _ in range(LOCKS))


def lock_number(number: int) -> int:
    """Return which of the locks the object of a number has."""
    return number % LOCKS
