"""Certificates and contexts of the tests: made once a process, trusted by nobody else."""

from __future__ import annotations

import functools
import ssl
from typing import Any

from iocp_ctypes.certificate import Throwaway, throwaway_certificate


@functools.cache
def certificate(*names: str) -> Throwaway:
    """The certificate of these names; of this machine without any."""
    return throwaway_certificate(*names)


def server_context(*names: str, **settings: Any) -> ssl.SSLContext:
    """A server's context; settings are attributes of it."""
    return _set(certificate(*names).server_context(), settings)


def client_context(*names: str, **settings: Any) -> ssl.SSLContext:
    """The context of a client that trusts that server."""
    return _set(certificate(*names).client_context(), settings)


def _set(context: ssl.SSLContext, settings: dict[str, Any]) -> ssl.SSLContext:
    for name, value in settings.items():
        setattr(context, name, value)
    return context


def no_verifying(**settings: Any) -> ssl.SSLContext:
    """The context of a client that takes anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return _set(context, settings)


TLS12 = {"maximum_version": ssl.TLSVersion.TLSv1_2}
TLS13 = {"minimum_version": ssl.TLSVersion.TLSv1_3}
