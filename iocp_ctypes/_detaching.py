"""L5: Detaching, how a connection lets its socket go with nothing lost.

Laws
1. The socket goes when nothing of ours is in flight: all that was handed over is sent, and all receives that
   were posted have come back. Until then the connection is open, and reading is held: what others ask for by
   pause_reading and resume_reading meanwhile holds as soon as nobody waits here any more.
2. Bytes that came and that on_data was not given stay with the connection, in `unread`.
3. The connection then ends like any other: on_close comes once, with reason "detached".
Nobody else pays for it: waiting looks again and again, so that no other path has to tell.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Any, Final

from . import _lifecycle as life
from ._addresses import Address
from ._errors import ConnectionClosedError
from ._lifecycle import CloseReason
from ._lifetime import DELIVERING, POSTED
from ._options import Settings, check_timeout
from ._tlschannel import TLSChannel

#: Seconds between two looks.
LOOK: Final = 0.002


class Detaching(TLSChannel):
    """A channel whose socket can be taken away."""

    __slots__ = ("_pause_asked", "_takers")

    def _attach(self, server: Any, home: Any, sock: Any, settings: Settings, peer: Address) -> None:
        super()._attach(server, home, sock, settings, peer)
        self._takers = 0  # calls of detach that wait
        self._pause_asked = False  # whether reading is paused as soon as none of them waits

    @property
    def unread(self) -> bytes:
        """Bytes that came and that on_data has not been given: while reading is paused, and after `detach`,
        which leaves here what its caller has to look at before the socket. Over TLS there are none."""
        with self._lock:
            return b"".join(self._not_delivered())

    def _not_delivered(self) -> list[bytes]:
        """What on_data has not been given, in order. Needs the lock."""
        assert self._lock._is_owned()
        stash, burst = self._stash or [], self._burst
        return [*stash, *(burst.waiting() if burst is not None else ())]

    def detach(self, timeout: float | None = 5.0) -> socket.socket:
        """Take the socket out of the connection, as a plain blocking socket that is the caller's to close.

        Waits until what was sent is out, and the receive in flight has been called back. In on_connect,
        on_data and on_eof, with nothing unsent, there is nothing to wait for. Bytes that came meanwhile are
        in `unread`; on_close(None) follows, with close_reason "detached". Called from anywhere else, other
        connections' callbacks included, it waits for an on_data that is running.

        Args:
            timeout: seconds; None: without end.

        Raises:
            TimeoutError: not all could be sent in time; the connection goes on as before, or as pause_reading
            and resume_reading have asked for meanwhile.
            ConnectionClosedError: the connection is not open, or ended meanwhile.
            OSError: it has no socket that could be handed over: a pipe, or TLS, whose keys stay here.

        The socket works with blocking and non-blocking calls. From Windows 8.1 on it is taken off our
        completion port, too, so that it may be given to another (asyncio's Proactor, `adopt`); on older
        systems that fails with error 87, for an association is for life. Any thread; blocks.
        Source: learn.microsoft.com/windows-hardware/drivers/ddi/ntifs/ns-ntifs-_file_completion_information
        """
        limit = check_timeout("timeout", timeout) if timeout != 0 else 0.0
        if not hasattr(self, "_state"):
            raise ConnectionClosedError("detach(): not connected yet")
        deadline = None if limit is None else time.monotonic() + limit
        in_callback = self._home.is_callback_thread()
        self._hold_reading()
        try:
            while (taken := self._try_to_let_go(in_callback)) is None:
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"detach(): {self._flow.size} bytes are unsent after {limit:g} s")
                time.sleep(LOOK)
        except BaseException:
            self._read_on()
            raise
        return taken

    def resume_reading(self) -> None: ...

    def _hold_reading(self) -> None:
        """Begin to wait: nothing is delivered or posted until `_read_on`."""
        with self._lock:
            self._check_detachable()
            if not self._takers:
                self._pause_asked = self._paused
            self._takers += 1
            self._paused = self._detour = True

    def _read_on(self) -> None:
        """Wait no more: from now on what was asked for holds."""
        with self._lock:  # in one go, so that nobody's pause_reading comes between
            self._takers -= 1
            if not self._takers and not self._pause_asked:
                self.resume_reading()

    def _hold(self, pause: bool) -> bool:
        """Note what is asked for while somebody waits; see TLSChannel. Needs the lock."""
        if self._takers:
            self._pause_asked = pause
            return True
        return super()._hold(pause)

    def _check_detachable(self) -> None:
        """Raise where there is no socket that could be handed over. Needs the lock."""
        assert self._lock._is_owned()
        if self._state != life.OPEN:
            raise ConnectionClosedError(f"detach(): connection {self.id} is not open")
        if not self._socket.detachable:
            raise OSError(errno.EOPNOTSUPP, f"detach(): connection {self.id} has no plain socket")
        if self._tls is not None or self._shaking is not None:
            raise OSError(errno.EOPNOTSUPP, f"detach(): connection {self.id} uses TLS")

    def _try_to_let_go(self, in_callback: bool) -> socket.socket | None:
        """Let the socket go where nothing is in flight; else see to it that this will be so."""
        with self._lock:
            self._check_detachable()
            flow = self._flow
            if self._relayed:
                self._flush()
            if self._state != life.OPEN or flow.queued or flow.sends or flow.files:
                return None
            if self._reading == POSTED:
                if self._burst is None:
                    self._socket.cancel()  # what it brings in this moment goes to the stash
                else:
                    self._burst_cancel(self._burst, kept=0)
                return None
            if self._reading == DELIVERING and not (
                in_callback and self._opened and not self._strand.runs_elsewhere()
            ):
                return None  # what is being delivered is neither in the stash nor taken in
            taken: socket.socket = self._socket.release()
            self._reason = CloseReason.DETACHED
            stash = self._not_delivered()
            self._burst = self._burst_due = None
            self._fail(CloseReason.DETACHED, None)
            self._stash = stash
            return taken
