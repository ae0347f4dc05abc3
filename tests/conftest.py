"""What both tiers share: where `bound/` runs, and the markers that name a row of `windows.md`."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ON_WINDOWS = sys.platform == "win32"

# `pytest` alone, unlike `python -m pytest`, does not look into the checkout.
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

collect_ignore = [] if ON_WINDOWS else ["bound"]


def rows() -> set[str]:
    """Return the names of the rows of windows.md."""
    return set(re.findall(r"^\| `([^`]+)` \|", (HERE / "windows.md").read_text(encoding="utf-8"), re.M))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "windows_only(row): runs on a real Windows only; `row` of tests/windows.md says why"
    )
    config.addinivalue_line(
        "markers",
        "wine_differs(row): checks by other means, there as well, what `row` of tests/windows.md says",
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not ON_WINDOWS:
        return ["tests/bound: not collected, it needs Windows: python3 tests/windows.py -m pytest"]
    from iocp_ctypes._win32 import is_wine

    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    where = "Wine" if is_wine() else "Windows"
    return [f"tests/bound: on {where}, {'with' if gil else 'without'} a GIL"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What ran with a GIL says nothing of a free-threaded Python."""
    if sysconfig.get_config_var("Py_GIL_DISABLED") and sys._is_gil_enabled():
        print("\nFAILED: something that was imported has brought the GIL back")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from iocp_ctypes._win32 import is_wine

    known = rows()
    for item in items:
        for name in ("windows_only", "wine_differs"):
            for mark in item.iter_markers(name):
                if len(mark.args) != 1 or mark.args[0] not in known:
                    raise pytest.UsageError(
                        f"{item.nodeid}: {name}{mark.args!r} names no row of tests/windows.md"
                    )
        mark = item.get_closest_marker("windows_only")
        if mark is not None and (is_wine() or not ON_WINDOWS):
            item.add_marker(
                pytest.mark.skip(reason=f"needs a real Windows: row {mark.args[0]!r} of tests/windows.md")
            )
