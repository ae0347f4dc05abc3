"""The I/O threads: in turn, none lost, none stalled by another; on real ports and on one in memory."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import FakePort
from support import wait_until

from iocp_ctypes import _dispatcher, _win32
from iocp_ctypes._dispatcher import CROWD, STALL_CHECK, STALL_CHECK_AGAIN, STALLED_MAX, Dispatcher
from iocp_ctypes._port import KEY_IO, CompletionPort
from iocp_ctypes._proactor import PENDING, Operation, Proactor
from iocp_ctypes._sockops import OverlappedSocket
from iocp_ctypes.watchdog import Watchdog

PATIENCE = 10


class RealPort(CompletionPort):
    """A completion port that the test may queue packets in, as the kernel does."""

    __slots__ = ()

    def put(self, *packets: tuple[int, int]) -> None:
        for address, transferred in packets:
            assert _win32.PostQueuedCompletionStatus(self._handle, transferred, KEY_IO, address)


class Looks:
    """What calls a function after a while, for tests in which no time passes: they say when one looks."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, seconds: float, function: Callable[[], None]) -> None:
        self.waiting.append((seconds, function))

    def look(self) -> None:
        """Let the time of one look pass."""
        ((_seconds, function),) = self.waiting
        self.waiting.clear()
        function()


class Bench:
    """A dispatcher with what it needs; `looks` or a watchdog that looks for stalled threads by itself."""

    def __init__(
        self,
        running: int = 1,
        port: Any = None,
        looks: Looks | None = None,
        kind: type[Dispatcher] = Dispatcher,
    ) -> None:
        self.failures: list[BaseException] = []
        self.port: Any = RealPort() if port is None else port
        self.proactor = Proactor()
        self.watchdog = Watchdog()
        self.watchdog.start()
        later: Any = self.watchdog.later if looks is None else looks
        self.dispatcher = kind(self.port, self.proactor, running, later, self.failures.append)
        self.dispatcher.start()
        self.gates: list[Gate] = []

    def gate(self) -> Gate:
        """Make something that blocks an I/O thread until it is opened."""
        made = Gate()
        self.gates.append(made)
        return made

    def stall(self) -> Gate:
        """Block an I/O thread."""
        gate = self.gate()
        self.dispatcher.call_soon(gate)
        assert gate.began.wait(PATIENCE)
        return gate

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function on an I/O thread, and return what it returned."""
        answers: list[Any] = []
        done = threading.Event()
        self.dispatcher.call_soon(lambda: (answers.append(function()), done.set()))
        assert done.wait(PATIENCE), "an I/O thread did not come to it"
        return answers[0]

    def operation(self, handler: Callable[[Operation, int, int], None]) -> Operation:
        """Register an operation as one that the kernel has."""
        made = Operation()
        made.handler = handler
        self.proactor.pending[made.address] = made
        return made

    def end(self) -> None:
        for gate in self.gates:
            gate.go_on.set()
        self.watchdog.stop(PATIENCE)
        if self.dispatcher.threads:  # else it has ended already
            assert self.dispatcher.stop(PATIENCE) is True
        self.port.close()
        assert self.dispatcher.threads == 0


class Gate:
    """A handler that blocks until the test opens it."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.thread = 0

    def __call__(self) -> None:
        self.thread = threading.get_ident()
        self.began.set()
        assert self.go_on.wait(6 * PATIENCE)


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    """Make benches that end with the test, however it ends."""
    made: list[Bench] = []

    def build(*args: Any, **kwargs: Any) -> Bench:
        made.append(Bench(*args, **kwargs))
        return made[-1]

    yield build
    for bench in made:
        bench.end()


@pytest.fixture
def bench(make: Callable[..., Bench], io_threads: int) -> Bench:
    """A dispatcher on a real port, with one thread and with four."""
    return make(io_threads)


@pytest.fixture
def quiet(make: Callable[..., Bench]) -> Bench:
    """One thread on a port in memory, with nobody who looks for stalls."""
    return make(1, FakePort(), Looks())


def put(port: Any, *packets: tuple[int, int]) -> None:
    port.put(*packets)


# -- none lost, in turn -------------------------------------------------------------------------------------


def test_calls_come_on_an_io_thread(bench: Bench) -> None:
    assert bench.dispatcher.is_io_thread() is False
    assert bench.call(bench.dispatcher.is_io_thread) is True
    assert bench.call(lambda: threading.current_thread().name).startswith("iocp_ctypes I/O ")
    assert bench.call(lambda: threading.current_thread().daemon) is False


def test_calls_of_one_thread_come_in_order(quiet: Bench) -> None:
    ran: list[int] = []
    for number in range(500):
        quiet.dispatcher.call_soon(lambda number=number: ran.append(number))
    quiet.call(lambda: None)
    assert ran == list(range(500))


def test_calls_from_many_threads_are_all_made(bench: Bench) -> None:
    ran: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for turn in range(500):
            bench.dispatcher.call_soon(lambda name=(number, turn): ran.append(name))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(ran) >= 4000, what="calls that were made")
    assert Counter(ran) == Counter((number, turn) for number in range(8) for turn in range(500))


def test_calls_from_calls_are_all_made(bench: Bench) -> None:
    ran: list[int] = []

    def fork(depth: int) -> None:
        ran.append(depth)
        if depth:
            bench.dispatcher.call_soon(lambda: fork(depth - 1))
            bench.dispatcher.call_soon(lambda: fork(depth - 1))

    bench.dispatcher.call_soon(lambda: fork(9))
    wait_until(lambda: len(ran) >= 1023, what="calls that were made")
    assert Counter(ran) == {depth: 1 << (9 - depth) for depth in range(10)}


def test_an_operation_is_retired_with_its_bytes_and_its_status(bench: Bench) -> None:
    told: list[tuple[Operation, int, int]] = []
    done = threading.Event()

    def handler(*arguments: Any) -> None:
        told.append(arguments)  # type: ignore[arg-type]
        assert operation.address not in bench.proactor.pending, "retired before its handler"
        done.set()

    operation = bench.operation(handler)
    operation.Internal = 0xC000020D
    put(bench.port, (operation.address, 12345))
    assert done.wait(PATIENCE)
    assert told == [(operation, 12345, 0xC000020D)]


def test_each_packet_of_a_batch_has_its_own_status(bench: Bench) -> None:
    # That the call which took them succeeded says nothing of any of them.
    told: list[tuple[int, int, int]] = []
    expected = []
    packets = []
    for number in range(100):
        operation = bench.operation(lambda op, count, status: told.append((op.address, count, status)))
        operation.Internal = [0, 0xC0000120, 0xC000020D][number % 3]
        expected.append((operation.address, number, operation.Internal))
        packets.append((operation.address, number))
    put(bench.port, *packets)
    wait_until(lambda: len(told) >= 100)
    assert sorted(told) == sorted(expected)
    assert not bench.proactor.pending


def test_what_completed_at_once_is_served_in_its_turn(quiet: Bench) -> None:
    ran: list[Any] = []
    gate = quiet.stall()
    first = quiet.operation(lambda _op, count, _status: ran.append(("completed", count)))
    second = quiet.operation(lambda _op, count, _status: ran.append(("packet", count)))
    quiet.dispatcher.call_soon(lambda: ran.append("call"))
    quiet.dispatcher.completed(first.address, 7)
    put(quiet.port, (second.address, 8))
    gate.go_on.set()
    wait_until(lambda: len(ran) == 3)  # a call could be ready before the packet is taken off the port
    assert ran == ["call", ("completed", 7), ("packet", 8)]


def test_what_completes_at_once_for_ever_starves_nobody(quiet: Bench) -> None:
    # An echo to itself: each handler issues a call that is done when it returns.
    served = threading.Event()
    turns = 0

    def again(operation: Operation, _count: int, _status: int) -> None:
        nonlocal turns
        turns += 1
        if not served.is_set():
            quiet.proactor.pending[operation.address] = operation
            quiet.dispatcher.completed(operation.address, 1)

    other = quiet.operation(lambda _op, _count, _status: served.set())
    operation = quiet.operation(again)
    quiet.dispatcher.completed(operation.address, 1)
    wait_until(lambda: turns > 100)
    put(quiet.port, (other.address, 1))
    try:
        assert served.wait(PATIENCE)
    finally:
        served.set()


def test_who_queues_as_fast_as_packets_are_taken_keeps_nobody_from_serving(
    make: Callable[..., Bench],
) -> None:
    class Flood(FakePort):
        """Full of packets, however many are taken; until the flood is over."""

        left = 0

        def _take(self, size: int) -> list[tuple[Any, int]]:
            self.left -= size
            return [(0, 0)] * size if self.left > 0 else super()._take(size)

    port = Flood()
    bench = make(1, port, Looks())
    bench.call(lambda: None)
    wait_until(lambda: port.waiting == 1)
    port.left = 100_000
    left = bench.call(lambda: port.left)
    assert left > 90_000, "it was served when the flood was over"
    port.left = 0


def test_a_serving_thread_needs_no_packet_for_its_own_calls(quiet: Bench) -> None:
    quiet.call(lambda: None)
    before = quiet.port.posts
    ran: list[int] = []

    def several() -> None:
        for number in range(10):
            quiet.dispatcher.call_soon(lambda number=number: ran.append(number))

    quiet.call(several)
    wait_until(lambda: len(ran) == 10)
    assert quiet.port.posts == before + 1


@pytest.mark.parametrize(("others", "crowd"), [(CROWD - 1, False), (CROWD, True), (3 * CROWD, True)])
def test_what_is_deferred_comes_after_the_round_where_that_is_a_crowd(
    others: int, crowd: bool, quiet: Bench
) -> None:
    ran: list[Any] = []
    dispatcher = quiet.dispatcher
    first = quiet.operation(
        lambda _op, _count, _status: ran.append(dispatcher.defer(lambda: ran.append("deferred")))
    )
    rest = [quiet.operation(lambda _op, _count, _status: ran.append("other")) for _ in range(others)]
    wait_until(lambda: quiet.port.waiting == 1)
    put(quiet.port, *((operation.address, 0) for operation in [first, *rest]))  # a round of these alone
    wait_until(lambda: len(ran) == 1 + others + crowd)
    assert ran == [crowd, *["other"] * others, *["deferred"] * crowd]
    assert quiet.port.posts == 0, "a serving thread needs no packet for it"


def test_what_was_deferred_is_called_by_who_takes_over(make: Callable[..., Bench]) -> None:
    looks = Looks()
    bench = make(1, FakePort(), looks)
    ran: list[str] = []
    gate = bench.gate()

    def defer(_operation: Operation, _count: int, _status: int) -> None:
        assert bench.dispatcher.defer(lambda: ran.append("deferred"))

    first = bench.operation(defer)
    second = bench.operation(lambda _op, _count, _status: gate())
    rest = [bench.operation(lambda _op, _count, _status: ran.append("other")) for _ in range(CROWD)]
    put(bench.port, *((operation.address, 0) for operation in [first, second, *rest]))
    assert gate.began.wait(PATIENCE)
    assert ran == []
    looks.look()
    looks.look()
    wait_until(lambda: len(ran) == CROWD + 1)
    assert ran.count("deferred") == 1
    gate.go_on.set()


def test_what_a_relieved_thread_defers_is_called(make: Callable[..., Bench]) -> None:
    looks = Looks()
    bench = make(1, FakePort(), looks)
    ran: list[str] = []
    answers: list[bool] = []
    first = bench.gate()

    def held_up() -> None:
        first()
        answers.append(bench.dispatcher.defer(lambda: ran.append("deferred")))

    bench.dispatcher.call_soon(held_up)
    assert first.began.wait(PATIENCE)
    looks.look()
    looks.look()
    second = bench.stall()  # on the thread that took over
    for _ in range(CROWD):
        bench.dispatcher.call_soon(lambda: ran.append("other"))
    first.go_on.set()
    wait_until(lambda: bool(answers))
    assert answers == [True]
    second.go_on.set()
    wait_until(lambda: len(ran) == CROWD + 1)
    assert ran.count("deferred") == 1


def test_what_was_deferred_in_the_last_round_is_called_and_keeps_nobody(
    quiet: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatcher, "CROWD", 0)
    ran: list[str] = []
    gate = quiet.stall()
    last = quiet.operation(
        lambda _op, _n, _status: ran.append(str(quiet.dispatcher.defer(lambda: ran.append("done"))))
    )
    quiet.dispatcher.completed(last.address, 0)
    assert quiet.dispatcher.stop(0.0) is False  # its packet is taken in that last round
    gate.go_on.set()
    wait_until(lambda: quiet.dispatcher.threads == 0)
    assert ran == ["True", "done"]


def test_those_that_deferred_count_as_a_crowd(quiet: Bench) -> None:
    answers: list[bool] = []
    ran: list[int] = []

    def defer(_operation: Operation, number: int, _status: int) -> None:
        answers.append(quiet.dispatcher.defer(lambda: ran.append(number)))

    wait_until(lambda: quiet.port.waiting == 1)
    put(quiet.port, *((quiet.operation(defer).address, number) for number in range(CROWD + 1)))
    wait_until(lambda: len(ran) == CROWD + 1)
    assert answers == [True] * (CROWD + 1)
    assert ran == list(range(CROWD + 1))


def test_what_a_relieved_thread_defers_wakes_who_waits(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatcher, "CROWD", 0)
    looks = Looks()
    bench = make(1, FakePort(), looks)
    ran: list[str] = []
    gate = bench.gate()
    bench.dispatcher.call_soon(lambda: (gate(), bench.dispatcher.defer(lambda: ran.append("deferred"))))
    assert gate.began.wait(PATIENCE)
    looks.look()
    looks.look()
    wait_until(lambda: bench.port.waiting == 1, what="the one that took over waits for packets")
    gate.go_on.set()
    wait_until(lambda: ran == ["deferred"])


def test_a_thread_relieved_in_what_was_deferred_waits_in_reserve(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatcher, "CROWD", 0)
    looks = Looks()
    bench = make(1, FakePort(lifo=True), looks)  # who waits last is served first
    dispatcher = bench.dispatcher
    ran: list[str] = []
    gate = bench.gate()

    def defer_two() -> None:
        assert dispatcher.defer(gate)
        assert dispatcher.defer(lambda: ran.append("second"))

    dispatcher.call_soon(defer_two)
    assert gate.began.wait(PATIENCE)
    looks.look()
    looks.look()
    wait_until(lambda: ran == ["second"], what="the rest is done by who takes over")
    assert dispatcher.stalled == 1
    gate.go_on.set()
    wait_until(lambda: dispatcher.stalled == 0)
    wait_until(lambda: bench.port.waiting == 1, what="one waits for packets, and one in reserve")
    blocked = bench.stall()
    assert blocked.thread != gate.thread
    assert dispatcher.threads == 2


def test_a_thread_that_takes_over_is_busy_with_what_was_deferred(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatcher, "CROWD", 0)
    looks = Looks()
    bench = make(1, FakePort(), looks)
    served = threading.Event()
    gates = [bench.gate(), bench.gate()]
    bench.dispatcher.call_soon(lambda: (bench.dispatcher.defer(gates[1]), gates[0]()))
    assert gates[0].began.wait(PATIENCE)
    for gate in gates:
        assert gate.began.wait(PATIENCE)
        bench.dispatcher.call_soon(served.set)
        assert not served.is_set()
        looks.look()
        looks.look()
    assert served.wait(PATIENCE), "a third one took over"
    assert bench.dispatcher.handoffs == 2


def test_where_several_threads_serve_nothing_is_deferred(make: Callable[..., Bench]) -> None:
    bench = make(4, FakePort(), Looks())

    def defer_behind_many() -> bool:
        for _ in range(10 * CROWD):
            bench.dispatcher.call_soon(lambda: None)
        return bench.dispatcher.defer(lambda: None)

    assert bench.call(defer_behind_many) is False, "a packet is what wakes an idle one"


def test_a_deferred_call_that_raises_is_logged(
    quiet: Bench, expects_errors: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatcher, "CROWD", 0)
    ran: list[str] = []

    def bad() -> None:
        raise ZeroDivisionError

    assert quiet.call(lambda: quiet.dispatcher.defer(bad)) is True
    assert quiet.call(lambda: quiet.dispatcher.defer(lambda: ran.append("second"))) is True
    wait_until(lambda: ran == ["second"])
    (record,) = expects_errors
    assert record.levelno == logging.CRITICAL
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize(("others", "rounds"), [(0, 0), (2, 3)])
def test_a_round_of_a_single_call_is_no_round_of_others(others: int, rounds: int, quiet: Bench) -> None:
    seen: list[int] = []

    def walk(steps: int) -> None:
        seen.append(quiet.dispatcher.round)
        for _ in range(others):
            quiet.dispatcher.call_soon(lambda: None)
        if steps:
            quiet.dispatcher.call_soon(lambda: walk(steps - 1))

    wait_until(lambda: quiet.port.waiting == 1)
    quiet.dispatcher.call_soon(lambda: walk(3))  # with the packet that wakes the thread; no other comes
    wait_until(lambda: len(seen) == 4)
    assert seen[3] - seen[0] == rounds


def test_figures_count_packets_and_calls_that_brought_some(quiet: Bench) -> None:
    quiet.call(lambda: None)
    wait_until(lambda: quiet.port.waiting == 1)
    packets, reaps = quiet.dispatcher.packets, quiet.dispatcher.reaps
    gate = quiet.stall()
    put(quiet.port, *[(0, 0)] * 10)
    gate.go_on.set()
    quiet.call(lambda: None)
    wait_until(lambda: quiet.dispatcher.packets - packets == 12)
    assert 2 <= quiet.dispatcher.reaps - reaps <= 4


@pytest.mark.parametrize("running", [1, 4])
def test_no_more_serve_at_a_time_than_may(running: int, make: Callable[..., Bench]) -> None:
    bench = make(running, looks=Looks())
    inside = most = 0
    lock, done = threading.Lock(), threading.Event()
    left = 400

    def handler() -> None:
        nonlocal inside, most, left
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0)  # lets others run, if there are any
        with lock:
            inside -= 1
            left -= 1
            if not left:
                done.set()

    for _ in range(400):
        bench.dispatcher.call_soon(handler)
    assert done.wait(PATIENCE)
    assert most <= running
    assert bench.dispatcher.threads == running
    assert bench.dispatcher.handoffs == 0


# -- a packet before its call has returned ------------------------------------------------------------------


def test_a_packet_may_be_handled_before_the_call_returns(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It happened to 1 of 100 receives when nobody made it happen; here it happens to each.
    handled: list[tuple[int, bytes]] = []
    came = threading.Event()
    receive = _win32.hot_receive
    left, right = socket.socketpair()

    def slow_to_return(*arguments: Any) -> int:
        failed = receive(*arguments)
        code = _win32.ctypes.get_last_error()
        right.sendall(b"hello")
        assert came.wait(PATIENCE)
        _win32.ctypes.set_last_error(code)
        return int(failed)

    def handler(operation: Operation, transferred: int, status: int) -> None:
        assert status == 0
        handled.append((operation.address, operation.buffer[:transferred]))
        operation.handler = None  # whoever touches it after its packet fails
        came.set()

    monkeypatch.setattr(_win32, "hot_receive", slow_to_return)
    with left, right:
        sock = OverlappedSocket(left.fileno(), left.family, bench.proactor)
        sock.associate(bench.port)
        for number in range(20):
            came.clear()
            operation = Operation(100)
            operation.handler = handler
            assert sock.receive(operation) == PENDING
            assert handled[number:] == [(operation.address, b"hello")]
            assert operation.address not in bench.proactor.pending


# -- stalls -------------------------------------------------------------------------------------------------


def test_a_handler_that_blocks_holds_nobody_back(bench: Bench) -> None:
    """One of 64 that are ready blocks; the others are served while it does, for another thread took over."""
    gate = bench.gate()
    served = [threading.Event() for _ in range(63)]
    began = time.monotonic()
    bench.dispatcher.call_soon(gate)
    for event in served:
        bench.dispatcher.call_soon(event.set)
    for event in served:
        assert event.wait(PATIENCE)
    print(f"the others waited for {time.monotonic() - began:.3f} s")
    assert not gate.go_on.is_set()
    assert gate.began.wait(PATIENCE)
    if bench.dispatcher._running_max == 1:
        assert bench.dispatcher.handoffs >= 1


def test_a_thread_that_blocks_is_replaced_after_two_looks_and_not_after_one(
    make: Callable[..., Bench],
) -> None:
    looks = Looks()
    bench = make(1, FakePort(), looks)
    dispatcher = bench.dispatcher
    gate = bench.stall()
    served = threading.Event()
    dispatcher.call_soon(served.set)
    looks.look()
    assert (dispatcher.handoffs, dispatcher.stalled, dispatcher.threads) == (0, 0, 1)
    assert not served.is_set()
    looks.look()
    assert (dispatcher.handoffs, dispatcher.stalled, dispatcher.threads) == (1, 1, 2)
    assert served.wait(PATIENCE)
    gate.go_on.set()
    wait_until(lambda: dispatcher.stalled == 0, what="the stalled thread comes back")
    assert dispatcher.threads == 2, "it waits in reserve"


def test_who_takes_over_is_looked_at_sooner(make: Callable[..., Bench]) -> None:
    # Several callbacks in a row that block must not add up.
    looks = Looks()
    bench = make(1, FakePort(), looks)
    gates = [bench.gate() for _ in range(3)]
    for gate in gates:
        bench.dispatcher.call_soon(gate)
    waits = []
    for gate in gates:
        assert gate.began.wait(PATIENCE)
        looks.look()
        looks.look()
        waits += [seconds for seconds, _function in looks.waiting]
    assert bench.dispatcher.handoffs == 3
    assert set(waits) == {STALL_CHECK_AGAIN}
    bench.call(lambda: None)
    for gate in gates:
        gate.go_on.set()
    wait_until(lambda: bench.port.waiting == 1, what="the thread that serves waits for packets")
    assert STALL_CHECK_AGAIN < STALL_CHECK


def test_a_relieved_thread_is_an_io_thread_but_does_not_serve(make: Callable[..., Bench]) -> None:
    looks = Looks()
    bench = make(1, FakePort(), looks)
    said: list[tuple[bool, bool]] = []

    def ask() -> None:
        said.append((bench.dispatcher.is_io_thread(), bench.dispatcher.is_serving()))

    gate = bench.gate()
    bench.dispatcher.call_soon(lambda: (ask(), gate(), ask()))
    assert gate.began.wait(PATIENCE)
    looks.look()
    looks.look()
    gate.go_on.set()
    wait_until(lambda: len(said) == 2)
    ask()
    assert said == [(True, True), (True, False), (False, False)]


def test_a_thread_that_gets_on_is_not_replaced(make: Callable[..., Bench]) -> None:
    looks = Looks()
    bench = make(1, FakePort(), looks)
    for _ in range(5):
        gate = bench.stall()  # another turn at each look
        looks.look()
        gate.go_on.set()
    assert bench.dispatcher.handoffs == 0
    assert bench.dispatcher.threads == 1


def test_looking_ends_when_nobody_is_busy_and_begins_again(make: Callable[..., Bench]) -> None:
    looks = Looks()
    bench = make(1, FakePort(), looks)
    for _ in range(3):
        bench.call(lambda: None)
        wait_until(lambda: bench.port.waiting == 1, what="the thread waits for packets")
        looks.look()
        assert looks.waiting == []
    gate = bench.stall()
    assert len(looks.waiting) == 1
    looks.look()
    looks.look()
    assert bench.dispatcher.handoffs == 1
    gate.go_on.set()


def test_the_reserve_is_used_before_new_threads_are_made(make: Callable[..., Bench]) -> None:
    looks = Looks()
    bench = make(1, FakePort(), looks)
    threads = set()
    for _ in range(5):
        gate = bench.stall()
        threads.add(gate.thread)
        looks.look()
        looks.look()
        bench.call(lambda: None)
        gate.go_on.set()
        wait_until(lambda: bench.dispatcher.stalled == 0)
    assert bench.dispatcher.handoffs == 5
    assert bench.dispatcher.threads == 2
    assert len(threads) == 2, "they took turns"


RESERVE_MAX = 4  # on Windows


def test_no_thread_ends_where_its_operations_go_with_it() -> None:
    wanted = STALLED_MAX if _win32.is_wine() else RESERVE_MAX
    assert wanted == _dispatcher.RESERVE_MAX


def test_the_reserve_is_bounded(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatcher, "RESERVE_MAX", RESERVE_MAX)
    looks = Looks()
    bench = make(1, FakePort(), looks)
    gates = []
    for _ in range(RESERVE_MAX + 3):
        gates.append(bench.stall())
        looks.look()
        looks.look()
    bench.call(lambda: None)
    assert bench.dispatcher.threads == RESERVE_MAX + 4
    assert bench.dispatcher.stalled == RESERVE_MAX + 3
    for gate in gates:
        gate.go_on.set()
    wait_until(lambda: bench.dispatcher.threads == RESERVE_MAX + 1, what="one that serves, and the reserve")
    assert bench.dispatcher.stalled == 0
    bench.call(lambda: None)


def test_at_the_most_stalled_threads_the_rest_waits_for_one_to_return(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., Bench]
) -> None:
    monkeypatch.setattr(_dispatcher, "STALLED_MAX", 2)
    looks = Looks()
    bench = make(1, FakePort(), looks)
    gates = []
    for _ in range(3):
        gates.append(bench.stall())
        looks.look()
        looks.look()
    assert bench.dispatcher.threads == 3
    served = threading.Event()
    bench.dispatcher.call_soon(served.set)
    for _ in range(3):
        if looks.waiting:
            looks.look()
    assert bench.dispatcher.threads == 3, "the limit"
    assert not served.is_set()
    gates[1].go_on.set()
    assert served.wait(PATIENCE), "who comes back serves at once"


def test_who_is_relieved_between_two_handlers_leaves_nothing_behind(make: Callable[..., Bench]) -> None:
    """A look may find a thread stalled that has just finished, and that goes on to reap a batch.

    It serves one packet, sees that it was relieved, and goes into reserve: the rest is for the one who waits.
    """
    hooks: list[Callable[[], None]] = []

    class Watched(Dispatcher):
        """Stops at each round of a thread, before it waits for packets."""

        @property
        def _stopping(self) -> bool:
            if hooks and self.is_serving():
                hooks.pop()()
            return self._stops

        @_stopping.setter
        def _stopping(self, value: bool) -> None:
            self._stops = value

        def is_serving(self) -> bool:
            return not self._lock.locked() and threading.get_ident() in self._serving

    looks = Looks()
    port = FakePort(lifo=True)  # who waits last is served first
    bench = make(1, port, looks, Watched)
    dispatcher = bench.dispatcher

    def relieve_me() -> None:
        looks.look()
        looks.look()  # the second one in the same turn
        wait_until(lambda: port.waiting == 1, what="the other one waits for packets")

    served: list[int] = []
    dispatcher.call_soon(lambda: hooks.append(relieve_me))
    wait_until(lambda: port.waiting == 2, what="both wait for packets")
    assert dispatcher.handoffs == 1
    operations = [bench.operation(lambda _op, count, _status: served.append(count)) for _ in range(5)]
    put(port, *[(operation.address, number) for number, operation in enumerate(operations)])
    wait_until(lambda: len(served) == 5, what="all five are served")
    assert served == list(range(5))


def test_asking_who_is_an_io_thread_while_threads_come_and_go(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatcher, "RESERVE_MAX", RESERVE_MAX)
    looks = Looks()
    bench = make(1, FakePort(), looks)
    done = threading.Event()
    wrong: list[Any] = []

    def ask() -> None:
        while not done.is_set():
            try:
                if bench.dispatcher.is_io_thread() or bench.dispatcher.stalled < 0:
                    wrong.append("it is none")
            except RuntimeError as exc:
                wrong.append(exc)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    for _ in range(5):
        gates = []
        for _ in range(RESERVE_MAX + 2):
            gates.append(bench.stall())
            looks.look()
            looks.look()
        for gate in gates:
            gate.go_on.set()
        wait_until(lambda: bench.dispatcher.threads == RESERVE_MAX + 1)
    done.set()
    for thread in asking:
        thread.join()
    assert not wrong


# -- handlers that raise ------------------------------------------------------------------------------------


def test_a_handler_that_raises_is_logged_and_the_thread_lives(
    make: Callable[..., Bench], io_threads: int, expects_errors: list[logging.LogRecord]
) -> None:
    bench = make(io_threads, looks=Looks())

    def bad(*_arguments: Any) -> None:
        raise ZeroDivisionError

    before = bench.dispatcher.threads
    operation = bench.operation(bad)
    put(bench.port, (operation.address, 1))
    bench.dispatcher.call_soon(bad)
    wait_until(lambda: len(expects_errors) == 2)
    bench.call(lambda: None)
    assert bench.dispatcher.threads == before
    for record in expects_errors:
        assert record.levelno == logging.CRITICAL
        assert record.exc_info
        assert record.exc_info[0] is ZeroDivisionError
    assert not bench.proactor.pending


class Rude(logging.Handler):
    """A user's handler that raises."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ZeroDivisionError


def test_a_log_handler_that_raises_ends_no_thread(
    make: Callable[..., Bench], io_threads: int, expects_errors: Any
) -> None:
    bench = make(io_threads, looks=Looks())

    def bad() -> None:
        raise LookupError

    log, rude = logging.getLogger("iocp_ctypes"), Rude()
    log.addHandler(rude)
    try:
        bench.dispatcher.call_soon(bad)
        wait_until(lambda: expects_errors)
        bench.call(lambda: None)
    finally:
        log.removeHandler(rude)
    assert bench.dispatcher.threads == bench.dispatcher._running_max
    assert bench.failures == []


class Breaking(FakePort):
    """Fails from some moment on."""

    broken: BaseException | None = None

    def reap(self, *arguments: Any) -> int:
        count = super().reap(*arguments)
        if self.broken is not None:
            raise self.broken
        return count


@pytest.mark.parametrize("kind", [OSError, MemoryError])
def test_a_thread_that_cannot_take_packets_says_so(
    kind: type[Exception], make: Callable[..., Bench], expects_errors: list[logging.LogRecord]
) -> None:
    port = Breaking()
    bench = make(1, port, Looks())
    port.broken = kind("broken")
    port.post()
    wait_until(lambda: bench.dispatcher.threads == 0)
    wait_until(lambda: bench.failures == [port.broken])
    wait_until(lambda: expects_errors)
    (record,) = expects_errors
    assert record.levelno == logging.CRITICAL
    assert record.exc_info
    assert record.exc_info[1] is port.broken


# -- the end ------------------------------------------------------------------------------------------------


def test_stop_packets_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has room for all wake packets at once; nevertheless each of eight threads hears of the end."""
    monkeypatch.setattr(_dispatcher, "BATCH_SHARED", 64)
    looks = Looks()
    for round_number in range(50):
        port = RealPort()
        dispatcher = Dispatcher(port, Proactor(), 8, looks)
        dispatcher.start()
        if round_number % 2:
            for _ in range(8):
                port.post()
        assert dispatcher.stop(PATIENCE) is True, f"round {round_number}"
        assert dispatcher.threads == 0
        port.close()


def test_all_threads_end_among_traffic(bench: Bench) -> None:
    storming = threading.Event()

    def storm() -> None:
        while not storming.is_set():
            bench.dispatcher.call_soon(lambda: None)

    threads = [threading.Thread(target=storm) for _ in range(2)]
    for thread in threads:
        thread.start()
    bench.call(lambda: None)
    assert bench.dispatcher.stop(PATIENCE) is True
    storming.set()
    for thread in threads:
        thread.join()


def test_threads_in_reserve_end_too(make: Callable[..., Bench]) -> None:
    looks = Looks()
    bench = make(1, FakePort(), looks)
    for gate in [bench.stall()]:
        looks.look()
        looks.look()
        gate.go_on.set()
    wait_until(lambda: bench.dispatcher.stalled == 0)
    assert bench.dispatcher.threads == 2


def test_stopping_waits_for_a_handler_and_gives_up_at_the_time_out(bench: Bench) -> None:
    gate = bench.stall()
    assert bench.dispatcher.stop(0.01) is False
    gate.go_on.set()
    assert bench.dispatcher.stop(PATIENCE) is True


def test_what_a_callback_left_to_do_is_done_after_stopping_gave_up(bench: Bench) -> None:
    # A callback that outlasts the stop still has its on_close after it.
    ran = threading.Event()
    gate = bench.gate()
    bench.dispatcher.call_soon(lambda: (gate(), bench.dispatcher.call_soon(ran.set)))
    assert gate.began.wait(PATIENCE)
    assert bench.dispatcher.stop(0.01) is False
    gate.go_on.set()
    assert ran.wait(PATIENCE)
    assert bench.dispatcher.stop(PATIENCE) is True


def test_a_handler_may_stop_its_own_dispatcher(bench: Bench) -> None:
    said: list[bool] = []
    done = threading.Event()

    def stop() -> None:
        said.append(bench.dispatcher.stop(PATIENCE))
        done.set()

    bench.dispatcher.call_soon(stop)
    assert done.wait(PATIENCE)
    assert said == [True]
    wait_until(lambda: bench.dispatcher.threads == 0)


def test_a_port_that_fails_ends_its_threads_and_is_told(
    expects_errors: list[logging.LogRecord], make: Callable[..., Bench]
) -> None:
    bench = make(1, FakePort(), Looks())
    bench.port.close()
    bench.port.put((0, 0))  # wakes the one that waits; its next call is refused
    wait_until(lambda: bench.dispatcher.threads == 0)
    (record,) = expects_errors
    assert record.levelno == logging.CRITICAL
    assert "port" in record.getMessage()
