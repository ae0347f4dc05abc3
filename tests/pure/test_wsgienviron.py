"""The environ: what a request says in it, whom X-Forwarded fields are believed from, and wsgi.errors."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from iocp_ctypes import _wsgienviron as module
from iocp_ctypes._httpmessage import Request
from iocp_ctypes._wsgienviron import ERROR_LINE_MAX, Environs, ErrorLog

LOCAL = ("10.0.0.9", 8000)


def environ_of(
    target: str = "/",
    *headers: tuple[bytes, bytes],
    client: str = "192.0.2.7",
    environs: Environs | None = None,
    secure: bool = False,
    length: int = 0,
    **attributes: Any,
) -> dict[str, Any]:
    request = Request("GET", target, list(headers), client=(client, 50_000))
    for name, value in attributes.items():
        setattr(request, name, value)
    return (environs or Environs()).make(request, LOCAL, secure, io.BytesIO(), length)


def test_what_a_request_says() -> None:
    environ = environ_of("/a%20b/%C3%BC%2Fx?q=1&r=%20", (b"host", b"example"), (b"x-two-words", b"\xe9"))
    assert environ["PATH_INFO"] == "/a b/\xc3\xbc/x"
    assert environ["PATH_INFO"].encode("latin-1").decode() == "/a b/ü/x"
    assert environ["QUERY_STRING"] == "q=1&r=%20"
    assert environ["REQUEST_URI"] == "/a%20b/%C3%BC%2Fx?q=1&r=%20"
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("10.0.0.9", "8000")
    assert (environ["REMOTE_ADDR"], environ["REMOTE_PORT"]) == ("192.0.2.7", "50000")
    assert environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    assert environ["HTTP_X_TWO_WORDS"] == "\xe9"
    assert environ["HTTP_HOST"] == "example"
    assert (environ["wsgi.multithread"], environ["wsgi.multiprocess"], environ["wsgi.run_once"]) == (
        True,
        False,
        False,
    )
    assert environ_of(environs=Environs(several=True))["wsgi.multiprocess"] is True
    assert environ["wsgi.version"] == (1, 0)
    assert environ["wsgi.url_scheme"] == "http"
    assert environ_of(secure=True)["wsgi.url_scheme"] == "https"
    assert type(environ) is dict


def test_the_body_is_as_long_as_it_came() -> None:
    assert "CONTENT_LENGTH" not in environ_of()
    assert environ_of("/", (b"content-length", b"0"))["CONTENT_LENGTH"] == "0"
    chunked = environ_of("/", (b"transfer-encoding", b"chunked"), (b"content-type", b"text/x"), length=7)
    assert (chunked["CONTENT_LENGTH"], chunked["CONTENT_TYPE"]) == ("7", "text/x")
    assert not {"HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE", "HTTP_TRANSFER_ENCODING", ""} & set(chunked)


def test_the_user_whom_a_guard_found() -> None:
    assert environ_of(user="Ann")["REMOTE_USER"] == "Ann"
    assert "REMOTE_USER" not in environ_of()


def test_options_of_the_whole_server() -> None:
    assert environ_of("*")["PATH_INFO"] == ""


@pytest.mark.parametrize(
    ("target", "path"),
    [("/shop", ""), ("/shop/a", "/a"), ("/shops", "/shops"), ("/other", "/other"), ("/sh%6Fp/x", "/x")],
)
def test_the_script_name_is_taken_from_the_path(target: str, path: str) -> None:
    environ = environ_of(target, environs=Environs(script_name="/shop"))
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("/shop", path)


def test_a_script_name_beyond_ascii() -> None:
    environ = environ_of("/%C3%BC/a", environs=Environs(script_name="/ü"))
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("/\xc3\xbc", "/a")


def test_fields_with_underscores_do_not_pass_for_others() -> None:
    environ = environ_of("/", (b"x_forwarded_for", b"1.2.3.4"), (b"x_real", b"1"), client="10.1.1.1")
    assert not [name for name in environ if name.startswith("HTTP_")]


FORWARDED = (
    (b"x-forwarded-for", b"203.0.113.5, 10.1.1.2"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-host", b"shop.example"),
    (b"host", b"inside:8000"),
)


def test_nobody_is_believed_by_default() -> None:
    environ = environ_of("/", *FORWARDED, client="10.1.1.1")
    assert environ["REMOTE_ADDR"] == "10.1.1.1"
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["HTTP_HOST"] == "inside:8000"
    assert not [name for name in environ if "FORWARDED" in name]


def test_trusted_proxies_are_believed_and_others_are_not() -> None:
    environs = Environs(["10.0.0.0/8", "::1"])
    environ = environ_of("/", *FORWARDED, client="10.1.1.1", environs=environs)
    assert environ["REMOTE_ADDR"] == "203.0.113.5"
    assert "REMOTE_PORT" not in environ
    assert environ["wsgi.url_scheme"] == "https"
    assert environ["HTTP_HOST"] == environ["SERVER_NAME"] == "shop.example"
    assert environ["SERVER_PORT"] == "443"
    assert environ_of("/", *FORWARDED, client="::1", environs=environs)["REMOTE_ADDR"] == "203.0.113.5"
    environ = environ_of("/", *FORWARDED, client="192.0.2.1", environs=environs)
    assert environ["REMOTE_ADDR"] == "192.0.2.1"
    assert not [name for name in environ if "FORWARDED" in name]


@pytest.mark.parametrize(
    ("hops", "client"),
    [
        (b"198.51.100.1, 203.0.113.5", "203.0.113.5"),  # the first one is what the peer itself wrote
        (b"203.0.113.5, 10.1.1.2, 10.1.1.3", "203.0.113.5"),
        (b"10.1.1.2", "10.1.1.2"),
        (b"unknown", "10.1.1.1"),
        (b"203.0.113.5, unknown, 10.1.1.2", "10.1.1.2"),
        (b"203.0.113.5:4711", "203.0.113.5"),
        (b"[2001:db8::5]:4711", "2001:db8::5"),
        (b"2001:db8::5", "2001:db8::5"),
        (b"", "10.1.1.1"),
        (b",,,", "10.1.1.1"),
    ],
)
def test_the_client_is_the_last_that_is_no_proxy(hops: bytes, client: str) -> None:
    environs = Environs(["10.0.0.0/8"])
    environ = environ_of("/", (b"x-forwarded-for", hops), client="10.1.1.1", environs=environs)
    assert environ["REMOTE_ADDR"] == client


@pytest.mark.parametrize(
    ("host", "name", "port"),
    [
        (b"evil.example, shop.example:81", "shop.example", "81"),
        (b"[2001:db8::1]", "[2001:db8::1]", "80"),
        (b"a b", "10.0.0.9", "8000"),
        (b"x/../y", "10.0.0.9", "8000"),
        (b"", "10.0.0.9", "8000"),
    ],
)
def test_the_host_that_a_proxy_was_asked_for(host: bytes, name: str, port: str) -> None:
    environs = Environs(["10.0.0.0/8"])
    environ = environ_of(
        "/",
        (b"x-forwarded-host", host),
        (b"x-forwarded-proto", b"gopher"),
        client="10.1.1.1",
        environs=environs,
    )
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == (name, port)
    assert environ["wsgi.url_scheme"] == "http"


@pytest.mark.parametrize("script_name", ["shop", "/", "/shop/", "//", "/a//b", "/a?b", "/a\r\nb", "/a b"])
def test_script_names_that_are_none(script_name: str) -> None:
    with pytest.raises(ValueError, match="script_name="):
        Environs(script_name=script_name)


def test_arguments_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="script_name=None"):
        Environs(script_name=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="several networks"):
        Environs("10.0.0.0/8")
    with pytest.raises(ValueError, match="office"):
        Environs(["office"])


def test_lines_of_wsgi_errors_are_records_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    errors = ErrorLog()
    assert errors.write("one\ntw") == 6
    errors.writelines(["o\n", "\n", "three"])
    assert [record.getMessage() for record in caplog.records] == ["one", "two"]
    errors.flush()
    errors.flush()
    assert [record.getMessage() for record in caplog.records] == ["one", "two", "three"]
    assert {(record.name, record.levelno) for record in caplog.records} == {
        ("iocp_ctypes.wsgi", logging.ERROR)
    }
    with pytest.raises(TypeError, match="bytes"):
        errors.write(b"x")  # type: ignore[arg-type]


def test_an_endless_line_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    errors = ErrorLog()
    errors.write("x" * ERROR_LINE_MAX)
    assert not caplog.records
    errors.write("x")
    assert len(caplog.records[0].getMessage()) == ERROR_LINE_MAX + 1


def test_a_log_that_writes_to_wsgi_errors_does_not_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, stderr = ErrorLog(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    handler = logging.StreamHandler(errors)  # type: ignore[type-var]
    module.log.addHandler(handler)
    try:
        errors.write("once\n")
        errors.flush()
    finally:
        module.log.removeHandler(handler)
    assert stderr.getvalue() == "once\n"
