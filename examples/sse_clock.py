"""A clock in every open page: server-sent events, encoded once for however many.

Open the page in a browser; or look at the events: `curl -N http://127.0.0.1:8001/events`.

From the checkout's root: `py -m examples.sse_clock [--port N] [--every SECONDS]`.
"""

import argparse
import threading
import time

from iocp_ctypes import Server
from iocp_ctypes.http import EventStream, HTTPConnection, Request, Response, encode_event

PAGE = """<!DOCTYPE html>
<title>A clock</title>
<h1 id="clock">...</h1>
<script>
new EventSource("/events").addEventListener("tick", (event) => {
  document.getElementById("clock").textContent = event.data;
});
</script>
"""
streams: set[EventStream] = set()


def events(request: Request) -> None:
    stream = EventStream(request, retry=2)
    stream.on_close = streams.discard
    streams.add(stream)


class Clock(HTTPConnection):
    routes = {  # noqa: RUF012  # made once, and read only
        "/": lambda request: Response(PAGE, content_type="text/html; charset=utf-8"),
        "/events": events,
    }


def tick(stopped: threading.Event, seconds: float) -> None:
    while not stopped.wait(seconds):
        now = time.strftime("%H:%M:%S")
        encoded = encode_event(now, event="tick", id=str(int(time.time())))
        for stream in streams.copy():
            stream.send_encoded(encoded)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Shows the time in every open page.")
    parser.add_argument("--port", type=int, default=8001, help="0 is any that is free (%(default)s)")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="(%(default)s)")
    given = parser.parse_args()
    stopped = threading.Event()
    threading.Thread(target=tick, args=(stopped, given.every)).start()
    server = Server(("127.0.0.1", given.port), Clock)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
    stopped.set()
