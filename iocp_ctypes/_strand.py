"""A strand: the callbacks of one connection, one at a time and in order (layer P: pure).

Laws
1. At most one thread runs a strand's tasks at any moment; tasks run in the order in which they were posted.
2. `post` appends before it tries for the token, and a runner looks at the queue again after it gave the token
   back: so no task is left behind, without a lock around either.
3. A task never runs inside `post`: who posts may hold locks of his own.
4. A runner runs what was queued when it began, or once what is when it leaves, and hands the rest to
   `execute`, so that one strand cannot keep a thread to itself.
5. `execute` has at most one callable of a strand: it is handed over with the token. What posts itself again
   for ever therefore neither fills the executor's queue nor crowds out other strands.
6. `_runner` is the thread that has the token, 0 while the token is handed over, and old where nobody has it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any


class Strand:
    """The running flag and the queue."""

    __slots__ = ("_execute", "_runner", "_tasks", "_token")

    def __init__(self, execute: Callable[[Callable[[], None]], None]) -> None:
        """Make a strand; `execute` runs a callable soon on a thread where this strand's tasks belong."""
        # Whoever pops the token is the runner, or has asked `execute` for one. A list does what a lock would,
        # without waiting and without the semaphore that CPython makes for every lock on Windows: there are as
        # many strands as connections.
        self._token = [True]
        self._tasks: deque[tuple[Callable[..., object], tuple[Any, ...]]] | None = (
            None  # made when first needed
        )
        self._execute = execute
        self._runner = 0

    def enter(self) -> bool:
        """Become the runner without waiting.

        False where somebody runs or tasks wait (then `post` instead).
        """
        if self._tasks:
            return False
        try:
            self._token.pop()
        except IndexError:
            return False
        self._runner = get_ident()
        return True

    def go_on(self) -> None:
        """Be the runner in place of the thread that entered, which has asked for this and runs nothing."""
        self._runner = get_ident()

    def runs_elsewhere(self) -> bool:
        """Whether another thread is the runner at this instant; false while tasks only wait for one."""
        return not self._token and self._runner not in (0, get_ident())

    def _take(self) -> bool:
        try:
            return self._token.pop()
        except IndexError:
            return False

    def leave(self) -> None:
        """Stop being the runner; what was posted meanwhile is handed on."""
        if not self._tasks:
            self._token.append(True)
            if not self._tasks or not self._take():
                return
        self._hand_over()

    def leave_done(self) -> None:
        """As `leave`, but run first, once, what was posted meanwhile: often the last there will be."""
        if self._tasks:
            self._drain()
        else:
            self.leave()

    def _hand_over(self) -> None:
        """Have the tasks run by a thread that gets the token with the call."""
        self._runner = 0
        self._execute(self._drain)

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Queue a call; tasks must not raise."""
        if self._tasks is None:
            self._make_queue()
        assert self._tasks is not None
        self._tasks.append((function, args))
        if self._take():
            self._hand_over()

    def _make_queue(self) -> None:
        with _making:  # two posts at once must not make two queues
            if self._tasks is None:
                self._tasks = deque()

    def _drain(self) -> None:
        """Run what is queued now, with the token that came with the call."""
        self._runner = get_ident()
        tasks = self._tasks
        assert tasks is not None
        try:
            for _ in range(len(tasks)):
                function, args = tasks.popleft()
                function(*args)
        finally:
            self.leave()


_making = threading.Lock()
