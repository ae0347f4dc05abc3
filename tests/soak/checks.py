"""What a soak run claims, each with the figure that shows it.

Law: a claim is written down before it is judged, so the report shows those that hold, too.
"""

from __future__ import annotations

from . import Figures

HANDLES_MAX = 5  # more or less than before the server was made


class Report:
    """Claims and figures of one run, printed as they come."""

    def __init__(self, title: str) -> None:
        self.failed: list[str] = []
        print(f"== {title}", flush=True)

    def figure(self, name: str, value: object) -> None:
        """Print a figure that is no claim."""
        print(f"   {name}: {value}", flush=True)

    def claim(self, text: str, holds: bool, shown: object) -> None:
        """Print a claim with what it was judged by."""
        print(f"{'ok' if holds else 'FAILED':>6} {text}: {shown}", flush=True)
        if not holds:
            self.failed.append(text)


def served(report: Report, figures: Figures) -> None:
    """Claims on a server that all clients have left: it accepts, and nothing of them is left."""
    report.claim("no connection is open", figures.connections == 0, figures.connections)
    report.claim(
        "every on_connect had its on_close",
        figures.opened == figures.ended == figures.accepted,
        f"{figures.opened} on_connect, {figures.ended} on_close, {figures.accepted} accepted",
    )
    report.claim("callbacks came in order", figures.disorder == 0, f"{figures.disorder} out of order")
    report.claim(
        "the pool of AcceptEx is full",
        figures.backlog_in_use == figures.backlog_cap,
        f"{figures.backlog_in_use} of {figures.backlog_cap}",
    )
    report.claim(
        "only the AcceptEx are pending",
        figures.ops_pending == figures.backlog_cap,
        f"{figures.ops_pending} operations",
    )
    report.claim("no deadline is left", figures.deadlines == 0, figures.deadlines)
    report.claim("no Connection object is left", figures.living == 0, figures.living)
    report.claim("the log is empty", figures.records == 0, figures.record_texts or 0)
    report.figure("closed by reason", figures.closed)


def stopped(report: Report, figures: Figures) -> None:
    """Claims on a process whose server was stopped."""
    report.claim("stop() returned True", figures.stopped, figures.stopped)
    report.claim("ops_pending is 0", figures.ops_pending == 0, figures.ops_pending)
    report.claim("no thread is left", not figures.threads, figures.threads)
    more = figures.handles - figures.handles_before
    report.claim(
        "the handle count is as before",
        abs(more) <= HANDLES_MAX,
        f"{figures.handles_before} before, {figures.handles} after",
    )
