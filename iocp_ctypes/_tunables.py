"""L6: Tunables, the options of a server that may be set while it runs.

Laws
1. What is set holds for connections from then on; those that are there keep what they have.
2. A refused value raises and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._options import KeepAlive, Live, Settings, Usage, change, check_profile
from ._tlschannel import check_tls

if TYPE_CHECKING:
    from ._acceptor import Acceptor
    from ._processes import Processes
    from ._tracing import Trace
    from .connection import Connection
    from .engine import Engine


class Tunables:
    """The live options; Server has the rest. Thread-safe; nothing blocks."""

    silent_timeout = Live[float | None]("silent_timeout")
    idle_timeout = Live[float | None]("idle_timeout")
    linger_timeout = Live[float]("linger_timeout")
    max_connections = Live[int | None]("max_connections")
    max_per_host = Live[int | None]("max_per_host")
    recv_mode = Live[str]("recv_mode")
    recv_size = Live[int]("recv_size")
    recv_buffer_max = Live[int]("recv_buffer_max")
    nodelay = Live[bool]("nodelay")
    keepalive = Live[KeepAlive]("keepalive")
    high_mark = Live[int]("high_mark")
    low_mark = Live[int]("low_mark")
    write_buffer_max = Live[int]("write_buffer_max")
    trace = Live[int]("trace")
    tls = Live[Any]("tls")  # an ssl.SSLContext or None
    tls_handshake_timeout = Live[float]("tls_handshake_timeout")

    _settings: Settings
    _acceptor: Acceptor | None
    _engine: Engine | None
    _processes: Processes | None
    _lock: Any
    _parked: Any

    _trace: Trace

    def _refill(self) -> None: ...
    def _retrace(self) -> None: ...

    if TYPE_CHECKING:  # of Server

        @property
        def connections(self) -> list[Connection]: ...

    def _change(self, name: str, value: Any) -> None:
        if name == "tls" and self._processes is not None:
            count = self._settings.processes
            raise ValueError(
                f"tls={value!r}: cannot be changed with processes={count}; no other process has it"
            )
        with self._lock:
            self._settings = check_tls(change(self._settings, **{name: value}))
        if name == "max_connections" and self._acceptor is not None:
            self._acceptor.top_up()
            if self._parked and self._engine is not None:
                self._engine.dispatcher.call_soon(self._refill)
        if name == "trace":
            self._trace.switch(value)
            self._retrace()
        if self._processes is not None:
            self._processes.retune(self._settings)

    @property
    def backlog(self) -> Usage:
        """AcceptEx operations: the cap and how many the kernel has; assign a whole number.

        They are the whole server's, shared out over its addresses, at least one to each. The cap is less than
        what was assigned for as long as the system is short of buffers.
        """
        return self._acceptor.usage if self._acceptor else Usage(self._settings.backlog, 0)

    @backlog.setter
    def backlog(self, cap: int) -> None:
        self._change("backlog", cap)
        if self._acceptor is not None:
            self._acceptor.set_cap(cap)

    @property
    def sendcap(self) -> Usage:
        """The cap of concurrent WSASends of a new connection, and how many all connections have.

        Assign the cap.
        """
        return Usage(
            self._settings.sendcap, sum(connection.sendcap.in_use for connection in self.connections)
        )

    @sendcap.setter
    def sendcap(self, cap: int) -> None:
        self._change("sendcap", cap)

    @property
    def recvburst(self) -> Usage:
        """The cap of concurrent WSARecvs of a new connection, and how many all connections have.

        Assign the cap.
        """
        return Usage(
            self._settings.recvburst, sum(connection.recvburst.in_use for connection in self.connections)
        )

    @recvburst.setter
    def recvburst(self, cap: int) -> None:
        self._change("recvburst", cap)

    def tune(self, profile: str) -> None:
        """Set backlog, sendcap and recvburst for a kind of service; as assigning them does, one by one.

        Args:
            profile: "ftpd" (10, 20, 20): few connections that move much; "httpd" (500, 1, 1): many that come
                and go.

        Raises:
            ValueError: no such profile; the message names them. Nothing is changed. TypeError: no str.

        Any thread; never blocks.
        """
        self.backlog, self.sendcap, self.recvburst = check_profile(profile)
