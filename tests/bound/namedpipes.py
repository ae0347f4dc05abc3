"""Helpers of the tests of named pipes: names, and clients and servers without the library."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from typing import Any

from iocp_ctypes import _win32, _win32files

_numbers = itertools.count(1)


def new_name() -> str:
    """A name that nobody has."""
    return rf"\\.\pipe\iocp_ctypes test {os.getpid()} {next(_numbers)}"


class Plain:
    """A client's end as any program has it: opened as a file, with blocking calls."""

    def __init__(self, name: str, access: int = _win32files.GENERIC_READ | _win32files.GENERIC_WRITE) -> None:
        self.handle = _win32files.CreateFileW(name, access, 0, None, _win32files.OPEN_EXISTING, 0, 0)
        if self.handle == _win32.INVALID_HANDLE_VALUE:
            code = ctypes.get_last_error()
            raise OSError(None, f"CreateFile failed with {code}", name, code)

    def read(self, size: int = 65536) -> bytes:
        """Up to `size` bytes; none at the end. OSError for all else."""
        buffer, count = ctypes.create_string_buffer(size), _win32.DWORD()
        if not _win32files.ReadFile(self.handle, buffer, size, ctypes.byref(count), None):
            code = ctypes.get_last_error()
            if code == 109:
                return b""
            raise OSError(None, f"ReadFile failed with {code}", None, code)
        return buffer.raw[: count.value]

    def read_exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size and (part := self.read(min(65536, size - len(parts)))):
            parts += part
        return bytes(parts)

    def read_all(self) -> bytes:
        return self.read_exactly(1 << 62)

    def write(self, data: bytes) -> None:
        count = _win32.DWORD()
        if not _win32files.WriteFile(self.handle, data, len(data), ctypes.byref(count), None):
            code = ctypes.get_last_error()
            raise OSError(None, f"WriteFile failed with {code}", None, code)

    def close(self) -> None:
        handle, self.handle = self.handle, _win32.INVALID_HANDLE_VALUE
        if handle != _win32.INVALID_HANDLE_VALUE:
            _win32.CloseHandle(handle)

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def beside(function: Any, *arguments: Any) -> threading.Thread:
    """Run something on a thread."""
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    return thread
