"""The asyncio echo server on winloop, the libuv event loop for Windows (pip install winloop)."""

import importlib

from .asyncio_proactor import run

if __name__ == "__main__":
    run(importlib.import_module("winloop").new_event_loop)
