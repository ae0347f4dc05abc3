"""Our HTTP server: 1 KiB of text at any path, and the file named in the arguments below /files/."""

import sys
from pathlib import Path

from iocp_ctypes import Server
from iocp_ctypes.http import HTTPConnection, Request, Response, StaticFiles

BODY = b"x" * 1024
FOLDER = Path(sys.argv[1]).parent


def answer(request: Request) -> Response:
    return Response(BODY, content_type="text/plain")


class Web(HTTPConnection):
    routes = {"/": answer, "/files/": StaticFiles(FOLDER)}  # noqa: RUF012


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Web)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
