"""The load generator and the report of the benchmark, on a small threaded echo server in this process."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import command, hotspots, load, placement, report, tls, usage
from bench.cycle import Address, Cycle, payload
from bench.servers import Kind, NativePython, Server
from secure import server_context


class Echo(socketserver.BaseRequestHandler):
    """Echoes; `spoil` makes of a received piece what is sent back."""

    def handle(self) -> None:
        connection: socket.socket = self.request
        try:
            while data := connection.recv(65536):
                connection.sendall(self.server.spoil(data))  # type: ignore[attr-defined]
        except OSError:
            pass


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 200

    def spoil(self, data: bytes) -> bytes:
        return data


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer(("127.0.0.1", 0), Echo) as echo:
        thread = threading.Thread(target=echo.serve_forever, args=(0.01,))
        thread.start()
        yield echo
        echo.shutdown()
        thread.join()


@pytest.fixture
def address(server: EchoServer) -> Address:
    return ("127.0.0.1", server.server_address[1])


def closed_address() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return ("127.0.0.1", port)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_percentile_is_nearest_rank(share: float, expected: int) -> None:
    assert load.percentile(range(1, 101), share) == expected


def test_percentile_of_one_and_of_none() -> None:
    assert load.percentile([7.0], 0.99) == 7.0
    assert load.percentile([], 0.5) is None


def test_fairness_is_smallest_over_mean() -> None:
    assert load.fairness([4, 4, 4]) == 1.0
    assert load.fairness([1, 3]) == 0.5
    assert load.fairness([0, 9]) == 0.0
    assert load.fairness([]) == load.fairness([0, 0]) == 0.0


def test_payloads_have_one_size_and_differ() -> None:
    messages = {payload(number) for number in range(1000)}
    assert len(messages) == 1000
    assert {len(message) for message in messages} == {64}


def test_exchange_counts_every_client(address: Address) -> None:
    result = load.exchange(address, clients=5, seconds=0.15, warmup=0.02)
    assert result.failures == {}
    assert result.starved == 0
    assert result.exchanges >= 5
    assert 0 < result.fairness <= 1
    assert result.p50_us is not None
    assert result.p99_us is not None
    assert result.longest_us is not None
    assert 0 < result.p50_us <= result.p99_us <= result.longest_us
    assert result.per_s == pytest.approx(result.exchanges / result.seconds)


def test_exchange_reads_the_processor_time_of_the_server(address: Address) -> None:
    if usage.cpu([os.getpid()]) is None:
        pytest.skip("this system has no reading of processor time by process id")
    result = load.exchange(address, 2, 0.1, 0.0, usage.Watched(server=(os.getpid(),)))
    assert result.cost.user_us is not None
    assert result.cost.user_us >= 0


def test_a_wrong_echo_is_a_failure(server: EchoServer, address: Address) -> None:
    server.spoil = bytes.upper  # type: ignore[method-assign]
    result = load.exchange(address, clients=3, seconds=0.05, warmup=0.0)
    assert result.failures == {"wrong echo": 3}
    assert (result.exchanges, result.starved, result.fairness) == (0, 3, 0.0)


def test_an_echo_in_pieces_is_whole_in_the_end(server: EchoServer, address: Address) -> None:
    client = load.Client(socket.socket(), 3)
    with client.sock:
        assert load._take(client, client.message[:10]) == ""
        assert load._take(client, client.message[10:]) is None
        assert load._take(client, b"X") == "wrong echo"
        assert load._take(client, b"") == "closed by the server"


def test_churn_counts_whole_cycles(address: Address) -> None:
    result = load.churn(address, parallel=4, seconds=0.15, warmup=0.02)
    assert result.failures == {}
    assert result.connections > 0


def test_storm_ends_with_the_last_connection(address: Address) -> None:
    result = load.storm(address, count=100, parallel=50)
    assert (result.connections, result.failures) == (100, {})


def test_clients_in_the_midst_of_a_storm_are_measured(address: Address) -> None:
    result = load.besieged(address, clients=4, count=200, parallel=20)
    assert (result.clients, result.failures, result.starved) == (4, {}, 0)
    assert result.exchanges > 4
    assert result.p99_us


def test_a_refusal_is_counted_for_each_connection() -> None:
    result = load.storm(closed_address(), count=5, parallel=2)
    assert result.connections == 0
    assert sum(result.failures.values()) == 5
    assert all(reason == "connect ECONNREFUSED" for reason in result.failures)


def test_a_silent_server_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cycle = Cycle(("127.0.0.1", listener.getsockname()[1]), 3, socket.socket.close, timeout_s=0.05)
        assert cycle.run(5.0, 3) == 0
        cycle.drain(2.0)
    assert cycle.failures == {"no echo in time": 3}
    assert cycle.latencies_s == []


def test_bulk_verifies_the_checksum(address: Address) -> None:
    result = load.bulk(address, mib=2)
    assert result.intact
    assert (result.bytes, result.failures) == (2 << 20, {})


def test_bulk_finds_one_wrong_byte(server: EchoServer, address: Address) -> None:
    seen = []

    def spoil(data: bytes) -> bytes:
        seen.append(len(data))
        return data if len(seen) != 2 else data[:-1] + bytes([data[-1] ^ 1])

    server.spoil = spoil  # type: ignore[method-assign]
    result = load.bulk(address, mib=1)
    assert not result.intact
    assert result.failures == {"wrong echo": 1}


def test_idle_keeps_its_connections_open_until_it_has_read(address: Address) -> None:
    result = load.idle(address, connections=10)
    assert (result.connections, result.failures) == (10, {})
    assert result.private_kib is None  # nothing was watched


def test_resets_then_a_normal_client(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RESET_PAUSE_S", 0.0)
    result = load.resets(address, count=5, wait=2.0)
    assert (result.resets, result.served_before, result.served) == (5, True, True)
    gone = load.resets(closed_address(), count=1, wait=0.2)
    assert not gone.served
    assert not gone.served_before
    assert gone.failures


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_round_visits_each_server_once_in_another_order(count: int) -> None:
    names = ["ours", "asyncio", "threading"][:count]
    orders = [command.order(names, turn) for turn in range(6)]
    assert all(sorted(visit) == sorted(names) for visit in orders)
    assert {visit[0] for visit in orders} == {visit[-1] for visit in orders} == set(names)


@pytest.mark.parametrize(("calm", "visits"), [(None, 1), (5.0, 3), (0.0, command.CALM_TRIES_MAX)])
def test_what_the_host_disturbs_is_measured_again(monkeypatch: pytest.MonkeyPatch, calm: float | None,
                                                  visits: int) -> None:
    shares = [0.5, 0.06, 0.04, 0.03, 0.02]

    def visit(_bench: command.Bench, measure: command.Measure, turn: int, *_more: object) -> report.Record:
        made.append(turn)
        return report.Record(turn + 1, measure.name, "ours", 0, 1.0, None, None, (), shares[len(made) - 1])

    made: list[int] = []
    monkeypatch.setattr(command.Bench, "_visit", visit)
    kind = Kind("ours", ("-c", "pass"), (), 10)
    bench = command.Bench([kind], NativePython(), argparse.Namespace(calm=calm, rounds=1, minutes=1.0))
    bench.run([command.Measure("echo64", "exchange", (), timed=True)])
    assert len(made) == visits
    assert [record.stolen for record in bench.records] == [shares[visits - 1]]


HEADER = report.Header("3.12", None, "3.11", "System", 2, "anywhere", "0.0", "2000-01-01", 2, 1.0, False,
                       {"ours": "python ours", "asyncio": "python asyncio"})


def record(turn: int, server: str, rate: float, **more: Any) -> report.Record:
    result = {"per_s": rate, "cost": {"user_us": None}, "failures": more.get("failures", {})}
    return report.Record(turn, "echo64", server, 0, 1.0, result, more.get("error"))


def test_a_ratio_is_taken_round_by_round() -> None:
    records = [record(1, "ours", 30), record(1, "asyncio", 10), record(2, "ours", 8), record(2, "asyncio", 8),
               record(3, "ours", 20), record(3, "asyncio", 10), record(4, "ours", 99)]
    summary = report.summary(records, "asyncio")["echo64"]["per_s"]
    assert summary["ours"] == {"median": 25, "min": 8, "max": 99, "ratio": 2.0}
    assert summary["asyncio"]["ratio"] == 1.0
    assert report.summary(records, "asyncio")["echo64"]["cost.user_us"] == {}


def test_marks_that_are_missed_are_told() -> None:
    good = [record(1, "ours", 1600), record(1, "asyncio", 1000)]
    assert report.check(good, "ours", "asyncio") == []
    slow = [record(1, "ours", 1300), record(1, "asyncio", 1000)]
    assert report.check(slow, "ours", "asyncio") == ["echo64, per_s: 1.30, not at least 1.4 of asyncio's"]
    alone = [record(1, "ours", 1300)]
    assert report.check(alone, "ours", "asyncio") == ["echo64, per_s: ?, not at least 1.4 of asyncio's"]
    failing = [record(1, "ours", 1600, failures={"wrong echo": 2}), record(1, "asyncio", 1000)]
    assert report.check(failing, "ours", "asyncio") == ["echo64: 2 failed"]


def test_the_report_shows_failures_deaths_and_a_dead_listener() -> None:
    deaf = {"served_before": True, "served": False}
    records = [record(1, "ours", 30, failures={"no echo in time": 2}),
               record(1, "asyncio", 10, error="the server died"),
               report.Record(1, "resets", "ours", 0, 1.0, {"served_before": True, "served": True}, None),
               report.Record(1, "resets", "asyncio", 1, 1.0, deaf, None, ("Boo",))]
    text = report.table(HEADER, records, "asyncio")
    assert "failed: echo64, ours: 2 x no echo in time" in text
    assert "failed: echo64, asyncio: 1 x the server died" in text
    assert "asyncio accepts nobody any more" in text
    assert "ours accepts nobody" not in text
    assert "ours/asyncio" in text
    assert "the host kept" not in text
    known = [dataclasses.replace(one, stolen=share)
             for one, share in zip(records, (0.0, 0.1, 0.0, 0.3), strict=True)]
    kept = "the host kept 10.0 % of the processors' time for others, 30.0 % in the worst measure"
    assert kept in report.table(HEADER, known, "asyncio")


def test_the_json_holds_every_raw_round() -> None:
    records = [record(turn, server, 10) for turn in (1, 2) for server in ("ours", "asyncio")]
    loaded = json.loads(json.dumps(report.as_json(HEADER, records, "asyncio")))
    assert set(loaded) == {"schema", "header", "baseline", "rounds", "summary"}
    assert [(one["round"], one["server"]) for one in loaded["rounds"]] == [
        (1, "ours"), (1, "asyncio"), (2, "ours"), (2, "asyncio")]
    assert loaded["rounds"][0]["result"]["per_s"] == 10


def test_hotspots_are_for_one_exchange_and_sorted_by_own_time() -> None:
    rows = [["small", 10, 0.001, 0.005], ["large", 30, 0.002, 0.002]]
    lines = hotspots.table(rows, exchanges=10).splitlines()
    assert lines[2].split() == ["3.000", "200.00", "200.00", "large"]
    assert lines[3].split() == ["1.000", "100.00", "500.00", "small"]
    assert lines[4].split() == ["4.000", "all", "calls"]


def test_the_use_of_a_process_that_is_gone_is_not_known() -> None:
    gone = 2**31 - 7
    assert usage.cpu([gone]) is None
    assert usage.memory([os.getpid(), gone]) is None
    assert usage.memory([]) is None
    assert usage.Meter(usage.Watched(server=(gone,))).cost(10) == usage.Cost()


def test_what_the_host_keeps_is_a_share_of_all_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (usage.stolen_s() is not None) == (sys.platform == "linux")
    monkeypatch.setattr(usage, "stolen_s", lambda: 7.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert usage.stolen_share(5.0, 10.0) == pytest.approx(0.05)
    assert usage.stolen_share(None, 10.0) is None


class SecureEcho(Echo):
    """The same over TLS."""

    def handle(self) -> None:
        context: ssl.SSLContext = self.server.context  # type: ignore[attr-defined]
        with contextlib.suppress(OSError), context.wrap_socket(self.request, server_side=True) as secured:
            self.request = secured
            super().handle()


@pytest.fixture
def secure_address(server: EchoServer) -> Address:
    server.RequestHandlerClass = SecureEcho
    server.context = server_context()  # type: ignore[attr-defined]
    return ("127.0.0.1", server.server_address[1])


def test_exchanges_over_tls_are_counted(secure_address: Address) -> None:
    watched = usage.Watched((os.getpid(),))
    result = tls.exchange(secure_address, 0.1, watched, clients=5)
    assert result.failures == {}
    assert result.done >= 5
    assert result.rate == pytest.approx(result.done / result.seconds)


def test_handshakes_are_counted_and_failures_too(server: EchoServer, secure_address: Address) -> None:
    result = tls.handshakes(secure_address, 0.1)
    assert result.failures == {}
    assert result.done >= 1
    server.RequestHandlerClass = Echo  # which sends the client's own hello back
    result = tls.handshakes(secure_address, 0.05)
    assert result.done == 0
    assert sum(result.failures.values()) >= 1


def test_the_report_over_tls_pairs_rounds() -> None:
    ours, theirs = tls.Round(300, 1.0, 10.0, {}), tls.Round(100, 1.0, 20.0, {"OSError": 1})
    results = {tls.OURS: [ours, ours], tls.THEIRS: [theirs, theirs]}
    assert tls.ratios(results) == [3.0, 3.0]
    text = tls.report("tls64", results)
    assert "ratio of rates: 3.00 (3.00 to 3.00)" in text
    assert "ratio of user CPU: 0.50" in text
    assert "failed: {'OSError': 2}" in text


@pytest.mark.parametrize("arguments", [["--against", "nobody"], ["--measures", "nothing"], ["--rounds", "0"],
                                       ["--variant", "x"], ["--variant", "ours=--io-threads 1"],
                                       ["--profile", "nobody"], ["--check", "--against", "threading"],
                                       ["--calm", "-1"], ["--calm", "101"], ["--calm", "nan"]])
def test_wrong_arguments_end_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parse(arguments)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_variants_of_ours_are_servers_of_their_own() -> None:
    _, kinds, measures = command.parse(["--ours=--io-threads 1", "--variant", "two=--io-threads 2",
                                        "--against", "asyncio", "--measures", "bulk,echo64"])
    assert [kind.name for kind in kinds] == ["ours", "two", "asyncio"]
    assert kinds[1].arguments[-2:] == ("--io-threads", "2")
    assert [measure.name for measure in measures] == ["echo64", "bulk"]


@pytest.mark.parametrize(("processors", "servers", "generator"),
                         [({0, 1}, [0], [1]), ({5, 2, 3}, [2], [3, 5]), ({4}, [4], [4])])
def test_servers_get_one_processor_and_the_load_generator_the_others(
        processors: set[int], servers: list[int], generator: list[int]) -> None:
    assert placement.sides(processors) == (servers, generator)


def test_free_placement_moves_nothing() -> None:
    assert placement.take_sides("free") is None
    placement.move([os.getpid()], [], None)
    assert "left to the system" in placement.described(None)


if sys.platform == "linux":

    class PlacedPython(NativePython):
        """Notes on which processors what it starts begins: under Wine all threads to come will be there."""

        def popen(self, args: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
            self.began_at = os.sched_getaffinity(0)
            return super().popen(args, **options)

    @pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="with one processor there are no two sides")
    @pytest.mark.parametrize(("choice", "policy"), [("split", os.SCHED_OTHER), ("prompt", os.SCHED_RR)])
    def test_a_server_begins_and_is_at_its_place_with_all_threads_and_the_load_generator_is_not(
            choice: str, policy: int) -> None:
        before = os.sched_getaffinity(0)
        if choice == "prompt" and not placement._may_be_prompt():
            pytest.skip("this user may not start real-time threads")
        kind = Kind("threading", ("-m", "bench.peers.threading_server"))
        try:
            place = placement.take_sides(choice)
            assert place is not None
            starter = PlacedPython()
            server = Server(kind, starter, "placed", place)
            server.start()
            try:
                assert starter.began_at == set(place.processors)
                (pid,) = server.watched().server
                tasks = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
                assert tasks
                assert all(os.sched_getaffinity(task) == set(place.processors) for task in tasks)
                assert all(os.sched_getscheduler(task) == policy for task in tasks)
                assert os.sched_getaffinity(0) == before - set(place.processors)
                assert os.sched_getscheduler(0) == os.SCHED_OTHER
            finally:
                server.end()
        finally:
            os.sched_setaffinity(0, before)
