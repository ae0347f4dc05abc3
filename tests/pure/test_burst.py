"""Burst detection alone: every interleaving of few receives, and chance for many."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from iocp_ctypes._burst import EOF, NOTHING, Burst

SIZE = 4
CAP = 5


@dataclasses.dataclass
class Slot:
    """A receive as the caller has it."""

    number: int
    done: bool = False


def chunk(number: int, size: int = SIZE) -> bytes:
    return bytes([number + 1]) * size


# -- exhaustively -------------------------------------------------------------------------------------------


class World:
    """A connection and its kernel, small enough to walk through all that may happen.

    `story` says what each receive brings: bytes, NOTHING (then its number is skipped), or an end. Moves:
    "post" all that is missing and fits, "fill" the oldest that is not done (the kernel does that in order),
    "retire" any that is done (threads do that in any order), "take" what is next, "consume" it.
    """

    def __init__(self, story: tuple[Any, ...], limit: int) -> None:
        self.story = story
        self.limit = limit
        self.burst = Burst()
        self.kernel: list[Slot] = []
        self.filled: list[Slot] = []
        self.taken: list[Any] = []
        self.consuming = False

    def copy(self) -> World:
        other = World(self.story, self.limit)
        for name in Burst.__slots__:
            value = getattr(self.burst, name)
            setattr(other.burst, name, value.copy() if isinstance(value, (dict, set)) else value)
        slots = {slot.number: Slot(slot.number, slot.done) for slot in (*self.kernel, *self.filled)}
        other.burst.posted = {
            number: (size, slots[number]) for number, (size, _) in self.burst.posted.items()
        }
        other.kernel = [slots[slot.number] for slot in self.kernel]
        other.filled = [slots[slot.number] for slot in self.filled]
        other.taken = list(self.taken)
        other.consuming = self.consuming
        return other

    @property
    def key(self) -> tuple[Any, ...]:
        """All that what comes depends on."""
        burst = self.burst
        state = [
            getattr(burst, name) for name in sorted(Burst.__slots__) if name not in ("posted", "arrived")
        ]
        return (
            tuple(map(repr, state)),
            tuple(burst.posted),
            tuple(sorted(burst.arrived)),
            tuple(slot.number for slot in self.kernel),
            tuple(slot.number for slot in self.filled),
            tuple(self.taken),
            self.consuming,
        )

    @property
    def moves(self) -> list[tuple[str, int]]:
        burst = self.burst
        moves = [("retire", index) for index in range(len(self.filled))]
        if burst.number < len(self.story) and burst.missing(CAP) and burst.has_room(SIZE, self.limit):
            moves.append(("post", 0))
        if self.kernel:
            moves.append(("fill", 0))
        if not self.consuming and burst.head() is not NOTHING:
            moves.append(("take", 0))
        if self.consuming:
            moves.append(("consume", 0))
        return moves

    def make(self, move: str, index: int) -> None:
        burst = self.burst
        if move == "post":
            slot = Slot(burst.number)
            assert burst.post(SIZE, slot) == slot.number
            self.kernel.append(slot)
        elif move == "fill":
            slot = self.kernel.pop(0)
            slot.done = True
            self.filled.append(slot)
        elif move == "retire":
            number = self.filled.pop(index).number
            burst.arrive(number, self.story[number])
        elif move == "take":
            what = burst.take()
            self.taken.append(what)
            self.consuming = isinstance(what, bytes)
        else:
            burst.consumed(CAP)
            self.consuming = False
        self.check()

    def check(self) -> None:
        """What holds at every moment."""
        burst = self.burst
        in_hand = [what for what in burst.arrived.values() if isinstance(what, bytes)]
        if self.consuming:
            in_hand.append(self.taken[-1])
        assert burst.unread == sum(map(len, in_hand))
        assert burst.reserved == sum(size for size, _slot in burst.posted.values())
        assert burst.unread + burst.reserved <= self.limit
        assert 1 <= burst.wanted <= CAP
        assert len(burst.posted) <= CAP

    def check_end(self) -> None:
        """What holds where no move is left."""
        expected = []
        for what in self.story:
            if what is not NOTHING:
                expected.append(what)
                if not isinstance(what, bytes):
                    break
        assert self.taken == expected, self.key
        assert self.burst.unread == self.burst.reserved == 0
        assert not self.burst.posted
        assert not self.kernel
        assert self.burst.forget() is NOTHING


def stories() -> list[tuple[Any, ...]]:
    """Up to five receives: all bytes; each of them cancelled, EOF, failed or short; with what follows."""
    found: list[tuple[Any, ...]] = []
    for count in range(1, 6):
        plain = [chunk(number) for number in range(count)]
        found.append(tuple(plain))
        for place in range(count):
            for what in (NOTHING, EOF, 10054, b"\x63"):
                end = what is EOF or what == 10054
                # Behind an end the kernel has the same, or for once something else.
                behind = [what] * (count - place - 1) if end else plain[place + 1 :]
                found.append((*plain[:place], what, *behind))
    return found


@pytest.mark.parametrize("limit", [SIZE, 3 * SIZE + 1, 100 * SIZE])
@pytest.mark.parametrize("wanted", [1, CAP])
def test_every_interleaving_of_five_receives_keeps_the_order(limit: int, wanted: int) -> None:
    """Whatever is posted, filled, retired and read when: order, bounds, and never a stall."""
    ends = 0
    for story in stories():
        begin = World(story, limit)
        begin.burst.wanted = wanted
        seen = {begin.key}
        todo = [begin]
        while todo:
            world = todo.pop()
            moves = world.moves
            if not moves:
                world.check_end()
                ends += 1
            for move in moves:
                after = world.copy()
                after.make(*move)
                if after.key not in seen:
                    seen.add(after.key)
                    todo.append(after)
    assert ends >= len(stories()), "each story has its end"


def test_all_orders_of_retiring_are_met() -> None:
    """The walk above is as wide as it says: with five wanted, 120 orders in which five receives come back."""
    world = World(tuple(chunk(number) for number in range(5)), 100 * SIZE)
    world.burst.wanted = CAP
    for _ in range(5):
        world.make("post", 0)
    for _ in range(5):
        world.make("fill", 0)
    orders = set()

    def walk(world: World, order: tuple[int, ...]) -> None:
        if not world.filled:
            while world.moves:
                world.make(*world.moves[0])
            world.check_end()
            orders.add(order)
        for index, slot in enumerate(world.filled):
            after = world.copy()
            after.make("retire", index)
            walk(after, (*order, slot.number))

    walk(world, ())
    assert len(orders) == 120


@pytest.mark.parametrize("seed", range(20))
def test_many_receives_of_any_size_by_chance(seed: int) -> None:
    chance = random.Random(seed)
    limit, cap = chance.randrange(64, 2000), chance.randrange(1, 40)
    burst = Burst()
    kernel: list[tuple[int, Slot, int]] = []
    filled: list[tuple[int, bytes]] = []
    sent, read, most = bytearray(), bytearray(), 0
    consuming = False
    while len(read) < 20_000:
        size = chance.randrange(1, 64)
        move = chance.randrange(5)
        if move == 0:
            for _ in range(burst.missing(cap)):
                if burst.has_room(size, limit):
                    slot = Slot(0)
                    kernel.append((burst.post(size, slot), slot, size))
        elif move == 1 and kernel:
            number, slot, size = kernel.pop(0)
            data = chance.randbytes(chance.randrange(1, size + 1))
            slot.done = True
            sent += data
            filled.append((number, data))
        elif move == 2 and filled:
            burst.arrive(*filled.pop(chance.randrange(len(filled))))
        elif move == 3 and not consuming and burst.head() is not NOTHING:
            read += burst.take()
            consuming = True
        elif move == 4:
            burst.consumed(cap)
            consuming = False
        most = max(most, burst.unread)
        assert burst.unread + burst.reserved <= limit
        assert len(burst.posted) <= cap
    assert sent.startswith(read)
    assert most <= limit


# -- growth and decay ---------------------------------------------------------------------------------------


def exchange(burst: Burst, cap: int) -> None:
    """Post what is missing; the kernel fills one, and all of it is read."""
    while burst.missing(cap):
        burst.post(SIZE, Slot(0))
    number = next(iter(burst.posted))
    burst.arrive(number, chunk(number))
    while burst.take() is not NOTHING:
        burst.consumed(cap)


def test_it_begins_with_one_grows_one_by_one_and_stops_at_the_cap() -> None:
    burst = Burst()
    assert burst.missing(20) == 1
    widths = []
    for _ in range(30):
        for number in tuple(burst.posted):
            burst.posted[number][1].done = True  # the kernel is done with all of them before one is read
        while burst.missing(6):
            burst.post(SIZE, Slot(0, done=True))
        number = next(iter(burst.posted))
        burst.arrive(number, b"data")
        while burst.missing(6):
            burst.post(SIZE, Slot(0, done=True))
        burst.take()
        burst.consumed(6)
        widths.append(burst.wanted)
    assert widths[:6] == [2, 3, 4, 5, 6, 6]
    assert set(widths[5:]) == {6}
    assert not burst.calm


def test_it_falls_one_by_one_while_the_consumer_waits_and_stays_at_one() -> None:
    burst = Burst()
    burst.wanted = 5
    widths, calm = [], []
    for _ in range(7):
        exchange(burst, 20)
        widths.append(burst.wanted)
        calm.append(burst.calm)
    assert widths == [4, 3, 2, 1, 1, 1, 1]
    assert calm == [False, False, False, False, True, True, True]
    assert len(burst.posted) == 0, "the one that is wanted is posted when it is asked for"
    assert burst.missing(20) == 1


def test_what_has_arrived_already_counts_as_ahead() -> None:
    burst = Burst()
    burst.wanted = 3
    for _ in range(3):
        burst.post(SIZE, Slot(0))
    for number in (2, 1, 0):
        burst.arrive(number, b"data")
    for wanted in (4, 5, 4):  # the third has nothing behind it
        assert burst.take() == b"data"
        burst.consumed(20)
        assert burst.wanted == wanted


def test_a_lower_cap_posts_no_more_than_it_says() -> None:
    burst = Burst()
    burst.wanted = 8
    for _ in range(8):
        burst.post(SIZE, Slot(0))
    assert burst.missing(3) == 0
    for number in range(6):
        burst.arrive(number, b"data")
    assert burst.missing(3) == 1
    burst.take()
    burst.consumed(3)
    assert burst.wanted == 3


def test_reading_nothing_judges_nothing() -> None:
    burst = Burst()
    burst.wanted = 4
    burst.consumed(9)
    assert burst.wanted == 4


# -- edges --------------------------------------------------------------------------------------------------


def test_the_limit_is_met_exactly_and_not_passed() -> None:
    burst = Burst()
    burst.wanted = 10
    while burst.has_room(10, 100):
        burst.post(10, Slot(0))
    assert (len(burst.posted), burst.reserved) == (10, 100)
    burst.arrive(0, b"1234567")
    assert not burst.has_room(4, 100)
    assert burst.has_room(3, 100)


def test_a_receive_that_could_not_be_posted_leaves_no_gap() -> None:
    burst = Burst()
    first = burst.post(SIZE, Slot(0))
    failed = burst.post(SIZE, Slot(0))
    burst.withdraw(failed)
    assert burst.reserved == SIZE
    second = burst.post(SIZE, Slot(0))
    burst.arrive(second, b"second")
    burst.arrive(first, b"first")
    assert [burst.take(), burst.take(), burst.take()] == [b"first", b"second", NOTHING]


def test_only_the_newest_can_be_withdrawn() -> None:
    burst = Burst()
    first = burst.post(SIZE, Slot(0))
    burst.post(SIZE, Slot(0))
    with pytest.raises(AssertionError):
        burst.withdraw(first)


def test_surplus_is_all_but_the_oldest_and_each_only_once() -> None:
    burst = Burst()
    for _ in range(4):
        burst.post(SIZE, Slot(0))
    burst.cancelled.add(2)
    assert [number for number, _slot in burst.surplus(1)] == [1, 3]
    assert [number for number, _slot in burst.surplus(0)] == [0, 1, 3]
    burst.arrive(2, NOTHING)
    assert not burst.cancelled
    burst.arrive(0, b"data")
    assert [number for number, _slot in burst.surplus(1)] == [3]


def test_after_an_end_nothing_is_posted_and_nothing_behind_it_is_taken() -> None:
    burst = Burst()
    burst.wanted = 4
    for _ in range(4):
        burst.post(SIZE, Slot(0))
    burst.arrive(2, EOF)
    assert burst.missing(4) == 0
    burst.arrive(3, b"late")
    burst.arrive(1, b"two")
    burst.arrive(0, b"one")
    assert [burst.take(), burst.take(), burst.take(), burst.take()] == [b"one", b"two", EOF, NOTHING]


def test_a_failure_is_seen_when_it_is_next_and_not_before() -> None:
    burst = Burst()
    burst.wanted = 3
    for _ in range(3):
        burst.post(SIZE, Slot(0))
    assert burst.failure() is None
    burst.arrive(1, 10054)
    assert burst.failure() is None
    burst.arrive(0, b"data")
    assert burst.failure() is None
    burst.take()
    burst.consumed(3)
    assert burst.failure() == 10054


def test_forgetting_tells_the_first_end_and_keeps_what_is_being_read() -> None:
    burst = Burst()
    for _ in range(4):
        burst.post(SIZE, Slot(0))
    burst.arrive(0, b"reading")
    burst.arrive(1, b"waits")
    burst.arrive(3, 10054)
    burst.arrive(2, EOF)
    burst.take()
    assert burst.forget() is EOF
    assert burst.unread == 7
    burst.consumed(1)
    assert burst.unread == 0
    assert burst.forget() is NOTHING


def test_what_waits_is_told_in_order_and_not_taken() -> None:
    burst = Burst()
    for number in range(6):
        assert burst.post(SIZE, Slot(number)) == number
    burst.arrive(1, chunk(1))
    assert burst.waiting() == []
    burst.arrive(0, chunk(0))
    burst.arrive(3, chunk(3))
    assert burst.waiting() == [chunk(0), chunk(1)]
    burst.arrive(2, NOTHING)
    assert burst.waiting() == [chunk(0), chunk(1), chunk(3)]
    assert burst.take() == chunk(0)
    burst.arrive(4, EOF)
    burst.arrive(5, EOF)
    assert burst.waiting() == [chunk(1), chunk(3)]
    assert [burst.take() for _ in range(3)] == [chunk(1), chunk(3), EOF]
    assert burst.waiting() == []


def test_idle_is_when_nothing_is_under_way() -> None:
    burst = Burst()
    assert burst.idle
    burst.post(SIZE, Slot(0))
    assert not burst.idle
    burst.arrive(0, b"data")
    assert not burst.idle
    burst.delivering = True
    burst.take()
    assert not burst.idle
    burst.delivering = False
    assert burst.idle


def test_signs_say_what_they_are() -> None:
    assert (repr(EOF), repr(NOTHING)) == ("EOF", "NOTHING")
