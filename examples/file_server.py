"""File server: a folder over HTTP/1.0, files by send_file; try it with a browser.

From the checkout's root: `py -m examples.file_server [--port N] [FOLDER]`; with `-m` the root is importable.
Only what is under the folder is served, one request a connection. A server for others needs more than this.
"""

import argparse
from pathlib import Path
from urllib.parse import unquote

from iocp_ctypes import Connection, Server

REQUEST_MAX = 8192


class FileConnection(Connection):
    folder = Path()

    def on_connect(self) -> None:
        self.request = b""
        self.set_deadline(30)  # for the request; a client that is slow to read has more time

    def on_data(self, data: bytes) -> None:
        self.request += data
        head, end, _rest = self.request.partition(b"\r\n\r\n")
        if not end and len(self.request) < REQUEST_MAX:
            return
        self.set_deadline(None)
        method, _, target = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        if not end or method != "GET":
            self.answer("400 Bad Request")
        else:
            self.send_what(unquote(target.split(" ")[0].split("?")[0]).lstrip("/"))
        self.close()  # when all is sent

    def send_what(self, name: str) -> None:
        path = (self.folder / name).resolve()  # links and ".." are gone; a drive replaces the folder
        if path.is_relative_to(self.folder) and path.is_file() and ":" not in name:
            size = path.stat().st_size
            self.send_file(path, 0, size, header=b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        else:
            self.answer("404 Not Found")

    def answer(self, status: str) -> None:
        self.send(f"HTTP/1.0 {status}\r\nContent-Length: 0\r\n\r\n".encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serves the files of a folder.")
    parser.add_argument("folder", nargs="?", default=".", help="what to serve (%(default)s)")
    parser.add_argument("--port", type=int, default=9005, help="0 is any that is free (%(default)s)")
    given = parser.parse_args()
    FileConnection.folder = Path(given.folder).resolve()
    server = Server(("127.0.0.1", given.port), FileConnection)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
