"""L7: Outgoing, the sending half of a WebSocket.

Laws
1. A frame is built by the library (`Frame.serialize`), outside the lock; `_lock` covers what decides the
   order: handing it to the connection, or putting it behind what waits.
2. The connection is given no data frame while it is above its high mark: those wait here. So a control frame,
   which is handed over at once, goes before them.
3. What waits has an end: `queue_max`. Only a peer that reads is waited for.
4. With `collect_sends`, while several messages of one receive are worked off, the frames they send are
   collected and go out as one: `_batch`.
Lock order: `_lock` of a WebSocket, then the connection's.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from websockets.exceptions import ProtocolError
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Close, Frame, Opcode

from .._channel import as_bytes
from .._errors import ConnectionClosedError
from .._locks import lock_number, make_locks
from .._options import KIB
from ._limits import Deflate, Options

if TYPE_CHECKING:
    from ..connection import Connection

CONTINUATION, TEXT, BINARY = Opcode.CONT, Opcode.TEXT, Opcode.BINARY
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG

#: Where a WebSocket is: before the handshake is done; open; our Close is on its way; on_close has its call.
CONNECTING, OPEN, CLOSING, CLOSED = range(4)
STATE_NAMES: Final = ("connecting", "open", "closing", "closed")

#: Bytes that are collected before they go out; a larger frame is not copied to be collected.
BATCH_MAX: Final = 16 * KIB
#: Bytes of a control frame's payload, and of a Close's reason besides its code (RFC 6455, section 5.5).
CONTROL_MAX: Final = 125
REASON_MAX: Final = 123
#: Codes that are never on the wire (RFC 6455, section 7.4.1): nothing was said; the connection just ended.
NO_CODE: Final = 1005
ABNORMAL: Final = 1006
NORMAL: Final = 1000
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
INVALID_DATA: Final = 1007
POLICY: Final = 1008
TOO_BIG: Final = 1009
INTERNAL_ERROR: Final = 1011

_LOCKS: Final = make_locks()
_numbers = itertools.count(1)
_numbers_lock: Final = threading.RLock()  # without a GIL, count alone may give a number twice


def payload(message: Any) -> tuple[Opcode, bytes]:
    """Return the opcode and the bytes of a message; TypeError where it is neither text nor bytes."""
    if isinstance(message, str):
        return TEXT, message.encode()
    try:
        return BINARY, as_bytes(message)
    except TypeError:
        raise TypeError(f"message is of type {type(message).__name__}: must be str or bytes-like") from None


def build(opcode: Opcode, data: bytes, mask: bool, extensions: Sequence[Any] | None = None) -> bytes:
    """Build a frame that is a whole message."""
    return Frame(opcode, data).serialize(mask=mask, extensions=extensions)


def compressor(deflate: Deflate, window_bits: int) -> PerMessageDeflate:
    """Return the library's extension for one message that refers to no other."""
    return PerMessageDeflate(True, True, 15, window_bits, deflate.settings)


def close_payload(code: int | None, reason: str) -> bytes:
    """Return the payload of a Close; ValueError where the code or the reason cannot be sent."""
    if code is None:
        if reason:
            raise ValueError(f"reason={reason!r}: a reason needs a code")
        return b""
    if len(reason.encode()) > REASON_MAX:
        raise ValueError(f"reason={reason!r}: must have at most {REASON_MAX} bytes as UTF-8")
    try:
        return Close(code, reason).serialize()
    except ProtocolError:
        raise ValueError(
            f"code={code!r}: must be one of 1000 to 1014 that may be sent (RFC 6455), or 3000 to 4999"
        ) from None


class Shared:
    """A message for many: built once, and compressed once for each size of window."""

    __slots__ = ("_frames", "data", "opcode")

    def __init__(self, message: str | bytes) -> None:
        self.opcode, self.data = payload(message)
        self._frames: dict[tuple[Deflate, int] | None, bytes] = {}

    def frame(self, deflate: Deflate | None, window_bits: int) -> bytes:
        """Return the frame: plain, or compressed for a window."""
        key = None if deflate is None else (deflate, window_bits)
        frame = self._frames.get(key)
        if frame is None:
            extensions = None if deflate is None else [compressor(deflate, window_bits)]
            frame = self._frames[key] = build(self.opcode, self.data, False, extensions)
        return frame


class Outgoing(Options):
    """What is sent."""

    def __init__(self, connection: Connection) -> None:
        self.connection: Any = connection
        self.dropped = 0
        with _numbers_lock:
            self.id = next(_numbers)
        self._lock: Any = _LOCKS[lock_number(self.id)]
        self._state = CONNECTING
        self._mask = False  # True on a client
        self._deflate: Deflate | None = None  # not None exactly where compression was agreed on
        self._window_bits = 15
        self._packer: Any = None  # the library's extension, where what we compress refers to earlier messages
        self._packing: threading.Lock | None = None  # and what keeps such messages in order
        self._stream: Any = None  # the extension of a message that is sent in fragments, or False, or None
        self._stream_kind: Opcode | None = None  # TEXT or BINARY until its last fragment is sent
        self._parked: list[bytes] = []  # messages that were sent meanwhile
        self._parked_bytes = 0
        self._full = False  # the connection is above its high mark: data waits here
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._full_since: float | None = None
        self._batch: list[bytes] | None = None
        self._batch_bytes = 0
        self._fate: tuple[int, str] | None = None  # what on_close will be told; the first counts
        self._slow_due: float | None = None

    def _be_client(self) -> None:
        """Mask what is sent, and let it wait until the handshake is done."""
        self._mask = self._full = True

    def _use(self, extension: Any) -> None:
        """Compress from now on, as was agreed on."""
        self._window_bits = extension.local_max_window_bits
        if not extension.local_no_context_takeover:
            self._packer = extension
            self._packing = threading.Lock()
        self._deflate = self.compression

    # -- messages -------------------------------------------------------------------------------------------

    def send(self, message: str | bytes | bytearray | memoryview, *, compress: bool | None = None) -> bool:
        """Send a message: str as text, bytes as binary.

        Args:
            message: of any size; a frame of its own.
            compress: whether to compress it, where that was agreed on; None: from `threshold` bytes on.

        Returns:
            False where the peer reads more slowly than this: better wait for on_drain. Nothing is lost; only
            when more than `queue_max` bytes wait besides what the connection holds is it closed.

        Raises:
            ConnectionClosedError: it is not open any more, or not yet. (A client's messages may be sent
            before it is open: they go when it is.)
            TypeError: the message is neither text nor bytes-like. UnicodeEncodeError: it is no Unicode text.

        Any thread; never blocks.
        """
        if message.__class__ is bytes:
            opcode, data = BINARY, message
        else:
            opcode, data = payload(message)
        deflate = self._deflate
        if deflate is not None and (len(data) >= deflate.threshold if compress is None else compress):
            return self._send_compressed(opcode, data)
        frame = Frame(opcode, data).serialize(mask=self._mask)
        with self._lock:
            if self._full or self._batch is not None or self._state != OPEN or self._stream_kind is not None:
                return self._put(frame)
            # The hot path: nothing waits, so it goes straight to the connection.
            if self.connection.send(frame):
                return True
            self._note_full()
            return False

    def _send_compressed(self, opcode: Opcode, data: bytes, droppable: bool = False) -> bool:
        deflate = self._deflate
        assert deflate is not None
        if self._packing is None:
            frame = build(opcode, data, self._mask, [compressor(deflate, self._window_bits)])
            with self._lock:
                return self._put(frame, droppable)
        with self._packing:  # in this order they are compressed, and in this order they go
            # The compressor is at work on a message that is sent in fragments: this one goes as it is.
            extensions = None if self._stream else [self._packer]
            frame = build(opcode, data, self._mask, extensions)
            with self._lock:
                return self._put(frame, droppable)

    def send_fragment(self, data: str | bytes, *, last: bool = False, compress: bool | None = None) -> bool:
        """Send a message piece by piece: each call a fragment, until one is the last.

        Args:
            data: str or bytes, of the same kind as the first; may be empty.
            last: True ends the message.
            compress: with the first: whether the message is compressed; None: where that was agreed on.

        Returns:
            As `send`. Messages that others send meanwhile wait for the last fragment.

        Raises:
            TypeError: the kind differs from that of the first. Else as `send`.

        One thread at a time; never blocks.
        """
        kind, raw = payload(data)
        with self._lock:
            first = self._stream_kind is None
            if not first and kind is not self._stream_kind:
                raise TypeError(
                    f"data is of type {type(data).__name__}: a message is all text or all bytes, as it began"
                )
        if self._packing is None:
            frame = self._fragment(first, kind, raw, last, compress)
            with self._lock:
                return self._put_fragment(frame, kind, last)
        with self._packing:
            frame = self._fragment(first, kind, raw, last, compress)
            with self._lock:
                return self._put_fragment(frame, kind, last)

    def _fragment(self, first: bool, kind: Opcode, raw: bytes, last: bool, compress: bool | None) -> bytes:
        """Build a fragment; where what we compress refers to earlier messages, with `_packing` held."""
        if first:
            packs = self._deflate is not None and (compress is None or compress)
            if not packs or self._deflate is None:
                self._stream = False
            else:
                self._stream = self._packer or compressor(self._deflate, self._window_bits)
        extensions = [self._stream] if self._stream else None
        frame = Frame(kind if first else CONTINUATION, raw, last)
        return frame.serialize(mask=self._mask, extensions=extensions)

    def _put_fragment(self, frame: bytes, kind: Opcode, last: bool) -> bool:
        """Hand over a fragment, and after the last what waited for it. Needs the lock."""
        self._stream_kind = None
        good = self._put(frame)
        if not last:
            self._stream_kind = kind
            return good
        self._stream = None
        parked, self._parked, self._parked_bytes = self._parked, [], 0
        for other in parked:
            good = self._put(other)
        return good

    def _send_shared(self, shared: Shared, directly: bool) -> bool:
        """Send a message of a broadcast; True where it was taken. Any thread; never blocks."""
        deflate, dropped = self._deflate, self.dropped
        if deflate is None or len(shared.data) < deflate.threshold:
            deflate = None
        elif self._packing is not None:
            self._send_compressed(shared.opcode, shared.data, droppable=True)
            return dropped == self.dropped and self._fate is None
        frame = shared.frame(deflate, self._window_bits)
        with self._lock:
            if self._state == OPEN and not (
                self._full or self._fate or self._stream_kind is not None or self._batch is not None
            ):
                # The hot path, as in `send`.
                connection = self.connection
                if not (connection.send(frame) if directly else connection._send_in_turn(frame)):
                    self._note_full()
                return True
            dropped = self.dropped
            self._put(frame, droppable=True)
            return dropped == self.dropped and self._fate is None

    # -- control frames -------------------------------------------------------------------------------------

    def ping(self, data: bytes | str = b"") -> None:
        """Send a ping; `on_pong` is called with the same bytes when the answer comes.

        Args:
            data: at most 125 bytes.

        Raises ConnectionClosedError where it is not open. Any thread; never blocks.
        """
        raw = payload(data)[1]
        if len(raw) > CONTROL_MAX:
            raise ValueError(f"data={raw[:20]!r}...: a ping carries at most {CONTROL_MAX} bytes")
        self._refuse_unless_open()
        self._send_control(PING, raw)

    def _send_control(self, opcode: Opcode, raw: bytes) -> None:
        """Send a ping or pong before all data that waits here; none after our Close."""
        self._send_now(Frame(opcode, raw).serialize(mask=self._mask))

    def _send_now(self, frames: bytes) -> None:
        """Hand control frames to the connection, before data that waits here; none after our Close."""
        with self._lock:
            if self._state <= OPEN and not self.connection.send(frames):
                self._note_full()

    def _note_full(self) -> None:
        """The connection is above its high mark: on_drain will come, after this. Needs the lock."""
        assert self._lock._is_owned()
        if not self._full:
            self._full = True
            if self.slow_reader == "wait":
                self._slow_due = monotonic() + self.slow_timeout
                self._arm()

    def _refuse_unless_open(self) -> None:
        if self._state != OPEN:
            raise ConnectionClosedError(f"this WebSocket is {STATE_NAMES[self._state]}")

    # -- the queue ------------------------------------------------------------------------------------------

    def _put(self, frame: bytes, droppable: bool = False) -> bool:
        """Hand a data frame to the connection, or let it wait. Needs the lock."""
        assert self._lock._is_owned()
        if self._state != OPEN and not (self._mask and self._state == CONNECTING):
            self._refuse_unless_open()
        if self._fate is not None:
            raise ConnectionClosedError(f"this WebSocket was given up: {self._fate[1]}")
        if self._stream_kind is not None:
            return self._park(frame, droppable)
        batch = self._batch
        if batch is not None and len(frame) <= BATCH_MAX:
            batch.append(frame)
            self._batch_bytes += len(frame)
            if self._batch_bytes > BATCH_MAX:
                self._batch = []
                self._batch_bytes = 0
                return self._hand_over(b"".join(batch))
            return not self._full
        if batch:
            self._batch = []
            self._batch_bytes = 0
            self._hand_over(b"".join(batch))
        return self._hand_over(frame, droppable)

    def _hand_over(self, frame: bytes, droppable: bool = False) -> bool:
        """As _put, behind what was collected. Needs the lock."""
        assert self._lock._is_owned()
        if not self._full:
            if self.connection.send(frame):
                return True
            self._note_full()
            return False
        if self._waiting and self._waiting_bytes + len(frame) > self.queue_max:
            return self._too_slow(droppable)
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)
        return False

    def _park(self, frame: bytes, droppable: bool) -> bool:
        """Keep a message until the one that is sent in fragments is complete. Needs the lock."""
        assert self._lock._is_owned()
        if self._parked and self._parked_bytes + len(frame) > self.queue_max:
            return self._too_slow(droppable)
        self._parked.append(frame)
        self._parked_bytes += len(frame)
        return False

    def _too_slow(self, droppable: bool) -> bool:
        """More than queue_max bytes would wait. Needs the lock."""
        if droppable and self.slow_reader == "drop":
            self.dropped += 1
        else:
            self._give_up(POLICY, f"the peer reads too slowly: more than {self.queue_max} bytes wait for it")
        return False

    def _give_up(self, code: int, reason: str) -> None:
        """End now and by a reset: nobody is there, or nobody reads. on_close follows. Needs the lock."""
        assert self._lock._is_owned()
        self._fate = self._fate or (code, reason)
        self._forget()
        self.connection.abort()

    def _forget(self) -> None:
        """Drop what waits. Needs the lock."""
        assert self._lock._is_owned()
        self._waiting.clear()
        self._parked.clear()
        self._waiting_bytes = self._parked_bytes = 0
        self._batch = None

    def _collect(self, on: bool) -> None:
        """Begin to collect what is sent, or send what was collected. On the strand."""
        with self._lock:
            batch, self._batch = self._batch, [] if on else None
            self._batch_bytes = 0
            if batch and self._state <= CLOSING:
                self._hand_over(b"".join(batch))

    def _drained(self) -> bool:
        """The connection takes more: give it what waits; True where nothing is left. On the strand."""
        with self._lock:
            waiting = self._waiting
            while waiting and not self._full:
                count, size = 1, len(waiting[0])
                while count < len(waiting) and size + len(waiting[count]) <= BATCH_MAX:
                    size += len(waiting[count])
                    count += 1
                frames = [waiting.popleft() for _ in range(count)]
                self._waiting_bytes -= sum(map(len, frames))
                self._hand_over(frames[0] if count == 1 else b"".join(frames))
            return not waiting and not self._full

    @property
    def write_buffer_size(self) -> int:
        """Bytes that were sent and that the kernel has not yet taken; those that wait here included."""
        return self._waiting_bytes + self._parked_bytes + int(self.connection.write_buffer_size)

    def _arm(self) -> None: ...
