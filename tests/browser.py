"""The chat example in a real browser: `python3 tests/browser.py [--python 3.12] [--chromium PATH]`.

Starts `examples/websocket_chat.py` on the Windows Python and two pages in headless Chromium on this system;
each page says something by its own form, and both must show what both said. Needs Chromium or Chrome, and the
library `websockets`, by which it speaks Chromium's DevTools protocol. Exit code: 0 where all holds, 1 where
not, 2 where there is no browser.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import windows
from websockets.sync.client import ClientConnection, connect

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
#: Nothing but what a page asks for, so that it starts the same with and without a network.
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
PATIENCE_S = 60.0
SAY = """(() => { const say = document.getElementById("say"); say.value = %s;
document.forms[0].requestSubmit(); })()"""
SAID = 'Array.from(document.querySelectorAll("#said li")).map(item => item.textContent)'


def line_of(stream: IO[bytes], pattern: str) -> str:
    """Wait for a line that has this in it; returns the first group. The rest is read and dropped."""
    found: list[str] = []
    seen: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for raw in stream:
            seen.append(raw.decode(errors="replace"))
            match = re.search(pattern, seen[-1])
            if match and not found:
                found.append(match[1])
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(PATIENCE_S)
    if not found:
        raise RuntimeError(f"{pattern} did not come; there was: {''.join(seen)[-2000:]}")
    return found[0]


class Browser:
    """Chromium's DevTools protocol: commands, each with its answer."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Give a command; returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._connection.send(json.dumps({**message, "sessionId": session} if session else message))
        while True:
            answer = json.loads(self._connection.recv(PATIENCE_S))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def page(self, url: str) -> Page:
        """Open a page in a window of its own."""
        target = self.ask("Target.createTarget", url=url)["targetId"]
        return Page(self, self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])


class Page:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def run(self, script: str) -> Any:
        """Run a script in the page; returns its value, that of a promise when it is kept."""
        told = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self._browser.ask("Runtime.evaluate", self._session, **told)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"the page raised {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """Write what the page shows as a PNG."""
        shot = self._browser.ask("Page.captureScreenshot", self._session)
        path.write_bytes(base64.b64decode(shot["data"]))

    def until(self, *texts: str) -> list[str]:
        """Wait until the page shows lines that end like these; returns all its lines."""
        limit = time.monotonic() + PATIENCE_S
        while True:
            lines = self.run(SAID) or []
            if all(any(line.endswith(text) for line in lines) for text in texts):
                return list(lines)
            if time.monotonic() > limit:
                raise RuntimeError(f"the page shows {lines}, not {texts}")
            time.sleep(0.05)


def find_browser(named: str | None) -> str | None:
    """The program that is named, or the first there is; None: there is none."""
    return named or next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def browsing(program: str) -> Iterator[Browser]:
    """A browser without a screen, with a profile of its own, for a `with` block; it always ends."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += ["--remote-debugging-port=0", f"--user-data-dir={profile}", *QUIET, "about:blank"]
        process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            assert process.stdout
            url = line_of(process.stdout, r"DevTools listening on (ws://\S+)")
            with connect(url, max_size=None) as connection:
                browser = Browser(connection)
                yield browser
                browser.ask("Browser.close")
            process.wait(PATIENCE_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def talk(browser: Browser, url: str) -> None:
    """The two pages."""
    one = browser.page(url)
    one.until(": is here")
    two = browser.page(url)
    two.until(": is here")
    one.run(SAY % json.dumps("grüß Gott 😀"))
    two.run(SAY % json.dumps("good <b>day</b>"))
    shown = [page.until(": grüß Gott 😀", ": good <b>day</b>") for page in (one, two)]
    for lines in shown:
        print("   a page shows:", " | ".join(lines))
    two.run("socket.close(1000)")
    one.until(": has left (1000)")
    two.until("(closed: 1000)")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", help="a tag as of tests/windows.py, for example 3.13t")
    parser.add_argument("--chromium", help="the browser (default: the first found)")
    options = parser.parse_args()
    program = find_browser(options.chromium)
    if program is None:
        print("browser.py: there is no Chromium: --chromium names one", file=sys.stderr)
        return 2
    target = windows.prepare(options.python)
    server = target.popen(
        ["-u", "-m", "examples.websocket_chat", "--port", "0"],
        cwd=str(windows.CHECKOUT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        address = line_of(server.stdout, r"listening on (\S+)")  # type: ignore[arg-type]
        with browsing(program) as browser:
            print(f"   {browser.ask('Browser.getVersion')['product']} at http://{address}/")
            talk(browser, f"http://{address}/")
    except (RuntimeError, OSError) as problem:
        print(f"FAILED: {problem}", file=sys.stderr)
        return 1
    finally:
        server.end()
    print("two pages have seen each other's messages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
