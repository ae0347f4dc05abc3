"""Long and heavy runs: commands, not collected by pytest. `python3 tests/soak/run.py --help`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Figures:
    """What `served.py` tells of its server and its process."""

    connections: int
    connections_peak: int
    accepted: int
    accept_failed: int
    accept_unreplaced: int
    backlog_cap: int
    backlog_in_use: int
    closed: dict[str, int]  # by close_reason
    bytes_received: int
    bytes_sent: int
    opened: int  # calls of on_connect
    ended: int  # calls of on_close
    disorder: int  # callbacks before on_connect or after on_close, and second ones of either
    deadlines: int  # that the watchdog has
    ops_pending: int
    io_threads: int
    handoffs: int
    resource_retries: int
    threads: list[str]  # all but the main one
    handles: int
    handles_before: int  # before this server was made, and after another had gone
    living: int  # Connection objects
    burst_receives: int  # that bursts brought
    burst_overtakes: int  # of them, retired before one that was posted before them
    burst_width_max: int  # receives of one connection at a time
    burst_held_max: int  # bytes, unread and in buffers of posted receives, of one connection
    records: int  # of the log, at WARNING and above
    record_texts: list[str]
    stopped: bool = False  # what Server.stop returned
