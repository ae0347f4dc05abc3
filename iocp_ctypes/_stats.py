"""What an operator asks for, as plain numbers (layer P: pure).

Laws
1. A figure is read from what the work keeps anyway, or from a counter that is written under a lock which is
   held at that point anyway, or by one thread: counting takes no lock and makes no object of its own.
2. Each says its unit. Counts begin with their owner; what says "now" is 0 again when all is closed.
3. A connection's counts are in its server's as long as it lives, and stay there when it has gone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ._options import Usage


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at one instant: port, threads, watchdog. Counts begin with the engine."""

    io_threads: int  # threads that exist now: running, waiting and stalled
    stalled_threads: int  # of those, in a callback for so long that another thread took over
    users: int  # servers, clients and datagram sockets that use it now
    sockets: int  # handles that are open now: listening, inside AcceptEx, connected, of datagrams
    ops_pending: int  # operations that the kernel has now
    bytes_pending: int  # bytes of their buffers: room of receives, data of sends
    bytes_kept: int  # bytes of buffers kept for use again
    deadlines: int  # time-outs, retries and looks that the watchdog waits for now
    packets: int  # completion packets taken off the port, our own included
    reaps: int  # calls of GetQueuedCompletionStatusEx that brought packets
    packets_per_reap: float  # packets / reaps; 0.0 where there were none
    bytes_received: int  # bytes handed to on_data, by all connections that used it, gone ones included
    bytes_sent: int  # bytes the kernel has accepted of them
    receives: int  # WSARecv operations that they issued
    receives_at_once: int  # of those, completed when the call returned
    sends: int  # WSASend operations that they issued
    sends_at_once: int  # of those, completed when the call returned
    turns: int  # what I/O threads served: packets, receives that completed at once, calls of our own
    handoffs: int  # times another thread took over from a stalled one
    resource_retries: int  # calls put off because the system was short of buffers


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectionStats:
    """A connection at one instant. Counts begin with the connection."""

    id: int
    age: float  # seconds since it was connected
    idle: float  # seconds since a byte last came or went
    bytes_received: int  # bytes handed to on_data, those stashed by pause_reading included
    bytes_sent: int  # bytes the kernel has accepted
    receives: int  # WSARecv operations issued, those without a buffer included
    receives_at_once: int  # of those, completed when the call returned
    sends: int  # WSASend operations issued
    sends_at_once: int  # of those, completed when the call returned
    sendcap: Usage  # sends: the cap, and those that the kernel has now
    recvburst: Usage  # receives: the cap, and those that the kernel has now
    write_queued: int  # bytes handed to send() and not accepted by the kernel, now
    unread: int  # bytes that came and wait for resume_reading, now
    bytes_held: int  # bytes of memory in both, and in the buffer of its receive, now


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """A server at one instant. Counts begin with the server."""

    connections: int  # accepted and not gone, now
    connections_peak: int  # the most at once
    parked: int  # of those, above max_connections and waiting to be served, now
    sockets: int  # handles that are open now: listening, inside AcceptEx, connected
    accepted: int  # handed to a handler
    refused: int  # turned away by verify_request, max_per_host or stop
    handler_failed: int  # turned away because the handler could not make a connection
    accept_failed: int  # AcceptEx operations or their context updates that failed
    accept_unreplaced: int  # AcceptEx operations that could not be posted again at once
    backlog: Usage  # AcceptEx operations: the cap, and those that the kernel has now
    sendcap: Usage  # sends: the cap of a new connection, and those that the kernel has now of all
    recvburst: Usage  # receives: the cap of a new connection, and those that the kernel has now of all
    bytes_received: int  # bytes handed to on_data
    bytes_sent: int  # bytes the kernel has accepted
    receives: int  # WSARecv operations issued, those without a buffer included
    receives_at_once: int  # of those, completed when the call returned
    sends: int  # WSASend operations issued
    sends_at_once: int  # of those, completed when the call returned
    write_queued: int  # bytes handed to send() and not accepted by the kernel, now
    unread: int  # bytes that came and wait for resume_reading, now
    bytes_held: int  # bytes of memory in both, and in the buffers of the connections' receives, now
    closed: Mapping[str, int]  # connections that have gone, by close_reason
    reaped: int  # of those, by the watchdog; and the silent inside AcceptEx
    reaped_by: Mapping[str, int]  # the same by reason: silent, idle, deadline
    last_accept: float | None  # time.monotonic() when the newest connection was accepted
    since_accept: float | None  # seconds since then
    work_queued: tuple[int, ...]  # calls waiting for each work thread, now
    engine: EngineStats


class Traffic:
    """What connections have moved, summed up. No lock of its own."""

    __slots__ = (
        "bytes_received",
        "bytes_sent",
        "receives_at_once",
        "receives_by_packet",
        "sends_at_once",
        "sends_by_packet",
    )

    def __init__(self, of: Traffic | None = None) -> None:
        """Begin with nothing, or with what another has counted."""
        self.bytes_received: int = 0 if of is None else of.bytes_received
        self.bytes_sent: int = 0 if of is None else of.bytes_sent
        self.receives_at_once: int = 0 if of is None else of.receives_at_once
        self.receives_by_packet: int = 0 if of is None else of.receives_by_packet
        self.sends_at_once: int = 0 if of is None else of.sends_at_once
        self.sends_by_packet: int = 0 if of is None else of.sends_by_packet

    def add_all(self, of: Traffic) -> None:
        """Add what another has counted."""
        for name in Traffic.__slots__:
            setattr(self, name, getattr(self, name) + getattr(of, name))

    def add(self, connection: Any) -> None:
        """Add what a connection, and the socket it has or had, has moved."""
        sock = connection._socket
        self.bytes_received += connection.bytes_received
        self.bytes_sent += connection.bytes_sent
        self.receives_at_once += sock.receives_at_once
        self.receives_by_packet += sock.receives_by_packet
        self.sends_at_once += sock.sends_at_once
        self.sends_by_packet += sock.sends_by_packet

    @property
    def receives(self) -> int:
        """Receives issued."""
        return self.receives_by_packet + self.receives_at_once

    @property
    def sends(self) -> int:
        """Sends issued."""
        return self.sends_by_packet + self.sends_at_once


#: What the figures of several processes are added up in; the other figures are their parent's.
_COUNTS = (
    "accepted",
    "handler_failed",
    "accept_failed",
    "bytes_received",
    "bytes_sent",
    "receives",
    "receives_at_once",
    "sends",
    "sends_at_once",
    "reaped",
)
_NOW = ("write_queued", "unread", "bytes_held")


def merged(own: Stats, others: Iterable[Stats]) -> Stats:
    """Return a server's figures with those that its worker processes have reported."""
    parts = [own, *others]
    closed: Counter[str] = Counter()
    reaped_by: Counter[str] = Counter()
    for part in parts:
        closed.update(part.closed)
        reaped_by.update(part.reaped_by)
    sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in (*_COUNTS, *_NOW)}
    return dataclasses.replace(
        own,
        **sums,
        closed=dict(closed),
        reaped_by=dict(reaped_by),
        sendcap=Usage(own.sendcap.cap, sum(part.sendcap.in_use for part in parts)),
        recvburst=Usage(own.recvburst.cap, sum(part.recvburst.in_use for part in parts)),
        work_queued=tuple(queued for part in parts for queued in part.work_queued),
    )


def of_the_past(stats: Stats) -> Stats:
    """Return what is left of the figures of a process that has ended: nothing is now."""
    nothing: dict[str, Any] = dict.fromkeys(_NOW, 0)
    return dataclasses.replace(
        stats,
        **nothing,
        sendcap=Usage(stats.sendcap.cap, 0),
        recvburst=Usage(stats.recvburst.cap, 0),
        work_queued=(),
    )
