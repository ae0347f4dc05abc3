"""L5: PipeConnector, the way from the name of a pipe to a connected one.

Laws
1. Opening a pipe does not wait: where all its instances are taken it fails, and is tried again after a while,
   by the watchdog's clock, until the time-out. No thread waits for it.
2. `done` is called exactly once, on an I/O thread: with a pipe, or with why not.
3. It stands in for the pipe of a connection as Connector does for a socket.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ._errors import ERROR_OPERATION_ABORTED, ERROR_PIPE_BUSY, error_from_code
from ._options import KeepAlive
from ._pipeops import OverlappedPipe, open_pipe

if TYPE_CHECKING:
    from ._deadlines import Deadline
    from .engine import Engine

#: Seconds before a pipe whose instances are all taken is tried again: doubled each time up to the second.
BUSY_FIRST: Final = 0.005
BUSY_MAX: Final = 0.1

Done = Callable[[OverlappedPipe | None, OSError | None], None]


class PipeConnector:
    """One connecting to a pipe; thread-safe, nothing blocks."""

    local_raw = b""
    half_closes = False
    receives_at_once = receives_by_packet = sends_at_once = sends_by_packet = 0
    traced: Callable[[Any], Any] | None = None  # opening a pipe is no operation: there is nothing to record

    def __init__(self, engine: Engine, name: str, timeout: float | None, done: Done) -> None:
        """Prepare; `start` begins."""
        self._engine = engine
        self._name = name
        self._timeout = timeout
        self._done: Done | None = done
        self._lock = threading.Lock()
        self._delay = BUSY_FIRST
        self._timer: Deadline | None = None
        self._again: Deadline | None = None

    def start(self) -> None:
        """Begin."""
        if self._timeout is not None:
            with self._lock:
                self._timer = self._engine.watchdog.later(self._timeout, self._timed_out)
        self._engine.dispatcher.call_soon(self._attempt)

    # -- what a closing connection calls in place of its pipe -----------------------------------------------

    def cancel(self) -> None:
        """Give up; `done` follows."""
        self._conclude(None, error_from_code(ERROR_OPERATION_ABORTED, "connecting was cancelled"))

    def close(self) -> None:
        """Nothing is left to close."""

    def reset_on_close(self) -> None:
        """Nothing is connected that could be reset."""

    def set_nodelay(self, on: bool) -> None:
        """A pipe delays nothing."""

    def set_keepalive(self, keepalive: KeepAlive) -> None:
        """A pipe needs no probes."""

    # -- the way --------------------------------------------------------------------------------------------

    def _attempt(self) -> None:
        """Try to open the pipe. On an I/O thread."""
        with self._lock:
            self._again = None
            if self._done is None:
                return
        pipe, code = open_pipe(self._name, self._engine.proactor, self._engine.port)
        if code == ERROR_PIPE_BUSY:
            with self._lock:
                if self._done is not None:
                    self._again = self._engine.watchdog.later(self._delay, self._soon)
                    self._delay = min(BUSY_MAX, self._delay * 2)
            return
        error = None if pipe else error_from_code(code, f"cannot connect to {self._name}")
        if not self._conclude(pipe, error) and pipe is not None:
            pipe.close()  # it was given up meanwhile

    def _soon(self) -> None:
        self._engine.dispatcher.call_soon(self._attempt)

    def _timed_out(self) -> None:
        text = f"{self._name} had no free instance within timeout={self._timeout:g} s"
        self._conclude(None, TimeoutError(errno.ETIMEDOUT, text))

    def _conclude(self, pipe: OverlappedPipe | None, error: OSError | None) -> bool:
        """Have `done` called; False where it was before."""
        with self._lock:
            done, self._done = self._done, None
            timers = self._timer, self._again
            self._timer = self._again = None
        if done is None:
            return False
        for timer in timers:
            if timer is not None:
                self._engine.watchdog.cancel(timer)
        told = done
        self._engine.dispatcher.call_soon(lambda: told(pipe, error))
        return True
