"""The structures and constants of `_win32.py`, on 64-bit and on 32-bit Windows, against Microsoft's headers.

The structures are made twice from the source, once with each size of a pointer, so that both are tested on
any system.
"""

from __future__ import annotations

import ast
import ctypes
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from layouts import check_layout

from iocp_ctypes import _win32

# Field: (offset on 32-bit, offset on 64-bit); "size": the size of all. Counted by hand from the headers.
LAYOUTS: dict[str, dict[str, tuple[int, int]]] = {
    # minwinbase.h: ULONG_PTR Internal, InternalHigh; union { struct { DWORD Offset, OffsetHigh }; PVOID };
    # HANDLE hEvent
    "OVERLAPPED": {
        "Internal": (0, 0),
        "InternalHigh": (4, 8),
        "Offset": (8, 16),
        "OffsetHigh": (12, 20),
        "hEvent": (16, 24),
        "size": (20, 32),
    },
    # minwinbase.h: ULONG_PTR lpCompletionKey; LPOVERLAPPED; ULONG_PTR Internal; DWORD
    "OVERLAPPED_ENTRY": {
        "lpCompletionKey": (0, 0),
        "lpOverlapped": (4, 8),
        "Internal": (8, 16),
        "dwNumberOfBytesTransferred": (12, 24),
        "size": (16, 32),
    },
    # ws2def.h: ULONG len; CHAR *buf
    "WSABUF": {"len": (0, 0), "buf": (4, 8), "size": (8, 16)},
    # Ours: an OVERLAPPED, then a WSABUF, then a DWORD.
    "TRANSFER": {"len": (20, 32), "buf": (24, 40), "flags": (28, 48), "size": (32, 56)},
    # guiddef.h: unsigned long; unsigned short; unsigned short; unsigned char[8]
    "GUID": {"Data1": (0, 0), "Data2": (4, 4), "Data3": (6, 6), "Data4": (8, 8), "size": (16, 16)},
    # winsock2.h: u_short l_onoff, l_linger
    "LINGER": {"l_onoff": (0, 0), "l_linger": (2, 2), "size": (4, 4)},
    # mstcpip.h: USHORT Rtt; UCHAR MaxSynRetransmissions
    "TCP_INITIAL_RTO_PARAMETERS": {"Rtt": (0, 0), "MaxSynRetransmissions": (2, 2), "size": (4, 4)},
    # ws2ipdef.h: no pointers in any of these
    "IP_MREQ": {"imr_multiaddr": (0, 0), "imr_interface": (4, 4), "size": (8, 8)},
    "IP_MREQ_SOURCE": {
        "imr_multiaddr": (0, 0),
        "imr_sourceaddr": (4, 4),
        "imr_interface": (8, 8),
        "size": (12, 12),
    },
    "IPV6_MREQ": {"ipv6mr_multiaddr": (0, 0), "ipv6mr_interface": (16, 16), "size": (20, 20)},
    "GROUP_SOURCE_REQ": {
        "gsr_interface": (0, 0),
        "gsr_group": (8, 8),
        "gsr_source": (136, 136),
        "size": (264, 264),
    },
    # ws2def.h: ADDRESS_FAMILY; CHAR[6]; __int64, aligned to 8 on both; CHAR[112]
    "SOCKADDR_STORAGE": {
        "ss_family": (0, 0),
        "pad1": (2, 2),
        "align": (8, 8),
        "pad2": (16, 16),
        "size": (128, 128),
    },
    # mstcpip.h: ULONG onoff, keepalivetime, keepaliveinterval
    "TCP_KEEPALIVE": {
        "onoff": (0, 0),
        "keepalivetime": (4, 4),
        "keepaliveinterval": (8, 8),
        "size": (12, 12),
    },
    # winsock2.h: int ChainLen; DWORD ChainEntries[7]
    "WSAPROTOCOLCHAIN": {"ChainLen": (0, 0), "ChainEntries": (4, 4), "size": (32, 32)},
    # winsock2.h: no pointers, so the same on both
    "WSAPROTOCOL_INFOW": {
        "dwServiceFlags1": (0, 0),
        "dwServiceFlags2": (4, 4),
        "dwServiceFlags3": (8, 8),
        "dwServiceFlags4": (12, 12),
        "dwProviderFlags": (16, 16),
        "ProviderId": (20, 20),
        "dwCatalogEntryId": (36, 36),
        "ProtocolChain": (40, 40),
        "iVersion": (72, 72),
        "iAddressFamily": (76, 76),
        "iMaxSockAddr": (80, 80),
        "iMinSockAddr": (84, 84),
        "iSocketType": (88, 88),
        "iProtocol": (92, 92),
        "iProtocolMaxOffset": (96, 96),
        "iNetworkByteOrder": (100, 100),
        "iSecurityScheme": (104, 104),
        "dwMessageSize": (108, 108),
        "dwProviderReserved": (112, 112),
        "szProtocol": (116, 116),
        "size": (628, 628),
    },
}

# The headers' values: ws2def.h, winsock2.h, mswsock.h, mstcpip.h, winbase.h, winerror.h.
CONSTANTS = {
    "INFINITE": 0xFFFFFFFF,
    "WAIT_TIMEOUT": 258,
    "ERROR_NOT_FOUND": 1168,
    "AF_INET": 2,
    "AF_INET6": 23,
    "SOCK_STREAM": 1,
    "IPPROTO_TCP": 6,
    "SOL_SOCKET": 0xFFFF,
    "SO_LINGER": 0x0080,
    "SO_CONNECT_TIME": 0x700C,
    "SO_UPDATE_ACCEPT_CONTEXT": 0x700B,
    "SO_UPDATE_CONNECT_CONTEXT": 0x7010,
    "SO_PROTOCOL_INFOW": 0x2005,
    "TCP_NODELAY": 1,
    "SD_SEND": 1,
    "SIO_GET_EXTENSION_FUNCTION_POINTER": 0x40000000 | 0x80000000 | 0x08000000 | 6,  # _WSAIORW(IOC_WS2, 6)
    "SIO_KEEPALIVE_VALS": 0x80000000 | 0x18000000 | 4,  # _WSAIOW(IOC_VENDOR, 4)
    "SIO_TCP_INITIAL_RTO": 0x80000000 | 0x18000000 | 17,  # _WSAIOW(IOC_VENDOR, 17)
    "TCP_INITIAL_RTO_UNSPECIFIED_RTT": 0xFFFF,  # (USHORT)-1
    "TCP_INITIAL_RTO_NO_SYN_RETRANSMISSIONS": 0xFE,  # (UCHAR)-2
    "SIO_UDP_CONNRESET": 0x80000000 | 0x18000000 | 12,  # _WSAIOW(IOC_VENDOR, 12)
    "SIO_UDP_NETRESET": 0x80000000 | 0x18000000 | 15,  # _WSAIOW(IOC_VENDOR, 15)
    "IP_ADD_SOURCE_MEMBERSHIP": 15,
    "IP_DROP_SOURCE_MEMBERSHIP": 16,
    "MCAST_JOIN_SOURCE_GROUP": 45,
    "MCAST_LEAVE_SOURCE_GROUP": 46,
    "WSA_FLAG_OVERLAPPED": 0x01,
    "WSA_FLAG_NO_HANDLE_INHERIT": 0x80,
    "XP1_IFS_HANDLES": 0x00020000,
    "FILE_SKIP_COMPLETION_PORT_ON_SUCCESS": 0x1,
    "FILE_SKIP_SET_EVENT_ON_HANDLE": 0x2,
    "CONNECT_TIME_NOT_CONNECTED": 0xFFFFFFFF,
    "WINSOCK_VERSION": 0x0202,
    "SOCKADDR_STORAGE_SIZE": 128,
    "ACCEPT_ADDRESS_SIZE": 128 + 16,
}


def declarations(monkeypatch: pytest.MonkeyPatch, bits: int) -> dict[str, Any]:
    """Execute the structures and constants of `_win32.py` with pointers of so many bits."""
    word = {32: ctypes.c_uint32, 64: ctypes.c_uint64}[bits]
    for name in ("c_size_t", "c_void_p", "c_char_p"):
        monkeypatch.setattr(ctypes, name, word)
    tree = ast.parse(Path(_win32.__file__).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.If)]  # without the DLLs
    namespace: dict[str, Any] = {"__name__": "declarations"}
    exec(compile(tree, _win32.__file__, "exec"), namespace)
    return namespace


def structures(namespace: dict[str, Any]) -> dict[str, Any]:
    """The structures that a namespace defines."""
    return {
        name: value
        for name, value in namespace.items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure)
    }


def test_every_structure_is_in_the_table() -> None:
    assert set(structures(vars(_win32))) == set(LAYOUTS)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(monkeypatch: pytest.MonkeyPatch, name: str, bits: int) -> None:
    check_layout(structures(declarations(monkeypatch, bits))[name], LAYOUTS[name], bits)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_of_this_very_python(name: str) -> None:
    check_layout(getattr(_win32, name), LAYOUTS[name], 8 * ctypes.sizeof(ctypes.c_void_p))


@pytest.mark.parametrize("bits", [32, 64])
def test_a_transfer_is_an_overlapped_with_a_wsabuf(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    made = structures(declarations(monkeypatch, bits))
    overlapped, wsabuf, transfer = made["OVERLAPPED"], made["WSABUF"], made["TRANSFER"]
    assert issubclass(transfer, overlapped)
    assert transfer.len.offset == ctypes.sizeof(overlapped), "right behind the OVERLAPPED"
    assert transfer.len.offset % ctypes.alignment(wsabuf) == 0
    assert transfer.buf.offset - transfer.len.offset == wsabuf.buf.offset - wsabuf.len.offset
    assert (transfer.len.size, transfer.buf.size) == (wsabuf.len.size, wsabuf.buf.size)
    assert transfer.flags.offset >= transfer.len.offset + ctypes.sizeof(wsabuf)
    assert transfer.flags.size == 4


@pytest.mark.parametrize("bits", [32, 64])
def test_invalid_values_are_all_ones(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    namespace = declarations(monkeypatch, bits)
    assert namespace["INVALID_SOCKET"] == namespace["INVALID_HANDLE_VALUE"] == (1 << bits) - 1
    # What a function returns is compared with them, so it must come as the same unsigned number.
    for kind in (namespace["SOCKET"], namespace["HANDLE"]):
        assert kind(-1).value == (1 << bits) - 1


def test_types_have_their_widths() -> None:
    assert [ctypes.sizeof(getattr(_win32, name)) for name in ("BOOL", "DWORD", "ULONG", "NTSTATUS")] == [
        4,
        4,
        4,
        4,
    ]
    word = ctypes.sizeof(ctypes.c_void_p)
    assert [ctypes.sizeof(getattr(_win32, name)) for name in ("ULONG_PTR", "HANDLE", "SOCKET")] == [word] * 3


def test_constants_are_those_of_the_headers() -> None:
    numbers = {
        name: value
        for name, value in vars(_win32).items()
        if name.isupper() and isinstance(value, int) and not name.startswith(("INVALID_", "FUNCFLAG_"))
    }
    assert numbers == CONSTANTS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("WSAID_ACCEPTEX", "b5367df1-cbac-11cf-95ca-00805f48a192"),
        ("WSAID_CONNECTEX", "25a207b9-ddf3-4660-8ee9-76e58c74063e"),
        ("WSAID_GETACCEPTEXSOCKADDRS", "b5367df2-cbac-11cf-95ca-00805f48a192"),
    ],
)
def test_guids_are_those_of_mswsock(name: str, text: str) -> None:
    assert bytes(getattr(_win32, name)) == uuid.UUID(text).bytes_le


def test_every_guid_is_tested() -> None:
    guids = {name for name, value in vars(_win32).items() if isinstance(value, _win32.GUID)}
    assert guids == {"WSAID_ACCEPTEX", "WSAID_CONNECTEX", "WSAID_GETACCEPTEXSOCKADDRS"}


def test_a_hot_handle_is_as_wide_as_a_pointer() -> None:
    handle = (1 << (8 * ctypes.sizeof(ctypes.c_void_p))) - 2
    identity = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda value: value)
    bare = ctypes.cast(identity, ctypes.CFUNCTYPE(ctypes.c_void_p))  # the same function without argtypes
    bare.argtypes = None
    assert bare(_win32.handle_argument(handle)) == handle


@pytest.mark.skipif(sys.platform == "win32", reason="it shows what other systems are told")
def test_off_windows_a_function_is_an_import_error() -> None:
    with pytest.raises(ImportError, match=r"iocp_ctypes needs Windows for WSARecv: \w+ has no completion"):
        _win32.WSARecv  # noqa: B018
    assert not hasattr(_win32, "__wrapped__")
    assert _win32.is_wine() is False
