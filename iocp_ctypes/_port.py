"""L2: CompletionPort, the kernel's queue of completion packets. Four verbs: associate, post, reap, close.

Laws
1. A completion key is a kind (IO, WAKE), never a pointer: what a packet belongs to is found by its
   OVERLAPPED.
2. Each thread that reaps has its own Batch: two threads in one array would overwrite each other's packets.
3. Closing wakes nobody (Windows does, Wine does not): whoever closes has stopped the reaping threads before.
"""

from __future__ import annotations

import ctypes
from collections import deque
from ctypes import addressof, c_void_p, sizeof
from typing import Any, Final

from . import _win32
from ._errors import error_from_code

KEY_IO: Final = 1  # a packet of the kernel for one of our operations
KEY_WAKE: Final = 2  # our own packet: look at what else there is to do

ERROR_INVALID_HANDLE: Final = 6
ERROR_INVALID_PARAMETER: Final = 87

_WORD: Final = sizeof(_win32.ULONG_PTR)
_WORDS_PER_ENTRY: Final = sizeof(_win32.OVERLAPPED_ENTRY) // _WORD
_OVERLAPPED_WORD: Final = _win32.OVERLAPPED_ENTRY.lpOverlapped.offset // _WORD
_DWORDS_PER_ENTRY: Final = sizeof(_win32.OVERLAPPED_ENTRY) // 4
_BYTES_DWORD: Final = _win32.OVERLAPPED_ENTRY.dwNumberOfBytesTransferred.offset // 4


class Batch:
    """The entries array of one reaping thread, with views that read it without a ctypes object per field."""

    __slots__ = ("_count", "_entries", "argument", "count_argument", "counts", "size", "words")

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries = (_win32.OVERLAPPED_ENTRY * size)()
        self._count = _win32.ULONG(0)
        raw = memoryview(self._entries).cast("B")
        self.words = raw.cast("Q" if _WORD == 8 else "I")
        self.counts = raw.cast("I")
        self.argument = c_void_p.from_param(addressof(self._entries))
        self.count_argument = c_void_p.from_param(addressof(self._count))

    def move_to(self, ready: deque[tuple[Any, int]]) -> int:
        """Append (OVERLAPPED address, bytes) of each packet to `ready`; return how many."""
        count: int = self._count.value
        if count == 1:
            ready.append((self.words[_OVERLAPPED_WORD], self.counts[_BYTES_DWORD]))
        else:
            addresses = self.words[_OVERLAPPED_WORD : count * _WORDS_PER_ENTRY : _WORDS_PER_ENTRY].tolist()
            transferred = self.counts[_BYTES_DWORD : count * _DWORDS_PER_ENTRY : _DWORDS_PER_ENTRY].tolist()
            ready.extend(zip(addresses, transferred, strict=True))
        return count


class CompletionPort:
    """A completion port; any thread may use any method until `close`."""

    __slots__ = ("_argument", "_handle")

    def __init__(self, concurrency: int = 0) -> None:
        """Make a port.

        Args:
            concurrency: how many threads the kernel lets run at a time; 0: as many as there are processors.
        """
        self._handle: int = _win32.CreateIoCompletionPort(_win32.INVALID_HANDLE_VALUE, 0, 0, concurrency)
        if not self._handle:
            raise error_from_code(ctypes.get_last_error(), "CreateIoCompletionPort")
        self._argument = _win32.handle_argument(self._handle)

    def associate(self, handle: int) -> None:
        """Send the packets of a handle here, for the rest of its life; a handle has one port, ever."""
        port = self._handle
        if not port:  # with 0 for a port the system would make a new one
            raise error_from_code(ERROR_INVALID_HANDLE, "the completion port is closed")
        if not _win32.CreateIoCompletionPort(handle, port, KEY_IO, 0):
            code = ctypes.get_last_error()
            what = "the socket already belongs to another completion port"
            raise error_from_code(code, what if code == ERROR_INVALID_PARAMETER else "CreateIoCompletionPort")

    def post(self) -> None:
        """Queue a WAKE packet: one waiting thread returns from `reap`."""
        if not _win32.PostQueuedCompletionStatus(self._handle, 0, KEY_WAKE, None):
            raise error_from_code(ctypes.get_last_error(), "PostQueuedCompletionStatus")

    def post_packet(self, address: int) -> None:
        """Queue the packet that the kernel will not send for the operation at this address."""
        if not _win32.PostQueuedCompletionStatus(self._handle, 0, KEY_IO, address):
            raise error_from_code(ctypes.get_last_error(), "PostQueuedCompletionStatus")

    def reap(self, batch: Batch, timeout_ms: int, ready: deque[tuple[Any, int]]) -> int:
        """Take packets off the port and append them to `ready` as (OVERLAPPED address or 0, bytes).

        Blocks up to `timeout_ms` (INFINITE: without end) for the first packet; takes at most the batch's
        size. A packet says nothing about success: that stands in its operation.

        Returns:
            How many packets were taken; 0 where the time ran out.
        """
        call = _win32.hot_reap if timeout_ms else _win32.hot_poll
        if call(self._argument, batch.argument, batch.size, batch.count_argument, timeout_ms, 0):
            return batch.move_to(ready)
        code = ctypes.get_last_error()
        if code != _win32.WAIT_TIMEOUT:
            raise error_from_code(code, "GetQueuedCompletionStatusEx")
        return 0

    def close(self) -> None:
        """Close the port; twice is once."""
        handle, self._handle = self._handle, 0
        self._argument = _win32.handle_argument(0)  # the system may give the number to something else
        if handle:
            _win32.CloseHandle(handle)
