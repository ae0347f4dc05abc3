"""`tests/windows.py`, as far as it goes without Wine and without a network."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).resolve().parent.parent / "windows.py"
linux_half = pytest.mark.skipif(sys.platform == "win32", reason="the half of windows.py for Linux")

# Stands in for Wine: the programs are this interpreter's, and a wineserver is running already.
DRIVER = f"""
import os, runpy, shutil, sys
windows = runpy.run_path({str(RUNNER)!r})
timeout = float(sys.argv[1]) or None
variables = dict(os.environ, WINESERVER=shutil.which("false"))
sys.exit(windows["run"](windows["Target"]("native", (sys.executable,), variables), sys.argv[2:], timeout))
"""


def load() -> Any:
    spec = importlib.util.spec_from_file_location("windows_runner", RUNNER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


windows = load()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("IOCP_CTYPES_CACHE", str(folder))
    return folder


def options(
    python: Sequence[str] = (), timeout: Sequence[str] = (), extra: Sequence[str] = ()
) -> dict[str, list[str]]:
    return {"--python": list(python), "--timeout": list(timeout), "--with": list(extra)}


# Command line


@pytest.mark.parametrize(
    ("words", "own", "args"),
    [
        ([], options(), []),
        (["-m", "pytest", "-q"], options(), ["-m", "pytest", "-q"]),
        (["--python", "3.13t", "-c", "1"], options(python=["3.13t"]), ["-c", "1"]),
        (["--python=3.12", "--timeout=1.5", "x.py"], options(["3.12"], ["1.5"]), ["x.py"]),
        (["--with", "a", "--with=b>=2", "-"], options(extra=["a", "b>=2"]), ["-"]),
        (["x.py", "--timeout", "1"], options(), ["x.py", "--timeout", "1"]),
        (["--version"], options(), ["--version"]),
    ],
)
def test_own_options_come_before_the_first_argument(
    words: list[str], own: dict[str, list[str]], args: list[str]
) -> None:
    assert windows.parse(words) == (own, args)


@pytest.mark.parametrize(
    "words",
    [["--python"], ["--python="], ["--with"], ["--timeout", "0"], ["--timeout", "-1"], ["--timeout=soon"]],
)
def test_an_option_without_a_proper_value_is_one_line_and_code_2(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert windows.main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"windows.py: {words[0].partition('=')[0]} needs ")
    assert err.count("\n") == 1


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert windows.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in options())


# The interpreter


def tags(*versions: str) -> dict[str, Path]:
    return dict.fromkeys(versions, Path())


@pytest.mark.parametrize(
    ("own", "wanted", "versions", "chosen"),
    [
        ("3.12", None, ["3.11", "3.12", "3.13"], "3.12"),
        ("3.10", None, ["3.11", "3.13"], "3.13"),
        ("3.11", "3.13", ["3.11", "3.13"], "3.13"),
        ("3.11", "3.13t", ["3.11", "3.13"], "3.13t"),
    ],
)
def test_the_running_version_is_the_default_and_else_the_newest(
    own: str, wanted: str | None, versions: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "OWN", own)
    monkeypatch.setattr(windows.sysconfig, "get_config_var", lambda name: 0)
    assert windows.choose(wanted, tags(*versions)) == chosen


def test_a_free_threaded_host_has_a_free_threaded_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "OWN", "3.13")
    monkeypatch.setattr(windows.sysconfig, "get_config_var", lambda name: 1)
    assert windows.choose(None, tags("3.13")) == "3.13t"


@pytest.mark.parametrize("wanted", ["3.9", "3.14", "3", "three"])
def test_an_unknown_version_names_the_ones_there_are(wanted: str) -> None:
    with pytest.raises(windows.Problem, match=r"available: 3\.11, 3\.13, 3\.13t$"):
        windows.choose(wanted, tags("3.11", "3.13"))


def test_no_standard_library_at_all_is_a_problem() -> None:
    with pytest.raises(windows.Problem, match="no standard library"):
        windows.choose(None, {})


@linux_half
def test_standard_libraries_of_pyenv_and_uv_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "OWN", "3.10")
    monkeypatch.setattr(windows, "TAGS", ("3.98", "3.99", "3.99t"))
    homes = {
        "3.98": tmp_path / "pyenv/versions/3.98.1",
        "3.99": tmp_path / "uv/cpython-3.99.0-linux-x86_64-gnu",
    }
    for version, home in homes.items():
        module = home / f"lib/python{version}/asyncio/windows_events.py"
        module.parent.mkdir(parents=True)
        module.touch()
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    expected = {version: home / f"lib/python{version}" for version, home in homes.items()}
    assert windows.host_stdlibs() == expected


# Requirements


EXTRAS = '[project.optional-dependencies]\nhttp = ["h11"]\n'


def test_without_pyproject_the_test_requirements_have_a_default(tmp_path: Path) -> None:
    assert windows.requirements(tmp_path / "pyproject.toml") == windows.TEST_REQUIREMENTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EXTRAS + 'test = ["pytest>=8", "mypy>=1", "ruff"]\n', ["pytest>=8"]),
        (EXTRAS + 'test = [\n  "a[b]>=1",  # why\n  "mypy-x",\n]\n[tool.x]\n', ["a[b]>=1", "mypy-x"]),
        (EXTRAS + '[tool.x]\ntest = ["no"]\n', None),
        ('[tool.x]\ntest = ["no"]\n', None),
        (EXTRAS + "test = []\n", []),
    ],
)
def test_requirements_are_the_test_extra_without_host_tools(
    text: str, expected: list[str] | None, tmp_path: Path
) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(text)
    assert windows.requirements(file) == (windows.TEST_REQUIREMENTS if expected is None else expected)


def test_this_project_names_what_its_tests_import() -> None:
    names = " ".join(windows.requirements())
    assert all(name in names for name in ("pytest", "pytest-timeout", "hypothesis"))
    assert not any(tool in names for tool in windows.HOST_TOOLS)


# The cache


def test_the_cache_folder_is_made(cache: Path) -> None:
    assert windows.cache_folder() == cache.resolve()
    assert cache.is_dir()


@linux_half
def test_the_cache_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IOCP_CTYPES_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert windows.cache_folder() == (tmp_path / "xdg/iocp_ctypes").resolve()


def test_an_unusable_cache_is_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IOCP_CTYPES_CACHE", str(tmp_path / "file" / "cache"))
    assert windows.main(["--with", "a", "-c", "1"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("windows.py: cannot use the cache folder ")
    assert err.count("\n") == 1


def test_a_result_appears_when_it_is_complete() -> None:
    final = windows.cache_folder() / "thing"
    with windows.building(final) as part:
        (part / "file").write_text("x")
        assert not final.exists()
    assert (final / "file").read_text() == "x"
    with windows.building(final) as part:
        assert part is None


def test_a_failed_step_leaves_nothing_and_the_next_begins_anew() -> None:
    final = windows.cache_folder() / "thing"
    with contextlib.suppress(ZeroDivisionError), windows.building(final) as part:
        (part / "half").write_text(str(1 / 0))
    assert not final.exists()
    with windows.building(final) as part:
        assert list(part.iterdir()) == []


def test_of_two_builders_one_builds_and_the_other_waits() -> None:
    final = windows.cache_folder() / "thing"
    seen: list[object] = []

    def second() -> None:
        with windows.building(final) as part:
            seen.append(part)

    with windows.building(final) as part:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        assert seen == []
        (part / "file").touch()
    thread.join(20)
    assert seen == [None]


# Problems on Linux


class Pip:
    """In pip's place: keeps the commands, answers each with `output` and `code`."""

    output = ""
    code = 0

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.code, self.output)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    fake = Pip()
    monkeypatch.setattr(windows, "quietly", fake)
    monkeypatch.setattr(windows, "host_pip", lambda: "python")
    return fake


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("Retrying after connection broken by 'X'\nERROR: No matching distribution found", "no network"),
        ("ERROR: a\nERROR: No matching distribution for b==1\n", "No matching distribution for b==1$"),
        ("Traceback\nboom", "boom$"),
        ("", "no output$"),
    ],
)
def test_what_pip_says_becomes_one_line(output: str, line: str, pip: Pip) -> None:
    pip.output, pip.code = output, 1
    with pytest.raises(windows.Problem, match=line) as caught:
        windows.pip("3.12", "install", "b==1")
    assert "\n" not in str(caught.value)


def test_a_free_threaded_interpreter_takes_no_stable_abi(pip: Pip) -> None:
    windows.pip("3.13t", "install", "x")
    windows.pip("3.13", "install", "x")
    free_threaded, usual = pip.commands
    assert "cp313t" in free_threaded
    assert "abi3" not in free_threaded
    assert {"cp313", "abi3", "none"} <= set(usual)


def test_packages_are_installed_once(pip: Pip) -> None:
    folder = windows.install("3.12", ["x"])
    assert windows.install("3.12", ["x"]) == folder
    assert windows.install("3.12", ["y"]) != folder
    assert [command[-1] for command in pip.commands] == ["x", "y"]


@linux_half
@pytest.mark.parametrize(
    ("apt", "user", "line"),
    [
        (None, 0, "there is no apt-get here"),
        ("/usr/bin/apt-get", 1000, "sudo apt-get install --no-install-recommends wine wine64 gcc-mingw-w64"),
    ],
)
def test_missing_wine_is_one_line(
    apt: str | None, user: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows.shutil, "which", lambda name: apt if name == "apt-get" else None)
    windows.cache_folder()
    monkeypatch.setattr(windows, "locked", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(windows.os, "geteuid", lambda: user)
    with pytest.raises(windows.Problem, match=line):
        windows.tools()


@linux_half
@pytest.mark.parametrize(("system", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_another_system_is_a_problem(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(**{**vars(sys), "platform": system})
    monkeypatch.setattr(windows, "sys", fake)
    monkeypatch.setattr(windows.platform, "machine", lambda: machine)
    with pytest.raises(windows.Problem, match=f"unsupported system {system} {machine}"):
        windows.prepare()


# Running, with this interpreter in Wine's place


@contextlib.contextmanager
def running(code: str, timeout: float = 0, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", DRIVER, str(timeout), "-c", code]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    with subprocess.Popen(command, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def result(
    code: str, timeout: float = 0, data: bytes | None = None, **streams: Any
) -> tuple[int, bytes, bytes]:
    with running(code, timeout, **streams) as process:
        out, err = process.communicate(data, timeout=60)
        return process.returncode, out or b"", err or b""


@linux_half
def test_what_the_host_is_told_of_its_screen_and_its_python_does_not_reach_wine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DISPLAY", "TMPDIR", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OF_THE_CALLER", "2")
    made = windows.wine_environment(Path("/prefix"), windows.Tools("wine", "wineserver", "compiler"))
    assert not {"DISPLAY", "TMPDIR", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"} & set(made)
    assert (made["OF_THE_CALLER"], made["WINEPREFIX"], made["WINESERVER"]) == ("2", "/prefix", "wineserver")


@linux_half
def test_exit_code_and_both_outputs_come_through() -> None:
    code = "import sys; sys.stdout.write('out'); sys.stderr.write('err'); sys.exit(7)"
    assert result(code) == (7, b"out", b"err")


@linux_half
@pytest.mark.parametrize("as_file", [False, True], ids=["pipe", "file"])
def test_stdin_comes_through_in_bytes(as_file: bool, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    code = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"
    if as_file:
        (tmp_path / "data").write_bytes(data)
        with open(tmp_path / "data", "rb") as file:
            assert result(code, stdin=file) == (0, data, b"")
    else:
        assert result(code, data=data, stdin=subprocess.PIPE) == (0, data, b"")


@linux_half
def test_output_may_go_to_files(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        assert result("print('x' * 100_000)", stdout=out)[0] == 0
    assert (tmp_path / "out").read_bytes() == b"x" * 100_000 + b"\n"


@linux_half
def test_output_comes_when_it_is_written() -> None:
    with running("import time; print('up'); time.sleep(300)") as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        assert process.poll() is None


@linux_half
def test_ctrl_c_reaches_the_program() -> None:
    code = "try:\n print('up', flush=True)\n input()\nexcept KeyboardInterrupt:\n raise SystemExit(9)"
    reader, writer = os.pipe()
    # A shell has its background jobs ignore SIGINT, and these tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with open(reader, "rb"), open(writer, "wb"), running(code, stdin=reader) as process:
            assert process.stdout
            assert process.stdout.readline() == b"up\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 9
    finally:
        signal.signal(signal.SIGINT, before)


@linux_half
def test_the_time_limit_ends_the_program_and_what_it_started() -> None:
    code = (
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "child = subprocess.Popen(sleep, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)"
    )
    exit_code, out, err = result(code, timeout=1.5)
    assert exit_code == windows.TIMED_OUT
    assert err == b"windows.py: ended at the time limit of 1.5 s\n"
    assert not alive(int(out))


@linux_half
def test_only_processes_of_the_run_are_ended() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
    variables = {**os.environ, "WINESERVER": shutil.which("false") or ""}
    target = windows.Target("native", (sys.executable,), variables)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(subprocess.Popen(sleep))
        stack.callback(other.kill)
        one, two = (stack.enter_context(target.popen(sleep[1:])) for _ in range(2))
        stack.callback(two.end)
        assert one.end() == -signal.SIGKILL
        assert other.poll() is None
        assert two.poll() is None


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
