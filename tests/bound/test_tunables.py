"""The live options of a server: what they change at once, what new connections inherit."""

from __future__ import annotations

import time
from typing import Any

import pytest
from support import LOOPBACK, Echo, Recorder, echoes, made, raw, reachable, serving, wait_until

from iocp_ctypes import Server, Usage, connect
from iocp_ctypes._options import OPTIONS
from iocp_ctypes._tunables import Tunables

#: Options that hold for the life of a server.
FIXED = {
    "listen_backlog",
    "accept_data",
    "io_threads",
    "work_threads",
    "processes",
    "exclusive",
    "dualstack",
    "reject_remote",
    "pipe_security",
}


def test_every_option_that_is_not_fixed_is_live() -> None:
    live = {name for name in vars(Tunables) if name in OPTIONS}
    assert live == set(OPTIONS) - FIXED
    assert not [name for name in FIXED if hasattr(Server, name)]


def test_the_three_knobs_before_the_start() -> None:
    server = Server(LOOPBACK, Echo)
    try:
        server.backlog, server.sendcap, server.recvburst = 5, 6, 7
        assert (server.backlog, server.sendcap, server.recvburst) == (Usage(5, 0), Usage(6, 0), Usage(7, 0))
    finally:
        server.stop()


def test_knobs_are_true_under_load() -> None:
    """All connections' sends and receives add up to what the kernel has."""

    class Sender(Recorder):
        def got(self, data: bytes) -> None:
            for _ in range(40):
                self.send(bytes(200_000))

    with serving(Sender, sendcap=3, recv_mode="flow", linger_timeout=0.1) as server:
        clients = [raw(server.address) for _ in range(4)]
        for client in clients:
            client.sendall(b"go")

        def three_of_each() -> bool:
            if server.sendcap == Usage(3, 12):
                return True
            time.sleep(0.2)
            for client in clients:  # under Wine the send of a callback held up goes alone: let it be done
                client.recv(200_000)
            return False

        wait_until(three_of_each)
        wait_until(lambda: server.recvburst == Usage(1, 4))
        engine = server.engine
        assert engine is not None
        wait_until(
            lambda: (
                engine.ops_pending == server.sendcap.in_use + server.recvburst.in_use + server.backlog.in_use
            )
        )
        for connection in made(Sender, 4):  # the system may still take one from them
            wait_until(lambda one=connection: one.sendcap == Usage(3, 3))  # type: ignore[misc]
            assert connection.recvburst == Usage(1, 1)
        server.abort_clients()
        wait_until(lambda: (server.sendcap.in_use, server.recvburst.in_use) == (0, 0))
        for client in clients:
            client.close()


def test_a_client_takes_the_options_of_receiving() -> None:
    with serving(Echo) as server:

        class Asking(Recorder):
            def connected(self) -> None:
                self.send(bytes(100_000))

        client = connect(
            server.address, Asking, recv_mode="burst", recvburst=5, recv_buffer_max=50_000, sendcap=2
        )
        assert (client.recvburst.cap, client.recv_mode) == (5, "burst")
        wait_until(lambda: client.received == bytes(100_000))
        assert client.recvburst.cap == 5
        client.abort()
        assert client.wait_closed(10)


@pytest.mark.parametrize("name", ["backlog", "sendcap", "recvburst"])
@pytest.mark.parametrize("wrong", [0, -1, 1 << 40, 2.5, "3", None, True, Usage(3, 0)])
def test_what_is_no_cap_is_refused_by_name_and_changes_nothing(name: str, wrong: Any) -> None:
    with serving(Echo, backlog=3) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        before = server.backlog, server.sendcap.cap, server.recvburst.cap
        with pytest.raises((TypeError, ValueError), match=f"{name}="):
            setattr(server, name, wrong)
        if name != "backlog":
            own = connection.sendcap.cap, connection.recvburst.cap
            with pytest.raises((TypeError, ValueError), match=f"{name}="):
                setattr(connection, name, wrong)
            assert (connection.sendcap.cap, connection.recvburst.cap) == own
        wait_until(lambda: (server.backlog, server.sendcap.cap, server.recvburst.cap) == before)
        echoes(client)


def test_sendcap_is_live_and_summed_over_connections() -> None:
    class Sender(Recorder):
        def got(self, data: bytes) -> None:
            for _ in range(20):
                self.send(bytes(200_000))

    with serving(Sender, sendcap=2, linger_timeout=0.1) as server:
        assert server.sendcap == Usage(2, 0)
        with raw(server.address) as one, raw(server.address) as two:
            one.sendall(b"go")
            two.sendall(b"go")
            wait_until(lambda: server.sendcap.in_use == 4)
            with pytest.raises(ValueError, match="sendcap=0"):
                server.sendcap = 0
            server.sendcap = 3
            wait_until(lambda: server.sendcap == Usage(3, 4))
            with raw(server.address) as three:
                three.sendall(b"go")
                wait_until(lambda: server.sendcap.in_use == 7)
            server.abort_clients()


def test_recvburst_is_live_and_summed_over_connections() -> None:
    with serving(Echo, recvburst=3, recv_mode="flow") as server:
        assert server.recvburst == Usage(3, 0)
        with raw(server.address) as one, raw(server.address) as two:
            echoes(one)
            echoes(two)
            wait_until(lambda: server.recvburst == Usage(3, 2))
            with pytest.raises(ValueError, match="recvburst=0"):
                server.recvburst = 0
            assert server.recvburst.cap == 3
            server.recvburst = 9
            with raw(server.address) as three:
                echoes(three)
                caps = [connection.recvburst.cap for connection in made(Echo, 3)]
                assert caps == [3, 3, 9]
                wait_until(lambda: server.recvburst == Usage(9, 3))
        wait_until(lambda: server.recvburst == Usage(9, 0))


def test_new_connections_inherit_and_may_have_their_own() -> None:
    """The three knobs: the server's for who comes from now on, and each connection's own in on_connect."""

    class Own(Echo):
        def connected(self) -> None:
            self.data = self.sendcap, self.recvburst
            if self.server.data == "own":
                self.sendcap, self.recvburst, self.recv_mode = 7, 11, "burst"

    class Noting(Server):
        data = ""

    with serving(Own, server=Noting, sendcap=2, recvburst=3) as server, raw(server.address) as one:
        echoes(one)
        server.sendcap, server.recvburst = 5, 6
        server.data = "own"
        with raw(server.address) as two:
            echoes(two)
            first, second = made(Own, 2)
            assert first.data == (Usage(2, 0), Usage(3, 0))
            assert second.data == (Usage(5, 0), Usage(6, 0))
            assert (first.sendcap.cap, first.recvburst.cap) == (2, 3)
            assert (second.sendcap.cap, second.recvburst.cap) == (7, 11)
            assert (server.sendcap.cap, server.recvburst.cap) == (5, 6)


def test_tune_sets_the_three_of_a_profile() -> None:
    with serving(Echo, backlog=3) as server:
        server.tune("ftpd")
        assert (server.backlog, server.sendcap.cap, server.recvburst.cap) == (Usage(10, 10), 20, 20)
        with raw(server.address) as client:
            echoes(client)
            server.tune("httpd")
            assert (server.backlog, server.sendcap.cap, server.recvburst.cap) == (Usage(500, 500), 1, 1)
            (connection,) = made(Echo)
            assert (connection.sendcap.cap, connection.recvburst.cap) == (20, 20)
            reachable(server.address)
            newest = made(Echo, 2)[-1]
            assert (newest.sendcap.cap, newest.recvburst.cap) == (1, 1)


@pytest.mark.parametrize(("wrong", "error"), [("smtpd", ValueError), ("", ValueError), (10, TypeError)])
def test_an_unknown_profile_is_refused_and_changes_nothing(wrong: Any, error: type[Exception]) -> None:
    server = Server(LOOPBACK, Echo, backlog=3)
    try:
        with pytest.raises(error, match=r"must be one of 'ftpd', 'httpd'"):
            server.tune(wrong)
        assert (server.backlog, server.sendcap, server.recvburst) == (Usage(3, 0), Usage(4, 0), Usage(1, 0))
    finally:
        server.stop()


def test_backlog_is_live() -> None:
    with serving(Echo, backlog=2) as server:
        with pytest.raises(ValueError, match="backlog=0"):
            server.backlog = 0
        assert server.backlog == Usage(2, 2)
        server.backlog = 30
        assert server.backlog == Usage(30, 30)
        server.backlog = 5
        assert server.backlog == Usage(5, 30)
        for _ in range(25):
            reachable(server.address)
        wait_until(lambda: server.backlog == Usage(5, 5))
        reachable(server.address)
        wait_until(lambda: server.backlog == Usage(5, 5))
