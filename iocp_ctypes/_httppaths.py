"""From the path of a URL to names below a folder; ranges, dates and tags (layer P: pure, no file is touched).

Laws
1. A path either becomes names that can only be below the folder, on Windows as well, or it is refused.
2. What Windows would read as something else than a file of that name is refused on every system: separators,
   drives, streams, devices, short names, names that end with a dot or a space.
3. Nothing is decoded twice.
4. A range that cannot be understood is ignored; one that cannot be satisfied is told apart from it.
Source: RFC 3986, RFC 9110 sections 13 and 14;
learn.microsoft.com/windows/win32/fileio/naming-a-file
"""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import unquote_to_bytes

from ._httpmessage import Request

#: Ranges of one request; more, or such as bring more than the file has, are answered with the whole file.
RANGES_MAX: Final = 16
#: Names of a path, and characters of a name, which is what NTFS takes.
NAMES_MAX: Final = 64
NAME_LENGTH_MAX: Final = 255

_FORBIDDEN: Final = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
_DEVICE: Final = re.compile(r"(CON|PRN|AUX|NUL|COM[0-9¹²³]|LPT[0-9¹²³]|CONIN\$|CONOUT\$|CLOCK\$)", re.I)
_SHORT: Final = re.compile(r"[^.~]{1,6}~[0-9]{1,6}(\.[^.]{0,3})?")
_RANGE: Final = re.compile(r"[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*")


def names_of(raw_path: str, hidden: bool = False) -> list[str] | None:
    """Return the names that a path consists of; None where it is refused.

    Args:
        raw_path: the path as it came, not decoded; empty names count as not there.
        hidden: whether names that begin with a dot are let through; ".well-known" always is.
    """
    names: list[str] = []
    for part in raw_path.split("/"):
        if not part:
            continue
        try:
            name = unquote_to_bytes(part).decode("utf-8")
        except UnicodeDecodeError:
            return None
        if not is_plain(name) or (name.startswith(".") and not hidden and name != ".well-known"):
            return None
        names.append(name)
    return names if len(names) <= NAMES_MAX else None


def is_plain(name: str) -> bool:
    """Return whether a name can only be that of a file or folder in the folder where it is looked for."""
    if not name or len(name) > NAME_LENGTH_MAX or name[-1] in ". " or name[0] == " ":
        return False
    if _FORBIDDEN.search(name) or any("\ud800" <= character <= "\udfff" for character in name):
        return False
    if _DEVICE.fullmatch(name.partition(".")[0].rstrip(" ")):
        return False
    return not (_SHORT.fullmatch(name) and len(name) <= 12)


def ranges_of(value: str, size: int) -> list[tuple[int, int]] | None:
    """Return the ranges that a Range field asks for, as (offset, count).

    Args:
        value: the field's value.
        size: bytes of the file.

    Returns:
        None: to be ignored. An empty list: none can be satisfied.
    """
    unit, equals, rest = value.partition("=")
    if not equals or unit.strip().lower() != "bytes":
        return None
    asked = rest.split(",")
    if len(asked) > RANGES_MAX:
        return None
    ranges: list[tuple[int, int]] = []
    for part in asked:
        match = _RANGE.fullmatch(part)
        if match is None or not (match[1] or match[2]):
            return None
        if match[1]:
            first, last = int(match[1]), int(match[2]) if match[2] else size - 1
            if match[2] and last < first:
                return None
        else:
            first, last = max(0, size - int(match[2])), size - 1
        last = min(last, size - 1)
        if first <= last:
            ranges.append((first, last - first + 1))
    return None if sum(count for _first, count in ranges) > size else ranges


def etag_of(size: int, changed: int, variant: str = "") -> str:
    """Return the tag of a file by its size and the time of its last change, in nanoseconds."""
    return f'"{changed:x}-{size:x}{variant}"'


def matches(value: str, etag: str, weak: bool) -> bool:
    """Return whether an If-Match or If-None-Match field names a tag; `weak`: W/ makes no difference."""
    if value.strip() == "*":
        return True
    for tag in value.split(","):
        tag = tag.strip()
        if (tag.removeprefix("W/") if weak else tag) == etag:
            return True
    return False


def seconds_of(date: str) -> int | None:
    """Return the instant of an HTTP date in seconds of time.time(); None where it is none."""
    try:
        return int(parsedate_to_datetime(date).timestamp())
    except (ValueError, TypeError, OverflowError):
        return None


def verdict(request: Request, etag: str, changed: int) -> int:
    """Return what the conditions of a request come to: 200, 304 or 412.

    Args:
        request: the request.
        etag: the file's tag.
        changed: the second of the file's last change.
    """

    def field(name: bytes) -> str | None:
        value = request.field(name)
        return None if value is None else value.decode("latin-1")

    reads = request.method in ("GET", "HEAD")
    if (value := field(b"if-match")) is not None:
        if not matches(value, etag, weak=False):
            return 412
    elif (value := field(b"if-unmodified-since")) is not None:
        since = seconds_of(value)
        if since is not None and changed > since:
            return 412
    if (value := field(b"if-none-match")) is not None:
        if matches(value, etag, weak=True):
            return 304 if reads else 412
    elif (value := field(b"if-modified-since")) is not None and reads:
        since = seconds_of(value)
        if since is not None and changed <= since:
            return 304
    return 200


def range_counts(value: str | None, etag: str, changed: int) -> bool:
    """Return whether an If-Range field (None: there is none) lets the Range field count."""
    if value is None:
        return True
    value = value.strip()
    if value.startswith(('"', "W/")):
        return value == etag  # a weak tag never counts
    return seconds_of(value) == changed


#: Media types by the end of a name. The system's own table is left out: a registry that says what nobody
#: expects is a common fault of Windows machines.
TYPES: Final = {
    "avif": "image/avif",
    "bmp": "image/bmp",
    "css": "text/css",
    "csv": "text/csv",
    "gif": "image/gif",
    "gz": "application/gzip",
    "htm": "text/html",
    "html": "text/html",
    "ico": "image/x-icon",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "js": "text/javascript",
    "json": "application/json",
    "map": "application/json",
    "md": "text/markdown",
    "mjs": "text/javascript",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "ogg": "audio/ogg",
    "otf": "font/otf",
    "pdf": "application/pdf",
    "png": "image/png",
    "svg": "image/svg+xml",
    "tar": "application/x-tar",
    "ttf": "font/ttf",
    "txt": "text/plain",
    "wasm": "application/wasm",
    "wav": "audio/wav",
    "webm": "video/webm",
    "webmanifest": "application/manifest+json",
    "webp": "image/webp",
    "woff": "font/woff",
    "woff2": "font/woff2",
    "xhtml": "application/xhtml+xml",
    "xml": "application/xml",
    "zip": "application/zip",
}


def type_of(name: str) -> str:
    """Return the media type of a file by its name; texts are said to be UTF-8."""
    kind = TYPES.get(name.rpartition(".")[2].lower() if "." in name else "", "application/octet-stream")
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
