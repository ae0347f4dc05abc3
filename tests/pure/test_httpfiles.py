"""Static files without a connection: what is found, what is said of it, and what is not there."""

from __future__ import annotations

import gc
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iocp_ctypes import _httpfiles
from iocp_ctypes._httpfiles import LISTING_MAX, SMALL_FILE_MAX, OpenFile, StaticFiles
from iocp_ctypes._httpmessage import FileBody, Request, Response

TEXT = b"<p>hello</p>\n"
BIG = bytes(range(256)) * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "page.html").write_bytes(TEXT)
    (folder / "big.bin").write_bytes(BIG)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "grüß gott.txt").write_text("grüß", encoding="utf-8")
    (folder / "sub" / "index.html").write_bytes(b"index")
    (folder / ".secret").write_bytes(b"secret")
    (tmp_path / "outside.txt").write_bytes(b"outside")
    (tmp_path / "root-twin").mkdir()
    (tmp_path / "root-twin" / "x.txt").write_bytes(b"twin")
    return folder


def ask(files: StaticFiles, target: str, method: str = "GET", route: str = "/", **headers: str) -> Response:
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    request = Request(method, target, fields)
    request.route = route
    return files(request)


def body(response: Response) -> bytes:
    """The bytes that would be sent; closes the file."""
    if isinstance(response.body, bytes):
        return response.body
    sent = b""
    for before, offset, count in response.body.parts:
        response.body.file.seek(offset)
        sent += before + response.body.file.read(count)
    sent += response.body.tail
    assert len(sent) == response.body.length
    response.body.close()
    return sent


def test_a_file(root: Path) -> None:
    answer = ask(StaticFiles(root), "/page.html")
    assert answer.status == 200
    assert body(answer) == TEXT
    assert answer.header("Content-Type") == "text/html; charset=utf-8"
    assert answer.header("Accept-Ranges") == "bytes"
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert re.fullmatch(r'"[0-9a-f]+-d"', str(answer.header("ETag")))
    assert str(answer.header("Last-Modified")).endswith(" GMT")


def test_a_large_file_is_left_in_the_file(root: Path) -> None:
    answer = ask(StaticFiles(root), "/big.bin")
    assert isinstance(answer.body, FileBody)
    assert body(answer) == BIG


def test_the_edge_between_small_and_large(root: Path) -> None:
    for size, kept in ((SMALL_FILE_MAX, bytes), (SMALL_FILE_MAX + 1, FileBody)):
        (root / "edge.bin").write_bytes(bytes(size))
        answer = ask(StaticFiles(root), "/edge.bin")
        assert isinstance(answer.body, kept)
        assert body(answer) == bytes(size)


def test_an_empty_file(root: Path) -> None:
    assert body(ask(StaticFiles(root), "/empty.txt")) == b""
    assert ask(StaticFiles(root), "/empty.txt", range="bytes=0-").status == 416


def test_a_name_beyond_ascii(root: Path) -> None:
    assert body(ask(StaticFiles(root), "/gr%C3%BC%C3%9F%20gott.txt")) == "grüß".encode()


@pytest.mark.parametrize(
    "target",
    [
        "/nothing",
        "/page.html/",
        "/page.html/x",
        "/../outside.txt",
        "/%2e%2e/outside.txt",
        "/..%5coutside.txt",
        "/sub/../../outside.txt",
        "/../root-twin/x.txt",
        "/page.html::$DATA",
        "/page.html.",
        "/page.html%20",
        "/NUL",
        "/CON",
        "/COM1",
        "/.secret",
        "/sub/deep/",
        "/" + "x" * 255,
        "/" + "/".join(["x" * 200] * 60),
    ],
)
def test_what_is_not_there(root: Path, target: str) -> None:
    assert ask(StaticFiles(root), target).status == 404


def test_an_absolute_path_is_not_there(root: Path) -> None:
    outside = root.parent / "outside.txt"
    for target in (outside.as_posix(), "/" + str(outside), "//" + outside.as_posix()):
        assert ask(StaticFiles(root), target).status == 404


def test_hidden_files_where_asked_for(root: Path) -> None:
    assert body(ask(StaticFiles(root, hidden=True), "/.secret")) == b"secret"


def test_other_methods(root: Path) -> None:
    answer = ask(StaticFiles(root), "/page.html", "POST")
    assert (answer.status, answer.header("Allow")) == (405, "GET, HEAD")
    assert ask(StaticFiles(root), "/page.html", "HEAD").status == 200


def test_folders(root: Path) -> None:
    files = StaticFiles(root)
    assert body(ask(files, "/sub/")) == b"index"
    answer = ask(files, "/sub?a=b")
    assert (answer.status, answer.header("Location")) == (301, "/sub/?a=b")
    assert ask(files, "/").status == 404


def test_a_redirect_stays_at_home(root: Path) -> None:
    (root / "example.org").mkdir()
    assert ask(StaticFiles(root), "//example.org").header("Location") == "/example.org/"


def test_another_index(root: Path) -> None:
    files = StaticFiles(root, index=("nothing.html", "page.html"))
    assert body(ask(files, "/")) == TEXT
    assert ask(files, "/sub/").status == 404


def test_below_a_route(root: Path) -> None:
    files = StaticFiles(root / "sub")
    assert body(ask(files, "/static/index.html", route="/static/")) == b"index"
    assert body(ask(files, "/a/b/", route="/a/b/")) == b"index"
    assert body(ask(files, "/index.html", route="/index.html")) == b"index"
    assert ask(files, "/static/../page.html", route="/static/").status == 404


def test_a_listing(root: Path) -> None:
    (root / "a&b <i>.txt").write_bytes(b"") if sys.platform != "win32" else None
    (root / "a&b.txt").write_bytes(b"123")
    answer = ask(StaticFiles(root, listing=True), "/")
    assert answer.header("Content-Type") == "text/html; charset=utf-8"
    text = body(answer).decode()
    links = re.findall(r'<a href="([^"]+)">([^<]+)</a>', text)
    assert links[0] == ("./sub/", "sub/"), "folders first"
    assert ("./a%26b.txt", "a&amp;b.txt") in links
    assert ("./gr%C3%BC%C3%9F%20gott.txt", "grüß gott.txt") in links
    assert ".secret" not in text
    assert "<i>" not in text, "what could not be asked for is not shown"
    deeper = body(ask(StaticFiles(root, listing=True), "/sub/deep/")).decode()
    assert '<a href="../">' in deeper
    assert "<h1>/sub/deep/</h1>" in deeper


def test_a_listing_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LISTING_MAX >= 1000
    monkeypatch.setattr(_httpfiles, "LISTING_MAX", 2)
    assert body(ask(StaticFiles(root, listing=True), "/")).count(b"<tr>") == 2


@pytest.mark.parametrize(
    ("asked", "part", "shown"),
    [
        ("bytes=0-0", BIG[:1], "bytes 0-0/262144"),
        ("bytes=100-199", BIG[100:200], "bytes 100-199/262144"),
        ("bytes=262143-", BIG[-1:], "bytes 262143-262143/262144"),
        ("bytes=-10", BIG[-10:], "bytes 262134-262143/262144"),
    ],
)
def test_a_range(root: Path, asked: str, part: bytes, shown: str) -> None:
    answer = ask(StaticFiles(root), "/big.bin", range=asked)
    assert answer.status == 206
    assert answer.header("Content-Range") == shown
    assert body(answer) == part


def test_several_ranges(root: Path) -> None:
    answer = ask(StaticFiles(root), "/big.bin", range="bytes=0-9,300-399,-5")
    match = re.fullmatch(r"multipart/byteranges; boundary=(\w+)", str(answer.header("Content-Type")))
    assert answer.status == 206
    assert match
    sent = body(answer)
    first, *parts, last = sent.split(b"--" + match[1].encode())
    assert (first, last) == (b"", b"--\r\n")
    expected = [(BIG[:10], b"0-9"), (BIG[300:400], b"300-399"), (BIG[-5:], b"262139-262143")]
    for part, (data, shown) in zip(parts, expected, strict=True):
        head = (
            b"\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes "
            + shown
            + b"/262144\r\n\r\n"
        )
        assert part == head + data + b"\r\n"


def test_ranges_that_do_not_count(root: Path) -> None:
    files = StaticFiles(root)
    answer = ask(files, "/big.bin", range="bytes=300000-")
    assert (answer.status, answer.header("Content-Range")) == (416, "bytes */262144")
    for answer in (
        ask(files, "/big.bin", range="nonsense"),
        ask(files, "/big.bin", range="bytes=0-1", if_range='"other"'),
        ask(files, "/big.bin", "HEAD", range="bytes=0-1"),
    ):
        assert answer.status == 200
        assert body(answer) == BIG
    etag = str(ask(files, "/big.bin").header("ETag"))
    assert ask(files, "/big.bin", range="bytes=0-1", if_range=etag).status == 206


def test_conditions(root: Path) -> None:
    files = StaticFiles(root)
    first = ask(files, "/page.html")
    etag, changed = str(first.header("ETag")), str(first.header("Last-Modified"))
    for headers in ({"if_none_match": etag}, {"if_modified_since": changed}, {"if_none_match": "W/" + etag}):
        again = ask(files, "/page.html", **headers)
        assert again.status == 304
        assert again.body == b""
        assert again.header("ETag") == etag
    assert ask(files, "/page.html", if_match='"other"').status == 412
    (root / "page.html").write_bytes(TEXT + b"more")
    assert ask(files, "/page.html", if_none_match=etag).status == 200


def test_ready_made_compression(root: Path) -> None:
    packed = root / "page.html.gz"
    packed.write_bytes(gzip.compress(TEXT))
    files = StaticFiles(root)
    answer = ask(files, "/page.html", accept_encoding="gzip")
    assert gzip.decompress(body(answer)) == TEXT
    assert answer.header("Content-Encoding") == "gzip"
    assert answer.header("Content-Type") == "text/html; charset=utf-8"
    plain = ask(files, "/page.html")
    assert body(plain) == TEXT
    assert plain.header("Content-Encoding") is None
    assert plain.header("Vary") == answer.header("Vary") == "Accept-Encoding"
    assert plain.header("ETag") != answer.header("ETag")
    assert (
        ask(StaticFiles(root, precompressed=False), "/page.html", accept_encoding="gzip").header("Vary")
        is None
    )
    old = (root / "page.html").stat().st_mtime - 100
    os.utime(packed, (old, old))
    assert body(ask(files, "/page.html", accept_encoding="gzip")) == TEXT, "it is older than the page"


def test_further_fields(root: Path) -> None:
    files = StaticFiles(root, headers=[("Cache-Control", "max-age=60")])
    assert ask(files, "/page.html").header("Cache-Control") == "max-age=60"


def link(target: Path, place: Path, *, folder: bool) -> str | None:
    """Make a link that leads to `target`, or a junction; returns why there is none."""
    try:
        place.symlink_to(target, target_is_directory=folder)
    except OSError as exc:
        if sys.platform != "win32" or not folder:
            return str(exc)
        made = subprocess.run(["cmd", "/c", "mklink", "/J", str(place), str(target)], capture_output=True)
        return None if made.returncode == 0 and place.exists() else str(exc)
    return None if place.exists() else "links cannot be made here"


@pytest.mark.parametrize("folder", [False, True])
def test_links_lead_nowhere_outside(root: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    outside = root.parent / ("root-twin" if folder else "outside.txt")
    name = "way" + ("/x.txt" if folder else "")
    if link(outside, root / "way", folder=folder) is not None:
        # Without links what they would do is put in: that the path leads elsewhere.
        (root / "way").mkdir() if folder else (root / "way").write_bytes(b"")
        real = os.path.realpath
        end = os.path.join(str(outside), "x.txt") if folder else str(outside)
        monkeypatch.setattr(
            os.path, "realpath", lambda path, **more: end if "way" in str(path) else real(path)
        )
    assert ask(StaticFiles(root), "/" + name).status == 404


def test_links_may_lead_to_what_is_inside(root: Path) -> None:
    if sys.platform == "win32":
        files = StaticFiles(root.parent / "root" / "sub" / "..")  # a root that is not written as it is
        assert body(ask(files, "/page.html")) == TEXT
        return
    assert link(root / "page.html", root / "way.html", folder=False) is None
    assert link(root, root.parent / "alias", folder=True) is None
    assert body(ask(StaticFiles(root.parent / "alias"), "/way.html")) == TEXT


@pytest.mark.parametrize("what", ["nothing", "page.html"])
def test_a_root_that_is_no_folder(root: Path, what: str) -> None:
    with pytest.raises(NotADirectoryError):
        StaticFiles(root / what)


def test_an_index_that_is_one_text(root: Path) -> None:
    with pytest.raises(TypeError, match="index="):
        StaticFiles(root, index="index.html")


def test_what_may_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> int:
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "open", refuse)
    assert ask(StaticFiles(root), "/page.html").status == 403


def test_a_file_closes_with_its_last_reference(root: Path) -> None:
    file = OpenFile(str(root / "page.html"))
    number = file.fileno()
    assert (file.read(2), file.tell(), file.seek(1), file.read()) == (TEXT[:2], 2, 1, TEXT[1:])
    del file
    gc.collect()
    with pytest.raises(OSError):  # noqa: PT011
        os.fstat(number)


def test_no_file_stays_open(root: Path) -> None:
    files = StaticFiles(root)
    big = root / "big.bin"
    for headers in ({}, {"range": "bytes=0-1"}, {"range": "bytes=999999-"}, {"if_none_match": "*"}):
        ask(files, "/big.bin", **headers)
    gc.collect()
    big.rename(root / "renamed.bin")  # on Windows, not while it is open
    with pytest.raises(ValueError, match="closed"):
        closed(root / "renamed.bin").fileno()


def closed(path: Path) -> OpenFile:
    file = OpenFile(str(path))
    file.close()
    file.close()
    return file


def test_a_folder_is_no_file(root: Path) -> None:
    with pytest.raises(OSError):  # noqa: PT011
        OpenFile(str(root))
