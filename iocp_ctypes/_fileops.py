"""L4: files that are sent: opened, read in slices through the port, or handed to TransmitFile.

Laws
1. A Source has a handle of its own, from the file object it was opened with: the caller may close that, and
   its position does not move. Where the system cannot open the file anew, the handle is a duplicate, and the
   position, which both then share, moves with what is read.
2. A Source is closed once, after its last packet: who owns it waits for that.
3. What it knows is decided when it is opened: a file that grows is sent up to its old end, one that shrinks
   ends early, and that is an error of whoever sends it.
4. TransmitFile takes the offset from its operation, never the position of the file.
"""

from __future__ import annotations

import ctypes
import io
import os
from ctypes import addressof, byref, c_char_p, c_int64, c_void_p, sizeof
from typing import Any, Final

from . import _win32, _win32files
from ._errors import error_from_code
from ._port import CompletionPort
from ._proactor import COMPLETED, PENDING, Handler, Operation, Proactor

#: True where TransmitFile serves any number of connections at a time. A workstation carries out two in the
#: whole system: two peers that do not read would hold up everybody's files, so there they are read instead.
TRANSMITS_FREELY: Final = _win32.is_wine() or not _win32files.is_workstation()

#: The most bytes of one TransmitFile, header and trailer included.
TRANSMIT_MAX: Final = _win32files.TRANSMIT_MAX
_SHARE_ALL: Final = _win32files.FILE_SHARE_READ | _win32files.FILE_SHARE_WRITE | _win32files.FILE_SHARE_DELETE


class Source:
    """What is left to be sent of a file, or of bytes in memory."""

    __slots__ = ("_data", "_handle", "_overlapped", "left", "position")

    def __init__(self, handle: int, overlapped: bool, data: bytes, position: int, left: int) -> None:
        """Own a handle, or bytes where that is 0."""
        self._handle = handle
        self._overlapped = overlapped
        self._data = data
        self.position = position
        self.left = left

    @property
    def in_memory(self) -> bool:
        """Whether there is no file, only bytes."""
        return not self._handle

    def advance(self, size: int) -> None:
        """So many bytes more were sent."""
        self.position += size
        self.left -= size

    def peek(self, size: int) -> bytes:
        """The next bytes, of a source in memory."""
        return self._data[self.position : self.position + min(size, self.left)]

    def prepare(self, port: CompletionPort) -> None:
        """Have the packets of `read` come to a port."""
        if self._overlapped:
            port.associate(self._handle)

    def read(self, operation: Operation, handler: Handler, proactor: Proactor, size: int) -> int:
        """Read the next bytes into the operation's buffer: COMPLETED (InternalHigh bytes), PENDING, or an
        error code.

        Blocks where the handle is a duplicate of one that blocks.
        """
        operation.Offset = self.position & 0xFFFFFFFF
        operation.OffsetHigh = self.position >> 32
        buffer = addressof(operation.buffer)
        if not self._overlapped:
            transferred = _win32.DWORD()
            if not _win32files.ReadFile(self._handle, buffer, size, byref(transferred), operation.address):
                return ctypes.get_last_error()
            operation.InternalHigh = transferred.value
            return COMPLETED
        operation.handler = handler
        proactor.pending[operation.address] = operation
        if _win32files.ReadFile(self._handle, buffer, size, None, operation.address):
            return PENDING  # files do not skip, so success has a packet as well
        return proactor.settle(operation)

    def cancel(self) -> None:
        """Ask for the end of the read in flight, which still has its packet."""
        if self._handle:
            _win32.CancelIoEx(self._handle, None)

    def close(self) -> None:
        """Let the file go; twice is once."""
        handle, self._handle = self._handle, 0
        self._data = b""
        if handle:
            _win32.CloseHandle(handle)


class TransmitOperation(Operation):
    """A TransmitFile: bytes before, a part of a file, bytes after."""

    __slots__ = ("amount", "buffers", "file_handle")

    def __init__(self, source: Source, amount: int, head: bytes, tail: bytes) -> None:
        """Send `head`, then `amount` bytes of the source from its position on, at least one, then `tail`."""
        super().__init__()
        self.Offset = source.position & 0xFFFFFFFF
        self.OffsetHigh = source.position >> 32
        self.file_handle = source._handle
        self.amount = amount
        self.length = len(head) + amount + len(tail)
        self.keep = head, tail
        self.buffers: Any = None
        if head or tail:
            self.buffers = _win32files.TRANSMIT_FILE_BUFFERS()
            self.buffers.Head, self.buffers.HeadLength = _address(head), len(head)
            self.buffers.Tail, self.buffers.TailLength = _address(tail), len(tail)

    @property
    def buffers_address(self) -> int:
        """Where the TRANSMIT_FILE_BUFFERS are; 0: there are none."""
        return addressof(self.buffers) if self.buffers is not None else 0


def _address(data: bytes) -> int | None:
    """Where a bytes object has its bytes; whoever asks keeps it."""
    return ctypes.cast(c_char_p(data), c_void_p).value if data else None


def open_source(file: Any, offset: Any, count: Any) -> Source:
    """Open what is to be sent.

    Args:
        file: a path, a file object of a file on disk that was opened in binary mode, or an io.BytesIO.
        offset: where to begin, in bytes from the beginning; a file object's position does not matter.
        count: how many bytes; None: up to the end.

    Raises:
        TypeError: not a file, or one in text mode. ValueError: offset or count beyond the end, a file that is
        not on disk, is closed or cannot be read. OSError: it cannot be opened; IsADirectoryError for one.

    Asks the file system, and takes as long as that takes.
    """
    for name, value in (("offset", offset), ("count", count)):
        if isinstance(value, bool) or not isinstance(value, int):
            if name == "offset" or value is not None:
                raise TypeError(f"{name}={value!r}: must be a whole number, 0 or more")
        elif value < 0:
            raise ValueError(f"{name}={value!r}: must be a whole number, 0 or more")
    if isinstance(file, io.BytesIO):
        data = file.getvalue()
        left = _left(file, len(data), offset, count)
        return Source(0, False, data[offset : offset + left], 0, left)  # no more is kept than is sent
    if isinstance(file, (str, os.PathLike)):
        return _open_path(file, offset, count)
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"file={file!r}: is in text mode; a connection sends bytes: open it with 'rb'")
    if not (hasattr(file, "read") and hasattr(file, "fileno")):
        raise TypeError(f"file={file!r}: must be a path, or a file object that was opened in binary mode")
    return _open_file(file, offset, count)


def _open_path(path: Any, offset: int, count: int | None) -> Source:
    try:
        opened = open(path, "rb", buffering=0)  # noqa: SIM115  # closed below
    except PermissionError as exc:
        if os.path.isdir(path):
            raise IsADirectoryError(21, "a directory cannot be sent", os.fspath(path)) from exc
        raise
    with opened:
        return _open_file(opened, offset, count)


def _open_file(file: Any, offset: int, count: int | None) -> Source:
    """Open a file object's file once more."""
    try:
        handle = _win32files.get_osfhandle(file.fileno())
    except io.UnsupportedOperation as exc:
        raise TypeError(f"file={file!r}: has no file on disk; send what it reads") from exc
    except ValueError as exc:  # it is closed
        raise ValueError(f"file={file!r}: {exc}") from exc
    if hasattr(file, "readable") and not file.readable():
        raise ValueError(f"file={file!r}: was not opened for reading")
    if hasattr(file, "writable") and file.writable():
        file.flush()  # what it has not written yet is meant as well
    if _win32files.GetFileType(handle) != _win32files.FILE_TYPE_DISK:
        raise ValueError(f"file={file!r}: is not a file on disk; send what it reads")
    size = c_int64()
    if not _win32files.GetFileSizeEx(handle, byref(size)):
        raise error_from_code(ctypes.get_last_error(), f"file={file!r}: its size")
    left = _left(file, size.value, offset, count)
    own, overlapped = _own_handle(handle)
    return Source(own, overlapped, b"", offset, left)


def _own_handle(handle: int) -> tuple[int, bool]:
    """A handle of our own, and whether it is overlapped."""
    own = _win32files.ReOpenFile(
        handle,
        _win32files.GENERIC_READ,
        _SHARE_ALL,
        _win32files.FILE_FLAG_OVERLAPPED | _win32files.FILE_FLAG_SEQUENTIAL_SCAN,
    )
    if own != _win32.INVALID_HANDLE_VALUE:
        return own, True
    # Deleted already, or opened by somebody who shares it with nobody.
    copy = _win32.HANDLE()
    process = _win32.GetCurrentProcess()
    if not _win32files.DuplicateHandle(
        process, handle, process, byref(copy), 0, False, _win32files.DUPLICATE_SAME_ACCESS
    ):
        raise error_from_code(ctypes.get_last_error(), "DuplicateHandle")
    return int(copy.value), False


def _left(file: Any, size: int, offset: int, count: int | None) -> int:
    """How many bytes there are to send; ValueError where the file has fewer."""
    if offset > size:
        raise ValueError(f"offset={offset}: is beyond the end of {file!r}, which has {size} bytes")
    if count is not None and offset + count > size:
        raise ValueError(f"count={count}: from offset={offset} on {file!r} has {size - offset} bytes")
    return size - offset if count is None else count


assert sizeof(TransmitOperation) == sizeof(_win32.TRANSFER)
