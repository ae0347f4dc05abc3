"""What structures of C look like in memory, as the tests of the bindings write it down."""

from __future__ import annotations

import ctypes
from typing import Any

#: Field: (offset on 32-bit, offset on 64-bit); "size": the size of all.
Layout = dict[str, tuple[int, int]]


def check_layout(structure: Any, layout: Layout, bits: int) -> None:
    """Assert that offsets, sizes and alignment are those of a C compiler."""
    column = {32: 0, 64: 1}[bits]
    assert {field[0] for field in structure._fields_} == set(layout) - {"size"}
    for field in structure._fields_:
        assert getattr(structure, field[0]).offset == layout[field[0]][column], field[0]
    assert ctypes.sizeof(structure) == layout["size"][column]
