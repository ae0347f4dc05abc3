"""Guards: who passes, who does not, and what is said to them."""

from __future__ import annotations

import base64
import hmac
import threading
from typing import Any

import pytest

from iocp_ctypes import access
from iocp_ctypes._httpmessage import Request
from iocp_ctypes.access import Basic, Bearer, Networks, RateLimit, UrlToken, networks, same


def request(target: str = "/", authorization: str | None = None, host: str = "192.0.2.1") -> Request:
    headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
    return Request("GET", target, headers, client=(host, 5000))


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def refused(guard: Any, asked: Request, status: int = 401) -> str:
    """Assert that a guard refuses; returns the challenge."""
    answer = guard(asked)
    assert answer is not None
    assert answer.status == status
    assert asked.user is None
    return str(answer.header("WWW-Authenticate"))


def test_basic() -> None:
    guard = Basic({"ann": "s3cret:with colon", "grüße": "ß"}, realm="here")
    for name, password in (("ann", "s3cret:with colon"), ("grüße", "ß")):
        asked = request(authorization=basic(name, password))
        assert guard(asked) is None
        assert asked.user == name
    assert refused(guard, request()) == 'Basic realm="here", charset="UTF-8"'


@pytest.mark.parametrize(
    "given",
    [
        basic("ann", "wrong"),
        basic("bob", "s3cret"),
        basic("ann", ""),
        basic("", ""),
        "Basic",
        "Basic ",
        "Basic !!!",
        "Basic YW5u",  # no colon
        "Basic /////w==",  # no UTF-8
        "Basic " + "A" * 10_001,
        "Bearer " + basic("ann", "s3cret")[6:],
        "\xff",
    ],
)
def test_basic_refuses(given: str) -> None:
    refused(Basic({"ann": "s3cret"}), request(authorization=given))


def test_basic_asks_a_function() -> None:
    seen = []

    def check(name: str, password: str) -> bool:
        seen.append((name, password))
        return name == "ann"

    assert Basic(check)(request(authorization=basic("ann", "x"))) is None
    refused(Basic(check), request(authorization=basic("bob", "y")))
    assert seen == [("ann", "x"), ("bob", "y")]


def test_secrets_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    passwords = {"a": "1", "b": "2", "c": "3"}
    for name in ("a", "c", "nobody"):
        compared.clear()
        Basic(passwords)(request(authorization=basic(name, "1")))
        assert len(compared) == 2 * len(passwords), "who is known must not show"
    for token in ("one", "three", "none"):
        compared.clear()
        Bearer(["one", "two", "three"])(request(authorization=f"Bearer {token}"))
        assert len(compared) == 3


def test_same_takes_any_text() -> None:
    assert same("ß", "ß")
    assert same("a", b"a")
    assert not same("ß", "ss")


def test_bearer() -> None:
    guard = Bearer({"t0ken": "ann"})
    asked = request(authorization="bearer t0ken")
    assert guard(asked) is None
    assert asked.user == "ann"
    assert "invalid_token" in refused(guard, request(authorization="Bearer other"))
    assert "invalid_token" not in refused(guard, request())
    refused(guard, request(authorization="Bearer "))
    assert Bearer(lambda token: "x" if token == "y" else None)(request(authorization="Bearer y")) is None


def test_url_token_passes_and_is_not_logged() -> None:
    guard = UrlToken(["t0ken"], argument="key")
    asked = request("/feed?a=1&key=t0ken")
    assert guard(asked) is None
    assert asked.user == "token"
    assert asked.arguments["a"] == ["1"]
    assert "t0ken" not in asked.target


@pytest.mark.parametrize("target", ["/", "/?key=", "/?key=other", "/?key=t0ken&key=t0ken", "/?token=t0ken"])
def test_url_token_refuses(target: str) -> None:
    refused(UrlToken(["t0ken"], argument="key"), request(target))


def test_url_token_and_a_query_of_too_many_fields() -> None:
    refused(UrlToken(["t0ken"]), request("/?" + "a=1&" * 2000), 400)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Basic("ann:pw"), TypeError),  # type: ignore[arg-type]
        (lambda: Basic({}, realm='a"b'), ValueError),
        (lambda: Basic({}, realm="a\nb"), ValueError),
        (lambda: Basic({}, realm=5), TypeError),  # type: ignore[arg-type]
        (lambda: Bearer("token"), TypeError),
        (lambda: Bearer([""]), TypeError),
        (lambda: Bearer([5]), TypeError),  # type: ignore[list-item]
        (lambda: Networks("10.0.0.0/8"), TypeError),
        (lambda: Networks(["10.0.0.1/8"]), ValueError),
        (lambda: Networks(deny=["nonsense"]), ValueError),
        (lambda: RateLimit(0, 1), ValueError),
        (lambda: RateLimit(1, 0.5), ValueError),
        (lambda: RateLimit(float("inf"), 1), ValueError),
        (lambda: RateLimit(float("nan"), 1), ValueError),
        (lambda: RateLimit("1", 1), TypeError),  # type: ignore[arg-type]
        (lambda: RateLimit(1, True), TypeError),
    ],
)
def test_what_is_refused_at_construction(make: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        make()


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("10.9.0.1", False),
        ("192.0.2.1", False),
        ("2001:db8::1", True),
        ("fe80::1%3", False),
        ("nonsense", False),
    ],
)
def test_networks(host: str, allowed: bool) -> None:
    guard = Networks(allow=["10.0.0.0/8", "2001:db8::/32"], deny=["10.9.0.0/16"])
    assert guard.allows(host) is allowed
    answer = guard(request(host=host))
    assert (answer is None) is allowed
    assert answer is None or answer.status == 403


def test_networks_that_only_deny() -> None:
    assert Networks(deny=["10.0.0.0/8"]).allows("192.0.2.1")
    assert not Networks(deny=["10.0.0.0/8"]).allows("10.0.0.1")
    assert not Networks(allow=[]).allows("10.0.0.1")
    assert len(networks(["10.0.0.0/8", "::/0"])) == 2


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_rate() -> None:
    clock = Clock()
    guard = RateLimit(2, 3, clock)
    for _ in range(3):
        assert guard(request()) is None
    answer = guard(request())
    assert answer is not None
    assert (answer.status, answer.header("Retry-After")) == (429, "1")
    assert guard(request(host="192.0.2.2")) is None, "another host has its own"
    assert guard.wait("192.0.2.1") == 0.5
    clock.now += 0.5
    assert guard.wait("192.0.2.1") == 0.0
    assert guard.wait("192.0.2.1") > 0
    clock.now += 1000
    assert [guard.wait("192.0.2.1") == 0.0 for _ in range(4)] == [True, True, True, False], (
        "no more than burst"
    )


def test_retry_after_is_rounded_up() -> None:
    guard = RateLimit(0.1, 1, Clock())
    guard(request())
    answer = guard(request())
    assert answer is not None
    assert answer.header("Retry-After") == "10"


def test_the_oldest_hosts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "HOSTS_MAX", 3)
    guard = RateLimit(1, 1, Clock())
    for host in ("a", "b", "c"):
        assert guard.wait(host) == 0.0
    assert guard.wait("a") > 0, "who comes again is young"
    assert guard.wait("d") == 0.0
    assert len(guard._buckets) == 3
    assert guard.wait("a") > 0
    assert guard.wait("b") == 0.0, "b was the oldest"


def test_many_threads_at_one_rate() -> None:
    guard = RateLimit(1, 50, Clock())
    passed: list[bool] = []

    def ask() -> None:
        for number in range(200):
            passed.append(guard.wait("h") == 0.0)
            guard.wait(f"other {number}")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 800
    assert 50 <= sum(passed) <= 300
