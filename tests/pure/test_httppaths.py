"""From URLs to names below a folder; ranges and conditions."""

from __future__ import annotations

import ntpath
import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iocp_ctypes import _httppaths as paths
from iocp_ctypes._httpmessage import Request
from iocp_ctypes._httppaths import (
    NAME_LENGTH_MAX,
    NAMES_MAX,
    RANGES_MAX,
    etag_of,
    matches,
    names_of,
    range_counts,
    ranges_of,
    seconds_of,
    type_of,
    verdict,
)

ESCAPES = [
    "/..",
    "/../x",
    "/a/../../x",
    "/./x",
    "/%2e%2e/x",
    "/%2E%2e/x",
    "/.%2e/x",
    "/%2e/x",
    "/...",
    "/.../x",
    "/..%2fx",
    "/..%5cx",
    "/a%2fb",
    "/a\\b",
    "/..\\x",
    "/\\\\host\\share\\x",
    "/%5c%5chost%5cshare",
    "/C:/x",
    "/C:",
    "/c%3a/x",
    "/C:x",
    "/x::$DATA",
    "/x%3a%3a$DATA",
    "/x:stream",
    "/x:stream:$DATA",
    "/CON",
    "/con",
    "/con.txt",
    "/CON.tar.gz",
    "/con%20.txt",
    "/aux/x",
    "/NUL",
    "/nul.html",
    "/PRN",
    "/COM1",
    "/com0",
    "/COM9.log",
    "/LPT1",
    "/COM%C2%B9",
    "/LPT%C2%B3.txt",
    "/CONIN$",
    "/CONOUT$",
    "/CLOCK$",
    "/PROGRA~1/x",
    "/HTACCE~1",
    "/A~1.TXT",
    "/readm~12.md",
    "/x.",
    "/x..",
    "/x%20",
    "/x.%20",
    "/%20x",
    "/x%00.txt",
    "/x%0a",
    "/%7f",
    "/a%3fb",
    "/a*b",
    "/a%22b",
    "/a<b",
    "/a%7cb",
    "/%ff",
    "/%c0%ae%c0%ae/x",
    "/%ed%a0%80",
    "/" + "x" * (NAME_LENGTH_MAX + 1),
    "/x" * (NAMES_MAX + 1),
    "/.git/config",
    "/.htaccess",
    "/%2egit",
]


@pytest.mark.parametrize("path", ESCAPES)
def test_what_might_lead_elsewhere_is_refused(path: str) -> None:
    assert names_of(path) is None


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/", []),
        ("//", []),
        ("/a", ["a"]),
        ("/a/b.txt", ["a", "b.txt"]),
        ("//a///b/", ["a", "b"]),
        ("/a%20b", ["a b"]),
        ("/gr%C3%BC%C3%9F.txt", ["grüß.txt"]),
        ("/%252e%252e", ["%2e%2e"]),
        ("/a+b", ["a+b"]),
        ("/icon", ["icon"]),
        ("/console.log", ["console.log"]),
        ("/com10", ["com10"]),
        ("/a.con", ["a.con"]),
        ("/~user/x", ["~user", "x"]),
        ("/long-name~1.txt", ["long-name~1.txt"]),
        ("/a..b", ["a..b"]),
        ("/.well-known/acme", [".well-known", "acme"]),
        ("/" + "x" * NAME_LENGTH_MAX, ["x" * NAME_LENGTH_MAX]),
        ("/x" * NAMES_MAX, ["x"] * NAMES_MAX),
    ],
)
def test_what_is_a_name_stays_one(path: str, names: list[str]) -> None:
    assert names_of(path) == names


def test_hidden_names_only_where_asked_for() -> None:
    assert names_of("/.git/config", hidden=True) == [".git", "config"]
    assert names_of("/..", hidden=True) is None
    assert names_of("/.", hidden=True) is None


@given(st.text(st.sampled_from("./\\%2eEfF5cC:~$ ab\0cON1"), max_size=40))
def test_whatever_comes_stays_below(path: str) -> None:
    names = names_of("/" + path, hidden=True)
    for name in names or ():
        assert name not in (".", "..")
        assert not set(name) & set('/\\:\0*?"<>|')
        assert name == name.rstrip(". ")
    if names is not None:
        for module, root in ((ntpath, "Q:\\site"), (posixpath, "/site")):
            joined = module.normpath(module.join(root, *names))
            assert joined == root or joined.startswith(root + module.sep)
            assert joined.count(module.sep) == root.count(module.sep) + len(names)


@pytest.mark.parametrize(
    ("value", "ranges"),
    [
        ("bytes=0-0", [(0, 1)]),
        ("bytes=0-", [(0, 100)]),
        ("bytes=10-19", [(10, 10)]),
        ("bytes=90-1000", [(90, 10)]),
        ("bytes=99-", [(99, 1)]),
        ("bytes=-1", [(99, 1)]),
        ("bytes=-100", [(0, 100)]),
        ("bytes=-1000", [(0, 100)]),
        ("BYTES = 5-6", [(5, 2)]),
        ("bytes=0-1, 3-4 ,-2", [(0, 2), (3, 2), (98, 2)]),
        ("bytes=0-1,200-", [(0, 2)]),
        ("bytes=100-", []),
        ("bytes=100-200", []),
        ("bytes=-0", []),
        ("bytes=1000-,2000-", []),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes=5-4", None),
        ("bytes=1", None),
        ("bytes=1-2-3", None),
        ("bytes=+1-2", None),
        ("bytes=0x0-1", None),
        ("bytes=1-²", None),
        ("bytes=1-99999999999999999999", None),
        ("lines=0-1", None),
        ("0-1", None),
        ("bytes=0-,0-", None),
        ("bytes=0-99,0-0", None),
        ("bytes=" + ",".join(["0-0"] * RANGES_MAX), [(0, 1)] * RANGES_MAX),
        ("bytes=" + ",".join(["0-0"] * (RANGES_MAX + 1)), None),
    ],
)
def test_ranges(value: str, ranges: list[tuple[int, int]] | None) -> None:
    assert ranges_of(value, 100) == ranges


def test_an_empty_file_has_no_ranges() -> None:
    assert ranges_of("bytes=0-", 0) == []
    assert ranges_of("bytes=-5", 0) == []


def test_tags() -> None:
    assert etag_of(255, 16) == '"10-ff"'
    assert etag_of(255, 16, "-gz") == '"10-ff-gz"'
    assert matches('"a", "b"', '"b"', weak=False)
    assert not matches('W/"b"', '"b"', weak=False)
    assert matches('W/"b"', '"b"', weak=True)
    assert matches("*", '"b"', weak=False)
    assert not matches('"c"', '"b"', weak=True)


DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
AT = 784111777


def test_dates() -> None:
    assert seconds_of(DATE) == AT
    assert seconds_of("Sunday, 06-Nov-94 08:49:37 GMT") == AT
    for wrong in ("", "yesterday", "Sun, 99 Nov 1994 08:49:37 GMT", "1" * 100):
        assert seconds_of(wrong) is None


@pytest.mark.parametrize(
    ("method", "headers", "changed", "status"),
    [
        ("GET", {}, AT, 200),
        ("GET", {b"if-none-match": b'"t"'}, AT, 304),
        ("HEAD", {b"if-none-match": b'"t"'}, AT, 304),
        ("PUT", {b"if-none-match": b"*"}, AT, 412),
        ("GET", {b"if-none-match": b'"u"'}, AT, 200),
        ("GET", {b"if-none-match": b'"u"', b"if-modified-since": DATE.encode()}, AT, 200),
        ("GET", {b"if-modified-since": DATE.encode()}, AT, 304),
        ("GET", {b"if-modified-since": DATE.encode()}, AT - 1, 304),
        ("GET", {b"if-modified-since": DATE.encode()}, AT + 1, 200),
        ("GET", {b"if-modified-since": b"nonsense"}, AT, 200),
        ("GET", {b"if-match": b'"t"'}, AT, 200),
        ("GET", {b"if-match": b'"u"'}, AT, 412),
        ("GET", {b"if-match": b'W/"t"'}, AT, 412),
        ("GET", {b"if-unmodified-since": DATE.encode()}, AT, 200),
        ("GET", {b"if-unmodified-since": DATE.encode()}, AT + 1, 412),
        ("GET", {b"if-match": b"*", b"if-unmodified-since": DATE.encode()}, AT + 1, 200),
        ("GET", {b"if-match": b"*", b"if-none-match": b"*"}, AT, 304),
    ],
)
def test_conditions(method: str, headers: dict[bytes, bytes], changed: int, status: int) -> None:
    assert verdict(Request(method, "/", list(headers.items())), '"t"', changed) == status


@pytest.mark.parametrize(
    ("value", "counts"),
    [(None, True), ('"t"', True), ('"u"', False), ('W/"t"', False), (DATE, True), ("nonsense", False)],
)
def test_if_range(value: str | None, counts: bool) -> None:
    assert range_counts(value, '"t"', AT) is counts


def test_if_range_with_another_date() -> None:
    assert not range_counts(DATE, '"t"', AT + 1)


def test_media_types() -> None:
    assert type_of("a.HTML") == "text/html; charset=utf-8"
    assert type_of("a.tar.gz") == "application/gzip"
    assert type_of("a.js") == "text/javascript; charset=utf-8", "whatever the registry says"
    assert type_of("html") == type_of("a.unknown") == "application/octet-stream"
    assert all("/" in kind for kind in paths.TYPES.values())
