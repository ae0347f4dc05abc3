"""What worker processes serve with in tests: they import it by name, so it is at the top of a module."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from iocp_ctypes import Connection, Server, StreamServer


class Telling(Connection):
    """Says which process serves it, and when; does what it is told."""

    def on_data(self, data: bytes) -> None:
        """Answer."""
        if data == b"pid":
            self.send(b"%d" % os.getpid())
        elif data == b"die":
            os._exit(7)
        elif data == b"shutdown":
            self.server.shutdown()
        elif data == b"exit":
            raise SystemExit("told to")
        elif data == b"raise":
            raise ValueError("told to")
        elif data == b"block":
            self.send(b"blocking")
            threading.Event().wait(60)
        elif data == b"idle":
            self.send(repr(self.idle_timeout).encode())
        elif data == b"stats":
            self.send(b"%d" % self.server.stats().connections)
        else:
            self.send(data)

    def on_drain(self) -> None:
        """Nothing is held back here."""


class Picky(Connection):
    """Cannot be made in a worker."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        raise ValueError("not here")


class Refusing(Server):
    """Cannot be made in a worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._role is not None:
            raise ValueError("no second one of me")


class Quiet(Server):
    """Logs nothing of what callbacks raise, and refuses who it is told to."""

    def __init__(self, address: Any, most: int, **options: Any) -> None:
        """Take `most` connections and refuse all others."""
        super().__init__(address, Telling, **options)
        self._left = most

    def verify_request(self, peer_address: Any) -> bool:
        """Count."""
        self._left -= 1
        return self._left >= 0

    def handle_error(self, connection: Connection, exc: BaseException) -> None:
        """Say nothing."""


class Keeping(Server):
    """Takes its first connection for itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[Any] = []

    def take_socket(self, sock: Any, peer_address: Any) -> bool:
        """Take one."""
        if self.kept:
            return False
        self.kept.append(sock)
        return True


def shout(stream: Any) -> None:
    """A function of a StreamServer."""
    for line in stream:
        time.sleep(0.001)
        stream.write(b"%d " % os.getpid() + line.upper())


def shouting(address: Any, **options: Any) -> StreamServer:
    """A StreamServer of it."""
    return StreamServer(address, shout, **options)
