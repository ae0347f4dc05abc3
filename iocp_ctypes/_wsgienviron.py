"""The environ of a WSGI application: what a request says, and who may say more (layer P: pure).

Laws
1. Text in it is bytes decoded as latin-1, as PEP 3333 wants it; the path is decoded once.
2. X-Forwarded-For, -Proto and -Host count from the networks that were named, and from nobody else is anything
   left of them: an application cannot believe them by mistake.
3. A field whose name has an underscore is left out: it would pass for the one with a hyphen.
Source: peps.python.org/pep-3333
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from ._addresses import Address
from ._httpmessage import Request
from .access import Networks

#: Characters of an unfinished line of wsgi.errors that are kept.
ERROR_LINE_MAX: Final = 8 * 1024

_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[-A-Za-z0-9._~]+)(?::([0-9]{1,5}))?")
_PATH: Final = re.compile(r"(?:/[^/?#\x00-\x20\x7f]+)*")
_FORWARDED: Final = ("HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_PROTO", "HTTP_X_FORWARDED_HOST")
#: What has a place of its own in the environ, or none: how the body came is nobody's business any more.
_ELSEWHERE: Final = {"content-type": "CONTENT_TYPE", "content-length": "", "transfer-encoding": ""}

log = logging.getLogger("iocp_ctypes.wsgi")


class ErrorLog:
    """wsgi.errors: each line becomes a record of the logger `iocp_ctypes.wsgi`, with level ERROR."""

    def __init__(self) -> None:
        """Begin with an empty line."""
        self._rest = ""
        self._logging = False

    def write(self, text: str) -> int:
        """Log the lines that are complete, keep the rest."""
        if not isinstance(text, str):
            raise TypeError(f"wsgi.errors takes str, not {type(text).__name__}")
        if self._logging:  # a handler of the log writes to wsgi.errors: it must not go round for ever
            if logging.lastResort is not None and text.strip():
                record = log.makeRecord(log.name, logging.ERROR, "", 0, text.rstrip(), (), None)
                logging.lastResort.handle(record)
            return len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > ERROR_LINE_MAX:
            lines.append(self._rest)
            self._rest = ""
        for line in lines:
            self._log(line)
        return len(text)

    def _log(self, line: str) -> None:
        self._logging = True
        try:
            if line.strip():
                log.error("%s", line.rstrip())
        finally:
            self._logging = False

    def writelines(self, lines: Iterable[str]) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Log what is left of a line."""
        rest, self._rest = self._rest, ""
        self._log(rest)


class Environs:
    """Makes the environs of one server."""

    def __init__(
        self,
        trusted: Iterable[str] = (),
        script_name: str = "",
        software: str = "",
        several: bool = False,
    ) -> None:
        """Take what a server was given.

        Args:
            trusted: networks of proxies whose X-Forwarded fields count, such as "10.0.0.0/8" or "::1".
            script_name: the path below which the application is, such as "/shop"; "": the root.
            software: SERVER_SOFTWARE.
            several: whether other processes call the application at the same time.

        Raises:
            TypeError, ValueError: one of them is wrong.
        """
        self._trusted = Networks(allow=trusted)
        if not isinstance(script_name, str):
            raise TypeError(f"script_name={script_name!r}: must be a str")
        if not _PATH.fullmatch(script_name):
            raise ValueError(f"script_name={script_name!r}: must be '' or begin, and not end, with '/'")
        self._script_name = script_name.encode().decode("latin-1")
        self._base = {
            "SCRIPT_NAME": self._script_name,
            "SERVER_SOFTWARE": software,
            "wsgi.version": (1, 0),
            "wsgi.multithread": True,
            "wsgi.multiprocess": several,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
        }

    def make(self, request: Request, local: Address, secure: bool, body: Any, length: int) -> dict[str, Any]:
        """Return the environ of a request.

        Args:
            request: the request; its body has come.
            local: our end of its connection.
            secure: whether that is TLS.
            body: a file with the body, for wsgi.input.
            length: bytes in it.
        """
        path = unquote_to_bytes(request.raw_path).decode("latin-1")
        script = self._script_name
        if script and (path == script or path.startswith(script + "/")):
            path = path[len(script) :]
        environ: dict[str, Any] = {
            **self._base,
            "REQUEST_METHOD": request.method,
            "PATH_INFO": "" if path == "*" else path,
            "QUERY_STRING": request.query,
            "REQUEST_URI": request.target,
            "SERVER_NAME": local[0],
            "SERVER_PORT": str(local[1]),
            "SERVER_PROTOCOL": f"HTTP/{request.http_version}",
            "REMOTE_ADDR": request.client[0],
            "REMOTE_PORT": str(request.client[1]),
            "wsgi.url_scheme": "https" if secure else "http",
            "wsgi.input": body,
            "wsgi.errors": ErrorLog(),
        }
        for name, value in request.fields.items():
            if "_" not in name:
                key = _ELSEWHERE.get(name)
                environ["HTTP_" + name.upper().replace("-", "_") if key is None else key] = value
        environ.pop("", None)
        if length or request.length is None or request.field(b"content-length") is not None:
            environ["CONTENT_LENGTH"] = str(length)
        if request.user is not None:
            environ["REMOTE_USER"] = request.user
        if self._trusted.allows(request.client[0]):
            self._believe(environ)
        else:
            for name in _FORWARDED:
                environ.pop(name, None)
        return environ

    def _believe(self, environ: dict[str, Any]) -> None:
        """Take over what trusted proxies say about the request as it came to them."""
        hops, protocols, hosts = (environ.get(name, "").split(",") for name in _FORWARDED)
        for hop in reversed(hops):  # each has added its peer at the end: ours first, and so on
            client = _host_of(hop.strip())
            if client is None:
                break
            environ["REMOTE_ADDR"] = client
            environ.pop("REMOTE_PORT", None)
            if not self._trusted.allows(client):
                break
        protocol = protocols[-1].strip().lower()
        if protocol in ("http", "https"):
            environ["wsgi.url_scheme"] = protocol
        host = _HOST.fullmatch(hosts[-1].strip())
        if host:
            environ["HTTP_HOST"] = host[0]
            environ["SERVER_NAME"] = host[1]
            default = "443" if environ["wsgi.url_scheme"] == "https" else "80"
            environ["SERVER_PORT"] = host[2] or default


def _host_of(hop: str) -> str | None:
    """Return the address of a hop, without brackets and port; None where it has none."""
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        return str(ipaddress.ip_address(hop))
    except ValueError:
        return None
