"""Every option: what is taken, what is refused, and that a refusal says which option, value and range."""

from __future__ import annotations

import dataclasses
import ssl
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iocp_ctypes import OPTIONS, Usage
from iocp_ctypes._options import (
    KEEPALIVE_MAX,
    KIB,
    MIB,
    SECONDS_MAX,
    ServerOptions,
    Settings,
    change,
    check_marks,
    check_option,
    make_settings,
)

YEAR = 365 * 86400
NAN, INFINITY = float("nan"), float("inf")


class Case:
    """What one option takes and refuses; the first and last good values are the edges of its range."""

    def __init__(self, default: Any, good: list[Any], out_of_range: list[Any], says: str) -> None:
        self.default = default
        self.good = good
        self.out_of_range = out_of_range
        self.says = says  # how the message puts what is allowed


def whole(default: int | None, low: int, high: int, none: bool = False) -> Case:
    says = f"a whole number from {low} to {high}" + (" or None" if none else "")
    return Case(default, [low, low + 1, high], [low - 1, high + 1, -1, 1 << 80], says)


def seconds(default: float | None, zero: bool = False, none: bool = True) -> Case:
    good = ([0, 0.0] if zero else [1e-9]) + [1, 2.5, YEAR]
    bad = [YEAR + 1, -1, -0.001, NAN, INFINITY, -INFINITY, 10**400] + ([] if zero else [0, 0.0, -0.0])
    low = "0 or more" if zero else "more than 0"
    return Case(
        default, good, bad, f"a number of seconds ({low}, at most {YEAR})" + (" or None" if none else "")
    )


def flag(default: bool | None, none: bool = False) -> Case:
    return Case(default, [True, False], [], "True, False or None" if none else "True or False")


CONTEXTS = [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)]
CASES = {
    "backlog": whole(64, 1, 10_000),
    "listen_backlog": whole(None, 1, 65_535, none=True),
    "accept_data": whole(0, 0, 64 * KIB),
    "silent_timeout": seconds(120.0),
    "idle_timeout": seconds(None),
    "linger_timeout": seconds(5.0, zero=True, none=False),
    "max_connections": whole(None, 1, 1_000_000, none=True),
    "max_per_host": whole(None, 1, 1_000_000, none=True),
    "sendcap": whole(4, 1, 1_000),
    "recvburst": whole(1, 1, 10_000),
    "recv_mode": Case(
        "auto",
        ["auto", "flow", "zero-byte", "burst"],
        ["", "AUTO", "zero"],
        "one of 'auto', 'flow', 'zero-byte', 'burst'",
    ),
    "recv_size": whole(16 * KIB, 64, 16 * MIB),
    "recv_buffer_max": whole(MIB, 64, 1 << 40),
    "high_mark": whole(64 * KIB, 0, 1 << 40),
    "low_mark": whole(16 * KIB, 0, 1 << 40),
    "write_buffer_max": whole(16 * MIB, 1, 1 << 40),
    "io_threads": whole(0, 0, 256),
    "work_threads": whole(0, 0, 256),
    "processes": whole(1, 1, 64),
    "nodelay": flag(True),
    "keepalive": Case(
        None,
        [1, 0.001, 60, KEEPALIVE_MAX, (60, 1), (0.5, KEEPALIVE_MAX)],
        [
            0,
            -1,
            NAN,
            INFINITY,
            KEEPALIVE_MAX + 1,
            (0, 1),
            (1, 0),
            (KEEPALIVE_MAX + 1, 1),
            (1,),
            (1, 2, 3),
            (),
        ],
        "seconds (more than 0, at most 4294967), (idle, interval) in such seconds, or None",
    ),
    "exclusive": flag(True),
    "dualstack": flag(None, none=True),
    "trace": whole(0, 0, 1_000_000),
    "tls": Case(None, CONTEXTS, [], "an ssl.SSLContext or None"),
    "tls_handshake_timeout": seconds(10.0, none=False),
    "reject_remote": flag(True),
    "pipe_security": Case(
        None,
        ["D:(A;;GA;;;WD)", "O:BAD:"],
        ["", "everybody"],
        "in SDDL, such as 'D:(A;;GA;;;WD)', or None",
    ),
}
OF_WRONG_TYPE: list[Any] = ["5", b"5", [5], {}, object(), 1 + 2j]


def of_wrong_type(name: str) -> list[Any]:
    """Values of kinds that an option does not take."""
    case = CASES[name]
    is_flag, is_choice = isinstance(case.good[0], bool), isinstance(case.good[0], str)
    return [
        *(value for value in OF_WRONG_TYPE if not (is_choice and isinstance(value, str))),
        *([0, 1] if is_flag else [True]),
        *([2.0, 1.5] if "whole number" in case.says else []),
        *([("5", 1), (1, None), (True, 1), [60, 1]] if name == "keepalive" else [(5, 5)]),
    ]


def test_there_is_a_case_for_every_option_and_a_default_and_a_type() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert fields == {name: case.default for name, case in CASES.items()}
    assert list(OPTIONS) == list(fields), "the table, the settings and these cases are in one order"
    assert list(ServerOptions.__annotations__) == list(fields)
    assert ServerOptions.__total__ is False
    hints = get_type_hints(Settings, localns={"ssl": ssl})
    assert get_type_hints(ServerOptions, localns={"ssl": ssl}) == hints


def test_every_option_says_what_it_means() -> None:
    for name, option in OPTIONS.items():
        assert option.meaning.strip() == option.meaning != "", name
        assert not option.meaning.endswith("."), name


def test_the_defaults_are_values_one_may_give() -> None:
    given_all = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert make_settings(given_all) == make_settings({}) == Settings()


@pytest.mark.parametrize("name", CASES)
def test_good_values_are_taken(name: str) -> None:
    for value in CASES[name].good:
        checked = check_option(name, value)
        assert checked == value
        if "seconds" in CASES[name].says and not isinstance(value, tuple):
            assert type(checked) is float
        else:
            assert type(checked) is type(value)


@pytest.mark.parametrize("name", CASES)
def test_none_is_taken_where_the_message_says_so(name: str) -> None:
    allowed = CASES[name].default is None or CASES[name].says.endswith("or None")
    if allowed:
        assert check_option(name, None) is None
    else:
        with pytest.raises(TypeError, match=f"^{name}=None: must be "):
            check_option(name, None)


@pytest.mark.parametrize("name", CASES)
def test_values_out_of_range_are_refused(name: str) -> None:
    for value in CASES[name].out_of_range:
        with pytest.raises(ValueError, match=f"^{name}=") as caught:
            check_option(name, value)
        check_message(str(caught.value), name, value)


@pytest.mark.parametrize("name", CASES)
def test_values_of_a_wrong_type_are_refused(name: str) -> None:
    for value in of_wrong_type(name):
        with pytest.raises(TypeError, match=f"^{name}=") as caught:
            check_option(name, value)
        check_message(str(caught.value), name, value)


def check_message(message: str, name: str, value: Any) -> None:
    """Assert that a refusal names the option, the value and what is allowed, on one line."""
    assert message.startswith(f"{name}={value!r}: ")
    assert CASES[name].says in message
    assert "must be" in message
    assert "\n" not in message


def test_keepalive_fits_a_dword_of_milliseconds() -> None:
    assert KEEPALIVE_MAX * 1000 <= 0xFFFFFFFF < (KEEPALIVE_MAX + 1) * 1000
    assert KEEPALIVE_MAX < SECONDS_MAX == YEAR


def test_an_unknown_option_is_refused_with_the_list_of_all() -> None:
    with pytest.raises(TypeError, match="backlogg=5") as caught:
        make_settings({"backlogg": 5})
    assert all(name in str(caught.value) for name in OPTIONS)


@pytest.mark.parametrize(
    "marks",
    [
        {"low_mark": 0, "high_mark": 0, "write_buffer_max": 1},
        {"low_mark": 7, "high_mark": 7, "write_buffer_max": 7},
        {"low_mark": 1, "high_mark": 2, "write_buffer_max": 3},
    ],
)
def test_marks_may_touch(marks: dict[str, int]) -> None:
    settings = make_settings(marks)
    assert check_marks(settings) is settings
    assert {name: getattr(settings, name) for name in marks} == marks


@pytest.mark.parametrize(
    ("marks", "says"),
    [
        ({"low_mark": 8, "high_mark": 7}, "low_mark=8: must be from 0 to high_mark, which is 7"),
        ({"high_mark": 16 * KIB - 1}, "low_mark=16384: .* which is 16383"),
        (
            {"write_buffer_max": 64 * KIB - 1},
            "high_mark=65536: must be from low_mark to write_buffer_max, which is 65535",
        ),
        ({"low_mark": 0, "high_mark": 2, "write_buffer_max": 1}, "high_mark=2: "),
    ],
)
def test_marks_must_not_cross(marks: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_settings(marks)


def test_a_change_makes_new_settings_and_leaves_the_old() -> None:
    before = Settings()
    after = change(before, sendcap=9, idle_timeout=3)
    assert (after.sendcap, after.idle_timeout) == (9, 3.0)
    assert before == Settings()
    assert dataclasses.replace(after, sendcap=4, idle_timeout=None) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"sendcap": 0},
        {"sendcap": "many"},
        {"sendcap": 9, "nonsense": 1},
        {"high_mark": 1},
        {"sendcap": 9, "low_mark": 1 << 30},
    ],
)
def test_a_refused_change_changes_nothing(changes: dict[str, Any]) -> None:
    before = make_settings({"sendcap": 3})
    copy = dataclasses.replace(before)
    with pytest.raises((TypeError, ValueError)):
        change(before, **changes)
    assert before == copy


def test_two_marks_may_change_together_where_one_alone_may_not() -> None:
    before = Settings()
    with pytest.raises(ValueError, match="high_mark"):
        change(before, high_mark=10)
    after = change(before, high_mark=10, low_mark=5)
    assert (after.high_mark, after.low_mark) == (10, 5)


def test_settings_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().sendcap = 5  # type: ignore[misc]


@given(
    st.sampled_from(list(OPTIONS)), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
)
def test_whatever_is_given_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    refusal = ""
    try:
        checked = check_option(name, value)
    except (TypeError, ValueError) as exc:
        refusal = str(exc)
    if refusal:
        assert refusal.startswith(f"{name}={value!r}: must be ")
    else:
        assert checked == value
        assert check_option(name, checked) == checked


def test_usage_is_a_pair() -> None:
    assert Usage(4, 1) == (4, 1)
    assert Usage(cap=4, in_use=1).in_use == 1
