"""The stub of `_overlapped` names what CPython has, and nothing else."""

from __future__ import annotations

import _overlapped
import ast
import sys
from pathlib import Path

STUB = Path(__file__).resolve().parent.parent.parent / "typings" / "_overlapped.pyi"


def names(body: list[ast.stmt]) -> set[str]:
    """What a body defines on this system and version."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
        elif isinstance(node, ast.If) and eval(ast.unparse(node.test), {"sys": sys}):
            found |= names(node.body)
    return found


def classes(body: list[ast.stmt]) -> dict[str, ast.ClassDef]:
    return {node.name: node for top in body for node in ast.walk(top) if isinstance(node, ast.ClassDef)}


def test_stub_of_overlapped() -> None:
    tree = ast.parse(STUB.read_text(encoding="utf-8")).body
    there = {name for name in vars(_overlapped) if not name.startswith("__")}
    assert names(tree) == there
    methods = {name for name in vars(_overlapped.Overlapped) if name not in ("__doc__", "__module__")}
    assert names(classes(tree)["Overlapped"].body) == methods
