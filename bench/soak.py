"""`python -m bench.soak [--hours H]`: nodes with churn and load for hours; what grows in those never restarted.

Rules: NODES nodes, SERVERS of which serve; the last CHURNED are killed (-9) and started again in turn, the rest never.
RSS, descriptors and threads come from the system, tasks from the node's own status. A slope is Theil-Sen's (the median
of the slopes of all pairs of samples), an hour's worth, without the first SETTLE_S, in which caches fill. It counts as
flat below the bound of its row. The exit code is 1 when something grows or a log holds a traceback.
Source: Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from bench.harness import Options, Row, report
from bench.real_clients import ERROR, REFUSED, RESULT, UNRESOLVED, Client, DoorNow, Request
from bench.real_swarm import tracebacks
from node.commands.processes import Cluster, NodeProcess

NODES, SERVERS, CHURNED = 8, 2, 3
START_S_MAX = 900.0  # on a busy machine
HOURS, HOURS_QUICK = 2.0, 1.5 / 60
CHURN_EVERY_S = 60.0
AWAY_S = 10.0
SAMPLE_EVERY_S, SAMPLE_EVERY_QUICK_S = 15.0, 3.0
SETTLE_S, SETTLE_QUICK_S = 600.0, 20.0
ASK_EVERY_S = 1.0
MIB = 1 << 20
# what an hour may add: a tenth of a node without a model; more than the noise of the peers that come and go
FLAT = {"rss_mb": 12.0, "descriptors": 6.0, "threads": 3.0, "tasks": 30.0}


@dataclass(slots=True, kw_only=True)
class Series:
    """Samples of one node: at (s from the start), and each quantity."""

    name: str
    at_s: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FLAT})

    def take(self, node: NodeProcess, http: httpx.Client, now_s: float) -> None:
        """One sample. Raises what httpx raises."""
        status = http.get(f"{node.url}/api/v1/status").json()["node"]
        process = psutil.Process(node.process.pid)
        self.at_s.append(now_s)
        self.values["rss_mb"].append(process.memory_info().rss / MIB)
        self.values["descriptors"].append(float(process.num_fds()))
        self.values["threads"].append(float(process.num_threads()))
        self.values["tasks"].append(float(status["tasks"]))

    def settled(self, quantity: str, settle_s: float) -> list[tuple[float, float]]:
        """(hours, value) without the first settle_s."""
        pairs = zip(self.at_s, self.values[quantity], strict=True)
        return [(at_s / 3600, value) for at_s, value in pairs if at_s >= settle_s]


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes of all pairs of points; 0 for fewer than two."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2) if x2 != x1]
    return statistics.median(slopes) if slopes else 0.0


class Soak:
    """The nodes, who asks them, and who restarts them."""

    def __init__(self, cluster: Cluster, count: int, servers: int, seed: int) -> None:
        """Starts all and waits until they are ready."""
        self._cluster, self._rng = cluster, random.Random(seed)
        names = [f"server{n}" if n < servers else f"door{n}" for n in range(count)]
        self._seed_address = cluster.reserve(names[0])
        self.nodes = {name: self._start(name) for name in names}
        for node in self.nodes.values():
            node.wait_ready(START_S_MAX)
        self.steady = names[: count - CHURNED]
        self._churned = itertools.cycle(names[count - CHURNED :])
        self._away: tuple[str, float] | None = None
        self.restarts = 0

    def _start(self, name: str) -> NodeProcess:
        model = () if name.startswith("server") else ("--model", "none")
        return self._cluster.start(name, *model, join=[self._seed_address])

    def doors(self) -> list[DoorNow]:
        """Doors that are asked: those never restarted."""
        return [
            DoorNow(name=name, url=self.nodes[name].url, killed=lambda: False)
            for name in self.steady
            if name.startswith("door")
        ]

    def churn(self, now: float) -> None:
        """Kill the next one; its start is `back`'s."""
        name = next(self._churned)
        node = self.nodes[name]
        node.process.kill()
        node.process.wait()
        self._cluster.nodes.remove(node)
        self._away = (name, now + AWAY_S)

    def back(self, now: float) -> None:
        """Start who is away and due."""
        if self._away is not None and now >= self._away[1]:
            self.nodes[self._away[0]] = self._start(self._away[0])
            self.restarts += 1
            self._away = None


class Paced(Client):
    """A client that asks once in ASK_EVERY_S, or as soon as its last answer has ended."""

    def run(self, done: threading.Event) -> None:
        """Ask until done."""
        with httpx.Client(trust_env=False, timeout=60.0) as http:
            while not done.is_set():
                due = time.monotonic() + ASK_EVERY_S
                self.ask(http, self._rng.choice(self._doors()))
                done.wait(max(0.0, due - time.monotonic()))


def main() -> int:
    """Soak, fit, report; 0 when all is flat."""
    chosen = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are ended
    quick = chosen.quick
    hours = chosen.hours or (HOURS_QUICK if quick else HOURS)
    settle_s = SETTLE_QUICK_S if quick else min(SETTLE_S, hours * 3600 / 3)
    with tempfile.TemporaryDirectory(prefix="openagi-soak-") as place, Cluster(Path(place)) as cluster:
        soak = Soak(cluster, chosen.nodes, chosen.servers, chosen.seed)
        client = Paced(soak.doors, chosen.seed)
        series = endured(soak, client, hours, SAMPLE_EVERY_QUICK_S if quick else SAMPLE_EVERY_S)
        found = tracebacks(cluster.root)
    figures = rows(series, client.requests, soak.restarts, found, hours, settle_s)
    report("soak", figures, Options(quick=quick, json_path=chosen.json))
    for text in found[:5]:
        print(f"TRACEBACK {text}", file=sys.stderr)
    for why, count in Counter(one.why[:160] for one in client.requests if one.end != RESULT).most_common(8):
        print(f"{count} requests: {why or 'left'}")
    growing = {} if quick else grown(series, settle_s)
    for name, slope in growing.items():
        print(f"GROWS: {name} by {slope:.3g} an hour")
    wrong = growing or found or any(one.end == UNRESOLVED for one in client.requests)
    print("verdict: " + ("not flat, or something went wrong" if wrong else "flat"))
    return 1 if wrong else 0


def endured(soak: Soak, client: Paced, hours: float, sample_every_s: float) -> list[Series]:
    """Load, churn and sample for so long."""
    done = threading.Event()
    asking = threading.Thread(target=client.run, args=(done,), daemon=True)
    asking.start()
    series = [Series(name=name) for name in soak.steady]
    began = time.monotonic()
    next_churn, next_sample = began + CHURN_EVERY_S, began
    with httpx.Client(trust_env=False, timeout=60.0) as http:
        while (now := time.monotonic()) - began < hours * 3600:
            soak.back(now)
            if now >= next_churn:
                next_churn += CHURN_EVERY_S
                soak.churn(now)
            if now >= next_sample:
                next_sample += sample_every_s
                for one in series:
                    one.take(soak.nodes[one.name], http, now - began)
            time.sleep(0.2)
    done.set()
    asking.join(timeout=180.0)
    return series


def grown(series: list[Series], settle_s: float) -> dict[str, float]:
    """What is not flat: "node quantity" -> slope an hour."""
    slopes = {
        f"{one.name} {quantity}": theil_sen(one.settled(quantity, settle_s)) for one in series for quantity in FLAT
    }
    return {name: slope for name, slope in slopes.items() if slope > FLAT[name.split()[1]]}


def rows(
    series: list[Series], requests: list[Request], restarts: int, found: list[str], hours: float, settle_s: float
) -> list[Row]:
    """The figures: of each quantity the worst node's slope, and where it ended."""
    ends = Counter(one.end for one in requests)
    made = [
        Row(figure="hours", value=hours, unit="h", better="higher"),
        Row(figure="restarts", value=restarts, unit="of other nodes", better="higher"),
        Row(figure="requests", value=ends.total(), unit="asked", better="higher"),
        Row(figure="results", value=ends[RESULT], unit="requests", better="higher"),
        Row(figure="refused_or_error", value=ends[REFUSED] + ends[ERROR], unit="requests", better="lower"),
        Row(figure="unresolved", value=ends[UNRESOLVED], unit="requests", better="lower"),
        Row(figure="tracebacks", value=len(found), unit="in logs", better="lower"),
    ]
    for quantity in FLAT:
        slopes = [theil_sen(one.settled(quantity, settle_s)) for one in series]
        last = max(one.values[quantity][-1] for one in series)
        made.append(Row(figure=f"{quantity}_per_hour", value=max(slopes), unit="worst node", better="lower"))
        made.append(Row(figure=f"{quantity}_at_end", value=last, unit="largest", better="lower"))
    return made


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="90 s; slopes are told, not judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--hours", type=float, default=0.0, help=f"how long (default {HOURS:g})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=NODES, help="processes in all")
    parser.add_argument("--servers", type=int, default=SERVERS, help="of them with a model")
    chosen = parser.parse_args()
    if not 1 <= chosen.servers < chosen.nodes - CHURNED:
        parser.error(
            f"--servers {chosen.servers} --nodes {chosen.nodes} came, wanted 1 and {CHURNED + 1} more nodes at least"
        )
    return chosen


if __name__ == "__main__":
    sys.exit(main())
