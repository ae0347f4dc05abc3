"""L7: the library's protocol objects, with a buffer that shows how much of a frame is there.

Laws
1. Nothing of the protocol is done here. `Reader` does what the library's own does, and remembers the head of
   the frame that is being read, so that a text can be checked before its frame is complete.
2. Where another version of the library should have no use for it, texts are checked when their frame is
   complete; nothing else changes.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from websockets.client import ClientProtocol
from websockets.frames import Opcode, apply_mask  # type: ignore[attr-defined]  # fast where that is there
from websockets.server import ServerProtocol
from websockets.streams import StreamReader

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

#: The bit of a frame's first byte that says "compressed" (RFC 7692, section 6), and those of its opcode.
COMPRESSED, OPCODE = 0x40, 0x0F
#: The lengths in a frame's second byte above which the length follows (RFC 6455, section 5.2).
LENGTH, LENGTH_MAX = 0x7F, 125


class _Quiet(_Adapter):
    """Tells at DEBUG what the library tells at INFO: that connections open and close is no news."""

    def info(self, msg: object, *args: object, **kwargs: Any) -> None:
        self.debug(msg, *args, **kwargs)


LOG: Final = _Quiet(logging.getLogger("iocp_ctypes.websocket"), {})


class Reader(StreamReader):
    """The library's buffer of what came, which also knows where in a frame the parser is.

    The parser asks `at_eof` before each frame, then for its head (2 bytes), the length where the head has
    none, the mask, the payload.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read: list[bytearray] = []  # of the frame that the parser is in

    def at_eof(self) -> Generator[None, None, bool]:
        """Tell whether the stream ended where a frame could begin."""
        self._read.clear()
        while not self.buffer:
            if self.eof:
                return True
            yield
        return False

    def read_exact(self, n: int) -> Generator[None, None, bytearray]:
        """Return the next `n` bytes, once they are there."""
        buffer = self.buffer
        while len(buffer) < n:
            if self.eof:
                raise EOFError(f"the stream ends after {len(buffer)} bytes of {n}")
            yield
        data = buffer[:n]
        del buffer[:n]
        self._read.append(data)
        return data

    def text(self, message: Opcode | None, skip: int) -> bytes:
        """Return what is there of an incomplete frame's payload, where that is text and not compressed.

        Args:
            message: what kind of message goes on with this frame; None: it begins one.
            skip: so many bytes of it are not wanted.
        """
        read = self._read
        if not read or len(self.buffer) <= skip:
            return b""
        first, second = read[0]
        masked = second > LENGTH
        long = (second & LENGTH) > LENGTH_MAX
        expected = Opcode.TEXT if message is None else Opcode.CONT
        if len(read) != 1 + long + masked or first & COMPRESSED or first & OPCODE != expected:
            return b""
        data = bytes(memoryview(self.buffer)[skip:])
        if masked:
            turn = skip % 4
            data = bytes(apply_mask(data, bytes(read[-1][turn:] + read[-1][:turn])))
        return data


class ServerCore(ServerProtocol):
    """The server's side of the protocol."""

    def parse(self) -> Any:
        """Begin to read, from a buffer of ours."""
        self.reader = Reader()
        return super().parse()


class ClientCore(ClientProtocol):
    """The client's side of the protocol."""

    def parse(self) -> Any:
        """Begin to read, from a buffer of ours."""
        self.reader = Reader()
        return super().parse()
