"""Datagram as users see it: echo, addresses, oversize, multicast, errors, options, the end."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from datagrams import Echo, Probe, closed_port, plain, running
from program import ROOT, Program
from support import LOOPBACK, handle_count, wait_until

from iocp_ctypes import (
    ConnectionClosedError,
    Datagram,
    DatagramStats,
    Engine,
    _datagramops,
    _dispatcher,
    _win32,
)
from iocp_ctypes import datagram as datagram_module
from iocp_ctypes._port import CompletionPort

# Of this run alone: Linux gives a socket the datagrams of each group that somebody on the machine has joined.
LAST = os.urandom(2)
GROUP, SOURCE_GROUP = f"239.255.{LAST[0]}.{LAST[1]}", f"232.1.{LAST[0]}.{LAST[1]}"
GROUP6 = f"ff02::4d:1{LAST.hex()[1:]}"
V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", V4), ("::1", V6)])
def test_echo_at_depth_8_loses_nothing(host: str, family: int, io_threads: int) -> None:
    count, depth = 2000, 8
    with running(Echo((host, 0), io_threads=io_threads)) as echo, plain(family) as client:
        for number in range(count + depth):
            if number < count:
                client.sendto(b"%d" % number, echo.address)
            if number >= depth:
                assert client.recv(100) == b"%d" % (number - depth)
        assert echo.received == [b"%d" % number for number in range(count)]
        assert set(echo.senders) == {client.getsockname()}
        stats = echo.stats()
        assert isinstance(stats, DatagramStats)
        assert stats.datagrams_received == stats.datagrams_sent == count
        assert stats.bytes_received == stats.bytes_sent == sum(map(len, echo.received))
        assert stats.receives == (8, stats.receives.in_use)
        assert stats.receives.in_use >= 7
    assert echo.close_reason == "local"
    assert echo.values("close") == [None]


def test_empty_and_largest_datagrams() -> None:
    with running(Echo()) as echo, plain() as client:
        for data in (b"", b"x" * 65_507, bytearray(b"abc"), memoryview(b"def")):
            client.sendto(data, echo.address)
            assert client.recv(65_536) == bytes(data)
        assert echo.send_to(bytearray(b"later"), client.getsockname())
        assert client.recv(100) == b"later"


def test_oversize_is_flagged_with_the_bytes_that_came() -> None:
    with running(Echo(recv_size=100, recv_depth=2)) as echo, plain() as client:
        for _ in range(50):
            client.sendto(b"y" * 100, echo.address)
            assert client.recv(1000) == b"y" * 100
            client.sendto(b"x" * 101, echo.address)
        client.sendto(b"end", echo.address)
        assert client.recv(1000) == b"end"
        assert echo.values("oversize") == [b"x" * 100] * 50
        assert echo.stats().oversize == 50
        assert set(echo.senders) == {client.getsockname()}


def test_oversize_that_waited_in_the_kernel(io_threads: int) -> None:
    """Found at once by the call that posts the receive: with a packet or without, it is delivered once."""
    gate = threading.Event()

    class Slow(Probe):
        def got(self, data: bytes, address: Any) -> None:
            gate.wait(10)

    with running(Slow(recv_size=64, recv_depth=1, io_threads=io_threads)) as slow, plain() as client:
        client.sendto(b"hold", slow.address)
        slow.until(1)
        for number in range(20):
            client.sendto(b"%02d" % number + b"x" * 100, slow.address)
        client.sendto(b"end", slow.address)
        gate.set()
        slow.until(2)
        assert [data[:2] for data in slow.values("oversize")] == [b"%02d" % number for number in range(20)]
        assert slow.received == [b"hold", b"end"]


def test_dual_stack_socket_has_ipv4_and_ipv6_peers() -> None:
    with running(Echo(("", 0))) as echo, plain(V4) as four, plain(V6) as six:
        port = echo.address[1]
        four.sendto(b"four", ("127.0.0.1", port))
        assert four.recv(100) == b"four"
        six.sendto(b"six", ("::1", port))
        assert six.recv(100) == b"six"
        assert echo.senders == [four.getsockname(), six.getsockname()]


def test_callbacks_that_raise_end_nothing() -> None:
    class Bad(Probe):
        def got(self, data: bytes, address: Any) -> None:
            raise RuntimeError(data.decode())

    with running(Bad()) as bad, plain() as client:
        for number in range(20):
            client.sendto(b"%d" % number, bad.address)
        wait_until(lambda: len(bad.raised) == 20)
        assert [str(exc) for exc in bad.raised] == [str(number) for number in range(20)]
        assert bad.stats().callback_errors == 20


def test_a_callback_that_raises_is_logged(expects_errors: list[Any]) -> None:
    class Bad(Datagram):
        def on_datagram(self, data: bytes, address: Any) -> None:
            raise RuntimeError("oh")

    with Bad(LOOPBACK) as bad, plain() as client:
        client.sendto(b"x", bad.address)
        wait_until(lambda: expects_errors)
    assert "a callback raised" in expects_errors[0].getMessage()


# -- errors that are not ours ---------------------------------------------------------------------------


@pytest.mark.wine_differs("udp-icmp")
@pytest.mark.parametrize("wanted", [None, True])
def test_thousand_datagrams_to_a_closed_port_leave_the_receiver_alive(wanted: bool | None) -> None:
    dead = closed_port()
    with running(Echo(report_errors=wanted)) as echo, plain() as client:
        for number in range(1000):
            assert echo.send_to(b"%d" % number, dead)
        if wanted and not _win32.is_wine():
            echo.until(1, "error")
        for number in range(50):
            client.sendto(b"%d" % number, echo.address)
            assert client.recv(100) == b"%d" % number
        codes = {exc.winerror for exc in echo.values("error")}
        assert codes == ({10054} if wanted and not _win32.is_wine() else set())


@pytest.mark.wine_differs("udp-icmp")
def test_connected_reports_that_nobody_listens_and_goes_on() -> None:
    dead = closed_port()
    with running(Echo()) as echo:
        echo.connect(dead)
        echo.send_to(b"x")
        error = echo.until(1, "error")[0]
        assert isinstance(error, ConnectionError)
        assert error.winerror in (10054, 10061)
        for _ in range(200):
            echo.send_to(b"x")
        wait_until(lambda: echo.stats().receives.in_use == 8, what="all receives in flight again")
        assert echo.stats().receive_errors >= 1
        with plain() as client:
            echo.connect(client.getsockname())
            echo.send_to(b"sent")
            assert client.recv(100) == b"sent"
            if not _win32.is_wine():
                client.sendto(b"alive?", echo.address)
                assert client.recv(100) == b"alive?"


@pytest.mark.wine_differs("udp-icmp")
@pytest.mark.parametrize(
    ("options", "connected", "value"),
    [({}, False, 0), ({}, True, 1), ({"report_errors": True}, False, 1), ({"report_errors": False}, True, 0)],
)
def test_icmp_errors_are_switched_off_unless_wanted(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], connected: bool, value: int
) -> None:
    set_to: dict[int, int] = {}
    native = _win32.WSAIoctl

    def spy(handle: int, code: int, given: Any, size: int, *rest: Any) -> int:
        if code in (_win32.SIO_UDP_CONNRESET, _win32.SIO_UDP_NETRESET):
            assert size == 4, "a BOOL"
            set_to[code] = given._obj.value
        return int(native(handle, code, given, size, *rest))

    monkeypatch.setattr(_win32, "WSAIoctl", spy)
    with running(Probe(**options)) as probe, plain() as client:
        if connected:
            probe.connect(client.getsockname())
    assert set_to == {0x9800000C: value, 0x9800000F: value}


def test_what_the_system_refuses_to_send_is_told() -> None:
    with running(Probe(report_errors=True)) as probe:
        assert probe.send_to(b"x", ("255.255.255.255", 9)) is False
        assert isinstance(probe.until(1, "error")[0], PermissionError)
        assert (probe.stats().send_errors, probe.stats().datagrams_sent) == (1, 0)


# -- connected, broadcast, multicast --------------------------------------------------------------------


def test_connected_receives_from_its_peer_only() -> None:
    probe = Probe()
    with plain() as client, plain() as other:
        probe.connect(client.getsockname())
        with running(probe):
            assert probe.remote_address == client.getsockname()
            other.sendto(b"foreign", probe.address)
            client.sendto(b"mine", probe.address)
            assert probe.until(1) == [b"mine"]
            assert probe.send_to(b"to the peer")
            assert client.recv(100) == b"to the peer"
    with running(Probe()) as unconnected, pytest.raises(ValueError, match=r"address=None: must be \(host"):
        unconnected.send_to(b"x")


def test_broadcast() -> None:
    with running(Probe(("0.0.0.0", 0))) as receiver, running(Probe(("0.0.0.0", 0))) as sender:
        assert sender.broadcast is False
        sender.broadcast = True
        assert sender.broadcast is True
        assert sender.send_to(b"to all", ("127.255.255.255", receiver.address[1]))
        assert receiver.until(1) == [b"to all"]
        sender.broadcast = False
        assert sender.send_to(b"no", ("255.255.255.255", receiver.address[1])) is False
        with pytest.raises(TypeError, match="broadcast=1: must be True or False"):
            sender.broadcast = 1
    with running(Probe(broadcast=True)) as asked:
        assert asked.broadcast is True


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any]]:
    """A receiver, and a sender whose multicast datagrams leave by loopback."""
    with running(Probe(("0.0.0.0", 0))) as receiver, running(Probe(("0.0.0.0", 0))) as sender:
        sender.multicast_interface = "127.0.0.1"
        yield receiver, sender


def _arrive(receiver: Any, sender: Any, group: str) -> bool:
    """Return whether a datagram to the group comes; one to the receiver itself says that it would have."""
    before = len(receiver.received)
    sender.send_to(b"group", (group, receiver.address[1]))
    sender.send_to(b"marker", ("127.0.0.1", receiver.address[1]))
    wait_until(lambda: b"marker" in receiver.received[before:])
    return b"group" in receiver.received[before:]


def test_multicast_join_and_leave(pair: tuple[Any, Any]) -> None:
    receiver, sender = pair
    assert not _arrive(receiver, sender, GROUP)
    receiver.join(GROUP, interface="127.0.0.1")
    assert _arrive(receiver, sender, GROUP)
    with pytest.raises(ValueError, match="was joined already"):
        receiver.join(GROUP, interface="127.0.0.1")
    receiver.leave(GROUP, interface="127.0.0.1")
    assert not _arrive(receiver, sender, GROUP)
    with pytest.raises(ValueError, match="was not joined"):
        receiver.leave(GROUP, interface="127.0.0.1")
    receiver.join(GROUP, interface="127.0.0.1")
    assert _arrive(receiver, sender, GROUP)


@pytest.mark.wine_differs("multicast")
def test_multicast_from_one_source(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, sender = pair
    asked: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            receiver._socket, "_python", SimpleNamespace(setsockopt=lambda *given: asked.append(given))
        )
        receiver.join(SOURCE_GROUP, interface="127.0.0.1", source="127.0.0.9")
        receiver.leave(SOURCE_GROUP, interface="127.0.0.1", source="127.0.0.9")
    request = bytes((232, 1, *LAST, 127, 0, 0, 9, 127, 0, 0, 1))  # group, source, interface
    assert asked == [(0, 15, request), (0, 16, request)]
    if not _win32.is_wine():
        receiver.join(SOURCE_GROUP, interface="127.0.0.1", source="127.0.0.9")
        assert not _arrive(receiver, sender, SOURCE_GROUP)
        receiver.leave(SOURCE_GROUP, interface="127.0.0.1", source="127.0.0.9")
    receiver.join(SOURCE_GROUP, interface="127.0.0.1", source="127.0.0.1")
    assert _arrive(receiver, sender, SOURCE_GROUP)


@pytest.mark.wine_differs("multicast")
def test_multicast_loop_and_ttl(pair: tuple[Any, Any]) -> None:
    receiver, sender = pair
    receiver.join(GROUP, interface="127.0.0.1")
    assert sender.multicast_loop is True
    for one in pair:  # Windows looks at the receiver's, Unix at the sender's
        one.multicast_loop = False
        assert one.multicast_loop is False
    if not _win32.is_wine():
        assert not _arrive(receiver, sender, GROUP)
    for one in pair:
        one.multicast_loop = True
    for ttl in (0, 1, 255):
        sender.multicast_ttl = ttl
        assert sender.multicast_ttl == ttl
        assert _arrive(receiver, sender, GROUP), "ttl counts routers, and there is none"
    sender.ttl = 17
    assert sender.ttl == 17


@pytest.mark.wine_differs("multicast")
def test_multicast_of_ipv6() -> None:
    index = 1  # the loopback interface of Windows and of Wine
    with running(Probe(("::", 0))) as receiver, running(Probe(("::", 0))) as sender:
        sender.multicast_interface = index
        assert sender.multicast_interface == index
        sender.multicast_ttl = 2
        assert sender.multicast_ttl == 2
        sender.multicast_loop = True
        assert sender.multicast_loop is True
        sender.ttl = 9
        assert sender.ttl == 9
        receiver.join(GROUP6, interface=index)
        if not _win32.is_wine():
            sender.send_to(b"group", (GROUP6, receiver.address[1], 0, index))
            assert receiver.until(1) == [b"group"]
        receiver.leave(GROUP6, interface=index)


@pytest.mark.wine_differs("multicast")
def test_multicast_of_ipv6_from_one_source() -> None:
    with running(Probe(("::", 0))) as probe:
        if _win32.is_wine():
            with pytest.raises(OSError, match="source='::1': this system has no source-specific multicast"):
                probe.join("ff3e::4d:1", interface=1, source="::1")
        else:
            probe.join("ff3e::4d:1", interface=1, source="::1")
            probe.leave("ff3e::4d:1", interface=1, source="::1")


# -- bad input: says what is wrong, and the socket stays usable -----------------------------------------


def _bad_uses(probe: Any) -> Iterator[tuple[Any, type[Exception], str]]:
    def set_to(name: str, value: Any) -> Any:
        return lambda: setattr(probe, name, value)

    yield lambda: probe.send_to("text", LOOPBACK), TypeError, "data is a str"
    yield lambda: probe.send_to(None, LOOPBACK), TypeError, "data is of type NoneType"
    yield lambda: probe.send_to(bytes(65_508), ("127.0.0.1", 9)), ValueError, "65508 bytes.*at most 65507"
    yield lambda: probe.send_to(b"x", ("localhost", 9)), ValueError, "must be a numeric address"
    yield lambda: probe.send_to(b"x", ["127.0.0.1", 9]), TypeError, "an address is"
    yield lambda: probe.send_to(b"x", ("::1", 9)), ValueError, "must be an IPv4 address"
    yield lambda: probe.connect("127.0.0.1"), TypeError, "an address is"
    yield lambda: probe.join(GROUP6), ValueError, f"group='{GROUP6}': must be an IPv4 multicast address"
    yield lambda: probe.join("10.0.0.1"), ValueError, "group='10.0.0.1': must be an IPv4 multicast"
    yield lambda: probe.join(GROUP, interface="10.99.98.97"), ValueError, "interface='10.99.98.97'"
    yield lambda: probe.join(GROUP, interface=1), TypeError, "interface=1: must be the IPv4 address"
    yield lambda: probe.join(GROUP, source="::1"), ValueError, "source='::1': must be an IPv4 address"
    yield set_to("multicast_ttl", 256), ValueError, "multicast_ttl=256: must be a whole number from 0 to 255"
    yield set_to("ttl", 0), ValueError, "ttl=0: must be a whole number from 1 to 255"
    yield set_to("multicast_loop", "yes"), TypeError, "multicast_loop='yes': must be True or False"
    yield set_to("multicast_interface", "eth0"), ValueError, "interface='eth0': must be the IPv4"
    yield set_to("multicast_interface", "10.99.98.97"), ValueError, "interface='10.99.98.97': is no interface"


def test_bad_input_leaves_the_socket_usable() -> None:
    with running(Echo()) as echo, plain() as client:
        for use, error, text in _bad_uses(echo):
            with pytest.raises(error, match=text):
                use()
            client.sendto(b"well?", echo.address)
            assert client.recv(100) == b"well?"


def test_bad_construction() -> None:
    for options, error, text in (
        ({"recv_depth": 0}, ValueError, "recv_depth=0: must be"),
        ({"nodelay": True}, TypeError, "unknown option nodelay=True"),
        ({"type": socket.SOCK_STREAM}, ValueError, "type=.*must be socket.SOCK_DGRAM"),
    ):
        with pytest.raises(error, match=text):
            Probe(**options)  # type: ignore[arg-type]
    with plain() as taken, pytest.raises(OSError, match=r"cannot bind to 127\.0\.0\.1:\d+"):
        Probe(taken.getsockname())


# -- raw sockets ----------------------------------------------------------------------------------------


def test_raw_icmp_echo() -> None:
    request = struct.pack(">BBHHH", 8, 0, 0xF7FF - 0x4D4D, 0x4D4D, 0)
    probe = Probe(("0.0.0.0", 0), type=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMP)
    with running(probe):

        def answered() -> bool:  # asked again: the ICMP of others may have filled the socket's buffer
            probe.send_to(request, ("127.0.0.1", 0))
            return any(data[20] == 0 and data[24:26] == b"MM" for data in list(probe.received))

        wait_until(answered)
        assert ("127.0.0.1", 0) in probe.senders


def test_raw_sockets_need_the_privilege(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> Any:
        exc = PermissionError(13, "an attempt was made")
        exc.winerror = 10013
        raise exc

    monkeypatch.setattr(_datagramops.socket, "socket", refuse)
    with pytest.raises(PermissionError, match=r"raw sockets \(type=SOCK_RAW\) are for administrators"):
        Datagram(LOOPBACK, type=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMP)


def test_ping_example() -> None:
    program = Program("-m", "examples.ping", "127.0.0.1", "--count", "2")
    try:
        code, lines = program.ended()
    finally:
        program.kill()
    assert code == 0, lines
    assert [line.partition(",")[0] for line in lines] == [
        "24 bytes from 127.0.0.1: number 0",
        "24 bytes from 127.0.0.1: number 1",
    ]
    assert len((ROOT / "examples" / "ping.py").read_text(encoding="utf-8").splitlines()) <= 60


# -- the beginning and the end --------------------------------------------------------------------------


def test_start_and_close_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatcher, "STALL_CHECK", 3600.0)  # a thread in reserve has handles
    before = 0
    with running(Probe()) as first:  # keeps its engine running
        for number in range(60):
            if number == 10:  # what is made once and kept has been made
                before = handle_count()
            with running(Probe(engine=first._engine)) as probe, plain() as client:
                if number % 2:
                    client.sendto(b"x", probe.address)
                assert probe.stats().receives.in_use >= 7
        wait_until(lambda: first._engine.ops_pending == 8)
        wait_until(lambda: handle_count() <= before + 5, what=f"{before} handles at most")


def test_engine_is_shared_and_survives_its_users(io_threads: int) -> None:
    engine = Engine(io_threads)
    with running(Echo(engine=engine)) as first, plain() as client:
        with running(Echo(engine=engine)) as second:
            assert engine.ops_pending == 16
            for one in (first, second):
                client.sendto(b"x", one.address)
                assert client.recv(10) == b"x"
        wait_until(lambda: engine.ops_pending == 8)
        client.sendto(b"y", first.address)
        assert client.recv(10) == b"y"


def test_close_and_abort_with_operations_pending_from_everywhere() -> None:
    class Closing(Probe):
        def got(self, data: bytes, address: Any) -> None:
            self.close()
            self.abort()
            with pytest.raises(RuntimeError, match="called from a callback"):
                self.wait_closed(1)

    with running(Closing()) as closing, plain() as client:
        for _ in range(10):
            client.sendto(b"x", closing.address)
        assert closing.wait_closed(10)
        assert closing.received == [b"x"], "nothing comes after close()"
    with running(Probe()) as probe:
        threads = [threading.Thread(target=end) for end in (probe.abort, probe.close) * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert probe.wait_closed(10)
        assert probe.close_reason in ("local", "aborted")


def test_after_the_end_and_before_the_beginning() -> None:
    probe = Probe()
    with pytest.raises(ConnectionClosedError, match="was not started"):
        probe.send_to(b"x", ("127.0.0.1", 9))
    probe.close()
    assert probe.wait_closed(1)
    assert probe.calls == [], "it never began"
    with pytest.raises(RuntimeError, match="started once"):
        probe.start()
    with running(Probe()) as ended:
        ended.close()
        assert ended.wait_closed(10)
        with pytest.raises(RuntimeError, match="started once"):
            ended.start()
        for use in (
            lambda: ended.send_to(b"x", ("127.0.0.1", 9)),
            lambda: ended.join(GROUP),
            lambda: ended.connect(("127.0.0.1", 9)),
            lambda: ended.ttl,
            lambda: setattr(ended, "multicast_interface", None),
        ):
            with pytest.raises(ConnectionClosedError, match="is closed"):
                use()
        assert ended.address[0] == "127.0.0.1"


def test_a_wrong_engine_is_refused_before_there_is_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(datagram_module, "open_datagram", lambda *given: opened.append(given))
    with pytest.raises(TypeError, match=r"^engine=1: must be an Engine or None$"):
        Datagram(LOOPBACK, engine=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^io_threads=2: the given engine has its own threads; "):
        Datagram(LOOPBACK, engine=Engine(), io_threads=2)
    assert opened == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_close_while_start_is_under_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The handle is not closed around its association, which might be of another one of its value then."""
    engine = Engine(1)
    with running(Probe(engine=engine)):
        probe = Probe(engine=engine)
        associate = CompletionPort.associate
        closing = threading.Thread(target=probe.close)

        def close() -> None:
            closing.start()
            closing.join(0.2)

        def spy(port: CompletionPort, handle: int) -> None:
            if moment == "before":
                close()
            associate(port, handle)
            if moment == "after":
                close()

        monkeypatch.setattr(CompletionPort, "associate", spy)
        probe.start()
        closing.join()
        assert probe.wait_closed(10)
        probe.check()
        wait_until(lambda: engine.stats().users == 1)
        assert engine.stats().sockets == 1


def test_a_stopped_engine_is_refused_and_leaves_nothing() -> None:
    engine = Engine(1)
    with running(Probe(engine=engine)):
        pass
    wait_until(lambda: not engine.running)
    probe = Probe(engine=engine)
    with pytest.raises(RuntimeError, match="has been stopped"):
        probe.start()
    probe.close()
    assert probe.wait_closed(1)


def test_a_script_that_forgets_to_close_ends() -> None:
    program = Program(
        "-c", "from iocp_ctypes import Datagram\nDatagram(('127.0.0.1', 0)).start()\nprint('on')"
    )
    try:
        assert program.ended() == (0, ["on"])
    finally:
        program.kill()
