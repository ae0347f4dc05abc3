"""Work threads: pinned by number, in order, until the end."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import Echo, echoes, made, raw, serving, wait_until

from iocp_ctypes.workers import WorkThreads

PATIENCE = 10


@pytest.fixture(params=[1, 4])
def workers(request: pytest.FixtureRequest) -> Iterator[WorkThreads]:
    threads = WorkThreads(request.param)
    threads.start()
    yield threads
    assert threads.stop(PATIENCE)


class Gate:
    """A task that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.began.set()
        assert self.go_on.wait(PATIENCE)


def call(execute: Callable[[Any], None], function: Callable[[], Any]) -> Any:
    """Run a function there and return what it returned."""
    answers: list[Any] = []
    done = threading.Event()
    execute(lambda: (answers.append(function()), done.set()))
    assert done.wait(PATIENCE)
    return answers[0]


def test_a_number_has_one_thread_for_ever(workers: WorkThreads) -> None:
    threads: dict[int, set[int]] = defaultdict(set)
    for _ in range(3):
        for number in range(20):
            threads[number].add(call(workers.executor(number), threading.get_ident))
    assert all(len(idents) == 1 for idents in threads.values())
    count = len(workers.queued())
    assert len(set().union(*threads.values())) == count
    assert threads[0] == threads[count] == threads[2 * count]


def test_a_number_keeps_its_thread_though_others_are_free() -> None:
    workers = WorkThreads(3)
    workers.start()
    gate = Gate()
    workers.executor(0)(gate)
    assert gate.began.wait(PATIENCE)
    ran: list[int] = []
    workers.executor(3)(lambda: ran.append(threading.get_ident()))
    busy = workers.queued()
    others = {call(workers.executor(number), threading.get_ident) for number in (1, 2)}
    assert ran == []
    assert busy == (1, 0, 0)
    gate.go_on.set()
    assert workers.stop(PATIENCE)
    assert len(ran) == 1
    assert not set(ran) & others


def test_tasks_of_a_thread_run_in_order(workers: WorkThreads) -> None:
    ran: list[int] = []
    execute = workers.executor(5)
    for number in range(500):
        execute(lambda number=number: ran.append(number))
    call(execute, lambda: None)
    assert ran == list(range(500))


def test_a_task_that_raises_is_logged_and_the_thread_lives(expects_errors: list[logging.LogRecord]) -> None:
    workers = WorkThreads(1)
    workers.start()

    def bad() -> None:
        raise ZeroDivisionError

    before = call(workers.executor(0), threading.get_ident)
    workers.executor(0)(bad)
    assert call(workers.executor(0), threading.get_ident) == before
    (record,) = expects_errors
    assert record.levelno == logging.CRITICAL
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError
    assert workers.stop(PATIENCE)


def test_threads_know_themselves(workers: WorkThreads) -> None:
    assert workers.is_work_thread() is False
    assert call(workers.executor(1), workers.is_work_thread) is True
    other = WorkThreads(1)
    assert call(workers.executor(1), other.is_work_thread) is False


def test_stopping_runs_first_what_is_queued() -> None:
    workers = WorkThreads(2)
    workers.start()
    gate, ran = Gate(), []
    workers.executor(0)(gate)
    for number in range(10):
        workers.executor(0)(lambda number=number: ran.append(number))
    assert gate.began.wait(PATIENCE)
    assert workers.stop(0.01) is False
    gate.go_on.set()
    assert workers.stop(PATIENCE) is True
    assert ran == list(range(10))
    assert workers.stop(PATIENCE) is True, "again is harmless"


def test_stopping_from_one_of_them_does_not_wait_for_itself(workers: WorkThreads) -> None:
    assert call(workers.executor(0), lambda: workers.stop(PATIENCE)) is True
    wait_until(lambda: not any(thread.is_alive() for thread in workers._threads))


def test_their_threads_keep_the_interpreter_from_ending_under_them() -> None:
    assert not any(thread.daemon for thread in WorkThreads(2)._threads)
    assert [thread.name for thread in WorkThreads(2)._threads] == ["iocp_ctypes work 1", "iocp_ctypes work 2"]


def test_connections_are_pinned(io_threads: int) -> None:
    with serving(Echo, work_threads=3, io_threads=io_threads) as server:
        clients = [raw(server.address) for _ in range(9)]
        for _ in range(3):
            for client in clients:
                echoes(client)
        connections = made(Echo, 9)
        assert server.stats().work_queued == (0, 0, 0)
        for client in clients:
            client.close()
        for connection in connections:
            connection.until("close")
    by_thread: dict[int, set[int]] = defaultdict(set)
    for connection in connections:
        connection.check()
        (ident,) = connection.threads
        by_thread[ident].add(connection.id % 3)
    assert all(len(numbers) == 1 for numbers in by_thread.values()), "a thread has its numbers"
    assert len(by_thread) == 3
