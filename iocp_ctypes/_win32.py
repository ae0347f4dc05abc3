"""L1: structures, constants and prototypes of kernel32, ntdll and ws2_32. No state, no policy.

Laws
1. Spelling and types are Microsoft's; field widths are exact (DWORD is 32 bits on every system),
   pointer-sized fields come from ctypes, so the structures are right on 32- and 64-bit Windows and can be
   tested anywhere.
2. The DLLs are opened by this module: prototypes set on `ctypes.windll` by others do not touch ours.
3. `use_last_error`: an error code is read with `get_last_error()`, at once, and only after a failure.
4. Each prototype says: the C shape, who writes what, what failure looks like, whether it blocks, the source.
5. Six functions are called for every message. For these a second function object without argtypes exists
   (`HOT`): ctypes then takes ready-made `byref` objects and small ints as they are, which costs 0.3 us a
   call against 0.9 us. Handles go to them only as the object `handle_argument` makes, because a bare int
   would be cut to 32 bits.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import (
    POINTER,
    c_char_p,
    c_int,
    c_int32,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, Final

BOOL = c_int32
DWORD = c_uint32
ULONG = c_uint32
NTSTATUS = c_uint32  # signed in ntdef.h; unsigned is how they are written
ULONG_PTR = c_size_t
HANDLE = c_size_t
SOCKET = c_size_t

INVALID_SOCKET: Final = (1 << (8 * ctypes.sizeof(SOCKET))) - 1
INVALID_HANDLE_VALUE: Final = (1 << (8 * ctypes.sizeof(HANDLE))) - 1
INFINITE: Final = 0xFFFFFFFF
WAIT_TIMEOUT: Final = 258
ERROR_NOT_FOUND: Final = 1168

AF_INET: Final = 2
AF_INET6: Final = 23
SOCK_STREAM: Final = 1
IPPROTO_TCP: Final = 6
SOL_SOCKET: Final = 0xFFFF
SO_LINGER: Final = 0x0080
SO_CONNECT_TIME: Final = 0x700C
SO_UPDATE_ACCEPT_CONTEXT: Final = 0x700B
SO_UPDATE_CONNECT_CONTEXT: Final = 0x7010
SO_PROTOCOL_INFOW: Final = 0x2005
TCP_NODELAY: Final = 0x0001
SD_SEND: Final = 1
SIO_GET_EXTENSION_FUNCTION_POINTER: Final = 0xC8000006
SIO_KEEPALIVE_VALS: Final = 0x98000004
SIO_TCP_INITIAL_RTO: Final = 0x98000011
TCP_INITIAL_RTO_UNSPECIFIED_RTT: Final = 0xFFFF
TCP_INITIAL_RTO_NO_SYN_RETRANSMISSIONS: Final = 0xFE
WSA_FLAG_OVERLAPPED: Final = 0x01
WSA_FLAG_NO_HANDLE_INHERIT: Final = 0x80
XP1_IFS_HANDLES: Final = 0x00020000
FILE_SKIP_COMPLETION_PORT_ON_SUCCESS: Final = 0x1
FILE_SKIP_SET_EVENT_ON_HANDLE: Final = 0x2
CONNECT_TIME_NOT_CONNECTED: Final = 0xFFFFFFFF
WINSOCK_VERSION: Final = 0x0202
SIO_UDP_CONNRESET: Final = 0x9800000C
SIO_UDP_NETRESET: Final = 0x9800000F
IP_ADD_SOURCE_MEMBERSHIP: Final = 15
IP_DROP_SOURCE_MEMBERSHIP: Final = 16
MCAST_JOIN_SOURCE_GROUP: Final = 45
MCAST_LEAVE_SOURCE_GROUP: Final = 46


class OVERLAPPED(ctypes.Structure):
    """minwinbase.h.

    The kernel writes Internal (the NTSTATUS) and InternalHigh (bytes) until the packet is queued.
    """

    _fields_ = (
        ("Internal", ULONG_PTR),
        ("InternalHigh", ULONG_PTR),
        ("Offset", DWORD),
        ("OffsetHigh", DWORD),
        ("hEvent", HANDLE),
    )


class OVERLAPPED_ENTRY(ctypes.Structure):
    """minwinbase.h. What GetQueuedCompletionStatusEx fills; Internal is documented as reserved."""

    _fields_ = (
        ("lpCompletionKey", ULONG_PTR),
        ("lpOverlapped", ULONG_PTR),
        ("Internal", ULONG_PTR),
        ("dwNumberOfBytesTransferred", DWORD),
    )


class WSABUF(ctypes.Structure):
    """ws2def.h. A buffer of a scatter or gather list."""

    _fields_ = (("len", ULONG), ("buf", c_void_p))


class TRANSFER(OVERLAPPED):
    """Ours: an OVERLAPPED, the one WSABUF and the flags of a send or receive in one block of memory.

    `len` and `buf` have WSABUF's layout; `buf` takes a bytes object or an address.
    """

    _fields_ = (("len", ULONG), ("buf", c_char_p), ("flags", DWORD))  # type: ignore[assignment]  # appended


class GUID(ctypes.Structure):
    """guiddef.h."""

    _fields_ = (("Data1", DWORD), ("Data2", c_uint16), ("Data3", c_uint16), ("Data4", c_uint8 * 8))


class LINGER(ctypes.Structure):
    """winsock2.h."""

    _fields_ = (("l_onoff", c_uint16), ("l_linger", c_uint16))


class TCP_KEEPALIVE(ctypes.Structure):
    """mstcpip.h, struct tcp_keepalive; times in milliseconds."""

    _fields_ = (("onoff", ULONG), ("keepalivetime", ULONG), ("keepaliveinterval", ULONG))


class TCP_INITIAL_RTO_PARAMETERS(ctypes.Structure):
    """mstcpip.h; Rtt in milliseconds."""

    _fields_ = (("Rtt", c_uint16), ("MaxSynRetransmissions", c_uint8))


class WSAPROTOCOLCHAIN(ctypes.Structure):
    """winsock2.h."""

    _fields_ = (("ChainLen", c_int32), ("ChainEntries", DWORD * 7))


class WSAPROTOCOL_INFOW(ctypes.Structure):
    """winsock2.h; szProtocol is 256 UTF-16 units."""

    _fields_ = (
        ("dwServiceFlags1", DWORD),
        ("dwServiceFlags2", DWORD),
        ("dwServiceFlags3", DWORD),
        ("dwServiceFlags4", DWORD),
        ("dwProviderFlags", DWORD),
        ("ProviderId", GUID),
        ("dwCatalogEntryId", DWORD),
        ("ProtocolChain", WSAPROTOCOLCHAIN),
        ("iVersion", c_int32),
        ("iAddressFamily", c_int32),
        ("iMaxSockAddr", c_int32),
        ("iMinSockAddr", c_int32),
        ("iSocketType", c_int32),
        ("iProtocol", c_int32),
        ("iProtocolMaxOffset", c_int32),
        ("iNetworkByteOrder", c_int32),
        ("iSecurityScheme", c_int32),
        ("dwMessageSize", DWORD),
        ("dwProviderReserved", DWORD),
        ("szProtocol", c_uint16 * 256),
    )


class IP_MREQ(ctypes.Structure):
    """ws2ipdef.h; IPv4 addresses in network byte order."""

    _fields_ = (("imr_multiaddr", c_uint8 * 4), ("imr_interface", c_uint8 * 4))


class IP_MREQ_SOURCE(ctypes.Structure):
    """ws2ipdef.h; the source stands before the interface, other than on Linux."""

    _fields_ = (
        ("imr_multiaddr", c_uint8 * 4),
        ("imr_sourceaddr", c_uint8 * 4),
        ("imr_interface", c_uint8 * 4),
    )


class IPV6_MREQ(ctypes.Structure):
    """ws2ipdef.h; the interface is an index, 0: the system chooses."""

    _fields_ = (("ipv6mr_multiaddr", c_uint8 * 16), ("ipv6mr_interface", ULONG))


class SOCKADDR_STORAGE(ctypes.Structure):
    """ws2def.h; room for any address, aligned to eight bytes on every Windows."""

    _fields_ = (("ss_family", c_uint16), ("pad1", c_uint8 * 6), ("align", c_uint64), ("pad2", c_uint8 * 112))


class GROUP_SOURCE_REQ(ctypes.Structure):
    """ws2ipdef.h; membership of one source, of either family."""

    _fields_ = (("gsr_interface", ULONG), ("gsr_group", SOCKADDR_STORAGE), ("gsr_source", SOCKADDR_STORAGE))


#: Bytes of a SOCKADDR_STORAGE; AcceptEx wants 16 more for each of its two addresses.
SOCKADDR_STORAGE_SIZE: Final = 128
ACCEPT_ADDRESS_SIZE: Final = SOCKADDR_STORAGE_SIZE + 16

WSAID_ACCEPTEX: Final = GUID(
    0xB5367DF1, 0xCBAC, 0x11CF, (c_uint8 * 8)(0x95, 0xCA, 0x00, 0x80, 0x5F, 0x48, 0xA1, 0x92)
)
WSAID_GETACCEPTEXSOCKADDRS: Final = GUID(
    0xB5367DF2, 0xCBAC, 0x11CF, (c_uint8 * 8)(0x95, 0xCA, 0x00, 0x80, 0x5F, 0x48, 0xA1, 0x92)
)
WSAID_CONNECTEX: Final = GUID(
    0x25A207B9, 0xDDF3, 0x4660, (c_uint8 * 8)(0x8E, 0xE9, 0x76, 0xE5, 0x8C, 0x74, 0x06, 0x3E)
)


def handle_argument(handle: int) -> Any:
    """Make the argument under which a HOT function takes a handle or socket.

    Pointer-sized, made once per handle.
    """
    return c_void_p.from_param(handle)


if sys.platform == "win32":
    from _ctypes import FUNCFLAG_PYTHONAPI, FUNCFLAG_STDCALL
    from ctypes import WINFUNCTYPE, WinDLL
    from ctypes import get_last_error as get_last_error  # for who calls: elsewhere ctypes has none

    _kernel32 = WinDLL("kernel32", use_last_error=True)
    _ws2_32 = WinDLL("ws2_32", use_last_error=True)
    _ntdll = WinDLL("ntdll")

    def _bind(dll: WinDLL, name: str, restype: Any, *argtypes: Any) -> Any:
        function = getattr(dll, name)
        function.restype = restype
        function.argtypes = argtypes
        return function

    # HANDLE CreateIoCompletionPort(HANDLE FileHandle, HANDLE ExistingPort, ULONG_PTR Key, DWORD
    # NumberOfThreads) 0 on failure. Does not block.
    # learn.microsoft.com/windows/win32/fileio/createiocompletionport
    CreateIoCompletionPort = _bind(
        _kernel32, "CreateIoCompletionPort", HANDLE, HANDLE, HANDLE, ULONG_PTR, DWORD
    )
    # BOOL GetQueuedCompletionStatusEx(HANDLE, OVERLAPPED_ENTRY *out, ULONG count, ULONG *removed out, DWORD
    # ms, BOOL) FALSE on failure and on time-out (WAIT_TIMEOUT). Blocks up to ms.
    # learn.microsoft.com/windows/win32/fileio/getqueuedcompletionstatusex-func
    GetQueuedCompletionStatusEx = _bind(
        _kernel32,
        "GetQueuedCompletionStatusEx",
        BOOL,
        HANDLE,
        POINTER(OVERLAPPED_ENTRY),
        ULONG,
        POINTER(ULONG),
        DWORD,
        BOOL,
    )
    # BOOL PostQueuedCompletionStatus(HANDLE, DWORD bytes, ULONG_PTR key, OVERLAPPED *)
    # FALSE on failure. Does not block. learn.microsoft.com/windows/win32/fileio/postqueuedcompletionstatus
    PostQueuedCompletionStatus = _bind(
        _kernel32, "PostQueuedCompletionStatus", BOOL, HANDLE, DWORD, ULONG_PTR, c_void_p
    )
    # BOOL CloseHandle(HANDLE). FALSE on failure.
    # learn.microsoft.com/windows/win32/api/handleapi/nf-handleapi-closehandle
    CloseHandle = _bind(_kernel32, "CloseHandle", BOOL, HANDLE)
    # BOOL CancelIoEx(HANDLE, OVERLAPPED *or NULL for all of the handle). FALSE with ERROR_NOT_FOUND where
    # nothing was pending; the operations still complete through the port. Does not block.
    # learn.microsoft.com/windows/win32/fileio/cancelioex-func
    CancelIoEx = _bind(_kernel32, "CancelIoEx", BOOL, HANDLE, c_void_p)
    # BOOL SetFileCompletionNotificationModes(HANDLE, UCHAR flags). FALSE on failure. Does not block.
    # learn.microsoft.com/windows/win32/api/winbase/nf-winbase-setfilecompletionnotificationmodes
    SetFileCompletionNotificationModes = _bind(
        _kernel32, "SetFileCompletionNotificationModes", BOOL, HANDLE, c_uint8
    )
    # BOOL GetProcessHandleCount(HANDLE process, DWORD *out). FALSE on failure.
    # learn.microsoft.com/windows/win32/api/processthreadsapi/nf-processthreadsapi-getprocesshandlecount
    GetProcessHandleCount = _bind(_kernel32, "GetProcessHandleCount", BOOL, HANDLE, POINTER(DWORD))
    # HANDLE GetCurrentProcess(void). A pseudo handle; cannot fail.
    # learn.microsoft.com/windows/win32/api/processthreadsapi/nf-processthreadsapi-getcurrentprocess
    GetCurrentProcess = _bind(_kernel32, "GetCurrentProcess", HANDLE)
    # ULONG RtlNtStatusToDosError(NTSTATUS). ERROR_MR_MID_NOT_FOUND (317) where there is no such code.
    # learn.microsoft.com/windows/win32/api/winternl/nf-winternl-rtlntstatustodoserror
    RtlNtStatusToDosError = _bind(_ntdll, "RtlNtStatusToDosError", ULONG, NTSTATUS)

    # int WSAStartup(WORD version, WSADATA *out, 408 bytes at the most). Nonzero is the error code.
    # learn.microsoft.com/windows/win32/api/winsock/nf-winsock-wsastartup
    WSAStartup = _bind(_ws2_32, "WSAStartup", c_int, c_uint16, c_void_p)
    # SOCKET WSASocketW(int family, int type, int protocol, WSAPROTOCOL_INFOW *, GROUP, DWORD flags)
    # INVALID_SOCKET on failure. Does not block.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsasocketw
    WSASocketW = _bind(_ws2_32, "WSASocketW", SOCKET, c_int, c_int, c_int, c_void_p, DWORD, DWORD)
    # int closesocket(SOCKET). SOCKET_ERROR on failure. Does not block without SO_LINGER.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-closesocket
    closesocket = _bind(_ws2_32, "closesocket", c_int, SOCKET)
    # int shutdown(SOCKET, int how). SOCKET_ERROR on failure. Does not block.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-shutdown
    shutdown = _bind(_ws2_32, "shutdown", c_int, SOCKET, c_int)
    # int setsockopt(SOCKET, int level, int name, const char *value, int length). SOCKET_ERROR on failure.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-setsockopt
    setsockopt = _bind(_ws2_32, "setsockopt", c_int, SOCKET, c_int, c_int, c_void_p, c_int)
    # int getsockopt(SOCKET, int level, int name, char *value out, int *length in out). SOCKET_ERROR on
    # failure.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-getsockopt
    getsockopt = _bind(_ws2_32, "getsockopt", c_int, SOCKET, c_int, c_int, c_void_p, POINTER(c_int))
    # int getpeername(SOCKET, sockaddr *out, int *length in out). SOCKET_ERROR on failure.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-getpeername
    getpeername = _bind(_ws2_32, "getpeername", c_int, SOCKET, c_void_p, POINTER(c_int))
    # int getsockname(SOCKET, sockaddr *out, int *length in out). SOCKET_ERROR on failure.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-getsockname
    getsockname = _bind(_ws2_32, "getsockname", c_int, SOCKET, c_void_p, POINTER(c_int))
    # int WSAIoctl(SOCKET, DWORD code, void *in, DWORD, void *out, DWORD, DWORD *returned, OVERLAPPED *,
    # routine) SOCKET_ERROR on failure. The codes used here do not block.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsaioctl
    WSAIoctl = _bind(
        _ws2_32,
        "WSAIoctl",
        c_int,
        SOCKET,
        DWORD,
        c_void_p,
        DWORD,
        c_void_p,
        DWORD,
        POINTER(DWORD),
        c_void_p,
        c_void_p,
    )
    # int WSARecv(SOCKET, WSABUF *, DWORD count, DWORD *received, DWORD *flags in out, OVERLAPPED *, routine)
    # SOCKET_ERROR on failure, WSA_IO_PENDING among them; buffers and OVERLAPPED belong to the kernel until
    # the packet. `received` is NULL with an OVERLAPPED, as documented.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsarecv
    WSARecv = _bind(
        _ws2_32, "WSARecv", c_int, SOCKET, c_void_p, DWORD, POINTER(DWORD), c_void_p, c_void_p, c_void_p
    )
    # int WSASend(SOCKET, WSABUF *, DWORD count, DWORD *sent, DWORD flags, OVERLAPPED *, routine)
    # As WSARecv. learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsasend
    WSASend = _bind(
        _ws2_32, "WSASend", c_int, SOCKET, c_void_p, DWORD, POINTER(DWORD), DWORD, c_void_p, c_void_p
    )
    # int connect(SOCKET, const sockaddr *, int length). SOCKET_ERROR on failure. A datagram socket only notes
    # the address: does not block. learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-connect
    connect = _bind(_ws2_32, "connect", c_int, SOCKET, c_void_p, c_int)
    # int WSARecvFrom(SOCKET, WSABUF *, DWORD count, DWORD *received, DWORD *flags in out, sockaddr *from,
    # int *length in out, OVERLAPPED *, routine) SOCKET_ERROR on failure, WSA_IO_PENDING among them. Windows
    # writes buffer, flags, `from` and `length` until the packet: all four belong to the operation. A datagram
    # larger than the buffer fills it and reports WSAEMSGSIZE, at once or in the packet
    # (STATUS_BUFFER_OVERFLOW). Does not block with an OVERLAPPED.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsarecvfrom
    WSARecvFrom = _bind(
        _ws2_32,
        "WSARecvFrom",
        c_int,
        SOCKET,
        c_void_p,
        DWORD,
        POINTER(DWORD),
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
    )
    # int WSASendTo(SOCKET, WSABUF *, DWORD count, DWORD *sent out, DWORD flags, const sockaddr *to or NULL,
    # int length, OVERLAPPED *or NULL, routine) SOCKET_ERROR on failure, WSA_IO_PENDING among them. Without an
    # OVERLAPPED `sent` must be given; on a socket with FIONBIO it then fails with WSAEWOULDBLOCK where it
    # would have to wait. Does not block on such a socket, nor with an OVERLAPPED.
    # learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsasendto
    WSASendTo = _bind(
        _ws2_32,
        "WSASendTo",
        c_int,
        SOCKET,
        c_void_p,
        DWORD,
        POINTER(DWORD),
        DWORD,
        c_void_p,
        c_int,
        c_void_p,
        c_void_p,
    )
    # BOOL AcceptEx(SOCKET listener, SOCKET accept, void *buffer out, DWORD data, DWORD local, DWORD remote,
    #               DWORD *received, OVERLAPPED *). FALSE on failure, ERROR_IO_PENDING among them.
    # learn.microsoft.com/windows/win32/api/mswsock/nf-mswsock-acceptex
    ACCEPTEX = WINFUNCTYPE(
        BOOL, SOCKET, SOCKET, c_void_p, DWORD, DWORD, DWORD, POINTER(DWORD), c_void_p, use_last_error=True
    )
    # BOOL ConnectEx(SOCKET bound, const sockaddr *, int length, void *data, DWORD size, DWORD *sent,
    # OVERLAPPED *) FALSE on failure, ERROR_IO_PENDING among them. The socket must be bound and not
    # connected.
    # learn.microsoft.com/windows/win32/api/mswsock/nc-mswsock-lpfn_connectex
    CONNECTEX = WINFUNCTYPE(
        BOOL, SOCKET, c_void_p, c_int, c_void_p, DWORD, POINTER(DWORD), c_void_p, use_last_error=True
    )
    # void GetAcceptExSockaddrs(void *buffer, DWORD data, DWORD local, DWORD remote, sockaddr **local out,
    #                           int *length out, sockaddr **remote out, int *length out). Pointers into the
    # buffer.
    # learn.microsoft.com/windows/win32/api/mswsock/nf-mswsock-getacceptexsockaddrs
    GETACCEPTEXSOCKADDRS = WINFUNCTYPE(
        None,
        c_void_p,
        DWORD,
        DWORD,
        DWORD,
        POINTER(c_void_p),
        POINTER(c_int),
        POINTER(c_void_p),
        POINTER(c_int),
    )

    class _HeldDLL(ctypes.CDLL):
        """Calls that never block, made with the GIL held.

        Giving it up and taking it back would cost more than the call, and would leave it for 5 ms to whatever
        else computes in the process.
        """

        _func_flags_ = FUNCFLAG_STDCALL | FUNCFLAG_PYTHONAPI

    # The second function objects of law 5: same functions, no argtypes, arguments ready-made by the callers.
    _hot_kernel32 = WinDLL("kernel32", use_last_error=True)
    _held_kernel32 = _HeldDLL("kernel32", use_last_error=True)
    _held_ws2_32 = _HeldDLL("ws2_32", use_last_error=True)
    hot_reap = _hot_kernel32.GetQueuedCompletionStatusEx
    hot_poll = _held_kernel32.GetQueuedCompletionStatusEx  # with a time-out of 0
    hot_receive = _held_ws2_32.WSARecv
    hot_send = _held_ws2_32.WSASend
    hot_receive_from = _held_ws2_32.WSARecvFrom
    hot_send_to = _held_ws2_32.WSASendTo
    HOT: Final = (hot_reap, hot_poll, hot_receive, hot_send, hot_receive_from, hot_send_to)

    def is_wine() -> bool:
        """Return whether this Windows is Wine, where some extensions differ (tests/windows.md lists them)."""
        return hasattr(_ntdll, "wine_get_version")
else:

    def __getattr__(name: str) -> Any:
        # Functions and prototypes; what asks for a dunder name only looks around.
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ImportError(f"iocp_ctypes needs Windows for {name}: {sys.platform} has no completion ports")

    def is_wine() -> bool:
        """Return False: this is not Windows at all."""
        return False
