"""Who may ask: passwords, tokens, networks and rates, as guards of HTTP requests (layer P: pure).

Laws
1. A guard is called with a request and returns None to let it pass or a Response that refuses it. Guards run
   before the body is read and before any upgrade.
2. Secrets are compared in constant time, and all of them, whichever is right.
3. What is kept for each host is bounded; the oldest is forgotten first.
4. No threads and no locks: a rate is kept in one tuple, and of two requests at the same moment on two threads
   one may pass uncounted.
Source: RFC 7617 (Basic), RFC 6750 (Bearer), RFC 6585 (429)
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from ._httpmessage import Request, Response, problem

#: Hosts whose rate is kept: some 200 bytes each.
HOSTS_MAX: Final = 10_000

Guard = Callable[[Request], Response | None]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def same(one: str | bytes, other: str | bytes) -> bool:
    """Return whether two secrets are the same, in a time that tells nothing about where they differ."""
    first = one.encode() if isinstance(one, str) else one
    return hmac.compare_digest(first, other.encode() if isinstance(other, str) else other)


def _unauthorized(challenge: str) -> Response:
    return problem(401, headers=[("WWW-Authenticate", challenge), ("Cache-Control", "no-store")])


def _check_realm(realm: str) -> str:
    if not isinstance(realm, str):
        raise TypeError(f"realm={realm!r}: must be a str")
    if not realm.isascii() or not realm.isprintable() or '"' in realm or "\\" in realm:
        raise ValueError(f"realm={realm!r}: must be printable ASCII without quotation marks and backslashes")
    return realm


class Basic:
    """Asks for a name and a password; `request.user` is the name then.

    Use it over TLS only: the password travels as it is.
    """

    def __init__(
        self, check: Mapping[str, str] | Callable[[str, str], bool], realm: str = "iocp_ctypes"
    ) -> None:
        """Take passwords by name, or a function of (name, password) that says whether they are right.

        TypeError, ValueError: one of both is of no use.
        """
        if not isinstance(check, Mapping) and not callable(check):
            raise TypeError(f"check={check!r}: must be a mapping of names to passwords, or a function")
        self._check = check
        self._challenge = f'Basic realm="{_check_realm(realm)}", charset="UTF-8"'

    def __call__(self, request: Request) -> Response | None:
        """Let the request pass, or answer 401."""
        scheme, _, given = (request.field(b"authorization") or b"").partition(b" ")
        if scheme.lower() == b"basic":
            try:
                name, colon, password = base64.b64decode(given.strip(), validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                colon = name = password = ""
            if colon and self._is_right(name, password):
                request.user = name
                return None
        return _unauthorized(self._challenge)

    def _is_right(self, name: str, password: str) -> bool:
        if not isinstance(self._check, Mapping):
            return bool(self._check(name, password))
        right = False
        for known, secret in self._check.items():
            right |= same(known, name) & same(secret, password)
        return right


class _Tokens:
    """Tokens, each with the name of who has it."""

    def __init__(self, tokens: Iterable[str] | Mapping[str, str] | Callable[[str], str | None]) -> None:
        self._find: Callable[[str], str | None] | None = None
        self._tokens: dict[str, str] = {}
        if isinstance(tokens, (str, bytes)):
            raise TypeError("tokens: must be several, in a list for example, and not one str")
        if callable(tokens):
            self._find = tokens
        elif isinstance(tokens, Mapping):
            self._tokens = dict(tokens)
        else:
            self._tokens = dict.fromkeys(tokens, "token")
        if not all(isinstance(token, str) and token for token in self._tokens):
            raise TypeError("tokens: each must be a str that is not empty")

    def user(self, given: str) -> str | None:
        """Return the name of who has a token; None where nobody has it."""
        if self._find is not None:
            return self._find(given)
        found = None
        for token, user in self._tokens.items():
            if same(token, given):
                found = user
        return found


class Bearer:
    """Asks for a token in the Authorization field; `request.user` is the name of who has it."""

    def __init__(
        self,
        tokens: Iterable[str] | Mapping[str, str] | Callable[[str], str | None],
        realm: str = "iocp_ctypes",
    ) -> None:
        """Take tokens; or tokens with the names of who has them; or a function of a token that returns such a
        name or None.
        """
        self._tokens = _Tokens(tokens)
        self._challenge = f'Bearer realm="{_check_realm(realm)}"'

    def __call__(self, request: Request) -> Response | None:
        """Let the request pass, or answer 401."""
        scheme, _, given = (request.field(b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not given.strip():
            return _unauthorized(self._challenge)
        request.user = self._tokens.user(given.strip().decode("latin-1"))
        return _unauthorized(f'{self._challenge}, error="invalid_token"') if request.user is None else None


class UrlToken:
    """Asks for a token in the query: browsers let no script add a header to a WebSocket or an event stream.

    A URL ends up in logs and histories: make such a token short-lived. The access log leaves it out.
    """

    def __init__(
        self,
        tokens: Iterable[str] | Mapping[str, str] | Callable[[str], str | None],
        argument: str = "token",
    ) -> None:
        """Take tokens as `Bearer` does, and the name of the query's field."""
        self._tokens = _Tokens(tokens)
        self._argument = argument

    def __call__(self, request: Request) -> Response | None:
        """Let the request pass, or answer 401."""
        try:
            given = request.arguments.get(self._argument, [])
        except ValueError:
            return problem(400, "the query has too many fields")
        if len(given) == 1:
            request.user = self._tokens.user(given[0])
        if request.user is not None:
            request.target = request.raw_path + "?..."  # what the log writes
        return _unauthorized('Bearer realm="token in the query"') if request.user is None else None


def networks(given: Iterable[str]) -> tuple[Network, ...]:
    """Return networks, such as "10.0.0.0/8" or "::1"; ValueError names the one that is none."""
    if isinstance(given, str):
        raise TypeError(f"{given!r}: must be several networks, in a list for example")
    return tuple(ipaddress.ip_network(network) for network in given)


class Networks:
    """Lets only some hosts ask; others are answered with 403.

    What `deny` names is refused, then what `allow` names passes; all else passes where `allow` is None.
    """

    def __init__(self, allow: Iterable[str] | None = None, deny: Iterable[str] = ()) -> None:
        """Take networks as `networks` does."""
        self._allow = None if allow is None else networks(allow)
        self._deny = networks(deny)

    def allows(self, host: str) -> bool:
        """Return whether a host may ask; fits into `Server.verify_request`, for `peer_address[0]`."""
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if any(address in network for network in self._deny):
            return False
        return self._allow is None or any(address in network for network in self._allow)

    def __call__(self, request: Request) -> Response | None:
        """Let the request pass, or answer 403."""
        return None if self.allows(request.client[0]) else problem(403)


class RateLimit:
    """A bucket of tokens for each host: `rate` of them come in a second, up to `burst`.

    A request takes one.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Take requests a second, more than 0; how many may come at once, 1 or more; a clock of seconds."""
        for name, value, low in (("rate", rate, 0.0), ("burst", burst, 1.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r}: must be a number")
            if not low <= value < math.inf or not value:
                raise ValueError(f"{name}={value!r}: must be {'more than 0' if not low else '1 or more'}")
        self._rate, self._burst, self._clock = float(rate), float(burst), clock
        self._buckets: dict[str, tuple[float, float]] = {}  # host: tokens, and when there were so many

    def wait(self, host: str) -> float:
        """Take a token of a host; returns 0.0, or where there is none the seconds until there is one."""
        now = self._clock()
        tokens, since = self._buckets.pop(host, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        passes = tokens >= 1.0
        self._buckets[host] = (tokens - 1.0 if passes else tokens, now)  # at the end: it is the youngest
        while len(self._buckets) > HOSTS_MAX:
            try:
                self._buckets.pop(next(iter(self._buckets)), None)
            except (StopIteration, RuntimeError):
                break  # another thread changes it at this moment, and forgets the oldest as well
        return 0.0 if passes else (1.0 - tokens) / self._rate

    def __call__(self, request: Request) -> Response | None:
        """Let the request pass, or answer 429 and say when to come again."""
        wait = self.wait(request.client[0])
        return problem(429, headers=[("Retry-After", str(math.ceil(wait)))]) if wait else None
