"""The command line: it parses arguments and starts what is in `_commands`; no logic of its own.

Exit codes: 0 done or ended by Ctrl-C, 1 cannot listen, the demonstration failed or this is no Windows, 2 bad
arguments. An error is one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from ._options import OPTIONS, check_option

#: The options of Server that a serving command takes; OPTIONS says what they allow and mean.
SERVING: Final = ("io_threads", "work_threads", "backlog", "sendcap", "recv_mode")

#: More clients than this, and what is shown is how this process runs out of sockets.
CLIENTS_MAX: Final = 5000
MESSAGES_MAX: Final = 1000


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line; no abbreviations, which the next version's options would break."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _option(name: str) -> Callable[[str], Any]:
    """Return what reads the text of an option of Server; the table of options says what is wrong with it."""

    def read(text: str) -> Any:
        try:
            value: int | str = int(text)
        except ValueError:
            value = text
        try:
            return check_option(name, value)
        except (TypeError, ValueError) as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return read


def _whole(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from {low} to {high}")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m iocp_ctypes", description="TCP servers on a completion port.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_serving(commands.add_parser("echo", help="serve: send back what comes"))
    _add_serving(commands.add_parser("websocket", help="serve: send back messages over WebSocket"))

    demo = commands.add_parser("demo", help="serve clients of this very process, and say what happened")
    demo.add_argument("--clients", type=_whole(1, CLIENTS_MAX), default=1000, help="(%(default)s)")
    demo.add_argument("--messages", type=_whole(1, MESSAGES_MAX), default=5, help="of each (%(default)s)")
    return parser


def _add_serving(command: argparse.ArgumentParser) -> None:
    """Add the arguments that every command that serves takes."""
    command.add_argument(
        "--host", default="127.0.0.1", help="where to listen; '' is every interface (%(default)s)"
    )
    command.add_argument(
        "--port", type=_whole(0, 65535), default=9000, help="0 is any that is free (%(default)s)"
    )
    for name in SERVING:
        meaning = OPTIONS[name].meaning
        command.add_argument(f"--{name.replace('_', '-')}", type=_option(name), metavar="VALUE", help=meaning)
    command.add_argument("--stats", action="store_true", help="print the server's figures at the end")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, or leaves by SystemExit as argparse does."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        from . import (
            Server,  # noqa: F401  # off Windows its ImportError says what is missing
            _commands,
        )

        if given.command == "demo":
            return _commands.demo(given.clients, given.messages)
        options = {name: value for name in SERVING if (value := getattr(given, name)) is not None}
        serve = {"echo": _commands.echo, "websocket": _commands.websocket}[given.command]
        return serve((given.host, given.port), given.stats, options)
    except KeyboardInterrupt:
        return 0
    except (ImportError, OSError) as exc:
        parser.exit(1, f"{parser.prog}: error: {getattr(exc, 'strerror', None) or exc}\n")


if __name__ == "__main__":
    sys.exit(main())
