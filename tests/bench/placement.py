"""Which processor does what in a run: servers and wineserver on the first, the load generator on the others.

Why: a request to wineserver stands for a system call, which on Windows runs on the processor of its caller.
Left to itself Linux has the two on one processor or on two, as it happens, and on two each request wakes an
idle processor twice: the same server then did 1,900 connections a second in place of 3,050, so that a run
measured where Linux had put the processes. And the load generator takes nothing from the server it measures.
Laws: (i) all servers alike; (ii) a server that uses several processors is not measured so: that is what
`free` is for; (iii) where nothing can be placed (one processor, no such call) all is left as it is, and the
report says so; (iv) a server is there when it starts: Wine puts each thread that a process makes where the
process was at first, so whoever is moved later has its new threads left behind.

`prompt` adds: a thread of a server whose call has returned runs at once, as on Windows. Otherwise wineserver
may keep the processor until the next tick of Linux, up to 4 ms: while connections wait in the listen queue it
looks for who takes the last one until the server does, and the server waits for the processor. Such a pause,
no server's doing, hits one AcceptEx in a hundred, and is what the p99 of a storm shows.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CHOICES = ("split", "free", "prompt")
HELP = ("split: servers and wineserver on one processor, the load generator on the others; free: where the "
        "system puts them, which is for servers that use several, such as a free-threaded Python's; prompt: "
        "as split, and the servers' threads are real-time threads, for which one must be root "
        "(default: %(default)s)")


class Placement(NamedTuple):
    """Where the servers run."""

    processors: list[int]
    prompt: bool = False


def sides(processors: Iterable[int]) -> tuple[list[int], list[int]]:
    """Returns: the processors of the servers and those of the load generator; one alone is for both."""
    ordered = sorted(processors)
    return (ordered[:1], ordered[1:]) if len(ordered) > 1 else (ordered, ordered)


def take_sides(choice: str) -> Placement | None:
    """Moves this process, and with it all that it starts, to the side of the load generator.

    Returns: the place of the servers; None: leave them where they are.
    """
    if choice == "free" or sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        return None
    if choice == "prompt" and not _may_be_prompt():
        raise SystemExit("--placement prompt: this user may not start real-time threads; root may")
    servers, load = sides(os.sched_getaffinity(0))
    os.sched_setaffinity(0, load)
    return Placement(servers, choice == "prompt")


@contextlib.contextmanager
def at(place: Placement | None) -> Iterator[None]:
    """For a `with` block puts this thread, and what it starts, where the servers are."""
    if sys.platform != "linux" or place is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, place.processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def move(servers: Iterable[int], wineservers: Iterable[int], place: Placement | None) -> None:
    """Moves every thread of these processes; a thread that ends meanwhile is no matter."""
    if sys.platform != "linux" or place is None:
        return
    for pids, prompt in ((servers, place.prompt), (wineservers, False)):
        for pid in pids:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    with contextlib.suppress(OSError):
                        os.sched_setaffinity(int(task.name), place.processors)
                        if prompt:  # the lowest priority of those that need not wait for others
                            os.sched_setscheduler(int(task.name), os.SCHED_RR, os.sched_param(1))


if sys.platform == "linux":

    def _may_be_prompt() -> bool:
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except PermissionError:
            return False
        os.sched_setscheduler(0, *before)
        return True


def described(place: Placement | None) -> str:
    """Returns: for the heading of a report, who runs where."""
    if place is None:
        return "processors left to the system"
    where = f"servers and wineserver on processor {', '.join(map(str, place.processors))}"
    return f"{where}, load generator elsewhere{', servers before wineserver' if place.prompt else ''}"
