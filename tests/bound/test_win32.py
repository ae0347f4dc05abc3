"""The declarations against Windows itself: constants, prototypes, last errors, and who else uses the DLLs."""

from __future__ import annotations

import _overlapped
import _winapi
import ast
import ctypes
import errno
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from ctypes import byref
from pathlib import Path
from typing import Any

import pytest
from support import reachable, serving

from iocp_ctypes import _errors, _win32
from iocp_ctypes._port import Batch, CompletionPort

SOURCE = Path(_win32.__file__).read_text(encoding="utf-8")


def functions() -> dict[str, Any]:
    """Every function that `_win32` binds."""
    return {
        name: value
        for name, value in vars(_win32).items()
        if isinstance(value, ctypes._CFuncPtr)  # type: ignore[attr-defined]
    }


def prototypes() -> dict[str, Any]:
    """Every type of an extension function."""
    return {
        name: value
        for name, value in vars(_win32).items()
        if isinstance(value, type) and issubclass(value, ctypes._CFuncPtr)  # type: ignore[attr-defined]
    }


# -- constants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("INFINITE", _overlapped.INFINITE),
        ("INFINITE", _winapi.INFINITE),
        ("INVALID_HANDLE_VALUE", _overlapped.INVALID_HANDLE_VALUE),
        ("SO_UPDATE_ACCEPT_CONTEXT", _overlapped.SO_UPDATE_ACCEPT_CONTEXT),
        ("SO_UPDATE_CONNECT_CONTEXT", _overlapped.SO_UPDATE_CONNECT_CONTEXT),
        ("WAIT_TIMEOUT", _winapi.WAIT_TIMEOUT),
        ("AF_INET", socket.AF_INET),
        ("AF_INET6", socket.AF_INET6),
        ("SOCK_STREAM", socket.SOCK_STREAM),
        ("IPPROTO_TCP", socket.IPPROTO_TCP),
        ("SOL_SOCKET", socket.SOL_SOCKET),
        ("SO_LINGER", socket.SO_LINGER),
        ("TCP_NODELAY", socket.TCP_NODELAY),
        ("SD_SEND", socket.SHUT_WR),
        ("SIO_KEEPALIVE_VALS", socket.SIO_KEEPALIVE_VALS),
    ],
)
def test_a_constant_is_what_python_says(ours: str, theirs: int) -> None:
    width = 1 << (8 * ctypes.sizeof(ctypes.c_void_p))
    assert getattr(_win32, ours) == theirs % width


def test_error_numbers_are_what_python_says() -> None:
    assert _errors.WSA_IO_PENDING == _overlapped.ERROR_IO_PENDING == _winapi.ERROR_IO_PENDING
    assert _errors.ERROR_OPERATION_ABORTED == _winapi.ERROR_OPERATION_ABORTED
    for name, value in vars(_errors).items():
        if name.startswith("WSAE"):
            assert value == getattr(errno, name), name


# Statuses for which ntdll has another word than ours, which knows what was tried.
TRANSLATED_OTHERWISE = {
    0x8000000A: {676, 317},  # HANDLES_CLOSED; unknown to older systems
    0xC0000140: {59},  # UNEXP_NET_ERR
    0xC0000141: {59},
    0xC000020A: {52},  # DUP_NAME
    0xC0000043: {32},  # SHARING_VIOLATION
    0xC000020C: {64},  # NETNAME_DELETED, as for a reset
    0xC000013B: {64},
}


@pytest.mark.parametrize("row", _errors.TABLE, ids=lambda row: f"{row.winsock}-{row.errno_name}")
def test_the_table_of_failures_agrees_with_ntdll(row: _errors.Failure) -> None:
    for status in row.statuses:
        expected = TRANSLATED_OTHERWISE.get(status, {*row.win32, row.winsock})
        assert _win32.RtlNtStatusToDosError(status) in expected, f"{status:#x}"


def test_the_classes_of_the_table_are_those_python_gives_to_winsock_codes() -> None:
    narrower = {995, 10038, 10057}  # OSError in Python; here the connection is known to be gone
    for row in _errors.TABLE:
        python = type(OSError(None, "", None, row.winsock))
        if row.winsock not in narrower:
            assert python in (row.exception, OSError), row
        exc = _errors.error_from_code(row.winsock, "the call")
        assert exc.winerror == row.winsock
        assert str(exc).startswith(f"[WinError {row.winsock}] ") or f"WinError {row.winsock}" in str(exc)


# -- prototypes ---------------------------------------------------------------------------------------------


def test_every_function_has_argtypes_and_restype_but_the_hot_ones() -> None:
    bound = functions()
    assert len(bound) > 15
    hot = {id(function) for function in _win32.HOT}
    for name, function in bound.items():
        if id(function) in hot:
            assert name.startswith("hot_")
            assert function.argtypes is None, f"{name} takes ready-made arguments"
        else:
            assert function.argtypes is not None, name
    assert {name for name in bound if name.startswith("hot_")} == {
        name for name, function in bound.items() if id(function) in hot
    }


def test_every_function_is_bound_with_the_type_of_its_result() -> None:
    # Not to be seen in the function itself: the default is the int of C, which some functions do return.
    bound = {
        ast.unparse(node.targets[0])
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Assign) and "_bind(" in ast.unparse(node.value)[:6]
    }
    assert bound == {name for name in functions() if not name.startswith("hot_")}


def test_every_prototype_of_an_extension_has_argtypes_and_restype() -> None:
    kinds = prototypes()
    assert set(kinds) >= {"ACCEPTEX", "GETACCEPTEXSOCKADDRS"}
    for name, kind in kinds.items():
        assert kind._argtypes_, name
        assert hasattr(kind, "_restype_"), name


def test_every_handle_is_as_wide_as_a_pointer() -> None:
    wide = ctypes.sizeof(ctypes.c_void_p)
    for name in ("CreateIoCompletionPort", "WSASocketW", "GetCurrentProcess"):
        assert ctypes.sizeof(functions()[name].restype) == wide, name
    for name, function in functions().items():
        if function.argtypes and name not in {"WSAStartup", "WSASocketW", "RtlNtStatusToDosError"}:
            assert ctypes.sizeof(function.argtypes[0]) == wide, f"{name}: its first argument is a handle"


def test_every_declaration_says_its_shape_and_its_source() -> None:
    """Above each bound function stands a comment with its C shape, what failure looks like, and its page."""
    lines = SOURCE.splitlines()
    for node in ast.walk(ast.parse(SOURCE)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        function = ast.unparse(node.value.func)
        if function not in {"_bind", "WINFUNCTYPE"}:
            continue
        assert len(node.value.args) >= 2, "the DLL, the name and the type of the result"
        above = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.append(line)
        comment = "\n".join(above)
        name = ast.unparse(node.targets[0])
        assert name.lower() in comment.lower(), name
        assert "learn.microsoft.com/windows/" in comment, name


def test_the_functions_are_those_of_the_system() -> None:
    for name, function in functions().items():
        if name.startswith("hot_"):
            continue
        address = ctypes.cast(function, ctypes.c_void_p).value
        found = [
            ctypes.cast(getattr(dll, name), ctypes.c_void_p).value
            for dll in (ctypes.WinDLL("kernel32"), ctypes.WinDLL("ws2_32"), ctypes.WinDLL("ntdll"))
            if hasattr(dll, name)
        ]
        assert address in found, name


def test_a_hot_function_is_the_same_function_under_another_name() -> None:
    pairs = {
        "hot_reap": "GetQueuedCompletionStatusEx",
        "hot_poll": "GetQueuedCompletionStatusEx",
        "hot_receive": "WSARecv",
        "hot_send": "WSASend",
        "hot_receive_from": "WSARecvFrom",
        "hot_send_to": "WSASendTo",
    }
    assert {name for name in functions() if name.startswith("hot_")} == set(pairs)
    for hot, plain in pairs.items():
        addresses = {ctypes.cast(getattr(_win32, name), ctypes.c_void_p).value for name in (hot, plain)}
        assert len(addresses) == 1, hot
        assert getattr(_win32, hot) is not getattr(_win32, plain)


def test_extension_functions_are_found_by_their_guids() -> None:
    with socket.socket() as sock:
        for name in ("WSAID_ACCEPTEX", "WSAID_CONNECTEX", "WSAID_GETACCEPTEXSOCKADDRS"):
            guid = getattr(_win32, name)
            pointer, returned = ctypes.c_void_p(), _win32.DWORD()
            assert not _win32.WSAIoctl(
                sock.fileno(),
                _win32.SIO_GET_EXTENSION_FUNCTION_POINTER,
                byref(guid),
                ctypes.sizeof(guid),
                byref(pointer),
                ctypes.sizeof(pointer),
                byref(returned),
                None,
                None,
            )
            assert pointer.value
            assert returned.value == ctypes.sizeof(pointer)
        unknown = _win32.GUID.from_buffer_copy(uuid.uuid4().bytes_le)
        failed = _win32.WSAIoctl(
            sock.fileno(),
            _win32.SIO_GET_EXTENSION_FUNCTION_POINTER,
            byref(unknown),
            ctypes.sizeof(unknown),
            byref(pointer),
            ctypes.sizeof(pointer),
            byref(returned),
            None,
            None,
        )
        assert failed == -1
        assert ctypes.get_last_error() in {10022, 10045}


# -- who else uses the DLLs --------------------------------------------------------------------------------

CORRUPT = (
    "CreateIoCompletionPort",
    "GetQueuedCompletionStatusEx",
    "PostQueuedCompletionStatus",
    "CancelIoEx",
    "CloseHandle",
    "SetFileCompletionNotificationModes",
)
CORRUPT_WINSOCK = ("WSARecv", "WSASend", "WSASocketW", "closesocket", "setsockopt", "shutdown", "WSAIoctl")


@pytest.fixture
def corrupted() -> Iterator[None]:
    """Others set the prototypes of the shared `ctypes.windll` as they like."""
    spoilt = [getattr(ctypes.windll.kernel32, name) for name in CORRUPT]
    spoilt += [getattr(ctypes.windll.ws2_32, name) for name in CORRUPT_WINSOCK]
    for function in spoilt:
        function.argtypes, function.restype = [], ctypes.c_int8
    yield
    for function in spoilt:
        function.argtypes, function.restype = None, ctypes.c_int


@pytest.mark.usefixtures("corrupted")
def test_prototypes_that_others_set_harm_nothing() -> None:
    with pytest.raises(TypeError, match="takes 0 arguments"):
        ctypes.windll.kernel32.CloseHandle(0)
    with serving() as server:
        reachable(server.address, b"x" * 5000)


def test_prototypes_that_others_set_before_harm_nothing() -> None:
    program = f"""
import ctypes, socket, sys
for name in {CORRUPT!r}:
    function = getattr(ctypes.windll.kernel32, name)
    function.argtypes, function.restype = [], ctypes.c_int8
for name in {CORRUPT_WINSOCK!r}:
    function = getattr(ctypes.windll.ws2_32, name)
    function.argtypes, function.restype = [], ctypes.c_int8
sys.path.insert(0, {str(Path(_win32.__file__).parent.parent)!r})
from iocp_ctypes import Connection, Server

class Echo(Connection):
    def on_data(self, data):
        self.send(data)

with Server(("127.0.0.1", 0), Echo) as server, socket.create_connection(server.address, timeout=10) as client:
    client.sendall(b"hello")
    print(client.recv(5).decode())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "hello")


# -- the last error ----------------------------------------------------------------------------------------


def test_a_failure_leaves_its_code_for_this_thread_alone() -> None:
    port = CompletionPort()
    codes: dict[str, int] = {}
    failed, looked = threading.Event(), threading.Event()

    def failing() -> None:
        assert not _win32.CancelIoEx(0, None)
        failed.set()
        looked.wait(10)
        codes["failing"] = ctypes.get_last_error()

    def quiet() -> None:
        ctypes.set_last_error(0)
        failed.wait(10)
        codes["quiet"] = ctypes.get_last_error()
        looked.set()

    threads = [threading.Thread(target=target) for target in (failing, quiet)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    port.close()
    assert codes == {"failing": 6, "quiet": 0}


@pytest.mark.parametrize("name", ["hot_reap", "hot_poll"])
def test_a_hot_function_leaves_its_code_too(name: str) -> None:
    port, batch = CompletionPort(), Batch(1)
    ctypes.set_last_error(0)
    arguments = (port._argument, batch.argument, batch.size, batch.count_argument, 0, 0)
    assert not getattr(_win32, name)(*arguments)
    assert ctypes.get_last_error() == _win32.WAIT_TIMEOUT
    port.close()


def test_a_hot_winsock_call_leaves_its_code_too() -> None:
    with socket.socket() as sock:
        handle = _win32.handle_argument(sock.fileno())
        wsabuf = _win32.WSABUF(0, None)
        ctypes.set_last_error(0)
        assert _win32.hot_send(handle, byref(wsabuf), 1, None, 0, None, None) == -1
        assert ctypes.get_last_error() in {10014, 10057}  # no pointer for the bytes sent, or not connected


def test_nobody_asks_the_system_for_the_last_error() -> None:
    """Between a failed call and a call of GetLastError anything may have happened on the thread."""
    for file in sorted(Path(_win32.__file__).parent.rglob("*.py")):
        words = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Attribute, ast.Name))
        }
        assert not words & {"GetLastError", "WSAGetLastError", "FormatError", "WinError"}, file.name


def test_every_dll_whose_errors_are_read_keeps_them() -> None:
    kept = ctypes.WinDLL("kernel32", use_last_error=True)._FuncPtr._flags_
    other = ctypes.WinDLL("kernel32")._FuncPtr._flags_
    keeps = kept & ~other
    assert keeps
    for name, function in functions().items():
        if name != "RtlNtStatusToDosError":  # its result is the code
            assert function._flags_ & keeps, name
