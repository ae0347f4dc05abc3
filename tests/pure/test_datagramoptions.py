"""What a Datagram is asked for: what is taken, what is refused and how the refusal says so; layouts."""

from __future__ import annotations

import ctypes
import socket
from typing import Any

import pytest

from iocp_ctypes import _datagramoptions as checks
from iocp_ctypes import _win32
from iocp_ctypes._addresses import parse_sockaddr

V4, V6 = int(socket.AF_INET), int(socket.AF_INET6)
DGRAM, RAW = int(socket.SOCK_DGRAM), int(socket.SOCK_RAW)


@pytest.mark.parametrize(
    ("name", "edges", "refused"),
    [
        ("recv_depth", (1, 256), (0, 257)),
        ("recv_size", (64, 65536), (63, 65537)),
        ("write_buffer_max", (65536, 1 << 40), (0, (1 << 40) + 1)),
        ("linger_timeout", (0, 31536000), (-1, float("nan"))),
        ("io_threads", (0, 256), (-1, 257)),
    ],
)
def test_numbers_have_edges(name: str, edges: tuple[Any, ...], refused: tuple[Any, ...]) -> None:
    for value in edges:
        assert getattr(checks.make_datagram_settings({name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=f"^{name}=.*must be"):
            checks.make_datagram_settings({name: value})
    for wrong in ("1", True, None):
        with pytest.raises(TypeError, match=f"^{name}=.*must be"):
            checks.make_datagram_settings({name: wrong})


@pytest.mark.parametrize("name", ["broadcast", "reuse_address", "report_errors"])
def test_flags(name: str) -> None:
    for value in (True, False):
        assert getattr(checks.make_datagram_settings({name: value}), name) is value
    with pytest.raises(TypeError, match=f"^{name}=1: must be True"):
        checks.make_datagram_settings({name: 1})


def test_unknown_options_and_marks_out_of_order() -> None:
    with pytest.raises(TypeError, match="unknown option backlog=5: the options are recv_depth"):
        checks.make_datagram_settings({"backlog": 5})
    with pytest.raises(ValueError, match="low_mark=70000"):
        checks.make_datagram_settings({"low_mark": 70000})
    with pytest.raises(ValueError, match=r"high_mark=65536.*write_buffer_max, which is 1000"):
        checks.make_datagram_settings({"write_buffer_max": 1000})


def test_kind_and_protocol() -> None:
    assert checks.check_kind(socket.SOCK_DGRAM, 0) == (DGRAM, 0)
    assert checks.check_kind(socket.SOCK_RAW, 1) == (RAW, 1)
    with pytest.raises(ValueError, match=r"type=.*must be socket.SOCK_DGRAM or"):
        checks.check_kind(socket.SOCK_STREAM, 0)
    with pytest.raises(ValueError, match="protocol=0: must be from 1 to 255 for SOCK_RAW"):
        checks.check_kind(socket.SOCK_RAW, 0)
    with pytest.raises(ValueError, match="protocol=256: must be"):
        checks.check_kind(socket.SOCK_RAW, 256)
    with pytest.raises(TypeError, match="protocol='1': must be"):
        checks.check_kind(socket.SOCK_RAW, "1")


@pytest.mark.parametrize(
    ("family", "kind", "dual", "address", "read", "largest"),
    [
        (V4, DGRAM, False, ("1.2.3.4", 5), ("1.2.3.4", 5), 65_507),
        (V4, RAW, False, ("1.2.3.4", 0), ("1.2.3.4", 0), 65_515),
        (V6, DGRAM, False, ("::1", 5), ("::1", 5, 0, 0), 65_527),
        (V6, DGRAM, False, ("fe80::1%7", 5), ("fe80::1", 5, 0, 7), 65_527),
        (V6, DGRAM, False, ("fe80::1", 5, 1, 9), ("fe80::1", 5, 1, 9), 65_527),
        (V6, DGRAM, True, ("1.2.3.4", 5), ("1.2.3.4", 5), 65_507),
    ],
)
def test_destinations(family: int, kind: int, dual: bool, address: Any, read: Any, largest: int) -> None:
    raw, most = checks.destination(family, kind, dual, address)
    assert (parse_sockaddr(raw), most) == (read, largest)
    assert len(raw) == (28 if family == V6 else 16)


@pytest.mark.parametrize(
    ("family", "address", "error", "text"),
    [
        (V4, ("localhost", 5), ValueError, "host must be a numeric address"),
        (V4, ("1.2.3", 5), ValueError, "host must be a numeric address"),
        (V4, ("::1", 5), ValueError, "must be an IPv4 address"),
        (V6, ("1.2.3.4", 5), ValueError, "must be an IPv6 address: the socket is not dual-stack"),
        (V6, ("fe80::1%eth0", 5), ValueError, "number of an interface"),
        (V6, ("fe80::1", 5, 1 << 20, 0), ValueError, "flowinfo is at most"),
        (V4, ("1.2.3.4", 65536), ValueError, "port=65536"),
        (V4, ("1.2.3.4", "5"), TypeError, "port a whole number"),
        (V4, "1.2.3.4", TypeError, "an address is"),
        (V4, None, TypeError, "an address is"),
        (V4, ["1.2.3.4", 5], TypeError, "an address is"),
    ],
)
def test_bad_destinations(family: int, address: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        checks.destination(family, DGRAM, False, address)


def test_groups_sources_interfaces() -> None:
    assert checks.check_group(V4, "224.0.0.0")[0] == 224
    assert checks.check_group(V4, "239.255.255.255")[0] == 239
    assert checks.check_group(V6, "ff02::1")[0] == 0xFF
    for family, group in ((V4, "ff02::1"), (V4, "223.255.255.255"), (V4, "240.0.0.0"), (V6, "224.0.0.1")):
        with pytest.raises(ValueError, match=f"group='{group}': must be an IPv[46] multicast address"):
            checks.check_group(family, group)
    with pytest.raises(TypeError, match=r"group=5: must be .* a str"):
        checks.check_group(V4, 5)
    assert checks.check_source(V4, "1.2.3.4") == bytes((1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"source='224.0.0.1': must be an IPv4 address, not a multicast one"):
        checks.check_source(V4, "224.0.0.1")
    assert checks.check_interface(V4, None) == bytes(4)
    assert checks.check_interface(V4, "127.0.0.1") == bytes((127, 0, 0, 1))
    assert checks.check_interface(V6, None) == 0
    assert checks.check_interface(V6, 3) == 3
    for family, value, error in (
        (V4, 1, TypeError),
        (V4, "eth0", ValueError),
        (V4, "::1", ValueError),
        (V6, "::1", TypeError),
        (V6, True, TypeError),
        (V6, -1, ValueError),
    ):
        with pytest.raises(error, match=r"interface=.*must be"):
            checks.check_interface(family, value)


def test_ttl_and_data() -> None:
    assert [checks.check_ttl("ttl", value, 1) for value in (1, 255)] == [1, 255]
    for value in (0, 256, -1):
        with pytest.raises(ValueError, match=f"ttl={value}: must be a whole number from 1 to 255"):
            checks.check_ttl("ttl", value, 1)
    with pytest.raises(TypeError, match="ttl='1'"):
        checks.check_ttl("ttl", "1", 1)
    assert checks.check_data(bytearray(b"ab")) == checks.check_data(memoryview(b"ab")) == b"ab"
    with pytest.raises(TypeError, match="data is a str: a datagram is bytes"):
        checks.check_data("ab")
    with pytest.raises(TypeError, match="data is of type int"):
        checks.check_data(5)


@pytest.mark.parametrize(
    ("structure", "size", "offsets"),
    [
        # ws2ipdef.h; none has a pointer, so 32- and 64-bit Windows agree
        (_win32.IP_MREQ, 8, {"imr_multiaddr": 0, "imr_interface": 4}),
        (_win32.IP_MREQ_SOURCE, 12, {"imr_multiaddr": 0, "imr_sourceaddr": 4, "imr_interface": 8}),
        (_win32.IPV6_MREQ, 20, {"ipv6mr_multiaddr": 0, "ipv6mr_interface": 16}),
        (_win32.SOCKADDR_STORAGE, 128, {"ss_family": 0, "pad1": 2, "align": 8, "pad2": 16}),
        (_win32.GROUP_SOURCE_REQ, 264, {"gsr_interface": 0, "gsr_group": 8, "gsr_source": 136}),
    ],
)
def test_layout(structure: Any, size: int, offsets: dict[str, int]) -> None:
    assert ctypes.sizeof(structure) == size
    assert {name: getattr(structure, name).offset for name, *_ in structure._fields_} == offsets
