"""A Python program of the checkout in a process of its own, whose output comes line by line."""

from __future__ import annotations

import contextlib
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Seconds for a line or for an end: a start takes up to 4 s under Wine, and the machine may be busy.
PATIENCE = 60.0
#: What a server of several processes logs where the system, under load, cannot make one at once (Wine: 1359).
SHORT = "no process could be made: OSError"
#: What a process logs whose threads are held up for a second while it ends.
LATE = "left threads behind that callbacks keep"


class Program:
    """A program that runs; stdout and stderr are one."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        self._lines: queue.Queue[str | None] = queue.Queue()  # None: there will be no more
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                if SHORT not in line and LATE not in line:
                    self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for the next line, which must be like `pattern`."""
        line = self._lines.get(timeout=PATIENCE)
        match = re.fullmatch(pattern, "(the end)" if line is None else line)
        assert match, f"{line!r} is not like {pattern!r}; then came {self.rest()}"
        return match

    def listening(self) -> tuple[str, int]:
        """Wait for the line that says where it listens."""
        host, port = self.line(r"listening on ([0-9.]+):(\d+)").groups()
        return host, int(port)

    def ended(self) -> tuple[int, list[str]]:
        """Wait for the end by itself: the exit code and the lines that were not asked for."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code, self.rest()

    def rest(self) -> list[str]:
        """The lines so far that were not asked for."""
        return [line for line in list(self._lines.queue) if line is not None]

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Program]:
    """Run a server for a `with` block; it must not end or write, above all no traceback, unless asked to."""
    program = Program(*arguments)
    try:
        yield program
        assert program.process.poll() is None, f"it ended by itself: {program.ended()}"
    finally:
        program.kill()
    assert program.rest() == []
