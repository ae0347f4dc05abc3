"""Echo server on asyncio's Proactor, as a Protocol (the fastest way to use asyncio) with its default options.

It stops reading while its peer does not read, as ours does. On systems other than Windows it runs on their
default event loop, which serves to try the load generator out.
"""

import asyncio
from collections.abc import Callable
from typing import cast

# Every server gets the same kernel queue, so that a storm compares accepting and not default sizes.
LISTEN_BACKLOG = 200


class Echo(asyncio.Protocol):
    """Sends back what it receives."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # winloop's is none by class

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=LISTEN_BACKLOG)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"listening on {host}:{port}", flush=True)
    await server.serve_forever()


def run(new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop) -> None:
    """Serves for ever on a loop that `new_loop` makes."""
    loop = new_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(serve())


if __name__ == "__main__":
    run()
