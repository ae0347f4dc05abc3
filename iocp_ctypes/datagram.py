"""L6: Datagram, a UDP or raw socket with several receives in flight: callbacks, methods, options.

Laws
1. What moves inside is in `_datagramchannel`; this file is the face.
2. Methods are thread-safe and do not block, except `wait_closed`, leaving the `with` block, and looking up
   the name that a socket is to be bound to.
3. What is asked for is checked before it is tried: a refused value leaves the socket as it was.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING, Any, Final

from . import _datagramoptions as checks
from . import _lifecycle as life
from ._addresses import Address, check_address, format_address, resolve_listening
from ._datagramchannel import DatagramChannel
from ._datagramops import INTERFACE_CODES, Target, open_datagram
from ._datagramoptions import DatagramOptions, DatagramStats, make_datagram_settings
from ._errors import RESOURCE_CODES, ConnectionClosedError, error_from_code
from ._lifecycle import CloseReason
from ._options import Usage
from ._proactor import COMPLETED
from .engine import Engine

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

#: The option is not known to the system.
WSAENOPROTOOPT: Final = 10042

log = logging.getLogger("iocp_ctypes")


class Datagram(DatagramChannel):
    """A UDP or raw socket; subclass it and override the callbacks, all of which are optional.

    Callbacks never overlap and come in the order of the datagrams, on an I/O thread. One that raises goes to
    `handle_error`, and receiving goes on. Use it with `start()` and `close()`, or as a context manager.

    Attributes:
        data: yours; None at first.
        close_reason: None while it is open, then "local", "aborted", "timeout" or "shutdown".
    """

    def __init__(
        self,
        address: Any = ("", 0),
        *,
        type: int = socket.SOCK_DGRAM,
        protocol: int = 0,
        engine: Engine | None = None,
        **options: Unpack[DatagramOptions],
    ) -> None:
        """Make and bind the socket; `start` begins to receive.

        Args:
            address: (host, port) to bind to, or a four-part IPv6 address; the host "" is every interface,
                port 0 any port. May be a name, which is looked up.
            type: socket.SOCK_DGRAM, or socket.SOCK_RAW, which Windows gives to administrators only.
            protocol: 0 for UDP; for raw sockets for example socket.IPPROTO_ICMP.
            engine: whose threads to use; None: the engine of the process, or one of its own where
                `io_threads` is named.
            options: recv_depth (8 receives in flight), recv_size (64 KiB: nothing is oversize), high_mark
                (64 KiB), low_mark (16 KiB), write_buffer_max (1 MiB), linger_timeout (5 s for what is queued
                at close), io_threads (0: those of the process; 1 is the
                fastest for one busy socket on a free-threaded build, whose callbacks come one at a time
                anyway), broadcast (False), report_errors (None: only
                while connected), reuse_address (False: nobody else binds to the port), dualstack (None: only
                for the host "").

        Raises:
            TypeError, ValueError: an argument is wrong; the message says what is allowed.
            PermissionError: a raw socket, and this process is not elevated.
            OSError: the address cannot be had.

        Any thread; looking a name up blocks.
        learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsarecvfrom
        """
        settings = make_datagram_settings(options)
        if engine is not None and not isinstance(engine, Engine):
            raise TypeError(f"engine={engine!r}: must be an Engine or None")
        if engine is not None and settings.io_threads:
            count = settings.io_threads
            raise ValueError(
                f"io_threads={count}: the given engine has its own threads; leave one of the two out"
            )
        kind, protocol = checks.check_kind(type, protocol)
        place = check_address(address)
        if kind == socket.SOCK_RAW and place[0] == "":
            place = ("0.0.0.0", *place[1:])
        family, numeric, dual = resolve_listening(place, settings.dualstack)[0]
        sock = open_datagram(family, kind, protocol, numeric, settings.reuse_address, dual)
        sock.set_option(socket.SOL_SOCKET, socket.SO_BROADCAST, settings.broadcast)
        super().__init__(sock, settings, dual, engine)
        self.data: Any = None
        self._groups: set[tuple[Any, Any, Any]] = set()

    # -- callbacks ----------------------------------------------------------------------------------------

    def on_datagram(self, data: bytes, address: Address) -> None:
        """A datagram came; of a raw IPv4 socket with its IP header."""

    def on_oversize(self, data: bytes, address: Address) -> None:
        """A datagram larger than recv_size came: `data` is its beginning, the rest is lost.

        By default it is dropped; `stats().oversize` counts it.
        """

    def on_error(self, exc: OSError) -> None:
        """The system reported an ICMP error (nobody listens there), or could not send a datagram.

        Only while connected, or with report_errors=True. Receiving goes on.
        """

    def on_drain(self) -> None:
        """The write queue had passed the high mark and has now fallen to the low mark: send on."""

    def on_close(self, exc: OSError | None) -> None:
        """The last callback; `exc` is None, or says that linger_timeout was too short for what was queued."""

    def handle_error(self, exc: BaseException) -> None:
        """A callback raised: by default that is logged. Receiving goes on."""
        log.error("datagrams at %s: a callback raised", format_address(self._address), exc_info=exc)

    # -- the beginning and the end ------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to receive. Any thread; never blocks. Once: RuntimeError after that, and after close()."""
        self._begin()

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and wait for the end; not from a callback."""
        self.close()
        if self._engine is None or not self._engine.dispatcher.is_io_thread():
            self.wait_closed(self._settings.linger_timeout + 5.0)

    def close(self) -> None:
        """Receive no more, send what is queued within linger_timeout, then close. Any thread; never blocks.

        Again is a no-op. A callback that runs is waited for before the handle is closed.
        """
        with self._lock:
            if self._move(life.CLOSE):
                self.close_reason = CloseReason.LOCAL
                if self._queue:
                    later = self._engine.watchdog.later
                    self._linger = later(self._settings.linger_timeout, self._linger_over)
                else:
                    self._end()

    def abort(self) -> None:
        """Close at once: what is queued is dropped. Any thread; never blocks; again is a no-op."""
        self._fail(CloseReason.ABORTED, None)

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait until on_close has returned.

        Args:
            timeout: seconds; None: without end.

        Returns:
            True where it is closed, False where the time ran out.

        Raises:
            RuntimeError: called from a callback, which on_close would wait for.

        Any other thread. Blocks.
        """
        if self._engine is not None and self._engine.dispatcher.is_io_thread():
            raise RuntimeError("wait_closed() was called from a callback: on_close could not run meanwhile")
        # In slices, because before Python 3.14 an endless wait on Windows cannot be interrupted by Ctrl-C.
        remaining = timeout
        while not self._closed_event.wait(0.25 if remaining is None else min(0.25, max(0.0, remaining))):
            if remaining is not None:
                remaining -= 0.25
                if remaining <= 0:
                    return self._closed_event.is_set()
        return True

    # -- sending ------------------------------------------------------------------------------------------
    def send_to(self, data: bytes | bytearray | memoryview, address: Address | None = None) -> bool:
        """Send a datagram.

        Args:
            data: at most 65,507 bytes over IPv4, 65,527 over IPv6; b"" is a datagram, too. bytes are kept
                uncopied.
            address: (host, port) or a four-part IPv6 address, numeric; None: the one of `connect`.

        Returns:
            True where the kernel took it, or it is queued below the high mark. False: go slower until
            on_drain, or it was not sent: above write_buffer_max it is dropped, and what the system refuses
            is an error (`stats()` counts both, on_error tells the second).

        Raises:
            TypeError, ValueError: data or address are wrong; nothing is sent.
            ConnectionClosedError: not started, or closed.

        Any thread; never blocks. learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-wsasendto
        """
        if type(data) is not bytes:
            data = checks.check_data(data)
        try:
            target = self._targets[address]
        except (KeyError, TypeError):
            target = self._target(address)
        if len(data) > target.size_max:
            raise checks.too_large(len(data), target.size_max)
        with self._lock:
            if self._state != life.OPEN:
                raise ConnectionClosedError(
                    "the Datagram is closed" if self._started else "the Datagram was not started"
                )
            if not self._queue:
                code = self._try_send(data, target)
                if code not in RESOURCE_CODES:
                    return code == COMPLETED
            return self._enqueue(data, target)

    def connect(self, address: Address) -> None:
        """Send to one address, and receive from nobody else; ICMP errors about it come to `on_error`.

        Args:
            address: (host, port) or a four-part IPv6 address, numeric.

        Raises:
            TypeError, ValueError: the address is wrong.
            OSError: the system refuses it.
            ConnectionClosedError: closed.

        Before or after `start`; again changes the address. Any thread; never blocks.
        learn.microsoft.com/windows/win32/api/winsock2/nf-winsock2-connect
        """
        sockaddr, size_max = checks.destination(
            self._socket.family, self._socket.kind, self._dualstack, address
        )
        with self._lock:
            self._check_open()
            self._socket.connect(sockaddr)
            self._remote = address
            self._remote_target = Target(b"", size_max)
            self._address = self._socket.address
            self._socket.report_unreachable(self._reporting)

    # -- multicast ------------------------------------------------------------------------------------------

    def join(self, group: str, *, interface: Any = None, source: str | None = None) -> None:
        """Receive what is sent to a multicast group at this socket's port.

        Args:
            group: a multicast address of the socket's family.
            interface: for IPv4 the address of an interface of this machine; for IPv6 its index; None: the
                system chooses.
            source: receive from this sender only (for IPv6 not under every Windows); None: from any.

        Raises:
            TypeError, ValueError: an argument is wrong, or this was joined already.
            OSError: the system refuses.
            ConnectionClosedError: closed.

        Any thread; never blocks. learn.microsoft.com/windows/win32/winsock/ip-multicast-2
        """
        self._membership(True, group, interface, source)

    def leave(self, group: str, *, interface: Any = None, source: str | None = None) -> None:
        """End what `join` with the same arguments began; as `join` in all else."""
        self._membership(False, group, interface, source)

    def _membership(self, join: bool, group: Any, interface: Any, source: Any) -> None:
        family = self._socket.family
        number = checks.check_group(family, group)
        place = checks.check_interface(family, interface)
        sender = None if source is None else checks.check_source(family, source)
        key = (number, place, sender)
        with self._lock:
            self._check_open()
            if join == (key in self._groups):
                what = "was joined already" if join else "was not joined"
                raise ValueError(f"group={group!r}: {what} with interface={interface!r}, source={source!r}")
            try:
                self._socket.membership(join, number, place, sender)
            except OSError as exc:
                code = getattr(exc, "winerror", None) or exc.errno or 0
                if code in INTERFACE_CODES and interface is not None:
                    raise checks.no_interface(interface) from exc
                if code == WSAENOPROTOOPT:
                    text = f"source={source!r}: this system has no source-specific multicast for IPv6"
                    raise OSError(errno.EOPNOTSUPP, text) from exc
                raise error_from_code(code, f"cannot {'join' if join else 'leave'} {group}") from exc
            (self._groups.add if join else self._groups.discard)(key)

    @property
    def multicast_ttl(self) -> int:
        """Routers (hops) that sent multicast datagrams pass at most, 0 to 255; 1 by default: the own network.

        This and the options below: any thread; never block; ConnectionClosedError after the end.
        """
        return self._get_option(socket.IP_MULTICAST_TTL, socket.IPV6_MULTICAST_HOPS)

    @multicast_ttl.setter
    def multicast_ttl(self, value: int) -> None:
        checks.check_ttl("multicast_ttl", value, 0)
        self._set_option(socket.IP_MULTICAST_TTL, socket.IPV6_MULTICAST_HOPS, value)

    @property
    def multicast_loop(self) -> bool:
        """Whether this machine receives what is sent to groups here, too; True by default."""
        return bool(self._get_option(socket.IP_MULTICAST_LOOP, socket.IPV6_MULTICAST_LOOP))

    @multicast_loop.setter
    def multicast_loop(self, value: bool) -> None:
        checks.check_on("multicast_loop", value)
        self._set_option(socket.IP_MULTICAST_LOOP, socket.IPV6_MULTICAST_LOOP, int(value))

    @property
    def multicast_interface(self) -> str | int:
        """The interface that multicast datagrams leave by: its IPv4 address, or for IPv6 its index.

        "0.0.0.0" or 0: the system chooses. Set it to None for that.
        """
        with self._lock:
            self._check_open()
            if self._socket.family == socket.AF_INET:
                return self._socket.get_address_option(socket.IPPROTO_IP, socket.IP_MULTICAST_IF)
            return self._socket.get_option(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF)

    @multicast_interface.setter
    def multicast_interface(self, value: str | int | None) -> None:
        place = checks.check_interface(self._socket.family, value)
        try:
            self._set_option(socket.IP_MULTICAST_IF, socket.IPV6_MULTICAST_IF, place)
        except ConnectionClosedError:
            raise
        except OSError as exc:
            raise checks.no_interface(value) from exc

    # -- options and figures --------------------------------------------------------------------------------

    @property
    def ttl(self) -> int:
        """Routers (hops) that other datagrams pass at most, 1 to 255."""
        return self._get_option(socket.IP_TTL, socket.IPV6_UNICAST_HOPS)

    @ttl.setter
    def ttl(self, value: int) -> None:
        checks.check_ttl("ttl", value, 1)
        self._set_option(socket.IP_TTL, socket.IPV6_UNICAST_HOPS, value)

    @property
    def broadcast(self) -> bool:
        """Whether datagrams may be sent to broadcast addresses; without it the system refuses them."""
        with self._lock:
            self._check_open()
            return bool(self._socket.get_option(socket.SOL_SOCKET, socket.SO_BROADCAST))

    @broadcast.setter
    def broadcast(self, value: bool) -> None:
        checks.check_on("broadcast", value)
        with self._lock:
            self._check_open()
            self._socket.set_option(socket.SOL_SOCKET, socket.SO_BROADCAST, int(value))

    def _check_open(self) -> None:
        """Needs the lock."""
        assert self._lock._is_owned()
        if self._state >= life.JOINING:
            raise ConnectionClosedError("the Datagram is closed")

    def _level(self) -> int:
        return socket.IPPROTO_IPV6 if self._socket.family == socket.AF_INET6 else socket.IPPROTO_IP

    def _get_option(self, name4: int, name6: int) -> int:
        with self._lock:
            self._check_open()
            v4 = self._socket.family == socket.AF_INET
            return self._socket.get_option(self._level(), name4 if v4 else name6)

    def _set_option(self, name4: int, name6: int, value: int | bytes) -> None:
        with self._lock:
            self._check_open()
            v4 = self._socket.family == socket.AF_INET
            self._socket.set_option(self._level(), name4 if v4 else name6, value)

    @property
    def address(self) -> Address:
        """The local address, after the end as well."""
        return self._address

    @property
    def remote_address(self) -> Address | None:
        """The address given to `connect`, or None."""
        return self._remote

    @property
    def closed(self) -> bool:
        """Whether the handle is closed; on_close may still be on its way."""
        return self._state == life.CLOSED

    def stats(self) -> DatagramStats:
        """Return the figures of this instant. Any thread; never blocks."""
        with self._lock:
            depth = self._settings.recv_depth
            return DatagramStats(
                datagrams_received=self._datagrams_in,
                bytes_received=self._bytes_in,
                datagrams_sent=self._datagrams_out,
                bytes_sent=self._bytes_out,
                oversize=self._oversize,
                receive_errors=self._receive_errors,
                send_errors=self._send_errors,
                dropped=self._dropped,
                callback_errors=self._callback_errors,
                receives=Usage(depth, 0 if self._engine is None or self.closed else depth - len(self._free)),
                write_buffer_size=self._queued,
            )
