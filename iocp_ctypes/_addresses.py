"""Addresses: what users may write, and what the kernel hands back (layer P: pure).

Laws
1. An address users see is `(host, port)` for IPv4 and `(host, port, flowinfo, scope_id)` for IPv6, as in
   `socket`.
2. An IPv4 peer of a dual-stack socket is an IPv4 peer: `::ffff:a.b.c.d` becomes `a.b.c.d`.
3. No name is looked up for a peer.
4. A pipe's name is a str that begins with PIPE_PREFIX, the address of its ends is (name, process id).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from typing import Any, Final

Address = tuple[Any, ...]

#: Windows' number of the IPv6 family; it differs from Linux, where the pure tests run.
WINDOWS_AF_INET6: Final = 23
#: What the names of pipes of this machine begin with; their case does not matter.
PIPE_PREFIX: Final = "\\\\.\\pipe\\"
#: Characters of the rest: 256 are allowed for all of it.
PIPE_NAME_MAX: Final = 256 - len(PIPE_PREFIX)
_MAPPED_PREFIX: Final = bytes(10) + b"\xff\xff"


def parse_sockaddr(raw: bytes | Address) -> Address | None:
    """Read a Windows SOCKADDR_IN or SOCKADDR_IN6; None where the kernel left none (a peer already gone).

    The address of a pipe is one already.
    """
    if isinstance(raw, tuple):
        return raw
    if len(raw) < 16:
        return None
    family = raw[0] | raw[1] << 8
    port = raw[2] << 8 | raw[3]
    if family == socket.AF_INET:
        return _dotted(raw[4:8]), port
    if family == WINDOWS_AF_INET6 and len(raw) >= 28:
        host = raw[8:24]
        if host.startswith(_MAPPED_PREFIX):
            return _dotted(host[12:]), port
        flow = int.from_bytes(raw[4:8], "big")
        (scope,) = struct.unpack("<I", raw[24:28])
        return socket.inet_ntop(socket.AF_INET6, host), port, flow, scope
    return None


def _dotted(host: bytes) -> str:
    return f"{host[0]}.{host[1]}.{host[2]}.{host[3]}"


def make_sockaddr(family: int, address: Address) -> bytes:
    """Write a Windows SOCKADDR_IN or SOCKADDR_IN6 of a numeric address."""
    host, port = address[0], address[1]
    if family == socket.AF_INET:
        return struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)
    flow, scope = (address[2], address[3]) if len(address) == 4 else (0, 0)
    number = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return (
        struct.pack("<H", WINDOWS_AF_INET6)
        + struct.pack(">HI", port, flow)
        + number
        + struct.pack("<I", scope)
    )


def numeric_family(host: str) -> int | None:
    """Return the family of a numeric host; None for a name, and for "fe80::1%4": its zone is a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return None if "%" in host else int(family)
    return None


def interleave(places: list[tuple[int, Address]]) -> list[tuple[int, Address]]:
    """Order addresses for connecting as RFC 8305 section 4 says.

    Families in turn, each in the resolver's order.
    """
    if not places:
        return []
    first = places[0][0]
    one = [place for place in places if place[0] == first]
    other = [place for place in places if place[0] != first]
    mixed: list[tuple[int, Address]] = []
    for number in range(max(len(one), len(other))):
        mixed += one[number : number + 1] + other[number : number + 1]
    return mixed


def format_address(address: Address | str | None) -> str:
    r"""Write an address for a person: `127.0.0.1:80`, `[::1]:80`, `\\.\pipe\NAME`."""
    if not address:
        return "an unknown address"
    if isinstance(address, str):
        return address
    if str(address[0]).startswith(PIPE_PREFIX):
        return f"{address[0]} (process {address[1]})"
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def check_pipe_name(name: str) -> str:
    r"""Return the name of a pipe of this machine, `\\.\pipe\NAME`; ValueError where it is none."""
    shape = (
        rf"a pipe's name is {PIPE_PREFIX}NAME; NAME is 1 to {PIPE_NAME_MAX} characters without a backslash"
    )
    if not _is_pipe(name):
        raise ValueError(f"address={name!r}: {shape}; an address is (host, port)")
    rest = name[len(PIPE_PREFIX) :]
    if not 0 < len(rest) <= PIPE_NAME_MAX or "\\" in rest or "\0" in rest:
        raise ValueError(f"address={name!r}: {shape}")
    return PIPE_PREFIX + rest


def check_address(address: object) -> Address:
    """Return `(host, port)` or a four-part IPv6 address.

    TypeError or ValueError says what is wrong with it.
    """
    shape = "an address is (host, port), with host a str and port a whole number from 0 to 65535"
    if not isinstance(address, tuple) or len(address) not in (2, 4):
        raise TypeError(f"address={address!r}: {shape}")
    host, port = address[0], address[1]
    if not isinstance(host, str) or isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"address={address!r}: {shape}")
    if not 0 <= port <= 65535:
        raise ValueError(f"address={address!r}: port={port}: {shape}")
    if len(address) == 4 and not all(isinstance(part, int) and part >= 0 for part in address[2:]):
        raise ValueError(f"address={address!r}: flowinfo and scope_id must be whole numbers, 0 or more")
    if len(address) == 4 and ":" not in host:
        raise ValueError(
            f"address={address!r}: host={host!r} is of the wrong family, four parts are for IPv6"
        )
    return address


def _is_pipe(name: object) -> bool:
    return isinstance(name, str) and name.lower().startswith(PIPE_PREFIX)


def _is_one_address(address: object) -> bool:
    return (
        isinstance(address, tuple)
        and len(address) in (2, 4)
        and isinstance(address[0], str)
        and not _is_pipe(address[0])
    )


def check_addresses(address: Any) -> list[Address | socket.socket | str]:
    """Return the addresses, bound sockets and names of pipes that a server is to listen on.

    See `check_address` and `check_pipe_name`.
    """
    if _is_one_address(address) or isinstance(address, (socket.socket, str)):
        several: Iterable[Any] = [address]
    elif isinstance(address, Iterable) and not isinstance(address, (str, bytes, tuple)):
        several = list(address)
    elif (
        isinstance(address, tuple)
        and address
        and all(isinstance(part, (tuple, socket.socket)) or _is_pipe(part) for part in address)
    ):
        several = address
    else:
        several = [address]
    checked = [_check_one(one) for one in several]
    if not checked:
        raise ValueError(f"address={address!r}: names no address to listen on")
    return checked


def _check_one(one: Any) -> Address | socket.socket | str:
    if isinstance(one, str):
        return check_pipe_name(one)
    return _check_socket(one) if isinstance(one, socket.socket) else check_address(one)


def _check_socket(sock: socket.socket) -> socket.socket:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"address={sock!r}: must be a bound IPv4 or IPv6 stream socket")
    try:
        port = sock.getsockname()[1]
    except OSError:
        port = 0
    if not port:
        raise ValueError(f"address={sock!r}: is not bound to an address yet")
    return sock


def resolve_listening(address: Address, dualstack: bool | None) -> list[tuple[int, Address, bool]]:
    """Return where to bind for one address: (family, address, dual-stack) for each socket.

    The host "" is every interface: one dual-stack IPv6 socket where the system has IPv6, else IPv4.
    OSError names the address where its host is not known. May ask the name service; it blocks for as long as
    that takes.
    """
    host, port = address[0], address[1]
    if len(address) == 4:
        return [(socket.AF_INET6, address, bool(dualstack))]
    if host == "":
        if socket.has_ipv6 and dualstack is not False:
            return [(socket.AF_INET6, ("::", port, 0, 0), True)]
        return [(socket.AF_INET, ("0.0.0.0", port), False)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, ValueError) as exc:  # ValueError: what cannot be a name at all
        number = exc.errno if isinstance(exc, OSError) else errno.EINVAL
        text = f"cannot listen on {format_address(address)}: the host is not known"
        raise OSError(number or errno.EINVAL, text) from exc
    places: list[tuple[int, Address, bool]] = []
    for family, _type, _protocol, _name, sockaddr in found:
        place = (int(family), tuple(sockaddr), bool(dualstack) and family == socket.AF_INET6)
        if family in (socket.AF_INET, socket.AF_INET6) and place not in places:
            places.append(place)
    return places
