"""L5: FileChannel, sending files in order with all else that a connection sends.

Laws
1. A file begins when all that was handed over before it is sent, and it is sent alone: what is handed over
   behind it waits in `_files.waiting`, as it came, and is queued when the file is done.
2. One file at a time, in slices. Where the socket transmits, a slice is one TransmitFile, with the header in
   the first and the trailer in the last; else a slice is read and goes the way of all bytes, and the next is
   read when less than FILE_AHEAD is unsent.
3. The system may read the disk before such a call returns, so it is made on an I/O thread and without the
   lock. `busy` is true exactly from the decision to make it until it is retired; meanwhile the file stays
   open.
4. A file that cannot be sent to its end ends the connection with a reset: the peer must not take a part for
   the whole.
5. A slice is as large as the peer is quick: on Windows a call shows no progress before it is complete.
"""

from __future__ import annotations

import errno
import functools
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from . import _lifecycle as life
from ._addresses import Address
from ._burstchannel import BurstChannel
from ._channel import Buffer, as_bytes
from ._errors import (
    ERROR_HANDLE_EOF,
    RESOURCE_CODES,
    WSAECONNRESET,
    ConnectionClosedError,
    error_from_code,
    reason_of,
)
from ._fileops import TRANSMIT_MAX, Source, TransmitOperation, open_source
from ._flow import SEND_SLICE_MAX
from ._lifecycle import CloseReason
from ._options import KIB, Settings
from ._proactor import COMPLETED, PENDING, Operation
from ._sockops import RESETS_GET_LOST, error_code

if TYPE_CHECKING:
    from ._deadlines import Deadline

#: Bytes of the first TransmitFile of a file, and of the smallest.
TRANSMIT_FIRST: Final = 256 * KIB
#: Seconds: a slice sent in less lets the next be four times as large, one that took four times as long makes
#: it so much smaller.
TRANSMIT_QUICK: Final = 0.25
#: Bytes of one read, and how many may be unsent when the next begins: two slices in memory at the most.
FILE_AHEAD: Final = 256 * KIB
#: Files that wait in one connection; each is an open handle. Above it the connection is closed with overflow.
FILES_MAX: Final = 256
#: Seconds between two cancels of a TransmitFile: Wine forgets one that meets the end of a part of it.
CANCEL_AGAIN: Final = 0.05
#: Seconds between two looks whether the peer of a TransmitFile that waits has reset: Wine may never tell.
LOOK_AGAIN: Final = 1.0
#: Codes with which a provider says that it has no TransmitFile for this: the file is read instead.
_NOT_SUPPORTED: Final = frozenset({1, 50, 120, 10045})


class Job:
    """A file on its way: what is left of the header, the file and the trailer."""

    __slots__ = ("began", "busy", "by_slices", "head", "operation", "size", "slice", "source", "tail")

    def __init__(self, source: Source, head: bytes, tail: bytes) -> None:
        self.source = source
        self.head = head
        self.tail = tail
        self.size = len(head) + source.left + len(tail)
        self.by_slices = False
        self.busy = False
        self.began = 0.0
        self.slice = TRANSMIT_FIRST
        self.operation: Any = None

    @property
    def memory(self) -> int:
        """Bytes that are in memory: all but those on disk."""
        source = self.source
        return len(self.head) + (source.left if source.in_memory else 0) + len(self.tail)

    def consume(self, sent: int) -> int:
        """So many bytes more were sent, in order; returns how many of them were in memory."""
        memory = self.memory
        part = min(sent, len(self.head))
        self.head = self.head[part:]
        sent -= part
        part = min(sent, self.source.left)
        self.source.advance(part)
        self.tail = self.tail[sent - part :]
        return memory - self.memory

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return not (self.head or self.source.left or self.tail)


class _Files:
    """The file that is being sent, and what waits behind it: bytes and further files."""

    __slots__ = ("again", "job", "waiting")

    def __init__(self) -> None:
        self.job: Job | None = None
        self.waiting: deque[Any] = deque()
        self.again: Deadline | None = None


def make_job(file: Any, offset: Any, count: Any, header: Buffer, trailer: Buffer) -> Job:
    """Check and open what `send_file` was called with."""
    head, tail = as_bytes(header), as_bytes(trailer)
    return Job(open_source(file, offset, count), head, tail)


class FileChannel(BurstChannel):
    """A channel that sends files as well."""

    __slots__ = ("_files",)

    def _attach(self, server: Any, home: Any, sock: Any, settings: Settings, peer: Address) -> None:
        self._files: _Files | None = None
        super()._attach(server, home, sock, settings, peer)

    # -- handing over ---------------------------------------------------------------------------------------

    def send_file(
        self,
        file: Any,
        offset: int = 0,
        count: int | None = None,
        *,
        header: Buffer = b"",
        trailer: Buffer = b"",
    ) -> bool:
        """Send a file of any size, after all that was handed over before.

        Args:
            file: a path, a file object of a file on disk in binary mode, or an io.BytesIO. A file object may
                be closed when this returns; its position does not matter, nor does it move. (It may where the
                system cannot open the file anew, because it was deleted or is shared with nobody: leave such
                a file object alone until it is sent, or close it.)
            offset: where to begin, in bytes from the beginning of the file.
            count: how many bytes to send; None: up to the end.
            header: bytes to send before the file, in the same call of the system where that transmits files.
            trailer: bytes to send after it.

        Returns:
            False: on_drain comes when the file is sent. True only where there was nothing to send.

        Raises:
            ConnectionClosedError: after close(), send_eof() or the end of the connection.
            TypeError: not a file, or one in text mode. ValueError: offset or count are negative or beyond the
            end, or the file is not one on disk. OSError: it cannot be opened.

        Until it is sent `send` returns False, and what it takes waits in memory behind the file. What is in
        memory, an io.BytesIO and header and trailer, counts as bytes of `send` do: above `write_buffer_max`
        the connection is closed, with reason `overflow`; but a BytesIO for which nothing waits may be larger.
        A file that becomes shorter meanwhile, or cannot be read, resets the connection, with close_reason
        "error". Any thread; blocks for as long as opening takes.
        Source: learn.microsoft.com/windows/win32/api/mswsock/nf-mswsock-transmitfile
        """
        return self._send_job(make_job(file, offset, count, header, trailer))

    def _send_job(self, job: Job) -> bool:
        """Queue a file; it is closed where that is refused."""
        with self._lock:
            flow = self._flow
            if self._state > life.OPEN or self._eof_out:
                job.source.close()
                raise ConnectionClosedError(f"connection {self.id} is closed for sending")
            if not job.size:
                job.source.close()
                return not flow.above
            # Alone it may be larger: the caller has it in memory anyway, and files have no limit either.
            alone = job.source.in_memory and not flow.size and not flow.files
            too_much = flow.size + job.memory > self._settings.write_buffer_max and not alone
            if flow.files >= FILES_MAX or too_much:
                job.source.close()
                return self._overflow()
            files = self._files
            if files is None:
                files = self._files = _Files()
            files.waiting.append(job)
            flow.files += 1
            flow.held += job.memory
            if self._state == life.OPEN:
                self._flush()
            return flow.mark(self._settings.high_mark)

    def _send_queued(self, buffers: Any, at_once: bool = True) -> bool:
        """Queue buffers, behind the files that wait. Needs the lock."""
        assert self._lock._is_owned()
        flow, files = self._flow, self._files
        if not flow.files or files is None or self._state > life.OPEN or self._eof_out:
            return super()._send_queued(buffers, at_once)
        size = sum(map(len, buffers))
        if flow.size + size > self._settings.write_buffer_max:
            return self._overflow()
        files.waiting.extend(data for data in buffers if data)
        flow.held += size
        return flow.mark(self._settings.high_mark)

    # -- on and on ------------------------------------------------------------------------------------------

    def _go_on_with_files(self) -> None:
        """Take the next step of the file whose turn it is. Needs the lock."""
        assert self._lock._is_owned()
        flow, files = self._flow, self._files
        if files is None or self._retry_due is not None or not life.OPEN <= self._state < life.JOINING:
            return
        job = files.job
        if job is None:
            if flow.size > flow.held or flow.sends or not files.waiting:
                return
            job = files.job = files.waiting.popleft()
            job.by_slices = (
                not self._transmits
                or job.source.in_memory
                or job.memory > SEND_SLICE_MAX
                or not job.source.left
            )
            if job.by_slices:
                self._begin_slices(job)
                self._flush()  # which comes back here
                return
        if job.busy:
            return
        if not job.by_slices:
            self._transmit(job)
        elif flow.size - flow.held <= FILE_AHEAD:
            job.busy = True
            self._home.engine.dispatcher.call_soon(functools.partial(self._read, job))

    @property
    def _transmits(self) -> bool:
        """Whether the socket sends files by itself. What changes bytes on their way says no."""
        return bool(self._socket.transmits)

    def _push(self, data: bytes) -> None:
        """Queue bytes of a file, or bytes that have waited behind one. Needs the lock.

        What changes bytes on their way does it here.
        """
        assert self._lock._is_owned()
        if data:
            self._flow.push(data)

    def _begin_slices(self, job: Job) -> None:
        """The header goes first. Needs the lock."""
        job.operation = None
        head, job.head = job.head, b""
        self._flow.held -= len(head)
        self._push(head)

    def _file_done(self, job: Job) -> None:
        """The file is over: what waits behind it is queued, up to the next one. Needs the lock."""
        flow, files = self._flow, self._files
        assert files is not None
        files.job = job.operation = None
        flow.files -= 1
        job.source.close()
        while files.waiting and isinstance(files.waiting[0], bytes):
            data = files.waiting.popleft()
            flow.held -= len(data)
            self._push(data)

    def _file_failed(self, code: int) -> None:
        """The file cannot be sent to its end. Needs the lock."""
        files = self._files
        if code in (0, ERROR_HANDLE_EOF):
            left = files.job.source.left if files is not None and files.job is not None else 0
            text = f"a file ended {left} bytes early: it was made shorter while it was sent"
            self._fail(CloseReason.ERROR, OSError(errno.EIO, text), reset=True)
        else:
            self._fail(reason_of(code), error_from_code(code, "sending a file"), reset=True)

    def _cancel(self) -> None:
        """Cancel, and let the files go. Needs the lock."""
        self._close_files()
        super()._cancel()
        files = self._files
        if files is not None and files.again is not None:
            self._home.engine.watchdog.cancel(files.again)  # the next look is to be soon
            files.again = None
        self._watch(CANCEL_AGAIN)

    def _close_files(self) -> None:
        """Let the files go; the one that a call is working on goes when that is done. Needs the lock."""
        assert self._lock._is_owned()
        files = self._files
        if files is not None:
            for waiting in files.waiting:
                if isinstance(waiting, Job):
                    waiting.source.close()
            files.waiting.clear()
            if files.job is not None and not files.job.busy:
                files.job.source.close()

    def _watch(self, seconds: float) -> None:
        """See to it that the TransmitFile under way ends, whatever Wine forgets. Needs the lock."""
        assert self._lock._is_owned()
        files = self._files
        if files is not None and files.job is not None and files.job.busy and files.again is None:
            files.again = self._home.engine.watchdog.later(seconds, self._watch_again)

    def _watch_again(self) -> None:
        """Cancel again where it was cancelled; else look for a reset. On the watchdog's thread."""
        with self._lock:
            files = self._files
            if files is None:
                return
            files.again = None
            if not self._flow.sends:
                return  # it is done; the next has looks of its own
            if self._state == life.JOINING:
                self._socket.cancel()
                self._watch(CANCEL_AGAIN)
            elif RESETS_GET_LOST and files.job is not None and files.job.busy and not files.job.by_slices:
                if self._socket.was_reset():
                    self._file_failed(WSAECONNRESET)
                else:
                    self._watch(LOOK_AGAIN)

    def _is_over(self, job: Job) -> bool:
        """Whether the connection, or TLS, ended under a file, which is let go then. Needs the lock."""
        job.busy = False
        if self._state < life.JOINING and self._flow.files:
            return False
        job.operation = None
        job.source.close()
        files = self._files
        if files is not None and files.again is not None:
            self._home.engine.watchdog.cancel(files.again)
            files.again = None
        self._join()
        return True

    def _after_step(self) -> bool:
        """Go on sending; True where on_drain is to be told. Needs the lock."""
        self._flush()
        relieved = self._relieved()
        self._advance()
        return relieved

    # -- by TransmitFile ------------------------------------------------------------------------------------

    def _transmit(self, job: Job) -> None:
        """Have the next slice transmitted. Needs the lock."""
        assert self._lock._is_owned()
        left = job.source.left
        amount = min(left, job.slice, TRANSMIT_MAX - job.memory)
        job.operation = TransmitOperation(job.source, amount, job.head, job.tail if amount == left else b"")
        job.busy = True
        self._flow.sends += 1
        self._home.engine.dispatcher.call_soon(functools.partial(self._issue_transmit, job))

    def _issue_transmit(self, job: Job) -> None:
        """Make the call. On an I/O thread."""
        sock, operation = self._socket, job.operation
        with self._lock:
            if self._state >= life.JOINING:
                self._flow.sends -= 1
                self._is_over(job)
                return
        job.began = monotonic()
        code = sock.transmit(operation, self._transmitted)
        if code == COMPLETED:
            self._transmitted(operation, operation.InternalHigh, 0)
            return
        # Wine never completes one that it begins after a reset, nor always one that a reset meets.
        reset = code == PENDING and sock.was_reset()
        with self._lock:
            if code == PENDING:
                if reset and self._state < life.JOINING:
                    self._file_failed(WSAECONNRESET)
                elif self._state == life.JOINING:  # it ended during the call: nobody cancelled this one
                    sock.cancel()
                elif RESETS_GET_LOST:
                    self._watch(LOOK_AGAIN)
                return
            self._flow.sends -= 1
            if self._is_over(job):
                return
            if code in _NOT_SUPPORTED:
                job.by_slices = True
                self._begin_slices(job)
            elif code in RESOURCE_CODES:
                self._retry_later("sendcap", self._flow.sends)
            else:
                self._file_failed(code)
            self._after_step()

    def _transmitted(self, operation: Operation, transferred: int, status: int) -> None:
        """Retire a TransmitFile. On an I/O thread."""
        with self._lock:
            files, flow = self._files, self._flow
            assert files is not None
            assert files.job is not None
            job = files.job
            flow.sends -= 1
            if self._is_over(job):
                return
            now = self.last_activity = monotonic()
            self.bytes_sent += transferred
            flow.held -= job.consume(transferred)
            code = error_code(status) if status else 0
            if code in RESOURCE_CODES:
                self._retry_later("sendcap", flow.sends)
            elif status or transferred != operation.length:
                self._file_failed(code)
            elif job.done:
                self._file_done(job)
            elif now - job.began < TRANSMIT_QUICK:
                job.slice = min(TRANSMIT_MAX, job.slice * 4)
            elif now - job.began > TRANSMIT_QUICK * 4:
                job.slice = max(TRANSMIT_FIRST, job.slice // 4)
            relieved = self._after_step()
        if relieved:
            self._run(self._deliver_drain)

    # -- by reading -----------------------------------------------------------------------------------------

    def _read(self, job: Job) -> None:
        """Read the next slice. On an I/O thread."""
        with self._lock:
            if self._is_over(job):
                return
            job.busy = True
        source = job.source
        size = min(FILE_AHEAD, source.left)
        if source.in_memory or not size:
            self._slice_came(job, source.peek(size), size, 0)
            return
        engine = self._home.engine
        if job.operation is None:
            job.operation = Operation(FILE_AHEAD)
            try:
                source.prepare(engine.port)
            except OSError as exc:
                self._slice_came(job, b"", size, getattr(exc, "winerror", None) or 1)
                return
        operation = job.operation
        code = source.read(operation, self._retired_read, engine.proactor, size)
        if code == PENDING:
            with self._lock:
                if self._state >= life.JOINING and job.busy:
                    source.cancel()
        elif code == COMPLETED:
            self._slice_came(job, operation.buffer[: operation.InternalHigh], size, 0)
        else:
            self._slice_came(job, b"", size, code)

    def _retired_read(self, operation: Operation, transferred: int, status: int) -> None:
        """Retire a ReadFile. On an I/O thread."""
        files = self._files
        assert files is not None
        assert files.job is not None  # it stays while it is busy
        code = error_code(status) if status else 0
        self._slice_came(
            files.job, operation.buffer[:transferred], min(FILE_AHEAD, files.job.source.left), code
        )

    def _slice_came(self, job: Job, data: bytes, wanted: int, code: int) -> None:
        """Send what was read. On an I/O thread."""
        with self._lock:
            if self._is_over(job):
                return
            if code or len(data) != wanted:
                self._file_failed(code)
            else:
                before = job.memory
                job.source.advance(wanted)
                self._flow.held -= before - job.memory
                self._push(data)
                if not job.source.left:
                    self._flow.held -= len(job.tail)
                    self._push(job.tail)
                    self._file_done(job)
            relieved = self._after_step()
        if relieved:
            self._run(self._deliver_drain)
