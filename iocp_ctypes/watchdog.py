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

from ._deadlines import Deadline, Deadlines

log = logging.getLogger("iocp_ctypes")


class Watchdog:
    """A thread over a heap of deadlines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make a watchdog; `clock` returns seconds and is the one its deadlines are instants of."""
        self.clock = clock
        self._changed = threading.Condition(threading.Lock())
        self._deadlines = Deadlines()
        self._sleeping_until: float | None = None  # None: until notified; meaningful only while it sleeps
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="iocp_ctypes watchdog", daemon=False)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def at(self, due: float, action: Callable[[], None]) -> Deadline:
        """Call `action` on this thread once the clock reaches `due`. Any thread; never blocks."""
        with self._changed:
            entry = self._deadlines.add(due, action)
            if self._sleeping_until is None or due < self._sleeping_until:
                self._changed.notify()
            return entry

    def later(self, seconds: float, action: Callable[[], None]) -> Deadline:
        """Call `action` on this thread after a while. Any thread; never blocks."""
        return self.at(self.clock() + seconds, action)

    def cancel(self, entry: Deadline) -> None:
        """Forget a deadline; one that came up already is left alone. Any thread; never blocks."""
        with self._changed:
            self._deadlines.cancel(entry)

    def __len__(self) -> int:
        with self._changed:
            return len(self._deadlines)

    def stop(self, timeout: float) -> bool:
        """End the thread; blocks up to `timeout` seconds. Returns whether it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                due = self._deadlines.next_due()
                now = self.clock()
                if self._stopping:
                    return
                if due is None or due > now:
                    self._sleeping_until = due
                    self._changed.wait(None if due is None else due - now)
                    continue
                actions = self._deadlines.take_due(now)
            for action in actions:
                try:
                    action()
                except Exception:
                    log.critical(
                        "a deadline's action raised, which is a defect of iocp_ctypes", exc_info=True
                    )
