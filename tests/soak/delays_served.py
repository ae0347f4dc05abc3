"""The server of the soak run `delays`, a program for Windows: it echoes, and blocks where a client asks.

Started by `process.py` as `python -m soak.delays_served OPTIONS`, where OPTIONS are Server's, in JSON, and
"block", for how many seconds, and "serve", whether the main thread is in serve_forever, and else reads the
command. That comes from stdin:
    interrupt   Ctrl-C for serve_forever; answers with one line of JSON how that went; the program ends
    stop        stop the server; the program ends
    forget      the script ends, and has forgotten to stop the server
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time

from iocp_ctypes import Connection, Server

held = threading.Lock()  # by this program, for ever


def read_from_nobody(seconds: float) -> None:
    """Wait for an answer that does not come, as a database's driver does for one that is slow."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(seconds)
        try:
            ours.recv(1)
        except TimeoutError:
            pass


def compute(seconds: float) -> None:
    """Hold no lock and make no call that waits: what holds others up is the GIL alone."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


WAYS = {
    b"sleep": time.sleep,
    b"lock": lambda seconds: held.acquire(timeout=seconds),
    b"database": read_from_nobody,
    b"compute": compute,
}


class Blocking(Connection):
    """Sends back what comes, but blocks first where that names a way to."""

    seconds = 0.0

    def on_data(self, data: bytes) -> None:
        if way := WAYS.get(data):
            way(self.seconds)
            data = b"done"
        self.send(data)


def interrupt(pressed: list[float]) -> None:
    """Wait for the command and raise SIGINT, as the thread does that a console makes for Ctrl-C."""
    sys.stdin.readline()
    pressed.append(time.monotonic())
    signal.raise_signal(signal.SIGINT)


def serve(server: Server) -> None:
    """Serve until interrupted, and say how long that took."""
    pressed: list[float] = []
    thread = threading.Thread(target=interrupt, args=(pressed,))
    thread.start()
    server.serve_forever()
    seconds = time.monotonic() - pressed[0]
    thread.join()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        again.bind(server.address)  # raises where the port is not free
    print(json.dumps({"seconds": seconds, "connections": len(server.connections)}), flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    Blocking.seconds = options.pop("block", 0.0)
    forever = options.pop("serve", False)
    held.acquire()
    server = Server(("127.0.0.1", 0), Blocking, **options)
    server.start()
    print(json.dumps({"address": list(server.address)}), flush=True)
    if forever:
        serve(server)
    elif sys.stdin.readline().strip() == "stop":
        server.stop(5)


if __name__ == "__main__":
    main()
