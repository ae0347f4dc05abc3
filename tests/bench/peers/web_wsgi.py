"""The application of web_waitress on our WSGI server, with its default options."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from iocp_ctypes.wsgi import WSGIServer

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


if __name__ == "__main__":
    server = WSGIServer(("127.0.0.1", 0), application)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
