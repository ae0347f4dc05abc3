"""Datagram echo server of ours; its one argument is the number of I/O threads, 0: the default."""

import sys
import threading

from iocp_ctypes import Datagram


class Echo(Datagram):
    """Sends back what it receives."""

    def on_datagram(self, data: bytes, address: tuple[object, ...]) -> None:
        self.send_to(data, address)


if __name__ == "__main__":
    with Echo(("127.0.0.1", 0), io_threads=int(sys.argv[1])) as server:
        host, port = server.address[:2]
        print(f"listening on {host}:{port}", flush=True)
        threading.Event().wait()
