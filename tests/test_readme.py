"""README and DESIGN: the example runs, commands are accepted, what is named exists, tables are true."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from iocp_ctypes import _lifecycle
from iocp_ctypes.__main__ import _parser
from iocp_ctypes._options import OPTIONS, Settings

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "iocp_ctypes"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (PACKAGE / "DESIGN.md").read_text(encoding="utf-8")


def section(title: str, text: str = TEXT) -> str:
    """The text under a heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, title
    return found[1]


def rows(text: str, head: bool = False) -> list[list[str]]:
    """The cells of a section's tables, without their heads or with them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    ruled = [number for number, line in enumerate(lines) if set(line) <= set("|-")]
    left_out = {*ruled, *(() if head else (number - 1 for number in ruled))}
    kept = [line for number, line in enumerate(lines) if number not in left_out]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in kept]


def in_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
EXAMPLE = BLOCKS[0]
COMMANDS = sorted({code for code in in_code(TEXT) if re.match(r"(py|python3?|pip) ", code)})


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.splitlines()) <= 12
    compile(EXAMPLE, "README.md", "exec")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    program, *words = shlex.split(command.replace("\\", "/"))
    if (program, words[0]) == ("pip", "install"):
        assert words in (["install", place] for place in (".", ".[http]", ".[websocket]"))
        return
    if words[0] == "tests/windows.py":
        words = words[1:]
        if words == ["ARGS"]:
            return
    if words[0] == "-m":
        module, *arguments = words[1:]
        if module == "iocp_ctypes" and "--help" not in arguments:
            _parser().parse_args(arguments)
        else:
            assert module in {"iocp_ctypes", "pytest", "pydoc"}
    else:
        assert (ROOT / words[0]).is_file() or words == ["ARGS"]


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[a-z]+)", TEXT))))
def test_options_exist(option: str) -> None:
    sources = ["tests/windows.py", "tests/bench/command.py", "iocp_ctypes/__main__.py"]
    assert any(f'"{option}"' in (ROOT / name).read_text(encoding="utf-8") for name in sources)


def test_what_is_named_exists() -> None:
    names = [code for code in in_code(TEXT) if re.fullmatch(r"[\w./]*(\.py|\.md|/)|LICENSE", code)]
    assert len(names) > 30
    for name in names:
        assert any((folder / name).exists() for folder in (ROOT, PACKAGE, ROOT / "examples")), name


def test_guarantees_are_shown_by_tests_that_exist() -> None:
    guarantees = re.split(r"^\d\. ", section("Guarantees"), flags=re.M)[1:]
    assert len(guarantees) == 5
    for guarantee in guarantees:
        tests = [code for code in in_code(guarantee) if "::" in code]
        assert tests, guarantee
        for test in tests:
            file, name = test.split("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_map_has_every_file_in_its_layer() -> None:
    mapped = {name: layer for files, layer, _owns in rows(section("The map")) for name in in_code(files)}
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert set(mapped) == {path.name for path in PACKAGE.glob("*.py")} | packages
    for name, layer in mapped.items():
        file = PACKAGE / name / "__init__.py" if name.endswith("/") else PACKAGE / name
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        expected = {"pure": "(layer P: pure", "front": ""}.get(layer, f"L{layer}: ")
        assert expected in docstring.split("\n\n")[0].replace("\n", " "), name


def spelled(value: Any, text: str) -> Any:
    """Read a default in the way the table writes it, as the type of the value it should be."""
    number, _, unit = text.partition(" ")
    units = {"KiB": 1024, "MiB": 1024 * 1024, "s": 1}
    return int(number) * units[unit] if unit else ast.literal_eval(text)


def test_the_options_are_those_that_exist() -> None:
    table = {
        in_code(option)[0]: (default, meaning)
        for option, default, meaning in rows(section("Options of `Server`"))
    }
    assert list(table) == list(OPTIONS)
    files = [PACKAGE / "server.py", PACKAGE / "_tunables.py"]
    server = "".join(file.read_text(encoding="utf-8") for file in files)
    live = set(re.findall(r'Live\[.*?\]\("(\w+)"\)', server)) | set(re.findall(r"@(\w+)\.setter", server))
    for name, (default, meaning) in table.items():
        assert spelled(getattr(Settings(), name), default.strip("`")) == getattr(Settings(), name), name
        assert meaning.endswith("; live") == (name in live), name


def test_the_metadata_points_to_files_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', project, re.M)
    assert len(named) == 2
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("document", ["DESIGN.md", "CHANGES.md"])
def test_files_named_in_the_documents_exist(document: str) -> None:
    text = (PACKAGE / document).read_text(encoding="utf-8")
    for name in in_code(text):
        if re.fullmatch(r"[\w/]+\.(py|md|pyi)", name):
            assert any((folder / name).exists() for folder in (ROOT, PACKAGE)), name


def test_the_states_of_the_design_are_those_of_the_table() -> None:
    head, *states = rows(section("3. States", DESIGN), head=True)
    events = head[2:]
    assert events == list(_lifecycle.EVENTS)
    assert [state[0].lower() for state in states] == list(_lifecycle.STATE_NAMES)
    told = {
        (getattr(_lifecycle, name), event): getattr(_lifecycle, to)
        for name, _meaning, *targets in states
        for event, to in zip(events, targets, strict=True)
        if to
    }
    assert told == _lifecycle.TRANSITIONS


def test_the_limits_of_the_design_exist_and_none_is_missing() -> None:
    told: dict[str, list[str]] = {}
    for names, _default, _reason in rows(section("7. Limits", DESIGN)):
        files = [name for name in in_code(names) if name.endswith(".py")]
        for name in in_code(names):
            if name.isupper():
                told[name] = files
            elif name not in files:
                assert name in OPTIONS
    for name, files in told.items():
        for file in files:
            assert re.search(rf"^{name}: Final = ", (PACKAGE / file).read_text(encoding="utf-8"), re.M), name
    limit = re.compile(
        r"^([A-Z]\w*(?:_MAX|_MIN|_TIMEOUT|_FIRST|_PATIENCE\w*|_CHECK\w*|_GAP)): Final = ", re.M
    )
    ours = [path for path in PACKAGE.rglob("*.py") if path.name != "_win32.py"]  # its constants are Windows'
    there = {name for path in ours for name in limit.findall(path.read_text(encoding="utf-8"))}
    assert there <= set(told)


def test_locks_and_functions_of_the_design_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for name in in_code(DESIGN):
        if match := re.fullmatch(r"[A-Z]\w+\.(\w+)(\(\w*\))?", name):
            assert re.search(rf"\b{match[1]}\b", sources), name


if sys.platform == "win32":
    import socket
    import time
    import traceback

    from program import PATIENCE, Program, running

    from iocp_ctypes import Connection, Server

    def client(address: Any) -> socket.socket:
        return socket.create_connection(address, timeout=PATIENCE)

    def test_the_example_runs() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        code = EXAMPLE.replace("9000", str(port))
        assert code != EXAMPLE
        with running("-c", code) as program:
            for _ in range(3):
                with patiently_connected(port) as sock:
                    sock.sendall(b"hello")
                    assert sock.recv(5, socket.MSG_WAITALL) == b"hello"
                    mine = sock.getsockname()[1]
                program.line(rf"bye \('127\.0\.0\.1', {mine}\) eof")

    def test_the_example_over_tls_runs() -> None:
        [code] = [block for block in BLOCKS if "throwaway_certificate" in block]
        program = Program("-c", code)
        try:
            program.line(r"b'HELLO\\n' TLSv1\.3")
            assert program.ended() == (0, [])
        finally:
            program.kill()

    def patiently_connected(port: int) -> socket.socket:
        """Connect to a server that may not listen yet."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return client(("127.0.0.1", port))
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def test_the_map_tells_the_way_of_a_received_byte() -> None:
        told = re.findall(r"^\d\. `(\w+\.py)`", section("The map"), re.M)
        assert told == ["_sockops.py", "_port.py", "_dispatcher.py", "_channel.py", "connection.py"]
        ways: list[list[str]] = []

        class Follow(Connection):
            def on_data(self, data: bytes) -> None:
                ways.append([Path(frame.filename).name for frame in traceback.extract_stack()])
                self.send(data)

        with Server(("127.0.0.1", 0), Follow) as server, client(server.address) as sock:
            for _ in range(3):
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
        for way in ways:
            ours = [name for name in way if (PACKAGE / name).exists()]
            assert ours == ["_dispatcher.py", "_dispatcher.py", "_channel.py"]
            assert way[-1] == Path(__file__).name
