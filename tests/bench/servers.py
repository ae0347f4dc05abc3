"""The servers of a benchmark run: how each is started, found in the process table and ended.

Owns: the processes it starts, and no others; each carries a mark in its environment, and only marked Python
processes are read or ended. On Linux the servers are Windows programs under Wine: see `tests/windows.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .cycle import Address
from .placement import Placement, at, move
from .usage import Watched, command_line, marked_processes, process_name

TESTS = Path(__file__).resolve().parent.parent
MARK = "IOCP_CTYPES_BENCH"
START_MAX_S = 60.0  # the first start under Wine starts Wine, too
END_MAX_S = 5.0
LAST_LINES = 12
READY = re.compile(r"listening on (\S+):(\d+)")


@dataclass(frozen=True)
class Kind:
    """A server to compare: the name of its column, Python's arguments that start it, packages it needs."""

    name: str
    arguments: tuple[str, ...]
    packages: tuple[str, ...] = ()
    idle_max: int = 2000  # connections in the measure of memory


def ours(name: str, options: Sequence[str]) -> Kind:
    """Returns: our echo server with `options` of its command line."""
    start = ("-m", "iocp_ctypes", "echo", "--host", "127.0.0.1", "--port", "0")
    return Kind(name, (*start, *options))


PEERS = {
    "asyncio": Kind("asyncio", ("-m", "bench.peers.asyncio_proactor")),
    # 500 show what a thread takes as well as 2,000 do, whose ending keeps Wine busy for ten seconds.
    "threading": Kind("threading", ("-m", "bench.peers.threading_server"), idle_max=500),
    "winloop": Kind("winloop", ("-m", "bench.peers.winloop_server"), ("winloop",)),
    "twisted": Kind("twisted", ("-m", "bench.peers.twisted_iocp"),
                    ("twisted", "twisted-iocpsupport", "pywin32")),
}


class Starter(Protocol):
    """What starts a Windows Python: the part of the Target of `tests/windows.py` that is used here."""

    def environment(self) -> dict[str, str]: ...

    def popen(self, args: Sequence[str], **options: Any) -> subprocess.Popen[bytes]: ...


class NativePython:
    """This very Python: on Windows; elsewhere to try the benchmark out with the peers that run there."""

    def environment(self) -> dict[str, str]:
        paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))

    def popen(self, args: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        python = sys.executable
        if sys.platform == "win32":
            # In a virtual environment that one only starts the real one, which is the one to measure.
            python = getattr(sys, "_base_executable", python)
        return subprocess.Popen([python, *args], **options)


def make_starter(python: str | None, packages: Sequence[str], native: bool) -> Starter:
    """Returns: what starts the servers; at first use it fetches the Windows Python and the packages."""
    if native or os.name == "nt":
        return NativePython()
    sys.path.insert(0, str(TESTS))
    target = importlib.import_module("windows").prepare(python, tuple(packages))
    prefix = own_prefix(Path(target.variables["WINEPREFIX"]))
    starter: Starter = dataclasses.replace(target, variables={**target.variables, "WINEPREFIX": str(prefix)})
    return starter


def own_prefix(prefix: Path) -> Path:
    """Returns: a Wine prefix like `prefix`, which only benchmarks use; made once.

    Its wineserver, which has but one thread, does not also serve the tests that run at the same time, and
    what it uses is used for the servers. The files of drive C are those of `prefix`.
    """
    own = prefix.with_name(prefix.name + "-bench")
    if not (own / "dosdevices" / "c:").exists():
        shutil.rmtree(own, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=own.name, dir=own.parent))
        for file in (*prefix.glob("*.reg"), prefix / ".update-timestamp"):
            shutil.copy2(file, part)
        (part / "dosdevices").mkdir()
        (part / "dosdevices" / "c:").symlink_to(prefix / "drive_c")
        (part / "dosdevices" / "z:").symlink_to("/")
        try:
            part.rename(own)
        except OSError:
            shutil.rmtree(part)  # another run was faster
    return own


class NotStarted(Exception):
    """A server that did not come up; says what it printed last."""


class Server:
    """One server of the comparison, at `place` where given: see `placement.py`.

    Not thread-safe; its output is read by a thread of its own.
    """

    def __init__(self, kind: Kind, starter: Starter, token: str,
                 place: Placement | None = None) -> None:
        self.kind = kind
        self._place = place
        self._starter = starter
        self._token = f"{token}-{kind.name}"
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reader: threading.Thread | None = None
        self._ready = threading.Event()
        self._address: Address | None = None
        self._wineserver: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def address(self) -> Address:
        assert self._address
        return self._address

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None and self._address is not None

    def start(self) -> None:
        """Starts a fresh process, and ends the one before. Raises: NotStarted."""
        self.end()
        environment = self._starter.environment()
        environment[MARK] = self._token
        self._lines.clear()
        self._ready.clear()
        self._address = None
        # Pipes for both: Python under Wine does not start when its output is a regular file.
        with at(self._place):
            self._process = self._starter.popen(self.kind.arguments, env=environment, cwd=str(TESTS),
                                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                                stderr=subprocess.STDOUT)
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        self._ready.wait(START_MAX_S)
        if not self.running:
            self.end()
            raise NotStarted(self.last_words())
        self._wineserver = wineservers(environment)
        watched = self.watched()
        move(watched.server, watched.wineserver, self._place)

    def watched(self) -> Watched:
        """Returns: the processes whose use counts for this server; a server may have several of its own."""
        assert self._process
        pids = {self._process.pid, *self._pythons()}
        return Watched(tuple(sorted(pids)), self._wineserver)

    def last_lines(self) -> tuple[str, ...]:
        """Returns: what it printed last, for a report of what went wrong; not the line that it is ready."""
        return tuple(line for line in self._lines.copy() if line.strip() and not READY.search(line))

    def last_words(self) -> str:
        """Returns: the last of these lines."""
        return (self.last_lines() or ("no output",))[-1]

    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def end(self) -> None:
        """Ends what it started; by process id, and at once: the benchmark does not test shutting down."""
        process, self._process = self._process, None
        if process is None:
            return
        for pid in self._pythons():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(END_MAX_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._reader:
            self._reader.join(END_MAX_S)
        self._address = None

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        with process.stdout as pipe:
            for raw in pipe:
                line = raw.decode(errors="replace").rstrip()
                self._lines.append(line)
                if self._address is None and (found := READY.search(line)):
                    self._address = (found[1], int(found[2]))
                    self._ready.set()
        self._ready.set()  # it ended: nothing more to wait for

    def _pythons(self) -> list[int]:
        """The marked Python processes; not Wine's services, which inherit the mark of who starts Wine."""
        return [pid for pid in marked_processes(MARK, self._token) if "python" in command_line(pid).lower()]


def wineservers(environment: Mapping[str, str]) -> tuple[int, ...]:
    """Returns: process ids of the wineserver that serves this environment; none on Windows.

    All servers of a run share it; only one of them is measured at a time.
    """
    prefix = environment.get("WINEPREFIX")
    if not prefix:
        return ()
    return tuple(pid for pid in marked_processes("WINEPREFIX", prefix)
                 if process_name(pid).startswith("wineserver"))


def version_line(starter: Starter) -> str:
    """Returns: version and kind of the Python that runs the servers, as it says them itself."""
    code = ("import sys, platform\n"
            "gil = getattr(sys, '_is_gil_enabled', lambda: True)()\n"
            "print(platform.python_version(), '64-bit' if sys.maxsize > 2**32 else '32-bit',"
            " '' if gil else 'free-threaded', sys.platform)")
    process = starter.popen(["-c", code], env=starter.environment(), stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output = process.communicate(timeout=START_MAX_S)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "did not start"
    return " ".join((output.strip().splitlines() or ["no output"])[-1].split())


def wine_version(starter: Starter) -> str | None:
    """Returns: what Wine calls itself; None where the servers do not run under Wine."""
    if not starter.environment().get("WINEPREFIX"):
        return None
    tools = getattr(starter, "tools", None)
    program = getattr(tools, "wine", "wine")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([program, "--version"], env=starter.environment(), timeout=START_MAX_S,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              check=False)
        return done.stdout.decode(errors="replace").strip() or "unknown"
    return "unknown"
