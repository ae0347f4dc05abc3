"""L3: Operation and the pending table: what the kernel has, and who keeps it alive.

Laws
1. An operation is registered *before* the call that issues it, by the address of its OVERLAPPED: its packet
   may be retired on another thread before the call returns. After success or "pending" the issuer touches
   it no more.
2. The table is keep-alive, lookup and leak meter in one. An operation leaves it exactly once: by its
   packet, by the issuer when the call failed, or by the issuer when the call completed at once and no
   packet will come.
3. Whatever the kernel points at (OVERLAPPED, WSABUF, flags, data) hangs on the operation.
4. An operation is used again only after it left the table.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import addressof, c_char, c_char_p, c_void_p, sizeof
from typing import Any, Final

from . import _win32
from ._errors import STATUS_PENDING, WSA_IO_PENDING
from ._flow import SEND_GATHER_MAX, Piece

#: What issuing returns besides an error code.
COMPLETED: Final = 0  # done, no packet will come; for receives the issuer hands it to the dispatcher
PENDING: Final = WSA_IO_PENDING  # a packet comes, or has come already

#: True where a thread that ends may take an operation along that it issued: Wine drops it if the end comes
#: while the operation is being carried out. Windows leaves the operations of handles with a completion port
#: alone.
ENDING_THREADS_DROP: Final = _win32.is_wine()

Handler = Callable[["Operation", int, int], None]

_array_types: dict[int, Any] = {}


def _buffer(size: int) -> Any:
    """Make a char array.

    The array type of a size is made once, because making it costs more than the array.
    """
    kind = _array_types.get(size)
    if kind is None:
        kind = _array_types[size] = c_char * size
    return kind()


class Operation(_win32.TRANSFER):
    """An OVERLAPPED plus all that belongs to it. `handler(operation, transferred, status)` is called once,
    at retiring.

    `wsabuf`, `flags_argument`, `overlapped` are the ready-made arguments of the HOT functions. They hold
    addresses, not references (a reference to itself would keep an operation for ever): the pending table
    keeps it alive.
    """

    __slots__ = (
        "address",
        "buffer",
        "flags_argument",
        "handler",
        "keep",
        "length",
        "overlapped",
        "size",
        "vector",
        "wsabuf",
    )

    buf: Any

    def __init__(self, size: int = 0) -> None:
        """Make an operation with a buffer of `size` bytes of its own; 0: none."""
        super().__init__()
        address = addressof(self)
        self.address = address
        self.overlapped = c_void_p.from_param(address)
        self.wsabuf = c_void_p.from_param(address + _win32.TRANSFER.len.offset)
        self.flags_argument = c_void_p.from_param(address + _win32.TRANSFER.flags.offset)
        self.size = size
        self.length = 0  # bytes that a send carries
        self.keep: Any = None  # what the kernel reads from, while it does
        self.vector: Any = None
        self.handler: Handler | None = None
        self.buffer: Any = None
        if size:
            self.buffer = _buffer(size)
            self.len = size
            self.buf = addressof(self.buffer)

    @property
    def done(self) -> bool:
        """Whether the kernel has completed it, as far as that can be seen before its packet was taken.

        Source: learn.microsoft.com/windows/win32/api/winbase/nf-winbase-hasoverlappediocompleted
        """
        return bool(self.Internal != STATUS_PENDING)

    def load(self, data: bytes) -> None:
        """Point the one WSABUF at a bytes object, uncopied."""
        self.keep = data
        self.buf = data
        length = len(data)
        if length != self.length:  # setting a field costs more than looking
            self.length = self.len = length

    def load_pieces(self, pieces: list[Piece]) -> tuple[Any, int]:
        """Point a gather list at pieces, uncopied; return it as an argument, and how many WSABUFs it has."""
        if self.vector is None:
            self.vector = (_win32.WSABUF * SEND_GATHER_MAX)()
        total = 0
        for wsabuf, (data, start, stop) in zip(self.vector, pieces, strict=False):
            address = ctypes.cast(c_char_p(data), c_void_p).value or 0  # the bytes object itself, not a copy
            wsabuf.buf = address + start
            wsabuf.len = stop - start
            total += stop - start
        self.keep = pieces
        self.length = self.len = total
        return c_void_p.from_param(addressof(self.vector)), len(pieces)


#: Operations kept for use again: enough for what is in flight at a busy moment, little enough to forget.
KEPT_MAX: Final = 64
#: Bytes of the receives that are kept, per size.
KEPT_BYTES_MAX: Final = 1024 * 1024
#: A kept send forgets its data where that is larger than this, so that what is kept stays small.
KEPT_DATA_MAX: Final = 4096


class Proactor:
    """The pending table, and operations kept for use again.

    Receives have a buffer of their own, sends point at the sender's data: they are kept apart. Thread-safe,
    because the appends and pops of a list are atomic.
    """

    __slots__ = ("_receives", "pending", "sends", "sockets")

    def __init__(self) -> None:
        self.pending: dict[int, Operation] = {}
        self.sockets: set[int] = set()  # handles that are open; added once made, discarded before closing
        self.sends: list[Operation] = []
        self._receives: dict[int, list[Operation]] = {}

    def settle(self, operation: Operation) -> int:
        """After a call that did not return success.

        PENDING, or the error code, with the operation retired.
        """
        code = ctypes.get_last_error()
        if code != WSA_IO_PENDING:
            del self.pending[operation.address]
        return code

    @property
    def bytes_pending(self) -> int:
        """Bytes of the buffers that the kernel has: room of receives, data of sends."""
        return sum(operation.size + operation.length for operation in self.pending.copy().values())

    @property
    def bytes_kept(self) -> int:
        """Bytes of the buffers that are kept for use again."""
        receives = sum(size * len(free) for size, free in self._receives.copy().items())
        lengths = (operation.length for operation in self.sends.copy())
        return receives + sum(length for length in lengths if length <= KEPT_DATA_MAX)

    def take_receive(self, size: int) -> Operation:
        """Return an operation with a buffer of `size` bytes that the kernel does not have."""
        try:
            return self._receives[size].pop()
        except (KeyError, IndexError):
            return Operation(size)

    def give_receive(self, operation: Operation) -> None:
        """Take back a receive that has left the pending table."""
        operation.handler = None
        free = self._receives.setdefault(operation.size, [])
        if len(free) < KEPT_MAX and (len(free) + 1) * operation.size <= KEPT_BYTES_MAX:
            free.append(operation)

    def take_send(self) -> Operation:
        """Return an operation for a send."""
        try:
            return self.sends.pop()
        except IndexError:
            return Operation()

    def give_send(self, operation: Operation) -> None:
        """Take back a send that has left the pending table."""
        operation.handler = operation.keep = None
        if len(self.sends) < KEPT_MAX:
            if operation.length > KEPT_DATA_MAX:
                operation.buf = b""  # not None, at which ctypes keeps its reference to what was there
                operation.vector = None
            self.sends.append(operation)


assert sizeof(_win32.TRANSFER) == sizeof(Operation)
