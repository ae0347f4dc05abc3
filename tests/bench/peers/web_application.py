"""The WSGI application of the servers compared: 1 KiB, or the file that the program was started with."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BODY = b"x" * 1024
FILE = Path(sys.argv[1])


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"].startswith("/files/"):
        size = FILE.stat().st_size
        start_response(
            "200 OK", [("Content-Type", "application/octet-stream"), ("Content-Length", str(size))]
        )
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](FILE.open("rb"), 32768)
        return wrapped
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))])
    return [BODY]
