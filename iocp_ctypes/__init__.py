"""iocp_ctypes: thousands of sockets through one I/O completion port, in pure Python.

    from iocp_ctypes import Connection, Server

    class Echo(Connection):
        def on_data(self, data: bytes) -> None:
            self.send(data)

    Server(("0.0.0.0", 9000), Echo).serve_forever()

The pure parts import anywhere; what needs completion ports raises ImportError off Windows when it is used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ._datagramoptions import DatagramStats
from ._errors import ConnectionClosedError
from ._lifecycle import CloseReason
from ._options import OPTIONS, Usage
from ._stats import ConnectionStats, EngineStats, Stats
from ._trace import TraceRecord

if TYPE_CHECKING or sys.platform == "win32":
    from .client import connect
    from .connection import Connection
    from .datagram import Datagram
    from .engine import Engine
    from .server import Server
    from .stream import IncompleteReadError, Stream, open_stream
    from .stream_server import StreamServer

__version__ = "0.1.0"

__all__ = [
    "OPTIONS",
    "CloseReason",
    "Connection",
    "ConnectionClosedError",
    "ConnectionStats",
    "Datagram",
    "DatagramStats",
    "Engine",
    "EngineStats",
    "IncompleteReadError",
    "Server",
    "Stats",
    "Stream",
    "StreamServer",
    "TraceRecord",
    "Usage",
    "connect",
    "open_stream",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        raise ImportError(f"iocp_ctypes needs Windows for {name}: {sys.platform} has no completion ports")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
