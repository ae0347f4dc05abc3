"""The figures: what they are called, that they are a snapshot, and that every one says what it counts."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest

import iocp_ctypes
from iocp_ctypes import ConnectionStats, EngineStats, Stats, Usage, _stats
from iocp_ctypes._stats import Traffic, merged, of_the_past

ENGINE: dict[str, Any] = {
    field.name: number for number, field in enumerate(dataclasses.fields(EngineStats), 1)
}


def figures() -> Stats:
    """Some figures, each another number."""
    values: dict[str, Any] = {
        field.name: number for number, field in enumerate(dataclasses.fields(Stats), 100)
    }
    values |= {"backlog": Usage(64, 63), "closed": {"eof": 3, "reset": 1}, "work_queued": (0, 2)}
    return Stats(**{**values, "engine": EngineStats(**ENGINE)})


def test_the_names_an_operator_relies_on() -> None:
    assert {field.name for field in dataclasses.fields(EngineStats)} >= {
        "io_threads",
        "stalled_threads",
        "ops_pending",
        "packets",
        "reaps",
        "handoffs",
        "resource_retries",
    }
    assert {field.name for field in dataclasses.fields(Stats)} >= {
        "connections",
        "connections_peak",
        "accepted",
        "refused",
        "accept_failed",
        "accept_unreplaced",
        "backlog",
        "bytes_received",
        "bytes_sent",
        "closed",
        "reaped",
        "last_accept",
        "work_queued",
        "engine",
    }
    assert {field.name for field in dataclasses.fields(ConnectionStats)} >= {
        "bytes_received",
        "bytes_sent",
        "receives",
        "receives_at_once",
        "sends",
        "sends_at_once",
        "sendcap",
        "recvburst",
        "write_queued",
        "unread",
    }
    assert {"Stats", "EngineStats", "ConnectionStats", "Usage"} <= set(iocp_ctypes.__all__)


@pytest.mark.parametrize("kind", [Stats, EngineStats])
def test_figures_are_a_snapshot_nobody_changes(kind: Any) -> None:
    made = figures() if kind is Stats else figures().engine
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(kind)[0].name, 0)
    with pytest.raises((AttributeError, TypeError)):
        made.another = 1  # there are slots and nothing else
    assert not hasattr(made, "__dict__")


def test_no_figure_has_a_default() -> None:
    # A figure that somebody forgot to fill in must not look like a zero.
    for kind in (Stats, EngineStats, ConnectionStats):
        for field in dataclasses.fields(kind):
            assert field.default is dataclasses.MISSING, field.name
            assert field.default_factory is dataclasses.MISSING, field.name


def test_equal_figures_are_equal_and_tell_themselves() -> None:
    assert figures() == figures()
    assert "connections_peak=101" in repr(figures())
    assert dataclasses.replace(figures(), connections=0) != figures()


def test_figures_become_json_for_a_monitor() -> None:
    written = json.loads(json.dumps(dataclasses.asdict(figures())))
    assert written["backlog"] == [64, 63]
    assert written["closed"] == {"eof": 3, "reset": 1}
    assert written["engine"] == ENGINE


def test_every_figure_is_explained() -> None:
    source = inspect.getsource(_stats)
    for kind in (Stats, EngineStats, ConnectionStats):
        lines = inspect.getsource(kind).splitlines()
        for field in dataclasses.fields(kind):
            (line,) = [line for line in lines if line.strip().startswith(f"{field.name}: ")]
            assert "  # " in line or field.name in ("id", "engine"), f"{kind.__name__}.{field.name}"
    assert "seconds" in source
    assert "bytes" in source


class Moved:
    """What a connection and its socket have counted."""

    def __init__(self, factor: int) -> None:
        self._socket: Any = self
        self.bytes_received, self.bytes_sent = 1 * factor, 2 * factor
        self.receives_at_once, self.receives_by_packet = 3 * factor, 4 * factor
        self.sends_at_once, self.sends_by_packet = 5 * factor, 6 * factor


def test_traffic_is_a_sum() -> None:
    total = Traffic()
    assert (total.receives, total.sends) == (0, 0)
    for factor in (1, 10):
        total.add(Moved(factor))
    assert (total.bytes_received, total.bytes_sent) == (11, 22)
    assert (total.receives, total.receives_at_once) == (77, 33)
    assert (total.sends, total.sends_at_once) == (121, 55)
    copy = Traffic(total)
    copy.add(Moved(100))
    assert (copy.receives, total.receives) == (777, 77)


def test_figures_of_processes_are_added_to_their_parents() -> None:
    parent, worker = (
        figures(),
        dataclasses.replace(
            figures(), accepted=1000, bytes_sent=5000, closed={"eof": 4, "aborted": 2}, sendcap=Usage(9, 3)
        ),
    )
    parent = dataclasses.replace(
        parent, sendcap=Usage(4, 0), recvburst=Usage(1, 0), reaped_by={"idle": 1}, work_queued=()
    )
    worker = dataclasses.replace(worker, recvburst=Usage(1, 2), reaped_by={"idle": 2, "silent": 1})
    total = merged(parent, [worker, of_the_past(worker)])
    assert total.accepted == parent.accepted + 2000
    assert total.bytes_sent == parent.bytes_sent + 10_000
    assert total.closed == {"eof": 11, "reset": 1, "aborted": 4}
    assert total.reaped_by == {"idle": 5, "silent": 2}
    assert (total.sendcap, total.recvburst) == (Usage(4, 3), Usage(1, 2)), "of the past nothing is in use"
    assert total.unread == parent.unread + worker.unread
    assert total.work_queued == (0, 2)
    for own in ("connections", "connections_peak", "refused", "backlog", "last_accept", "engine"):
        assert getattr(total, own) == getattr(parent, own)
    assert merged(parent, []) == dataclasses.replace(parent, closed=dict(parent.closed))
