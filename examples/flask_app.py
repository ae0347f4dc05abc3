"""A Flask application on the completion port: a page, an upload, an answer that comes piece by piece.

`/` says who asks, `/count` counts what is posted to it, `/slow` sends a line every second.

From the checkout's root: `py -m examples.flask_app [--port N]`; it needs Flask: `pip install flask h11`.
Or leave the serving to `py -m iocp_ctypes wsgi examples.flask_app:app`.
"""

import argparse
import time
from collections.abc import Iterator

from flask import Flask, Response, request

from iocp_ctypes.wsgi import WSGIServer

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    return f"hello {request.remote_addr}\n"


@app.post("/count")
def count() -> dict[str, int]:
    data = request.get_data()
    return {"bytes": len(data), "lines": data.count(b"\n")}


@app.get("/slow")
def slow() -> Response:
    def lines() -> Iterator[str]:
        for number in range(5):
            yield f"line {number}\n"
            time.sleep(1)

    return Response(lines(), mimetype="text/plain")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serves a Flask application.")
    parser.add_argument("--port", type=int, default=8000, help="0 is any that is free (%(default)s)")
    given = parser.parse_args()
    server = WSGIServer(("127.0.0.1", given.port), app)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
