"""Addresses: what users may write, and what the kernel hands back."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iocp_ctypes import _addresses
from iocp_ctypes._addresses import (
    PIPE_NAME_MAX,
    PIPE_PREFIX,
    check_address,
    check_addresses,
    check_pipe_name,
    format_address,
    parse_sockaddr,
    resolve_listening,
)

V4 = 2
V6 = 23  # Windows' number, on whatever system this runs


def sockaddr_in(host: bytes, port: int, tail: bytes = b"") -> bytes:
    """SOCKADDR_IN of ws2def.h: family, port in network order, address, eight zeros."""
    return struct.pack("<H", V4) + struct.pack(">H", port) + host + bytes(8) + tail


def sockaddr_in6(host: bytes, port: int, flow: int = 0, scope: int = 0, tail: bytes = b"") -> bytes:
    """SOCKADDR_IN6 of ws2ipdef.h; flowinfo is in network order, the scope is not."""
    return (
        struct.pack("<H", V6)
        + struct.pack(">H", port)
        + struct.pack(">I", flow)
        + host
        + struct.pack("<I", scope)
        + tail
    )


# -- from the kernel ----------------------------------------------------------------------------------------


def test_an_ipv4_address() -> None:
    assert parse_sockaddr(sockaddr_in(bytes([127, 0, 0, 1]), 9000)) == ("127.0.0.1", 9000)


def test_an_ipv6_address() -> None:
    host = bytes(15) + b"\x01"
    assert parse_sockaddr(sockaddr_in6(host, 9000)) == ("::1", 9000, 0, 0)
    assert parse_sockaddr(sockaddr_in6(host, 1, 0x12345, 7)) == ("::1", 1, 0x12345, 7)


def test_a_mapped_address_is_an_ipv4_address() -> None:
    host = bytes(10) + b"\xff\xff" + bytes([10, 1, 2, 3])
    assert parse_sockaddr(sockaddr_in6(host, 80, 5, 6)) == ("10.1.2.3", 80)


@pytest.mark.parametrize(
    "host",
    [
        bytes(10) + b"\xff\xfe" + bytes(4),
        bytes(9) + b"\x01\xff\xff" + bytes(4),
        bytes(12) + bytes([10, 1, 2, 3]),
        b"\x00\x64\xff\x9b" + bytes(8) + bytes([10, 1, 2, 3]),
    ],
)
def test_what_only_looks_mapped_is_ipv6(host: bytes) -> None:
    parsed = parse_sockaddr(sockaddr_in6(host, 80))
    assert parsed is not None
    assert len(parsed) == 4
    assert ipaddress.IPv6Address(parsed[0]).packed == host


@given(st.binary(min_size=4, max_size=4), st.integers(0, 65535), st.binary(max_size=112))
def test_any_ipv4_address(host: bytes, port: int, tail: bytes) -> None:
    # AcceptEx's buffer has room for more: what follows the address does not matter.
    expected = str(ipaddress.IPv4Address(host)), port
    assert parse_sockaddr(sockaddr_in(host, port, tail)) == expected
    assert check_address(expected) == expected


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 65535),
    st.integers(0, (1 << 20) - 1),
    st.integers(0, (1 << 32) - 1),
    st.binary(max_size=100),
)
def test_any_ipv6_address(host: bytes, port: int, flow: int, scope: int, tail: bytes) -> None:
    parsed = parse_sockaddr(sockaddr_in6(host, port, flow, scope, tail))
    assert parsed is not None
    address = ipaddress.IPv6Address(host)
    if address.ipv4_mapped:
        assert parsed == (str(address.ipv4_mapped), port)
    else:
        assert ipaddress.IPv6Address(parsed[0]) == address
        assert parsed[1:] == (port, flow, scope)
        assert check_address(parsed) == parsed


@given(st.binary(max_size=40))
def test_any_bytes_are_an_address_or_none(raw: bytes) -> None:
    parsed = parse_sockaddr(raw)
    family = int.from_bytes(raw[:2], "little")
    if parsed is None:
        assert len(raw) < 16 or family not in (V4, V6) or (family == V6 and len(raw) < 28)
    else:
        assert family in (V4, V6)


def test_a_short_address_is_none() -> None:
    for length in range(28):
        assert parse_sockaddr(sockaddr_in6(bytes(16), 1)[:length]) is None
        if length < 16:
            assert parse_sockaddr(sockaddr_in(bytes(4), 1)[:length]) is None


@pytest.mark.parametrize("family", [0, 1, 10, 17, 0x0200, 0x1700, 0xFFFF])
def test_an_unknown_family_is_none(family: int) -> None:
    # 10 is Linux' IPv6, 0x0200 and 0x1700 are the right ones read from the wrong end.
    assert parse_sockaddr(struct.pack("<H", family) + bytes(126)) is None


def test_what_the_kernel_left_empty_is_none() -> None:
    assert parse_sockaddr(b"") is None
    assert parse_sockaddr(bytes(128)) is None


@pytest.mark.parametrize(
    ("address", "written"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("localhost", 0), "localhost:0"),
        (("::1", 80), "[::1]:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        (("", 80), ":80"),
        (None, "an unknown address"),
        ((), "an unknown address"),
    ],
)
def test_addresses_are_written_for_people(address: Any, written: str) -> None:
    assert format_address(address) == written


# -- from users ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [("", 0), ("127.0.0.1", 65535), ("localhost", 1), ("::1", 80), ("::1", 80, 0, 0), ("fe80::1", 80, 1, 7)],
)
def test_good_addresses_are_taken_as_they_are(address: Any) -> None:
    assert check_address(address) is address
    assert check_addresses(address) == [address]


@pytest.mark.parametrize(
    "address",
    [
        None,
        80,
        ("127.0.0.1",),
        ("127.0.0.1", 80, 0),
        ("::1", 80, 0, 0, 0),
        (),
        ("127.0.0.1", "80"),
        ("127.0.0.1", 80.0),
        ("127.0.0.1", True),
        ("127.0.0.1", None),
        (b"127.0.0.1", 80),
        (None, 80),
        (80, "127.0.0.1"),
    ],
    ids=repr,
)
def test_wrong_shapes_are_a_type_error_that_shows_the_right_one(address: Any) -> None:
    for check in (check_address, check_addresses):
        with pytest.raises(TypeError) as caught:
            check(address)
        assert f"address={address!r}" in str(caught.value)
        assert "(host, port)" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        ("", -1),
        ("", 65536),
        ("::1", 80, -1, 0),
        ("::1", 80, 0, -1),
        ("::1", 80, "0", 0),
        ("127.0.0.1", 80, 0, 0),
        ("", 80, 0, 0),
        [],
        set(),
        "127.0.0.1:80",
        "NAME",
    ],
    ids=repr,
)
def test_wrong_values_are_a_value_error_that_shows_the_address(address: Any) -> None:
    with pytest.raises(ValueError, match="address=") as caught:
        check_addresses(address)
    assert repr(address) in str(caught.value)


def test_names_of_pipes_are_told_by_their_prefix() -> None:
    assert check_pipe_name(r"\\.\pipe\a name.1") == r"\\.\pipe\a name.1"
    assert check_pipe_name(r"\\.\PIPE\Name") == r"\\.\pipe\Name"
    longest = PIPE_PREFIX + "x" * PIPE_NAME_MAX
    assert len(longest) == 256
    assert check_pipe_name(longest) == longest
    two = [r"\\.\pipe\a", r"\\.\pipe\b"]
    assert check_addresses(two[0]) == two[:1]
    assert check_addresses(two) == check_addresses(tuple(two)) == two
    assert check_addresses([("", 1), two[0]]) == [("", 1), two[0]]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NAME",
        r"\\.\pipe",
        PIPE_PREFIX,
        r"\\host\pipe\name",
        r"\\.\mailslot\name",
        "//./pipe/name",
        PIPE_PREFIX + r"a\b",
        PIPE_PREFIX + "a\0b",
        PIPE_PREFIX + "x" * (PIPE_NAME_MAX + 1),
    ],
)
def test_other_names_are_a_value_error_that_shows_the_right_form(name: str) -> None:
    for check in (check_pipe_name, check_addresses):
        with pytest.raises(ValueError, match=r"a pipe's name is ") as caught:
            check(name)
        assert repr(name) in str(caught.value)
        assert PIPE_PREFIX + "NAME" in str(caught.value)


def test_the_address_of_a_pipe_is_one_already() -> None:
    address = (PIPE_PREFIX + "name", 1234)
    assert parse_sockaddr(address) is address
    assert format_address(address) == r"\\.\pipe\name (process 1234)"
    assert format_address(address[0]) == r"\\.\pipe\name"


def test_several_addresses_may_come_in_any_iterable() -> None:
    two = [("127.0.0.1", 1), ("::1", 2)]
    assert check_addresses(two) == two
    assert check_addresses(tuple(two)) == two
    assert check_addresses(iter(two)) == two
    assert check_addresses({("127.0.0.1", 1)}) == two[:1]
    assert check_addresses((("127.0.0.1", 1),)) == two[:1]
    assert check_addresses((("127.0.0.1", 1), ("127.0.0.1", 2), ("127.0.0.1", 3))) == [
        ("127.0.0.1", 1),
        ("127.0.0.1", 2),
        ("127.0.0.1", 3),
    ]


def test_one_bad_address_of_several_is_named() -> None:
    with pytest.raises(TypeError, match=r"address=\('b', 'x'\)"):
        check_addresses([("a", 1), ("b", "x")])
    with pytest.raises(ValueError, match="address='b'"):
        check_addresses([("a", 1), "b"])


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


def test_a_bound_socket_is_an_address(bound: socket.socket) -> None:
    assert check_addresses(bound) == [bound]
    assert check_addresses([bound, ("127.0.0.1", 1)]) == [bound, ("127.0.0.1", 1)]
    assert check_addresses((bound, ("127.0.0.1", 1))) == [bound, ("127.0.0.1", 1)]
    assert check_addresses((bound, bound)) == [bound, bound]


def test_a_socket_must_be_bound_and_of_streams() -> None:
    with socket.socket() as sock, pytest.raises(ValueError, match="not bound"):
        check_addresses(sock)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="stream"):
            check_addresses(sock)
    sock = socket.socket()
    sock.close()
    with pytest.raises(ValueError, match="not bound"):
        check_addresses(sock)


# -- where to bind ------------------------------------------------------------------------------------------


def test_every_interface_is_one_dual_stack_socket() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    for dualstack in (None, True):
        assert resolve_listening(("", 80), dualstack) == [(socket.AF_INET6, ("::", 80, 0, 0), True)]


def test_every_interface_without_ipv6_is_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    ipv4 = [(socket.AF_INET, ("0.0.0.0", 80), False)]
    assert resolve_listening(("", 80), False) == ipv4
    monkeypatch.setattr(socket, "has_ipv6", False)
    for dualstack in (None, True, False):
        assert resolve_listening(("", 80), dualstack) == ipv4


@pytest.mark.parametrize(("dualstack", "expected"), [(None, False), (False, False), (True, True)])
def test_a_four_part_address_is_taken_as_it_is(dualstack: bool | None, expected: bool) -> None:
    address = ("fe80::1", 80, 0, 3)
    assert resolve_listening(address, dualstack) == [(socket.AF_INET6, address, expected)]


def test_a_number_is_one_place() -> None:
    assert resolve_listening(("127.0.0.1", 80), None) == [(socket.AF_INET, ("127.0.0.1", 80), False)]
    assert resolve_listening(("127.0.0.1", 80), True) == [(socket.AF_INET, ("127.0.0.1", 80), False)]
    if socket.has_ipv6:
        assert resolve_listening(("::1", 80), None) == [(socket.AF_INET6, ("::1", 80, 0, 0), False)]
        assert resolve_listening(("::1", 80), True) == [(socket.AF_INET6, ("::1", 80, 0, 0), True)]


def test_all_places_of_a_name_come_once_and_in_the_resolvers_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    found = [
        (socket.AF_INET6, 1, 6, "", ("::1", 80, 0, 0)),
        (socket.AF_INET, 1, 6, "", ("127.0.0.1", 80)),
        (socket.AF_INET6, 1, 0, "", ("::1", 80, 0, 0)),
        (socket.AF_UNSPEC, 1, 6, "", ("what", 80)),
    ]

    def getaddrinfo(*args: Any, **kwargs: Any) -> list[Any]:
        asked.append((args, kwargs))
        return found

    monkeypatch.setattr(_addresses.socket, "getaddrinfo", getaddrinfo)
    assert resolve_listening(("a.name", 80), True) == [
        (socket.AF_INET6, ("::1", 80, 0, 0), True),
        (socket.AF_INET, ("127.0.0.1", 80), False),
    ]
    ((args, kwargs),) = asked
    assert args == ("a.name", 80)
    assert kwargs == {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}


def test_an_unknown_name_is_an_os_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: Any, **kwargs: Any) -> list[Any]:
        raise socket.gaierror(11001, "getaddrinfo failed")

    monkeypatch.setattr(_addresses.socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match=r"no\.such\.name"):
        resolve_listening(("no.such.name", 80), None)
