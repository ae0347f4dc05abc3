"""What the tests of the client side connect to: their own names, ports that refuse, full queues."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import OWN_HOST, Recorder

from iocp_ctypes import _connector


class Asked(Recorder):
    """A connection made by connect()."""

    def check_failed(self, kind: type[BaseException] | None, reason: str) -> None:
        """Assert that connecting failed: on_close, and nothing else."""
        assert self.names == ["close"]
        exc = self.calls[0].value
        assert exc is None if kind is None else type(exc) is kind, repr(exc)
        assert self.close_reason == reason
        assert self.closed
        assert not self.closing


def closed_port(host: str = OWN_HOST) -> tuple[str, int]:
    """An address where nobody listens."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return host, port


@contextlib.contextmanager
def full_queue(host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """Listen where connecting is not answered: the queue is full, and nobody accepts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        listener.bind((host, 0))
        listener.listen(1)
        address: tuple[str, int] = listener.getsockname()[:2]
        late = 0
        for _ in range(300):
            client = stack.enter_context(socket.socket(listener.family))
            client.settimeout(1.0)
            try:
                client.connect(address)
                late = 0
            except TimeoutError:
                late += 1
                if late == 3:  # one alone may be a machine that is busy
                    break
        else:
            raise AssertionError("the queue never was full")
        yield address


def names(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]) -> list[str]:
    """Have the connector look names up in a table: numeric hosts, an exception, or a function.

    Returns the list of what is looked up. Hosts may be (host, port) too.
    """
    asked: list[str] = []

    def look_up(host: str, port: int, *_args: Any, **_kwargs: Any) -> list[Any]:
        asked.append(host)
        answer = table[host]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Callable):  # type: ignore[arg-type]
            answer = answer()
        places = [place if isinstance(place, tuple) else (place, port) for place in answer]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (*place, 0, 0))
            if ":" in place[0]
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", place)
            for place in places
        ]

    class Names:
        """The socket module with a resolver of ours."""

        getaddrinfo = staticmethod(look_up)

        def __getattr__(self, name: str) -> Any:
            return getattr(socket, name)

    monkeypatch.setattr(_connector, "socket", Names())
    return asked
