"""A strict reader of trace files: what ui.perfetto.dev and chrome://tracing take, and nothing that they only
tolerate.

From "Trace Event Format" (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU),
narrowed to what Perfetto imports: numeric pids, tids and ids, one value in a counter, arrows that start and
end in slices.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

#: The keys of each kind of event, all of them required.
KEYS = {
    "M": {"ph", "name", "pid", "tid", "args"},
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "s": {"ph", "name", "cat", "pid", "tid", "ts", "id"},
    "f": {"ph", "name", "cat", "pid", "tid", "ts", "id", "bp"},
    "C": {"ph", "name", "cat", "pid", "tid", "ts", "args"},
}
METADATA = {"process_name": str, "thread_name": str, "thread_sort_index": int}


@dataclasses.dataclass
class Seen:
    """What a valid file has in it."""

    threads: dict[int, str] = dataclasses.field(default_factory=dict)  # names by tid
    slices: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    counters: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # values by name and series
    arrows: int = 0

    @property
    def names(self) -> Counter[str]:
        """How many slices there are of each name."""
        return Counter(event["name"] for event in self.slices)


def read_trace(path: Path) -> Seen:
    """Check a file and return what is in it."""
    return check_trace(json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant))


def _no_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def check_trace(document: Any) -> Seen:
    """Check a document; AssertionError says what is wrong with it."""
    assert isinstance(document, dict), "the JSON object format"
    assert set(document) == {"displayTimeUnit", "traceEvents"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    assert isinstance(document["traceEvents"], list)
    reader = _Reader()
    for event in document["traceEvents"]:
        reader.take(event)
    reader.end()
    return reader.seen


class _Reader:
    def __init__(self) -> None:
        self.seen = Seen()
        self.pids: set[int] = set()
        self.processes = 0
        self.last: dict[Any, int] = {}  # nanoseconds, by track
        self.open: dict[int, list[tuple[int, int]]] = {}  # begin and end of the slices around, by tid
        self.begun: dict[Any, int] = {}
        self.ended: dict[Any, int] = {}

    def take(self, event: Any) -> None:
        assert isinstance(event, dict), event
        assert event.get("ph") in KEYS, event
        assert set(event) == KEYS[event["ph"]], event
        assert isinstance(event["name"], str), event
        assert event["name"], event
        for key in ("pid", "tid"):
            assert type(event[key]) is int, event
            assert event[key] >= 0, event
        self.pids.add(event["pid"])
        {"M": self.metadata, "X": self.slice, "s": self.begin, "f": self.finish, "C": self.counter}[
            event["ph"]
        ](event)

    def metadata(self, event: dict[str, Any]) -> None:
        assert event["name"] in METADATA, event
        ((key, value),) = event["args"].items()
        assert key == ("sort_index" if event["name"] == "thread_sort_index" else "name"), event
        assert type(value) is METADATA[event["name"]], event
        if event["name"] == "process_name":
            self.processes += 1
        elif event["name"] == "thread_name":
            assert event["tid"] not in self.seen.threads, "a second name for a thread"
            self.seen.threads[event["tid"]] = value

    def when(self, event: dict[str, Any], track: Any) -> int:
        """The time of an event, which must not go back on its track."""
        assert type(event["ts"]) in (int, float), event
        assert math.isfinite(event["ts"]), event
        assert isinstance(event["cat"], str), event
        at = round(event["ts"] * 1000)
        assert abs(event["ts"] * 1000 - at) < 0.1, f"finer than a nanosecond: {event}"
        assert at >= self.last.get(track, 0), f"time went back: {event}"
        self.last[track] = at
        return at

    def slice(self, event: dict[str, Any]) -> None:
        tid = event["tid"]
        assert tid in self.seen.threads, f"a thread without a name: {event}"
        begin = self.when(event, tid)
        assert type(event["dur"]) in (int, float), event
        assert math.isfinite(event["dur"]), event
        length = round(event["dur"] * 1000)
        assert length > 0, event
        assert isinstance(event["args"], dict), event
        around = self.open.setdefault(tid, [])
        while around and around[-1][1] <= begin:
            around.pop()
        assert not around or begin + length <= around[-1][1], f"it reaches beyond what is around it: {event}"
        around.append((begin, begin + length))
        self.seen.slices.append(event)

    def _inside(self, event: dict[str, Any]) -> int:
        at = self.when(event, event["tid"])
        around = self.open.get(event["tid"], [])
        assert any(begin <= at < end for begin, end in around), f"an arrow without a slice: {event}"
        assert type(event["id"]) is int, event
        return at

    def begin(self, event: dict[str, Any]) -> None:
        at, key = self._inside(event), (event["cat"], event["name"], event["id"])
        assert key not in self.begun, f"an arrow that starts twice: {event}"
        self.begun[key] = at

    def finish(self, event: dict[str, Any]) -> None:
        at, key = self._inside(event), (event["cat"], event["name"], event["id"])
        assert event["bp"] == "e", event
        assert key not in self.ended, f"an arrow that ends twice: {event}"
        self.ended[key] = at

    def counter(self, event: dict[str, Any]) -> None:
        self.when(event, event["name"])
        ((series, value),) = event["args"].items()  # Perfetto makes a counter of each
        assert type(value) in (int, float), event
        assert math.isfinite(value), event
        assert value >= 0, event
        self.seen.counters.setdefault(f"{event['name']} {series}", []).append(value)

    def end(self) -> None:
        assert self.processes == 1, "one name for the process"
        assert len(self.pids) == 1, self.pids
        assert set(self.begun) == set(self.ended), "arrows with one end"
        assert all(self.begun[key] <= at for key, at in self.ended.items()), "an arrow that goes back in time"
        assert len({identity for _cat, _name, identity in self.begun}) == len(self.begun), "an id used twice"
        self.seen.arrows = len(self.begun)
