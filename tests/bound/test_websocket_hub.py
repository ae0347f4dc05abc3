"""The hub: enumeration, broadcast, topics, from any thread; many clients, and some that do not read."""

from __future__ import annotations

import contextlib
import threading
import zlib
from typing import Any

import pytest
from support import LOOPBACK, wait_until
from wspeer import BINARY, TEXT, Frame, Peer, close, noted, small_buffers, websockets

from iocp_ctypes import Server
from iocp_ctypes.websocket import Deflate, _outgoing, hub_of
from iocp_ctypes.websocket._hub import SUBSCRIPTIONS_MAX

DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate"


@contextlib.contextmanager
def guests(count: int, *headers: str, **options: Any) -> Any:
    """A server and its clients; the WebSockets in the clients' order."""
    kind = noted(echo=False, **options)
    with websockets(kind) as server, contextlib.ExitStack() as stack:
        peers = []
        for number in range(count):
            peers.append(stack.enter_context(Peer(server.address, "/", *headers)))
            wait_until(lambda number=number: len(server.websockets) > number)
        yield server, server.websockets, peers


def test_broadcast() -> None:
    with guests(4) as (server, (one, two, three, four), peers):
        assert server.broadcast("all") == 4
        assert server.broadcast(b"bytes") == 4
        assert server.broadcast("two", to=[one, two]) == 2
        assert server.broadcast("not one", exclude=one) == 3
        assert server.broadcast("by function", lambda websocket: websocket is not four) == 3
        assert server.broadcast("both", to=[one, two, three], exclude=[two]) == 2
        assert server.broadcast("nobody", to=()) == 0
        wanted: list[list[bytes]] = [
            [b"all", b"bytes", b"two", b"by function", b"both"],
            [b"all", b"bytes", b"two", b"not one", b"by function"],
            [b"all", b"bytes", b"not one", b"by function", b"both"],
            [b"all", b"bytes", b"not one"],
        ]
        for peer, messages in zip(peers, wanted, strict=True):
            for message in messages:
                assert peer.get() == Frame(BINARY if message == b"bytes" else TEXT, message)


def test_who_has_gone_is_not_in_it_any_more() -> None:
    with guests(3) as (server, (one, two, three), peers):
        peers[0].send(close(1000))
        peers[1].sock.close()
        wait_until(lambda: server.websockets == [three])
        assert server.broadcast("x", to=[one, two, three]) == 1
        assert len(hub_of(server)) == 1
        peers[2].expect(TEXT, "x")


def test_topics() -> None:
    with guests(3) as (server, (one, two, three), peers):
        one.subscribe("news/+")
        two.subscribe("news/sport")
        two.subscribe("news/sport")
        two.subscribe("#")
        three.subscribe("other")
        assert server.publish("news/sport", "goal") == 2
        assert server.publish("news/sport", "own goal", exclude=[one]) == 1
        assert server.publish("news", "all") == 1
        assert server.publish("other", b"!") == 2
        assert server.hub.subscribers("other") == [two, three]
        two.unsubscribe("#")
        two.unsubscribe("never subscribed")
        assert server.publish("other", "last") == 1
        for message in ("goal",):
            peers[0].expect(TEXT, message)
        for message in ("goal", "own goal", "all"):
            peers[1].expect(TEXT, message)
        peers[1].expect(BINARY, b"!")
        peers[2].expect(BINARY, b"!")
        peers[2].expect(TEXT, "last")
        peers[0].send(close(1000))
        wait_until(lambda: len(server.websockets) == 2)
        assert server.publish("news/sport", "x") == 1
        one.subscribe("news/+")  # it has closed
        assert server.hub.subscribers("news/x") == []


def test_what_is_no_topic() -> None:
    with guests(1) as (server, (one,), _peers):
        with pytest.raises(ValueError, match="a topic names them"):
            server.publish("news/+", "x")
        with pytest.raises(ValueError, match="must be the last level"):
            one.subscribe("#/news")
        with pytest.raises(TypeError, match="must be a str"):
            one.subscribe(b"news")
        with pytest.raises(TypeError, match="must be str or bytes-like"):
            server.broadcast(None)
        for number in range(SUBSCRIPTIONS_MAX):
            one.subscribe(f"t/{number}")
        one.subscribe("t/0")
        with pytest.raises(ValueError, match=f"{SUBSCRIPTIONS_MAX} at most"):
            one.subscribe("one too many")


def test_a_message_is_built_once_and_compressed_once_for_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    build = _outgoing.build
    monkeypatch.setattr(_outgoing, "build", lambda *args: built.append(args) or build(*args))
    kind = noted(echo=False, compression=Deflate(threshold=50))
    offers = ["", DEFLATE, DEFLATE, f"{DEFLATE}; server_max_window_bits=10", DEFLATE]
    with websockets(kind) as server, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(server.address, "/", *filter(None, [offer]))) for offer in offers]
        wait_until(lambda: len(server.websockets) == 5)
        built.clear()
        message = "the same again and " * 100
        for turn in (1, 2):
            assert server.broadcast(message) == 5
            assert len(built) == 3 * turn, "plain, 12 bits, 10 bits"
            for offer, peer in zip(offers, peers, strict=True):
                got = peer.get()
                assert got is not None
                data = zlib.decompressobj(-15).decompress(got.data + b"\0\0\xff\xff") if offer else got.data
                assert data == message.encode()
                assert got.rsv == (4 if offer else 0)
        assert server.broadcast("short") == 5
        for peer in peers:
            peer.expect(TEXT, "short")


def test_who_refers_to_earlier_messages_gets_its_own() -> None:
    kind = noted(echo=False, compression=Deflate(threshold=0, takeover=True))
    with websockets(kind) as server, Peer(server.address, "/", DEFLATE) as peer:
        wait_until(lambda: server.websockets)
        inflate = zlib.decompressobj(-12)
        for n in range(5):
            server.websockets[0].send(f"direct {n} " * 20)
            server.broadcast(f"to all {n} " * 20)
            for text in ("direct", "to all"):
                got = peer.get()
                assert got is not None
                assert inflate.decompress(got.data + b"\0\0\xff\xff").decode() == f"{text} {n} " * 20


def test_broadcasts_from_many_threads_keep_each_ones_order() -> None:
    with guests(5) as (server, _websockets, peers):

        def talk(who: int) -> None:
            for n in range(50):
                server.broadcast(f"{who} {n}")

        threads = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for peer in peers:
            seen = [0] * 4
            for _ in range(200):
                got = peer.get()
                assert got is not None
                who, n = map(int, got.data.split())
                assert n == seen[who]
                seen[who] += 1


def test_broadcast_from_callbacks() -> None:
    """A chat: each message goes to all, on_close tells the others."""

    def got(self: Any, message: str) -> None:
        self.hub.broadcast(message, exclude=self)

    def gone(self: Any) -> None:
        self.hub.broadcast("bye")

    with (
        websockets(noted(got=got, gone=gone)) as server,
        Peer(server.address) as one,
        Peer(server.address) as two,
    ):
        wait_until(lambda: len(server.websockets) == 2)
        one.text("hello")
        two.expect(TEXT, "hello")
        one.send(close(1000))
        two.expect(TEXT, "bye")


def test_each_server_has_its_own() -> None:
    kind = noted(echo=False)
    with (
        Server(LOOPBACK, kind.serve) as one,
        Server(LOOPBACK, kind.serve) as two,
        Peer(one.address) as peer,
        Peer(two.address) as other,
    ):
        wait_until(lambda: len(hub_of(one)) == len(hub_of(two)) == 1)
        assert hub_of(one) is not hub_of(two)
        assert hub_of(one).broadcast("one") == 1
        assert hub_of(two).broadcast("two") == 1
        peer.expect(TEXT, "one")
        other.expect(TEXT, "two")


def test_many_get_all_in_order_while_some_do_not_read() -> None:
    """The soak run `websocket` in small."""
    clients, stuck, rounds = 60, 3, 100
    kind = noted(echo=False, queue_max=100_000)
    with websockets(kind, high_mark=1 << 16) as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(small_buffers(server.address)) for _ in range(stuck)]
        peers = [stack.enter_context(Peer(server.address)) for _ in range(clients)]
        wait_until(lambda: len(server.websockets) == clients + stuck)
        block = "x" * 50_000
        for number in range(rounds):
            message = f"{number} {block}"
            server.broadcast(message)
            for peer in peers:
                peer.expect(TEXT, message)
        wait_until(lambda: len(server.websockets) == clients, what="those that do not read are closed")
        codes = [websocket.close_code for websocket in kind.made if not websocket.open]
        assert codes == [1008] * stuck
        assert slow
