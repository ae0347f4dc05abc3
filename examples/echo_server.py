"""Echo: send back what comes.

From the checkout's root: `py -m examples.echo_server [--port N]`; with `-m` the root is importable.
"""

import argparse

from iocp_ctypes import Connection, Server


class Echo(Connection):
    def on_connect(self) -> None:
        print("hello", self.peer_address, flush=True)

    def on_data(self, data: bytes) -> None:
        if not self.send(data):
            self.pause_reading()  # the peer sends faster than it reads: TCP holds it back

    def on_drain(self) -> None:
        self.resume_reading()

    def on_close(self, exc: OSError | None) -> None:
        print("bye", self.peer_address, self.close_reason, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sends back what comes.")
    parser.add_argument("--port", type=int, default=9000, help="0 is any that is free (%(default)s)")
    server = Server(("127.0.0.1", parser.parse_args().port), Echo)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
