"""TLS proxy: takes TLS, forwards in the clear; who sends faster than the other side reads has to wait.

From the checkout's root: `py -m examples.tls_proxy [--port N] [--to HOST:PORT] [--cert FILE] [--key FILE]`.
Without --cert it makes a certificate for the time that it runs, which no client trusts unless told to.
"""

import argparse
from contextlib import suppress

from iocp_ctypes import Connection, ConnectionClosedError, Server, connect
from iocp_ctypes.certificate import throwaway_certificate
from iocp_ctypes.tls import context_of_files


class Side(Connection):
    other: "Side"

    def on_data(self, data: bytes) -> None:
        with suppress(ConnectionClosedError):  # then its on_close ends this side as well
            if not self.other.send(data):
                self.pause_reading()
                if self.other.write_buffer_size <= self.other.low_mark:
                    self.resume_reading()  # its on_drain came in between, on another thread

    def on_drain(self) -> None:
        self.other.resume_reading()

    def on_eof(self) -> bool:
        with suppress(ConnectionClosedError):
            self.other.send_eof()
        return True

    def on_close(self, exc: OSError | None) -> None:
        if exc is None and self.close_reason == "eof":
            self.other.close()
        else:
            self.other.abort()  # so that nobody takes a part for the whole


class Outside(Side):
    def on_connect(self) -> None:
        self.other = Side()
        self.other.other = self
        connect(target, lambda _server, _address: self.other, timeout=10)  # what is sent meanwhile waits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Takes TLS, forwards in the clear.")
    parser.add_argument("--port", type=int, default=9443, help="0 is any that is free (%(default)s)")
    parser.add_argument("--to", default="127.0.0.1:9000", help="where to forward to (%(default)s)")
    parser.add_argument("--cert", help="PEM file of the certificate; it may have the key, too")
    parser.add_argument("--key", help="PEM file of the key")
    given = parser.parse_args()
    host, _, port = given.to.rpartition(":")
    target = (host, int(port))
    tls = context_of_files(given.cert, given.key) if given.cert else throwaway_certificate().server_context()
    server = Server(("127.0.0.1", given.port), Outside, tls=tls)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
