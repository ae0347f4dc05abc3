"""The command: `python3 tests/soak/run.py all [--python 3.12] [--seed N]`, or a run's name in place of `all`.

Prints figures and claims as they come. Exit code: 0 where all claims hold, 1 where one does not.
"""

from __future__ import annotations

import argparse
import importlib
import secrets
import sys
import time
from pathlib import Path

RUNS = ("many", "storm", "burst", "websocket", "ends", "delays")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=(*RUNS, "all"))
    parser.add_argument("--python", help="a tag as of tests/windows.py, for example 3.13t")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="of all that is random")
    parser.add_argument("--runs", type=int, help="of burst")
    parser.add_argument("--mib", type=int, help="of each run of burst")
    options = parser.parse_args()
    burst = {name: value for name in ("runs", "mib") if (value := getattr(options, name))}
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    failed: list[str] = []
    for name in RUNS if options.what == "all" else (options.what,):
        began = time.monotonic()
        more = burst if name == "burst" else {}
        failed += importlib.import_module(f"soak.{name}").run(options.python, options.seed, **more)
        print(f"   seconds in all: {time.monotonic() - began:.1f}", flush=True)
    print("all claims hold" if not failed else f"{len(failed)} claims FAILED: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
