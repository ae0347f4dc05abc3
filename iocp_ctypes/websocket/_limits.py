"""L7: the options of a WebSocket: class attributes, checked when the class is made.

Laws
1. A wrong value raises TypeError or ValueError, with option, value and what is allowed, where the class is
   defined: before there is a socket.
2. An instance may set an option for itself, at the latest in `on_handshake` or `on_open`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from .._options import KIB, MIB, check_count, check_timeout

#: A message may have at most so many bytes, whatever `message_max` says: it is kept in memory.
MESSAGE_LIMIT: Final = 1024 * MIB
#: So many fragments at most, whatever `fragments_max` says: each costs some 100 bytes until the last came.
FRAGMENTS_LIMIT: Final = 1_000_000
#: What may wait to be sent, whatever `queue_max` says.
QUEUE_LIMIT: Final = 1024 * MIB

SLOW: Final = ("close", "drop", "wait")
PING_WHEN: Final = ("always", "quiet")
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclasses.dataclass(frozen=True)
class Deflate:
    """How messages are compressed, where the peer agrees (permessage-deflate, RFC 7692).

    Attributes:
        threshold: bytes from which a message is compressed, where `send` does not say.
        level: of zlib, 1 (fast) to 9 (small).
        memory_level: of zlib, 1 to 9; 5 costs 16 KiB while a message is compressed.
        window_bits: 9 to 15: what we compress refers back up to 2**window_bits bytes.
        takeover: what we compress refers to earlier messages: smaller, but each connection keeps its
            compressor (64 KiB and more), and a broadcast is compressed for each of them alone.
        peer_window_bits: 8 to 15, what the peer is asked to keep to; None: its choice.
        peer_takeover: whether the peer's messages may refer to earlier ones, for which we keep its window.

    Raises:
        TypeError, ValueError: an attribute is out of range.
    """

    threshold: int = 256
    level: int = 6
    memory_level: int = 5
    window_bits: int = 12
    takeover: bool = False
    peer_window_bits: int | None = None
    peer_takeover: bool = True

    def __post_init__(self) -> None:
        check_count("threshold", self.threshold, 0, MESSAGE_LIMIT)
        check_count("level", self.level, 1, 9)
        check_count("memory_level", self.memory_level, 1, 9)
        check_count("window_bits", self.window_bits, 9, 15)
        if self.peer_window_bits is not None:
            check_count("peer_window_bits", self.peer_window_bits, 8, 15)
        for name in ("takeover", "peer_takeover"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r}: must be True or False")

    @property
    def settings(self) -> dict[str, int]:
        """The arguments of zlib.compressobj."""
        return {"level": self.level, "memLevel": self.memory_level}


class Options:
    """The options of a WebSocket, as class attributes of it.

    Attributes:
        subprotocols: those spoken, the best first; the first that the peer knows as well is chosen.
        origins: pages that may connect: values of the Origin header, and None for clients without one; None
            in place of the list: all. Browsers send it; it keeps other sites' pages out.
        page: HTML that a browser gets which opens the address itself; None: it is told that this is no page.
        compression: how messages are compressed; None: they are not.
        message_max: bytes of a message, inflated and of all its fragments; longer: closed with 1009.
        fragments_max: fragments of a message; more: closed with 1009.
        queue_max: bytes that may wait for a peer that reads slowly, besides what its connection has taken.
        slow_reader: what happens to a peer when a broadcast would make more than `queue_max` wait: "close"
            it, "drop" the message, or "wait": as "close", and also where it has caught up with nothing for
            `slow_timeout` seconds. (`send` never drops: it closes.)
        slow_timeout: seconds, see `slow_reader`.
        ping_interval: seconds between two pings; None: no heartbeat.
        ping_timeout: seconds for the answer; then, if nothing else came either, the peer is gone and the
            connection is reset. None: an answer is not waited for.
        ping_when: "always": a ping every interval; "quiet": only if nothing came in the interval.
        open_timeout: seconds for the opening handshake.
        close_timeout: seconds for the peer's part of the closing handshake.
        collect_sends: whether what the callbacks of one receive send goes out together, after the last of
            them: fewer calls for peers that send many messages at once. Only for callbacks that never wait
            for an answer to what they sent.
    """

    subprotocols: Sequence[str] = ()
    origins: Sequence[str | None] | None = None
    page: str | None = None
    compression: Deflate | None = None
    message_max: int = 1 * MIB
    fragments_max: int = 4096
    queue_max: int = 1 * MIB
    slow_reader: str = "close"
    slow_timeout: float = 10.0
    ping_interval: float | None = 20.0
    ping_timeout: float | None = 20.0
    ping_when: str = "always"
    open_timeout: float = 10.0
    close_timeout: float = 10.0
    collect_sends: bool = False

    def __init_subclass__(cls, **rest: Any) -> None:
        """Check what the class sets."""
        super().__init_subclass__(**rest)
        for name, check in CHECKS.items():
            if name in vars(cls):
                check(name, vars(cls)[name])


def _count(low: int, high: int) -> Callable[[str, Any], object]:
    return lambda name, value: check_count(name, value, low, high)


def _seconds(name: str, value: Any) -> None:
    if value is None:
        raise TypeError(f"{name}=None: must be a number of seconds")
    check_timeout(name, value)


def _choice(*choices: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")

    return check


def _texts(name: str, value: Any, none: bool) -> None:
    allowed = "a list or tuple of str" + (" and None" if none else "")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}={value!r}: must be {allowed}")
    for item in value:
        if not isinstance(item, str) and not (none and item is None):
            raise TypeError(f"{name}={value!r}: must be {allowed}")


def _subprotocols(name: str, value: Any) -> None:
    _texts(name, value, none=False)
    for item in value:
        if not TOKEN.fullmatch(item):
            raise ValueError(f"{name}={value!r}: {item!r} is no token of HTTP (RFC 9110, section 5.6.2)")


def _origins(name: str, value: Any) -> None:
    if value is not None:
        _texts(name, value, none=True)


def _compression(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Deflate):
        raise TypeError(f"{name}={value!r}: must be a Deflate or None")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False")


def _page(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: must be a str of HTML, or None")


CHECKS: Final[dict[str, Callable[[str, Any], object]]] = {
    "subprotocols": _subprotocols,
    "origins": _origins,
    "page": _page,
    "compression": _compression,
    "message_max": _count(1, MESSAGE_LIMIT),
    "fragments_max": _count(1, FRAGMENTS_LIMIT),
    "queue_max": _count(4 * KIB, QUEUE_LIMIT),
    "slow_reader": _choice(*SLOW),
    "slow_timeout": _seconds,
    "ping_interval": check_timeout,
    "ping_timeout": check_timeout,
    "ping_when": _choice(*PING_WHEN),
    "open_timeout": _seconds,
    "close_timeout": _seconds,
    "collect_sends": _flag,
}
