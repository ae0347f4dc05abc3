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
SERVING: Final = ("io_threads", "work_threads", "processes", "backlog", "sendcap", "recvburst", "recv_mode")

#: The commands that serve over TLS where they are given a certificate.
TLS_COMMANDS: Final = ("echo", "http", "websocket", "wsgi")

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


def _context(parser: _Parser, given: argparse.Namespace) -> Any:
    """Return the ssl.SSLContext of --tls-cert and --tls-key, None without them."""
    if given.tls_cert is None:
        if given.tls_key is not None:
            parser.error("argument --tls-key: is of no use without --tls-cert")
        return None
    from .tls import context_of_files  # only who asks for TLS waits for `ssl` to be imported

    try:
        return context_of_files(given.tls_cert, given.tls_key)
    except ValueError as exc:
        parser.error(f"argument --tls-cert: {exc}")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m iocp_ctypes", description="TCP servers on a completion port.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    echo = commands.add_parser("echo", help="serve: send back what comes")
    _add_serving(echo, 9000)

    http = commands.add_parser("http", help="serve: the files of a folder, over HTTP (needs h11)")
    http.add_argument(
        "directory", nargs="?", default=".", metavar="DIRECTORY", help="the folder (%(default)s)"
    )
    _add_serving(http, 8000)
    http.add_argument("--log", action="store_true", help="print a line for each request")

    websocket = commands.add_parser("websocket", help="serve: send back messages over WebSocket")
    _add_serving(websocket, 9000)

    wsgi = commands.add_parser(
        "wsgi", help="serve: a WSGI application, such as Flask's or Django's (needs h11)"
    )
    wsgi.add_argument("app", metavar="MODULE:APP", help="where it is, such as shop:app")
    _add_serving(wsgi, 8000, processes=False)  # an application can seldom be handed to another process
    wsgi.add_argument("--log", action="store_true", help="print a line for each request")
    wsgi.add_argument(
        "--trusted",
        action="append",
        default=[],
        metavar="NETWORK",
        help="of a proxy whose X-Forwarded fields count; may be given again",
    )
    path = "the path below which the application is"
    wsgi.add_argument("--script-name", default="", metavar="PATH", help=path)

    demo = commands.add_parser("demo", help="serve clients of this very process, and say what happened")
    demo.add_argument("--clients", type=_whole(1, CLIENTS_MAX), default=1000, help="(%(default)s)")
    demo.add_argument("--messages", type=_whole(1, MESSAGES_MAX), default=5, help="of each (%(default)s)")
    return parser


def _add_serving(command: argparse.ArgumentParser, port: int, processes: bool = True) -> None:
    """Add the arguments that every command that serves takes."""
    command.add_argument(
        "--host", default="127.0.0.1", help="where to listen; '' is every interface (%(default)s)"
    )
    command.add_argument(
        "--port", type=_whole(0, 65535), default=port, help="0 is any that is free (%(default)s)"
    )
    for name in SERVING:
        if name == "processes" and not processes:
            continue
        meaning = OPTIONS[name].meaning
        command.add_argument(f"--{name.replace('_', '-')}", type=_option(name), metavar="VALUE", help=meaning)
    stats = "print the server's figures: a line every 5 seconds, all of them at the end"
    command.add_argument("--stats", action="store_true", help=stats)
    trace = "write the newest operations to a file for ui.perfetto.dev at the end"
    command.add_argument("--trace", metavar="FILE", help=trace)
    command.add_argument("--tls-cert", metavar="FILE", help="serve over TLS with this certificate (PEM)")
    command.add_argument(
        "--tls-key", metavar="FILE", help="its key; left out, it is in the certificate's file"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, or leaves by SystemExit as argparse does."""
    parser = _parser()
    given = parser.parse_args(arguments)
    tls = _context(parser, given) if given.command in TLS_COMMANDS else None
    if (getattr(given, "processes", None) or 1) > 1:
        for name in ("tls_cert", "trace"):
            if getattr(given, name) is not None:
                parser.error(f"argument --{name.replace('_', '-')}: needs --processes 1")
    try:
        from . import (
            Server,  # noqa: F401  # off Windows its ImportError says what is missing
            _commands,
        )

        if given.command == "demo":
            return _commands.demo(given.clients, given.messages)
        options = {name: value for name in SERVING if (value := getattr(given, name, None)) is not None}
        if tls is not None:
            options["tls"] = tls
        place = (given.host, given.port)
        if given.command == "http":
            return _commands.http(given.directory, place, given.log, given.stats, options, given.trace)
        if given.command == "wsgi":
            options.update(trusted=given.trusted, script_name=given.script_name)
            try:
                return _commands.wsgi(given.app, place, given.log, given.stats, options, given.trace)
            except _commands.BadArgument as exc:
                parser.error(str(exc))
        serve = {"echo": _commands.echo, "websocket": _commands.websocket}[given.command]
        return serve(place, given.stats, options, given.trace)
    except KeyboardInterrupt:
        return 0
    except (ImportError, OSError) as exc:
        parser.exit(1, f"{parser.prog}: error: {getattr(exc, 'strerror', None) or exc}\n")


if __name__ == "__main__":
    sys.exit(main())
