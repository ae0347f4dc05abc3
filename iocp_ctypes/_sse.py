"""L7: server-sent events: a stream of events as the answer to a request.

Laws
1. An event is encoded once, for however many streams.
2. What is silent gets a comment every `heartbeat` seconds: proxies let it live, and a peer that is gone is
   noticed.
3. A peer that does not read is closed with `overflow`, as every connection.
Source: html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from ._errors import ConnectionClosedError
from ._httpmessage import Request, Response
from ._options import check_timeout

#: Seconds between comments that say that the stream lives.
HEARTBEAT: Final = 15.0

_LINES: Final = re.compile("\r\n|\r|\n")


def encode_event(
    data: str = "", *, event: str | None = None, id: str | None = None, retry: float | None = None
) -> bytes:
    """Return an event as bytes.

    Args:
        data: what the page gets; may have several lines.
        event: its type; None: "message".
        id: what the page sends as Last-Event-ID when it connects again.
        retry: seconds that it waits before.

    Raises:
        TypeError, ValueError: a part is no str, or `event` or `id` has a line end or NUL.
    """
    lines: list[str] = []
    for name, value in (("event", event), ("id", id)):
        if value is None:
            continue
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r}: must be a str")
        if re.search("[\r\n\0]", value):
            raise ValueError(f"{name}={value!r}: must not have line ends or NUL")
        lines.append(f"{name}: {value}\n")
    if retry is not None:
        lines.append(_retry(retry))
    if not isinstance(data, str):
        raise TypeError(f"data is of type {type(data).__name__}: must be a str")
    lines += [f"data: {line}\n" for line in _LINES.split(data)]
    lines.append("\n")
    return "".join(lines).encode()


def _retry(seconds: float) -> str:
    return f"retry: {round((check_timeout('retry', seconds) or 0.0) * 1000)}\n"


class EventStream:
    """The answer to a request as a stream of events; make it in on_request or a handler, which returns None.

    Attributes:
        last_event_id: the id of the last event that the page got before, "" where it is new here.
        heartbeat: seconds between comments.
        on_close: called once when the stream has ended, whoever ended it; None at first.
        data: yours; None at first.
    """

    def __init__(
        self,
        request: Request,
        *,
        heartbeat: float = HEARTBEAT,
        retry: float | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Begin the answer.

        Args:
            request: the request; `request.connection` must be its HTTPConnection.
            heartbeat: seconds between comments.
            retry: seconds that the page shall wait before it connects again.
            headers: further header fields.

        Raises:
            TypeError, ValueError: a number is wrong. RuntimeError: the request was answered before.
        """
        if heartbeat is None:
            raise TypeError("heartbeat=None: must be a number of seconds")
        check_timeout("heartbeat", heartbeat)
        self.heartbeat = heartbeat
        self.last_event_id = request.fields.get("last-event-id", "")
        self.on_close: Callable[[EventStream], object] | None = None
        self.data: Any = None
        self._connection: Any = request.connection
        response = Response(
            b"" if retry is None else _retry(retry).encode() + b"\n",
            headers=[("Cache-Control", "no-store"), ("X-Accel-Buffering", "no"), *headers],
            content_type="text/event-stream",
        )
        connection = request.connection
        connection.respond(response, more=True)
        if request.method == "HEAD":
            self._connection = None
            connection.end()
        else:
            connection._stream = self

    @property
    def closed(self) -> bool:
        """Whether the stream has ended; nothing can be sent then."""
        return self._connection is None

    def send(
        self, data: str = "", *, event: str | None = None, id: str | None = None, retry: float | None = None
    ) -> bool:
        """Send an event; see `encode_event`. Returns as `send_encoded`."""
        return self.send_encoded(encode_event(data, event=event, id=id, retry=retry))

    def send_encoded(self, encoded: bytes) -> bool:
        """Send what `encode_event` returned.

        Returns:
            False where the stream has ended, or more than `high_mark` bytes are waiting.

        Any thread; never blocks.
        """
        connection = self._connection
        if connection is None:
            return False
        try:
            going: bool = connection.send_body(encoded)
            return going
        except (ConnectionClosedError, RuntimeError):
            return False

    def beat(self) -> None:
        """Send a comment."""
        self.send_encoded(b":\n\n")

    def close(self) -> None:
        """End the stream; the page will connect again, unless it was told otherwise. Any thread."""
        connection = self._connection
        if connection is not None:
            try:
                connection.end()
            except (ConnectionClosedError, RuntimeError):
                pass
            self.ended()

    def ended(self) -> None:
        """The connection told that the stream has ended."""
        if self._connection is not None:
            self._connection = None
            if self.on_close is not None:
                self.on_close(self)
