"""`python -m bench.limits`: a real node with --api-keys under clients that ask too much, too slowly, and too largely.

Rules: node, flooder and honest client are processes of their own on one machine, so the flooder's own work slows the
others too, and what the honest client sees is an upper bound. It has a key of its own, and asks for one token again and
again. Attackers have six addresses of loopback, since a node takes at most 256 connections of one. Memory is the node's
RSS, at its highest while the body is sent.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from bench.harness import ANEW, Row, options, quantile, report
from node.commands.processes import Cluster, NodeProcess

MIB = 1 << 20
RATE_PER_S = 1000
DRIBBLERS = 600
LARGE_BYTES = 300_000_000
EVERY_S = 0.05  # between the honest client's requests
BODY = {"prompt": "Once upon a time", "max_tokens": 1, "temperature": 0}


def key_of(node: Path, name: str, limit: str, concurrent: int) -> str:
    """Make an API key of a node by its command."""
    words = [
        "keys",
        "create",
        "--data-dir",
        str(node),
        "--name",
        name,
        "--limit",
        limit,
        "--concurrent",
        str(concurrent),
    ]
    return subprocess.run(
        [sys.executable, "-m", "node", *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@contextmanager
def attacker(node: NodeProcess, kind: str, key: str, amount: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """The other end, at work."""
    parts = urlsplit(node.url)
    words = [kind, str(parts.hostname), str(parts.port), key, str(amount), str(seconds)]
    command = [sys.executable, "-m", "bench.limits_end", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("go\n")
            process.stdin.flush()
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What an attacker saw, when it has ended."""
    assert process.stdout is not None
    seen: dict[str, Any] = json.loads(process.stdout.readline())
    return seen


def honest_ms(node: NodeProcess, key: str, seconds: float) -> list[float]:
    """Milliseconds of each honest request; all must be answered."""
    times, until = [], time.monotonic() + seconds
    headers = {**ANEW, "authorization": f"Bearer {key}"}
    with httpx.Client(base_url=node.url, headers=headers, timeout=60) as client:
        while time.monotonic() < until:
            began = time.perf_counter()
            client.post("/v1/completions", json=BODY).raise_for_status()
            times.append(1000 * (time.perf_counter() - began))
            time.sleep(EVERY_S)
    return times


def large_ms(node: NodeProcess, key: str) -> tuple[float, float]:
    """Milliseconds until a body of LARGE_BYTES is refused, and MiB that the node grew by meanwhile."""
    process = psutil.Process(node.process.pid)
    before, began = process.memory_info().rss, time.perf_counter()
    highest = before

    def body() -> Iterator[bytes]:
        nonlocal highest
        for _ in range(LARGE_BYTES // MIB):
            yield bytes(MIB)
            highest = max(highest, process.memory_info().rss)

    headers = {"authorization": f"Bearer {key}", "content-length": str(LARGE_BYTES // MIB * MIB)}
    with httpx.Client(base_url=node.url, timeout=60) as client:
        try:
            with client.stream("POST", "/v1/completions", content=body(), headers=headers) as response:
                refused = 1000 * (time.perf_counter() - began)
                assert response.status_code == 413, response.status_code
        except httpx.WriteError:  # cut off after the drain, which is as well
            refused = 1000 * (time.perf_counter() - began)
    return refused, (max(highest, process.memory_info().rss) - before) / MIB


def declared_ms(node: NodeProcess, key: str) -> float:
    """Milliseconds until a head that declares LARGE_BYTES is answered 413, before any of the body is sent."""
    parts = urlsplit(node.url)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as sock:
        began = time.perf_counter()
        sock.sendall(f"{head}content-length: {LARGE_BYTES}\r\n\r\n".encode())
        assert b" 413 " in sock.recv(4096)
        return 1000 * (time.perf_counter() - began)


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    seconds = 10.0 if chosen.quick else 60.0
    with tempfile.TemporaryDirectory() as place, Cluster(Path(place)) as cluster:
        folder = Path(place) / "node"
        poor, rich = key_of(folder, "poor", "5/s", 2), key_of(folder, "rich", "1000/s", 1000)
        node = cluster.start("node", "--api-keys").wait_ready()
        honest_ms(node, rich, 3.0)  # its memory settles
        calm = honest_ms(node, rich, seconds)
        with attacker(node, "flood", poor, RATE_PER_S, seconds) as process:
            beside = honest_ms(node, rich, seconds - 1.0)
            flood = told(process)
        with attacker(node, "dribble", rich, DRIBBLERS, 40.0) as process:
            time.sleep(5.0)
            slow = honest_ms(node, rich, 30.0)
            dribbled = told(process)
        large = [large_ms(node, rich) for _ in range(3)]
        declared = statistics.median(declared_ms(node, rich) for _ in range(5))
    report("limits", _rows(calm, beside, flood, slow, large, declared, dribbled), chosen)


def _rows(
    calm: list[float],
    beside: list[float],
    flood: dict[str, Any],
    slow: list[float],
    *more: Any,
) -> list[Row]:
    large, declared, dribbled = more
    asked = sum(flood["statuses"].values())
    rival = "without an attack"
    calm_p99, calm_p50 = quantile(calm, 0.99), statistics.median(calm)
    return [
        Row(figure="flood_asked", value=flood["per_s"], unit=f"requests/s of {RATE_PER_S}", better="higher"),
        Row(
            figure="flood_refused",
            value=100 * flood["statuses"].get("429", 0) / asked,
            unit="% answered 429",
            better="higher",
        ),
        Row(
            figure="flood_answer_p50",
            value=1000 * statistics.median(flood["times_s"]),
            unit="ms",
            better="lower",
        ),
        Row(
            figure="flood_honest_p50",
            value=statistics.median(beside),
            unit="ms",
            better="lower",
            rival=rival,
            rival_value=calm_p50,
        ),
        Row(
            figure="flood_honest_p99",
            value=quantile(beside, 0.99),
            unit="ms",
            better="lower",
            rival=rival,
            rival_value=calm_p99,
        ),
        Row(figure="dribble_opened", value=dribbled["opened"], unit="connections", better="higher"),
        Row(
            figure="dribble_honest_p99",
            value=quantile(slow, 0.99),
            unit="ms",
            better="lower",
            rival=rival,
            rival_value=calm_p99,
        ),
        Row(figure="large_refused", value=statistics.median(ms for ms, _ in large), unit="ms", better="lower"),
        Row(figure="large_declared_refused", value=declared, unit="ms", better="lower"),
        Row(figure="large_memory", value=max(mib for _, mib in large), unit="MiB", better="lower"),
    ]


if __name__ == "__main__":
    main()
