"""_fileops.py: what may be sent, handles of our own, reading through the port, TransmitFile itself."""

from __future__ import annotations

import io
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support import handle_count, read_exactly
from test_sockops import Table

from iocp_ctypes import _fileops, _win32, _win32files
from iocp_ctypes._fileops import TRANSMIT_MAX, TransmitOperation, open_source
from iocp_ctypes._proactor import COMPLETED, PENDING, Operation

BYTES = bytes(range(256)) * 40
SIZE = len(BYTES)
ERROR_HANDLE_EOF = 38
STATUS_END_OF_FILE = 0xC0000011


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a file"
    made.write_bytes(BYTES)
    return made


@pytest.fixture
def table() -> Any:
    made = Table()
    yield made
    made.end()


def content(source: Any, table: Table) -> bytes:
    """Read all that is left, as a connection does."""
    if source.in_memory:
        data = source.peek(1 << 30)
        source.advance(len(data))
        return bytes(data)
    source.prepare(table.port)
    operation, parts = Operation(3000), []
    while source.left:
        size = min(3000, source.left)
        code = source.read(operation, lambda *_: None, table.proactor, size)
        if code == PENDING:
            done, transferred, status = table.next()
            assert (done, status) == (operation, 0)
        else:
            assert code == COMPLETED
            transferred = operation.InternalHigh
        assert transferred == size
        parts.append(operation.buffer[:transferred])
        source.advance(transferred)
    return b"".join(parts)


def opened_with_python(path: Path) -> Any:
    return open(path, "rb")


KINDS = {
    "str": str,
    "path": lambda path: path,
    "buffered": opened_with_python,
    "raw": lambda path: open(path, "rb", buffering=0),  # noqa: SIM115
    "update": lambda path: open(path, "r+b"),  # noqa: SIM115
    "memory": lambda path: io.BytesIO(path.read_bytes()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("offset", "count"), [(0, None), (1000, None), (1000, 7000), (0, 0), (SIZE, None), (SIZE, 0), (0, SIZE)]
)
def test_what_is_left_of_each_kind(path: Path, table: Table, kind: str, offset: int, count: Any) -> None:
    file = KINDS[kind](path)
    source = open_source(file, offset, count)
    if hasattr(file, "close"):
        file.close()
    expected = BYTES[offset:] if count is None else BYTES[offset : offset + count]
    assert source.left == len(expected)
    assert content(source, table) == expected
    assert source.left == 0
    source.close()
    source.close()


def test_the_position_of_a_file_object_neither_matters_nor_moves(path: Path, table: Table) -> None:
    with path.open("rb") as file:
        file.seek(77)
        source = open_source(file, 0, None)
        assert content(source, table) == BYTES
        assert file.tell() == 77
        assert file.read(3) == BYTES[77:80]
        source.close()


def test_of_what_is_in_memory_only_the_part_is_kept() -> None:
    whole = io.BytesIO(BYTES)
    source = open_source(whole, 7, 10)
    assert (source._data, source.left) == (BYTES[7:17], 10)
    source = open_source(whole, 0, None)
    assert source._data is whole.getvalue(), "it is not copied either"


def test_what_was_written_and_not_flushed_is_sent(path: Path, table: Table) -> None:
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"more")
        source = open_source(file, SIZE - 2, None)
        assert content(source, table) == BYTES[-2:] + b"more"
        source.close()


@pytest.mark.parametrize(
    ("offset", "count", "kind", "text"),
    [
        (-1, None, ValueError, "offset=-1: must be a whole number, 0 or more"),
        (SIZE + 1, None, ValueError, f"offset={SIZE + 1}: is beyond the end of "),
        (0, -1, ValueError, "count=-1: must be a whole number, 0 or more"),
        (0, SIZE + 1, ValueError, f"count={SIZE + 1}: from offset=0 on "),
        (SIZE, 1, ValueError, "has 0 bytes"),
        (1.0, None, TypeError, "offset=1.0: must be a whole number"),
        (True, None, TypeError, "offset=True: must be a whole number"),
        (None, None, TypeError, "offset=None: must be a whole number"),
        (0, "7", TypeError, "count='7': must be a whole number"),
        (0, False, TypeError, "count=False: must be a whole number"),
    ],
)
@pytest.mark.parametrize("memory", [False, True])
def test_wrong_parts(
    path: Path, offset: Any, count: Any, kind: type[Exception], text: str, memory: bool
) -> None:
    with pytest.raises(kind) as caught:
        open_source(io.BytesIO(BYTES) if memory else path, offset, count)
    assert text in str(caught.value)


@pytest.mark.parametrize("file", [None, 5, b"name", object(), [1], socket.socket], ids=repr)
def test_what_is_no_file_is_a_type_error(file: Any) -> None:
    if file is socket.socket:
        with socket.socket() as sock, pytest.raises(TypeError, match="must be a path, or a file object"):
            open_source(sock, 0, None)
    with pytest.raises(TypeError, match=r"^file=.*: must be a path, or a file object"):
        open_source(file, 0, None)


def test_a_file_in_text_mode_is_a_type_error(path: Path) -> None:
    with path.open(encoding="latin-1") as file, pytest.raises(TypeError, match="is in text mode"):
        open_source(file, 0, None)
    with pytest.raises(TypeError, match="is in text mode"):
        open_source(io.StringIO("text"), 0, None)


def test_a_file_that_has_no_file_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="has no file on disk"):
        open_source(io.BufferedReader(io.BytesIO(b"x")), 0, None)  # type: ignore[arg-type]


def test_files_that_cannot_be_sent(path: Path, tmp_path: Path) -> None:
    closed = path.open("rb")
    closed.close()
    with pytest.raises(ValueError, match="closed file"):
        open_source(closed, 0, None)
    with path.open("ab") as file, pytest.raises(ValueError, match="was not opened for reading"):
        open_source(file, 0, None)
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "nothing", 0, None)
    with pytest.raises(IsADirectoryError, match="a directory cannot be sent"):
        open_source(tmp_path, 0, None)
    reading, writing = os.pipe()
    with open(reading, "rb") as file, pytest.raises(ValueError, match="is not a file on disk"):
        open_source(file, 0, None)
    os.close(writing)
    for wrong in ("a\0b", "?" if not _win32.is_wine() else "a\0b"):
        with pytest.raises((ValueError, OSError)):
            open_source(wrong, 0, None)


def test_handles_are_closed_whatever_happens(path: Path, tmp_path: Path) -> None:
    def try_all() -> None:
        open_source(path, 0, None).close()
        with path.open("rb") as file:
            open_source(file, 5, None).close()
            for offset in (SIZE + 1, -1):
                with pytest.raises(ValueError, match="offset="):
                    open_source(file, offset, None)
        with pytest.raises(ValueError, match="count="):
            open_source(path, 0, SIZE + 1)
        with pytest.raises(OSError, match="directory"):
            open_source(tmp_path, 0, None)

    try_all()
    before = handle_count()
    for _ in range(20):
        try_all()
    assert handle_count() <= before + 3


def test_a_file_that_cannot_be_opened_again_is_sent_by_a_duplicate(
    path: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_win32files, "ReOpenFile", lambda *_: _win32.INVALID_HANDLE_VALUE)
    with path.open("rb") as file:
        source = open_source(file, 100, 5000)
    assert content(source, table) == BYTES[100:5100]
    source.close()


def test_the_position_does_not_matter_where_the_handle_is_a_duplicate_but_moves(
    path: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both handles are of one file object of the system, which has the position."""
    monkeypatch.setattr(_win32files, "ReOpenFile", lambda *_: _win32.INVALID_HANDLE_VALUE)
    with path.open("rb", buffering=0) as file:
        file.seek(77)
        source = open_source(file, 100, 5000)
        assert file.tell() == 77
        assert content(source, table) == BYTES[100:5100]
        assert file.tell() == 5100
        source.close()


def test_a_temporary_file_can_be_sent(table: Table) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(BYTES)
        source = open_source(file, 0, None)
    assert content(source, table) == BYTES
    source.close()


def test_reading_beyond_a_new_end_says_so(path: Path, table: Table) -> None:
    source = open_source(path, SIZE - 10, None)
    source.prepare(table.port)
    with path.open("r+b") as file:
        file.truncate(10)
    code = source.read(operation := Operation(100), lambda *_: None, table.proactor, 10)
    if code == PENDING:
        assert table.next() == (operation, 0, STATUS_END_OF_FILE)
    else:
        assert code == ERROR_HANDLE_EOF
    source.close()


# -- TransmitFile -------------------------------------------------------------------------------------------


def transmit(table: Table, sock: Any, source: Any, amount: int, head: bytes, tail: bytes) -> tuple[int, int]:
    """Transmit and see it through: bytes and status."""
    operation = TransmitOperation(source, amount, head, tail)
    assert operation.length == len(head) + amount + len(tail)
    code = sock.transmit(operation, lambda *_: None)
    if code == COMPLETED:
        return int(operation.InternalHigh), 0
    assert code == PENDING
    done, transferred, status = table.next()
    assert done is operation
    return transferred, status


@pytest.mark.parametrize(("head", "tail"), [(b"", b""), (b"head", b""), (b"", b"tail"), (b"h" * 3000, b"t")])
@pytest.mark.parametrize("again", [True, False])
def test_transmit(
    path: Path, table: Table, head: bytes, tail: bytes, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not again:
        monkeypatch.setattr(_win32files, "ReOpenFile", lambda *_: _win32.INVALID_HANDLE_VALUE)
    sock, peer = table.pair()
    assert sock.transmits
    with path.open("rb") as file:
        source = open_source(file, 300, 4000)
    assert transmit(table, sock, source, 4000, head, tail) == (len(head) + 4000 + len(tail), 0)
    source.close()
    assert read_exactly(peer, len(head) + 4000 + len(tail)) == head + BYTES[300:4300] + tail


def test_transmit_begins_beyond_four_gigabytes(tmp_path: Path, table: Table) -> None:
    big = tmp_path / "big"
    place = (1 << 32) + 12345
    with big.open("wb") as file:
        file.seek(place)  # a hole, where the file system has holes
        file.write(b"far away")
    source = open_source(big, place, None)
    assert source.left == 8
    sock, peer = table.pair()
    assert transmit(table, sock, source, 8, b"", b"") == (8, 0)
    assert read_exactly(peer, 8) == b"far away"
    assert content(source, table) == b"far away"
    source.close()


def test_a_transmit_that_is_cancelled_has_its_packet(path: Path, table: Table) -> None:
    sock, _peer = table.pair()
    with path.open("r+b") as file:
        file.truncate(50_000_000)
    source = open_source(path, 0, None)
    operation = TransmitOperation(source, source.left, b"", b"")
    assert sock.transmit(operation, lambda *_: None) == PENDING
    assert table.nothing_comes()
    while not (packet := table.next_within(50)):
        sock.cancel()  # again and again: Wine may lose it
    assert packet[0] is operation
    assert packet[2]
    source.close()


def test_the_largest_call_is_below_two_gigabytes() -> None:
    assert TRANSMIT_MAX == 2_147_483_646


def test_a_workstation_reads_instead(monkeypatch: pytest.MonkeyPatch, table: Table) -> None:
    """It transmits two files at a time in the whole system; Wine calls itself one and has no such limit."""
    monkeypatch.setattr(sys, "getwindowsversion", lambda: type("V", (), {"product_type": 1}))
    assert _win32files.is_workstation()
    monkeypatch.setattr(sys, "getwindowsversion", lambda: type("V", (), {"product_type": 3}))
    assert not _win32files.is_workstation()
    sock, _peer = table.pair()
    monkeypatch.setattr("iocp_ctypes._sockops.TRANSMITS_FREELY", False)
    assert not sock.transmits
    assert _win32.is_wine() <= _fileops.TRANSMITS_FREELY


def test_a_provider_without_transmitfile_is_read_for(monkeypatch: pytest.MonkeyPatch, table: Table) -> None:
    def has_none(*_: Any) -> Any:
        raise OSError("no")

    sock, _peer = table.pair()
    monkeypatch.setattr("iocp_ctypes._sockops._extension", has_none)
    assert sock.transmits is False
