"""The server process of a soak run, as the machine that drives it sees it.

Owns: one program, `soak.served`, from its start to its end; on Linux it is a Windows program under Wine.
Law: everything ends; a server that does not answer in ANSWER_MAX_S is an error.
"""

from __future__ import annotations

import importlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import Figures

TESTS = Path(__file__).resolve().parent.parent
ANSWER_MAX_S = 60.0  # the first start under Wine starts Wine, too
POLL_S = 0.1

Address = tuple[str, int]


class Lost(Exception):
    """The server process ended or did not answer; says what it printed last."""


class ServerProcess:
    """A context manager: starts the server and ends it. Not thread-safe."""

    def __init__(self, python: str | None, program: str = "soak.served", **options: Any) -> None:
        """Prepare a server with these options of `Server`; `python` is a tag as of tests/windows.py.

        `program` is the module that serves.
        """
        self._program = program
        self._target = importlib.import_module("windows").prepare(python)
        self._options = options
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process: Any = None
        self._unasked: list[str] = []  # what it printed since it listens, besides answers
        self.address: Address = ("", 0)

    def __enter__(self) -> ServerProcess:
        self._process = self._target.popen(
            ["-m", self._program, json.dumps(self._options)],
            cwd=str(TESTS),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            host, port = self._answer()["address"]
        except BaseException:
            self._process.end()
            raise
        self.address = (host, port)
        self._unasked.clear()  # Wine's own words while it starts
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.end()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def ask(self, command: str, seconds: float = ANSWER_MAX_S) -> dict[str, Any]:
        """Give a command and return what is answered."""
        self.tell(command)
        return self._answer(seconds)

    def figures(self) -> Figures:
        """Ask for the figures of this instant."""
        return Figures(**self.ask("figures"))

    def settled(self, condition: Callable[[Figures], bool], seconds: float) -> Figures:
        """Ask until the condition holds or the time is over; returns the last figures either way."""
        limit = time.monotonic() + seconds
        while not condition(now := self.figures()) and time.monotonic() < limit:
            time.sleep(POLL_S)
        return now

    def stop(self) -> Figures:
        """Stop the server; returns what is left over. The program ends by itself then."""
        return Figures(**self.stop_asked())

    def stop_asked(self) -> dict[str, Any]:
        """Stop the server; returns what it answers."""
        left = self.ask("stop")
        if (code := self.ended(ANSWER_MAX_S)[0]) != 0:
            raise Lost(f"the server's program ended with exit code {code}")
        return left

    def ended(self, seconds: float) -> tuple[int, list[str]]:
        """Wait until the program has ended by itself; returns its exit code, and what it printed unasked."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Lost(f"the server's program did not end in {seconds:g} s") from None
        return code, self._unasked + list(iter(self._lines.get, None))

    def tell(self, command: str) -> None:
        """Give a command that is not answered."""
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()

    def _read(self) -> None:
        with self._process.stdout as pipe:
            for raw in pipe:
                self._lines.put(raw.decode(errors="replace").strip())
        self._lines.put(None)

    def _answer(self, seconds: float = ANSWER_MAX_S) -> dict[str, Any]:
        """Return the next line that is an object of JSON; what else is printed goes to stderr."""
        last = "nothing"
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                raise Lost(f"no answer in {seconds:g} s; last: {last}") from None
            if line is None:
                raise Lost(f"the server's program ended; last: {last}")
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
            last = line or last
            self._unasked.append(line)
            print(line, file=sys.stderr)
