"""The tests again and again: `python3 tests/soak/again.py [--times 10] [--minutes 600]`.

Runs the tests that need Windows, all of them, so many times in a row with each Python and each number of I/O
threads (`--pythons 3.11,3.13t --io-threads 1,4`), in `--lanes`, each with a Wine of its own on a processor of
its own. Prints a line for each run; what a run said that failed is kept in the folder `--keep`. Exit code: 0
where all passed, 1 where one did not or time ran out.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import windows

RUN_MAX_S = 1800
PURE = ("import", "win32_layout", "win32files", "main")  # of the pure tests those that Windows may differ in
ONTO = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.argv[2], sys.argv[2:])"
Job = tuple[int, str, str]


def jobs(times: int, pythons: list[str], io_threads: list[str]) -> Iterator[Job]:
    """Each Python with each number of threads, then all of them again."""
    for turn in range(times):
        for threads in io_threads:
            for python in pythons:
                yield turn + 1, python, threads


class Lanes:
    """Several runs at a time; what they have in common is under the lock."""

    def __init__(self, todo: Iterator[Job], minutes: float, keep: Path) -> None:
        self._todo = todo
        self._until = time.monotonic() + 60 * minutes
        self._keep = keep
        self._lock = threading.Lock()
        self.passed: collections.Counter[tuple[str, str]] = collections.Counter()
        self.bad: list[str] = []
        self.late = False

    def serve(self, lane: int, processor: int | None) -> None:
        """Do one job after the other. On a thread of the lane's own."""
        environment = dict(os.environ)
        if lane:  # the first uses what is there
            environment["IOCP_CTYPES_CACHE"] = str(windows.cache_folder() / f"lane-{lane}")
        onto = [] if processor is None else [sys.executable, "-c", ONTO, str(processor)]
        while job := self._next():
            _turn, python, threads = job
            environment["IOCP_CTYPES_TEST_IO_THREADS"] = threads
            began = time.monotonic()
            command = [*onto, sys.executable, "tests/windows.py", "--python", python]
            command += ["--timeout", str(RUN_MAX_S), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            command += ["tests/bound", *(f"tests/pure/test_{name}.py" for name in PURE)]
            done = subprocess.run(
                command,
                cwd=windows.CHECKOUT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            self._note(job, done, time.monotonic() - began)

    def end(self) -> None:
        """Begin no run any more."""
        with self._lock:
            self._until = 0.0

    def _next(self) -> Job | None:
        with self._lock:
            job = next(self._todo, None)
            if job and time.monotonic() > self._until:
                self.late = True
                return None
            return job

    def _note(self, job: Job, done: subprocess.CompletedProcess[bytes], took: float) -> None:
        turn, python, threads = job
        said = done.stdout.decode(errors="replace")
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        line = f"{turn}. {python}, {threads} I/O threads, {took:.0f} s: {last}"
        with self._lock:
            print(line, flush=True)
            if done.returncode == 0:
                self.passed[python, threads] += 1
                return
            self.bad.append(line)
            file = self._keep / f"{turn}-{python}-{threads}.txt"
            file.write_text(said, encoding="utf-8")
            print(f"   exit code {done.returncode}, see {file}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--pythons", default="3.11,3.12,3.13,3.13t", help="(default: %(default)s)")
    parser.add_argument("--io-threads", default="1,4", help="0: the default (default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=600, help="begin no run later")
    parser.add_argument("--keep", type=Path, default=Path.cwd(), help="folder for what failed runs said")
    options = parser.parse_args()
    todo = jobs(options.times, options.pythons.split(","), options.io_threads.split(","))
    lanes = Lanes(todo, options.minutes, options.keep)
    processors = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [None]
    threads = [
        threading.Thread(target=lanes.serve, args=(lane, processors[lane % len(processors)]))
        for lane in range(options.lanes)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:  # it ended the runs under way as well
        lanes.end()
    for (python, number), count in sorted(lanes.passed.items()):
        print(f"{python} with {number} I/O threads: passed {count} times")
    if lanes.late:
        print(f"time ran out after {options.minutes:g} minutes")
    for line in lanes.bad:
        print(f"FAILED: {line}")
    return 1 if lanes.bad or lanes.late else 0


if __name__ == "__main__":
    sys.exit(main())
