"""Topics and patterns, against a reading of the rule that is slow and obvious."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iocp_ctypes._topics import LEVELS_MAX, TOPIC_MAX, Topics, check_pattern, check_topic

LEVEL = st.sampled_from(["a", "b", ""])
TOPIC = st.lists(LEVEL, min_size=1, max_size=4).map("/".join).filter(bool)
PATTERN = st.builds(
    lambda levels, rest: "/".join([*levels, "#"] if rest or not any(levels) else levels),
    st.lists(st.sampled_from(["a", "b", "", "+"]), max_size=4),
    st.booleans(),
)


def fits(pattern: list[str], topic: list[str]) -> bool:
    """The rule itself, level by level."""
    if pattern == ["#"]:
        return True
    if not pattern or not topic:
        return not pattern and not topic
    return pattern[0] in ("+", topic[0]) and fits(pattern[1:], topic[1:])


@pytest.mark.parametrize(
    ("pattern", "topic", "fit"),
    [
        ("news", "news", True),
        ("news", "news/sport", False),
        ("news/sport", "news", False),
        ("news/+", "news/sport", True),
        ("news/+", "news", False),
        ("news/+", "news/sport/golf", False),
        ("news/#", "news", True),
        ("news/#", "news/sport/golf", True),
        ("#", "news", True),
        ("+/sport", "news/sport", True),
        ("+/sport", "news/golf", False),
        ("+/+/golf", "news/sport/golf", True),
        ("news/", "news", False),
        ("+", "News", True),
        ("news", "News", False),
        ("a+b", "a+b", True),
        ("a+b", "axb", False),
    ],
)
def test_patterns(pattern: str, topic: str, fit: bool) -> None:
    topics: Topics[int] = Topics()
    topics.add(pattern, 1)
    assert topics.match(topic) == ([1] if fit else [])


@given(st.lists(st.tuples(PATTERN, st.integers(0, 3)), max_size=8), TOPIC)
def test_it_finds_what_the_rule_says(subscriptions: list[tuple[str, int]], topic: str) -> None:
    topics: Topics[int] = Topics()
    for pattern, who in subscriptions:
        topics.add(pattern, who)
    found = topics.match(topic)
    assert len(found) == len(set(found))
    assert set(found) == {who for pattern, who in subscriptions if fits(pattern.split("/"), topic.split("/"))}


@given(st.lists(st.tuples(PATTERN, st.integers(0, 3)), max_size=8), st.randoms())
def test_what_is_removed_leaves_nothing_behind(subscriptions: list[tuple[str, int]], random: object) -> None:
    topics: Topics[int] = Topics()
    for pattern, who in subscriptions:
        topics.add(pattern, who)
        topics.add(pattern, who)
    random.shuffle(subscriptions)  # type: ignore[attr-defined]
    assert bool(topics) == bool(subscriptions)
    for pattern, who in subscriptions:
        topics.remove(pattern, who)
    assert not topics


def test_removing_what_is_not_there_is_no_error() -> None:
    topics: Topics[int] = Topics()
    topics.add("a/b", 1)
    for pattern in ("a", "a/b/c", "x", "#"):
        topics.remove(pattern, 1)
    topics.remove("a/b", 2)
    assert topics.match("a/b") == [1]


@pytest.mark.parametrize("bad", ["", "x" * (TOPIC_MAX + 1), "/" * LEVELS_MAX])
def test_lengths_have_an_end(bad: str) -> None:
    for check in (check_topic, check_pattern):
        with pytest.raises(ValueError, match=f"1 to {TOPIC_MAX} characters in 1 to {LEVELS_MAX} levels"):
            check(bad)


def test_the_longest_is_taken() -> None:
    assert len(check_topic("x" * TOPIC_MAX)) == 1
    assert len(check_pattern("/".join("x" * LEVELS_MAX))) == LEVELS_MAX


@pytest.mark.parametrize("bad", [None, 1, b"news"])
def test_a_topic_is_text(bad: object) -> None:
    for check in (check_topic, check_pattern):
        with pytest.raises(TypeError, match="must be a str"):
            check(bad)


def test_wildcards_belong_into_patterns() -> None:
    for topic in ("+", "news/#", "a/+/b"):
        with pytest.raises(ValueError, match="a topic names them"):
            check_topic(topic)
    with pytest.raises(ValueError, match="'#' must be the last level"):
        check_pattern("a/#/b")
