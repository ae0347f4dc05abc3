"""Echo server over TLS on asyncio's Proactor, with its default options; its one argument is a PEM file.

What it echoes, and how it holds a peer back, is that of asyncio_proactor.
"""

import asyncio
import ssl
import sys

from .asyncio_proactor import LISTEN_BACKLOG, Echo


async def serve(path: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=LISTEN_BACKLOG, ssl=context)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"listening on {host}:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
