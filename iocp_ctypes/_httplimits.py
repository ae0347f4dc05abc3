"""The limits of the HTTP server, checked in one place (layer P: pure).

Laws
1. Everything that a peer can make large or slow has a limit here; each has a name, a unit and a default.
2. A refused value raises TypeError or ValueError that names the limit, the value and what is allowed.
3. Limits are immutable: a class that shall have others gets a new object.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from ._options import KIB, MIB, check_count, check_timeout

#: Bytes of the request line: browsers and proxies stop at 8 KiB.
REQUEST_LINE_MAX: Final = 8 * KIB
#: Bytes of a whole head, request line included; number of its header fields.
HEAD_MAX: Final = 32 * KIB
HEADERS_MAX: Final = 100
#: Bytes of a request's body.
BODY_MAX: Final = 64 * MIB
#: Seconds from the first byte of a head to its last.
HEADER_TIMEOUT: Final = 10.0
#: Seconds that a connection may wait between an answer and the next request.
KEEPALIVE_TIMEOUT: Final = 75.0
#: Requests that one connection may bring: what a program leaks for each connection comes to an end.
REQUESTS_MAX: Final = 100_000
#: Bytes a second that a body has to bring on the average, once BODY_GRACE seconds have passed.
BODY_RATE_MIN: Final = 240
BODY_GRACE: Final = 5.0
#: Seconds that a peer may take nothing of an answer that waits for it.
SEND_TIMEOUT: Final = 60.0
#: Bytes of a text above which it is compressed: below, a packet carries it either way.
GZIP_MIN: Final = 1 * KIB


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one peer may ask of the HTTP server; for HTTPConnection.limits.

    Attributes:
        request_line_max: bytes of the request line; more is answered with 414.
        head_max: bytes of a head; more is answered with 431.
        headers_max: header fields of a request; more are answered with 431.
        body_max: bytes of a body; more are answered with 413.
        header_timeout: seconds for a head, from its first byte on; then 408.
        keepalive_timeout: seconds between an answer and the next request; then the connection is closed.
        requests_max: requests of one connection; the last answer says "Connection: close".
        body_rate_min: bytes a second that a body has to bring on the average; less is answered with 408.
            0: as slow as it likes.
        body_grace: seconds before that rate is asked for.
        send_timeout: seconds that a peer may take nothing of what waits for it; then it is cut off.
        gzip_min: bytes of a text above which it is compressed for who accepts gzip; None: never.
    """

    request_line_max: int = REQUEST_LINE_MAX
    head_max: int = HEAD_MAX
    headers_max: int = HEADERS_MAX
    body_max: int = BODY_MAX
    header_timeout: float = HEADER_TIMEOUT
    keepalive_timeout: float = KEEPALIVE_TIMEOUT
    requests_max: int = REQUESTS_MAX
    body_rate_min: int = BODY_RATE_MIN
    body_grace: float = BODY_GRACE
    send_timeout: float = SEND_TIMEOUT
    gzip_min: int | None = GZIP_MIN

    def __post_init__(self) -> None:
        check_count("request_line_max", self.request_line_max, 16, 1 * MIB)
        check_count("head_max", self.head_max, 64, 16 * MIB)
        check_count("headers_max", self.headers_max, 1, 10_000)
        check_count("body_max", self.body_max, 0, 1 << 40)
        check_count("requests_max", self.requests_max, 1, 1 << 40)
        check_count("body_rate_min", self.body_rate_min, 0, 1 << 40)
        if self.gzip_min is not None:
            check_count("gzip_min", self.gzip_min, 0, 1 << 40)
        for name in ("header_timeout", "keepalive_timeout", "body_grace", "send_timeout"):
            if getattr(self, name) is None:
                raise TypeError(f"{name}=None: must be a number of seconds")
            check_timeout(name, getattr(self, name))
