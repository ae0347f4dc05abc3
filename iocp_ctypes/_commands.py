"""L7: what the commands of `python -m iocp_ctypes` do.

Laws
1. A serving command prints one line `listening on HOST:PORT` per address when it is ready, and nothing else
   unless it is asked to.
2. The demonstration checks every byte that it says was exchanged, and ends: what hangs has failed.
3. The demonstration's clients are plain sockets of asyncio, so that nothing of ours vouches for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final

from . import _sockops, _win32
from ._addresses import Address, format_address
from ._options import MIB
from ._stats import Stats
from .connection import Connection
from .server import Server

#: Seconds between two lines of figures: a terminal that one can still read.
STATS_INTERVAL: Final = 5.0
#: Records of the trace that a command keeps: some seconds of a busy server, some 20 MiB while it runs.
TRACED: Final = 100_000
#: Clients of the demonstration that connect at the same moment: half of what listen_backlog takes.
CONNECTING_MAX: Final = 100
#: Seconds after which a demonstration has failed: many times what 5,000 clients take under Wine.
DEMO_TIMEOUT: Final = 300.0
#: Seconds for the server to see the last clients off, before it is stopped.
FAREWELL_TIMEOUT: Final = 5.0


class Echo(Connection):
    """Sends back what comes."""

    def on_data(self, data: bytes) -> None:
        """Echo; a peer that does not read what it gets is not read from either."""
        if not self.send(data):
            self.pause_reading()

    def on_drain(self) -> None:
        """Read on."""
        self.resume_reading()


def echo(address: Address, stats: bool, options: Mapping[str, Any], trace: str | None = None) -> int:
    """Serve the echo until Ctrl-C; returns the exit code.

    Args:
        address: where to listen.
        stats: print a line of figures every few seconds, and all of them at the end.
        options: of Server.
        trace: a file, for the newest operations; None: none.
    """
    return _serve(Server(address, Echo, **_traced(options, trace)), stats, trace)


def http(
    directory: str,
    address: Address,
    log: bool,
    stats: bool,
    options: Mapping[str, Any],
    trace: str | None = None,
) -> int:
    """Serve the files of a folder until Ctrl-C; the rest as `echo`. ImportError without h11."""
    return _serve(FileServer(address, directory, log, **_traced(options, trace)), stats, trace)


class FileServer(Server):
    """Serves the files of a folder; each process makes its own."""

    def __init__(self, address: Address, directory: str, log: bool, **options: Any) -> None:
        """Serve `directory` and print a line for each request if `log` says so. ImportError without h11."""
        from .http import HTTPConnection, StaticFiles

        class Files(HTTPConnection):
            routes: ClassVar[Mapping[str, Any]] = {"/": StaticFiles(directory, listing=True)}
            access_log = staticmethod(_print_line) if log else None

        super().__init__(address, Files, **options)


def websocket(address: Address, stats: bool, options: Mapping[str, Any], trace: str | None = None) -> int:
    """Serve an echo over WebSocket until Ctrl-C; arguments as `echo`. ImportError without websockets."""
    from .websocket import WebSocketServer
    from .websocket._echo import UNSENT_MAX, EchoSocket

    options = {"write_buffer_max": UNSENT_MAX, **_traced(options, trace)}
    return _serve(WebSocketServer(address, EchoSocket, **options), stats, trace)


class BadArgument(Exception):
    """An argument turned out to be of no use; the message says so in one line."""


def load_application(place: str) -> Any:
    """Return the WSGI application that MODULE:APP names; the current directory is looked into first.

    ValueError says in one line why there is none.
    """
    module, colon, path = place.partition(":")
    if not (colon and module and path):
        raise ValueError(f"{place!r}: must be MODULE:APP, such as shop:app")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except Exception as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name and f"{module}.".startswith(f"{exc.name}."):
            raise ValueError(f"{place!r}: there is no module {exc.name!r}") from exc
        *_, last = traceback.extract_tb(exc.__traceback__)
        where = f"{os.path.basename(last.filename)}, line {last.lineno}"
        told = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise ValueError(f"{place!r}: importing {module!r} raised {told} ({where})") from exc
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{place!r}: {module!r} has no {path!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{place!r}: is of type {type(found).__name__}, which cannot be called")
    return found


def wsgi(
    place: str,
    address: Address,
    log: bool,
    stats: bool,
    options: Mapping[str, Any],
    trace: str | None = None,
) -> int:
    """Serve the WSGI application that MODULE:APP names until Ctrl-C; the rest as `http`.

    `options` are those of WSGIServer. BadArgument where one, or the application, is none.
    """
    from .wsgi import WSGIConnection, WSGIServer

    class Logged(WSGIConnection):
        access_log = staticmethod(_print_line) if log else None

    traced = _traced(options, trace)
    try:
        server = WSGIServer(address, load_application(place), handler=Logged, **traced)
    except (TypeError, ValueError) as exc:
        raise BadArgument(str(exc)) from exc
    return _serve(server, stats, trace)


def _print_line(line: str) -> None:
    print(line, flush=True)


def _traced(options: Mapping[str, Any], trace: str | None) -> Mapping[str, Any]:
    """Return the options with a trace where a file for it is named."""
    if trace is None:
        return options
    with open(trace, "w", encoding="utf-8"):  # what cannot be written is told now, not at the end
        return {**options, "trace": TRACED}


def _serve(server: Server, stats: bool, trace: str | None) -> int:
    """Say where a server listens, and serve until Ctrl-C."""
    with server:
        for bound in server.addresses:
            print(f"listening on {format_address(bound)}", flush=True)
        with _figures_now_and_then(server) if stats else contextlib.nullcontext():
            server.serve_forever()
    if stats:
        _print_figures(server.stats())
    if trace is not None:
        print(f"{server.write_trace(trace)} records of the trace are in {trace}", flush=True)
    return 0


@contextlib.contextmanager
def _figures_now_and_then(server: Server) -> Iterator[None]:
    """Print a line of figures every STATS_INTERVAL seconds, on a thread of its own: a terminal may block."""
    over = threading.Event()

    def tell() -> None:
        before, then = server.stats(), time.perf_counter()
        while not over.wait(STATS_INTERVAL):
            figures, now = server.stats(), time.perf_counter()
            print(figures_line(before, figures, now - then), flush=True)
            before, then = figures, now

    thread = threading.Thread(target=tell, name="iocp_ctypes figures")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def figures_line(before: Stats, now: Stats, seconds: float) -> str:
    """Return in one line what a server does, and how fast since it was asked before."""
    receives = (now.receives - before.receives) / seconds
    brought = (now.bytes_received - before.bytes_received) / seconds
    sent = (now.bytes_sent - before.bytes_sent) / seconds
    return (
        f"{now.connections} connections (peak {now.connections_peak}), {now.accepted} accepted,"
        f" {now.accept_failed} failed, {now.refused} refused, {now.reaped} reaped;"
        f" {receives:.0f} receives/s, {brought / MIB:.2f} MiB/s in, {sent / MIB:.2f} MiB/s out;"
        f" backlog {now.backlog.in_use} of {now.backlog.cap}, {now.sendcap.in_use} sends in flight,"
        f" {now.write_queued} bytes queued, {now.engine.packets_per_reap:.1f} packets/reap"
    )


def _print_figures(figures: Any, prefix: str = "") -> None:
    for field in dataclasses.fields(figures):
        value = getattr(figures, field.name)
        if dataclasses.is_dataclass(value):
            _print_figures(value, f"{prefix}{field.name}.")
        else:
            print(f"{prefix}{field.name}: {value}", flush=True)


def demo(clients: int, messages: int) -> int:
    """Serve clients of this very process and print what happened; returns the exit code."""
    threads: set[int] = set()

    class Counted(Echo):
        def on_data(self, data: bytes) -> None:
            threads.add(threading.get_ident())
            super().on_data(data)

    began = time.perf_counter()
    with counted_calls() as calls, Server(("127.0.0.1", 0), Counted) as server:
        print(f"listening on {format_address(server.address)}", flush=True)
        try:
            good = asyncio.run(asyncio.wait_for(_clients(server.address, clients, messages), DEMO_TIMEOUT))
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError) as exc:
            print(f"failed: {exc!r}", file=sys.stderr)
            return 1
        took = time.perf_counter() - began
        while server.stats().connections and time.perf_counter() - began < took + FAREWELL_TIMEOUT:
            time.sleep(0.01)
        figures = server.stats()
    exchanges = clients * messages
    total, most = sum(calls.values()), ", ".join(f"{n} {name}" for name, n in calls.most_common(4))
    print(f"connections   {figures.accepted}, {figures.connections_peak} of them at once")
    print(f"exchanges     {good} of {exchanges} came back as they were sent")
    print(f"threads       {len(threads)} ran the callbacks of all connections")
    print(f"native calls  {total}, {total / exchanges:.1f} an exchange: {most} ...")
    print(f"bytes         {figures.bytes_received} received, {figures.bytes_sent} sent")
    print(f"time          {took:.2f} s with the clients in the same process")
    return 0 if good == exchanges and figures.accepted == clients else 1


@contextlib.contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Count native calls while the block runs, by name.

    Counters are put in front of the functions through which the library reaches Windows. Only a demonstration
    may do that: the library keeps no such figure, because it would cost something on every call.
    """
    calls: Counter[str] = Counter()
    lock = threading.Lock()

    def counted(name: str, native: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with lock:
                calls[name] += 1
            return native(*args)

        return call

    def counted_extension(handle: int, family: int, name: str) -> Any:
        return counted(name, extension(handle, family, name))

    extension = _sockops._extension
    natives = {
        name: thing
        for name, thing in vars(_win32).items()
        if hasattr(thing, "errcheck") and not isinstance(thing, type)  # a function object of ctypes
    }
    try:
        vars(_win32).update({name: counted(native.__name__, native) for name, native in natives.items()})
        vars(_sockops).update(_extension=counted_extension)
        yield calls
    finally:
        vars(_win32).update(natives)
        vars(_sockops).update(_extension=extension)


async def _clients(address: Address, clients: int, messages: int) -> int:
    """Connect all, then exchange on all, then close all; returns how many exchanges were right."""
    connecting = asyncio.Semaphore(CONNECTING_MAX)
    streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def connect() -> None:
        async with connecting:
            streams.append(await asyncio.open_connection(*address[:2]))

    async def exchange(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        good = 0
        for message in range(messages):
            sent = f"message {message} of client {number}\n".encode()
            writer.write(sent)
            good += await reader.readexactly(len(sent)) == sent
        return good

    try:
        await asyncio.gather(*(connect() for _ in range(clients)))
        return sum(await asyncio.gather(*(exchange(number, *ends) for number, ends in enumerate(streams))))
    finally:
        for _reader, writer in streams:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _reader, writer in streams), return_exceptions=True)
