"""The structures and constants of `_win32files.py`, as test_win32_layout.py has those of `_win32.py`."""

from __future__ import annotations

import ast
import ctypes
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from layouts import check_layout

from iocp_ctypes import _win32, _win32files

SOURCE = Path(_win32files.__file__).read_text(encoding="utf-8")

# Field: (offset on 32-bit, offset on 64-bit); "size": the size of all. Counted by hand from the headers.
LAYOUTS: dict[str, dict[str, tuple[int, int]]] = {
    # mswsock.h: LPVOID Head; DWORD HeadLength; LPVOID Tail; DWORD TailLength
    "TRANSMIT_FILE_BUFFERS": {
        "Head": (0, 0),
        "HeadLength": (4, 8),
        "Tail": (8, 16),
        "TailLength": (12, 24),
        "size": (16, 32),
    },
    # winsock2.h: SOCKET fd; SHORT events, revents
    "WSAPOLLFD": {"fd": (0, 0), "events": (4, 8), "revents": (6, 10), "size": (8, 16)},
    # minwinbase.h: DWORD nLength; LPVOID lpSecurityDescriptor; BOOL bInheritHandle
    "SECURITY_ATTRIBUTES": {
        "nLength": (0, 0),
        "lpSecurityDescriptor": (4, 8),
        "bInheritHandle": (8, 16),
        "size": (12, 24),
    },
    # wdm.h: union { NTSTATUS Status; PVOID Pointer }; ULONG_PTR Information
    "IO_STATUS_BLOCK": {"Status": (0, 0), "Information": (4, 8), "size": (8, 16)},
    # ntifs.h: HANDLE Port; PVOID Key
    "FILE_COMPLETION_INFORMATION": {"Port": (0, 0), "Key": (4, 8), "size": (8, 16)},
}

# The headers' values: winnt.h, winbase.h, fileapi.h, namedpipeapi.h, sddl.h, wdm.h.
CONSTANTS = {
    "GENERIC_READ": 0x80000000,
    "GENERIC_WRITE": 0x40000000,
    "FILE_SHARE_READ": 1,
    "FILE_SHARE_WRITE": 2,
    "FILE_SHARE_DELETE": 4,
    "OPEN_EXISTING": 3,
    "FILE_FLAG_OVERLAPPED": 0x40000000,
    "FILE_FLAG_SEQUENTIAL_SCAN": 0x08000000,
    "FILE_FLAG_FIRST_PIPE_INSTANCE": 0x00080000,
    "SECURITY_SQOS_PRESENT": 0x00100000,
    "SECURITY_IDENTIFICATION": 1 << 16,  # SecurityIdentification << 16
    "FILE_TYPE_DISK": 1,
    "POLLERR": 1,
    "POLLHUP": 2,
    "POLLWRNORM": 0x10,
    "DUPLICATE_SAME_ACCESS": 2,
    "PIPE_ACCESS_DUPLEX": 3,
    "PIPE_REJECT_REMOTE_CLIENTS": 8,
    "PIPE_UNLIMITED_INSTANCES": 255,
    "TOKEN_QUERY": 8,
    "TOKEN_USER_CLASS": 1,
    "SDDL_REVISION_1": 1,
    "FILE_IO_COMPLETION_NOTIFICATION": 41,
    "FILE_REPLACE_COMPLETION": 61,
    "VER_NT_WORKSTATION": 1,
    "TRANSMIT_MAX": (1 << 31) - 2,
}
ON_WINDOWS = sys.platform == "win32"


def declarations(monkeypatch: pytest.MonkeyPatch, bits: int) -> dict[str, Any]:
    """Execute the structures of both files with pointers of so many bits."""
    word = {32: ctypes.c_uint32, 64: ctypes.c_uint64}[bits]
    for name in ("c_size_t", "c_void_p", "c_char_p"):
        monkeypatch.setattr(ctypes, name, word)
    namespace: dict[str, Any] = {"__name__": "declarations"}
    for module in (_win32, _win32files):
        tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
        tree.body = [
            node
            for node in tree.body
            if not isinstance(node, ast.If) and not (isinstance(node, ast.ImportFrom) and node.level)
        ]
        exec(compile(tree, module.__file__ or "", "exec"), namespace)
    return namespace


def test_every_structure_is_in_the_table() -> None:
    ours = {
        name
        for name, value in vars(_win32files).items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure) and name not in vars(_win32)
    }
    assert ours == set(LAYOUTS)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(monkeypatch: pytest.MonkeyPatch, name: str, bits: int) -> None:
    check_layout(declarations(monkeypatch, bits)[name], LAYOUTS[name], bits)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_of_this_very_python(name: str) -> None:
    check_layout(getattr(_win32files, name), LAYOUTS[name], 8 * ctypes.sizeof(ctypes.c_void_p))


def test_constants_are_those_of_the_headers() -> None:
    numbers = {
        name: value for name, value in vars(_win32files).items() if name.isupper() and isinstance(value, int)
    }
    assert numbers == CONSTANTS


def test_the_guid_is_that_of_mswsock() -> None:
    text = "b5367df0-cbac-11cf-95ca-00805f48a192"
    assert bytes(_win32files.WSAID_TRANSMITFILE) == uuid.UUID(text).bytes_le


def test_every_declaration_says_its_shape_and_its_source() -> None:
    lines = SOURCE.splitlines()
    found = 0
    for node in ast.walk(ast.parse(SOURCE)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        if ast.unparse(node.value.func) not in {"_bind", "WINFUNCTYPE"}:
            continue
        found += 1
        above: list[str] = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip(" #"))
        comment = "".join(above).lower()
        assert ast.unparse(node.targets[0]).lower() in comment, node.lineno
        assert "learn.microsoft.com" in comment, node.lineno
    assert found > 15


@pytest.mark.skipif(not ON_WINDOWS, reason="it looks at bound functions, which only Windows has")
def test_every_function_is_typed_and_keeps_its_error() -> None:
    functions = {
        name: value
        for name, value in vars(_win32files).items()
        if isinstance(value, ctypes._CFuncPtr) and name not in vars(_win32)  # type: ignore[attr-defined]
    }
    assert len(functions) > 15
    kept = ctypes.WinDLL("kernel32", use_last_error=True)._FuncPtr._flags_
    keeps = kept & ~ctypes.WinDLL("kernel32")._FuncPtr._flags_
    for name, function in functions.items():
        assert function.argtypes, name
        assert name.startswith("Nt") or function._flags_ & keeps, name
    assert ctypes.sizeof(functions["CreateFileW"].restype) == ctypes.sizeof(ctypes.c_void_p)


@pytest.mark.skipif(ON_WINDOWS, reason="it shows what other systems are told")
def test_off_windows_a_function_is_an_import_error() -> None:
    with pytest.raises(ImportError, match=r"iocp_ctypes needs Windows for ReadFile: \w+ has no completion"):
        _win32files.ReadFile  # noqa: B018
