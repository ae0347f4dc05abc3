"""The figures: what they are called, that they are a snapshot, and that every one says what it counts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import iocp_ctypes
from iocp_ctypes import EngineStats, Stats, Usage

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
    assert {"Stats", "EngineStats", "Usage"} <= set(iocp_ctypes.__all__)


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
    for kind in (Stats, EngineStats):
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
