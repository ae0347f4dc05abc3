"""L1: a throw-away certificate for examples and tests, made by the OpenSSL that Python's ssl module brings.

Laws
1. For trying TLS out, never for serving: nobody but who is handed the certificate trusts it, and its key is
   not kept.
2. The library is the one that `_ssl` uses, found and called when a certificate is asked for; nothing is
   installed, and no other program is run.
3. What OpenSSL allocated is freed, however it ends. A function that fails returns 0 or NULL.
Source of all functions: docs.openssl.org/3.0/man3 (they are the same in OpenSSL 1.1.1).
"""

from __future__ import annotations

import ctypes
import functools
import glob
import ipaddress
import os
import re
import secrets
import ssl
import sys
import tempfile
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_long, c_void_p
from typing import Any, Final, NamedTuple

#: What a name in a certificate may be; in OpenSSL's text of an extension other characters have a meaning.
_NAME: Final = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
#: Days that a certificate may be asked to hold: longer is no throw-away.
DAYS_MAX: Final = 30

_EVP_PKEY_EC: Final = 408
_MBSTRING_UTF8: Final = 0x1000
_VERSION_3: Final = 2
_EXTENSIONS: Final = {  # NID: value, in OpenSSL's text form
    87: b"critical,CA:TRUE",  # basicConstraints; who trusts it trusts it as its own issuer
    83: b"critical,digitalSignature,keyCertSign",  # keyUsage
    126: b"serverAuth,clientAuth",  # extKeyUsage
    82: b"hash",  # subjectKeyIdentifier
}
_SUBJECT_ALT_NAME: Final = 85

#: Prototypes: result, arguments. Pointers are opaque; *_new and *_sign and the like return NULL or 0 on
#: failure, and none of them blocks.
_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "EVP_PKEY_CTX_new_id": (c_void_p, c_int, c_void_p),
    "EVP_PKEY_CTX_free": (None, c_void_p),
    "EVP_PKEY_CTX_ctrl_str": (c_int, c_void_p, c_char_p, c_char_p),
    "EVP_PKEY_keygen_init": (c_int, c_void_p),
    "EVP_PKEY_keygen": (c_int, c_void_p, c_void_p),  # writes an EVP_PKEY * through the second
    "EVP_PKEY_free": (None, c_void_p),
    "EVP_sha256": (c_void_p,),
    "X509_new": (c_void_p,),
    "X509_free": (None, c_void_p),
    "X509_set_version": (c_int, c_void_p, c_long),
    "X509_get_serialNumber": (c_void_p, c_void_p),  # into the certificate, as the two times are
    "ASN1_INTEGER_set": (c_int, c_void_p, c_long),
    "X509_getm_notBefore": (c_void_p, c_void_p),
    "X509_getm_notAfter": (c_void_p, c_void_p),
    "X509_gmtime_adj": (c_void_p, c_void_p, c_long),  # now and so many seconds
    "X509_get_subject_name": (c_void_p, c_void_p),  # into the certificate
    "X509_NAME_add_entry_by_txt": (c_int, c_void_p, c_char_p, c_int, c_char_p, c_int, c_int, c_int),
    "X509_set_issuer_name": (c_int, c_void_p, c_void_p),  # copies
    "X509_set_pubkey": (c_int, c_void_p, c_void_p),  # keeps a reference of its own
    "X509V3_set_ctx": (None, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "X509V3_EXT_conf_nid": (c_void_p, c_void_p, c_void_p, c_int, c_char_p),
    "X509_EXTENSION_free": (None, c_void_p),
    "X509_add_ext": (c_int, c_void_p, c_void_p, c_int),  # copies
    "X509_sign": (c_int, c_void_p, c_void_p, c_void_p),
    "BIO_s_mem": (c_void_p,),
    "BIO_new": (c_void_p, c_void_p),
    "BIO_free": (c_int, c_void_p),
    "BIO_read": (c_int, c_void_p, c_void_p, c_int),  # writes up to so many bytes, returns how many
    "PEM_write_bio_X509": (c_int, c_void_p, c_void_p),
    "PEM_write_bio_PrivateKey": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p),
}


class Throwaway(NamedTuple):
    """A self-signed certificate and its key, as PEM text."""

    certificate: str
    key: str

    def server_context(self) -> ssl.SSLContext:
        """Return a context for a server that has this certificate.

        The two are in a temporary file for a moment, which only this user may read.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.load_into(context)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return a context for clients that trust this certificate, and no other."""
        return ssl.create_default_context(cadata=self.certificate)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Give a context certificate and key, as a server's or a client's own."""
        handle, path = tempfile.mkstemp(suffix=".pem")
        try:
            with open(handle, "w", encoding="ascii") as file:
                file.write(self.key + self.certificate)
            context.load_cert_chain(path)
        finally:
            os.unlink(path)


def throwaway_certificate(*names: str, days: int = 1) -> Throwaway:
    """Make a self-signed certificate (ECDSA, P-256), for examples and tests.

    Args:
        names: host names and numeric addresses it is for; none: localhost, 127.0.0.1 and ::1.
        days: how long from now it is valid, 1 to 30; it is from a day ago on, for clocks differ.

    Raises:
        TypeError, ValueError: an argument is wrong. RuntimeError: this Python's OpenSSL cannot be called.

    Any thread; takes about a millisecond.
    """
    if isinstance(days, bool) or not isinstance(days, int):
        raise TypeError(f"days={days!r}: must be a whole number from 1 to {DAYS_MAX}")
    if not 1 <= days <= DAYS_MAX:
        raise ValueError(f"days={days!r}: must be a whole number from 1 to {DAYS_MAX}")
    checked = names or ("localhost", "127.0.0.1", "::1")
    alternatives = ",".join(_alternative(name) for name in checked).encode()
    library = _library()
    made: list[tuple[Callable[[Any], object], Any]] = []

    def owned(free: str, pointer: Any) -> Any:
        made.append((getattr(library, free), _good(pointer)))
        return pointer

    try:
        key = owned("EVP_PKEY_free", _make_key(library))
        certificate = owned("X509_free", library.X509_new())
        _fill(library, certificate, key, checked[0], alternatives, days * 86400)
        _good(library.X509_sign(certificate, key, library.EVP_sha256()))
        bio = owned("BIO_free", library.BIO_new(library.BIO_s_mem()))
        _good(library.PEM_write_bio_X509(bio, certificate))
        text = _drain(library, bio)
        _good(library.PEM_write_bio_PrivateKey(bio, key, None, None, 0, None, None))
        return Throwaway(text, _drain(library, bio))
    finally:
        for free, pointer in reversed(made):
            free(pointer)


def _alternative(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"names={name!r}: must be host names or numeric addresses")
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        if not _NAME.fullmatch(name) or len(name) > 64:
            text = "must be a host name (letters, digits, '-', '_', '.', 64 at the most) or a numeric address"
            raise ValueError(f"names={name!r}: {text}") from None
        return f"DNS:{name}"


@functools.cache
def _library() -> Any:
    """Return libcrypto with prototypes."""
    import _ssl  # what `ssl` is made of

    place = getattr(_ssl, "__file__", None)
    # On Windows libcrypto lies beside `_ssl`; elsewhere its functions are found through what needs it.
    paths = [place]
    if sys.platform == "win32":
        folders = {os.path.dirname(place or sys.executable), os.path.join(sys.base_prefix, "DLLs")}
        paths = [path for folder in folders for path in glob.glob(os.path.join(folder, "libcrypto-*.dll"))]
    for path in paths:
        try:
            library = ctypes.CDLL(path)
            for name, (result, *arguments) in _PROTOTYPES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):
            continue
        return library
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key.pem -out cert.pem"
    raise RuntimeError(f"the OpenSSL of this Python cannot be called; make a certificate with: {command}")


def _good(result: Any) -> Any:
    if not result or result < 0:
        raise RuntimeError("OpenSSL could not make a certificate")
    return result


def _make_key(library: Any) -> Any:
    maker = _good(library.EVP_PKEY_CTX_new_id(_EVP_PKEY_EC, None))
    try:
        _good(library.EVP_PKEY_keygen_init(maker))
        _good(library.EVP_PKEY_CTX_ctrl_str(maker, b"ec_paramgen_curve", b"P-256"))
        key = c_void_p()
        _good(library.EVP_PKEY_keygen(maker, ctypes.byref(key)))
        return key.value
    finally:
        library.EVP_PKEY_CTX_free(maker)


def _fill(library: Any, certificate: Any, key: Any, name: str, alternatives: bytes, valid_s: int) -> None:
    """Write all but the signature."""
    _good(library.X509_set_version(certificate, _VERSION_3))
    serial = 1 + secrets.randbelow((1 << 31) - 1)  # a C long has 32 bits on Windows
    _good(library.ASN1_INTEGER_set(library.X509_get_serialNumber(certificate), serial))
    _good(library.X509_gmtime_adj(library.X509_getm_notBefore(certificate), -86400))
    _good(library.X509_gmtime_adj(library.X509_getm_notAfter(certificate), valid_s))
    subject = library.X509_get_subject_name(certificate)
    for field, value in ((b"O", b"iocp_ctypes throw-away"), (b"CN", name.encode())):
        _good(library.X509_NAME_add_entry_by_txt(subject, field, _MBSTRING_UTF8, value, -1, -1, 0))
    _good(library.X509_set_issuer_name(certificate, subject))
    _good(library.X509_set_pubkey(certificate, key))
    context = ctypes.create_string_buffer(256)  # an X509V3_CTX, which has some 60 bytes
    library.X509V3_set_ctx(context, certificate, certificate, None, None, 0)
    for number, text in {**_EXTENSIONS, _SUBJECT_ALT_NAME: alternatives}.items():
        extension = _good(library.X509V3_EXT_conf_nid(None, context, number, text))
        try:
            _good(library.X509_add_ext(certificate, extension, -1))
        finally:
            library.X509_EXTENSION_free(extension)


def _drain(library: Any, bio: Any) -> str:
    """Read all that a memory BIO has."""
    buffer = ctypes.create_string_buffer(8192)
    parts = []
    while (count := library.BIO_read(bio, buffer, len(buffer))) > 0:
        parts.append(buffer.raw[:count])
    return b"".join(parts).decode("ascii")
