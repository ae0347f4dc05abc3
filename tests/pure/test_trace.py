"""The ring, and the file that comes of it, against a strict reader of the format."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perfetto import Seen, check_trace, read_trace

from iocp_ctypes import TraceRecord
from iocp_ctypes._trace import CALL, RETIRE, SUBMIT, Ring, status_text, trace_events, write_trace


def record(
    at: int = 0,
    *,
    took: int = 10,
    thread: int = 7,
    name: str = "one",
    connection: int = 1,
    operation: str = "receive",
    step: str = SUBMIT,
    number: int = 1,
    size: int = 0,
    status: int = 0,
    **in_use: int,
) -> TraceRecord:
    return TraceRecord(at, took, thread, name, connection, operation, step, number, size, status, **in_use)


def seen(*records: TraceRecord) -> Seen:
    """What the strict reader finds in the file of these records."""
    events = json.loads(json.dumps(list(trace_events(list(records), 42))))
    return check_trace({"displayTimeUnit": "ns", "traceEvents": events})


# -- the ring -----------------------------------------------------------------------------------------------


def test_a_ring_keeps_the_newest_in_the_order_of_their_times() -> None:
    ring = Ring(3, threading.RLock())
    for at in (1, 5, 4, 3, 2):
        ring.add(record(at))
    assert [kept.time_ns for kept in ring.records()] == [2, 3, 4]
    assert ring.size == 3


def test_a_ring_is_read_while_threads_add() -> None:
    ring = Ring(500, threading.RLock())
    over = threading.Event()

    def add(thread: int) -> None:
        at = 0
        while not over.is_set():
            ring.add(record(at, thread=thread))
            at += 1

    threads = [threading.Thread(target=add, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            found = ring.records()
            assert len(found) <= 500
            assert found == sorted(found, key=lambda kept: kept.time_ns)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_record_may_come_while_one_is_added() -> None:
    # A garbage collection inside runs a finalizer that closes a traced connection.
    ring = Ring(5, threading.RLock())
    with ring._lock:
        ring.add(record())
    assert len(ring.records()) == 1


# -- the file -----------------------------------------------------------------------------------------------


def test_submit_and_retire_are_slices_with_an_arrow() -> None:
    found = seen(
        record(1000, took=200, number=9, size=1024, status=997, recvburst=1),
        record(5000, took=900, number=9, size=5, step=RETIRE, thread=8, name="two", recvburst=0),
    )
    assert found.names == {"receive": 1, "retire receive": 1}
    assert found.arrows == 1
    assert found.threads == {1: "one (7)", 2: "two (8)"}
    submit, retire = found.slices
    assert (submit["ts"], submit["dur"], submit["tid"], submit["cat"]) == (0, 0.2, 1, "submit")
    assert (retire["ts"], retire["dur"], retire["tid"], retire["cat"]) == (4, 0.9, 2, "retire")
    assert submit["args"] == {
        "connection": 1,
        "operation": 9,
        "bytes": 1024,
        "status": "pending",
        "recvburst": 1,
    }
    assert retire["args"]["status"] == "success"
    assert found.counters == {"recvburst in use": [1, 0]}


def test_an_arrow_needs_both_ends() -> None:
    assert seen(record(0, number=1), record(5, number=2, step=RETIRE)).arrows == 0
    assert seen(record(0, number=1), record(50, number=1, step=RETIRE)).arrows == 1


def test_a_call_is_no_operation() -> None:
    found = seen(record(operation="close", step=CALL, number=0, sendcap=0))
    assert found.names == {"close": 1}
    assert found.slices[0]["args"] == {"connection": 1, "sendcap": 0}


def test_counters_are_sums_of_what_was_last_known() -> None:
    found = seen(
        record(0, connection=1, sendcap=2, queued=100),
        record(100, connection=2, sendcap=3, queued=0),
        record(200, connection=1, sendcap=0, queued=50),
        record(300, connection=-1, operation="accept", backlog=64),
        record(400, connection=-2, operation="accept", backlog=8),
        record(500, connection=1, sendcap=0, queued=50),
    )
    assert found.counters == {
        "sendcap in use": [2, 5, 3],
        "queue bytes": [100, 50],
        "backlog in use": [64, 72],
    }


def test_a_counter_is_told_when_its_step_ended() -> None:
    events = list(trace_events([record(1000, took=500, sendcap=1), record(1200, took=100, sendcap=2)], 1))
    told = [(event["ts"], event["args"]["in use"]) for event in events if event["ph"] == "C"]
    assert told == [(0.3, 2), (0.5, 1)]


def test_a_thread_number_used_again_is_another_track() -> None:
    found = seen(record(0, name="one"), record(50, name="two"), record(90, name="one"))
    assert sorted(found.threads.values()) == ["one (7)", "two (7)"]
    assert [event["tid"] for event in found.slices] == [1, 2, 1]


def test_what_happens_in_a_callback_is_inside_its_slice() -> None:
    # A callback sends, and the clock did not move in between.
    found = seen(record(100, took=0, operation="send", number=5), record(0, took=100, step=RETIRE, number=4))
    assert [event["name"] for event in found.slices] == ["retire receive", "send"]
    found = seen(record(0, took=0, operation="send", number=5), record(0, took=0, step=RETIRE, number=4))
    assert len(found.slices) == 2


def test_nothing_recorded_is_a_file_as_well(tmp_path: Path) -> None:
    assert write_trace(tmp_path / "trace.json", []) == 0
    assert read_trace(tmp_path / "trace.json").slices == []


def test_names_of_threads_are_written_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    assert write_trace(str(file), [record(name='with "quotes" and \u00e9\n')]) == 1
    assert list(read_trace(file).threads.values()) == ['with "quotes" and \u00e9\n (7)']


@pytest.mark.parametrize("path", [5, None, 1.5])
def test_a_path_is_a_path(path: Any) -> None:
    with pytest.raises(TypeError):
        write_trace(path, [])


def test_what_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"."):
        write_trace(tmp_path, [])
    with contextlib.suppress(OSError):
        write_trace(tmp_path / "missing" / "trace.json", [])
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (record(status=997), "pending"),
        (record(status=0), "completed at once"),
        (record(status=10055), "error 10055"),
        (record(step=RETIRE), "success"),
        (record(step=RETIRE, status=0xC000020D), "NTSTATUS 0xC000020D"),
    ],
)
def test_a_status_in_words(made: TraceRecord, text: str) -> None:
    assert status_text(made) == text


@st.composite
def histories(draw: st.DrawFn) -> list[TraceRecord]:
    """Records of threads that do one thing after another, some of it inside callbacks, from a clock that may
    stand still; some are missing, for the ring is short."""
    made: list[TraceRecord] = []
    numbers: list[int] = []
    for thread in range(draw(st.integers(1, 3))):
        now = draw(st.integers(0, 50))
        for _ in range(draw(st.integers(0, 6))):
            began = now
            for _ in range(draw(st.integers(0, 2))):
                now += draw(st.integers(0, 3))
                took = draw(st.integers(0, 3))
                numbers.append(len(numbers) + 1)
                sends = draw(st.integers(0, 3))
                made.append(record(now, took=took, thread=thread, number=numbers[-1], sendcap=sends))
                now += took
            now += draw(st.integers(0, 3))
            number = numbers.pop(0) if numbers and numbers[0] else 0
            made.append(
                record(began, took=now - began, thread=thread, number=1000 + number, step=RETIRE, queued=now)
            )
            now += draw(st.integers(0, 3))
    kept = draw(st.lists(st.booleans(), min_size=len(made), max_size=len(made)))
    return [one for one, keep in zip(made, kept, strict=True) if keep]


@given(histories())
def test_every_history_is_a_valid_file(records: list[TraceRecord]) -> None:
    found = seen(*records)
    assert len(found.slices) == len(records)


# -- the reader itself --------------------------------------------------------------------------------------


def good() -> list[dict[str, Any]]:
    return [dict(event) for event in trace_events([record(0), record(50, step=RETIRE, sendcap=1)], 42)]


def find(events: list[dict[str, Any]], ph: str) -> dict[str, Any]:
    return next(event for event in events if event["ph"] == ph)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda events: find(events, "X").update(ph="Z"),
        lambda events: find(events, "X").update(dur=0),
        lambda events: find(events, "X").update(dur=-1.0),
        lambda events: find(events, "X").update(ts=-1),
        lambda events: find(events, "X").update(ts="0"),
        lambda events: find(events, "X").update(tid=99),
        lambda events: find(events, "X").update(pid=43),
        lambda events: find(events, "X").update(more=1),
        lambda events: find(events, "X").pop("args"),
        lambda events: find(events, "s").update(id="x"),
        lambda events: find(events, "s").update(id=99),
        lambda events: find(events, "s").update(ts=0.03),
        lambda events: find(events, "f").pop("bp"),
        lambda events: events.remove(find(events, "f")),
        lambda events: events.append(find(events, "f")),
        lambda events: find(events, "C").update(args={"a": 1, "b": 2}),
        lambda events: find(events, "C").update(args={"a": float("nan")}),
        lambda events: events.remove(find(events, "M")),
        lambda events: events.append(find(events, "X")),
    ],
)
def test_the_reader_is_strict(spoil: Any) -> None:
    events = good()
    check_trace({"displayTimeUnit": "ns", "traceEvents": events})
    spoil(events)
    with pytest.raises((AssertionError, ValueError)):
        check_trace({"displayTimeUnit": "ns", "traceEvents": events})
