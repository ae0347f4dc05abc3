"""A relay: turns in the order of coming, in rounds, none lost; by hand, and by hammering."""

from __future__ import annotations

import threading
from collections import deque

import pytest
from test_strand import Later, Task

from iocp_ctypes._relay import ROUND, Relay


def run_all(later: Later) -> int:
    """Run what the executor was given, and what comes of it; return how many calls that were."""
    calls = 0
    while later.tasks:
        assert len(later.tasks) == 1, "one call under way at a time"
        later.run_one()
        calls += 1
    return calls


def test_turns_come_in_order_and_in_rounds() -> None:
    later, seen = Later(), []
    relay = Relay(later)
    for number in range(2 * ROUND + 1):
        relay.add(lambda number=number: seen.append(number))
    assert not seen
    later.run_one()
    assert seen == list(range(ROUND))
    assert run_all(later) == 2
    assert seen == list(range(2 * ROUND + 1))


def test_a_turn_never_runs_inside_add_and_may_add() -> None:
    later, seen = Later(), []
    relay = Relay(later)

    def again() -> None:
        seen.append("again")
        relay.add(lambda: seen.append("once more"))
        seen.append("added")

    relay.add(again)
    assert run_all(later) == 2
    assert seen == ["again", "added", "once more"]
    relay.add(lambda: seen.append("later"))
    assert run_all(later) == 1, "the token came back"
    assert seen[-1] == "later"


def test_a_turn_that_raises_keeps_nobody_from_theirs() -> None:
    later, seen = Later(), []
    relay = Relay(later)

    def broken() -> None:
        raise MemoryError

    relay.add(broken)
    relay.add(lambda: seen.append(1))
    with pytest.raises(MemoryError):
        later.run_one()
    assert run_all(later) == 1
    relay.add(broken)
    with pytest.raises(MemoryError):
        later.run_one()
    relay.add(lambda: seen.append(2))
    assert run_all(later) == 1
    assert seen == [1, 2]


@pytest.mark.parametrize("threads", [1, 4])
def test_none_is_lost_by_hammering(threads: int) -> None:
    each, seen = 5000, [0] * threads
    tasks: deque[Task] = deque()
    waiting = threading.Semaphore(0)

    def execute(task: Task) -> None:
        tasks.append(task)
        waiting.release()

    def serve() -> None:
        while True:
            waiting.acquire()
            if not tasks:
                return
            tasks.popleft()()

    relay = Relay(execute)

    def turn(which: int) -> Task:
        def run() -> None:
            seen[which] += 1  # only one thread walks at a time

        return run

    def add(which: int) -> None:
        for _ in range(each):
            relay.add(turn(which))

    servers = [threading.Thread(target=serve) for _ in range(2)]
    adders = [threading.Thread(target=add, args=(which,)) for which in range(threads)]
    for thread in servers + adders:
        thread.start()
    for thread in adders:
        thread.join()
    done = threading.Event()
    relay.add(done.set)
    assert done.wait(10)
    for _ in servers:
        waiting.release()
    for thread in servers:
        thread.join()
    assert seen == [each] * threads
