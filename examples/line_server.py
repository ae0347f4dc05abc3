"""A line protocol with deadlines: `set KEY VALUE`, `get KEY`, `quit`; one line in, one line out.

A deadline runs from line to line. Single bytes do not move it: nobody holds a connection by sending one now
and then, as an idle time-out alone would allow.

From the checkout's root: `py -m examples.line_server [--port N] [--seconds N]`.
"""

import argparse

from iocp_ctypes import Connection, Server

LINE_MAX = 1024  # bytes
KEYS_MAX = 10_000
store: dict[bytes, bytes] = {}


class Client(Connection):
    seconds = 30.0  # for each line
    rest = b""

    def on_connect(self) -> None:
        self.set_deadline(self.seconds)

    def on_data(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if not self.closing:
                self.on_line(line.split(None, 2))
        if len(self.rest) > LINE_MAX:
            self.abort()

    def on_line(self, words: list[bytes]) -> None:
        self.set_deadline(self.seconds)
        match words:
            case [b"get", key]:
                self.send(store.get(key, b"?") + b"\n")
            case [b"set", key, value] if key in store or len(store) < KEYS_MAX:
                store[key] = value.rstrip()
                self.send(b"ok\n")
            case [b"quit"]:
                self.close()
            case _:
                self.send(b"error\n")

    def on_timeout(self, kind: str) -> bool:
        self.send(b"too slow\n")
        self.close()
        return True  # else the connection would end at once, and the line might not arrive


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Keeps values by key, for clients that are quick enough.")
    parser.add_argument("--port", type=int, default=9002, help="0 is any that is free (%(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="for each line (%(default)s)")
    given = parser.parse_args()
    Client.seconds = given.seconds
    server = Server(("127.0.0.1", given.port), Client)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
