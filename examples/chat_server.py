"""Chat: what one says, all others hear. The first line is your name; `/who` lists who is there.

A guest that reads too slowly for what the others say is dropped: nobody waits for it, and what is kept for it
has an end.

From the checkout's root: `py -m examples.chat_server [--port N]`.
"""

import argparse

from iocp_ctypes import Connection, Server

LINE_MAX = 4096  # bytes
UNREAD_MAX = 256 * 1024  # bytes kept for a guest that does not read


class Guest(Connection):
    name = ""
    rest = b""

    def on_connect(self) -> None:
        self.send(b"your name?\n")

    def on_data(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.on_line(line.decode(errors="replace").strip())
        if len(self.rest) > LINE_MAX:
            self.abort()

    def on_line(self, line: str) -> None:
        if not self.name:
            self.name = line or f"guest {self.id}"
            self.tell_others(f"* {self.name} is here")
        elif line == "/who":
            names = sorted(guest.name for guest in self.server.connections if guest.name)
            self.send(f"* {', '.join(names)}\n".encode())
        elif line:
            self.tell_others(f"{self.name}: {line}")

    def tell_others(self, text: str) -> None:
        self.server.broadcast(f"{text}\n".encode(), where=lambda guest: guest.name and guest is not self)

    def on_close(self, exc: OSError | None) -> None:
        if self.name:
            self.tell_others(f"* {self.name} has left: {self.close_reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What one says, all others hear.")
    parser.add_argument("--port", type=int, default=9001, help="0 is any that is free (%(default)s)")
    server = Server(("127.0.0.1", parser.parse_args().port), Guest, write_buffer_max=UNREAD_MAX)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
