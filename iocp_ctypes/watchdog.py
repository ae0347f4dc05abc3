"""L5: the watchdog, the one thread that acts when time has passed.

Laws
1. It sleeps until the earliest deadline: its cost is proportional to what expires, not to the number of
   connections.
2. What it calls never blocks and runs no user code: user callbacks go to the I/O threads.
3. Any thread may set and cancel. It is woken only by a deadline earlier than the one it sleeps for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from ._deadlines import Deadline, Deadlines

#: Seconds of one sleep at the most: what `Lock.acquire` takes ends at 49 days on Windows.
SLEEP_MAX: Final = 86400.0

log = logging.getLogger("iocp_ctypes")


class Watchdog:
    """A thread over a heap of deadlines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make a watchdog; `clock` returns seconds and is the one its deadlines are instants of."""
        self.clock = clock
        self._lock = threading.Lock()
        self._bell = (
            threading.Lock()
        )  # released to wake the thread; a Condition would make a lock for every wait
        self._bell.acquire()
        self._deadlines = Deadlines()
        self._sleeping_until: float | None = None  # None: until it is woken
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="iocp_ctypes watchdog", daemon=False)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def at(self, due: float, action: Callable[[], None]) -> Deadline:
        """Call `action` on this thread once the clock reaches `due`. Any thread; never blocks."""
        with self._lock:
            entry = self._deadlines.add(due, action)
            sooner = self._sleeping_until is None or due < self._sleeping_until
        if sooner:
            self._ring()
        return entry

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # it has been rung already

    def later(self, seconds: float, action: Callable[[], None]) -> Deadline:
        """Call `action` on this thread after a while. Any thread; never blocks."""
        return self.at(self.clock() + seconds, action)

    def cancel(self, entry: Deadline) -> None:
        """Forget a deadline; one that came up already is left alone. Any thread; never blocks."""
        with self._lock:
            self._deadlines.cancel(entry)

    def __len__(self) -> int:
        with self._lock:
            return len(self._deadlines)

    def stop(self, timeout: float) -> bool:
        """End the thread; blocks up to `timeout` seconds. Returns whether it has ended.

        On the thread itself: True, for it ends once the action that called this has returned.
        """
        with self._lock:
            self._stopping = True
        self._ring()
        if self._thread is threading.current_thread():
            return True
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._stopping:
                    return
                now = self.clock()
                actions = self._deadlines.take_due(now)
                due = self._sleeping_until = self._deadlines.next_due()
            for action in actions:
                try:
                    action()
                except Exception:
                    log.critical(
                        "a deadline's action raised, which is a defect of iocp_ctypes", exc_info=True
                    )
            if not actions:
                self._bell.acquire(timeout=-1 if due is None else min(max(0.0, due - now), SLEEP_MAX))
