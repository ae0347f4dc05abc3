"""WebSocket echo server of the library `websockets` on asyncio, as its documentation writes it."""

import asyncio

from websockets.asyncio.server import ServerConnection, serve


async def echo(connection: ServerConnection) -> None:
    """Send back what it receives."""
    async for message in connection:
        await connection.send(message)


async def main() -> None:
    """Serve for ever."""
    async with serve(echo, "127.0.0.1", 0, compression=None) as server:
        print("listening on {}:{}".format(*server.sockets[0].getsockname()), flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
