"""TLS without sockets: two codecs against each other, ciphertext in any pieces; the write queue over it."""

from __future__ import annotations

import itertools
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from secure import TLS12, TLS13, certificate, client_context, no_verifying, server_context

from iocp_ctypes._flow import SEND_SLICE_MAX, Piece, WriteFlow
from iocp_ctypes.certificate import throwaway_certificate
from iocp_ctypes.tls import (
    BIO_MAX,
    RECORD_EXTRA_MAX,
    RECORD_MAX,
    Handshake,
    SecureFlow,
    TLSCodec,
    check_context,
    context_of_files,
    truncated,
)

VERSIONS = {"1.2": TLS12, "1.3": TLS13}
#: One context a side for all tests that need nothing special: making one takes milliseconds.
SERVERS = {version: server_context(**limits) for version, limits in VERSIONS.items()}
CLIENTS = {version: client_context(**limits) for version, limits in VERSIONS.items()}


def codecs(version: str = "1.3") -> tuple[TLSCodec, TLSCodec]:
    """A client and a server that have not begun."""
    client = TLSCodec(CLIENTS[version], server_side=False, server_hostname="localhost")
    return client, TLSCodec(SERVERS[version], server_side=True)


def carry(*pair: TLSCodec) -> None:
    """Carry the handshake, and what else is to be said, to and fro until both are quiet."""
    moved = True
    while moved:
        moved = False
        for one, other in (pair, pair[::-1]):
            one.handshake()
            if data := one.output():
                other.feed(data)
                moved = True


def connected(version: str = "1.3") -> tuple[TLSCodec, TLSCodec]:
    """A client and a server whose handshake is complete."""
    pair = codecs(version)
    carry(*pair)
    assert pair[0].shaken
    assert pair[1].shaken
    return pair


def written(codec: TLSCodec, data: bytes) -> bytes:
    """Encrypt all of it; return the ciphertext."""
    out = []
    for start in range(0, len(data), RECORD_MAX):
        part = data[start : start + RECORD_MAX]
        assert codec.write(part) == len(part)
        out.append(codec.output())
    return b"".join(out)


def read_all(codec: TLSCodec, most: int = 1 << 20) -> bytes:
    """Read what there is."""
    parts = []
    while (part := codec.read(most)) is not None:
        assert 0 < len(part) <= most
        parts.append(part)
    return b"".join(parts)


@pytest.fixture(params=sorted(VERSIONS))
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- the handshake -------------------------------------------------------------------------------------------


def test_a_handshake_and_a_message_each_way(version: str) -> None:
    client, server = connected(version)
    assert client.object.version() == server.object.version() == f"TLSv{version}"
    for one, other in ((client, server), (server, client)):
        assert one.read(100) is None
        other.feed(written(one, b"hello"))
        assert other.spoken is False
        assert other.read(100) == b"hello"
        assert other.spoken is True
        assert other.read(100) is None
        assert not other.more
        assert not other.ended


SIZES = st.integers(1, 30) | st.integers(1, 40_000)


@settings(deadline=None, max_examples=60)
@given(
    version=st.sampled_from(sorted(VERSIONS)),
    lengths=st.tuples(st.integers(0, 60_000), st.integers(0, 60_000)),
    sizes=st.lists(SIZES, min_size=1, max_size=12),
)
def test_it_does_not_matter_in_which_pieces_ciphertext_comes(
    version: str, lengths: tuple[int, int], sizes: list[int]
) -> None:
    pair = codecs(version)
    wires = [bytearray(), bytearray()]  # to the client, to the server
    says = [bytes([65 + number]) * length for number, length in enumerate(lengths)]
    got = [b"", b""]
    pieces = itertools.cycle(sizes)
    for _ in range(200_000):
        for number, codec in enumerate(pair):
            wire, size = wires[number], next(pieces)
            codec.feed(bytes(wire[:size]))
            del wire[:size]
            if codec.handshake():
                while (part := codec.read(max(200, next(pieces)))) is not None:
                    got[number] += part
                if not codec.closed:
                    wires[1 - number] += written(codec, says[number])
                    codec.close()
            wires[1 - number] += codec.output()
        if pair[0].ended and pair[1].ended:
            break
    assert not any(wires)
    assert got == says[::-1]


def test_what_came_with_the_handshakes_last_message_is_read(version: str) -> None:
    client, server = codecs(version)
    while not client.handshake():
        server.feed(client.output())
        server.handshake()
        client.feed(server.output())
    server.feed(client.output() + written(client, b"early"))
    assert server.handshake()
    assert server.more
    assert server.read(10) == b"early"


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(5), b"\x16\x03\x01\x02\x00" + b"x" * 512]
)
def test_what_is_no_tls_fails_the_handshake(data: bytes) -> None:
    _client, server = codecs()
    server.feed(data)
    with pytest.raises(ssl.SSLError):
        server.handshake()
    assert not server.shaken


def test_a_certificate_of_another_name_is_refused_and_the_server_is_told(version: str) -> None:
    client = TLSCodec(CLIENTS[version], server_side=False, server_hostname="example.org")
    server = TLSCodec(SERVERS[version], server_side=True)
    client.handshake()
    server.feed(client.output())
    server.handshake()
    client.feed(server.output())
    with pytest.raises(ssl.SSLCertVerificationError):
        client.handshake()
    server.feed(client.output())
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        server.handshake()


def test_alpn_and_sni() -> None:
    asked: list[Any] = []
    first, second = server_context("one.example"), server_context("two.example")
    for context in (first, second):
        context.set_alpn_protocols(["h2", "http/1.1"])

    def choose(tls: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        asked.append(name)
        if name == "two.example":
            tls.context = second

    first.sni_callback = choose
    for name in ("one.example", "two.example"):
        context = client_context(name)
        context.set_alpn_protocols(["http/1.1"])
        client = TLSCodec(context, server_side=False, server_hostname=name)
        server = TLSCodec(first, server_side=True)
        carry(client, server)
        assert client.object.selected_alpn_protocol() == server.object.selected_alpn_protocol() == "http/1.1"
    assert asked == ["one.example", "two.example"]


def test_client_certificates(version: str) -> None:
    guest = certificate("guest.example")
    server = server_context(verify_mode=ssl.CERT_REQUIRED, **VERSIONS[version])
    server.load_verify_locations(cadata=guest.certificate)
    known = client_context(**VERSIONS[version])
    guest.load_into(known)
    pair = (
        TLSCodec(known, server_side=False, server_hostname="localhost"),
        TLSCodec(server, server_side=True),
    )
    carry(*pair)
    names = pair[1].object.getpeercert()["subject"]  # type: ignore[index]
    assert (("commonName", "guest.example"),) in names
    nobody = TLSCodec(CLIENTS[version], server_side=False, server_hostname="localhost")
    with pytest.raises(ssl.SSLError, match=r"(?i)not return a certificate|required|alert"):
        carry(nobody, TLSCodec(server, server_side=True))


def test_a_session_is_resumed(version: str) -> None:
    client, server = connected(version)
    client.feed(written(server, b"tickets come before this"))
    assert client.read(100)
    session = client.object.session
    assert session is not None
    assert not client.object.session_reused
    again = TLSCodec(CLIENTS[version], server_side=False, server_hostname="localhost", session=session)
    carry(again, TLSCodec(SERVERS[version], server_side=True))
    assert again.object.session_reused


# -- reading -------------------------------------------------------------------------------------------------


def test_no_more_is_read_than_asked_for_and_the_bio_stays_small(version: str) -> None:
    client, server = connected(version)
    data = bytes(range(256)) * 4096
    server.feed(written(client, data))
    got = b""
    while len(got) < len(data):
        assert server._incoming.pending <= BIO_MAX
        assert server.more
        part = server.read(1000)
        assert part is not None
        assert 0 < len(part) <= 1000
        got += part
    assert got == data
    assert server.read(1) is None
    assert not server.more


def test_a_bad_record_is_told_after_the_good_ones(version: str) -> None:
    client, server = connected(version)
    good, bad = written(client, b"good"), bytearray(written(client, b"evil"))
    bad[-1] ^= 1
    server.feed(good + bytes(bad))
    assert server.read(100) == b"good"
    assert server.more
    with pytest.raises(ssl.SSLError, match=r"(?i)bad.record.mac|decrypt"):
        server.read(100)
    client.feed(server.output())
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        client.read(100)


def test_the_end_is_told_apart_from_a_pause(version: str) -> None:
    client, server = connected(version)
    wire = written(client, b"last words")
    client.close()
    wire += client.output()
    server.feed(wire[:-1])
    assert server.read(100) == b"last words"
    assert server.read(100) is None
    assert not server.ended
    server.feed(wire[-1:])
    assert server.read(100) is None
    assert server.ended
    assert isinstance(truncated(), ssl.SSLEOFError)
    assert isinstance(truncated(), OSError)


@pytest.mark.parametrize("unread", [0, 10, 20_000, 100_000])
def test_half_close_with_plaintext_unread(version: str, unread: int) -> None:
    client, server = connected(version)
    before = bytes(range(250)) * (unread // 250 + 1)
    client.feed(written(server, before))
    first = client.read(7) if unread else b""
    client.close()
    client.close()  # again is a no-op
    server.feed(client.output())
    assert server.read(10) is None
    assert server.ended
    client.feed(written(server, b"and more"))
    assert first is not None
    assert first + read_all(client, 5000) == before + b"and more"
    server.close()
    client.feed(server.output())
    assert client.read(10) is None
    assert client.ended


def test_close_before_the_handshake_says_nothing() -> None:
    client, server = codecs()
    for codec in (client, server):
        codec.close()
        assert codec.output() == b""
        assert not codec.closed
    carry(client, server)
    client.close()
    assert client.closed


# -- against another program ---------------------------------------------------------------------------------

OPENSSL = shutil.which("openssl")


class Peer:
    """`openssl s_server`, told by its stdin to renew keys or to renegotiate; what it says, in `said`."""

    def __init__(self, tmp_path: Path, *options: str) -> None:
        made = throwaway_certificate()
        (tmp_path / "pair.pem").write_text(made.key + made.certificate)
        command = [str(OPENSSL), "s_server", "-accept", "127.0.0.1:0", "-cert", str(tmp_path / "pair.pem")]
        self.process = subprocess.Popen(
            [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.said = b""
        self.port = 0
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()
        found = self.wait_for(rb"ACCEPT [^\s:]+:(\d+)")
        self.sock = socket.create_connection(("127.0.0.1", int(found[1])), timeout=10)

    def listen(self) -> None:
        assert self.process.stdout is not None
        while data := self.process.stdout.read1():  # type: ignore[attr-defined]
            with self.changed:
                self.said += data
                self.changed.notify_all()

    def wait_for(self, pattern: bytes) -> re.Match[bytes]:
        with self.changed:
            assert self.changed.wait_for(lambda: re.search(pattern, self.said), 20), self.said
        found = re.search(pattern, self.said)
        assert found
        return found

    def tell(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.sock.close()
        self.process.kill()
        self.process.wait()
        self.thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def peer(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Peer, TLSCodec]]:
    """The program and a codec whose handshake with it is complete."""
    made = Peer(tmp_path, *request.param.split())
    try:
        codec = TLSCodec(no_verifying(), server_side=False)
        while not codec.handshake():
            made.sock.sendall(codec.output())
            codec.feed(made.sock.recv(65536))
        made.sock.sendall(codec.output())
        yield made, codec
    finally:
        made.end()


def hear(made: Peer, codec: TLSCodec, expected: bytes) -> None:
    """Receive, and answer what TLS asks for, until the plaintext has come."""
    got = b""
    while expected not in got:
        codec.feed(made.sock.recv(65536))
        got += read_all(codec)
        made.sock.sendall(codec.output())


@pytest.mark.skipif(OPENSSL is None, reason="the only peer that renews keys at will is the program openssl")
@pytest.mark.parametrize("peer", ["-tls1_3 -num_tickets 0"], indirect=True)  # none comes first
def test_keys_are_renewed_when_the_peer_asks(peer: tuple[Peer, TLSCodec]) -> None:
    made, codec = peer
    for number in range(3):
        made.tell(b"K")  # a KeyUpdate that asks for one in return; what came with it would be ignored
        codec.feed(made.sock.recv(65536))
        assert codec.read(100) is None
        made.tell(b"number %d" % number)
        hear(made, codec, b"number %d" % number)
        made.sock.sendall(written(codec, b"answer %d\n" % number))
        made.wait_for(b"answer %d" % number)


@pytest.mark.skipif(OPENSSL is None, reason="the only peer that renegotiates at will is the program openssl")
@pytest.mark.parametrize("peer", ["-tls1_2"], indirect=True)
def test_writing_waits_while_the_peer_renegotiates(peer: tuple[Peer, TLSCodec]) -> None:
    made, codec = peer
    flow = SecureFlow()
    flow.codec = codec
    flow.open()
    made.tell(b"R")  # a HelloRequest
    while not codec._outgoing.pending:
        codec.feed(made.sock.recv(65536))
        assert codec.read(100) is None
    flow.push_wire(codec.output())
    flow.push(b"it was ")
    flow.push(b"said meanwhile\n")

    def send() -> None:
        while flow.queued and (pieces := flow.take()[0]):
            made.sock.sendall(bytes_of(pieces))

    send()  # our ClientHello, then nothing: the peer's part is still to come
    assert flow.blocked
    assert flow.queued == flow.secret == 22
    assert flow.take() == ([], 0)
    while flow.queued:
        codec.feed(made.sock.recv(65536))
        codec.read(100)
        flow.push_wire(codec.output())
        send()
    assert not flow.blocked
    made.wait_for(b"it was said meanwhile")


# -- the write queue -----------------------------------------------------------------------------------------


def bytes_of(pieces: list[Piece]) -> bytes:
    return b"".join(data[start:stop] for data, start, stop in pieces)


class Rot13:
    """A codec in which one can read what goes out: each record is its plaintext, marked by brackets."""

    def __init__(self) -> None:
        self.out = b""
        self.blocked = False
        self.error: OSError | None = None
        self.records: list[int] = []

    def write(self, data: bytes | memoryview) -> int:
        if self.error:
            raise self.error
        if self.blocked:
            return 0
        self.records.append(len(data))
        self.out += b"[" + bytes(data) + b"]"
        return len(data)

    def output(self) -> bytes:
        out, self.out = self.out, b""
        return out


def secure(before: WriteFlow | None = None) -> tuple[SecureFlow, Rot13]:
    flow = SecureFlow(before)
    codec: Any = Rot13()
    flow.codec = codec
    return flow, codec


def test_nothing_goes_to_the_kernel_uncounted() -> None:
    flow, _codec = secure()
    assert flow.at_once_max == 0
    flow.push(b"plain")
    assert (flow.queued, flow.size) == (0, 5)
    flow.push_wire(b"hello")
    assert (flow.queued, flow.size) == (5, 10)
    assert flow.take() == ([Piece(b"hello", 0, 5)], 5)
    assert (flow.queued, flow.size) == (0, 5)
    flow.open()
    assert (flow.queued, flow.size) == (5, 5)
    assert flow.take() == ([Piece(b"[plain]", 0, 7)], 7)
    assert (flow.queued, flow.size) == (0, 0)


def test_what_was_queued_before_goes_first_and_in_the_clear() -> None:
    plain = WriteFlow()
    plain.push(b"220 ready\r\n")
    plain.in_flight, plain.sends = 3, 1
    flow, _codec = secure(plain)
    flow.push(b"secret")
    flow.push_wire(b"<hello>")
    assert (flow.size, flow.sends) == (11 + 3 + 6 + 7, 1)
    flow.open()
    assert bytes_of(flow.take()[0]) == b"220 ready\r\n<hello>"
    assert bytes_of(flow.take()[0]) == b"[secret]"


def test_small_pieces_share_records_and_large_ones_are_not_copied() -> None:
    flow, codec = secure()
    flow.open()
    for _ in range(1000):
        flow.push(b"0123456789")
    pieces, length = flow.take()
    assert codec.records == [10_000]
    assert length == 10_002
    codec.records.clear()
    flow.push(bytes(100_000))
    flow.push(b"tail")
    pieces, length = flow.take()
    assert codec.records == [RECORD_MAX] * 6 + [100_004 - 6 * RECORD_MAX]
    assert length == sum(stop - start for _data, start, stop in pieces) == 100_004 + 14


def test_one_send_takes_no_more_than_a_slice() -> None:
    flow, _codec = secure()
    flow.open()
    flow.push(bytes(1_000_000))
    sent = 0
    while flow.queued:
        _pieces, length = flow.take()
        assert 0 < length <= SEND_SLICE_MAX
        assert length > SEND_SLICE_MAX - RECORD_MAX - RECORD_EXTRA_MAX or not flow.queued
        sent += length
    assert sent > 1_000_000


def test_a_failure_is_kept_and_nothing_is_taken() -> None:
    flow, codec = secure()
    flow.open()
    flow.push(b"x")
    codec.error = ssl.SSLError("no more")
    codec.out = b"alert"
    assert flow.take() == ([Piece(b"alert", 0, 5)], 5)
    assert flow.take() == ([], 0)
    assert flow.error is codec.error
    flow.drop_plain()
    assert (flow.queued, flow.secret, flow.lost) == (0, 0, True)


def test_lost_tells_whether_anything_was_forgotten() -> None:
    for flow in (WriteFlow(), SecureFlow()):
        flow.clear()
        assert not flow.lost
        flow.push(b"x")
        flow.clear()
        assert flow.lost
        assert flow.size == 0
    flow = WriteFlow()
    flow.in_flight = 1
    flow.clear()
    assert flow.lost


class SecureMachine(RuleBasedStateMachine):
    """A SecureFlow against a list of what is to come out."""

    HIGH, LOW = 60, 20

    def __init__(self) -> None:
        super().__init__()
        self.flow, self.codec = secure()
        self.plain = b""  # pushed and not seen in a record yet
        self.wire = b""  # pushed as it is, or put back, and not taken yet
        self.above = False

    def unbracketed(self, data: bytes) -> bytes:
        assert re.fullmatch(rb"(\[[a-z]+\])+", data), data
        return data.replace(b"[", b"").replace(b"]", b"")

    @rule(data=st.binary(min_size=1, max_size=40).map(lambda data: bytes(97 + byte % 26 for byte in data)))
    def push(self, data: bytes) -> None:
        self.flow.push(data)
        self.plain += data
        self.above = self.above or self.flow.size > self.HIGH
        assert self.flow.mark(self.HIGH) is (not self.above)

    @rule(data=st.sampled_from([b"<hello>", b"<finished>"]))
    def push_wire(self, data: bytes) -> None:
        self.flow.push_wire(data)
        self.wire += data

    @precondition(lambda self: not self.flow.is_open)
    @rule()
    def open(self) -> None:
        self.flow.open()

    @rule(blocked=st.booleans())
    def block(self, blocked: bool) -> None:
        self.codec.blocked = blocked

    @precondition(lambda self: self.flow.queued)
    @rule(most=st.integers(1, 100), back=st.integers(0, 30))
    def take(self, most: int, back: int) -> None:
        pieces, length = self.flow.take(most)
        data = bytes_of(pieces)
        assert len(data) == length
        if self.wire:
            assert data
            assert self.wire.startswith(data)
            self.wire = self.wire[len(data) :]
        elif self.codec.blocked:
            assert not data
            assert self.flow.blocked
        else:
            plain = self.unbracketed(data)
            assert self.plain.startswith(plain)
            self.plain = self.plain[len(plain) :]
        if back and data:  # a part of it was not sent
            kept = max(0, len(data) - back)
            self.flow.push_front(pieces, kept)
            self.wire = data[kept:] + self.wire
        self.above = self.above and not self.flow.relieved(self.LOW)

    @invariant()
    def counts(self) -> None:
        assert self.flow.secret == len(self.plain)
        assert self.flow.size == len(self.plain) + len(self.wire)
        assert self.flow.queued == len(self.wire) + (len(self.plain) if self.flow.is_open else 0)
        assert self.flow.above is self.above


TestSecureFlow = SecureMachine.TestCase


# -- arguments -----------------------------------------------------------------------------------------------


def test_a_context_must_fit_its_side() -> None:
    server, client = SERVERS["1.3"], CLIENTS["1.3"]
    assert check_context("tls", server, True) is server
    assert check_context("tls", client, False) is client
    with pytest.raises(ValueError, match=r"^tls=.*: is for the server side; this is the client"):
        check_context("tls", server, False)
    with pytest.raises(ValueError, match=r"^context=.*: is for the client side; this is the server"):
        check_context("context", client, True)
    with pytest.raises(TypeError, match=r"^tls=True: must be an ssl.SSLContext"):
        check_context("tls", True, True)


def test_a_context_of_files(tmp_path: Path) -> None:
    one, other = certificate(), certificate("other.example")
    (tmp_path / "cert.pem").write_text(one.certificate)
    (tmp_path / "key.pem").write_text(one.key)
    (tmp_path / "both.pem").write_text(one.key + one.certificate)
    (tmp_path / "other.pem").write_text(other.key)
    cert, key, both = (str(tmp_path / f"{name}.pem") for name in ("cert", "key", "both"))
    for context in (context_of_files(cert, key), context_of_files(both, None)):
        client = TLSCodec(CLIENTS["1.3"], server_side=False, server_hostname="localhost")
        carry(client, TLSCodec(context, server_side=True))
    for files, reason in (
        ((cert, None), "PEM"),
        ((cert, str(tmp_path / "other.pem")), "KEY_VALUES_MISMATCH"),
        ((str(tmp_path / "none.pem"), key), "No such file"),
        ((cert, str(tmp_path)), "."),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            context_of_files(*files)
        assert "\n" not in str(caught.value)


PROTECTED = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAg9sdKq0rhYLwICCAAw
-----END ENCRYPTED PRIVATE KEY-----
"""


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text(certificate().certificate)
    (tmp_path / "key.pem").write_text(PROTECTED)
    with pytest.raises(ValueError, match=r"cert.pem.*key.pem: "):
        context_of_files(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))


def test_a_client_that_verifies_names_needs_one() -> None:
    with pytest.raises(ValueError, match="check_hostname"):
        TLSCodec(CLIENTS["1.3"], server_side=False, server_hostname="")


def test_a_handshake_begins_without_a_limit_or_calls() -> None:
    begun = Handshake(first=True)
    assert (begun.first, begun.due, begun.pause, begun.calls) == (True, None, False, [])
