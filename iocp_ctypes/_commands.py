"""L7: what the commands of `python -m iocp_ctypes` do.

Laws
1. A serving command prints one line `listening on HOST:PORT` per address when it is ready, and nothing else
   unless it is asked to.
2. A demonstration checks every byte it says was exchanged.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from typing import Any, Final

from ._addresses import Address, format_address
from .connection import Connection
from .server import Server

#: Clients that connect at the same moment in the demonstration: what the default listen_backlog takes easily.
CONNECTING_MAX: Final = 100
CLIENTS_MAX: Final = 5000
MESSAGES_MAX: Final = 1000


class Echo(Connection):
    """Sends back what comes."""

    def on_data(self, data: bytes) -> None:
        """Echo; a peer that does not read what it gets is not read from either."""
        if not self.send(data):
            self.pause_reading()

    def on_drain(self) -> None:
        """Read on."""
        self.resume_reading()

    def on_eof(self) -> None:
        """Send what is left, then close."""


def echo(host: str, port: int, options: dict[str, Any], stats: bool) -> int:
    """Serve the echo until Ctrl-C."""
    server = Server((host, port), Echo, **options)
    server.start()
    for address in server.addresses:
        print(f"listening on {format_address(address)}", flush=True)
    try:
        server.serve_forever()
    finally:
        if stats:
            for name, value in dataclasses.asdict(server.stats()).items():
                print(f"{name}: {value}", flush=True)
    return 0


def demo(clients: int, messages: int) -> int:
    """Serve clients of this very process, which use plain sockets of asyncio, and print what happened."""
    for name, value, most in (("clients", clients, CLIENTS_MAX), ("messages", messages, MESSAGES_MAX)):
        if not 1 <= value <= most:
            raise ValueError(f"{name}={value}: must be a whole number from 1 to {most}")
    threads: set[int] = set()

    class Counted(Echo):
        def on_data(self, data: bytes) -> None:
            threads.add(threading.get_ident())
            super().on_data(data)

    with Server(("127.0.0.1", 0), Counted, listen_backlog=2 * CONNECTING_MAX) as server:
        print(f"listening on {format_address(server.address)}", flush=True)
        began = time.perf_counter()
        failures = asyncio.run(_clients(server.address, clients, messages))
        took = time.perf_counter() - began
        while server.stats().connections and time.perf_counter() - began < took + 5:
            time.sleep(0.01)
        figures = server.stats()
    exchanges = clients * messages
    engine = figures.engine
    print(f"connections   {figures.accepted}, at most {figures.connections_peak} at once")
    print(f"exchanges     {exchanges - failures} of {exchanges}, each checked")
    print(f"I/O threads   {len(threads)} of {engine.io_threads} ran callbacks")
    print(f"packets       {engine.packets} in {engine.reaps} calls of GetQueuedCompletionStatusEx")
    print(f"bytes         {figures.bytes_received} received, {figures.bytes_sent} sent")
    print(
        f"time          {took:.2f} s, {exchanges / took:.0f} exchanges/s with the clients in the same process"
    )
    return 1 if failures or figures.accepted != clients else 0


async def _clients(address: Address, clients: int, messages: int) -> int:
    """Connect all, exchange on all, close all; returns how many exchanges failed."""
    connecting = asyncio.Semaphore(CONNECTING_MAX)
    everybody_is_in = asyncio.Event()
    inside = 0

    async def client(number: int) -> int:
        nonlocal inside
        async with connecting:
            reader, writer = await asyncio.open_connection(*address[:2])
        inside += 1
        if inside == clients:
            everybody_is_in.set()
        await everybody_is_in.wait()
        failed = 0
        for message in range(messages):
            sent = f"message {message} of client {number}\n".encode()
            writer.write(sent)
            failed += await reader.readexactly(len(sent)) != sent
        writer.close()
        await writer.wait_closed()
        return failed

    outcomes = await asyncio.gather(*(client(number) for number in range(clients)), return_exceptions=True)
    return sum(messages if isinstance(outcome, BaseException) else outcome for outcome in outcomes)
