"""What an operator asks for, as plain numbers (layer P: pure)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ._options import Usage


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one instant. Counts begin with the engine."""

    io_threads: int  # threads that exist, running, waiting and stalled
    stalled_threads: int  # of those, in a callback for so long that another thread took over
    ops_pending: int  # operations that the kernel has
    packets: int  # completion packets taken off the port, our own included
    reaps: int  # calls of GetQueuedCompletionStatusEx that returned packets
    handoffs: int  # times another thread took over from a stalled one
    resource_retries: int  # calls put off because the system was short of buffers


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """A server at one instant. Counts begin with the server."""

    connections: int  # open now
    connections_peak: int
    accepted: int  # handed to a handler
    refused: int  # turned away by verify_request or max_per_host
    accept_failed: int  # AcceptEx operations or their context updates that failed
    accept_unreplaced: int  # AcceptEx operations that could not be posted again at once
    backlog: Usage
    bytes_received: int
    bytes_sent: int
    closed: Mapping[str, int]  # by close_reason
    reaped: int  # of those, by the watchdog: silent, idle, deadline
    last_accept: float | None  # time.monotonic() of the newest connection
    work_queued: tuple[int, ...]  # calls waiting for each work thread
    engine: EngineStats
