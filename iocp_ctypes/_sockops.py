"""L4: sockets of the completion port: fill an operation, issue it, read what came of it.

Laws
1. Raw handles stay in here: above are OverlappedSocket and ListeningSocket.
2. Issuing follows one pattern: register in the pending table, call, and on anything but success `settle`.
3. An accepted socket goes AcceptEx -> SO_UPDATE_ACCEPT_CONTEXT -> options -> associate -> first receive,
   each checked.
4. FILE_SKIP_COMPLETION_PORT_ON_SUCCESS is used only where the provider is an IFS one; never for accepts
   (the listener does not have it). Without it every success comes through the port, and issuing says
   PENDING.
5. `close` closes the handle once; nothing is issued on it afterwards. The caller has joined its operations
   before.
Nothing here blocks.
"""

from __future__ import annotations

import ctypes
import socket
from ctypes import addressof, byref, c_int, c_void_p, sizeof
from typing import Any, Final

from . import _win32, _win32files
from ._addresses import Address, format_address, make_sockaddr
from ._errors import error_from_code, winsock_code
from ._fileops import TRANSMITS_FREELY, TransmitOperation
from ._flow import SEND_GATHER_MAX
from ._options import KeepAlive
from ._port import CompletionPort
from ._proactor import COMPLETED, KEPT_MAX, PENDING, Handler, Operation, Proactor
from ._win32 import get_last_error

#: What `connect_time` says of a socket that no peer has connected to.
NOT_CONNECTED: Final = _win32.CONNECT_TIME_NOT_CONNECTED
#: What AcceptEx's buffer holds after the data: two addresses.
_ACCEPT_ADDRESSES: Final = 2 * _win32.ACCEPT_ADDRESS_SIZE
_RESET_ON_CLOSE: Final = _win32.LINGER(1, 0)

#: Whether an operation that waits may never be told of the peer's reset, and whether WSAPoll says of it that
#: both directions are over (POLLHUP; on Windows the peer's half-close is enough for that).
RESETS_GET_LOST: Final = _win32.is_wine()

_startup_data = ctypes.create_string_buffer(512)
# CPython's socket module does this too; ours makes the vendored folder independent of that. Never undone: the
# process keeps Winsock until it ends.
_win32.WSAStartup(_win32.WINSOCK_VERSION, _startup_data)

_extensions: dict[tuple[int, str], Any] = {}
_ifs_families: dict[int, bool] = {}


def _extension(handle: int, family: int, name: str) -> Any:
    """Return an extension function of the family's provider; asked for once per family."""
    function = _extensions.get((family, name))
    if function is None:
        guid, prototype = {
            "AcceptEx": (_win32.WSAID_ACCEPTEX, _win32.ACCEPTEX),
            "ConnectEx": (_win32.WSAID_CONNECTEX, _win32.CONNECTEX),
            "GetAcceptExSockaddrs": (_win32.WSAID_GETACCEPTEXSOCKADDRS, _win32.GETACCEPTEXSOCKADDRS),
            "TransmitFile": (_win32files.WSAID_TRANSMITFILE, _win32files.TRANSMITFILE),
        }[name]
        pointer = c_void_p()
        returned = _win32.DWORD()
        if _win32.WSAIoctl(
            handle,
            _win32.SIO_GET_EXTENSION_FUNCTION_POINTER,
            byref(guid),
            sizeof(guid),
            byref(pointer),
            sizeof(pointer),
            byref(returned),
            None,
            None,
        ):
            raise error_from_code(get_last_error(), f"the provider has no {name}")
        function = _extensions[family, name] = prototype(pointer.value or 0)
    return function


def provider_is_ifs(handle: int, family: int) -> bool:
    """Return whether the handles of this family's provider are real file handles.

    Asked for once per family.
    """
    known = _ifs_families.get(family)
    if known is None:
        info = _win32.WSAPROTOCOL_INFOW()
        length = c_int(sizeof(info))
        failed = _win32.getsockopt(
            handle, _win32.SOL_SOCKET, _win32.SO_PROTOCOL_INFOW, byref(info), byref(length)
        )
        known = not failed and bool(info.dwServiceFlags1 & _win32.XP1_IFS_HANDLES)
        _ifs_families[family] = known
    return known


def error_code(status: int) -> int:
    """Return the Winsock code of an NTSTATUS, or the Win32 code that the system has for it."""
    return winsock_code(status) or int(_win32.RtlNtStatusToDosError(status & 0xFFFFFFFF))


class OverlappedSocket:
    """A stream socket: receive, send, cancel, shut down, close, options."""

    __slots__ = (
        "_argument",
        "_handle",
        "_nodelay",
        "_pending",
        "_proactor",
        "family",
        "local_raw",
        "peer_raw",
        "receives_at_once",
        "receives_by_packet",
        "sends_at_once",
        "sends_by_packet",
        "skips",
    )

    detachable = True  # `release` works
    half_closes = True  # `shutdown_send` tells the peer that nothing more comes
    gather_max = SEND_GATHER_MAX  # buffers that one send takes
    bursts = True  # several receives may be posted at a time

    def __init__(self, handle: int, family: int, proactor: Proactor) -> None:
        """Own a handle."""
        self._handle = handle
        self._argument = _win32.handle_argument(handle)
        self._proactor = proactor
        self._pending = proactor.pending
        self.family = family
        self._nodelay: bool | None = None  # None: not known
        self.skips = False  # true exactly when an operation that completes at once has no packet
        # Operations issued. Whoever issues one holds the connection's lock, which makes them exact.
        self.receives_at_once = self.receives_by_packet = 0
        self.sends_at_once = self.sends_by_packet = 0
        proactor.sockets.add(handle)
        self.local_raw = b""  # SOCKADDRs as the kernel wrote them; read when asked for
        self.peer_raw = b""

    # -- set-up ---------------------------------------------------------------------------------------------

    def associate(self, port: CompletionPort) -> None:
        """Bind this socket to a port for life, and spare it the packets of what completes at once."""
        port.associate(self._handle)
        if provider_is_ifs(self._handle, self.family):
            self.skips = bool(
                _win32.SetFileCompletionNotificationModes(
                    self._handle,
                    _win32.FILE_SKIP_COMPLETION_PORT_ON_SUCCESS | _win32.FILE_SKIP_SET_EVENT_ON_HANDLE,
                )
            )

    def set_nodelay(self, on: bool) -> None:
        """TCP_NODELAY; OSError where the socket is gone. Costs nothing where it is known to be so."""
        if on is not self._nodelay:
            self._nodelay = None
            self._set(_win32.IPPROTO_TCP, _win32.TCP_NODELAY, c_int(on), "TCP_NODELAY")
            self._nodelay = on

    def _ask_nodelay(self) -> bool | None:
        value, length = c_int(), c_int(sizeof(c_int))
        failed = _win32.getsockopt(
            self._handle, _win32.IPPROTO_TCP, _win32.TCP_NODELAY, byref(value), byref(length)
        )
        return None if failed else bool(value.value)

    def set_keepalive(self, keepalive: KeepAlive) -> None:
        """SIO_KEEPALIVE_VALS: None is off; seconds, or (idle, interval) in seconds."""
        idle, interval = keepalive if isinstance(keepalive, tuple) else (keepalive or 0.0, 1.0)
        values = _win32.TCP_KEEPALIVE(
            keepalive is not None, max(1, int(idle * 1000)), max(1, int(interval * 1000))
        )
        returned = _win32.DWORD()
        if _win32.WSAIoctl(
            self._handle,
            _win32.SIO_KEEPALIVE_VALS,
            byref(values),
            sizeof(values),
            None,
            0,
            byref(returned),
            None,
            None,
        ):
            raise error_from_code(get_last_error(), "SIO_KEEPALIVE_VALS")

    def reset_on_close(self) -> None:
        """Make `close` send RST instead of FIN."""
        _win32.setsockopt(
            self._handle, _win32.SOL_SOCKET, _win32.SO_LINGER, byref(_RESET_ON_CLOSE), sizeof(_RESET_ON_CLOSE)
        )

    def connect_time(self) -> int:
        """Seconds since the peer connected, or NOT_CONNECTED."""
        seconds = _win32.DWORD(NOT_CONNECTED)
        length = c_int(sizeof(seconds))
        _win32.getsockopt(
            self._handle, _win32.SOL_SOCKET, _win32.SO_CONNECT_TIME, byref(seconds), byref(length)
        )
        return int(seconds.value)

    def _set(self, level: int, name: int, value: Any, what: str) -> None:
        if _win32.setsockopt(self._handle, level, name, byref(value), sizeof(value)):
            raise error_from_code(get_last_error(), what)

    # -- the hot calls --------------------------------------------------------------------------------------

    def receive(self, operation: Operation) -> int:
        """Issue a receive into the operation's buffer: COMPLETED (InternalHigh bytes), PENDING or an error
        code.

        What completed at once stays in the pending table: the dispatcher serves it in its turn.
        """
        self._pending[operation.address] = operation
        if not _win32.hot_receive(
            self._argument, operation.wsabuf, 1, None, operation.flags_argument, operation.overlapped, None
        ):
            if self.skips:
                self.receives_at_once += 1
                return COMPLETED
            code = PENDING
        else:
            code = get_last_error()
        if code == PENDING:
            self.receives_by_packet += 1
        else:
            del self._pending[operation.address]
        return code

    def send(self, operation: Operation, handler: Handler, vector: Any = None, count: int = 1) -> int:
        """Issue a send of what the operation was loaded with: COMPLETED, PENDING or an error code.

        COMPLETED: InternalHigh bytes were taken and the operation is the caller's again. `vector` and
        `count` are what `Operation.load_pieces` returned; without them the one buffer of `Operation.load`
        is sent.
        """
        operation.handler = handler
        self._pending[operation.address] = operation
        if not _win32.hot_send(
            self._argument, vector or operation.wsabuf, count, None, 0, operation.overlapped, None
        ):
            if self.skips:
                del self._pending[operation.address]
                self.sends_at_once += 1
                return COMPLETED
            code = PENDING
        else:
            code = self._proactor.settle(operation)
        self.sends_by_packet += code == PENDING
        return code

    @property
    def transmits(self) -> bool:
        """Whether `transmit` is to be used; else files are read and sent as bytes."""
        if not TRANSMITS_FREELY:
            return False
        try:
            return bool(_extension(self._handle, self.family, "TransmitFile"))
        except OSError:
            return False

    def transmit(self, operation: TransmitOperation, handler: Handler) -> int:
        """Issue a TransmitFile: COMPLETED (InternalHigh bytes), PENDING or an error code.

        Not under a lock: the system may read the disk before it returns.
        """
        transmit = _extension(self._handle, self.family, "TransmitFile")
        operation.handler = handler
        self._pending[operation.address] = operation
        file, head_and_tail = operation.file_handle, operation.buffers_address
        if transmit(self._handle, file, operation.amount, 0, operation.address, head_and_tail, 0):
            if self.skips:
                del self._pending[operation.address]
                return COMPLETED
            return PENDING
        return self._proactor.settle(operation)

    def was_reset(self) -> bool:
        """Whether the peer has reset the connection; for where no receive would tell."""
        entry = _win32files.WSAPOLLFD(self._handle, _win32files.POLLWRNORM)
        signs = _win32files.POLLERR | (_win32files.POLLHUP if RESETS_GET_LOST else 0)
        return _win32files.WSAPoll(byref(entry), 1, 0) == 1 and bool(entry.revents & signs)

    # -- connecting -----------------------------------------------------------------------------------------

    def connect(self, operation: Operation, handler: Handler, address: Address) -> int:
        """Issue a ConnectEx on a socket of `open_socket`: PENDING, COMPLETED or an error code."""
        sockaddr = make_sockaddr(self.family, address)
        operation.keep = ctypes.create_string_buffer(sockaddr, len(sockaddr))
        operation.handler = handler
        connect = _extension(self._handle, self.family, "ConnectEx")
        self._pending[operation.address] = operation
        if connect(self._handle, addressof(operation.keep), len(sockaddr), None, 0, None, operation.address):
            return COMPLETED if self.skips else PENDING
        return self._proactor.settle(operation)

    def finish_connect(self) -> None:
        """Make a connected socket a full one; OSError where the peer is gone again."""
        if _win32.setsockopt(self._handle, _win32.SOL_SOCKET, _win32.SO_UPDATE_CONNECT_CONTEXT, None, 0):
            raise error_from_code(ctypes.get_last_error(), "SO_UPDATE_CONNECT_CONTEXT")
        self.local_raw = self._name(_win32.getsockname)
        self.peer_raw = self._name(_win32.getpeername)

    def _name(self, function: Any) -> bytes:
        buffer = ctypes.create_string_buffer(_win32.SOCKADDR_STORAGE_SIZE)
        length = c_int(len(buffer))
        if function(self._handle, buffer, byref(length)):
            raise error_from_code(ctypes.get_last_error(), function.__name__)
        return buffer.raw[: length.value]

    def refuse_fast(self) -> None:
        """Do not repeat the SYN to this machine, which takes two seconds.

        Systems that cannot are left as they are.
        """
        values = _win32.TCP_INITIAL_RTO_PARAMETERS(
            _win32.TCP_INITIAL_RTO_UNSPECIFIED_RTT, _win32.TCP_INITIAL_RTO_NO_SYN_RETRANSMISSIONS
        )
        returned = _win32.DWORD()
        _win32.WSAIoctl(
            self._handle,
            _win32.SIO_TCP_INITIAL_RTO,
            byref(values),
            sizeof(values),
            None,
            0,
            byref(returned),
            None,
            None,
        )

    # -- handing over ---------------------------------------------------------------------------------------

    def release(self) -> socket.socket:
        """Give the handle away as a plain socket, off the port where the system can do that.

        The caller has joined all operations. Nothing is left to close.
        """
        block, nothing = _win32files.IO_STATUS_BLOCK(), _win32files.FILE_COMPLETION_INFORMATION(0, 0)
        arguments = byref(block), byref(nothing), sizeof(nothing), _win32files.FILE_REPLACE_COMPLETION
        _win32files.NtSetInformationFile(self._handle, *arguments)
        made = socket.socket(self.family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=self._handle)
        self._proactor.sockets.discard(self._handle)
        self._handle = _win32.INVALID_SOCKET
        return made

    def adopt(self, port: CompletionPort) -> None:
        """Associate a socket that was connected elsewhere, and read its addresses."""
        self.local_raw = self._name(_win32.getsockname)
        self.peer_raw = self._name(_win32.getpeername)
        port.associate(self._handle)
        # A mode stays with a socket, whoever has it: so it is asked for, and not changed.
        modes = _win32.ULONG(0)
        block = _win32files.IO_STATUS_BLOCK()
        status = _win32files.NtQueryInformationFile(
            self._handle,
            byref(block),
            byref(modes),
            sizeof(modes),
            _win32files.FILE_IO_COMPLETION_NOTIFICATION,
        )
        self.skips = not status and bool(modes.value & _win32.FILE_SKIP_COMPLETION_PORT_ON_SUCCESS)

    # -- the end --------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask for the end of all that is in flight; each operation still has its packet. No result to check:
        ERROR_NOT_FOUND means that the packets are on their way already."""
        _win32.CancelIoEx(self._handle, None)

    def cancel_receive(self, operation: Operation) -> None:
        """Ask for the end of one receive. Its packet says whether bytes had come before: they count.

        Source: learn.microsoft.com/windows/win32/api/ioapiset/nf-ioapiset-cancelioex
        """
        _win32.CancelIoEx(self._handle, operation.address)

    def shutdown_send(self) -> None:
        """Send FIN after what was sent.

        A peer that is gone makes this fail, which is no news to a closing socket.
        """
        _win32.shutdown(self._handle, _win32.SD_SEND)

    def close(self) -> None:
        """Close the handle; twice is once."""
        handle, self._handle = self._handle, _win32.INVALID_SOCKET
        if handle != _win32.INVALID_SOCKET:
            self._proactor.sockets.discard(handle)  # before the system gives the number to another
            _win32.closesocket(handle)


class AcceptOperation(Operation):
    """An AcceptEx: the socket that becomes the connection, and room for data and two addresses."""

    __slots__ = ("arguments", "data_size", "home", "local", "peer", "reaped", "socket")

    def __init__(self, accepted: Any, data_size: int, home: Any) -> None:
        super().__init__(data_size + _ACCEPT_ADDRESSES)
        self.socket = accepted
        self.data_size = data_size
        self.home = home  # the pool it is counted in
        self.reaped = False  # cancelled because its peer stayed silent
        self.local, self.peer = (c_void_p(), c_int()), (c_void_p(), c_int())  # where in the buffer, how long
        room = _win32.ACCEPT_ADDRESS_SIZE
        outs = (byref(out) for out in (*self.local, *self.peer))
        self.arguments = (addressof(self.buffer), data_size, room, room, *outs)  # of GetAcceptExSockaddrs

    def address_at(self, place: tuple[c_void_p, c_int]) -> bytes:
        """Return a SOCKADDR that GetAcceptExSockaddrs found; empty where there is none."""
        at, length = place
        if not at.value:
            return b""
        start = at.value - addressof(self.buffer)
        found: bytes = self.buffer[start : start + length.value]
        return found


class ListeningSocket:
    """A bound and listening socket whose connections come by AcceptEx."""

    __slots__ = (
        "_accept_ex",
        "_addresses_of",
        "_context",
        "_handle",
        "_nodelay",
        "_proactor",
        "_python",
        "_spare",
        "address",
        "family",
    )

    def __init__(self, python_socket: socket.socket, proactor: Proactor, port: CompletionPort) -> None:
        """Own a listening `socket.socket` and bind it to a port."""
        self._python = python_socket
        self._handle = python_socket.fileno()
        self._context = _win32.SOCKET(self._handle)
        self._nodelay: bool | None = None  # what accepted sockets have of the listener's; None: not known
        self._spare: list[AcceptOperation] = []  # to be used again; atomic appends and pops
        self._proactor = proactor
        self.family = int(python_socket.family)
        self.address: Address = python_socket.getsockname()
        self._accept_ex = _extension(self._handle, self.family, "AcceptEx")
        self._addresses_of = _extension(self._handle, self.family, "GetAcceptExSockaddrs")
        port.associate(self._handle)
        proactor.sockets.add(self._handle)

    def accept(self, handler: Handler, data_size: int, home: Any) -> tuple[AcceptOperation | None, int]:
        """Issue an AcceptEx: the operation and PENDING, or None and the error code of what failed.

        Args:
            handler: called once with (operation, bytes of data, status); `finish` reads the operation.
            data_size: 0, or the most bytes to wait for before the accept completes.
            home: kept in the operation, for the handler.
        """
        handle = _win32.WSASocketW(
            self.family,
            _win32.SOCK_STREAM,
            _win32.IPPROTO_TCP,
            None,
            0,
            _win32.WSA_FLAG_OVERLAPPED | _win32.WSA_FLAG_NO_HANDLE_INHERIT,
        )
        if handle == _win32.INVALID_SOCKET:
            return None, get_last_error()
        accepted = OverlappedSocket(handle, self.family, self._proactor)
        operation = self._operation(accepted, data_size, home)
        operation.handler = handler
        self._proactor.pending[operation.address] = operation
        if self._accept_ex(
            self._handle,
            handle,
            addressof(operation.buffer),
            data_size,
            _win32.ACCEPT_ADDRESS_SIZE,
            _win32.ACCEPT_ADDRESS_SIZE,
            None,
            operation.address,
        ):
            return operation, PENDING  # the listener does not skip, so success has a packet as well
        code = self._proactor.settle(operation)
        if code == PENDING:
            return operation, PENDING
        accepted.close()
        return None, code

    def _operation(self, accepted: OverlappedSocket, data_size: int, home: Any) -> AcceptOperation:
        try:
            operation = self._spare.pop()
        except IndexError:
            return AcceptOperation(accepted, data_size, home)
        operation.socket = accepted
        operation.home = home
        return operation

    def give(self, operation: AcceptOperation) -> None:
        """Take back an operation that was finished, and that the caller knows no more."""
        # Not those that wait for bytes: the watchdog may be looking at one of them.
        if not operation.data_size and len(self._spare) < KEPT_MAX:
            self._spare.append(operation)

    def finish(self, operation: AcceptOperation, transferred: int) -> tuple[OverlappedSocket, bytes]:
        """Make a completed AcceptEx a connected socket with its addresses; OSError where the peer is gone
        again.

        Returns:
            The socket (not associated yet), and the first bytes, empty without `data_size`.
        """
        accepted: OverlappedSocket = operation.socket
        accepted._set(
            _win32.SOL_SOCKET, _win32.SO_UPDATE_ACCEPT_CONTEXT, self._context, "SO_UPDATE_ACCEPT_CONTEXT"
        )
        # They have the listener's properties from here on. Whether TCP_NODELAY is among them is asked of the
        # first, so that a call can be saved for all others.
        if self._nodelay is None:
            self._nodelay = accepted._ask_nodelay()
        accepted._nodelay = self._nodelay
        self._addresses_of(*operation.arguments)
        accepted.local_raw = operation.address_at(operation.local)
        accepted.peer_raw = operation.address_at(operation.peer)
        return accepted, operation.buffer[:transferred] if operation.data_size else b""

    def cancel(self) -> None:
        """Ask for the end of all AcceptEx operations; each still has its packet."""
        _win32.CancelIoEx(self._handle, None)

    def reap(self, operation: AcceptOperation) -> None:
        """Ask for the end of one AcceptEx whose peer stayed silent; its packet decides whether it did."""
        operation.reaped = True
        _win32.CancelIoEx(self._handle, operation.address)

    def close(self) -> None:
        """Stop listening; AcceptEx operations complete as cancelled.

        The caller holds the lock of their pool.
        """
        self._proactor.sockets.discard(self._handle)
        # Before the system gives the number to another socket.
        self._handle = self._context.value = _win32.INVALID_SOCKET
        self._python.close()


def open_socket(
    family: int, local: Address | None, proactor: Proactor, port: CompletionPort
) -> OverlappedSocket:
    """Make a stream socket that is bound and associated, ready for ConnectEx."""
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.bind(local or (("::", 0) if family == socket.AF_INET6 else ("0.0.0.0", 0)))
    except OSError as exc:
        made.close()
        code = getattr(exc, "winerror", None) or exc.errno or 0
        raise error_from_code(code, f"cannot connect from {format_address(local)}") from exc
    opened = OverlappedSocket(made.detach(), family, proactor)
    try:
        opened.associate(port)
    except OSError:
        opened.close()
        raise
    return opened


def check_adoptable(python_socket: Any) -> Address:
    """Return the peer of a connected stream socket; TypeError or ValueError for all else."""
    if not isinstance(python_socket, socket.socket):
        raise TypeError(f"sock={python_socket!r}: must be a connected socket.socket")
    if (
        python_socket.family not in (socket.AF_INET, socket.AF_INET6)
        or python_socket.type != socket.SOCK_STREAM
    ):
        raise ValueError(f"sock={python_socket!r}: must be a connected IPv4 or IPv6 stream socket")
    try:
        peer: Address = python_socket.getpeername()
    except OSError as exc:
        raise ValueError(f"sock={python_socket!r}: is not connected: {exc}") from exc
    return peer


def adopt_socket(python_socket: Any, proactor: Proactor, port: CompletionPort) -> OverlappedSocket:
    """Take over a connected `socket.socket`, which is closed for its owner then; ours is what it was.

    OSError: it has another completion port. Then, and where `check_adoptable` raises, it stays its owner's.
    """
    check_adoptable(python_socket)
    adopted = OverlappedSocket(python_socket.fileno(), int(python_socket.family), proactor)
    try:
        adopted.adopt(port)
    except OSError:
        proactor.sockets.discard(python_socket.fileno())
        raise
    python_socket.detach()
    return adopted
