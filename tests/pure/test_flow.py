"""The write queue: whatever is pushed, taken, cut short and put back, bytes keep their order and number."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from iocp_ctypes._flow import (
    SEND_GATHER_MAX,
    SEND_IN_FLIGHT_MAX,
    SEND_SLICE_MAX,
    Piece,
    WriteFlow,
    cut,
)

KIB = 1024


class Huge(bytes):
    """An object of any length that takes no memory: nothing here may look into it."""

    length = 0

    def __len__(self) -> int:
        return self.length


def huge(length: int) -> Huge:
    """Make one."""
    made = Huge()
    made.length = length
    return made


def bytes_of(pieces: list[Piece]) -> bytes:
    """What a send of these pieces carries."""
    return b"".join(data[start:stop] for data, start, stop in pieces)


class FlowMachine(RuleBasedStateMachine):
    """A WriteFlow against a bytearray. Sends are issued and completed as `_channel` does it."""

    HIGH, LOW = 40, 15

    def __init__(self) -> None:
        super().__init__()
        self.flow = WriteFlow()
        self.unsent = bytearray()  # handed over, not yet accepted; what is in flight is its head
        self.flying: deque[tuple[list[Piece], int]] = deque()
        self.originals: set[int] = set()
        self.keep: list[bytes] = []
        self.above = False

    @rule(data=st.binary(min_size=1, max_size=30))
    def push(self, data: bytes) -> None:
        self.keep.append(data)
        self.originals.add(id(data))
        self.flow.push(data)
        self.unsent += data
        self.above = self.above or len(self.unsent) > self.HIGH
        assert self.flow.mark(self.HIGH) is (not self.above)

    @rule(most=st.integers(1, 50), gather=st.integers(1, 5))
    def issue(self, most: int, gather: int) -> None:
        flow = self.flow
        queued = flow.queued
        pieces, length = flow.take(most, gather)
        assert length == sum(piece.stop - piece.start for piece in pieces) == queued - flow.queued
        assert length <= most
        assert len(pieces) <= gather
        assert bool(pieces) is bool(queued)
        assert length == min(queued, most) or len(pieces) == gather, "a send carries as much as it may"
        assert all(id(piece.data) in self.originals for piece in pieces), "an object was copied"
        offset = flow.in_flight
        assert bytes_of(pieces) == self.unsent[offset : offset + length]
        if pieces:
            self.flying.append((pieces, length))
            flow.sends += 1
            flow.in_flight += length

    @precondition(lambda self: self.flying)
    @rule()
    def complete(self) -> None:
        _pieces, length = self.flying.popleft()
        self.flow.sends -= 1
        self.flow.in_flight -= length
        del self.unsent[:length]
        self._relieve()

    @precondition(lambda self: len(self.flying) == 1)
    @rule(part=st.floats(0, 1))
    def complete_short(self, part: float) -> None:
        # Only the one send in flight can be repaired: with others behind it the order is lost.
        pieces, length = self.flying.popleft()
        sent = int(length * part)
        self.flow.sends -= 1
        self.flow.in_flight -= length
        self.flow.push_front(pieces, sent)
        del self.unsent[:sent]
        self._relieve()

    @precondition(lambda self: self.flow.queued)
    @rule(most=st.integers(1, 50), gather=st.integers(1, 5))
    def issue_and_fail(self, most: int, gather: int) -> None:
        # WSAENOBUFS: what was taken goes back, whatever is in flight before it.
        pieces, _length = self.flow.take(most, gather)
        self.flow.push_front(pieces)

    @precondition(lambda self: not self.flying)
    @rule()
    def clear(self) -> None:
        self.flow.clear()
        self.unsent.clear()
        self._relieve()

    def _relieve(self) -> None:
        expected = self.above and len(self.unsent) <= self.LOW
        assert self.flow.relieved(self.LOW) is expected
        assert self.flow.relieved(self.LOW) is False, "relief is told once"
        if expected:
            self.above = False

    @invariant()
    def counts_are_right(self) -> None:
        flow = self.flow
        queued = list(flow.pieces or ())
        assert flow.size == len(self.unsent) == flow.queued + flow.in_flight
        assert flow.sends == len(self.flying)
        assert bytes_of(queued) == self.unsent[flow.in_flight :]
        assert flow.queued == sum(piece.stop - piece.start for piece in queued)
        assert flow.above is self.above


TestFlowMachine = FlowMachine.TestCase
TestFlowMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.binary(max_size=9), max_size=9), st.integers(0, 90))
def test_cut_drops_exactly_the_first_bytes(chunks: list[bytes], skip: int) -> None:
    pieces = [Piece(b"<" + chunk + b">", 1, 1 + len(chunk)) for chunk in chunks]
    left = cut(pieces, skip)
    assert bytes_of(left) == b"".join(chunks)[skip:]
    assert all(piece.stop > piece.start for piece in left), "an empty piece would be an empty WSABUF"


def test_a_new_flow_is_empty_and_has_no_queue() -> None:
    flow = WriteFlow()
    assert (flow.size, flow.queued, flow.in_flight, flow.sends, flow.above) == (0, 0, 0, 0, False)
    assert flow.pieces is None
    assert flow.take() == ([], 0)
    assert flow.mark(0) is True
    assert flow.relieved(0) is False


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_gather_limit(extra: int) -> None:
    flow = WriteFlow()
    for _ in range(SEND_GATHER_MAX + extra):
        flow.push(b"x")
    pieces, length = flow.take()
    assert len(pieces) == length == min(SEND_GATHER_MAX, SEND_GATHER_MAX + extra)
    assert flow.queued == max(0, extra)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_slice_limit(extra: int) -> None:
    flow = WriteFlow()
    data = bytes(SEND_SLICE_MAX + extra)
    flow.push(data)
    pieces, length = flow.take()
    assert length == min(SEND_SLICE_MAX, len(data))
    assert pieces == [Piece(data, 0, length)]
    assert flow.queued == max(0, extra)
    assert flow.take() == (([Piece(data, SEND_SLICE_MAX, len(data))], 1) if extra > 0 else ([], 0))


def test_a_slice_ends_inside_a_later_object() -> None:
    flow = WriteFlow()
    first, second = bytes(SEND_SLICE_MAX - 1), b"ab"
    flow.push(first)
    flow.push(second)
    assert flow.take() == ([Piece(first, 0, len(first)), Piece(second, 0, 1)], SEND_SLICE_MAX)
    assert flow.take() == ([Piece(second, 1, 2)], 1)


@pytest.mark.parametrize("length", [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 5, 5 << 30])
def test_lengths_beyond_a_dword_are_sliced(length: int) -> None:
    flow = WriteFlow()
    flow.push(huge(length))
    assert flow.size == length
    total = sends = 0
    while True:
        pieces, taken = flow.take()
        if not taken:
            break
        ((_data, start, stop),) = pieces
        assert start == total
        assert 0 < stop - start == taken <= SEND_SLICE_MAX
        total += taken
        sends += 1
    assert total == length
    assert sends == -(-length // SEND_SLICE_MAX)
    assert flow.size == 0


def test_above_begins_beyond_the_high_mark_and_ends_at_the_low_mark() -> None:
    flow = WriteFlow()
    flow.push(bytes(10))
    assert flow.mark(10) is True, "at the mark is not above it"
    flow.push(b"x")
    assert flow.mark(10) is False
    assert flow.relieved(4) is False
    _pieces, taken = flow.take(most=6)
    assert taken == 6
    flow.in_flight = 6
    assert flow.relieved(4) is False, "bytes in flight count"
    flow.in_flight = 0
    assert flow.relieved(4) is False, "5 are left, the mark is 4"
    assert flow.mark(10) is False, "between the marks it stays above"
    flow.take(most=1)
    assert flow.relieved(4) is True
    assert flow.relieved(4) is False
    assert flow.mark(10) is True


def test_what_may_be_in_flight() -> None:
    flow = WriteFlow()
    assert not flow.may_send(4), "nothing is queued"
    flow.push(bytes(SEND_SLICE_MAX))
    assert flow.may_send(1)
    for sends, in_flight, cap, may in (
        (1, 100, 1, False),
        (1, 100, 2, True),
        (3, SEND_IN_FLIGHT_MAX - SEND_SLICE_MAX, 1000, True),
        (3, SEND_IN_FLIGHT_MAX - SEND_SLICE_MAX + 1, 1000, False),
    ):
        flow.sends, flow.in_flight = sends, in_flight
        assert flow.may_send(cap) is may, (sends, in_flight, cap)
    flow.sends = flow.in_flight = 0
    flow.alone = object()
    assert not flow.may_send(4)


def test_no_more_goes_at_once_than_may_be_unsent() -> None:
    assert WriteFlow().at_once_max == WriteFlow(1 << 40).at_once_max == SEND_SLICE_MAX
    assert WriteFlow(1000).at_once_max == 1000


def test_clear_forgets_the_queue_but_not_what_the_kernel_has() -> None:
    flow = WriteFlow()
    flow.push(b"abcdef")
    _pieces, taken = flow.take(most=2)
    flow.in_flight += taken
    flow.sends += 1
    flow.clear()
    assert (flow.queued, flow.in_flight, flow.sends, flow.size) == (0, 2, 1, 2)
    assert flow.take() == ([], 0)


def test_what_is_put_back_comes_first() -> None:
    flow = WriteFlow()
    flow.push(b"abc")
    flow.push(b"defg")
    pieces, _taken = flow.take()
    flow.push(b"later")
    flow.push_front(pieces, 4)
    again, length = flow.take()
    assert bytes_of(again) == b"efglater"
    assert length == 8


# -- files --------------------------------------------------------------------------------------------------


def test_while_a_file_is_there_the_flow_is_above_and_not_relieved() -> None:
    flow = WriteFlow()
    flow.files = 1
    assert flow.mark(1000) is False
    assert flow.above
    assert not flow.relieved(1000)
    flow.files = 0
    assert flow.relieved(1000)
    assert not flow.relieved(1000)


def test_what_waits_behind_a_file_is_part_of_the_size_and_forgotten_with_all() -> None:
    flow = WriteFlow()
    flow.push(b"12345")
    flow.files, flow.held = 2, 100
    assert flow.size == 105
    flow.clear()
    assert (flow.size, flow.files, flow.held) == (0, 0, 0)
