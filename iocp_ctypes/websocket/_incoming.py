"""L7: Incoming, the receiving half of a WebSocket.

Laws
1. The library parses; what it answers by itself, pongs, goes out at once. Its Close does not: the messages
   that came before it are delivered first, and what they send goes before our Close.
2. Text is checked as it comes, also in a frame of which only a part is there (`_core.Reader`). Invalid UTF-8
   ends the connection with 1007 at once.
3. All of it runs on the connection's strand.
"""

from __future__ import annotations

import codecs
from typing import Any

from websockets.frames import Frame
from websockets.protocol import State

from ._outgoing import (
    BINARY,
    CLOSE,
    CONTINUATION,
    INVALID_DATA,
    OPEN,
    PING,
    PONG,
    TEXT,
    TOO_BIG,
    Outgoing,
)

CORE_OPEN = State.OPEN
_decoder = codecs.getincrementaldecoder("utf-8")


class Incoming(Outgoing):
    """What is received."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self._core: Any = None  # the library's protocol object
        self._heard = 0.0  # when bytes came last
        self._deaf = False  # nothing more is taken in: the peer's Close came, or it was at fault
        self._message: Any = None  # TEXT or BINARY while a message of several fragments is coming
        self._parts: list[Any] = []  # of the message that is coming: str or bytes
        self._fragments = 0
        self._text: Any = None  # the decoder of the text that is coming
        self._seen = 0  # bytes of the frame that is coming that the decoder has had
        self._pong: bytes | None = None  # to be answered when the connection takes more
        self._piecewise = False  # whether on_fragment is overridden

    # Callbacks, overridden by WebSocket and its subclasses.
    def on_message(self, message: Any) -> None: ...
    def on_fragment(self, data: Any, last: bool) -> None: ...
    def on_ping(self, data: bytes) -> None: ...
    def on_pong(self, data: bytes) -> None: ...

    # In WebSocket.
    def _fail(self, code: int, reason: str) -> None: ...
    def _close_received(self, code: int, reason: str) -> None: ...
    def _ponged(self, data: bytes) -> None: ...
    def _report(self, exc: BaseException) -> None: ...

    def _receive(self, data: bytes) -> None:
        """Take what one receive brought. On the strand."""
        core = self._core
        self._heard = self.connection.last_activity
        core.receive_data(data)
        self._work_off(core.events_received())

    def _work_off(self, events: list[Any]) -> None:
        """Work off what the library made of it. On the strand."""
        core = self._core
        healthy = core.state is CORE_OPEN
        if core.writes:
            answers = core.data_to_send()
            self._answer(answers if healthy else answers[: -1 - (not self._mask)])
        if len(events) == 1:
            self._take(events[0])
        elif events:
            self._take_many(events)
        if self._deaf:
            return
        if not healthy:
            self._core_ended()
        elif core.reader.buffer:
            self._look_ahead()

    def _answer(self, answers: list[bytes]) -> None:
        """Send pongs; while the peer does not read, only the last is kept (RFC 6455, section 5.5.3)."""
        if not answers or self._state > OPEN:
            return
        if self._full:
            self._pong = answers[-1]
        else:
            self._send_now(answers[0] if len(answers) == 1 else b"".join(answers))

    def _take_many(self, events: list[Any]) -> None:
        """Work off several frames."""
        collecting = self.collect_sends
        if collecting:
            self._collect(True)
        try:
            for frame in events:
                self._take(frame)
                if self._deaf:
                    break
        finally:
            if collecting:
                self._collect(False)

    def _take(self, frame: Frame) -> None:
        """Work off one frame."""
        opcode = frame.opcode
        if opcode is TEXT or opcode is BINARY:
            if frame.fin and not self._seen:
                if self._state != OPEN:
                    return  # after our Close nobody waits for messages
                data: Any = frame.data
                if opcode is TEXT:
                    try:
                        data = str(data, "utf-8")
                    except UnicodeDecodeError as exc:
                        self._invalid(exc)
                        return
                elif data.__class__ is not bytes:
                    data = bytes(data)
                try:
                    self.on_message(data)
                except BaseException as exc:
                    self._report(exc)
                return
            self._message = opcode
            self._take_fragment(frame)
        elif opcode is CONTINUATION:
            self._take_fragment(frame)
        elif opcode is PING:
            self._call(self.on_ping, bytes(frame.data))
        elif opcode is PONG:
            self._ponged(bytes(frame.data))
            self._call(self.on_pong, bytes(frame.data))
        elif opcode is not CLOSE:
            raise AssertionError(f"the library let opcode {opcode} through")

    def _take_fragment(self, frame: Frame) -> None:
        """Work off a part of a message, or a text frame of which a part was seen before."""
        last = frame.fin
        text = self._message is TEXT
        self._fragments += 1
        if self._fragments > self.fragments_max:
            self._fail(TOO_BIG, f"more than {self.fragments_max} fragments")
            return
        data: Any = frame.data
        if text:
            try:
                data = self._decode(data[self._seen :] if self._seen else data, last)
            except UnicodeDecodeError as exc:
                self._invalid(exc)
                return
        self._seen = 0
        self._parts.append(data if text else bytes(data))
        pieces, whole = self._parts, last and (not self._piecewise or self._fragments == 1)
        if not last and not self._piecewise:
            return
        self._parts = []
        data = pieces[0] if len(pieces) == 1 else ("" if text else b"").join(pieces)
        if last:
            self._message = self._text = None
            self._fragments = 0
        if self._state == OPEN:
            if whole:
                self._call(self.on_message, data)
            else:
                self._call(self.on_fragment, data, last)

    def _decode(self, data: Any, last: bool) -> str:
        """Decode a part of a text; UnicodeDecodeError where it cannot be one."""
        if self._text is None:
            self._text = _decoder()
        text: str = self._text.decode(data, last)
        return text

    def _look_ahead(self) -> None:
        """Check the text that is there of a frame that is not complete."""
        extension = self._core.extensions[0] if self._core.extensions else None
        if self._message is BINARY:
            return
        if self._message is not None and extension and getattr(extension, "decode_cont_data", True):
            return  # it is a part of a compressed message
        data = self._core.reader.text(self._message, self._seen)
        if not data:
            return
        try:
            self._parts.append(self._decode(data, False))
        except UnicodeDecodeError as exc:
            self._invalid(exc)
            return
        self._seen += len(data)

    def _invalid(self, exc: UnicodeDecodeError) -> None:
        self._fail(INVALID_DATA, f"a text is not UTF-8: {exc.reason}")

    def _core_ended(self) -> None:
        """The library takes in nothing more: the peer's Close came, or it was at fault."""
        core = self._core
        close = core.close_rcvd
        if close is not None:  # also between two fragments, which the library takes for a mistake
            self._close_received(int(close.code), close.reason)
        else:
            close = core.close_sent
            self._fail(int(close.code), close.reason)

    def _call(self, callback: Any, *args: Any) -> None:
        """Call a callback of the user; what it raises closes this WebSocket and nothing else."""
        try:
            callback(*args)
        except BaseException as exc:
            self._report(exc)
