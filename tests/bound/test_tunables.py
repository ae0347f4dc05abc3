"""_tunables.py: the live options of a server. What they do to its connections is in test_server.py."""

from __future__ import annotations

from typing import Any

import pytest
from support import LOOPBACK, Echo, Recorder, echoes, made, raw, serving, wait_until

from iocp_ctypes import Server, Usage, connect
from iocp_ctypes._options import OPTIONS
from iocp_ctypes._tunables import Tunables

#: Options that hold for the life of a server.
FIXED = {"listen_backlog", "accept_data", "io_threads", "work_threads", "exclusive", "dualstack"}


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
        wait_until(lambda: server.sendcap == Usage(3, 12))
        wait_until(lambda: server.recvburst == Usage(1, 4))
        engine = server.engine
        assert engine is not None
        wait_until(
            lambda: (
                engine.ops_pending == server.sendcap.in_use + server.recvburst.in_use + server.backlog.in_use
            )
        )
        for connection in made(Sender, 4):
            assert (connection.sendcap, connection.recvburst) == (Usage(3, 3), Usage(1, 1))
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
        assert (client.recvburst, client.recv_mode) == (Usage(5, 0), "burst")
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
