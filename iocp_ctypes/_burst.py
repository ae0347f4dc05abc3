"""Burst detection: how many receives are posted, and in which order their bytes are read (layer P: pure).

No I/O, no locks; the caller holds the connection's lock.

Laws
1. A receive gets its number when it is posted, and the kernel fills receives in that order. What they bring
   is taken in the order of the numbers, whoever retired them and when.
2. `wanted` begins at 1. It grows by one, up to the cap, where the next receive is done before what came
   earlier is consumed; it falls by one, down to 1, where the consumer has to wait for the flow.
3. `unread` (bytes that came and are not consumed) plus `reserved` (buffers the kernel has) never exceed the
   limit, so neither does `unread`, whatever comes.
4. After an end (EOF or a failure) nothing is posted, and what has a higher number is never taken. When the
   end is taken all else is forgotten, and what still comes with it.
"""

from __future__ import annotations

from typing import Any, Final


class _Sign:
    """One of the things that are not bytes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


#: What a receive brought that was cancelled, or dropped undone: its number is skipped.
NOTHING: Final = _Sign("NOTHING")
#: What a receive of no bytes brought.
EOF: Final = _Sign("EOF")


class Burst:
    """The receives of one connection in burst mode.

    A receive is known by its number and by a `slot` of the caller's, whose attribute `done` is true once the
    kernel has completed it. What it brought is bytes, NOTHING, or an end: EOF, or anything else that says
    what failed.
    """

    __slots__ = (
        "arrived",
        "calm",
        "came",
        "cancelled",
        "delivering",
        "ended",
        "finished",
        "next",
        "number",
        "posted",
        "reserved",
        "size",
        "taken",
        "unread",
        "wanted",
    )

    def __init__(self) -> None:
        self.posted: dict[int, tuple[int, Any]] = {}  # number -> buffer size and slot; oldest first
        self.arrived: dict[int, Any] = {}  # number -> what it brought, until it is taken
        self.cancelled: set[int] = set()  # numbers of posted receives whose end was asked for
        self.number = 0  # of the next receive to be posted
        self.next = 0  # number of the next one to be taken
        self.wanted = 1
        self.unread = 0
        self.reserved = 0
        self.taken = 0  # bytes that the consumer has now
        self.size = 0  # bytes of the next receive, where the flow has shown what suits it; 0: it has not
        self.came = 0.0  # when the last bytes came, by the caller's clock
        self.ended = False  # an end has arrived
        self.finished = False  # it was taken
        self.delivering = False  # true exactly while somebody takes, or has been asked to
        self.calm = False  # the consumer waited for the flow although only one receive was wanted

    # -- posting --------------------------------------------------------------------------------------------

    def missing(self, cap: int) -> int:
        """Return how many receives should be posted now."""
        return 0 if self.ended else max(0, min(self.wanted, cap) - len(self.posted))

    def has_room(self, size: int, limit: int) -> bool:
        """Return whether a receive of so many bytes fits below the limit of unread bytes."""
        return self.unread + self.reserved + size <= limit

    def post(self, size: int, slot: Any) -> int:
        """Number a receive that is about to be posted; returns its number."""
        number = self.number
        self.number += 1
        self.posted[number] = size, slot
        self.reserved += size
        return number

    def withdraw(self, number: int) -> None:
        """Take back the newest receive: posting it failed."""
        assert number == self.number - 1
        self.number = number
        self.reserved -= self.posted.pop(number)[0]

    def surplus(self, kept: int) -> list[tuple[int, Any]]:
        """Return number and slot of all posted receives but the oldest few; not those cancelled already."""
        posted = list(self.posted.items())
        return [(number, slot) for number, (_size, slot) in posted[kept:] if number not in self.cancelled]

    # -- what comes -----------------------------------------------------------------------------------------

    def arrive(self, number: int, what: Any) -> None:
        """Note what a posted receive brought: bytes (not empty), NOTHING or an end."""
        self.reserved -= self.posted.pop(number)[0]
        self.cancelled.discard(number)
        if self.finished:
            return
        self.arrived[number] = what
        if isinstance(what, bytes):
            self.unread += len(what)
        elif what is not NOTHING:
            self.ended = True

    def head(self) -> Any:
        """Return what is to be taken next, without taking it; NOTHING where it has not come yet."""
        while (what := self.arrived.get(self.next)) is NOTHING:
            del self.arrived[self.next]
            self.next += 1
        return NOTHING if what is None else what

    def failure(self) -> Any:
        """Return the failure that is next in order; None where something else is."""
        what = self.head()
        return None if isinstance(what, bytes | _Sign) else what

    def take(self) -> Any:
        """Return what is next in order, to be consumed; NOTHING where it has not come yet.

        Bytes stay unread until `consumed`. An end is the last that is taken.
        """
        what = self.head()
        if what is NOTHING:
            return what
        if isinstance(what, bytes):
            del self.arrived[self.next]
            self.next += 1
            self.taken = len(what)
        else:
            self.finished = True
            self.forget()
        return what

    def consumed(self, cap: int) -> None:
        """Note that what was taken is consumed, and judge by that how many receives are wanted."""
        if not self.taken:
            return
        self.unread -= self.taken
        self.taken = 0
        ahead = self.head() is not NOTHING or (self.next in self.posted and self.posted[self.next][1].done)
        self.calm = not ahead and self.wanted == 1
        self.wanted = max(1, min(cap, self.wanted + 1 if ahead else self.wanted - 1))

    def waiting(self) -> list[bytes]:
        """Return the bytes that have come and are next in order, without taking them."""
        found: list[bytes] = []
        number = self.next
        while (what := self.arrived.get(number)) is NOTHING or isinstance(what, bytes):
            if isinstance(what, bytes):
                found.append(what)
            number += 1
        return found

    def forget(self) -> Any:
        """Forget what has come; returns the first end that was among it, or NOTHING."""
        ends = [
            (number, what)
            for number, what in self.arrived.items()
            if what is not NOTHING and not isinstance(what, bytes)
        ]
        self.arrived.clear()
        self.unread = self.taken
        return min(ends, key=lambda end: end[0])[1] if ends else NOTHING

    @property
    def idle(self) -> bool:
        """True exactly when nothing is posted, nothing waits and nobody takes."""
        return not self.posted and not self.arrived and not self.delivering
