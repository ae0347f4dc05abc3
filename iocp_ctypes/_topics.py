"""Topics, and who has subscribed to them (layer P: pure, no locks).

Laws
1. A topic is a path of levels between slashes: "news/sport". In a pattern a level "+" stands for any one
   level, and a last level "#" for any number of levels, none included (MQTT 5.0, section 4.7.1).
2. A look-up costs by the levels of the topic and the patterns that fit it, not by the number of subscribers
   to others.
3. What nobody subscribes to any more leaves nothing behind.
The caller holds a lock.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

#: Characters of a topic or a pattern.
TOPIC_MAX: Final = 1024
#: Levels of either: a look-up visits each.
LEVELS_MAX: Final = 32

ONE, REST = "+", "#"


def check_topic(topic: Any) -> list[str]:
    """Return the levels of a topic that is published to; TypeError or ValueError says what is wrong."""
    levels = _levels("topic", topic)
    if ONE in levels or REST in levels:
        raise ValueError(f"topic={topic!r}: '+' and '#' stand for levels in patterns; a topic names them")
    return levels


def check_pattern(pattern: Any) -> list[str]:
    """Return the levels of a pattern that is subscribed to; TypeError or ValueError says what is wrong."""
    levels = _levels("pattern", pattern)
    if REST in levels[:-1]:
        raise ValueError(f"pattern={pattern!r}: '#' must be the last level")
    return levels


def _levels(name: str, text: Any) -> list[str]:
    allowed = f"1 to {TOPIC_MAX} characters in 1 to {LEVELS_MAX} levels between slashes"
    if not isinstance(text, str):
        raise TypeError(f"{name}={text!r}: must be a str of {allowed}")
    levels = text.split("/")
    if not 1 <= len(text) <= TOPIC_MAX or len(levels) > LEVELS_MAX:
        raise ValueError(f"{name}={text[:80]!r}: must be {allowed}")
    return levels


class _Node(Generic[T]):
    """A level: those whose pattern ends here, and the levels below. The dict keeps the order of coming."""

    __slots__ = ("below", "here")

    def __init__(self) -> None:
        self.here: dict[T, None] = {}
        self.below: dict[str, _Node[T]] = {}


class Topics(Generic[T]):
    """A tree of patterns."""

    __slots__ = ("_root",)

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()

    def __bool__(self) -> bool:
        return bool(self._root.below)

    def add(self, pattern: str, who: T) -> None:
        """Subscribe; a second time changes nothing."""
        node = self._root
        for level in check_pattern(pattern):
            node = node.below.setdefault(level, _Node())
        node.here[who] = None

    def remove(self, pattern: str, who: T) -> None:
        """Unsubscribe; who has not subscribed is left alone."""
        levels = check_pattern(pattern)
        way = [self._root]
        for level in levels:
            node = way[-1].below.get(level)
            if node is None:
                return
            way.append(node)
        way[-1].here.pop(who, None)
        while levels and not way[-1].here and not way[-1].below:
            way.pop()
            del way[-1].below[levels.pop()]

    def match(self, topic: str) -> list[T]:
        """Return who has subscribed to a topic, each once."""
        found: dict[T, None] = {}
        nodes = [self._root]
        for level in check_topic(topic):
            deeper: list[_Node[T]] = []
            for node in nodes:
                below = node.below
                if REST in below:
                    found.update(below[REST].here)
                if level in below:
                    deeper.append(below[level])
                if ONE in below:
                    deeper.append(below[ONE])
            nodes = deeper
        for node in nodes:
            found.update(node.here)
            if REST in node.below:
                found.update(node.below[REST].here)
        return list(found)
