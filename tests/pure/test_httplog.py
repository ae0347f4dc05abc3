"""The access log, and the figures for Prometheus."""

from __future__ import annotations

import re
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from iocp_ctypes._httplog import EXPOSITION, Metrics, combined, log_time, quoted
from iocp_ctypes._httpmessage import Request

COMBINED = re.compile(
    r'(\S+) - (\S+) \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "((?:[^"\\]|\\.)*)" (\d{3}) (\d+|-)'
    r' "((?:[^"\\]|\\.)*)" "((?:[^"\\]|\\.)*)"'
)


def test_a_line() -> None:
    request = Request("GET", "/a?b", [(b"referer", b"http://x/"), (b"user-agent", b"curl/8")])
    request.user = "ann"
    match = COMBINED.fullmatch(combined(request, "192.0.2.1", 200, 5))
    assert match
    assert match.groups() == ("192.0.2.1", "ann", "GET /a?b HTTP/1.1", "200", "5", "http://x/", "curl/8")


def test_a_line_of_what_was_no_request() -> None:
    match = COMBINED.fullmatch(combined(None, "::1", 400, 0))
    assert match
    assert match.groups() == ("::1", "-", "-", "400", "-", "-", "-")


@pytest.mark.parametrize("evil", ['a" 200 1 "', "a\r\nb", "\x1b[2J", "\\", "\xe9", "a\tb", "\x00"])
def test_what_a_peer_sends_stays_in_its_quotation_marks(evil: str) -> None:
    request = Request("GET", "/", [(b"user-agent", evil.encode("latin-1"))])
    request.user = evil
    line = combined(request, "h", 200, 1)
    assert COMBINED.fullmatch(line), line
    assert line.isprintable()
    assert line.isascii()


def test_quoting_can_be_undone() -> None:
    assert quoted('a"b\\') == "a\\x22b\\x5c"


def test_the_time_is_local_with_its_offset() -> None:
    at = 784111777.0
    text = log_time(at)
    assert time.mktime(time.strptime(text[:20], "%d/%b/%Y:%H:%M:%S")) == at
    offset = time.strftime("%z", time.localtime(at))
    assert text[21:] == offset.replace("-0000", "+0000")


def figures() -> SimpleNamespace:
    return SimpleNamespace(
        connections=3,
        connections_peak=4,
        accepted=5,
        refused=1,
        accept_failed=0,
        reaped=2,
        bytes_received=10,
        bytes_sent=20,
        backlog=(64, 63),
        closed={"eof": 2},
    )


def test_metrics() -> None:
    metrics = Metrics()
    metrics.count("GET", 200, 100)
    metrics.count("GET", 200, 50)
    metrics.count("POST", 404, 1)
    lines = metrics.text(figures()).splitlines()
    assert 'iocp_ctypes_http_requests_total{method="GET",status="200"} 2' in lines
    assert 'iocp_ctypes_http_requests_total{method="POST",status="404"} 1' in lines
    assert "iocp_ctypes_http_answer_bytes_total 151" in lines
    assert "iocp_ctypes_connections 3" in lines
    assert "iocp_ctypes_accepted_total 5" in lines
    assert 'iocp_ctypes_closed_total{reason="eof"} 2' in lines
    assert "iocp_ctypes_backlog 63" in lines


def test_metrics_are_in_the_format() -> None:
    metrics = Metrics("mine")
    metrics.count("GET", 200, 1)
    text = metrics.text(figures())
    assert text.endswith("\n")
    names: Counter[str] = Counter()
    kinds: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"# TYPE (\w+) (counter|gauge)", line):
            names[match[1]] += 1
            kinds[match[1]] = match[2]
        elif not re.fullmatch(r"# HELP \w+ .+", line):
            match = re.fullmatch(r'(\w+)(\{\w+="[^"\\]*"(,\w+="[^"\\]*")*\})? \d+', line)
            assert match, line
            assert match[1] in kinds, "its type comes before it"
            assert (kinds[match[1]] == "counter") == match[1].endswith("_total")
            assert match[1].startswith("mine_")
    assert set(names.values()) == {1}


def test_metrics_as_a_handler() -> None:
    metrics = Metrics()
    answer = metrics(Request("GET", "/metrics", []))
    assert (answer.status, answer.header("Content-Type")) == (200, EXPOSITION)
    assert metrics(Request("POST", "/metrics", [])).status == 405


@pytest.mark.parametrize("prefix", ["", "1a", "a-b", "a b"])
def test_a_prefix_that_no_name_begins_with(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix="):
        Metrics(prefix)
