"""The laws of the house that a reader of the sources can check; `ast` is the reader.

TABLE is the one list of layers. A new module gets a row, between what it builds on and what builds on it.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "iocp_ctypes"

P, FRONT = 0, 8

#: THE table of layers: a module may import only from rows above its own. Layer P is pure; FRONT is what users
#: and the command line touch first. A package of modules has one row.
TABLE: dict[str, int] = {
    "_lifecycle": P,
    "_errors": P,
    "_flow": P,
    "_burst": P,
    "_caps": P,
    "_deadlines": P,
    "_strand": P,
    "_relay": P,
    "_locks": P,
    "_addresses": P,
    "_options": P,
    "_stats": P,
    "_topics": P,
    "_datagramoptions": P,
    "_httplimits": P,
    "_httpmessage": P,
    "_httppaths": P,
    "access": P,
    "_wsgienviron": P,
    "_trace": P,
    "tls": P,
    "_win32": 1,
    "certificate": 1,
    "_win32files": 1,
    "_port": 2,
    "_proactor": 3,
    "_dispatcher": 4,
    "_fileops": 4,
    "_sockops": 4,
    "_pipeops": 4,
    "_datagramops": 4,
    "watchdog": 5,
    "_tracing": 5,
    "engine": 5,
    "_acceptor": 5,
    "_connector": 5,
    "_pipeconnector": 5,
    "_listening": 5,
    "_lifetime": 5,
    "_channel": 5,
    "_burstchannel": 5,
    "_filechannel": 5,
    "_tlschannel": 5,
    "_detaching": 5,
    "connection": 5,
    "_datagramchannel": 5,
    "workers": 6,
    "_workerprocess": 6,
    "_processes": 6,
    "_watching": 6,
    "_tunables": 6,
    "_handover": 6,
    "server": 6,
    "client": 6,
    "stream": 6,
    "stream_server": 6,
    "datagram": 6,
    "_httplog": 7,
    "_httpfiles": 7,
    "_httpparse": 7,
    "_httpanswer": 7,
    "_sse": 7,
    "_detect": 7,
    "http": 7,
    "websocket": 7,
    "wsgi": 7,
    "monitor": 7,
    "_commands": 7,
    "__init__": FRONT,
    "__main__": FRONT,
}
#: The layers that may know ctypes.
CTYPES_LAYERS = range(1, 5)
#: Libraries that an optional module may need. The core needs none.
THIRD_PARTY = {"_httpparse": {"h11"}, "wsgi": {"h11"}, "websocket": {"websockets"}}
#: Modules that write to the terminal, because that is what they are for.
PRINTING = {"_commands", "__main__"}
#: What modules do to the process when they are imported; each is explained where it stands.
SIDE_EFFECTS = {
    "_sockops": ["_win32.WSAStartup"],  # Winsock must be on before the first call
    "_httpparse": ["Try"],  # an ImportError that says what to install
    "engine": [
        "getattr(threading, '_register_atexit', atexit.register)"
    ],  # engines end before the interpreter
    "client": ["Engine._adopter"],  # upward flow is a callable handed over
}
#: Above the layers that own raw values: who may look into `_win32` all the same.
WIN32_READERS = {"_commands"}  # counts native calls for the demonstration
FUNCTION_LINES_MAX, FILE_LINES_MAX, LINE_LENGTH_MAX = 70, 600, 110
#: No machine of ours has a place in the sources.
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:root|home|work|Users|tmp)/\w|[A-Za-z]:\\+(?:Users|work|root|home)\b"
)

FILES = sorted(path for path in FOLDER.rglob("*.py") if "__pycache__" not in path.parts)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    """The name of a file's row: the module, or the package it is in."""
    return file.relative_to(FOLDER).with_suffix("").parts[0]


@functools.cache
def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(text_of(file), str(file))


def ident(value: Any) -> str:
    return str(value.relative_to(ROOT)).replace("\\", "/") if isinstance(value, Path) else repr(value)


each_file = pytest.mark.parametrize("file", FILES, ids=ident)


def own_imports(file: Path) -> Iterator[str]:
    """The rows that a file imports from, wherever in it; for the type checker alone counts as well."""
    rows = {name_of(other) for other in FILES}
    depth = len(file.relative_to(FOLDER).parts)
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            if node.module:
                yield node.module.split(".")[0]
            else:
                yield from (alias.name for alias in node.names if alias.name in rows)


def foreign_imports(file: Path) -> Iterator[str]:
    """The modules of others that a file imports when it runs."""
    typing_only: set[int] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typing_only.update(
                line for inner in node.body for line in range(inner.lineno, inner.end_lineno or 0)
            )
            typing_only.update(inner.end_lineno or 0 for inner in node.body)
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import) and node.lineno not in typing_only:
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.lineno not in typing_only:
            yield (node.module or "").split(".")[0]


def test_the_files_are_found_and_each_has_its_row() -> None:
    assert len(FILES) > 20
    assert {name_of(file) for file in FILES} <= set(TABLE)


def test_the_table_is_in_order() -> None:
    assert list(TABLE.values()) == sorted(TABLE.values())


@each_file
def test_a_module_imports_only_from_what_is_below_it(file: Path) -> None:
    rows = list(TABLE)
    name = name_of(file)
    above = rows[rows.index(name) + (len(file.relative_to(FOLDER).parts) > 1) :]
    assert not [imported for imported in own_imports(file) if imported in above], "these stand above"
    assert set(own_imports(file)) <= set(TABLE)


@each_file
def test_the_docstring_says_what_the_module_is_and_its_layer(file: Path) -> None:
    docstring = ast.get_docstring(tree_of(file)) or ""
    assert docstring, "a module begins by saying what it is"
    layer = TABLE[name_of(file)]
    first = docstring.split("\n\n")[0].replace("\n", " ")
    if layer == P:
        assert re.search(r"\(layer P: pure\b", first), first
    elif layer < FRONT:
        assert first.startswith(f"L{layer}: "), first


@each_file
def test_ctypes_stays_in_the_layers_that_own_raw_values(file: Path) -> None:
    name, layer = name_of(file), TABLE[name_of(file)]
    if layer not in CTYPES_LAYERS:
        assert not {"ctypes", "_ctypes", "_overlapped", "_winapi"} & set(foreign_imports(file))
    if layer > max(CTYPES_LAYERS) and name not in WIN32_READERS:
        declared = {"_win32", "_win32files"} & set(own_imports(file))
        assert not declared, "raw handles, pointers and DWORDs stay below"


def test_pure_modules_have_no_threads() -> None:
    for file in FILES:
        if TABLE[name_of(file)] == P:
            assert not {"threading", "select", "selectors"} & set(foreign_imports(file)) or (
                name_of(file) in {"_strand", "_locks"}  # locks, and no thread
            ), file.name


@each_file
def test_the_core_needs_nothing_but_the_standard_library(file: Path) -> None:
    allowed = sys.stdlib_module_names | THIRD_PARTY.get(name_of(file), set())
    assert not set(foreign_imports(file)) - allowed


@each_file
def test_functions_and_files_stay_small(file: Path) -> None:
    lines = text_of(file).splitlines()
    assert len(lines) <= FILE_LINES_MAX
    for node in ast.walk(tree_of(file)):
        if isinstance(node, Function):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines"


@pytest.mark.parametrize("folder", ["iocp_ctypes", "examples", "tests"])
def test_lines_stay_short_and_end_cleanly(folder: str) -> None:
    for file in sorted((ROOT / folder).rglob("*.py")):
        for number, line in enumerate(text_of(file).splitlines(), 1):
            where = f"{ident(file)}:{number}"
            assert len(line) <= LINE_LENGTH_MAX, where
            assert "\t" not in line, where
            assert line == line.rstrip(), where


@each_file
def test_there_is_a_test_file_for_it(file: Path) -> None:
    name = {"__init__": "import", "__main__": "main"}.get(name_of(file), name_of(file).lstrip("_"))
    found = [path for tier in ("pure", "bound") for path in (ROOT / "tests" / tier).glob(f"test_{name}.py")]
    assert len(found) == 1, f"tests/pure/test_{name}.py or tests/bound/test_{name}.py"
    assert "\ndef test_" in text_of(found[0]) or "Test" in text_of(found[0])


@each_file
def test_nothing_prints_but_commands(file: Path) -> None:
    if name_of(file) in PRINTING:
        return
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "sys.stdout.write", "sys.stderr.write"}, (
                node.lineno
            )


@each_file
def test_importing_does_nothing_to_the_process(file: Path) -> None:
    allowed = list(SIDE_EFFECTS.get(name_of(file), []))
    for call in statements_at_import(tree_of(file).body):
        assert call in allowed, f"{call}(…) runs when the module is imported"
        allowed.remove(call)
    assert not allowed, "the list of side effects names one that is no more"


def statements_at_import(body: list[ast.stmt]) -> Iterator[str]:
    """The calls that are statements of a module, and what it assigns to the attributes of others."""
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield ast.unparse(node.value.func)
        elif isinstance(node, ast.Assign) and any(isinstance(to, ast.Attribute) for to in node.targets):
            yield ast.unparse(node.targets[0])
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "__name__ == '__main__'":
            yield from statements_at_import(node.body)
            yield from statements_at_import(node.orelse)
        elif isinstance(node, (ast.With, ast.For, ast.While, ast.Try)):
            yield type(node).__name__


def test_what_needs_a_lock_asserts_it() -> None:
    """A function that says "Needs the lock" asserts that it is held: itself, or in a function it calls."""
    needing: dict[str, Function] = {}
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, Function) and "eeds the lock" in (ast.get_docstring(node) or ""):
                needing[f"{file.name}: {node.name}"] = node
    assert len(needing) > 10, "the words have changed"
    asserting = {
        node.name
        for node in needing.values()
        if any(isinstance(inner, ast.Assert) and "_lock" in ast.unparse(inner) for inner in ast.walk(node))
    }
    while True:
        grown = asserting | {node.name for node in needing.values() if calls_of(node) & asserting}
        if grown == asserting:
            break
        asserting = grown
    assert not [where for where, node in needing.items() if node.name not in asserting]


def calls_of(function: Function) -> set[str]:
    """The methods that a function calls on itself."""
    return {
        node.func.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }


@pytest.mark.parametrize("folder", ["iocp_ctypes", "examples", "tests", "typings"])
def test_no_path_of_a_machine(folder: str) -> None:
    suffixes = {".py", ".pyi", ".md", ".toml", ".txt", ".yml", ".json"}
    for file in sorted((ROOT / folder).rglob("*")):
        if file.suffix in suffixes and not {"__pycache__", ".mypy_cache"} & set(file.parts):
            found = MACHINE_PATH.search(text_of(file))
            assert not found or file.name == Path(__file__).name, f"{ident(file)}: {found}"


# -- the reader itself ---------------------------------------------------------------------------------------


def test_the_reader_sees_what_it_looks_for() -> None:
    tree = ast.parse("import a.b\nfrom c import d\nx.y = 1\nf(1)\nif z:\n    g()\nwith h: pass\n")
    assert list(statements_at_import(tree.body)) == ["x.y", "f", "g", "With"]
    assert MACHINE_PATH.search("see /home/somebody/file")
    assert MACHINE_PATH.search(r"C:\Users\somebody")
    assert not MACHINE_PATH.search("https://example.org/home/page and a/tmp/b")
    assert set(own_imports(FOLDER / "_port.py")) >= {"_win32", "_errors"}
    assert set(foreign_imports(FOLDER / "_port.py")) >= {"ctypes", "collections"}
    assert "typing_extensions" not in set(foreign_imports(FOLDER / "server.py"))
