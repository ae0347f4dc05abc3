"""The server of a soak run, a program for Windows: it echoes, and tells its figures when asked.

Started by `process.py` as `python -m soak.served OPTIONS`, where OPTIONS are Server's, in JSON.
It reads commands from stdin, one a line, and answers each with one line of JSON on stdout:
    figures   what the server and its process look like now
    stop      stop the server; then as `figures`, with what is left over; the program ends
Laws: (i) what is counted before the server starts is counted after a first server came and went, so that
what Python and Windows keep once for all is in neither; (ii) every record of the library's log at WARNING
and above is kept, with its traceback.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

from iocp_ctypes import Connection, Engine, Server
from iocp_ctypes._burst import Burst

from . import Figures

RECORDS_MAX = 50  # of the log; more are only counted
SYSTEM_EXTENDED_HANDLE_INFORMATION = 64
STATUS_INFO_LENGTH_MISMATCH = 0xC0000004
QUIET_MAX_S = 10.0  # for the last threads and packets of a stopped server


class Echo(Connection):
    """Sends back what comes; counts the ends of connections and what came out of order."""

    opened = 0
    closed = 0
    disorder = 0
    counting = threading.Lock()

    def __init__(self, server: Any, peer_address: Any) -> None:
        self.stage = 0  # 1 connected, 2 closed

    def on_connect(self) -> None:
        with Echo.counting:
            Echo.opened += 1
            Echo.disorder += self.stage != 0
        self.stage = 1

    def on_data(self, data: bytes) -> None:
        if self.stage != 1:
            with Echo.counting:
                Echo.disorder += 1
        if not self.send(data):
            self.pause_reading()

    def on_drain(self) -> None:
        self.resume_reading()

    def on_close(self, exc: OSError | None) -> None:
        with Echo.counting:
            Echo.closed += 1
            Echo.disorder += self.stage != 1
        self.stage = 2


class Bursts:
    """Watches all that bursts bring."""

    receives = overtakes = width_max = held_max = 0
    counting = threading.Lock()

    @classmethod
    def watch(cls) -> None:
        arrive = Burst.arrive

        def watched(self: Burst, number: int, what: Any) -> None:
            oldest, width = next(iter(self.posted)), len(self.posted)
            arrive(self, number, what)
            with cls.counting:
                cls.receives += 1
                cls.overtakes += number != oldest
                cls.width_max = max(cls.width_max, width)
                cls.held_max = max(cls.held_max, self.unread + self.reserved)

        Burst.arrive = watched  # type: ignore[method-assign]


class Records(logging.Handler):
    """Keeps what the library logs at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.count = 0
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        if len(self.texts) < RECORDS_MAX:
            self.texts.append(self.format(record))


def handles() -> int:
    """Return how many handles this process has."""
    kernel32 = ctypes.WinDLL("kernel32")
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    kernel32.GetProcessHandleCount.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    count = ctypes.c_ulong()
    if not kernel32.GetProcessHandleCount(kernel32.GetCurrentProcess(), ctypes.byref(count)):
        raise OSError("GetProcessHandleCount failed")
    return count.value or listed_handles()


def listed_handles() -> int:
    """Count this process's handles in the system's list: Wine 8 says 0 where it is asked for the count.

    NtQuerySystemInformation writes a SYSTEM_HANDLE_INFORMATION_EX: ULONG_PTR count, ULONG_PTR reserved,
    then for each handle of the system PVOID, ULONG_PTR process id, and 24 bytes more (64-bit).
    """
    ntdll = ctypes.WinDLL("ntdll")
    written, size, own = ctypes.c_ulong(), 1 << 16, os.getpid()
    while True:
        buffer = ctypes.create_string_buffer(size)
        status = ntdll.NtQuerySystemInformation(
            SYSTEM_EXTENDED_HANDLE_INFORMATION, buffer, size, ctypes.byref(written)
        )
        if status & 0xFFFFFFFF != STATUS_INFO_LENGTH_MISMATCH:
            break
        size *= 2
    if status:
        raise OSError(f"NtQuerySystemInformation: 0x{status & 0xFFFFFFFF:08X}")
    count, _ = struct.unpack_from("QQ", buffer)
    return sum(struct.unpack_from("Q", buffer, 16 + 40 * i + 8)[0] == own for i in range(count))


def living_threads() -> list[str]:
    """Return the names of all threads but the main one."""
    return [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]


def engine_of(options: dict[str, Any]) -> Engine:
    """Make an engine, to look into; it has the I/O threads that the options ask for."""
    return Engine(io_threads=options.get("io_threads", 0))


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are not the engine's."""
    return {name: value for name, value in options.items() if name != "io_threads"}


def rehearse(options: dict[str, Any]) -> None:
    """Serve one client, and go."""
    with Server(("127.0.0.1", 0), Echo, engine=engine_of(options), **options_of(options)) as server:
        with socket.create_connection(server.address) as client:
            client.sendall(b"once")
            if client.recv(4) != b"once":
                raise OSError("the rehearsal failed")
        limit = time.monotonic() + QUIET_MAX_S
        while server.stats().connections and time.monotonic() < limit:
            time.sleep(0.01)
    with Echo.counting:
        Echo.opened = Echo.closed = Echo.disorder = 0


def figures(server: Server, engine: Engine, records: Records, handles_before: int) -> Figures:
    stats = dataclasses.asdict(server.stats())
    return Figures(
        connections=stats["connections"],
        connections_peak=stats["connections_peak"],
        accepted=stats["accepted"],
        accept_failed=stats["accept_failed"],
        accept_unreplaced=stats["accept_unreplaced"],
        backlog_cap=server.backlog.cap,
        backlog_in_use=server.backlog.in_use,
        closed=dict(stats["closed"]),
        bytes_received=stats["bytes_received"],
        bytes_sent=stats["bytes_sent"],
        opened=Echo.opened,
        ended=Echo.closed,
        disorder=Echo.disorder,
        deadlines=len(engine.watchdog),
        ops_pending=engine.ops_pending,
        io_threads=stats["engine"]["io_threads"],
        handoffs=stats["engine"]["handoffs"],
        resource_retries=stats["engine"]["resource_retries"],
        threads=living_threads(),
        handles=handles(),
        handles_before=handles_before,
        living=sum(isinstance(thing, Echo) for thing in gc.get_objects()),
        burst_receives=Bursts.receives,
        burst_overtakes=Bursts.overtakes,
        burst_width_max=Bursts.width_max,
        burst_held_max=Bursts.held_max,
        records=records.count,
        record_texts=records.texts,
    )


def serve(options: dict[str, Any], records: Records, before: int) -> Figures:
    """Serve until told to stop; returns what is left over."""
    engine = engine_of(options)
    server = Server(("127.0.0.1", 0), Echo, engine=engine, **options_of(options))
    server.start()
    print(json.dumps({"address": list(server.address)}), flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        print(json.dumps(dataclasses.asdict(figures(server, engine, records, before))), flush=True)
    stopped = server.stop(5)
    limit = time.monotonic() + QUIET_MAX_S
    while (living_threads() or engine.ops_pending) and time.monotonic() < limit:
        time.sleep(0.01)
    return dataclasses.replace(figures(server, engine, records, before), stopped=stopped)


def main() -> None:
    options = json.loads(sys.argv[1])
    Bursts.watch()
    rehearse(options)
    records = Records()
    logging.getLogger("iocp_ctypes").addHandler(records)
    gc.collect()
    before = handles()
    left = serve(options, records, before)
    gc.collect()  # the server and the engine: up to Python 3.12 each lock has a handle
    print(json.dumps(dataclasses.asdict(dataclasses.replace(left, handles=handles()))), flush=True)


if __name__ == "__main__":
    main()
