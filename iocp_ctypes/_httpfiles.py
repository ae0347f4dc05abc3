"""L7: files below a folder as answers: conditions, ranges, ready-made compression, listings.

Laws
1. What is opened lies below the folder after all links and junctions were followed, or it is not there (404).
2. A file is looked at through its own handle, once it is open: what is said of it is true of what is sent.
3. Nobody is told why a path is refused.
4. Opening and looking wait for the disk, on the thread of the callback; sending does not wait for the peer.
"""

from __future__ import annotations

import html
import os
import secrets
import stat
import time
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

from ._httpmessage import FileBody, Request, Response, accepts_gzip, http_date, is_text, problem
from ._httppaths import etag_of, names_of, range_counts, ranges_of, type_of, verdict

#: Entries that a listing of a folder shows.
LISTING_MAX: Final = 10_000
#: Bytes up to which a file is read at once and sent with the head, compressed where it is a text.
SMALL_FILE_MAX: Final = 64 * 1024

_READ: Final = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)


class OpenFile:
    """A file that is open for reading and is closed with the last reference to it.

    So whoever sends it need not say when it is done.
    """

    __slots__ = ("_number", "size", "status")

    def __init__(self, path: str) -> None:
        """Open a path; OSError where that cannot be done or it is no regular file."""
        self._number = -1
        self._number = os.open(path, _READ)
        self.status = os.fstat(self._number)
        if not stat.S_ISREG(self.status.st_mode):
            self.close()
            raise FileNotFoundError(path)
        self.size = self.status.st_size

    def fileno(self) -> int:
        """Return the number of the C runtime's table; ValueError where the file is closed."""
        if self._number < 0:
            raise ValueError("the file is closed")
        return self._number

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; returns it."""
        return os.lseek(self.fileno(), offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return os.lseek(self.fileno(), 0, os.SEEK_CUR)

    def read(self, count: int = -1) -> bytes:
        """Read at most `count` bytes, up to the end where it is less than 0."""
        return os.read(self.fileno(), self.size if count < 0 else count)

    def close(self) -> None:
        """Close the file; again is a no-op."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __del__(self) -> None:
        self.close()


class StaticFiles:
    """A handler for `HTTPConnection.routes` that answers with the files of a folder.

    Put it under a path that ends with "/": what follows that path is looked up below the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        listing: bool = False,
        index: Sequence[str] = ("index.html",),
        hidden: bool = False,
        precompressed: bool = True,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Take a folder that exists.

        Args:
            folder: the folder.
            listing: whether a folder without an index file is answered with what is in it; else 404.
            index: names of files that stand for their folder, the first that exists.
            hidden: whether names that begin with a dot are shown.
            precompressed: whether `NAME.gz` is sent for `NAME` to who accepts gzip, where it is not older.
            headers: further header fields of each answer with a file, Cache-Control for example.

        Raises:
            NotADirectoryError: there is no such folder. TypeError: `index` is a str.
        """
        if isinstance(index, str):
            raise TypeError(f"index={index!r}: must be several names, in a tuple for example")
        self._root = os.path.realpath(os.fspath(folder))
        if not os.path.isdir(self._root):
            raise NotADirectoryError(f"no such folder: {os.fspath(folder)}")
        self._listing, self._index, self._hidden = listing, tuple(index), hidden
        self._precompressed, self._headers = precompressed, list(headers)

    def __call__(self, request: Request) -> Response:
        """Answer a request; the part of its path that its route stands for is left out."""
        if request.method not in ("GET", "HEAD"):
            return problem(405, headers=[("Allow", "GET, HEAD")])
        names = names_of(request.raw_path, self._hidden)
        if names is None:
            return problem(404)
        below = request.route.rpartition("/")[0]
        names = names[len([name for name in below.split("/") if name]) :]
        path = self._real(os.path.join(self._root, *names))
        if path is None:
            return problem(404)
        try:
            if os.path.isdir(path):
                return self._folder(request, path, names)
            if request.raw_path.endswith("/"):
                return problem(404)
            return self._file(request, path)
        except PermissionError:
            return problem(403)
        except OSError:
            return problem(404)

    def _real(self, path: str) -> str | None:
        """Return where a path leads, all links followed; None where there is nothing, or outside the root."""
        try:
            real = os.path.realpath(path, strict=True)
            inside = os.path.commonpath([self._root, real])
        except (OSError, ValueError):
            return None
        return real if os.path.normcase(inside) == os.path.normcase(self._root) else None

    # -- files ----------------------------------------------------------------------------------------------

    def _file(self, request: Request, path: str) -> Response:
        file = OpenFile(path)
        kind = type_of(path)
        headers = [*self._headers, ("Accept-Ranges", "bytes"), ("X-Content-Type-Options", "nosniff")]
        packed = self._packed(request, path, file, kind, headers)
        variant, file = ("-gz", packed) if packed is not None else ("", file)
        changed, size = file.status.st_mtime_ns, file.size
        etag = etag_of(size, changed, variant)
        headers += [("ETag", etag), ("Last-Modified", http_date(changed // 10**9).decode())]
        outcome = verdict(request, etag, changed // 10**9)
        if outcome != 200:
            file.close()
            return Response(status=304, headers=headers) if outcome == 304 else problem(412, headers=headers)
        asked = request.field(b"range") if request.method == "GET" else None
        if asked is not None and range_counts(request.fields.get("if-range"), etag, changed // 10**9):
            ranges = ranges_of(asked.decode("latin-1"), size)
            if ranges is not None:
                return self._part(file, ranges, kind, headers)
        if size > SMALL_FILE_MAX:
            return Response(FileBody(file, [(b"", 0, size)]), 200, headers, content_type=kind)
        try:
            return Response(file.read(size), 200, headers, content_type=kind)
        finally:
            file.close()

    def _packed(
        self, request: Request, path: str, file: OpenFile, kind: str, headers: list[tuple[str, str]]
    ) -> OpenFile | None:
        """Return the ready-made compressed file where there is one and the peer takes it; says so."""
        if not self._precompressed or not is_text(kind):
            return None
        real = self._real(path + ".gz")
        if real is None:
            return None
        try:
            packed = OpenFile(real)
        except OSError:
            return None
        if packed.status.st_mtime_ns < file.status.st_mtime_ns:
            packed.close()
            return None
        headers.append(("Vary", "Accept-Encoding"))
        if not accepts_gzip(request.field(b"accept-encoding")):
            packed.close()
            return None
        headers.append(("Content-Encoding", "gzip"))
        file.close()
        return packed

    def _part(
        self, file: OpenFile, ranges: list[tuple[int, int]], kind: str, headers: list[tuple[str, str]]
    ) -> Response:
        """Answer with ranges of a file: 206, or 416 where there are none."""
        size = file.size
        if not ranges:
            file.close()
            return problem(416, headers=[*headers, ("Content-Range", f"bytes */{size}")])
        shown = [f"bytes {offset}-{offset + count - 1}/{size}" for offset, count in ranges]
        if len(ranges) == 1:
            headers.append(("Content-Range", shown[0]))
            offset, count = ranges[0]
            return Response(FileBody(file, [(b"", offset, count)]), 206, headers, content_type=kind)
        boundary = secrets.token_hex(16)
        parts = []
        for number, (offset, count) in enumerate(ranges):
            start = "\r\n" if number else ""
            before = f"{start}--{boundary}\r\nContent-Type: {kind}\r\nContent-Range: {shown[number]}\r\n\r\n"
            parts.append((before.encode(), offset, count))
        body = FileBody(file, parts, f"\r\n--{boundary}--\r\n".encode())
        return Response(body, 206, headers, content_type=f"multipart/byteranges; boundary={boundary}")

    # -- folders --------------------------------------------------------------------------------------------

    def _folder(self, request: Request, path: str, names: list[str]) -> Response:
        if not request.raw_path.endswith("/"):
            # Not as it came: "//host/" at the beginning would lead to another host.
            place = "".join("/" + part for part in request.raw_path.split("/") if part) + "/"
            query = f"?{request.query}" if request.query else ""
            return problem(301, headers=[("Location", place + query)])
        for name in self._index:
            real = self._real(os.path.join(path, name))
            if real is not None and os.path.isfile(real):
                return self._file(request, real)
        if not self._listing:
            return problem(404)
        return Response(self._list(path, names), content_type="text/html; charset=utf-8")

    def _list(self, path: str, names: list[str]) -> str:
        """Return a folder's contents as a page."""
        title = html.escape("/" + "".join(name + "/" for name in names))
        rows: list[Any] = []
        with os.scandir(path) as entries:
            for entry in entries:
                # What could not be asked for is not shown.
                if names_of(quote(entry.name, errors="replace"), self._hidden) != [entry.name]:
                    continue
                if len(rows) >= LISTING_MAX:
                    break
                rows.append(_row(entry))
        up = '<tr><td><a href="../">../</a></td><td></td><td></td></tr>\n' if names else ""
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
            f"<body><h1>{title}</h1>\n<table>\n{up}"
            + "".join(row for _key, row in sorted(rows))
            + "</table></body></html>\n"
        )


def _row(entry: os.DirEntry[str]) -> tuple[tuple[bool, str], str]:
    """Return what a line of a listing is sorted by, folders first, and the line."""
    try:
        is_folder, status = entry.is_dir(), entry.stat()
    except OSError:
        is_folder, status = False, None
    name = entry.name + ("/" if is_folder else "")
    size = "" if is_folder or status is None else str(status.st_size)
    changed = "" if status is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
    link = f'<a href="./{quote(name)}">{html.escape(name)}</a>'
    row = f'<tr><td>{link}</td><td>{changed}</td><td align="right">{size}</td></tr>\n'
    return (not is_folder, entry.name.lower()), row
