"""Chat in the browser: one port serves the page and its WebSocket; what one says, all see.

From the checkout's root, with the library `websockets` installed:
`py -m examples.websocket_chat [--port N]`, then open the address it prints in two windows.
"""

import argparse
import json
from typing import Any

from iocp_ctypes.websocket import WebSocket, WebSocketServer

PAGE = """<!doctype html><meta charset="utf-8"><title>Chat</title>
<style>body{font:16px sans-serif;max-width:40em;margin:2em auto}#say{width:100%}</style>
<h1>Chat</h1><ul id="said"></ul><form><input id="say" autofocus autocomplete="off"></form>
<script>
const socket = new WebSocket(`ws://${location.host}/chat`), said = document.getElementById("said");
const show = text => said.appendChild(document.createElement("li")).textContent = text;
socket.onmessage = event => { const {who, text} = JSON.parse(event.data); show(`${who}: ${text}`); };
socket.onclose = event => show(`(closed: ${event.code})`);
document.forms[0].onsubmit = event => {
  event.preventDefault(); const say = document.getElementById("say");
  if (say.value) socket.send(say.value); say.value = "";
};
</script>"""


class Guest(WebSocket):
    page = PAGE
    message_max = 4096  # bytes
    queue_max = 256 * 1024  # bytes kept for a guest that does not read; then it is closed

    def on_open(self) -> None:
        self.tell("is here")

    def on_message(self, message: Any) -> None:
        self.tell(str(message))

    def on_close(self, code: int, reason: str) -> None:
        self.tell(f"has left ({code})")

    def tell(self, text: str) -> None:
        self.hub.broadcast(json.dumps({"who": f"guest {self.id}", "text": text}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What one says, all see.")
    parser.add_argument("--port", type=int, default=9002, help="0 is any that is free (%(default)s)")
    server = WebSocketServer(("127.0.0.1", parser.parse_args().port), Guest)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()
