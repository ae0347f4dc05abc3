r"""L4: named pipes of the completion port, with the faces of OverlappedSocket and ListeningSocket.

Laws
1. One instance is made first, with FILE_FLAG_FIRST_PIPE_INSTANCE, and kept disconnected for as long as the
   name is ours: nobody connects to it, and nobody else can take the name meanwhile.
2. An AcceptEx of pipes is a new instance and a ConnectNamedPipe on it. Where a client was faster there is no
   packet, so we queue one ourselves.
3. Pipes are in byte mode. They have no half-close and no socket options, and a write takes one buffer.
4. Only the user this process runs as may open our pipes, unless told otherwise by an SDDL string, and nobody
   from other machines. We let servers know who we are, and not act in our name.
Nothing here blocks.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from ctypes import addressof, byref, c_void_p, create_string_buffer, sizeof
from typing import Any, Final

from . import _win32, _win32files
from ._addresses import Address
from ._errors import ERROR_NO_DATA, ERROR_PIPE_CONNECTED, error_from_code
from ._options import KIB, KeepAlive
from ._port import CompletionPort
from ._proactor import COMPLETED, PENDING, Handler, Operation, Proactor
from ._sockops import NOT_CONNECTED, AcceptOperation

#: Bytes that each direction of a pipe keeps for its reader before a write has to wait.
PIPE_BUFFER: Final = 64 * KIB
ERROR_ACCESS_DENIED: Final = 5
_NOTHING: Final = create_string_buffer(1)  # where a read of no bytes points at


class OverlappedPipe:
    """One end of a pipe: what OverlappedSocket is to a connection."""

    __slots__ = (
        "_disconnects",
        "_forget",
        "_handle",
        "_pending",
        "_proactor",
        "_resets",
        "family",
        "local_raw",
        "peer_raw",
        "receives_at_once",
        "receives_by_packet",
        "sends_at_once",
        "sends_by_packet",
        "skips",
    )

    detachable = False
    half_closes = False
    gather_max = 1
    bursts = False
    transmits = False

    def __init__(self, handle: int, proactor: Proactor, serves: bool) -> None:
        """Own a handle; `serves`: it is the end that CreateNamedPipe made."""
        self._handle = handle
        self._proactor = proactor
        self._pending = proactor.pending
        self._disconnects = serves
        self._resets = False
        self._forget: Callable[[OverlappedPipe], None] | None = None  # called when it is closed
        self.family = 0
        self.skips = False
        self.receives_at_once = self.receives_by_packet = 0  # as those of OverlappedSocket
        self.sends_at_once = self.sends_by_packet = 0
        proactor.sockets.add(handle)
        self.local_raw: bytes | Address = b""  # (name, process id)
        self.peer_raw: bytes | Address = b""

    def begin(self, name: str) -> None:
        """The ends are connected: find out who they are, and spare us packets of what is done at once."""
        process = _win32.ULONG(0)
        ask = (
            _win32files.GetNamedPipeClientProcessId
            if self._disconnects
            else _win32files.GetNamedPipeServerProcessId
        )
        ask(self._handle, byref(process))  # 0 where the system does not know
        self.local_raw = name, os.getpid()
        self.peer_raw = name, int(process.value)
        self.skips = bool(
            _win32.SetFileCompletionNotificationModes(
                self._handle,
                _win32.FILE_SKIP_COMPLETION_PORT_ON_SUCCESS | _win32.FILE_SKIP_SET_EVENT_ON_HANDLE,
            )
        )

    def associate(self, port: CompletionPort) -> None:
        """It is associated since it was made."""

    def set_nodelay(self, on: bool) -> None:
        """A pipe delays nothing."""

    def set_keepalive(self, keepalive: KeepAlive) -> None:
        """A pipe's peer is on this machine: its end is always noticed."""

    def reset_on_close(self) -> None:
        """Make `close` break the pipe off: what the client has not read is lost, and it gets an error.

        The client's end cannot do that.
        """
        self._resets = self._disconnects

    def connect_time(self) -> int:
        """A pipe does not wait for first bytes."""
        return NOT_CONNECTED

    def receive(self, operation: Operation) -> int:
        """As OverlappedSocket.receive."""
        self._pending[operation.address] = operation
        buffer = addressof(operation.buffer) if operation.size else addressof(_NOTHING)
        if _win32files.ReadFile(self._handle, buffer, operation.size, None, operation.address):
            code = COMPLETED if self.skips else PENDING
        else:
            code = self._proactor.settle(operation)
        self.receives_at_once += code == COMPLETED
        self.receives_by_packet += code == PENDING
        return code

    def send(self, operation: Operation, handler: Handler, vector: Any = None, count: int = 1) -> int:
        """As OverlappedSocket.send, for one buffer."""
        operation.handler = handler
        if vector is None:
            data = operation.keep
        else:
            assert count == 1
            data = operation.vector[0].buf
        self._pending[operation.address] = operation
        if _win32files.WriteFile(self._handle, data, operation.length, None, operation.address):
            if self.skips:
                del self._pending[operation.address]
                self.sends_at_once += 1
                return COMPLETED
            code = PENDING
        else:
            code = self._proactor.settle(operation)
        self.sends_by_packet += code == PENDING
        return code

    def cancel(self) -> None:
        """As OverlappedSocket.cancel."""
        _win32.CancelIoEx(self._handle, None)

    def shutdown_send(self) -> None:
        """The client's end reads EOF when we close, after all that was written."""

    def close(self) -> None:
        """Close the handle; twice is once."""
        handle, self._handle = self._handle, _win32.INVALID_HANDLE_VALUE
        if handle == _win32.INVALID_HANDLE_VALUE:
            return
        forget, self._forget = self._forget, None
        if forget is not None:
            forget(self)
        if self._resets:
            _win32files.DisconnectNamedPipe(handle)
        self._proactor.sockets.discard(handle)  # before the system gives the number to another
        _win32.CloseHandle(handle)


class PipeName:
    """A name that is ours, and who may open it. Made before the port is known."""

    __slots__ = ("_anchor", "_descriptor", "_mode", "_security", "name")

    def __init__(self, name: str, sddl: str | None, reject_remote: bool) -> None:
        """Take a name.

        Args:
            name: as `check_pipe_name` returns it.
            sddl: who may do what with it, as a string of the security descriptor definition language; None:
                the user this process runs as may do all, and nobody else anything.
            reject_remote: whether to refuse clients on other machines.

        Raises:
            OSError: the name is taken. ValueError: `sddl` is not understood.
        """
        self._anchor, self._descriptor = _win32.INVALID_HANDLE_VALUE, c_void_p()
        self.name = name
        self._mode = _win32files.PIPE_REJECT_REMOTE_CLIENTS if reject_remote else 0
        text = f"D:P(A;;GA;;;{_own_sid()})" if sddl is None else sddl
        if not _win32files.ConvertStringSecurityDescriptorToSecurityDescriptorW(
            text, _win32files.SDDL_REVISION_1, byref(self._descriptor), None
        ):
            code = ctypes.get_last_error()
            raise ValueError(f"pipe_security={sddl!r}: is not a security descriptor (error {code})")
        self._security = _win32files.SECURITY_ATTRIBUTES(
            sizeof(_win32files.SECURITY_ATTRIBUTES), self._descriptor, False
        )
        anchor = self.instance(_win32files.FILE_FLAG_FIRST_PIPE_INSTANCE)
        if anchor == _win32.INVALID_HANDLE_VALUE:
            code = ctypes.get_last_error()
            self.close()
            taken = "; the name is taken" if code == ERROR_ACCESS_DENIED else ""
            raise error_from_code(code, f"cannot listen on {name}{taken}")
        self._anchor = anchor
        if not _win32files.DisconnectNamedPipe(anchor):
            _connect_once(name)  # some disconnect only what was connected
            _win32files.DisconnectNamedPipe(anchor)

    def __del__(self) -> None:
        """Give back a name that nobody started to serve."""
        if sys is not None and not sys.is_finalizing():  # else the system does it in a moment
            self.close()

    def instance(self, flags: int = 0) -> int:
        """Make an instance: its handle, or INVALID_HANDLE_VALUE."""
        return int(
            _win32files.CreateNamedPipeW(
                self.name,
                _win32files.PIPE_ACCESS_DUPLEX | _win32files.FILE_FLAG_OVERLAPPED | flags,
                self._mode,
                _win32files.PIPE_UNLIMITED_INSTANCES,
                PIPE_BUFFER,
                PIPE_BUFFER,
                0,
                addressof(self._security),
            )
        )

    def close(self) -> None:
        """Give the name back; twice is once."""
        anchor, self._anchor = self._anchor, _win32.INVALID_HANDLE_VALUE
        if anchor != _win32.INVALID_HANDLE_VALUE:
            _win32.CloseHandle(anchor)
        descriptor, self._descriptor = self._descriptor, c_void_p()
        if descriptor:
            _win32files.LocalFree(descriptor)


class ListeningPipe:
    """A name whose connections come by ConnectNamedPipe: what ListeningSocket is to a TCP address."""

    __slots__ = ("_lock", "_name", "_open", "_port", "_proactor", "_waiting")

    def __init__(self, name: PipeName, proactor: Proactor, port: CompletionPort) -> None:
        """Own a name."""
        self._name = name
        self._proactor = proactor
        self._port = port
        self._lock = threading.Lock()
        self._waiting: set[OverlappedPipe] = set()
        self._open = True
        proactor.sockets.add(name._anchor)

    def accept(self, handler: Handler, _data_size: int, home: Any) -> tuple[AcceptOperation | None, int]:
        """Make an instance wait for a client: the operation and PENDING, or None and the error code.

        As ListeningSocket.accept; pipes do not wait for first bytes.
        """
        handle = self._name.instance() if self._open else _win32.INVALID_HANDLE_VALUE
        if handle == _win32.INVALID_HANDLE_VALUE:
            return None, ctypes.get_last_error()
        pipe = OverlappedPipe(handle, self._proactor, serves=True)
        try:
            self._port.associate(handle)
        except OSError as exc:
            pipe.close()
            return None, getattr(exc, "winerror", None) or 0
        pipe._forget = self._forget
        with self._lock:
            self._waiting.add(pipe)
        operation = AcceptOperation(pipe, 0, home)
        operation.handler = handler
        self._proactor.pending[operation.address] = operation
        if _win32files.ConnectNamedPipe(handle, operation.address):
            return operation, PENDING
        code = ctypes.get_last_error()
        if code in (ERROR_PIPE_CONNECTED, ERROR_NO_DATA):  # gone again: what it wrote can still be read
            operation.Internal = 0
            self._port.post_packet(operation.address)
            return operation, PENDING
        if code == PENDING:
            return operation, PENDING
        del self._proactor.pending[operation.address]
        pipe.close()
        return None, code

    def finish(self, operation: AcceptOperation, _transferred: int) -> tuple[OverlappedPipe, bytes]:
        """Make a connected instance a connection; there are no first bytes."""
        pipe: OverlappedPipe = operation.socket
        pipe._forget = None
        self._forget(pipe)
        pipe.begin(self._name.name)
        return pipe, b""

    def _forget(self, pipe: OverlappedPipe) -> None:
        with self._lock:
            self._waiting.discard(pipe)

    def cancel(self) -> None:
        """Ask for the end of all waiting; each instance still has its packet."""
        with self._lock:
            for pipe in self._waiting:
                pipe.cancel()  # its handle is open: closing begins by leaving this set

    def give(self, operation: AcceptOperation) -> None:
        """As ListeningSocket.give; none is kept, for making an instance costs far more."""

    def reap(self, operation: AcceptOperation) -> None:
        """No pipe waits for first bytes."""

    def close(self) -> None:
        """Give the name back."""
        self._open = False
        self._proactor.sockets.discard(self._name._anchor)
        self._name.close()


def open_pipe(name: str, proactor: Proactor, port: CompletionPort) -> tuple[OverlappedPipe | None, int]:
    """Connect to a pipe: the client's end and 0, or None and the error code.

    ERROR_PIPE_BUSY: all instances are taken.
    """
    handle = _open(name)
    if handle == _win32.INVALID_HANDLE_VALUE:
        return None, ctypes.get_last_error()
    pipe = OverlappedPipe(handle, proactor, serves=False)
    try:
        port.associate(handle)
    except OSError as exc:
        pipe.close()
        return None, getattr(exc, "winerror", None) or 0
    pipe.begin(name)
    return pipe, 0


def _open(name: str) -> int:
    return int(
        _win32files.CreateFileW(
            name,
            _win32files.GENERIC_READ | _win32files.GENERIC_WRITE,
            0,
            None,
            _win32files.OPEN_EXISTING,
            _win32files.FILE_FLAG_OVERLAPPED
            | _win32files.SECURITY_SQOS_PRESENT
            | _win32files.SECURITY_IDENTIFICATION,
            0,
        )
    )


def _connect_once(name: str) -> None:
    """Be our own first client, so that the instance can be disconnected."""
    handle = _open(name)
    if handle != _win32.INVALID_HANDLE_VALUE:
        _win32.CloseHandle(handle)


def _own_sid() -> str:
    """The SID of the user this process runs as, as a string."""
    token = _win32.HANDLE()
    if not _win32files.OpenProcessToken(_win32.GetCurrentProcess(), _win32files.TOKEN_QUERY, byref(token)):
        raise error_from_code(ctypes.get_last_error(), "OpenProcessToken")
    try:
        buffer = create_string_buffer(256)  # a pointer, a DWORD, and a SID of 68 bytes at the most
        needed = _win32.DWORD()
        if not _win32files.GetTokenInformation(
            token.value, _win32files.TOKEN_USER_CLASS, buffer, sizeof(buffer), byref(needed)
        ):
            raise error_from_code(ctypes.get_last_error(), "GetTokenInformation")
        text = c_void_p()
        if not _win32files.ConvertSidToStringSidW(c_void_p.from_buffer(buffer), byref(text)):
            raise error_from_code(ctypes.get_last_error(), "ConvertSidToStringSid")
        try:
            return ctypes.wstring_at(text.value or 0)
        finally:
            _win32files.LocalFree(text)
    finally:
        _win32.CloseHandle(token.value or 0)
