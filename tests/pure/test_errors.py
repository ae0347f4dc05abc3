"""The table of failures, against what Microsoft's documents say, written down here a second time."""

from __future__ import annotations

import errno
import sys

import pytest

from iocp_ctypes import ConnectionClosedError, _errors
from iocp_ctypes._errors import TABLE, Failure, error_from_code, error_from_status, reason_of, winsock_code

# One line a Winsock code: the NTSTATUS values and Win32 codes that stand for it, the class of its exception,
# its errno, and why a connection ends by it.
EXPECTED: dict[int, tuple[set[int], set[int], type[OSError], str, str]] = {
    2: ({0xC0000034}, {2}, FileNotFoundError, "ENOENT", "refused"),
    109: ({0xC000014B}, {109}, BrokenPipeError, "EPIPE", "reset"),
    231: ({0xC00000AC, 0xC00000AE}, {231}, BlockingIOError, "EAGAIN", "refused"),
    232: ({0xC00000B1}, {232}, BrokenPipeError, "EPIPE", "reset"),
    233: ({0xC00000B0}, {233}, ConnectionResetError, "ECONNRESET", "reset"),
    995: ({0xC0000120}, set(), ConnectionAbortedError, "ECANCELED", "aborted"),
    10013: ({0xC0000022}, {5}, PermissionError, "EACCES", "aborted"),
    10014: ({0xC0000005}, {998}, OSError, "EFAULT", "aborted"),
    10022: ({0xC000000D}, {87}, OSError, "EINVAL", "aborted"),
    10024: (set(), {4}, OSError, "EMFILE", "aborted"),
    10035: (set(), set(), BlockingIOError, "EWOULDBLOCK", "aborted"),
    10038: ({0x8000000A, 0xC0000024}, {6}, ConnectionAbortedError, "ENOTSOCK", "aborted"),
    10040: ({0x80000005}, {234}, OSError, "EMSGSIZE", "aborted"),
    10048: ({0xC000020A, 0xC0000043}, set(), OSError, "EADDRINUSE", "aborted"),
    10049: ({0xC0000141}, {1214}, OSError, "EADDRNOTAVAIL", "aborted"),
    10051: ({0xC000023C}, {1231}, OSError, "ENETUNREACH", "timeout"),
    10053: ({0xC000013B, 0xC0000241}, {1236}, ConnectionAbortedError, "ECONNABORTED", "aborted"),
    10054: ({0xC000020D, 0xC000013C, 0xC000023F}, {64, 1234}, ConnectionResetError, "ECONNRESET", "reset"),
    10055: (
        {0xC000009A, 0xC0000017, 0xC0000044, 0xC000012D},
        {8, 1450, 1453, 1454, 1455, 1816},
        OSError,
        "ENOBUFS",
        "aborted",
    ),
    10057: ({0xC0000140, 0xC000020C}, {2250}, ConnectionResetError, "ENOTCONN", "reset"),
    10058: (set(), set(), BrokenPipeError, "EPIPE", "aborted"),
    10060: ({0xC00000B5}, {121}, TimeoutError, "ETIMEDOUT", "timeout"),
    10061: ({0xC0000236}, {1225}, ConnectionRefusedError, "ECONNREFUSED", "refused"),
    10065: ({0xC000023D}, {1232}, OSError, "EHOSTUNREACH", "timeout"),
}

STATUSES = [(status, winsock) for winsock, row in EXPECTED.items() for status in sorted(row[0])]
CODES = [(code, winsock) for winsock, row in EXPECTED.items() for code in sorted({winsock, *row[1]})]


def check_exception(exc: OSError, winsock: int, what: str = "") -> None:
    """Assert that an exception is the one of this Winsock code."""
    _statuses, _win32, kind, errno_name, _reason = EXPECTED[winsock]
    assert type(exc) is kind
    assert exc.errno == getattr(errno, errno_name)
    assert exc.winerror == winsock
    assert f"[WinError {winsock}] {what}" in str(exc)
    assert str(exc).count("WinError") == 1


def test_nothing_is_missing_in_the_table_and_nothing_in_the_test() -> None:
    assert {row.winsock for row in TABLE} == set(EXPECTED)
    for winsock, (statuses, win32, *_rest) in EXPECTED.items():
        rows = [row for row in TABLE if row.winsock == winsock]
        assert {status for row in rows for status in row.statuses} == statuses
        assert {code for row in rows for code in row.win32} == win32


@pytest.mark.parametrize(("status", "winsock"), STATUSES, ids=lambda number: f"{number:#x}")
def test_a_status_becomes_its_exception(status: int, winsock: int) -> None:
    assert winsock_code(status) == winsock
    check_exception(error_from_status(status), winsock)
    check_exception(error_from_status(status, "the call"), winsock, "the call: ")
    for same in (status - (1 << 32), status | (0xFFFFFFFF << 32)):  # signed, or sign-extended
        assert winsock_code(same) == winsock
        check_exception(error_from_status(same), winsock)


@pytest.mark.parametrize(("code", "winsock"), CODES)
def test_a_code_becomes_its_exception(code: int, winsock: int) -> None:
    check_exception(error_from_code(code), winsock)
    check_exception(error_from_code(code, "the call"), winsock, "the call: ")
    assert reason_of(code) == EXPECTED[winsock][4]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.winsock}-{row.errno_name}")
def test_a_row_comes_back_to_itself(row: Failure) -> None:
    for status in row.statuses:
        exc = error_from_status(status)
        assert type(error_from_code(exc.winerror)) is type(exc) is row.exception
        assert reason_of(winsock_code(status)) == row.reason
    for code in row.win32:
        assert error_from_code(code).winerror == row.winsock


def test_no_code_stands_in_two_rows_but_the_reset() -> None:
    statuses = [status for row in TABLE for status in row.statuses]
    assert len(statuses) == len(set(statuses))
    codes = [code for row in TABLE for code in {*row.win32, row.winsock}]
    assert [code for code in set(codes) if codes.count(code) > 1] == [10054]
    assert "reset" in error_from_code(10054).args[1], "10054 is a reset, not an unreachable port"


def test_each_winsock_code_has_one_class() -> None:
    classes: dict[int, set[type[OSError]]] = {}
    for row in TABLE:
        classes.setdefault(row.winsock, set()).add(row.exception)
    assert all(len(kinds) == 1 for kinds in classes.values()), classes


def test_every_row_has_an_errno_of_this_system_and_a_text() -> None:
    for row in TABLE:
        assert isinstance(getattr(errno, row.errno_name), int)
        assert row.text == row.text.strip() != ""
        assert not row.text.endswith(".")


def test_the_class_of_an_exception_is_what_python_makes_of_its_errno() -> None:
    # So `except ConnectionResetError` means the same whether the error came from here or from `socket`.
    exceptions = {
        "ECANCELED",
        "ENOTSOCK",
        "ENOTCONN",
    }  # ours are narrower than OSError: the connection is gone
    for row in TABLE:
        python = type(OSError(getattr(errno, row.errno_name), ""))
        if row.errno_name in exceptions:
            assert python is OSError
            assert issubclass(row.exception, ConnectionError)
        else:
            assert python is row.exception, row


@pytest.mark.parametrize("code", [1, 3, 317, 9999, 65535, 0xFFFFFFFF])
def test_an_unknown_code_is_told(code: int) -> None:
    exc = error_from_code(code, "the call")
    assert type(exc) is OSError
    assert (exc.errno, exc.winerror) == (errno.EIO, code)
    assert str(code) in str(exc)
    assert "the call" in str(exc)
    assert reason_of(code) == "aborted"


def test_an_unknown_status_is_told() -> None:
    exc = error_from_status(-0x3FFFFF0F & 0xFFFFFFFF, "the call")
    assert type(exc) is OSError
    assert exc.errno == errno.EIO
    assert not getattr(exc, "winerror", None)
    assert "0xC00000F1" in str(exc)
    assert "the call" in str(exc)
    assert winsock_code(0xC00000F1) == 0


def test_success_is_no_failure() -> None:
    assert winsock_code(_errors.STATUS_SUCCESS) == 0


def test_resource_codes_are_known_and_are_no_verdict_on_the_peer() -> None:
    for code in _errors.RESOURCE_CODES:
        assert error_from_code(code).winerror in {10055, 10035, 10024}
        assert reason_of(code) == "aborted"
    # Every code that means "short of buffers" is one of them, under whatever number it comes.
    for row in TABLE:
        if row.winsock in {10055, 10035, 10024}:
            assert {row.winsock, *row.win32} <= _errors.RESOURCE_CODES


def test_the_named_constants_are_the_documented_numbers() -> None:
    assert {name: value for name, value in vars(_errors).items() if name.startswith(("WSA", "ERROR_"))} == {
        "WSA_IO_PENDING": 997,
        "ERROR_OPERATION_ABORTED": 995,
        "ERROR_HANDLE_EOF": 38,
        "ERROR_BROKEN_PIPE": 109,
        "ERROR_PIPE_BUSY": 231,
        "ERROR_NO_DATA": 232,
        "ERROR_PIPE_CONNECTED": 535,
        "WSAENOTSOCK": 10038,
        "WSAEINVAL": 10022,
        "WSAEWOULDBLOCK": 10035,
        "WSAENOBUFS": 10055,
        "WSAEMFILE": 10024,
        "WSAEADDRINUSE": 10048,
        "WSAECONNRESET": 10054,
    }
    assert _errors.STATUS_CANCELLED == 0xC0000120


@pytest.mark.skipif(sys.platform != "win32", reason="errno has Winsock's codes on Windows only")
def test_the_named_constants_are_those_of_errno() -> None:
    for name, value in vars(_errors).items():
        if name.startswith("WSAE"):
            assert value == getattr(errno, name)


def test_a_closed_connection_is_a_connection_error() -> None:
    assert issubclass(ConnectionClosedError, ConnectionError)
    assert not issubclass(ConnectionClosedError, (ConnectionResetError, ConnectionAbortedError))
