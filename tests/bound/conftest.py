"""Guards around every test on Windows: what it started has ended, and the library had no complaint."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support import IO_THREADS, Echo, forget, handle_count, reachable, serving, wait_until

from iocp_ctypes import engine as engine_module

#: Handles that come and go on their own: Windows and Wine keep some for a while.
HANDLES_TOLERATED = 5


class _Errors(logging.Handler):
    """Keeps what the library logs as ERROR or CRITICAL."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []
        self.expected = False

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _of_library() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("iocp_ctypes")}


def _of_engines(engines: set[engine_module.Engine]) -> set[threading.Thread | None]:
    """I/O threads they have now: the server of a whole module may call in another one at any time."""
    return {worker.thread for engine in engines for worker in tuple(engine.dispatcher._workers)}


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Errors]:
    """After each test: no thread of the library, no pending operation, no unexpected ERROR in its log."""
    forget()
    # What a test before left behind, it has been blamed for.
    threads, running = _of_library(), set(engine_module._engines)
    tables: list[dict[int, Any]] = []  # not the engines, which have locks, which are handles
    build = engine_module.Engine.__init__

    def noting(self: engine_module.Engine, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        tables.append(self.proactor.pending)

    monkeypatch.setattr(engine_module.Engine, "__init__", noting)
    errors = _Errors()
    log = logging.getLogger("iocp_ctypes")
    log.addHandler(errors)
    try:
        yield errors
        wait_until(
            lambda: _of_library() <= threads | _of_engines(running), what=f"no thread left: {_of_library()}"
        )
        assert set(engine_module._engines) <= running, "an engine was left running"
        for pending in tables:
            assert not pending, f"{len(pending)} operations are pending"
        logged = [record.getMessage() for record in errors.records]
        if errors.expected:
            assert logged, "the test expects errors in the log, and there are none"
        else:
            assert not logged, f"the library logged errors: {logged}"
    finally:
        log.removeHandler(errors)


@pytest.fixture
def expects_errors(guards: _Errors) -> list[logging.LogRecord]:
    """Say that the library shall log errors in this test; returns the list they come into."""
    guards.expected = True
    return guards.records


@pytest.fixture
def flat_handles() -> Iterator[None]:
    """Assert that the test leaves as many kernel handles as there were before it."""
    with serving(Echo) as server:  # what is made once and kept is made now
        reachable(server.address)
    del server  # with its locks
    wait_until(lambda: not _of_library())
    forget()
    before = handle_count()
    yield
    wait_until(lambda: not _of_library())
    forget()
    wait_until(
        lambda: handle_count() <= before + HANDLES_TOLERATED,
        timeout=5,
        what=f"handle count at most {before} + {HANDLES_TOLERATED}, now {handle_count()}",
    )


@pytest.fixture(params=[IO_THREADS] if IO_THREADS else [1, 4])
def io_threads(request: pytest.FixtureRequest) -> int:
    """Run a test of concurrency with one I/O thread and with four, or as support.IO_THREADS says."""
    return int(request.param)
