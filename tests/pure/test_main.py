"""The command line's arguments: what is refused, and how it is said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from iocp_ctypes.__main__ import CLIENTS_MAX, SERVING, main
from iocp_ctypes._options import OPTIONS

ROOT = Path(__file__).resolve().parent.parent.parent


def ends(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Run the command line up to its end: the exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: COMMAND"),
        (["serve"], "'serve'"),
        (["echo", "demo"], "demo"),
        (["echo", "--port", "http"], "--port: 'http': must be a whole number from 0 to 65535"),
        (["echo", "--port", "65536"], "'65536'"),
        (["echo", "--port", "-1"], "'-1'"),
        (["echo", "--port", "²"], "'²'"),
        (["echo", "--port"], "--port"),
        (["echo", "--backlog", "0"], "backlog=0: must be a whole number from 1 to 10000"),
        (["echo", "--backlog", "many"], "backlog='many': must be a whole number from 1 to 10000"),
        (["echo", "--io-threads", "257"], "io_threads=257: must be a whole number from 0 to 256"),
        (["echo", "--work-threads", "1.5"], "work_threads='1.5'"),
        (["echo", "--processes", "0"], "processes=0: must be a whole number from 1 to 64"),
        (["echo", "--processes", "2", "--trace", "x"], "--trace: needs --processes 1"),
        (["wsgi", "shop:app", "--processes", "2"], "--processes"),
        (["echo", "--sendcap", "0"], "sendcap=0: must be a whole number from 1 to 1000"),
        (["echo", "--recv-mode", "fast"], "recv_mode='fast': must be one of 'auto', 'flow', 'zero-byte'"),
        (["echo", "--recvburst", "10001"], "recvburst=10001: must be a whole number from 1 to 10000"),
        (["echo", "--recv-mode", "7"], "recv_mode=7: must be one of"),
        (["echo", "--tls-key", "x.pem"], "--tls-key: is of no use without --tls-cert"),
        (["echo", "--tls-cert", "no-such.pem"], "--tls-cert: no-such.pem: No such file"),
        (["echo", "--tls-cert", __file__, "--tls-key", "no-such.pem"], "no-such.pem: No such file"),
        (["echo", "--tls-cert", __file__], "test_main.py: not a certificate and its key in PEM form: "),
        (["echo", "--stat"], "--stat"),
        (["websocket", "--backlog", "0"], "backlog=0: must be a whole number from 1 to 10000"),
        (["websocket", "--message-max", "5"], "--message-max"),
        (["demo", "--clients", "0"], f"'0': must be a whole number from 1 to {CLIENTS_MAX}"),
        (["demo", "--clients", str(CLIENTS_MAX + 1)], f"from 1 to {CLIENTS_MAX}"),
        (["demo", "--messages", "no"], "'no': must be a whole number"),
        (["demo", "--port", "1"], "--port"),
        (["http", "one", "two"], "two"),
        (["http", "--port", "x"], "--port: 'x'"),
        (["http", "--backlog", "0"], "backlog=0"),
        (["wsgi"], "MODULE:APP"),
        (["wsgi", "shop:app", "more"], "more"),
        (["wsgi", "shop:app", "--backlog", "0"], "backlog=0"),
        (["wsgi", "shop:app", "--tls-key", "x.pem"], "--tls-key: is of no use without --tls-cert"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    code, out, err = ends(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("python -m iocp_ctypes")
    assert told in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["echo", "--help"], ["http", "--help"], ["websocket", "--help"], ["demo", "--help"]],
)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = ends(capsys, *arguments)
    assert code == 0
    assert out.startswith("usage: python -m iocp_ctypes")
    assert err == ""


@pytest.mark.parametrize("command", ["echo", "http"])
def test_help_explains_every_option(capsys: pytest.CaptureFixture[str], command: str) -> None:
    _code, out, _err = ends(capsys, command, "--help")
    text = " ".join(out.split())
    for name in SERVING:
        assert f"--{name.replace('_', '-')} VALUE {OPTIONS[name].meaning}" in text


if sys.platform != "win32":  # what there is to see elsewhere

    @pytest.mark.parametrize("command", ["demo", "echo", "http", "websocket"])
    def test_off_windows_it_says_so(command: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "iocp_ctypes", command], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"python -m iocp_ctypes: error: iocp_ctypes needs Windows .*\n", done.stderr)
