"""Locks by number: which one, how many, and that one may be taken again by who has it."""

from __future__ import annotations

import threading

from iocp_ctypes._locks import LOCKS, lock_number, make_locks


def test_numbers_go_round() -> None:
    assert [lock_number(number) for number in (0, 1, LOCKS - 1, LOCKS, 10 * LOCKS + 3)] == [
        0,
        1,
        LOCKS - 1,
        0,
        3,
    ]


def test_each_kind_has_its_own() -> None:
    one, other = make_locks(), make_locks()
    assert len(set(map(id, one + other))) == 2 * LOCKS


def test_they_are_reentrant_and_exclusive() -> None:
    lock = make_locks()[0]
    taken: list[bool] = []
    with lock, lock:
        thread = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
    assert taken == [False]
