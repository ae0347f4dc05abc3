"""What a process has used: processor time, round trips to wineserver, memory.

Owns: the readings of `/proc` on Linux and of the process API on Windows. A process is named by its id in the
system that the reader runs on. All readings of a process that is gone are None, never an exception: a server
that died in a measure is something to report.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Cpu:
    """Seconds of processor time, and write calls (None where the system does not count them).

    Under Wine each request to wineserver is one write() and one read(), and little else of a server writes by
    write(): sockets are sent to with sendmsg. So `writes` counts round trips to wineserver.
    """

    user_s: float
    system_s: float
    writes: int | None


@dataclass(frozen=True)
class Memory:
    """KiB: resident, and private (not shared with another process; on Windows the commit charge)."""

    resident_kib: int
    private_kib: int


def cpu(pids: Sequence[int]) -> Cpu | None:
    """Returns: the sum over `pids`, or None when there is none or one of them is gone."""
    readings = [_cpu_of(pid) for pid in pids]
    known = [reading for reading in readings if reading]
    if not readings or len(known) < len(readings):
        return None
    writes = [reading.writes for reading in known if reading.writes is not None]
    return Cpu(sum(reading.user_s for reading in known), sum(reading.system_s for reading in known),
               sum(writes) if len(writes) == len(known) else None)


def memory(pids: Sequence[int]) -> Memory | None:
    """Returns: the sum over `pids`, or None when there is none or one of them is gone."""
    readings = [_memory_of(pid) for pid in pids]
    known = [reading for reading in readings if reading]
    if not readings or len(known) < len(readings):
        return None
    return Memory(sum(reading.resident_kib for reading in known),
                  sum(reading.private_kib for reading in known))


@dataclass(frozen=True)
class Watched:
    """The processes to read: those of the server, and wineserver, which works for it (none on Windows)."""

    server: tuple[int, ...] = ()
    wineserver: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Processor time, µs, and requests to wineserver, for one unit of work; None: not known."""

    user_us: float | None = None
    system_us: float | None = None
    wineserver_us: float | None = None
    requests: float | None = None


class Meter:
    """Reads processor time when made, and divides what was used since by the work done."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._server = cpu(watched.server)
        self._wineserver = cpu(watched.wineserver)

    def cost(self, units: float) -> Cost:
        server, wineserver = cpu(self._watched.server), cpu(self._watched.wineserver)
        before, wine_before = self._server, self._wineserver
        if not units or not server or not before:
            return Cost()
        wine_s = requests = None
        if wineserver and wine_before:
            wine_s = wineserver.user_s + wineserver.system_s - wine_before.user_s - wine_before.system_s
            if server.writes is not None and before.writes is not None:
                requests = (server.writes - before.writes) / units
        return Cost((server.user_s - before.user_s) * 1e6 / units,
                    (server.system_s - before.system_s) * 1e6 / units,
                    None if wine_s is None else wine_s * 1e6 / units, requests)


def stolen_s() -> float | None:
    """Returns: processor time in s that the host of this virtual machine has kept from it since it started.

    Summed over the processors; None where it is not known (not Linux).
    """
    if sys.platform != "linux":
        return None  # under Wine there is a /proc as well
    try:
        with (PROC / "stat").open() as file:
            return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return None


def stolen_share(before: float | None, seconds: float) -> float | None:
    """Returns: what was kept since the reading `before`, over what all processors have in `seconds`."""
    now = stolen_s()
    return None if before is None or now is None else (now - before) / (seconds * (os.cpu_count() or 1))


def marked_processes(variable: str, value: str) -> list[int]:
    """Returns: ids of the processes whose environment holds `variable=value` (Linux; elsewhere none)."""
    needle = f"{variable}={value}".encode()
    found = []
    for entry in _process_folders():
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def command_line(pid: int) -> str:
    """Returns: the command line with blanks between the arguments, "" when the process is gone (Linux)."""
    try:
        raw = (PROC / str(pid) / "cmdline").read_bytes()
        return raw.replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def process_name(pid: int) -> str:
    """Returns: the short name of a process, "" when it is gone (Linux)."""
    try:
        return (PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _process_folders() -> list[Path]:
    return [entry for entry in PROC.iterdir() if entry.name.isdigit()] if PROC.is_dir() else []


if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    PROCESS_QUERY_LIMITED_INFORMATION = 0x1000
    PROCESS_VM_READ = 0x0010
    TICKS_PER_S = 10_000_000  # a FILETIME counts 100 ns

    class _Counters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS_EX."""

        _fields_ = (
            ("cb", wintypes.DWORD), ("PageFaultCount", wintypes.DWORD),
            *((name, ctypes.c_size_t) for name in (
                "PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage", "QuotaPagedPoolUsage",
                "QuotaPeakNonPagedPoolUsage", "QuotaNonPagedPoolUsage", "PagefileUsage", "PeakPagefileUsage",
                "PrivateUsage")),
        )

    _kernel32 = ctypes.WinDLL("kernel32")
    _kernel32.OpenProcess.restype = wintypes.HANDLE
    _kernel32.OpenProcess.argtypes = (wintypes.DWORD, wintypes.BOOL, wintypes.DWORD)
    _kernel32.CloseHandle.argtypes = (wintypes.HANDLE,)
    _kernel32.GetProcessTimes.argtypes = (wintypes.HANDLE, *[ctypes.c_void_p] * 4)
    _kernel32.K32GetProcessMemoryInfo.argtypes = (wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD)

    def _cpu_of(pid: int) -> Cpu | None:
        handle = _kernel32.OpenProcess(PROCESS_QUERY_LIMITED_INFORMATION, False, pid)
        if not handle:
            return None
        times = (ctypes.c_uint64 * 4)()  # created, exited, kernel, user
        done = _kernel32.GetProcessTimes(handle, *(ctypes.addressof(times) + 8 * i for i in range(4)))
        _kernel32.CloseHandle(handle)
        return Cpu(times[3] / TICKS_PER_S, times[2] / TICKS_PER_S, None) if done else None

    def _memory_of(pid: int) -> Memory | None:
        handle = _kernel32.OpenProcess(PROCESS_QUERY_LIMITED_INFORMATION | PROCESS_VM_READ, False, pid)
        if not handle:
            return None
        counters = _Counters(cb=ctypes.sizeof(_Counters))
        done = _kernel32.K32GetProcessMemoryInfo(handle, ctypes.byref(counters), counters.cb)
        _kernel32.CloseHandle(handle)
        return Memory(counters.WorkingSetSize // 1024, counters.PrivateUsage // 1024) if done else None

else:

    def _cpu_of(pid: int) -> Cpu | None:
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        try:
            # The name in parentheses may hold blanks; what follows it is utime at 11, stime at 12.
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            user, system = int(fields[11]), int(fields[12])
            return Cpu(user / ticks_per_s, system / ticks_per_s, _number(pid, "io", "syscw:"))
        except (OSError, IndexError):
            return None

    def _memory_of(pid: int) -> Memory | None:
        resident = _number(pid, "smaps_rollup", "Rss:")
        dirty = _number(pid, "smaps_rollup", "Private_Dirty:")
        if resident is not None and dirty is not None:
            return Memory(resident, dirty)
        resident = _number(pid, "status", "VmRSS:")
        return Memory(resident, resident) if resident is not None else None

    def _number(pid: int, file: str, label: str) -> int | None:
        """The number after `label` in a file of /proc/PID, None where there is none."""
        try:
            for line in (PROC / str(pid) / file).read_text().splitlines():
                if line.startswith(label):
                    return int(line.split()[1])
        except (OSError, IndexError):
            pass  # gone, or a kernel without this counter
        return None
