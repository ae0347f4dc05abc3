"""L5: Channel, the bytes of a connection: receiving and sending.

Laws
1. One receive at a time: `_reading` is IDLE (nothing posted and nobody delivering), POSTED (the kernel has
   it), DELIVERING (its bytes are on the way to on_data, after which the next one is posted) or ENDED (on_eof
   was called). So bytes stay in order, and what on_data does not take in stays with the peer, by TCP's own
   flow control. Who made it DELIVERING posts the next one: at once, or after the others of the round where
   that is a crowd. Several receives at a time are in `_burstchannel`, which takes over where BURST stands
   for the size of the next one.
2. What may be sent is sent at once, by the thread that sends, or in the connection's turn where many are sent
   the same; the rest queues and goes out as sends complete, in the order of the calls.
3. An operation that the system lacks resources for is issued again later; nothing is lost by it.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Sequence
from time import monotonic
from typing import Any, Final

from . import _lifecycle as life
from ._errors import (
    ERROR_BROKEN_PIPE,
    RESOURCE_CODES,
    STATUS_CANCELLED,
    STATUS_PENDING,
    ConnectionClosedError,
    error_from_code,
    reason_of,
)
from ._flow import SEND_GATHER_MAX, Piece
from ._lifecycle import CloseReason
from ._lifetime import BURST, DELIVERING, ENDED, IDLE, POSTED, RETRY_FIRST, SMALL_RECEIVE, Lifetime
from ._options import KIB
from ._proactor import COMPLETED, ENDING_THREADS_DROP, KEPT_DATA_MAX, PENDING, Operation
from ._sockops import error_code

Buffer = bytes | bytearray | memoryview

#: Bytes of a receive in mode "auto" while a stream fills one of recv_size after the other.
BULK_RECEIVE: Final = 64 * KIB
#: Seconds between two messages up to which a connection counts as busy and keeps its small receive posted.
BUSY_GAP: Final = 1.0


def as_bytes(data: Any) -> bytes:
    """Return bytes as they are and a copy of any other contiguous buffer; TypeError for all else."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        raise TypeError("data is a str: a connection sends bytes; encode it first, for example data.encode()")
    try:
        return bytes(memoryview(data))
    except TypeError:
        raise TypeError(
            f"data is of type {type(data).__name__}: a connection sends bytes-like objects"
        ) from None


class Channel(Lifetime):
    """The moving bytes; Connection adds what users see."""

    __slots__ = ()

    # -- over TLS, in TLSChannel ----------------------------------------------------------------------------

    def _deliver_secure(self, data: bytes) -> None: ...
    def _cut_off(self) -> bool: ...  # type: ignore[empty-body]
    def _nothing_encrypted(self) -> None: ...

    # -- the beginning --------------------------------------------------------------------------------------

    def _start(self, first: bytes) -> None:
        """Begin the callbacks; `first` came with the accept. On an I/O thread."""
        with self._lock:
            self._retrace()
            self._arm()
        if self._home.executor is None:
            self._open(first)
        else:
            self._home.executor(self.id)(functools.partial(self._open, first))

    def _open(self, first: bytes) -> None:
        """Begin, and leave the strand, which `_attach` entered."""
        self._strand.go_on()
        try:
            self._begin(first)
        finally:
            self._strand.leave()

    def _begin(self, first: bytes) -> None:
        """Call on_connect and all that comes with it. On the strand."""
        if self._state >= life.JOINING:
            return  # ended before it began: no on_connect, and on_close only where connect() owes it
        self._opened = True
        if self._logged:
            self._log_begin()
        if first:
            self.bytes_received += len(first)
            self._stash = [first]
        self._call(self.on_connect)
        with self._lock:
            if self._state < life.JOINING:  # what was asked for before it was connected
                self._send_on()
                self._advance()
        self._deliver_stash()

    # -- receiving ------------------------------------------------------------------------------------------

    def _received(self, operation: Operation, transferred: int, status: int) -> None:
        """Retire a receive. On an I/O thread. The hot path: one strand, one callback, no lock."""
        if status or not transferred:
            self._reading = DELIVERING
            self._received_rarely(operation, status)
            return
        # POSTED until the strand is ours: so long nobody joins, who would get this operation's buffer, and
        # nobody detaches, who would miss these bytes.
        data = operation.buffer[:transferred]
        if self._state == life.OPEN:  # else it is dropped, and no progress: who waits is waiting for a send
            self.bytes_received += transferred
            now = monotonic()
            if (
                transferred == operation.size
                or operation.size != SMALL_RECEIVE
                or now - self.last_activity > BUSY_GAP
            ):
                self._resize(transferred, now - self.last_activity)
            self.last_activity = now
        strand = self._strand
        if self._home.executor is not None or not strand.enter():
            self._deliver_later(data)
            return
        self._reading = DELIVERING
        if self._state != life.OPEN or self._detour:  # looked at on the strand: on_close may have been here
            self._deliver(data)
            strand.leave()
            return
        try:
            self.on_data(data)
        except BaseException as exc:
            self._callback_raised(exc)
        # In a crowd when the others were served: what is there by then costs neither a wait nor a packet.
        if not self._home.engine.dispatcher.defer(self._receive_on):
            self._receive_on()
        strand.leave()

    def _receive_on(self) -> None:
        """Post the next receive after on_data. DELIVERING is ours until then, so nobody else posts one."""
        lock = self._lock
        lock.acquire()  # cheaper than `with`, here and in `send`
        try:
            operation = self._operation
            if (
                self._state == life.OPEN
                and not self._paused
                and operation is not None
                and operation.size == self._next_size
            ):
                self._reading = POSTED  # before the call: the packet may be retired before it returns
                code = self._socket.receive(operation)
                if code == COMPLETED:  # mostly, where it was deferred
                    self._home.engine.dispatcher.completed(operation.address, operation.InternalHigh)
                elif code != PENDING:
                    self._receive_issued(operation, code)
            else:
                self._receive_next()
        finally:
            lock.release()

    def _deliver_later(self, data: bytes) -> None:
        """Have bytes delivered by the strand; until then they are in the stash, where `detach` finds them."""
        with self._lock:
            self._reading = DELIVERING
            if self._state != life.OPEN or self._tls is not None:
                self._strand.post(self._deliver, data)
                return
            self._stash = [*(self._stash or ()), data]
            self._strand.post(self._deliver_stash)

    def _resize(self, transferred: int, gap: float) -> None:
        """Choose the size of the next receive in mode "auto".

        By what this one brought, and how long it took.
        """
        if self._settings.recv_mode != "auto":
            return
        size = self._settings.recv_size
        if transferred >= size:
            self._next_size = max(size, BULK_RECEIVE) if self._settings.recvburst == 1 else BURST
        elif transferred >= SMALL_RECEIVE:
            self._next_size = size
        else:
            self._next_size = SMALL_RECEIVE if gap <= BUSY_GAP else 0
        if self._settings.recv_mode != "auto":
            self._next_size = self._first_size()  # the mode was changed at this very moment

    def _received_rarely(self, operation: Operation, status: int) -> None:
        """Retire a receive that failed, brought EOF, or was the alert of a zero-byte one."""
        eof = False
        with self._lock:
            if self._state >= life.JOINING:
                self._reading = IDLE
                self._join()
            elif status == STATUS_PENDING:
                self._post_receive(operation.size)
            elif status == STATUS_CANCELLED and self._state == life.OPEN:  # by `detach`, which has paused it
                self._reading = IDLE
                if not self._paused:
                    self._post_receive(self._next_size)
            elif status:
                self._reading = IDLE
                self._receive_failed(error_code(status))
            elif operation.size == 0:
                # Bytes or EOF wait: only a receive with a buffer can tell, and it does not wait.
                self._reading = IDLE
                if not self._paused or self._state != life.OPEN:
                    self._post_receive(self._settings.recv_size)
            elif self._state != life.OPEN:
                self._eof_in = True
                self._reading = IDLE
                self._advance()
            else:
                self._eof_in = eof = True
        if eof:
            self._run(self._deliver_eof)

    def _deliver(self, data: bytes) -> None:
        """Hand bytes to on_data, then receive on. On the strand."""
        if self._tls is not None:
            self._deliver_secure(data)
            return
        if self._paused:
            with self._lock:
                if self._paused and self._state == life.OPEN:
                    self._stash = [*(self._stash or ()), data]
                    self._reading = IDLE
                    return
        if self._state == life.OPEN:
            try:
                self.on_data(data)
            except BaseException as exc:
                self._callback_raised(exc)
        with self._lock:
            self._receive_next()

    def _deliver_stash(self) -> None:
        """Hand over what came while reading was paused, then receive on. On the strand."""
        if self._tls is not None:
            self._deliver_secure(b"")
            return
        while True:
            with self._lock:
                going = self._state == life.OPEN and not self._paused
                if going and self._stash:
                    data = self._stash.pop(0)
                elif going and self._eof_in:
                    break
                else:  # in the same breath: who resumes from now on finds IDLE, and has the rest delivered
                    self._receive_next()
                    return
            self._call(self.on_data, data)
        self._deliver_eof()

    def _deliver_eof(self) -> None:
        """Tell on_eof, unless reading is paused: then resume_reading has it told. On the strand."""
        if self._tls is not None and self._cut_off():
            return
        with self._lock:
            told = self._state == life.OPEN and not self._paused
            self._reading = ENDED if told else IDLE
        if told:
            self._tell_eof()

    def _tell_eof(self) -> None:
        """Call on_eof, and close where it does not keep the connection. On the strand."""
        keep = self._call(self.on_eof)
        with self._lock:
            if self._state == life.OPEN:
                if not keep:
                    self._close(CloseReason.EOF)
                elif self._eof_out:
                    self._advance()

    def _receive_next(self) -> None:
        """After delivering: post the next receive, where there is to be one. Needs the lock."""
        if self._state == life.OPEN and not self._paused and not self._eof_in:
            self._post_receive(self._next_size)
        else:
            self._reading = IDLE
            self._receive_for_close()
            self._join()  # it may have been the last packet that a failed connection waited for

    def _receive_for_close(self) -> None:
        """While closing, receive and drop, to see the peer's EOF. Needs the lock."""
        if self._reading == IDLE and not self._eof_in and life.OPEN < self._state < life.JOINING:
            self._post_receive(SMALL_RECEIVE)

    def _post_receive(self, size: int) -> None:
        """Post one receive with a buffer of `size` bytes, or several. Needs the lock."""
        assert self._lock._is_owned()
        if size == BURST or self._burst is not None:
            self._post_burst()
            return
        operation = self._operation
        if operation is None or operation.size != size:
            proactor = self._home.engine.proactor
            if operation is not None:
                proactor.give_receive(operation)
            operation = self._operation = proactor.take_receive(size)
            operation.handler = self._received
        self._reading = POSTED
        self._receive_issued(operation, self._socket.receive(operation))

    def _receive_issued(self, operation: Operation, code: int) -> None:
        """Account for a receive that was issued. Needs the lock."""
        if code == COMPLETED:
            self._home.engine.dispatcher.completed(operation.address, operation.InternalHigh)
        elif code != PENDING:
            self._reading = IDLE
            self._receive_failed(code)

    def _receive_failed(self, code: int) -> None:
        """A receive could not be issued, or failed. Needs the lock."""
        if code in RESOURCE_CODES:
            self._retry_later("recvburst", 1)
        elif code == ERROR_BROKEN_PIPE:  # how the other end of a pipe says EOF
            self._eof_in = True
            if self._state == life.OPEN:
                self._reading = DELIVERING
                self._strand.post(self._deliver_eof)
            else:
                self._advance()
        else:
            self._fail(reason_of(code), error_from_code(code))

    # -- sending --------------------------------------------------------------------------------------------

    def send(self, data: Buffer) -> bool:
        """Send bytes, after all that was handed over before.

        Args:
            data: a bytes object, which is kept uncopied until it is sent, or another buffer, which is copied.
                Empty: a no-op.

        Returns:
            False where more than `high_mark` bytes are waiting: better wait for on_drain. Nothing is lost;
            only above `write_buffer_max` is the connection closed, with reason `overflow`.

        Raises:
            ConnectionClosedError: after close(), send_eof() or the end of the connection.
            TypeError: `data` is not bytes-like.

        Any thread; never blocks.
        Source: learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsasend
        """
        if data.__class__ is not bytes:
            data = as_bytes(data)
        length = len(data)
        lock = self._lock
        lock.acquire()
        try:
            flow = self._flow
            if (
                flow.sends
                or flow.queued
                or flow.files
                or self._state != life.OPEN
                or self._eof_out
                or not 0 < length <= flow.at_once_max
            ):
                return self._send_queued((data,))
            # The hot path: nothing is before these bytes, so they go straight to the kernel.
            sends = self._home.engine.proactor.sends
            try:
                operation = sends.pop()
            except IndexError:
                operation = Operation()
            operation.load(data)
            code = self._socket.send(operation, self._sent)
            if code == COMPLETED and operation.InternalHigh == length:
                flow.newest = None
                if length <= KEPT_DATA_MAX:
                    operation.handler = operation.keep = None
                    sends.append(operation)
                self.bytes_sent += length
                self.last_activity = monotonic()
                return not flow.above
            self._issued(operation, code, [Piece(data, 0, length)])
            if flow.queued:  # it took only a part
                self._flush()
            return flow.mark(self._settings.high_mark)
        finally:
            lock.release()

    def _send_queued(self, buffers: Sequence[bytes], at_once: bool = True) -> bool:
        """Queue buffers and, at once, send as much as may be in flight. Needs the lock."""
        assert self._lock._is_owned()
        if self._state > life.OPEN or self._eof_out:
            raise ConnectionClosedError(f"connection {self.id} is closed for sending")
        flow = self._flow
        if flow.size + sum(map(len, buffers)) > self._settings.write_buffer_max:
            return self._overflow()
        for data in buffers:
            if data:
                flow.push(data)
        if at_once and self._state == life.OPEN:
            self._flush()
        return flow.mark(self._settings.high_mark)

    def _send_in_turn(self, data: bytes) -> bool:
        """As `send`, to one of many: where it can wait, it is sent when the relay has gone round to here."""
        if type(self).send is not Channel.send:
            return self.send(data)  # somebody puts a length before it, or counts
        with self._lock:
            waiting = self._relayed
            # That the relay has not been here yet must not look as if the peer did not read.
            if waiting >= SEND_GATHER_MAX or self._flow.size + len(data) > self._settings.high_mark:
                return self._send_queued((data,))
            good = self._send_queued((data,), at_once=False)
            if self._state == life.OPEN:
                self._relayed = waiting + 1
                if not waiting:
                    self._home.engine.relay.add(self._relay_turn)
            return good

    def _relay_turn(self) -> None:
        """Send what was queued meanwhile; no callback runs, for others wait. On an I/O thread."""
        with self._lock:
            self._relayed = 0
            if self._state < life.JOINING:
                queued = self._flow.queued
                self._send_on()
                if queued:
                    self._advance()

    def _send_on(self) -> None:
        """Send what is queued; where all of it went at once, no packet will come to have on_drain told.

        Needs the lock.
        """
        self._flush()
        if self._relieved():
            self._strand.post(self._deliver_drain)

    def _relieved(self) -> bool:
        """Whether on_drain is to be told now, and is not on its way already. Needs the lock."""
        assert self._lock._is_owned()
        flow = self._flow
        if self._state != life.OPEN or not flow.relieved(self._settings.low_mark) or flow.drain_due:
            return False
        flow.drain_due = True
        return True

    def _overflow(self) -> bool:
        """The peer does not read: end it, rather than keep everything for it. Needs the lock."""
        most = self._settings.write_buffer_max
        text = f"more than write_buffer_max={most} bytes were waiting to be sent"
        self._fail(CloseReason.OVERFLOW, OSError(errno.ENOBUFS, text), reset=True)
        return False

    def _flush(self) -> None:
        """Issue sends of what is queued, as many as sendcap and SEND_IN_FLIGHT_MAX allow. Needs the lock."""
        assert self._lock._is_owned()
        flow = self._flow
        proactor = self._home.engine.proactor
        cap = self._settings.sendcap
        while flow.may_send(cap) and self._retry_due is None:
            pieces, length = flow.take(gather=self._socket.gather_max)
            if not length:
                self._nothing_encrypted()
                return
            operation = proactor.take_send()
            if len(pieces) == 1 and length == len(pieces[0].data):
                operation.load(pieces[0].data)
                code = self._socket.send(operation, self._sent)
            else:
                vector, count = operation.load_pieces(pieces)
                code = self._socket.send(operation, self._sent, vector, count)
            if not self._issued(operation, code, pieces):
                return
        if flow.files:
            self._go_on_with_files()

    def _issued(self, operation: Operation, code: int, pieces: list[Piece]) -> bool:
        """Account for a send that was issued; False where sending cannot go on now. Needs the lock."""
        flow = self._flow
        if code == PENDING:
            flow.sends += 1
            flow.in_flight += operation.length
            flow.newest = operation
            if ENDING_THREADS_DROP and not self._home.engine.dispatcher.is_serving():
                flow.alone = (
                    operation  # it may have to be issued again, and then nothing may have gone before it
                )
            return True
        length, sent = operation.length, int(operation.InternalHigh)
        self._home.engine.proactor.give_send(operation)
        if code == COMPLETED:
            flow.newest = None
            self.bytes_sent += sent
            self.last_activity = monotonic()
            if sent != length:
                flow.push_front(pieces, sent)
            return True
        if code in RESOURCE_CODES:
            flow.push_front(pieces)
            self._retry_later("sendcap", flow.sends)
        else:
            self._fail(reason_of(code), error_from_code(code))
        return False

    def _sent(self, operation: Operation, transferred: int, status: int) -> None:
        """Retire a send. On an I/O thread."""
        kept, length = operation.keep, operation.length
        with self._lock:
            flow = self._flow
            flow.sends -= 1
            flow.in_flight -= length
            newest = flow.newest is operation
            if newest:
                flow.newest = None
            if flow.alone is operation:
                flow.alone = None
            self._home.engine.proactor.give_send(operation)
            if self._state >= life.JOINING:
                self._join()
                return
            self.bytes_sent += transferred
            self.last_activity = monotonic()
            if transferred != length or status:
                pieces = kept if isinstance(kept, list) else [Piece(kept, 0, length)]
                self._cut_short(pieces, transferred, status, newest)
            self._flush()
            relieved = self._relieved()
            self._advance()
        if relieved:
            self._run(self._deliver_drain)

    def _cut_short(self, pieces: list[Piece], transferred: int, status: int, newest: bool) -> None:
        """A send took only a part: send the rest next, unless later bytes have gone. Needs the lock."""
        code = error_code(status) if status and status != STATUS_PENDING else 0
        if code and code not in RESOURCE_CODES:
            self._fail(reason_of(code), error_from_code(code))
        elif not newest:
            text = "a send was cut short with others behind it"
            self._fail(CloseReason.ABORTED, OSError(errno.EIO, text), reset=True)
        else:
            self._flow.push_front(pieces, transferred)
            if code:
                self._retry_later("sendcap", self._flow.sends)

    def _deliver_drain(self) -> None:
        """Tell on_drain, unless the connection ended meanwhile. On the strand."""
        with self._lock:
            self._flow.drain_due = False
        if self._state == life.OPEN:
            self._call(self.on_drain)

    def _try_again(self) -> None:
        """Issue again what the system had no resources for. Needs the lock."""
        if self._state >= life.JOINING:
            return
        if self._state == life.OPEN and self._reading == IDLE and not self._paused and not self._eof_in:
            self._post_receive(self._next_size)
        self._receive_for_close()
        self._send_on()
        if self._retry_due is None:
            self._retry_delay = RETRY_FIRST
            if self._short is not None:
                self._short.begin(monotonic())
        self._advance()
