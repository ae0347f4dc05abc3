"""Runs a module as `python -m` does, each thread under cProfile, and prints what a window of time went into.

`python -m bench.profiled DELAY SECONDS MODULE ARGUMENTS…`: after DELAY it notes how often each function was
called and for how long, SECONDS later again, and prints the differences as one line of JSON after `MARK`.

It needs Python 3.11: from 3.12 on only one cProfile can be active in a process, not one for each thread.
"""

from __future__ import annotations

import cProfile
import json
import runpy
import sys
import threading
import time
from types import FrameType
from typing import Any

MARK = "profile: "

Stats = dict[str, tuple[int, float, float]]
profiles: list[cProfile.Profile] = []


def begin(_frame: FrameType | None = None, _event: str = "", _argument: Any = None) -> None:
    """Puts the thread that calls it under a profile of its own; the hook of new threads, at their start."""
    sys.setprofile(None)
    profile = cProfile.Profile()
    profiles.append(profile)
    profile.enable()


def label(code: Any) -> str:
    """Returns: what the report calls a function: file:line name, or the name of a built-in one."""
    if isinstance(code, str):
        return code.strip("<>")
    file = "/".join(code.co_filename.replace("\\", "/").split("/")[-2:])
    return f"{file}:{code.co_firstlineno} {code.co_name}"


def snapshot() -> Stats:
    """Returns: calls, seconds in the function itself, seconds with what it calls; all threads, so far."""
    total: Stats = {}
    for profile in list(profiles):
        # getstats() copies under the GIL: the threads may go on.
        for entry in profile.getstats():
            name = label(entry.code)
            calls, own, cumulative = total.get(name, (0, 0.0, 0.0))
            total[name] = (calls + entry.callcount, own + entry.inlinetime, cumulative + entry.totaltime)
    return total


def watch(delay: float, seconds: float) -> None:
    """Waits, and prints the difference of two snapshots."""
    time.sleep(delay)
    before = snapshot()
    time.sleep(seconds)
    rows = []
    for name, (calls, own, cumulative) in snapshot().items():
        old = before.get(name, (0, 0.0, 0.0))
        if calls > old[0]:
            rows.append([name, calls - old[0], own - old[1], cumulative - old[2]])
    print(MARK + json.dumps(rows), flush=True)


def main() -> None:
    if sys.version_info >= (3, 12):
        sys.exit("profiling needs Python 3.11")
    delay, seconds, module, *arguments = sys.argv[1:]
    # Before the hook is set: the watching thread is not to be profiled.
    threading.Thread(target=watch, args=(float(delay), float(seconds)), daemon=True).start()
    threading.setprofile(begin)
    begin()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
