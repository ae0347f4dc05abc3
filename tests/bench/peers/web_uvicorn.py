"""The same 1 KiB by uvicorn on h11 and asyncio's loop, without its access log."""

import importlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

uvicorn: Any = importlib.import_module("uvicorn")

BODY = b"x" * 1024
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))],
}


async def application(
    scope: dict[str, Any], receive: Callable[..., Any], send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    await send(START)
    await send({"type": "http.response.body", "body": BODY})


class Server(uvicorn.Server):  # type: ignore[misc]  # untyped: uvicorn is optional
    """Says where it listens once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        assert sockets
        print("listening on {}:{}".format(*sockets[0].getsockname()), flush=True)


if __name__ == "__main__":
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        application, http="h11", loop="asyncio", lifespan="off", log_level="warning", access_log=False
    )
    Server(config).run(sockets=[listener])
