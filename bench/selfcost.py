"""`python -m bench.selfcost`: what a node's self-state and memory cost, under a steady load and while it waits.

Rules: two nodes of the default model, one as it comes and one with --no-memory, are there together; the same load goes
to one and then to the other in turns, the other one idle, so that what the machine does besides meets both. The load is
CLIENTS clients that each ask again as soon as they are answered. Shares are CPU time that the parts counted
(thread_time around all they do, `cost` of GET /api/v1/self) over the CPU time of the process in the same turn; what
the machine's other work takes does not count there. Beside them the CPU time of a token at both nodes: its difference
is all that the counting may have missed, and noise. The median of turns stands.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil

from bench.harness import ANEW, Options, Row, options, report
from node.commands.processes import Cluster, NodeProcess

CLIENTS: Final = 4
TOKENS: Final = 48  # of an answer
WARM_S: Final = 3.0
PATIENCE_S: Final = 120.0
PARTS: Final = ("memory", "state", "sampler", "looks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A stretch of one node. parts: CPU seconds of each part of its self-state."""

    cpu_s: float
    wall_s: float
    tokens: int
    requests: int
    parts: dict[str, float]

    @property
    def share(self) -> float:
        """Of the CPU time, all parts together."""
        return sum(self.parts.values()) / self.cpu_s if self.cpu_s else 0.0


def cpu_s(node: NodeProcess) -> float:
    """User and system time of a node since its start."""
    times = psutil.Process(node.process.pid).cpu_times()
    return float(times.user + times.system)


def costs(node: NodeProcess) -> dict[str, float]:
    """CPU seconds of the parts since the node's start; none without a memory."""
    answer = httpx.get(f"{node.url}/api/v1/self", timeout=PATIENCE_S)
    if answer.status_code != 200:
        return {}
    return {part: float(cost["cpu_s"]) for part, cost in answer.json()["cost"].items()}


def asked(node: NodeProcess, until: float, number: int) -> tuple[int, int]:
    """One client until then; (tokens, requests)."""
    tokens = requests = 0
    with httpx.Client(timeout=PATIENCE_S, headers=ANEW) as client:
        while time.monotonic() < until:
            body = {"model": "default", "prompt": f"Once {number} upon {requests}", "max_tokens": TOKENS}
            answer = client.post(f"{node.url}/v1/completions", json=body)
            answer.raise_for_status()
            tokens += int(answer.json()["usage"]["completion_tokens"])
            requests += 1
    return tokens, requests


def turn(node: NodeProcess, seconds: float, *, is_loaded: bool) -> Turn:
    """Watch a node for so long."""
    before, cpu_before, began = costs(node), cpu_s(node), time.monotonic()
    tokens = requests = 0
    if is_loaded:
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in pool.map(lambda number: asked(node, began + seconds, number), range(CLIENTS)):
                tokens, requests = tokens + done[0], requests + done[1]
    else:
        threading.Event().wait(seconds)
    wall_s, took_s, after = time.monotonic() - began, cpu_s(node) - cpu_before, costs(node)
    parts = {part: after[part] - before.get(part, 0.0) for part in after}
    return Turn(cpu_s=took_s, wall_s=wall_s, tokens=tokens, requests=requests, parts=parts)


def measure(chosen: Options) -> list[Row]:
    """All figures."""
    turns, seconds, idle_s = (2, 15.0, 20.0) if chosen.quick else (6, 30.0, 120.0)
    with tempfile.TemporaryDirectory() as place, Cluster(Path(place)) as cluster:
        kept, plain = cluster.start("kept"), cluster.start("plain", "--no-memory")
        for node in (kept, plain):
            node.wait_ready()
            turn(node, WARM_S, is_loaded=True)
        served: dict[str, list[Turn]] = {"kept": [], "plain": []}
        for number in range(turns):
            pairs = [("kept", kept), ("plain", plain)]
            for name, node in pairs if number % 2 == 0 else reversed(pairs):
                served[name].append(turn(node, seconds, is_loaded=True))
        with ThreadPoolExecutor(2) as pool:
            idle, idle_plain = pool.map(lambda node: turn(node, idle_s, is_loaded=False), (kept, plain))
        written = httpx.get(f"{kept.url}/api/v1/self", timeout=PATIENCE_S).json()["memory"]
    return [*serving_rows(served), *idle_rows(idle, idle_plain), *memory_rows(written)]


def serving_rows(served: dict[str, list[Turn]]) -> list[Row]:
    """While it serves."""
    kept, plain = served["kept"], served["plain"]
    token_ms, plain_ms = (
        statistics.median(1000 * each.cpu_s / each.tokens for each in turns) for turns in (kept, plain)
    )
    requests_s = statistics.median(each.requests / each.wall_s for each in kept)
    unit = f"% of the process's CPU, {requests_s:.1f} requests/s"
    rows = [
        Row(
            figure="serving_share_percent",
            value=100 * statistics.median(each.share for each in kept),
            unit=unit,
            better="lower",
        )
    ]
    for part in PARTS:
        shares = [each.parts.get(part, 0.0) / each.cpu_s for each in kept]
        row = Row(figure=f"serving_{part}_percent", value=100 * statistics.median(shares), unit=unit, better="lower")
        rows.append(row)
    rival = "--no-memory"
    rows.append(
        Row(
            figure="cpu_ms_a_token", value=token_ms, unit="ms", better="lower", rival=rival, rival_value=plain_ms
        )
    )  # fmt: skip
    return rows


def idle_rows(idle: Turn, plain: Turn) -> list[Row]:
    """While nobody asks, without peers."""
    return [
        Row(
            figure="idle_cpu_percent",
            value=100 * idle.cpu_s / idle.wall_s,
            unit="% of one CPU",
            better="lower",
            rival="--no-memory",
            rival_value=100 * plain.cpu_s / plain.wall_s,
        ),
        *(
            Row(
                figure=f"idle_{part}_percent",
                value=100 * idle.parts.get(part, 0.0) / idle.wall_s,
                unit="% of one CPU",
                better="lower",
            )
            for part in PARTS
        ),
    ]


def memory_rows(told: dict[str, int]) -> list[Row]:
    """What it has written by then."""
    return [
        Row(figure="entries", value=told["entries"], unit="events", better="lower"),
        Row(figure="bytes", value=told["bytes"], unit="B", better="lower"),
    ]


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    report("selfcost", measure(chosen), chosen)


if __name__ == "__main__":
    main()
