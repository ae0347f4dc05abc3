"""What a Datagram may be asked for: options, destinations, groups, interfaces (layer P: pure).

Laws
1. As in `_options`: a value is checked once, here; what is refused raises TypeError (wrong kind) or
   ValueError (out of range, wrong family) that names option, value and what is allowed.
2. Destinations are numeric: a name would have to be looked up, and sending never blocks.
"""

from __future__ import annotations

import dataclasses
import socket
from typing import Any, Final, TypedDict

from ._addresses import check_address, make_sockaddr
from ._options import KIB, MIB, Option, Usage, _flag, _seconds, _whole, check_option

#: What fits into one datagram: 65,535 bytes of an IP packet less 8 of UDP and 20 of IPv4; IPv6 does not
#: count its own header; a raw socket writes what follows the IP header (RFC 768, RFC 791, RFC 8200).
UDP4_MAX: Final = 65_507
UDP6_MAX: Final = 65_527
RAW4_MAX: Final = 65_515
RAW6_MAX: Final = 65_535
_ANY4: Final = bytes(4)
_MAPPED: Final = "::ffff:"


class DatagramOptions(TypedDict, total=False):
    """The keyword options of Datagram, for type checkers; DATAGRAM_OPTIONS says what each allows."""

    recv_depth: int
    recv_size: int
    high_mark: int
    low_mark: int
    write_buffer_max: int
    linger_timeout: float
    io_threads: int
    broadcast: bool
    report_errors: bool | None
    reuse_address: bool
    dualstack: bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class DatagramSettings:
    """The checked options of one Datagram."""

    recv_depth: int = 8
    recv_size: int = 64 * KIB
    high_mark: int = 64 * KIB
    low_mark: int = 16 * KIB
    write_buffer_max: int = 1 * MIB
    linger_timeout: float = 5.0
    io_threads: int = 0
    broadcast: bool = False
    report_errors: bool | None = None
    reuse_address: bool = False
    dualstack: bool | None = None


#: Those whose range or meaning differs from a connection's; the others are rows of OPTIONS.
DATAGRAM_OPTIONS: Final[dict[str, Option]] = {
    "recv_depth": Option(_whole(1, 256), "receives in flight: each keeps recv_size bytes"),
    "recv_size": Option(_whole(64, 64 * KIB), "bytes of one receive; a larger datagram is oversize"),
    "write_buffer_max": Option(
        _whole(1, 1 << 40), "unsent bytes above which a new datagram is dropped and counted"
    ),
    "linger_timeout": Option(_seconds(none=False, zero=True), "seconds that close() has for what is queued"),
    "broadcast": Option(_flag(), "SO_BROADCAST: allow sending to broadcast addresses"),
    "report_errors": Option(_flag(none=True), "call on_error; None: only while connected"),
    "reuse_address": Option(_flag(), "SO_REUSEADDR: share the port, as multicast listeners do"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class DatagramStats:
    """A Datagram at one instant. Counts begin with it."""

    datagrams_received: int  # handed to on_datagram
    bytes_received: int
    datagrams_sent: int  # taken by the kernel
    bytes_sent: int
    oversize: int  # larger than recv_size: handed to on_oversize, cut
    receive_errors: int  # ICMP errors among them
    send_errors: int  # datagrams that the system refused
    dropped: int  # not sent: above write_buffer_max, or still queued at the end
    callback_errors: int
    receives: Usage  # recv_depth, and how many are with the kernel or waiting for their callback
    write_buffer_size: int


def make_datagram_settings(options: DatagramOptions | dict[str, Any]) -> DatagramSettings:
    """Check options and return the settings they make."""
    names = [field.name for field in dataclasses.fields(DatagramSettings)]
    checked = {}
    for name, value in options.items():
        if name not in names:
            raise TypeError(f"unknown option {name}={value!r}: the options are {', '.join(names)}")
        option = DATAGRAM_OPTIONS.get(name)
        checked[name] = option.check(name, value) if option else check_option(name, value)
    settings = DatagramSettings(**checked)
    if settings.low_mark > settings.high_mark:
        raise ValueError(
            f"low_mark={settings.low_mark}: must be from 0 to high_mark, which is {settings.high_mark}"
        )
    if settings.high_mark > settings.write_buffer_max:
        raise ValueError(
            f"high_mark={settings.high_mark}: must be from low_mark to write_buffer_max,"
            f" which is {settings.write_buffer_max}"
        )
    return settings


def check_kind(kind: Any, protocol: Any) -> tuple[int, int]:
    """Return the checked type and protocol of a socket."""
    if kind not in (socket.SOCK_DGRAM, socket.SOCK_RAW) or isinstance(kind, bool):
        raise ValueError(f"type={kind!r}: must be socket.SOCK_DGRAM or socket.SOCK_RAW")
    _whole(0, 255)("protocol", protocol)
    if kind == socket.SOCK_RAW and not protocol:
        raise ValueError("protocol=0: must be from 1 to 255 for SOCK_RAW, for example socket.IPPROTO_ICMP")
    return int(kind), int(protocol)


def check_ttl(name: str, value: Any, low: int) -> int:
    """Return a checked time to live (hop limit), from `low` to 255."""
    checked: int = _whole(low, 255)(name, value)
    return checked


def check_on(name: str, value: Any) -> bool:
    """Return a checked True or False."""
    checked: bool = _flag()(name, value)
    return checked


def check_data(data: Any) -> bytes:
    """Return bytes as they are and a copy of any other buffer; TypeError for all else."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        raise TypeError("data is a str: a datagram is bytes; encode it first, for example data.encode()")
    try:
        return bytes(memoryview(data))
    except TypeError:
        raise TypeError(f"data is of type {type(data).__name__}: a datagram is a bytes-like object") from None


def too_large(size: int, largest: int) -> ValueError:
    """Make the exception for a datagram that cannot be."""
    return ValueError(f"data has {size} bytes: a datagram to this address has at most {largest}")


def _numeric(family: int, host: str) -> bytes | None:
    try:
        return socket.inet_pton(family, host)
    except (OSError, ValueError):
        return None


def destination(family: int, kind: int, dualstack: bool, address: Any) -> tuple[bytes, int]:
    """Return the Windows SOCKADDR of a numeric address for a socket of a family, and the largest datagram.

    IPv4 addresses go through a dual-stack IPv6 socket as mapped ones.
    """
    place = check_address(address)
    host, _, scope = str(place[0]).partition("%")
    raw = kind == socket.SOCK_RAW
    four, six = _numeric(socket.AF_INET, host), _numeric(socket.AF_INET6, host)
    if four is None and six is None:
        raise ValueError(f"address={address!r}: host must be a numeric address: names are not looked up here")
    if family == socket.AF_INET:
        if four is None:
            raise ValueError(f"address={address!r}: must be an IPv4 address, as the socket is")
        return make_sockaddr(family, (host, place[1])), RAW4_MAX if raw else UDP4_MAX
    if four is not None:
        if not dualstack:
            raise ValueError(f"address={address!r}: must be an IPv6 address: the socket is not dual-stack")
        return make_sockaddr(family, (_MAPPED + host, place[1])), RAW4_MAX if raw else UDP4_MAX
    flow, index = place[2:] if len(place) == 4 else (0, 0)
    if scope:
        if not scope.isascii() or not scope.isdigit():
            raise ValueError(f"address={address!r}: the scope after % must be the number of an interface")
        index = int(scope)
    if flow > 0xFFFFF or index > 0xFFFFFFFF:
        raise ValueError(f"address={address!r}: flowinfo is at most 0xFFFFF, scope_id at most 0xFFFFFFFF")
    return make_sockaddr(family, (host, place[1], flow, index)), RAW6_MAX if raw else UDP6_MAX


def check_group(family: int, group: Any, name: str = "group") -> bytes:
    """Return the bytes of a multicast address of the socket's family."""
    return _address_of(family, name, group, multicast=True)


def check_source(family: int, source: Any) -> bytes:
    """Return the bytes of the address of a sender of the socket's family."""
    return _address_of(family, "source", source, multicast=False)


def _address_of(family: int, name: str, text: Any, multicast: bool) -> bytes:
    v4 = family == socket.AF_INET
    kind = ("an IPv4" if v4 else "an IPv6") + (" multicast" if multicast else "") + " address"
    allowed = f"must be {kind}" + (f", {'224.0.0.0 to 239.255.255.255' if v4 else 'ff00::/8'}" * multicast)
    if not isinstance(text, str):
        raise TypeError(f"{name}={text!r}: {allowed}, a str")
    number = _numeric(family, text)
    if number is None:
        raise ValueError(f"{name}={text!r}: {allowed}")
    if multicast != (224 <= number[0] <= 239 if v4 else number[0] == 0xFF):
        raise ValueError(f"{name}={text!r}: {allowed}" + ("" if multicast else ", not a multicast one"))
    return number


def check_interface(family: int, interface: Any) -> bytes | int:
    """Return what names an interface: 4 bytes for IPv4, an index for IPv6; None: the system chooses."""
    if family == socket.AF_INET:
        allowed = "must be the IPv4 address of an interface of this machine, or None"
        if interface is None:
            return _ANY4
        if not isinstance(interface, str):
            raise TypeError(f"interface={interface!r}: {allowed}")
        number = _numeric(socket.AF_INET, interface)
        if number is None or number[0] >= 224:
            raise ValueError(f"interface={interface!r}: {allowed}")
        return number
    allowed = "must be the index of an interface of this machine (socket.if_nameindex()), or None"
    if interface is None:
        return 0
    if isinstance(interface, bool) or not isinstance(interface, int):
        raise TypeError(f"interface={interface!r}: {allowed}")
    if not 0 <= interface <= 0xFFFFFFFF:
        raise ValueError(f"interface={interface!r}: {allowed}")
    return interface


def no_interface(interface: Any) -> ValueError:
    """Make the exception for an interface that the system does not know."""
    return ValueError(
        f"interface={interface!r}: is no interface of this machine that this group can be had on"
    )
