"""The command line: parses arguments and starts what is elsewhere; no logic of its own.

Exit codes: 0 ended by Ctrl-C or done, 1 cannot listen or the demo failed, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ._options import OPTIONS, RECV_MODES, check_option

#: Options of Server that the serving commands take, with their types.
SERVING: tuple[tuple[str, Any], ...] = (
    ("io_threads", int),
    ("work_threads", int),
    ("backlog", int),
    ("sendcap", int),
    ("recv_mode", str),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m iocp_ctypes", description="A TCP server on a completion port."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    echo = commands.add_parser("echo", help="serve: send back what comes")
    echo.add_argument("--host", default="127.0.0.1", help="address to listen on; '' is every interface")
    echo.add_argument("--port", type=int, default=9000, help="port to listen on; 0 is any that is free")
    echo.add_argument("--stats", action="store_true", help="print the server's figures at the end")
    for name, kind in SERVING:
        choices = RECV_MODES if name == "recv_mode" else None
        echo.add_argument(
            f"--{name.replace('_', '-')}", type=kind, choices=choices, help=OPTIONS[name].meaning
        )
    demo = commands.add_parser("demo", help="serve 1,000 clients of this very process and say what happened")
    demo.add_argument("--clients", type=int, default=1000, help="how many clients, 1 to 5000")
    demo.add_argument("--messages", type=int, default=5, help="messages of each client, 1 to 1000")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        options = {
            name: check_option(name, getattr(given, name))
            for name, _kind in SERVING
            if getattr(given, name, None) is not None
        }
    except (TypeError, ValueError) as exc:
        parser.exit(2, f"{parser.prog}: error: {exc}\n")
    if sys.platform != "win32":
        parser.exit(
            1, f"{parser.prog}: error: iocp_ctypes needs Windows: {sys.platform} has no completion ports\n"
        )
    from . import _commands

    try:
        if given.command == "demo":
            return _commands.demo(given.clients, given.messages)
        return _commands.echo(given.host, given.port, options, given.stats)
    except (TypeError, ValueError) as exc:
        parser.exit(2, f"{parser.prog}: error: {exc}\n")
    except OSError as exc:
        parser.exit(1, f"{parser.prog}: error: {exc}\n")


if __name__ == "__main__":
    sys.exit(main())
