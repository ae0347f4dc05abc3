"""Which processor does what in a run: servers and wineserver on the first, the load generator on the others.

Why: a request to wineserver stands for a system call, which on Windows runs on the processor of its caller.
Left to itself Linux has the two on one processor or on two, as it happens, and on two each request wakes an
idle processor twice: the same server then did 1,900 connections a second in place of 3,050, so that a run
measured where Linux had put the processes. And the load generator takes nothing from the server it measures.
Laws: (i) all servers alike; (ii) a server that uses several processors is not measured so: that is what
`free` is for; (iii) where nothing can be placed (one processor, no such call) all is left as it is, and the
report says so.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

CHOICES = ("split", "free")
HELP = ("split: servers and wineserver on one processor, the load generator on the others; free: where the "
        "system puts them, which is for servers that use several, such as a free-threaded Python's "
        "(default: %(default)s)")


def sides(processors: Iterable[int]) -> tuple[list[int], list[int]]:
    """Returns: the processors of the servers and those of the load generator; one alone is for both."""
    ordered = sorted(processors)
    return (ordered[:1], ordered[1:]) if len(ordered) > 1 else (ordered, ordered)


def take_sides(choice: str) -> list[int] | None:
    """Moves this process, and with it all that it starts, to the side of the load generator.

    Returns: the processors for the servers; None: leave them where they are.
    """
    if choice == "free" or sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        return None
    servers, load = sides(os.sched_getaffinity(0))
    os.sched_setaffinity(0, load)
    return servers


def move(pids: Iterable[int], processors: Sequence[int] | None) -> None:
    """Moves every thread of these processes; a thread that ends meanwhile is no matter."""
    if sys.platform != "linux" or processors is None:
        return
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(task.name), processors)


def described(processors: Sequence[int] | None) -> str:
    """Returns: for the heading of a report, who runs where."""
    if processors is None:
        return "processors left to the system"
    return f"servers and wineserver on processor {', '.join(map(str, processors))}, load generator elsewhere"
