"""L6: StreamServer, a server whose connections are each served by a function that may block.

Laws
1. Functions run on threads of their own, at most `threads` of them; a thread lives while there is something
   to do. Accepting, receiving and sending stay with the I/O threads.
2. What a stream raises and its function lets through is the peer's doing and ends the connection; all else
   that a function raises is reported like what a callback raises.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from ._addresses import Address
from ._options import check_count, check_timeout
from .connection import Connection
from .server import Server
from .stream import SLICE, Feed, Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import ServerOptions
    from .engine import Engine

#: Threads of a StreamServer: each serves one connection at a time and mostly waits.
THREADS: Final = 64

log = logging.getLogger("iocp_ctypes")


class _Pool:
    """Threads for what blocks: made when there is something to do, ended when nothing waits."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()

    def run(self, task: Callable[[], None]) -> None:
        """Run a task on one of the threads, when one is free. Any thread; never blocks."""
        with self._lock:
            self._waiting.append(task)
            if len(self._threads) >= self._most:
                return
            thread = threading.Thread(target=self._work, name="iocp_ctypes stream", daemon=False)
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._threads.discard(thread)
                if self._threads or task not in self._waiting:
                    return  # those there are will do it, or have done it
                self._waiting.remove(task)
            raise

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads.discard(threading.current_thread())
                    self._lock.notify_all()
                    return
                task = self._waiting.popleft()
            task()

    def wait(self, timeout: float) -> bool:
        """Wait until all threads but the calling one have ended."""
        deadline = monotonic() + timeout
        with self._lock:
            while self._threads - {threading.current_thread()}:
                left = deadline - monotonic()
                if left <= 0:
                    return False
                self._lock.wait(min(left, SLICE))
        return True


class StreamServer(Server):
    """A server whose connections are each served by a function that may block.

        def talk(stream):
            for line in stream:
                stream.write(line.upper())

        StreamServer(("127.0.0.1", 9000), talk).serve_forever()

    `function(stream)` is called once for a connection, on one of `threads` threads that do nothing else;
    accepting, receiving and sending stay with the I/O threads. Where all are busy, connections wait their
    turn. When the function returns, the stream is closed; when it raises, the connection is aborted and
    `handle_error` called. Only what the stream itself raised is nobody's mistake: a function need not catch
    the end of its peer or a time-out.
    """

    def __init__(
        self,
        address: Any,
        function: Callable[[Stream], object],
        *,
        threads: int = THREADS,
        timeout: float | None = None,
        engine: Engine | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        """Bind and listen; nothing is accepted before `start`.

        Args:
            address: as for Server.
            function: called with the Stream of each connection.
            threads: how many connections are served at a time, 1 to 10000.
            timeout: seconds, the `timeout` of each stream; None: no limit.
            engine: as for Server.
            options: as for Server.
        """
        if not callable(function):
            raise TypeError(f"function={function!r}: must be a function of one argument, the Stream")
        check_count("threads", threads, 1, 10_000)
        self._function = function
        self._stream_timeout = check_timeout("timeout", timeout)
        self._pool = _Pool(threads)
        super().__init__(address, self._make_feed, engine=engine, **options)

    def _make_feed(self, _server: Any, peer_address: Address) -> Connection:
        feed = Feed(self, peer_address)
        feed.begin = self._begin
        return feed

    def _begin(self, feed: Feed) -> None:
        self._pool.run(lambda: self._serve(feed))

    def _serve(self, feed: Feed) -> None:
        stream = Stream(feed, self._stream_timeout)
        try:
            self._function(stream)
        except BaseException as exc:
            if stream._raised(exc):
                log.debug("%r ended: %s", feed, exc)
                feed.abort()
            else:
                feed._callback_raised(exc)
        else:
            feed.close()  # nobody waits for it: the thread is free for the next
        stream._closed = stream._told = True

    def stop(self, timeout: float = 5.0) -> bool:
        """Stop as Server does, then wait for the functions, whose streams have ended.

        Returns:
            True where all connections, threads and functions have ended. From a function: without itself.
        """
        if self._is_callback_thread():
            return super().stop(timeout)
        ended = super().stop(timeout)
        return self._pool.wait(min(timeout, 1.0)) and ended
