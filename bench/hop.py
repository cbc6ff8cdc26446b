"""`python -m bench.hop`: what a hop through a peer adds to a request, over libp2p on loopback.

Rules: two nodes; the same 1-token completion is asked of the one that holds the model and of the one that does not,
turn by turn in the same run, over connections that stay open. The figure is the difference of the medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import httpx

from bench.harness import ANEW, Row, options, quantile, report
from node.commands.processes import Cluster, NodeProcess

PROMPT = "Once upon a time"
WARM = 10
FOUND_S_MAX = 60.0


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    rounds = 60 if chosen.quick else 400
    with tempfile.TemporaryDirectory() as place, Cluster(Path(place)) as cluster:
        address = cluster.reserve("server")
        server = cluster.start("server")
        door = cluster.start("door", "--model", "none", join=[address])
        for node in (server, door):
            node.wait_ready()
        wait_found(door)
        with httpx.Client() as client:
            first, whole = {}, {}
            for node in (server, door):
                for _ in range(WARM):
                    first_byte_ms(client, node)
            pairs = [(first_byte_ms(client, server), first_byte_ms(client, door)) for _ in range(rounds)]
            first = {"local": [a for a, _ in pairs], "peer": [b for _, b in pairs]}
            whole = {node.name: requests_per_s(client, node, rounds) for node in (server, door)}
            cached = {node.name: embeddings_per_s(client, node, rounds) for node in (server, door)}
    added = statistics.median(first["peer"]) - statistics.median(first["local"])
    rows = [
        Row(figure="first_byte_local_p50_ms", value=statistics.median(first["local"]), unit="ms", better="lower"),
        Row(figure="first_byte_peer_p50_ms", value=statistics.median(first["peer"]), unit="ms", better="lower"),
        Row(figure="first_byte_added_p50_ms", value=added, unit="ms", better="lower"),
        Row(
            figure="first_byte_added_p99_ms",
            value=quantile(first["peer"], 0.99) - quantile(first["local"], 0.99),
            unit="ms",
            better="lower",
        ),
        Row(figure="completion_1_token_local_rps", value=whole["server"], unit="1/s", better="higher"),
        Row(figure="completion_1_token_peer_rps", value=whole["door"], unit="1/s", better="higher"),
        Row(figure="embedding_local_rps", value=cached["server"], unit="1/s", better="higher"),
        Row(figure="embedding_peer_rps", value=cached["door"], unit="1/s", better="higher"),
    ]
    report("hop", rows, chosen)


def wait_found(door: NodeProcess) -> None:
    """Until the door knows a peer that serves."""
    until = time.monotonic() + FOUND_S_MAX
    while not httpx.get(f"{door.url}/v1/models").json()["data"]:
        if time.monotonic() > until:
            raise SystemExit(f"the door found no peer within {FOUND_S_MAX:.0f} s:\n{door.log[-2000:]}")
        time.sleep(0.05)


def first_byte_ms(client: httpx.Client, node: NodeProcess) -> float:
    """Milliseconds from sending a 1-token streaming request to the first text."""
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "stream": True}
    began = time.perf_counter()
    with client.stream("POST", f"{node.url}/v1/completions", json=body, headers=ANEW) as response:
        response.raise_for_status()
        first = None
        for line in response.iter_lines():
            if first is None and line.startswith("data: ") and '"text"' in line:
                first = time.perf_counter()
    assert first is not None, "no event came"
    return (first - began) * 1000


def requests_per_s(client: httpx.Client, node: NodeProcess, rounds: int) -> float:
    """1-token completions a second, one after the other on one connection."""
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    began = time.perf_counter()
    for _ in range(rounds):
        client.post(f"{node.url}/v1/completions", json=body, headers=ANEW).raise_for_status()
    return rounds / (time.perf_counter() - began)


def embeddings_per_s(client: httpx.Client, node: NodeProcess, rounds: int) -> float:
    """Embeddings of one short text a second, one after the other on one connection; kept after the first."""
    began = time.perf_counter()
    for _ in range(rounds):
        client.post(f"{node.url}/v1/embeddings", json={"input": PROMPT}).raise_for_status()
    return rounds / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
