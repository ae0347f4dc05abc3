"""L6: work threads, to which connections are pinned, so that their callbacks may block and keep
thread-local state.

Laws
1. A connection's callbacks all run on one thread, chosen by the connection's number, never by who is free.
2. The queue of a thread is bounded by what its connections have in flight: one receive each, and a few
   callbacks.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger("iocp_ctypes")

_Task = Callable[[], None]


class WorkThreads:
    """N threads with a queue each."""

    def __init__(self, count: int) -> None:
        """Make `count` threads; they start with `start`."""
        self._queues: list[queue.SimpleQueue[_Task | None]] = [queue.SimpleQueue() for _ in range(count)]
        self._lock = threading.Lock()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, args=(tasks,), name=f"iocp_ctypes work {number}", daemon=False)
            for number, tasks in enumerate(self._queues, 1)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def executor(self, number: int) -> Callable[[_Task], None]:
        """Return what runs a callable soon on the thread that this number is pinned to."""
        return self._queues[number % len(self._queues)].put

    def is_work_thread(self) -> bool:
        """Return whether the calling thread is one of these."""
        return threading.current_thread() in self._threads

    def queued(self) -> tuple[int, ...]:
        """How many calls wait for each thread."""
        return tuple(tasks.qsize() for tasks in self._queues)

    def stop(self, timeout: float) -> bool:
        """End the threads after what is queued; blocks up to `timeout` seconds.

        Returns whether all have ended.
        """
        with self._lock:
            first, self._stopping = not self._stopping, True
        if first:  # a second None would keep a thread from ever finding its queue empty
            for tasks in self._queues:
                tasks.put(None)
        deadline = time.monotonic() + timeout
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            while thread.is_alive() and time.monotonic() < deadline:
                thread.join(min(0.25, max(0.0, deadline - time.monotonic())))
        return not any(thread.is_alive() for thread in others)

    @staticmethod
    def _run(tasks: queue.SimpleQueue[_Task | None]) -> None:
        stopping = False
        # What the last callback leaves to do, such as on_close, comes before the end.
        while not (stopping and tasks.empty()):
            task = tasks.get()
            if task is None:
                stopping = True
                continue
            try:
                task()
            except Exception:
                log.critical("a work task raised, which is a defect of iocp_ctypes", exc_info=True)
