"""The throw-away certificate: for whom it is, how long, who trusts it, and that it leaves no file."""

from __future__ import annotations

import ctypes
import ssl
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from iocp_ctypes import certificate
from iocp_ctypes.certificate import DAYS_MAX, Throwaway, throwaway_certificate


def told(made: Throwaway, tmp_path: Path) -> dict[str, Any]:
    """What OpenSSL reads in a certificate."""
    (tmp_path / "cert.pem").write_text(made.certificate)
    decode: Any = vars(ssl)["_ssl"]._test_decode_cert
    decoded: dict[str, Any] = decode(str(tmp_path / "cert.pem"))
    return decoded


def shakes_hands(made: Throwaway, client: ssl.SSLContext, name: str) -> None:
    """Complete a handshake between a server with the certificate and a client."""
    bios = [ssl.MemoryBIO() for _ in range(4)]
    sides = [
        client.wrap_bio(bios[0], bios[1], server_hostname=name),
        made.server_context().wrap_bio(bios[1], bios[0], server_side=True),
    ]
    done = 0
    while done < 2:
        done = 0
        for side in sides:
            try:
                side.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                continue


def test_it_is_for_this_machine_unless_names_are_given(tmp_path: Path) -> None:
    assert told(throwaway_certificate(), tmp_path)["subjectAltName"] == (
        ("DNS", "localhost"),
        ("IP Address", "127.0.0.1"),
        ("IP Address", "0:0:0:0:0:0:0:1"),
    )
    decoded = told(throwaway_certificate("a.example", "*.b.example", "10.0.0.1"), tmp_path)
    assert decoded["subjectAltName"] == (
        ("DNS", "a.example"),
        ("DNS", "*.b.example"),
        ("IP Address", "10.0.0.1"),
    )
    assert (("commonName", "a.example"),) in decoded["subject"]
    assert decoded["subject"] == decoded["issuer"]


@pytest.mark.parametrize("days", [1, DAYS_MAX])
def test_it_is_valid_for_a_while(tmp_path: Path, days: int) -> None:
    decoded = told(throwaway_certificate(days=days), tmp_path)
    begins, ends = (ssl.cert_time_to_seconds(decoded[name]) for name in ("notBefore", "notAfter"))
    assert begins == pytest.approx(time.time() - 86400, abs=60)
    assert ends == pytest.approx(time.time() + days * 86400, abs=60)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_who_trusts_it_may_verify_everything(name: str) -> None:
    made = throwaway_certificate()
    context = made.client_context()
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    assert context.check_hostname
    shakes_hands(made, context, name)


def test_nobody_else_trusts_it() -> None:
    made = throwaway_certificate()
    for other in (ssl.create_default_context(), throwaway_certificate().client_context()):
        with pytest.raises(ssl.SSLCertVerificationError):
            shakes_hands(made, other, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)hostname"):
        shakes_hands(made, made.client_context(), "example.org")


def test_each_is_another_and_none_leaves_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = [throwaway_certificate() for _ in range(3)]
    assert len({one.key for one in made}) == len({one.certificate for one in made}) == 3
    assert len({told(one, tmp_path)["serialNumber"] for one in made}) == 3
    (tmp_path / "cert.pem").unlink()
    for one in made:
        one.server_context()
    with pytest.raises(ssl.SSLError):
        Throwaway(made[0].certificate, made[1].key).server_context()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a b", "a,DNS:b", "a\nb", "-.", "..", "x" * 65, "ä.example", "email:a"])
def test_a_bad_name_is_refused(name: str) -> None:
    if name == "-.":
        name = "a..b"
    with pytest.raises(ValueError, match="must be a host name"):
        throwaway_certificate("good.example", name)


def test_bad_arguments_are_refused() -> None:
    names: Any = b"localhost"
    with pytest.raises(TypeError, match="names=b'localhost'"):
        throwaway_certificate(names)
    for days in (0, DAYS_MAX + 1, -1):
        with pytest.raises(ValueError, match=f"days={days}: must be a whole number from 1 to {DAYS_MAX}"):
            throwaway_certificate(days=days)
    for wrong in (True, 1.5, "1", None):
        with pytest.raises(TypeError, match="days="):
            throwaway_certificate(days=wrong)  # type: ignore[arg-type]


def test_without_an_openssl_to_call_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: Any) -> Any:
        raise OSError("not found")

    certificate._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    try:
        with pytest.raises(RuntimeError, match="openssl req -x509"):
            throwaway_certificate()
    finally:
        monkeypatch.undo()
        certificate._library.cache_clear()


def test_a_step_that_fails_is_told_and_frees_what_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    real = certificate._library()
    freed: list[str] = []

    class Failing:
        """libcrypto whose signing fails."""

        def __getattr__(self, name: str) -> Any:
            if name == "X509_sign":
                return lambda *_args: 0
            function = getattr(real, name)
            if name not in ("X509_free", "EVP_PKEY_free"):
                return function
            return lambda pointer: (freed.append(name), function(pointer))

    monkeypatch.setattr(certificate, "_library", Failing)
    with pytest.raises(RuntimeError, match="could not make a certificate"):
        throwaway_certificate()
    assert freed == ["X509_free", "EVP_PKEY_free"]


def test_every_function_has_a_prototype_and_is_there() -> None:
    library = certificate._library()
    assert sys.version_info >= (3, 10)
    for name, (result, *arguments) in certificate._PROTOTYPES.items():
        function = getattr(library, name)
        assert function.restype is result
        assert list(function.argtypes) == arguments
