"""WebSocket echo server of ours; its one argument is the number of I/O threads, 0: the default."""

import sys
from typing import Any

from iocp_ctypes.websocket import WebSocket, WebSocketServer


class Echo(WebSocket):
    """Sends back what it receives."""

    def on_message(self, message: Any) -> None:
        self.send(message)


if __name__ == "__main__":
    with WebSocketServer(("127.0.0.1", 0), Echo, io_threads=int(sys.argv[1])) as server:
        print("listening on {}:{}".format(*server.address), flush=True)
        server.serve_forever()
