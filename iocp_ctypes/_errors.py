"""THE table of failures: NTSTATUS, Win32 code, Winsock code, exception class, reason (layer P: pure).

Laws
1. A failed operation is decoded from the NTSTATUS in its OVERLAPPED; a failed call from its Winsock or
   Win32 code. Both end in the same row.
2. An exception made here carries `winerror` (the Winsock code) and an `errno` of the running system, on
   Windows and elsewhere, so that the pure tests can check it anywhere.
3. CANCELLED rows are our own doing and never reach a user.
"""

from __future__ import annotations

import errno
import sys
from typing import Final, NamedTuple

from ._lifecycle import CloseReason

STATUS_SUCCESS: Final = 0
#: Never the status of a finished operation on Windows. Wine leaves it behind where it dropped an operation
#: undone, because the thread that issued it ended at that moment.
STATUS_PENDING: Final = 0x103
STATUS_CANCELLED: Final = 0xC0000120
WSA_IO_PENDING: Final = 997
ERROR_OPERATION_ABORTED: Final = 995
ERROR_HANDLE_EOF: Final = 38
ERROR_BROKEN_PIPE: Final = 109
ERROR_PIPE_BUSY: Final = 231
ERROR_NO_DATA: Final = 232
ERROR_PIPE_CONNECTED: Final = 535
WSAENOTSOCK: Final = 10038
WSAEINVAL: Final = 10022
WSAEWOULDBLOCK: Final = 10035
WSAENOBUFS: Final = 10055
WSAEMFILE: Final = 10024
WSAEADDRINUSE: Final = 10048
WSAECONNRESET: Final = 10054


class ConnectionClosedError(ConnectionError):
    """Raised by the sending methods of a connection that is closing or closed."""


class Failure(NamedTuple):
    """One row: the codes under which one failure is reported, and what it means here."""

    statuses: tuple[int, ...]
    win32: tuple[int, ...]
    winsock: int
    exception: type[OSError]
    errno_name: str
    reason: CloseReason
    text: str


def _row(
    statuses: tuple[int, ...],
    win32: tuple[int, ...],
    winsock: int,
    exception: type[OSError],
    errno_name: str,
    reason: CloseReason,
    text: str,
) -> Failure:
    return Failure(statuses, win32, winsock, exception, errno_name, reason, text)


# Win32 64 (NETNAME_DELETED) stands for both a peer's reset and a local close; our own closing flag tells
# them apart.
TABLE: Final[tuple[Failure, ...]] = (
    _row(
        (0xC000020D, 0xC000013C),
        (64,),
        10054,
        ConnectionResetError,
        "ECONNRESET",
        CloseReason.RESET,
        "the peer reset the connection",
    ),
    _row(
        (0xC000013B, 0xC0000241),
        (1236,),
        10053,
        ConnectionAbortedError,
        "ECONNABORTED",
        CloseReason.ABORTED,
        "the connection was given up by this system",
    ),
    _row(
        (STATUS_CANCELLED,),
        (),
        ERROR_OPERATION_ABORTED,
        ConnectionAbortedError,
        "ECANCELED",
        CloseReason.ABORTED,
        "the operation was cancelled",
    ),
    # The two statuses with which Wine completes operations of a socket that was closed under them.
    _row(
        (0x8000000A, 0xC0000024),
        (6,),
        10038,
        ConnectionAbortedError,
        "ENOTSOCK",
        CloseReason.ABORTED,
        "the socket was closed during the operation",
    ),
    _row(
        (0xC0000140, 0xC000020C),
        (2250,),
        10057,
        ConnectionResetError,
        "ENOTCONN",
        CloseReason.RESET,
        "the socket is not connected any more",
    ),
    _row(
        (0xC0000236,),
        (1225,),
        10061,
        ConnectionRefusedError,
        "ECONNREFUSED",
        CloseReason.REFUSED,
        "the connection was refused: nothing listens there",
    ),
    _row(
        (0xC00000B5,),
        (121,),
        10060,
        TimeoutError,
        "ETIMEDOUT",
        CloseReason.TIMEOUT,
        "the peer does not answer",
    ),
    _row(
        (0xC000023C,),
        (1231,),
        10051,
        OSError,
        "ENETUNREACH",
        CloseReason.TIMEOUT,
        "the network is unreachable",
    ),
    _row(
        (0xC000023D,), (1232,), 10065, OSError, "EHOSTUNREACH", CloseReason.TIMEOUT, "the host is unreachable"
    ),
    _row(
        (0xC000023F,),
        (1234,),
        10054,
        ConnectionResetError,
        "ECONNRESET",
        CloseReason.RESET,
        "the peer reported its port unreachable",
    ),
    _row(
        (0x80000005,),
        (234,),
        10040,
        OSError,
        "EMSGSIZE",
        CloseReason.ABORTED,
        "the message was larger than the buffer",
    ),
    _row(
        (0xC000009A, 0xC0000017, 0xC0000044, 0xC000012D),
        (8, 1450, 1453, 1454, 1455, 1816),
        10055,
        OSError,
        "ENOBUFS",
        CloseReason.ABORTED,
        "the system is short of buffers or quota",
    ),
    _row(
        (),
        (),
        10035,
        BlockingIOError,
        "EWOULDBLOCK",
        CloseReason.ABORTED,
        "too many overlapped operations are outstanding",
    ),
    _row((), (4,), 10024, OSError, "EMFILE", CloseReason.ABORTED, "too many sockets are open"),
    _row(
        (0xC000020A, 0xC0000043),
        (),
        10048,
        OSError,
        "EADDRINUSE",
        CloseReason.ABORTED,
        "the address is in use",
    ),
    _row(
        (0xC0000141,),
        (1214,),
        10049,
        OSError,
        "EADDRNOTAVAIL",
        CloseReason.ABORTED,
        "the address is not one of this machine",
    ),
    _row((0xC0000022,), (5,), 10013, PermissionError, "EACCES", CloseReason.ABORTED, "access is denied"),
    _row((0xC000000D,), (87,), 10022, OSError, "EINVAL", CloseReason.ABORTED, "an argument is not valid"),
    # Named pipes have codes of their own; these rows have no Winsock code, so the Win32 code stands for it.
    _row((0xC0000034,), (2,), 2, FileNotFoundError, "ENOENT", CloseReason.REFUSED, "there is no such pipe"),
    _row((0xC000014B,), (109,), 109, BrokenPipeError, "EPIPE", CloseReason.RESET, "the other end has closed"),
    _row(
        (0xC00000AC, 0xC00000AE),
        (231,),
        231,
        BlockingIOError,
        "EAGAIN",
        CloseReason.REFUSED,
        "all instances of the pipe are taken",
    ),
    _row((0xC00000B1,), (232,), 232, BrokenPipeError, "EPIPE", CloseReason.RESET, "the other end has closed"),
    _row(
        (0xC00000B0,),
        (233,),
        233,
        ConnectionResetError,
        "ECONNRESET",
        CloseReason.RESET,
        "the other end broke the pipe off",
    ),
    _row((), (), 10058, BrokenPipeError, "EPIPE", CloseReason.ABORTED, "sending was shut down"),
    _row((0xC0000005,), (998,), 10014, OSError, "EFAULT", CloseReason.ABORTED, "a pointer is not valid"),
)

_BY_STATUS: Final = {status: row for row in TABLE for status in row.statuses}
# The first row that names a code owns it, so that 10054 means a reset and not an unreachable port.
_BY_CODE: Final = {code: row for row in reversed(TABLE) for code in (*row.win32, row.winsock)}

#: Codes after which the same call may succeed a moment later.
RESOURCE_CODES: Final = frozenset({WSAENOBUFS, WSAEWOULDBLOCK, WSAEMFILE, 8, 4, 1450, 1453, 1454, 1455, 1816})


def winsock_code(status: int) -> int:
    """Return the Winsock code of an NTSTATUS, or 0 where the table does not know it."""
    row = _BY_STATUS.get(status & 0xFFFFFFFF)
    return row.winsock if row else 0


def reason_of(code: int) -> CloseReason:
    """Return why a connection ends that failed with this Win32 or Winsock code."""
    row = _BY_CODE.get(code)
    return row.reason if row else CloseReason.ABORTED


def error_from_code(code: int, what: str = "") -> OSError:
    """Make the exception of a Win32 or Winsock code.

    Args:
        code: the code a failed call left behind.
        what: what was tried, for the message; may be empty.

    Returns:
        An OSError of the fitting subclass; `winerror` is the Winsock code where there is one.
    """
    row = _BY_CODE.get(code)
    if row is None:
        return _make(OSError, "EIO", code, what, f"Windows reported error {code}")
    return _make(row.exception, row.errno_name, row.winsock, what, row.text)


def error_from_status(status: int, what: str = "") -> OSError:
    """Make the exception of an NTSTATUS out of OVERLAPPED.Internal; see `error_from_code`."""
    row = _BY_STATUS.get(status & 0xFFFFFFFF)
    if row is None:
        return _make(
            OSError, "EIO", 0, what, f"the operation failed with NTSTATUS 0x{status & 0xFFFFFFFF:08X}"
        )
    return _make(row.exception, row.errno_name, row.winsock, what, row.text)


def _make(kind: type[OSError], errno_name: str, code: int, what: str, text: str) -> OSError:
    number = getattr(errno, errno_name, errno.EIO)
    message = f"{what}: {text}" if what else text
    if code and sys.platform != "win32":  # there `winerror` makes str() begin so by itself
        message = f"[WinError {code}] {message}"
    exc = kind(number, message)
    if code:
        exc.winerror = code
    return exc
