"""L1: structures, constants and prototypes for files and named pipes. The laws are those of `_win32`.

What `_win32` declares for sockets and ports, this declares for files that are sent, for named pipes and for
who may use those: kernel32, advapi32, ntdll and the extension TransmitFile. No state, no policy.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_int, c_int16, c_int64, c_uint32, c_void_p, c_wchar_p
from typing import Any, Final

from ._win32 import BOOL, DWORD, GUID, HANDLE, NTSTATUS, SOCKET, ULONG, ULONG_PTR

GENERIC_READ: Final = 0x80000000
GENERIC_WRITE: Final = 0x40000000
FILE_SHARE_READ: Final = 0x1
FILE_SHARE_WRITE: Final = 0x2
FILE_SHARE_DELETE: Final = 0x4
OPEN_EXISTING: Final = 3
FILE_FLAG_OVERLAPPED: Final = 0x40000000
FILE_FLAG_SEQUENTIAL_SCAN: Final = 0x08000000
FILE_FLAG_FIRST_PIPE_INSTANCE: Final = 0x00080000
SECURITY_SQOS_PRESENT: Final = 0x00100000
SECURITY_IDENTIFICATION: Final = 0x00010000
FILE_TYPE_DISK: Final = 1
POLLERR: Final = 0x0001
POLLHUP: Final = 0x0002
POLLWRNORM: Final = 0x0010
DUPLICATE_SAME_ACCESS: Final = 2
PIPE_ACCESS_DUPLEX: Final = 3
PIPE_REJECT_REMOTE_CLIENTS: Final = 8  # with PIPE_TYPE_BYTE, PIPE_READMODE_BYTE and PIPE_WAIT, which are 0
PIPE_UNLIMITED_INSTANCES: Final = 255
TOKEN_QUERY: Final = 8
TOKEN_USER_CLASS: Final = 1  # TokenUser of TOKEN_INFORMATION_CLASS
SDDL_REVISION_1: Final = 1
FILE_IO_COMPLETION_NOTIFICATION: Final = 41  # FileIoCompletionNotificationInformation
FILE_REPLACE_COMPLETION: Final = 61  # FileReplaceCompletionInformation, Windows 8.1 and later
VER_NT_WORKSTATION: Final = 1
#: The most bytes of one TransmitFile, header and trailer included: 2^31 - 2.
TRANSMIT_MAX: Final = 2_147_483_646


class TRANSMIT_FILE_BUFFERS(ctypes.Structure):
    """mswsock.h. What TransmitFile sends before and after the file."""

    _fields_ = (("Head", c_void_p), ("HeadLength", DWORD), ("Tail", c_void_p), ("TailLength", DWORD))


class WSAPOLLFD(ctypes.Structure):
    """winsock2.h."""

    _fields_ = (("fd", SOCKET), ("events", c_int16), ("revents", c_int16))


class SECURITY_ATTRIBUTES(ctypes.Structure):
    """minwinbase.h."""

    _fields_ = (("nLength", DWORD), ("lpSecurityDescriptor", c_void_p), ("bInheritHandle", BOOL))


class IO_STATUS_BLOCK(ctypes.Structure):
    """wdm.h; Status shares its word with a pointer."""

    _fields_ = (("Status", ULONG_PTR), ("Information", ULONG_PTR))


class FILE_COMPLETION_INFORMATION(ctypes.Structure):
    """ntifs.h; a Port of 0 takes the file off its completion port."""

    _fields_ = (("Port", HANDLE), ("Key", ULONG_PTR))


WSAID_TRANSMITFILE: Final = GUID(
    0xB5367DF0, 0xCBAC, 0x11CF, (ctypes.c_uint8 * 8)(0x95, 0xCA, 0x00, 0x80, 0x5F, 0x48, 0xA1, 0x92)
)

if sys.platform == "win32":
    from ctypes import WINFUNCTYPE, WinDLL
    from msvcrt import get_osfhandle as get_osfhandle  # from what Python calls a file descriptor

    from ._win32 import _bind

    _kernel32 = WinDLL("kernel32", use_last_error=True)
    _advapi32 = WinDLL("advapi32", use_last_error=True)
    _ntdll = WinDLL("ntdll")
    _ws2_32 = WinDLL("ws2_32", use_last_error=True)

    # BOOL TransmitFile(SOCKET, HANDLE file, DWORD bytes, DWORD bytes per send, OVERLAPPED *, TRANSMIT_FILE_
    # BUFFERS * or NULL, DWORD flags). FALSE on failure, ERROR_IO_PENDING among them; begins at the Offset of
    # the OVERLAPPED. At most TRANSMIT_MAX bytes; 0 bytes are the whole file. May read the disk before it
    # returns. Windows for workstations carries out two at a time in the whole system, the others wait.
    # learn.microsoft.com/windows/win32/api/mswsock/nf-mswsock-transmitfile
    TRANSMITFILE = WINFUNCTYPE(
        BOOL, SOCKET, HANDLE, DWORD, DWORD, c_void_p, c_void_p, DWORD, use_last_error=True
    )
    # int WSAPoll(WSAPOLLFD *in out, ULONG count, INT milliseconds). How many have events; SOCKET_ERROR on
    # failure. Does not block with 0 ms. learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsapoll
    WSAPoll = _bind(_ws2_32, "WSAPoll", c_int, POINTER(WSAPOLLFD), ULONG, c_int)
    # HANDLE ReOpenFile(HANDLE, DWORD access, DWORD share, DWORD flags). INVALID_HANDLE_VALUE on failure. A
    # file object of its own, with its own position and flags.
    # learn.microsoft.com/windows/win32/api/winbase/nf-winbase-reopenfile
    ReOpenFile = _bind(_kernel32, "ReOpenFile", HANDLE, HANDLE, DWORD, DWORD, DWORD)
    # BOOL DuplicateHandle(HANDLE process, HANDLE, HANDLE process, HANDLE *out, DWORD access, BOOL inherit,
    # DWORD options). FALSE on failure. Does not block.
    # learn.microsoft.com/windows/win32/api/handleapi/nf-handleapi-duplicatehandle
    DuplicateHandle = _bind(
        _kernel32, "DuplicateHandle", BOOL, HANDLE, HANDLE, HANDLE, POINTER(HANDLE), DWORD, BOOL, DWORD
    )
    # DWORD GetFileType(HANDLE). FILE_TYPE_UNKNOWN (0) on failure.
    # learn.microsoft.com/windows/win32/api/fileapi/nf-fileapi-getfiletype
    GetFileType = _bind(_kernel32, "GetFileType", DWORD, HANDLE)
    # BOOL GetFileSizeEx(HANDLE, LARGE_INTEGER *out). FALSE on failure.
    # learn.microsoft.com/windows/win32/api/fileapi/nf-fileapi-getfilesizeex
    GetFileSizeEx = _bind(_kernel32, "GetFileSizeEx", BOOL, HANDLE, POINTER(c_int64))
    # BOOL ReadFile(HANDLE, void *buffer, DWORD size, DWORD *read or NULL, OVERLAPPED *). FALSE on failure,
    # ERROR_IO_PENDING among them; reads at the Offset of the OVERLAPPED. Blocks only where the handle was
    # opened without FILE_FLAG_OVERLAPPED. learn.microsoft.com/windows/win32/api/fileapi/nf-fileapi-readfile
    ReadFile = _bind(_kernel32, "ReadFile", BOOL, HANDLE, c_void_p, DWORD, POINTER(DWORD), c_void_p)
    # BOOL WriteFile(HANDLE, const void *, DWORD size, DWORD *written or NULL, OVERLAPPED *). As ReadFile; the
    # buffer belongs to the kernel until the packet.
    # learn.microsoft.com/windows/win32/api/fileapi/nf-fileapi-writefile
    WriteFile = _bind(_kernel32, "WriteFile", BOOL, HANDLE, c_void_p, DWORD, POINTER(DWORD), c_void_p)
    # HANDLE CreateFileW(const wchar_t *, DWORD access, DWORD share, SECURITY_ATTRIBUTES *, DWORD disposition,
    # DWORD flags, HANDLE template). INVALID_HANDLE_VALUE on failure; for a pipe ERROR_PIPE_BUSY where no
    # instance waits: it does not block then.
    # learn.microsoft.com/windows/win32/api/fileapi/nf-fileapi-createfilew
    CreateFileW = _bind(
        _kernel32, "CreateFileW", HANDLE, c_wchar_p, DWORD, DWORD, c_void_p, DWORD, DWORD, HANDLE
    )
    # HANDLE CreateNamedPipeW(const wchar_t *, DWORD open mode, DWORD pipe mode, DWORD instances, DWORD out
    # buffer, DWORD in buffer, DWORD time-out ms, SECURITY_ATTRIBUTES *). INVALID_HANDLE_VALUE on failure:
    # ERROR_ACCESS_DENIED where FIRST_PIPE_INSTANCE is not. Does not block.
    # learn.microsoft.com/windows/win32/api/namedpipeapi/nf-namedpipeapi-createnamedpipew
    CreateNamedPipeW = _bind(
        _kernel32, "CreateNamedPipeW", HANDLE, c_wchar_p, DWORD, DWORD, DWORD, DWORD, DWORD, DWORD, c_void_p
    )
    # BOOL ConnectNamedPipe(HANDLE, OVERLAPPED *). FALSE on failure: ERROR_IO_PENDING, ERROR_PIPE_CONNECTED
    # where a client was faster (there is no packet then), ERROR_NO_DATA where it has gone already.
    # learn.microsoft.com/windows/win32/api/namedpipeapi/nf-namedpipeapi-connectnamedpipe
    ConnectNamedPipe = _bind(_kernel32, "ConnectNamedPipe", BOOL, HANDLE, c_void_p)
    # BOOL DisconnectNamedPipe(HANDLE). FALSE on failure. What the client has not read is lost. Does not
    # block.
    # learn.microsoft.com/windows/win32/api/namedpipeapi/nf-namedpipeapi-disconnectnamedpipe
    DisconnectNamedPipe = _bind(_kernel32, "DisconnectNamedPipe", BOOL, HANDLE)
    # BOOL GetNamedPipeClientProcessId(HANDLE, ULONG *out). FALSE on failure.
    # learn.microsoft.com/windows/win32/api/winbase/nf-winbase-getnamedpipeclientprocessid
    GetNamedPipeClientProcessId = _bind(
        _kernel32, "GetNamedPipeClientProcessId", BOOL, HANDLE, POINTER(ULONG)
    )
    # BOOL GetNamedPipeServerProcessId(HANDLE, ULONG *out). FALSE on failure.
    # learn.microsoft.com/windows/win32/api/winbase/nf-winbase-getnamedpipeserverprocessid
    GetNamedPipeServerProcessId = _bind(
        _kernel32, "GetNamedPipeServerProcessId", BOOL, HANDLE, POINTER(ULONG)
    )
    # HLOCAL LocalFree(HLOCAL). 0 on success.
    # learn.microsoft.com/windows/win32/api/winbase/nf-winbase-localfree
    LocalFree = _bind(_kernel32, "LocalFree", c_void_p, c_void_p)

    # BOOL OpenProcessToken(HANDLE process, DWORD access, HANDLE *out). FALSE on failure.
    # learn.microsoft.com/windows/win32/api/processthreadsapi/nf-processthreadsapi-openprocesstoken
    OpenProcessToken = _bind(_advapi32, "OpenProcessToken", BOOL, HANDLE, DWORD, POINTER(HANDLE))
    # BOOL GetTokenInformation(HANDLE, class, void *out, DWORD size, DWORD *needed out). FALSE on failure. For
    # TokenUser the buffer begins with a pointer to the SID, which is in the buffer as well.
    # learn.microsoft.com/windows/win32/api/securitybaseapi/nf-securitybaseapi-gettokeninformation
    GetTokenInformation = _bind(
        _advapi32, "GetTokenInformation", BOOL, HANDLE, DWORD, c_void_p, DWORD, POINTER(DWORD)
    )
    # BOOL ConvertSidToStringSidW(SID *, wchar_t **out). FALSE on failure; the string goes to LocalFree.
    # learn.microsoft.com/windows/win32/api/sddl/nf-sddl-convertsidtostringsidw
    ConvertSidToStringSidW = _bind(_advapi32, "ConvertSidToStringSidW", BOOL, c_void_p, POINTER(c_void_p))
    # BOOL ConvertStringSecurityDescriptorToSecurityDescriptorW(const wchar_t *, DWORD revision, void **out,
    # ULONG *size out or NULL). FALSE on failure; the descriptor goes to LocalFree. learn.microsoft.com/
    # windows/win32/api/sddl/nf-sddl-convertstringsecuritydescriptortosecuritydescriptorw
    ConvertStringSecurityDescriptorToSecurityDescriptorW = _bind(
        _advapi32,
        "ConvertStringSecurityDescriptorToSecurityDescriptorW",
        BOOL,
        c_wchar_p,
        DWORD,
        POINTER(c_void_p),
        POINTER(c_uint32),
    )

    # NTSTATUS NtQueryInformationFile(HANDLE, IO_STATUS_BLOCK *out, void *out, ULONG size, class). The result
    # is the status. learn.microsoft.com/windows-hardware/drivers/ddi/ntifs/nf-ntifs-ntqueryinformationfile
    NtQueryInformationFile = _bind(
        _ntdll,
        "NtQueryInformationFile",
        NTSTATUS,
        HANDLE,
        POINTER(IO_STATUS_BLOCK),
        c_void_p,
        ULONG,
        c_uint32,
    )
    # NTSTATUS NtSetInformationFile(HANDLE, IO_STATUS_BLOCK *out, void *, ULONG size, class). The result is
    # the status. learn.microsoft.com/windows-hardware/drivers/ddi/ntifs/nf-ntifs-ntsetinformationfile
    NtSetInformationFile = _bind(
        _ntdll, "NtSetInformationFile", NTSTATUS, HANDLE, POINTER(IO_STATUS_BLOCK), c_void_p, ULONG, c_uint32
    )

    def is_workstation() -> bool:
        """Return whether this Windows is not a server edition (wProductType of OSVERSIONINFOEX)."""
        return sys.getwindowsversion().product_type == VER_NT_WORKSTATION
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ImportError(f"iocp_ctypes needs Windows for {name}: {sys.platform} has no completion ports")
