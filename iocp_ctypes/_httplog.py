"""L7: the access log in the combined format, and figures as Prometheus reads them.

Laws
1. One request, one line: what a peer sent cannot end a line or a quoted part of it.
2. A figure's name says what it counts and in which unit; counters end in `_total`.
3. Figures are asked for; nothing is counted for who did not ask.
Source: httpd.apache.org/docs/current/logs.html; prometheus.io/docs/instrumenting/exposition_formats
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from ._httpmessage import Request, Response, problem

_UNSAFE: Final = re.compile(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def quoted(text: str) -> str:
    """Return a text as it may stand between the quotation marks of a log line."""
    return _UNSAFE.sub(lambda match: "".join(f"\\x{byte:02x}" for byte in match[0].encode("utf-8")), text)


def log_time(seconds: float) -> str:
    """Return an instant of time.time() as the log writes it, in local time."""
    at = time.localtime(seconds)
    minutes = at.tm_gmtoff // 60
    sign, minutes = ("-", -minutes) if minutes < 0 else ("+", minutes)
    offset = f"{sign}{minutes // 60:02d}{minutes % 60:02d}"
    return (
        f"{at.tm_mday:02d}/{_MONTHS[at.tm_mon - 1]}/{at.tm_year}:" + time.strftime("%H:%M:%S ", at) + offset
    )


def combined(
    request: Request | None, host: str, status: int, size: int, clock: Callable[[], float] = time.time
) -> str:
    """Return the line of one request.

    Args:
        request: the request; None where none could be read.
        host: who asked.
        status: the answer's.
        size: bytes of the answer's body that were handed over.
        clock: seconds as time.time() returns them.
    """
    line = user = referer = agent = "-"
    if request is not None:
        line = quoted(f"{request.method} {request.target} HTTP/{request.http_version}")
        user = quoted(request.user or "-").replace(" ", "\\x20")
        fields = request.fields
        referer, agent = quoted(fields.get("referer", "-")), quoted(fields.get("user-agent", "-"))
    sent = str(size) if size else "-"
    return f'{host} - {user} [{log_time(clock())}] "{line}" {status} {sent} "{referer}" "{agent}"'


class Metrics:
    """Counts answers, and writes the figures of a server; one object for all connections of a server.

    Assign it to `HTTPConnection.metrics`, and put it into `routes`, as "/metrics": it is a handler.
    """

    def __init__(self, prefix: str = "iocp_ctypes") -> None:
        """Begin at zero; `prefix` begins every name, a word of letters, digits and underscores."""
        if not re.fullmatch(r"[A-Za-z_]\w*", prefix, re.ASCII):
            raise ValueError(f"prefix={prefix!r}: must be a word of letters, digits and underscores")
        self._prefix = prefix
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._bytes = 0

    def count(self, method: str, status: int, size: int) -> None:
        """Count an answer. Any thread; blocks for an addition at the most."""
        with self._lock:
            self._counts[method, status] += 1
            self._bytes += size

    def __call__(self, request: Request) -> Response:
        """Answer with the figures as text."""
        if request.method not in ("GET", "HEAD"):
            return problem(405, headers=[("Allow", "GET, HEAD")])
        server = request.connection.server if request.connection is not None else None
        return Response(self.text(server.stats() if server is not None else None), content_type=EXPOSITION)

    def text(self, stats: Any = None) -> str:
        """Return the figures, and those of `Server.stats()` where they are given."""
        with self._lock:
            counts, size = sorted(self._counts.items()), self._bytes
        lines: list[str] = []
        answers = {f'{{method="{method}",status="{status}"}}': count for (method, status), count in counts}
        self._add(lines, "http_requests_total", "counter", "Requests that were answered.", answers)
        self._add(lines, "http_answer_bytes_total", "counter", "Bytes of the answers' bodies.", {"": size})
        if stats is not None:
            for name, kind, what in FIGURES:
                self._add(lines, name, kind, what, {"": getattr(stats, name.removesuffix("_total"))})
            closed = {f'{{reason="{reason}"}}': count for reason, count in sorted(stats.closed.items())}
            self._add(lines, "closed_total", "counter", "Connections that ended, by reason.", closed)
            self._add(
                lines, "backlog", "gauge", "AcceptEx operations that are posted.", {"": stats.backlog[1]}
            )
        return "\n".join(lines) + "\n"

    def _add(self, lines: list[str], name: str, kind: str, what: str, values: dict[str, int]) -> None:
        name = f"{self._prefix}_{name}"
        lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in values.items()]


#: The media type of what Prometheus reads.
EXPOSITION: Final = "text/plain; version=0.0.4; charset=utf-8"
#: Figures of `Server.stats()`: name, kind, meaning.
FIGURES: Final = (
    ("connections", "gauge", "Connections that are open."),
    ("connections_peak", "gauge", "Connections that were open at once, at the most."),
    ("accepted_total", "counter", "Connections that were accepted."),
    ("refused_total", "counter", "Connections that were refused."),
    ("accept_failed_total", "counter", "Accepts that failed."),
    ("reaped_total", "counter", "Connections that were closed for their silence."),
    ("bytes_received_total", "counter", "Bytes that were received."),
    ("bytes_sent_total", "counter", "Bytes that were sent."),
)
