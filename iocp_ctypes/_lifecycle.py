"""The states of a connection as data (layer P: pure, no I/O, no locks).

Laws
1. A state changes only by a row of TRANSITIONS; an event without a row leaves the state as it is, so every
   event may be told twice.
2. States are ordered: a connection never goes back to a smaller one.
3. JOINING means: nothing new is issued, what is in flight is being cancelled, the handle is still ours.
   CLOSED means: nothing is in flight and the handle is closed, or handed over by `detach`.
"""

from __future__ import annotations

import enum
from typing import Final

CONNECTING: Final = 0  # the socket is not connected yet: callbacks have not begun
OPEN: Final = 1  # both directions work
DRAINING: Final = 2  # close() was called: what is queued is still sent, what arrives is dropped
LINGERING: Final = 3  # everything is sent and our FIN is out: waiting for the peer's EOF
JOINING: Final = 4  # cancelled: waiting for the last completion packet
CLOSED: Final = 5  # the handle is closed

STATES: Final = (CONNECTING, OPEN, DRAINING, LINGERING, JOINING, CLOSED)
STATE_NAMES: Final = ("connecting", "open", "draining", "lingering", "joining", "closed")

CONNECTED: Final = "connected"  # the socket can send and receive
CLOSE: Final = "close"  # a graceful close was asked for
DRAINED: Final = "drained"  # nothing is queued or in flight any more
FINISHED: Final = "finished"  # the peer's EOF came, or waiting for it ended
FAIL: Final = "fail"  # an error, a time-out, an abort; the socket is handed over
JOINED: Final = "joined"  # the last packet was retired

EVENTS: Final = (CONNECTED, CLOSE, DRAINED, FINISHED, FAIL, JOINED)

TRANSITIONS: Final[dict[tuple[int, str], int]] = {
    (CONNECTING, CONNECTED): OPEN,
    (CONNECTING, CLOSE): JOINING,
    (CONNECTING, FAIL): JOINING,
    (OPEN, CLOSE): DRAINING,
    (OPEN, FAIL): JOINING,
    (DRAINING, DRAINED): LINGERING,
    (DRAINING, FAIL): JOINING,
    (LINGERING, FINISHED): JOINING,
    (LINGERING, FAIL): JOINING,
    (JOINING, JOINED): CLOSED,
}


class CloseReason(str, enum.Enum):
    """Why a connection ended; the first reason wins. Compares equal to its own text (``reason == "eof"``)."""

    LOCAL = "local"  # close() was called
    EOF = "eof"  # the peer half-closed and on_eof did not keep the connection
    RESET = "reset"  # the peer reset the connection
    ABORTED = "aborted"  # abort() was called, or the system gave the connection up
    TIMEOUT = "timeout"  # the network did: no acknowledgement came
    IDLE = "idle"  # nothing was received or sent for idle_timeout
    SILENT = "silent"  # accepted, and not one byte came within silent_timeout
    DEADLINE = "deadline"  # set_deadline() ran out
    OVERFLOW = "overflow"  # more than write_buffer_max was waiting to be sent
    TLS = "tls"  # the handshake failed, or a record was bad
    ERROR = "error"  # a callback raised, or a file could not be sent to its end
    SHUTDOWN = "shutdown"  # the server stopped
    REFUSED = "refused"  # verify_request or max_per_host said no
    DETACHED = "detached"  # detach() handed the socket over

    def __str__(self) -> str:
        return self.value
