"""L5: BurstChannel, several receives of a connection at a time; how many and in which order says `_burst`.

Laws
1. It is in charge exactly while `_burst` is not None: from the first receive of a burst until the mode has
   changed or, in mode "auto", the flow has calmed down, and all that was posted is retired and read, or until
   start_tls was called and all is retired. The ways of `_channel` post nothing meanwhile. `_reading` is
   POSTED exactly while a receive is outstanding.
2. A receive is posted again before what it brought is read, as far as recv_buffer_max allows. While on_data
   runs the next bytes come in; what on_data does not take in stays with the peer, above the limit.
3. Bytes, EOF and failures are handed over in the order of the receives, each at its place.
4. A flow that stops leaves one receive posted: the others are cancelled after QUIET seconds. What a cancelled
   one had got before counts, so nothing is lost by that.
5. All of it needs the lock, but for the calls of on_data and on_eof, which come on the strand.
"""

from __future__ import annotations

import functools
from time import monotonic
from typing import Any, Final

from . import _lifecycle as life
from ._burst import EOF, NOTHING, Burst
from ._channel import BULK_RECEIVE, Channel
from ._errors import ERROR_OPERATION_ABORTED, RESOURCE_CODES, STATUS_PENDING
from ._lifetime import BURST, DELIVERING, ENDED, IDLE, POSTED
from ._proactor import COMPLETED, PENDING, Operation
from ._sockops import error_code

#: Seconds without a byte after which a connection in burst mode keeps one receive posted.
QUIET: Final = 1.0
#: Calls of on_data in one turn; then others have theirs.
DELIVERED_MAX: Final = 32


class BurstChannel(Channel):
    """The receiving in burst mode."""

    __slots__ = ()

    # -- posting --------------------------------------------------------------------------------------------

    def _post_burst(self) -> None:
        """Take over the receiving, or go on with it; a pipe has one receive at a time. Needs the lock."""
        if not self._socket.bursts:
            self._post_receive(self._settings.recv_size)
            return
        if self._burst is None:
            self._burst = Burst()
        self._burst_go_on()

    def _burst_go_on(self) -> None:
        """Something has changed: post, deliver or end, as things are now. Needs the lock."""
        if self._burst is not None and self._burst_next(self._burst):
            self._strand.post(self._deliver_burst)

    def _burst_next(self, burst: Burst) -> bool:
        """Post, fail or end, as things are now; True where delivering has to be begun. Needs the lock."""
        assert self._lock._is_owned()
        if self._state == life.OPEN:
            if not self._eof_in:
                self._burst_post(burst)
            if not burst.delivering and (code := burst.failure()) is not None:
                burst.take()
                self._receive_failed(code)  # at once, paused or not: all that came before it was read
        if self._state != life.OPEN:
            self._receive_for_close()
            self._advance()
            return False
        if self._eof_in:
            self._burst_ended(burst, ENDED)
            return False
        if burst.idle and self._burst_is_over(burst):
            self._burst_ended(burst, IDLE)
            if self._next_size == BURST:
                self._next_size = self._settings.recv_size
            self._receive_next()
            return False
        start = not burst.delivering and not self._paused and burst.head() is not NOTHING
        burst.delivering = burst.delivering or start
        self._reading = POSTED if burst.posted else DELIVERING if burst.delivering else IDLE
        return start

    def _burst_is_over(self, burst: Burst) -> bool:
        """Whether the receiving is to be handed back as soon as nothing is under way."""
        mode = self._settings.recv_mode
        return mode != "burst" and (mode != "auto" or burst.calm or self._settings.recvburst == 1)

    def _burst_ended(self, burst: Burst, reading: int) -> None:
        """Hand the receiving back, or wait for the last packet. Needs the lock."""
        assert self._lock._is_owned()
        if burst.posted:
            self._reading = POSTED
        else:
            self._burst = self._burst_due = None
            self._reading = reading

    def _burst_post(self, burst: Burst) -> None:
        """Post what is wanted and fits. Needs the lock."""
        settings = self._settings
        missing = burst.missing(settings.recvburst)
        if not missing or self._paused or self._burst_is_over(burst):
            return
        proactor = self._home.engine.proactor
        # As many as are missing now: what is done at once is served in its turn, not in this loop.
        for _ in range(missing):
            size = burst.size
            if not size or not burst.has_room(size, settings.recv_buffer_max):
                size = min(settings.recv_size, settings.recv_buffer_max)
            if self._retry_due is not None or not burst.has_room(size, settings.recv_buffer_max):
                break
            operation = proactor.take_receive(size)
            number = burst.post(size, operation)
            operation.handler = functools.partial(self._burst_received, number)
            self._reading = POSTED
            code = self._socket.receive(operation)
            if code == COMPLETED:
                self._home.engine.dispatcher.completed(operation.address, operation.InternalHigh)
            elif code != PENDING:
                proactor.give_receive(operation)
                if code in RESOURCE_CODES:
                    burst.withdraw(number)
                    self._retry_later("recvburst", len(burst.posted))
                else:
                    burst.arrive(number, code)
        if len(burst.posted) > 1 and self._burst_due is None:
            self._burst_due = monotonic() + QUIET
            self._arm()

    def _burst_quiet(self, now: float) -> None:
        """Cancel all posted receives but one where nothing came for QUIET seconds. Needs the lock."""
        assert self._lock._is_owned()
        burst = self._burst
        if burst is None or len(burst.posted) < 2 or self._state >= life.JOINING:
            return
        if burst.came + QUIET > now:
            self._burst_due = burst.came + QUIET
            return
        burst.wanted = 1
        self._burst_cancel(burst, kept=1)

    def _burst_cancel(self, burst: Burst, kept: int) -> None:
        for number, operation in burst.surplus(kept):
            burst.cancelled.add(number)
            self._socket.cancel_receive(operation)

    def _try_again(self) -> None:
        """Issue again what the system had no resources for. Needs the lock."""
        if self._state < life.JOINING:
            self._burst_go_on()
        super()._try_again()

    def _receive_for_close(self) -> None:
        """While closing, drop what has come; receive on only when the burst's receives are all back."""
        if self._burst is not None and self._state != life.OPEN:
            self._burst_drop(self._burst)
        super()._receive_for_close()

    def _burst_drop(self, burst: Burst) -> None:
        """The connection closes: forget what nobody will read. Needs the lock."""
        end = burst.forget()
        self._burst_ended(burst, IDLE)
        if end is EOF:
            self._eof_in = True
        elif end is not NOTHING:
            self._receive_failed(end)

    # -- what comes -----------------------------------------------------------------------------------------

    def _burst_received(self, number: int, operation: Operation, transferred: int, status: int) -> None:
        """Retire a receive. On an I/O thread."""
        data: bytes = operation.buffer[:transferred] if transferred else b""
        inline = self._home.executor is None and self._strand.enter()
        with self._lock:
            self._home.engine.proactor.give_receive(operation)
            burst = self._burst
            assert burst is not None
            burst.arrive(number, self._burst_brought(burst, number, data, status))
            if data and self._state == life.OPEN:
                self._burst_counted(burst, len(data), operation.size)
            start = self._burst_next(burst)
        if inline:
            if start:
                self._deliver_burst()
            self._strand.leave()
        elif start:
            self._strand.post(self._deliver_burst)

    def _burst_brought(self, burst: Burst, number: int, data: bytes, status: int) -> Any:
        """Return what a receive brought, as `Burst.arrive` takes it. Needs the lock."""
        if data:
            return data
        if not status:
            return EOF
        if status == STATUS_PENDING:
            return NOTHING
        code = error_code(status)
        if code == ERROR_OPERATION_ABORTED and number in burst.cancelled:
            return NOTHING
        if code in RESOURCE_CODES:
            if self._state < life.JOINING:
                self._retry_later("recvburst", len(burst.posted) - 1)
            return NOTHING
        return code

    def _burst_counted(self, burst: Burst, length: int, size: int) -> None:
        """Count bytes that came, and choose the size of the next receive by them. Needs the lock."""
        assert self._lock._is_owned()
        self.bytes_received += length
        self.last_activity = burst.came = monotonic()
        if length == size:
            burst.size = max(self._settings.recv_size, BULK_RECEIVE)
        elif length < self._settings.recv_size:
            burst.size = 0

    # -- handing over ---------------------------------------------------------------------------------------

    def _deliver_burst(self) -> None:
        """Hand over what has come, in order. On the strand."""
        for _ in range(DELIVERED_MAX):
            with self._lock:
                what = self._burst_take()
            if what is NOTHING:
                return
            if what is EOF:
                self._tell_eof()
                return
            try:
                self.on_data(what)
            except BaseException as exc:
                self._callback_raised(exc)
        self._strand.post(self._deliver_burst)

    def _burst_take(self) -> Any:
        """Return bytes for on_data, EOF, or NOTHING to end delivering. On the strand; needs the lock."""
        burst = self._burst
        if burst is None:
            return NOTHING
        burst.consumed(self._settings.recvburst)
        while True:
            if self._state == life.OPEN and not self._paused and burst.delivering:
                what = burst.take()
                if isinstance(what, bytes):
                    if len(burst.posted) < burst.wanted:
                        self._burst_next(burst)
                    return what
                if what is EOF:
                    burst.delivering = False
                    self._eof_in = True
                    self._burst_cancel(burst, kept=0)  # they have EOF as well; no system may forget one
                    self._burst_ended(burst, ENDED)
                    return EOF
                if what is not NOTHING:
                    self._receive_failed(what)
            burst.delivering = False
            if not burst.arrived and len(burst.posted) >= burst.wanted and self._state == life.OPEN:
                return NOTHING  # nothing to post, to read or to end
            if not self._burst_next(burst):
                return NOTHING
