"""Echo server on `socketserver.ThreadingTCPServer`: a thread a connection, blocking calls."""

import socket
import socketserver

RECEIVE_SIZE = 65536  # what asyncio's Proactor asks for


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it receives, until the peer closes."""

    def handle(self) -> None:
        connection: socket.socket = self.request
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the others set it, too
        try:
            while data := connection.recv(RECEIVE_SIZE):
                connection.sendall(data)
        except OSError:
            pass  # a peer that resets is no news, and a traceback for each would be


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False  # else it keeps every thread object for ever
    request_queue_size = 200  # the same kernel queue for every server; its own default is 5


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Echo) as server:
        print(f"listening on {server.server_address[0]!s}:{server.server_address[1]}", flush=True)
        server.serve_forever()
