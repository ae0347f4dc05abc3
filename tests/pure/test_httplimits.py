"""The limits of the HTTP server: defaults, ranges, and what a refusal says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from iocp_ctypes import _httplimits
from iocp_ctypes._httplimits import Limits


def test_the_defaults_are_the_constants() -> None:
    for field in dataclasses.fields(Limits):
        assert field.default == getattr(_httplimits, field.name.upper())


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("request_line_max", 15, ValueError),
        ("request_line_max", "8000", TypeError),
        ("head_max", 63, ValueError),
        ("head_max", 1.5, TypeError),
        ("headers_max", 0, ValueError),
        ("headers_max", True, TypeError),
        ("body_max", -1, ValueError),
        ("requests_max", 0, ValueError),
        ("body_rate_min", -1, ValueError),
        ("gzip_min", -1, ValueError),
        ("header_timeout", 0, ValueError),
        ("header_timeout", None, TypeError),
        ("keepalive_timeout", "x", TypeError),
        ("keepalive_timeout", float("nan"), ValueError),
        ("body_grace", 1e9, ValueError),
        ("send_timeout", None, TypeError),
    ],
)
def test_what_is_refused_is_named(name: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{name}={value!r}: must be "):
        Limits(**{name: value})


def test_the_edges_are_allowed() -> None:
    assert Limits(body_max=0, body_rate_min=0, gzip_min=None, headers_max=1).body_max == 0


def test_limits_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().body_max = 1  # type: ignore[misc]
