"""From raw rounds to the report: medians, ranges, paired ratios; as a table and as JSON.

Owns: the list of metrics, each with its place in a result, its unit and which way is better. A ratio is never
that of two medians: it is the median, over the rounds, of a server's figure over the baseline's of the round.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1
EXPLANATION = """\
Median of the rounds [lowest-highest]. Ratio: a server's figure over {baseline}'s of the same round; median.
best: whether high or low is better. CPU: of the server itself. Wineserver does the work of the Windows
kernel, in one thread; a request to it is about what a system call is on Windows. From Wine to Windows user
CPU and the number of requests carry over; system CPU and rates less so, and servers with blocking calls look
better here than they are there."""


@dataclass(frozen=True)
class Record:
    """One measure of one server in one round: a result of load.py, an error, or both."""

    round: int
    measure: str
    server: str
    position: int  # in the order of this round
    took_s: float  # all in all, with starting the server and waiting until it was quiet
    result: dict[str, Any] | None
    error: str | None
    said: tuple[str, ...] = ()  # the server's last lines, where anything failed
    stolen: float | None = None  # share of the processors' time that the host kept; None: not known


@dataclass(frozen=True)
class Header:
    """What one must know to read the figures."""

    python: str
    wine: str | None
    load_generator: str
    system: str
    processors: int
    placement: str
    load_average: str
    started: str
    rounds: int
    seconds: float
    quick: bool
    servers: dict[str, str]


@dataclass(frozen=True)
class Metric:
    """A figure of a result; `key` as "cost.user_us"; `best` is "high" or "low"; `scale` multiplies."""

    label: str
    key: str
    best: str
    scale: float = 1.0
    flag: bool = False  # yes or no


def _costs(unit: str) -> tuple[Metric, ...]:
    return (
        Metric(f"user CPU µs/{unit}", "cost.user_us", "low"),
        Metric(f"system CPU µs/{unit}", "cost.system_us", "low"),
        Metric(f"wineserver µs/{unit}", "cost.wineserver_us", "low"),
        Metric(f"requests/{unit}", "cost.requests", "low"),
    )


TAILS = (Metric("p50 ms", "p50_us", "low", 0.001), Metric("p99 ms", "p99_us", "low", 0.001))
STARVED = Metric("clients with nothing", "starved", "low")
EXCHANGE = (Metric("exchanges/s", "per_s", "high"), *TAILS, *_costs("exchange"))
CYCLE = (Metric("connections/s", "per_s", "high"), *TAILS, *_costs("conn."))
METRICS: dict[str, tuple[Metric, ...]] = {
    "idle": (Metric("private KiB/conn.", "private_kib", "low"),
             Metric("resident KiB/conn.", "resident_kib", "low")),
    "echo1": EXCHANGE,
    "echo64": (*EXCHANGE, Metric("least share/mean", "fairness", "high"), STARVED),
    "echo1000": (*EXCHANGE, STARVED),
    "churn": CYCLE,
    "storm": (Metric("seconds", "seconds", "low"), *CYCLE),
    "besieged": (Metric("p99 ms", "p99_us", "low", 0.001), Metric("p50 ms", "p50_us", "low", 0.001),
                 Metric("exchanges/s", "per_s", "high"), Metric("least share/mean", "fairness", "high"),
                 STARVED),
    "bulk": (Metric("MB/s", "mb_per_s", "high"), Metric("checksum right", "intact", "high", flag=True),
             *_costs("MiB")),
    "resets": (Metric("next client served", "served", "high", flag=True),),
}


@dataclass(frozen=True)
class Mark:
    """What our server has to reach: a figure of its own, or, with `ratio`, over the baseline's."""

    measure: str
    key: str
    bound: float
    least: bool  # the bound is the least there must be; else the most
    ratio: bool = True


MARKS = (
    Mark("echo64", "per_s", 1.4, least=True),
    Mark("echo64", "p99_us", 1.0, least=False),
    Mark("echo64", "cost.user_us", 0.55, least=False),
    Mark("echo64", "fairness", 0.8, least=True, ratio=False),
    Mark("churn", "per_s", 1.5, least=True),
    Mark("besieged", "p99_us", 0.5, least=False),
    Mark("idle", "private_kib", 6.0, least=False, ratio=False),
    Mark("resets", "served", 1.0, least=True, ratio=False),
)


def check(records: Sequence[Record], server: str, baseline: str) -> list[str]:
    """Returns: a line for each mark that `server` misses, and for each failure of one of its clients."""
    found = summary(records, baseline)
    missed = []
    for mark in MARKS:
        figures = found.get(mark.measure, {}).get(mark.key, {}).get(server)
        if figures is None:
            continue  # not measured in this run
        figure = figures["ratio" if mark.ratio else "median" if mark.key != "served" else "min"]
        if figure is None or (figure < mark.bound if mark.least else figure > mark.bound):
            of = f" of {baseline}'s" if mark.ratio else ""
            wanted = f"{'at least' if mark.least else 'at most'} {mark.bound:g}{of}"
            told = "?" if figure is None else f"{figure:.2f}"
            missed.append(f"{mark.measure}, {mark.key}: {told}, not {wanted}")
    for measure in found:
        if counted := failures(records, measure, server):
            missed.append(f"{measure}: {sum(counted.values())} failed")
    return missed


def value(result: dict[str, Any] | None, metric: Metric) -> float | None:
    """Returns: the figure of a metric, None where it is not known."""
    found: Any = result
    for part in metric.key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return None if found is None else float(found) * metric.scale


def values(records: Sequence[Record], measure: str, server: str, metric: Metric) -> dict[int, float]:
    """Returns: the known figures by round."""
    found = {record.round: value(record.result, metric) for record in records
             if record.measure == measure and record.server == server}
    return {turn: figure for turn, figure in found.items() if figure is not None}


def paired_ratio(ours: dict[int, float], base: dict[int, float]) -> float | None:
    """Returns: the median of the ratios of those rounds that have both figures."""
    ratios = [ours[turn] / base[turn] for turn in ours if base.get(turn)]
    return statistics.median(ratios) if ratios else None


Summary = dict[str, dict[str, dict[str, dict[str, float | None]]]]


def summary(records: Sequence[Record], baseline: str) -> Summary:
    """Returns: measure -> metric -> server -> median, min, max, ratio to the baseline."""
    answer: Summary = {}
    servers = list(dict.fromkeys(record.server for record in records))
    for measure in dict.fromkeys(record.measure for record in records):
        for metric in METRICS[measure]:
            figures = {server: values(records, measure, server, metric) for server in servers}
            answer.setdefault(measure, {})[metric.key] = {
                server: {"median": statistics.median(found.values()), "min": min(found.values()),
                         "max": max(found.values()), "ratio": paired_ratio(found, figures.get(baseline, {}))}
                for server, found in figures.items() if found}
    return answer


def failures(records: Sequence[Record], measure: str, server: str) -> Counter[str]:
    """Returns: what clients failed of and what went wrong with the server, counted over all rounds."""
    counted: Counter[str] = Counter()
    for record in records:
        if record.measure == measure and record.server == server:
            counted.update((record.result or {}).get("failures", {}))
            counted.update([record.error] if record.error else [])
    return counted


def headline(record: Record) -> str:
    """Returns: the first figure of a measure, for a line of progress."""
    metric = METRICS[record.measure][0]
    figure = value(record.result, metric)
    text = record.error or "?" if figure is None else _cell([figure], metric)
    count = sum((record.result or {}).get("failures", {}).values())
    died = " (died)" if record.error and record.result else ""
    return text + (f" ({count} failed)" if count else "") + died


def as_json(header: Header, records: Sequence[Record], baseline: str) -> dict[str, Any]:
    """Returns: all of a run: header, raw rounds and summary."""
    return {"schema": SCHEMA, "header": asdict(header), "baseline": baseline,
            "rounds": [asdict(record) for record in records], "summary": summary(records, baseline)}


def table(header: Header, records: Sequence[Record], baseline: str) -> str:
    """Returns: the report to read."""
    servers = list(header.servers)
    others = [server for server in servers if server != baseline]
    rows = [["measure", "metric", "best", *servers, *(f"{name}/{baseline}" for name in others)]]
    for measure in METRICS:
        if any(record.measure == measure for record in records):
            rows += _rows(records, measure, servers, others, baseline)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    heading = [*_heading(header), *_taken(records)]
    return "\n".join([*heading, "", *lines, "", *_notes(records, servers, baseline)])


def _heading(header: Header) -> list[str]:
    wine = f" under {header.wine}" if header.wine else ""
    return [
        f"servers: Python {header.python}{wine}; load generator: Python {header.load_generator}",
        f"machine: {header.system}, {header.processors} processors, "
        f"load average {header.load_average}; {header.placement}",
        f"rounds: {header.rounds}, windows of {header.seconds:g} s{', quick' if header.quick else ''}; "
        f"started {header.started}",
        *(f"{name}: {command}" for name, command in header.servers.items()),
    ]


def _taken(records: Sequence[Record]) -> list[str]:
    shares = [100 * record.stolen for record in records if record.stolen is not None]
    if not shares:
        return []
    return [f"the host kept {statistics.mean(shares):.1f} % of the processors' time for others, "
            f"{max(shares):.1f} % in the worst measure"]


def _rows(records: Sequence[Record], measure: str, servers: Sequence[str], others: Sequence[str],
          baseline: str) -> list[list[str]]:
    rows = []
    for metric in METRICS[measure]:
        figures = {server: values(records, measure, server, metric) for server in servers}
        if any(figures.values()):
            ratios = [paired_ratio(figures[other], figures.get(baseline, {})) for other in others]
            rows.append([measure, metric.label, metric.best,
                         *(_cell(list(figures[server].values()), metric) for server in servers),
                         *("" if ratio is None or metric.flag else f"{ratio:.2f}" for ratio in ratios)])
    counts = [sum(failures(records, measure, server).values()) for server in servers]
    return [*rows, [measure, "failures, all rounds", "low", *map(str, counts), *[""] * len(others)]]


def _cell(figures: Sequence[float], metric: Metric) -> str:
    if not figures:
        return "-"
    if metric.flag:
        right = sum(1 for figure in figures if figure)
        return "yes" if right == len(figures) else "NO" if not right else f"{right} of {len(figures)} times"
    low, high = _figure(min(figures)), _figure(max(figures))
    return _figure(statistics.median(figures)) + ("" if low == high else f" [{low}-{high}]")


def _figure(figure: float) -> str:
    digits = 0 if figure >= 100 or figure == int(figure) else 1 if figure >= 10 else 2
    return f"{figure:.{digits}f}"


def _notes(records: Sequence[Record], servers: Sequence[str], baseline: str) -> list[str]:
    lines = EXPLANATION.format(baseline=baseline).splitlines()
    for measure in METRICS:
        for server in servers:
            if counted := failures(records, measure, server):
                details = "; ".join(f"{count} x {reason}" for reason, count in counted.most_common())
                said = next((record.said[-1] for record in records
                             if (record.measure, record.server) == (measure, server) and record.said), "")
                said = f"; it said: {said}" if said else ""
                lines.append(f"failed: {measure}, {server}: {details}{said}")
    deaf = {record.server for record in records
            if record.measure == "resets" and record.result
            and record.result["served_before"] and not record.result["served"]}
    lines += [f"{server} accepts nobody any more after clients that reset at once: its listener is dead."
              for server in servers if server in deaf]
    return lines
