"""The rules of RFC 6455 and RFC 7692, one by one, with plain sockets: what is taken, refused, answered."""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest
from wspeer import BINARY, CLOSE, CONT, PING, PONG, TEXT, Frame, Peer, close, first, frame, noted, websockets

from iocp_ctypes.websocket import Deflate

HELLO = "Hello-µ@ßöäüàá-UTF-8!!".encode()
DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate"

#: What is sent in one piece; what comes back, up to the server's end.
CASES: dict[str, tuple[list[bytes], list[Frame | int]]] = {
    "text": ([frame(TEXT, HELLO)], [Frame(TEXT, HELLO)]),
    "empty text": ([frame(TEXT)], [Frame(TEXT, b"")]),
    "binary": ([frame(BINARY, bytes(range(256)))], [Frame(BINARY, bytes(range(256)))]),
    "empty binary": ([frame(BINARY)], [Frame(BINARY, b"")]),
    **{
        f"text of {size}": ([frame(TEXT, b"*" * size)], [Frame(TEXT, b"*" * size)])
        for size in (125, 126, 127, 128, 65535, 65536)
    },
    "length written longer than needed": (
        [bytes([0x82, 0xFE, 0, 5]) + bytes(4) + b"hello"],
        [Frame(BINARY, b"hello")],
    ),
    "ping": ([frame(PING)], [Frame(PONG, b"")]),
    "ping with data": ([frame(PING, b"\0\xff\xfe")], [Frame(PONG, b"\0\xff\xfe")]),
    "ping of 125": ([frame(PING, b"x" * 125)], [Frame(PONG, b"x" * 125)]),
    "ping of 126": ([frame(PING, b"x" * 126)], [1002]),
    "pong nobody asked for": ([frame(PONG, b"x"), frame(PING)], [Frame(PONG, b"")]),
    "ten pings": ([frame(PING, b"%d" % n) for n in range(10)], [Frame(PONG, b"%d" % n) for n in range(10)]),
    **{f"reserved bits {rsv}": ([frame(TEXT, b"x", rsv=rsv)], [1002]) for rsv in range(1, 8)},
    "reserved bit after a good message": (
        [frame(TEXT, b"good"), frame(TEXT, b"bad", rsv=2), frame(PING)],
        [Frame(TEXT, b"good"), 1002],
    ),
    "reserved bits of a ping": ([frame(PING, rsv=1)], [1002]),
    "reserved bits of a close": ([frame(CLOSE, rsv=7)], [1002]),
    **{f"opcode {code}": ([frame(code, b"x")], [1002]) for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "opcode 5 after a good message": ([frame(TEXT, b"good"), frame(5)], [Frame(TEXT, b"good"), 1002]),
    "not masked": ([frame(TEXT, b"x", mask=False)], [1002]),
    "a ping in fragments": ([frame(PING, b"x", fin=False), frame(CONT, b"y")], [1002]),
    "a close in fragments": ([frame(CLOSE, b"", fin=False)], [1002]),
    "two fragments": ([frame(TEXT, b"one", False), frame(CONT, b"two")], [Frame(TEXT, b"onetwo")]),
    "binary fragments": (
        [frame(BINARY, b"\0", False), frame(CONT, b"\xff", False), frame(CONT, b"\1")],
        [Frame(BINARY, b"\0\xff\1")],
    ),
    "empty fragments": ([frame(TEXT, b"", False), frame(CONT, b"", False), frame(CONT)], [Frame(TEXT, b"")]),
    "fragments with a ping between": (
        [frame(TEXT, b"one", False), frame(PING, b"now"), frame(CONT, b"two")],
        [Frame(PONG, b"now"), Frame(TEXT, b"onetwo")],
    ),
    "continuation of nothing": ([frame(CONT, b"x")], [1002]),
    "continuation of nothing, not the last": ([frame(CONT, b"x", False)], [1002]),
    "continuation after the last": (
        [frame(TEXT, b"one", False), frame(CONT, b"two"), frame(CONT, b"three")],
        [Frame(TEXT, b"onetwo"), 1002],
    ),
    "text within fragments": ([frame(TEXT, b"one", False), frame(TEXT, b"two")], [1002]),
    "binary within fragments": ([frame(TEXT, b"one", False), frame(BINARY, b"two", False)], [1002]),
    "a character over two fragments": (
        [frame(TEXT, b"\xce", False), frame(CONT, b"\xba")],
        [Frame(TEXT, b"\xce\xba")],
    ),
    "a character that the end cuts": ([frame(TEXT, b"\xce\xba\xe1\xbd")], [1007]),
    "a character that the last fragment cuts": ([frame(TEXT, b"x", False), frame(CONT, b"\xce")], [1007]),
    **{
        f"not UTF-8: {data.hex()}": ([frame(TEXT, b"ok" + data)], [1007])
        for data in (
            b"\x80",
            b"\xbf",
            b"\xc0\xaf",
            b"\xc1\xbf",
            b"\xe0\x80\xaf",
            b"\xed\xa0\x80",
            b"\xed\xbf\xbf",
            b"\xf0\x80\x80\xaf",
            b"\xf4\x90\x80\x80",
            b"\xf5\x80\x80\x80",
            b"\xf8\x88\x80\x80\x80",
            b"\xfe",
            b"\xff",
            b"\xed\xa0\x80\xed\xb0\x80",
            b"\xc3\x28",
            b"\xe2\x82",
        )
    },
    **{
        f"UTF-8: {data.hex()}": ([frame(TEXT, data)], [Frame(TEXT, data)])
        for data in (
            b"\0",
            b"\x7f",
            b"\xc2\x80",
            b"\xef\xbf\xbf",
            b"\xf0\x90\x80\x80",
            b"\xf4\x8f\xbf\xbf",
            b"\xee\x80\x80",
            b"\xef\xb7\x90",
            b"\xf0\x9f\xbf\xbe",
        )
    },
    "close": ([close()], [Frame(CLOSE, b"")]),
    "close with a code": ([close(1000)], [1000]),
    "close with a reason": ([close(1000, b"bye")], [Frame(CLOSE, b"\x03\xe8bye")]),
    "close with the longest reason": ([close(1000, b"x" * 123)], [Frame(CLOSE, b"\x03\xe8" + b"x" * 123)]),
    "close that is too long": ([close(1000, b"x" * 124)], [1002]),
    "close of one byte": ([frame(CLOSE, b"x")], [1002]),
    "close with a reason that is no text": ([close(1000, b"\xce\xba\xe1\xbd")], [1007]),
    **{
        f"close {code}": ([close(code)], [code])
        for code in (1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)
    },
    **{
        f"close {code}, which nobody may send": ([close(code)], [1002])
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    },
    "a message, then close": ([frame(TEXT, b"x"), close(1000)], [Frame(TEXT, b"x"), 1000]),
    "a ping after close": ([close(1000), frame(PING)], [1000]),
    "a message after close": ([close(1000), frame(TEXT, b"x")], [1000]),
    "two closes": ([close(1000), close(1001)], [1000]),
    "close between fragments": ([frame(TEXT, b"x", False), close(1000), frame(CONT, b"y")], [1000]),
    "longer than message_max": ([frame(BINARY, bytes(100_001))], [1009]),
    "as long as message_max": ([frame(BINARY, bytes(100_000))], [Frame(BINARY, bytes(100_000))]),
    "fragments longer than message_max": (
        [frame(BINARY, bytes(60_000), False), frame(CONT, bytes(40_001))],
        [1009],
    ),
    "an announced length of 2**63 - 1": ([bytes([0x82, 0xFF]) + b"\x7f" + b"\xff" * 7 + bytes(4)], [1009]),
    "as many as fragments_max": (
        [frame(BINARY, b"x", False), *[frame(CONT, b"x", False)] * 8, frame(CONT, b"x")],
        [Frame(BINARY, b"x" * 10)],
    ),
    "more than fragments_max": ([frame(BINARY, b"", False), *[frame(CONT, b"", False)] * 10], [1009]),
    "compressed without having agreed on it": ([frame(TEXT, b"\xf2\x48\xcd\xc9\xc9\x07\0", rsv=4)], [1002]),
}


def matches(got: list[Frame], wanted: list[Frame | int]) -> bool:
    return len(got) == len(wanted) and all(
        one.opcode == CLOSE and one.code == other if isinstance(other, int) else one == other
        for one, other in zip(got, wanted, strict=True)
    )


def play(address: Any, sent: list[bytes], wanted: list[Frame | int], chop: int | None) -> None:
    """Send, in one piece or chopped, and compare what comes back; end it where the server does not."""
    if not any(isinstance(other, int) or other.opcode == CLOSE for other in wanted):
        sent, wanted = [*sent, close(1000)], [*wanted, 1000]
    data = b"".join(sent)
    with Peer(address) as peer:
        for start in range(0, len(data), chop or len(data)):
            try:
                peer.send(data[start : start + (chop or len(data))])
            except ConnectionError:
                break  # it has seen enough
        got = peer.frames()
    assert matches(got, wanted), got


@pytest.fixture(scope="module")
def echo() -> Any:
    """A server for all the rules: they are many."""
    kind = noted(message_max=100_000, fragments_max=10)
    with websockets(kind) as server:
        yield kind, server.address


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, echo: Any) -> None:
    kind, address = echo
    kind.made.clear()
    play(address, *CASES[name], None)
    first(kind).until("close")
    first(kind).check()


@pytest.mark.parametrize("chop", [1, 3])
def test_rules_hold_byte_by_byte(chop: int) -> None:
    """All of them over one server, for a receive is no frame."""
    with websockets(noted(message_max=100_000, fragments_max=10)) as server:
        for sent, wanted in CASES.values():
            if sum(map(len, sent)) < 400:
                play(server.address, sent, wanted, chop)


def test_invalid_text_is_seen_before_its_message_is_complete() -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        peer.send(frame(TEXT, b"good ", False), frame(CONT, b"bad \xf4\x90", False))
        (last,) = peer.frames()
        assert last.code == 1007


def test_invalid_text_is_seen_before_its_frame_is_complete() -> None:
    kind = noted()
    whole = frame(TEXT, b"good \xf0\x9f\x98\x80 \xf4\x90\x80\x80" + b"x" * 1000)
    with websockets(kind) as server, Peer(server.address) as peer:
        for start in range(23):  # up to the byte that no text has
            peer.send(whole[start : start + 1])
        (last,) = peer.frames()
        assert last.code == 1007
    kind.made[0].check()


@pytest.mark.parametrize("cut", range(1, 12))
def test_text_that_is_looked_at_in_parts_comes_whole(cut: int) -> None:
    text = "aß€😀" * 30
    data = text.encode()
    sent = frame(TEXT, data[:100], False) + frame(PING, b"!") + frame(CONT, data[100:]) + frame(TEXT, b"next")
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        for start in range(0, len(sent), cut):
            peer.send(sent[start : start + cut])
        peer.expect(PONG, b"!")
        peer.expect(TEXT, text)
        peer.expect(TEXT, "next")
    kind.made[0].until("close")
    assert kind.made[0].messages == [text, "next"]


# -- permessage-deflate --------------------------------------------------------------------------------------


class Squeezer:
    """The other end's half of permessage-deflate, by zlib alone."""

    def __init__(
        self, ours: int = 15, theirs: int = 15, keep_ours: bool = True, keep_theirs: bool = True
    ) -> None:
        self._ours, self._theirs = ours, theirs
        self._keep_ours, self._keep_theirs = keep_ours, keep_theirs
        self._pack = self._unpack = None

    def pack(self, data: bytes) -> bytes:
        if self._pack is None or not self._keep_ours:
            self._pack = zlib.compressobj(wbits=-self._ours)
        return (self._pack.compress(data) + self._pack.flush(zlib.Z_SYNC_FLUSH))[:-4]

    def unpack(self, data: bytes) -> bytes:
        if self._unpack is None or not self._keep_theirs:
            self._unpack = zlib.decompressobj(wbits=-self._theirs)
        return self._unpack.decompress(data + b"\0\0\xff\xff")


def text_of(size: int, seed: int) -> bytes:
    chance = random.Random(seed)
    return " ".join(chance.choice(["alpha", "beta", "gamma", "delta", "ε"]) for _ in range(size)).encode()


@pytest.mark.parametrize(
    ("offer", "options", "agreed", "squeezer"),
    [
        (
            "",
            {},
            "server_no_context_takeover; server_max_window_bits=12",
            {"theirs": 12, "keep_theirs": False},
        ),
        (
            "; client_max_window_bits",
            {"peer_window_bits": 10},
            "server_no_context_takeover; server_max_window_bits=12; client_max_window_bits=10",
            {"ours": 10, "theirs": 12, "keep_theirs": False},
        ),
        ("", {"takeover": True}, "server_max_window_bits=12", {"theirs": 12}),
        (
            "; client_no_context_takeover",
            {"takeover": True, "window_bits": 15},
            "client_no_context_takeover; server_max_window_bits=15",
            {"keep_ours": False},
        ),
        (
            "; server_no_context_takeover; server_max_window_bits=9",
            {"takeover": True, "peer_takeover": False},
            "server_no_context_takeover; client_no_context_takeover; server_max_window_bits=9",
            {"theirs": 9, "keep_theirs": False, "keep_ours": False},
        ),
    ],
)
def test_compression(offer: str, options: dict[str, Any], agreed: str, squeezer: dict[str, Any]) -> None:
    kind = noted(compression=Deflate(threshold=50, **options))
    with websockets(kind) as server, Peer(server.address, "/", DEFLATE + offer) as peer:
        assert peer.header("Sec-WebSocket-Extensions") == f"permessage-deflate; {agreed}"
        other = Squeezer(**squeezer)
        for number, size in enumerate([1, 20, 5000, 300, 20, 300]):
            data = text_of(size, number)
            peer.send(frame(TEXT, other.pack(data), rsv=4))
            back = peer.get()
            assert back is not None
            assert back.rsv == (4 if len(data) >= 50 else 0), "by the threshold"
            assert (other.unpack(back.data) if back.rsv else back.data) == data
            if size == 5000:
                assert len(back.data) < len(data) / 3
        middle = other.pack(text_of(900, 9))
        peer.send(frame(BINARY, middle[:7], False, rsv=4), frame(PING), frame(CONT, middle[7:]))
        peer.expect(PONG, b"")
        back = peer.get()
        assert back is not None
        assert other.unpack(back.data) == text_of(900, 9)
        peer.send(frame(TEXT, b"not compressed"))
        peer.expect(TEXT, "not compressed")


@pytest.mark.parametrize(
    "offer",
    [
        "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=8",
        "Sec-WebSocket-Extensions: permessage-deflate; what=1",
        "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=16",
        "Sec-WebSocket-Extensions: x-webkit-deflate-frame",
    ],
)
def test_an_offer_that_cannot_be_met_is_declined(offer: str) -> None:
    with websockets(noted(compression=Deflate(threshold=0))) as server:
        with Peer(server.address, "/", offer) as peer:
            assert peer.header("Sec-WebSocket-Extensions") is None
            peer.text("plain")
            peer.expect(TEXT, "plain")
        with Peer(server.address, "/", f"{offer}, permessage-deflate") as peer:
            assert "permessage-deflate; server_no" in (peer.header("Sec-WebSocket-Extensions") or "")


def test_compression_is_not_offered_unless_wanted() -> None:
    with websockets() as server, Peer(server.address, "/", DEFLATE) as peer:
        assert peer.header("Sec-WebSocket-Extensions") is None


@pytest.mark.parametrize("parts", [1, 3])
def test_what_inflates_beyond_message_max_is_refused(parts: int) -> None:
    kind = noted(compression=Deflate(), message_max=1 << 20)
    packer = zlib.compressobj(9, wbits=-15)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush(zlib.Z_SYNC_FLUSH)
    bomb = bomb[:-4]
    assert len(bomb) < 1 << 20
    size = -(-len(bomb) // parts)
    cuts = [bomb[start : start + size] for start in range(0, len(bomb), size)]
    with websockets(kind) as server, Peer(server.address, "/", DEFLATE) as peer:
        for number, cut in enumerate(cuts):
            last = number == len(cuts) - 1
            peer.send(frame(CONT if number else BINARY, cut, last, rsv=0 if number else 4))
        frames = peer.frames()
        assert [got.code for got in frames] == [1009]
    assert first(kind).messages == []
    first(kind).check()


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x06"])
def test_what_does_not_inflate_is_a_protocol_error(data: bytes) -> None:
    with websockets(noted(compression=Deflate())) as server, Peer(server.address, "/", DEFLATE) as peer:
        peer.send(frame(TEXT, data, rsv=4))
        assert [got.code for got in peer.frames()] == [1002]


def test_compressed_text_is_checked_as_well() -> None:
    with websockets(noted(compression=Deflate())) as server, Peer(server.address, "/", DEFLATE) as peer:
        data = Squeezer().pack(b"good \xff")
        peer.send(frame(TEXT, data[:3], False, rsv=4))
        peer.send(frame(CONT, data[3:5], False), frame(CONT, data[5:]))
        assert [got.code for got in peer.frames()] == [1007]


@pytest.mark.parametrize("takeover", [False, True])
def test_fragments_that_are_sent(takeover: bool) -> None:
    """Streaming: others' messages wait for the last fragment, control frames do not."""
    kind = noted(compression=Deflate(threshold=0, takeover=takeover), echo=False)
    with websockets(kind) as server, Peer(server.address, "/", DEFLATE) as peer:
        websocket = first(kind)
        websocket.until("open")
        other = Squeezer(theirs=12, keep_theirs=takeover)
        for packs in (True, False):
            websocket.send_fragment("one ", compress=packs)
            websocket.ping(b"now")
            websocket.send("meanwhile", compress=False)
            websocket.send_fragment("")
            websocket.send_fragment("two", last=True)
            websocket.send("after")
            got = [peer.get() for _ in range(6)]
            assert [(one.opcode, one.fin) for one in got if one] == [
                (TEXT, False),
                (PING, True),
                (CONT, False),
                (CONT, True),
                (TEXT, True),
                (TEXT, True),
            ]
            parts = b"".join(one.data for one in got if one and not (one.fin and one.opcode))
            assert (got[0].rsv if got[0] else -1) == (4 if packs else 0)
            assert (other.unpack(parts) if packs else parts) == b"one two"
            assert got[4] == Frame(TEXT, b"meanwhile")
            assert got[5] is not None
            assert other.unpack(got[5].data) == b"after"
        websocket.send_fragment("text")
        with pytest.raises(TypeError, match="all text or all bytes"):
            websocket.send_fragment(b"bytes")
