"""The write queue of a connection and its marks (layer P: pure, no I/O, no locks).

Laws
1. `size` is the number of bytes handed over and not yet accepted by the kernel: queued, in flight and held
   behind a file. It is the figure the marks and `write_buffer_max` are held against. The bytes of a file on
   disk are not in it; those of one in memory are.
2. Bytes leave in the order in which they came. What a partial completion left over goes back to the head.
3. An object is never copied: a piece is (bytes, start, stop). Who owns the bytes keeps them alive.
4. `above` is true exactly from the moment `size` passes the high mark, or a file is handed over, until it is
   at or below the low mark and no file is left.
5. `lost` is true exactly when something handed over was forgotten before the kernel had accepted it.
The caller holds the connection's lock.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple


class Piece(NamedTuple):
    """A part of a bytes object: the bytes from start up to stop."""

    data: bytes
    start: int
    stop: int


#: One send takes at most this many bytes: more would pin the memory and hide progress for too long.
SEND_SLICE_MAX: Final = 256 * 1024
#: One send gathers at most this many buffers (a WSABUF each, 16 bytes on 64-bit Windows).
SEND_GATHER_MAX: Final = 64
#: Bytes that the kernel has of a connection's sends, at the most, however many sends sendcap allows: their
#: pages are pinned. What the default sendcap of full slices comes to.
SEND_IN_FLIGHT_MAX: Final = 4 * SEND_SLICE_MAX


class WriteFlow:
    """The bytes between `send` and the kernel."""

    __slots__ = (
        "above",
        "alone",
        "at_once_max",
        "drain_due",
        "files",
        "held",
        "in_flight",
        "lost",
        "newest",
        "pieces",
        "queued",
        "sends",
    )

    def __init__(self, write_buffer_max: int = SEND_IN_FLIGHT_MAX) -> None:
        """Make an empty one; `write_buffer_max` may be less than what may be in flight."""
        self.pieces: deque[Piece] | None = None  # made when first needed: most connections never queue
        self.queued = 0  # bytes in `pieces`
        self.in_flight = 0  # bytes of sends that the kernel has
        self.sends = 0  # how many sends the kernel has
        #: Most bytes that may go to the kernel without being queued here, where nothing is before them.
        self.at_once_max = SEND_SLICE_MAX if write_buffer_max > SEND_SLICE_MAX else write_buffer_max
        self.files = 0  # how many files are not sent yet
        self.held = 0  # bytes that wait for a file before them, and those of files that are in memory
        self.above = False
        self.drain_due = False  # on_drain is on its way: who is relieved again meanwhile is told by it
        self.lost = False
        self.newest: object = None  # the send in flight after which no byte has been sent
        self.alone: object = None  # the send in flight after which none may be issued before it is done

    def may_send(self, cap: int) -> bool:
        """Return whether the next send may be issued: there is something to send, and neither too many sends
        nor too many bytes are in flight."""
        return bool(
            self.queued
            and self.sends < cap
            and self.alone is None
            and self.in_flight + min(self.queued, SEND_SLICE_MAX) <= SEND_IN_FLIGHT_MAX
        )

    @property
    def size(self) -> int:
        """Bytes queued, in flight and held behind files."""
        return self.queued + self.in_flight + self.held

    def push(self, data: bytes) -> None:
        """Queue a whole object at the tail."""
        if self.pieces is None:
            self.pieces = deque()
        self.pieces.append(Piece(data, 0, len(data)))
        self.queued += len(data)

    def push_front(self, pieces: list[Piece], skip: int = 0) -> None:
        """Put pieces back at the head, without their first `skip` bytes, in their old order."""
        if self.pieces is None:
            self.pieces = deque()
        for piece in reversed(cut(pieces, skip)):
            self.pieces.appendleft(piece)
            self.queued += piece.stop - piece.start

    def take(self, most: int = SEND_SLICE_MAX, gather: int = SEND_GATHER_MAX) -> tuple[list[Piece], int]:
        """Take the next pieces for one send: at most `most` bytes in at most `gather` pieces.

        Returns:
            The pieces and the number of their bytes; an empty list and 0 where nothing is queued.
        """
        taken: list[Piece] = []
        total = 0
        pieces = self.pieces
        while pieces and total < most and len(taken) < gather:
            data, start, stop = pieces.popleft()
            room = most - total
            if stop - start > room:
                pieces.appendleft(Piece(data, start + room, stop))
                stop = start + room
            taken.append(Piece(data, start, stop))
            total += stop - start
        self.queued -= total
        return taken, total

    def mark(self, high: int) -> bool:
        """Note that something was added; return True where the queue is below or at the high mark."""
        if self.files or self.queued + self.in_flight > high:
            self.above = True
        return not self.above

    def relieved(self, low: int) -> bool:
        """Return True exactly once after the size fell to the low mark, with no file left."""
        if self.above and not self.files and self.queued + self.in_flight <= low:
            self.above = False
            return True
        return False

    def clear(self) -> None:
        """Forget what is queued; what is in flight is not ours to forget, and does not count as accepted."""
        self.lost = self.lost or self.size > 0 or self.files > 0
        self.pieces = None
        self.queued = self.files = self.held = 0


def cut(pieces: list[Piece], skip: int) -> list[Piece]:
    """Return the pieces without their first `skip` bytes."""
    left: list[Piece] = []
    for data, start, stop in pieces:
        if skip >= stop - start:
            skip -= stop - start
        else:
            left.append(Piece(data, start + skip, stop))
            skip = 0
    return left
