"""Importing: off Windows, on Windows, and as a vendored copy under another parent package."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import iocp_ctypes

FOLDER = Path(iocp_ctypes.__file__).parent
PURE = {
    "CloseReason",
    "ConnectionClosedError",
    "ConnectionStats",
    "EngineStats",
    "OPTIONS",
    "Stats",
    "TraceRecord",
    "Usage",
}
BOUND = {
    "Connection",
    "Datagram",
    "Engine",
    "IncompleteReadError",
    "Server",
    "Stream",
    "StreamServer",
    "connect",
    "open_stream",
}
#: Modules that import anywhere; the others need Windows, each with the same words.
PURE_MODULES = (
    "_addresses",
    "_datagramoptions",
    "_deadlines",
    "_errors",
    "_flow",
    "_lifecycle",
    "_options",
    "_stats",
    "_strand",
    "_topics",
    "_trace",
    "certificate",
    "tls",
)
BOUND_MODULES = (
    "_acceptor",
    "_channel",
    "_commands",
    "_lifetime",
    "_sockops",
    "_tlschannel",
    "client",
    "connection",
    "datagram",
    "server",
    "stream",
    "stream_server",
    "websocket",
)
ON_WINDOWS = sys.platform == "win32"
NEEDS_WINDOWS = r"^iocp_ctypes needs Windows for \w+: \w+ has no completion ports$"


def run(program: str, *path: Path) -> str:
    """Run a program in a Python of its own, with these folders in front; return what it writes."""
    begin = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", begin + program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


@pytest.fixture
def vendored(tmp_path: Path) -> Iterator[Path]:
    """A folder with a package `vendored` that holds a copy of the library."""
    package = tmp_path / "vendored"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copytree(
        FOLDER,
        package / "iocp_ctypes",
        ignore=shutil.ignore_patterns("__pycache__", ".*"),
        copy_function=shutil.copyfile,  # from Python 3.13 on the usual one calls what Wine has not
    )
    return tmp_path


def test_all_names_are_sorted_and_there_is_nothing_behind_them() -> None:
    assert set(iocp_ctypes.__all__) >= PURE | BOUND
    assert len(set(iocp_ctypes.__all__)) == len(iocp_ctypes.__all__)
    shown = {name for name in vars(iocp_ctypes) if not name.startswith("_")}
    modules = {module.name for module in pkgutil.iter_modules([str(FOLDER)])}
    helpers = {"annotations", "sys", "TYPE_CHECKING", "Any"}
    assert shown - modules - helpers <= set(iocp_ctypes.__all__)


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_names_work_anywhere(name: str) -> None:
    assert getattr(iocp_ctypes, name) is not None


@pytest.mark.parametrize("name", sorted(BOUND))
def test_bound_names_need_windows(name: str) -> None:
    if ON_WINDOWS:
        assert callable(getattr(iocp_ctypes, name))
        return
    with pytest.raises(ImportError, match=NEEDS_WINDOWS) as caught:
        getattr(iocp_ctypes, name)
    assert name in str(caught.value)
    with pytest.raises(ImportError, match=NEEDS_WINDOWS):
        exec(f"from iocp_ctypes import {name}")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sever'"):
        iocp_ctypes.Sever  # noqa: B018
    assert not hasattr(iocp_ctypes, "__path_of_nothing__")


@pytest.mark.parametrize("name", PURE_MODULES)
def test_pure_modules_import_anywhere(name: str) -> None:
    assert importlib.import_module(f"iocp_ctypes.{name}").__name__ == f"iocp_ctypes.{name}"


@pytest.mark.parametrize("name", BOUND_MODULES)
def test_bound_modules_need_windows(name: str) -> None:
    if ON_WINDOWS:
        assert importlib.import_module(f"iocp_ctypes.{name}").__name__ == f"iocp_ctypes.{name}"
        return
    with pytest.raises(ImportError, match=NEEDS_WINDOWS):
        importlib.import_module(f"iocp_ctypes.{name}")


def test_an_engine_needs_windows() -> None:
    engine = importlib.import_module("iocp_ctypes.engine")
    if ON_WINDOWS:
        engine.Engine().port.close()
        return
    with pytest.raises(ImportError, match=NEEDS_WINDOWS):
        engine.Engine()


def test_importing_has_no_side_effects_that_a_program_would_notice() -> None:
    program = """
import faulthandler, signal, socket, threading, warnings
before = (threading.active_count(), signal.getsignal(signal.SIGINT), socket.getdefaulttimeout(),
          warnings.filters[:], sys.excepthook, threading.excepthook, sys.getswitchinterval())
import iocp_ctypes
after = (threading.active_count(), signal.getsignal(signal.SIGINT), socket.getdefaulttimeout(),
         warnings.filters[:], sys.excepthook, threading.excepthook, sys.getswitchinterval())
assert before == after, (before, after)
import logging
assert not logging.getLogger().handlers and not logging.getLogger("iocp_ctypes").handlers
gil = getattr(sys, "_is_gil_enabled", None)
print("asyncio" in sys.modules, "ssl" in sys.modules, gil() if gil else None)
"""
    without_gil = getattr(sys, "_is_gil_enabled", lambda: None)()
    assert run(program, FOLDER.parent) == f"False False {without_gil}"


def test_a_vendored_copy_imports_nothing_of_an_installed_one(vendored: Path) -> None:
    program = """
from vendored.iocp_ctypes import OPTIONS, CloseReason
import vendored.iocp_ctypes as copy
if sys.platform == "win32":
    from vendored.iocp_ctypes import Connection, Engine, Server
    assert Server.__module__ == "vendored.iocp_ctypes.server"
    with Server(("127.0.0.1", 0), Connection) as server:
        assert server.address[1]
else:
    try:
        copy.Server
    except ImportError as exc:
        assert str(exc).startswith("iocp_ctypes needs Windows"), exc
    else:
        raise AssertionError
others = [name for name in sys.modules if name.split(".")[0] == "iocp_ctypes"]
print(others, CloseReason.__module__)
"""
    # The checkout is on the path as well: an absolute import would find it.
    assert run(program, vendored, FOLDER.parent) == "[] vendored.iocp_ctypes._lifecycle"


def test_a_vendored_copy_runs_as_a_command(vendored: Path) -> None:
    program = """
import runpy
sys.argv = ["iocp_ctypes", "--help"]
try:
    runpy.run_module("vendored.iocp_ctypes", run_name="__main__", alter_sys=True)
except SystemExit as exc:
    assert not exc.code, exc
print([name for name in sys.modules if name.split(".")[0] == "iocp_ctypes"])
"""
    written = run(program, vendored, FOLDER.parent)
    assert "usage: python -m iocp_ctypes" in written
    assert written.endswith("[]")


def test_imports_of_the_package_are_relative() -> None:
    for file in sorted(FOLDER.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[Any] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert not [name for name in names if name.split(".")[0] == "iocp_ctypes"], file.name
