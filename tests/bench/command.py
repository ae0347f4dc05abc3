"""One benchmark run: the command line, the order of the measures, the rounds.

Owns: which server is measured when. In each round each measure visits every server once, in an order that
changes from round to round, so that what else happens on the machine hits all of them alike and each round
gives a pair to take a ratio of. A server that died is started again for the next measure, and its death is in
the report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import placement, usage
from .drive import drive
from .hotspots import profile
from .report import Header, Record, as_json, check, headline, table
from .servers import (
    PEERS,
    Kind,
    NotStarted,
    Server,
    Starter,
    make_starter,
    ours,
    version_line,
    wine_version,
)

BASELINE = "asyncio"
CALM_TRIES_MAX = 5  # a measure of a round that the host disturbs is taken again, with --calm
PROFILE_CLIENTS = 64
PROFILE_PYTHON = "3.11"  # see profiled.py


@dataclass(frozen=True)
class Measure:
    """A measure of `load.py` with its arguments; `fresh`: it wants a server that has served nobody yet.

    `rounds_max` keeps a long one from most rounds.
    """

    name: str
    load: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] = ()  # in place of `arguments`, where --quick makes a difference
    timed: bool = False  # takes --seconds and --warmup
    fresh: bool = False
    rounds_max: int = 100


# In this order: the first wants a fresh server, those that leave many closed connections come late, and the
# last one may leave a server without its listener.
MEASURES = (
    Measure("idle", "idle", ("--count", "2000"), ("--count", "500"), fresh=True),
    Measure("echo1", "exchange", ("--clients", "1"), timed=True),
    Measure("echo64", "exchange", ("--clients", "64"), timed=True),
    Measure("bulk", "bulk", ("--mib", "128"), ("--mib", "32")),
    Measure("churn", "churn", ("--clients", "16"), timed=True),
    Measure("echo1000", "exchange", ("--clients", "1000"), timed=True),
    Measure("storm", "storm", ("--count", "5000", "--clients", "500"),
            quick=("--count", "1000", "--clients", "500"), rounds_max=12),
    Measure("besieged", "besieged", ("--count", "5000", "--clients", "500"),
            quick=("--count", "1000", "--clients", "500"), rounds_max=12),
    Measure("resets", "resets", ("--count", "30", "--seconds", "2")),
)


def order(names: Sequence[str], turn: int) -> list[str]:
    """Returns: an order of `names`; turns go through all rotations, each of them forwards, then backwards."""
    first = turn // 2 % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if turn % 2 else turned


class Bench:
    """The servers of a run, and what was measured of them."""

    def __init__(self, kinds: Sequence[Kind], starter: Starter, options: argparse.Namespace,
                 place: placement.Placement | None = None) -> None:
        token = secrets.token_hex(8)
        self.servers = {kind.name: Server(kind, starter, token, place) for kind in kinds}
        self.records: list[Record] = []
        self._options = options
        self._stale: set[str] = set()  # to be started again before the next measure
        self._hopeless: dict[str, str] = {}  # did not start: name -> last words

    def run(self, measures: Sequence[Measure]) -> None:
        """Does the rounds that there is time for, one at least. Blocks; ends its servers however it ends."""
        begun = time.monotonic()
        end = begun + 60 * self._options.minutes
        try:
            for turn in range(self._options.rounds):
                if turn and time.monotonic() + (time.monotonic() - begun) / turn > end:
                    say(f"no time for round {turn + 1}: see --minutes")
                    break
                for place, measure in enumerate(measures):
                    if turn < measure.rounds_max:
                        self._visit_all(measure, turn, order(list(self.servers), turn + place))
        finally:
            for server in self.servers.values():
                server.end()

    def _visit_all(self, measure: Measure, turn: int, names: Sequence[str]) -> None:
        for _ in range(CALM_TRIES_MAX):
            records = [self._visit(measure, turn, self.servers[name], place)
                       for place, name in enumerate(names)]
            taken = 100 * max(record.stolen or 0.0 for record in records)
            if not measure.timed or self._options.calm is None or taken <= self._options.calm:
                break  # memory and what clients fail of do not depend on the host
            say(f"round {turn + 1}: {measure.name}: the host kept {taken:.0f} % of the processors' time")
        self.records += records
        shown = {record.server: headline(record) for record in records}
        line = ", ".join(f"{name} {shown[name]}" for name in self.servers)
        say(f"round {turn + 1} of {self._options.rounds}: {measure.name}: {line}")

    def _visit(self, measure: Measure, turn: int, server: Server, position: int) -> Record:
        result: dict[str, Any] | None = None
        started, stolen = time.monotonic(), usage.stolen_s()
        error = self._make_ready(server, measure.fresh)
        if not error:
            result, error = drive(server, self._arguments(measure, server.kind))
            if not server.running:
                error = f"the server died, exit code {server.exit_code()}: {server.last_words()}"
            if error or not succeeded(result):
                self._stale.add(server.name)
        said = server.last_lines() if error or (result and result["failures"]) else ()
        took = time.monotonic() - started
        share = usage.stolen_share(stolen, took)
        return Record(turn + 1, measure.name, server.name, position, took, result, error, said, share)

    def _make_ready(self, server: Server, fresh: bool) -> str | None:
        """Starts the server where needed. Returns: why it cannot be measured, None when it can."""
        if server.name in self._hopeless:
            return self._hopeless[server.name]
        if server.running and not fresh and server.name not in self._stale:
            return None
        self._stale.discard(server.name)
        try:
            server.start()
        except NotStarted as exc:
            self._hopeless[server.name] = f"did not start: {exc}"
            return self._hopeless[server.name]
        return None

    def _arguments(self, measure: Measure, kind: Kind) -> list[str]:
        options = self._options
        arguments = [measure.load, *(measure.quick if options.quick and measure.quick else measure.arguments)]
        if measure.load == "idle":
            arguments[-1] = str(min(kind.idle_max, int(arguments[-1])))
        if measure.timed:
            arguments += ["--seconds", str(options.seconds), "--warmup", str(options.warmup)]
        return arguments


def succeeded(result: dict[str, Any] | None) -> bool:
    """Returns: whether the server served anybody at all in this measure."""
    counts = ("exchanges", "connections", "bytes", "served")
    return result is not None and any(result.get(count) for count in counts)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Returns: the command line."""
    names = [measure.name for measure in MEASURES]
    parser = argparse.ArgumentParser(prog="run.py", description="Compares echo servers under one Windows "
                                     "Python, driven by a native process, in alternating rounds.")
    parser.add_argument("--python", help="version of the Windows Python, such as 3.12 or 3.13t (under Wine)")
    parser.add_argument("--native", action="store_true",
                        help="run the servers on this very Python, to try this program out (so on Windows)")
    parser.add_argument("--against", default="asyncio,threading", metavar="NAMES",
                        help=f"peers, of: {', '.join(PEERS)} (default: %(default)s)")
    parser.add_argument("--ours", default="", metavar="OPTIONS",
                        help='options of our server: --ours="--io-threads 1"')
    parser.add_argument("--without-ours", action="store_true", help="only the peers")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=OPTIONS",
                        help="our server once more, with other options; repeatable")
    parser.add_argument("--measures", default=",".join(names), metavar="NAMES", help="of: %(default)s")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --quick")
    parser.add_argument("--seconds", type=float, help="length of a measured window (default: 1.5, or 0.6)")
    parser.add_argument("--minutes", type=float,
                        help="begin no round that would end later (default: 6, or 1.5)")
    parser.add_argument("--placement", choices=placement.CHOICES, default="split", help=placement.HELP)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds: a minute and a half")
    parser.add_argument("--profile", metavar="NAME",
                        help="measure nothing; show where this server's time goes (Python 3.11 only)")
    parser.add_argument("--calm", type=float, metavar="PERCENT",
                        help="where the host of this virtual machine kept more of the processors' time "
                             "while rates were measured, measure all servers of that round again (Linux)")
    parser.add_argument("--check", action="store_true",
                        help="exit code 1 where ours misses a mark (see report.py) or fails a client")
    parser.add_argument("--json", metavar="FILE",
                        help="write all raw rounds; -: to stdout, and the table to stderr")
    return parser


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Kind], list[Measure]]:
    """Returns: options, servers and measures; ends the program with code 2 where they are wrong."""
    command = parser()
    options = command.parse_args(arguments)
    options.rounds = (2 if options.quick else 5) if options.rounds is None else options.rounds
    options.seconds = (0.6 if options.quick else 1.5) if options.seconds is None else options.seconds
    options.minutes = (1.5 if options.quick else 6.0) if options.minutes is None else options.minutes
    options.warmup = min(0.4, options.seconds / 3)
    if not 1 <= options.rounds <= 100 or not 0.1 <= options.seconds <= 60:
        command.error("--rounds is 1 to 100, --seconds 0.1 to 60")
    if options.calm is not None and not 0 <= options.calm <= 100:
        command.error(f"--calm is 0 to 100 percent, not {options.calm:g}")
    kinds = [] if options.without_ours else [ours("ours", shlex.split(options.ours))]
    for variant in options.variant:
        name, sign, text = variant.partition("=")
        if not name or not sign:
            command.error(f"--variant is NAME=OPTIONS, not {variant!r}")
        kinds.append(ours(name, shlex.split(text)))
    kinds += [PEERS[name] for name in chosen(command, "--against", options.against, list(PEERS))]
    if not kinds or len({kind.name for kind in kinds}) < len(kinds):
        command.error("no server, or two of the same name")
    if options.check and (options.without_ours or BASELINE not in {kind.name for kind in kinds}):
        command.error(f"--check compares ours with {BASELINE}: see --against")
    if options.profile:
        chosen(command, "--profile", options.profile, [kind.name for kind in kinds])
        options.python = options.python or PROFILE_PYTHON
    wanted = chosen(command, "--measures", options.measures, [measure.name for measure in MEASURES])
    return options, kinds, [measure for measure in MEASURES if measure.name in wanted]


def chosen(command: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        command.error(f"{option}: {', '.join(unknown)} is not one of {', '.join(known)}")
    return names


def describe(starter: Starter, options: argparse.Namespace, kinds: Sequence[Kind],
             place: placement.Placement | None) -> Header:
    """Returns: what one must know to read the figures."""
    return Header(
        python=version_line(starter), wine=wine_version(starter), load_generator=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processors=os.cpu_count() or 0, placement=placement.described(place), load_average=busy(),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        rounds=options.rounds, seconds=options.seconds, quick=options.quick,
        servers={kind.name: " ".join(("python", *kind.arguments)) for kind in kinds},
    )


def busy() -> str:
    """Returns: the load average of the last minute; what else runs makes the figures noisy."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns: 0; 1 if ours failed, missed a mark, or nothing was measured; 2: wrong options; 130: ended."""
    options, kinds, measures = parse(arguments)
    packages = sorted({package for kind in kinds for package in kind.packages})
    try:
        starter = make_starter(options.python, packages, options.native)
    except Exception as exc:  # the class meant is that of a module that is only found at run time
        if type(exc).__name__ != "Problem":
            raise
        say(f"run.py: {exc}")
        return 2
    if options.profile:
        kind = next(kind for kind in kinds if kind.name == options.profile)
        print(profile(kind, starter, PROFILE_CLIENTS, options.seconds))
        return 0
    place = placement.take_sides(options.placement)
    header = describe(starter, options, kinds, place)
    bench = Bench(kinds, starter, options, place)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the servers must not stay behind
    interrupted = False
    try:
        bench.run(measures)
    except KeyboardInterrupt:
        interrupted = True  # what was measured until then is worth its report
    header = replace(header, load_average=f"{header.load_average} before, {busy()} after",
                     rounds=max((record.round for record in bench.records), default=0))
    say(f"took {time.monotonic() - started:.0f} s")
    baseline = BASELINE if BASELINE in bench.servers else next(reversed(bench.servers))
    print(table(header, bench.records, baseline), file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json:
        text = json.dumps(as_json(header, bench.records, baseline), indent=1)
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    if interrupted:
        return 130
    missed = check(bench.records, next(iter(bench.servers)), baseline) if options.check else []
    for line in missed:
        say(f"missed: {line}")
    if missed:
        return 1
    failed = any(record.error for record in bench.records if record.server not in PEERS)
    return 1 if failed or not any(record.result for record in bench.records) else 0
