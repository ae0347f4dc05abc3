"""L7: the echo that `python -m iocp_ctypes websocket` serves, for conformance suites.

Laws
1. A peer that does not read what it gets is not read from: nothing but one receive's messages waits for it.
2. Its limits let the suites' largest cases pass: 16 MiB in a message, 65,536 fragments.
"""

from __future__ import annotations

from typing import Any, Final

from .._options import MIB
from ._limits import Deflate
from ._socket import WebSocket

#: Bytes that a connection may hold of what is to be sent: the largest messages, and a few of them.
UNSENT_MAX: Final = 64 * MIB


class EchoSocket(WebSocket):
    """Sends back what comes, compressed where that was agreed on."""

    compression = Deflate(threshold=0)
    message_max = 32 * MIB
    fragments_max = 100_000
    queue_max = 64 * MIB
    collect_sends = True

    def on_message(self, message: Any) -> None:
        """Echo."""
        if not self.send(message):
            self.pause_reading()

    def on_drain(self) -> None:
        """Read on."""
        self.resume_reading()
