"""L7: Hub, the open WebSockets of a server: enumeration, broadcast, topics.

Laws
1. A message for many is built once, and compressed once for each size of window.
2. Sending never blocks: a peer that reads slowly has its queue, and its `slow_reader` says what follows.
3. `_lock` covers the tables and nothing else; who gets a message is copied out first.
4. What one thread sends comes everywhere in its order; who opened meanwhile may or may not get it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from .._errors import ConnectionClosedError
from .._locks import lock_number
from .._relay import DIRECT_MAX
from .._topics import Topics
from ._outgoing import Shared

if TYPE_CHECKING:
    from ..server import Server
    from ._socket import WebSocket

#: Patterns that one WebSocket may subscribe to: clients often say which.
SUBSCRIPTIONS_MAX: Final = 1000


class Hub:
    """The open WebSockets of one server, whatever their classes. Thread-safe; nothing here blocks."""

    def __init__(self) -> None:
        """Called by `hub_of`."""
        self._lock = threading.Lock()
        self._members: dict[WebSocket, set[str]] = {}  # with the patterns each has subscribed to
        self._topics: Topics[WebSocket] = Topics()

    @property
    def websockets(self) -> list[WebSocket]:
        """Those of this instant."""
        with self._lock:
            return list(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def broadcast(
        self,
        message: str | bytes,
        to: Iterable[WebSocket] | Callable[[WebSocket], bool] | None = None,
        exclude: Iterable[WebSocket] | WebSocket = (),
    ) -> int:
        """Send a message to many.

        Args:
            message: str as text, bytes as binary.
            to: to these, or to those for which a function is true; None: to all.
            exclude: but not to these, or this one.

        Returns:
            How many took it: sent it or let it wait. Not: those that closed, and those that read too slowly.

        To more than 64 it is sent as `Server.broadcast` says. Any thread; never blocks.
        """
        if to is None:
            chosen = self.websockets
        elif callable(to):
            chosen = [websocket for websocket in self.websockets if to(websocket)]
        else:
            chosen = list(to)
        return self._send(Shared(message), chosen, exclude)

    def publish(self, topic: str, message: str | bytes, exclude: Iterable[WebSocket] | WebSocket = ()) -> int:
        """Send a message to all who have subscribed to a topic, once to each.

        Args:
            topic: "news/sport", at most 1,024 characters and 32 levels.
            message: str as text, bytes as binary.
            exclude: but not to these, or this one.

        Returns:
            As `broadcast`. Any thread; never blocks.
        """
        with self._lock:
            chosen = self._topics.match(topic)
        return self._send(Shared(message), chosen, exclude)

    def _send(self, shared: Shared, chosen: list[Any], exclude: Any) -> int:
        left_out = set(exclude) if isinstance(exclude, Iterable) else {exclude}
        directly = len(chosen) <= DIRECT_MAX
        if not directly:
            chosen.sort(key=lambda websocket: lock_number(websocket.connection.id))
        taken = 0
        for websocket in chosen:
            if websocket in left_out:
                continue
            try:
                taken += websocket._send_shared(shared, directly)
            except ConnectionClosedError:
                continue  # it closed a moment ago
        return taken

    def subscribe(self, websocket: WebSocket, pattern: str) -> None:
        """Let a WebSocket get what is published to topics that fit a pattern, until it closes.

        Args:
            websocket: an open one; of another hub or closed: nothing happens.
            pattern: levels between slashes; "+" is any one level, a last "#" any number of them.

        Raises:
            TypeError, ValueError: the pattern is none, or the 1,001st of this WebSocket.
        """
        with self._lock:
            patterns = self._members.get(websocket)
            if patterns is None:
                return
            if len(patterns) >= SUBSCRIPTIONS_MAX and pattern not in patterns:
                raise ValueError(f"pattern={pattern!r}: a WebSocket has {SUBSCRIPTIONS_MAX} at most")
            self._topics.add(pattern, websocket)
            patterns.add(pattern)

    def unsubscribe(self, websocket: WebSocket, pattern: str) -> None:
        """End that; one that was not subscribed to is left alone."""
        with self._lock:
            patterns = self._members.get(websocket)
            if patterns is not None and pattern in patterns:
                patterns.discard(pattern)
                self._topics.remove(pattern, websocket)

    def subscribers(self, topic: str) -> list[WebSocket]:
        """Return who would get what is published to a topic now."""
        with self._lock:
            return self._topics.match(topic)

    def _add(self, websocket: WebSocket) -> None:
        with self._lock:
            self._members[websocket] = set()

    def _remove(self, websocket: WebSocket) -> None:
        with self._lock:
            for pattern in self._members.pop(websocket, ()):
                self._topics.remove(pattern, websocket)


_hubs: weakref.WeakKeyDictionary[Server, Hub] = weakref.WeakKeyDictionary()
_hubs_lock = threading.Lock()


def hub_of(server: Server) -> Hub:
    """Return the hub of a server, whatever else it serves; the same one each time."""
    with _hubs_lock:
        hub = _hubs.get(server)
        if hub is None:
            hub = _hubs[server] = Hub()
        return hub
