"""Burst mode moves much: a checksummed echo of many MiB, run after run, with one I/O thread and with four."""

from __future__ import annotations

import statistics

from bench import load
from bench.usage import memory

from . import Figures, checks
from .process import ServerProcess

RUNS = 20
MIB = 1024
IO_THREADS = (1, 4)
RECVBURST = 8
RECV_BUFFER_MAX = 1 << 20
LEAVE_MAX_S = 30.0
MODES = {"burst": {"recv_mode": "burst", "recvburst": RECVBURST}, "flow": {"recv_mode": "flow"}}


def runs_of(report: checks.Report, server: ServerProcess, mode: str, runs: int, mib: int) -> list[float]:
    """Echo `mib` MiB `runs` times; returns MB/s of the runs that were right."""
    speeds: list[float] = []
    wrong: list[str] = []
    for number in range(runs):
        streamed = load.bulk(server.address, mib)
        if streamed.intact and streamed.mb_per_s:
            speeds.append(streamed.mb_per_s)
        else:
            wrong.append(f"run {number + 1}: {streamed.failures}")
    report.claim(f"{runs} of {runs} runs of {mib} MiB come back as they were sent", not wrong, wrong or mode)
    if speeds:
        report.figure(
            f"MB/s, {mode}: lowest, median, highest",
            [round(at) for at in (min(speeds), statistics.median(speeds), max(speeds))],
        )
    return speeds


def bounded(report: checks.Report, now: Figures) -> None:
    """Claims on what the bursts held."""
    report.claim(
        "unread bytes and posted buffers stay within recv_buffer_max",
        0 < now.burst_held_max <= RECV_BUFFER_MAX,
        f"{now.burst_held_max} of {RECV_BUFFER_MAX}",
    )
    report.claim(
        "no more receives than recvburst, and more than one",
        1 < now.burst_width_max <= RECVBURST,
        f"{now.burst_width_max} of {RECVBURST}",
    )
    report.figure("receives in bursts", now.burst_receives)
    report.figure("of these retired before one in front of them", now.burst_overtakes)


def run(python: str | None, seed: int, runs: int = RUNS, mib: int = MIB) -> list[str]:
    """Run it all; returns the claims that failed. Nothing is by chance here; the seed is not used."""
    failed: list[str] = []
    for io_threads in IO_THREADS:
        report = checks.Report(f"burst: {runs} times {mib} MiB, io_threads={io_threads}")
        medians = {}
        for mode, options in MODES.items():
            with ServerProcess(python, io_threads=io_threads, **options) as server:
                before = memory([server.pid])
                speeds = runs_of(report, server, mode, runs if mode == "burst" else max(1, runs // 5), mib)
                medians[mode] = statistics.median(speeds) if speeds else 0.0
                after = memory([server.pid])
                if before and after:
                    report.figure(
                        f"private memory more than before, KiB, {mode}",
                        after.private_kib - before.private_kib,
                    )
                now = server.settled(lambda at: not at.connections and not at.deadlines, LEAVE_MAX_S)
                if mode == "burst":
                    bounded(report, now)
                checks.served(report, now)
                checks.stopped(report, server.stop())
        if medians["flow"]:
            ratio = medians["burst"] / medians["flow"]
            report.claim("burst moves 1.2 times what flow does, in MB/s", ratio >= 1.2, round(ratio, 2))
        failed += report.failed
    return failed
