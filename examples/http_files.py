"""A web server: files of a folder, an answer of its own, and figures for Prometheus.

`/` is the folder, with a listing; `/time` says what time it is; `/echo` sends back what was posted;
`/metrics` has the figures.

From the checkout's root: `py -m examples.http_files [--port N] [--folder FOLDER] [--password NAME:PASSWORD]`.
"""

import argparse
import time

from iocp_ctypes import Server, access
from iocp_ctypes.http import HTTPConnection, Metrics, Request, Response, StaticFiles, problem


def tell_time(request: Request) -> Response:
    return Response(time.strftime("%H:%M:%S\n"), headers=[("Cache-Control", "no-store")])


def echo(request: Request) -> Response:
    if request.method != "POST":
        return problem(405, headers=[("Allow", "POST")])
    return Response(request.body, content_type=request.fields.get("content-type"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serves files and a little more.")
    parser.add_argument("--port", type=int, default=8000, help="0 is any that is free (%(default)s)")
    parser.add_argument("--folder", default=".", help="the files (%(default)s)")
    parser.add_argument("--password", default="", metavar="NAME:PASSWORD", help="asked for, if it is given")
    given = parser.parse_args()
    name, colon, password = given.password.partition(":")
    counted = Metrics()

    class Web(HTTPConnection):
        routes = {  # noqa: RUF012  # made once, and read only
            "/": StaticFiles(given.folder, listing=True),
            "/time": tell_time,
            "/echo": echo,
            "/metrics": counted,
        }
        guards = (access.Basic({name: password}),) if colon else ()
        metrics = counted

    server = Server(("127.0.0.1", given.port), Web)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
