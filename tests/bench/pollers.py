"""Readiness of many sockets, by the cheapest means of each system.

Owns: one small interface, `Poller`, with the calls and the list-of-pairs answer of `select.epoll`, so that
the hot loops of the load generator use epoll itself on Linux, with nothing in between.
Windows gets WSAPoll, because CPython's select() stops at 512 sockets there; other systems get `selectors`.
"""

from __future__ import annotations

import select
import selectors
import sys
from typing import Protocol

READ = 1
WRITE = 4


class Poller(Protocol):
    """The part of `select.epoll` that the load generator uses; timeouts in seconds."""

    def register(self, fd: int, eventmask: int, /) -> None: ...

    def modify(self, fd: int, eventmask: int, /) -> None: ...

    def unregister(self, fd: int, /) -> None: ...

    def poll(self, timeout: float, /) -> list[tuple[int, int]]: ...

    def close(self) -> None: ...


class SelectorPoller:
    """`selectors.DefaultSelector` behind the interface of epoll."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, eventmask: int, /) -> None:
        self._selector.register(fd, self._events(eventmask))

    def modify(self, fd: int, eventmask: int, /) -> None:
        self._selector.modify(fd, self._events(eventmask))

    def unregister(self, fd: int, /) -> None:
        self._selector.unregister(fd)

    def poll(self, timeout: float, /) -> list[tuple[int, int]]:
        return [(key.fd, (READ if events & selectors.EVENT_READ else 0)
                 | (WRITE if events & selectors.EVENT_WRITE else 0))
                for key, events in self._selector.select(timeout)]

    def close(self) -> None:
        self._selector.close()

    @staticmethod
    def _events(mask: int) -> int:
        return (selectors.EVENT_READ if mask & READ else 0) | (selectors.EVENT_WRITE if mask & WRITE else 0)


if sys.platform == "win32":
    import ctypes

    POLLRDNORM = 0x0100
    POLLWRNORM = 0x0010

    class _PollFd(ctypes.Structure):
        """WSAPOLLFD: SOCKET fd; SHORT events; SHORT revents."""

        _fields_ = (("fd", ctypes.c_size_t), ("events", ctypes.c_short), ("revents", ctypes.c_short))

    class WsaPoller:
        """WSAPoll over one array that is built again only after the set of sockets changed."""

        def __init__(self) -> None:
            self._wsapoll = ctypes.WinDLL("ws2_32").WSAPoll
            self._wsapoll.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int)
            self._wsapoll.restype = ctypes.c_int
            self._masks: dict[int, int] = {}
            self._array: ctypes.Array[_PollFd] | None = None

        def register(self, fd: int, eventmask: int, /) -> None:
            self._masks[fd] = eventmask
            self._array = None

        def modify(self, fd: int, eventmask: int, /) -> None:
            self.register(fd, eventmask)

        def unregister(self, fd: int, /) -> None:
            del self._masks[fd]
            self._array = None

        def poll(self, timeout: float, /) -> list[tuple[int, int]]:
            array = self._array
            if array is None:
                array = self._array = (_PollFd * max(1, len(self._masks)))()
                for entry, (fd, mask) in zip(array, self._masks.items(), strict=False):
                    entry.fd = fd
                    entry.events = (POLLRDNORM if mask & READ else 0) | (POLLWRNORM if mask & WRITE else 0)
            if self._wsapoll(array, len(self._masks), max(0, int(timeout * 1000))) <= 0:
                return []
            ready = []
            for entry in array:
                if events := entry.revents:
                    # Anything but the two bits asked for is an error or a hang-up: shown by the next receive.
                    write = WRITE if events & POLLWRNORM else 0
                    ready.append((entry.fd, write | (READ if events & ~POLLWRNORM else 0)))
            return ready

        def close(self) -> None:
            self._masks.clear()


def make_poller() -> Poller:
    """Returns: epoll on Linux, WSAPoll on Windows, the best selector elsewhere."""
    if sys.platform == "win32":
        return WsaPoller()
    elif sys.platform == "linux":
        return select.epoll()
    else:
        return SelectorPoller()
