"""L4: datagram sockets of the completion port: fill an operation, issue it, read what came of it.

Laws
1. Raw handles stay in here. `socket.socket` makes, binds, connects and sets options; ctypes does what is
   overlapped.
2. Receives are overlapped, registered before the call; buffer, flags, address and length cell belong to the
   operation.
3. A send is tried without an OVERLAPPED first: the socket does not block, so the call takes the datagram or
   says that it would have to wait. It has no packet and no operation, which halves its price. Only what
   would have to wait becomes an operation.
4. FILE_SKIP_COMPLETION_PORT_ON_SUCCESS is never set: it is not safe for UDP on every Windows. Each success
   of an overlapped call has its packet.
5. A failed call has none, with one exception: a datagram larger than the buffer is a warning, and the I/O
   manager queues a packet for what is not an error. Whether this system does is tried out once, when it
   first matters: to guess wrong would lose a receive, or use one twice.
Nothing here blocks, but the trial of law 5, for as long as a datagram takes over loopback.
"""

from __future__ import annotations

import ctypes
import errno
import select
import socket
from collections import deque
from collections.abc import Callable
from ctypes import addressof, byref, c_char, c_int, c_void_p, sizeof
from typing import Any, Final

from . import _win32
from ._addresses import Address, format_address, parse_sockaddr
from ._errors import error_from_code
from ._port import Batch, CompletionPort
from ._proactor import COMPLETED, KEPT_DATA_MAX, PENDING, Handler, Operation, Proactor

WSAEMSGSIZE: Final = 10040
#: NTSTATUS of a datagram that was larger than the buffer; the bytes that fitted are there.
STATUS_BUFFER_OVERFLOW: Final = 0x80000005
#: With these codes the system says that an *earlier* datagram could not be delivered (ICMP): port, time to
#: live, and what Wine says instead. The call that reports it did nothing, and may be repeated at once.
EARLIER_CODES: Final = frozenset({10054, 10052, 10061, 1234})
#: Those and the two of an unreachable network or host: none of them is about the receiving socket.
ICMP_CODES: Final = EARLIER_CODES | {10051, 10065}
#: Codes of options that mean: no such interface, or not with this group.
INTERFACE_CODES: Final = frozenset({10022, 10049, 10050, 10051, 10065, errno.ENODEV})
#: Seconds a datagram gets over loopback in the trial of law 5.
TRIAL_TIMEOUT: Final = 0.5

_NAME = c_char * _win32.SOCKADDR_STORAGE_SIZE


class DatagramReceive(Operation):
    """A WSARecvFrom: its buffer, the sender's address, and its number in the order of posting."""

    __slots__ = (
        "name",
        "name_argument",
        "name_size",
        "name_size_argument",
        "number",
        "status",
        "transferred",
    )

    def __init__(self, size: int, handler: Handler) -> None:
        """Make a receive of `size` bytes at most."""
        super().__init__(size)
        self.handler = handler
        self.name = _NAME()
        self.name_size = c_int(sizeof(_NAME))
        self.name_argument = c_void_p.from_param(addressof(self.name))
        self.name_size_argument = c_void_p.from_param(addressof(self.name_size))
        self.number = 0
        self.transferred = 0
        self.status = 0


class Target:
    """An address to send to, as the kernel reads it; never changed, so that many sends may share it."""

    __slots__ = ("argument", "cell", "length", "size_max")

    def __init__(self, sockaddr: bytes, size_max: int) -> None:
        """Keep a SOCKADDR, and the size of the largest datagram there."""
        self.cell = ctypes.create_string_buffer(sockaddr, len(sockaddr)) if sockaddr else None
        self.argument = None if self.cell is None else c_void_p.from_param(addressof(self.cell))
        self.length = len(sockaddr)
        self.size_max = size_max


class DatagramSocket:
    """A bound datagram or raw socket: receive, send, cancel, close, options.

    Sends share one buffer cell: the caller lets one thread send at a time. Everything else is thread-safe.
    """

    def __init__(self, python_socket: socket.socket) -> None:
        """Own a bound `socket.socket` that does not block."""
        self._python = python_socket
        self._handle = python_socket.fileno()
        self._argument = _win32.handle_argument(self._handle)
        self._proactor: Any = None
        self._pending: dict[int, Operation] = {}
        self.family = int(python_socket.family)
        self.kind = int(python_socket.type)
        self.sockaddr_size = 28 if self.family == socket.AF_INET6 else 16
        self._direct = Operation()
        self._sent = _win32.DWORD()
        self._sent_argument = c_void_p.from_param(addressof(self._sent))

    # -- set-up ---------------------------------------------------------------------------------------------

    def attach(self, proactor: Proactor, port: CompletionPort) -> None:
        """Bind this socket to a port for life."""
        port.associate(self._handle)
        self._proactor = proactor
        self._pending = proactor.pending
        proactor.sockets.add(self._handle)

    @property
    def address(self) -> Address:
        """The local address."""
        found: Address = self._python.getsockname()
        return found

    def connect(self, sockaddr: bytes) -> None:
        """Make an address the one that is sent to and received from; OSError where it cannot be."""
        if _win32.connect(self._handle, sockaddr, len(sockaddr)):
            code = ctypes.get_last_error()
            raise error_from_code(code, f"cannot connect to {format_address(parse_sockaddr(sockaddr))}")

    def report_unreachable(self, on: bool) -> None:
        """SIO_UDP_CONNRESET and SIO_UDP_NETRESET: whether ICMP errors end a receive.

        A system that knows neither, and raw sockets, are left as they are.
        """
        if self.kind != socket.SOCK_DGRAM:
            return
        value, returned = _win32.BOOL(on), _win32.DWORD()
        for code in (_win32.SIO_UDP_CONNRESET, _win32.SIO_UDP_NETRESET):
            _win32.WSAIoctl(
                self._handle, code, byref(value), sizeof(value), None, 0, byref(returned), None, None
            )

    def set_option(self, level: int, name: int, value: int | bytes) -> None:
        """Set an option; OSError where the system refuses it."""
        self._python.setsockopt(level, name, value)

    def get_option(self, level: int, name: int) -> int:
        """Return an option."""
        return self._python.getsockopt(level, name)

    def get_address_option(self, level: int, name: int) -> str:
        """Return an option that is an IPv4 address."""
        return socket.inet_ntoa(self._python.getsockopt(level, name, 4))

    # -- the hot calls --------------------------------------------------------------------------------------

    def receive(self, operation: DatagramReceive) -> int:
        """Issue a receive: PENDING, COMPLETED or an error code.

        COMPLETED happens only where law 5 found that an oversize datagram has no packet: the operation stays
        in the pending table, its status and bytes are filled in, and the dispatcher is to serve it.
        """
        operation.name_size.value = _win32.SOCKADDR_STORAGE_SIZE
        operation.flags = 0  # the system may have left some of its own
        self._pending[operation.address] = operation
        if not _win32.hot_receive_from(
            self._argument,
            operation.wsabuf,
            1,
            None,
            operation.flags_argument,
            operation.name_argument,
            operation.name_size_argument,
            operation.overlapped,
            None,
        ):
            return PENDING
        code = ctypes.get_last_error()
        if code == PENDING:
            return PENDING
        if code == WSAEMSGSIZE:
            if oversize_has_packet():
                return PENDING
            operation.Internal = STATUS_BUFFER_OVERFLOW
            operation.InternalHigh = operation.size
            return COMPLETED
        del self._pending[operation.address]
        return code

    def sender(self, operation: DatagramReceive) -> bytes:
        """Return the SOCKADDR of a receive that was retired; what came over a raw socket has port 0."""
        raw: Any = operation.name
        found: bytes = raw[: self.sockaddr_size]
        return found

    def send_now(self, data: bytes, target: Target) -> int:
        """Send without waiting: COMPLETED, or an error code, WSAEWOULDBLOCK among them.

        One thread at a time.
        """
        direct = self._direct
        direct.load(data)
        failed = _win32.hot_send_to(
            self._argument,
            direct.wsabuf,
            1,
            self._sent_argument,
            0,
            target.argument,
            target.length,
            None,
            None,
        )
        code = ctypes.get_last_error() if failed else COMPLETED
        if direct.length > KEPT_DATA_MAX:
            direct.keep = None
            direct.buf = None
        return code

    def send(self, operation: Operation, handler: Handler, data: bytes, target: Target) -> int:
        """Issue a send whose packet comes when the datagram was taken: PENDING or an error code."""
        operation.load(data)
        operation.keep = (data, target)
        operation.handler = handler
        self._pending[operation.address] = operation
        operation.Internal = 0
        if not _win32.hot_send_to(
            self._argument,
            operation.wsabuf,
            1,
            None,
            0,
            target.argument,
            target.length,
            operation.overlapped,
            None,
        ):
            return PENDING
        code = ctypes.get_last_error()
        # As law 5: a warning, which is what Wine makes of a datagram that is too large, has a packet.
        if code == WSAEMSGSIZE and operation.Internal & 0xFFFFFFFF == STATUS_BUFFER_OVERFLOW:
            return PENDING
        if code != PENDING:
            del self._pending[operation.address]
        return code

    # -- multicast ------------------------------------------------------------------------------------------

    def membership(self, join: bool, group: bytes, interface: bytes | int, source: bytes | None) -> None:
        """Join or leave a group on an interface, from any source or one; OSError where the system refuses."""
        if self.family == socket.AF_INET:
            assert isinstance(interface, bytes)
            if source is None:
                name = socket.IP_ADD_MEMBERSHIP if join else socket.IP_DROP_MEMBERSHIP
                request: Any = _win32.IP_MREQ(tuple(group), tuple(interface))
            else:
                name = _win32.IP_ADD_SOURCE_MEMBERSHIP if join else _win32.IP_DROP_SOURCE_MEMBERSHIP
                request = _win32.IP_MREQ_SOURCE(tuple(group), tuple(source), tuple(interface))
            self._python.setsockopt(socket.IPPROTO_IP, name, bytes(request))
            return
        assert isinstance(interface, int)
        if source is None:
            name = socket.IPV6_JOIN_GROUP if join else socket.IPV6_LEAVE_GROUP
            request = _win32.IPV6_MREQ(tuple(group), interface)
        else:
            name = _win32.MCAST_JOIN_SOURCE_GROUP if join else _win32.MCAST_LEAVE_SOURCE_GROUP
            request = _win32.GROUP_SOURCE_REQ(interface, _storage(group), _storage(source))
        self._python.setsockopt(socket.IPPROTO_IPV6, name, bytes(request))

    # -- the end --------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask for the end of all that is in flight; each operation still has its packet."""
        _win32.CancelIoEx(self._handle, None)

    def close(self) -> None:
        """Close the handle; twice is once."""
        if self._proactor is not None:
            self._proactor.sockets.discard(self._handle)
        self._handle = _win32.INVALID_SOCKET
        self._python.close()


def _storage(number: bytes) -> Any:
    """Make the SOCKADDR_STORAGE of an IPv6 address without a port."""
    raw = bytes((_win32.AF_INET6, 0)) + bytes(6) + number
    return _win32.SOCKADDR_STORAGE.from_buffer_copy(raw.ljust(_win32.SOCKADDR_STORAGE_SIZE, b"\0"))


def open_datagram(
    family: int, kind: int, protocol: int, address: Address, reuse: bool, dualstack: bool
) -> DatagramSocket:
    """Make a bound socket; PermissionError or OSError says what could not be had.

    Nobody else can bind over it, unless `reuse` says that they may.
    """
    try:
        made = socket.socket(family, kind, protocol)
    except OSError as exc:
        code = getattr(exc, "winerror", None) or exc.errno or 0
        if kind == socket.SOCK_RAW and code in (10013, errno.EPERM, errno.EACCES):
            text = "raw sockets (type=SOCK_RAW) are for administrators: run this program elevated"
            raise PermissionError(errno.EACCES, text) from exc
        raise error_from_code(code, f"cannot make a socket for protocol={protocol}") from exc
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if reuse else socket.SO_EXCLUSIVEADDRUSE, 1)
        if family == socket.AF_INET6 and kind == socket.SOCK_DGRAM:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dualstack)
        made.bind(address)
    except OSError as exc:
        made.close()
        code = getattr(exc, "winerror", None) or exc.errno or 0
        raise error_from_code(code, f"cannot bind to {format_address(address)}") from exc
    return DatagramSocket(made)


_trial: list[bool] = []
_trial_operations: list[Operation] = []  # for good, in case the system has not done with them


def oversize_has_packet() -> bool:
    """Return whether a receive that reports an oversize datagram at once has a packet as well: see law 5.

    Tried out at the first call; two threads may both do so, and find the same.
    """
    if not _trial:
        _trial.append(_try_oversize())
    return _trial[0]


def _try_oversize(readable: Callable[..., Any] = select.select) -> bool:
    """Receive two bytes into one, from ourselves; True where that cannot be tried."""
    try:
        port = CompletionPort()
    except OSError:
        return True
    try:
        trial = open_datagram(socket.AF_INET, socket.SOCK_DGRAM, 0, ("127.0.0.1", 0), False, False)
    except OSError:
        port.close()
        return True
    ready: deque[tuple[Any, int]] = deque()
    operation = DatagramReceive(1, lambda _operation, _transferred, _status: None)
    try:
        trial.attach(Proactor(), port)
        trial._python.sendto(b"ab", trial.address)
        readable([trial._python], [], [], TRIAL_TIMEOUT)
        _trial_operations.append(operation)
        at_once = _win32.WSARecvFrom(
            trial._handle,
            operation.wsabuf,
            1,
            None,
            operation.flags_argument,
            operation.name_argument,
            operation.name_size_argument,
            operation.overlapped,
            None,
        )
        code = ctypes.get_last_error()
        if not at_once or code != WSAEMSGSIZE:
            trial.cancel()  # the datagram was late, so nothing was learnt: what the I/O manager does
            port.reap(Batch(1), int(TRIAL_TIMEOUT * 1000), ready)
            return True
        return bool(port.reap(Batch(1), 20, ready))
    except OSError:
        return True
    finally:
        trial.close()
        port.close()
