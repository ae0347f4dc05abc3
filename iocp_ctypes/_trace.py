"""The trace: a ring of what operations did, and its export for Perfetto (layer P: pure).

Laws
1. A ring is bounded: the newest records push out the oldest.
2. Reading a ring takes a copy of it under its lock and formats afterwards: whoever writes a file holds
   nobody up, and records that come meanwhile are left to the next one.
3. The file is what "Trace Event Format" calls a JSON object: one track for each thread that did something
   (complete events, "X"), an arrow from each submit to its retirement ("s", "f") where both are in the ring,
   and one counter for each knob ("C", one value each, which is what Perfetto takes).
4. Times go up on each track. What began later and ended earlier is inside.
Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format), and
perfetto.dev/docs/getting-started/other-formats.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, Final, NamedTuple

from ._errors import WSA_IO_PENDING

#: The steps of an operation, and a call that is none.
SUBMIT, RETIRE, CALL = "submit", "retire", "call"

#: Counters of the file: name and series, which Perfetto shows as one name, and the field of the record.
COUNTERS: Final = (
    ("backlog", "in use", "backlog"),
    ("sendcap", "in use", "sendcap"),
    ("recvburst", "in use", "recvburst"),
    ("queue", "bytes", "queued"),
)


class TraceRecord(NamedTuple):
    """One step of one operation. The last four say what was in use when the step had ended."""

    time_ns: int  # time.perf_counter_ns() when the step began
    duration_ns: int  # of the native call; of a retirement: with the callbacks that ran in it
    thread: int  # threading.get_ident()
    thread_name: str
    connection: int  # its id; below 0: not a connection's, the same number for the same socket
    operation: (
        str  # "accept", "connect", "receive", "send", "transmit"; of calls: "shutdown", "cancel", "close"
    )
    step: str  # "submit", "retire", or "call" for what is no operation
    number: int  # the same in submit and retire of one operation and in no other; 0 of a call
    bytes: int  # submit: bytes offered, or room for them; retire and what completed at once: bytes moved
    status: int  # submit: 0 done at once, 997 pending, else the error; retire: NTSTATUS, 0 is success
    backlog: int | None = None  # AcceptEx operations that the kernel has
    sendcap: int | None = None  # sends of this connection that the kernel has
    recvburst: int | None = None  # receives of this connection that the kernel has
    queued: int | None = None  # bytes handed to send() and not taken by the kernel yet


_when = attrgetter("time_ns")


class Ring:
    """The newest records, at most `size`. Thread-safe by the lock it is given."""

    __slots__ = ("_lock", "_records", "size")

    def __init__(self, size: int, lock: AbstractContextManager[Any]) -> None:
        """Make a ring.

        Args:
            size: the most records it holds.
            lock: reentrant, for a finalizer may add a record while one is being added.
        """
        self.size = size
        self._lock = lock
        self._records: deque[TraceRecord] = deque(maxlen=size)

    def add(self, record: TraceRecord) -> None:
        """Add a record; above `size` the oldest goes."""
        with self._lock:
            self._records.append(record)

    def records(self) -> list[TraceRecord]:
        """Return a copy, in the order of the times at which the steps began."""
        with self._lock:
            found = list(self._records)
        found.sort(key=_when)
        return found


def write_trace(path: str | os.PathLike[str], records: Iterable[TraceRecord]) -> int:
    """Write records as a file that ui.perfetto.dev and chrome://tracing open.

    Returns:
        How many records were written. OSError where the file cannot be written.
    """
    written = list(records)
    pid = os.getpid()
    with open(os.fspath(path), "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
        separator = ""
        for event in trace_events(written, pid):
            file.write(separator + json.dumps(event))
            separator = ",\n"
        file.write("\n]}\n")
    return len(written)


def trace_events(records: list[TraceRecord], pid: int) -> Iterator[dict[str, Any]]:
    """Return the events of records: names, then slices and arrows by their time, then counters by theirs."""
    begin = min(map(_when, records), default=0)
    tracks: dict[tuple[int, str], int] = {}  # the system uses the numbers of threads that ended again
    for record in sorted(records, key=_when):
        tracks.setdefault((record.thread, record.thread_name), len(tracks) + 1)
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": "iocp_ctypes"}}
    for (thread, name), tid in tracks.items():
        told = {"name": f"{name} ({thread})"}
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": told}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
    yield from _slices(records, pid, begin, tracks)
    yield from _counters(records, pid, begin)


def _slices(
    records: list[TraceRecord], pid: int, begin: int, tracks: dict[tuple[int, str], int]
) -> Iterator[dict[str, Any]]:
    """The steps, each with its end of the arrow where the other end is there as well."""
    submitted = {record.number for record in records if record.step == SUBMIT}
    joined = submitted & {record.number for record in records if record.step == RETIRE}
    ends: dict[int, list[int]] = {}  # by track: when what has begun there ends, the innermost last
    for record in sorted(records, key=lambda record: (record.time_ns, -record.duration_ns)):
        tid = tracks[record.thread, record.thread_name]
        around = ends.setdefault(tid, [])
        while around and around[-1] <= record.time_ns:
            around.pop()
        end = record.time_ns + max(1, record.duration_ns)  # an arrow needs something to end in
        end = min(end, around[-1]) if around else end
        around.append(end)
        where = {"pid": pid, "tid": tid, "ts": _microseconds(record.time_ns - begin)}
        retired = record.step == RETIRE
        yield {
            "ph": "X",
            "name": f"retire {record.operation}" if retired else record.operation,
            "cat": record.step,
            **where,
            "dur": _microseconds(end - record.time_ns),
            "args": _told(record),
        }
        if record.number in joined:
            flow = {"name": record.operation, "cat": "operation", "id": record.number, **where}
            yield {"ph": "f", "bp": "e", **flow} if retired else {"ph": "s", **flow}


def _told(record: TraceRecord) -> dict[str, Any]:
    told: dict[str, Any] = {"connection": record.connection}
    if record.number:
        told |= {"operation": record.number, "bytes": record.bytes, "status": status_text(record)}
    for _name, _series, field in COUNTERS:
        if (value := getattr(record, field)) is not None:
            told[field] = value
    return told


def status_text(record: TraceRecord) -> str:
    """Return what a record's status means, in words."""
    if record.step == RETIRE:
        return f"NTSTATUS 0x{record.status & 0xFFFFFFFF:08X}" if record.status else "success"
    if record.status == WSA_IO_PENDING:
        return "pending"
    return f"error {record.status}" if record.status else "completed at once"


def _counters(records: list[TraceRecord], pid: int, begin: int) -> Iterator[dict[str, Any]]:
    """What is in use, summed over all that are in the records: what was last known of each counts."""
    last: dict[tuple[str, int], int] = {}
    totals = {field: 0 for _name, _series, field in COUNTERS}
    shown = dict.fromkeys(totals, -1)  # so that the first value is written
    for record in sorted(records, key=lambda record: record.time_ns + record.duration_ns):
        at = _microseconds(record.time_ns + record.duration_ns - begin)
        for name, series, field in COUNTERS:
            value: int | None = getattr(record, field)
            if value is None:
                continue
            totals[field] += value - last.get((field, record.connection), 0)
            last[field, record.connection] = value
            if totals[field] != shown[field]:
                shown[field] = totals[field]
                told = {series: totals[field]}
                yield {"ph": "C", "name": name, "cat": "knobs", "pid": pid, "tid": 0, "ts": at, "args": told}


def _microseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1000, 3)
