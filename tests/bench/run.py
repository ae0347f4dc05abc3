"""The command: `python3 tests/bench/run.py [--help]`. It only finds its package; command.py does the work."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(importlib.import_module("bench.command").main())
